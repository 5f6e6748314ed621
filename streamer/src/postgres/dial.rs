//! From a [`Target`] to a socket that Postgres listens on, encrypted as the target asks for.
//!
//! The one way to Postgres, for SQL and replication alike: hosts in turn, all addresses of each, unencrypted and TLS
//! in the order of `sslmode`. As in libpq, `allow` and `prefer` try the other kind when Postgres refuses the first,
//! and a host that lets nobody in for a definite reason ends the search. Names are resolved at each attempt.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use super::{
    sql::Error,
    target::{Encryption, Host, Session, Target},
    tls,
};

/// A silent peer is probed after this long, and given up after as long again: else a query that waits for an answer
/// would wait for ever behind a cut cable.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Code of an SSLRequest, with its length.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Why nobody was let in.
pub(super) enum Failed {
    /// Postgres said no as we logged in: the other kind of encryption may do, where both are allowed.
    Refused(Error),
    /// Anything else.
    Broken(Error),
}

impl Failed {
    fn into_error(self) -> Error {
        match self {
            Failed::Refused(error) | Failed::Broken(error) => error,
        }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Failed::Broken(Error::Transient(error.to_string()))
    }
}

/// Reads and writes bytes.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + Sync> Stream for S {}

/// A connection to Postgres, before anything was said on it (but about encryption).
pub(super) struct Socket {
    stream: Box<dyn Stream>,
    /// For the channel binding `tls-server-end-point`.
    pub end_point: Option<Vec<u8>>,
    /// Nobody can listen: it is encrypted, or does not leave the machine.
    pub private: bool,
    /// Somebody has logged in on it with our own client: Postgres is told when it is dropped.
    pub logged_in: bool,
}

impl Socket {
    fn unencrypted(stream: TcpStream) -> Self {
        Socket {
            stream: Box::new(stream),
            end_point: None,
            private: false,
            logged_in: false,
        }
    }

    /// Refuses to go on when the server asks for the password itself where others can listen.
    pub fn guarded(self) -> Guarded {
        Guarded {
            open: !self.private,
            socket: self,
            seen: Vec::new(),
        }
    }
}

/// What is to be done with a socket.
pub(super) trait Login: Sync {
    /// A session.
    type Session: Send;
    /// Makes a session of it.
    fn login(&self, socket: Socket) -> impl Future<Output = Result<Self::Session, Failed>> + Send;
}

/// Connects, and logs in, until that succeeds for one address.
pub(super) async fn connect<L: Login>(target: &Target, login: &L) -> Result<L::Session, Error> {
    let mut failed = None;
    for host in &target.hosts {
        match at_host(target, host, login).await {
            Ok(connected) => return Ok(connected),
            Err(error) => {
                let at = |error| format!("Postgres at {host}: {error}");
                match error {
                    Error::Definite(error) => return Err(Error::Definite(at(error))),
                    Error::Transient(error) => {
                        failed = failed.or(Some(Error::Transient(at(error))))
                    }
                }
            }
        }
    }
    Err(failed.unwrap_or_else(|| Error::Definite("no host to connect to".into())))
}

async fn at_host<L: Login>(target: &Target, host: &Host, login: &L) -> Result<L::Session, Error> {
    let (name, port) = match host {
        Host::Unix(path) => {
            return within(target.connect_timeout, async {
                let stream = UnixStream::connect(path).await?;
                let socket = Socket {
                    stream: Box::new(stream),
                    end_point: None,
                    private: true,
                    logged_in: false,
                };
                login.login(socket).await
            })
            .await
            .map_err(Failed::into_error);
        }
        Host::Tcp(name, port) => (name.as_str(), *port),
    };
    let addresses = within(target.connect_timeout, async {
        Ok(tokio::net::lookup_host((name, port)).await?)
    });
    let mut failed = Error::Transient("its name has no address".into());
    for address in addresses.await.map_err(Failed::into_error)? {
        let attempt = within(target.connect_timeout, async {
            let mut first = None;
            for encryption in attempts(target.encryption) {
                let socket = match open(target, name, address, *encryption).await {
                    Ok(socket) => socket,
                    // Where unencrypted is good enough too, whatever is wrong with TLS does not matter.
                    Err(failed) if target.encryption == Encryption::Prefer => {
                        first = first.or(Some(failed));
                        continue;
                    }
                    Err(failed) => return Err(first.unwrap_or(failed)),
                };
                match login.login(socket).await {
                    Err(failed @ Failed::Refused(_)) => first = first.or(Some(failed)),
                    done => return done.map_err(|failed| first.unwrap_or(failed)),
                }
            }
            Err(first.expect("there is at least one attempt, and none succeeded"))
        });
        match attempt.await.map_err(Failed::into_error) {
            Ok(connected) => return Ok(connected),
            Err(Error::Definite(error)) => return Err(Error::Definite(error)),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Kinds of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attempt {
    Unencrypted,
    /// TLS, or unencrypted if the server has no TLS.
    Either,
    Tls,
}

fn attempts(encryption: Encryption) -> &'static [Attempt] {
    match encryption {
        Encryption::Disable => &[Attempt::Unencrypted],
        Encryption::Allow => &[Attempt::Unencrypted, Attempt::Tls],
        Encryption::Prefer => &[Attempt::Either, Attempt::Unencrypted],
        Encryption::Require | Encryption::VerifyCa | Encryption::VerifyFull => &[Attempt::Tls],
    }
}

async fn within<T>(
    timeout: Option<Duration>,
    work: impl Future<Output = Result<T, Failed>>,
) -> Result<T, Failed> {
    match timeout {
        None => work.await,
        Some(timeout) => tokio::time::timeout(timeout, work)
            .await
            .unwrap_or_else(|_| {
                let seconds = timeout.as_secs();
                let error = format!("no answer within {seconds} s (connect_timeout)");
                Err(Failed::Broken(Error::Transient(error)))
            }),
    }
}

async fn open(
    target: &Target,
    name: &str,
    address: std::net::SocketAddr,
    attempt: Attempt,
) -> Result<Socket, Failed> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE / 4)
        .with_retries(4);
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    if attempt == Attempt::Unencrypted {
        return Ok(Socket::unencrypted(stream));
    }

    let definite = |error: String| Failed::Broken(Error::Definite(error));
    stream.write_all(&SSL_REQUEST).await?;
    // Exactly one byte: whatever follows it in the clear must not be taken for what was said under TLS.
    match (stream.read_u8().await?, attempt) {
        (b'S', _) => {}
        (b'N', Attempt::Either) => return Ok(Socket::unencrypted(stream)),
        (b'N', _) => return Err(definite("it has no TLS, which sslmode asks for".into())),
        // An error message that nothing protects; it is not shown.
        _ => {
            let error = "it answers the request for TLS with an error".into();
            return Err(Failed::Broken(Error::Transient(error)));
        }
    }
    let config = {
        let target = target.clone();
        tokio::task::spawn_blocking(move || tls::config(&target))
            .await
            .map_err(|error| definite(error.to_string()))?
            .map_err(definite)?
    };
    let server = ServerName::try_from(name.to_owned())
        .map_err(|_| definite("its name can't be in a certificate".into()))?;
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let stream = connector.connect(server, stream).await.map_err(|error| {
        let text = format!("TLS: {error}");
        Failed::Broken(match error.kind() {
            // What rustls itself finds wrong.
            io::ErrorKind::InvalidData => Error::Definite(text),
            _ => Error::Transient(text),
        })
    })?;
    let certificates = stream.get_ref().1.peer_certificates();
    let end_point = certificates
        .and_then(<[_]>::first)
        .and_then(|certificate| tls::end_point(certificate));
    Ok(Socket {
        stream: Box::new(stream),
        end_point,
        private: true,
        logged_in: false,
    })
}

