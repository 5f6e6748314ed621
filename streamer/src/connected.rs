//! Who is connected, and what each asked for: kept for commands that an operator runs beside the streamer (`shapes diff`,
//! `explain`), and told to them on a socket in `data_dir`.
//!
//! **Why so.** Such a command needs two things: the rows, which it reads in the mirror by itself (`mirror::outside`), so that a
//! computation of minutes costs the streamer neither memory nor a thread, and ends with the command; and what only the streamer
//! knows, which replicas are here with which claims. Claims may be sensitive. Whoever may open a file in `data_dir` (mode 0700)
//! may read every row anyway, so a socket in there, of mode 0600, opens nothing that was closed: no token is needed, none can
//! be stolen, and nothing is on the network, where loopback would be open to every user of the machine.
//!
//! One request, `GET /connected`, one answer ([`Answer`]). Claims are in it, so it is never logged or printed.

use std::{
    collections::{BTreeMap, HashMap},
    io::ErrorKind,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anabranch_proto::{Position, v1};
use axum::{
    Json, Router,
    extract::{Query, State},
    routing::get,
};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::{
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::shape::{BindError, Bound, Shape, Source};

/// The socket's name in `data_dir`.
pub const SOCKET: &str = "control";

/// Longest answer that is taken: as many replicas as a streamer has, with claims and parameters of some usual length.
pub const ANSWER_BYTES_MAX: usize = 256 << 20;

/// How long the streamer may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The connected replicas.
#[derive(Default)]
pub struct Connected {
    seats: Mutex<BTreeMap<u64, Known>>,
}

/// A replica is connected as long as this lives.
pub struct Seat {
    session: u64,
    sent: Arc<Sent>,
    all: Arc<Connected>,
}

/// The position of the last commit or heartbeat that a replica was sent.
type Sent = Mutex<Option<Position>>;

/// What is known of one that is here: a [`Replica`], as small as it can be kept. There are thousands, and nobody may ever ask.
struct Known {
    replica: Box<str>,
    subscriptions: Box<[Wanted]>,
    claims: Arc<Map<String, Value>>,
    sent: Arc<Sent>,
}

/// A subscription: the shape, and the parameters.
struct Wanted {
    shape: Box<str>,
    params: Box<[(Box<str>, Box<str>)]>,
}

/// One connected replica.
#[derive(Clone, Serialize, Deserialize)]
pub struct Replica {
    /// Its id.
    pub replica: String,
    /// What it asked for.
    pub subscriptions: Vec<Subscription>,
    /// The claims of its token.
    pub claims: Map<String, Value>,
    /// The position of the last commit or heartbeat that it was sent: `epoch@lsn`.
    pub sent: Option<String>,
}

/// A subscription, as in a Hello.
#[derive(Clone, Serialize, Deserialize)]
pub struct Subscription {
    /// The shape.
    pub shape: String,
    /// The parameters that the replica chose: JSON texts.
    pub params: HashMap<String, String>,
}

/// What the streamer tells.
#[derive(Clone, Serialize, Deserialize)]
pub struct Answer {
    /// The shapes that are in force, as the config had them when the streamer started.
    pub shapes: Vec<Source>,
    /// Who is connected, in the order in which they came.
    pub replicas: Vec<Replica>,
}

/// The streamer could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error(
        "no streamer runs on data_dir {} (or it is still starting); this command asks it who is connected", _0.display()
    )]
    NotRunning(PathBuf),
    /// Not this user's.
    #[error("{} can't be opened: run this as the streamer's user", _0.display())]
    Forbidden(PathBuf),
    /// It did not answer as it should.
    #[error("the streamer's answer: {0}")]
    Answer(String),
}

