//! Names of types, as SQL writes them.
//!
//! Source: <https://www.postgresql.org/docs/15/datatype.html>: the words of SQL stand for internal names.

use super::{
    cursor::Cursor,
    lex::Kind,
    syntax::{Fault, Place, TypeName},
};

/// Longest `varchar(n)` and `char(n)`, as in Postgres.
const LENGTH_MAX: usize = 10_485_760;

/// Reads the name of a type.
pub fn type_name(text: &str) -> Result<TypeName, Fault> {
    let mut cursor = Cursor::new(text)?;
    let name = cursor.type_name()?;
    match cursor.peek() {
        Kind::End => Ok(name),
        _ => Err(cursor.unexpected("the end")),
    }
}

impl Cursor {
    /// Takes the name of a type.
    pub fn type_name(&mut self) -> Result<TypeName, Fault> {
        let place = self.place();
        let mut parts = self.dotted_name("a type")?;
        // Quoted, only the internal name is meant: "integer" is no type, and "char" is another one than char.
        let quoted = matches!(self.last(), Kind::Quoted(_));
        let last = parts.pop().expect("a dotted name has a part").text;
        let schema = match parts.len() {
            0 => None,
            1 => Some(parts.remove(0).text),
            _ => return Err(place.fault("a type is named type or schema.type")),
        };
        let (mut name, mut length) = (last, None);
        if schema.is_none() && !quoted {
            (name, length) = self.standard_name(name, place)?;
        } else if name == "char" {
            return Err(place.fault("the type \"char\" is not supported"));
        }
        let mut array = false;
        if self.take(&Kind::OpenBracket) {
            if !self.take(&Kind::CloseBracket) {
                return Err(self.place().fault("write arrays of a type as type[]"));
            }
            array = true;
            if *self.peek() == Kind::OpenBracket {
                return Err(self
                    .place()
                    .fault("only arrays of one dimension are supported"));
            }
        }
        if *self.peek() == Kind::Open {
            return Err(self
                .place()
                .fault(format!("a precision of {name} is not supported")));
        }
        Ok(TypeName {
            schema,
            name,
            length,
            array,
        })
    }

    /// The names of SQL for built-in types, and their lengths.
    fn standard_name(
        &mut self,
        word: String,
        place: Place,
    ) -> Result<(String, Option<usize>), Fault> {
        let name = match word.as_str() {
            "int" | "integer" => "int4",
            "smallint" => "int2",
            "bigint" => "int8",
            "boolean" => "bool",
            "real" => "float4",
            "float" => "float8",
            "decimal" | "dec" => "numeric",
            "double" => {
                self.expect_word("precision")?;
                "float8"
            }
            "varchar" => return Ok(("varchar".to_owned(), self.length()?)),
            "char" | "character" => {
                let name = if self.take_word("varying") {
                    "varchar"
                } else {
                    "bpchar"
                };
                let length = self.length()?;
                let default = if name == "bpchar" { Some(1) } else { None };
                return Ok((name.to_owned(), length.or(default)));
            }
            "national" | "nchar" => return Err(place.fault("write char(n) or varchar(n)")),
            "timestamp" | "time" => {
                let zoned = if self.is_word(0, "with") || self.is_word(0, "without") {
                    let with = self.is_word(0, "with");
                    self.skip();
                    self.expect_word("time")?;
                    self.expect_word("zone")?;
                    with
                } else {
                    false
                };
                return Ok((format!("{word}{}", if zoned { "tz" } else { "" }), None));
            }
            _ => return Ok((word, None)),
        };
        Ok((name.to_owned(), None))
    }

    /// `(n)`
    fn length(&mut self) -> Result<Option<usize>, Fault> {
        if !self.take(&Kind::Open) {
            return Ok(None);
        }
        let place = self.place();
        let length = match self.advance() {
            Kind::Number(number) => number.parse().ok().filter(|n| (1..=LENGTH_MAX).contains(n)),
            _ => None,
        };
        self.expect(&Kind::Close)?;
        length
            .map(Some)
            .ok_or_else(|| place.fault("a length is a number from 1"))
    }
}
