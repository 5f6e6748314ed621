use pg_walstream::protocol::{LogicalReplicationMessage as Theirs, LogicalReplicationParser};
use rand::{Rng, rngs::StdRng};

use super::{encode::Writer, *};
use crate::postgres::seed::seeded;

/// Rounds of the tests that throw bytes at the decoder.
fn rounds() -> u64 {
    std::env::var("ANABRANCH_FUZZ_ROUNDS")
        .map(|rounds| rounds.parse().expect("ANABRANCH_FUZZ_ROUNDS is a number"))
        .unwrap_or(200_000)
}

fn any_text(random: &mut StdRng) -> String {
    let length = random.random_range(0..12);
    (0..length)
        .map(|_| ['a', 'Z', '"', '.', ' ', 'ä', '🦀', '\u{1}'][random.random_range(0..8)])
        .collect()
}

fn any_tuple(random: &mut StdRng) -> Vec<encode::Value> {
    let length = random.random_range(0..9);
    (0..length)
        .map(|_| match random.random_range(0..4) {
            0 => encode::Value::Null,
            1 => encode::Value::Unchanged,
            2 => encode::text(&any_text(random)),
            _ => encode::Value::Binary(random.random_iter().take(5).collect()),
        })
        .collect()
}

const KINDS: &[u8] = b"BCORYIUDTMSEcAbPKrp";

/// A valid message of this kind, written by rules that are not the decoder's.
fn any_message(kind: u8, xid: Option<u32>, random: &mut StdRng) -> Vec<u8> {
    let lsn = |random: &mut StdRng| random.random::<u64>() >> random.random_range(0..64);
    let old = |random: &mut StdRng| if random.random() { b'K' } else { b'O' };
    let plain = Writer::new(kind);
    let change = Writer::with_xid(kind, xid);
    match kind {
        b'B' => plain.u64(lsn(random)).u64(lsn(random)).u32(random.random()),
        b'C' => {
            let writer = plain.u8(0).u64(lsn(random)).u64(lsn(random));
            writer.u64(lsn(random))
        }
        b'O' => plain.u64(lsn(random)).text(&any_text(random)),
        b'R' => {
            let mut writer = change.u32(random.random());
            writer = writer.text(&any_text(random)).text(&any_text(random));
            let count = random.random_range(0..6);
            writer = writer.u8(b"dnfi"[random.random_range(0..4)]).u16(count);
            for _ in 0..count {
                writer = writer.u8(random.random_range(0..2)).text(&any_text(random));
                writer = writer.u32(random.random()).u32(random.random());
            }
            writer
        }
        b'Y' => {
            let writer = change.u32(random.random());
            writer.text(&any_text(random)).text(&any_text(random))
        }
        b'I' => change
            .u32(random.random())
            .u8(b'N')
            .tuple(&any_tuple(random)),
        b'U' => {
            let mut writer = change.u32(random.random());
            if random.random() {
                writer = writer.u8(old(random)).tuple(&any_tuple(random));
            }
            writer.u8(b'N').tuple(&any_tuple(random))
        }
        b'D' => change
            .u32(random.random())
            .u8(old(random))
            .tuple(&any_tuple(random)),
        b'T' => {
            let count = random.random_range(0..5);
            let writer = change.u32(count).u8(random.random_range(0..4));
            (0..count).fold(writer, |writer, _| writer.u32(random.random()))
        }
        b'M' => {
            let content: Vec<u8> = random.random_iter().take(7).collect();
            let writer = change.u8(random.random_range(0..2)).u64(lsn(random));
            let writer = writer.text(&any_text(random));
            writer.u32(content.len() as u32).bytes(&content)
        }
        b'S' => plain
            .u32(random.random_range(1..u32::MAX))
            .u8(random.random_range(0..2)),
        b'E' => plain,
        b'c' => {
            let writer = plain.u32(random.random()).u8(0).u64(lsn(random));
            writer.u64(lsn(random)).u64(lsn(random))
        }
        b'A' => plain.u32(random.random()).u32(random.random()),
        b'b' => {
            let writer = plain.u64(lsn(random)).u64(lsn(random)).u64(lsn(random));
            writer.u32(random.random()).text(&any_text(random))
        }
        b'P' | b'K' | b'p' => {
            let writer = plain.u8(0).u64(lsn(random)).u64(lsn(random));
            let writer = writer.u64(lsn(random)).u32(random.random());
            writer.text(&any_text(random))
        }
        b'r' => {
            let writer = plain.u8(0).u64(lsn(random)).u64(lsn(random));
            let writer = writer.u64(lsn(random)).u64(lsn(random));
            writer.u32(random.random()).text(&any_text(random))
        }
        _ => unreachable!("not in KINDS"),
    }
    .0
}

