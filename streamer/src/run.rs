//! The streamer as a whole: what runs, in which order it starts, and in which it ends.
//!
//! Nothing is spawned and forgotten: a failure of any part ends all of them. Parts that may be started anew (the mirror
//! failed, the disk was full) are, from the durable position on; what must not be gone over ends the program.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinError,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use crate::{
    auth::{self, Verifier},
    config::{self, Config, JwtKey},
    connected::{self, Connected},
    definition::Keeper,
    engine::{self, Engine, GROUP_TIME, INPUTS_MAX, Input, Inputs, Progress},
    events::Waiting,
    http::{self, Pages},
    metrics::Metrics,
    postgres::{copy, sql, stream},
    rpc::{self, Quotas},
    serve::{self, Stage},
    session::{
        self, Readers, Rounds, Total,
        admission::{Admission, WAITING_MAX},
        gathering,
    },
    source::{Retained, Source},
    start::{self, Opening},
    table::Defaults,
    tls,
};

/// How long the parts may take to end once they were told to.
const GRACE: Duration = Duration::from_secs(8);

/// The wait before the parts are started anew after one of them failed.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// The streamer ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A person must look: trying again would do the same, or would go over a gap.
    #[error("{0}")]
    Definite(String),
    /// Starting the parts anew may help.
    #[error("{0}")]
    Transient(String),
}

impl From<start::Error> for Error {
    fn from(error: start::Error) -> Self {
        match error {
            start::Error::Transient(reason) => Error::Transient(reason),
            start::Error::Definite(reason) => Error::Definite(reason),
        }
    }
}

impl From<sql::Error> for Error {
    fn from(error: sql::Error) -> Self {
        match error {
            sql::Error::Transient(reason) => Error::Transient(reason),
            sql::Error::Definite(reason) => Error::Definite(reason),
        }
    }
}

/// What the files hold that the config names, and what is published where it says.
pub struct Keys {
    verifier: Verifier,
    tls: Option<Arc<rustls::ServerConfig>>,
}

/// Keys can't be had.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A file that can't be used: a wrong config.
    #[error(transparent)]
    File(config::Error),
    /// What should be fetched could not be.
    #[error(transparent)]
    Unreachable(config::Error),
}

impl Keys {
    /// Reads them. One that can't be used is a wrong config, to be said before anything is connected.
    pub async fn read(config: &Config) -> Result<Keys, KeysError> {
        let tls = config.tls.as_ref().map(tls::server).transpose();
        let tls = tls.map_err(|error| KeysError::File(config.refused_file(error.field, &error)))?;
        let verifier = Verifier::new(&config.auth).await.map_err(|error| {
            let field = match (&error, config.auth.jwt.as_ref().map(|jwt| &jwt.key)) {
                (auth::Error::Revoked(_), _) => "auth.revoked_file",
                (auth::Error::Authority(_), _) => "auth.jwt.jwks_ca",
                (_, Some(JwtKey::PublicKeyFile(_))) => "auth.jwt.public_key_file",
                (_, Some(JwtKey::Jwks(_))) => "auth.jwt.jwks",
                _ => "auth.jwt.hs256_file",
            };
            let refused = config.refused_file(field, &error);
            match error {
                auth::Error::Published(_) => KeysError::Unreachable(refused),
                _ => KeysError::File(refused),
            }
        })?;
        Ok(Keys { verifier, tls })
    }
}

/// Runs until `stopping`, or until a definite error. `listener` is bound already: a port that is in use is noticed
/// before anything is made.
pub async fn run(
    config: Config,
    keys: Keys,
    listener: TcpListener,
    stopping: CancellationToken,
) -> Result<(), Error> {
    let shared = Shared {
        verifier: Arc::new(keys.verifier),
        quotas: Quotas::new(config.auth.limits),
        metrics: Metrics::new(),
        copied: copy::Progress::default(),
        group_time: group_time(),
    };
    let config = Arc::new(config);
    let stage = Stage::new(shared.verifier.clone());
    let server = tokio::spawn(serve::serve(
        listener,
        keys.tls,
        stage.clone(),
        stopping.clone(),
    ));
    let verifier = shared.verifier.clone();
    let keeper = stopping
        .clone()
        .run_until_cancelled_owned(async move { verifier.keep().await });
    let keeper = tokio::spawn(keeper);
    let ended = loop {
        match parts(&config, &shared, &stage, &stopping).await {
            Err(Error::Transient(reason)) if !stopping.is_cancelled() => {
                stage.starting();
                tracing::error!(reason, "starting anew");
                tokio::select! {
                    () = tokio::time::sleep(RESTART_AFTER) => {}
                    () = stopping.cancelled() => break Ok(()),
                }
            }
            ended => break ended,
        }
    };
    stopping.cancel();
    // The server ends its connections within a grace of its own.
    let _ = server.await;
    if let Err(panic) = keeper.await {
        return Err(Error::Definite(panic.to_string()));
    }
    ended
}

