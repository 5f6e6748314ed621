//! Decimal numbers of any length, compared by value without allocation.
//!
//! Source: <https://www.postgresql.org/docs/15/datatype-numeric.html>. NaN equals NaN and is greater than all else.

use std::cmp::Ordering;

/// Most digits before the decimal point that a numeric has.
const INTEGER_DIGITS_MAX: usize = 131_072;

/// Most digits after it.
const FRACTION_DIGITS_MAX: usize = 16_383;

/// A number, borrowed from its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decimal<'a> {
    /// `-Infinity`
    NegativeInfinity,
    /// Any number.
    Finite {
        /// Below zero.
        negative: bool,
        /// Its digits before the point, without leading zeros.
        integer: &'a [u8],
        /// Its digits after the point, without trailing zeros.
        fraction: &'a [u8],
    },
    /// `Infinity`
    Infinity,
    /// `NaN`
    NaN,
}

/// Room for the digits of any i64.
pub type DigitBuffer = [u8; 20];

impl<'a> Decimal<'a> {
    /// Reads what Postgres prints (and [`canonical`] returns): no blanks, no exponent.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (negative, digits) = match text.as_bytes() {
            b"NaN" => return Some(Decimal::NaN),
            b"Infinity" => return Some(Decimal::Infinity),
            b"-Infinity" => return Some(Decimal::NegativeInfinity),
            [b'-', digits @ ..] => (true, digits),
            digits => (false, digits),
        };
        let (integer, fraction) = match digits.iter().position(|&byte| byte == b'.') {
            Some(point) => (&digits[..point], &digits[point + 1..]),
            None => (digits, &digits[digits.len()..]),
        };
        if integer.is_empty() && fraction.is_empty()
            || !all_digits(integer)
            || !all_digits(fraction)
        {
            return None;
        }
        let zeros = integer.iter().take_while(|&&digit| digit == b'0').count();
        let used = fraction
            .iter()
            .rposition(|&digit| digit != b'0')
            .map_or(0, |last| last + 1);
        let (integer, fraction) = (&integer[zeros..], &fraction[..used]);
        Some(Decimal::Finite {
            negative: negative && !(integer.is_empty() && fraction.is_empty()),
            integer,
            fraction,
        })
    }

    /// The same number as an integer.
    pub fn from_integer(value: i64, buffer: &'a mut DigitBuffer) -> Self {
        let mut rest = value.unsigned_abs();
        let mut start = buffer.len();
        while rest > 0 {
            start -= 1;
            buffer[start] = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        Decimal::Finite {
            negative: value < 0,
            integer: &buffer[start..],
            fraction: &[],
        }
    }

    /// The integer of this value, if it is one and fits.
    pub fn to_integer(self) -> Option<i64> {
        let Decimal::Finite {
            negative,
            integer,
            fraction: [],
        } = self
        else {
            return None;
        };
        if integer.len() > 19 {
            return None;
        }
        let magnitude = integer
            .iter()
            .fold(0i128, |sum, &digit| sum * 10 + i128::from(digit - b'0'));
        i64::try_from(if negative { -magnitude } else { magnitude }).ok()
    }

    /// A text that is the same for equal values and no others.
    pub fn normal(self) -> String {
        match self {
            Decimal::NegativeInfinity => "-Infinity".to_owned(),
            Decimal::Infinity => "Infinity".to_owned(),
            Decimal::NaN => "NaN".to_owned(),
            Decimal::Finite {
                negative,
                integer,
                fraction,
            } => {
                let text = |digits| std::str::from_utf8(digits).unwrap_or_default();
                let sign = if negative { "-" } else { "" };
                format!("{sign}{}.{}", text(integer), text(fraction))
            }
        }
    }

    /// Bytes in the order of the numbers, the same for equal ones.
    pub fn order_bytes(self) -> Vec<u8> {
        let Decimal::Finite {
            negative,
            integer,
            fraction,
        } = self
        else {
            return vec![2 * self.rank()];
        };
        if integer.is_empty() && fraction.is_empty() {
            // Between what is below and what is above.
            return vec![3];
        }
        // 0.d × 10^e: the exponent decides, then the digits, which end below all others.
        let zeros = fraction.iter().take_while(|&&digit| digit == b'0').count();
        let (exponent, fraction) = match integer.len() {
            0 => (-(zeros as i32), &fraction[zeros..]),
            digits => (digits as i32, fraction),
        };
        let mut bytes = vec![2 * self.rank()];
        bytes.extend_from_slice(&(exponent ^ i32::MIN).to_be_bytes());
        bytes.extend_from_slice(integer);
        bytes.extend_from_slice(fraction);
        bytes.push(0);
        if negative {
            bytes[1..].iter_mut().for_each(|byte| *byte = !*byte);
        }
        bytes
    }

    fn rank(&self) -> u8 {
        match self {
            Decimal::NegativeInfinity => 0,
            Decimal::Finite { negative: true, .. } => 1,
            Decimal::Finite {
                negative: false, ..
            } => 2,
            Decimal::Infinity => 3,
            Decimal::NaN => 4,
        }
    }
}

impl Ord for Decimal<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let (
            Decimal::Finite {
                negative,
                integer: a,
                fraction: a_fraction,
            },
            Decimal::Finite {
                negative: other_negative,
                integer: b,
                fraction: b_fraction,
            },
        ) = (self, other)
        else {
            return self.rank().cmp(&other.rank());
        };
        if negative != other_negative {
            return other_negative.cmp(negative);
        }
        // Without zeros at the ends, more digits before the point are a greater number, and digits after it
        // compare like text.
        let magnitude = a
            .len()
            .cmp(&b.len())
            .then_with(|| a.cmp(b))
            .then_with(|| a_fraction.cmp(b_fraction));
        if *negative {
            magnitude.reverse()
        } else {
            magnitude
        }
    }
}

