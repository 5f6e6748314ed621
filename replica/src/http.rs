//! The local HTTP interface: a view of the board, for programs and people on this machine.
//!
//! It reads memory, and asks the file's thread. It never opens the database: closing a descriptor of it would drop the locks
//! that SQLite holds in this process. What acts is POST, all else GET.
//!
//! There is no token: who may connect to loopback or to the socket may ask. A page in a browser may connect to loopback
//! too, under a name that its owner lets point here ("DNS rebinding"): so the Host header must be a loopback one. And it may
//! POST to our right name, only that it is not told the answer ("CSRF"): so what acts must not be asked by a page of elsewhere.
//!
//! - [`server`]: listening, connections, their limits.
//! - `events`: `/changes` as server-sent events.

mod events;
pub mod server;

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{RawQuery, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    board::Board,
    file::{Decision, Which},
    keeper::{Flushed, Keeper},
    status::now,
    wait::{Outcome, Target},
};

/// Longest time that `/wait` may be asked to wait.
pub const WAIT_SECONDS_MAX: f64 = 300.0;

/// How long `/wait` waits unless told otherwise.
pub const WAIT_SECONDS_DEFAULT: f64 = 30.0;

/// How long `/flush` waits before it has the file looked at again, where that was not possible. Each look may wait for
/// a program's lock by itself.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Readers of `/changes` at a time.
pub const CHANGES_READERS_MAX: usize = 256;

/// What handlers know.
#[derive(Clone)]
pub struct View {
    /// What they show.
    pub board: Arc<Board>,
    /// The file's thread.
    pub keeper: Keeper,
    /// The streamer's URL.
    pub streamer: Arc<str>,
    /// The database's path.
    pub database: Arc<str>,
    /// Which Host headers are right; `None`: any, on a unix socket.
    pub port: Option<u16>,
    /// Ends what waits.
    pub cancel: CancellationToken,
}

/// All routes.
pub fn router(view: View) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .route("/wait", get(wait))
        .route("/changes", get(changes))
        .route("/flush", post(flush))
        .route("/rejected/retry", post(retry))
        .route("/rejected/discard", post(discard))
        .fallback(async || {
            let known = "/status /healthz /readyz /metrics /changes /wait /flush /rejected/retry /rejected/discard";
            refuse(
                StatusCode::NOT_FOUND,
                format!("there is no such page; there are {known}"),
            )
        })
        .method_not_allowed_fallback(async || {
            refuse(
                StatusCode::METHOD_NOT_ALLOWED,
                "what acts (/flush, /rejected/…) is asked for by POST, all else by GET".into(),
            )
        })
        .layer(middleware::from_fn_with_state(view.clone(), check_host))
        .with_state(view)
}

fn refuse(status: StatusCode, error: String) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}

async fn check_host(State(view): State<View>, request: Request, next: Next) -> Response {
    if let Some(port) = view.port {
        // HTTP/1.1 has it as a header, and in the target where that is a whole URL.
        let mut hosts = request.headers().get_all(header::HOST).iter();
        let named = match (
            hosts.next().map(|host| host.to_str()),
            hosts.next(),
            request.uri().authority(),
        ) {
            (Some(Ok(host)), None, None) => Some(host),
            (Some(Ok(host)), None, Some(authority)) if host == authority.as_str() => Some(host),
            _ => None,
        };
        if !named.is_some_and(|host| is_ours(host, port)) {
            let right = format!(
                "the Host header must name this machine: localhost:{port} or 127.0.0.1:{port}"
            );
            return refuse(StatusCode::MISDIRECTED_REQUEST, right);
        }
        if !request.method().is_safe() && is_of_foreign_page(request.headers()) {
            let error = "a page of another site must not have anything done here";
            return refuse(StatusCode::FORBIDDEN, error.into());
        }
    }
    next.run(request).await
}

/// Whether a browser says that a page which is not of this machine asks. It says so with each POST, and nothing else does.
fn is_of_foreign_page(headers: &HeaderMap) -> bool {
    let is_foreign = |origin: &HeaderValue| {
        let uri = origin
            .to_str()
            .ok()
            .and_then(|text| text.parse::<Uri>().ok());
        let authority = uri.as_ref().and_then(Uri::authority);
        !authority.is_some_and(|authority| is_loopback(authority.host()))
    };
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let site = headers.get("sec-fetch-site");
    origins.any(is_foreign) || site.is_some_and(|site| site == "cross-site")
}

/// Whether a Host header names loopback and our port.
fn is_ours(host: &str, port: u16) -> bool {
    let (name, said) = match host.rsplit_once(':') {
        Some((name, said)) if !said.contains(']') => (name, said.parse().ok()),
        _ => (host, Some(80)),
    };
    said == Some(port) && is_loopback(name)
}

/// Whether a name, or an address as it is in a URL, is that of loopback.
fn is_loopback(name: &str) -> bool {
    let address = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
        .unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn readyz(State(view): State<View>) -> Response {
    if view.board.watch().borrow().position.is_some() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no complete commit yet\n").into_response()
    }
}