/// What outlives a restart of the parts.
struct Shared {
    verifier: Arc<Verifier>,
    quotas: Arc<Quotas>,
    metrics: Arc<Metrics>,
    copied: copy::Progress,
    group_time: Duration,
}

/// Starts all parts, and ends them all when one ends.
async fn parts(
    config: &Arc<Config>,
    shared: &Shared,
    stage: &Stage,
    stopping: &CancellationToken,
) -> Result<(), Error> {
    let (inputs, taken) = mpsc::sync_channel(INPUTS_MAX);
    let (told, progress) = watch::channel(Progress::default());
    let (copied, copied_seen) = watch::channel(0);
    let (defaults, _) = watch::channel(Arc::default());
    let parts = Parts {
        config,
        shared,
        stage,
        here: stopping.child_token(),
        tasks: TaskTracker::new(),
        queues: Total::new(config.memory().queues_bytes_max),
        waiting: Waiting::new(config.memory().events_bytes_max),
        connected: Arc::default(),
        inputs,
        progress,
        defaults: Arc::new(defaults),
        copied: copied_seen,
    };
    let result = parts.run(taken, told, copied).await;
    // Sessions may have begun before anything else did.
    parts.here.cancel();
    parts.tasks.close();
    if timeout(GRACE, parts.tasks.wait()).await.is_err() {
        return Err(Error::Definite("the sessions did not end in time".into()));
    }
    result
}

/// What the parts share from one start to its end.
struct Parts<'a> {
    config: &'a Arc<Config>,
    shared: &'a Shared,
    stage: &'a Stage,
    /// Ends them.
    here: CancellationToken,
    /// Those of the sessions.
    tasks: TaskTracker,
    queues: Arc<Total>,
    waiting: Arc<Waiting>,
    connected: Arc<Connected>,
    inputs: Inputs,
    progress: watch::Receiver<Progress>,
    defaults: Arc<watch::Sender<Arc<Defaults>>>,
    copied: watch::Receiver<u64>,
}

