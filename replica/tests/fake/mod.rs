//! A scripted streamer, and what a test needs around it.
//!
//! Each call of a replica is handed to the test, which reads what the replica says and sends what it likes. The
//! messages are made here by hand, from the comments of the `.proto` file; rows are packed by the writer of
//! `anabranch_proto`, which the streamer uses too.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use anabranch_proto::{
    Epoch, Lsn, Position,
    down::Encoded,
    ops,
    record::{Builder, ValueRef},
    v1::{
        self,
        anabranch_server::{Anabranch, AnabranchServer},
        element::Kind,
    },
};
use anabranch_replica::{Config, Sidecar, config::Timing, http::server::Listener, status::Status};
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Streaming,
    transport::{Server, ServerTlsConfig, server::TcpIncoming},
};

/// Nothing here takes this long unless it never comes.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long an impatient replica waits for its streamer.
pub const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Waits for something that must come.
#[track_caller]
pub fn soon<F: Future>(what: &'static str, future: F) -> impl Future<Output = F::Output> {
    let caller = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(PATIENCE, future).await {
            Ok(output) => output,
            Err(_) => panic!("{caller}: waited in vain for {what}"),
        }
    }
}

/// One `Replicate` of a replica.
pub struct Call {
    pub authorization: Option<String>,
    pub hello: v1::Hello,
    pub up: Streaming<v1::Up>,
    pub down: mpsc::Sender<Result<v1::Down, tonic::Status>>,
}

impl Call {
    /// Sends a message; waits where the replica does not read.
    pub async fn send(&self, down: v1::Down) {
        self.down
            .send(Ok(down))
            .await
            .expect("the replica is there");
    }

    /// Says heartbeats until the call ends, as a streamer does that has caught up: without them nobody is up to date for
    /// long.
    pub fn keep_heard(&self, lsn: u64) -> JoinHandle<()> {
        let down = self.down.clone();
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(200));
            loop {
                tick.tick().await;
                if down.send(Ok(heartbeat(lsn, lsn))).await.is_err() {
                    break;
                }
            }
        })
    }

    /// The next Ack's position.
    pub async fn ack(&mut self) -> Option<Position> {
        match soon("an Ack", self.up.message()).await {
            Ok(Some(v1::Up {
                kind: Some(v1::up::Kind::Ack(ack)),
            })) => ack.position.map(Into::into),
            other => panic!("{other:?} instead of an Ack"),
        }
    }

    /// Reads Acks until one has this position.
    #[track_caller]
    pub fn acked(&mut self, position: Position) -> impl Future<Output = ()> {
        soon("the Ack of a position", async move {
            while self.ack().await != Some(position) {}
        })
    }
}

/// The streamer.
pub struct Fake {
    pub address: SocketAddr,
    calls: mpsc::Receiver<Call>,
    /// What `authorization` must be; others are refused as UNAUTHENTICATED.
    pub required: Arc<Mutex<Option<String>>>,
    /// Every Hello is refused with this.
    pub refusal: Arc<Mutex<Option<tonic::Status>>>,
    server: JoinHandle<()>,
}

struct Service {
    calls: mpsc::Sender<Call>,
    required: Arc<Mutex<Option<String>>>,
    refusal: Arc<Mutex<Option<tonic::Status>>>,
}

#[tonic::async_trait]
impl Anabranch for Service {
    type WriteStream = tokio_stream::Empty<Result<v1::WriteDown, tonic::Status>>;

    async fn write(
        &self,
        _request: Request<Streaming<v1::WriteUp>>,
    ) -> Result<Response<Self::WriteStream>, tonic::Status> {
        Err(tonic::Status::unimplemented(
            "this streamer takes no writes",
        ))
    }

    type ReplicateStream = Pin<Box<dyn Stream<Item = Result<Encoded, tonic::Status>> + Send>>;

