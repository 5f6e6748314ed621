//! Light replicas: thousands in one process, without files.
//!
//! Each says Hello, acknowledges, and understands as much of what comes as is needed to know its position, to count its rows,
//! and to tell when they came. Like a replica it keeps its resume token, comes back when its stream ends, and obeys the
//! streamer where that says when. What it holds is not compared with anything: that is what real replicas are for.
//!
//! All of a [`Fleet`] run on threads of their own, so that their CPU time can be told from that of others.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anabranch_proto::{
    ACK_EVERY, Epoch, Lsn, MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Position,
    codec::SmallBuffers,
    ops,
    record::{self, ValueRef},
    v1::{self, element::Kind},
};
use bytes::{Bytes, BytesMut};
use prost::Message;
use rand::Rng;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{runtime::Runtime, sync::watch, task::JoinSet};
use tokio_stream::{StreamExt, wrappers::IntervalStream};
use tonic::{
    IntoStreamingRequest, Request, Status, Streaming,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

use crate::process;

/// Name of their threads.
const THREADS: &str = "light";

/// Streams on one connection at most, as the streamer has it.
const STREAMS_MAX: usize = 100;

/// Descriptors that are not connections.
const DESCRIPTORS_BESIDE: u64 = 200;

/// The first pause before a stream is tried again, doubled with each failure up to the longest; as a replica does.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A fleet to be.
pub struct Settings {
    /// `http://host:port`.
    pub url: String,
    /// What all use as their token.
    pub token: String,
    /// How many there are.
    pub replicas: usize,
    /// How many connections they share.
    pub connections: usize,
    /// What each subscribes to, by its number.
    pub subscriptions: Box<dyn Fn(usize) -> Vec<v1::Subscription> + Send + Sync>,
    /// The column, in the order of the wire, that tells when a row was made, in microseconds since 1970; a value below 0
    /// is a mark: see [`Fleet::marked`].
    pub made: usize,
}

/// A subscription to a shape with one parameter.
pub fn subscription(shape: &str, params: &[(&str, String)]) -> v1::Subscription {
    let params = params.iter();
    v1::Subscription {
        shape: shape.into(),
        params: params
            .map(|(name, value)| ((*name).into(), value.clone()))
            .collect(),
    }
}

/// Light replicas, running.
pub struct Fleet {
    shared: Arc<Shared>,
    /// `None` once it is dropped.
    runtime: Option<Runtime>,
}

/// What was received since it was last looked at.
#[derive(Clone, Debug, Default)]
pub struct Received {
    /// Messages.
    pub messages: u64,
    /// Operations on rows.
    pub rows: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// How long each row was on its way since it was made, in seconds, in any order.
    pub latencies: Vec<f64>,
}

struct Shared {
    settings: Settings,
    replicas: Vec<State>,
    /// Bumped to cut all connections; none is made while it is odd.
    cuts: watch::Sender<u64>,
    reading: watch::Sender<bool>,
    measuring: AtomicBool,
    messages: AtomicU64,
    rows: AtomicU64,
    bytes: AtomicU64,
    connects: AtomicU64,
    hints: AtomicU64,
    /// Microseconds.
    latencies: Mutex<Vec<i64>>,
    last_mark: Mutex<Option<Instant>>,
    last_failure: Mutex<String>,
}

/// What is known of one.
#[derive(Default)]
struct State {
    token: Mutex<Bytes>,
    epoch: AtomicU64,
    lsn: AtomicU64,
    mark: AtomicI64,
}

/// A stream came to its end.
struct Ended {
    why: String,
    /// The streamer says when to come back.
    hint: Option<Duration>,
}

impl Fleet {
    /// Starts them. Panics, and says what to do, if this machine does not allow as many connections.
    pub fn start(settings: Settings) -> Fleet {
        let (replicas, connections) = (settings.replicas, settings.connections);
        assert!(
            (replicas.div_ceil(STREAMS_MAX)..=replicas).contains(&connections),
            "{replicas} replicas on {connections} connections"
        );
        allow_descriptors(connections as u64 + DESCRIPTORS_BESIDE);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(THREADS)
            .enable_all()
            .build()
            .expect("a runtime needs nothing but threads");
        let shared = Arc::new(Shared {
            replicas: (0..replicas).map(|_| State::default()).collect(),
            settings,
            cuts: watch::Sender::new(0),
            reading: watch::Sender::new(true),
            measuring: AtomicBool::new(false),
            messages: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            connects: AtomicU64::new(0),
            hints: AtomicU64::new(0),
            latencies: Mutex::default(),
            last_mark: Mutex::default(),
            last_failure: Mutex::default(),
        });
        for connection in 0..connections {
            let own: Vec<usize> = (connection..replicas).step_by(connections).collect();
            runtime.spawn(keep(shared.clone(), own));
        }
        Fleet {
            shared,
            runtime: Some(runtime),
        }
    }

    /// How many they are.
    pub fn replicas(&self) -> usize {
        self.shared.replicas.len()
    }

    /// All connections break at once, and none is made until [`let_back`](Self::let_back).
    pub fn lose(&self) {
        self.shared
            .cuts
            .send_if_modified(|cuts| std::mem::replace(cuts, *cuts | 1) & 1 == 0);
    }

    /// They may come back.
    pub fn let_back(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += *cuts & 1);
    }

    /// Whether they read what comes, beyond what HTTP/2 takes by itself.
    pub fn read(&self, reading: bool) {
        self.shared.reading.send_replace(reading);
    }

    /// How many have a position at or beyond this.
    pub fn at(&self, lsn: Lsn) -> usize {
        let replicas = self.shared.replicas.iter();
        replicas
            .filter(|replica| replica.lsn.load(Relaxed) >= lsn.0)
            .count()
    }

    /// How many have seen a row with this mark (below 0, and each below the one before), and when the last of them did.
    pub fn marked(&self, mark: i64) -> (usize, Option<Instant>) {
        let replicas = self.shared.replicas.iter();
        let count = replicas.filter(|replica| replica.mark.load(Relaxed) <= mark);
        (count.count(), *lock(&self.shared.last_mark))
    }

    /// Measures from here on how long rows are on their way, or no longer.
    pub fn measure(&self, measuring: bool) {
        self.shared.measuring.store(measuring, Relaxed);
    }

    /// What came since this was last asked.
    pub fn received(&self) -> Received {
        let micros = std::mem::take(&mut *lock(&self.shared.latencies));
        Received {
            messages: self.shared.messages.swap(0, Relaxed),
            rows: self.shared.rows.swap(0, Relaxed),
            bytes: self.shared.bytes.swap(0, Relaxed),
            latencies: micros.into_iter().map(|one| one as f64 / 1e6).collect(),
        }
    }

    /// Streams that were begun, and how often the streamer said when to come back instead.
    pub fn attempts(&self) -> (u64, u64) {
        let of = |count: &AtomicU64| count.load(Relaxed);
        (of(&self.shared.connects), of(&self.shared.hints))
    }

    /// Why a stream ended last.
    pub fn last_failure(&self) -> String {
        lock(&self.shared.last_failure).clone()
    }

    /// CPU seconds of all fleets of this process.
    pub fn cpu_seconds() -> f64 {
        process::cpu_seconds_of_threads(THREADS)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Keeps one connection, and the streams of its replicas.
async fn keep(shared: Arc<Shared>, own: Vec<usize>) {
    let mut cuts = shared.cuts.subscribe();
    let mut failures = 0;
    loop {
        let Ok(cut) = cuts.wait_for(|cuts| cuts & 1 == 0).await.map(|cuts| *cuts) else {
            return;
        };
        if failures > 0 {
            pause(failures, None).await;
        }
        failures += 1;
        let tasks = Tasks::default();
        let endpoint = Endpoint::from_shared(shared.settings.url.clone()).expect("a URL");
        let endpoint = endpoint.executor(tasks.clone());
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => {
                *lock(&shared.last_failure) = format!("connect: {error:?}");
                continue;
            }
        };
        let mut streams = JoinSet::new();
        for &number in &own {
            streams.spawn(stay(shared.clone(), number, channel.clone()));
        }
        drop(channel);
        // The channel connects again by itself, for the streams that try again.
        if cuts.wait_for(|cuts| *cuts != cut).await.is_err() {
            return;
        }
        streams.shutdown().await;
        tasks.stop().await;
        failures = 1;
    }
}

/// Keeps one stream.
async fn stay(shared: Arc<Shared>, number: usize, channel: Channel) {
    let mut failures = 0;
    loop {
        let before = shared.replicas[number].lsn.load(Relaxed);
        let Ended { why, hint } = stream(&shared, number, channel.clone()).await;
        if shared.replicas[number].lsn.load(Relaxed) > before {
            failures = 0;
        }
        failures += 1;
        *lock(&shared.last_failure) = why;
        shared.hints.fetch_add(hint.is_some().into(), Relaxed);
        pause(failures, hint).await;
    }
}

/// As a replica does it: at random up to a limit that doubles; or, told when, that and up to as long again.
async fn pause(failures: u32, hint: Option<Duration>) {
    let longest = RETRY.0.saturating_mul(1 << failures.min(20)).min(RETRY.1);
    let jitter = |most: Duration| most.mul_f64(rand::rng().random::<f64>());
    tokio::time::sleep(match hint {
        Some(hint) => hint + jitter(hint),
        None => jitter(longest),
    })
    .await;
}

/// One stream, to its end.
async fn stream(shared: &Arc<Shared>, number: usize, channel: Channel) -> Ended {
    let state = &shared.replicas[number];
    let hello = v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        replica_id: format!("light-{number}"),
        resume_token: lock(&state.token).clone(),
        subscriptions: (shared.settings.subscriptions)(number),
        zstd: false,
        token_replica_id: String::new(),
    };
    let up = |kind| v1::Up { kind: Some(kind) };
    let acknowledged = shared.clone();
    // Not all at the same moment.
    let first = tokio::time::Instant::now() + ACK_EVERY.mul_f64(rand::rng().random::<f64>());
    let acks = IntervalStream::new(tokio::time::interval_at(first, ACK_EVERY)).map(move |_| {
        let position = acknowledged.replicas[number].position();
        up(v1::up::Kind::Ack(v1::Ack { position }))
    });
    let mut request = Request::new(tokio_stream::once(up(v1::up::Kind::Hello(hello))).chain(acks));
    let bearer = format!("Bearer {}", shared.settings.token);
    let bearer = bearer.parse().expect("a token of ours");
    request.metadata_mut().insert("authorization", bearer);
    shared.connects.fetch_add(1, Relaxed);
    let mut down = match replicate(channel, request).await {
        Ok(down) => down,
        Err(status) => return status.into(),
    };
    let mut reading = shared.reading.subscribe();
    let mut reader = Reader::default();
    loop {
        if reading.wait_for(|reading| *reading).await.is_err() {
            return Ended {
                why: "the fleet is gone".into(),
                hint: None,
            };
        }
        match down.message().await {
            Ok(Some(message)) => reader.take(shared, state, message),
            Ok(None) => {
                return Ended {
                    why: "the stream was closed".into(),
                    hint: None,
                };
            }
            Err(status) => return status.into(),
        }
    }
}