impl Parts<'_> {
    async fn run(
        &self,
        taken: mpsc::Receiver<Input>,
        told: watch::Sender<Progress>,
        copied: watch::Sender<u64>,
    ) -> Result<(), Error> {
        let mut early = None;
        let let_in = |opening| {
            let grpc = self.grpc(opening)?;
            self.stage.early(grpc.clone());
            early = Some(grpc);
            Ok(())
        };
        let starting = start::start(self.config, &self.shared.copied, &copied, Box::new(let_in));
        let started = tokio::select! {
            started = starting => started?,
            () = self.here.cancelled() => return Ok(()),
        };
        let grpc = match started.opening {
            Some(opening) => self.grpc(opening)?,
            None => early.ok_or_else(|| Error::Definite("no replica was let in".into()))?,
        };
        let (config, connected, here) = (
            self.config.clone(),
            self.connected.clone(),
            self.here.clone(),
        );
        self.tasks.spawn(async move {
            connected::serve(&config.data_dir, connected, config.shapes.clone(), here).await;
        });
        let (mut engine, confirmed) = Engine::new(started.mirror, told);
        let group_time = self.shared.group_time;
        let (over, mut ended) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                let _ = over.send(engine.run(&taken, group_time));
            })
            .map_err(|error| Error::Transient(error.to_string()))?;

        let source = Source {
            target: self.config.postgres.target.clone(),
            slot: self.config.postgres.slot.clone(),
            retained: Retained::new(self.config.wal_retained_max),
            publication: self.config.postgres.publication.clone(),
            streaming: self.config.postgres.streaming,
            tables: Arc::new(started.tables),
            witnesses: started.witnesses,
            defaults: self.defaults.clone(),
            spool_directory: self.config.data_dir.clone(),
            limits: self.limits(),
            inputs: self.inputs.clone(),
            waiting: self.waiting.clone(),
            confirmed,
            metrics: self.shared.metrics.clone(),
            observed: Arc::default(),
        };
        let mut source = tokio::spawn(source.run(self.here.clone()));
        let serve = async {
            // Tables that were copied just now are as of up to here.
            let mut progress = self.progress.clone();
            let there = |progress: &Progress| progress.durable.lsn >= started.serve_from;
            if progress.wait_for(there).await.is_ok() {
                self.stage.ready(grpc.merge(self.pages()));
            }
            std::future::pending::<()>().await
        };
        let (result, source_ended) = tokio::select! {
            streamed = &mut source => (streamed_ended(streamed), true),
            engine = &mut ended => (Err(engine_ended(engine.ok())), false),
            () = serve => unreachable!("it never ends"),
        };
        // Whoever calls from here on is for the next start.
        self.stage.starting();
        self.here.cancel();
        session::send(&self.inputs, Input::Shutdown);
        if !source_ended && timeout(GRACE, source).await.is_err() {
            return Err(Error::Definite("the stream did not end in time".into()));
        }
        let joined = tokio::task::block_in_place(|| thread.join());
        joined.map_err(|_| Error::Definite("the engine panicked".into()))?;
        result
    }

    fn grpc(&self, opening: Opening) -> Result<axum::Router, start::Error> {
        self.defaults.send_replace(Arc::new(opening.defaults));
        let readers = Readers::new(opening.readers);
        let (inputs, here) = (self.inputs.clone(), self.here.clone());
        let rounds = Rounds::new(self.config.memory().rounds_bytes_max);
        let gathering =
            gathering::start(readers.clone(), rounds.clone(), inputs, &self.tasks, here);
        let core = rpc::Core {
            verifier: self.shared.verifier.clone(),
            quotas: self.shared.quotas.clone(),
            shapes: opening.shapes,
            receipts: opening.receipts,
            policies: opening.policies,
            writes: self.config.takes_writes().then(|| rpc::Writes {
                writers: rpc::Writers::new(self.config.postgres.write_target.clone()),
                role: self.config.auth.role.clone(),
                transaction_bytes_max: self.config.memory().transaction_bytes_max,
                budgets: Arc::default(),
            }),
            token_key: opening.token_key,
            inputs: self.inputs.clone(),
            progress: self.progress.clone(),
            defaults: self.defaults.subscribe(),
            readers,
            rounds,
            gathering,
            admission: Admission::new(WAITING_MAX),
            connected: self.connected.clone(),
            keeper: Keeper::new(self.inputs.clone()),
            copied: self.copied.clone(),
            queue_bytes_max: self.config.memory().queue_bytes_max,
            waiting: self.waiting.clone(),
            queues: self.queues.clone(),
            metrics: self.shared.metrics.clone(),
            tasks: self.tasks.clone(),
            stopping: self.here.clone(),
        };
        let (_, health) = tonic_health::server::health_reporter();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(anabranch_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .map_err(|error| start::Error::Definite(error.to_string()))?;
        let mut grpc = Routes::builder();
        grpc.add_service(rpc::Service::new(core))
            .add_service(health)
            .add_service(reflection);
        Ok(grpc.routes().into_axum_router())
    }

    fn pages(&self) -> axum::Router {
        http::routes(Arc::new(Pages {
            verifier: self.shared.verifier.clone(),
            progress: self.progress.clone(),
            metrics: self.shared.metrics.clone(),
            queues: self.queues.clone(),
        }))
    }

    fn limits(&self) -> stream::Limits {
        let memory = self.config.memory();
        stream::Limits {
            chunk_bytes_max: memory.chunk_bytes_max,
            row_bytes_max: memory.row_bytes_max,
            spool_memory_bytes_max: memory.spool_bytes_max,
        }
    }
}

fn streamed_ended(ended: Result<Result<(), sql::Error>, JoinError>) -> Result<(), Error> {
    match ended {
        Ok(streamed) => streamed.map_err(Error::from),
        Err(panic) => Err(Error::Definite(panic.to_string())),
    }
}

fn engine_ended(ended: Option<Result<(), engine::Error>>) -> Error {
    match ended {
        Some(Ok(())) => Error::Transient("the engine ended".into()),
        Some(Err(error)) => Error::Transient(error.to_string()),
        None => Error::Definite("the engine panicked".into()),
    }
}

/// How long a group stays open; a test stretches it to see what happens to who joins meanwhile.
fn group_time() -> Duration {
    std::env::var("ANABRANCH_FAILPOINT_GROUP_MS")
        .ok()
        .and_then(|text| text.parse().ok())
        .map_or(GROUP_TIME, Duration::from_millis)
}
