//! What one subject may do, and what becomes of the others meanwhile.

use std::time::{Duration, Instant};

use anabranch_proto::PUSHBACK;
use anabranch_tests::{
    caller::{self, hello},
    peers::Replica,
    wait::{DEADLINE, until},
};
use tonic::{Code, Status};

use super::{Fixture, last_error, metric};

fn pushback(status: &Status) -> Duration {
    let millis = status.metadata().get(PUSHBACK).expect("it says when");
    Duration::from_millis(millis.to_str().unwrap().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_subject_takes_the_streams_of_all() {
    let fixture = Fixture::start(|config| config.set("auth.limits.streams_max", 2)).await;
    let open = async |subject: &str, id: &str| {
        let token = fixture.token(subject, 1);
        let channel = fixture.channel().await;
        caller::replicate(channel, Some(&token), hello(id, "s")).await
    };
    let mut first = open("a", "one").await.unwrap();
    let mut second = open("a", "two").await.unwrap();
    first.first().await.unwrap();
    second.first().await.unwrap();
    let refused = open("a", "three").await.expect_err("it is refused");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("streams_max"), "{refused:?}");
    assert!(pushback(&refused) >= Duration::from_secs(1));
    // Writing has room of its own, and so has everybody else.
    let token = fixture.token("a", 1);
    let channel = fixture.channel().await;
    assert!(caller::write(channel, Some(&token), "w", "s").await.is_ok());
    let other = Replica::config(&fixture.streamer)
        .token(&fixture.token("b", 1))
        .subscribe("s")
        .start()
        .await;
    let one = [("t", "SELECT * FROM t WHERE team = 1")];
    other.until_equal(&fixture.database, &one).await;

    // A replica comes by itself when there is room, and not before it was told to.
    let waiting = Replica::config(&fixture.streamer)
        .token(&token)
        .subscribe("s")
        .prepare();
    waiting.spawn();
    until("it is refused", DEADLINE, || async {
        let error = last_error(&waiting).await?;
        anyhow::ensure!(error.contains("RESOURCE_EXHAUSTED"), "{error}");
        Ok(())
    })
    .await;
    let told = Instant::now();
    drop((first, second));
    waiting.until_ready().await;
    let waited = told.elapsed();
    assert!(waited > Duration::from_secs(3), "{waited:?}");
    waiting.until_equal(&fixture.database, &one).await;
    assert!(metric(&fixture.streamer, "anabranch_streamer_limited_total").await >= 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_subject_calls_again_and_again() {
    let fixture = Fixture::start(|config| config.set("auth.limits.calls_per_minute", 10)).await;
    let token = fixture.token("a", 1);
    let channel = fixture.channel().await;
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..100 {
        // Not even a Hello that is nonsense is read any more.
        let called = caller::replicate(channel.clone(), Some(&token), hello("", "s")).await;
        let status = called.expect_err("nobody has that id");
        match status.code() {
            Code::InvalidArgument => taken += 1,
            Code::ResourceExhausted => {
                let after = pushback(&status);
                assert!(after <= Duration::from_secs(6), "{after:?}");
                refused += 1;
            }
            _ => panic!("{status:?}"),
        }
    }
    // A few more than ten, for the time that it took.
    assert!((10..25).contains(&taken), "{taken}");
    assert_eq!(taken + refused, 100);
    let other = fixture.token("b", 1);
    let called = caller::replicate(channel, Some(&other), hello("r", "s")).await;
    assert!(called.is_ok());
}

/// A limit on writing makes it slow, and loses or rejects nothing; who is not concerned is as fast as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_writes_is_refused_or_keeps_others_waiting() {
    let fixture = Fixture::start(|config| config.set("auth.limits.writes_per_second", 10)).await;
    let start = async |subject: &str, team: i64| {
        Replica::config(&fixture.streamer)
            .token(&fixture.token(subject, team))
            .subscribe("s")
            .start()
            .await
    };
    let (flood, other) = (start("a", 1).await, start("b", 2).await);
    let program = super::program(&flood);
    // A hundred at once are allowed; then ten a second.
    for id in 1000..1160 {
        let row = (id, "x");
        program
            .execute("INSERT INTO t (id, team, v) VALUES (?1, 1, ?2)", row)
            .unwrap();
    }
    let began = Instant::now();
    let written = async |from: i32, below: i32| {
        let sql = "SELECT FROM t WHERE id >= $1 AND id < $2";
        fixture.database.query(sql, &[&from, &below]).await.len()
    };
    super::program(&other)
        .execute("INSERT INTO t (id, team, v) VALUES (2000, 2, 'y')", [])
        .unwrap();
    until("the other one's is made", DEADLINE, || async {
        written(2000, 2001).await == 1
    })
    .await;
    let others = began.elapsed();
    assert!(others < Duration::from_secs(3), "{others:?}");
    until("all are made", 2 * DEADLINE, || async {
        let count = written(1000, 1160).await;
        anyhow::ensure!(count == 160, "{count}");
        Ok(())
    })
    .await;
    let took = began.elapsed();
    assert!(took > Duration::from_secs(3), "{took:?}");
    assert_eq!(last_error(&flood).await.unwrap(), "");
    let rejected: i64 = (flood.open())
        .query_row("SELECT rejected FROM _anabranch_status", [], |row| {
            row.get(0)
        })
        .unwrap();
    assert_eq!(rejected, 0);
}
