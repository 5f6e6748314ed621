//! A table with a column of every kind, and rows with every value that somebody got wrong once.

use std::sync::Arc;

use anabranch_proto::record::Builder;
use anabranch_streamer::{
    postgres::convert,
    table::{Collation, Column, Identity, Kind, Table},
};
use bytes::Bytes;
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use tokio_postgres::{Client, SimpleQueryMessage};

use super::rows::Rows;

/// What conditions over a column are made of.
pub struct Class {
    /// How its type is written in casts.
    pub type_name: &'static str,
    /// Texts that are values of it.
    pub values: &'static [&'static str],
    /// Its columns.
    pub columns: &'static [&'static str],
}

const TEXTS: &[&str] = &[
    "", "a", "A", "b", "ab", "abc", "a b", "a  ", " a", "ä", "Ä", "ß", "日本", "%", "_", "\\",
    "a%b", "a_b", "a\\b", "a'b", "\"", "10", "9", "e\u{301}", "é", "😀", "x\ny", "null", "true",
    "z", "zz", "{a,b}",
];

/// The labels in an order that is not that of their letters.
pub const LABELS: &[&str] = &["sad", "ok", "happy", "a b", "Ünique", "it's"];

/// Classes whose values compare.
pub const CLASSES: &[Class] = &[
    Class {
        type_name: "int2",
        values: &["0", "1", "-1", "7", "100", "32767", "-32768"],
        columns: &["i2"],
    },
    Class {
        type_name: "integer",
        values: &[
            "0",
            "1",
            "-1",
            "7",
            "100",
            "2147483647",
            "-2147483648",
            "16777217",
        ],
        columns: &["i4", "Mixed \"Case\"", "dom"],
    },
    Class {
        type_name: "bigint",
        values: &[
            "0",
            "1",
            "-1",
            "7",
            "100",
            "2147483648",
            "9007199254740993",
            "9223372036854775807",
            "-9223372036854775808",
        ],
        columns: &["i8"],
    },
    Class {
        type_name: "oid",
        values: &["0", "1", "7", "2147483648", "4294967295"],
        columns: &["o"],
    },
    Class {
        type_name: "boolean",
        values: &["t", "f", "true", "no", "1"],
        columns: &["b", "b2"],
    },
    Class {
        type_name: "real",
        values: &[
            "0",
            "-0",
            "1",
            "-1",
            "7",
            "0.1",
            "-1.5",
            "NaN",
            "Infinity",
            "-Infinity",
            "1e30",
            "1.1754944e-38",
            "3.4028235e38",
            "1e-45",
            "16777216",
        ],
        columns: &["f4"],
    },
    Class {
        type_name: "double precision",
        values: &[
            "0",
            "-0",
            "1",
            "-1",
            "7",
            "0.1",
            "0.10000000149011612",
            "-1.5",
            "NaN",
            "Infinity",
            "-Infinity",
            "1e300",
            "5e-324",
            "1.7976931348623157e308",
            "9007199254740992",
            "9.223372036854775807e18",
        ],
        columns: &["f8", "f8b"],
    },
    Class {
        type_name: "numeric",
        values: &[
            "0",
            "0.00",
            "1",
            "1.0",
            "1.000",
            "-1",
            "7",
            "100",
            "0.1",
            "0.10",
            "1.5",
            "NaN",
            "Infinity",
            "-Infinity",
            "9223372036854775807",
            "9223372036854775807.0",
            "9223372036854775808",
            "-9223372036854775808.5",
            "0.000000000000000000000000000001",
            "1000000000000000000000000000000",
            "123456789012345678901234567890.123456789",
        ],
        columns: &["n", "n2"],
    },
    Class {
        type_name: "text",
        values: TEXTS,
        columns: &["t", "t2", "td", "vc"],
    },
    Class {
        type_name: "name",
        values: TEXTS,
        columns: &["nm"],
    },
    Class {
        type_name: "bpchar",
        values: &[
            "", "a", "a ", "ab", "  a", "a   b", "ä", "a%", "a\t", "abcdef", "10", "9",
        ],
        columns: &["c", "c2"],
    },
    Class {
        type_name: "mood",
        values: LABELS,
        columns: &["e", "e2"],
    },
    Class {
        type_name: "uuid",
        values: &[
            "00000000-0000-0000-0000-000000000000",
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
            "{a0eebc999c0b4ef8bb6d6bb9bd380a12}",
            "ffffffff-ffff-ffff-ffff-ffffffffffff",
        ],
        columns: &["u", "u2"],
    },
    Class {
        type_name: "bytea",
        values: &[
            "\\x",
            "\\x00",
            "\\x61",
            "\\x6100",
            "\\xFF",
            "\\xdeadbeef",
            "a",
            "a\\000",
            "\\\\",
        ],
        columns: &["y", "y2"],
    },
    Class {
        type_name: "timestamptz",
        values: &[
            "-infinity",
            "infinity",
            "4714-11-24 00:00:00+00 BC",
            "0044-03-15 12:00:00+00 BC",
            "0044-03-15 12:00:00.5+00 BC",
            "0001-01-01 00:00:00+00",
            "1969-12-31 23:59:59.999999+00",
            "1970-01-01 00:00:00Z",
            "1970-01-01T00:00:00+00",
            "2024-02-29 12:34:56.789+00",
            "2024-02-29 14:34:56.789+02",
            "2024-02-29 12:34:56.789001+00",
            "9999-12-31 23:59:59.999999+00",
            "10000-01-01 00:00:00+00",
            "10000-01-01 00:00:00.123+00",
            "294276-12-31 23:59:59.999999+00",
        ],
        columns: &["tz", "tz2"],
    },
    Class {
        type_name: "timestamp",
        values: &[
            "-infinity",
            "infinity",
            "4714-11-24 00:00:00 BC",
            "0044-03-15 12:00:00.123 BC",
            "0001-12-31 23:59:59 BC",
            "0001-01-01 00:00:00",
            "1970-01-01 00:00:00",
            "2024-02-29 00:00:00",
            "2024-02-29 12:34:56.789",
            "2024-02-29 12:34",
            "9999-12-31 23:59:59.999999",
            "10000-01-01 00:00:00",
            "294276-12-31 23:59:59.999999",
        ],
        columns: &["ts", "ts2"],
    },
    Class {
        type_name: "date",
        values: &[
            "-infinity",
            "infinity",
            "4714-11-24 BC",
            "0044-03-15 BC",
            "0001-12-31 BC",
            "0001-01-01",
            "1970-01-01",
            "2024-02-29",
            "2024-03-01",
            "9999-12-31",
            "10000-01-01",
            "294277-01-01",
            "5874897-12-31",
        ],
        columns: &["d", "d2"],
    },
    Class {
        type_name: "time",
        values: &[
            "00:00:00",
            "00:00",
            "12:34:56.789",
            "12:34:56.789001",
            "23:59:59.999999",
            "24:00:00",
        ],
        columns: &["tm", "tm2"],
    },
];

