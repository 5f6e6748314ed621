//! What programs did to a replica's file, as the replica tells it: local transactions. Pure.
//!
//! The bytes come from a replica, so nothing in them is believed: reading never panics, and what was read is well-formed
//! as far as it can be known without the database (places in range, values as many as there should be). Whether the
//! replica may write what it names is the writer's to ask, see `postgres::writer`.
//!
//! An [`Entry`] keeps its record as it came, and [`LocalTransaction::change`] reads it: a transaction of 100,000 entries
//! takes about the memory of its bytes.

use std::{collections::HashMap, sync::Arc};

use anabranch_proto::{
    Nonce, local,
    record::{self, Malformed, ValueRef},
};
use aws_lc_rs::digest;
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// What a transaction is chained by: SHA-256.
pub type Hash = [u8; 32];

/// The hash before the first transaction.
pub const NO_HASH: Hash = [0; 32];

/// As many columns as a table of Postgres has at most.
const COLUMNS_MAX: usize = 1600;

/// What happens to a local change of a column that was changed in Postgres since.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Conflict {
    /// It is made.
    #[default]
    LastWrite,
    /// It is rejected.
    FirstWrite,
    /// Its difference is added.
    Add,
    /// This function of Postgres (`schema.name`) decides, from the old, the new and the current row.
    Function(String),
}

/// [`Conflict`] of each column of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Of columns that are not named.
    pub table: Conflict,
    /// By name.
    pub columns: HashMap<String, Conflict>,
}

impl Policy {
    /// That of a column.
    pub fn of(&self, column: &str) -> &Conflict {
        self.columns.get(column).unwrap_or(&self.table)
    }
}

/// A table as the replica knew it when its programs wrote to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteTable {
    /// Schema in Postgres, unquoted.
    pub schema: String,
    /// Name in Postgres, unquoted.
    pub name: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Places in `columns`, in the order of the key.
    pub key: Vec<usize>,
    /// By place in `columns`.
    pub conflicts: Vec<Conflict>,
}

impl WriteTable {
    /// Checks what the replica said; `policy` is what it was told of the table.
    pub fn new(
        schema: String,
        name: String,
        columns: Vec<String>,
        key: Vec<usize>,
        policy: &Policy,
    ) -> Result<WriteTable, Malformed> {
        if columns.is_empty() || columns.len() > COLUMNS_MAX {
            return Err(Malformed("count of columns"));
        }
        let mut sorted: Vec<_> = columns.iter().collect();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Malformed("a column is named twice"));
        }
        let mut places = key.clone();
        places.sort_unstable();
        places.dedup();
        let in_range = places.last().is_some_and(|last| *last < columns.len());
        if !in_range || places.len() != key.len() {
            return Err(Malformed("key of a table"));
        }
        let conflicts = columns
            .iter()
            .map(|column| policy.of(column).clone())
            .collect();
        Ok(WriteTable {
            schema,
            name,
            columns,
            key,
            conflicts,
        })
    }
}

/// What an entry does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A row is new.
    Insert,
    /// A row changes.
    Update,
    /// A row goes.
    Delete,
}

/// What one program did to one row.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    table: usize,
    kind: Kind,
    nonce: Nonce,
    record: Bytes,
}

/// Never shows values.
impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} in table {}", self.kind, self.table)
    }
}

impl Entry {
    /// Its place in [`LocalTransaction::tables`].
    pub fn table(&self) -> usize {
        self.table
    }

    /// What it does.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What tells it from all others.
    pub fn nonce(&self) -> Nonce {
        self.nonce
    }
}

/// An entry, read. Places are those in [`WriteTable::columns`].
#[derive(Clone, Debug, PartialEq)]
pub enum Change<'a> {
    /// A row is new.
    Insert {
        /// A value for each column.
        row: Vec<ValueRef<'a>>,
    },
    /// A row changes.
    Update {
        /// Its key as it was.
        key: Vec<ValueRef<'a>>,
        /// What changed.
        set: Vec<Set<'a>>,
    },
    /// A row goes.
    Delete {
        /// Its key.
        key: Vec<ValueRef<'a>>,
        /// The values that the program saw, if the replica was told to send them.
        old: Option<Vec<ValueRef<'a>>>,
    },
}

/// A column that changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Set<'a> {
    /// Its place.
    pub column: usize,
    /// What it became.
    pub new: ValueRef<'a>,
    /// What it was, if the replica was told to send it.
    pub old: Option<ValueRef<'a>>,
}

/// What one transaction of a program did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalTransaction {
    /// Its number, from 1 without gaps for each replica.
    pub seq: u64,
    /// Proves it and all before it.
    pub hash: Hash,
    /// The tables that its entries name.
    pub tables: Vec<Arc<WriteTable>>,
    /// In the order in which they were made.
    pub entries: Vec<Entry>,
    /// Several transactions of programs may be in it.
    pub merged: bool,
}