/// The bytes that a message was written from, written again from what was decoded. Knows all fields.
fn written_again(message: &Message, xid: Option<u32>) -> Vec<u8> {
    let tuple = |tuple: &Tuple| -> Vec<encode::Value> {
        let values: Vec<_> = tuple
            .values()
            .map(|value| match value {
                Value::Null => encode::Value::Null,
                Value::Unchanged => encode::Value::Unchanged,
                Value::Text(bytes) => encode::Value::Text(bytes.into()),
                Value::Binary(bytes) => encode::Value::Binary(bytes.into()),
            })
            .collect();
        assert_eq!(values.len(), tuple.len());
        values
    };
    let old = |writer: Writer, old: &OldTuple| match old {
        OldTuple::Key(old) => writer.u8(b'K').tuple(&tuple(old)),
        OldTuple::Full(old) => writer.u8(b'O').tuple(&tuple(old)),
    };
    let prepared = |writer: Writer, p: &Prepared| {
        let writer = writer.u64(p.lsn.0).u64(p.end_lsn.0).u64(p.time as u64);
        writer.u32(p.xid).text(p.gid)
    };
    match message {
        Message::Begin {
            final_lsn,
            commit_time,
            xid,
        } => return encode::begin(*final_lsn, *commit_time, *xid),
        Message::Commit {
            commit_lsn,
            end_lsn,
            commit_time,
            flags: 0,
        } => return encode::commit(*commit_lsn, *end_lsn, *commit_time),
        Message::Commit { .. } => panic!("flags were 0"),
        Message::Origin { lsn, name } => Writer::new(b'O').u64(lsn.0).text(name),
        Message::Relation(r) => {
            let columns: Vec<_> = r
                .columns
                .iter()
                .map(|c| (c.key, c.name.to_owned(), c.type_oid, c.typmod))
                .collect();
            assert_eq!(columns.len(), r.columns.len());
            return encode::relation(xid, r.oid, r.schema, r.name, r.identity, &columns);
        }
        Message::Type { oid, schema, name } => Writer::with_xid(b'Y', xid)
            .u32(*oid)
            .text(schema)
            .text(name),
        Message::Insert { relation, new } => return encode::insert(xid, *relation, &tuple(new)),
        Message::Update {
            relation,
            old: before,
            new,
        } => {
            let mut writer = Writer::with_xid(b'U', xid).u32(*relation);
            if let Some(before) = before {
                writer = old(writer, before);
            }
            writer.u8(b'N').tuple(&tuple(new))
        }
        Message::Delete {
            relation,
            old: before,
        } => old(Writer::with_xid(b'D', xid).u32(*relation), before),
        Message::Truncate {
            cascade,
            restart_identity,
            relations,
        } => {
            let oids: Vec<_> = relations.iter().collect();
            let options = u8::from(*cascade) | u8::from(*restart_identity) << 1;
            return encode::truncate(xid, options, &oids);
        }
        Message::Logical {
            transactional,
            lsn,
            prefix,
            content,
        } => {
            let writer = Writer::with_xid(b'M', xid).u8(u8::from(*transactional));
            let writer = writer.u64(lsn.0).text(prefix).u32(content.len() as u32);
            writer.bytes(content)
        }
        Message::StreamStart { xid, first } => return encode::stream_start(*xid, *first),
        Message::StreamStop => return encode::stream_stop(),
        Message::StreamCommit {
            xid,
            commit_lsn,
            end_lsn,
            commit_time,
            flags: 0,
        } => return encode::stream_commit(*xid, *commit_lsn, *end_lsn, *commit_time),
        Message::StreamCommit { .. } => panic!("flags were 0"),
        Message::StreamAbort { xid, subxid, at } => {
            let writer = Writer(encode::stream_abort(*xid, *subxid));
            match at {
                Some((lsn, time)) => writer.u64(lsn.0).u64(*time as u64),
                None => writer,
            }
        }
        Message::BeginPrepare(p) => prepared(Writer::new(b'b'), p),
        Message::Prepare(p) => prepared(Writer::new(b'P').u8(0), p),
        Message::StreamPrepare(p) => prepared(Writer::new(b'p').u8(0), p),
        Message::CommitPrepared(p) => prepared(Writer::new(b'K').u8(0), p),
        Message::RollbackPrepared {
            prepare_end_lsn,
            rollback_end_lsn,
            prepare_time,
            rollback_time,
            xid,
            gid,
        } => {
            let writer = Writer::new(b'r').u8(0).u64(prepare_end_lsn.0);
            let writer = writer.u64(rollback_end_lsn.0).u64(*prepare_time as u64);
            writer.u64(*rollback_time as u64).u32(*xid).text(gid)
        }
    }
    .0
}

