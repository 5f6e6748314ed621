//! Forwards local transactions: the call `Write`, beside the stream and on the same connection.
//!
//! It only sends. What became of a transaction comes by the stream, with the effects; so an answer can't be lost with this
//! call, and the stream never waits for it. When the call breaks, what was not answered is sent again by the next one.
//!
//! Where the streamer knows something of this replica that the file does not, the file is a copy: then the call is for asking
//! what became of what it has, and ends with a new id, under which all begins anew.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anabranch_proto::{
    HEARTBEAT_EVERY, Lsn, MESSAGE_BYTES_TARGET, Nonce, PROTOCOL_VERSION,
    v1::{self, anabranch_client::AnabranchClient, write_down, write_up},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Streaming, transport::Channel};

use super::{Client, Failure, check_content_type, renewal::Access, retry::Retry};
use crate::{
    config::Secret,
    file::{Claim, Judged, Judgement, Local},
    keeper::{Outgoing, Start, Unsent},
};

/// What is read from the file at a time.
const READ_BYTES: usize = 4 * MESSAGE_BYTES_TARGET;

/// The cause of a failure: an entry was answered for another copy of the file.
pub(super) const CLAIMED: &str = "already_exists";

/// Messages on their way into the connection.
const MESSAGES_AHEAD: usize = 2;

/// Ids that did not come are asked for again after this time: the streamer had none for us.
const LEASE_AGAIN: Duration = Duration::from_secs(10);

/// Why the call ended.
enum Ended {
    /// Try again.
    Failed(Failure),
    /// The file's thread is gone: whoever owns this learns of it by the stream.
    Gone,
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Ended::Failed(failure)
    }
}

