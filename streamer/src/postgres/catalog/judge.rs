//! From facts to tables, or to refusals. Pure.

use std::collections::{HashMap, HashSet};

use super::{
    super::sql::identifier,
    Name, Refusal,
    facts::{Attribute, Facts, IndexFacts, Locale, Relation},
};
use crate::{
    receipts,
    table::{Collation, Column, Identity, Index, Kind, Table},
};

/// SQLite's own limit on the columns of a table (`SQLITE_MAX_COLUMN`).
const COLUMNS_MAX: usize = 2000;

/// OIDs below it are made by initdb (`FirstNormalObjectId`).
const FIRST_USER_OID: u32 = 16384;

/// Names in SQLite that begin so are ours or SQLite's, in any case.
const RESERVED: [&str; 2] = ["_anabranch_", "sqlite_"];

/// regproc, regprocedure, regoper, regoperator, regclass, regtype, regrole, regnamespace, regconfig, regdictionary,
/// regcollation: they print as names of other objects.
const NAMING_TYPES: [u32; 11] = [
    24, 2202, 2203, 2204, 2205, 2206, 4096, 4089, 3734, 3769, 4191,
];

/// What each table that was asked for is; `None` where there is none.
pub(super) fn judge(facts: &Facts) -> Vec<Option<Result<Table, Refusal>>> {
    let mut judged: Vec<_> = facts
        .relations
        .iter()
        .map(|relation| {
            relation
                .as_ref()
                .map(|relation| Judge { facts, relation }.table())
        })
        .collect();
    refuse_collisions(&mut judged);
    judged
}

/// The answer for a name that no table has. `alike`: one that differs by case only.
pub(super) fn missing(name: &Name, alike: Option<&str>) -> Refusal {
    Refusal {
        table: format!("{}.{}", name.schema, name.name),
        reason: match alike {
            Some(alike) => format!("it does not exist; is {alike} meant? Case matters"),
            None => "it does not exist".to_owned(),
        },
        remedy: None,
    }
}

/// Refuses tables that would be one table in SQLite, all of them: which one should win would be chance.
fn refuse_collisions(judged: &mut [Option<Result<Table, Refusal>>]) {
    let mut named: HashMap<String, Vec<(u32, String)>> = HashMap::new();
    for table in judged.iter().flatten().flatten() {
        let same = named
            .entry(folded_name(&table.schema, &table.name))
            .or_default();
        if same.iter().all(|(oid, _)| *oid != table.oid) {
            same.push((table.oid, table.full_name()));
        }
    }
    for judged in judged.iter_mut().flatten() {
        let Ok(table) = judged else { continue };
        let same = &named[&folded_name(&table.schema, &table.name)];
        if let Some((_, other)) = same.iter().find(|(oid, _)| *oid != table.oid) {
            *judged = Err(Refusal {
                table: table.full_name(),
                reason: format!(
                    "it and {other} would have the same name in SQLite, which ignores case"
                ),
                remedy: None,
            });
        }
    }
}

/// What a table is called in SQLite, by which SQLite tells tables apart: it ignores the case of ASCII only.
fn folded_name(schema: &str, name: &str) -> String {
    let mut folded = match schema {
        "public" => name.to_owned(),
        _ => format!("{schema}.{name}"),
    };
    folded.make_ascii_lowercase();
    folded
}

struct Judge<'a> {
    facts: &'a Facts,
    relation: &'a Relation,
}

impl<'a> Judge<'a> {
    fn table(&self) -> Result<Table, Refusal> {
        self.check_relation()?;
        let columns = self.columns()?;
        let (key, identity) = self.key(&columns)?;
        Ok(Table {
            oid: self.relation.oid,
            schema: self.relation.schema.clone(),
            name: self.relation.name.clone(),
            indexes: self.secondary(&columns, &key),
            columns,
            key,
            identity,
            version: 1,
        })
    }

    fn refuse<T>(&self, reason: impl Into<String>, remedy: Option<String>) -> Result<T, Refusal> {
        Err(Refusal {
            table: format!("{}.{}", self.relation.schema, self.relation.name),
            reason: reason.into(),
            remedy,
        })
    }

    /// Its name in SQL.
    fn quoted(&self) -> String {
        format!(
            "{}.{}",
            identifier(&self.relation.schema),
            identifier(&self.relation.name)
        )
    }

