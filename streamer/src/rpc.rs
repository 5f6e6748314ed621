//! The gRPC rim: two calls. `Replicate` checks who calls and what it asks for, and starts its [`Session`]; `write` has its
//! local transactions made in Postgres.
//!
//! Nothing about the replica is believed but its verified token of access and its authenticated resume token.

mod budget;
mod permit;
pub mod quota;
mod write;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use anabranch_proto::{
    MESSAGE_BYTES_MAX, PROTOCOL_VERSION, PUSHBACK, SILENCE_MAX, SUBSCRIPTIONS_MAX, down::Encoded,
    v1,
};
use prost::Message;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tokio_stream::{Stream, StreamExt};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::{MetadataMap, MetadataValue},
};

pub use self::{
    budget::Budgets,
    quota::Quotas,
    write::{WRITERS_MAX, Writers},
};
use self::{
    permit::{Permit, unauthenticated},
    quota::{Entered, Kind, ROOM_AFTER},
};
use crate::{
    auth::{Principal, Shown, Verifier, certificate::Certificate},
    catchup::View,
    config::Role,
    connected::Connected,
    definition::Keeper,
    engine::{Inputs, Progress},
    events::Waiting,
    metrics::Metrics,
    policy::Policies,
    postgres::writer::{Replica, Rules},
    receipts,
    session::{
        Ended, Handle, MESSAGES_AHEAD, Readers, Rounds, Session, TableView, Total,
        admission::{Admission, Admitted},
        gathering::Requests,
    },
    shape::{BindError, Bound, Shape},
    table::Defaults,
    token,
};

/// Connected replicas at once. Each costs a queue, a connection and two tasks; beyond this, more streamers are the way.
pub const SESSIONS_MAX: i64 = 10_000;

/// Bytes of names and parameters in a Hello.
pub const HELLO_BYTES_MAX: usize = 64 * 1024;

/// A replica says Hello within this time, or is not one.
const HELLO_TIME: Duration = Duration::from_secs(10);

/// What calls need.
pub struct Core {
    /// Checks who calls.
    pub verifier: Arc<Verifier>,
    /// How much each may do.
    pub quotas: Arc<Quotas>,
    /// The defined shapes.
    pub shapes: Vec<Shape>,
    /// How replicas get their receipts; `None`: no shape takes writes.
    pub receipts: Option<Shape>,
    /// How conflicting writes are settled.
    pub policies: Policies,
    /// How local writes are made; `None`: no shape takes any.
    pub writes: Option<Writes>,
    /// Makes and checks resume tokens.
    pub token_key: token::Key,
    /// The engine.
    pub inputs: Inputs,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    /// What columns hold that an INSERT leaves out.
    pub defaults: watch::Receiver<Arc<Defaults>>,
    /// For catch-ups.
    pub readers: Arc<Readers>,
    /// For what they fill.
    pub rounds: Arc<Rounds>,
    /// Where sessions are served together.
    pub gathering: Requests,
    /// Who may wait to be served.
    pub admission: Arc<Admission>,
    /// Who is here.
    pub connected: Arc<Connected>,
    /// Keeps what replicas are shown, for when it changes.
    pub keeper: Arc<Keeper>,
    /// Counts what the initial copy brings, if one is under way.
    pub copied: watch::Receiver<u64>,
    /// What waits for the engine.
    pub waiting: Arc<Waiting>,
    /// Bytes of one queue at most.
    pub queue_bytes_max: usize,
    /// Bytes of all queues.
    pub queues: Arc<Total>,
    /// Counted here.
    pub metrics: Arc<Metrics>,
    /// The tasks of sessions.
    pub tasks: TaskTracker,
    /// The streamer stops.
    pub stopping: CancellationToken,
}

/// How local writes are made.
pub struct Writes {
    /// The connections that make them.
    pub writers: Arc<Writers>,
    /// Whom they run as.
    pub role: Option<Role>,
    /// A larger local transaction is rejected.
    pub transaction_bytes_max: usize,
    /// How many ids are leased.
    pub budgets: Arc<Budgets>,
}

/// The service.
pub struct Service {
    core: Core,
    sessions: AtomicU64,
}

