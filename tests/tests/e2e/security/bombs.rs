//! Line 13: what is small on the wire, or in a config, and large behind it: compressed messages, and what is nested deeply.

use anabranch_proto::v1;
use anabranch_tests::{
    caller::{self, hello},
    peers::{Replica, Streamer},
    postgres::Server,
};
use prost::Message;
use serde_json::{Value, json};
use tonic::Code;

use super::{
    Fixture, claims,
    floods::{Post, post},
};

/// Zeros, about 158 times as many as it has bytes: RFC 1951 with the fixed codes, in RFC 1952's frame.
fn gzip_bomb(bytes: usize) -> Vec<u8> {
    let mut bomb = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let (mut held, mut count) = (0_u32, 0);
    let mut push = |code: u32, bits: u32| {
        // Codes have their first bit first.
        for bit in (0..bits).rev() {
            held |= (code >> bit & 1) << count;
            count += 1;
            if count == 8 {
                bomb.push(held as u8);
                (held, count) = (0, 0);
            }
        }
        bomb.len()
    };
    // The last block, with fixed codes (01, of which the lower bit is first); a zero.
    push(0b110, 3);
    push(0b0011_0000, 8);
    // Of what was one byte ago, 258 bytes.
    while push(0b1100_0101 << 5, 13) < bytes {}
    push(0, 7);
    push(0, 8);
    bomb
}

