//! Local transactions on their way out: what is sent, what it is called, and that it is the same the next time.

use anabranch_proto::Nonce;
use aws_lc_rs::digest;
use rusqlite::types::Value;

use super::{local::*, *};

fn start_with(sheet: &Sheet) -> (Folder, File) {
    let folder = Folder::new();
    let mut file = folder.open();
    let mut elements = vec![first(&[]), sheet.declare()];
    elements.extend(receipts());
    elements.push(commit(10));
    file.apply(&down(elements)).unwrap();
    (folder, file)
}

fn all(file: &File, after: u64, bytes_max: usize) -> Vec<v1::LocalTransaction> {
    let mut from = Outgoing::after(after);
    let mut all = Vec::new();
    loop {
        let pieces = file.outgoing(&mut from, bytes_max).unwrap();
        if pieces.is_empty() {
            return all;
        }
        let bytes: usize = pieces.iter().map(|piece| piece.entries.len()).sum();
        assert!(bytes <= bytes_max + 2 * anabranch_proto::MESSAGE_BYTES_TARGET);
        all.extend(pieces);
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for i in 0.. {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7F) << (7 * i);
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// Table, kind and values of each entry, as text.
fn decoded(mut entries: &[u8]) -> Vec<String> {
    let mut all = Vec::new();
    while !entries.is_empty() {
        let (table, kind, length) = (
            varint(&mut entries),
            varint(&mut entries),
            varint(&mut entries),
        );
        let (record, rest) = entries[Nonce::BYTES..].split_at(length as usize);
        let values: Vec<String> = record::values(record)
            .unwrap()
            .map(|value| match value.unwrap() {
                N => "NULL".to_owned(),
                I(value) => value.to_string(),
                R(value) => format!("{value:?}"),
                T(value) => format!("'{value}'"),
                B(value) => format!("x{}", value.len()),
            })
            .collect();
        all.push(format!("{table} {kind} {}", values.join("|")));
        entries = rest;
    }
    all
}

/// What the hash covers of tables, as the protocol says.
fn hashed(tables: &[v1::WriteTable]) -> Vec<u8> {
    let number = |number: usize| (number as u32).to_be_bytes().to_vec();
    let text = |text: &str| [number(text.len()), text.as_bytes().to_vec()].concat();
    let mut out = number(tables.len());
    for table in tables {
        out.extend([text(&table.schema), text(&table.name)].concat());
        out.extend(number(table.columns.len()));
        table
            .columns
            .iter()
            .for_each(|column| out.extend(text(column)));
        out.extend(number(table.key.len()));
        table
            .key
            .iter()
            .for_each(|place| out.extend(number(*place as usize)));
    }
    out
}

/// The first nonce of some entries.
fn first_nonce(mut entries: &[u8]) -> Nonce {
    for _ in 0..3 {
        varint(&mut entries);
    }
    Nonce::from_bytes(*entries.first_chunk().unwrap())
}

fn sha(parts: &[&[u8]]) -> Vec<u8> {
    let mut context = digest::Context::new(&digest::SHA256);
    parts.iter().for_each(|part| context.update(part));
    context.finish().as_ref().to_vec()
}

#[test]
fn entries_travel_as_the_protocol_says() {
    let wide = Sheet::composite();
    let (folder, mut file) = start_with(&wide);
    let row = |x: f64, k2: &str, i: i64, k1: i64, blob: &[u8]| -> Vec<Value> {
        vec![
            x.into(),
            text(k2),
            i.into(),
            k1.into(),
            blob.to_vec().into(),
        ]
    };
    folder.write(|program| wide.insert(program, &row(1.0, "a", 5, 1, b"abc")));
    folder.write(|program| {
        wide.update(
            program,
            &[1.into(), text("a")],
            &row(2.5, "a", 7, 1, b"abc"),
        );
        wide.update(program, &[1.into(), text("a")], &row(2.5, "b", 7, 1, b"x"));
        wide.delete(program, &[1.into(), text("b")]);
    });
    file.assign(&[1], false).unwrap();
    file.assign(&[1, 4], true).unwrap();
    let sent = all(&file, 0, 1);
    assert_eq!(sent.len(), 2);
    assert_eq!(decoded(&sent[0].entries), ["0 0 1.0|'a'|5|1|x3"]);
    assert_eq!(
        decoded(&sent[1].entries),
        [
            // Old values of `i`, which is added, and of the blob, where the first write wins.
            "0 1 1|'a'|'10100'|2.5|7|5",
            "0 1 1|'a'|'01001'|'b'|x1|x3",
            "0 2 1|'b'|2.5|'b'|7|1|x1",
        ]
    );
    let table = &sent[0].tables[0];
    assert_eq!(
        (table.schema.as_str(), table.name.as_str()),
        ("s", "wide one")
    );
    assert_eq!(table.columns, ["x", "k\"2", "i", "k1", "blob"]);
    assert_eq!(table.key, [3, 1]);
    assert_eq!([sent[0].merged, sent[1].merged], [false, true]);
    let tables = hashed(&sent[0].tables);
    assert_eq!(hashed(&sent[1].tables), tables);
    let first = sha(&[&[0; 32], &1u64.to_be_bytes(), &tables, &sent[0].entries]);
    assert_eq!(sent[0].hash, first);
    assert_eq!(
        sent[1].hash,
        sha(&[&first, &2u64.to_be_bytes(), &tables, &sent[1].entries])
    );
    let nonce = first_nonce(&sent[0].entries);
    assert_ne!(nonce, first_nonce(&sent[1].entries));
    let kept = folder.query(
        "SELECT strftime('%s', captured_time), nonce FROM \"_anabranch_entries_s.wide one\" WHERE id = 1",
    );
    let low = i64::from_be_bytes(*nonce.to_bytes().last_chunk().unwrap());
    assert_eq!(kept, [format!("'{}'|{low}", nonce.seconds())]);
    assert_eq!(all(&file, 1, 1 << 20), sent[1..]);
    assert_eq!(file.assigned().unwrap(), (2, 4));
}

#[test]
fn a_large_transaction_travels_in_pieces_that_are_the_same_each_time() {
    let wide = Sheet::composite();
    let (folder, mut file) = start_with(&wide);
    folder.write(|program| {
        for i in 0..3_000i64 {
            // One row is larger than several messages.
            let bytes = if i == 1_500 {
                3_000_000
            } else {
                (i as usize * 7) % 900
            };
            let row = vec![
                0.5.into(),
                text("k"),
                i.into(),
                i.into(),
                vec![i as u8; bytes].into(),
            ];
            wide.insert(program, &row);
        }
    });
    folder.assign(&mut file);
    folder.write(|program| wide.delete(program, &[7.into(), text("k")]));
    folder.assign(&mut file);
    let sent = all(&file, 0, 1 << 20);
    let (large, small): (Vec<_>, Vec<_>) = sent.iter().partition(|piece| piece.seq == 1);
    assert_eq!(small.len(), 1);
    assert!(large.len() > 10);
    for (i, piece) in large.iter().enumerate() {
        assert!(piece.entries.len() <= anabranch_proto::MESSAGE_BYTES_TARGET);
        assert_eq!(piece.continued, i + 1 < large.len());
        assert_eq!(piece.tables.len(), usize::from(i == 0));
    }
    let entries: Vec<u8> = large
        .iter()
        .flat_map(|piece| piece.entries.to_vec())
        .collect();
    assert_eq!(decoded(&entries).len(), 3_000);
    let tables = hashed(&large[0].tables);
    let hash = sha(&[&[0; 32], &1u64.to_be_bytes(), &tables, &entries]);
    assert!(large.iter().all(|piece| piece.hash == hash));
    drop(file);
    let file = folder.open();
    for bytes_max in [1, 300_000, 1 << 30] {
        let again = all(&file, 0, bytes_max);
        let joined: Vec<u8> = again
            .iter()
            .filter(|piece| piece.seq == 1)
            .flat_map(|piece| piece.entries.to_vec())
            .collect();
        assert_eq!(joined, entries);
        assert_eq!(again.len(), sent.len());
    }
}

#[test]
fn tables_of_one_transaction_are_in_the_order_of_their_first_entries() {
    let (wide, simple) = (Sheet::composite(), Sheet::simple());
    let (folder, mut file) = start_with(&wide);
    file.apply(&down(vec![begin(&[]), simple.declare(), commit(20)]))
        .unwrap();
    let insert = |program: &Connection, id: i64| {
        simple.insert(program, &vec![id.into(), text("a"), Value::Null, text("1")]);
    };
    folder.write(|program| {
        insert(program, 1);
        let row = vec![0.5.into(), text("k"), 1.into(), 1.into(), Value::Null];
        wide.insert(program, &row);
        insert(program, 2);
    });
    folder.assign(&mut file);
    let sent = all(&file, 0, 1 << 20);
    let names: Vec<&str> = sent[0]
        .tables
        .iter()
        .map(|table| table.name.as_str())
        .collect();
    assert_eq!(names, ["t", "wide one"]);
    assert_eq!(
        decoded(&sent[0].entries),
        [
            "0 0 1|'a'|NULL|'1'",
            "1 0 0.5|'k'|1|1|NULL",
            "0 0 2|'a'|NULL|'1'"
        ]
    );
    assert_eq!(
        folder.query(
            "SELECT id, txn, table_name, key, changes, state FROM _anabranch_outbox ORDER BY id"
        ),
        [
            r#"1|1|'t'|'[1]'|'{"id":1,"a":"a","b":null,"n":"1"}'|'assigned'"#,
            r#"2|1|'s.wide one'|'[1,"k"]'|'{"x":0.5,"k\"2":"k","i":1,"k1":1,"blob":null}'|'assigned'"#,
            r#"3|1|'t'|'[2]'|'{"id":2,"a":"a","b":null,"n":"1"}'|'assigned'"#,
        ]
    );
}

#[test]
fn the_outbox_of_hundreds_of_tables_can_be_read() {
    let folder = Folder::new();
    let mut file = folder.open();
    let mut elements = vec![first(&[])];
    for id in 0..450 {
        let mut table = declared(
            id,
            &format!("t{id}"),
            &[("id", Integer, 1), ("it's", Text, 0)],
        );
        table.writable = true;
        elements.push(element(Kind::Table(table)));
    }
    elements.push(commit(10));
    file.apply(&down(elements)).unwrap();
    assert_eq!(
        folder.query("SELECT count(*) FROM _anabranch_outbox"),
        ["0"]
    );
    assert_eq!(
        sqlite3(folder.path(), "SELECT count(*) FROM _anabranch_outbox"),
        "0\n"
    );
}

#[test]
fn the_widest_table_can_be_written() {
    let folder = Folder::new();
    let mut file = folder.open();
    let names: Vec<String> = (0..500).map(|i| format!("column {i}")).collect();
    let columns: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.as_str(), Text, u32::from(i == 0)))
        .collect();
    let mut table = declared(1, "t", &columns);
    table.writable = true;
    file.apply(&down(vec![
        first(&[]),
        element(Kind::Table(table)),
        commit(10),
    ]))
    .unwrap();
    assert_eq!(
        folder.query("SELECT count(*) FROM _anabranch_outbox"),
        ["0"]
    );
    assert_eq!(
        sqlite3(
            folder.path(),
            "SELECT count(changes) FROM _anabranch_outbox"
        ),
        "0\n"
    );
    assert_eq!(
        folder.query("SELECT count(*) FROM _anabranch_base_t"),
        ["0"]
    );
}