    fn check_relation(&self) -> Result<(), Refusal> {
        let relation = self.relation;
        let what = match relation.kind {
            'r' => None,
            'p' => Some("it is partitioned, which is not followed yet"),
            'v' => Some("it is a view, which has no changes of its own"),
            'm' => Some("it is a materialized view, which Postgres does not replicate"),
            'f' => Some("it is a foreign table, of which the changes are made elsewhere"),
            'S' => Some("it is a sequence"),
            _ => Some("it is not a table"),
        };
        if let Some(what) = what {
            return self.refuse(what, None);
        }
        if relation.persistence == 't' {
            return self.refuse("it is temporary", None);
        }
        let schema = relation.schema.as_str();
        if relation.oid < FIRST_USER_OID
            || schema == "information_schema"
            || schema.starts_with("pg_")
        {
            return self.refuse(
                "it is a system catalog, which Postgres does not replicate",
                None,
            );
        }
        // Receipts are rows that each replica gets its own of; no shape of a config can name them.
        let is_receipts =
            [receipts::REPLICAS, receipts::REJECTIONS].contains(&relation.name.as_str());
        if schema == receipts::SCHEMA && !is_receipts {
            return self.refuse("it is the streamer's own", None);
        }
        if relation.persistence == 'u' {
            let remedy = format!("ALTER TABLE {} SET LOGGED", self.quoted());
            return self.refuse(
                "it is unlogged: Postgres writes no WAL for it",
                Some(remedy),
            );
        }
        if relation.is_partition {
            return self.refuse("it is a partition, which is not followed yet", None);
        }
        if relation.has_children {
            return self.refuse(
                "other tables inherit from it, which is not followed yet",
                None,
            );
        }
        let folded = folded_name(schema, &relation.name);
        if let Some(reserved) = RESERVED
            .iter()
            .find(|reserved| folded.starts_with(**reserved))
        {
            return self.refuse(
                format!("names that begin with {reserved} are reserved in SQLite"),
                None,
            );
        }
        Ok(())
    }