/// A replica's subscriptions can't be bound.
#[derive(Debug, thiserror::Error)]
pub enum Unbound {
    /// There is no such shape.
    #[error("it subscribes to shape `{0}`, which is not defined")]
    Shape(String),
    /// A claim or a parameter is missing, or does not fit.
    #[error(transparent)]
    Parameter(#[from] BindError),
}

impl Connected {
    /// A replica has come.
    pub fn enter(
        self: &Arc<Self>,
        session: u64,
        replica: &str,
        subscriptions: &[v1::Subscription],
        claims: &Arc<Map<String, Value>>,
    ) -> Seat {
        let sent = Arc::<Sent>::default();
        let known = Known {
            replica: replica.into(),
            subscriptions: subscriptions.iter().map(Wanted::new).collect(),
            claims: claims.clone(),
            sent: sent.clone(),
        };
        self.lock().insert(session, known);
        Seat {
            session,
            sent,
            all: self.clone(),
        }
    }

    /// Those with this id, or all.
    fn replicas(&self, id: Option<&str>) -> Vec<Replica> {
        let seats = self.lock();
        let wanted = seats
            .values()
            .filter(|known| id.is_none_or(|id| &*known.replica == id));
        wanted.map(Known::told).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Known>> {
        lock(&self.seats)
    }
}

impl Known {
    fn told(&self) -> Replica {
        Replica {
            replica: self.replica.to_string(),
            subscriptions: self.subscriptions.iter().map(Wanted::told).collect(),
            claims: Map::clone(&self.claims),
            sent: lock(&self.sent).map(|position| position.to_string()),
        }
    }
}

impl Wanted {
    fn new(said: &v1::Subscription) -> Wanted {
        let params = said.params.iter();
        Wanted {
            shape: said.shape[..].into(),
            params: params
                .map(|(name, value)| (name[..].into(), value[..].into()))
                .collect(),
        }
    }