/// A transaction can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Its hash does not follow from that before it: the replica's file is not the one that sent that.
    #[error("the hash of the transaction does not follow from the one before it")]
    Hash,
    /// What it holds is not what the protocol says.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// The hash of a transaction.
pub fn chain(previous: &Hash, seq: u64, tables: &[Arc<WriteTable>], entries: &[u8]) -> Hash {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(previous);
    context.update(&seq.to_be_bytes());
    let mut covered = Vec::new();
    local::push_number(&mut covered, tables.len());
    for table in tables {
        local::push_table(
            &mut covered,
            &table.schema,
            &table.name,
            table.columns.iter().map(String::as_str),
            table.key.iter().copied(),
        );
    }
    context.update(&covered);
    context.update(entries);
    let mut hash = NO_HASH;
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

impl LocalTransaction {
    /// Reads the whole `entries` of a transaction that comes after the one with the hash `previous`.
    pub fn read(
        previous: &Hash,
        seq: u64,
        hash: Hash,
        tables: Vec<Arc<WriteTable>>,
        entries: Bytes,
        merged: bool,
    ) -> Result<LocalTransaction, Invalid> {
        if chain(previous, seq, &tables, &entries) != hash {
            return Err(Invalid::Hash);
        }
        let mut read = LocalTransaction {
            seq,
            hash,
            tables,
            entries: Vec::new(),
            merged,
        };
        let mut rest = entries;
        while !rest.is_empty() {
            let entry = take(&mut rest)?;
            read.change(&entry)?;
            read.entries.push(entry);
        }
        if u32::try_from(read.entries.len()).is_err() {
            return Err(Malformed("count of entries").into());
        }
        Ok(read)
    }

    /// What is to be remembered of it, so that it is known in a copy of the file too. Copies have all of what was one
    /// transaction of a program or nothing of it, so its last entry stands for it; of several nobody knows where they end.
    pub fn claimed(&self) -> &[Entry] {
        match self.entries.len().checked_sub(1) {
            Some(last) if !self.merged => &self.entries[last..],
            _ => &self.entries,
        }
    }

    /// What an entry of this transaction says. Does not fail for those that [`read`](Self::read) let through.
    pub fn change<'a>(&self, entry: &'a Entry) -> Result<Change<'a>, Malformed> {
        let table = self.tables.get(entry.table);
        let table = table.ok_or(Malformed("place of a table"))?;
        let mut values = record::values(&entry.record)?;
        let change = match entry.kind {
            Kind::Insert => Change::Insert {
                row: take_values(&mut values, table.columns.len())?,
            },
            Kind::Update => {
                let key = take_values(&mut values, table.key.len())?;
                let set = take_set(&mut values, table)?;
                Change::Update { key, set }
            }
            Kind::Delete => {
                let key = take_values(&mut values, table.key.len())?;
                let old = if values.is_at_end() {
                    None
                } else {
                    Some(take_values(&mut values, table.columns.len())?)
                };
                Change::Delete { key, old }
            }
        };
        if values.is_at_end() {
            Ok(change)
        } else {
            Err(Malformed("more values than there should be"))
        }
    }
}

fn take_values<'a>(
    values: &mut record::Values<'a>,
    count: usize,
) -> Result<Vec<ValueRef<'a>>, Malformed> {
    let taken: Vec<_> = values.by_ref().take(count).collect::<Result<_, _>>()?;
    if taken.len() == count {
        Ok(taken)
    } else {
        Err(Malformed("fewer values than there should be"))
    }
}

/// The changed columns. Old values are there for the columns of which the policy needs them; where a policy was changed
/// between a write and its sending, for none or for all.
fn take_set<'a>(
    values: &mut record::Values<'a>,
    table: &WriteTable,
) -> Result<Vec<Set<'a>>, Malformed> {
    let Some(ValueRef::Text(mask)) = values.next().transpose()? else {
        return Err(Malformed("which columns changed"));
    };
    let known = mask.bytes().all(|byte| matches!(byte, b'0' | b'1'));
    if !known || mask.len() != table.columns.len() {
        return Err(Malformed("which columns changed"));
    }
    let changed = || (0..).zip(mask.bytes()).filter(|(_, byte)| *byte == b'1');
    let rest: Vec<_> = values.collect::<Result<_, _>>()?;
    let keeps = |column: usize| table.conflicts[column] != Conflict::LastWrite;
    let count = changed().count();
    let expected = count + changed().filter(|(column, _)| keeps(*column)).count();
    let sent = rest.len();
    let has_old = |column| match sent {
        length if length == expected => keeps(column),
        length => length != count,
    };
    if rest.len() != expected && rest.len() != count && rest.len() != 2 * count {
        return Err(Malformed("count of changed values"));
    }
    let mut rest = rest.into_iter();
    let mut set = Vec::with_capacity(count);
    for (column, _) in changed() {
        let missing = Malformed("count of changed values");
        let new = rest.next().ok_or(missing)?;
        let old = if has_old(column) {
            Some(rest.next().ok_or(missing)?)
        } else {
            None
        };
        set.push(Set { column, new, old });
    }
    Ok(set)
}

