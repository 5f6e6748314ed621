//! A file restored from a backup, copied to a second node, or run twice: no write is lost, none is made twice.

mod ledger;

use std::path::{Path, PathBuf};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};
use rusqlite::Connection;

/// `arrived` has no key, so what Postgres made twice is in it twice. What is in `pad` can't be compressed much.
const TABLES: &str = "
    CREATE TABLE tokens (token text PRIMARY KEY, note text NOT NULL CHECK (note <> 'forbidden'));
    CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL);
    INSERT INTO counter VALUES (1, 0);
    CREATE TABLE pad (id int PRIMARY KEY, md5 text NOT NULL);
    INSERT INTO pad SELECT g, md5(g::text) || md5((-g)::text) FROM generate_series(1, 20000) g;
    CREATE TABLE arrived (token text);
    CREATE FUNCTION arrive() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.arrived VALUES (NEW.token); RETURN NULL; END $$;
    CREATE TRIGGER arrive AFTER INSERT ON tokens FOR EACH ROW EXECUTE FUNCTION arrive()";

const SELECTS: [(&str, &str); 3] = [
    ("tokens", "SELECT * FROM tokens"),
    ("counter", "SELECT * FROM counter"),
    ("pad", "SELECT * FROM pad"),
];

/// The shape, and two tokens of one subject and one of another.
async fn streamer(database: &Database) -> Streamer {
    Streamer::config(database)
        .token("first", serde_json::json!({ "sub": "edge-1" }))
        .token("second", serde_json::json!({ "sub": "edge-2" }))
        .shape("all", &SELECTS.map(|(_, select)| select))
        .set(
            "shape.all.writable",
            toml::Value::from(vec!["tokens", "counter"]),
        )
        .toml("[table.\"public.counter\"]\ncolumn.n = \"add\"")
        .set("row_bytes_max", "1MiB")
        .start()
        .await
}

/// A new node, which runs nothing yet.
fn node(streamer: &Streamer) -> Replica {
    Replica::config(streamer)
        .token("first")
        .subscribe("all")
        .prepare()
}

async fn begin() -> (Database, Streamer, Replica) {
    let database = Server::shared().await.database().await;
    database.execute(TABLES).await;
    let streamer = streamer(&database).await;
    let replica = node(&streamer);
    replica.start().await;
    replica.until_equal(&database, &SELECTS).await;
    (database, streamer, replica)
}

/// A transaction of a program: it inserts the token, and counts it.
fn write(file: &Path, token: &str) {
    let connection = Connection::open(file).unwrap();
    connection
        .busy_timeout(std::time::Duration::from_secs(5))
        .unwrap();
    connection
        .execute_batch(&format!(
            "BEGIN IMMEDIATE; INSERT INTO tokens VALUES('{token}', 'fine');
             UPDATE counter SET n = n + 1 WHERE id = 1; COMMIT"
        ))
        .unwrap();
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Copies the file of a replica that does not run, with what its WAL has.
fn copy(from: &Path, to: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let (from, to) = (beside(from, suffix), beside(to, suffix));
        let _ = std::fs::remove_file(&to);
        if suffix != "-shm" && from.exists() {
            std::fs::copy(from, to).unwrap();
        }
    }
}

