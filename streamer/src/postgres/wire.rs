//! One connection of our own: startup, authentication, simple queries, and the way into what we do with it: streaming, or
//! statements without waiting.
//!
//! tokio-postgres can neither ask for `replication=database`, nor stream in both directions, nor send several statements with
//! one Sync; this is the little that is needed beside it, on the same crate for the bytes of messages (`postgres-protocol`).
//! Two messages that the crate does not know are handled before it sees them: CopyBothResponse and NegotiateProtocolVersion.
//!
//! The server is not trusted with our memory: the length of a message is checked before room is made for it.
//!
//! Reference: <https://www.postgresql.org/docs/current/protocol-flow.html>.

use std::{collections::HashMap, io};

use bytes::{Buf, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{self, ScramSha256},
    },
    message::{
        backend::{AuthenticationSaslBody, ErrorFields, Header, Message},
        frontend,
    },
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    dial::{self, Failed, REFUSES_CLEARTEXT, Socket},
    sql::{self, Error},
    target::{ChannelBinding, Target},
};

/// The longest message that is accepted outside of streaming. The rows that we ask for there are short.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// CopyBothResponse.
const COPY_BOTH: u8 = b'W';

/// NegotiateProtocolVersion: the server knows less than we asked for. We ask for 3.0, which all know.
const NEGOTIATE: u8 = b'v';

/// One row of a simple query.
pub(super) type Row = Vec<Option<String>>;

/// What a connection is for.
#[derive(Clone, Copy)]
enum Purpose<'a> {
    /// `replication=database`, with these settings where the URL has no others.
    Replication(&'a [(&'a str, &'a str)]),
    /// To write what programs wrote.
    Writing,
}

impl Purpose<'_> {
    fn session(self) -> sql::Use {
        match self {
            Purpose::Replication(_) => sql::Use::Ours,
            Purpose::Writing => sql::Use::Writing,
        }
    }
}

/// A connection, logged in.
pub(super) struct Wire {
    socket: Socket,
    read: BytesMut,
    parameters: HashMap<String, String>,
    server_version: u32,
    /// The answer to the last query was read to its end.
    ready: bool,
}

/// What comes from the server.
enum Received {
    Message(Message),
    CopyBoth,
}

impl Wire {
    /// Connects, logs in, pins the session settings and verifies them. The URL's `options` override `suggested`.
    pub async fn connect(
        target: &Target,
        application_name: &str,
        suggested: &[(&str, &str)],
    ) -> Result<Wire, Error> {
        let login = Login {
            target,
            application_name,
            purpose: Purpose::Replication(suggested),
        };
        dial::connect(target, &login).await
    }

    /// The same, to write what programs wrote.
    pub async fn connect_to_write(target: &Target, application_name: &str) -> Result<Wire, Error> {
        let login = Login {
            target,
            application_name,
            purpose: Purpose::Writing,
        };
        dial::connect(target, &login).await
    }

    /// The connection alone, and what has arrived since the last answer.
    pub fn into_parts(self) -> (Socket, BytesMut) {
        (self.socket, self.read)
    }

    /// `major * 10000 + minor`.
    pub fn server_version(&self) -> u32 {
        self.server_version
    }

