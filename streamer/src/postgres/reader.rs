//! The reading side of a replication connection: from the socket to batches of whole frames.
//!
//! Takes as much from the socket as is there, and looks at no more than the frames and the keepalives in them. It
//! reads ahead of the assembler by at most [`READ_AHEAD_BYTES_MAX`], and never waits for it otherwise, so that a
//! question of Postgres is seen although the engine stands still (as long as no more than that lies before it).
//! Frames are slices of what was read: nothing is copied.

use std::{sync::Arc, time::Duration};

use anabranch_proto::Lsn;
use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, sleep, timeout_at},
};

use super::{
    assemble::{self, Keepalive},
    feedback::Asked,
    sql::Error,
    stream::Observed,
    wire,
};

#[cfg(test)]
mod tests;

/// How far the reader may be ahead of the assembler. A row that is larger travels alone.
const READ_AHEAD_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What a batch counts beside its frames, so that many small ones are bounded too.
const BATCH_BYTES: usize = 512;

/// The walsender writes each row by itself. What nobody waits for, since it has not committed, gathers in the socket for
/// this long, and so does what comes so fast that there were [`READS_MAX`] reads within this time: a wake-up of
/// several threads for each row would be most of the work.
const GATHER: Duration = Duration::from_millis(1);

/// A live stream of some thousand transactions a second stays below it.
const READS_MAX: u32 = 12;

/// The reader's buffer: what one read of the socket may yield.
const READ_BYTES: usize = 256 * 1024;

/// After so long a silence Postgres is asked for a sign of life. It sends one by itself after half of its
/// `wal_sender_timeout` (by default also 30 s).
const PROBE_AFTER: Duration = Duration::from_secs(30);

/// After so long a silence it is taken for dead.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The longest message that is not CopyData.
const CONTROL_BYTES_MAX: usize = 1024 * 1024;

/// `row_bytes_max` below this is taken as this: descriptions of tables must pass.
const MESSAGE_BYTES_MIN: usize = 1024 * 1024;

/// How much is kept of a row that is too large: enough to know its table.
const CUT_BYTES: usize = 64;

/// What goes from the reader to the assembler.
pub(super) struct Batch {
    pub content: Content,
    /// Part of the read-ahead.
    _permit: OwnedSemaphorePermit,
}

pub(super) enum Content {
    /// Whole frames of CopyData.
    Frames(Frames),
    /// The beginning of the payload of one that is too large.
    Cut(Bytes),
}

/// Whole frames of CopyData.
pub(super) struct Frames(Bytes);

impl Frames {
    /// What they carry, in order.
    pub fn payloads(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (whole, after) = rest.split_at_checked(frame(rest)?.length)?;
            rest = after;
            Some(&whole[HEADER_BYTES..])
        })
    }
}

/// Length of what precedes a message's payload: its kind, and its length without the kind.
const HEADER_BYTES: usize = 5;

/// A message ahead.
#[derive(Clone, Copy)]
struct Frame {
    kind: u8,
    /// With the header.
    length: usize,
}

/// The message at the beginning of `bytes`, whether or not it is there whole. `None`: not even its header is.
fn frame(bytes: &[u8]) -> Option<Frame> {
    let [kind, length @ ..] = bytes.first_chunk::<HEADER_BYTES>()?;
    // A length below 4 makes no sense; it ends as a message that is malformed.
    let length = (u32::from_be_bytes(*length) as usize + 1).max(HEADER_BYTES);
    Some(Frame {
        kind: *kind,
        length,
    })
}

/// See the module's documentation.
pub(super) struct Reader<R> {
    socket: R,
    buffer: BytesMut,
    /// Bytes that may still be read ahead.
    budget: Arc<Semaphore>,
    /// Bounded by the budget.
    batches: mpsc::UnboundedSender<Batch>,
    asked: watch::Sender<Asked>,
    observed: Arc<Observed>,
    message_bytes_max: usize,
    /// Between `B` and `C` of a transaction.
    within: bool,
    /// Between `S` and `E`: a transaction that has not committed is streamed.
    in_progress: bool,
    /// When reads were last counted from nothing, and how many there were since.
    window: Instant,
    reads: u32,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Reads from `socket` what comes after `buffer`. A row above `row_bytes_max` is not read into memory.
    pub fn new(
        socket: R,
        buffer: BytesMut,
        row_bytes_max: usize,
        batches: mpsc::UnboundedSender<Batch>,
        asked: watch::Sender<Asked>,
        observed: Arc<Observed>,
    ) -> Self {
        Reader {
            socket,
            buffer,
            budget: Arc::new(Semaphore::new(READ_AHEAD_BYTES_MAX)),
            batches,
            asked,
            observed,
            message_bytes_max: row_bytes_max.max(MESSAGE_BYTES_MIN),
            within: false,
            in_progress: false,
            window: Instant::now(),
            reads: 0,
        }
    }

