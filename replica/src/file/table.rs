//! A table as the streamer declared it, checked.
//!
//! What arrives is not trusted: only a [`Table`] that this module made is ever turned into SQL, and all of that SQL is
//! made here and in `schema`, of quoted identifiers and the four storage classes; no text of the wire is SQL.

use std::{collections::HashSet, fmt::Write};

use anabranch_proto::v1;
use prost::Message;
use serde::{Deserialize, Serialize};

use super::{Error, defaults, names};

/// Longest identifier that is taken. Postgres' own limit is 63 unless it was built otherwise.
const IDENTIFIER_BYTES_MAX: usize = 255;

/// Longest text of a type that is taken.
const TYPE_BYTES_MAX: usize = 1024;

/// SQLite's own limit on columns is 2000; Postgres' is 1600.
const COLUMNS_MAX: usize = 1600;

/// Far above what any table has; bounds the work that one declaration can cause.
const INDEXES_MAX: usize = 256;

/// How a value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Storage {
    Integer,
    Real,
    Text,
    Blob,
}

/// What the rows of a table are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Rows for programs.
    Data,
    /// How far local transactions are answered.
    Receipts,
    /// Which of them were rejected, and why.
    Rejections,
}

/// What happens to a local change of a column that was changed in Postgres since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Conflict {
    LastWrite,
    FirstWrite,
    Add,
    Function,
}

/// What a column holds that an INSERT leaves out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LeftOut {
    /// NULL; where that can't be, the INSERT fails.
    Null,
    /// A constant, as SQL.
    Value(String),
    /// The time.
    Now,
    /// A random uuid.
    Uuid,
    /// The next of a sequence.
    Sequence,
    /// NULL, for which Postgres puts something else.
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub name: String,
    pub postgres_type: String,
    pub storage: Storage,
    pub not_null: bool,
    pub conflict: Conflict,
    pub left_out: LeftOut,
}

/// A secondary index, by Postgres' name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Index {
    pub name: String,
    pub columns: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub id: u32,
    /// As in Postgres.
    pub schema: String,
    /// As in Postgres.
    pub postgres_name: String,
    /// As in the file.
    pub name: String,
    pub purpose: Purpose,
    /// Programs may write it.
    pub writable: bool,
    /// It is in the file with other columns, and its rows are to be kept.
    pub reshaped: bool,
    pub columns: Vec<Column>,
    /// Places in `columns`, in the order of the key.
    pub key: Vec<usize>,
    pub indexes: Vec<Index>,
    /// Length of its declaration.
    pub declared_bytes: usize,
    /// Takes all columns in order: inserts the row, or makes the one of its key equal to it.
    pub upsert: String,
    /// Takes the key: deletes the row.
    pub delete: String,
}

fn identifier(name: &str, what: &str) -> Result<(), Error> {
    if name.is_empty() || name.len() > IDENTIFIER_BYTES_MAX || name.contains('\0') {
        return Err(Error::Stream(format!(
            "the streamer declared a {what} whose name is empty, longer than {IDENTIFIER_BYTES_MAX} bytes, or holds a NUL"
        )));
    }
    Ok(())
}

