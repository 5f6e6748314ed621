//! Fetches the keys that an issuer publishes (`auth.jwt.jwks`).
//!
//! They are fetched at the start, which fails without them; then every so often, and when a token names a key that is not known,
//! though not more often than every [`UNKNOWN_GAP_MIN`]: anybody can make up names of keys. While a fetch fails, the set that
//! came last counts on, and that is said in the log and on the page. A set that comes counts as it is: a key that is not in it
//! any more verifies nothing, and the streams that it opened end.
//!
//! What answers is not trusted with more than its keys: it is asked by TLS, redirects are not followed, and size and time are
//! limited.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, StatusCode, Uri,
    client::conn::http1,
    header::{ACCEPT, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use jsonwebtoken::Algorithm;
use rustls::{ClientConfig, pki_types::ServerName};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    Error,
    key::{Key, KeyId, Set},
};
use crate::{config::Jwks, tls};

/// The least time between the end of a fetch and one for a key that is not known: so many an attacker can cause, and so long a
/// new key waits at worst.
pub const UNKNOWN_GAP_MIN: Duration = Duration::from_secs(10);

/// A hundred RSA keys with their certificate chains.
pub const BYTES_MAX: usize = 512 * 1024;

/// One fetch, from connecting to the last byte. Replicas wait for it.
pub const FETCH_TIME: Duration = Duration::from_secs(5);

/// A start tries again within this time: streamer and issuer may start together.
const START_TIME: Duration = Duration::from_secs(15);

/// Between two attempts of a start.
const START_PAUSE: Duration = Duration::from_secs(1);

/// What the page tells of them.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where they are from.
    pub url: String,
    /// Keys that verify tokens.
    pub keys: usize,
    /// Seconds since they were fetched.
    pub age_seconds: u64,
    /// Why the last fetch failed.
    pub error: Option<String>,
}

/// The keys as they were last published.
pub(super) struct Published {
    source: Jwks,
    tls: Option<Arc<ClientConfig>>,
    set: RwLock<Arc<Set>>,
    last: Mutex<Last>,
    /// The end of the last attempt. Held while there is one: who needs a key waits for it, and does not make another.
    attempt: tokio::sync::Mutex<Instant>,
    changes: Arc<watch::Sender<u64>>,
}

struct Last {
    fetched: Instant,
    error: Option<String>,
}

impl Published {
    /// The first fetch.
    pub async fn fetch(source: Jwks, changes: Arc<watch::Sender<u64>>) -> Result<Published, Error> {
        let tls = match source.url.scheme_str() {
            Some("https") => {
                let client = tls::client(source.ca.as_deref()).map_err(Error::Authority)?;
                Some(client)
            }
            _ => None,
        };
        let began = Instant::now();
        let set = loop {
            let reason = match fetch(&source.url, tls.as_ref()).await {
                Ok(set) if set.len() > 0 => break set,
                Ok(set) => format!("no key can be used: {}", said(&set)),
                Err(reason) => reason,
            };
            if began.elapsed() >= START_TIME {
                return Err(Error::Published(format!(
                    "{}: {reason}. Without these keys no token can be verified: see that this machine reaches that address, and that it \
                     answers with a JSON Web Key Set; or give the key itself by auth.jwt.public_key_file",
                    source.url
                )));
            }
            tracing::warn!(
                reason,
                "the keys of auth.jwt.jwks could not be fetched; trying again"
            );
            tokio::time::sleep(START_PAUSE).await;
        };
        tracing::info!(
            keys = set.len(),
            left_out = set.left_out.len(),
            "keys fetched"
        );
        let now = Instant::now();
        Ok(Published {
            source,
            tls,
            set: RwLock::new(Arc::new(set)),
            last: Mutex::new(Last {
                fetched: now,
                error: None,
            }),
            attempt: tokio::sync::Mutex::new(now),
            changes,
        })
    }

    /// The key of a token.
    pub fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<Key> {
        self.set().find(kid, algorithm).cloned()
    }

    /// Whether a key is still published.
    pub fn holds(&self, id: &KeyId) -> bool {
        self.set().holds(id)
    }

