//! Comparable values: what a column's value in a record, and a constant, become to be compared.

use std::{cmp::Ordering, sync::Arc};

use anabranch_proto::record::{Malformed, ValueRef};

use super::{
    datatype::{DataType, Domain},
    literal::{self, Constant},
    moment::{self, Instant, Zone},
    numeric::Decimal,
};
use crate::table::Kind;

/// A value that can be compared with others of its [`Domain`].
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// Integers; false and true; microseconds of a time; the place of an enum's label.
    Integer(i64),
    /// A numeric.
    Decimal(Decimal<'a>),
    /// A float.
    Float(f64),
    /// Anything that compares by its bytes.
    Bytes(&'a [u8]),
    /// A date or timestamp.
    Instant(Instant),
}

/// A [`Value`] that owns what it is made of: a constant, ready to be compared.
#[derive(Clone)]
pub enum Comparable {
    /// [`Value::Integer`]
    Integer(i64),
    /// [`Value::Decimal`]: the text that it is read from.
    Decimal(Box<str>),
    /// [`Value::Float`]
    Float(f64),
    /// [`Value::Bytes`]
    Bytes(Box<[u8]>),
    /// [`Value::Instant`]
    Instant(Instant),
}

/// How a column's value in a record is read for a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// An integer (or bool).
    Integer,
    /// An integer or a float, as a float.
    Float,
    /// The text of a numeric.
    Decimal,
    /// Text or blob, by bytes.
    Bytes,
    /// The label of an enum, by its place.
    Rank(Arc<[String]>),
    /// The text of a date.
    Date,
    /// The text of a timestamp.
    Timestamp(Zone),
    /// The text of a time.
    Time,
}

const MISMATCH: Malformed = Malformed("a value is not of its column's type");

impl Value<'_> {
    /// Compares. Two values of different domains are a record that is not of its table.
    pub fn compare(self, other: Value<'_>) -> Result<Ordering, Malformed> {
        Ok(match (self, other) {
            (Value::Integer(a), Value::Integer(b)) => a.cmp(&b),
            (Value::Bytes(a), Value::Bytes(b)) => a.cmp(b),
            (Value::Instant(a), Value::Instant(b)) => a.cmp(&b),
            (Value::Float(a), Value::Float(b)) => compare_floats(a, b),
            (Value::Decimal(a), Value::Decimal(b)) => a.cmp(&b),
            (Value::Integer(a), Value::Decimal(b)) => {
                Decimal::from_integer(a, &mut [0; 20]).cmp(&b)
            }
            (Value::Decimal(a), Value::Integer(b)) => {
                a.cmp(&Decimal::from_integer(b, &mut [0; 20]))
            }
            _ => return Err(MISMATCH),
        })
    }

    /// Bytes that are the same for equal values of a domain, and for no others. Floats have none.
    pub fn route_bytes(self) -> Vec<u8> {
        match self {
            Value::Integer(value) => tagged(b'i', &value.to_be_bytes()),
            Value::Decimal(value) => match value.to_integer() {
                Some(integer) => Value::Integer(integer).route_bytes(),
                None => tagged(b'd', value.normal().as_bytes()),
            },
            // -0.0 = 0.0 and NaN = NaN in Postgres: floats are not routed by.
            Value::Float(_) => Vec::new(),
            Value::Bytes(bytes) => tagged(b'b', bytes),
            Value::Instant(instant) => tagged(b't', &instant.to_be_bytes()),
        }
    }

    /// Bytes in the order of the values of a domain, the same for equal ones.
    pub fn order_bytes(self) -> Vec<u8> {
        match self {
            Value::Integer(value) => Decimal::from_integer(value, &mut [0; 20]).order_bytes(),
            Value::Decimal(value) => value.order_bytes(),
            Value::Bytes(bytes) => bytes.to_vec(),
            Value::Instant(instant) => (instant ^ Instant::MIN).to_be_bytes().to_vec(),
            Value::Float(value) if value.is_nan() => vec![0xff; 8],
            Value::Float(value) => {
                // -0 is 0. Of negative ones, those further from zero come first.
                let bits = (value + 0.0).to_bits();
                let negative = bits >> 63 == 1;
                let bits = if negative { !bits } else { bits | 1 << 63 };
                bits.to_be_bytes().to_vec()
            }
        }
    }
}

fn tagged(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(bytes.len() + 1);
    key.push(tag);
    key.extend_from_slice(bytes);
    key
}

/// Postgres' order of floats: NaN equals NaN and is greater than all else; -0 equals 0.
fn compare_floats(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b)
        .unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

