//! The gRPC rim: one stream to the streamer, for ever.
//!
//! The machine has three states, and always goes round them in this order:
//!
//! ```text
//! begin    the file forgets what an older stream left unfinished, and says from where to go on
//! attempt  connect, Hello, then messages to the file and Acks to the streamer, until something fails
//! pause    all tasks of the connection have ended; wait, longer each time until a commit succeeds
//! ```
//!
//! What a streamer sends is only handed on here, never interpreted: an answer that is not ours (a proxy's error page, a
//! captive portal) fails before a byte of it reaches the file.
//!
//! - `connection`: TCP, TLS, HTTP/2.
//! - [`retry`]: how long to pause.
//! - `renewal`: the token, as it is now.
//! - `write`: the call beside it, by which local transactions go up.

mod connection;
mod renewal;
pub mod retry;
mod write;

use std::{pin::pin, sync::Arc, time::Duration};

use anabranch_proto::{PROTOCOL_VERSION, Position, packed, v1};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming};

use self::{
    connection::{Received, Tasks, connect, explain},
    renewal::Access,
    retry::{Pace, Retry, random},
};
use crate::{
    board::Board,
    config::{Config, Secret, Subscription, Token},
    keeper::{Gone, Keeper, Start},
};

/// Bytes within [`SILENCE_MAX`](anabranch_proto::SILENCE_MAX) that count as a sign of life although no message was
/// completed. Answers to HTTP/2 pings are far below it, so a streamer that hangs while its connection lives is noticed.
const PROGRESS_BYTES_MIN: u64 = 1_024;

/// Longest text of a streamer that is repeated in status and log.
const REASON_CHARS_MAX: usize = 1_000;

/// A stream that lived so long was no mistake, whatever it ended with.
const LIVED_MIN: Duration = Duration::from_secs(60);

/// Why there is no stream.
#[derive(Debug)]
struct Failure {
    /// For the metric.
    cause: &'static str,
    what: String,
    pace: Pace,
    /// The streamer says when to come back.
    pushback: Option<Duration>,
}

impl Failure {
    fn soon(cause: &'static str, what: impl Into<String>) -> Self {
        Failure {
            cause,
            what: what.into(),
            pace: Pace::Soon,
            pushback: None,
        }
    }

    fn slow(cause: &'static str, what: impl Into<String>) -> Self {
        Failure {
            cause,
            what: what.into(),
            pace: Pace::Slow,
            pushback: None,
        }
    }

    /// Classified by its code, never by its text.
    fn from_status(status: &Status) -> Self {
        let (cause, pace) = match status.code() {
            Code::Unauthenticated => ("unauthenticated", Pace::Slow),
            Code::PermissionDenied => ("permission_denied", Pace::Slow),
            Code::NotFound => ("not_found", Pace::Slow),
            Code::InvalidArgument => ("invalid_argument", Pace::Slow),
            Code::FailedPrecondition => ("failed_precondition", Pace::Slow),
            // Not our server, or a message above the limit.
            Code::Unimplemented => ("unimplemented", Pace::Slow),
            Code::OutOfRange => ("out_of_range", Pace::Slow),
            Code::ResourceExhausted => ("resource_exhausted", Pace::Soon),
            Code::Unavailable => ("unavailable", Pace::Soon),
            Code::Internal => ("internal", Pace::Soon),
            Code::Cancelled => ("cancelled", Pace::Soon),
            Code::Aborted => ("aborted", Pace::Soon),
            Code::AlreadyExists => (write::CLAIMED, Pace::Soon),
            Code::DeadlineExceeded => ("deadline_exceeded", Pace::Soon),
            Code::DataLoss => ("data_loss", Pace::Soon),
            _ => ("unknown", Pace::Soon),
        };
        let text: String = match std::error::Error::source(status) {
            Some(error) => explain(error),
            None => status.message().to_owned(),
        };
        let text: String = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(REASON_CHARS_MAX)
            .collect();
        Failure {
            cause,
            what: format!("{}: {text}", cause.to_uppercase()),
            pace,
            pushback: pushback(status),
        }
    }

    /// How long to wait now.
    fn pause(&self, retry: &mut Retry) -> Duration {
        let own = retry.pause(self.pace, random());
        (self.pushback).map_or(own, |asked| retry::pushed_back(asked, random()))
    }
}

