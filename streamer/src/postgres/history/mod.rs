//! Whether the history that the mirror holds goes on at this server: to be verified at *every* connect, before
//! START_REPLICATION, since Postgres itself would not notice. It silently forwards a request for WAL below the slot's
//! confirmed position, and serves another history under the same name, slot and LSNs after a restore.
//!
//! [`judge`] is pure: what was observed and what is remembered make a [`Verdict`]. Only proof continues. What is broken
//! is said and stops the streamer (healing it is not part of this version); it is never skipped over.
//!
//! Two nonces lie in the database. That of `anabranch.source` is made once: with the system identifier, the timeline
//! and the database's OID it makes the id of the [`Epoch`]. The *continuity nonce* in `anabranch.streamers` (a row for
//! each slot) is renewed every minute: a server whose disk was put back to an earlier state, which has the same
//! identifier, timeline and even LSNs, has an older one. It also proves that a slot is ours.

mod facts;
mod observe;

use std::fmt;

use anabranch_proto::{Epoch, Lsn};
use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

pub use self::{
    facts::{Claim, Remembered},
    observe::{claim, observe, renew, stands},
};

/// How often the continuity nonce is renewed: what a restore may go back unnoticed, unless LSNs tell.
pub const RENEW_EVERY: std::time::Duration = std::time::Duration::from_secs(60);

/// Which history of which database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// System identifier of the cluster.
    pub system: u64,
    /// Timeline.
    pub timeline: u32,
    /// OID of the database: a copy of it in the same cluster has the same nonce.
    pub database: u32,
    /// The nonce of `anabranch.source`, as hexadecimal digits.
    pub nonce: String,
}

impl Source {
    /// The id of this history, the same for every streamer: the first 8 bytes of the SHA-256 of `anabranch epoch` and
    /// a zero byte, the system identifier (8 bytes, big-endian like all of them), the timeline (4), the database's
    /// OID (4), and the nonce's digits.
    pub fn epoch(&self) -> Epoch {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"anabranch epoch\0");
        context.update(&self.system.to_be_bytes());
        context.update(&self.timeline.to_be_bytes());
        context.update(&self.database.to_be_bytes());
        context.update(self.nonce.as_bytes());
        let digest = context.finish();
        let mut id = [0; 8];
        id.copy_from_slice(&digest.as_ref()[..8]);
        Epoch(u64::from_be_bytes(id))
    }
}

/// A slot that we created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incarnation {
    /// Its name.
    pub name: String,
    /// Where it began, as text.
    pub consistent_point: String,
}

/// What the server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// System identifier, as the replication connection has it.
    pub system: u64,
    /// Timeline, as the replication connection has it.
    pub timeline: u32,
    /// OID of the database.
    pub database: u32,
    /// Its name.
    pub database_name: String,
    /// How far WAL is flushed.
    pub flushed: Lsn,
    /// It is a standby, or restoring.
    pub in_recovery: bool,
    /// `anabranch.source`; `None` if it is not there.
    pub nonce: Option<String>,
    /// Our row of `anabranch.streamers`.
    pub continuity: Option<String>,
    /// OID of the publication.
    pub publication: Option<u32>,
    /// The slot that the config names.
    pub slot: Option<Slot>,
}

impl Observed {
    /// Whose history this is.
    pub fn source(&self) -> Source {
        Source {
            system: self.system,
            timeline: self.timeline,
            database: self.database,
            nonce: self.nonce.clone().unwrap_or_default(),
        }
    }
}

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Its output plugin; `None` for a physical slot.
    pub plugin: Option<String>,
    /// The database that it decodes.
    pub database: Option<String>,
    /// It ends with its connection.
    pub temporary: bool,
    /// It decodes prepared transactions before their commit.
    pub two_phase: bool,
    /// Who uses it.
    pub active_pid: Option<i32>,
    /// It was invalidated; why.
    pub lost: Option<String>,
    /// `confirmed_flush_lsn`.
    pub confirmed: Option<Lsn>,
    /// WAL that it holds back.
    pub retained_bytes: Option<u64>,
}

