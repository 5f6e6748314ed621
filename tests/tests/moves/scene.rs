//! A few tables with chosen rows, and how much is read of them.

use std::{cell::Cell, collections::HashMap, sync::Arc};

use anabranch_proto::{
    Epoch, Lsn,
    record::{self, ValueRef},
};
use anabranch_streamer::{
    lookup::{Answers, Each, Error, Index, Lookup},
    mirror::{Mirror, Settings},
    route::{Routed, Router, SessionId},
    shape::{self, Bound, ParamSource, Shape, Source},
    table::{Collation, Column, Identity, Kind, Table},
    transaction::{Change, Chunk, End, Old},
};
use bytes::Bytes;

/// Tables of four integers: `id`, which is the key, `project`, `person`, `v`.
pub struct Scene {
    _directory: tempfile::TempDir,
    pub mirror: Mirror,
    pub router: Router,
    pub shapes: Vec<Shape>,
    tables: Vec<Arc<Table>>,
    lsn: Lsn,
}

/// A state, whose rows are counted as they are given.
struct Counted<'a> {
    of: &'a dyn Lookup,
    rows: &'a Cell<usize>,
}

impl Lookup for Counted<'_> {
    fn rows(&self, index: &Index, prefix: &[u8], each: Each<'_>) -> Result<(), Error> {
        self.rows.set(self.rows.get() + 1);
        self.of.rows(index, prefix, &mut |row| {
            self.rows.set(self.rows.get() + 1);
            each(row)
        })
    }

    fn answers(&self) -> Option<&Answers> {
        None
    }
}

pub fn row(values: [i64; 4]) -> Bytes {
    record::build(values.map(ValueRef::Integer))
}

impl Scene {
    /// Shapes with parameters from claims of the same name; of each table its rows.
    pub fn new(shapes: &[&str], rows: &[(&str, Vec<[i64; 4]>)]) -> Scene {
        let column = |(place, name): (usize, &str)| Column {
            name: name.into(),
            attnum: place as i16 + 1,
            type_oid: 20,
            base_oid: 20,
            typmod: -1,
            postgres_type: "bigint".into(),
            kind: Kind::Integer,
            not_null: place == 0,
            collation: Collation::Bytes,
        };
        let table = |(place, (name, _)): (usize, &(&str, Vec<_>))| {
            let names = ["id", "project", "person", "v"];
            Arc::new(Table {
                oid: 100 + place as u32,
                schema: "public".into(),
                name: (*name).into(),
                columns: names.into_iter().enumerate().map(column).collect(),
                key: vec![0],
                identity: Identity::Key,
                indexes: Vec::new(),
                version: 1,
            })
        };
        let tables: Vec<_> = rows.iter().enumerate().map(table).collect();
        let source = |(place, sql): (usize, &&str)| Source {
            name: format!("s{place}"),
            params: ["me", "min", "max"]
                .into_iter()
                .filter(|name| sql.contains(&format!("${name}")))
                .map(|name| (name.to_owned(), ParamSource::Claim(name.to_owned())))
                .collect(),
            tables: vec![(*sql).into()],
            writable: Vec::new(),
        };
        let sources: Vec<_> = shapes.iter().enumerate().map(source).collect();
        let shapes = shape::compile(&sources, &tables).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut mirror = Mirror::open(&Settings {
            directory: directory.path().into(),
            cache_bytes: 16 << 20,
            reader_cache_bytes: 1 << 20,
            index_bytes_max: u64::MAX,
            index_hours_max: 24,
            row_bytes_max: 1 << 20,
        })
        .unwrap();
        let selects = shapes.iter().flat_map(|shape| &shape.selects);
        let indexes: Vec<_> = selects.flat_map(|select| select.indexes()).collect();
        mirror.set_indexes(&indexes).unwrap();
        for (table, (_, rows)) in tables.iter().zip(rows) {
            let rows: Vec<Bytes> = rows.iter().map(|values| row(*values)).collect();
            mirror.begin_copy(table).unwrap();
            mirror.copy_rows(table.oid, &rows).unwrap();
            mirror.end_copy(table.oid, Lsn(100)).unwrap();
        }
        mirror.begin_epoch(Epoch(7), None, Lsn(100)).unwrap();
        Scene {
            _directory: directory,
            mirror,
            router: Router::default(),
            shapes,
            tables,
            lsn: Lsn(100),
        }
    }

    pub fn bound(&self, shape: usize, me: i64, min: i64, max: i64) -> Bound {
        let claims = serde_json::json!({"me": me, "min": min, "max": max});
        let claims = claims.as_object().unwrap();
        let bound = self.shapes[shape].bind(claims, &HashMap::new());
        bound.unwrap().remove(0)
    }

    /// Session `id` subscribes to a shape as `me`.
    pub fn join(&mut self, id: SessionId, shape: usize, me: i64) {
        let bound = self.bound(shape, me, 0, 0);
        self.router.add(id, &[bound]);
    }

    pub fn table(&self, name: &str) -> Arc<Table> {
        let found = self.tables.iter().find(|table| table.name == name);
        found.unwrap().clone()
    }

    pub fn insert(&self, table: &str, values: [i64; 4]) -> Change {
        Change::Insert {
            table: self.table(table),
            new: row(values),
        }
    }

    pub fn delete(&self, table: &str, id: i64) -> Change {
        Change::Delete {
            table: self.table(table),
            old: Old::Identity(record::build([ValueRef::Integer(id)])),
        }
    }

    /// What a transaction means, and how many rows were read to find out.
    pub fn commit(&mut self, changes: Vec<Change>) -> (Routed, usize) {
        let commit_lsn = self.lsn;
        self.lsn = Lsn(self.lsn.0 + 1);
        let chunk = Chunk {
            changes,
            bytes: 0,
            first: true,
            commit_lsn,
            end: Some(End {
                lsn: self.lsn,
                commit_time: 0,
            }),
        };
        let nets = self.mirror.apply(&chunk).unwrap().nets;
        let rows = Cell::new(0);
        let (before, now) = (self.mirror.before(&nets), self.mirror.now());
        let counted = |of| Counted { of, rows: &rows };
        let routed = self.router.route(&nets, &counted(&before), &counted(&now));
        (routed.unwrap(), rows.get())
    }
}