    fn attributes(&self) -> &'a [Attribute] {
        self.facts
            .columns
            .get(&self.relation.oid)
            .map_or(&[], Vec::as_slice)
    }

    fn indexes(&self) -> &'a [IndexFacts] {
        self.facts
            .indexes
            .get(&self.relation.oid)
            .map_or(&[], Vec::as_slice)
    }

    fn columns(&self) -> Result<Vec<Column>, Refusal> {
        let columns: Vec<_> = self
            .attributes()
            .iter()
            .filter(|attribute| !attribute.generated)
            .map(|attribute| {
                let kind = kind(self.facts, attribute.type_oid);
                Column {
                    name: attribute.name.clone(),
                    attnum: attribute.attnum,
                    type_oid: attribute.type_oid,
                    base_oid: base(self.facts, attribute.type_oid),
                    typmod: attribute.typmod,
                    postgres_type: attribute.postgres_type.clone(),
                    collation: self.collation(attribute, &kind),
                    kind,
                    not_null: attribute.not_null,
                }
            })
            .collect();
        if columns.len() > COLUMNS_MAX {
            let count = columns.len();
            return self.refuse(
                format!("it has {count} columns; SQLite takes {COLUMNS_MAX}"),
                None,
            );
        }
        let mut seen: HashMap<String, &str> = HashMap::new();
        for column in &columns {
            if let Some(other) = seen.insert(column.name.to_ascii_lowercase(), &column.name) {
                let (other, name) = (identifier(other), identifier(&column.name));
                return self.refuse(
                    format!("its columns {other} and {name} would be the same to SQLite, which ignores case"),
                    None,
                );
            }
        }
        Ok(columns)
    }

    fn collation(&self, attribute: &Attribute, kind: &Kind) -> Collation {
        let mut innermost = kind;
        while let Kind::Array(element, _) = innermost {
            innermost = element;
        }
        if *innermost == Kind::Citext {
            return Collation::NonDeterministic;
        }
        if attribute.collation == 0 {
            return Collation::Bytes;
        }
        match self.facts.collations.get(&attribute.collation) {
            Some(locale) if locale.provider == 'd' => collation(&self.facts.database),
            Some(locale) => collation(locale),
            // Dropped while it was read. Nothing is known of it.
            None => Collation::NonDeterministic,
        }
    }

    /// The key of the mirror, and how Postgres names an old row.
    fn key(&self, columns: &[Column]) -> Result<(Vec<usize>, Identity), Refusal> {
        let usable = |index: &&IndexFacts| {
            index.is_unique && index.is_immediate && index.is_valid && index.is_plain
        };
        let primary = self.indexes().iter().find(|index| index.is_primary);
        let key = primary.filter(usable);
        let identity = self
            .indexes()
            .iter()
            .filter(|index| index.is_identity)
            .find(usable);
        match (self.relation.identity, key, identity) {
            ('n', ..) => self.refuse(
                "its replica identity is NOTHING: once it is published, Postgres refuses to UPDATE or DELETE in it",
                Some(match key {
                    Some(_) => format!("ALTER TABLE {} REPLICA IDENTITY DEFAULT", self.quoted()),
                    None => self.make_identity(columns, primary),
                }),
            ),
            ('i', _, Some(index)) => {
                let mut identity = self.places(columns, index)?;
                if let Some(place) = identity.iter().find(|place| !columns[**place].not_null) {
                    let name = identifier(&columns[*place].name);
                    return self.refuse(
                        format!("the column {name} of its replica identity may be NULL"),
                        Some(format!("ALTER TABLE {} ALTER COLUMN {name} SET NOT NULL", self.quoted())),
                    );
                }
                let key = match key {
                    Some(key) => self.places(columns, key)?,
                    None => return Ok((identity, Identity::Key)),
                };
                identity.sort_unstable();
                let mut sorted = key.clone();
                sorted.sort_unstable();
                Ok((key, if identity == sorted { Identity::Key } else { Identity::Index(identity) }))
            }
            ('i', Some(_), None) => self.refuse(
                "the index that was its replica identity is gone: Postgres refuses to UPDATE or DELETE in it",
                Some(format!("ALTER TABLE {} REPLICA IDENTITY DEFAULT", self.quoted())),
            ),
            ('d', Some(key), _) => Ok((self.places(columns, key)?, Identity::Key)),
            ('f', Some(key), _) => Ok((self.places(columns, key)?, Identity::Full)),
            (_, None, _) => self.refuse(
                match primary {
                    Some(_) => "its primary key is deferrable, so Postgres may hold two rows of one key for a while",
                    None => "it has no primary key, and no other replica identity that names a row",
                },
                Some(self.make_identity(columns, primary)),
            ),
            (other, ..) => self.refuse(format!("its replica identity `{other}` is not known"), None),
        }
    }

    /// Where the columns of an index are among those that are replicated.
    fn places(&self, columns: &[Column], index: &IndexFacts) -> Result<Vec<usize>, Refusal> {
        let mut places = Vec::with_capacity(index.key.len());
        for attnum in &index.key {
            let Some(place) = columns.iter().position(|column| column.attnum == *attnum) else {
                let attribute = self
                    .attributes()
                    .iter()
                    .find(|attribute| attribute.attnum == *attnum);
                let name = attribute.map_or("?", |attribute| &attribute.name);
                let name = identifier(name);
                return self.refuse(
                    format!(
                        "the column {name} of its key is generated: Postgres does not stream it"
                    ),
                    None,
                );
            };
            if let Some(why) = no_key(self.facts, &columns[place]) {
                let name = identifier(&columns[place].name);
                let of = &columns[place].postgres_type;
                return self.refuse(
                    format!("the column {name} of its key is of type {of}: {why}"),
                    None,
                );
            }
            places.push(place);
        }
        Ok(places)
    }

    /// SQL that gives the table a replica identity: an index that it has, one like its deferrable primary key, or
    /// else a primary key of columns that only its owner can name.
    fn make_identity(&self, columns: &[Column], primary: Option<&IndexFacts>) -> String {
        let table = self.quoted();
        let fits = |index: &&IndexFacts| {
            let can_be = index.is_unique
                && index.is_immediate
                && index.is_valid
                && index.is_plain
                && index.is_btree;
            can_be
                && self
                    .places(columns, index)
                    .is_ok_and(|places| places.iter().all(|place| columns[*place].not_null))
        };
        if let Some(index) = self.indexes().iter().find(fits) {
            return format!(
                "ALTER TABLE {table} REPLICA IDENTITY USING INDEX {}",
                identifier(&index.name)
            );
        }
        let places = primary.and_then(|primary| self.places(columns, primary).ok());
        let Some(places) = places else {
            return format!(
                "ALTER TABLE {table} ADD PRIMARY KEY (/* columns that together are unique */)"
            );
        };
        let names: Vec<_> = places
            .iter()
            .map(|place| identifier(&columns[*place].name))
            .collect();
        // Names have 63 bytes at most; this leaves 40 for the table's.
        let mut end = self.relation.name.len().min(40);
        while !self.relation.name.is_char_boundary(end) {
            end -= 1;
        }
        let index = identifier(&format!("{}_replica_identity", &self.relation.name[..end]));
        let names = names.join(", ");
        format!(
            "CREATE UNIQUE INDEX {index} ON {table} ({names}); ALTER TABLE {table} REPLICA IDENTITY USING INDEX {index}"
        )
    }

    /// Indexes that are worth having in SQLite too: whole, on columns, of an order that SQLite has. One of the same
    /// columns as the key, or as an index before it, adds nothing.
    fn secondary(&self, columns: &[Column], key: &[usize]) -> Vec<Index> {
        let mut seen: HashSet<Vec<usize>> = HashSet::from([key.to_vec()]);
        self.indexes()
            .iter()
            .filter(|index| index.is_valid && index.is_plain && index.is_btree)
            .filter(|index| {
                let folded = index.name.to_ascii_lowercase();
                !RESERVED.iter().any(|reserved| folded.starts_with(reserved))
            })
            .filter_map(|index| {
                let place =
                    |attnum: &i16| columns.iter().position(|column| column.attnum == *attnum);
                let places: Vec<_> = index.key.iter().map(place).collect::<Option<_>>()?;
                seen.insert(places.clone()).then(|| Index {
                    name: index.name.clone(),
                    columns: places,
                })
            })
            .collect()
    }
}