/// Columns that only IS NULL works on, their types, and a value.
pub const OTHERS: &[(&str, &str, &str)] = &[
    ("j", "jsonb", "{\"a\": 1}"),
    ("ar", "int4[]", "{1,2,NULL}"),
    ("ip", "inet", "10.0.0.1"),
    ("iv", "interval", "1 day"),
    ("rg", "int4range", "[1,5)"),
    ("co", "pair", "(,)"),
];

/// The table and its rows, as the streamer has them, and those that subqueries ask for.
pub struct Fixture {
    pub table: Arc<Table>,
    /// In the order of their ids.
    pub rows: Vec<Bytes>,
    /// All tables.
    pub tables: Vec<Arc<Table>>,
    /// All their rows.
    pub lookup: Rows,
}

/// Tables that have the same columns, and how many rows of `samples`, or rows like them.
pub const INNER: &[(&str, usize)] = &[("few", 8), ("More Rows", 16), ("none", 0)];

impl Fixture {
    /// Creates the table, fills it with `count` rows, and reads them back.
    pub async fn create(client: &Client, rng: &mut StdRng, count: usize) -> Fixture {
        let settings = "SET DateStyle = 'ISO, MDY'; SET TimeZone = 'UTC'; SET extra_float_digits = 1; \
                        SET bytea_output = 'hex'; SET client_encoding = 'UTF8'; SET standard_conforming_strings = on;";
        run(client, settings).await;
        let icu = client
            .query_one(
                "SELECT count(*) FROM pg_collation WHERE collname = 'und-x-icu'",
                &[],
            )
            .await
            .unwrap()
            .get::<_, i64>(0)
            > 0;
        let other_collation = if icu { "und-x-icu" } else { "C" };
        let labels: Vec<String> = LABELS.iter().map(|label| quote(label)).collect();
        let create = format!(
            "CREATE TYPE mood AS ENUM ({});
             CREATE TYPE pair AS (a int, b int);
             CREATE DOMAIN small AS int4;
             CREATE TABLE samples (
                id int8 PRIMARY KEY,
                i2 int2, i4 int4, \"Mixed \"\"Case\"\"\" int4, dom small, i8 int8, o oid, b bool, b2 bool,
                f4 float4, f8 float8, f8b float8, n numeric, n2 numeric,
                t text COLLATE \"C\", t2 text COLLATE \"C\", td text COLLATE \"{other_collation}\",
                vc varchar(20) COLLATE \"C\", nm name, c char(6) COLLATE \"C\", c2 char(8) COLLATE \"C\",
                e mood, e2 mood, u uuid, u2 uuid, y bytea, y2 bytea, tz timestamptz, tz2 timestamptz,
                ts timestamp, ts2 timestamp, d date, d2 date, tm time, tm2 time,
                j jsonb, ar int4[], ip inet, iv interval, rg int4range, co pair)",
            labels.join(", ")
        );
        run(client, &create).await;
        for id in 0..count {
            let mut names = vec!["id".to_owned()];
            let mut values = vec![id.to_string()];
            for class in CLASSES {
                for column in class.columns {
                    names.push(identifier(column));
                    values.push(match rng.random_ratio(1, 7) {
                        true => "NULL".to_owned(),
                        false => quote(class.values.choose(rng).unwrap()),
                    });
                }
            }
            for (column, type_name, value) in OTHERS {
                names.push((*column).to_owned());
                values.push(match rng.random_ratio(1, 2) {
                    true => "NULL".to_owned(),
                    false => format!("{}::{type_name}", quote(value)),
                });
            }
            let insert = format!(
                "INSERT INTO samples ({}) VALUES ({})",
                names.join(", "),
                values.join(", ")
            );
            run(client, &insert).await;
        }
        let table = Arc::new(read_table(client, icu, "samples").await);
        let rows = read_rows(client, &table).await;
        let mut lookup = Rows::default();
        lookup.add(table.oid, rows.clone());
        Fixture {
            tables: vec![table.clone()],
            table,
            rows,
            lookup,
        }
    }