async fn status(State(view): State<View>) -> Response {
    Json(
        view.board
            .status()
            .to_json(now(), &view.streamer, &view.database),
    )
    .into_response()
}

async fn metrics(State(view): State<View>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], view.board.render_metrics()).into_response()
}

async fn wait(State(view): State<View>, RawQuery(query): RawQuery) -> Response {
    let (target, timeout) = match parse_wait(query.as_deref().unwrap_or_default()) {
        Ok(asked) => asked,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let answer = |status: StatusCode, reached: bool| {
        let position = view
            .board
            .watch()
            .borrow()
            .position
            .map(|position| position.to_string());
        (
            status,
            Json(json!({ "position": position, "reached": reached })),
        )
            .into_response()
    };
    let outcome = tokio::select! {
        // Reached wins over time that is up: a timeout of 0 asks whether it is there.
        biased;
        outcome = view.board.waiters.wait(target) => outcome,
        () = view.cancel.cancelled() => return refuse(StatusCode::SERVICE_UNAVAILABLE, "stopping".into()),
        () = tokio::time::sleep(timeout) => return answer(StatusCode::GATEWAY_TIMEOUT, false),
    };
    match outcome {
        Outcome::Reached(position) => {
            Json(json!({ "position": position.to_string(), "reached": true })).into_response()
        }
        Outcome::OtherEpoch(position) => {
            let error = "the file follows another history of the source, where that position means nothing; ask Postgres for a new one";
            let body =
                json!({ "position": position.to_string(), "reached": false, "error": error });
            (StatusCode::CONFLICT, Json(body)).into_response()
        }
        Outcome::Full => refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{} requests wait already", crate::wait::WAITERS_MAX),
        ),
    }
}

/// Waits until all local writes so far are answered.
async fn flush(State(view): State<View>, RawQuery(query): RawQuery) -> Response {
    let timeout = match parse_flush(query.as_deref().unwrap_or_default()) {
        Ok(timeout) => timeout,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let stopping = || refuse(StatusCode::SERVICE_UNAVAILABLE, "stopping".into());
    let until = Instant::now() + timeout;
    let begun = loop {
        match view.keeper.look().await {
            Err(_) => return stopping(),
            Ok(Some(begun)) => break Some(begun),
            Ok(None) if Instant::now() >= until => break None,
            Ok(None) => {}
        }
        tokio::select! {
            () = view.cancel.cancelled() => return stopping(),
            () = tokio::time::sleep_until(until.min(Instant::now() + LOOK_AGAIN)) => {}
        }
    };
    let mut local = view.board.local.subscribe();
    let answered = match &begun {
        // What was written so far can't even be told: none of it is known to be answered.
        None => false,
        Some(begun) => tokio::select! {
            // Answered wins over time that is up: a timeout of 0 asks whether they are.
            biased;
            answered = local.wait_for(|local| local.has_answered(begun)) => answered.is_ok(),
            () = view.cancel.cancelled() => return stopping(),
            () = tokio::time::sleep_until(until) => false,
        },
    };
    let begun = begun.unwrap_or(*local.borrow());
    let Ok(Flushed { rejected, pending }) = view.keeper.flushed(begun).await else {
        return stopping();
    };
    let position = view.board.watch().borrow().position;
    let rejected: Vec<_> = rejected
        .into_iter()
        .map(|one| {
            json!({ "id": one.id, "table": one.table, "sqlstate": one.sqlstate, "message": one.message })
        })
        .collect();
    let body = json!({
        "position": position.map(|position| position.to_string()),
        "answered": answered,
        "pending": pending,
        "rejected": rejected,
    });
    let status = if answered {
        StatusCode::OK
    } else {
        StatusCode::GATEWAY_TIMEOUT
    };
    (status, Json(body)).into_response()
}

/// Makes rejected changes again.
async fn retry(State(view): State<View>, RawQuery(query): RawQuery) -> Response {
    decide(&view, query, Decision::Retry).await
}

/// Forgets rejected changes.
async fn discard(State(view): State<View>, RawQuery(query): RawQuery) -> Response {
    decide(&view, query, Decision::Discard).await
}

async fn decide(view: &View, query: Option<String>, decision: Decision) -> Response {
    let which = match parse_which(query.as_deref().unwrap_or_default()) {
        Ok(which) => which,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    match view.keeper.decide(which, decision).await {
        Ok(Ok(0)) => {
            let error = "no such row is in _anabranch_rejected";
            refuse(StatusCode::NOT_FOUND, error.into())
        }
        Ok(Ok(changes)) => Json(json!({ "changes": changes })).into_response(),
        Ok(Err(why)) => refuse(StatusCode::SERVICE_UNAVAILABLE, why),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "stopping".into()),
    }
}

fn parse_which(query: &str) -> Result<Which, String> {
    const RIGHT: &str = "write ?id=7 for a row of _anabranch_rejected, or ?txn=3 for a transaction";
    let (key, value) = query.split_once('=').unwrap_or((query, ""));
    let which = match key {
        "id" => Which::Change,
        "txn" => Which::Transaction,
        _ => return Err(RIGHT.into()),
    };
    let number = value.parse::<i64>().map_err(|_| RIGHT)?;
    Ok(which(number))
}

fn parse_flush(query: &str) -> Result<Duration, String> {
    let mut timeout = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if key != "timeout" || timeout.is_some() {
            return Err(format!(
                "`{key}` is not known, or given twice; write /flush?timeout=5"
            ));
        }
        timeout = Some(parse_timeout(value)?);
    }
    Ok(timeout.unwrap_or(Duration::from_secs_f64(WAIT_SECONDS_DEFAULT)))
}