impl Service {
    /// As a tonic service, with its limits.
    pub fn new(core: Core) -> v1::anabranch_server::AnabranchServer<Service> {
        let service = Service {
            core,
            sessions: AtomicU64::new(0),
        };
        v1::anabranch_server::AnabranchServer::new(service)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Turns a Hello into a session, or says why not.
    fn open(
        &self,
        principal: &Principal,
        hello: v1::Hello,
        admitted: Admitted,
        out: mpsc::Sender<Box<Encoded>>,
    ) -> Result<Session, Status> {
        let core = &self.core;
        if hello.encoded_len() > HELLO_BYTES_MAX + 16 * token::FINGERPRINTS_MAX {
            return Err(Status::invalid_argument("Hello is too long"));
        }
        check_version(hello.protocol_version)?;
        check_replica_id(&hello.replica_id)?;
        let mut bounds = self.bind(principal, &hello.subscriptions)?;
        if let Some(shape) = &core.receipts {
            let receipts = receipts::bind(shape, &hello.replica_id, principal.subject.as_deref())
                .map_err(|error| Status::internal(error.to_string()))?;
            bounds.extend(
                receipts
                    .into_iter()
                    .map(|bound| (shape.name.clone(), bound)),
            );
        }
        let views = self.views(&bounds)?;
        let holder = core
            .token_key
            .bind(&hello.replica_id, principal.subject.as_deref());
        let proof = match &*hello.token_replica_id {
            "" => holder.verify(&hello.resume_token),
            // Whoever knows both id and token could as well have said Hello as that replica: it proves no less.
            former => {
                check_replica_id(former)?;
                tracing::warn!(
                    replica = hello.replica_id,
                    former,
                    "a replica's file was restored from a backup, or copied, and has a new id"
                );
                core.metrics.forks.inc();
                let holder = core.token_key.bind(former, principal.subject.as_deref());
                holder.verify(&hello.resume_token)
            }
        };
        let fingerprints: Vec<_> = views.iter().map(|view| view.fingerprint()).collect();
        let id = self.sessions.fetch_add(1, Ordering::Relaxed);
        let tables = views.iter().map(|view| view.table().oid).collect();
        let seat = (core.connected).enter(
            id,
            &hello.replica_id,
            &hello.subscriptions,
            &principal.claims,
        );
        // Receipts are shown in one way only.
        let shown = |view: &&Arc<TableView>| view.table().schema != receipts::SCHEMA;
        let used = (core.keeper).used(views.iter().filter(shown).cloned().collect());
        Ok(Session {
            handle: Handle::new(id, tables, core.queue_bytes_max, core.queues.clone()),
            bounds: Arc::new(bounds.into_iter().map(|(_, bound)| bound).collect()),
            views,
            proof,
            issue: Box::new(move |position| {
                seat.sent(position);
                used.now();
                holder.issue(position, &fingerprints)
            }),
            inputs: core.inputs.clone(),
            progress: core.progress.clone(),
            waiting: core.waiting.clone(),
            defaults: core.defaults.clone(),
            readers: core.readers.clone(),
            rounds: core.rounds.clone(),
            room: None,
            owner: principal.subject.as_ref().unwrap_or(&hello.replica_id)[..].into(),
            gathering: core.gathering.clone(),
            admitted: Some(admitted),
            copied: core.copied.clone(),
            zstd: hello.zstd,
            out,
            metrics: core.metrics.clone(),
            stopping: core.stopping.clone(),
        })
    }

    /// Who calls, and that he may call now: nothing of what he says is read before.
    async fn enter<T>(
        &self,
        request: &Request<T>,
        kind: Kind,
    ) -> Result<(Principal, Entered), Status> {
        let core = &self.core;
        let authorization = request.metadata().get("authorization");
        let certificate = request.extensions().get::<Arc<Certificate>>();
        let shown = Shown {
            authorization: authorization.and_then(|value| value.to_str().ok()),
            certificate: certificate.map(Arc::as_ref),
        };
        let admitted = core.verifier.admit_late(shown).await;
        let principal = admitted.map_err(unauthenticated)?;
        let (open, what) = match kind {
            Kind::Stream => (&core.metrics.sessions, "too many replicas are connected"),
            Kind::Write => (&core.metrics.writing, "too many replicas write"),
        };
        if open.get() >= SESSIONS_MAX {
            return Err(exhausted(what, ROOM_AFTER));
        }
        let entered = core.quotas.enter(principal.account(), kind, Instant::now());
        let entered = entered.map_err(|refused| {
            core.metrics.limited.inc();
            exhausted(&refused.what, refused.after)
        })?;
        Ok((principal, entered))
    }

    fn views(&self, bounds: &[(String, Bound)]) -> Result<Vec<Arc<TableView>>, Status> {
        TableView::of(bounds, &self.core.policies)
            .map_err(|differ| Status::failed_precondition(differ.to_string()))
    }

    fn bind(
        &self,
        principal: &Principal,
        subscriptions: &[v1::Subscription],
    ) -> Result<Vec<(String, Bound)>, Status> {
        if subscriptions.is_empty() || subscriptions.len() > SUBSCRIPTIONS_MAX {
            return Err(Status::invalid_argument(format!(
                "a replica subscribes to 1 to {SUBSCRIPTIONS_MAX} shapes"
            )));
        }
        let mut bounds = Vec::new();
        for subscription in subscriptions {
            let shape = self
                .core
                .shapes
                .iter()
                .find(|shape| shape.name == subscription.shape)
                .ok_or_else(|| Status::not_found("a subscribed shape is not defined here"))?;
            let bound = shape
                .bind(&principal.claims, &subscription.params)
                .map_err(|error| match error {
                    BindError::MissingClaim(..) => Status::permission_denied(error.to_string()),
                    BindError::Parameter(..) => Status::invalid_argument(error.to_string()),
                })?;
            bounds.extend(bound.into_iter().map(|bound| (shape.name.clone(), bound)));
        }
        Ok(bounds)
    }
}

#[tonic::async_trait]
impl v1::anabranch_server::Anabranch for Service {
    type ReplicateStream = Downward<Encoded>;

