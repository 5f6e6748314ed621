//! Freshness: what `_anabranch_status` says, and when a position has reached another.

use std::time::Duration;

use anabranch_proto::Lsn;
use jiff::Timestamp;

use super::receipts::BOUNDARY;

/// When the state row's heartbeat is older than this, the status view says `connected = 0`, whatever the row says: a
/// killed sidecar cannot lie. Three of the reports that come every five seconds.
pub(super) const HEARTBEAT_AGE_MAX: Duration = Duration::from_secs(15);

/// What was heard of the source longer ago than this is not known any more: a streamer that has nothing else to say
/// sends a heartbeat each second, and one that sends a long transaction says nothing of the source until its end.
pub const HEARD_AGE_MAX: Duration =
    Duration::from_secs(3 * anabranch_proto::HEARTBEAT_EVERY.as_secs());

/// WAL pages of Postgres, unless it was built otherwise.
const PAGE_BYTES: u64 = 8192;
/// Header of such a page.
const PAGE_HEADER_BYTES: u64 = 24;
/// WAL segments of Postgres, unless initdb was told otherwise.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
/// Header of the first page of a segment.
const SEGMENT_HEADER_BYTES: u64 = 40;

/// Whether a position at `lsn` includes all WAL up to `target`.
///
/// An idle server's insert LSN can lie just behind a page's header, where nothing but the header is, while the last
/// record ended at the page's start. So an LSN within a header counts as the page's start, on both sides.
pub fn reaches(lsn: Lsn, target: Lsn) -> bool {
    without_header(lsn) >= without_header(target)
}

/// The LSN, or the start of its page where it lies within the page's header.
pub fn without_header(Lsn(lsn): Lsn) -> u64 {
    let header = match lsn % SEGMENT_BYTES {
        0..PAGE_BYTES => SEGMENT_HEADER_BYTES,
        _ => PAGE_HEADER_BYTES,
    };
    match lsn % PAGE_BYTES {
        offset if offset <= header => lsn - offset,
        _ => lsn,
    }
}

/// A time in the form that all times in the file have: `YYYY-MM-DD HH:MM:SS.ffffffZ`. It sorts, and SQLite's date
/// functions read it.
pub(super) fn time_text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S%.6fZ").to_string()
}

/// The same of microseconds since 1970; `None` where they are zero (not known), or no time at all.
pub(super) fn micros_text(micros: i64) -> Option<String> {
    (micros != 0)
        .then(|| Timestamp::from_microsecond(micros).ok())
        .flatten()
        .map(time_text)
}

/// The view, in SQL that any SQLite ≥ 3.37 runs. Ids of entries have no gaps, so what is pending is not counted.
pub(super) fn view() -> String {
    let seconds = HEARTBEAT_AGE_MAX.as_secs();
    // A heartbeat from the future (the clock was set back) proves as little as an old one.
    let alive = format!(
        "coalesce(abs(julianday('now') - julianday(heartbeat_time)) * 86400 < {seconds}, 0)"
    );
    format!(
        "CREATE VIEW _anabranch_status AS SELECT epoch, lsn, commit_time, received_time, \
         connected AND {alive} AS connected, connected AND caught_up AND {alive} AS caught_up, \
         max(coalesce((SELECT last FROM _anabranch_head), 0) - {BOUNDARY}, 0) AS pending, \
         (SELECT count(*) FROM _anabranch_rejected) AS rejected, last_error FROM _anabranch_state"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_servers_insert_lsn_behind_a_page_header_is_reached() {
        let reached = |lsn: u64, target: u64| reaches(Lsn(lsn), Lsn(target));
        let page = 0x16_B200_0000 + 3 * PAGE_BYTES;
        assert!(reached(page, page));
        assert!(reached(page, page + 24));
        assert!(reached(page + 24, page));
        assert!(!reached(page, page + 32));
        assert!(!reached(page - 8, page + 24));
        assert!(!reached(page - 8, page));
        let segment = 0x16_B200_0000;
        assert!(reached(segment, segment + 24));
        assert!(reached(segment, segment + 40));
        assert!(!reached(segment, segment + 48));
        assert!(!reached(segment - 8, segment));
        assert!(reached(0, 0));
        assert!(reached(u64::MAX, u64::MAX));
    }

    #[test]
    fn times_have_six_digits_and_sort() {
        assert_eq!(micros_text(0), None);
        assert_eq!(
            micros_text(1_700_000_000_000_001).as_deref(),
            Some("2023-11-14 22:13:20.000001Z")
        );
        assert_eq!(
            micros_text(1_700_000_000_000_000).as_deref(),
            Some("2023-11-14 22:13:20.000000Z")
        );
        assert_eq!(micros_text(i64::MAX), None);
        assert_eq!(micros_text(i64::MIN), None);
    }
}
