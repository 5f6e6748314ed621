//! Local transactions that are large: many rows, one huge value. They arrive whole, and with the memory that the programs have
//! by default.
//!
//! `ANABRANCH_LARGE_ROWS=100000` makes the first as large as it may well be: unoptimised programs take long for that.

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    wait::until,
};
use rusqlite::Connection;

/// Rows of one local transaction, where nobody says how many.
const ROWS: i64 = 20_000;

/// The largest value that the README promises.
const VALUE_BYTES: i64 = 64 << 20;

/// How long one may take. It is no verdict on speed.
const ANSWER_MAX: std::time::Duration = std::time::Duration::from_secs(300);

const TABLE: &str = "CREATE TABLE large (id int PRIMARY KEY, note text NOT NULL)";
const LARGE: &str = "SELECT * FROM large";

async fn start() -> (Database, Streamer, Replica) {
    let database = Server::shared().await.database().await;
    database.execute(TABLE).await;
    let streamer = Streamer::config(&database)
        .shape("large", &[LARGE])
        .set("shape.large.writable", true)
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("large").start().await;
    replica.until_caught_up(&database).await;
    (database, streamer, replica)
}

/// Runs one local transaction, and waits for its answer.
async fn write(replica: &Replica, sql: &str) {
    tokio::task::block_in_place(|| {
        let program = Connection::open(replica.file()).unwrap();
        program.execute_batch(sql).unwrap();
    });
    let file = replica.open();
    until("it is answered", ANSWER_MAX, || async {
        let sql = "SELECT pending, rejected FROM _anabranch_status";
        let stands: (i64, i64) = file.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        assert_eq!(stands.1, 0, "nothing is rejected");
        anyhow::ensure!(stands.0 == 0, "{} entries are pending", stands.0);
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_transaction_of_many_rows_is_torn_or_refused() {
    let rows = std::env::var("ANABRANCH_LARGE_ROWS");
    let rows = rows.map_or(ROWS, |rows| rows.parse().unwrap());
    let (database, _streamer, replica) = start().await;
    let insert = format!(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
         INSERT INTO large SELECT i, printf('row %d %.200c', i, 'x') FROM n"
    );
    write(&replica, &insert).await;
    let found = "SELECT count(*), count(DISTINCT xmin::text) FROM large";
    let found = &database.query(found, &[]).await[0];
    let (count, transactions): (i64, i64) = (found.get(0), found.get(1));
    assert_eq!(
        (count, transactions),
        (rows, 1),
        "one transaction of Postgres"
    );
    // Pending changes of many rows at once: of all, and then of none.
    write(&replica, "UPDATE large SET note = 'changed'").await;
    write(&replica, "DELETE FROM large WHERE id % 2 = 0").await;
    replica.until_equal(&database, &[("large", LARGE)]).await;
    let left: i64 = database
        .query("SELECT count(*) FROM large WHERE note = 'changed'", &[])
        .await[0]
        .get(0);
    assert_eq!(left, rows - rows / 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_local_value_does_not_go_through() {
    let (database, _streamer, replica) = start().await;
    write(
        &replica,
        &format!("INSERT INTO large VALUES(1, printf('%.{VALUE_BYTES}c', 'x'))"),
    )
    .await;
    let sum = "SELECT length(note)::bigint, note = repeat('x', length(note)) FROM large";
    let sum = &database.query(sum, &[]).await[0];
    assert_eq!(
        (sum.get::<_, i64>(0), sum.get::<_, bool>(1)),
        (VALUE_BYTES, true)
    );
    replica.until_equal(&database, &[("large", LARGE)]).await;
}