#[test]
fn every_kind_of_message_is_read_whole() {
    let mut random = seeded();
    for _ in 0..3_000 {
        for kind in KINDS {
            for xid in [None, Some(random.random())] {
                let bytes = any_message(*kind, xid, &mut random);
                let message = decode(&bytes, xid.is_some()).unwrap();
                assert_eq!(written_again(&message, xid), bytes, "{message:?}");
                let carries = matches!(kind, b'R' | b'Y' | b'I' | b'U' | b'D' | b'T' | b'M');
                if xid.is_some() {
                    assert_eq!(streamed_xid(&bytes).unwrap(), xid.filter(|_| carries));
                }
                // Every shorter message is refused, and so is a longer one.
                for end in 0..bytes.len() {
                    decode(&bytes[..end], xid.is_some()).unwrap_err();
                }
                if *kind != b'A' {
                    decode(&[&bytes[..], &[0]].concat(), xid.is_some()).unwrap_err();
                }
            }
        }
    }
    let with_place = [&encode::stream_abort(7, 8)[..], &[0; 15], &[9]].concat();
    let Ok(Message::StreamAbort { at, .. }) = decode(&with_place, false) else {
        panic!("not an abort");
    };
    assert_eq!(at, Some((Lsn(0), 9)));
}

/// What the other implementation made of a message, written by our encoder.
fn theirs_written(message: &Theirs, xid: Option<u32>) -> Option<Vec<u8>> {
    let tuple = |tuple: &pg_walstream::protocol::TupleData| -> Vec<encode::Value> {
        let value = |column: &pg_walstream::protocol::ColumnData| match column.data_type {
            b'n' => encode::Value::Null,
            b'u' => encode::Value::Unchanged,
            b't' => encode::Value::Text(column.as_bytes().into()),
            _ => encode::Value::Binary(column.as_bytes().into()),
        };
        tuple.columns.iter().map(value).collect()
    };
    Some(match message {
        Theirs::Begin {
            final_lsn,
            timestamp,
            xid,
        } => encode::begin(Lsn(*final_lsn), *timestamp, *xid),
        Theirs::Commit {
            commit_lsn,
            end_lsn,
            timestamp,
            ..
        } => encode::commit(Lsn(*commit_lsn), Lsn(*end_lsn), *timestamp),
        Theirs::Relation {
            relation_id,
            namespace,
            relation_name,
            replica_identity,
            columns,
        } => {
            let columns: Vec<_> = columns
                .iter()
                .map(|c| (c.is_key(), c.name.to_string(), c.type_id, c.type_modifier))
                .collect();
            encode::relation(
                xid,
                *relation_id,
                namespace,
                relation_name,
                *replica_identity,
                &columns,
            )
        }
        Theirs::Insert {
            relation_id,
            tuple: new,
        } => encode::insert(xid, *relation_id, &tuple(new)),
        Theirs::Update {
            relation_id,
            old_tuple,
            new_tuple,
            key_type,
        } => {
            let old = old_tuple.as_ref().map(tuple);
            let old = old.as_ref().map(|old| (key_type.unwrap() as u8, &old[..]));
            encode::update(xid, *relation_id, old, &tuple(new_tuple))
        }
        Theirs::Delete {
            relation_id,
            old_tuple,
            key_type,
        } => encode::delete(xid, *relation_id, *key_type as u8, &tuple(old_tuple)),
        Theirs::Truncate {
            relation_ids,
            flags,
        } => encode::truncate(xid, *flags, relation_ids),
        Theirs::Type {
            type_id,
            namespace,
            type_name,
        } => {
            let writer = Writer::with_xid(b'Y', xid).u32(*type_id);
            writer.text(namespace).text(type_name).0
        }
        Theirs::Origin {
            origin_lsn,
            origin_name,
        } => Writer::new(b'O').u64(*origin_lsn).text(origin_name).0,
        Theirs::Message {
            flags,
            lsn,
            prefix,
            content,
        } => {
            let writer = Writer::with_xid(b'M', xid).u8(*flags).u64(*lsn);
            let writer = writer.text(prefix).u32(content.len() as u32);
            writer.bytes(content).0
        }
        Theirs::StreamStart { xid, first_segment } => encode::stream_start(*xid, *first_segment),
        Theirs::StreamStop => encode::stream_stop(),
        Theirs::StreamCommit {
            xid,
            commit_lsn,
            end_lsn,
            timestamp,
            ..
        } => encode::stream_commit(*xid, Lsn(*commit_lsn), Lsn(*end_lsn), *timestamp),
        Theirs::StreamAbort {
            xid,
            subtransaction_xid,
            ..
        } => encode::stream_abort(*xid, *subtransaction_xid),
        Theirs::BeginPrepare {
            prepare_lsn,
            end_lsn,
            timestamp,
            xid,
            gid,
        } => {
            let writer = Writer::new(b'b').u64(*prepare_lsn).u64(*end_lsn);
            writer.u64(*timestamp as u64).u32(*xid).text(gid).0
        }
        Theirs::RollbackPrepared {
            prepare_end_lsn,
            rollback_end_lsn,
            prepare_timestamp,
            rollback_timestamp,
            xid,
            gid,
            ..
        } => {
            let writer = Writer::new(b'r').u8(0).u64(*prepare_end_lsn);
            let writer = writer.u64(*rollback_end_lsn);
            let writer = writer.u64(*prepare_timestamp as u64);
            let writer = writer.u64(*rollback_timestamp as u64).u32(*xid);
            writer.text(gid).0
        }
        Theirs::Prepare {
            prepare_lsn: lsn,
            end_lsn,
            timestamp,
            xid,
            gid,
            ..
        }
        | Theirs::CommitPrepared {
            commit_lsn: lsn,
            end_lsn,
            timestamp,
            xid,
            gid,
            ..
        }
        | Theirs::StreamPrepare {
            prepare_lsn: lsn,
            end_lsn,
            timestamp,
            xid,
            gid,
            ..
        } => {
            let kind = match message {
                Theirs::Prepare { .. } => b'P',
                Theirs::CommitPrepared { .. } => b'K',
                _ => b'p',
            };
            let writer = Writer::new(kind).u8(0).u64(*lsn).u64(*end_lsn);
            writer.u64(*timestamp as u64).u32(*xid).text(gid).0
        }
    })
}