impl Comparable {
    /// Makes a constant comparable in `domain`.
    pub fn new(constant: &Constant, domain: &Domain) -> Result<Comparable, String> {
        let text = constant.text.as_str();
        let data_type = &constant.data_type;
        let broken = || format!("not a value of type {}", data_type.sql());
        Ok(match domain {
            Domain::Number => match Decimal::parse(text).ok_or_else(broken)?.to_integer() {
                Some(integer) => Comparable::Integer(integer),
                None => Comparable::Decimal(text.into()),
            },
            Domain::Float => {
                let as_float8 = match data_type {
                    // The exact value of the float4, widened.
                    DataType::Float4 => f64::from(text.parse::<f32>().map_err(|_| broken())?),
                    DataType::Numeric => {
                        let constant = literal::read(&DataType::Float8, text)?;
                        constant.text.parse().map_err(|_| broken())?
                    }
                    _ => text.parse::<f64>().map_err(|_| broken())?,
                };
                Comparable::Float(as_float8)
            }
            Domain::Bool => Comparable::Integer(i64::from(text == "true")),
            Domain::Label => Comparable::Bytes(text.as_bytes().into()),
            Domain::Bytes => match data_type {
                DataType::Bytea => {
                    let digits = text.strip_prefix("\\x").ok_or_else(broken)?;
                    Comparable::Bytes(literal::unhex(digits).ok_or_else(broken)?.into())
                }
                _ => Comparable::Bytes(text.as_bytes().into()),
            },
            Domain::Rank(labels) => Comparable::Integer(rank(labels, text).ok_or_else(broken)?),
            Domain::Instant => Comparable::Instant(
                match data_type {
                    DataType::Date => moment::date(text),
                    DataType::Timestamp => moment::timestamp(text, Zone::None),
                    _ => moment::timestamp(text, Zone::Needed),
                }
                .ok_or_else(broken)?,
            ),
            Domain::Time => Comparable::Integer(moment::time(text).ok_or_else(broken)?),
        })
    }

    /// The value, to compare with.
    pub fn value(&self) -> Value<'_> {
        match self {
            Comparable::Integer(value) => Value::Integer(*value),
            // It was parsed when it was made; garbage can't come here.
            Comparable::Decimal(text) => {
                Value::Decimal(Decimal::parse(text).unwrap_or(Decimal::NaN))
            }
            Comparable::Float(value) => Value::Float(*value),
            Comparable::Bytes(bytes) => Value::Bytes(bytes),
            Comparable::Instant(instant) => Value::Instant(*instant),
        }
    }
}

fn rank(labels: &[String], label: &str) -> Option<i64> {
    labels
        .iter()
        .position(|known| known == label)
        .map(|place| place as i64)
}

impl Reading {
    /// How a column of `kind` is read to be compared in `domain`.
    pub fn new(kind: &Kind, domain: &Domain) -> Reading {
        match (domain, kind) {
            (Domain::Number, Kind::Numeric) => Reading::Decimal,
            (Domain::Number | Domain::Bool, _) => Reading::Integer,
            (Domain::Float, _) => Reading::Float,
            (Domain::Bytes | Domain::Label, _) => Reading::Bytes,
            (Domain::Rank(labels), _) => Reading::Rank(Arc::clone(labels)),
            (Domain::Instant, Kind::Date) => Reading::Date,
            (Domain::Instant, Kind::Timestamp) => Reading::Timestamp(Zone::None),
            (Domain::Instant, _) => Reading::Timestamp(Zone::Needed),
            (Domain::Time, _) => Reading::Time,
        }
    }