/// Takes the first entry off `entries`. It shares the buffer.
fn take(entries: &mut Bytes) -> Result<Entry, Malformed> {
    let table = take_varint(entries)?;
    let table = usize::try_from(table).map_err(|_| Malformed("place of a table"))?;
    let kind = match take_varint(entries)? {
        0 => Kind::Insert,
        1 => Kind::Update,
        2 => Kind::Delete,
        _ => return Err(Malformed("kind of an entry")),
    };
    let length = take_varint(entries)?;
    let length = usize::try_from(length).map_err(|_| Malformed("length of an entry"))?;
    let ends = Malformed("ends within an entry");
    let nonce = *entries.first_chunk::<{ Nonce::BYTES }>().ok_or(ends)?;
    entries.advance(Nonce::BYTES);
    if length > entries.len() {
        return Err(ends);
    }
    Ok(Entry {
        table,
        kind,
        nonce: Nonce::from_bytes(nonce),
        record: entries.split_to(length),
    })
}

/// As in protobuf.
fn take_varint(bytes: &mut Bytes) -> Result<u64, Malformed> {
    let mut value = 0u64;
    for i in 0..10 {
        let Some(&byte) = bytes.first() else {
            return Err(Malformed("ends within a number"));
        };
        bytes.advance(1);
        let bits = u64::from(byte & 0x7F);
        if i == 9 && bits > 1 {
            break;
        }
        value |= bits << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Malformed("a number above 64 bits"))
}