fn text(file: &Path, sql: &str) -> String {
    let connection = Connection::open(file).unwrap();
    // The first to open a file that was put back recovers its WAL.
    connection
        .busy_timeout(std::time::Duration::from_secs(5))
        .unwrap();
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn id(replica: &Replica) -> String {
    text(&replica.file(), "SELECT replica_id FROM _anabranch_state")
}

fn rejected(replica: &Replica) -> String {
    let all =
        "SELECT coalesce(group_concat(outcome || ' ' || key || ' ' || coalesce(sqlstate, '')), '')
               FROM (SELECT * FROM _anabranch_rejected WHERE table_name = 'tokens' ORDER BY id)";
    text(&replica.file(), all)
}

async fn until_renamed(replica: &Replica, former: &str) {
    until("it has a new id", DEADLINE, || async {
        id(replica) != former
    })
    .await;
}

/// All tokens that arrived, and what the counter says.
async fn arrived(database: &Database) -> String {
    let sql = "SELECT coalesce((SELECT string_agg(token, ' ' ORDER BY token) FROM arrived), '') || ': ' || n FROM counter";
    database.query(sql, &[]).await[0].get(0)
}

async fn is_settled(database: &Database, replicas: &[&Replica], expected: &str) {
    for replica in replicas {
        replica.until_answered().await;
    }
    for replica in replicas {
        replica.until_equal(database, &SELECTS).await;
    }
    database.until_visible().await;
    assert_eq!(arrived(database).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_file_loses_or_doubles_what_was_pending_in_the_backup() {
    let (database, streamer, _) = begin().await;
    let link = Proxy::to(streamer.address()).await;
    let replica = Replica::config(&streamer)
        .token("first")
        .subscribe("all")
        .through(&link)
        .start()
        .await;
    replica.until_equal(&database, &SELECTS).await;
    let whole = link.bytes(Way::Down);
    let (file, first) = (replica.file(), id(&replica));
    let backup = file.with_file_name("backup");
    write(&file, "a1");
    replica.until_answered().await;
    replica.kill();
    write(&file, "a2");
    write(&file, "a3");
    copy(&file, &backup);
    replica.start().await;
    is_settled(&database, &[&replica], "a1 a2 a3: 3").await;
    for token in ["b1", "b2"] {
        write(&file, token);
    }
    is_settled(&database, &[&replica], "a1 a2 a3 b1 b2: 5").await;
    assert_eq!(id(&replica), first);
    replica.kill();

    copy(&backup, &file);
    write(&file, "c1");
    let before = link.bytes(Way::Down);
    replica.spawn();
    until_renamed(&replica, &first).await;
    write(&file, "c2");
    is_settled(&database, &[&replica], "a1 a2 a3 b1 b2 c1 c2: 7").await;
    assert_eq!(rejected(&replica), "");
    // Only what differs came, though the id is another.
    let came = link.bytes(Way::Down) - before;
    assert!(came < whole / 4, "{came} bytes, of {whole} at first");
    let status = replica.get("/status").await.unwrap().json().unwrap();
    assert_eq!(status["replica_id"], id(&replica).as_str());

    // The same backup again: the entries went under the second id by now.
    replica.kill();
    let second = id(&replica);
    copy(&backup, &file);
    replica.start().await;
    write(&file, "d1");
    until_renamed(&replica, &first).await;
    is_settled(&database, &[&replica], "a1 a2 a3 b1 b2 c1 c2 d1: 8").await;
    assert_ne!(id(&replica), second);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_with_one_file_lose_or_double_what_is_pending_in_both() {
    let (database, streamer, one) = begin().await;
    let first = id(&one);
    streamer.kill();
    write(&one.file(), "a1");
    one.kill();
    write(&one.file(), "a2");
    let (two, three) = (node(&streamer), node(&streamer));
    for other in [&two, &three] {
        copy(&one.file(), &other.file());
    }
    write(&one.file(), "b1");
    write(&two.file(), "c1");
    for replica in [&one, &two, &three] {
        replica.spawn();
    }
    write(&one.file(), "b2");
    write(&two.file(), "c2");
    streamer.start().await;
    write(&three.file(), "d1");
    let all = [&one, &two, &three];
    is_settled(&database, &all, "a1 a2 b1 b2 c1 c2 d1: 7").await;
    for replica in all {
        assert_eq!(rejected(replica), "");
    }
    let mut ids = all.map(id);
    ids.sort();
    assert!(ids[0] != ids[1] && ids[1] != ids[2], "{ids:?}");
    assert!(ids.iter().filter(|id| **id == first).count() <= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_with_nothing_pending_goes_on_as_the_other_one() {
    let (database, streamer, one) = begin().await;
    write(&one.file(), "a1");
    one.until_answered().await;
    one.kill();
    let first = id(&one);
    let two = node(&streamer);
    copy(&one.file(), &two.file());
    one.start().await;
    two.start().await;
    write(&one.file(), "b1");
    // It learns of it by the receipt of a transaction that it did not make, and has written nothing.
    until_renamed(&two, &first).await;
    write(&two.file(), "c1");
    is_settled(&database, &[&one, &two], "a1 b1 c1: 3").await;
    assert_eq!(id(&one), first);
}

/// A replica's backup of when three writes were pending, of which one with this note is `refused`; and the replica now, which knows.
async fn backup_of_what_is_rejected(
    note: &str,
    refused: &str,
) -> (Database, Streamer, Replica, PathBuf) {
    let (database, streamer, replica) = begin().await;
    let file = replica.file();
    let backup = file.with_file_name("backup");
    // Each a transaction of its own, so not written while nothing runs.
    streamer.kill();
    for (token, note) in [("a1", "fine"), ("a2", note), ("a3", "fine")] {
        Connection::open(&file)
            .unwrap()
            .execute("INSERT INTO tokens VALUES(?1, ?2)", [token, note])
            .unwrap();
    }
    until("they are told apart", DEADLINE, || async {
        text(&file, "SELECT CAST(count(*) AS TEXT) FROM _anabranch_local") == "3"
    })
    .await;
    replica.kill();
    copy(&file, &backup);
    streamer.start().await;
    replica.start().await;
    is_settled(&database, &[&replica], "a1 a3: 0").await;
    assert_eq!(rejected(&replica), refused);
    (database, streamer, replica, backup)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_rejected_for_another_copy_is_not_told_in_the_restored_file() {
    // The second is one that the streamer does not even read.
    for (note, refused) in [
        ("forbidden", r#"error ["a2"] 23514"#),
        (&*"x".repeat(2 << 20), r#"too_large ["a2"] 54000"#),
    ] {
        is_told_in_the_restored_file(note, refused).await;
    }
}

async fn is_told_in_the_restored_file(note: &str, refused: &str) {
    let (database, _streamer, replica, backup) = backup_of_what_is_rejected(note, refused).await;
    let (file, first) = (replica.file(), id(&replica));
    write(&file, "a4");
    is_settled(&database, &[&replica], "a1 a3 a4: 1").await;
    replica.kill();
    copy(&backup, &file);
    write(&file, "b1");
    replica.start().await;
    until_renamed(&replica, &first).await;
    is_settled(&database, &[&replica], "a1 a3 a4 b1: 2").await;
    assert_eq!(rejected(&replica), refused);
}

/// The restored file has made all that Postgres knows of, so it goes on under its id.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_newer_file_had_heard_of_is_not_told_in_the_restored_one() {
    let refused = r#"error ["a2"] 23514"#;
    let (database, _streamer, replica, backup) =
        backup_of_what_is_rejected("forbidden", refused).await;
    let first = id(&replica);
    until("Postgres knows that it was told", DEADLINE, || async {
        let sql = "SELECT bool_and(settled) FROM anabranch.rejections";
        database.query(sql, &[]).await[0].get::<_, Option<bool>>(0) != Some(false)
    })
    .await;
    replica.kill();
    copy(&backup, &replica.file());
    replica.start().await;
    is_settled(&database, &[&replica], "a1 a3: 0").await;
    assert_eq!(rejected(&replica), refused);
    assert_eq!(id(&replica), first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_sends_under_the_id_of_another_subject() {
    let (database, streamer, replica) = begin().await;
    let (file, first) = (replica.file(), id(&replica));
    write(&file, "a1");
    replica.until_answered().await;
    streamer.kill();
    write(&file, "a2");
    replica.kill();
    replica.reconfigure("token", "second");
    streamer.start().await;
    replica.start().await;
    // It is kept, and a person is told.
    until("it is told", DEADLINE, || async {
        replica.log().contains("another subject")
    })
    .await;
    assert_eq!(id(&replica), first);
    assert_eq!(arrived(&database).await, "a1: 1");
    replica.kill();
    replica.reconfigure("token", "first");
    replica.start().await;
    is_settled(&database, &[&replica], "a1 a2: 2").await;
    assert_eq!(id(&replica), first);

    // With nothing pending it goes on by itself, though the receipts of the other subject are not shown to it.
    replica.kill();
    replica.reconfigure("token", "second");
    replica.start().await;
    until_renamed(&replica, &first).await;
    write(&file, "b1");
    is_settled(&database, &[&replica], "a1 a2 b1: 3").await;
    assert_eq!(rejected(&replica), "");
}