impl Table {
    /// Checks a declaration.
    pub(super) fn new(declared: &v1::Table) -> Result<Table, Error> {
        identifier(&declared.schema, "schema")?;
        identifier(&declared.name, "table")?;
        let full_name = format!("{}.{}", declared.schema, declared.name);
        let wrong = |what: &str| Error::Stream(format!("declaration of {full_name}: {what}"));
        if declared.columns.is_empty() || declared.columns.len() > COLUMNS_MAX {
            return Err(wrong("no columns, or too many"));
        }
        if declared.indexes.len() > INDEXES_MAX {
            return Err(wrong("too many indexes"));
        }
        let mut seen = HashSet::new();
        let mut key = vec![None; declared.columns.len()];
        let mut columns = Vec::with_capacity(declared.columns.len());
        for (place, column) in declared.columns.iter().enumerate() {
            identifier(&column.name, "column")?;
            if !seen.insert(names::fold(&column.name)) {
                return Err(Error::Definite(format!(
                    "{full_name} has two columns whose names differ only by case (`{}`), which SQLite cannot have: leave one out of the shape",
                    column.name
                )));
            }
            if column.postgres_type.len() > TYPE_BYTES_MAX || column.postgres_type.contains('\0') {
                return Err(wrong("the name of a type is too long"));
            }
            let storage = match column.storage() {
                v1::Storage::Integer => Storage::Integer,
                v1::Storage::Real => Storage::Real,
                v1::Storage::Text => Storage::Text,
                v1::Storage::Blob => Storage::Blob,
                v1::Storage::Unspecified => return Err(wrong("a column without known storage")),
            };
            if column.key_position > 0 {
                // A NaN would be a NULL in the key.
                if storage == Storage::Real {
                    return Err(wrong("a float in the key"));
                }
                let slot = usize::try_from(column.key_position - 1)
                    .ok()
                    .and_then(|position| key.get_mut(position))
                    .ok_or_else(|| wrong("the places in its key are not 1, 2, …"))?;
                if slot.replace(place).is_some() {
                    return Err(wrong("two columns in one place of its key"));
                }
            }
            let conflict = match v1::Conflict::try_from(column.conflict) {
                Ok(v1::Conflict::LastWrite) => Conflict::LastWrite,
                Ok(v1::Conflict::FirstWrite) => Conflict::FirstWrite,
                Ok(v1::Conflict::Add) => Conflict::Add,
                Ok(v1::Conflict::Function) => Conflict::Function,
                Err(_) => return Err(wrong("a column without known conflict policy")),
            };
            let left_out = left_out(column, storage)
                .ok_or_else(|| wrong("a column with a default that makes no sense"))?;
            columns.push(Column {
                conflict,
                left_out,
                name: column.name.clone(),
                postgres_type: column.postgres_type.clone(),
                storage,
                not_null: column.not_null || column.key_position > 0,
            });
        }
        let width = key.iter().flatten().count();
        if width == 0 {
            return Err(wrong("no key"));
        }
        let key: Vec<usize> = key.into_iter().map_while(|place| place).collect();
        if key.len() != width {
            return Err(wrong("the places in its key are not 1, 2, …"));
        }
        let mut indexes: Vec<Index> = Vec::with_capacity(declared.indexes.len());
        for index in &declared.indexes {
            identifier(&index.name, "index")?;
            let places: HashSet<_> = index.columns.iter().collect();
            if places.is_empty() || places.len() != index.columns.len() {
                return Err(wrong("an index without columns, or with one twice"));
            }
            if indexes.iter().any(|other| other.name == index.name) {
                return Err(wrong("two indexes of one name"));
            }
            let columns = index
                .columns
                .iter()
                .map(|&place| columns.get(place as usize).map(|c| c.name.clone()))
                .collect::<Option<_>>()
                .ok_or_else(|| wrong("an index on a column that it does not have"))?;
            indexes.push(Index {
                name: index.name.clone(),
                columns,
            });
        }
        let (purpose, name) = match v1::Purpose::try_from(declared.purpose) {
            Ok(v1::Purpose::Data) => (
                Purpose::Data,
                names::table(&declared.schema, &declared.name),
            ),
            Ok(v1::Purpose::Receipts) => (Purpose::Receipts, names::RECEIPTS.to_owned()),
            Ok(v1::Purpose::Rejections) => (Purpose::Rejections, names::REJECTIONS.to_owned()),
            Err(_) => return Err(wrong("a purpose that this version does not know")),
        };
        let needed: &[&str] = match purpose {
            Purpose::Data => &[],
            Purpose::Receipts => &names::RECEIPTS_COLUMNS,
            Purpose::Rejections => &names::REJECTIONS_COLUMNS,
        };
        if !needed
            .iter()
            .all(|name| columns.iter().any(|c| c.name == *name))
        {
            return Err(wrong("without the columns that its purpose needs"));
        }
        let mut table = Table {
            id: declared.id,
            name,
            purpose,
            writable: declared.writable && purpose == Purpose::Data,
            reshaped: declared.reshaped && purpose == Purpose::Data,
            schema: declared.schema.clone(),
            postgres_name: declared.name.clone(),
            columns,
            key,
            indexes,
            declared_bytes: declared.encoded_len(),
            upsert: String::new(),
            delete: String::new(),
        };
        if purpose == Purpose::Data && names::is_reserved(&table.name) {
            return Err(Error::Definite(format!(
                "{full_name} cannot be kept in a SQLite file: names that begin with `sqlite_` or `_anabranch_` are taken; leave it out of the shape, or rename it in Postgres"
            )));
        }
        table.upsert = table.upsert_into(&table.name);
        table.delete = table.delete_from(&table.name);
        Ok(table)
    }

    /// The names of the key's columns, in its order.
    pub(super) fn key_names(&self) -> impl Iterator<Item = &str> {
        self.key
            .iter()
            .map(|&place| self.columns[place].name.as_str())
    }

