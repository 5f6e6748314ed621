//! Line 19: at the most talkative level there is, no log holds anything of a row: not of those that are copied, streamed, written,
//! refused by Postgres, or of a table that is stopped.

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::Server,
    wait::{DEADLINE, until},
};
use serde_json::json;

use super::program;

/// Something of each kind that quotes what it is about.
const SETUP: &str = "
    CREATE TABLE parents (id text PRIMARY KEY);
    INSERT INTO parents VALUES ('canary-parent');
    CREATE TABLE t (id text PRIMARY KEY, team text NOT NULL, v text CHECK (v NOT LIKE 'canary-check%'), u text UNIQUE,
        j json, parent text REFERENCES parents, day date, n int);
    INSERT INTO t SELECT 'canary-copied-' || g, 'canary-team', 'canary-copied-value', 'canary-unique-' || g, '{\"a\": \"canary-json\"}',
        'canary-parent', '2024-01-01', 731000000 + g FROM generate_series(1, 50) g;
    CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.v = 'canary-raise' THEN
            RAISE WARNING 'it was %', NEW.v;
            RAISE EXCEPTION 'not %', NEW.v USING DETAIL = NEW.id, HINT = coalesce(NEW.u, '');
        END IF;
        RETURN NEW; END $$;
    CREATE TRIGGER complain BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION complain()";

/// What programs write that Postgres refuses: what is found wrong is told with the value, by Postgres and its functions.
const REFUSED: &[(&str, &str)] = &[
    (
        "INSERT INTO t(id, team, v) VALUES('canary-1', 'canary-team', 'canary-check')",
        "23514",
    ),
    (
        "INSERT INTO t(id, team, u) VALUES('canary-2', 'canary-team', 'canary-unique-7')",
        "23505",
    ),
    (
        "INSERT INTO t(id, team) VALUES('canary-moved', 'canary-team')",
        "23505",
    ),
    (
        "INSERT INTO t(id, team, parent) VALUES('canary-3', 'canary-team', 'canary-nobody')",
        "23503",
    ),
    (
        "INSERT INTO t(id, team, j) VALUES('canary-4', 'canary-team', '{canary-json')",
        "22P02",
    ),
    (
        "UPDATE t SET day = 'canary-day' WHERE id = 'canary-copied-2'",
        "22007",
    ),
    (
        "INSERT INTO t(id, team, v) VALUES('canary-5', 'canary-team', 'canary-raise')",
        "P0001",
    ),
    (
        "INSERT INTO t(id, team) VALUES('canary-6', 'canary-other-team')",
        "AB100",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_in_a_log_at_some_level() {
    let server = Server::shared().await;
    let database = server.database().await;
    database.execute(SETUP).await;
    let token = "canary-token";
    let streamer = Streamer::config(&database)
        .toml(
            "[shape.s]
             params.team = { claim = \"team\" }
             params.some = { client = \"text[]\" }
             tables = [\"SELECT * FROM t WHERE team = $team AND (v IS NULL OR v <> ALL($some))\"]
             writable = true",
        )
        .token(token, json!({ "sub": "a", "team": "canary-team" }))
        .env("RUST_LOG", "trace")
        .start()
        .await;
    let mut chosen = toml::Table::new();
    chosen.insert("some".into(), vec!["canary-param"].into());
    let replica = Replica::config(&streamer)
        .token(token)
        .subscribe_with("s", chosen)
        .env("RUST_LOG", "trace")
        .start()
        .await;
    // The key of one is another's by the time that it is written: only Postgres knows that it is taken.
    let mine = [(
        "t",
        "SELECT * FROM t WHERE team = 'canary-team' AND (v IS NULL OR v <> 'canary-param')",
    )];
    replica.until_equal(&database, &mine).await;
    database
        .execute(
            "INSERT INTO t(id, team, v) VALUES('canary-streamed', 'canary-team', 'canary-streamed-value');
             UPDATE t SET id = 'canary-renamed', v = 'canary-updated' WHERE id = 'canary-copied-1';
             DELETE FROM t WHERE id = 'canary-copied-3';
             UPDATE t SET v = 'canary-param' WHERE id = 'canary-copied-4';
             INSERT INTO t(id, team) VALUES('canary-moved', 'canary-elsewhere')",
        )
        .await;
    replica.until_equal(&database, &mine).await;

    let file = program(&replica);
    file.execute_batch(
        "INSERT INTO t(id, team, v) VALUES('canary-written', 'canary-team', 'canary-written-value');
         UPDATE t SET v = 'canary-overwritten' WHERE id = 'canary-copied-5';
         DELETE FROM t WHERE id = 'canary-copied-6'",
    )
    .unwrap();
    for (sql, _) in REFUSED {
        file.execute_batch(sql).unwrap();
    }
    let rejected = || -> rusqlite::Result<Vec<String>> {
        let sql = "SELECT coalesce(sqlstate, outcome) FROM _anabranch_rejected ORDER BY id";
        let file = replica.open();
        let mut statement = file.prepare(sql)?;
        statement.query_map([], |row| row.get(0))?.collect()
    };
    until("all are answered", DEADLINE, || async {
        let rejected = rejected()?;
        let wanted: Vec<_> = REFUSED.iter().map(|(_, sqlstate)| *sqlstate).collect();
        anyhow::ensure!(rejected == wanted, "{rejected:?}");
        Ok(())
    })
    .await;
    // To whom it belongs it is told: the reason that the application gave is in the file.
    let sql = "SELECT message FROM _anabranch_rejected WHERE sqlstate = 'P0001'";
    let message: String = file.query_row(sql, [], |row| row.get(0)).unwrap();
    assert!(message.contains("canary-raise"), "{message}");
    replica.until_equal(&database, &mine).await;

    // A change that the shape can't be kept over stops the table, with rows on their way.
    database
        .execute(
            "ALTER TABLE t ALTER team TYPE json USING to_json(team);
             INSERT INTO t(id, team) VALUES('canary-behind', '\"canary-team\"')",
        )
        .await;
    until("the table is stopped", DEADLINE, || async {
        let sql = "SELECT state || ' ' || coalesce(reason, '') FROM _anabranch_tables WHERE table_name = 't'";
        let state: String = replica.open().query_row(sql, [], |row| row.get(0))?;
        anyhow::ensure!(state.starts_with("stopped"), "{state}");
        anyhow::ensure!(!state.contains("canary"), "{state}");
        Ok(())
    })
    .await;

    for (who, log) in [("streamer", streamer.log()), ("replica", replica.log())] {
        assert!(log.contains("TRACE"), "the {who} says little");
        for word in ["canary", "7310000", "63616e617279"] {
            let found: Vec<_> = log
                .lines()
                .filter(|line| line.contains(word))
                .take(5)
                .collect();
            assert!(found.is_empty(), "in the log of the {who}: {found:#?}");
        }
    }
    for peer in [&*streamer, &*replica] {
        for page in ["/status", "/metrics"] {
            let text = peer.get(page).await.unwrap().ok().unwrap();
            assert!(!text.contains("canary"), "{page}: {text}");
        }
    }
}