    /// Creates the tables of [`INNER`] too. Their rows are equal to rows of `samples`, but for what is NULL in them, and
    /// values that are changed for those of others.
    pub async fn with_inner(client: &Client, rng: &mut StdRng, count: usize) -> Fixture {
        let mut fixture = Fixture::create(client, rng, count).await;
        let icu = fixture
            .table
            .columns
            .iter()
            .any(|column| column.collation == Collation::Deterministic);
        for (name, rows) in INNER {
            let name = identifier(name);
            let mut sql = format!("CREATE TABLE {name} (LIKE samples INCLUDING ALL);");
            for id in 0..*rows {
                let row = rng.random_range(0..count);
                sql += &format!(
                    "INSERT INTO {name} SELECT * FROM samples WHERE id = {row} ON CONFLICT DO NOTHING;"
                );
                let class = CLASSES.choose(rng).unwrap();
                let column = identifier(class.columns.choose(rng).unwrap());
                let other = quote(class.values.choose(rng).unwrap());
                let value = if id % 2 == 0 { "NULL" } else { &*other };
                sql += &format!("UPDATE {name} SET {column} = {value} WHERE id = {row};");
            }
            run(client, &sql).await;
            let table = Arc::new(read_table(client, icu, &name).await);
            let rows = read_rows(client, &table).await;
            fixture.lookup.add(table.oid, rows);
            fixture.tables.push(table);
        }
        run(client, "ANALYZE").await;
        fixture
    }
}

