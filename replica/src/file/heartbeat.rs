//! Heartbeats: positions that move without content, and signs of life.

use std::time::{Duration, Instant};

use anabranch_proto::{
    Lsn, Position,
    v1::{self, element::Kind},
};
use bytes::Bytes;
use jiff::Timestamp;

use super::{
    Error, File,
    error::Doing,
    state::{Heard, State},
    transaction::Write,
};

/// A heartbeat that moves the position is committed at once if nothing was for this long: a streamer sends one each
/// second, so `position()` lags by one at most, and a hasty one can't make us write all the time.
const HEARTBEAT_COMMIT_EVERY: Duration = Duration::from_millis(500);

/// One that moves nothing is written this seldom, as the sign of life in `_anabranch_status`.
const HEARTBEAT_WRITE_EVERY: Duration = Duration::from_secs(5);

impl File {
    /// Takes heartbeats that came alone. Says the position if it was committed and has moved.
    pub(super) fn heartbeats(
        &mut self,
        message: &v1::Down,
        proves_position: bool,
    ) -> Result<Option<Position>, Error> {
        let Some(Kind::Heartbeat(last)) = message
            .elements
            .last()
            .and_then(|element| element.kind.as_ref())
        else {
            return Ok(None);
        };
        self.stream.heard = Some(Heard {
            source_lsn: Lsn(last.source_lsn),
            source_connected: last.source_connected,
            time: Timestamp::now(),
        });
        if let Some(position) = last.position.filter(|_| proves_position) {
            let token = Bytes::copy_from_slice(&message.resume_token);
            self.stream.noted = Some((position.into(), token));
        }
        let mut state = self.state.clone();
        state.connected = true;
        self.note(&mut state, Timestamp::now());
        let moves = state.position != self.state.position;
        let news = moves || state.caught_up != self.state.caught_up;
        let is_due = self.written.is_none_or(|written| {
            let age = written.elapsed();
            age >= HEARTBEAT_WRITE_EVERY || (news && age >= HEARTBEAT_COMMIT_EVERY)
        });
        if !is_due {
            return Ok(None);
        }
        self.guard.still_there()?;
        self.store(state)?;
        Ok(self.state.position.filter(|_| moves))
    }

    /// Takes over what heartbeats said, as it is to be judged at `now`.
    pub(super) fn note(&self, state: &mut State, now: Timestamp) {
        if let Some((position, token)) = &self.stream.noted {
            state.position = Some(*position);
            state.set_token(token.clone());
        }
        match &self.stream.heard {
            Some(heard) => state.hear(heard, now),
            None => state.caught_up = false,
        }
    }

    /// Writes a state in a transaction of its own; not over content that somebody else put there.
    pub(super) fn store(&mut self, state: State) -> Result<(), Error> {
        let write = Write::begin(&self.connection)?;
        if !self.state.is_in_file(&self.connection)? {
            drop(write);
            return Err(self.start_over());
        }
        state
            .store(&self.connection)
            .doing("write the state of the file")?;
        write.commit()?;
        self.state = state;
        self.stream.noted = None;
        self.written = Some(Instant::now());
        Ok(())
    }
}