/// What comes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Proved: streaming may go on from the mirror's position.
    Continue,
    /// The mirror holds no complete history: start one. A slot that is left from an attempt that was cut off,
    /// provably ours, is to be dropped before.
    Fresh {
        /// Drop the slot.
        drop_slot: bool,
    },
    /// Nothing is known to be wrong, but it can't go on now: try again.
    Wait {
        /// What is waited for.
        what: String,
    },
    /// History is broken. Stop.
    Broken {
        /// What happened.
        what: String,
        /// What to do.
        remedy: String,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Continue => f.write_str("the history goes on"),
            Verdict::Fresh { .. } => f.write_str("there is no history yet"),
            Verdict::Wait { what } => f.write_str(what),
            Verdict::Broken { what, remedy } => write!(f, "{what}\n{remedy}"),
        }
    }
}

/// What to run to start over.
fn start_over(slot: &str) -> String {
    format!(
        "Nothing was changed or skipped. To start over with a new copy: stop the streamer, remove its data_dir, run\n  \
         SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}' AND NOT active;\n\
         and start it again. Replicas keep what they have until then, and are sent the tables anew."
    )
}

/// Compares what the server says with what the mirror remembers. `slot` is the name in the config.
pub fn judge(observed: &Observed, remembered: &Remembered, slot: &str) -> Verdict {
    if observed.in_recovery {
        return Verdict::Wait {
            what: "the server is in recovery: a standby, or not up yet".into(),
        };
    }
    let broken = match &remembered.source {
        Some(source) if remembered.complete => broken_source(observed, remembered, source)
            .or_else(|| broken_slot(observed, remembered, slot)),
        _ => return judge_incomplete(observed, remembered, slot),
    };
    if let Some(what) = broken {
        return Verdict::Broken {
            what,
            remedy: start_over(slot),
        };
    }
    match observed.slot.as_ref().and_then(|slot| slot.active_pid) {
        Some(pid) => Verdict::Wait {
            what: format!(
                "slot {slot} is in use by the process {pid} of the server: another streamer, or our own last connection, which the server has not given up yet"
            ),
        },
        None => Verdict::Continue,
    }
}

/// There is no complete mirror, so nothing can be lost; but a slot may stand in the way.
fn judge_incomplete(observed: &Observed, remembered: &Remembered, name: &str) -> Verdict {
    let Some(slot) = &observed.slot else {
        return Verdict::Fresh { drop_slot: false };
    };
    let ours = remembered.source.as_ref().is_some_and(|source| {
        // It was absent when the intent was written down, or this is what it was when we made it; and nobody has
        // used it since, nor claimed its name.
        let made = match &remembered.slot {
            Some(made) => {
                made.name == name
                    && slot.confirmed.map(|lsn| lsn.to_string())
                        == Some(made.consistent_point.clone())
            }
            None => remembered.intent.as_deref() == Some(name),
        };
        made && *source == observed.source()
            && remembered.knows(observed.continuity.as_deref())
            && slot.plugin.as_deref() == Some("pgoutput")
            && slot.database.as_deref() == Some(&observed.database_name)
            && !slot.temporary
    });
    match (ours, slot.active_pid) {
        (true, None) => Verdict::Fresh { drop_slot: true },
        (true, Some(pid)) => Verdict::Wait {
            what: format!("slot {name} is still in use by the process {pid} of the server"),
        },
        (false, _) => Verdict::Broken {
            what: format!(
                "slot {name} exists, but this data_dir does not hold what was copied from it: another streamer uses it, or data_dir was removed"
            ),
            remedy: format!(
                "If another streamer uses it, give this one a slot of its own (postgres.slot). If none does:\n  \
                 SELECT pg_drop_replication_slot('{name}');\n\
                 and start again."
            ),
        },
    }
}