    /// The names of all columns.
    pub(super) fn column_names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.name.as_str())
    }

    /// The names of the columns outside of the key.
    pub(super) fn value_names(&self) -> impl Iterator<Item = &str> {
        let in_key = |place: &usize| self.key.contains(place);
        self.columns
            .iter()
            .enumerate()
            .filter(move |(place, _)| !in_key(place))
            .map(|(_, column)| column.name.as_str())
    }

    /// All columns are in the key.
    pub(super) fn is_all_key(&self) -> bool {
        self.key.len() == self.columns.len()
    }

    /// The place of the column that is the rowid, if there is one.
    pub(super) fn rowid(&self) -> Option<usize> {
        match self.key[..] {
            [place] if self.columns[place].storage == Storage::Integer => Some(place),
            _ => None,
        }
    }

    /// Postgres takes the key from a sequence, and programs may insert rows: they need ids.
    pub(super) fn is_leased(&self) -> bool {
        let is_sequence = |place: usize| self.columns[place].left_out == LeftOut::Sequence;
        self.writable && self.rowid().is_some_and(is_sequence)
    }

    /// What follows the name in CREATE TABLE. Two tables with the same one hold the same kind of rows.
    pub(super) fn definition(&self) -> String {
        let rowid = self.rowid();
        let mut sql = String::from("(");
        for (place, column) in self.columns.iter().enumerate() {
            let storage = defaults::type_name(column.storage);
            let more = match (rowid == Some(place), column.not_null) {
                // SQLite does not look at a default of it.
                (true, _) => " PRIMARY KEY".to_owned(),
                (false, true) => format!(" NOT NULL{}", defaults::clause(column)),
                (false, false) => defaults::clause(column),
            };
            let comma = if place == 0 { "" } else { ", " };
            let _ = write!(sql, "{comma}{} {storage}{more}", names::quote(&column.name));
        }
        match rowid {
            Some(_) => sql.push_str(") STRICT"),
            None => {
                let key = names::quote_all(self.key_names());
                let _ = write!(sql, ", PRIMARY KEY({key})) STRICT, WITHOUT ROWID");
            }
        }
        sql
    }

    /// The statement that puts a row into `name`, a table of this definition.
    pub(super) fn upsert_into(&self, name: &str) -> String {
        let columns = names::quote_all(self.column_names());
        let values = vec!["?"; self.columns.len()].join(", ");
        format!(
            "INSERT INTO {}({columns}) VALUES({values}) {}",
            names::quote(name),
            self.on_conflict()
        )
    }

    /// The statement that inserts a row, which is not there, into `name`, a table of this definition.
    pub(super) fn insert_into(&self, name: &str) -> String {
        format!(
            "INSERT INTO {}({}) VALUES({})",
            names::quote(name),
            names::quote_all(self.column_names()),
            vec!["?"; self.columns.len()].join(", ")
        )
    }

    /// The statement that makes the row of its key equal to what [`upsert_into`](Table::upsert_into) would take. Not all
    /// columns are in the key.
    pub(super) fn update_in(&self, name: &str) -> String {
        let set = |place: &usize| {
            format!(
                "{} = ?{}",
                names::quote(&self.columns[*place].name),
                place + 1
            )
        };
        let (key, values): (Vec<usize>, Vec<usize>) =
            (0..self.columns.len()).partition(|place| self.key.contains(place));
        let join =
            |places: &[usize], between| places.iter().map(set).collect::<Vec<_>>().join(between);
        format!(
            "UPDATE {} SET {} WHERE {}",
            names::quote(name),
            join(&values, ", "),
            join(&key, " AND ")
        )
    }

    /// What an INSERT does where the key is there: never REPLACE, which deletes rows that no trigger sees.
    pub(super) fn on_conflict(&self) -> String {
        let key = names::quote_all(self.key_names());
        if self.is_all_key() {
            return format!("ON CONFLICT({key}) DO NOTHING");
        }
        let set = self
            .value_names()
            .map(|name| format!("{0} = excluded.{0}", names::quote(name)))
            .collect::<Vec<_>>()
            .join(", ");
        format!("ON CONFLICT({key}) DO UPDATE SET {set}")
    }

    /// The statement that deletes a row from `name`, a table of this definition.
    pub(super) fn delete_from(&self, name: &str) -> String {
        format!("DELETE FROM {} WHERE {}", names::quote(name), self.by_key())
    }

    /// The condition that finds a row by its key.
    pub(super) fn by_key(&self) -> String {
        self.key_names()
            .map(|name| format!("{} = ?", names::quote(name)))
            .collect::<Vec<_>>()
            .join(" AND ")
    }
}

