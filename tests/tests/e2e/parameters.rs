//! Parameters that the replica chooses, beside those of its token: they narrow, and never widen.

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use serde_json::json;

const SHAPE: &str = r#"
    [shape.s]
    params.team = { claim = "team_id" }
    params.from = { client = "int8" }
    params.states = { client = "text[]" }
    tables = ["SELECT * FROM t WHERE team = $team AND id >= $from AND state = ANY($states)"]"#;

/// What nobody should take for SQL.
const ODD: &str = "it's $from' OR 'a' = 'a";

async fn start() -> (Database, Streamer) {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id bigint PRIMARY KEY, team int, state text);
             INSERT INTO t SELECT g, g % 3, (ARRAY['open', 'done', 'odd'])[1 + g % 7 % 3] FROM generate_series(1, 300) g;
             INSERT INTO t VALUES (9007199254740993, 1, 'open'), (9007199254740992, 1, 'open')",
        )
        .await;
    let streamer = Streamer::config(&database)
        .toml(SHAPE)
        .token("token-one", json!({ "sub": "a", "team_id": 1 }))
        .token("token-two", json!({ "sub": "b", "team_id": 2 }))
        .start()
        .await;
    (database, streamer)
}

fn chosen(from: i64, states: &[&str]) -> toml::Table {
    let mut chosen = toml::Table::new();
    chosen.insert("from".into(), from.into());
    chosen.insert("states".into(), states.to_vec().into());
    chosen
}

fn select(team: i64, from: i64, states: &[&str]) -> String {
    let quoted: Vec<_> = states
        .iter()
        .map(|state| format!("'{}'", state.replace('\'', "''")))
        .collect();
    let states = quoted.join(", ");
    format!(
        "SELECT * FROM t WHERE team = {team} AND id >= {from} AND state = ANY(ARRAY[{states}]::text[])"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_replica_chooses_narrows_what_its_token_allows() {
    let (database, streamer) = start().await;
    let choices: [(&str, i64, i64, &[&str]); 5] = [
        ("token-one", 1, 1, &["open", "done"]),
        ("token-one", 1, 100, &["open"]),
        // A float would take it for its neighbour.
        ("token-one", 1, 9_007_199_254_740_993, &["open"]),
        ("token-two", 2, -5, &[ODD, "done"]),
        ("token-two", 2, 1, &[]),
    ];
    let mut replicas = Vec::new();
    for (token, team, from, states) in choices {
        let replica = Replica::config(&streamer)
            .token(token)
            .subscribe_with("s", chosen(from, states))
            .start()
            .await;
        replicas.push((replica, select(team, from, states)));
    }
    let changes = [
        "UPDATE t SET id = id + 90 WHERE id BETWEEN 290 AND 400".to_owned(),
        format!("UPDATE t SET state = '{}' WHERE id % 5 = 0", ODD.replace('\'', "''")),
        "UPDATE t SET team = (team + 1) % 3, state = 'open' WHERE id % 4 = 0".to_owned(),
        "BEGIN; UPDATE t SET state = 'done' WHERE id < 150; DELETE FROM t WHERE id % 11 = 0; COMMIT".to_owned(),
    ];
    for change in changes {
        database.execute(&change).await;
        for (replica, select) in &replicas {
            replica.until_equal(&database, &[("t", select)]).await;
        }
    }
    // It chooses anew: what it had and still may have stays, the rest goes.
    let (replica, _) = &replicas[1];
    replica.kill();
    let mut subscription = toml::Table::new();
    subscription.insert("shape".into(), "s".into());
    subscription.insert("params".into(), chosen(120, &["done", ODD]).into());
    replica.reconfigure("subscribe", vec![toml::Value::from(subscription)]);
    replica.start().await;
    until("it has what it chose now", DEADLINE, || async {
        let status = replica.get("/status").await?.json()?;
        anyhow::ensure!(status["caught_up"] == true, "{status}");
        Ok(())
    })
    .await;
    database
        .execute("UPDATE t SET state = 'done' WHERE id BETWEEN 110 AND 130")
        .await;
    let now = select(1, 120, &["done", ODD]);
    replica.until_equal(&database, &[("t", &now)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_choice_that_is_not_the_replicas_or_of_another_type_is_refused_by_name() {
    let (_database, streamer) = start().await;
    let with = |name: &str, value: toml::Value| {
        let mut chosen = chosen(1, &["open"]);
        chosen.insert(name.into(), value);
        chosen
    };
    let mut without = chosen(1, &["open"]);
    without.remove("from");
    let refused = [
        (without, "from", "the replica must choose it"),
        (
            with("from", "ten".into()),
            "from",
            "not a value of type int8",
        ),
        (with("from", 1.5.into()), "from", "is needed for int8"),
        (
            with("states", "open".into()),
            "states",
            "an array is needed",
        ),
        (
            with("from", vec![1, 2].into()),
            "from",
            "one value is needed",
        ),
        // Those of the token are not the replica's to choose, and neither is what the shape does not have.
        (
            with("team", 2.into()),
            "team",
            "not one that the replica may choose",
        ),
        (
            with("other", 2.into()),
            "other",
            "not one that the replica may choose",
        ),
    ];
    let replicas: Vec<_> = refused
        .iter()
        .map(|(chosen, ..)| {
            let replica = Replica::config(&streamer)
                .token("token-one")
                .subscribe_with("s", chosen.clone())
                .prepare();
            replica.spawn();
            replica
        })
        .collect();
    for (replica, (_, name, words)) in replicas.iter().zip(&refused) {
        until(&format!("refused: {name}: {words}"), DEADLINE, || async {
            let status = replica.get("/status").await?.json()?;
            let error = status["last_error"].as_str().unwrap_or_default();
            anyhow::ensure!(error.contains(name) && error.contains(words), "{status}");
            Ok(())
        })
        .await;
        assert!(replica.open().prepare("SELECT * FROM t").is_err(), "{name}");
    }
}
