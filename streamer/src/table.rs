//! What the streamer knows about a published table.
//!
//! A table's identity is its OID, never its name. [`Table`] is made by `postgres::catalog` from the system
//! catalogs, kept by the mirror, and shared, unchanged, by everything that handles its rows.

use std::collections::{BTreeMap, HashMap};

use anabranch_proto::v1::Storage;
use serde::{Deserialize, Serialize};

/// OID of a table in Postgres.
pub type Oid = u32;

/// A published table, as of one version of its schema.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Its identity.
    pub oid: Oid,
    /// Schema, as in the catalog, unquoted.
    pub schema: String,
    /// Name, as in the catalog, unquoted.
    pub name: String,
    /// The columns that are replicated, in the order of `attnum`. A row's record has one value for each.
    pub columns: Vec<Column>,
    /// The key of the mirror and of replicas: places in `columns`, in the order of the index. The primary key, or
    /// the replica identity where there is none that is enforced at once.
    pub key: Vec<usize>,
    /// How Postgres names the old row of an UPDATE or DELETE.
    pub identity: Identity,
    /// Secondary indexes on plain columns.
    pub indexes: Vec<Index>,
    /// Counts the schemas that this table has had, from 1.
    pub version: u32,
}

/// The replica identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// The columns of [`Table::key`].
    Key,
    /// The columns of another unique index (`REPLICA IDENTITY USING INDEX`): places in `columns`, ascending.
    Index(Vec<usize>),
    /// The whole row (`REPLICA IDENTITY FULL`).
    Full,
}

/// A column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name, as in the catalog, unquoted.
    pub name: String,
    /// `attnum`: stays when the column is renamed.
    pub attnum: i16,
    /// OID of the declared type (a domain's own, not its base's).
    pub type_oid: u32,
    /// OID of the type that values have: a domain's base, or the declared type itself.
    pub base_oid: u32,
    /// `atttypmod`.
    pub typmod: i32,
    /// The type as `format_type()` prints it.
    pub postgres_type: String,
    /// What a value is, domains resolved.
    pub kind: Kind,
    /// Whether Postgres enforces NOT NULL (by column or primary key; a domain that is NOT NULL lets NULLs through).
    pub not_null: bool,
    /// How text compares in it.
    pub collation: Collation,
}

/// How the text of a column compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Collation {
    /// By bytes (`C`, `POSIX`, `C.UTF-8` and the like), or the type has no collation.
    Bytes,
    /// Equality is by bytes, order is not.
    Deterministic,
    /// Not even equality is by bytes.
    NonDeterministic,
}

/// What a value of a column is: how Postgres' text becomes a value of SQLite, and how values compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// int2, int4, int8, oid.
    Integer,
    /// bool: 0 or 1.
    Bool,
    /// float4, widened exactly. NaN stays NaN in a record; it becomes NULL where SQLite stores it.
    Float4,
    /// float8.
    Float8,
    /// numeric, as Postgres prints it.
    Numeric,
    /// text, varchar, name.
    Text,
    /// char(n), without trailing blanks.
    Char,
    /// citext.
    Citext,
    /// An enum, with its labels in catalog order.
    Enum(Vec<String>),
    /// uuid, in lower case.
    Uuid,
    /// bytea, as a blob.
    Bytea,
    /// json and jsonb.
    Json,
    /// `YYYY-MM-DD HH:MM:SS.ffffffZ`; infinities and years outside 0001–9999 as Postgres prints them.
    Timestamptz,
    /// `YYYY-MM-DD HH:MM:SS.ffffff`, with the same exceptions.
    Timestamp,
    /// `YYYY-MM-DD`, with the same exceptions.
    Date,
    /// `HH:MM:SS.ffffff`.
    Time,
    /// An array, as JSON.
    Array(
        Box<Kind>,
        /* the delimiter of its element type: `,`, or `;` for box */ char,
    ),
    /// Any other type, in Postgres' own text.
    Other,
}

/// What Postgres puts into a column that an INSERT leaves out, as far as SQLite can do the same.
///
/// Not a part of [`Column`]: it has no meaning for rows that are there, and changes without a word in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// NULL.
    Null,
    /// A constant: a record of it.
    Value(Vec<u8>),
    /// The time.
    Now,
    /// A random uuid.
    Uuid,
    /// The next of a sequence, of a key of one integer column.
    Sequence,
    /// What only Postgres knows.
    Other,
}

/// By table, and by `attnum`; NULL where there is nothing.
pub type Defaults = HashMap<Oid, BTreeMap<i16, LeftOut>>;

/// A secondary index that replicas get too, as a plain one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Its name, unquoted.
    pub name: String,
    /// Places in `columns`.
    pub columns: Vec<usize>,
}

impl Kind {
    /// How SQLite stores it.
    pub fn storage(&self) -> Storage {
        match self {
            Kind::Integer | Kind::Bool => Storage::Integer,
            Kind::Float4 | Kind::Float8 => Storage::Real,
            Kind::Bytea => Storage::Blob,
            _ => Storage::Text,
        }
    }
}

impl Table {
    /// `schema.name` for people, logs and errors.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// The place of the single integer column that is the key, if the key is that.
    pub fn integer_key(&self) -> Option<usize> {
        match self.key[..] {
            [column] if self.columns[column].kind == Kind::Integer => Some(column),
            _ => None,
        }
    }

    /// The columns that Postgres sends of an old row.
    pub fn identity_columns(&self) -> Vec<usize> {
        match &self.identity {
            Identity::Key => {
                let mut columns = self.key.clone();
                columns.sort_unstable();
                columns
            }
            Identity::Index(columns) => columns.clone(),
            Identity::Full => (0..self.columns.len()).collect(),
        }
    }
}