async fn run(client: &Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql).await {
        panic!("{error:?}\n{sql}");
    }
}

async fn read_table(client: &Client, icu: bool, name: &str) -> Table {
    let sql = "SELECT attname::text, attnum, atttypid, atttypmod, format_type(atttypid, atttypmod), attrelid, \
               coalesce((SELECT nullif(typbasetype, 0) FROM pg_type WHERE oid = atttypid), atttypid) \
               FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 ORDER BY attnum";
    let rows = client.query(sql, &[&name]).await.unwrap();
    let columns = rows.iter().map(|row| {
        let name: String = row.get(0);
        let not_null = name == "id";
        Column {
            attnum: row.get(1),
            type_oid: row.get(2),
            base_oid: row.get(6),
            typmod: row.get(3),
            postgres_type: row.get(4),
            kind: kind(&name),
            not_null,
            collation: if name == "td" && icu {
                Collation::Deterministic
            } else {
                Collation::Bytes
            },
            name,
        }
    });
    Table {
        oid: rows[0].get(5),
        schema: "public".to_owned(),
        name: name.trim_matches('"').to_owned(),
        columns: columns.collect(),
        key: vec![0],
        identity: Identity::Key,
        indexes: Vec::new(),
        version: 1,
    }
}

fn kind(column: &str) -> Kind {
    match column {
        "id" => Kind::Integer,
        "j" => Kind::Json,
        "ar" => Kind::Array(Box::new(Kind::Integer), ','),
        "ip" | "iv" | "rg" | "co" => Kind::Other,
        column => {
            let class = CLASSES
                .iter()
                .find(|class| class.columns.contains(&column))
                .unwrap();
            match class.type_name {
                "int2" | "integer" | "bigint" | "oid" => Kind::Integer,
                "boolean" => Kind::Bool,
                "real" => Kind::Float4,
                "double precision" => Kind::Float8,
                "numeric" => Kind::Numeric,
                "text" | "name" => Kind::Text,
                "bpchar" => Kind::Char,
                "mood" => Kind::Enum(LABELS.iter().map(|&label| label.to_owned()).collect()),
                "uuid" => Kind::Uuid,
                "bytea" => Kind::Bytea,
                "timestamptz" => Kind::Timestamptz,
                "timestamp" => Kind::Timestamp,
                "date" => Kind::Date,
                "time" => Kind::Time,
                other => panic!("no kind for {other}"),
            }
        }
    }
}

/// In the simple protocol, so that each value is what its type's output function prints.
async fn read_rows(client: &Client, table: &Table) -> Vec<Bytes> {
    let mut builder = Builder::new();
    let mut rows = Vec::new();
    let sql = format!("SELECT * FROM {} ORDER BY id", identifier(&table.name));
    for message in client.simple_query(&sql).await.unwrap() {
        let SimpleQueryMessage::Row(row) = message else {
            continue;
        };
        for (index, column) in table.columns.iter().enumerate() {
            match row.get(index) {
                None => builder.push_null(),
                Some(text) => convert::push(&mut builder, &column.kind, text.as_bytes()).unwrap(),
            }
        }
        rows.push(builder.finish());
    }
    rows
}

/// A string as SQL has it.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// An identifier as SQL has it.
pub fn identifier(name: &str) -> String {
    if name
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}