    /// Ends with an error, or because the assembler has gone.
    pub async fn run(&mut self) -> Result<(), Error> {
        loop {
            let whole = self.whole_frames();
            if whole > 0 {
                let frames = self.buffer.split_to(whole).freeze();
                if !self.hand_on(Content::Frames(Frames(frames)), whole).await {
                    return Ok(());
                }
            }
            match frame(&self.buffer) {
                Some(Frame { kind: b'd', length }) if length > self.message_bytes_max => {
                    let head = self.cut(length).await?;
                    if !self.hand_on(Content::Cut(head), CUT_BYTES).await {
                        return Ok(());
                    }
                }
                Some(frame) if frame.kind != b'd' && frame.length > CONTROL_BYTES_MAX => {
                    return Err(Error::Transient(
                        "Postgres announces a message that is too long".into(),
                    ));
                }
                Some(frame) if frame.length > self.buffer.len() => {
                    self.buffer.reserve(frame.length - self.buffer.len());
                    self.read().await?;
                }
                Some(frame) => self.control(frame)?,
                None => self.read().await?,
            }
        }
    }

    /// Reads and forgets, until Postgres has closed the connection.
    pub async fn drain(&mut self) {
        loop {
            self.buffer.clear();
            match self.socket.read_buf(&mut self.buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// `false`: there is nobody any more to hand it to.
    async fn hand_on(&self, content: Content, bytes: usize) -> bool {
        let bytes = (bytes + BATCH_BYTES).min(READ_AHEAD_BYTES_MAX) as u32;
        let Ok(permit) = self.budget.clone().acquire_many_owned(bytes).await else {
            return false;
        };
        let batch = Batch {
            content,
            _permit: permit,
        };
        self.batches.send(batch).is_ok()
    }

    async fn read(&mut self) -> Result<(), Error> {
        if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 8 {
            self.buffer.reserve(READ_BYTES);
        }
        self.reads += 1;
        if self.window.elapsed() >= GATHER {
            (self.window, self.reads) = (Instant::now(), 0);
        }
        if self.in_progress || self.reads > READS_MAX {
            sleep(GATHER).await;
        }
        let since = Instant::now();
        let mut read = std::pin::pin!(self.socket.read_buf(&mut self.buffer));
        let read = match timeout_at(since + PROBE_AFTER, &mut read).await {
            Ok(read) => Ok(read),
            Err(_) => {
                self.asked.send_modify(|asked| asked.probes += 1);
                timeout_at(since + SILENCE_MAX, read).await
            }
        };
        match read {
            Ok(Ok(bytes @ 1..)) => {
                self.observed.has_read(bytes);
                Ok(())
            }
            Ok(Ok(0)) => Err(Error::Transient("Postgres closed the connection".into())),
            Ok(Err(error)) => Err(Error::Transient(format!(
                "the connection to Postgres broke: {error}"
            ))),
            Err(_) => Err(Error::Transient(format!(
                "Postgres was silent for {} s",
                SILENCE_MAX.as_secs()
            ))),
        }
    }

    /// How many bytes at the beginning of the buffer are whole frames of CopyData. Looks at each.
    fn whole_frames(&mut self) -> usize {
        let mut end = 0;
        let mut highest = 0;
        while let Some(Frame { kind: b'd', length }) = frame(&self.buffer[end..])
            && length <= self.message_bytes_max
            && let Some(payload) = self.buffer.get(end + HEADER_BYTES..end + length)
        {
            match payload.first() {
                Some(b'w') => {
                    if let Some(lsn) = payload.get(1..).and_then(<[u8]>::first_chunk) {
                        highest = highest.max(u64::from_be_bytes(*lsn));
                    }
                    match payload.get(assemble::XLOG_HEADER_BYTES) {
                        Some(b'B') => self.within = true,
                        Some(b'C') => self.within = false,
                        Some(b'S') => self.in_progress = true,
                        Some(b'E') => self.in_progress = false,
                        _ => {}
                    }
                }
                Some(b'k') => {
                    if let Ok(keepalive) = Keepalive::read(payload) {
                        highest = highest.max(keepalive.wal_end.0);
                        self.observed.has_decoded(keepalive.wal_end);
                        if keepalive.reply {
                            // Within a transaction nothing new will be confirmed soon: it is answered at once.
                            let after = if self.within {
                                Lsn(0)
                            } else {
                                keepalive.wal_end
                            };
                            self.asked.send_modify(|asked| {
                                asked.answers += 1;
                                asked.after = after;
                            });
                        }
                    }
                }
                _ => {}
            }
            end += length;
        }
        self.observed.has_received(Lsn(highest));
        end
    }

    /// Takes a frame out of the stream that is too large, and returns the beginning of its payload.
    async fn cut(&mut self, length: usize) -> Result<Bytes, Error> {
        while self.buffer.len() < HEADER_BYTES + CUT_BYTES {
            self.read().await?;
        }
        let head = Bytes::copy_from_slice(&self.buffer[HEADER_BYTES..HEADER_BYTES + CUT_BYTES]);
        let mut left = length;
        loop {
            let here = left.min(self.buffer.len());
            self.buffer.advance(here);
            left -= here;
            if left == 0 {
                return Ok(head);
            }
            self.read().await?;
        }
    }

    /// Takes a message that is not CopyData.
    fn control(&mut self, frame: Frame) -> Result<(), Error> {
        let mut message = self.buffer.split_to(frame.length);
        match frame.kind {
            b'E' => Err(wire::error(&mut message)),
            // CopyDone or CommandComplete.
            b'c' | b'C' => Err(Error::Transient("Postgres ended the stream".into())),
            // Notices, and parameters that changed.
            b'N' | b'S' | b'A' => Ok(()),
            _ => Err(Error::Transient(
                "Postgres sent what the protocol does not allow".into(),
            )),
        }
    }
}