    async fn replicate(
        &self,
        request: Request<Streaming<v1::Up>>,
    ) -> Result<Response<Self::ReplicateStream>, tonic::Status> {
        let authorization = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        if let Some(required) = self.required.lock().unwrap().clone()
            && authorization.as_deref() != Some(&*format!("Bearer {required}"))
        {
            return Err(tonic::Status::unauthenticated("the token is expired"));
        }
        let mut up = request.into_inner();
        let hello = match up.message().await? {
            Some(v1::Up {
                kind: Some(v1::up::Kind::Hello(hello)),
            }) => hello,
            other => panic!("{other:?} instead of Hello"),
        };
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        let (down, messages) = mpsc::channel(1);
        let call = Call {
            authorization,
            hello,
            up,
            down,
        };
        self.calls
            .send(call)
            .await
            .map_err(|_| tonic::Status::unavailable("the test is over"))?;
        let encoded = ReceiverStream::new(messages).map(|message| message.map(Encoded::from));
        Ok(Response::new(Box::pin(encoded)))
    }
}

impl Fake {
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), None).await
    }

    pub async fn start_at(address: SocketAddr, tls: Option<ServerTlsConfig>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (calls, receiver) = mpsc::channel(16);
        let (required, refusal) = (Arc::default(), Arc::default());
        let service = Service {
            calls,
            required: Arc::clone(&required),
            refusal: Arc::clone(&refusal),
        };
        let service = AnabranchServer::new(service).max_encoding_message_size(64 << 20);
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        let serving = server
            .add_service(service)
            .serve_with_incoming(TcpIncoming::from(listener));
        let server = tokio::spawn(async move { serving.await.unwrap() });
        Fake {
            address,
            calls: receiver,
            required,
            refusal,
            server,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next call of a replica.
    #[track_caller]
    pub fn call(&mut self) -> impl Future<Output = Call> {
        let call = soon("a call", self.calls.recv());
        async move { call.await.expect("the server runs") }
    }

    /// Whether a call is there already.
    pub fn has_call(&mut self) -> bool {
        !self.calls.is_empty()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub fn at(lsn: u64) -> Position {
    Position {
        epoch: Epoch(7),
        lsn: Lsn(lsn),
    }
}

fn element(kind: Kind) -> v1::Element {
    v1::Element { kind: Some(kind) }
}

pub fn begin(first: bool, reset: &[u32]) -> v1::Element {
    element(Kind::Begin(v1::Begin {
        first,
        reset: reset.to_vec(),
    }))
}

/// `public.items(id int8 primary key, body text)` as table 1.
pub fn table() -> v1::Element {
    let column = |name: &str, postgres_type: &str, storage, key_position| v1::Column {
        name: name.into(),
        postgres_type: postgres_type.into(),
        storage: storage as i32,
        not_null: key_position > 0,
        key_position,
        ..v1::Column::default()
    };
    element(Kind::Table(v1::Table {
        id: 1,
        schema: "public".into(),
        name: "items".into(),
        columns: vec![
            column("id", "bigint", v1::Storage::Integer, 1),
            column("body", "text", v1::Storage::Text, 0),
        ],
        indexes: vec![],
        ..v1::Table::default()
    }))
}

/// The `ops` of upserts.
pub fn upserts(rows: &[(i64, &str)]) -> Bytes {
    let mut packed = BytesMut::new();
    for (id, body) in rows {
        let mut builder = Builder::new();
        builder.push(ValueRef::Integer(*id));
        builder.push(ValueRef::Text(body));
        ops::push(&mut packed, ops::Kind::Upsert, &builder.finish());
    }
    packed.freeze()
}

pub fn rows(ops: Bytes, continued: bool) -> v1::Element {
    element(Kind::Rows(v1::Rows {
        table: 1,
        ops,
        continued,
    }))
}

pub fn commit(lsn: u64, source_lsn: u64) -> v1::Element {
    element(Kind::Commit(v1::Commit {
        position: Some(at(lsn).into()),
        commit_time: 1_700_000_000_000_000 + lsn as i64,
        source_lsn,
    }))
}

pub fn heartbeat(lsn: u64, source_lsn: u64) -> v1::Down {
    let heartbeat = v1::Heartbeat {
        position: Some(at(lsn).into()),
        source_lsn,
        source_connected: true,
    };
    message(vec![element(Kind::Heartbeat(heartbeat))])
}

/// A message; with a token where the grammar wants one.
pub fn message(elements: Vec<v1::Element>) -> v1::Down {
    let token = match elements.last().and_then(|element| element.kind.as_ref()) {
        Some(
            Kind::Commit(v1::Commit { position, .. })
            | Kind::Heartbeat(v1::Heartbeat { position, .. }),
        ) => position.map_or(0, |position| position.lsn).to_string(),
        _ => String::new(),
    };
    v1::Down {
        elements,
        resume_token: token.into(),
        ..v1::Down::default()
    }
}

/// The first transaction of a stream to a replica that has nothing: a full copy.
pub fn copy(lsn: u64, content: &[(i64, &str)]) -> v1::Down {
    message(vec![
        begin(true, &[1]),
        table(),
        rows(upserts(content), false),
        commit(lsn, lsn),
    ])
}

/// The first transaction of a stream to a replica that has all: nothing.
pub fn nothing_new(lsn: u64) -> v1::Down {
    message(vec![begin(true, &[]), table(), commit(lsn, lsn)])
}

/// A later transaction.
pub fn change(lsn: u64, content: &[(i64, &str)]) -> v1::Down {
    message(vec![
        begin(false, &[]),
        rows(upserts(content), false),
        commit(lsn, lsn),
    ])
}

/// A replica under test, in a directory of its own.
pub struct Replica {
    pub sidecar: Sidecar,
    pub database: PathBuf,
    pub port: u16,
    pub directory: tempfile::TempDir,
}

/// Times that make a test quick, and still far from what a busy machine takes for a step.
pub fn quick() -> Timing {
    Timing {
        // Nobody here sends heartbeats; tests of silence have their own.
        silence_max: Duration::from_secs(600),
        ack_every: Duration::from_millis(200),
        ack_gap: Duration::from_millis(1),
        retry: (Duration::from_millis(1), Duration::from_millis(50)),
        slow_retry: (Duration::from_secs(600), Duration::from_secs(601)),
        token_poll: Duration::from_millis(20),
        report_every: Duration::from_millis(200),
        file_retry: (Duration::from_millis(5), Duration::from_millis(50)),
        ..Timing::default()
    }
}

pub fn config(url: &str, directory: &Path, extra: &str) -> Config {
    let database = directory.join("app.db");
    let text = format!(
        "streamer = \"{url}\"\ndatabase = \"{}\"\n{extra}\n[[subscribe]]\nshape = \"all\"\nparams = {{ team = 7 }}\n",
        database.display()
    );
    let mut config = Config::parse(&text, "replica.toml", []).unwrap();
    config.timing = quick();
    config
}

impl Replica {
    pub async fn start(url: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), url, "token = \"t\"", |_| {}).await
    }

    /// One that gives up a silent streamer soon.
    pub async fn start_impatient(url: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start_in(directory, url, "token = \"t\"", |config| {
            config.timing.silence_max = SILENCE_MAX;
        })
        .await
    }

    pub async fn start_in(
        directory: tempfile::TempDir,
        url: &str,
        extra: &str,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let mut config = config(url, directory.path(), extra);
        change(&mut config);
        let database = config.database.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let sidecar = Sidecar::start(
            config,
            Some(Listener::Tcp(listener)),
            CancellationToken::new(),
        )
        .await
        .unwrap();
        Replica {
            sidecar,
            database,
            port,
            directory,
        }
    }

    /// Waits until the status is so.
    #[track_caller]
    pub fn until(
        &self,
        what: &'static str,
        mut condition: impl FnMut(&Status) -> bool,
    ) -> impl Future<Output = Status> {
        let mut status = self.sidecar.status();
        soon(what, async move {
            status
                .wait_for(|status| condition(status))
                .await
                .unwrap()
                .clone()
        })
    }

    /// What a foreign program reads in the file.
    pub fn items(&self) -> Vec<(i64, String)> {
        let connection = self.foreign();
        let mut statement = connection
            .prepare("SELECT id, body FROM items ORDER BY id")
            .unwrap();
        statement
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    /// A connection as any program has it.
    pub fn foreign(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(&self.database).unwrap()
    }

    /// One request, with any head; status code and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        self.request(&format!(
            "GET {path} HTTP/1.1\r\nHost: localhost:{}\r\nConnection: close\r\n\r\n",
            self.port
        ))
        .await
    }

    pub async fn request(&self, head: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon("an answer", stream.read_to_string(&mut answer))
            .await
            .unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    pub async fn json(&self, path: &str) -> (u16, serde_json::Value) {
        let (status, body) = self.get(path).await;
        (
            status,
            serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")),
        )
    }
}
