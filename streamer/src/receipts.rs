//! Receipts: what became of a replica's local writes.
//!
//! A local transaction is claimed in the very transaction of Postgres that has its effects, by a row of
//! `anabranch.replicas`; a rejected one leaves a row in `anabranch.rejections`. Both tables are published and mirrored as
//! any others, and each replica is subscribed to its own rows of them by the shape that is made here. So a receipt comes at
//! its place in the order of the WAL, together with the effects, and a catch-up brings what is missing of them: there is no
//! second way by which an answer could come too early, too late, or not at all.

use std::collections::HashMap;

use anabranch_proto::v1::Purpose;

use crate::{
    postgres::catalog::Name,
    shape::{BindError, Bound, ParamSource, Shape, Source},
    table::Table,
};

/// The schema of all that is ours in the database.
pub const SCHEMA: &str = "anabranch";

/// The table with a row for each replica that ever wrote.
pub const REPLICAS: &str = "replicas";

/// The table with a row for each local transaction that was rejected.
pub const REJECTIONS: &str = "rejections";

/// No shape of a config can have this name.
const NAME: &str = "anabranch.receipts";

/// The parameters: whose they are. Knowing a replica's id is not enough to see them.
const REPLICA: &str = "replica";
const SUBJECT: &str = "subject";
const OWN: &str = "replica = $replica AND subject = $subject";

/// The shape, to be compiled beside those of the config.
pub fn source() -> Source {
    Source {
        name: NAME.into(),
        params: [REPLICA, SUBJECT]
            .map(|name| (name.to_owned(), ParamSource::Client("text".into())))
            .into(),
        tables: vec![
            format!("SELECT replica, seq, hash FROM {SCHEMA}.{REPLICAS} WHERE {OWN}"),
            format!(
                "SELECT replica, seq, entry, outcome, sqlstate, message, constraint_name, settled \
                 FROM {SCHEMA}.{REJECTIONS} WHERE {OWN}"
            ),
        ],
        writable: Vec::new(),
    }
}

/// The tables.
pub fn names() -> [Name; 2] {
    [REPLICAS, REJECTIONS].map(|name| Name {
        schema: SCHEMA.into(),
        name: name.into(),
    })
}

/// Takes the shape out of those that were compiled.
pub fn split(shapes: Vec<Shape>) -> (Vec<Shape>, Option<Shape>) {
    let (mut receipts, shapes): (Vec<_>, Vec<_>) =
        shapes.into_iter().partition(|shape| shape.name == NAME);
    (shapes, receipts.pop())
}

/// The replica's own rows, if it is this principal's.
pub fn bind(shape: &Shape, replica: &str, subject: Option<&str>) -> Result<Vec<Bound>, BindError> {
    let param = |text: &str| serde_json::Value::from(text).to_string();
    let params = HashMap::from([
        (REPLICA.to_owned(), param(replica)),
        (SUBJECT.to_owned(), param(subject.unwrap_or_default())),
    ]);
    shape.bind(&serde_json::Map::new(), &params)
}

/// What the rows of a table are for.
pub fn purpose(table: &Table) -> Purpose {
    match (&*table.schema, &*table.name) {
        (SCHEMA, REPLICAS) => Purpose::Receipts,
        (SCHEMA, REJECTIONS) => Purpose::Rejections,
        _ => Purpose::Data,
    }
}
