//! As much of an HTTP client as tests need: one request, one answer, one connection.

use std::time::Duration;

use anyhow::{Context, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, header, http::request::Builder};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long an answer may take to start. What waits on purpose (`/wait`, `/flush`) is asked by [`send`].
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// `200`, `503`, …
    pub status: u16,
    /// As text.
    pub body: String,
}

impl Answer {
    /// Its body, if the status is a success.
    pub fn ok(self) -> anyhow::Result<String> {
        ensure!(
            (200..300).contains(&self.status),
            "status {}: {}",
            self.status,
            self.body
        );
        Ok(self.body)
    }

    /// Its body as JSON, if the status is a success.
    pub fn json(self) -> anyhow::Result<serde_json::Value> {
        let body = self.ok()?;
        serde_json::from_str(&body).with_context(|| format!("not JSON: {body}"))
    }
}

/// GETs a path, such as `/status`, from `host:port`.
pub async fn get(address: &str, path: &str) -> anyhow::Result<Answer> {
    ask(address, path, Request::get(path)).await
}

/// POSTs nothing to a path.
pub async fn post(address: &str, path: &str) -> anyhow::Result<Answer> {
    ask(address, path, Request::post(path)).await
}

async fn ask(address: &str, path: &str, request: Builder) -> anyhow::Result<Answer> {
    let request = request.body(Full::default())?;
    let asked = async {
        let response = send(address, request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        anyhow::Ok(Answer {
            status,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    };
    tokio::time::timeout(ANSWER_WITHIN, asked)
        .await
        .with_context(|| format!("no answer to {path}"))?
}

/// Sends any request and gives the answer with its body unread: that of server-sent events has no end.
pub async fn send(
    address: &str,
    mut request: Request<Full<bytes::Bytes>>,
) -> anyhow::Result<Response<Incoming>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    request
        .headers_mut()
        .entry(header::HOST)
        .or_insert(address.parse()?);
    Ok(sender.send_request(request).await?)
}
