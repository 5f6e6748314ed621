//! Line 6: whatever text a client, a program, a token or a row brings, and whatever a table is called, Postgres is asked the same
//! statements, and SQLite has the same schema. Each scene runs with texts that mean nothing first, and then with a corpus of those
//! that do: what Postgres was asked must be of no other shape.

mod corpus;
mod names;
mod statements;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    sync::Arc,
};

use anabranch_proto::{
    Nonce,
    record::{self, ValueRef},
    v1::{self, write_down, write_up},
};
use anabranch_streamer::write::{Hash, Kind, NO_HASH, Policy, WriteTable, chain, push};
use anabranch_tests::{
    caller::{self, First, hello},
    issuer::{self, Signer},
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    seed::Seed,
    wait::{DEADLINE, until},
};
use bytes::BytesMut;
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::{Code, Status, transport::Channel};

use self::{
    corpus::{Corpus, harmless},
    statements::{logged, shape, shapes},
};
use super::program;

const SHAPES: &str = r#"
    [shape.one]
    params.one = { client = "text" }
    tables = ["SELECT * FROM v WHERE s = $one"]
    [shape.some]
    params.some = { client = "text[]" }
    tables = ["SELECT * FROM v WHERE s = ANY($some)"]
    [shape.mine]
    params.me = { claim = "me" }
    tables = ["SELECT * FROM v WHERE s = ANY($me)"]
    [shape.written]
    tables = ["SELECT * FROM w"]
    writable = true
    [shape.own]
    params.me = { claim = "me" }
    params.owner = { claim = "sub" }
    tables = ["SELECT * FROM w WHERE v = ANY($me) AND k <> $owner"]
    writable = true
    [auth]
    role = { claim = "role", allowed = ["app"] }
    limits = { calls_per_minute = 1000000, streams_max = 10000 }"#;

/// Subscriptions of one call.
const AT_ONCE: usize = 100;

/// Claims in a token, which has room for 8 KiB.
const CLAIMS_AT_ONCE: usize = 10;

/// Tokens that call at a time.
const TOKENS_AT_ONCE: usize = 20;

/// The texts of one run, of each channel its own.
struct Texts {
    /// Of things that a call names: ids, shapes, parameters. Some of them are refused for what they are.
    named: Vec<String>,
    /// Values of rows, and of parameters.
    values: Vec<String>,
    /// What programs write.
    written: Vec<(String, String)>,
    /// Names of tables and columns in local transactions.
    tables: Vec<String>,
}

impl Texts {
    fn count(&self) -> usize {
        // Ids (of two calls, and the former one), shapes and names of parameters of two calls; claims of two kinds, and the role;
        // values as rows and parameters.
        self.named.len() * 10
            + self.values.len() * 2
            + self.written.len() * 2
            + self.tables.len() * 2
    }
}

struct Scene {
    database: Database,
    streamer: Streamer,
    signer: Signer,
    channel: Channel,
    _dir: TempDir,
}

impl Scene {
    async fn start(server: &Server, values: &[String]) -> Scene {
        let database = server.database().await;
        let name = database.name();
        database
            .execute(&format!(
                "CREATE TABLE v (s text PRIMARY KEY, n int); CREATE TABLE w (k text PRIMARY KEY, v text);
                 DO $$ BEGIN CREATE ROLE app; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
                 GRANT ALL ON w TO app; GRANT CONNECT ON DATABASE {name} TO app"
            ))
            .await;
        let dir = TempDir::new().unwrap();
        let signer = Signer::new("a");
        let key = dir.path().join("issuer.pem");
        fs::write(&key, signer.public_pem()).unwrap();
        let streamer = Streamer::config(&database)
            .toml(SHAPES)
            .set("auth.jwt.public_key_file", key.to_str().unwrap())
            .start()
            .await;
        // What is there is copied by another scene; these come by the stream.
        let insert = "INSERT INTO v SELECT * FROM unnest($1::text[]) WITH ORDINALITY";
        database.query(insert, &[&values]).await;
        let channel = caller::channel(streamer.address()).await;
        let scene = Scene {
            database,
            streamer,
            signer,
            channel,
            _dir: dir,
        };
        let lsn = scene.database.lsn().await;
        until("the streamer has the rows", DEADLINE, || async {
            let status = scene.streamer.get("/status").await?.json()?;
            let at: anabranch_proto::Lsn = status["lsn"].as_str().unwrap().parse()?;
            anyhow::ensure!(at >= lsn, "{status}");
            Ok(())
        })
        .await;
        scene
    }