/// What is wrong with the server, if something is.
fn broken_source(observed: &Observed, remembered: &Remembered, source: &Source) -> Option<String> {
    let position = remembered.position;
    if observed.system != source.system {
        return Some(format!(
            "this is another cluster: its system identifier is {}, and that of the mirror is {} (restored from a dump, upgraded, or the url leads elsewhere)",
            observed.system, source.system
        ));
    }
    if observed.timeline < source.timeline {
        return Some(format!(
            "the server is on timeline {}, and the mirror on the later timeline {}: this is an old primary that was left behind by a failover",
            observed.timeline, source.timeline
        ));
    }
    if observed.timeline > source.timeline {
        return Some(format!(
            "the server is on timeline {}, and the mirror on timeline {}: there was a failover or a restore, and commits that the mirror has may have been lost",
            observed.timeline, source.timeline
        ));
    }
    if observed.database != source.database {
        return Some(format!(
            "this is another database: its OID is {}, and that of the mirror is {} (dropped and created again, or the url leads elsewhere)",
            observed.database, source.database
        ));
    }
    match &observed.nonce {
        None => {
            return Some(
                "anabranch.source is gone: the database was restored, or the schema dropped".into(),
            );
        }
        Some(nonce) if *nonce != source.nonce => {
            return Some("anabranch.source is not the one that the mirror was copied under".into());
        }
        Some(_) => {}
    }
    if observed.flushed < position {
        return Some(format!(
            "the server's WAL ends at {}, before the mirror's position {position}: the server was put back to an earlier state",
            observed.flushed
        ));
    }
    match &observed.continuity {
        None => Some("our row of anabranch.streamers is gone: the database was put back to a state before it, or the row was deleted".into()),
        nonce if !remembered.knows(nonce.as_deref()) => Some(
            "the nonce in anabranch.streamers is not one that this streamer wrote last: the database or data_dir was put back to an earlier state, or two streamers use this slot".into(),
        ),
        Some(_) => None,
    }
}

/// What is wrong with slot and publication, if something is.
fn broken_slot(observed: &Observed, remembered: &Remembered, name: &str) -> Option<String> {
    let position = remembered.position;
    let Some(made) = &remembered.slot else {
        return Some("data_dir does not say which slot it belongs to".into());
    };
    if made.name != name {
        return Some(format!(
            "data_dir belongs to slot {}, and the config names slot {name}",
            made.name
        ));
    }
    let Some(slot) = &observed.slot else {
        return Some(format!(
            "slot {name} is gone: what was committed since {position} can't be had any more"
        ));
    };
    if let Some(reason) = &slot.lost {
        return Some(format!(
            "slot {name} was invalidated by the server: {reason}"
        ));
    }
    let right = slot.plugin.as_deref() == Some("pgoutput")
        && slot.database.as_deref() == Some(&observed.database_name)
        && !slot.temporary
        && !slot.two_phase;
    let began = made.consistent_point.parse::<Lsn>().ok();
    let (true, Some(confirmed), Some(began)) = (right, slot.confirmed, began) else {
        return Some(format!(
            "slot {name} is not the one that was made: it is of another kind, plugin or database"
        ));
    };
    if confirmed > position {
        return Some(format!(
            "slot {name} is confirmed up to {confirmed}, beyond the mirror's position {position}: it was made again, advanced or consumed by somebody else, or data_dir was put back to an earlier state"
        ));
    }
    if confirmed < began {
        return Some(format!(
            "slot {name} is confirmed up to {confirmed}, before {began}, where ours began: it is another one of the same name"
        ));
    }
    match (remembered.publication, observed.publication) {
        (_, None) => Some("the publication was dropped".into()),
        (Some(then), Some(now)) if then != now => Some(
            "the publication was dropped and created again: what was committed in between may not have been published".into(),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
