//! Dates, times and timestamps as numbers, from the text that a record has and from unambiguous constants.
//!
//! Source: <https://www.postgresql.org/docs/15/datatype-datetime.html>. Only ISO forms are read, which mean the same
//! under every DateStyle: `2024-02-29`, `2024-02-29 12:30:00.5+02`, years up to 7 digits, ` BC`, and `infinity`.

/// Microseconds since 1970-01-01 00:00 (of UTC, where there is a zone). A date is its midnight. Wide enough for all
/// dates, whose years go beyond those of timestamps.
pub type Instant = i128;

/// Later than every instant.
pub const INFINITY: Instant = Instant::MAX;

/// Earlier than every instant.
pub const NEGATIVE_INFINITY: Instant = Instant::MIN;

const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400 * SECOND;

/// What a text says, not yet checked against what its type may have.
struct Scanned {
    days: i64,
    /// Microseconds of the day, if a time is there.
    time: Option<i64>,
    /// Seconds east of UTC, if a zone is there.
    zone: Option<i64>,
}

/// What a timestamp must have or not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// timestamptz
    Needed,
    /// timestamp
    None,
}

/// A date.
pub fn date(text: &str) -> Option<Instant> {
    if let Some(infinite) = infinite(text) {
        return Some(infinite);
    }
    let scanned = scan(text)?;
    let is_date = scanned.time.is_none() && scanned.zone.is_none();
    is_date.then_some(Instant::from(scanned.days) * Instant::from(DAY))
}

/// A timestamp, with or without time zone.
pub fn timestamp(text: &str, zone: Zone) -> Option<Instant> {
    if let Some(infinite) = infinite(text) {
        return Some(infinite);
    }
    let scanned = scan(text)?;
    if scanned.zone.is_some() != (zone == Zone::Needed) {
        return None;
    }
    let time = scanned.time? - scanned.zone.unwrap_or(0) * SECOND;
    Some(Instant::from(scanned.days) * Instant::from(DAY) + Instant::from(time))
}

/// Microseconds of the day; `24:00:00` is one, too.
pub fn time(text: &str) -> Option<i64> {
    let mut cursor = Cursor(text.as_bytes());
    let micros = cursor.time()?;
    cursor.0.is_empty().then_some(micros)
}

/// Why `text` is refused as a constant of a date.
pub fn check_date(text: &str) -> Result<(), String> {
    let instant = date(text).ok_or("write a date as 'YYYY-MM-DD', 'infinity' or '-infinity'")?;
    let range = from_days(-4713, 11, 24)..from_days(5_874_898, 1, 1);
    in_range(instant, &range)
}

/// Why `text` is refused as a constant of a timestamp.
pub fn check_timestamp(text: &str, zone: Zone) -> Result<(), String> {
    let instant = timestamp(text, zone).ok_or(match zone {
        Zone::Needed => {
            "write a timestamptz as 'YYYY-MM-DD HH:MM:SS+00' with its zone as an offset or Z (without one it \
             would depend on the session), 'infinity' or '-infinity'"
        }
        Zone::None => {
            "write a timestamp as 'YYYY-MM-DD HH:MM:SS' without a zone (Postgres would ignore it), 'infinity' \
             or '-infinity'"
        }
    })?;
    let range = from_days(-4713, 11, 24)..from_days(294_277, 1, 1);
    // 24:00 is the next day to Postgres; one way to write it is enough.
    if scan(text).is_some_and(|scanned| scanned.time >= Some(DAY)) {
        return Err("write 24:00 as 00:00 of the next day".to_owned());
    }
    in_range(instant, &range)
}

fn in_range(instant: Instant, range: &std::ops::Range<Instant>) -> Result<(), String> {
    let is_infinite = [INFINITY, NEGATIVE_INFINITY].contains(&instant);
    if is_infinite || range.contains(&instant) {
        Ok(())
    } else {
        Err("out of Postgres' range".to_owned())
    }
}