/// Another implementation reads the same in messages of every kind, inside streamed blocks and outside.
#[test]
fn another_implementation_reads_the_same() {
    let mut random = seeded();
    for round in 0..3_000 {
        for kind in KINDS {
            let streamed = round % 2 == 1 && !b"BCSEcAbPKrp".contains(kind);
            let xid = streamed.then(|| random.random_range(1..u32::MAX));
            let bytes = any_message(*kind, xid, &mut random);
            let ours = written_again(&decode(&bytes, streamed).unwrap(), xid);
            let mut parser = LogicalReplicationParser::with_protocol_version(3);
            if streamed {
                parser
                    .parse_wal_message(&encode::stream_start(5, true))
                    .unwrap();
            } else if *kind == b'E' {
                continue; // refused outside of a block by the other one; checked above by ourselves
            }
            let theirs = match parser.parse_wal_message(&bytes) {
                Ok(theirs) => theirs,
                Err(error) => panic!("{} {bytes:?}: {error}", char::from(*kind)),
            };
            if streamed && *kind != b'O' {
                assert_eq!(theirs.xid, streamed_xid(&bytes).unwrap());
            }
            let theirs = theirs_written(&theirs.message, xid).unwrap();
            assert_eq!(ours, theirs, "{}", char::from(*kind));
        }
    }
}

