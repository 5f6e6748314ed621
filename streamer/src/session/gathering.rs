//! Where sessions that are a little behind meet, to be served together.
//!
//! One task takes all that have come, lets them join at one boundary of groups with one snapshot, has
//! [`together`](crate::catchup::together) find out in one pass what each of them is told, and begins again with those who
//! have come meanwhile. So the more come at once, the less each of them costs; and only one of the few readers is needed for
//! all, which nobody else's initial copy can keep away.

use std::sync::Arc;

use anabranch_proto::Position;
use tokio::sync::{mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Readers, TableView, blocking,
    rounds::{Room, Rounds},
    send,
};
use crate::{
    catchup::{
        View,
        together::{self, Member, TOLD_BYTES_MAX, Told},
    },
    delta::Op,
    engine::{Input, Inputs, Join, Joined, Joining},
    mirror,
    route::Router,
    table::Oid,
};

/// Sessions that are served at once at most. More would wait long for the last of them, and each have little memory.
const TOGETHER_MAX: usize = 512;

/// Asks to be served.
pub struct Request {
    /// Its queue and what it may see.
    pub joining: Joining,
    /// Where it stands.
    pub member: Member<TableView>,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Answer>,
}

/// What a session is told: the difference up to `position`, from where on its queue has everything.
pub struct Answer {
    /// With the room that they take. `None`: it must catch up by itself; its queue means nothing.
    pub ops: Option<(Vec<(usize, Op)>, Room)>,
    /// Where it then is.
    pub position: Position,
    /// All tables that are not followed any more, and why.
    pub stopped: Arc<Vec<(Oid, String)>>,
}

/// Where requests go.
pub type Requests = mpsc::Sender<Request>;

/// Starts the task, which ends with `stopping` or with the engine.
pub fn start(
    readers: Arc<Readers>,
    rounds: Arc<Rounds>,
    inputs: Inputs,
    tasks: &TaskTracker,
    stopping: CancellationToken,
) -> Requests {
    let (requests, asked) = mpsc::channel(TOGETHER_MAX);
    let gathering = Gathering {
        readers,
        rounds,
        inputs,
    };
    tasks.spawn(async move {
        let _ = stopping.run_until_cancelled(gathering.run(asked)).await;
    });
    requests
}

struct Gathering {
    readers: Arc<Readers>,
    rounds: Arc<Rounds>,
    inputs: Inputs,
}

impl Gathering {
    async fn run(&self, mut asked: mpsc::Receiver<Request>) {
        let mut batch = Vec::new();
        while asked.recv_many(&mut batch, TOGETHER_MAX).await > 0 {
            let reader = self.readers.take_first().await;
            // Those who came meanwhile go along.
            while batch.len() < TOGETHER_MAX
                && let Ok(request) = asked.try_recv()
            {
                batch.push(request);
            }
            let requests = std::mem::take(&mut batch).into_iter();
            let (sessions, waiting) = requests
                .filter(|request| !request.answer.is_closed())
                .map(|request| (request.joining, (request.member, request.answer)))
                .unzip();
            let (answer, answered) = oneshot::channel();
            let join = Join {
                sessions,
                reader,
                answer,
            };
            send(&self.inputs, Input::Join(join));
            let Ok(joined) = answered.await else {
                // The engine ended, as everybody hears.
                return;
            };
            if self.serve(joined, waiting).await.is_none() {
                return;
            }
        }
    }

    /// `None`: the streamer stops.
    async fn serve(
        &self,
        joined: Joined,
        waiting: Vec<(Member<TableView>, oneshot::Sender<Answer>)>,
    ) -> Option<()> {
        let Joined {
            mut reader,
            position,
            stopped,
        } = joined;
        let stopped = Arc::new(stopped);
        let (members, answers): (Vec<_>, Vec<_>) = waiting.into_iter().unzip();
        let rooms = self.rounds.take_many(members.len(), TOLD_BYTES_MAX);
        let bytes_max = rooms.iter().map(Room::bytes).sum();
        let passed = blocking(move || {
            let told = pass(&mut reader, &members, bytes_max);
            // Each of them finds the same by itself, if it is not only about being served together.
            let told = told.unwrap_or_else(|error| {
                tracing::debug!(%error, "sessions can't be served together");
                members.iter().map(|_| Told::Alone).collect()
            });
            drop(reader);
            Ok(told)
        });
        let passed = passed.await.ok()?.into_iter();
        for ((told, room), answer) in passed.zip(rooms).zip(answers) {
            let ops = match told {
                Told::All(ops) => Some((ops, room)),
                Told::Alone => None,
            };
            // Who is gone meanwhile does not mind.
            let _ = answer.send(Answer {
                ops,
                position,
                stopped: stopped.clone(),
            });
        }
        Some(())
    }
}

fn pass(
    reader: &mut mirror::Reader,
    members: &[Member<TableView>],
    bytes_max: usize,
) -> Result<Vec<Told>, mirror::Error> {
    let mut router = Router::default();
    for (place, member) in members.iter().enumerate() {
        let bounds = member.views.iter().flat_map(|view| view.bounds());
        router.add(place as u64, &bounds.cloned().collect::<Vec<_>>());
    }
    let may_see = |table: Oid, row: &[u8], found: &mut Vec<u64>| router.may_see(table, row, found);
    together::pass(reader, members, &may_see, bytes_max)
}
