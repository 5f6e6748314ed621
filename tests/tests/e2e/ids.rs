//! Ids and defaults: rows that programs insert without knowing what Postgres would put in, also offline.

use std::path::Path;

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use rusqlite::Connection;

const ALL: &str = "SELECT * FROM notes";

/// Opens a file as a program does.
fn program(file: &Path) -> Connection {
    let connection = Connection::open(file).unwrap();
    connection
        .busy_timeout(std::time::Duration::from_secs(5))
        .unwrap();
    connection
}

/// Inserts a row as the README says.
const INSERT: &str = "INSERT INTO notes(id, title) \
     VALUES((SELECT next_id FROM _anabranch_ids WHERE table_name = 'notes'), ?1) RETURNING id";

fn insert(program: &Connection, title: &str) -> i64 {
    program
        .query_row(INSERT, [title], |row| row.get(0))
        .unwrap()
}

struct Fleet {
    database: Database,
    streamer: Streamer,
    replicas: Vec<Replica>,
}

impl Fleet {
    /// Some replicas of the table `notes`.
    async fn start(notes: &str, replicas: usize) -> Fleet {
        let database = Server::shared().await.database().await;
        database.execute(notes).await;
        let streamer = Streamer::config(&database)
            .shape("notes", &[ALL])
            .set("shape.notes.writable", true)
            .start()
            .await;
        let mut fleet = Fleet {
            database,
            streamer,
            replicas: Vec::new(),
        };
        for _ in 0..replicas {
            let replica = Replica::config(&fleet.streamer).subscribe("notes");
            fleet.replicas.push(replica.start().await);
        }
        for replica in &fleet.replicas {
            replica
                .until_equal(&fleet.database, &[("notes", ALL)])
                .await;
        }
        fleet
    }

    async fn until_leased(&self) {
        for replica in &self.replicas {
            let file = replica.open();
            until("ids are leased", DEADLINE, || async {
                ids_of(&file).is_some()
            })
            .await;
        }
    }

    /// Until nothing is pending, all is the same everywhere, and nothing was rejected.
    async fn until_same(&self) {
        for replica in &self.replicas {
            let file = replica.open();
            until("all local writes are answered", DEADLINE, || async {
                number(&file, "SELECT pending FROM _anabranch_status") == 0
            })
            .await;
            assert_eq!(number(&file, "SELECT count(*) FROM _anabranch_rejected"), 0);
        }
        for replica in &self.replicas {
            replica.until_equal(&self.database, &[("notes", ALL)]).await;
        }
    }

    async fn one(&self, sql: &str) -> String {
        let client = self.database.connect().await;
        let row = client.query_one(sql, &[]).await.unwrap();
        row.get::<_, Option<String>>(0).unwrap_or_default()
    }
}

/// What the view offers.
fn ids_of(file: &Connection) -> Option<(i64, i64, i64)> {
    file.query_row(
        "SELECT next_id, last_id, step FROM _anabranch_ids WHERE table_name = 'notes'",
        [],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )
    .ok()
}

fn number(file: &Connection, sql: &str) -> i64 {
    file.query_row(sql, [], |row| row.get(0)).unwrap()
}

const NOTES: &str = "CREATE TABLE notes (id bigserial PRIMARY KEY, title text NOT NULL)";

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_and_psql_use_the_same_id() {
    let fleet = Fleet::start(NOTES, 2).await;
    fleet.until_leased().await;
    let [one, other] = [0, 1].map(|i| program(&fleet.replicas[i].file()));
    for n in 0..700 {
        insert(&one, &format!("one {n}"));
        insert(&other, &format!("other {n}"));
        if n % 10 == 0 {
            let psql = format!("INSERT INTO notes(title) VALUES ('psql {n}')");
            fleet.database.execute(&psql).await;
        }
    }
    fleet.until_same().await;
    assert_eq!(
        fleet
            .one("SELECT count(*) || ' ' || count(DISTINCT title) FROM notes")
            .await,
        "1470 1470"
    );
    // More were leased before those were used up.
    fleet.until_leased().await;
    fleet.streamer.kill();
    let offline = insert(&one, "offline");
    assert_ne!(offline, insert(&other, "offline"));
    fleet.streamer.start().await;
    fleet.until_same().await;
}

