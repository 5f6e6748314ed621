//! Listening and connections, with their limits: how many, how long a request may take to arrive, how long a client may
//! leave its answer unread.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustix::fs::Mode;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener, UnixSocket, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::Sleep,
};
use tokio_util::sync::CancellationToken;

use super::{View, router};
use crate::config::Address;

/// Connections at a time: all that may wait and read changes, and some to ask.
const CONNECTIONS_MAX: usize = crate::wait::WAITERS_MAX + super::CHANGES_READERS_MAX + 128;

/// How long a request's head may take to arrive, and a connection may be idle.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);

/// How long a client may take nothing of its answer.
const UNREAD_TIME_MAX: Duration = Duration::from_secs(30);

/// How long an answer may take to be finished once we were told to end; a client that stopped in the middle of its
/// request must not hold up the end.
const GRACE: Duration = Duration::from_secs(2);

/// Largest head of a request.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Pause after the system refused to give a connection (out of descriptors): at once it would refuse again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A place where we listen.
#[derive(Debug)]
pub enum Listener {
    /// Loopback TCP.
    Tcp(TcpListener),
    /// A unix socket, and its path, which is removed at the end.
    Unix(UnixListener, PathBuf),
}

/// Listening failed.
#[derive(Debug, thiserror::Error)]
#[error("listening at {address}: {what}")]
pub struct Error {
    address: String,
    what: String,
}

impl Listener {
    /// Listens. A unix socket gets `mode`; one that a dead process left behind is replaced.
    pub async fn bind(address: &Address, mode: u32) -> Result<Self, Error> {
        let wrong = |error: io::Error| Error {
            address: address.to_string(),
            what: error.to_string(),
        };
        match address {
            Address::Tcp(address) => Ok(Listener::Tcp(
                TcpListener::bind(address).await.map_err(wrong)?,
            )),
            Address::Unix(path) => {
                remove_dead(path).await.map_err(wrong)?;
                let socket = UnixSocket::new_stream().map_err(wrong)?;
                // The mode of an unbound socket becomes that of its file (Linux), so that it never is more open.
                let bits = Mode::from_bits_truncate(mode & 0o777);
                rustix::fs::fchmod(&socket, bits).map_err(|error| wrong(error.into()))?;
                socket.bind(path).map_err(wrong)?;
                rustix::fs::chmod(path, bits).map_err(|error| wrong(error.into()))?;
                let listener = socket.listen(1_024).map_err(wrong)?;
                Ok(Listener::Unix(listener, path.clone()))
            }
        }
    }

    /// Where it listens, with the port that the system chose.
    pub fn address(&self) -> Option<Address> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().ok().map(Address::Tcp),
            Listener::Unix(_, path) => Some(Address::Unix(path.clone())),
        }
    }

    fn port(&self) -> Option<u16> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().ok().as_ref().map(SocketAddr::port),
            Listener::Unix(..) => None,
        }
    }
}

/// Only a socket that nobody listens at may go; anything else at that path is somebody's.
async fn remove_dead(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match tokio::fs::symlink_metadata(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => Err(io::Error::other(
            "there is a file of that name that is not a socket",
        )),
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => Err(io::Error::from(io::ErrorKind::AddrInUse)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                tokio::fs::remove_file(path).await
            }
            Err(error) => Err(error),
        },
    }
}

/// Serves until told to end; then lets answers that are being written finish.
pub async fn serve(listener: Listener, mut view: View) {
    view.port = listener.port();
    let cancel = view.cancel.clone();
    let routes = router(view);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = accept(&listener, &room) => match accepted {
                Ok((stream, place)) => {
                    let (routes, cancel) = (routes.clone(), cancel.clone());
                    connections.spawn(async move {
                        converse(stream, routes, cancel).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!("accepting a local HTTP connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    if let Listener::Unix(listener, path) = listener {
        drop(listener);
        // Gone already: then somebody else removed it.
        let _ = std::fs::remove_file(path);
    }
    while connections.join_next().await.is_some() {}
}

async fn accept(
    listener: &Listener,
    room: &Arc<Semaphore>,
) -> io::Result<(Box<dyn Stream>, tokio::sync::OwnedSemaphorePermit)> {
    // With no room, connections wait in the system's queue.
    let place = room
        .clone()
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let stream: Box<dyn Stream> = match listener {
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Listener::Unix(listener, _) => Box::new(listener.accept().await?.0),
    };
    Ok((stream, place))
}

async fn converse(stream: Box<dyn Stream>, routes: Router, cancel: CancellationToken) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(
            TokioIo::new(Impatient::new(stream, UNREAD_TIME_MAX)),
            TowerToHyperService::new(routes),
        );
    let mut connection = pin!(connection);
    // What goes wrong with one connection is that client's trouble: it sees it itself.
    let finished = tokio::select! {
        result = connection.as_mut() => Some(result),
        () = cancel.cancelled() => None,
    };
    if finished.is_none() {
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(GRACE, connection).await;
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A stream whose writes fail when the other side reads nothing for too long, so that a stopped client does not hold its
/// place for ever.
struct Impatient {
    stream: Box<dyn Stream>,
    patience: Duration,
    unread: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: Box<dyn Stream>, patience: Duration) -> Self {
        Impatient {
            stream,
            patience,
            unread: None,
        }
    }

    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.unread = None;
            return result;
        }
        let patience = self.patience;
        let unread = self
            .unread
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        match unread.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_taken_from_a_living_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address, 0o600).await.unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let error = Listener::bind(&address, 0o600)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("in use"), "{error}");
        drop(first);
        // What a dead process left behind is replaced; a file of somebody else is not.
        Listener::bind(&address, 0o660).await.unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
        );
        let file = directory.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let error = Listener::bind(&Address::Unix(file.clone()), 0o600)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_client_that_never_reads_is_kept() {
        use tokio::io::AsyncWriteExt;
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut stream = Impatient::new(Box::new(ours), Duration::from_millis(20));
        let error = stream.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
