//! One port for gRPC and HTTP, plain or TLS.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use http_body_util::BodyExt;
use hyper::{Request, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use crate::auth::{Shown, Verifier, certificate::Certificate};

/// Connections at once, replicas and readers of pages together.
pub const CONNECTIONS_MAX: usize = 12_000;

/// A TLS handshake, and the head of an HTTP/1 request, must be done within this time.
const GREETING_TIME: Duration = Duration::from_secs(10);

/// HTTP/2 windows. The default of 64 KiB limits a stream to its size in each round trip; these fill a link of
/// 1 Gbit/s at 30 ms. They bound what a client may send us, which is little; the client sets its own for what it gets.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;

/// Bytes that HTTP/2 may hold for one stream until the socket takes them, beside the message that goes beyond it. It only has to
/// last for as long as it takes to be given more; and each replica that does not read has it filled.
const SEND_BUFFER_MAX: usize = 64 * 1024;

/// Streams that one connection may have open: a replica needs one.
const STREAMS_MAX: u32 = 100;

/// Bytes of the headers of one request: a token of 8 KiB and what else there is. A CONTINUATION flood ends its connection here.
const HEADERS_BYTES_MAX: u32 = 16 * 1024;

/// Streams that a client took back before they were looked at: above this its connection ends (rapid reset, CVE-2023-44487).
const RESETS_PENDING_MAX: usize = 20;

/// Streams that a client made us take back, by what it did wrong: above this its connection ends.
const RESETS_OWN_MAX: usize = 256;

/// A connection on which nothing was asked, or is, for so long is closed: a replica's has a call, and a page's reader asks anew.
const IDLE_MAX: Duration = Duration::from_secs(30);

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
        let certificate = request.extensions().get::<Arc<Certificate>>();
        let shown = Shown {
            authorization: authorization.and_then(|value| value.to_str().ok()),
            certificate: certificate.map(Arc::as_ref),
        };
        self.verifier.admit(shown).is_ok()
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
        None => Box::pin(drive(stream, peer, None, stage, stopping)).await,
        Some(tls) => match timeout(GREETING_TIME, Box::pin(tls.accept(stream))).await {
            Ok(Ok(stream)) => {
                let shown = stream.get_ref().1.peer_certificates();
                let certificate = shown.and_then(|chain| Certificate::parse(chain.first()?));
                let certificate = certificate.map(Arc::new);
                Box::pin(drive(stream, peer, certificate, stage, stopping)).await
            }
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
    certificate: Option<Arc<Certificate>>,
    stage: Arc<Stage>,
    stopping: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let called = stopping.clone();
    let busy = Busy::default();
    let asked = busy.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        if let Some(certificate) = &certificate {
            request.extensions_mut().insert(certificate.clone());
        }
        let (stage, stopping) = (stage.clone(), called.clone());
        let one = asked.begin();
        // Boxed: what answers a call is done with as the stream begins, which then lives for days.
        Box::pin(async move {
            let routes = stage.routes(&request, &stopping).await;
            let answer = routes.oneshot(request.map(Body::new)).await;
            // It is being answered until the last byte of its body.
            answer.map(|answer| {
                answer.map(|body| {
                    Body::new(body.map_frame(move |frame| {
                        let _ = &one;
                        frame
                    }))
                })
            })
        })
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(GREETING_TIME)
        .max_buf_size(2 * HEADERS_BYTES_MAX as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADERS_BYTES_MAX)
        .max_pending_accept_reset_streams(RESETS_PENDING_MAX)
        .max_local_error_reset_streams(RESETS_OWN_MAX)
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
        () = busy.idle() => {
            // Whoever asks just now is answered still.
            connection.as_mut().graceful_shutdown();
            timeout(GRACE, connection).await.unwrap_or(Ok(()))
        }
    }
}

/// What is being answered on a connection, and since when there is nothing.
#[derive(Clone)]
struct Busy(Arc<watch::Sender<(usize, Instant)>>);

/// One request, until its answer has ended.
struct One(Busy);

impl Default for Busy {
    fn default() -> Self {
        Busy(Arc::new(watch::Sender::new((0, Instant::now()))))
    }
}

impl Busy {
    fn begin(&self) -> One {
        self.0.send_modify(|(count, _)| *count += 1);
        One(self.clone())
    }

    /// Until there was nothing for too long.
    async fn idle(&self) {
        let mut seen = self.0.subscribe();
        loop {
            let (count, since) = *seen.borrow_and_update();
            let over = async {
                match count {
                    0 => tokio::time::sleep_until(since + IDLE_MAX).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => return,
                _ = seen.changed() => {}
            }
        }
    }
}

impl Drop for One {
    fn drop(&mut self) {
        self.0.0.send_modify(|(count, since)| {
            *count -= 1;
            *since = Instant::now();
        });
    }
}
