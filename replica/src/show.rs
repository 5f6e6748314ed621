//! `anabranch-replica status`: asks the running replica over its local HTTP interface, and prints the answer.

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use anabranch_replica::{Config, config::Address};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use crate::{BAD_CONFIG, DEFINITE_ERROR};

/// It answers from memory, so this is generous.
const PATIENCE: Duration = Duration::from_secs(5);

/// A status with tens of thousands of tables.
const ANSWER_BYTES_MAX: usize = 16 << 20;

pub async fn status(config: &Config, json: bool) -> ExitCode {
    let Some(address) = &config.http else {
        eprintln!(
            "`http` is off in the config, so there is nobody to ask; the view _anabranch_status in {} tells the same",
            config.database.display()
        );
        return ExitCode::from(BAD_CONFIG);
    };
    let answer = match tokio::time::timeout(PATIENCE, ask(address)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {PATIENCE:?}")),
    };
    match answer {
        Ok(status) if json => println!("{status:#}"),
        Ok(status) => print!("{}", describe(&status)),
        Err(what) => {
            eprintln!("asking the replica at {address}: {what}; is it running?");
            return ExitCode::from(DEFINITE_ERROR);
        }
    }
    ExitCode::SUCCESS
}

async fn ask(address: &Address) -> Result<Value, String> {
    match address {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address)
                .await
                .map_err(|error| error.to_string())?;
            get(stream, &address.to_string()).await
        }
        Address::Unix(path) => {
            let stream = UnixStream::connect(path)
                .await
                .map_err(|error| error.to_string())?;
            get(stream, "localhost").await
        }
    }
}

async fn get(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    host: &str,
) -> Result<Value, String> {
    let text = |error: hyper::Error| error.to_string();
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(text)?;
    let request = Request::get("/status")
        .header("host", host)
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    // The sender goes with the exchange, and the connection with the sender.
    let exchange = async move {
        let mut sender = sender;
        let response = sender.send_request(request).await.map_err(text)?;
        let code = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        let bytes = body
            .collect()
            .await
            .map_err(|error| error.to_string())?
            .to_bytes();
        if !code.is_success() {
            return Err(format!("it answers {code}"));
        }
        serde_json::from_slice(&bytes).map_err(|_| "what answers there is no replica".to_owned())
    };
    let (answer, _) = tokio::join!(exchange, connection);
    answer
}

/// For people: what matters first.
fn describe(status: &Value) -> String {
    let text = |key: &str| match &status[key] {
        Value::Null => "–".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let yes = |key: &str| status[key] == Value::Bool(true);
    let state = if yes("caught_up") {
        "up to date".to_owned()
    } else if !yes("connected") {
        format!("not connected since {}", text("connected_changed"))
    } else if !yes("source_connected") {
        "connected, but the streamer has lost Postgres".to_owned()
    } else if status["position"].is_null() {
        "connected, first copy under way".to_owned()
    } else {
        "connected, catching up".to_owned()
    };
    let mut lines = vec![
        ("state", state),
        ("position", text("position")),
        (
            "committed",
            format!("{} (in Postgres)", text("commit_time")),
        ),
        ("received", text("received_time")),
        (
            "lag",
            status["lag_ms"]
                .as_u64()
                .map_or_else(|| "–".into(), |ms| format!("{ms} ms")),
        ),
        (
            "writes",
            format!("{} pending, {} rejected", text("pending"), text("rejected")),
        ),
        ("streamer", text("streamer")),
        ("database", text("database")),
        (
            "replica",
            format!("{} (version {})", text("replica_id"), text("version")),
        ),
    ];
    if !status["last_error"].is_null() {
        lines.insert(1, ("trouble", text("last_error")));
    }
    let mut out = String::new();
    for (name, value) in lines {
        // Writing to a String can't fail.
        let _ = writeln!(out, "{name:<10} {value}");
    }
    for table in status["tables"].as_array().into_iter().flatten() {
        let field = |key: &str| table[key].as_str().unwrap_or_default();
        let _ = writeln!(
            out,
            "{:<10} {} {} {}",
            "table",
            field("table"),
            field("state"),
            field("reason")
        );
    }
    out
}