    async fn replicate(
        &self,
        request: Request<Streaming<v1::Up>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let (principal, entered) = self.enter(&request, Kind::Stream).await?;
        let admitted = (self.core.admission.enter(Instant::now()))
            .map_err(|after| exhausted("too many replicas wait to be served", after))?;
        let mut up = request.into_inner();
        let hello = match timeout(HELLO_TIME, up.next()).await {
            Ok(Some(Ok(v1::Up {
                kind: Some(v1::up::Kind::Hello(hello)),
            }))) => hello,
            Ok(Some(Err(status))) => return Err(status),
            _ => return Err(Status::invalid_argument("the first message must be Hello")),
        };
        let (out, messages) = mpsc::channel(MESSAGES_AHEAD);
        let replica = hello.replica_id.clone();
        let mut session = self.open(&principal, hello, admitted, out)?;
        let permit = Permit::new(self.core.verifier.clone(), principal);

        let (over, ended) = oneshot::channel();
        let metrics = self.core.metrics.clone();
        self.core.tasks.spawn(async move {
            let counted = metrics.session_started();
            tracing::info!(replica, session = session.handle.id(), "replica connected");
            let status = tokio::select! {
                ended = session.run() => status_of(ended),
                status = listen(&mut up, &permit) => status,
                status = permit.lost() => status,
            };
            drop((session, up, counted, entered));
            tracing::info!(replica, reason = status.message(), "replica disconnected");
            let _ = over.send(status);
        });
        Ok(Response::new(Downward { messages, ended }))
    }

    type WriteStream = Downward<v1::WriteDown>;

    async fn write(
        &self,
        request: Request<Streaming<v1::WriteUp>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let (principal, entered) = self.enter(&request, Kind::Write).await?;
        let Some(writes) = &self.core.writes else {
            return Err(Status::unimplemented("no shape is writable here"));
        };
        let mut up = request.into_inner();
        let hello = match timeout(HELLO_TIME, up.next()).await {
            Ok(Some(Ok(v1::WriteUp {
                kind: Some(v1::write_up::Kind::Hello(hello)),
            }))) => hello,
            Ok(Some(Err(status))) => return Err(status),
            _ => {
                return Err(Status::invalid_argument(
                    "the first message must be WriteHello",
                ));
            }
        };
        check_version(hello.protocol_version)?;
        check_replica_id(&hello.replica_id)?;
        let bounds = self.bind(&principal, &hello.subscriptions)?;
        let (down, messages) = mpsc::channel(MESSAGES_AHEAD);
        let call = write::Call {
            replica: Replica {
                role: role_of(&principal, writes.role.as_ref())?,
                id: hello.replica_id,
                subject: principal.subject.clone().unwrap_or_default(),
                claims_json: plain_json(serde_json::Map::clone(&principal.claims).into()),
            },
            rules: rules(&self.views(&bounds)?),
            metrics: self.core.metrics.clone(),
            writers: writes.writers.clone(),
            transaction_bytes_max: writes.transaction_bytes_max,
            budgets: writes.budgets.clone(),
            permit: Permit::new(self.core.verifier.clone(), principal),
            entered,
            down,
        };
        let (over, ended) = oneshot::channel();
        let metrics = self.core.metrics.clone();
        let stopping = self.core.stopping.clone();
        self.core.tasks.spawn(async move {
            metrics.writing.inc();
            let status = tokio::select! {
                status = call.run(up) => status,
                () = stopping.cancelled() => Status::unavailable("the streamer is stopping"),
                status = call.permit.lost() => status,
            };
            metrics.writing.dec();
            let _ = over.send(status);
        });
        Ok(Response::new(Downward { messages, ended }))
    }
}

/// The messages of a call, then the status that ends it.
pub struct Downward<T> {
    /// Boxed: a channel has room for 32 and more, whatever its limit, and two calls of three never have one in it.
    messages: mpsc::Receiver<Box<T>>,
    ended: oneshot::Receiver<Status>,
}

impl<T> Stream for Downward<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(message) = ready!(self.messages.poll_recv(context)) {
            return Poll::Ready(Some(Ok(*message)));
        }
        if self.ended.is_terminated() {
            return Poll::Ready(None);
        }
        let status = match ready!(Pin::new(&mut self.ended).poll(context)) {
            Ok(status) => status,
            Err(_) => Status::unavailable("the streamer is stopping"),
        };
        Poll::Ready((status.code() != Code::Ok).then_some(Err(status)))
    }
}