    /// Reads a value of a record; NULL is none.
    pub fn read<'a>(&self, value: ValueRef<'a>) -> Result<Option<Value<'a>>, Malformed> {
        Ok(Some(match (self, value) {
            (_, ValueRef::Null) => return Ok(None),
            (Reading::Integer, ValueRef::Integer(value)) => Value::Integer(value),
            (Reading::Bytes, ValueRef::Text(text)) => Value::Bytes(text.as_bytes()),
            (Reading::Bytes, ValueRef::Blob(bytes)) => Value::Bytes(bytes),
            (Reading::Float, ValueRef::Real(value)) => Value::Float(value),
            (Reading::Float, ValueRef::Integer(value)) => Value::Float(value as f64),
            (Reading::Decimal, ValueRef::Text(text)) => {
                Value::Decimal(Decimal::parse(text).ok_or(MISMATCH)?)
            }
            (Reading::Rank(labels), ValueRef::Text(text)) => Value::Integer(
                rank(labels, text)
                    .ok_or(Malformed("an enum's label that the table does not know"))?,
            ),
            (Reading::Date, ValueRef::Text(text)) => {
                Value::Instant(moment::date(text).ok_or(MISMATCH)?)
            }
            (Reading::Timestamp(zone), ValueRef::Text(text)) => {
                Value::Instant(moment::timestamp(text, *zone).ok_or(MISMATCH)?)
            }
            (Reading::Time, ValueRef::Text(text)) => {
                Value::Integer(moment::time(text).ok_or(MISMATCH)?)
            }
            _ => return Err(MISMATCH),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_ordered_as_in_postgres() {
        let ascending = [
            f64::NEG_INFINITY,
            -1.0,
            -0.0,
            1e-300,
            1.0,
            f64::INFINITY,
            f64::NAN,
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare_floats(*a, *b), i.cmp(&j));
            }
        }
        assert_eq!(compare_floats(-0.0, 0.0), Ordering::Equal);
    }

    #[test]
    fn bytes_are_in_the_order_of_the_values() {
        let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(1);
        let mut numbers: Vec<String> = [
            "NaN",
            "Infinity",
            "-Infinity",
            "0",
            "0.00",
            "-0.0",
            "10",
            "9.99",
            "100",
            "1000.0",
        ]
        .map(str::to_owned)
        .into();
        for _ in 0..300 {
            let part = |rng: &mut _, digits| {
                let digits = rand::Rng::random_range(rng, 0..digits);
                (0..digits)
                    .map(|_| ["0", "0", "1", "5", "9"][rand::Rng::random_range(rng, 0..5)])
                    .collect::<String>()
            };
            let sign = ["", "-"][rand::Rng::random_range(&mut rng, 0..2)];
            let (integer, fraction) = (part(&mut rng, 6), part(&mut rng, 6));
            numbers.push(format!("{sign}0{integer}.{fraction}0"));
        }
        let mut domains: Vec<Vec<Value<'_>>> = vec![
            numbers
                .iter()
                .map(|text| Value::Decimal(Decimal::parse(text).unwrap()))
                .collect(),
            [
                -5.0,
                -0.0,
                0.0,
                1e-300,
                -1e-300,
                7.5,
                f64::NAN,
                -f64::NAN,
                f64::INFINITY,
                f64::NEG_INFINITY,
            ]
            .map(Value::Float)
            .into(),
            [
                moment::INFINITY,
                moment::NEGATIVE_INFINITY,
                0,
                -1,
                1,
                1 << 70,
            ]
            .map(Value::Instant)
            .into(),
            [&b""[..], b"a", b"ab", b"b", b"\0", b"\xff"]
                .map(Value::Bytes)
                .into(),
        ];
        domains[0].extend([i64::MIN, -10, -9, -1, 0, 1, 9, 10, 100, i64::MAX].map(Value::Integer));
        for values in domains {
            for (one, other) in values
                .iter()
                .flat_map(|one| values.iter().map(move |other| (one, other)))
            {
                let order = one.compare(*other).unwrap();
                assert_eq!(
                    one.order_bytes().cmp(&other.order_bytes()),
                    order,
                    "{one:?} {other:?}"
                );
            }
        }
    }

    #[test]
    fn equal_numbers_of_different_types_have_the_same_route() {
        let key = |data_type: DataType, text: &str| {
            let constant = literal::read(&data_type, text).unwrap();
            Comparable::new(&constant, &Domain::Number)
                .unwrap()
                .value()
                .route_bytes()
        };
        let seven = key(DataType::Int2, "7");
        assert_eq!(seven, key(DataType::Int8, "7"));
        assert_eq!(seven, key(DataType::Numeric, "7.000"));
        assert_ne!(seven, key(DataType::Numeric, "7.001"));
        let big = "9223372036854775808";
        assert_eq!(
            key(DataType::Numeric, big),
            key(DataType::Numeric, &format!("{big}.0"))
        );
        let stored = Reading::Decimal
            .read(ValueRef::Text("7.0"))
            .unwrap()
            .unwrap();
        assert_eq!(seven, stored.route_bytes());
    }

    #[test]
    fn a_record_of_another_table_is_an_error_and_no_answer() {
        assert!(Reading::Integer.read(ValueRef::Text("1")).is_err());
        assert!(Reading::Date.read(ValueRef::Text("tomorrow")).is_err());
        assert!(Reading::Decimal.read(ValueRef::Text("1e5")).is_err());
        assert!(
            Reading::Rank(["a".to_owned()].into())
                .read(ValueRef::Text("b"))
                .is_err()
        );
        assert!(Value::Integer(1).compare(Value::Float(1.0)).is_err());
    }
}