    fn token(&self, subject: &str, me: &[String], role: &str) -> String {
        let exp = issuer::at(600);
        let claims = json!({ "sub": subject, "me": me, "role": role, "exp": exp });
        self.signer.token(&claims)
    }

    /// The texts of the rows that a call shows.
    async fn shown(&self, token: &str, hello: v1::Hello) -> BTreeSet<String> {
        let stream = caller::replicate(self.channel.clone(), Some(token), hello).await;
        texts(&stream.unwrap().first().await.unwrap())
    }

    async fn text(&self, sql: &str) -> String {
        self.database.query(sql, &[]).await[0].get(0)
    }
}

/// Of rows of `v`, which alone have two columns.
fn texts(first: &First) -> BTreeSet<String> {
    let rows = first.records.iter().filter_map(|(_, record)| {
        let values: Result<Vec<_>, _> = record::values(record).unwrap().collect();
        match values.unwrap()[..] {
            [ValueRef::Text(text), ValueRef::Integer(_)] => Some(text.to_owned()),
            _ => None,
        }
    });
    rows.collect()
}

fn set(texts: &[String]) -> BTreeSet<String> {
    texts.iter().cloned().collect()
}

fn code<T>(answer: Result<T, Status>) -> Code {
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

fn params(name: &str, value: &serde_json::Value) -> HashMap<String, String> {
    HashMap::from([(name.to_owned(), value.to_string())])
}

/// What a call names is refused, or taken for the name that it is.
async fn names_of_calls(scene: &Scene, texts: &[String]) {
    let token = scene.token("a", &[], "app");
    let is_id = |text: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=64).contains(&text.len()) && text.chars().all(allowed)
    };
    for text in texts {
        let replicate = async |change: &dyn Fn(&mut v1::Hello)| {
            let mut hello = hello("r", "written");
            change(&mut hello);
            code(caller::replicate(scene.channel.clone(), Some(&token), hello).await)
        };
        let write = async |id: &str, shape: &str| {
            code(caller::write(scene.channel.clone(), Some(&token), id, shape).await)
        };
        let id = if is_id(text) {
            Code::Ok
        } else {
            Code::InvalidArgument
        };
        assert_eq!(
            replicate(&|hello| hello.replica_id = text.clone()).await,
            id,
            "{text:?}"
        );
        assert_eq!(write(text, "written").await, id, "{text:?}");
        let former = if text.is_empty() { Code::Ok } else { id };
        let said = replicate(&|hello| hello.token_replica_id = text.clone()).await;
        assert_eq!(said, former, "{text:?}");
        let shape = |hello: &mut v1::Hello| hello.subscriptions[0].shape = text.clone();
        assert_eq!(replicate(&shape).await, Code::NotFound, "{text:?}");
        assert_eq!(write("r", text).await, Code::NotFound, "{text:?}");
        let param = |hello: &mut v1::Hello| {
            hello.subscriptions[0].params = params(text, &json!(text));
        };
        assert_eq!(replicate(&param).await, Code::InvalidArgument, "{text:?}");
    }
}

