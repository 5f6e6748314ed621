//! Lies about local writes: answers to what was never sent, and ids that are none. What is pending stays pending.

use anabranch_proto::{record::ValueRef, v1::write_down};

use super::*;

/// `items`, which programs may write and whose ids are leased, and the table of receipts with these rows.
fn writable(receipts: &[[ValueRef<'_>; 3]], lsn: u64) -> v1::Down {
    let mut items = table(1, "items");
    items.writable = true;
    items.columns[0].default_kind = v1::DefaultKind::Sequence as i32;
    let receipt_table = v1::Table {
        schema: "anabranch".into(),
        purpose: v1::Purpose::Receipts as i32,
        columns: vec![
            column("replica", v1::Storage::Text, 1),
            column("seq", v1::Storage::Integer, 0),
            column("hash", v1::Storage::Blob, 0),
        ],
        ..table(2, "replicas")
    };
    let mut elements = vec![
        begin(true, &[1, 2]),
        declare(items),
        declare(receipt_table),
        rows(
            1,
            upsert(&[ValueRef::Integer(1), ValueRef::Text("one")]),
            false,
        ),
    ];
    elements.extend(receipts.iter().map(|row| rows(2, upsert(row), false)));
    elements.push(commit(lsn));
    down(elements)
}

fn said(kind: write_down::Kind) -> v1::WriteDown {
    v1::WriteDown { kind: Some(kind) }
}

fn ready(seq: u64, hash: &[u8]) -> v1::WriteDown {
    said(write_down::Kind::Ready(v1::WriteReady {
        seq,
        hash: hash.to_vec().into(),
        transaction_bytes_max: 1 << 20,
        other_subject: false,
    }))
}

/// A replica with a pending write, behind a stream that stands.
async fn pending() -> (Victim, Answer) {
    let liar = Liar::start().await;
    let replica = Replica::config_at(&liar.url()).subscribe("all").prepare();
    replica.spawn();
    let mut victim = Victim {
        liar,
        replica,
        waiting: None,
        lsn: 0,
    };
    let stream = victim.call("Replicate").await.answer(&[]);
    assert!(stream.say(&writable(&[], 100)).await);
    victim.replica.until_ready().await;
    program(&victim.replica)
        .execute("INSERT INTO items VALUES (3, 'mine')", [])
        .unwrap();
    (victim, stream)
}

fn is_pending(replica: &Replica) {
    let sql = "SELECT (SELECT body FROM items WHERE id = 3), (SELECT count(*) FROM _anabranch_outbox), pending, rejected
               FROM _anabranch_status";
    let columns =
        |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?));
    let found: (String, i64, i64, i64) = replica.open().query_row(sql, [], columns).unwrap();
    assert_eq!(found, ("mine".into(), 1, 1, 0));
    let log = replica.log();
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_a_write_that_was_never_sent_takes_what_is_pending() {
    use ValueRef::{Blob, Integer, Text};
    let (mut victim, mut stream) = pending().await;
    let status = victim.replica.get("/status").await.unwrap();
    let status = status.json().unwrap();
    let id = status["replica_id"].as_str().unwrap().to_owned();
    for (lsn, seq, hash) in [
        (101, 1, vec![7; 32]),
        (102, 5, vec![0; 32]),
        (103, i64::MAX, Vec::new()),
        (104, i64::MIN, vec![1]),
    ] {
        let receipt = [Text(&id), Integer(seq), Blob(&hash)];
        // In a stream of its own, since with a doubt it asks, and may begin anew.
        victim.again();
        drop(stream);
        stream = victim.call("Replicate").await.answer(&[]);
        assert!(stream.say(&writable(&[receipt], lsn)).await);
        victim.replica.until_at(anabranch_proto::Lsn(lsn)).await;
        is_pending(&victim.replica);
    }
    // The call for writes: where it stands is what cannot be, what is judged is not what was asked for, and then nonsense.
    let judged = |nonce: Vec<u8>| {
        said(write_down::Kind::Judged(v1::WriteJudged {
            claimed: vec![v1::Claimed {
                nonce: nonce.into(),
                outcome: "applied'; --".into(),
                sqlstate: "\u{1b}".into(),
            }],
            kept_since: u64::MAX,
            lsn: u64::MAX,
        }))
    };
    let unset = v1::WriteDown { kind: None };
    for lie in [
        vec![ready(u64::MAX, &[7; 32]), judged(vec![1; 3])],
        vec![ready(1, &[7; 32]), judged(vec![7; 16]), judged(vec![8; 16])],
        vec![ready(0, &[]), judged(vec![7; 16])],
        vec![ready(0, &[0; 32]), ready(0, &[0; 32])],
        vec![judged(vec![7; 16])],
        vec![unset],
    ] {
        victim.again();
        drop(stream);
        stream = victim.call("Replicate").await.answer(&[]);
        assert!(stream.say(&writable(&[], 105)).await);
        let write = victim.call("Write").await.answer(&[]);
        for message in &lie {
            if !write.say(message).await {
                break;
            }
        }
        // It gives up the call, and makes another one; or it begins anew, under another id.
        let _next = victim.liar.call().await;
        is_pending(&victim.replica);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_none_are_given_to_programs_or_end_the_replica() {
    let (mut victim, _stream) = pending().await;
    let write = victim.call("Write").await.answer(&[]);
    assert!(write.say(&ready(0, &[0; 32])).await);
    let ids = |blocks: Vec<(i64, i64, i64)>| {
        let block = |(first, last, step)| v1::Block { first, last, step };
        said(write_down::Kind::Ids(v1::Ids {
            schema: "public".into(),
            table: "items".into(),
            blocks: blocks.into_iter().map(block).collect(),
        }))
    };
    let lies = [
        vec![(1, 10, 0)],
        vec![(10, 1, 1)],
        vec![(1, 10, -1)],
        vec![(1, 10, 2)],
        vec![(i64::MIN, i64::MAX, 1)],
        vec![(i64::MIN, i64::MIN, 1)],
        vec![(i64::MAX, i64::MAX, -1)],
        vec![(i64::MAX, i64::MAX, 1)],
        vec![(1, i64::MAX - 1, 1)],
        vec![(1, i64::MAX / 2, 1)],
        vec![(1, i64::MAX / 2, 1)],
        vec![(1, i64::MAX / 2, 1)],
        vec![(1, 1, 1); 20_000],
    ];
    for lie in lies {
        assert!(write.say(&ids(lie)).await, "{}", victim.replica.log());
    }
    assert!(write.say(&ids(vec![(1001, 1010, 1)])).await);
    let next = || {
        let sql = "SELECT next_id FROM _anabranch_ids WHERE table_name = 'items'";
        (victim.replica.open()).query_row(sql, [], |row| row.get::<_, i64>(0))
    };
    until("good ids are there", DEADLINE, || async {
        if let Some(status) = victim.replica.poll_exit() {
            panic!("{status}:\n{}", victim.replica.log());
        }
        match next()? {
            1001 => Ok(()),
            other => anyhow::bail!("{other}"),
        }
    })
    .await;
    is_pending(&victim.replica);
}