fn from_days(year: i64, month: i64, day: i64) -> Instant {
    Instant::from(days(year, month, day)) * Instant::from(DAY)
}

fn infinite(text: &str) -> Option<Instant> {
    match text {
        "infinity" => Some(INFINITY),
        "-infinity" => Some(NEGATIVE_INFINITY),
        _ => None,
    }
}

/// Days since 1970-01-01 in the Gregorian calendar, extended to all time; the year before 1 is 0.
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `days_from_civil`.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year.rem_euclid(4) == 0
            && (year.rem_euclid(100) != 0 || year.rem_euclid(400) == 0) =>
        {
            29
        }
        2 => 28,
        _ => 31,
    }
}

fn scan(text: &str) -> Option<Scanned> {
    let (bytes, before_christ) = match text.as_bytes() {
        [bytes @ .., b' ', b'B', b'C'] => (bytes, true),
        bytes => (bytes, false),
    };
    let mut cursor = Cursor(bytes);
    let year_digits = bytes
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    if !(4..=7).contains(&year_digits) {
        return None;
    }
    let written = cursor.number(year_digits)?;
    if written == 0 {
        return None;
    }
    let year = if before_christ { 1 - written } else { written };
    cursor.literal(b'-')?;
    let month = cursor.number(2)?;
    cursor.literal(b'-')?;
    let day = cursor.number(2)?;
    if !(1..=12).contains(&month) || !(1..=days_in_month(year, month)).contains(&day) {
        return None;
    }
    let mut scanned = Scanned {
        days: days(year, month, day),
        time: None,
        zone: None,
    };
    if let [b' ' | b'T', rest @ ..] = cursor.0 {
        cursor.0 = rest;
        scanned.time = Some(cursor.time()?);
        scanned.zone = cursor.zone()?;
    }
    cursor.0.is_empty().then_some(scanned)
}

struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    /// A number of exactly `digits` digits.
    fn number(&mut self, digits: usize) -> Option<i64> {
        let (number, rest) = self.0.split_at_checked(digits)?;
        let mut value = 0;
        for &byte in number {
            if !byte.is_ascii_digit() {
                return None;
            }
            value = value * 10 + i64::from(byte - b'0');
        }
        self.0 = rest;
        Some(value)
    }

    fn literal(&mut self, byte: u8) -> Option<()> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        (first == byte).then_some(())
    }

    fn take(&mut self, byte: u8) -> bool {
        match self.0 {
            [first, rest @ ..] if *first == byte => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    /// `HH:MM[:SS[.ffffff]]`
    fn time(&mut self) -> Option<i64> {
        let hour = self.number(2)?;
        self.literal(b':')?;
        let minute = self.number(2)?;
        let second = if self.take(b':') { self.number(2)? } else { 0 };
        let mut micros = 0;
        if self.take(b'.') {
            let digits = self
                .0
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count();
            if !(1..=6).contains(&digits) {
                return None;
            }
            micros = self.number(digits)? * 10i64.pow(6 - digits as u32);
        }
        if minute > 59 || second > 59 {
            return None;
        }
        let total = ((hour * 60 + minute) * 60 + second) * SECOND + micros;
        (total <= DAY).then_some(total)
    }

    /// `Z`, `+HH`, `+HH:MM`, `+HH:MM:SS`, `+HHMM`, or nothing: seconds east of UTC.
    fn zone(&mut self) -> Option<Option<i64>> {
        if self.0.is_empty() {
            return Some(None);
        }
        if self.take(b'Z') {
            return Some(Some(0));
        }
        let sign = match self.0.first()? {
            b'+' => 1,
            b'-' => -1,
            _ => return None,
        };
        self.0 = &self.0[1..];
        let hours = self.number(2)?;
        let (mut minutes, mut seconds) = (0, 0);
        if self.take(b':') {
            minutes = self.number(2)?;
            if self.take(b':') {
                seconds = self.number(2)?;
            }
        } else if !self.0.is_empty() {
            minutes = self.number(2)?;
        }
        // Postgres' bounds: below 16 hours.
        (hours <= 15 && minutes <= 59 && seconds <= 59)
            .then_some(Some(sign * ((hours * 60 + minutes) * 60 + seconds)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_ascend_over_every_form() {
        let ascending = [
            "-infinity",
            "4714-11-24 BC",
            "0044-03-15 BC",
            "0001-12-31 BC",
            "0001-01-01",
            "1969-12-31",
            "1970-01-01",
            "2024-02-29",
            "9999-12-31",
            "10000-01-01",
            "5874897-12-31",
            "infinity",
        ];
        assert!(
            ascending
                .windows(2)
                .all(|pair| date(pair[0]).unwrap() < date(pair[1]).unwrap())
        );
        assert_eq!(date("1970-01-01"), Some(0));
        // The year before 1 is 1 BC: no day between.
        assert_eq!(
            date("0001-01-01").unwrap() - date("0001-12-31 BC").unwrap(),
            Instant::from(DAY)
        );
        assert!(ascending.iter().all(|text| check_date(text).is_ok()));
    }

    #[test]
    fn timestamps_ascend_over_every_form() {
        let ascending = [
            "-infinity",
            "0044-03-15 00:00:00+00 BC",
            "0044-03-15 00:00:00.5+00 BC",
            "1969-12-31 23:59:59.999999Z",
            "1970-01-01 00:00:00.000000Z",
            "1970-01-01 00:00:00.000001Z",
            "9999-12-31 23:59:59.999999Z",
            "10000-01-01 00:00:00+00",
            "294276-12-31 23:59:59.999999+00",
            "infinity",
        ];
        let instant = |text| timestamp(text, Zone::Needed).unwrap();
        assert!(
            ascending
                .windows(2)
                .all(|pair| instant(pair[0]) < instant(pair[1]))
        );
        assert_eq!(instant("1970-01-01 02:00:00+02"), 0);
        assert_eq!(instant("1969-12-31T18:30:00-05:30"), 0);
        assert_eq!(timestamp("1970-01-01 00:00", Zone::None), Some(0));
    }

    #[test]
    fn what_is_ambiguous_or_impossible_is_no_constant() {
        for text in [
            "now",
            "today",
            "epoch",
            "Infinity",
            "2024-02-30",
            "2023-02-29",
            "24-01-01",
            "2024-1-5",
            "0000-01-01",
            "01/02/2024",
            "2024-01-05 10:00",
            "2024-13-01",
            "5874898-01-01",
            "4714-11-23 BC",
            "2024-01-05 AD",
            "",
            "2024-01-05x",
            " 2024-01-05",
        ] {
            assert!(check_date(text).is_err(), "{text:?}");
        }
        for text in [
            "2024-01-05",
            "2024-01-05 10:00:00",
            "2024-01-05 10:00:00 UTC",
            "2024-01-05 10:00:60Z",
            "2024-01-05 24:00:00Z",
            "2024-01-05 10:00:00.1234567Z",
            "2024-01-05 10:00:00+16",
            "294277-01-01 00:00:00Z",
            "294276-12-31 23:59:59-01",
        ] {
            assert!(check_timestamp(text, Zone::Needed).is_err(), "{text:?}");
        }
        assert!(check_timestamp("2024-01-05 10:00:00Z", Zone::None).is_err());
        for text in [
            "24:00:01",
            "24:00:00.000001",
            "1:00",
            "10:60:00",
            "10:00:60",
            "25:00",
            "10",
            "",
        ] {
            assert_eq!(time(text), None, "{text:?}");
        }
        assert_eq!(time("24:00:00"), Some(DAY));
        assert_eq!(time("23:59:59.999999"), Some(DAY - 1));
    }
}
