//! What one tenant tries with what belongs to another.

use anabranch_proto::v1::{self, write_down, write_up};
use anabranch_tests::{
    caller::{self, First, hello},
    peers::{Replica, Streamer},
    postgres::Server,
    wait::{DEADLINE, until},
};
use tonic::Code;

use super::{Fixture, SETUP, SHAPE};

/// Whether rows that a team may see are among these bytes. Rows travel as SQLite's records, in which text is as it is.
fn shows(first: &First, team: i64) -> bool {
    let canary = format!("canary-of-team-{team}");
    let canary = canary.as_bytes();
    first.rows.windows(canary.len()).any(|word| word == canary)
}

async fn first(fixture: &Fixture, token: &str, hello: v1::Hello) -> First {
    let stream = caller::replicate(fixture.channel().await, Some(token), hello).await;
    stream.unwrap().first().await.unwrap()
}

/// Lines 2 and 15: ids and cursors of others, of other histories, and such as nobody gave.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_cursor_is_believed() {
    let fixture = Fixture::start(|config| config).await;
    let (one, two) = (fixture.token("a", 1), fixture.token("b", 2));
    let own = first(&fixture, &one, hello("victim", "s")).await;
    assert!(own.reset > 0 && shows(&own, 1) && !shows(&own, 2));
    let with = |id: &str, token: &[u8]| v1::Hello {
        resume_token: token.to_vec().into(),
        ..hello(id, "s")
    };
    // Its own proves what it has: nothing comes again.
    let again = first(&fixture, &one, with("victim", &own.resume_token)).await;
    assert!(again.reset == 0 && !shows(&again, 1));

    // The same rights under another subject, another id, and both; then other rights with all that the victim has.
    let same_rights = fixture.token("c", 1);
    for (token, id) in [
        (&one, "thief"),
        (&same_rights, "victim"),
        (&same_rights, "thief"),
    ] {
        let got = first(&fixture, token, with(id, &own.resume_token)).await;
        assert!(got.reset > 0 && shows(&got, 1), "{id}");
    }
    for id in ["victim", "thief"] {
        let hello = v1::Hello {
            token_replica_id: "victim".into(),
            ..with(id, &own.resume_token)
        };
        let got = first(&fixture, &two, hello).await;
        assert!(got.reset > 0 && shows(&got, 2) && !shows(&got, 1), "{id}");
    }

    // Another source, whose epoch is another and whose key is too.
    let database = Server::shared().await.database().await;
    database.execute(SETUP).await;
    let other = Streamer::config(&database)
        .toml(SHAPE)
        .token("of-other", serde_json::json!({ "sub": "a", "team_id": 1 }))
        .start()
        .await;
    let foreign = caller::replicate(
        caller::channel(other.address()).await,
        Some("of-other"),
        hello("victim", "s"),
    );
    let foreign = foreign.await.unwrap().first().await.unwrap().resume_token;
    let mut tokens = vec![foreign, b"x".to_vec(), vec![0; 1000], vec![255; 60_000]];
    let real = &own.resume_token;
    for at in 0..real.len() {
        let mut flipped = real.clone();
        flipped[at] ^= 1 << (at % 8);
        tokens.push(flipped);
    }
    for length in [1, 8, 19, real.len() - 1] {
        tokens.push(real[..length].to_vec());
    }
    tokens.push([&real[..], &[0]].concat());
    for token in tokens {
        let got = first(&fixture, &one, with("victim", &token)).await;
        assert!(got.reset > 0 && shows(&got, 1), "{token:?}");
    }
}