/// The default of a column, if there can be such a one.
fn left_out(column: &v1::Column, storage: Storage) -> Option<LeftOut> {
    Some(match v1::DefaultKind::try_from(column.default_kind).ok()? {
        v1::DefaultKind::None => LeftOut::Null,
        v1::DefaultKind::Value => {
            LeftOut::Value(defaults::constant(&column.default_value, storage)?)
        }
        v1::DefaultKind::Now if storage == Storage::Text => LeftOut::Now,
        v1::DefaultKind::Uuid if storage == Storage::Text => LeftOut::Uuid,
        v1::DefaultKind::Sequence if storage == Storage::Integer => LeftOut::Sequence,
        v1::DefaultKind::Other => LeftOut::Other,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, storage: v1::Storage, key_position: u32) -> v1::Column {
        v1::Column {
            name: name.into(),
            postgres_type: "t".into(),
            storage: storage.into(),
            not_null: false,
            key_position,
            ..v1::Column::default()
        }
    }

    fn table(columns: Vec<v1::Column>) -> v1::Table {
        v1::Table {
            id: 1,
            schema: "public".into(),
            name: "t".into(),
            columns,
            indexes: vec![],
            ..v1::Table::default()
        }
    }

    #[test]
    fn a_single_integer_key_is_the_rowid_and_no_other_is() {
        use v1::Storage::{Integer, Text};
        let definition = |columns| Table::new(&table(columns)).unwrap().definition();
        assert_eq!(
            definition(vec![column("a", Text, 0), column("b", Integer, 1)]),
            r#"("a" TEXT, "b" INTEGER PRIMARY KEY) STRICT"#
        );
        assert_eq!(
            definition(vec![column("a", Integer, 2), column("b\"", Integer, 1)]),
            r#"("a" INTEGER NOT NULL, "b""" INTEGER NOT NULL, PRIMARY KEY("b""", "a")) STRICT, WITHOUT ROWID"#
        );
    }

    #[test]
    fn the_replicas_own_rows_have_names_that_no_table_of_postgres_can_take() {
        let name = |purpose: v1::Purpose| {
            let needed = names::RECEIPTS_COLUMNS
                .iter()
                .chain(&names::REJECTIONS_COLUMNS[2..]);
            let columns =
                needed.map(|name| column(name, v1::Storage::Text, (*name == "replica") as u32));
            let mut declared = table(columns.collect());
            declared.purpose = purpose.into();
            Table::new(&declared).unwrap().name
        };
        assert_eq!(name(v1::Purpose::Data), "t");
        assert_eq!(name(v1::Purpose::Receipts), "_anabranch_receipts");
        assert_eq!(name(v1::Purpose::Rejections), "_anabranch_rejections");
    }

    #[test]
    fn a_declaration_that_makes_no_sense_is_refused() {
        use v1::Storage::{Integer, Real, Text, Unspecified};
        let index = |name: &str, columns: &[u32]| v1::Index {
            name: name.into(),
            columns: columns.to_vec(),
        };
        let good = || table(vec![column("a", Integer, 1), column("b", Text, 0)]);
        assert!(Table::new(&good()).is_ok());
        let with = |change: &dyn Fn(&mut v1::Table)| {
            let mut declared = good();
            change(&mut declared);
            Table::new(&declared)
        };
        let changes: &[&dyn Fn(&mut v1::Table)] = &[
            &|t| t.name.clear(),
            &|t| t.name = "a\0b".into(),
            &|t| t.schema.clear(),
            &|t| t.name = "x".repeat(256),
            &|t| t.columns.clear(),
            &|t| t.columns[0].name.clear(),
            &|t| t.columns[0].key_position = 0,
            &|t| t.columns[0].key_position = 2,
            &|t| t.columns[0].key_position = u32::MAX,
            &|t| t.columns[1].key_position = 1,
            &|t| t.columns[0].storage = Real.into(),
            &|t| t.columns[1].storage = Unspecified.into(),
            &|t| t.columns[1].storage = 99,
            &|t| t.columns[1].postgres_type = "x".repeat(2000),
            &|t| t.columns = vec![column("a", Integer, 1); 1601],
            &|t| t.indexes = vec![index("i", &[])],
            &|t| t.indexes = vec![index("i", &[2])],
            &|t| t.indexes = vec![index("i", &[1, 1])],
            &|t| t.indexes = vec![index("", &[1])],
            &|t| t.indexes = vec![index("i", &[1]), index("i", &[0])],
            &|t| t.indexes = (0..300).map(|i| index(&i.to_string(), &[1])).collect(),
            &|t| t.purpose = 99,
            &|t| t.columns[1].conflict = 99,
            &|t| (t.purpose, t.writable) = (v1::Purpose::Receipts.into(), true),
        ];
        for (i, change) in changes.iter().enumerate() {
            assert!(matches!(with(change), Err(Error::Stream(_))), "change {i}");
        }
        let definite: &[&dyn Fn(&mut v1::Table)] = &[
            &|t| t.columns[1].name = "A".into(),
            &|t| t.name = "SQLite_x".into(),
            &|t| t.name = "_anabranch_state".into(),
        ];
        for (i, change) in definite.iter().enumerate() {
            assert!(
                matches!(with(change), Err(Error::Definite(_))),
                "change {i}"
            );
        }
    }
}
