//! A database that takes writes, and programs that make them.

use std::{collections::HashMap, sync::Arc};

use anabranch_proto::{
    Nonce,
    record::{self, ValueRef},
};
use anabranch_streamer::{
    postgres::{
        catalog::{self, Name},
        setup::{self, Wanted, Writing},
        sql::Client,
        target::Target,
        writer::{Replica, Rule, Rules, Writer},
    },
    shape::{self, Source},
    table::Table,
    write::{Hash, Kind, LocalTransaction, NO_HASH, Policy, WriteTable, chain, push},
};
use anabranch_tests::{
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use bytes::BytesMut;

const PASSWORD: &str = "writer";

/// A database with a role that logs in to write, and one that programs write as.
pub struct Fixture {
    pub database: Database,
}

/// What a replica may write, and the tables.
pub struct Allowed {
    pub rules: Rules,
    tables: HashMap<String, (Arc<Table>, Vec<usize>)>,
    policy: Policy,
}

/// Place of a table, what is done to it, and the values of its record.
pub type Made<'a> = (u64, Kind, Vec<ValueRef<'a>>);

pub fn insert<'a>(table: u64, row: &[ValueRef<'a>]) -> Made<'a> {
    (table, Kind::Insert, row.to_vec())
}

pub fn update<'a>(
    table: u64,
    key: &[ValueRef<'a>],
    mask: &'a str,
    values: &[ValueRef<'a>],
) -> Made<'a> {
    let mut record = key.to_vec();
    record.push(ValueRef::Text(mask));
    record.extend_from_slice(values);
    (table, Kind::Update, record)
}

pub fn delete<'a>(table: u64, key: &[ValueRef<'a>]) -> Made<'a> {
    (table, Kind::Delete, key.to_vec())
}

/// Makes local transactions that follow each other.
pub struct Program {
    tables: Vec<Arc<WriteTable>>,
    seq: u64,
    previous: Hash,
}

impl Fixture {
    pub async fn new(sql: &str) -> Fixture {
        Fixture::on(Server::shared().await, sql).await
    }

    pub async fn on(server: &Server, sql: &str) -> Fixture {
        Fixture::of(server.database().await, sql).await
    }

    pub async fn of(database: Database, sql: &str) -> Fixture {
        let fixture = Fixture { database };
        fixture.database.execute(sql).await;
        let (app, login) = (fixture.app(), fixture.login());
        fixture
            .database
            .execute(&format!(
                "CREATE ROLE \"{app}\"; CREATE ROLE \"{login}\" LOGIN NOINHERIT PASSWORD '{PASSWORD}'"
            ))
            .await;
        fixture.set_up().await;
        fixture
            .grant(
                "GRANT ALL ON ALL TABLES IN SCHEMA public TO {app};
                 GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {app};
                 GRANT SELECT ON ALL TABLES IN SCHEMA public TO {login}",
            )
            .await;
        fixture
    }

    pub fn app(&self) -> String {
        format!("{} app", self.database.name())
    }

    pub fn login(&self) -> String {
        format!("{} login", self.database.name())
    }

    /// Sets up what writes need, as the streamer does.
    pub async fn set_up(&self) {
        let client = self.client().await;
        let (role, roles) = (self.login(), [self.app()]);
        let wanted = Wanted {
            publication: "anabranch",
            published: &[],
            readable: &[],
            writing: Some(Writing {
                role: &role,
                roles: &roles,
                tables: &[],
            }),
        };
        setup::ensure(&client, wanted).await.unwrap();
    }

    /// Runs SQL, with the names of the roles put in.
    pub async fn grant(&self, sql: &str) {
        let sql = sql
            .replace("{app}", &format!("\"{}\"", self.app()))
            .replace("{login}", &format!("\"{}\"", self.login()));
        self.database.execute(&sql).await;
    }

    /// As a superuser.
    pub async fn client(&self) -> Client {
        let target = Target::parse(self.database.url()).unwrap();
        Client::connect(&target, "test").await.unwrap()
    }

    pub async fn writer(&self) -> Writer {
        let url = self.database.url_as(&self.login(), PASSWORD);
        Writer::connect(&Target::parse(&url).unwrap())
            .await
            .unwrap()
    }

    pub fn replica(&self, id: &str) -> Replica {
        Replica {
            id: id.into(),
            subject: "edge-1".into(),
            role: Some(self.app()),
            claims_json: r#"{"sub":"edge-1"}"#.into(),
        }
    }

    /// Whole tables.
    pub async fn rules(&self, tables: &[&str], policy: &Policy) -> Allowed {
        let selects: Vec<_> = tables
            .iter()
            .map(|table| (*table, format!("SELECT * FROM {table}")))
            .collect();
        let selects: Vec<_> = selects.iter().map(|(t, select)| (*t, &**select)).collect();
        self.rules_of(&selects, policy).await
    }

