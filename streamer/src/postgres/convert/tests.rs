use anabranch_proto::record::{self, ValueRef};
use proptest::prelude::*;

use super::*;

fn array(element: Kind) -> Kind {
    Kind::Array(Box::new(element), ',')
}

#[track_caller]
fn check(kind: Kind, cases: &[(&str, ValueRef<'_>)]) {
    for (text, expect) in cases {
        let mut builder = Builder::new();
        push(&mut builder, &kind, text.as_bytes()).unwrap_or_else(|_| panic!("{kind:?} {text}"));
        let built = builder.finish();
        // As records, since NaN is not equal to itself.
        assert_eq!(built, record::build([*expect]), "{kind:?} {text}");
    }
}

#[track_caller]
fn check_texts(kind: Kind, cases: &[(&str, &str)]) {
    for (text, expect) in cases {
        check(kind.clone(), &[(text, ValueRef::Text(expect))]);
    }
}

#[track_caller]
fn check_refused(kind: Kind, texts: &[&[u8]]) {
    for text in texts {
        let pushed = push(&mut Builder::new(), &kind, text);
        let shown = String::from_utf8_lossy(text);
        assert_eq!(pushed, Err(Unconvertible), "{kind:?} {shown}");
    }
}

/// Every kind that has its own rules.
fn kinds() -> Vec<Kind> {
    let scalars = [
        Kind::Integer,
        Kind::Bool,
        Kind::Float4,
        Kind::Float8,
        Kind::Numeric,
        Kind::Text,
        Kind::Char,
        Kind::Bytea,
        Kind::Timestamptz,
        Kind::Timestamp,
        Kind::Date,
        Kind::Time,
        Kind::Other,
    ];
    let arrays = scalars.clone().map(array);
    let nested = [array(array(Kind::Text))];
    scalars.into_iter().chain(arrays).chain(nested).collect()
}

#[test]
fn integers_at_their_ends_keep_every_digit() {
    use ValueRef::Integer;
    check(
        Kind::Integer,
        &[
            ("0", Integer(0)),
            ("-1", Integer(-1)),
            ("4294967295", Integer(4_294_967_295)),
            ("9223372036854775807", Integer(i64::MAX)),
            ("-9223372036854775808", Integer(i64::MIN)),
        ],
    );
    check_refused(
        Kind::Integer,
        &[
            b"",
            b"-",
            b"+1",
            b" 1",
            b"1 ",
            b"1.0",
            b"x",
            b"9223372036854775808",
            b"-9223372036854775809",
            b"99999999999999999999",
            b"\xff",
        ],
    );
}

#[test]
fn only_t_and_f_are_bools() {
    check(
        Kind::Bool,
        &[("t", ValueRef::Integer(1)), ("f", ValueRef::Integer(0))],
    );
    check_refused(Kind::Bool, &[b"", b"true", b"1", b"T"]);
}

#[test]
fn floats_keep_every_bit() {
    use ValueRef::Real;
    check(
        Kind::Float8,
        &[
            ("0", Real(0.0)),
            ("-0", Real(-0.0)),
            ("0.1", Real(0.1)),
            ("1e+20", Real(1e20)),
            ("5e-324", Real(f64::from_bits(1))),
            ("2.2250738585072014e-308", Real(f64::MIN_POSITIVE)),
            ("1.7976931348623157e+308", Real(f64::MAX)),
            ("-1.7976931348623157e+308", Real(f64::MIN)),
            ("NaN", Real(f64::NAN)),
            ("Infinity", Real(f64::INFINITY)),
            ("-Infinity", Real(f64::NEG_INFINITY)),
        ],
    );
    check(
        Kind::Float4,
        &[
            // Read as a double it would be another number.
            ("0.1", Real(0.100_000_001_490_116_12)),
            ("1e-45", Real(1.401_298_464_324_817e-45)),
            ("3.4028235e+38", Real(3.402_823_466_385_288_6e38)),
            ("-0", Real(-0.0)),
            ("NaN", Real(f64::NAN)),
            ("-Infinity", Real(f64::NEG_INFINITY)),
        ],
    );
    for kind in [Kind::Float4, Kind::Float8] {
        check_refused(
            kind,
            &[
                b"", b"nan", b"inf", b"+1", b".5", b"5.", b"1e", b"1e999", b"0x1", b"00", b"1_0",
            ],
        );
    }
}

#[test]
fn numerics_are_verbatim() {
    let long = format!("{}.{}", "9".repeat(131_072), "1".repeat(16_383));
    for text in ["0", "1.00", "-0.000", "NaN", "Infinity", "-Infinity", &long] {
        check_texts(Kind::Numeric, &[(text, text)]);
    }
    check_refused(Kind::Numeric, &[b"", b"1e5", b"1,0", b"nan", b"--1"]);
}

#[test]
fn only_char_loses_blanks() {
    check_texts(
        Kind::Char,
        &[("a  ", "a"), ("  ", ""), (" a\t ", " a\t"), ("a", "a")],
    );
    let same = [("a  ", "a  "), ("", ""), ("ä€😀\u{1}", "ä€😀\u{1}")];
    let labels = same.map(|(label, _)| label.to_owned()).to_vec();
    for kind in [Kind::Text, Kind::Citext, Kind::Other, Kind::Enum(labels)] {
        check_texts(kind, &same);
    }
}

#[test]
fn a_label_that_the_enum_did_not_have_is_refused() {
    let kind = || Kind::Enum(vec!["sad".into(), "happy".into()]);
    check_texts(kind(), &[("sad", "sad"), ("happy", "happy")]);
    check_refused(kind(), &[b"ok", b"Sad", b""]);
    let array = |text: &[u8]| {
        push(
            &mut Builder::new(),
            &Kind::Array(Box::new(kind()), ','),
            text,
        )
    };
    assert!(array(b"{sad,NULL}").is_ok());
    assert!(array(b"{sad,ok}").is_err());
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    for kind in [Kind::Text, Kind::Char, Kind::Json, Kind::Enum(vec![])] {
        check_refused(kind, &[b"\xff", b"a\xc3"]);
    }
    check_refused(Kind::Other, &[b"a\xff"]);
}

/// What `charout` of Postgres 16 prints for the byte that `charout` of Postgres 15 sends bare.
#[test]
fn a_char_above_127_has_the_form_of_newer_servers() {
    for (text, expect) in [(b"\xff", "\\377"), (b"\x80", "\\200")] {
        let mut builder = Builder::new();
        push(&mut builder, &Kind::Other, text).unwrap();
        assert_eq!(builder.finish(), record::build([ValueRef::Text(expect)]));
    }
    let mut builder = Builder::new();
    push(&mut builder, &array(Kind::Other), b"{\xff,a}").unwrap();
    assert_eq!(
        builder.finish(),
        record::build([ValueRef::Text(r#"["\\377","a"]"#)])
    );
}

#[test]
fn bytea_becomes_bytes_whatever_its_size() {
    use ValueRef::Blob;
    check(
        Kind::Bytea,
        &[("\\x", Blob(b"")), ("\\x00ff5C", Blob(b"\x00\xff\\"))],
    );
    for size in [511, 512, 513, 100_000] {
        let text = format!("\\x{}", "e7".repeat(size));
        check(Kind::Bytea, &[(&text, Blob(&vec![0xE7; size]))]);
    }
}

/// The output of `bytea_output = escape` must never be taken for bytes, above all where it looks like hex.
#[test]
fn escaped_bytea_is_refused() {
    let many = format!("\\x{}g0", "00".repeat(1000));
    check_refused(
        Kind::Bytea,
        &[
            b"",
            b"abc",
            b"\\\\x00",
            b"\\000",
            b"\\x0",
            b"\\x0g",
            b"\\xzz",
            b"x00",
            many.as_bytes(),
        ],
    );
}

#[test]
fn timestamps_have_six_digits_or_are_verbatim() {
    check_texts(
        Kind::Timestamptz,
        &[
            ("2024-01-02 03:04:05.5+00", "2024-01-02 03:04:05.500000Z"),
            ("2024-01-02 03:04:05+00", "2024-01-02 03:04:05.000000Z"),
            (
                "0001-01-01 00:00:00.000001+00",
                "0001-01-01 00:00:00.000001Z",
            ),
            (
                "9999-12-31 23:59:59.999999+00",
                "9999-12-31 23:59:59.999999Z",
            ),
            ("infinity", "infinity"),
            ("-infinity", "-infinity"),
            ("4714-11-24 00:00:00+00 BC", "4714-11-24 00:00:00+00 BC"),
            (
                "294276-12-31 23:59:59.999999+00",
                "294276-12-31 23:59:59.999999+00",
            ),
            ("10000-01-01 00:00:00+00", "10000-01-01 00:00:00+00"),
        ],
    );
    check_texts(
        Kind::Timestamp,
        &[
            ("2024-01-02 03:04:05.12", "2024-01-02 03:04:05.120000"),
            ("2024-01-02 03:04:05", "2024-01-02 03:04:05.000000"),
            ("infinity", "infinity"),
            ("0044-03-15 12:00:00.5 BC", "0044-03-15 12:00:00.5 BC"),
            ("294276-12-31 23:59:59", "294276-12-31 23:59:59"),
        ],
    );
    check_texts(
        Kind::Date,
        &[
            ("2024-01-02", "2024-01-02"),
            ("0044-03-15 BC", "0044-03-15 BC"),
            ("5874897-12-31", "5874897-12-31"),
            ("-infinity", "-infinity"),
        ],
    );
    check_texts(
        Kind::Time,
        &[
            ("03:04:05", "03:04:05.000000"),
            ("03:04:05.000001", "03:04:05.000001"),
            ("24:00:00", "24:00:00.000000"),
        ],
    );
}

/// If a setting were not pinned after all, this is what would come.
#[test]
fn times_under_other_settings_are_refused() {
    check_refused(
        Kind::Timestamptz,
        &[
            b"",
            b"2024-01-02 03:04:05",
            b"2024-01-02 03:04:05+02",
            b"2024-01-02 03:04:05+05:30",
            b"2024-01-02 03:04:05.5+00 AD",
            b"2024-01-02 03:04:05.1234567+00",
            b"2024-01-02 03:04:05.+00",
            b"02/01/2024 03:04:05 UTC",
            b"Tue Jan 02 03:04:05 2024 UTC",
            b"2024-01-02T03:04:05+00",
            b"Infinity",
            b"10000-01-01 00:00:00+01",
            b"0044-03-15 12:00:00+01 BC",
        ],
    );
    check_refused(
        Kind::Timestamp,
        &[
            b"",
            b"2024-01-02 03:04:05+00",
            b"2024-01-02",
            b"2024-01-02 3:04:05",
            b"02.01.2024 03:04:05",
        ],
    );
    check_refused(
        Kind::Date,
        &[
            b"",
            b"01-02-2024",
            b"2024-1-2",
            b"2024-01-02 ",
            b"2024-01-02 03:04:05",
            b"024-01-02",
        ],
    );
    check_refused(
        Kind::Time,
        &[b"", b"03:04", b"03:04:05+00", b"03:04:05 BC", b"infinity"],
    );
}

/// SQLite's date functions are the judge: they know nothing of this code.
#[test]
fn sqlite_reads_our_times() {
    let sqlite = rusqlite::Connection::open_in_memory().unwrap();
    for (kind, text, format, expect) in [
        (
            Kind::Timestamptz,
            "2024-02-29 23:59:59.25+00",
            "%Y %m %d %H %M %f",
            "2024 02 29 23 59 59.250",
        ),
        (
            Kind::Timestamp,
            "0001-01-01 00:00:00",
            "%Y %m %d %H %M %f",
            "0001 01 01 00 00 00.000",
        ),
        (Kind::Date, "9999-12-31", "%Y %m %d", "9999 12 31"),
        (Kind::Time, "13:14:15.6", "%H %M %f", "13 14 15.600"),
    ] {
        let mut builder = Builder::new();
        push(&mut builder, &kind, text.as_bytes()).unwrap();
        let record = builder.finish();
        let Ok(ValueRef::Text(ours)) = record::value(&record, 0) else {
            panic!("{kind:?} is text");
        };
        let read: String = sqlite
            .query_row("SELECT strftime(?1, ?2)", (format, ours), |row| row.get(0))
            .unwrap();
        assert_eq!(read, expect, "{ours}");
    }
}

#[test]
fn arrays_become_json() {
    check_texts(
        array(Kind::Integer),
        &[
            ("{}", "[]"),
            ("{1,NULL,-3}", "[1,null,-3]"),
            ("{{1,2},{3,4}}", "[[1,2],[3,4]]"),
            ("{{{1}},{{2}}}", "[[[1]],[[2]]]"),
        ],
    );
    check_texts(array(Kind::Bool), &[("{t,f,NULL}", "[true,false,null]")]);
    check_texts(
        array(Kind::Float8),
        &[(
            "{0.1,1e+20,-0,NaN,Infinity,-Infinity}",
            r#"[0.1,1e+20,-0,"NaN","Infinity","-Infinity"]"#,
        )],
    );
    check_texts(array(Kind::Float4), &[("{0.1,1e-45}", "[0.1,1e-45]")]);
    check_texts(array(Kind::Numeric), &[("{1.00,NaN}", r#"["1.00","NaN"]"#)]);
    check_texts(
        array(Kind::Text),
        &[
            (
                r#"{a,"b c","",NULL,"NULL",null}"#,
                r#"["a","b c","",null,"NULL","null"]"#,
            ),
            (
                r#"{"{","}","a,b","\"","\\"}"#,
                r#"["{","}","a,b","\"","\\"]"#,
            ),
            ("{\"\n\",\u{1},ä;}", r#"["\n","\u0001","ä;"]"#),
            (r#"{"\"\"\\\\",x}"#, r#"["\"\"\\\\","x"]"#),
        ],
    );
    check_texts(array(Kind::Char), &[(r#"{"a  ","  "}"#, r#"["a",""]"#)]);
    check_texts(
        array(Kind::Bytea),
        &[(r#"{"\\x00ff","\\x"}"#, r#"["\\x00ff","\\x"]"#)],
    );
    check_texts(
        array(Kind::Timestamptz),
        &[(
            r#"{"2024-01-02 03:04:05.5+00",infinity,NULL}"#,
            r#"["2024-01-02 03:04:05.500000Z","infinity",null]"#,
        )],
    );
    check_texts(array(Kind::Date), &[("{2024-01-02}", r#"["2024-01-02"]"#)]);
    check_texts(
        array(Kind::Json),
        &[(
            r#"{"{\"a\": [1, \"x\"]}",null}"#,
            r#"["{\"a\": [1, \"x\"]}","null"]"#,
        )],
    );
    // The elements of an array of box are separated by semicolons, and not quoted for their commas.
    check_texts(
        Kind::Array(Box::new(Kind::Other), ';'),
        &[(
            "{(3,4),(1,2);(5,6),(0,0)}",
            r#"["(3,4),(1,2)","(5,6),(0,0)"]"#,
        )],
    );
    // A domain over an array as element: no dimension.
    check_texts(
        array(array(Kind::Integer)),
        &[(r#"{"{1,2}","{}",NULL}"#, r#"["[1,2]","[]",null]"#)],
    );
}

/// JSON has no bounds, so such an array keeps its own text, which is no JSON.
#[test]
fn arrays_with_other_lower_bounds_lose_nothing() {
    let sqlite = rusqlite::Connection::open_in_memory().unwrap();
    for text in [
        "[2:4]={1,2,3}",
        "[0:0]={7}",
        "[-2:-1][5:6]={{1,2},{3,NULL}}",
        "[1:1][0:1]={{1,2}}",
    ] {
        check_texts(array(Kind::Integer), &[(text, text)]);
        let valid: bool = sqlite
            .query_row("SELECT json_valid(?1)", [text], |row| row.get(0))
            .unwrap();
        assert!(!valid, "{text}");
    }
    check_refused(
        array(Kind::Integer),
        &[
            b"[2:4]",
            b"[2:4]=",
            b"[2]={1}",
            b"[a:b]={1}",
            b"[]={1}",
            b"[2:4]={x}",
            b"2:4]={1}",
        ],
    );
}

#[test]
fn broken_arrays_are_refused() {
    check_refused(
        array(Kind::Integer),
        &[
            b"",
            b"{",
            b"}",
            b"1",
            b"{1",
            b"{1,",
            b"{1,}",
            b"{,1}",
            b"{1}}",
            b"{{1}",
            b"{{}}",
            b"{1}2",
            b"{1{2}}",
            b"{1 2}",
            b"{{1}{2}}",
            b"{x}",
            b"{007}",
            b"{\"1}",
            b"{\"1\\",
            b"{\"1\"2}",
            b"{{{{{{{1}}}}}}}",
            b"{}{}",
        ],
    );
    check_refused(array(Kind::Text), &[b"{\xff}", b"{\"\\\xff\"}"]);
    check_refused(array(Kind::Bytea), &[b"{abc}", br#"{"\\x0"}"#]);
    check_refused(Kind::Array(Box::new(Kind::Text), '€'), &[b"{a;b}"]);
}

/// How Postgres quotes: the rule of `array_out`, with everything quoted that may be.
fn quoted(element: &str) -> String {
    format!("\"{}\"", element.replace('\\', "\\\\").replace('"', "\\\""))
}

proptest! {
    #[test]
    fn any_bytes_are_converted_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        for kind in kinds() {
            let _ = push(&mut Builder::new(), &kind, &bytes);
        }
    }

    #[test]
    fn anything_like_postgres_text_is_converted_without_panic(
        text in r#"(\\x|\[|infinity|20[0-9]{2}-[0-9]{2}-[0-9]{2} ?)?[-0-9{}"\\,;:.\[\]=+ ef]{0,40}( BC)?"#,
    ) {
        for kind in kinds() {
            let _ = push(&mut Builder::new(), &kind, text.as_bytes());
        }
    }

    /// Whatever is accepted as an array is JSON for somebody else too, unless it has bounds.
    #[test]
    fn accepted_arrays_are_json(text in r#"\{[-0-9{}"\\,.nulNUL a]{0,30}\}"#) {
        for element in [Kind::Text, Kind::Integer, Kind::Float8, Kind::Numeric] {
            let mut builder = Builder::new();
            if push(&mut builder, &array(element), text.as_bytes()).is_ok() {
                let record = builder.finish();
                let Ok(ValueRef::Text(json)) = record::value(&record, 0) else { panic!("arrays are text") };
                prop_assert!(serde_json::from_str::<serde_json::Value>(json).is_ok(), "{}", json);
            }
        }
    }

    #[test]
    fn strings_in_arrays_are_what_another_json_writer_makes(elements in prop::collection::vec(any::<String>(), 0..6)) {
        let text = format!("{{{}}}", elements.iter().map(|e| quoted(e)).collect::<Vec<_>>().join(","));
        let mut builder = Builder::new();
        push(&mut builder, &array(Kind::Text), text.as_bytes()).unwrap();
        let expect = serde_json::to_string(&elements).unwrap();
        prop_assert_eq!(builder.finish(), record::build([ValueRef::Text(&expect)]));
    }

    #[test]
    fn numbers_round_trip(integer: i64, double: f64, single: f32) {
        let expect = record::build([ValueRef::Integer(integer), ValueRef::Real(double), ValueRef::Real(single.into())]);
        let mut builder = Builder::new();
        push(&mut builder, &Kind::Integer, integer.to_string().as_bytes()).unwrap();
        push(&mut builder, &Kind::Float8, format!("{double:e}").as_bytes()).unwrap();
        push(&mut builder, &Kind::Float4, format!("{single:e}").as_bytes()).unwrap();
        prop_assert_eq!(builder.finish(), expect);
    }
}
