//! JSON web tokens: what is not proved is refused, and what has expired ends.

use std::{
    fs,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use tempfile::TempDir;

const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";

/// What the streamer allows clocks to differ by.
const LEEWAY_SECONDS: i64 = 60;

/// Seconds since 1970, so many seconds from now.
fn at(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs().cast_signed() + seconds
}

fn sign(algorithm: Algorithm, key: &[u8], claims: &Value) -> String {
    encode(
        &Header::new(algorithm),
        claims,
        &EncodingKey::from_secret(key),
    )
    .unwrap()
}

/// One that is good for so many seconds, the leeway included.
fn good_for(seconds: i64, team: i64) -> String {
    let claims = json!({ "sub": "a", "aud": "anabranch", "exp": at(seconds - LEEWAY_SECONDS), "team_id": team });
    sign(Algorithm::HS256, KEY, &claims)
}

async fn start(database: &Database, dir: &Path) -> Streamer {
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY, team int); INSERT INTO t SELECT g, g % 3 FROM generate_series(1, 30) g")
        .await;
    let key = dir.join("jwt.key");
    fs::write(&key, KEY).unwrap();
    Streamer::config(database)
        .toml("[shape.s]\nparams.team = { claim = \"team_id\" }\ntables = [\"SELECT * FROM t WHERE team = $team\"]")
        .set("auth.jwt.hs256_file", key.to_str().unwrap())
        .set("auth.jwt.audience", "anabranch")
        .start()
        .await
}

/// What `/status` says last went wrong.
async fn last_error(replica: &Replica) -> anyhow::Result<String> {
    let status = replica.get("/status").await?.json()?;
    Ok(status["last_error"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_proves_nothing_is_refused_with_the_reason() {
    let database = Server::shared().await.database().await;
    let dir = TempDir::new().unwrap();
    let streamer = start(&database, dir.path()).await;
    let claims = json!({ "sub": "a", "aud": "anabranch", "exp": at(600), "team_id": 1 });
    let with = |name: &str, value: Value| {
        let mut claims = claims.clone();
        claims[name] = value;
        sign(Algorithm::HS256, KEY, &claims)
    };
    let mut no_expiry = claims.clone();
    no_expiry.as_object_mut().unwrap().remove("exp");
    let good = sign(Algorithm::HS256, KEY, &claims);
    // `none`, and the body of a good one.
    let body = good.split('.').nth(1).unwrap();
    let unsigned = format!("eyJhbGciOiJub25lIn0.{body}.");
    let tokens = [
        (
            sign(Algorithm::HS256, &[b'x'; 32], &claims),
            "signature is wrong",
        ),
        (
            sign(Algorithm::HS512, &KEY.repeat(2), &claims),
            "not signed with the algorithm",
        ),
        (unsigned, "the token"),
        (with("aud", json!("somebody-else")), "another audience"),
        (with("exp", json!(at(-LEEWAY_SECONDS - 60))), "has expired"),
        (with("nbf", json!(at(LEEWAY_SECONDS + 60))), "not valid yet"),
        (with("team_id", Value::Null), "team"),
        (
            sign(Algorithm::HS256, KEY, &no_expiry),
            "lacks a mandatory claim",
        ),
    ];
    let accepted = Replica::config(&streamer)
        .token(&good)
        .subscribe("s")
        .start()
        .await;
    let replicas: Vec<_> = tokens
        .iter()
        .map(|(token, _)| {
            let replica = Replica::config(&streamer)
                .token(token)
                .subscribe("s")
                .prepare();
            replica.spawn();
            replica
        })
        .collect();
    for (replica, (token, complaint)) in replicas.iter().zip(&tokens) {
        until(&format!("refused: {complaint}"), DEADLINE, || async {
            let error = last_error(replica).await?;
            anyhow::ensure!(error.contains(complaint), "{error}");
            Ok(())
        })
        .await;
        let rows = replica.open().prepare("SELECT * FROM t").map(|_| ());
        assert!(rows.is_err(), "{complaint}: it has the table");
        for log in [replica.log(), streamer.log()] {
            assert!(!log.contains(token.as_str()), "a token is in a log");
        }
    }
    let one = [("t", "SELECT * FROM t WHERE team = 1")];
    accepted.until_equal(&database, &one).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_ends_the_stream_until_there_is_another() {
    let database = Server::shared().await.database().await;
    let dir = TempDir::new().unwrap();
    let streamer = start(&database, dir.path()).await;
    let other = Replica::config(&streamer)
        .token(&good_for(600, 1))
        .subscribe("s")
        .start()
        .await;
    let file = dir.path().join("token");
    let replica = Replica::config(&streamer)
        .token_file(&file)
        .subscribe("s")
        .prepare();
    // As long as this machine needs to have a stream before the token is over.
    let mut seconds = 4;
    loop {
        fs::write(&file, good_for(seconds, 1)).unwrap();
        replica.spawn();
        let streams = until("it streams, or is too late", DEADLINE, || async {
            let status = replica.get("/status").await?.json()?;
            let (streams, error) = (status["caught_up"] == true, status["last_error"].as_str());
            anyhow::ensure!(streams || error.is_some(), "{status}");
            Ok(streams)
        })
        .await;
        if streams {
            break;
        }
        replica.kill();
        seconds *= 2;
        assert!(seconds < 100, "{}", replica.log());
    }
    until("the stream ends", 2 * DEADLINE, || async {
        let error = last_error(&replica).await?;
        anyhow::ensure!(error.contains("expired"), "{error}");
        Ok(())
    })
    .await;
    database.execute("UPDATE t SET team = 1 WHERE id = 2").await;
    other.until_caught_up(&database).await;
    let rows = |replica: &Replica, sql: &str| -> i64 {
        let file = replica.open();
        file.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    assert_eq!(rows(&other, "SELECT count(*) FROM t"), 11);
    assert_eq!(rows(&replica, "SELECT count(*) FROM t"), 10);
    assert_eq!(
        rows(
            &replica,
            "SELECT connected + caught_up FROM _anabranch_status"
        ),
        0
    );

    // The same replica in another team: it has what that may have, and nothing of the old.
    fs::write(&file, good_for(600, 2)).unwrap();
    let two = [("t", "SELECT * FROM t WHERE team = 2")];
    replica.until_equal(&database, &two).await;
}