    /// Tables and their SELECTs.
    pub async fn rules_of(&self, selects: &[(&str, &str)], policy: &Policy) -> Allowed {
        let source = Source {
            name: "s".into(),
            tables: selects.iter().map(|(_, select)| (*select).into()).collect(),
            ..Source::default()
        };
        let sources = [source];
        let names = shape::tables_named(&sources).unwrap().into_iter();
        let names: Vec<_> = names.map(|(schema, name)| Name { schema, name }).collect();
        let client = self.client().await;
        let read = catalog::read(&client, &names).await.unwrap();
        let tables: Vec<_> = read
            .into_iter()
            .map(|table| Arc::new(table.unwrap()))
            .collect();
        let shapes = shape::compile(&sources, &tables).unwrap();
        let bounds = shapes[0]
            .bind(&serde_json::Map::new(), &HashMap::new())
            .unwrap();
        let mut allowed = Allowed {
            rules: Rules::default(),
            tables: HashMap::new(),
            policy: policy.clone(),
        };
        for bound in bounds {
            let (table, columns) = (bound.select.table.clone(), bound.select.columns.clone());
            let rule = Rule::new(table.clone(), columns.clone(), &[bound], policy.clone());
            allowed.rules.allow(rule);
            allowed.tables.insert(table.name.clone(), (table, columns));
        }
        allowed
    }

    /// One text.
    pub async fn text(&self, sql: &str) -> String {
        self.database.query(sql, &[]).await[0].get(0)
    }

    pub async fn until_somebody_waits(&self) {
        self.until_waiting(1).await;
    }

    /// Until so many wait for locks, or more.
    pub async fn until_waiting(&self, count: usize) {
        until("they wait for locks", DEADLINE, || async {
            let sql = "SELECT count(*)::text FROM pg_stat_activity
                        WHERE datname = current_database() AND wait_event_type = 'Lock'";
            self.text(sql).await.parse::<usize>().unwrap() >= count
        })
        .await;
    }
}

impl Allowed {
    /// What a column's values are.
    pub fn kind(&self, table: &str, column: usize) -> anabranch_streamer::table::Kind {
        self.tables[table].0.columns[column].kind.clone()
    }
}

impl Program {
    pub fn new(allowed: &Allowed, tables: &[&str]) -> Program {
        let mut program = Program {
            tables: Vec::new(),
            seq: 0,
            previous: NO_HASH,
        };
        program.tables = declared(allowed, tables);
        program
    }

    /// It goes on, with other tables.
    pub fn over(mut self, allowed: &Allowed, tables: &[&str]) -> Program {
        self.tables = declared(allowed, tables);
        self
    }

    /// It goes on, with tables and columns that it says itself; the first is the key.
    pub fn with(mut self, tables: &[(&str, &[&str])]) -> Program {
        let table = |(name, columns): &(&str, &[&str])| {
            let columns = columns.iter().map(|column| (*column).to_owned()).collect();
            let policy = Policy::default();
            Arc::new(
                WriteTable::new("public".into(), (*name).into(), columns, vec![0], &policy)
                    .unwrap(),
            )
        };
        self.tables = tables.iter().map(table).collect();
        self
    }

    pub fn transaction(&mut self, made: &[Made<'_>]) -> LocalTransaction {
        let mut entries = BytesMut::new();
        for (table, kind, values) in made {
            let record = record::build(values.iter().copied());
            let nonce = Nonce::new(1_800_000_000, rand::random());
            push(&mut entries, *table, *kind, nonce, &record);
        }
        self.seq += 1;
        let hash = chain(&self.previous, self.seq, &self.tables, &entries);
        let (tables, entries) = (self.tables.clone(), entries.freeze());
        let read = LocalTransaction::read(&self.previous, self.seq, hash, tables, entries, false);
        self.previous = hash;
        read.unwrap()
    }
}

fn declared(allowed: &Allowed, tables: &[&str]) -> Vec<Arc<WriteTable>> {
    let table = |name: &&str| {
        let (table, places) = &allowed.tables[*name];
        let column = |place: &usize| table.columns[*place].name.clone();
        let key = table.key.iter().map(|key| {
            let place = places.iter().position(|place| place == key);
            place.unwrap()
        });
        let made = WriteTable::new(
            table.schema.clone(),
            table.name.clone(),
            places.iter().map(column).collect(),
            key.collect(),
            &allowed.policy,
        );
        Arc::new(made.unwrap())
    };
    tables.iter().map(table).collect()
}
