//! Whether Postgres told of all that happened to a table's rows. Pure.
//!
//! It does not where a table is out of the publication for a while, where the publication keeps quiet of deletes for a
//! while, and where a statement rewrites the whole table (`ALTER TABLE … TYPE text USING lower(…)`): each may be over, and
//! all look as before, by the time that somebody looks. What such a statement leaves behind in the catalogs is remembered
//! and compared.

use serde::{Deserialize, Serialize};

/// What stays the same as long as Postgres tells of every change of a table's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// OID of the table's membership in the publication, which is another one if the table was taken out and put back;
    /// and above it the transaction that last altered the publication itself, since what it publishes may have been
    /// changed and changed back.
    pub membership: u64,
    /// The table's file (`relfilenode`): another one after a rewrite, and also after VACUUM FULL, CLUSTER and TRUNCATE.
    pub file: u32,
    /// Hash of the transactions that last altered each of its columns: another one after a rewrite that changes values, and
    /// also after SET DEFAULT and the like.
    pub columns: i64,
}

/// Why rows that were right at `then` may not be what the table holds `now`; `None` if they are, up to what was streamed.
///
/// That both the file and the columns are others may also be due to two harmless statements. The table is given up then
/// without need, which is better than rows that are wrong for ever.
pub fn untold(then: Option<&Witness>, now: Option<&Witness>) -> Option<&'static str> {
    let Some(now) = now else {
        return Some("it was taken out of the publication");
    };
    match then {
        Some(then) if then.membership == now.membership => (then.file != now.file
            && then.columns != now.columns)
            .then_some("all its rows may have been changed by an ALTER TABLE, of which Postgres does not tell"),
        _ => Some("it was taken out of the publication for a while, or that was altered"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_postgres_does_not_tell_is_noticed_and_what_it_tells_is_not() {
        let then = Witness {
            membership: 1,
            file: 2,
            columns: 3,
        };
        let vacuumed = Witness { file: 9, ..then };
        let defaulted = Witness { columns: 9, ..then };
        for harmless in [then, vacuumed, defaulted] {
            assert_eq!(untold(Some(&then), Some(&harmless)), None, "{harmless:?}");
        }
        let rewritten = Witness {
            file: 9,
            ..defaulted
        };
        let put_back = Witness {
            membership: 9,
            ..then
        };
        for (then, now, said) in [
            (Some(then), None, "taken out of the publication"),
            (None, Some(then), "for a while"),
            (Some(then), Some(put_back), "for a while"),
            (Some(then), Some(rewritten), "ALTER TABLE"),
        ] {
            let reason = untold(then.as_ref(), now.as_ref());
            assert!(
                reason.is_some_and(|reason| reason.contains(said)),
                "{reason:?}"
            );
        }
    }
}