/// Ids that a replica leased and never used are lost; those that it used are not leased again.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_lease_and_use_repeats_ids() {
    let fleet = Fleet::start(NOTES, 1).await;
    let replica = &fleet.replicas[0];
    for round in 0..6 {
        fleet.until_leased().await;
        let file = program(&replica.file());
        for n in 0..250 {
            insert(&file, &format!("{round} {n}"));
            // While more are asked for.
            match (round % 2, n) {
                (0, 200) => replica.kill(),
                (1, 200) => fleet.streamer.kill(),
                _ => {}
            }
        }
        match round % 2 {
            0 => replica.spawn(),
            _ => fleet.streamer.spawn(),
        }
        fleet.until_same().await;
    }
    assert_eq!(fleet.one("SELECT count(*)::text FROM notes").await, "1500");
    // Nor does the sequence come back to them.
    fleet
        .database
        .execute("INSERT INTO notes(title) SELECT 'psql' FROM generate_series(1, 2000)")
        .await;
    fleet.until_same().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_counts_otherwise_gives_wrong_ids() {
    for (sequence, is_one) in [
        ("INCREMENT 5 START 7 CACHE 10", "id % 5 = 2 AND id >= 7"),
        ("INCREMENT -3 START -1", "-id % 3 = 1 AND id < 0"),
    ] {
        let notes = format!(
            "CREATE SEQUENCE numbers {sequence};
             CREATE TABLE notes (id int PRIMARY KEY DEFAULT nextval('numbers'), title text NOT NULL)"
        );
        let fleet = Fleet::start(&notes, 2).await;
        fleet.until_leased().await;
        for replica in &fleet.replicas {
            let file = program(&replica.file());
            for n in 0..40 {
                insert(&file, &n.to_string());
            }
            file.execute(
                "INSERT INTO notes(id, title) SELECT next_id + step * (row_number() OVER () - 1), title
                 FROM _anabranch_ids JOIN (SELECT title FROM notes LIMIT 40) ON table_name = 'notes'",
                [],
            )
            .unwrap();
        }
        fleet
            .database
            .execute("INSERT INTO notes(title) SELECT 'psql' FROM generate_series(1, 40)")
            .await;
        fleet.until_same().await;
        let count = format!("SELECT count(*)::text FROM notes WHERE {is_one}");
        assert_eq!(fleet.one(&count).await, "200", "{sequence}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_that_postgres_always_makes_itself_is_refused() {
    let notes =
        "CREATE TABLE notes (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text NOT NULL)";
    let fleet = Fleet::start(notes, 1).await;
    fleet.until_leased().await;
    let file = program(&fleet.replicas[0].file());
    for n in 0..10 {
        insert(&file, &n.to_string());
    }
    let refused = file.execute("INSERT INTO notes(title) VALUES('x')", []);
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("SELECT next_id FROM _anabranch_ids"),
        "{refused}"
    );
    fleet.until_same().await;
    assert_eq!(fleet.one("SELECT count(*)::text FROM notes").await, "10");
}

/// A sequence that is almost used up is not leased as a whole, and what is left of it still is.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_sequence_is_used_up_by_replicas() {
    let fleet = Fleet::start(
        "CREATE TABLE notes (id smallserial PRIMARY KEY, title text)",
        1,
    )
    .await;
    fleet.until_leased().await;
    let taken: i64 = fleet
        .one("SELECT last_value::text FROM notes_id_seq")
        .await
        .parse()
        .unwrap();
    assert!((1..1000).contains(&taken), "{taken}");
    fleet
        .database
        .execute("SELECT setval('notes_id_seq', 32766)")
        .await;
    let file = program(&fleet.replicas[0].file());
    while let Some((next, last, _)) = ids_of(&file) {
        if next == 32767 {
            break;
        }
        assert!(next <= last && last <= taken, "{next} {last}");
        insert(&file, "x");
    }
    fleet.until_same().await;
}

