//! One port for gRPC and HTTP, plain or TLS.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use crate::auth::Verifier;

/// Connections at once, replicas and readers of pages together.
pub const CONNECTIONS_MAX: usize = 12_000;

/// A TLS handshake, and the head of an HTTP/1 request, must be done within this time.
const GREETING_TIME: Duration = Duration::from_secs(10);

/// HTTP/2 windows. The default of 64 KiB limits a stream to its size in each round trip; these fill a link of
/// 1 Gbit/s at 30 ms. They bound what a client may send us, which is little; the client sets its own for what it gets.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;

/// Bytes that HTTP/2 may hold for one stream until the socket takes them.
const SEND_BUFFER_MAX: usize = 512 * 1024;

/// Streams that one connection may have open: a replica needs one.
const STREAMS_MAX: u32 = 100;

/// How long a replica's call waits for a streamer that is starting. Told to come again at once, all of them would come
/// some pause too late, and to a stream that is under way already. It hears from the streamer within its limit of silence.
const STARTING_MAX: Duration = Duration::from_secs(5);

/// How long connections may take to end when the streamer stops.
const GRACE: Duration = Duration::from_secs(3);

/// What is served: until the mirror is complete, a few words on that, and what is there to replicas; from then on,
/// everything.
pub struct Stage {
    verifier: Arc<Verifier>,
    starting: Router,
    ready: watch::Sender<Option<Router>>,
}

impl Stage {
    /// Says that the streamer is starting.
    pub fn new(verifier: Arc<Verifier>) -> Arc<Stage> {
        Arc::new(Stage {
            verifier,
            starting: starting_pages().fallback(starting),
            ready: watch::Sender::new(None),
        })
    }

    /// From here on replicas are served by these while the mirror is filled; pages still say that the streamer is starting.
    pub fn early(&self, grpc: Router) {
        self.ready.send_replace(Some(grpc.merge(starting_pages())));
    }

    /// From here on these are served, also on connections that are open already.
    pub fn ready(&self, routes: Router) {
        self.ready.send_replace(Some(routes));
    }

    /// The streamer starts anew.
    pub fn starting(&self) {
        self.ready.send_replace(None);
    }

    /// What answers this. Calls of replicas wait for a while until they can be answered; others, and pages, don't.
    async fn routes(&self, request: &Request<Incoming>, stopping: &CancellationToken) -> Router {
        let mut ready = self.ready.subscribe();
        let longest = match is_call(request) && self.knows(request) {
            true => STARTING_MAX,
            false => Duration::ZERO,
        };
        let routes = ready.wait_for(Option::is_some);
        let routes = stopping.run_until_cancelled(timeout(longest, routes)).await;
        let routes = routes.and_then(|waited| waited.ok()?.ok()?.clone());
        routes.unwrap_or_else(|| self.starting.clone())
    }

    fn knows<T>(&self, request: &Request<T>) -> bool {
        let authorization = request.headers().get(header::AUTHORIZATION);
        let authorization = authorization.and_then(|value| value.to_str().ok());
        self.verifier.verify(authorization).is_ok()
    }
}

fn is_call<T>(request: &Request<T>) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// The pages while the mirror is filled.
fn starting_pages() -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(starting))
        .route("/status", get(starting))
        .route("/metrics", get(starting))
}

/// Replicas are told in gRPC's own terms, so that they try again soon.
async fn starting(request: Request<Body>) -> Response {
    const STARTING: &str = "the streamer is starting";
    if is_call(&request) {
        return tonic::Status::unavailable(STARTING).into_http();
    }
    (StatusCode::SERVICE_UNAVAILABLE, STARTING).into_response()
}

/// Accepts until `stopping`, then lets the open connections end.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    stage: Arc<Stage>,
    stopping: CancellationToken,
) {
    let tls = tls.map(TlsAcceptor::from);
    let connections = TaskTracker::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopping.cancelled() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the client is gone already: neither ends the server.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!(
                limit = CONNECTIONS_MAX,
                "too many connections; one was refused"
            );
            continue;
        };
        let (stage, tls, stopping) = (stage.clone(), tls.clone(), stopping.clone());
        connections.spawn(async move {
            connection(stream, peer, tls, stage, stopping).await;
            drop(permit);
        });
    }
    connections.close();
    if timeout(GRACE, connections.wait()).await.is_err() {
        tracing::warn!("connections did not end in time and are cut");
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    stage: Arc<Stage>,
    stopping: CancellationToken,
) {
    // Latency before packet count: a message is written at once, whole.
    let _ = stream.set_nodelay(true);
    let ended = match tls {
        // Boxed, each for itself: neither needs the other's room.
        None => Box::pin(drive(stream, peer, stage, stopping)).await,
        Some(tls) => match timeout(GREETING_TIME, Box::pin(tls.accept(stream))).await {
            Ok(Ok(stream)) => Box::pin(drive(stream, peer, stage, stopping)).await,
            Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => return,
        },
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

/// Serves one connection until it ends, or gracefully until the streamer stops.
async fn drive(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    stage: Arc<Stage>,
    stopping: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let called = stopping.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        let (stage, stopping) = (stage.clone(), called.clone());
        // Boxed: what answers a call is done with as the stream begins, which then lives for days.
        Box::pin(async move {
            let routes = stage.routes(&request, &stopping).await;
            routes.oneshot(request.map(Body::new)).await
        })
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(GREETING_TIME);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(Some(GREETING_TIME))
        .keep_alive_timeout(GREETING_TIME);
    let connection = builder.serve_connection(TokioIo::new(io), service);
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}