/// The call `Replicate`, but that elements stay as they came.
async fn replicate(
    channel: Channel,
    request: impl IntoStreamingRequest<Message = v1::Up>,
) -> Result<Streaming<Down>, Status> {
    let mut client = Grpc::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX + 64 * 1024);
    client
        .ready()
        .await
        .map_err(|error| Status::from_error(error.into()))?;
    let path = PathAndQuery::from_static("/anabranch.v1.Anabranch/Replicate");
    let codec = SmallBuffers::<v1::Up, Down>::default();
    let response = client.streaming(request.into_streaming_request(), path, codec);
    Ok(response.await?.into_inner())
}

/// A [`v1::Down`] of which nothing is decoded yet. To build all of its elements at once costs more than to look at them, and what
/// a fleet costs is missing to the streamer beside it.
#[derive(Message)]
struct Down {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    elements: Vec<Bytes>,
    #[prost(bytes = "bytes", tag = "2")]
    resume_token: Bytes,
}

/// What tonic spawns for a connection. Some of it would keep the connection open as long as there are Acks to say.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    async fn stop(&self) {
        let mut tasks = std::mem::take(&mut *lock(&self.0));
        tasks.shutdown().await;
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, future: F) {
        lock(&self.0).spawn(future);
    }
}

/// Of a run of ops that was cut: what is not a whole op yet.
#[derive(Default)]
struct Reader {
    rest: BytesMut,
}

