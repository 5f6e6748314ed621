//! SQL connections (tokio-postgres), with the session settings that make text output exact; and what an error of
//! Postgres means to a caller.
//!
//! A database or a role may have any default for the settings that change how values are printed. What is given
//! in `options` as the session starts beats those defaults, so it is given there, last; and verified afterwards,
//! since a pooler in between may drop it.

use std::time::Duration;

use super::{
    dial::{self, Guarded, Socket},
    target::{ChannelBinding, Target},
};

/// Set in every session of ours, SQL and replication alike, so that snapshot and stream print the same.
const PINNED: &[(&str, &str)] = &[
    ("DateStyle", "ISO,YMD"),
    ("TimeZone", "UTC"),
    ("IntervalStyle", "postgres"),
    // Any value above 0 prints floats in the fewest digits that read back exactly (Postgres 12 and later).
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    ("xmloption", "content"),
    // regclass and the like print a name with its schema or without, and quoted or not, depending on these two.
    ("search_path", "public"),
    ("quote_all_identifiers", "off"),
    // Our literals rely on it.
    ("standard_conforming_strings", "on"),
    // A policy must make reading fail, not silently leave out rows: the stream would have them.
    ("row_security", "off"),
    // What we remember to have written there must be there after a crash of the server; a standby is not waited for.
    ("synchronous_commit", "local"),
    // A copy or a stream takes as long as it takes.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
];

/// Otherwise in a session that writes what programs wrote.
const PINNED_TO_WRITE: &[(&str, &str)] = &[
    // Policies are what says what a replica's role may do.
    ("row_security", "on"),
    // A write behind a long lock is tried again, so that it does not hold all behind it for ever.
    ("lock_timeout", "10s"),
    // Statements follow each other at once. If they do not, our machine is gone, and Postgres would keep its locks until it
    // gives up the connection: two hours, by default.
    ("idle_in_transaction_session_timeout", "30s"),
];

/// Not pinned there: an answered write must be as durable as the database promises.
const OPEN_TO_WRITE: &[&str] = &["synchronous_commit"];

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// To read tables, the stream, and catalogs; and to keep our own books.
    Ours,
    /// To write what programs wrote.
    Writing,
}

fn pinned(session: Use) -> Vec<(&'static str, &'static str)> {
    let mut settings = PINNED.to_vec();
    if session == Use::Writing {
        settings.retain(|(name, _)| !OPEN_TO_WRITE.contains(name));
        for (name, value) in &mut settings {
            if let Some((_, other)) = PINNED_TO_WRITE.iter().find(|(given, _)| given == name) {
                *value = other;
            }
        }
    }
    settings
}

/// Set after connecting, from this server version on.
const PINNED_LATER: &[(u32, &str, &str)] = &[
    // A database may be read-only by default, but `anabranch` is ours to write. Not before connecting: the server
    // would report our value to `target_session_attrs`, in place of its own.
    (0, "default_transaction_read_only", "off"),
    // Statements that look again after waiting for a lock must see what changed.
    (0, "default_transaction_isolation", "'read committed'"),
    (0, "default_transaction_deferrable", "off"),
    // Older ones would refuse the connection.
    (170_000, "transaction_timeout", "0"),
];

/// How long the driver of a dropped connection may take to say goodbye. Without a limit it would wait for the end of
/// whatever the connection was doing.
const GOODBYE_WITHIN: Duration = Duration::from_secs(1);

/// An SQL connection. It is closed when this is dropped, whatever it is doing.
pub struct Client {
    /// To query with.
    pub client: tokio_postgres::Client,
    server_version: u32,
    /// Ends the driver task; dropped after `client`.
    _driver: tokio_util::sync::DropGuard,
}

/// A connection failed, or a statement did.
///
/// Messages of Postgres are shown as `SEVERITY SQLSTATE: message`, without DETAIL and HINT: those quote values of rows.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Trying again later may help: Postgres is away, starting, full; the network broke.
    #[error("{0}")]
    Transient(String),
    /// Trying again does not help until somebody changes something.
    #[error("{0}")]
    Definite(String),
}

impl Client {
    /// Connects, pins DateStyle, TimeZone, IntervalStyle, extra_float_digits, bytea_output and the like whatever
    /// database and role say, and verifies that they hold.
    pub async fn connect(target: &Target, application_name: &str) -> Result<Client, Error> {
        let login = Login {
            target,
            application_name,
            session: Use::Ours,
        };
        dial::connect(target, &login).await
    }

    /// The same, to write what programs wrote: under row-level security, and with the durability that the database has.
    pub async fn connect_to_write(
        target: &Target,
        application_name: &str,
    ) -> Result<Client, Error> {
        let login = Login {
            target,
            application_name,
            session: Use::Writing,
        };
        dial::connect(target, &login).await
    }

    /// `major * 10000 + minor`, e.g. 150018.
    pub fn server_version(&self) -> u32 {
        self.server_version
    }