const DEFAULTS: &str = "
    CREATE TYPE status AS ENUM ('new', 'done');
    CREATE TABLE notes (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        title text NOT NULL DEFAULT 'it''s new',
        status status NOT NULL DEFAULT 'new',
        done bool NOT NULL DEFAULT false,
        hits int NOT NULL DEFAULT 0,
        price numeric(10,2) NOT NULL DEFAULT 0,
        ratio float8 NOT NULL DEFAULT 0.5,
        tags text[] NOT NULL DEFAULT '{}',
        payload jsonb NOT NULL DEFAULT '{}',
        bytes bytea NOT NULL DEFAULT '\\x00ff',
        day date NOT NULL DEFAULT '2024-02-29',
        made timestamptz NOT NULL DEFAULT now(),
        optional text DEFAULT 'given',
        today date NOT NULL DEFAULT current_date,
        who text DEFAULT current_user,
        number bigserial,
        plain text)";

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_leaves_out_becomes_something_else_in_postgres() {
    let fleet = Fleet::start(DEFAULTS, 1).await;
    fleet.streamer.kill();
    let file = program(&fleet.replicas[0].file());
    for sql in [
        "INSERT INTO notes DEFAULT VALUES",
        "INSERT INTO notes(optional) VALUES(NULL)",
        "INSERT INTO notes(who, number, today) VALUES('me', 7, '2000-01-01')",
    ] {
        file.execute(sql, []).unwrap();
    }
    let mirrored = "id, title, status, done, hits, price, ratio, tags, payload, bytes, day, made, optional, plain";
    let rows = format!(
        "SELECT json_array({}) FROM notes ORDER BY id",
        mirrored.replace("bytes", "hex(bytes)")
    );
    let read = || -> Vec<String> {
        let mut statement = file.prepare(&rows).unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let before = read();
    assert_eq!(before.len(), 3);
    let left_out =
        "SELECT count(*) FROM notes WHERE who IS NULL AND number IS NULL AND today IS NULL";
    assert_eq!(number(&file, left_out), 2);
    fleet.streamer.start().await;
    fleet.until_same().await;
    assert_eq!(read(), before);
    // What only Postgres knows came down.
    assert_eq!(
        fleet
            .one(
                "SELECT count(*) || ' ' || count(DISTINCT number) || ' ' || count(*) FILTER (WHERE who = current_user)
                 || ' ' || count(optional) FROM notes WHERE today = '2000-01-01' OR today > '2020-01-01'"
            )
            .await,
        "3 3 2 2"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_default_that_changed_stays_what_it_was() {
    let notes = "CREATE TABLE notes (id bigserial PRIMARY KEY, title text NOT NULL DEFAULT 'one', plain text NOT NULL)";
    let fleet = Fleet::start(notes, 1).await;
    fleet.until_leased().await;
    let file = program(&fleet.replicas[0].file());
    file.execute_batch("CREATE TABLE mine(id); CREATE TRIGGER mine AFTER INSERT ON notes BEGIN INSERT INTO mine VALUES(NEW.id); END")
        .unwrap();
    let insert = "INSERT INTO notes(id, plain) VALUES((SELECT next_id FROM _anabranch_ids WHERE table_name = 'notes'), 'p')";
    file.execute(insert, []).unwrap();
    let ids = ids_of(&file);
    fleet
        .database
        .execute(
            "ALTER TABLE notes ALTER title SET DEFAULT 'two';
             ALTER TABLE notes ALTER plain SET DEFAULT version()",
        )
        .await;
    until("the file has the new default", DEADLINE, || async {
        let sql: String = file
            .query_row(
                "SELECT sql FROM sqlite_schema WHERE name = 'notes'",
                [],
                |row| row.get(0),
            )
            .unwrap();
        sql.contains("'two'")
    })
    .await;
    // It was not sent anew.
    assert_eq!(ids_of(&file), ids);
    file.execute(insert, []).unwrap();
    file.execute(&insert.replace("'p'", "NULL"), []).unwrap();
    fleet.until_same().await;
    assert_eq!(
        fleet
            .one("SELECT string_agg(title || left(plain, 10), ' ' ORDER BY id) FROM notes")
            .await,
        "onep twop twoPostgreSQL"
    );
    assert_eq!(number(&file, "SELECT count(*) FROM mine"), 3);
    // Nor at the next connect.
    fleet.streamer.kill();
    fleet.streamer.start().await;
    fleet.until_same().await;
    assert_eq!(number(&file, "SELECT count(*) FROM mine"), 3);
}

/// What stands between a replica and a sequence that its role could not use by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_insert_takes_ids() {
    let fleet = Fleet::start(NOTES, 1).await;
    let role = format!("may_not_insert_{}", fleet.database.name());
    let lease = format!(
        "SELECT sum(abs(last - first) + 1)::text FROM anabranch.lease('notes'::regclass, 1::int2, '{role}', 10)"
    );
    fleet
        .database
        .execute(&format!(
            "CREATE ROLE {role}; GRANT SELECT ON notes TO {role}"
        ))
        .await;
    assert_eq!(fleet.one(&lease).await, "");
    fleet
        .database
        .execute(&format!("GRANT INSERT (title) ON notes TO {role}"))
        .await;
    assert_eq!(fleet.one(&lease).await, "10");
    // Nor a trigger, which may run with the rights of the login role.
    let in_a_trigger = format!(
        "CREATE TABLE other (id int);
         CREATE FUNCTION take() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {}; RETURN NEW; END $$;
         CREATE TRIGGER take BEFORE INSERT ON other FOR EACH ROW EXECUTE FUNCTION take()",
        lease.replace("SELECT", "PERFORM")
    );
    fleet.database.execute(&in_a_trigger).await;
    let refused = fleet
        .database
        .try_execute("INSERT INTO other VALUES (1)")
        .await;
    let refused = format!("{:?}", refused.unwrap_err());
    assert!(refused.contains("not within a trigger"), "{refused}");
    // A key that is no sequence's has none.
    fleet
        .database
        .execute("ALTER TABLE notes ALTER id DROP DEFAULT")
        .await;
    assert_eq!(fleet.one(&lease).await, "");
    fleet
        .database
        .execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await;
}
