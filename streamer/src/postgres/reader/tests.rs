use tokio::io::AsyncWriteExt;

use super::{super::pgoutput::encode, *};

struct Fixture {
    reader: Reader<tokio::io::DuplexStream>,
    batches: mpsc::UnboundedReceiver<Batch>,
    asked: watch::Receiver<Asked>,
    server: tokio::io::DuplexStream,
}

fn fixture(message_bytes_max: usize) -> Fixture {
    let (server, socket) = tokio::io::duplex(10_000);
    let (sender, batches) = mpsc::unbounded_channel();
    let (asked, asked_seen) = watch::channel(Asked::default());
    let mut reader = Reader::new(socket, BytesMut::new(), 0, sender, asked, Arc::default());
    reader.message_bytes_max = message_bytes_max;
    Fixture {
        reader,
        batches,
        asked: asked_seen,
        server,
    }
}

fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32 + 4).to_be_bytes();
    [&[kind], &length[..], payload].concat()
}

fn copy_data(payload: &[u8]) -> Vec<u8> {
    message(b'd', payload)
}

fn change(bytes: usize) -> Vec<u8> {
    let value = encode::Value::Text(vec![b'x'; bytes]);
    copy_data(&encode::xlog_data(&encode::insert(None, 7, &[value])))
}

/// Sends `bytes` in pieces, and collects what the assembler would get: payloads, and `None` for one that was cut.
async fn payloads(
    fixture: Fixture,
    bytes: Vec<u8>,
    piece: usize,
) -> (Vec<Option<Vec<u8>>>, Error, Arc<Observed>) {
    let Fixture {
        mut reader,
        mut batches,
        asked: _asked,
        mut server,
    } = fixture;
    let observed = reader.observed.clone();
    let sending = tokio::spawn(async move {
        for piece in bytes.chunks(piece) {
            server.write_all(piece).await.unwrap();
        }
    });
    let reading = tokio::spawn(async move { reader.run().await });
    let mut payloads = Vec::new();
    while let Some(batch) = batches.recv().await {
        match batch.content {
            Content::Cut(head) => {
                assert_eq!(head.len(), CUT_BYTES);
                payloads.push(None);
            }
            Content::Frames(frames) => {
                payloads.extend(frames.payloads().map(|payload| Some(payload.to_vec())));
            }
        }
    }
    sending.await.unwrap();
    let error = reading.await.unwrap().unwrap_err();
    (payloads, error, observed)
}

#[tokio::test]
async fn frames_are_whole_however_the_network_cuts_them() {
    let mut bytes = Vec::new();
    let mut sent = Vec::new();
    for length in [0, 1, 70, 5_000, 2, 40_000, 3, 3, 3] {
        let frame = change(length);
        sent.push((frame.len() <= 30_000).then(|| frame[HEADER_BYTES..].to_vec()));
        bytes.extend(frame);
        // Between them, what Postgres may send at any time.
        bytes.extend(message(b'N', b"SNOTICE\0\0"));
        bytes.extend(message(b'S', b"TimeZone\0UTC\0"));
    }
    bytes.extend(message(
        b'E',
        b"SFATAL\0VFATAL\0C57P01\0Mterminating\0DCANARY\0\0",
    ));
    for piece in [1, 7, 1_000, 1_000_000] {
        let (payloads, error, observed) = payloads(fixture(30_000), bytes.clone(), piece).await;
        assert!(payloads == sent, "in pieces of {piece}");
        assert!(matches!(&error, Error::Transient(text) if text == "FATAL 57P01: terminating"));
        assert!(observed.bytes() <= bytes.len() as u64);
        assert!(observed.bytes() > bytes.len() as u64 / 2);
    }
}

#[tokio::test]
async fn what_ends_a_stream_is_told_apart() {
    for (bytes, text) in [
        (Vec::new(), "closed the connection"),
        (message(b'c', b""), "ended the stream"),
        (message(b'C', b"COPY 0\0"), "ended the stream"),
        (message(b'?', b""), "protocol"),
        (message(b'E', b"garbage"), "protocol"),
        (b"N\xFF\xFF\xFF\xFF".to_vec(), "too long"),
        (b"d\0\0\0\0".to_vec(), "closed the connection"),
        (copy_data(b"half")[..7].to_vec(), "closed the connection"),
    ] {
        let (_, error, _) = payloads(fixture(1_000), bytes, 1_000).await;
        assert!(
            matches!(&error, Error::Transient(t) if t.contains(text)),
            "{text}: {error}"
        );
    }
    let (_, error, _) = payloads(
        fixture(1_000),
        message(b'E', b"VERROR\0C55000\0Mslot is gone\0\0"),
        1_000,
    )
    .await;
    assert!(matches!(&error, Error::Definite(text) if text == "ERROR 55000: slot is gone"));
}

