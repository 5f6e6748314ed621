//! What we tell Postgres while it streams: how far we are.
//!
//! A task of its own on the writing half of the connection. It waits neither for what arrives nor for the engine, so
//! Postgres never takes us for dead because we are busy. The position that it confirms (flushed and applied) is only
//! ever the one that the engine says is durable; beside it goes what was received, which Postgres uses for nothing but
//! its statistics.
//!
//! When Postgres asks for an answer it may be shutting down, and then waits, without limit, for the confirmation
//! of everything it sent. So the answer is given once what was sent is confirmed; if that takes longer than
//! [`Pace::answer_within`] the connection is given up, which lets Postgres go.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anabranch_proto::Lsn;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{dial::TERMINATE, sql::Error, stream::Observed};

/// How fast.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Confirmations are sent at most this often, unless Postgres asks.
    pub status_every_min: Duration,
    /// And at least this often.
    pub status_every_max: Duration,
    /// How long Postgres waits, when it asks, until we rather close the connection.
    pub answer_within: Duration,
    /// How long a status may take to be written.
    pub write_within: Duration,
}

/// The pace of all connections: seconds are far below any reasonable `wal_sender_timeout`, and Postgres reads between
/// any two messages that it sends, so that one which does not read for long is dead.
pub(super) const PACE: Pace = Pace {
    status_every_min: Duration::from_millis(50),
    status_every_max: Duration::from_secs(1),
    answer_within: Duration::from_secs(1),
    write_within: Duration::from_secs(30),
};

const COPY_DONE: [u8; 5] = [b'c', 0, 0, 0, 4];

/// What the reading side wants to be told to Postgres.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    /// How often Postgres asked for an answer so far.
    pub answers: u64,
    /// Answer the last time it asked when this is confirmed.
    pub after: Lsn,
    /// How often Postgres should be asked for a sign of life so far.
    pub probes: u64,
}

/// Runs until `shutdown` (then Postgres has been told that we stop), or until the engine is gone, or an error.
pub(super) async fn run(
    pace: Pace,
    mut write: impl AsyncWrite + Unpin,
    mut confirmed: watch::Receiver<Lsn>,
    mut asked: watch::Receiver<Asked>,
    shutdown: CancellationToken,
    observed: Arc<Observed>,
) -> Result<(), Error> {
    let mut told = Lsn(0);
    let mut told_at: Option<Instant> = None;
    let mut seen = Asked::default();
    // The oldest question that is still open, and the newest.
    let mut open: Option<(Lsn, Instant)> = None;
    let mut newest = (Lsn(0), Instant::now());
    loop {
        let now = Instant::now();
        let safe = *confirmed.borrow_and_update();
        let wanted = *asked.borrow_and_update();
        let probe = wanted.probes != seen.probes;
        let mut answer = false;
        if wanted.answers != seen.answers {
            newest = (wanted.after, now);
            open = open.or(Some(newest));
        }
        seen = wanted;
        if let Some((after, _)) = open
            && after <= safe
        {
            answer = true;
            open = (newest.0 > safe).then_some(newest);
        }

        let due = match told_at {
            None => now,
            Some(_) if answer || probe => now,
            Some(at) if safe > told => at + pace.status_every_min,
            Some(at) => at + pace.status_every_max,
        };
        if due <= now {
            let status = status(observed.received().max(safe), safe, probe);
            written(pace, &mut write, &status).await?;
            observed.told(safe);
            told = safe;
            told_at = Some(now);
            continue;
        }
        let deadline = open.map(|(_, since)| since + pace.answer_within);
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Error::Transient(format!(
                "what Postgres sent was not made durable within {} ms after it asked: the connection is given up, so that it does not wait for us",
                pace.answer_within.as_millis()
            )));
        }
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {
                let safe = *confirmed.borrow();
                let mut last = status(observed.received().max(safe), safe, false).to_vec();
                // After CopyDone and Terminate Postgres frees the slot at once.
                last.extend_from_slice(&COPY_DONE);
                last.extend_from_slice(&TERMINATE);
                return written(pace, &mut write, &last).await;
            }
            changed = asked.changed() => if changed.is_err() { return Ok(()) },
            changed = confirmed.changed() => if changed.is_err() { return Ok(()) },
            () = tokio::time::sleep_until(deadline.map_or(due, |deadline| deadline.min(due))) => {}
        }
    }
}

async fn written(
    pace: Pace,
    write: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
) -> Result<(), Error> {
    let work = async {
        write.write_all(bytes).await?;
        write.flush().await
    };
    let done = timeout(pace.write_within, work).await;
    done.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| Error::Transient(format!("the connection to Postgres broke: {error}")))
}

/// A standby status update, in its CopyData.
fn status(received: Lsn, confirmed: Lsn, reply: bool) -> [u8; 39] {
    // Microseconds since 2000, for the server's statistics.
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(946_684_800))
        .map_or(0, |time| time.as_micros() as u64);
    let mut bytes = [0; 39];
    bytes[0] = b'd';
    bytes[1..5].copy_from_slice(&38u32.to_be_bytes());
    bytes[5] = b'r';
    bytes[6..14].copy_from_slice(&received.0.to_be_bytes());
    bytes[14..22].copy_from_slice(&confirmed.0.to_be_bytes());
    bytes[22..30].copy_from_slice(&confirmed.0.to_be_bytes());
    bytes[30..38].copy_from_slice(&now.to_be_bytes());
    bytes[38] = u8::from(reply);
    bytes
}

#[cfg(test)]
mod tests;