/// What a replica chooses narrows to the rows that are equal to it, one by one and as an array.
async fn values_of_parameters(scene: &Scene, values: &[String]) {
    let token = scene.token("a", &[], "app");
    for some in values.chunks(AT_ONCE) {
        let mut one = hello("one", "one");
        one.subscriptions = (some.iter())
            .map(|text| v1::Subscription {
                shape: "one".into(),
                params: params("one", &json!(text)),
            })
            .collect();
        assert_eq!(scene.shown(&token, one).await, set(some));
        let mut many = hello("some", "some");
        many.subscriptions[0].params = params("some", &json!(some));
        assert_eq!(scene.shown(&token, many).await, set(some));
    }
    // A real replica, which says them from its config.
    let some = &values[..values.len().min(5 * AT_ONCE)];
    let mut chosen = toml::Table::new();
    chosen.insert("some".into(), some.to_vec().into());
    let replica = Replica::config(&scene.streamer)
        .token(&token)
        .subscribe_with("some", chosen)
        .start()
        .await;
    replica.until_caught_up(&scene.database).await;
    let file = replica.open();
    let mut statement = file.prepare("SELECT s FROM v").unwrap();
    let found = statement.query_map([], |row| row.get::<_, String>(0));
    let found: BTreeSet<_> = found.unwrap().map(Result::unwrap).collect();
    assert_eq!(found, set(some));
}

/// What a token says: as a parameter, as the owner of a replica's id, for policies, and as the role.
async fn claims_of_tokens(scene: &Arc<Scene>, texts: &[String], values: &[String]) {
    for some in values[..texts.len()].chunks(CLAIMS_AT_ONCE) {
        let token = scene.token("a", some, "app");
        assert_eq!(scene.shown(&token, hello("r", "mine")).await, set(some));
    }
    let pairs: Vec<_> = texts.iter().cloned().zip(values.iter().cloned()).collect();
    let mut made = 0;
    for (i, some) in pairs.chunks(TOKENS_AT_ONCE).enumerate() {
        let mut asked = JoinSet::new();
        for (j, (subject, me)) in some.iter().cloned().enumerate() {
            let (scene, id) = (scene.clone(), format!("r{i}-{j}"));
            asked.spawn(async move { claims_of_token(&scene, &id, &subject, &me).await });
        }
        // Calls that end may take back what they said, and a connection has room for some.
        let calls = asked.join_all().await;
        made += calls.len();
        until("they are made", DEADLINE, || async {
            let count = scene.text("SELECT count(*)::text FROM w").await;
            anyhow::ensure!(count == made.to_string(), "{count}");
            Ok(())
        })
        .await;
    }
    let rows = scene
        .database
        .query("SELECT subject FROM anabranch.replicas", &[])
        .await;
    let subjects: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(subjects, set(texts));
    let rows = scene.database.query("SELECT v FROM w", &[]).await;
    let written: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(written, set(&values[..made]));
    scene.database.execute("DELETE FROM w").await;
}

/// Of one token: the call that its write is made by.
async fn claims_of_token(scene: &Scene, id: &str, subject: &str, me: &str) -> caller::Write {
    let token = scene.token(subject, &[me.to_owned()], "app");
    let denied = scene.token("a", &[], subject);
    let denied = caller::write(scene.channel.clone(), Some(&denied), "r", "written").await;
    assert_eq!(code(denied), Code::PermissionDenied, "{subject:?}");

    // What it may write is told Postgres by these claims.
    let call = caller::write(scene.channel.clone(), Some(&token), id, "own").await;
    let mut call = call.unwrap();
    let ready = call.next().await.unwrap();
    assert!(matches!(ready, write_down::Kind::Ready(_)), "{ready:?}");
    let table = ("public", "w", ["k", "v"]);
    let (transaction, _) = transaction(&NO_HASH, 1, table, [id, me]);
    call.say(write_up::Kind::Transaction(transaction)).await;
    call
}

/// A local transaction that inserts one row.
fn transaction(
    previous: &Hash,
    seq: u64,
    (schema, name, columns): (&str, &str, [&str; 2]),
    row: [&str; 2],
) -> (v1::LocalTransaction, Hash) {
    let columns: Vec<_> = columns.iter().map(|&column| column.to_owned()).collect();
    let (schema, name) = (schema.to_owned(), name.to_owned());
    let table = v1::WriteTable {
        schema: schema.clone(),
        name: name.clone(),
        columns: columns.clone(),
        key: vec![0],
    };
    let hashed = WriteTable::new(schema, name, columns, vec![0], &Policy::default());
    let mut entries = BytesMut::new();
    let record = record::build(row.map(ValueRef::Text));
    let nonce = Nonce::new(issuer::at(0).cast_unsigned(), rand::random());
    push(&mut entries, 0, Kind::Insert, nonce, &record);
    let hash = chain(previous, seq, &[Arc::new(hashed.unwrap())], &entries);
    let transaction = v1::LocalTransaction {
        seq,
        hash: hash.to_vec().into(),
        tables: vec![table],
        entries: entries.freeze(),
        ..v1::LocalTransaction::default()
    };
    (transaction, hash)
}

