//! An SQL connection on which statements are sent without waiting for the answers to those before them.
//!
//! With tokio-postgres each statement has a Sync of its own: Postgres sends what it has to say for each, and we wake up for
//! each. Here many share one. Statements are sent in *groups* that a Sync ends. The first one that fails ends its group:
//! Postgres skips the rest, up to the Sync. A transaction is begun and ended by statements like any other, and may go over
//! groups.
//!
//! Nothing runs in the background: [`Pipeline::poll`] writes and reads, whichever goes, so neither end waits for the other
//! with full buffers. Who sends must take as many answers as it expects.
//!
//! Reference: <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-EXT-QUERY>.

mod answers;

use std::{
    collections::HashMap,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker, ready},
};

use bytes::BytesMut;
use postgres_protocol::{
    IsNull,
    message::frontend::{self, BindError},
};
use tokio::io::{AsyncReadExt, AsyncWrite};

use self::answers::Answers;
pub use self::answers::{Answer, Said};
use super::{
    dial::Socket,
    sql::Error,
    target::Target,
    wire::{self, Wire},
    writer::Param,
};

/// As many prepared statements are kept; others are parsed each time.
const PREPARED_MAX: usize = 512;

/// What the names of prepared statements begin with: a number follows. An application's own are called otherwise.
const NAME: &str = "anabranch ";

/// A prepared statement is not there; and the function of the server that says so.
const NO_SUCH_STATEMENT: &str = "26000";
const FETCH: &str = "FetchPreparedStatement";

/// Read at once, at most.
const READ_BYTES: usize = 16 * 1024;

/// A buffer that grew beyond this, for a large value, is not kept.
const WRITE_BYTES_KEPT: usize = 256 * 1024;

/// A connection, logged in.
pub struct Pipeline {
    socket: Socket,
    read: BytesMut,
    write: BytesMut,
    /// As much of it was.
    written: usize,
    /// What was written has left us.
    flushed: bool,
    answers: Answers,
    /// Names of prepared statements, by their text.
    prepared: HashMap<String, Box<str>>,
    /// As many names were given.
    named: u64,
    /// The server has prepared statements that are not known here any more.
    forgotten: bool,
    /// None are to be prepared.
    unnamed: bool,
    server_version: u32,
    broken: bool,
}

impl Pipeline {
    /// Connects to write what programs wrote: under row-level security, and with the durability that the database has.
    /// Executes `settings`, and those of `optional` that the server knows. The connection, and all that was executed.
    pub async fn connect_to_write(
        target: &Target,
        application_name: &str,
        settings: &str,
        optional: &[&str],
    ) -> Result<(Pipeline, String), Error> {
        let mut wire = Wire::connect_to_write(target, application_name).await?;
        wire.query(settings).await?;
        let mut set = settings.to_owned();
        for setting in optional {
            if wire.query(setting).await.is_ok() {
                set = format!("{set}; {setting}");
            }
        }
        let server_version = wire.server_version();
        let (socket, read) = wire.into_parts();
        let pipeline = Pipeline {
            socket,
            read,
            write: BytesMut::new(),
            written: 0,
            flushed: true,
            answers: Answers::default(),
            prepared: HashMap::new(),
            named: 0,
            forgotten: false,
            unnamed: false,
            server_version,
            broken: false,
        };
        Ok((pipeline, set))
    }

    /// `major * 10000 + minor`, e.g. 150018.
    pub fn server_version(&self) -> u32 {
        self.server_version
    }

    /// Whether the connection is there, as far as that is known. Only where all was answered.
    pub fn is_open(&mut self) -> bool {
        if !self.broken {
            let polled = self.poll(&mut Context::from_waker(Waker::noop()));
            // Nobody asked it anything.
            self.broken |= polled.is_ready();
        }
        !self.broken
    }

    /// It is of no use any more.
    pub fn give_up(&mut self) {
        self.broken = true;
    }

    /// Bytes that were not written yet.
    pub fn unwritten(&self) -> usize {
        self.write.len() - self.written
    }

    /// Adds a statement. If it is to be prepared first: its text, which [`forget`](Self::forget) takes.
    pub fn statement(&mut self, text: &str, params: &[Param]) -> io::Result<Option<String>> {
        let before = self.write.len();
        let added = self.add(text, params);
        if added.is_err() {
            self.write.truncate(before);
            self.forget(text);
        }
        added
    }