impl Reader {
    fn take(&mut self, shared: &Shared, state: &State, message: Down) {
        shared.messages.fetch_add(1, Relaxed);
        for element in message.elements {
            match v1::Element::decode(element).expect("an element").kind {
                Some(Kind::Rows(rows)) => self.rows(shared, state, rows),
                Some(Kind::Commit(commit)) => state.reached(commit.position),
                Some(Kind::Heartbeat(heartbeat)) => state.reached(heartbeat.position),
                Some(Kind::Begin(_) | Kind::Table(_) | Kind::State(_)) => {}
                None => panic!("an element that this version does not know"),
            }
        }
        if !message.resume_token.is_empty() {
            *lock(&state.token) = message.resume_token;
        }
    }

    fn rows(&mut self, shared: &Shared, state: &State, rows: v1::Rows) {
        shared.bytes.fetch_add(rows.ops.len() as u64, Relaxed);
        let mut ops = if self.rest.is_empty() {
            rows.ops
        } else {
            self.rest.extend_from_slice(&rows.ops);
            std::mem::take(&mut self.rest).freeze()
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.expect("after 1970").as_micros() as i64;
        let mut count = 0;
        while let Some((kind, record)) = ops::take(&mut ops).expect("ops") {
            count += 1;
            if kind == ops::Kind::Delete {
                continue;
            }
            let value = record::value(&record, shared.settings.made).expect("a record");
            let ValueRef::Integer(made) = value else {
                continue;
            };
            if made >= 0 {
                if shared.measuring.load(Relaxed) {
                    lock(&shared.latencies).push(now - made);
                }
            } else if state.mark.fetch_min(made, Relaxed) > made {
                *lock(&shared.last_mark) = Some(Instant::now());
            }
        }
        shared.rows.fetch_add(count, Relaxed);
        assert!(rows.continued || ops.is_empty(), "half an op");
        self.rest.extend_from_slice(&ops);
    }
}

impl State {
    fn reached(&self, position: Option<v1::Position>) {
        let position: Position = position.expect("a position").into();
        self.epoch.store(position.epoch.0, Relaxed);
        let before = self.lsn.fetch_max(position.lsn.0, Relaxed);
        assert!(before <= position.lsn.0, "a position goes back");
    }

    fn position(&self) -> Option<v1::Position> {
        let position = Position {
            epoch: Epoch(self.epoch.load(Relaxed)),
            lsn: Lsn(self.lsn.load(Relaxed)),
        };
        (position != Position::default()).then(|| position.into())
    }
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        let hint = status.metadata().get("grpc-retry-pushback-ms");
        let hint = hint.and_then(|value| value.to_str().ok()?.parse().ok());
        Ended {
            why: format!("{:?}: {}", status.code(), status.message()),
            hint: hint.map(Duration::from_millis),
        }
    }
}

/// Lets this process, and those that it starts, have so many descriptors.
fn allow_descriptors(count: u64) {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= count) {
        return;
    }
    limit.current = limit.maximum;
    let raised = setrlimit(Resource::Nofile, limit);
    let most = limit.maximum.unwrap_or(u64::MAX);
    assert!(
        raised.is_ok() && most >= count,
        "{count} descriptors are needed, and {most} allowed: raise the hard limit of open files (`ulimit -Hn`, or nofile in \
         /etc/security/limits.conf), or take fewer connections"
    );
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