impl PartialOrd for Decimal<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

fn all_digits(bytes: &[u8]) -> bool {
    bytes.iter().all(u8::is_ascii_digit)
}

/// Reads what Postgres' input of numeric accepts, and writes it without exponent.
pub fn canonical(text: &str) -> Option<String> {
    let text = text.trim_matches(super::literal::is_blank);
    let (sign, rest) = match text.as_bytes().first()? {
        b'-' => ("-", &text[1..]),
        b'+' => ("", &text[1..]),
        _ => ("", text),
    };
    match rest.to_ascii_lowercase().as_str() {
        "nan" => return (rest.len() == text.len()).then(|| "NaN".to_owned()),
        "infinity" | "inf" => return Some(format!("{sign}Infinity")),
        _ => {}
    }
    let (mantissa, exponent) = match rest.find(['e', 'E']) {
        Some(at) => (&rest[..at], exponent(&rest[at + 1..])?),
        None => (rest, 0),
    };
    let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if integer.is_empty() && fraction.is_empty()
        || !all_digits(integer.as_bytes())
        || !all_digits(fraction.as_bytes())
    {
        return None;
    }
    // The point moves by the exponent over the digits, with zeros where there are none.
    let digits = format!("{integer}{fraction}");
    let point = integer.len() as i64 + exponent;
    let (integer, fraction) = if point <= 0 {
        (
            "0".to_owned(),
            "0".repeat(point.unsigned_abs() as usize) + &digits,
        )
    } else if point as usize >= digits.len() {
        let zeros = point as usize - digits.len();
        (digits + &"0".repeat(zeros), String::new())
    } else {
        (
            digits[..point as usize].to_owned(),
            digits[point as usize..].to_owned(),
        )
    };
    let integer = match integer.trim_start_matches('0') {
        "" => "0",
        trimmed => trimmed,
    };
    if integer.len() > INTEGER_DIGITS_MAX || fraction.len() > FRACTION_DIGITS_MAX {
        return None;
    }
    let is_zero = integer == "0" && fraction.bytes().all(|digit| digit == b'0');
    let sign = if is_zero { "" } else { sign };
    Some(match fraction.as_str() {
        "" => format!("{sign}{integer}"),
        fraction => format!("{sign}{integer}.{fraction}"),
    })
}

fn exponent(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !all_digits(digits.as_bytes()) {
        return None;
    }
    let limit = INTEGER_DIGITS_MAX as i64;
    text.parse::<i64>()
        .ok()
        .filter(|exponent| (-limit..=limit).contains(exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_compare_by_value_whatever_their_spelling() {
        // Ascending; the spellings in one line are equal.
        let ascending: &[&[&str]] = &[
            &["-Infinity"],
            &["-1000000000000000000000000000000.5"],
            &["-10"],
            &["-9.99", "-9.990", "-09.99"],
            &["-0.5"],
            &["0", "-0", "0.000", "-0.0", "00"],
            &["0.0000000001"],
            &["0.5", "0.50"],
            &["0.51"],
            &["9", "9.0"],
            &["10", "10.00", "010"],
            &["99999999999999999999"],
            &["Infinity"],
            &["NaN"],
        ];
        for (i, left) in ascending.iter().enumerate() {
            for (j, right) in ascending.iter().enumerate() {
                for (a, b) in left.iter().flat_map(|a| right.iter().map(move |b| (a, b))) {
                    let (a, b) = (Decimal::parse(a).unwrap(), Decimal::parse(b).unwrap());
                    assert_eq!(a.cmp(&b), i.cmp(&j), "{a:?} {b:?}");
                    assert_eq!(a.normal() == b.normal(), i == j, "{a:?} {b:?}");
                }
            }
        }
    }

    #[test]
    fn integers_are_decimals_at_the_edges_too() {
        for value in [0, 1, -1, 10, i64::MAX, i64::MIN, i64::MIN + 1] {
            let text = value.to_string();
            let mut buffer = [0; 20];
            let made = Decimal::from_integer(value, &mut buffer);
            assert_eq!(Some(made), Decimal::parse(&text));
            assert_eq!(made.to_integer(), Some(value));
        }
        assert_eq!(
            Decimal::parse("9223372036854775808").unwrap().to_integer(),
            None
        );
        assert_eq!(Decimal::parse("1.5").unwrap().to_integer(), None);
        assert_eq!(Decimal::parse("NaN").unwrap().to_integer(), None);
    }

    #[test]
    fn input_is_that_of_postgres() {
        for (text, expected) in [
            ("1e3", Some("1000")),
            (" +1.50e1 ", Some("15.0")),
            ("1.5e-3", Some("0.0015")),
            (".5", Some("0.5")),
            ("5.", Some("5")),
            ("-0", Some("0")),
            ("-00012.30", Some("-12.30")),
            ("nan", Some("NaN")),
            ("-inf", Some("-Infinity")),
            ("-nan", None),
            ("", None),
            (".", None),
            ("1e", None),
            ("e5", None),
            ("1 2", None),
            ("0x10", None),
            ("1e131073", None),
            ("1e99999999999999999999", None),
        ] {
            assert_eq!(canonical(text).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn garbage_is_no_number() {
        for text in ["", "-", ".", "1e5", "+1", " 1", "1..2", "１"] {
            assert_eq!(Decimal::parse(text), None, "{text:?}");
        }
    }
}