impl Client {
    /// Keeps a call open for as long as there is something that may be written. Never ends by itself.
    pub(super) async fn forward(
        &self,
        client: AnabranchClient<Channel>,
        start: &Start,
        access: &Access,
    ) -> Infallible {
        let mut retry = Retry::new(&self.config.timing);
        let mut last_what = String::new();
        let mut is_copy = false;
        // What an older call said of it says nothing of now.
        self.board.writes_wait(None);
        loop {
            let mut local = self.board.local.subscribe();
            let is_due = |local: &Local| {
                is_copy || local.in_doubt || local.assigned > local.answered || local.wants_ids
            };
            if local.wait_for(is_due).await.is_err() {
                return std::future::pending().await;
            }
            let answered = local.borrow().answered;
            let ended = self.write(client.clone(), start, access, is_copy).await;
            let failure = match ended {
                Ended::Failed(failure) => failure,
                Ended::Gone => return std::future::pending().await,
            };
            is_copy = failure.cause == CLAIMED;
            if self.board.local.borrow().answered > answered {
                retry.reset();
                last_what.clear();
            }
            self.board.metrics.failed(failure.cause);
            self.board.writes_wait(Some(&failure.what));
            let pause = failure.pause(&mut retry);
            if failure.what != last_what {
                let pause_ms = pause.as_millis() as u64;
                tracing::warn!(pause_ms, "local writes wait: {}", failure.what);
                last_what = failure.what;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One call.
    async fn write(
        &self,
        mut client: AnabranchClient<Channel>,
        start: &Start,
        access: &Access,
        is_copy: bool,
    ) -> Ended {
        let (messages, to_send) = mpsc::channel(MESSAGES_AHEAD);
        let hello = v1::WriteHello {
            protocol_version: PROTOCOL_VERSION,
            replica_id: start.replica_id.clone(),
            subscriptions: self.subscriptions(),
        };
        let hello = tokio_stream::once(up(write_up::Kind::Hello(hello)));
        let mut request = Request::new(hello.chain(ReceiverStream::new(to_send)));
        let newer = access.newer();
        if let Err(failure) = access.authorize(&mut request) {
            return failure.into();
        }
        let silence_max = self.config.timing.silence_max;
        let response = match tokio::time::timeout(silence_max, client.write(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(status)) => return Failure::from_status(&status).into(),
            Err(_) => return silent(silence_max).into(),
        };
        if let Err(failure) = check_content_type(&response) {
            return failure.into();
        }
        let mut down = response.into_inner();
        let ready = loop {
            match next(&mut down, silence_max).await {
                Ok(write_down::Kind::Ready(ready)) => break ready,
                // It waits for Postgres itself.
                Ok(write_down::Kind::Alive(_)) => {}
                Ok(write_down::Kind::Ids(_) | write_down::Kind::Judged(_)) => {
                    return Failure::soon("write", "the streamer did not say where writes stand")
                        .into();
                }
                Err(failure) => return failure.into(),
            }
        };
        if ready.other_subject {
            return self.leave().await;
        }
        let first = if is_copy {
            Err(Unsent::Forked)
        } else {
            match self.first(&ready).await {
                Ok(first) => first,
                Err(gone) => return gone,
            }
        };
        let outgoing = match first {
            Ok(outgoing) => outgoing,
            Err(Unsent::Forked) => return self.ask(&mut down, &messages).await,
            Err(Unsent::Trouble(what)) => return Failure::slow("write", what).into(),
        };
        self.board.writes_wait(None);
        let asked = Asked::default();
        tokio::select! {
            ended = self.send(outgoing, messages, &asked, newer) => ended,
            ended = self.listen(&mut down, silence_max, &asked) => ended,
        }
    }

    /// Where sending begins.
    async fn first(&self, ready: &v1::WriteReady) -> Result<Result<Outgoing, Unsent>, Ended> {
        let after = Outgoing::After(ready.seq, ready.hash.clone());
        match self.keeper.outgoing(after, 0).await {
            Ok(read) => Ok(read.map(|(_, outgoing)| outgoing)),
            Err(_) => Err(Ended::Gone),
        }
    }

    /// The id belongs to another subject. What is pending was written by it, and must not be sent as somebody else.
    async fn leave(&self) -> Ended {
        match self.keeper.adopt(None).await {
            Err(_) | Ok(Ok(true)) => Ended::Gone,
            Ok(Ok(false)) => {
                let what = "what is pending in this file was written with a token of another subject (sub): run the replica with such a \
                            token until it is answered; it is kept, and not sent";
                Failure::slow("other_subject", what).into()
            }
            Ok(Err(what)) => Failure::soon("file", what).into(),
        }
    }

    /// The file is a copy: asks what became of what is pending, and takes a new id.
    async fn ask(
        &self,
        down: &mut Streaming<v1::WriteDown>,
        messages: &mpsc::Sender<v1::WriteUp>,
    ) -> Ended {
        let mut judgement = Judgement::default();
        let mut after = 0;
        loop {
            let asked = match self.keeper.pending(after).await {
                Ok(Ok(asked)) => asked,
                Ok(Err(what)) => return Failure::soon("file", what).into(),
                Err(_) => return Ended::Gone,
            };
            let Some((last, _)) = asked.last() else {
                break;
            };
            after = *last;
            let nonces: Vec<u8> = (asked.iter())
                .flat_map(|(_, nonce)| nonce.to_bytes())
                .collect();
            let judge = v1::WriteJudge {
                nonces: nonces.into(),
            };
            // If the call has ended, the answer says why.
            let _ = say(messages, write_up::Kind::Judge(judge)).await;
            match self.judged(down).await {
                Ok(judged) => judgement.add(&asked, &judged),
                Err(failure) => return failure.into(),
            }
        }
        match self.keeper.adopt(Some(judgement)).await {
            // The stream ends now, and all begins anew.
            Err(_) | Ok(Ok(_)) => Ended::Gone,
            Ok(Err(what)) => Failure::soon("file", what).into(),
        }
    }

    async fn judged(&self, down: &mut Streaming<v1::WriteDown>) -> Result<Judged, Failure> {
        loop {
            match next(down, self.config.timing.silence_max).await? {
                write_down::Kind::Alive(_) => {}
                write_down::Kind::Judged(judged) => {
                    return judged_of(judged).ok_or_else(|| {
                        Failure::slow("write", "the streamer named what is no nonce")
                    });
                }
                write_down::Kind::Ready(_) | write_down::Kind::Ids(_) => {
                    return Err(Failure::soon(
                        "write",
                        "the streamer said what it was not asked",
                    ));
                }
            }
        }
    }

    async fn send(
        &self,
        mut outgoing: Outgoing,
        messages: mpsc::Sender<v1::WriteUp>,
        asked: &Asked,
        mut newer: watch::Receiver<Option<Secret>>,
    ) -> Ended {
        let mut local = self.board.local.subscribe();
        let mut settled = 0;
        loop {
            let now = *local.borrow_and_update();
            if now.in_doubt {
                return Failure::soon("write", "answers came that are not of this file").into();
            }
            // Looked at each second at least, as the loop goes round.
            let is_newer = newer.has_changed().unwrap_or_default();
            let token = newer.borrow_and_update().clone().filter(|_| is_newer);
            if let Some(token) = token {
                let token = token.reveal().to_owned();
                let renew = write_up::Kind::Renew(v1::Renew { token });
                if say(&messages, renew).await.is_none() {
                    return over().await;
                }
            }
            if now.settled > settled {
                settled = now.settled;
                if say(&messages, write_up::Kind::Settled(settled))
                    .await
                    .is_none()
                {
                    return over().await;
                }
            }
            if now.wants_ids {
                let Ok(wanted) = self.keeper.leases_wanted().await else {
                    return Ended::Gone;
                };
                for (schema, table) in asked.due(wanted, Instant::now()) {
                    let lease = write_up::Kind::Lease(v1::Lease { schema, table });
                    if say(&messages, lease).await.is_none() {
                        return over().await;
                    }
                }
            }
            let read = match self.keeper.outgoing(outgoing, READ_BYTES).await {
                Ok(read) => read,
                Err(_) => return Ended::Gone,
            };
            let pieces;
            (pieces, outgoing) = match read {
                Ok(read) => read,
                Err(Unsent::Trouble(what)) => return Failure::slow("write", what).into(),
                // Only asked at the beginning.
                Err(Unsent::Forked) => return Failure::soon("write", "the file changed").into(),
            };
            let is_idle = pieces.is_empty();
            for piece in pieces {
                if say(&messages, write_up::Kind::Transaction(piece))
                    .await
                    .is_none()
                {
                    return over().await;
                }
            }
            if is_idle {
                match tokio::time::timeout(HEARTBEAT_EVERY, local.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Ended::Gone,
                    Err(_) => {
                        let alive = write_up::Kind::Alive(v1::Alive {});
                        if say(&messages, alive).await.is_none() {
                            return over().await;
                        }
                    }
                }
            }
        }
    }

    /// Until the call ends.
    async fn listen(
        &self,
        down: &mut Streaming<v1::WriteDown>,
        silence_max: Duration,
        asked: &Asked,
    ) -> Ended {
        loop {
            match next(down, silence_max).await {
                Ok(write_down::Kind::Alive(_)) => {}
                Ok(write_down::Kind::Ids(ids)) => {
                    let table = (ids.schema.clone(), ids.table.clone());
                    let came = !ids.blocks.is_empty();
                    if self.keeper.lease(ids).await.is_err() {
                        return Ended::Gone;
                    }
                    if came {
                        asked.answered(table);
                    }
                }
                Ok(write_down::Kind::Ready(_) | write_down::Kind::Judged(_)) => {
                    return Failure::soon("write", "the streamer said what it was not asked")
                        .into();
                }
                Err(failure) => return failure.into(),
            }
        }
    }
}

/// When ids were asked for, by schema and name of the table. An answer with ids allows to ask again at once.
#[derive(Default)]
struct Asked(Mutex<HashMap<(String, String), Instant>>);

impl Asked {
    /// The tables that are to be asked for now.
    fn due(&self, mut wanted: Vec<(String, String)>, now: Instant) -> Vec<(String, String)> {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.retain(|table| {
            let is_due = |at: &Instant| now.saturating_duration_since(*at) >= LEASE_AGAIN;
            asked.get(table).is_none_or(is_due)
        });
        asked.extend(wanted.iter().map(|table| (table.clone(), now)));
        wanted
    }

    /// Ids came.
    fn answered(&self, table: (String, String)) {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.remove(&table);
    }
}

fn judged_of(judged: v1::WriteJudged) -> Option<Judged> {
    let text = |text: String| (!text.is_empty()).then_some(text);
    let claimed = judged.claimed.into_iter().map(|claimed| {
        let nonce = Nonce::from_bytes(claimed.nonce[..].try_into().ok()?);
        let claim = Claim {
            outcome: text(claimed.outcome),
            sqlstate: text(claimed.sqlstate),
        };
        Some((nonce, claim))
    });
    Some(Judged {
        claimed: claimed.collect::<Option<_>>()?,
        kept_since: judged.kept_since,
        lsn: Lsn(judged.lsn),
    })
}

/// The call has ended: whoever listens hears why.
async fn over() -> Ended {
    std::future::pending().await
}

async fn say(messages: &mpsc::Sender<v1::WriteUp>, kind: write_up::Kind) -> Option<()> {
    messages.send(up(kind)).await.ok()
}

fn up(kind: write_up::Kind) -> v1::WriteUp {
    v1::WriteUp { kind: Some(kind) }
}

fn silent(silence_max: Duration) -> Failure {
    Failure::soon(
        "silence",
        format!("nothing from the streamer for {silence_max:?} in the call for writes"),
    )
}

async fn next(
    down: &mut Streaming<v1::WriteDown>,
    silence_max: Duration,
) -> Result<write_down::Kind, Failure> {
    match tokio::time::timeout(silence_max, down.message()).await {
        Ok(Ok(Some(v1::WriteDown { kind: Some(kind) }))) => Ok(kind),
        Ok(Ok(Some(_))) => Err(Failure::slow(
            "write",
            "the streamer is newer than this replica: it said something unknown",
        )),
        Ok(Ok(None)) => Err(Failure::soon(
            "closed",
            "the streamer closed the call for writes",
        )),
        Ok(Err(status)) => Err(Failure::from_status(&status)),
        Err(_) => Err(silent(silence_max)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_do_not_come_are_asked_for_all_the_time() {
        let (asked, start) = (Asked::default(), Instant::now());
        let table = |name: &str| ("public".to_owned(), name.to_owned());
        let wanted = || vec![table("a"), table("b")];
        assert_eq!(asked.due(wanted(), start), wanted());
        assert!(asked.due(wanted(), start).is_empty());
        // What came may be used up already.
        asked.answered(table("b"));
        assert_eq!(asked.due(wanted(), start), [table("b")]);
        assert_eq!(asked.due(wanted(), start + LEASE_AGAIN), wanted());
    }
}
