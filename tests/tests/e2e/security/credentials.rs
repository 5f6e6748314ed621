//! Tokens that end, are renewed, and are revoked, while streams stand.

use std::{
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anabranch_proto::v1::write_up;
use anabranch_tests::{
    caller::{self, hello},
    issuer::{LEEWAY_SECONDS, at},
    peers::Replica,
    wait::{DEADLINE, until},
};
use serde_json::{Value, json};
use tonic::Code;

use super::{Fixture, claims, last_error, metric};

/// How long a token of these tests lives, leeway included: as long as a busy machine needs to connect.
const LIFE_SECONDS: i64 = 8;

/// What may pass between the end of a token and that of its call.
const LATE_SECONDS: f64 = 3.0;

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs_f64()
}

/// With an id of the token's own.
fn with_id(mut claims: Value, id: &str) -> Value {
    claims["jti"] = id.into();
    claims
}

async fn until_past(seconds: i64) {
    until("the old token is over", DEADLINE, || async {
        now() > seconds as f64
    })
    .await;
}

/// Line 4. Each kind of call, with and without a newer token said in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_outlives_its_token() {
    let fixture = Fixture::start(|config| config).await;
    let end = at(LIFE_SECONDS);
    let short = |id: &str| {
        let claims = claims(id, 1, LIFE_SECONDS - LEEWAY_SECONDS);
        fixture.signer.token(&claims)
    };
    let open = async |id: &str| {
        let channel = fixture.channel().await;
        let token = short(id);
        let stream = caller::replicate(channel, Some(&token), hello(id, "s"));
        stream.await.unwrap()
    };
    let open_write = async |id: &str| {
        let channel = fixture.channel().await;
        let token = short(id);
        let write = caller::write(channel, Some(&token), id, "s");
        write.await.unwrap()
    };
    let (mut left, mut left_write) = (open("a").await, open_write("a").await);
    let (mut renewed, mut renewed_write) = (open("b").await, open_write("b").await);
    let longer = fixture.token("b", 1);
    renewed.renew(&longer).await;
    let renew = anabranch_proto::v1::Renew {
        token: longer.clone(),
    };
    renewed_write.say(write_up::Kind::Renew(renew)).await;

    let lived = async {
        tokio::join!(renewed.until_over(), renewed_write.until_over());
    };
    let ended = async {
        let (stream, write) = tokio::join!(async { (left.until_over().await, now()) }, async {
            (left_write.until_over().await, now())
        },);
        for (status, when) in [stream, write] {
            assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
            assert!(status.message().contains("expired"), "{status:?}");
            let late = when - end as f64;
            // Its seconds are whole ones.
            assert!((-1.5..LATE_SECONDS).contains(&late), "{late} s late");
        }
        until_past(end + 3).await;
    };
    tokio::select! {
        () = ended => {}
        () = lived => panic!("those with a newer token ended too"),
    }
}

/// The replica finds the newer token in its file by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_token_breaks_the_stream() {
    let fixture = Fixture::start(|config| config).await;
    let short = with_id(claims("a", 1, LIFE_SECONDS + 4 - LEEWAY_SECONDS), "first");
    let end = at(LIFE_SECONDS + 4);
    let file = fixture.token_file("token", &fixture.signer.token(&short));
    let replica = fixture.replica_by(&file).await;
    let newer = fixture
        .signer
        .token(&with_id(claims("a", 1, 600), "second"));
    fs::write(&file, &newer).unwrap();
    // Writes are on while it is renewed, by a call that was begun with the old one.
    super::program(&replica)
        .execute("INSERT INTO t VALUES (100, 1, 'before')", [])
        .unwrap();
    until_past(end + 2).await;
    super::program(&replica)
        .execute("INSERT INTO t VALUES (101, 1, 'after')", [])
        .unwrap();
    until("it is written", DEADLINE, || async {
        let sql = "SELECT FROM t WHERE id IN (100, 101)";
        fixture.database.query(sql, &[]).await.len() == 2
    })
    .await;
    fixture
        .database
        .execute("UPDATE t SET v = v || '!' WHERE id <= 10")
        .await;
    let mine = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(&fixture.database, &mine).await;
    assert_eq!(
        metric(&replica, "anabranch_replica_streams_total").await,
        1.0
    );
    let log = fixture.streamer.log();
    assert_eq!(log.matches("replica connected").count(), 1, "{log}");
    assert_eq!(last_error(&replica).await.unwrap(), "");
    for log in [replica.log(), fixture.streamer.log()] {
        assert!(!log.contains(&newer), "a token is in a log");
    }
}

