//! The whole replica, to be embedded or run by the program.
//!
//! Three parts, one life: the file's thread, the client, the HTTP interface. If any of them ends without having been told
//! to, all end, and the error says why: half a sidecar would be one that lies. Cancellation goes down to all at once; the
//! supervisor joins all, and gives them a grace at the end.

use std::sync::Arc;

use anabranch_proto::Position;
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    board::Board,
    changes::Reader,
    client,
    config::{Address, Config, Timing},
    file,
    http::{
        View,
        server::{self, Listener},
    },
    keeper::{Keeper, Thread},
    status::Status,
    wait::{Outcome, Target},
};

/// Why the sidecar can't go on: all of these need a person, but for [`Stopped`](Error::Stopped).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The local HTTP interface can't listen.
    #[error(transparent)]
    Http(#[from] server::Error),
    /// The file can't be opened, or can't go on.
    #[error("the database: {0}")]
    File(#[from] file::Error),
    /// It was told to end while it waited for the file, which was locked, or its disk full.
    #[error("told to end before the database could be opened")]
    Stopped,
    /// A part ended that never ends: a bug.
    #[error("the {0} ended unexpectedly; please report this")]
    Ended(&'static str),
    /// The parts did not end in time.
    #[error(
        "not stopped within {0:?}; the database is safe, whatever was being written will be sent again"
    )]
    Stuck(std::time::Duration),
}

/// A running replica. Dropping it tells it to end, without waiting.
#[derive(Debug)]
pub struct Sidecar {
    board: Arc<Board>,
    http: Option<Address>,
    cancel: CancellationToken,
    _end_on_drop: DropGuard,
    supervisor: JoinHandle<Result<(), Error>>,
}

impl Sidecar {
    /// Opens the file and starts. Listens where the config says, unless a listener is given. `cancel` ends it, as
    /// [`shutdown`](Self::shutdown) does.
    ///
    /// Returns when the file is open, which may take for ever where a program keeps it locked; use [`status`](Self::status) to wait for content.
    pub async fn start(
        config: Config,
        listener: Option<Listener>,
        cancel: CancellationToken,
    ) -> Result<Self, Error> {
        let cancel = cancel.child_token();
        let end_on_drop = cancel.clone().drop_guard();
        let listener = match (listener, &config.http) {
            (Some(listener), _) => Some(listener),
            (None, Some(address)) => Some(Listener::bind(address, config.file_mode).await?),
            (None, None) => None,
        };
        let http = listener.as_ref().and_then(Listener::address);
        let settings = file::Settings {
            path: config.database.clone(),
            mode: config.file_mode,
            cache_bytes: config.memory.cache_bytes,
            hold_bytes_max: config.memory.hold_bytes_max,
        };
        let (keeper, board, thread) = Keeper::open(
            settings,
            config.timing.clone(),
            config.memory.queue_bytes_max,
            config.memory.changes_bytes_max,
            cancel.clone(),
        )
        .await?
        .ok_or(Error::Stopped)?;
        let parts = Parts::start(Arc::new(config), listener, keeper, &board, thread, &cancel);
        Ok(Sidecar {
            board,
            http,
            cancel,
            _end_on_drop: end_on_drop,
            supervisor: tokio::spawn(parts.supervise()),
        })
    }

    /// What the file's content is; `None` before the first complete commit.
    pub fn position(&self) -> Option<Position> {
        self.board.watch().borrow().position
    }

    /// What is known, and a call when that changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.board.watch()
    }

    /// Waits until the file has a position, as `/wait` does. Put a timeout around it.
    pub async fn wait(&self, target: Target) -> Outcome {
        self.board.waiters.wait(target).await
    }

    /// Tables and keys of commits from now on, as `/changes` tells them; or from after an event's position.
    pub fn changes(&self, after: Option<Position>) -> Reader {
        let id = after.map(|position| position.to_string());
        self.board
            .changes
            .reader(id.as_deref(), usize::MAX)
            .expect("there is always room below usize::MAX")
    }

    /// Where the local HTTP interface listens.
    pub fn http(&self) -> Option<&Address> {
        self.http.as_ref()
    }

    /// Waits for its end: `Ok` if it was told to end, else the error that ended it. May be dropped and called again, but
    /// not after it returned.
    pub async fn ended(&mut self) -> Result<(), Error> {
        match (&mut self.supervisor).await {
            Ok(result) => result,
            Err(_) => Err(Error::Ended("supervisor")),
        }
    }

    /// Tells all parts to end, and waits for them.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.cancel.cancel();
        self.ended().await
    }
}

/// The parts, as the supervisor has them.
struct Parts {
    tasks: JoinSet<(&'static str, Result<(), Error>)>,
    cancel: CancellationToken,
    timing: Timing,
}

impl Parts {
    fn start(
        config: Arc<Config>,
        listener: Option<Listener>,
        keeper: Keeper,
        board: &Arc<Board>,
        thread: Thread,
        cancel: &CancellationToken,
    ) -> Self {
        let mut tasks = JoinSet::new();
        if let Some(listener) = listener {
            let view = View {
                board: board.clone(),
                keeper: keeper.clone(),
                streamer: config.streamer.to_string().into(),
                database: config.database.display().to_string().into(),
                port: None,
                cancel: cancel.clone(),
            };
            tasks.spawn(async move {
                server::serve(listener, view).await;
                ("HTTP interface", Ok(()))
            });
        }
        tasks.spawn(async move {
            let result = match thread.join().await {
                Some(result) => result.map_err(Error::File),
                None => Err(Error::Ended("file's thread")),
            };
            ("file's thread", result)
        });
        let timing = config.timing.clone();
        let client = client::run(config, keeper, board.clone(), cancel.clone());
        tasks.spawn(async move {
            client.await;
            ("client", Ok(()))
        });
        Parts {
            tasks,
            cancel: cancel.clone(),
            timing,
        }
    }

    async fn supervise(mut self) -> Result<(), Error> {
        let grace = self.timing.grace;
        let mut overdue = std::pin::pin!(async {
            self.cancel.cancelled().await;
            tokio::time::sleep(grace).await;
        });
        // The first error is the cause, later ones its consequences. Only a part that ended without a word of its own is
        // judged last: the client ends so when the file's thread is gone, which tells why itself.
        let (mut cause, mut wordless) = (None, None);
        loop {
            let part = tokio::select! {
                part = self.tasks.join_next() => part,
                () = &mut overdue => return Err(cause.or(wordless).unwrap_or(Error::Stuck(grace))),
            };
            let told = self.cancel.is_cancelled();
            match part {
                None => return cause.or(wordless).map_or(Ok(()), Err),
                Some(Ok((_, Ok(())))) if told => {}
                Some(Ok((name, Ok(())))) => wordless = wordless.or(Some(Error::Ended(name))),
                Some(Ok((_, Err(error)))) => cause = cause.or(Some(error)),
                Some(Err(_)) => cause = cause.or(Some(Error::Ended("task of a part"))),
            }
            self.cancel.cancel();
        }
    }
}