/// Why a column can't be in a key, if it can't.
fn no_key(facts: &Facts, column: &Column) -> Option<&'static str> {
    match column.kind {
        Kind::Float4 | Kind::Float8 => Some(
            "SQLite has no NaN, and does not tell -0 from 0, so that it can't tell all rows apart",
        ),
        _ if NAMING_TYPES.contains(&innermost(facts, column.type_oid)) => {
            Some("it is shown by the name of another object, which may change without the row")
        }
        _ => None,
    }
}

/// The type under domains and arrays.
fn innermost(facts: &Facts, mut oid: u32) -> u32 {
    while let Some(under) = facts.types.get(&oid).and_then(|of| of.base.or(of.element)) {
        oid = under;
    }
    oid
}

/// The type that a domain stands for, or the type itself.
fn base(facts: &Facts, oid: u32) -> u32 {
    match facts.types.get(&oid).and_then(|of| of.base) {
        Some(of) => base(facts, of),
        None => oid,
    }
}

/// What values of a type are.
fn kind(facts: &Facts, oid: u32) -> Kind {
    let oid = base(facts, oid);
    let Some(of) = facts.types.get(&oid) else {
        return Kind::Other;
    };
    if let Some(element) = of.element {
        // array_out asks the element's type for the delimiter, not the array's.
        let delimiter = facts.types.get(&element).map_or(',', |of| of.delimiter);
        return Kind::Array(Box::new(kind(facts, element)), delimiter);
    }
    if let Some(labels) = &of.labels {
        return Kind::Enum(labels.clone());
    }
    match oid {
        20 | 21 | 23 | 26 => Kind::Integer,
        16 => Kind::Bool,
        700 => Kind::Float4,
        701 => Kind::Float8,
        1700 => Kind::Numeric,
        // text, varchar, name.
        25 | 1043 | 19 => Kind::Text,
        1042 => Kind::Char,
        2950 => Kind::Uuid,
        17 => Kind::Bytea,
        // json, jsonb.
        114 | 3802 => Kind::Json,
        1184 => Kind::Timestamptz,
        1114 => Kind::Timestamp,
        1082 => Kind::Date,
        1083 => Kind::Time,
        _ if of.name == "citext" && of.extension.as_deref() == Some("citext") => Kind::Citext,
        _ => Kind::Other,
    }
}

/// How text compares under a locale. `C.UTF-8` of libc is in the order of code points, which in UTF-8 is that of bytes.
fn collation(of: &Locale) -> Collation {
    if !of.is_deterministic {
        return Collation::NonDeterministic;
    }
    let is = |names: &[&str]| {
        let locale = of.locale.as_deref().unwrap_or_default();
        names.iter().any(|name| name.eq_ignore_ascii_case(locale))
    };
    let by_bytes = match of.provider {
        'c' => is(&["C", "POSIX", "C.UTF-8", "C.UTF8"]),
        'b' => is(&["C", "C.UTF-8", "PG_UNICODE_FAST"]),
        _ => false,
    };
    if by_bytes {
        Collation::Bytes
    } else {
        Collation::Deterministic
    }
}

#[cfg(test)]
mod tests;