/// A message of gRPC that says that it is compressed.
fn compressed(bytes: &[u8]) -> Vec<u8> {
    let mut framed = vec![1];
    framed.extend((bytes.len() as u32).to_be_bytes());
    framed.extend(bytes);
    framed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_compressed_is_unpacked() {
    let fixture = Fixture::start(|config| config).await;
    let address = fixture.streamer.address().to_owned();
    let token = fixture.token("a", 1);
    // The same message as it is: it is read, and only its shape is not known.
    let up = v1::Up {
        kind: Some(v1::up::Kind::Hello(hello("r", "unknown"))),
    };
    let plain = up.encode_to_vec();
    let mut uncompressed = compressed(&plain);
    uncompressed[0] = 0;
    let ask = async |token: &str, path: &str, encoding: Option<&str>, body: &[u8]| {
        let headers = encoding.map(|encoding| ("grpc-encoding", encoding));
        let asked = Post {
            path,
            token,
            headers: headers.as_slice(),
        };
        post(&address, asked, body.to_vec()).await
    };
    let replicate = "/anabranch.v1.Anabranch/Replicate";
    let status = ask(&token, replicate, None, &uncompressed).await;
    assert_eq!(status, (Code::NotFound as i32).to_string());

    let zstd = zstd::bulk::compress(&vec![0; 1 << 30], 1).unwrap();
    let gzip = gzip_bomb(3 << 20);
    let bodies = [
        compressed(&zstd::bulk::compress(&plain, 1).unwrap()),
        compressed(&zstd),
        compressed(&gzip),
        compressed(&plain),
    ];
    let memory = fixture.streamer.memory_peak_bytes();
    let refused = [Code::Unimplemented, Code::Internal].map(|code| (code as i32).to_string());
    for path in [
        replicate,
        "/anabranch.v1.Anabranch/Write",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ] {
        for encoding in [
            None,
            Some("gzip"),
            Some("zstd"),
            Some("deflate"),
            Some("identity"),
            Some("gzip, zstd"),
            Some("../x"),
        ] {
            for body in &bodies {
                let status = ask(&token, path, encoding, body).await;
                // The stream of questions is over with what is none.
                let is_over = path.contains("Reflection") && status == "0";
                assert!(
                    refused.contains(&status) || is_over,
                    "{path} {encoding:?}: {status}"
                );
            }
        }
    }
    let grown = fixture.streamer.memory_peak_bytes() - memory;
    println!("{} KiB more for all of it", grown >> 10);
    assert!(grown < 32 << 20, "{grown} bytes more");
    let replica = Replica::config(&fixture.streamer)
        .token(&token)
        .subscribe("s")
        .start()
        .await;
    let mine = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(&fixture.database, &mine).await;
}

/// JSON that is nested as deeply as its bytes allow, where a client may send JSON.
#[tokio::test(flavor = "multi_thread")]
async fn json_that_is_nested_deeply_ends_the_streamer() {
    let fixture = Fixture::start(|config| {
        config.toml(
            "[shape.chosen]
             params.some = { client = \"text[]\" }
             tables = [\"SELECT * FROM t WHERE v = ANY($some)\"]",
        )
    })
    .await;
    let channel = fixture.channel().await;
    let token = fixture.token("a", 1);
    let deep = |open: &str, close: &str, bytes: usize| {
        let levels = bytes / (open.len() + close.len());
        open.repeat(levels) + &close.repeat(levels)
    };
    for text in [
        deep("[", "]", 60_000),
        deep("{\"a\":[", "]}", 60_000),
        "[".repeat(60_000),
        "[".repeat(5) + &"]".repeat(5),
        format!("[{}0]", "0,".repeat(10_000)),
        format!("1{}", "0".repeat(60_000)),
        "1e999999999".to_owned(),
    ] {
        let mut chosen = hello("r", "chosen");
        chosen.subscriptions[0]
            .params
            .insert("some".into(), text.clone());
        let refused = caller::replicate(channel.clone(), Some(&token), chosen).await;
        let status = refused.expect_err("it is refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().len() < 300, "{status:?}");
    }
    // In a claim that a shape uses; a token has room for less.
    for levels in [100, 120, 1000] {
        let mut claim = json!(1);
        for _ in 0..levels {
            claim = Value::Array(vec![claim]);
        }
        let mut claims = claims("a", 1, 600);
        claims["team_id"] = claim;
        let token = fixture.signer.token(&claims);
        let refused = caller::replicate(channel.clone(), Some(&token), hello("r", "s")).await;
        let status = refused.expect_err("it is refused");
        let expected = [Code::InvalidArgument, Code::Unauthenticated];
        assert!(expected.contains(&status.code()), "{levels}: {status:?}");
    }
    let good = caller::replicate(channel, Some(&token), hello("r", "s")).await;
    assert!(good.unwrap().first().await.unwrap().reset > 0);
}

/// No client sends conditions; whoever writes the config may have them made by a program.
#[tokio::test(flavor = "multi_thread")]
async fn a_condition_that_is_nested_deeply_or_long_ends_the_streamer() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (7, 'b')",
        )
        .await;
    let wrapped = |open: &str, close: &str, levels: usize| {
        format!("{}id = 7{}", open.repeat(levels), close.repeat(levels))
    };
    let subquery = "id IN (SELECT id FROM t WHERE ";
    for (condition, complaint) in [
        (wrapped("(", ")", 30_000), "nested deeper"),
        (wrapped("NOT ", "", 15_000), "nested deeper"),
        (wrapped("NOT (", ")", 10_000), "nested deeper"),
        (format!("id = {}7", "- ".repeat(30_000)), "nested deeper"),
        (
            format!("id = 7{}", " IS TRUE".repeat(8_000)),
            "nested deeper",
        ),
        (
            format!("id = 7{}", "::int4".repeat(10_000)),
            "nested deeper",
        ),
        (wrapped(subquery, ")", 1000), "subqueries"),
        (wrapped("/*", "", 30_000), "comment"),
        ("(".repeat(60_000), "nested deeper"),
        ("(".repeat(1_000_000), "longer than"),
    ] {
        let select = format!("SELECT * FROM t WHERE {condition}");
        let streamer = Streamer::config(&database).shape("s", &[&select]).prepare();
        let output = streamer.command("check").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        let start: String = condition.chars().take(30).collect();
        assert_eq!(output.status.code(), Some(2), "{start}: {output:?}");
        assert!(said.contains(complaint), "{start}: {said}");
        assert!(said.len() < 5_000, "{start}: {} bytes are said", said.len());
    }

    // Long, and not deep: it is taken, and means what it says.
    let terms = |between: &str, term: &dyn Fn(usize) -> String| {
        (0..4_000).map(term).collect::<Vec<_>>().join(between)
    };
    let selects = [
        terms(" OR ", &|i| format!("id = {}", i * 7 + 7)),
        terms(" AND ", &|i| format!("id <> {}", i * 7 + 1)),
        format!("id IN ({})", terms(", ", &|i| (i * 7).to_string())),
        format!("id = 7 OR v = '{}'", "%_".repeat(30_000)),
    ]
    .map(|condition| format!("SELECT * FROM t WHERE {condition}"));
    let mut config = Streamer::config(&database);
    for (i, select) in selects.iter().enumerate() {
        config = config.shape(&format!("s{i}"), &[select]);
    }
    let streamer = config.start().await;
    let wanted = [("t", "SELECT * FROM t WHERE id = 7")];
    for i in 0..selects.len() {
        let replica = Replica::config(&streamer)
            .subscribe(&format!("s{i}"))
            .start()
            .await;
        replica.until_equal(&database, &wanted).await;
        database.execute("UPDATE t SET v = v || '!'").await;
        replica.until_equal(&database, &wanted).await;
    }
}