/// Keeps a stream open until it is told to end, or the file's thread has ended.
pub async fn run(
    config: Arc<Config>,
    keeper: Keeper,
    board: Arc<Board>,
    cancel: CancellationToken,
) {
    let client = Client {
        config,
        keeper,
        board,
    };
    // Dropping the future closes the stream; the tasks of the connection end with the set that holds them.
    let _ = cancel.run_until_cancelled(client.run()).await;
}

struct Client {
    config: Arc<Config>,
    keeper: Keeper,
    board: Arc<Board>,
}

impl Client {
    /// Returns only when the file's thread is gone.
    async fn run(&self) -> Gone {
        let mut retry = Retry::new(&self.config.timing);
        let mut generation = 0;
        let mut last_what = String::new();
        loop {
            generation += 1;
            let (start, refused) = match self.keeper.begin(generation).await {
                Ok(begun) => begun,
                Err(gone) => return gone,
            };
            let began = Instant::now();
            let commits = self.commits();
            let tasks = Tasks::default();
            let mut token = None;
            let result = self
                .attempt(generation, start, refused, &tasks, &mut token)
                .await;
            tasks.stop().await;
            let failure = match result {
                Ok(gone) => return gone,
                Err(failure) => failure,
            };
            self.board.metrics.failed(failure.cause);
            self.board.disconnected(Some(&failure.what));
            if let Err(gone) = self.keeper.ended().await {
                return gone;
            }
            // A file that refuses the stream will probably refuse the next one as well, though commits went before.
            let refused_by_file = failure.cause == "file" && began.elapsed() < LIVED_MIN;
            if self.commits() > commits && !refused_by_file {
                retry.reset();
                last_what.clear();
            }
            let pause = failure.pause(&mut retry);
            // One line for each change of state, not for each attempt.
            if failure.what != last_what {
                let ms = pause.as_millis() as u64;
                tracing::warn!(
                    pause_ms = ms,
                    "no stream from {}: {}",
                    self.config.streamer,
                    failure.what
                );
                last_what = failure.what;
            }
            self.pause(pause, failure.pace, token).await;
        }
    }

    fn commits(&self) -> u64 {
        self.board.watch().borrow().commits
    }

    /// One connection, from its beginning to its end.
    async fn attempt(
        &self,
        generation: u64,
        start: Start,
        refused: oneshot::Receiver<String>,
        tasks: &Tasks,
        used: &mut Option<Secret>,
    ) -> Result<Gone, Failure> {
        let timing = &self.config.timing;
        let access = Access::read(&self.config.token)?;
        *used = access.token();

        let mut connection = connect(&self.config, tasks)
            .await
            .map_err(|what| Failure::soon("connect", what))?;
        let (acks, to_send) = mpsc::channel(1);
        let hello = v1::Up {
            kind: Some(v1::up::Kind::Hello(self.hello(&start))),
        };
        let mut request =
            Request::new(tokio_stream::once(hello).chain(ReceiverStream::new(to_send)));
        access.authorize(&mut request)?;
        let writes = connection.client.clone();
        let response =
            tokio::time::timeout(timing.silence_max, connection.client.replicate(request))
                .await
                .map_err(|_| {
                    Failure::soon(
                        "silence",
                        format!("no answer to Hello within {:?}", timing.silence_max),
                    )
                })?
                .map_err(|status| Failure::from_status(&status))?;
        check_content_type(&response)?;
        let mut stream = response.into_inner();

        let read = self.read(generation, &mut stream, &connection.received);
        let renewals = access.renew(&self.config, acks.clone());
        // No order between them: a stream that never pauses must not keep the Acks from being said.
        tokio::select! {
            result = read => result,
            never = self.acknowledge(acks) => match never {},
            never = renewals => match never {},
            never = self.forward(writes, &start, &access) => match never {},
            Ok(what) = refused => Err(Failure::soon("file", what)),
        }
    }