    /// What the server reported of itself, e.g. `in_hot_standby`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Rows of one statement. If it is dropped before it answers, the connection can't be used any more.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>, Error> {
        self.send_query(sql).await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            match self.receive().await? {
                Received::Message(Message::DataRow(body)) => {
                    let column = |range: Option<std::ops::Range<usize>>| match range {
                        None => Ok(None),
                        Some(range) => std::str::from_utf8(&body.buffer()[range])
                            .map(|text| Some(text.to_owned()))
                            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
                    };
                    rows.push(body.ranges().map(column).collect().map_err(broken)?);
                }
                Received::Message(Message::ErrorResponse(body)) => {
                    let error = of_fields(&mut body.fields());
                    // After a fatal one nothing follows.
                    if error.1 {
                        return Err(error.0);
                    }
                    failed = failed.or(Some(error.0));
                }
                Received::Message(Message::ReadyForQuery(_)) => {
                    self.ready = true;
                    return failed.map_or(Ok(rows), Err);
                }
                Received::Message(_) => {}
                Received::CopyBoth => return Err(unexpected()),
            }
        }
    }

    /// Sends a statement that begins streaming in both directions. What has arrived since is in the buffer.
    pub async fn copy_both(mut self, sql: &str) -> Result<(Socket, BytesMut), Error> {
        self.send_query(sql).await?;
        loop {
            match self.receive().await? {
                Received::CopyBoth => return Ok((self.socket, self.read)),
                Received::Message(Message::ErrorResponse(body)) => {
                    return Err(of_fields(&mut body.fields()).0);
                }
                Received::Message(Message::ReadyForQuery(_)) => return Err(unexpected()),
                Received::Message(_) => {}
            }
        }
    }

    async fn send_query(&mut self, sql: &str) -> Result<(), Error> {
        if !std::mem::take(&mut self.ready) {
            let error = "an earlier command on this connection was not finished";
            return Err(Error::Transient(error.into()));
        }
        let mut bytes = BytesMut::new();
        frontend::query(sql, &mut bytes).map_err(broken)?;
        self.socket.write_all(&bytes).await.map_err(broken)?;
        self.socket.flush().await.map_err(broken)
    }

    async fn pin(&mut self, session: sql::Use) -> Result<(), Error> {
        let rows = self.query(&sql::verification(session)).await?;
        let row = rows.first();
        self.server_version = sql::verify(session, |place| row?.get(place)?.as_deref())?;
        let later = sql::pin_later(self.server_version);
        if !later.is_empty() {
            self.query(&later).await?;
        }
        Ok(())
    }

    async fn authenticate(&mut self, target: &Target) -> Result<(), Failed> {
        let definite = |error: &str| Failed::Broken(Error::Definite(error.into()));
        let password = || {
            let password = target.password.as_deref().map(str::as_bytes);
            password.ok_or_else(|| definite("it asks for a password, and the URL has none"))
        };
        let required = target.channel_binding == ChannelBinding::Require;
        let mut bytes = BytesMut::new();
        match self.answer().await? {
            Message::AuthenticationSasl(body) => {
                return self.scram(target, body, password()?).await;
            }
            // All other ways prove nothing about the server.
            _ if required => {
                return Err(definite(
                    "it does not authenticate with channel binding, which channel_binding=require asks for",
                ));
            }
            Message::AuthenticationOk => return Ok(()),
            Message::AuthenticationCleartextPassword if !self.socket.private => {
                return Err(definite(REFUSES_CLEARTEXT));
            }
            Message::AuthenticationCleartextPassword => {
                frontend::password_message(password()?, &mut bytes)?;
            }
            Message::AuthenticationMd5Password(body) => {
                let hash = md5_hash(target.user.as_bytes(), password()?, body.salt());
                frontend::password_message(hash.as_bytes(), &mut bytes)?;
            }
            Message::AuthenticationGss
            | Message::AuthenticationSspi
            | Message::AuthenticationKerberosV5
            | Message::AuthenticationScmCredential => {
                return Err(definite(
                    "it wants a way of authentication that is not supported",
                ));
            }
            _ => return Err(Failed::Broken(unexpected())),
        }
        self.send(&bytes).await?;
        self.authenticated().await
    }

    async fn scram(
        &mut self,
        target: &Target,
        body: AuthenticationSaslBody,
        password: &[u8],
    ) -> Result<(), Failed> {
        let definite = |error: String| Failed::Broken(Error::Definite(error));
        let mut offered = body.mechanisms();
        let (mut plain, mut plus) = (false, false);
        while let Some(mechanism) = offered.next()? {
            plain |= mechanism == sasl::SCRAM_SHA_256;
            plus |= mechanism == sasl::SCRAM_SHA_256_PLUS;
        }
        let binding = match target.channel_binding {
            ChannelBinding::Disable => None,
            _ => self.socket.end_point.clone(),
        };
        let (binding, mechanism) = match binding {
            Some(hash) if plus => (
                sasl::ChannelBinding::tls_server_end_point(hash),
                sasl::SCRAM_SHA_256_PLUS,
            ),
            _ if target.channel_binding == ChannelBinding::Require => {
                return Err(definite(
                    "channel binding is not possible on this connection, and channel_binding=require asks for it"
                        .into(),
                ));
            }
            // Tells the server that we could: if it could too, somebody between us hides it.
            Some(_) if plain => (sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256),
            None if plain => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
            _ => {
                return Err(definite(
                    "it offers no way of authentication that we know".into(),
                ));
            }
        };

        let mut scram = ScramSha256::new(password, binding);
        let mut bytes = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut bytes)?;
        self.send(&bytes).await?;
        let Message::AuthenticationSaslContinue(body) = self.answer().await? else {
            return Err(Failed::Broken(unexpected()));
        };
        scram
            .update(body.data())
            .map_err(|error| definite(format!("SCRAM: {error}")))?;
        bytes.clear();
        frontend::sasl_response(scram.message(), &mut bytes)?;
        self.send(&bytes).await?;
        let Message::AuthenticationSaslFinal(body) = self.answer().await? else {
            return Err(Failed::Broken(unexpected()));
        };
        scram.finish(body.data()).map_err(|error| {
            definite(format!(
                "SCRAM: the server proves not to know the password: {error}"
            ))
        })?;
        self.authenticated().await
    }

    async fn authenticated(&mut self) -> Result<(), Failed> {
        match self.answer().await? {
            Message::AuthenticationOk => Ok(()),
            _ => Err(Failed::Broken(unexpected())),
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Failed> {
        self.socket.write_all(bytes).await?;
        Ok(self.socket.flush().await?)
    }

    /// The next message while logging in, where an error ends the attempt.
    async fn answer(&mut self) -> Result<Message, Failed> {
        loop {
            match self.receive().await.map_err(Failed::Broken)? {
                Received::Message(Message::ErrorResponse(body)) => {
                    return Err(Failed::Refused(of_fields(&mut body.fields()).0));
                }
                Received::Message(Message::NoticeResponse(_)) => {}
                Received::Message(message) => return Ok(message),
                Received::CopyBoth => return Err(Failed::Broken(unexpected())),
            }
        }
    }

    async fn receive(&mut self) -> Result<Received, Error> {
        loop {
            if let Some(header) = Header::parse(&self.read).map_err(broken)? {
                let length = 1 + usize::try_from(header.len()).map_err(|_| unexpected())?;
                if length > MESSAGE_BYTES_MAX {
                    let error = format!("Postgres announces a message of {length} bytes");
                    return Err(Error::Transient(error));
                }
                if self.read.len() >= length {
                    match header.tag() {
                        COPY_BOTH => {
                            self.read.advance(length);
                            return Ok(Received::CopyBoth);
                        }
                        NEGOTIATE => {
                            self.read.advance(length);
                            continue;
                        }
                        _ => {
                            let mut message = self.read.split_to(length);
                            let message = Message::parse(&mut message).map_err(broken)?;
                            return message.map(Received::Message).ok_or_else(unexpected);
                        }
                    }
                }
                self.read.reserve(length - self.read.len());
            }
            if self.socket.read_buf(&mut self.read).await.map_err(broken)? == 0 {
                return Err(closed());
            }
        }
    }
}

pub(super) fn broken(error: io::Error) -> Error {
    Error::Transient(format!("the connection to Postgres broke: {error}"))
}

pub(super) fn closed() -> Error {
    Error::Transient("Postgres closed the connection".into())
}

pub(super) fn unexpected() -> Error {
    Error::Transient("Postgres sent what the protocol does not allow".into())
}

struct Login<'a> {
    target: &'a Target,
    application_name: &'a str,
    purpose: Purpose<'a>,
}