    async fn pin(&mut self, session: Use) -> Result<(), Error> {
        let row = self.client.simple_query(&verification(session)).await?;
        let row = row.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let value = |place| row.and_then(|row| row.get(place));
        self.server_version = verify(session, value)?;
        let later = pin_later(self.server_version);
        if !later.is_empty() {
            self.client.batch_execute(&later).await?;
        }
        Ok(())
    }
}

/// Drives a connection until it ends, or until its client was dropped.
async fn drive(
    mut connection: tokio_postgres::Connection<Guarded, Guarded>,
    dropped: tokio_util::sync::CancellationToken,
) {
    // Messages between queries are drained, not logged: a notice may quote values.
    let mut messages = std::pin::pin!(async {
        while let Some(Ok(_)) =
            std::future::poll_fn(|context| connection.poll_message(context)).await
        {}
    });
    tokio::select! {
        () = &mut messages => {}
        () = dropped.cancelled() => {
            let _ = tokio::time::timeout(GOODBYE_WITHIN, messages).await;
        }
    }
}

struct Login<'a> {
    target: &'a Target,
    application_name: &'a str,
    session: Use,
}

impl dial::Login for Login<'_> {
    type Session = Client;

    async fn login(&self, socket: Socket) -> Result<Client, dial::Failed> {
        let Login {
            target,
            application_name,
            session,
        } = self;
        let mut config = tokio_postgres::Config::new();
        config
            .user(&target.user)
            .dbname(&target.database)
            .application_name(
                target
                    .application_name
                    .as_deref()
                    .unwrap_or(application_name),
            )
            .options(options(target, *session, &[]))
            .channel_binding(match target.channel_binding {
                ChannelBinding::Disable => tokio_postgres::config::ChannelBinding::Disable,
                ChannelBinding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
                ChannelBinding::Require => tokio_postgres::config::ChannelBinding::Require,
            })
            // The socket is ready: whatever encryption there is to be was agreed upon.
            .ssl_mode(tokio_postgres::config::SslMode::Require)
            .ssl_negotiation(tokio_postgres::config::SslNegotiation::Direct);
        if let Some(password) = &target.password {
            config.password(password);
        }
        let (client, connection) = match config.connect_raw(socket.guarded(), dial::Ready).await {
            Ok(connected) => connected,
            Err(error) if error.as_db_error().is_some() => {
                return Err(dial::Failed::Refused(error.into()));
            }
            Err(error) => return Err(dial::Failed::Broken(error.into())),
        };
        let parameter = |name: &str| connection.parameter(name).map(str::to_owned);
        dial::check_session(target, parameter)?;

        let dropped = tokio_util::sync::CancellationToken::new();
        tokio::spawn(drive(connection, dropped.clone()));
        let mut client = Client {
            client,
            server_version: 0,
            _driver: dropped.drop_guard(),
        };
        client.pin(*session).await.map_err(dial::Failed::Broken)?;
        Ok(client)
    }
}

/// The `options` of a session. The last one wins: `suggested` ones, those of the URL, and what is pinned.
pub(super) fn options(target: &Target, session: Use, suggested: &[(&str, &str)]) -> String {
    let written = |settings: &[(&str, &str)]| -> String {
        let settings = settings.iter();
        let settings = settings.map(|(name, value)| format!(" -c {name}={value}"));
        settings.collect()
    };
    let options = &target.options;
    format!(
        "{} {options}{}",
        written(suggested),
        written(&pinned(session))
    )
}

/// Asks for the server's version and the pinned settings, in one row.
pub(super) fn verification(session: Use) -> String {
    let settings: Vec<_> = pinned(session)
        .iter()
        .map(|(name, _)| format!("pg_catalog.current_setting('{name}')"))
        .collect();
    format!(
        "SELECT pg_catalog.current_setting('server_version_num'), pg_catalog.current_setting('client_encoding'), {}",
        settings.join(", ")
    )
}

/// Checks the row that [`verification`] asked for; the server's version.
pub(super) fn verify<'a>(
    session: Use,
    value: impl Fn(usize) -> Option<&'a str>,
) -> Result<u32, Error> {
    let version = value(0)
        .and_then(|version| version.parse().ok())
        .ok_or_else(|| Error::Definite("the server does not tell its version".into()))?;
    let expected = [("client_encoding", "UTF8")];
    for (i, (name, expected)) in expected.iter().chain(&pinned(session)).enumerate() {
        // Postgres prints lists with a blank after the comma.
        let found = value(i + 1).map(|value| value.replace(", ", ","));
        if found.as_deref() != Some(*expected) {
            return Err(Error::Definite(format!(
                "the session setting {name} is {} although {expected} was asked for; is there a pooler between us and Postgres?",
                found.as_deref().unwrap_or("not there")
            )));
        }
    }
    Ok(version)
}

/// What to execute after connecting.
pub(super) fn pin_later(server_version: u32) -> String {
    PINNED_LATER
        .iter()
        .filter(|(since, _, _)| *since <= server_version)
        .map(|(_, name, value)| format!("SET {name} = {value};"))
        .collect()
}