#[tokio::test]
async fn a_question_is_passed_on_although_nobody_takes_the_changes() {
    let Fixture {
        mut reader,
        batches,
        mut asked,
        mut server,
    } = fixture(1_000_000);
    let observed = reader.observed.clone();
    tokio::spawn(async move { reader.run().await });
    let keepalive = |lsn, reply| copy_data(&encode::keepalive(Lsn(lsn), reply));
    let begin = copy_data(&encode::xlog_data(&encode::begin(Lsn(1), 0, 1)));
    let commit = copy_data(&encode::xlog_data(&encode::commit(Lsn(1), Lsn(2), 0)));

    for _ in 0..30 {
        server.write_all(&change(60_000)).await.unwrap();
    }
    server.write_all(&keepalive(40, false)).await.unwrap();
    server.write_all(&keepalive(50, true)).await.unwrap();
    let now = *asked.wait_for(|asked| asked.answers == 1).await.unwrap();
    assert_eq!(now.after, Lsn(50));
    assert_eq!(observed.received(), Lsn(50));
    assert_eq!(observed.wal_end(), Lsn(50));

    // Within a transaction there is nothing to wait for.
    server.write_all(&begin).await.unwrap();
    server.write_all(&keepalive(60, true)).await.unwrap();
    let now = *asked.wait_for(|asked| asked.answers == 2).await.unwrap();
    assert_eq!(now.after, Lsn(0));
    server.write_all(&commit).await.unwrap();
    server.write_all(&keepalive(70, true)).await.unwrap();
    let now = *asked.wait_for(|asked| asked.answers == 3).await.unwrap();
    assert_eq!(now.after, Lsn(70));
    drop(batches);
}

#[tokio::test]
async fn no_more_is_read_ahead_than_allowed() {
    let Fixture {
        mut reader,
        mut batches,
        asked: _asked,
        mut server,
    } = fixture(1_000_000);
    let observed = reader.observed.clone();
    let budget = reader.budget.clone();
    let reading = tokio::spawn(async move { reader.run().await });
    let sending = tokio::spawn(async move {
        for _ in 0..400 {
            server.write_all(&change(60_000)).await.unwrap();
        }
    });
    // The reader stands when the budget does not suffice for the next batch.
    while budget.available_permits() > READ_BYTES * 2 {
        tokio::task::yield_now().await;
    }
    let bound = (READ_AHEAD_BYTES_MAX + 4 * READ_BYTES) as u64;
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
        assert!(observed.bytes() <= bound, "{}", observed.bytes());
    }
    assert!(!sending.is_finished());
    let mut bytes = 0;
    while let Some(batch) = batches.recv().await {
        match batch.content {
            Content::Frames(frames) => bytes += frames.0.len(),
            Content::Cut(_) => panic!("nothing is too large"),
        }
    }
    assert_eq!(bytes, 400 * change(60_000).len());
    sending.await.unwrap();
    reading.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn many_small_messages_are_bounded_too() {
    let Fixture {
        mut reader,
        batches,
        asked: _asked,
        mut server,
    } = fixture(1_000_000);
    let budget = reader.budget.clone();
    let reading = tokio::spawn(async move { reader.run().await });
    let keepalive = copy_data(&encode::keepalive(Lsn(1), false));
    // Each is read by itself.
    let mut sent = 0;
    while budget.available_permits() > BATCH_BYTES + keepalive.len() {
        let before = budget.available_permits();
        server.write_all(&keepalive).await.unwrap();
        sent += 1;
        while budget.available_permits() == before {
            tokio::task::yield_now().await;
        }
    }
    assert!(sent <= READ_AHEAD_BYTES_MAX / BATCH_BYTES);
    drop(batches);
    drop(server);
    let _ = reading.await.unwrap();
}
