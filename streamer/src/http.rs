//! `/status`, `/healthz`, `/readyz` and `/metrics`, on the same port as gRPC.
//!
//! `/healthz` and `/readyz` are open and say no more than yes or no; the rest needs a token, or loopback.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anabranch_proto::Lsn;
use axum::{
    Json, Router,
    extract::{Request, State},
    http::{StatusCode, header, uri::Authority},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    auth::{Shown, Verifier, certificate::Certificate, jwks, revoked},
    engine::Progress,
    metrics::Metrics,
    session::Total,
};

/// What the pages show.
pub struct Pages {
    /// Checks tokens.
    pub verifier: Arc<Verifier>,
    /// How far the engine is.
    pub progress: watch::Receiver<Progress>,
    /// Counted elsewhere.
    pub metrics: Arc<Metrics>,
    /// Bytes of all queues.
    pub queues: Arc<Total>,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    /// `epoch@lsn`: what survives a power cut here, and what is confirmed to Postgres.
    position: String,
    epoch: String,
    lsn: String,
    /// How far Postgres' WAL had come when it was last heard.
    source_lsn: String,
    /// Bytes of WAL between the two.
    lag_bytes: u64,
    connected: bool,
    replicas: i64,
    queue_bytes: usize,
    /// The published keys that tokens are verified by, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    jwks: Option<jwks::Report>,
    /// The list of who is revoked, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    revoked: Option<revoked::Report>,
}

/// The routes.
pub fn routes(pages: Arc<Pages>) -> Router {
    let guarded = Router::new()
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(pages.clone(), guard));
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .merge(guarded)
        .with_state(pages)
}

/// Lets in who has a token or is on this machine.
async fn guard(State(pages): State<Arc<Pages>>, request: Request, next: Next) -> Response {
    if !is_local(&request) {
        let header = request.headers().get(header::AUTHORIZATION);
        let certificate = request.extensions().get::<Arc<Certificate>>();
        let shown = Shown {
            authorization: header.and_then(|value| value.to_str().ok()),
            certificate: certificate.map(Arc::as_ref),
        };
        if pages.verifier.admit_late(shown).await.is_err() {
            return (
                StatusCode::UNAUTHORIZED,
                "a token is needed from outside this machine\n",
            )
                .into_response();
        }
    }
    next.run(request).await
}

/// Whether somebody on this machine asks. What a proxy on it brings is from elsewhere, and what names another host is a page of
/// somebody else's that a browser here was led to ask for.
fn is_local(request: &Request) -> bool {
    let peer = request.extensions().get::<SocketAddr>();
    let headers = request.headers();
    let forwarded = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];
    let is_here = |host: &Authority| {
        let host = host.host().trim_matches(['[', ']']);
        let address = host.parse::<IpAddr>();
        host == "localhost" || address.is_ok_and(|ip| ip.to_canonical().is_loopback())
    };
    // HTTP/2 has the name in the target, HTTP/1.1 in a header, and some have it twice: each must be ours.
    let mut named = headers.get_all(header::HOST).iter().map(|host| {
        let host = host.to_str().ok()?;
        host.parse::<Authority>().ok()
    });
    peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback())
        && !forwarded.iter().any(|name| headers.contains_key(*name))
        && request.uri().authority().is_none_or(is_here)
        && named.all(|host| host.as_ref().is_some_and(is_here))
}

async fn status(State(pages): State<Arc<Pages>>) -> Json<Status> {
    let progress = *pages.progress.borrow();
    let Lsn(source) = progress.source.lsn.max(progress.durable.lsn);
    Json(Status {
        version: env!("CARGO_PKG_VERSION"),
        position: progress.durable.to_string(),
        epoch: progress.durable.epoch.to_string(),
        lsn: progress.durable.lsn.to_string(),
        source_lsn: Lsn(source).to_string(),
        lag_bytes: source - progress.durable.lsn.0,
        connected: progress.source.connected,
        replicas: pages.metrics.sessions.get(),
        queue_bytes: pages.queues.bytes(),
        jwks: pages.verifier.jwks(),
        revoked: pages.verifier.revoked(),
    })
}

async fn metrics(State(pages): State<Arc<Pages>>) -> String {
    let progress = *pages.progress.borrow();
    let metrics = &pages.metrics;
    metrics.queue_bytes.set(signed(pages.queues.bytes() as u64));
    metrics.confirmed_lsn.set(signed(progress.durable.lsn.0));
    metrics.source_lsn.set(signed(progress.source.lsn.0));
    metrics.render()
}

async fn healthz() -> &'static str {
    "ok\n"
}

/// Ready: the mirror is complete (this page is served from then on), and Postgres is connected.
async fn readyz(State(pages): State<Arc<Pages>>) -> (StatusCode, &'static str) {
    if pages.progress.borrow().source.connected {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "Postgres is not connected\n",
        )
    }
}

/// Prometheus' gauges are signed here; no LSN is above 2^63.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