/// SQL that makes a session what it was when it began, but for prepared statements: whoever used it before may have set
/// what it liked. RESET ALL leaves the role out.
pub(super) fn renewal(server_version: u32) -> String {
    format!(
        "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; {} SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES",
        pin_later(server_version)
    )
}

/// Quotes an identifier.
pub fn identifier(name: &str) -> String {
    postgres_protocol::escape::escape_identifier(name)
}

impl Error {
    /// What Postgres said.
    pub(super) fn of_postgres(severity: &str, sqlstate: &str, message: &str) -> Error {
        let text = format!("{severity} {sqlstate}: {message}");
        if is_transient(sqlstate) {
            Error::Transient(text)
        } else {
            Error::Definite(text)
        }
    }
}

/// Whether trying again may help, by SQLSTATE.
///
/// Reference: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
fn is_transient(sqlstate: &str) -> bool {
    match sqlstate {
        // The database was dropped.
        "57P04" => false,
        // Serialization failure and deadlock, but not the others of their class.
        "40001" | "40P01" => true,
        // A slot or another object is in use; a lock is not available.
        "55006" | "55P03" => true,
        // Read-only: a standby, or a primary whose disk is full.
        "25006" => true,
        _ => {
            let class = sqlstate.get(..2);
            // Connection, resources, operator intervention, the operating system, and idle timeouts.
            matches!(class, Some("08" | "53" | "57" | "58"))
                || matches!(sqlstate, "25P03" | "25P04")
        }
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        if let Some(error) = error.as_db_error() {
            return Error::of_postgres(error.severity(), error.code().code(), error.message());
        }
        let mut text = error.to_string();
        let source = std::error::Error::source(&error);
        if let Some(source) = source {
            text = format!("{text}: {source}");
        }
        let broken = source.is_some_and(|source| source.is::<std::io::Error>());
        let refused = source
            .and_then(|source| source.downcast_ref::<std::io::Error>())
            .is_some_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
        if error.is_closed() || (broken && !refused) {
            Error::Transient(text)
        } else {
            Error::Definite(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_split_by_whether_trying_again_may_help() {
        for (sqlstate, transient) in [
            ("57P01", true),  // shut down by an administrator
            ("57P03", true),  // starting up
            ("08006", true),  // connection failure
            ("53100", true),  // disk full
            ("53300", true),  // too many connections
            ("55006", true),  // slot in use
            ("57014", true),  // cancelled
            ("57P04", false), // database dropped
            ("28P01", false), // password
            ("28000", false), // pg_hba.conf
            ("3D000", false), // no such database
            ("42704", false), // no such slot
            ("55000", false), // slot invalidated, wal_level too low
            ("42501", false), // privilege
            ("XX000", false),
            ("", false),
        ] {
            let error = Error::of_postgres("FATAL", sqlstate, "why");
            assert_eq!(
                matches!(error, Error::Transient(_)),
                transient,
                "{sqlstate}"
            );
            assert_eq!(error.to_string(), format!("FATAL {sqlstate}: why"));
        }
    }

    #[test]
    fn a_setting_that_does_not_hold_is_named() {
        let answer = |place: usize| -> Option<String> {
            Some(match place {
                0 => "150018".into(),
                1 => "UTF8".into(),
                _ => PINNED[place - 2].1.replace(',', ", "),
            })
        };
        let answers: Vec<_> = (0..PINNED.len() + 2).map(answer).collect();
        assert_eq!(
            verify(Use::Ours, |i| answers[i].as_deref()).unwrap(),
            150_018
        );
        let mut wrong = answers.clone();
        wrong[3] = Some("Europe/Berlin".into());
        let error = verify(Use::Ours, |i| wrong[i].as_deref())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("TimeZone") && error.contains("Europe/Berlin"),
            "{error}"
        );
    }

    #[test]
    fn what_is_pinned_comes_last() {
        let target = Target::parse("postgres://u@h?options=-c%20TimeZone%3DAsia/Tokyo").unwrap();
        let options = options(&target, Use::Ours, &[("x", "y")]);
        let expected = " -c x=y -c TimeZone=Asia/Tokyo -c DateStyle=ISO,YMD -c TimeZone=UTC ";
        assert!(options.starts_with(expected), "{options}");
    }

    #[test]
    fn what_writes_is_under_policies_and_as_durable_as_the_database_says() {
        let target = Target::parse("postgres://u@h").unwrap();
        let options = options(&target, Use::Writing, &[]);
        assert!(options.contains("row_security=on"), "{options}");
        assert!(!options.contains("synchronous_commit"), "{options}");
        assert!(options.contains("TimeZone=UTC"), "{options}");
    }

    #[test]
    fn identifiers_are_quoted() {
        assert_eq!(identifier("a\"b.C"), "\"a\"\"b.C\"");
    }
}