/// Adds an entry to the `entries` of a transaction. The streamer makes none; this is the other end of what it reads, for
/// tests and benches.
pub fn push(entries: &mut BytesMut, table: u64, kind: Kind, nonce: Nonce, record: &[u8]) {
    let kind = match kind {
        Kind::Insert => 0,
        Kind::Update => 1,
        Kind::Delete => 2,
    };
    for mut value in [table, kind, record.len() as u64] {
        while value >= 0x80 {
            entries.put_u8(value as u8 | 0x80);
            value >>= 7;
        }
        entries.put_u8(value as u8);
    }
    entries.extend_from_slice(&nonce.to_bytes());
    entries.extend_from_slice(record);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(policy: &Policy) -> Arc<WriteTable> {
        let columns = ["id", "a", "b"].map(str::to_owned).to_vec();
        Arc::new(WriteTable::new("public".into(), "t".into(), columns, vec![0], policy).unwrap())
    }

    fn read(table: Arc<WriteTable>, entries: &[u8]) -> Result<LocalTransaction, Invalid> {
        let tables = vec![table];
        let hash = chain(&NO_HASH, 1, &tables, entries);
        let entries = Bytes::copy_from_slice(entries);
        LocalTransaction::read(&NO_HASH, 1, hash, tables, entries, false)
    }

    fn nonce(random: u64) -> Nonce {
        Nonce::new(1_800_000_000, random)
    }

    #[test]
    fn entries_are_read_as_they_were_written() {
        use ValueRef::{Integer, Null, Text};
        let mut policy = Policy::default();
        policy.columns.insert("b".into(), Conflict::FirstWrite);
        let table = table(&policy);
        let mut entries = BytesMut::new();
        let row = [Integer(1), Text("x"), Null];
        push(&mut entries, 0, Kind::Insert, nonce(1), &record::build(row));
        let update = [Integer(1), Text("011"), Text("y"), Integer(2), Null];
        push(
            &mut entries,
            0,
            Kind::Update,
            nonce(2),
            &record::build(update),
        );
        let delete = [Integer(1), Integer(1), Text("y"), Integer(2)];
        push(
            &mut entries,
            0,
            Kind::Delete,
            nonce(3),
            &record::build(delete),
        );
        let transaction = read(table, &entries).unwrap();
        let nonces: Vec<_> = transaction.entries.iter().map(Entry::nonce).collect();
        assert_eq!(nonces, [nonce(1), nonce(2), nonce(3)]);
        let changes: Vec<_> = transaction
            .entries
            .iter()
            .map(|entry| transaction.change(entry).unwrap())
            .collect();
        let set = |column, new, old| Set { column, new, old };
        assert_eq!(
            changes,
            [
                Change::Insert { row: row.to_vec() },
                Change::Update {
                    key: vec![Integer(1)],
                    set: vec![set(1, Text("y"), None), set(2, Integer(2), Some(Null))],
                },
                Change::Delete {
                    key: vec![Integer(1)],
                    old: Some(vec![Integer(1), Text("y"), Integer(2)]),
                },
            ]
        );
    }

    #[test]
    fn one_transaction_is_remembered_by_its_last_entry_and_several_by_all() {
        let mut entries = BytesMut::new();
        for id in 1..=3 {
            let row = [ValueRef::Integer(id); 3];
            push(
                &mut entries,
                0,
                Kind::Insert,
                nonce(id as u64),
                &record::build(row),
            );
        }
        let mut one = read(table(&Policy::default()), &entries).unwrap();
        assert_eq!(one.claimed(), &one.entries[2..]);
        one.merged = true;
        assert_eq!(one.claimed(), one.entries);
        one.entries.clear();
        assert_eq!(one.claimed(), []);
    }

    #[test]
    fn a_policy_that_changed_since_the_write_does_not_make_it_unreadable() {
        use ValueRef::{Integer, Text};
        let update = |values: &[ValueRef<'static>]| {
            let mut entries = BytesMut::new();
            let values = [Integer(1), Text("011")].into_iter().chain(values.to_vec());
            push(
                &mut entries,
                0,
                Kind::Update,
                nonce(2),
                &record::build(values),
            );
            let mut policy = Policy::default();
            policy.columns.insert("b".into(), Conflict::Add);
            read(table(&policy), &entries)
        };
        for (values, olds) in [
            (vec![Integer(1), Integer(2)], [None, None]),
            (
                vec![Integer(1), Integer(2), Integer(3)],
                [None, Some(Integer(3))],
            ),
            (
                vec![Integer(1), Integer(2), Integer(3), Integer(4)],
                [Some(Integer(2)), Some(Integer(4))],
            ),
        ] {
            let transaction = update(&values).unwrap();
            let change = transaction.change(&transaction.entries[0]).unwrap();
            let Change::Update { set, .. } = change else {
                panic!("an update");
            };
            assert_eq!([set[0].old, set[1].old], olds);
        }
        assert!(update(&[Integer(1)]).is_err());
        assert!(update(&[Integer(1); 5]).is_err());
    }

    #[test]
    fn a_transaction_of_another_file_is_noticed() {
        let table = table(&Policy::default());
        let mut hash = chain(&NO_HASH, 1, std::slice::from_ref(&table), b"");
        let read = |hash| {
            LocalTransaction::read(&NO_HASH, 1, hash, vec![table.clone()], Bytes::new(), false)
        };
        assert!(read(hash).is_ok());
        hash[31] ^= 1;
        assert_eq!(read(hash), Err(Invalid::Hash));
        assert_ne!(chain(&NO_HASH, 1, &[], b""), chain(&NO_HASH, 2, &[], b""));
        // The same bytes, to another table.
        let other = WriteTable {
            name: "u".into(),
            ..WriteTable::clone(&table)
        };
        assert_ne!(
            chain(&NO_HASH, 1, &[table], b""),
            chain(&NO_HASH, 1, &[Arc::new(other)], b"")
        );
    }

    #[test]
    fn a_table_that_makes_no_sense_is_refused() {
        let new = |columns: &[&str], key: &[usize]| {
            let columns = columns.iter().map(|column| (*column).to_owned()).collect();
            WriteTable::new(
                "s".into(),
                "t".into(),
                columns,
                key.to_vec(),
                &Policy::default(),
            )
        };
        assert!(new(&["a", "b"], &[1, 0]).is_ok());
        assert!(new(&[], &[]).is_err());
        assert!(new(&["a"], &[]).is_err());
        assert!(new(&["a"], &[1]).is_err());
        assert!(new(&["a"], &[usize::MAX]).is_err());
        assert!(new(&["a", "b"], &[0, 0]).is_err());
        assert!(new(&["a", "a"], &[0]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(table(&Policy::default()), &bytes);
        }

        #[test]
        fn any_record_is_read_without_panic(
            kind in 0usize..3,
            values in prop::collection::vec(prop_oneof![
                Just(ValueRef::Null), Just(ValueRef::Text("011")), Just(ValueRef::Text("01")),
                any::<i64>().prop_map(ValueRef::Integer),
            ], 0..9),
            flip in any::<prop::sample::Index>(),
            bit in 0u8..9,
        ) {
            let mut bytes = record::build(values).to_vec();
            let at = flip.index(bytes.len());
            if bit < 8 {
                bytes[at] ^= 1 << bit;
            }
            let mut entries = BytesMut::new();
            push(&mut entries, 0, [Kind::Insert, Kind::Update, Kind::Delete][kind], nonce(1), &bytes);
            let policy = Policy { table: Conflict::Add, ..Policy::default() };
            let _ = read(table(&policy), &entries);
        }
    }
}