fn parse_wait(query: &str) -> Result<(Target, Duration), String> {
    const RIGHT: &str = "write /wait?position=0/16B3748&timeout=5";
    // The query is read raw, since `+` or `%2F` in a position deserve a clear answer rather than a guess.
    let (mut target, mut timeout) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = unescape(value)
            .ok_or_else(|| format!("`{key}` is not escaped as in a URL; {RIGHT}"))?;
        let again = match key {
            "position" => target.replace(value.parse::<Target>()?).is_some(),
            "timeout" => timeout.replace(parse_timeout(&value)?).is_some(),
            _ => return Err(format!("`{key}` is not known; {RIGHT}")),
        };
        if again {
            return Err(format!("`{key}` is given twice; {RIGHT}"));
        }
    }
    let target = target.ok_or_else(|| format!("`position` is missing; {RIGHT}"))?;
    Ok((
        target,
        timeout.unwrap_or(Duration::from_secs_f64(WAIT_SECONDS_DEFAULT)),
    ))
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| (0.0..=WAIT_SECONDS_MAX).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| {
            format!("`timeout={text}` is not a number of seconds from 0 to {WAIT_SECONDS_MAX}")
        })
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                (digit(rest.next()?)? * 16 + digit(rest.next()?)?) as u8
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

async fn changes(State(view): State<View>, headers: HeaderMap) -> Response {
    // One that can't be read is one that is not known.
    let id = headers
        .get("last-event-id")
        .map(|id| id.to_str().unwrap_or_default());
    let Some(reader) = view.board.changes.reader(id, CHANGES_READERS_MAX) else {
        let error = format!("{CHANGES_READERS_MAX} readers are there already");
        return refuse(StatusCode::SERVICE_UNAVAILABLE, error);
    };
    events::respond(reader, view.cancel.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_host_is_taken_for_ours() {
        for host in [
            "localhost:7430",
            "LOCALHOST:7430",
            "127.0.0.1:7430",
            "127.9.9.9:7430",
            "[::1]:7430",
        ] {
            assert!(is_ours(host, 7430), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:7430",
            "localhost",
            "127.0.0.1",
            "127.0.0.1:80",
            "[::1]",
            "localhost.evil.example:7430",
            "10.0.0.1:7430",
            "[::2]:7430",
            ":7430",
            "localhost:7430:7430",
            "0.0.0.0:7430",
        ] {
            assert!(!is_ours(host, 7430), "{host}");
        }
        assert!(is_ours("localhost", 80));
        assert!(is_ours("[::1]", 80));
    }

    #[test]
    fn what_is_to_be_decided_on_is_guessed() {
        assert_eq!(parse_which("id=7"), Ok(Which::Change(7)));
        assert_eq!(parse_which("txn=3"), Ok(Which::Transaction(3)));
        for query in ["", "id", "id=", "id=x", "id=1&txn=2", "key=1", "id=1%20"] {
            assert!(parse_which(query).is_err(), "{query}");
        }
    }

    #[test]
    fn a_question_that_is_wrong_is_guessed_at() {
        let (target, timeout) = parse_wait("position=0/16B3748&timeout=2.5").unwrap();
        assert_eq!(
            (target.lsn.0, timeout),
            (0x16B_3748, Duration::from_millis(2_500))
        );
        let (target, timeout) = parse_wait("position=00c0ffee00c0ffee%400%2F1").unwrap();
        assert_eq!((target.lsn.0, timeout), (1, Duration::from_secs(30)));
        for (query, expected) in [
            ("", "`position` is missing"),
            ("position", "is no position"),
            ("position=16B3748", "write an LSN such as 0/16B3748"),
            ("position=0/1&timeout=301", "from 0 to 300"),
            ("position=0/1&timeout=-1", "from 0 to 300"),
            ("position=0/1&timeout=NaN", "from 0 to 300"),
            ("position=0/1&timeout=5s", "from 0 to 300"),
            ("position=0/1&position=0/2", "given twice"),
            ("position=0/1&time=5", "`time` is not known"),
            ("position=%zz", "not escaped"),
            ("position=%ff", "not escaped"),
            ("position=%2", "not escaped"),
        ] {
            let error = parse_wait(query).unwrap_err();
            assert!(error.contains(expected), "{query}: {error}");
        }
    }
}