impl dial::Login for Login<'_> {
    type Session = Wire;

    async fn login(&self, socket: Socket) -> Result<Wire, Failed> {
        let Login {
            target,
            application_name,
            purpose,
        } = self;
        let mut wire = Wire {
            socket,
            read: BytesMut::with_capacity(8 * 1024),
            parameters: HashMap::new(),
            server_version: 0,
            ready: false,
        };
        let name = target.application_name.as_deref();
        let (suggested, replication) = match purpose {
            Purpose::Replication(suggested) => (*suggested, Some(("replication", "database"))),
            Purpose::Writing => (&[][..], None),
        };
        let options = sql::options(target, purpose.session(), suggested);
        let parameters = [
            ("user", target.user.as_str()),
            ("database", &target.database),
        ];
        let parameters = parameters.into_iter().chain(replication).chain([
            ("application_name", name.unwrap_or(application_name)),
            ("client_encoding", "UTF8"),
            ("options", &options),
        ]);
        let mut bytes = BytesMut::new();
        frontend::startup_message(parameters, &mut bytes)
            .map_err(|error| Failed::Broken(Error::Definite(error.to_string())))?;
        wire.send(&bytes).await?;
        wire.authenticate(target).await?;
        loop {
            match wire.answer().await? {
                Message::ParameterStatus(body) => {
                    let (name, value) = (body.name()?.to_owned(), body.value()?.to_owned());
                    wire.parameters.insert(name, value);
                }
                Message::ReadyForQuery(_) => break,
                Message::BackendKeyData(_) => {}
                _ => return Err(Failed::Broken(unexpected())),
            }
        }
        wire.ready = true;
        wire.socket.logged_in = true;
        dial::check_session(target, |name| wire.parameter(name).map(str::to_owned))?;
        let session = purpose.session();
        wire.pin(session).await.map_err(Failed::Broken)?;
        Ok(wire)
    }
}

/// What a whole ErrorResponse says.
pub(super) fn error(message: &mut BytesMut) -> Error {
    match Message::parse(message) {
        Ok(Some(Message::ErrorResponse(body))) => of_fields(&mut body.fields()).0,
        _ => unexpected(),
    }
}

/// An error of Postgres, and whether it ends the connection.
fn of_fields(fields: &mut ErrorFields<'_>) -> (Error, bool) {
    let (mut severity, mut sqlstate, mut message) = (String::new(), String::new(), String::new());
    while let Ok(Some(field)) = fields.next() {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            // `V` is never translated; `S` may be.
            b'V' => severity = value,
            b'S' if severity.is_empty() => severity = value,
            b'C' => sqlstate = value,
            b'M' => message = value,
            _ => {}
        }
    }
    if sqlstate.is_empty() {
        return (unexpected(), true);
    }
    let fatal = matches!(severity.as_str(), "FATAL" | "PANIC");
    (Error::of_postgres(&severity, &sqlstate, &message), fatal)
}

#[cfg(test)]
mod tests;