    fn told(&self) -> Subscription {
        let params = self.params.iter();
        Subscription {
            shape: self.shape.to_string(),
            params: params
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect(),
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in here can panic halfway.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seat {
    /// It was sent everything up to here.
    pub fn sent(&self, position: Position) {
        *lock(&self.sent) = Some(position);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.all.lock().remove(&self.session);
    }
}

/// Binds what a replica asked for to its claims, as its connection does: each SELECT with its shape's name.
pub fn bind(shapes: &[Shape], replica: &Replica) -> Result<Vec<(String, Bound)>, Unbound> {
    let mut bounds = Vec::new();
    for subscription in &replica.subscriptions {
        let shape = shapes
            .iter()
            .find(|shape| shape.name == subscription.shape)
            .ok_or_else(|| Unbound::Shape(subscription.shape.clone()))?;
        let bound = shape.bind(&replica.claims, &subscription.params)?;
        bounds.extend(bound.into_iter().map(|bound| (shape.name.clone(), bound)));
    }
    Ok(bounds)
}

#[derive(Clone)]
struct Told {
    connected: Arc<Connected>,
    shapes: Arc<Vec<Source>>,
}

#[derive(Deserialize)]
struct Asked {
    replica: Option<String>,
}

/// Answers on the socket in `directory`, which is this process's, until `stopping`. A streamer does its work without it, so what
/// keeps it from listening is logged.
pub async fn serve(
    directory: &Path,
    connected: Arc<Connected>,
    shapes: Vec<Source>,
    stopping: CancellationToken,
) {
    let path = directory.join(SOCKET);
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(error) => {
            let path = path.display();
            tracing::warn!(%error, "`shapes diff` and `explain` can't ask: {path} can't be listened on");
            return;
        }
    };
    let told = Told {
        connected,
        shapes: Arc::new(shapes),
    };
    let routes = Router::new()
        .route("/connected", get(tell))
        .with_state(told);
    let served = axum::serve(listener, routes).with_graceful_shutdown(stopping.cancelled_owned());
    if let Err(error) = served.await {
        tracing::warn!(%error, "`shapes diff` and `explain` can't ask any more");
    }
    let _ = std::fs::remove_file(&path);
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    // One that is left is of a streamer that was killed: the directory is locked by this one.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn tell(State(told): State<Told>, Query(asked): Query<Asked>) -> Json<Answer> {
    Json(Answer {
        shapes: told.shapes.to_vec(),
        replicas: told.connected.replicas(asked.replica.as_deref()),
    })
}

/// Asks the streamer on `directory` for all replicas, or those with this id.
pub async fn ask(directory: &Path, replica: Option<&str>) -> Result<Answer, Error> {
    match timeout(ANSWER_WITHIN, asked(directory, replica)).await {
        Ok(answered) => answered,
        Err(_) => Err(Error::Answer("it did not come in time".into())),
    }
}

async fn asked(directory: &Path, replica: Option<&str>) -> Result<Answer, Error> {
    let path = directory.join(SOCKET);
    let stream = UnixStream::connect(&path)
        .await
        .map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => Error::Forbidden(path.clone()),
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                Error::NotRunning(directory.to_owned())
            }
            _ => Error::Answer(error.to_string()),
        })?;
    let wrong = |error: &dyn std::fmt::Display| Error::Answer(error.to_string());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| wrong(&error))?;
    let connection = tokio::spawn(connection);
    let query = match replica {
        Some(replica) => format!("?replica={replica}"),
        None => String::new(),
    };
    let request = Request::get(format!("/connected{query}"))
        .header(header::HOST, "localhost")
        .body(Empty::<Bytes>::new())
        .map_err(|error| wrong(&error))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| wrong(&error))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    let body = body
        .collect()
        .await
        .map_err(|error| wrong(&error))?
        .to_bytes();
    connection.abort();
    if !status.is_success() {
        return Err(Error::Answer(format!("status {status}")));
    }
    // What serde says of it might show a claim.
    serde_json::from_slice(&body)
        .map_err(|_| Error::Answer("it is of another version of the program".into()))
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{Epoch, Lsn};

    use super::*;

    fn connected() -> Arc<Connected> {
        Arc::new(Connected::default())
    }

    fn enter(connected: &Arc<Connected>, session: u64, id: &str) -> Seat {
        let subscription = v1::Subscription {
            shape: "s".into(),
            params: HashMap::from([("from".into(), "7".into())]),
        };
        let claims = Map::from_iter([("team".to_owned(), Value::from(3))]);
        connected.enter(session, id, &[subscription], &Arc::new(claims))
    }

    #[tokio::test]
    async fn who_is_here_is_told_until_they_leave_and_to_the_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let connected = connected();
        let refused = ask(directory.path(), None).await;
        assert!(matches!(refused, Err(Error::NotRunning(_))));
        let stopping = CancellationToken::new();
        let source = Source {
            name: "s".into(),
            ..Source::default()
        };
        let serving = tokio::spawn({
            let (connected, stopping) = (connected.clone(), stopping.clone());
            let directory = directory.path().to_owned();
            async move { serve(&directory, connected, vec![source], stopping).await }
        });
        let path = directory.path().join(SOCKET);
        while !path.exists() {
            tokio::task::yield_now().await;
        }
        let (one, _two) = (enter(&connected, 1, "one"), enter(&connected, 2, "two"));
        one.sent(Position {
            epoch: Epoch(5),
            lsn: Lsn(0x16B_3748),
        });
        let answer = ask(directory.path(), None).await.unwrap();
        assert_eq!(answer.shapes[0].name, "s");
        let ids: Vec<_> = answer.replicas.iter().map(|of| &of.replica[..]).collect();
        assert_eq!(ids, ["one", "two"]);
        let sent = answer.replicas[0].sent.as_deref().unwrap();
        assert!(sent.ends_with("@0/16B3748"), "{sent}");
        assert_eq!(answer.replicas[1].claims["team"], 3);
        let answer = ask(directory.path(), Some("two")).await.unwrap();
        assert_eq!(answer.replicas.len(), 1);
        drop(one);
        let answer = ask(directory.path(), None).await.unwrap();
        assert_eq!(answer.replicas.len(), 1);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        stopping.cancel();
        serving.await.unwrap();
        assert!(!path.exists());
    }
}