/// What a Hello says beside its token of access.
#[tokio::test(flavor = "multi_thread")]
async fn a_hello_that_is_nonsense_is_taken_in() {
    let fixture = Fixture::start(|config| config).await;
    let token = fixture.token("a", 1);
    let good = || hello("r", "s");
    let subscription = |params: &[(&str, &str)]| v1::Subscription {
        shape: "s".into(),
        params: params
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
    };
    let injection = "s\"; DROP TABLE t; --";
    for (hello, expected) in [
        (hello("", "s"), Code::InvalidArgument),
        (hello(&"r".repeat(65), "s"), Code::InvalidArgument),
        (hello("../r", "s"), Code::InvalidArgument),
        (hello("r'; DROP TABLE t; --", "s"), Code::InvalidArgument),
        (hello("r", injection), Code::NotFound),
        (hello("r", ""), Code::NotFound),
        // The claim decides, and whoever names it himself is told so.
        (
            v1::Hello {
                subscriptions: vec![subscription(&[("team", "2")])],
                ..good()
            },
            Code::InvalidArgument,
        ),
        (
            v1::Hello {
                subscriptions: vec![subscription(&[(injection, "2")])],
                ..good()
            },
            Code::InvalidArgument,
        ),
        (
            v1::Hello {
                subscriptions: Vec::new(),
                ..good()
            },
            Code::InvalidArgument,
        ),
        (
            v1::Hello {
                subscriptions: vec![subscription(&[]); 101],
                ..good()
            },
            Code::InvalidArgument,
        ),
        (
            v1::Hello {
                resume_token: vec![1; 200_000].into(),
                ..good()
            },
            Code::InvalidArgument,
        ),
        (
            v1::Hello {
                token_replica_id: "../x".into(),
                ..good()
            },
            Code::InvalidArgument,
        ),
        (
            v1::Hello {
                protocol_version: 3,
                ..good()
            },
            Code::InvalidArgument,
        ),
    ] {
        let channel = fixture.channel().await;
        let refused = caller::replicate(channel, Some(&token), hello).await;
        let status = refused.expect_err("it is refused");
        assert_eq!(status.code(), expected, "{status:?}");
    }
    // It is all there still.
    let got = first(&fixture, &token, good()).await;
    assert!(shows(&got, 1));
}

/// Lines 2 and 15 of writing: an id of another subject tells and takes nothing, and what does not follow is not made.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_under_a_foreign_id_or_out_of_its_order_is_made() {
    let fixture = Fixture::start(|config| config).await;
    let (one, two) = (fixture.token("a", 1), fixture.token("b", 2));
    let replica = Replica::config(&fixture.streamer)
        .token(&one)
        .subscribe("s")
        .start()
        .await;
    super::program(&replica)
        .execute("INSERT INTO t VALUES (100, 1, 'written')", [])
        .unwrap();
    until("it is written", DEADLINE, || async {
        let sql = "SELECT FROM t WHERE id = 100";
        fixture.database.query(sql, &[]).await.len() == 1
    })
    .await;
    let status = replica.get("/status").await.unwrap().json().unwrap();
    let victim = status["replica_id"].as_str().unwrap().to_owned();

    let mut thief = caller::write(fixture.channel().await, Some(&two), &victim, "s")
        .await
        .unwrap();
    let Ok(write_down::Kind::Ready(ready)) = thief.next().await else {
        panic!("it is not ready")
    };
    assert!(ready.other_subject && ready.seq == 0, "{ready:?}");
    assert!(ready.hash.iter().all(|byte| *byte == 0), "{ready:?}");
    let transaction = |seq, hash: u8| {
        write_up::Kind::Transaction(v1::LocalTransaction {
            seq,
            hash: vec![hash; 32].into(),
            ..v1::LocalTransaction::default()
        })
    };
    thief.say(transaction(1, 0)).await;
    let status = thief.until_over().await;
    let refused = [Code::PermissionDenied, Code::Aborted];
    assert!(refused.contains(&status.code()), "{status:?}");

    // A jump, and a hash that does not follow, of an id of one's own.
    for (id, seq) in [("jumper", 7), ("forger", 1)] {
        let channel = fixture.channel().await;
        let mut call = caller::write(channel, Some(&two), id, "s").await.unwrap();
        assert!(matches!(call.next().await, Ok(write_down::Kind::Ready(_))));
        call.say(transaction(seq, 9)).await;
        let status = call.until_over().await;
        assert_eq!(status.code(), Code::Aborted, "{id}: {status:?}");
    }
    let rows = fixture.database.query("SELECT FROM t", &[]).await;
    assert_eq!(rows.len(), 31);
}