    fn add(&mut self, text: &str, params: &[Param]) -> io::Result<Option<String>> {
        let (name, parsed) = match self.prepared.get(text) {
            Some(name) => (&**name, None),
            None if self.unnamed || self.prepared.len() >= PREPARED_MAX => {
                frontend::parse("", text, [], &mut self.write)?;
                ("", None)
            }
            None => {
                self.named += 1;
                let name = format!("{NAME}{}", self.named);
                frontend::parse(&name, text, [], &mut self.write)?;
                let name = self.prepared.entry(text.into()).or_insert(name.into());
                (&**name, Some(text.to_owned()))
            }
        };
        let formats = params.iter().map(|param| i16::from(param.is_binary()));
        let value = |param: &Param, out: &mut BytesMut| {
            let Some(bytes) = param.bytes() else {
                return Ok(IsNull::Yes);
            };
            out.extend_from_slice(bytes);
            Ok(IsNull::No)
        };
        let bound = frontend::bind("", name, formats, params, value, [0], &mut self.write);
        bound.map_err(|error| match error {
            BindError::Conversion(error) => io::Error::other(error),
            BindError::Serialization(error) => error,
        })?;
        frontend::execute("", 0, &mut self.write)?;
        Ok(parsed)
    }

    /// A statement that was to be prepared was not.
    pub fn forget(&mut self, text: &str) {
        self.prepared.remove(text);
    }

    /// Prepares all anew, after the [`tidy`](Self::tidy) that comes next.
    pub fn forget_all(&mut self) {
        self.prepared.clear();
        self.forgotten = true;
    }

    /// From here on statements are prepared, or are not. What is prepared is forgotten.
    pub fn prepare(&mut self, prepare: bool) {
        if self.unnamed == prepare {
            self.unnamed = !prepare;
            self.forget_all();
        }
    }

    /// Whether an error says that a statement, which we prepared, is not there.
    pub fn is_unprepared(said: &Said) -> bool {
        // In any language.
        let named = said.message.contains(NAME);
        said.sqlstate == NO_SUCH_STATEMENT && said.routine.as_deref() == Some(FETCH) && named
    }

    /// SQL to be sent, between groups, before anything else: it drops what is not known here any more. None: nothing is to
    /// be done.
    pub fn tidy(&mut self) -> Option<&'static str> {
        if self.prepared.len() >= PREPARED_MAX {
            self.forget_all();
        }
        std::mem::take(&mut self.forgotten).then_some("DEALLOCATE ALL")
    }

    /// Ends a group.
    pub fn sync(&mut self) {
        frontend::sync(&mut self.write);
    }

    /// Adds statements without parameters, as a group of their own.
    pub fn simple(&mut self, sql: &str) -> io::Result<()> {
        frontend::query(sql, &mut self.write)
    }

    /// Writes what can be written, and takes the next answer.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Answer, Error>> {
        let polled = self.poll_both(context);
        self.broken |= matches!(polled, Poll::Ready(Err(_)));
        polled
    }

    fn poll_both(&mut self, context: &mut Context<'_>) -> Poll<Result<Answer, Error>> {
        // Whether it waits does not matter: it wakes us.
        if let Poll::Ready(Err(error)) = self.poll_write(context) {
            return Poll::Ready(Err(wire::broken(error)));
        }
        loop {
            match self.answers.next(&mut self.read) {
                Ok(Some(answer)) => return Poll::Ready(Ok(answer)),
                Ok(None) => {}
                Err(answers::Unexpected) => return Poll::Ready(Err(wire::unexpected())),
            }
            self.read.reserve(READ_BYTES);
            let read = pin!(self.socket.read_buf(&mut self.read)).poll(context);
            match ready!(read) {
                Ok(0) => return Poll::Ready(Err(wire::closed())),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(wire::broken(error))),
            }
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.unwritten() > 0 {
            self.flushed = false;
            let socket = Pin::new(&mut self.socket);
            let written = ready!(socket.poll_write(context, &self.write[self.written..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        if self.write.capacity() > WRITE_BYTES_KEPT {
            self.write = BytesMut::new();
        }
        self.write.clear();
        self.written = 0;
        if !self.flushed {
            ready!(Pin::new(&mut self.socket).poll_flush(context))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}
