//! One connection to the streamer: TCP, TLS, HTTP/2, and a count of what came over it.
//!
//! tonic spawns tasks for a connection. Here they are kept in a set, and stopped and joined before a new connection is
//! made: nothing of an old one is left behind.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use anabranch_proto::{MESSAGE_BYTES_MAX, v1::anabranch_client::AnabranchClient};
use hyper::Uri;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::JoinSet,
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tower::service_fn;

use crate::config::{self, Config, Tls};

/// What a message may be above its limit: the limit speaks of its content, the frame comes on top.
const MESSAGE_SLACK_BYTES: usize = 64 * 1024;

/// An open connection.
pub struct Connection {
    /// Makes calls on it.
    pub client: AnabranchClient<Channel>,
    /// What came so far.
    pub received: Received,
}

/// Counts bytes as they come from the network. A large message on a thin line takes longer than silence may last:
/// progress is then seen here.
#[derive(Clone, Debug, Default)]
pub struct Received(Arc<AtomicU64>);

impl Received {
    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The tasks of a connection.
#[derive(Clone, Debug, Default)]
pub struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    /// Stops them, and returns when the last one has ended.
    pub async fn stop(&self) {
        let mut tasks = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, future: F) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .spawn(future);
    }
}

/// Connects. Files of certificates are read now, so that renewed ones are taken.
pub async fn connect(config: &Config, tasks: &Tasks) -> Result<Connection, String> {
    let timeout = config.timing.silence_max;
    let mut endpoint = Endpoint::from(config.streamer.clone())
        .executor(tasks.clone())
        .user_agent(concat!("anabranch-replica/", env!("CARGO_PKG_VERSION")))
        .map_err(|error| explain(&error))?
        .connect_timeout(timeout)
        .initial_stream_window_size(config.memory.stream_window_bytes)
        .initial_connection_window_size(config.memory.connection_window_bytes)
        // Beside the heartbeats in the stream: these also free the socket of a connection that nobody reads.
        .http2_keep_alive_interval(timeout)
        .keep_alive_timeout(timeout)
        .keep_alive_while_idle(true);
    if config.streamer.scheme_str() == Some("https") {
        endpoint = endpoint
            .tls_config(tls(config.host(), &config.tls, timeout).await?)
            .map_err(|error| explain(&error))?;
    }
    let received = Received::default();
    let counter = received.clone();
    let connector = service_fn(move |uri: Uri| {
        let counter = counter.clone();
        async move {
            let host = config::host(&uri).to_owned();
            let port = uri
                .port_u16()
                .unwrap_or(if uri.scheme_str() == Some("https") {
                    443
                } else {
                    80
                });
            // The name is looked up at each attempt: an address may have moved.
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            Ok::<_, io::Error>(TokioIo::new(Counted { stream, counter }))
        }
    });
    let channel = tokio::time::timeout(timeout, endpoint.connect_with_connector(connector))
        .await
        .map_err(|_| format!("no answer within {timeout:?}"))?
        .map_err(|error| explain(&error))?;
    let client = AnabranchClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX + MESSAGE_SLACK_BYTES);
    Ok(Connection { client, received })
}

async fn tls(host: &str, files: &Tls, timeout: Duration) -> Result<ClientTlsConfig, String> {
    let mut tls = ClientTlsConfig::new().domain_name(host).timeout(timeout);
    tls = match &files.ca {
        Some(path) => tls.ca_certificate(Certificate::from_pem(read(path).await?)),
        None => tls.with_native_roots(),
    };
    if let Some((cert, key)) = &files.identity {
        tls = tls.identity(Identity::from_pem(read(cert).await?, read(key).await?));
    }
    Ok(tls)
}

async fn read(path: &std::path::Path) -> Result<Vec<u8>, String> {
    tokio::fs::read(path)
        .await
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// An error with all its causes: what tonic says of itself is only "transport error".
pub fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Many wrap their cause and say it again.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

struct Counted {
    stream: TcpStream,
    counter: Received,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        let read = buf.filled().len() - before;
        self.counter.0.fetch_add(read as u64, Ordering::Relaxed);
        result
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
}
