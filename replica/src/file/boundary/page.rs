//! The few pages whose content is looked at: the head table's only page, and the database's first.
//!
//! Source: <https://www.sqlite.org/fileformat2.html>, "B-tree Pages" and "Record Format". Like `wal`, these never trust
//! what they read: a page number may name another page by now.

/// First byte of a leaf page of a table.
const TABLE_LEAF: u8 = 0x0d;

/// Where page 1 tells the number of changes to the schema.
const COOKIE_OFFSET: usize = 40;

/// `PRAGMA schema_version`, from page 1; `None`: too short.
pub(super) fn cookie(first: &[u8]) -> Option<u32> {
    let cookie = first.get(COOKIE_OFFSET..)?.first_chunk::<4>()?;
    Some(u32::from_be_bytes(*cookie))
}

/// `last` of the head table, from its root page: a leaf with one cell, whose row has id 1 and the values NULL (an
/// `INTEGER PRIMARY KEY` is the row's id) and an integer. `None`: this is no such page.
///
/// A page may end with bytes that are not SQLite's (`reserved space`). No cell is there, and a row this short never
/// overflows its page, so their number does not matter.
pub(super) fn head(page: &[u8]) -> Option<i64> {
    let half = |offset: usize| -> Option<u16> {
        let half = page.get(offset..)?.first_chunk::<2>()?;
        Some(u16::from_be_bytes(*half))
    };
    if *page.first()? != TABLE_LEAF || half(3)? != 1 {
        return None;
    }
    let mut cell = page.get(usize::from(half(8)?)..)?;
    let payload_bytes = usize::try_from(varint(&mut cell)?).ok()?;
    let row_id = varint(&mut cell)?;
    let payload = cell.get(..payload_bytes)?;
    let &[3, 0, kind, ref value @ ..] = payload else {
        return None;
    };
    let wide = match kind {
        1..=4 => usize::from(kind),
        5 => 6,
        6 => 8,
        8 | 9 => 0,
        _ => return None,
    };
    if row_id != 1 || value.len() != wide {
        return None;
    }
    match kind {
        8 => Some(0),
        9 => Some(1),
        _ => {
            let is_negative = value.first()? & 0x80 != 0;
            let mut bytes = [if is_negative { 0xff } else { 0 }; 8];
            bytes[8 - wide..].copy_from_slice(value);
            Some(i64::from_be_bytes(bytes))
        }
    }
}

/// Takes a variable-length integer off the front.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for place in 0..9 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        if place == 8 {
            return Some(value << 8 | u64::from(byte));
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use rusqlite::Connection;

    use super::*;

    #[test]
    fn a_varint_of_each_length_is_read() {
        let cases: [(&[u8], Option<u64>, usize); 6] = [
            (&[0x7f], Some(0x7f), 0),
            (&[0x81, 0x00, 9], Some(0x80), 1),
            (&[0xff; 9], Some(u64::MAX), 0),
            (
                &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 5, 6],
                Some(5),
                1,
            ),
            (&[], None, 0),
            (&[0x80], None, 0),
        ];
        for (mut bytes, expected, left) in cases {
            let told = varint(&mut bytes);
            assert_eq!((told, bytes.len()), (expected, left));
        }
    }

    #[test]
    fn an_id_of_each_width_is_read_from_a_page_that_sqlite_wrote() {
        let directory = tempfile::tempdir().unwrap();
        for (page_bytes, last) in [512u32, 4_096, 65_536].into_iter().zip([0, 1, 127].iter()) {
            check(directory.path(), page_bytes, *last);
        }
        for shift in [7, 8, 15, 16, 23, 24, 31, 32, 47, 48, 62] {
            for last in [(1i64 << shift) - 1, 1 << shift, -(1 << shift)] {
                check(directory.path(), 1_024, last);
            }
        }
        check(directory.path(), 1_024, i64::MAX);
        check(directory.path(), 1_024, i64::MIN);
    }

    fn check(directory: &std::path::Path, page_bytes: u32, last: i64) {
        let path = directory.join("one.db");
        let _ = fs::remove_file(&path);
        let connection = Connection::open(&path).unwrap();
        connection
            .execute_batch(&format!(
                "PRAGMA page_size = {page_bytes};
                 CREATE TABLE _anabranch_head(id INTEGER PRIMARY KEY CHECK(id = 1), last INTEGER NOT NULL) STRICT;
                 INSERT INTO _anabranch_head VALUES(1, {last})"
            ))
            .unwrap();
        let (root, cookie): (u32, u32) = connection
            .query_row(
                "SELECT rootpage, schema_version FROM sqlite_schema, pragma_schema_version WHERE name = '_anabranch_head'",
                [],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .unwrap();
        drop(connection);
        let file = fs::read(&path).unwrap();
        let (root, page_bytes) = (root as usize, page_bytes as usize);
        assert_eq!(super::cookie(&file), Some(cookie));
        let page = &file[(root - 1) * page_bytes..root * page_bytes];
        assert_eq!(head(page), Some(last), "{page_bytes} bytes");
        assert_eq!(head(&file[..page_bytes]), None, "page 1 is no head");
    }

    proptest! {
        #[test]
        fn any_page_is_survived(
            mut page in prop::collection::vec(any::<u8>(), 0..600),
            like_a_leaf: bool,
        ) {
            if let (true, Some(page)) = (like_a_leaf, page.first_chunk_mut::<5>()) {
                *page = [TABLE_LEAF, 0, 0, 0, 1];
            }
            let _ = head(&page);
            let _ = cookie(&page);
        }
    }
}
