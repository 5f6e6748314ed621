//! Keys that an issuer publishes: new ones, ones that are taken out, and an issuer that fails.

use std::time::Duration;

use anabranch_tests::{
    authority::Authority,
    caller::{self, hello},
    issuer::{Issuer, Signer, answer},
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::Value;
use tonic::{Code, Status};

use super::{SETUP, SHAPE, claims, last_error, metric};

/// The gap that is kept between two fetches for keys that are not known, and some time to fetch.
const GAP: Duration = Duration::from_secs(12);

async fn database() -> Database {
    let database = Server::shared().await.database().await;
    database.execute(SETUP).await;
    database
}

fn streamer(database: &Database, issuer: &Issuer, refresh_seconds: i64) -> Streamer {
    Streamer::config(database)
        .toml(SHAPE)
        .set("auth.jwt.jwks", issuer.url())
        .set("auth.jwt.jwks_refresh_seconds", refresh_seconds)
        .set("auth.jwt.audience", "anabranch")
        .prepare()
}

async fn open(streamer: &Streamer, token: &str) -> Result<caller::Stream, Status> {
    let channel = caller::channel(streamer.address()).await;
    caller::replicate(channel, Some(token), hello("r", "s")).await
}

async fn jwks(streamer: &Streamer) -> Value {
    let status = streamer.get("/status").await.unwrap().json().unwrap();
    status["jwks"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_no_longer_published_still_streams() {
    let database = database().await;
    let (old, kept, new) = (Signer::new("old"), Signer::new("kept"), Signer::new("new"));
    let issuer = Issuer::start(&[&old, &kept]).await;
    let streamer = streamer(&database, &issuer, 1);
    streamer.start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), old.token(&claims("a", 1, 600))).unwrap();
    let of_old = Replica::config(&streamer)
        .token_file(file.path())
        .subscribe("s")
        .start()
        .await;
    let of_kept = Replica::config(&streamer)
        .token(&kept.token(&claims("b", 1, 600)))
        .subscribe("s")
        .start()
        .await;
    assert_eq!(jwks(&streamer).await["keys"], 2);

    issuer.publish(&[&kept, &new]);
    until("the stream ends", DEADLINE, || async {
        let error = last_error(&of_old).await?;
        anyhow::ensure!(error.contains("published"), "{error}");
        Ok(())
    })
    .await;
    let refused = open(&streamer, &old.token(&claims("a", 1, 600))).await;
    assert_eq!(refused.err().unwrap().code(), Code::Unauthenticated);
    database
        .execute("UPDATE t SET v = 'after' WHERE team = 1")
        .await;
    let one = [("t", "SELECT * FROM t WHERE team = 1")];
    of_kept.until_equal(&database, &one).await;
    let sql = "SELECT count(*) FROM t WHERE v = 'after'";
    let seen: i64 = (of_old.open())
        .query_row(sql, [], |row| row.get(0))
        .unwrap();
    assert_eq!(seen, 0);
    // The same name for another key is no way back in.
    let impostor = Signer::new("old");
    issuer.publish(&[&kept, &new, &impostor]);
    until("they are fetched", DEADLINE, || async {
        jwks(&streamer).await["keys"] == 3
    })
    .await;
    let refused = open(&streamer, &old.token(&claims("a", 1, 600))).await;
    assert!(refused.err().unwrap().message().contains("signature"));

    // It goes on with a token under a new key.
    std::fs::write(file.path(), new.token(&claims("a", 1, 600))).unwrap();
    of_old.until_equal(&database, &one).await;
    assert_eq!(
        metric(&of_kept, "anabranch_replica_streams_total").await,
        1.0
    );
}

/// Line 3, of published keys.
#[tokio::test(flavor = "multi_thread")]
async fn a_kid_or_an_algorithm_opens_what_it_should_not() {
    let database = database().await;
    let (signer, other) = (Signer::new("a"), Signer::new("b"));
    let issuer = Issuer::start(&[&signer, &other]).await;
    let streamer = streamer(&database, &issuer, 3600);
    streamer.start().await;
    let good = claims("a", 1, 600);
    assert!(open(&streamer, &signer.token(&good)).await.is_ok());
    let with = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        signer.token(&claims)
    };
    // The public key, which everybody has, as the secret of an HMAC: in each form that it has.
    let confused = |secret: &[u8]| {
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("a".into());
        encode(&header, &good, &EncodingKey::from_secret(secret)).unwrap()
    };
    let jwk = signer.jwk();
    let body = signer.token(&good);
    let body = body.split('.').nth(1).unwrap();
    let mut refused = vec![
        confused(signer.public_pem().as_bytes()),
        confused(jwk.to_string().as_bytes()),
        confused(jwk["x"].as_str().unwrap().as_bytes()),
        // {"alg":"none","kid":"a"}
        format!("eyJhbGciOiJub25lIiwia2lkIjoiYSJ9.{body}."),
        // Signed by one, named as the other.
        signer.token_named(Some("b"), &good),
        // Two are published, and it names none.
        signer.token_named(None, &good),
        with("exp", Value::Null),
        with("exp", (anabranch_tests::issuer::at(-61)).into()),
        with("nbf", (anabranch_tests::issuer::at(90)).into()),
        with("aud", "another".into()),
        with("aud", Value::Null),
    ];
    for kid in [
        "../../../etc/passwd",
        "/dev/null",
        "a' OR '1'='1",
        "http://127.0.0.1:1/jwks",
        "a\u{0}",
        "",
        &"k".repeat(4000),
    ] {
        refused.push(signer.token_named(Some(kid), &good));
    }
    for token in refused {
        let status = open(&streamer, &token).await.expect_err("it is refused");
        assert_eq!(status.code(), Code::Unauthenticated, "{token}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_waits_or_made_up_ones_flood_the_issuer() {
    let database = database().await;
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let issuer = Issuer::start(&[&old]).await;
    let streamer = streamer(&database, &issuer, 3600);
    streamer.start().await;
    assert_eq!(issuer.asked(), 1);
    issuer.publish(&[&old, &new]);
    // Nothing but a token that names the key makes the streamer look.
    until("a token under the new key is good", DEADLINE, || async {
        open(&streamer, &new.token(&claims("a", 1, 600)))
            .await
            .map_err(|status| status.message().to_owned())
    })
    .await;
    assert_eq!(issuer.asked(), 2);
    assert!(
        open(&streamer, &old.token(&claims("a", 1, 600)))
            .await
            .is_ok()
    );

    // Names that nobody has, for longer than the gap: one fetch for all of them.
    let began = std::time::Instant::now();
    let mut calls = 0;
    while began.elapsed() < GAP {
        let made_up = Signer::new(&format!("made-up-{calls}"));
        let refused = open(&streamer, &made_up.token(&claims("a", 1, 600))).await;
        assert_eq!(refused.err().unwrap().code(), Code::Unauthenticated);
        calls += 1;
    }
    assert!(calls > 20, "{calls}");
    assert!(issuer.asked() <= 4, "{} for {calls} calls", issuer.asked());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_that_fails_ends_streams_or_goes_unsaid() {
    let database = database().await;
    let signer = Signer::new("a");
    let issuer = Issuer::start(&[&signer]).await;
    let streamer = streamer(&database, &issuer, 1);
    streamer.start().await;
    let replica = Replica::config(&streamer)
        .token(&signer.token(&claims("a", 1, 600)))
        .subscribe("s")
        .start()
        .await;
    let huge = format!("{{\"keys\": [], \"x\": \"{}\"}}", "x".repeat(1 << 20));
    for (answer, complaint) in [
        (answer("500 Internal Server Error", "no"), "500"),
        (answer("200 OK", "<html>welcome</html>"), "no JSON"),
        (answer("200 OK", "{}"), "no list `keys`"),
        (answer("200 OK", &huge), "limit"),
        (
            "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n".into(),
            "not followed",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{".into(),
            "can't be read",
        ),
        ("no HTTP at all".into(), "HTTP"),
    ] {
        issuer.say(answer);
        until(complaint, DEADLINE, || async {
            let jwks = jwks(&streamer).await;
            let error = jwks["error"].as_str().unwrap_or_default();
            anyhow::ensure!(error.contains(complaint), "{jwks}");
            anyhow::ensure!(jwks["keys"] == 1, "{jwks}");
            Ok(())
        })
        .await;
        assert!(streamer.log().contains("those that came last count on"));
    }
    assert!(
        open(&streamer, &signer.token(&claims("a", 1, 600)))
            .await
            .is_ok()
    );
    issuer.publish(&[&signer]);
    until("it is well again", DEADLINE, || async {
        jwks(&streamer).await["error"].is_null()
    })
    .await;
    database.execute("UPDATE t SET v = v || '!'").await;
    let one = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(&database, &one).await;
    assert_eq!(
        metric(&replica, "anabranch_replica_streams_total").await,
        1.0
    );
    assert_eq!(last_error(&replica).await.unwrap(), "");

    // No key at all is a word too.
    issuer.publish(&[]);
    until("the stream ends", DEADLINE, || async {
        let error = last_error(&replica).await?;
        anyhow::ensure!(error.contains("published"), "{error}");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_keys_lets_everybody_in_or_says_nothing_of_use() {
    let database = database().await;
    let issuer = Issuer::start(&[]).await;
    let streamer = streamer(&database, &issuer, 1);
    streamer.spawn();
    assert_eq!(streamer.exit().await.code(), Some(1));
    let log = streamer.log();
    assert!(log.contains("auth.jwt.jwks"), "{log}");
    assert!(log.contains("the list `keys` is empty"), "{log}");
    assert!(log.contains("see that this machine reaches"), "{log}");

    // An issuer whose certificate is of an authority that is not the one that is named; then of that one.
    let (authority, other) = (Authority::new(), Authority::new());
    let signer = Signer::new("a");
    let issuer = Issuer::start_tls(&[&signer], &authority).await;
    let file = |authority: &Authority| {
        let file = authority.file("ca.crt", &authority.pem());
        file.to_str().unwrap().to_owned()
    };
    streamer.reconfigure("auth.jwt.jwks", issuer.url());
    streamer.reconfigure("auth.jwt.jwks_ca", file(&other));
    streamer.spawn();
    assert_eq!(streamer.exit().await.code(), Some(1));
    assert!(streamer.log().contains("TLS: "), "{}", streamer.log());
    streamer.reconfigure("auth.jwt.jwks_ca", "/nonexistent.crt");
    streamer.spawn();
    assert_eq!(streamer.exit().await.code(), Some(2));
    streamer.reconfigure("auth.jwt.jwks_ca", file(&authority));
    streamer.start().await;
    assert!(
        open(&streamer, &signer.token(&claims("a", 1, 600)))
            .await
            .is_ok()
    );
}
