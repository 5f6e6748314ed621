//! Places in the history of a source.

use std::{fmt, str::FromStr};

use crate::v1;

/// A WAL position of Postgres; WAL up to it is included. Zero is before everything.
///
/// As text it is what Postgres prints: `0/16B3748`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not an LSN or a position.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not {1}")]
pub struct Unreadable(String, &'static str);

impl FromStr for Lsn {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let half = |digits: &str| {
            // from_str_radix alone would take a sign.

            digits
                .bytes()
                .all(|b| b.is_ascii_hexdigit())
                .then_some(())?;
            u32::from_str_radix(digits, 16).ok()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some((half(high)?, half(low)?)))
            .map(|(high, low)| Lsn(u64::from(high) << 32 | u64::from(low)))
            .ok_or_else(|| Unreadable(text.into(), "an LSN such as 0/16B3748"))
    }
}

/// One history of a source. As text: 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Epoch {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        (text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()))
            .then(|| u64::from_str_radix(text, 16).ok())
            .flatten()
            .map(Epoch)
            .ok_or_else(|| Unreadable(text.into(), "an epoch of 16 hexadecimal digits"))
    }
}

/// A place in the history of a source. Positions of different epochs do not compare.
///
/// As text: `epoch@lsn`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Position {
    /// Which history.
    pub epoch: Epoch,
    /// Where in it.
    pub lsn: Lsn,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.epoch, self.lsn)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Position {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('@')
            .and_then(|(epoch, lsn)| {
                Some(Position {
                    epoch: epoch.parse().ok()?,
                    lsn: lsn.parse().ok()?,
                })
            })
            .ok_or_else(|| Unreadable(text.into(), "a position such as 00c0ffee00c0ffee@0/16B3748"))
    }
}

impl From<Position> for v1::Position {
    fn from(position: Position) -> Self {
        v1::Position {
            epoch: position.epoch.0,
            lsn: position.lsn.0,
        }
    }
}

impl From<v1::Position> for Position {
    fn from(position: v1::Position) -> Self {
        Position {
            epoch: Epoch(position.epoch),
            lsn: Lsn(position.lsn),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_position_round_trips() {
        for (lsn, text) in [
            (0, "0/0"),
            (0x16B_3748, "0/16B3748"),
            (u64::MAX, "FFFFFFFF/FFFFFFFF"),
            (0xFFFF_FFFF_0000_0001, "FFFFFFFF/1"),
        ] {
            assert_eq!(Lsn(lsn).to_string(), text);
            assert_eq!(text.parse(), Ok(Lsn(lsn)));
            let position = Position {
                epoch: Epoch(lsn ^ 7),
                lsn: Lsn(lsn),
            };
            assert_eq!(position.to_string().parse(), Ok(position));
        }
    }

    #[test]
    fn text_that_is_no_position_is_refused() {
        for text in [
            "",
            "/",
            "0/",
            "/0",
            "+1/0",
            "0/-1",
            "123456789/0",
            "0/G",
            "1",
        ] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
        for text in ["0/1", "@0/1", "1@0/1", "00c0ffee00c0ffeeX@0/1"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