/// Line 5, without waiting for the end of the old token.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_token_of_other_claims_leaves_the_old_rows() {
    let fixture = Fixture::start(|config| config).await;
    let file = fixture.token_file("token", &fixture.token("a", 1));
    let replica = fixture.replica_by(&file).await;
    fs::write(&file, fixture.token("a", 2)).unwrap();
    until("it has the rows of the other team", DEADLINE, || async {
        let sql = "SELECT group_concat(DISTINCT team) FROM t";
        let teams = (replica.open()).query_row(sql, [], |row| row.get::<_, String>(0));
        teams.is_ok_and(|teams| teams == "2")
    })
    .await;
    let two = [("t", "SELECT * FROM t WHERE team = 2")];
    replica.until_equal(&fixture.database, &two).await;
    // Not by an old token that ended: by the new one that came.
    assert!(replica.log().contains("ABORTED"), "{}", replica.log());
}

/// What is in the file may be anything for a while.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_token_that_is_no_good_ends_a_good_stream() {
    let fixture = Fixture::start(|config| config).await;
    let file = fixture.token_file("token", &fixture.token("a", 1));
    let replica = fixture.replica_by(&file).await;
    let stranger = anabranch_tests::issuer::Signer::new("a");
    let other = stranger.token(&claims("a", 2, 600));
    for (i, bad) in [other.as_str(), "half-a-tok", "", "a\nb"]
        .into_iter()
        .enumerate()
    {
        fs::write(&file, bad).unwrap();
        if i < 2 {
            until("the streamer refused it", DEADLINE, || async {
                let log = fixture.streamer.log();
                log.matches("a newer token is refused").count() > i
            })
            .await;
        }
    }
    fs::remove_file(&file).unwrap();
    fixture.database.execute("UPDATE t SET v = v || '!'").await;
    let one = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(&fixture.database, &one).await;
    assert_eq!(
        metric(&replica, "anabranch_replica_streams_total").await,
        1.0
    );
    assert!(
        !fixture.streamer.log().contains(&other),
        "a token is in a log"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_revoked_goes_on_streaming() {
    let list = tempfile::NamedTempFile::new().unwrap();
    let path = list.path().to_str().unwrap().to_owned();
    let fixture = Fixture::start(|config| config.set("auth.revoked_file", path)).await;
    let token =
        |subject: &str, id: &str| fixture.signer.token(&with_id(claims(subject, 1, 600), id));
    let open = async |subject: &str, id: &str| {
        let channel = fixture.channel().await;
        caller::replicate(channel, Some(&token(subject, id)), hello(id, "s")).await
    };
    let replica = Replica::config(&fixture.streamer)
        .token(&token("c", "three"))
        .subscribe("s")
        .start()
        .await;
    let mut by_subject = open("a", "one").await.unwrap();
    let mut by_token = open("b", "two").await.unwrap();
    let channel = fixture.channel().await;
    let mut write = caller::write(channel, Some(&token("a", "one")), "one", "s")
        .await
        .unwrap();
    fs::write(list.path(), "# lost\nsub a\njti two\n").unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), async {
        tokio::join!(
            by_subject.until_over(),
            by_token.until_over(),
            write.until_over()
        )
    });
    let (a, b, c) = ended.await.expect("they end");
    for status in [a, b, c] {
        assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
        assert!(status.message().contains("revoked"), "{status:?}");
    }
    for (subject, id) in [("a", "one"), ("a", "other"), ("x", "two")] {
        let refused = open(subject, id).await.expect_err("it is refused");
        assert!(refused.message().contains("revoked"), "{refused:?}");
    }
    // Nobody else is concerned: the same subject with another token, and who was connected before.
    assert!(open("b", "other").await.is_ok());
    fixture.database.execute("UPDATE t SET v = v || '!'").await;
    let one = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(&fixture.database, &one).await;
    assert_eq!(
        metric(&replica, "anabranch_replica_streams_total").await,
        1.0
    );

    // A file that can't be read lets nobody in again, and that is said.
    fs::write(list.path(), "sub a\njti two\nwho is this\n").unwrap();
    until("it is said", DEADLINE, || async {
        let status = fixture.streamer.get("/status").await?.json()?;
        let error = status["revoked"]["error"].as_str().unwrap_or_default();
        anyhow::ensure!(error.contains("line 3"), "{status}");
        anyhow::ensure!(status["revoked"]["entries"] == json!(2), "{status}");
        Ok(())
    })
    .await;
    assert!(open("a", "one").await.is_err());
    fs::write(list.path(), "").unwrap();
    until("it is let in again", DEADLINE, || async {
        open("a", "one").await.is_ok()
    })
    .await;
}
