//! What the mirror remembers of the history that it holds, as facts in its file.
//!
//! Each change of the world is written down before it is made: the intent before the slot, the pending nonce before
//! the UPDATE. So whatever moment a kill picks, what is found at the next start is one of the things that are remembered.

use std::collections::BTreeMap;

use anabranch_proto::{Lsn, Position};
use aws_lc_rs::rand;

use super::{Incarnation, Source};
use crate::{
    mirror::{Error, Mirror},
    postgres::witness::Witness,
    table::Oid,
};

/// JSON of a [`Source`].
const SOURCE: &str = "history.source";
/// JSON of an [`Incarnation`].
const SLOT: &str = "history.slot";
/// The name of a slot that is about to be created, and was absent.
const INTENT: &str = "history.intent";
/// The continuity nonce.
const NONCE: &str = "history.nonce";
/// The one that it may have become already.
const PENDING: &str = "history.nonce_pending";
/// OID of the publication.
const PUBLICATION: &str = "history.publication";
/// JSON of a map from the OID of each table to its [`Witness`].
const PUBLISHED: &str = "history.published";
/// Set once the initial copy is complete.
const COMPLETE: &str = "history.complete";

/// What the mirror remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remembered {
    /// The source that it was, or is being, copied from.
    pub source: Option<Source>,
    /// The slot that was created for it.
    pub slot: Option<Incarnation>,
    /// A slot that was about to be created.
    pub intent: Option<String>,
    /// The continuity nonce: the last one that is known to be in the database, and the one that may be.
    pub nonces: Vec<String>,
    /// OID of the publication.
    pub publication: Option<u32>,
    /// OID of each published table, and what tells whether it lacks anything.
    pub published: BTreeMap<Oid, Witness>,
    /// The initial copy is complete.
    pub complete: bool,
    /// What is durable.
    pub position: Lsn,
}

/// A continuity nonce on its way into the database: any of `from` becomes `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What may be there now.
    pub from: Vec<String>,
    /// What shall be there.
    pub to: String,
}

impl Remembered {
    /// Reads the facts.
    pub fn read(mirror: &Mirror) -> Result<Remembered, Error> {
        let position: Position = mirror.durable();
        Ok(Remembered {
            source: json(mirror, SOURCE)?,
            slot: json(mirror, SLOT)?,
            intent: mirror.fact(INTENT)?,
            nonces: [mirror.fact(NONCE)?, mirror.fact(PENDING)?]
                .into_iter()
                .flatten()
                .collect(),
            publication: json(mirror, PUBLICATION)?,
            published: json(mirror, PUBLISHED)?.unwrap_or_default(),
            complete: mirror.fact(COMPLETE)?.is_some(),
            position: position.lsn,
        })
    }

    /// Whether a continuity nonce is one of ours.
    pub fn knows(&self, nonce: Option<&str>) -> bool {
        nonce.is_some_and(|nonce| self.nonces.iter().any(|ours| ours == nonce))
    }

    /// Before anything is made for a fresh start: forgets all else, and writes down the source, the slot that is absent
    /// and about to be created, and the nonce that is about to claim its name. Durable when it returns.
    pub fn intend(mirror: &mut Mirror, source: &Source, slot: &str) -> Result<Claim, Error> {
        mirror.clear()?;
        let to = random()?;
        mirror.set_facts(&[
            (SOURCE, Some(&text(source)?)),
            (INTENT, Some(slot)),
            (PENDING, Some(&to)),
        ])?;
        Ok(Claim {
            from: Vec::new(),
            to,
        })
    }

    /// The slot was created.
    pub fn created(mirror: &mut Mirror, slot: &Incarnation) -> Result<(), Error> {
        mirror.set_facts(&[(SLOT, Some(&text(slot)?)), (INTENT, None)])
    }

    /// What is published, before it is copied.
    pub fn published(
        mirror: &mut Mirror,
        publication: Oid,
        tables: &BTreeMap<Oid, Witness>,
    ) -> Result<(), Error> {
        let publication = publication.to_string();
        mirror.set_facts(&[
            (PUBLICATION, Some(&publication)),
            (PUBLISHED, Some(&text(tables)?)),
        ])
    }

    /// The witnesses of the published tables, as they are now.
    pub fn witnesses(mirror: &mut Mirror, tables: &BTreeMap<Oid, Witness>) -> Result<(), Error> {
        mirror.set_facts(&[(PUBLISHED, Some(&text(tables)?))])
    }

    /// The initial copy is complete.
    pub fn completed(mirror: &mut Mirror) -> Result<(), Error> {
        mirror.set_facts(&[(COMPLETE, Some("1"))])
    }

    /// Begins to renew the continuity nonce. Durable when it returns. One that was begun and whose end is not known
    /// is taken up again, so that there are never more than two that may be in the database.
    pub fn begin_renewal(mirror: &mut Mirror) -> Result<Claim, Error> {
        let pending = mirror.fact(PENDING)?;
        let to = match &pending {
            Some(pending) => pending.clone(),
            None => random()?,
        };
        if pending.is_none() {
            mirror.set_facts(&[(PENDING, Some(&to))])?;
        }
        Ok(Claim {
            from: [mirror.fact(NONCE)?, Some(to.clone())]
                .into_iter()
                .flatten()
                .collect(),
            to,
        })
    }

    /// The nonce is in the database.
    pub fn end_renewal(mirror: &mut Mirror, claim: &Claim) -> Result<(), Error> {
        mirror.set_facts(&[(NONCE, Some(&claim.to)), (PENDING, None)])
    }
}

fn json<T: serde::de::DeserializeOwned>(mirror: &Mirror, name: &str) -> Result<Option<T>, Error> {
    mirror
        .fact(name)?
        .map(|text| serde_json::from_str(&text))
        .transpose()
        .map_err(|error| Error::Damaged(format!("the fact {name}: {error}")))
}

fn text<T: serde::Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Damaged(error.to_string()))
}

fn random() -> Result<String, Error> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes)
        .map_err(|_| Error::Damaged("the system has no random numbers".into()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