/// Whether the server is of the kind that `target_session_attrs` asks for, by what it reported.
pub(super) fn check_session(
    target: &Target,
    parameter: impl Fn(&str) -> Option<String>,
) -> Result<(), Failed> {
    let is = |name: &str| parameter(name).as_deref() == Some("on");
    let standby = is("in_hot_standby");
    let read_only = standby || is("default_transaction_read_only");
    let (right, wanted) = match target.session {
        Session::Any => (true, ""),
        Session::ReadWrite => (!read_only, "read-write"),
        Session::ReadOnly => (read_only, "read-only"),
        Session::Primary => (!standby, "a primary"),
        Session::Standby => (standby, "a standby"),
    };
    if right {
        Ok(())
    } else {
        let error = format!("it is not {wanted}, which target_session_attrs asks for");
        Err(Failed::Broken(Error::Transient(error)))
    }
}

/// Terminate.
pub(super) const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

impl Drop for Socket {
    /// Says goodbye, if that takes no waiting; else Postgres logs a broken connection.
    fn drop(&mut self) {
        if self.logged_in {
            let mut context = Context::from_waker(Waker::noop());
            let stream = &mut self.stream;
            let _ = Pin::new(&mut *stream).poll_write(&mut context, &TERMINATE);
            let _ = Pin::new(stream).poll_flush(&mut context);
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A socket for tokio-postgres, which would tell a password to whoever asks: fails if the first message of the server
/// asks for it in the clear, and the socket is not private.
pub(super) struct Guarded {
    socket: Socket,
    /// Still watching.
    open: bool,
    /// The first bytes of the server.
    seen: Vec<u8>,
}

/// `AuthenticationCleartextPassword`.
pub(super) const ASKS_FOR_PASSWORD: [u8; 9] = [b'R', 0, 0, 0, 8, 0, 0, 0, 3];

/// Said then.
pub(super) const REFUSES_CLEARTEXT: &str =
    "it asks for the password in the clear over an unencrypted connection, which we refuse";

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(context, buffer);
        if self.open && matches!(read, Poll::Ready(Ok(()))) {
            let missing = ASKS_FOR_PASSWORD.len() - self.seen.len();
            let bytes = &buffer.filled()[before..];
            self.seen.extend(bytes.iter().take(missing));
            if self.seen == ASKS_FOR_PASSWORD {
                let kind = io::ErrorKind::PermissionDenied;
                return Poll::Ready(Err(io::Error::new(kind, REFUSES_CLEARTEXT)));
            }
            self.open = self.seen.len() < ASKS_FOR_PASSWORD.len();
        }
        read
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

impl TlsStream for Guarded {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.socket.end_point {
            Some(hash) => ChannelBinding::tls_server_end_point(hash.clone()),
            None => ChannelBinding::none(),
        }
    }
}

/// Tells tokio-postgres that the socket is ready.
pub(super) struct Ready;

impl TlsConnect<Guarded> for Ready {
    type Stream = Guarded;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Guarded>>;

    fn connect(self, socket: Guarded) -> Self::Future {
        std::future::ready(Ok(socket))
    }
}
