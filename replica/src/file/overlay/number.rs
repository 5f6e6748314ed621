//! Sums of numbers as they are stored: for columns whose conflict policy is to add.
//!
//! `numeric` is a TEXT of any length and scale; what Postgres prints after an addition has the larger of the two scales.
//! It is added digit by digit, as it is written, since no decimal type of fixed width holds all of it.

use std::cmp::Ordering;

use rusqlite::types::Value;

/// `there + (new - old)`. `None` where that is not a number of the same storage: a NULL, a NaN, an overflow.
pub(super) fn add(there: &Value, old: &Value, new: &Value) -> Option<Value> {
    match (there, old, new) {
        (Value::Integer(there), Value::Integer(old), Value::Integer(new)) => {
            let sum = i128::from(*there) + i128::from(*new) - i128::from(*old);
            i64::try_from(sum).ok().map(Value::Integer)
        }
        (Value::Real(there), Value::Real(old), Value::Real(new)) => {
            let sum = there + (new - old);
            (!sum.is_nan()).then_some(Value::Real(sum))
        }
        (Value::Text(there), Value::Text(old), Value::Text(new)) => {
            let (there, old, new) = (parse(there)?, parse(old)?, parse(new)?);
            let difference = plus(&new, &negative(old));
            Some(Value::Text(print(&plus(&there, &difference))))
        }
        _ => None,
    }
}

/// A decimal number: its digits without sign or point, the first of them first, and how many are behind the point.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Decimal {
    is_negative: bool,
    digits: Vec<u8>,
    scale: usize,
}

/// As Postgres prints it: no exponent. `NaN` and the infinities are none.
fn parse(text: &str) -> Option<Decimal> {
    let (is_negative, unsigned) = match text.strip_prefix('-') {
        Some(unsigned) => (true, unsigned),
        None => (false, text),
    };
    let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    let digits: Vec<u8> = whole.bytes().chain(fraction.bytes()).collect();
    if whole.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(Decimal {
        is_negative,
        digits: digits.into_iter().map(|digit| digit - b'0').collect(),
        scale: fraction.len(),
    })
}

fn negative(number: Decimal) -> Decimal {
    Decimal {
        is_negative: !number.is_negative,
        ..number
    }
}

fn plus(a: &Decimal, b: &Decimal) -> Decimal {
    let scale = a.scale.max(b.scale);
    let whole = (a.digits.len() - a.scale).max(b.digits.len() - b.scale);
    // One more in front, for a carry.
    let aligned = |number: &Decimal| {
        let mut digits = vec![0; 1 + whole - (number.digits.len() - number.scale)];
        digits.extend_from_slice(&number.digits);
        digits.resize(1 + whole + scale, 0);
        digits
    };
    let (x, y) = (aligned(a), aligned(b));
    let (is_negative, digits) = if a.is_negative == b.is_negative {
        (a.is_negative, sum(&x, &y))
    } else if x.cmp(&y) == Ordering::Less {
        (b.is_negative, difference(&y, &x))
    } else {
        (a.is_negative, difference(&x, &y))
    };
    Decimal {
        is_negative,
        digits,
        scale,
    }
}

/// Of two of one length; the first digits leave room for the carry.
fn sum(x: &[u8], y: &[u8]) -> Vec<u8> {
    let mut digits = vec![0; x.len()];
    let mut carry = 0;
    for i in (0..x.len()).rev() {
        let digit = x[i] + y[i] + carry;
        digits[i] = digit % 10;
        carry = digit / 10;
    }
    digits
}

/// Of two of one length, the larger first.
fn difference(x: &[u8], y: &[u8]) -> Vec<u8> {
    let mut digits = vec![0; x.len()];
    let mut borrow = 0;
    for i in (0..x.len()).rev() {
        let digit = 10 + x[i] - y[i] - borrow;
        digits[i] = digit % 10;
        borrow = u8::from(digit < 10);
    }
    digits
}

fn print(number: &Decimal) -> String {
    let whole = number.digits.len() - number.scale;
    let leading = number.digits[..whole.saturating_sub(1)]
        .iter()
        .take_while(|digit| **digit == 0)
        .count();
    let mut text = String::with_capacity(number.digits.len() + 2);
    if number.is_negative && number.digits.iter().any(|digit| *digit != 0) {
        text.push('-');
    }
    for (i, digit) in number.digits.iter().enumerate().skip(leading) {
        if i == whole {
            text.push('.');
        }
        text.push(char::from(b'0' + digit));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_added_exactly_and_keep_the_larger_scale() {
        let check = |there: &str, old: &str, new: &str, expected: &str| {
            let text = |text: &str| Value::Text(text.to_owned());
            assert_eq!(
                add(&text(there), &text(old), &text(new)),
                Some(text(expected)),
                "{there} + ({new} - {old})"
            );
        };
        check("0.1", "0", "0.2", "0.3");
        check("10", "3", "5", "12");
        check("1.50", "1.5", "1.5", "1.50");
        check("99.99", "0", "0.01", "100.00");
        check("0", "1", "0", "-1");
        check("-1", "0", "1", "0");
        check("-0.5", "0.25", "0.125", "-0.625");
        check("5", "-7.00", "-9", "3.00");
        check("0.00", "5", "5.0", "0.00");
        check(
            "123456789012345678901234567890.123456789",
            "0.000000001",
            "100000000000000000000000000000",
            "223456789012345678901234567890.123456788",
        );
        for odd in ["NaN", "Infinity", "", "1e5", "-", ".", "+1"] {
            let text = |text: &str| Value::Text(text.to_owned());
            assert_eq!(add(&text(odd), &text("1"), &text("2")), None, "{odd}");
            assert_eq!(add(&text("1"), &text("1"), &text(odd)), None, "{odd}");
        }
    }

    #[test]
    fn decimals_agree_with_integers() {
        let mut seed = 1u64;
        let mut number = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed as i64) >> (seed % 60)
        };
        for _ in 0..2_000 {
            let (there, old, new) = (number() / 4, number() / 4, number() / 4);
            let integers = add(&there.into(), &old.into(), &new.into());
            let text = |n: i64| Value::Text(n.to_string());
            let texts = add(&text(there), &text(old), &text(new));
            let expected = i128::from(there) + i128::from(new) - i128::from(old);
            assert_eq!(texts, Some(Value::Text(expected.to_string())));
            assert_eq!(integers, i64::try_from(expected).ok().map(Value::Integer));
        }
    }

    #[test]
    fn what_is_no_sum_is_none() {
        assert_eq!(add(&i64::MAX.into(), &0.into(), &1.into()), None);
        assert_eq!(add(&Value::Null, &0.into(), &1.into()), None);
        assert_eq!(add(&1.into(), &0.into(), &1.5.into()), None);
        assert_eq!(
            add(&1.5.into(), &1.0.into(), &2.0.into()),
            Some(Value::Real(2.5))
        );
    }
}