    fn hello(&self, start: &Start) -> v1::Hello {
        v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            replica_id: start.replica_id.clone(),
            resume_token: start.resume_token.clone(),
            subscriptions: self.subscriptions(),
            zstd: self.config.zstd,
            token_replica_id: start.token_id.clone().unwrap_or_default(),
        }
    }

    fn subscriptions(&self) -> Vec<v1::Subscription> {
        let subscription = |subscription: &Subscription| v1::Subscription {
            shape: subscription.shape.clone(),
            params: subscription.params.clone().into_iter().collect(),
        };
        self.config.subscriptions.iter().map(subscription).collect()
    }

    /// Hands messages to the file. While the file is slow it waits here and reads nothing.
    async fn read(
        &self,
        generation: u64,
        stream: &mut Streaming<v1::Down>,
        received: &Received,
    ) -> Result<Gone, Failure> {
        let mut first = true;
        loop {
            let message = self.next(stream, received).await?;
            if std::mem::take(&mut first) {
                self.board.connected();
                tracing::info!("streaming from {}", self.config.streamer);
            }
            if let Err(gone) = self.keeper.message(generation, message).await {
                return Ok(gone);
            }
        }
    }

    async fn next(
        &self,
        stream: &mut Streaming<v1::Down>,
        received: &Received,
    ) -> Result<v1::Down, Failure> {
        let silence_max = self.config.timing.silence_max;
        let mut message = pin!(stream.message());
        loop {
            let before = received.bytes();
            match tokio::time::timeout(silence_max, &mut message).await {
                Ok(Ok(Some(message))) => {
                    return packed::unpack(message)
                        .map_err(|error| Failure::soon("packed", error.to_string()));
                }
                Ok(Ok(None)) => {
                    return Err(Failure::soon("closed", "the streamer closed the stream"));
                }
                Ok(Err(status)) => return Err(Failure::from_status(&status)),
                Err(_) if received.bytes() - before >= PROGRESS_BYTES_MIN => {}
                Err(_) => {
                    return Err(Failure::soon(
                        "silence",
                        format!("nothing from the streamer for {silence_max:?}"),
                    ));
                }
            }
        }
    }

    /// Says what became durable, and that we live. Never waits for the file: a slow one must not look dead.
    async fn acknowledge(&self, acks: mpsc::Sender<v1::Up>) -> std::convert::Infallible {
        let timing = &self.config.timing;
        let mut status = self.board.watch();
        let mut tick = tokio::time::interval(timing.ack_every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said: Option<Position> = None;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                position = status.wait_for(|status| status.position != said) => {
                    if position.is_err() {
                        break;
                    }
                }
            }
            said = status.borrow_and_update().position;
            let ack = v1::Ack {
                position: said.map(Into::into),
            };
            if acks
                .send(v1::Up {
                    kind: Some(v1::up::Kind::Ack(ack)),
                })
                .await
                .is_err()
            {
                break;
            }
            tick.reset();
            // What commits meanwhile is said at once afterwards.
            tokio::time::sleep(timing.ack_gap).await;
        }
        // The stream has ended: the reader hears why.
        std::future::pending().await
    }

    /// Waits, but not longer than a better token takes to come.
    async fn pause(&self, pause: Duration, pace: Pace, used: Option<Secret>) {
        let end = Instant::now() + pause;
        if pace == Pace::Soon || !matches!(self.config.token, Token::File(_)) {
            return tokio::time::sleep_until(end).await;
        }
        while Instant::now() < end {
            if self.config.token.read().is_ok_and(|token| token != used) {
                tracing::info!("the token file has another token: trying it");
                return;
            }
            tokio::time::sleep_until(end.min(Instant::now() + self.config.timing.token_poll)).await;
        }
    }
}

/// What a status says about when to come back. Anything but a number says nothing.
fn pushback(status: &Status) -> Option<Duration> {
    let asked = status.metadata().get(anabranch_proto::PUSHBACK)?;
    let ms = asked.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(ms))
}

/// A page of a proxy or portal is not a stream, whatever its status.
fn check_content_type<T>(response: &tonic::Response<T>) -> Result<(), Failure> {
    let content_type = response
        .metadata()
        .get("content-type")
        .and_then(|value| value.to_str().ok());
    match content_type {
        Some(text) if text.starts_with("application/grpc") => Ok(()),
        other => Err(Failure::slow(
            "not_grpc",
            format!(
                "what answers there does not speak gRPC (content-type {})",
                other.unwrap_or("missing")
            ),
        )),
    }
}