/// Uses all that a message hands out.
fn walk(message: &Message) -> usize {
    let tuple = |tuple: &Tuple| {
        let count = tuple.values().count();
        assert_eq!(count, tuple.len(), "a checked tuple gives all its values");
        count
    };
    let old = |old: &OldTuple| match old {
        OldTuple::Key(old) | OldTuple::Full(old) => tuple(old),
    };
    match message {
        Message::Insert { new, .. } => tuple(new),
        Message::Update {
            old: before, new, ..
        } => before.as_ref().map_or(0, old) + tuple(new),
        Message::Delete { old: before, .. } => old(before),
        Message::Truncate { relations, .. } => relations.iter().count(),
        Message::Relation(relation) => {
            let count = relation.columns.iter().count();
            assert_eq!(count, relation.columns.len());
            count
        }
        _ => 0,
    }
}

#[test]
fn mutated_messages_and_noise_never_panic() {
    let mut random = seeded();
    let seeds: Vec<Vec<u8>> = (0..2_000)
        .map(|i| {
            let xid = (i % 2 == 0).then(|| random.random());
            any_message(KINDS[i % KINDS.len()], xid, &mut random)
        })
        .collect();
    let mut bytes = Vec::new();
    let (mut read, mut walked) = (0u64, 0);
    for round in 0..rounds() {
        bytes.clear();
        if round % 4 == 0 {
            // Noise behind a known letter, with small numbers, so that counts are sometimes plausible.
            bytes.push(KINDS[random.random_range(0..KINDS.len())]);
            for _ in 0..random.random_range(0..60) {
                bytes.push(
                    *[0, 0, 0, 1, 2, b't', b'n', b'N', b'K', random.random()]
                        .get(random.random_range(0..10))
                        .expect("ten of them"),
                );
            }
        } else {
            bytes.extend_from_slice(&seeds[random.random_range(0..seeds.len())]);
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..5) {
                    0 => bytes[at] ^= 1 << random.random_range(0..8),
                    1 => bytes[at] = [0, 1, 0x7F, 0x80, 0xFF][random.random_range(0..5)],
                    2 => bytes.truncate(at.max(1)),
                    3 => bytes.insert(at, random.random()),
                    _ => {
                        let end = (at + 4).min(bytes.len());
                        bytes[at..end].fill(0xFF);
                    }
                }
            }
        }
        for streamed in [false, true] {
            if let Ok(message) = decode(&bytes, streamed) {
                read += 1;
                walked += walk(&message);
            }
            let _ = streamed_xid(&bytes);
        }
    }
    println!("{read} of {} read, {walked} parts walked", rounds());
    assert!(read > 0 && walked > 0, "nothing survived its mutations");
}