/// Takes acks and newer tokens until the replica ends the call, or says nothing for too long.
async fn listen(up: &mut Streaming<v1::Up>, permit: &Permit) -> Status {
    loop {
        match timeout(SILENCE_MAX, up.next()).await {
            Err(_) => return Status::unavailable("nothing was heard from the replica"),
            Ok(None) => return Status::ok("the replica ended the call"),
            Ok(Some(Err(status))) => return status,
            Ok(Some(Ok(v1::Up {
                kind: Some(v1::up::Kind::Ack(_)),
            }))) => {}
            Ok(Some(Ok(v1::Up {
                kind: Some(v1::up::Kind::Renew(renew)),
            }))) => {
                // Boxed: hours lie between one and the next.
                if let Err(status) = Box::pin(permit.renew(&renew.token)).await {
                    return status;
                }
            }
            Ok(Some(Ok(_))) => {
                return Status::invalid_argument("after Hello, only Ack and Renew are said");
            }
        }
    }
}

fn status_of(ended: Result<(), Ended>) -> Status {
    match ended {
        Ok(()) | Err(Ended::Gone) => Status::ok("the replica disconnected"),
        Err(error @ (Ended::Stopping | Ended::Later(_))) => Status::unavailable(error.to_string()),
        Err(Ended::Mirror(error)) => {
            tracing::error!(%error, "a catch-up failed");
            Status::unavailable("the streamer can't read its mirror; see its log")
        }
    }
}

/// What a replica may write of what it sees.
fn rules(views: &[Arc<TableView>]) -> Rules {
    let mut rules = Rules::default();
    for rule in views.iter().filter_map(|view| view.rule()) {
        rules.allow(rule);
    }
    rules
}

/// The role of Postgres that a principal's writes run as; `None`: that of the connection.
fn role_of(principal: &Principal, role: Option<&Role>) -> Result<Option<String>, Status> {
    let Some(role) = role else { return Ok(None) };
    let denied = |what: &str| Status::permission_denied(format!("{what} `{}`", role.claim));
    match principal.claims.get(&role.claim) {
        Some(serde_json::Value::String(name)) if role.allowed.contains(name) => {
            Ok(Some(name.clone()))
        }
        Some(_) => Err(denied("writes are not allowed for the role in claim")),
        None => Err(denied("writes need a role, and the token has no claim")),
    }
}

/// A refusal with the time after which to come again.
fn exhausted(what: &str, after: Duration) -> Status {
    let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
    let mut metadata = MetadataMap::new();
    metadata.insert(PUSHBACK, MetadataValue::from(millis));
    Status::with_metadata(
        Code::ResourceExhausted,
        format!("{what}; try again later"),
        metadata,
    )
}

fn check_version(version: u32) -> Result<(), Status> {
    if version == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "the replica speaks protocol version {version}, this streamer {PROTOCOL_VERSION}: run the same version of both"
    )))
}

fn check_replica_id(id: &str) -> Result<(), Status> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if (1..=64).contains(&id.len()) && id.bytes().all(allowed) {
        return Ok(());
    }
    Err(Status::invalid_argument(
        "replica_id must be 1 to 64 of [A-Za-z0-9_-]",
    ))
}

/// JSON of ASCII only: the encoding of a database may have no other.
fn plain_json(value: serde_json::Value) -> String {
    use std::fmt::Write;
    let json = value.to_string();
    let mut plain = String::with_capacity(json.len());
    for c in json.chars() {
        match c.is_ascii() {
            true => plain.push(c),
            // Beyond ASCII it can only be in a string.
            false => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                write!(plain, "\\u{unit:04x}").expect("a string grows");
            }),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_in_ascii_are_the_same_claims() {
        let claims = serde_json::json!({"sub": "Zoë \"😀\" \u{7f}", "näme": ["\\u00e9", 1]});
        let plain = plain_json(claims.clone());
        assert!(plain.is_ascii(), "{plain}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&plain).unwrap(),
            claims
        );
    }
}