    /// Fetches them again, unless they just were.
    pub async fn fetch_for_unknown(&self) {
        self.fetch_again(UNKNOWN_GAP_MIN).await;
    }

    /// Fetches them now and then, for ever.
    pub async fn keep(&self) {
        loop {
            tokio::time::sleep(self.source.refresh).await;
            self.fetch_again(Duration::ZERO).await;
        }
    }

    async fn fetch_again(&self, gap: Duration) {
        let mut attempt = self.attempt.lock().await;
        if attempt.elapsed() < gap {
            return;
        }
        let fetched = fetch(&self.source.url, self.tls.as_ref()).await;
        *attempt = Instant::now();
        match fetched {
            Ok(set) => self.take(set),
            Err(reason) => {
                let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.error.as_ref() != Some(&reason) {
                    tracing::error!(
                        reason,
                        "the keys of auth.jwt.jwks could not be fetched; those that came last count on"
                    );
                }
                last.error = Some(reason);
            }
        }
    }

    fn take(&self, set: Set) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.fetched = Instant::now();
        if last.error.take().is_some() {
            tracing::info!("the keys of auth.jwt.jwks are fetched again");
        }
        drop(last);
        if set.is_same(&self.set()) {
            return;
        }
        if set.len() == 0 {
            let reason = said(&set);
            tracing::error!(reason, "no key is published any more: no token is good");
        }
        tracing::info!(
            keys = set.len(),
            left_out = set.left_out.len(),
            "other keys are published"
        );
        *self.set.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(set);
        self.changes.send_modify(|count| *count += 1);
    }

    fn set(&self) -> Arc<Set> {
        self.set
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// For the page.
    pub fn report(&self) -> Report {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        Report {
            url: self.source.url.to_string(),
            keys: self.set().len(),
            age_seconds: last.fetched.elapsed().as_secs(),
            error: last.error.clone(),
        }
    }
}

/// Why there is no key in a set.
fn said(set: &Set) -> String {
    match set.left_out.first() {
        Some(reason) => format!("one {reason}"),
        None => "the list `keys` is empty".to_owned(),
    }
}

async fn fetch(url: &Uri, tls: Option<&Arc<ClientConfig>>) -> Result<Set, String> {
    let bytes = timeout(FETCH_TIME, get(url, tls))
        .await
        .map_err(|_| format!("no whole answer within {FETCH_TIME:?}"))??;
    Set::parse(&bytes).map_err(|reason| format!("what answers there {reason}"))
}

async fn get(url: &Uri, tls: Option<&Arc<ClientConfig>>) -> Result<Bytes, String> {
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = url.port_u16().unwrap_or(match tls {
        Some(_) => 443,
        None => 80,
    });
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| error.to_string())?;
    match tls {
        None => ask(stream, url).await,
        Some(tls) => {
            let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
            let connecting = TlsConnector::from(tls.clone()).connect(name, stream);
            let stream = connecting.await.map_err(|error| format!("TLS: {error}"))?;
            ask(stream, url).await
        }
    }
}

async fn ask(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    url: &Uri,
) -> Result<Bytes, String> {
    let failed = |error: hyper::Error| format!("HTTP: {error}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(failed)?;
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let host = url.authority().map_or("", |authority| authority.as_str());
    let request = Request::get(path)
        .header(HOST, host)
        .header(ACCEPT, "application/json")
        .header(
            USER_AGENT,
            concat!("anabranch-streamer/", env!("CARGO_PKG_VERSION")),
        )
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        let status = response.status();
        if status.is_redirection() {
            return Err(format!(
                "it answers {status}, which is not followed: give the address that it leads to"
            ));
        }
        if status != StatusCode::OK {
            return Err(format!("it answers {status}"));
        }
        let body = Limited::new(response.into_body(), BYTES_MAX);
        match body.collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) => Err(format!("what it answers can't be read: {error}")),
        }
    };
    let driven = async {
        // What is wrong with it the answer tells.
        let _ = connection.await;
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        answer = answer => answer,
        never = driven => match never {},
    }
}