/// Tables and columns that a replica says: those that it may write are known, and no others are asked for.
async fn tables_of_writes(scene: &Scene, names: &[String]) {
    let token = scene.token("forger", &[], "app");
    let call = caller::write(scene.channel.clone(), Some(&token), "forger", "written").await;
    let mut call = call.unwrap();
    let (mut previous, mut seq) = (NO_HASH, 0);
    for four in names.chunks_exact(4) {
        let [a, b, c, d] = four else { continue };
        for table in [
            (&**a, &**b, [&**c, &**d]),
            ("public", b, ["k", "v"]),
            (a, "w", ["k", "v"]),
            ("public", "w", ["k", d]),
            ("public", "w", [c, "v"]),
        ] {
            seq += 1;
            let (made, hash) = transaction(&previous, seq, table, ["x", "y"]);
            call.say(write_up::Kind::Transaction(made)).await;
            previous = hash;
        }
        for (schema, table) in [(&**a, &**b), ("public", c), (d, "w")] {
            let lease = v1::Lease {
                schema: schema.to_owned(),
                table: table.to_owned(),
            };
            call.say(write_up::Kind::Lease(lease)).await;
            let ids = loop {
                match call.next().await.unwrap() {
                    write_down::Kind::Ids(ids) => break ids,
                    write_down::Kind::Ready(_) => {}
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!((&*ids.schema, &*ids.table), (schema, table));
            assert!(ids.blocks.is_empty(), "{ids:?}");
        }
    }
    until("all are refused", DEADLINE, || async {
        let sql = "SELECT count(*)::text FROM anabranch.rejections WHERE replica = 'forger' AND outcome = 'not_writable'";
        let count = scene.text(sql).await;
        anyhow::ensure!(count == seq.to_string(), "{count}");
        Ok(())
    })
    .await;
    assert_eq!(scene.text("SELECT count(*)::text FROM w").await, "0");
}

/// What a program writes arrives as it was written, keys too, and comes back as it was.
async fn rows_of_programs(scene: &Scene, written: &[(String, String)]) {
    let replica = Replica::config(&scene.streamer)
        .token(&scene.token("program", &[], "app"))
        .subscribe("written")
        .start()
        .await;
    let schema = || {
        let sql =
            "SELECT group_concat(type || name || coalesce(sql, ''), char(10)) FROM sqlite_schema";
        let schema: String = replica.open().query_row(sql, [], |row| row.get(0)).unwrap();
        schema
    };
    let before = schema();
    let mut file = program(&replica);
    let mut expected = BTreeMap::new();
    for some in written.chunks(500) {
        let all = file.transaction().unwrap();
        for (key, value) in some {
            all.execute("INSERT INTO w VALUES (?1, ?2)", [key, value])
                .unwrap();
            expected.insert(key.clone(), value.clone());
        }
        all.commit().unwrap();
    }
    let all = file.transaction().unwrap();
    for (i, (key, value)) in written.iter().enumerate() {
        match i % 5 {
            0 => {
                let other = format!("{value}'{key}");
                all.execute("UPDATE w SET v = ?2 WHERE k = ?1", [key, &other])
                    .unwrap();
                expected.insert(key.clone(), other);
            }
            1 => {
                let other = format!("\"{key}");
                all.execute("UPDATE w SET k = ?2 WHERE k = ?1", [key, &other])
                    .unwrap();
                let value = expected.remove(key).unwrap();
                expected.insert(other, value);
            }
            2 => {
                all.execute("DELETE FROM w WHERE k = ?1", [key]).unwrap();
                expected.remove(key);
            }
            _ => {}
        }
    }
    all.commit().unwrap();
    until_all_is_taken(&replica).await;
    let rows = scene.database.query("SELECT k, v FROM w", &[]).await;
    let found: BTreeMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(
        found == expected,
        "{} rows instead of {}",
        found.len(),
        expected.len()
    );
    replica
        .until_equal(&scene.database, &[("w", "SELECT * FROM w")])
        .await;
    assert_eq!(schema(), before);
    // No text of Postgres holds a NUL: it is refused, and not cut.
    file.execute(
        "INSERT INTO w VALUES ('a' || char(0) || ''';--', 'nul')",
        [],
    )
    .unwrap();
    until("it is refused", DEADLINE, || async {
        let sql = "SELECT sqlstate FROM _anabranch_rejected";
        let sqlstate: String = replica.open().query_row(sql, [], |row| row.get(0))?;
        anyhow::ensure!(sqlstate == "22021", "{sqlstate}");
        Ok(())
    })
    .await;
    // The replica's thanks for it are the last statement: who ends earlier never saw it asked.
    until("it is settled", DEADLINE, || async {
        let sql = "SELECT count(*)::text FROM anabranch.rejections WHERE replica <> 'forger' AND NOT settled";
        let count = scene.text(sql).await;
        anyhow::ensure!(count == "0", "{count}");
        Ok(())
    })
    .await;
}

async fn run(server: &Server, texts: &Texts) -> BTreeSet<String> {
    let began = server.log().await.len();
    let scene = Arc::new(Scene::start(server, &texts.values).await);
    names_of_calls(&scene, &texts.named).await;
    values_of_parameters(&scene, &texts.values).await;
    claims_of_tokens(&scene, &texts.named, &texts.values).await;
    tables_of_writes(&scene, &texts.tables).await;
    rows_of_programs(&scene, &texts.written).await;
    let rows = scene.database.query("SELECT s FROM v", &[]).await;
    let kept: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(kept, set(&texts.values));
    shapes(&server.log().await[began..])
}

/// What was asked with the corpus, and never without it.
fn assert_no_other(harmless: &BTreeSet<String>, asked: &BTreeSet<String>) {
    assert!(harmless.len() > 20, "{harmless:#?}");
    let more: Vec<_> = asked.difference(harmless).collect();
    assert!(more.is_empty(), "{more:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_becomes_a_part_of_a_statement() {
    let server = Server::start(logged()).await;
    let pairs = |texts: Vec<String>| {
        let (keys, values) = texts.split_at(texts.len() / 2);
        keys.iter().cloned().zip(values.iter().cloned()).collect()
    };
    let plain = Texts {
        named: harmless(20, 0),
        values: harmless(120, 1000),
        written: pairs(harmless(200, 2000)),
        tables: harmless(40, 3000),
    };
    let harmless = run(&server, &plain).await;

    let mut corpus = Corpus::new(Seed::new().rng("corpus"));
    let named = corpus.short(500, 1000);
    let texts = Texts {
        // Long ones would not fit into a call with a hundred of them.
        values: corpus.short(1500, 250),
        written: pairs(corpus.texts(2400)),
        tables: corpus.short(800, 63),
        named,
    };
    assert!(texts.count() >= 10_000, "{}", texts.count());
    let asked = run(&server, &texts).await;
    assert_no_other(&harmless, &asked);

    // And it would have been seen: a constant that is not quoted as it should be.
    let url = format!("{}?application_name=anabranch", server.url("postgres"));
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    let began = server.log().await.len();
    client
        .batch_execute("SELECT 'it'; SELECT 1 --'")
        .await
        .unwrap();
    let injected = shapes(&server.log().await[began..]);
    assert_eq!(
        injected,
        BTreeSet::from([shape("SELECT 'it'; SELECT 1 --'")])
    );
    assert!(!harmless.is_superset(&injected));
}

/// All that programs wrote into its file is answered, and nothing is rejected.
async fn until_all_is_taken(replica: &Replica) {
    until("all is answered", 2 * DEADLINE, || async {
        let sql = "SELECT pending || ' ' || rejected FROM _anabranch_status";
        let told: String = replica.open().query_row(sql, [], |row| row.get(0))?;
        anyhow::ensure!(told == "0 0", "{told}");
        Ok(())
    })
    .await;
}
