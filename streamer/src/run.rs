//! The streamer as a whole: what runs, in which order it starts, and in which it ends.
//!
//! Nothing is spawned and forgotten: a failure of any part ends all of them. Parts that may be started anew (the mirror
//! failed, the disk was full) are, from the durable position on; what must not be gone over ends the program.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use tokio::{net::TcpListener, task::JoinError};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use crate::{
    auth::Verifier,
    config::Config,
    engine::{self, Engine, GROUP_TIME, INPUTS_MAX, Input, Progress},
    http::{self, Pages},
    metrics::Metrics,
    postgres::{copy, sql, stream},
    rpc,
    serve::{self, Stage},
    session::{self, Readers, Total},
    source::Source,
    start, tls,
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

/// Runs until `stopping`, or until a definite error. `listener` is bound already: a port that is in use is noticed
/// before anything is made.
pub async fn run(
    config: Config,
    listener: TcpListener,
    stopping: CancellationToken,
) -> Result<(), Error> {
    let verifier =
        Verifier::new(&config.auth).map_err(|error| Error::Definite(error.to_string()))?;
    let shared = Shared {
        verifier: Arc::new(verifier),
        metrics: Metrics::new(),
        copied: copy::Progress::default(),
        group_time: group_time(),
    };
    let tls = config.tls.as_ref().map(tls::server).transpose();
    let tls = tls.map_err(|error| Error::Definite(error.to_string()))?;
    let config = Arc::new(config);
    let stage = Stage::new();
    let server = tokio::spawn(serve::serve(listener, tls, stage.clone(), stopping.clone()));
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
    ended
}

/// What outlives a restart of the parts.
struct Shared {
    verifier: Arc<Verifier>,
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
    let started = tokio::select! {
        started = start::start(config, &shared.copied) => started?,
        () = stopping.cancelled() => return Ok(()),
    };
    let memory = config.memory();
    let readers: Result<Vec<_>, _> = (0..memory.readers)
        .map(|_| started.mirror.reader())
        .collect();
    let readers = Readers::new(readers.map_err(|error| Error::Transient(error.to_string()))?);
    let (mut engine, progress, confirmed) = Engine::new(started.mirror);
    let (inputs, taken) = mpsc::sync_channel(INPUTS_MAX);
    let group_time = shared.group_time;
    let (over, mut ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            let _ = over.send(engine.run(&taken, group_time));
        })
        .map_err(|error| Error::Transient(error.to_string()))?;

    let here = stopping.child_token();
    let tasks = TaskTracker::new();
    let queues = Total::new(memory.queues_bytes_max);
    let core = rpc::Core {
        verifier: shared.verifier.clone(),
        shapes: started.shapes,
        token_key: started.token_key,
        inputs: inputs.clone(),
        progress: progress.clone(),
        readers,
        queue_bytes_max: memory.queue_bytes_max,
        queues: queues.clone(),
        metrics: shared.metrics.clone(),
        tasks: tasks.clone(),
        stopping: here.clone(),
    };
    let pages = Pages {
        verifier: shared.verifier.clone(),
        progress: progress.clone(),
        metrics: shared.metrics.clone(),
        queues,
    };
    let routes = routes(core, pages)?;
    let source = Source {
        target: config.postgres.target.clone(),
        slot: config.postgres.slot.clone(),
        publication: config.postgres.publication.clone(),
        tables: Arc::new(started.tables),
        memberships: started.memberships,
        spool_directory: config.data_dir.clone(),
        limits: stream::Limits {
            chunk_bytes_max: memory.chunk_bytes_max,
            row_bytes_max: memory.row_bytes_max,
            spool_memory_bytes_max: memory.events_bytes_max,
        },
        inputs: inputs.clone(),
        confirmed,
        metrics: shared.metrics.clone(),
        observed: Arc::default(),
    };
    let mut source = tokio::spawn(source.run(here.clone()));
    let serve = async {
        // Tables that were copied just now are as of up to here.
        let mut progress = progress;
        let there = |progress: &Progress| progress.durable.lsn >= started.serve_from;
        if progress.wait_for(there).await.is_ok() {
            stage.ready(routes);
        }
        std::future::pending::<()>().await
    };
    let (result, source_ended) = tokio::select! {
        streamed = &mut source => (streamed_ended(streamed), true),
        engine = &mut ended => (Err(engine_ended(engine.ok())), false),
        () = serve => unreachable!("it never ends"),
    };
    here.cancel();
    session::send(&inputs, Input::Shutdown);
    drop(inputs);
    tasks.close();
    let all = async {
        if !source_ended {
            let _ = source.await;
        }
        tasks.wait().await;
    };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        return Err(Error::Definite("the parts did not end in time".into()));
    }
    let joined = tokio::task::block_in_place(|| thread.join());
    joined.map_err(|_| Error::Definite("the engine panicked".into()))?;
    result
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

fn routes(core: rpc::Core, pages: Pages) -> Result<axum::Router, Error> {
    let (_, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(anabranch_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| Error::Definite(error.to_string()))?;
    let mut grpc = Routes::builder();
    grpc.add_service(rpc::Service::new(core))
        .add_service(health)
        .add_service(reflection);
    Ok(grpc
        .routes()
        .into_axum_router()
        .merge(http::routes(Arc::new(pages))))
}

/// How long a group stays open; a test stretches it to see what happens to who joins meanwhile.
fn group_time() -> Duration {
    std::env::var("ANABRANCH_FAILPOINT_GROUP_MS")
        .ok()
        .and_then(|text| text.parse().ok())
        .map_or(GROUP_TIME, Duration::from_millis)
}
