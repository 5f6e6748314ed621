//! What an error of Postgres means for a local transaction.

use std::borrow::Cow;

/// What became of a local transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It took effect, just now.
    Applied,
    /// It did not, and never will: that is recorded, just now.
    Rejected(Rejection),
    /// It was answered before, one way or the other.
    AlreadyAnswered,
}

/// Why a local transaction was rejected. It is for the replica that wrote it, not for logs: a message of Postgres may
/// quote what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Which of its entries; `None`: the transaction as a whole.
    pub entry: Option<u32>,
    /// `error` (see `sqlstate`), `update_missing`, `insert_exists`, `out_of_shape`, `conflict`, `not_writable`; and of
    /// what never gets here, `too_large` and `malformed`.
    pub outcome: Cow<'static, str>,
    /// Of Postgres, or ours where it was refused before.
    pub sqlstate: String,
    /// Without DETAIL, which quotes rows.
    pub message: String,
    /// The constraint that it would have broken.
    pub constraint: Option<String>,
}

/// A local transaction could be neither applied nor rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Trying again later may help. If the connection [broke](super::Writer::is_usable), with another one.
    #[error("{0}")]
    Transient(String),
    /// Trying again does not help until somebody changes something.
    #[error("{0}")]
    Definite(String),
    /// The transaction is not the next one.
    #[error("the local transaction is not the next one, which is {expected}")]
    OutOfOrder {
        /// The next one.
        expected: u64,
    },
    /// Postgres has another transaction of that number, or before it: the replica's file was restored or copied.
    #[error("the local transaction follows another one than transaction {seq} that is in Postgres")]
    Forked {
        /// The last that is in Postgres.
        seq: u64,
    },
    /// An entry of the transaction was answered for another copy of the file.
    #[error("the local transaction was answered before, for another copy of the replica's file")]
    AlreadyClaimed,
    /// The id of the replica belongs to another subject.
    #[error("the replica's id belongs to another subject")]
    OtherSubject,
}

impl From<super::sql::Error> for Error {
    fn from(error: super::sql::Error) -> Self {
        match error {
            super::sql::Error::Transient(text) => Error::Transient(text),
            super::sql::Error::Definite(text) => Error::Definite(text),
        }
    }
}

/// What to do after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The same again, at once.
    Retry,
    /// The same again, at once; if that does not help, never again.
    Doubtful,
    /// The same again, when something has changed.
    Transient,
    /// Never again.
    Final,
}

/// Longest message that is passed on, and longest name of a constraint (63 bytes in Postgres).
const MESSAGE_CHARS_MAX: usize = 500;

/// By SQLSTATE.
///
/// Reference: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
pub fn classify(sqlstate: &str) -> Class {
    match sqlstate {
        // Serialization failure, deadlock.
        "40001" | "40P01" => Class::Retry,
        // Something is in use, or was changed meanwhile (internal errors say so); a limit is reached, of this transaction or of all;
        // a snapshot is too old.
        "55006" | "54000" | "72000" | "XX000" => Class::Doubtful,
        // A page or an index is damaged; another server that a table is of does not answer.
        "XX001" | "XX002" | "HV00N" => Class::Transient,
        // A lock was waited for, long enough: others want the connection.
        "55P03" => Class::Transient,
        // Completion unknown; read-only: a standby, or a primary whose disk is full; idle too long.
        "40003" | "25006" | "25P03" | "25P04" => Class::Transient,
        // Connection, resources, operator intervention, the operating system.
        _ => match sqlstate.get(..2) {
            Some("08" | "53" | "57" | "58") => Class::Transient,
            _ => Class::Final,
        },
    }
}

/// A message of Postgres, of this SQLSTATE, without the values that it quotes: those of data exceptions are of whatever was
/// read, columns among them that the replica is not shown. Quotes are those of any language that Postgres speaks.
pub fn told(sqlstate: &str, message: &str) -> String {
    const QUOTES: [char; 7] = ['"', '«', '»', '„', '“', '”', '\''];
    let quoted = message.find(QUOTES).zip(message.rfind(QUOTES));
    match quoted {
        Some((first, last)) if sqlstate.starts_with("22") => {
            format!(
                "{}…{}",
                &message[..first],
                message[last..].trim_start_matches(QUOTES)
            )
        }
        _ => message.to_owned(),
    }
}

/// A message that may be passed on.
pub fn bounded(message: &str) -> String {
    let printable = message.chars().filter(|c| !c.is_control() || *c == '\n');
    printable.take(MESSAGE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_retried_waited_out_or_final() {
        use Class::{Doubtful, Final, Retry, Transient};
        for (sqlstate, class) in [
            ("XX000", Doubtful),
            ("54000", Doubtful),
            ("XX002", Transient),
            ("40001", Retry),
            ("40P01", Retry),
            ("55P03", Transient),
            ("08006", Transient),
            ("53100", Transient),
            ("53300", Transient),
            ("57014", Transient),
            ("57P01", Transient),
            ("57P02", Transient),
            ("57P03", Transient),
            ("25006", Transient),
            ("58030", Transient),
            ("40003", Transient),
            ("22001", Final),
            ("22003", Final),
            ("22P02", Final),
            ("23502", Final),
            ("23503", Final),
            ("23505", Final),
            ("23514", Final),
            ("23P01", Final),
            ("42501", Final),
            ("42703", Final),
            ("42P01", Final),
            ("44000", Final),
            ("P0001", Final),
            ("40002", Final),
            ("0A000", Final),
            ("", Final),
        ] {
            assert_eq!(classify(sqlstate), class, "{sqlstate}");
        }
    }

    #[test]
    fn values_that_a_message_quotes_are_not_told() {
        let syntax = "invalid input syntax for type integer";
        assert_eq!(
            told("22P02", &format!("{syntax}: \"a\"b\"")),
            format!("{syntax}: …")
        );
        let range = told("22003", "value \"99\" is out of range for type integer");
        assert_eq!(range, "value … is out of range for type integer");
        assert_eq!(told("22P02", "ungültig: „x“ hier"), "ungültig: … hier");
        assert_eq!(
            told("23514", "violates \"positive\""),
            "violates \"positive\""
        );
        assert_eq!(told("22012", "division by zero"), "division by zero");
    }

    #[test]
    fn messages_are_bounded() {
        assert_eq!(
            bounded(&"ä".repeat(10_000)).chars().count(),
            MESSAGE_CHARS_MAX
        );
        assert_eq!(bounded("a\u{1b}[31mb\nc"), "a[31mb\nc");
    }
}
