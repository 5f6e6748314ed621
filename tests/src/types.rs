//! Columns of every type that a table may have, with values that have gone wrong somewhere.
//!
//! What they must become is not said here: whoever uses them asks Postgres.

/// Makes the types of [`TYPES`] that Postgres does not bring along. Needs a superuser, for the extensions.
pub const SETUP: &str = r#"
CREATE EXTENSION hstore;
CREATE EXTENSION citext;
CREATE SCHEMA "Odd ""schema""";
CREATE TYPE mood AS ENUM ('sad', 'ok', 'NULL', 'a,b "c" {d} \e', 'happy');
ALTER TYPE mood ADD VALUE 'very sad' BEFORE 'sad';
CREATE TYPE "Odd ""schema""".mood AS ENUM ('other', '');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN small AS positive CHECK (VALUE < 100);
CREATE DOMAIN moment AS timestamptz;
CREATE DOMAIN code AS char(5);
CREATE DOMAIN numbers AS int[];
CREATE DOMAIN area AS box;
CREATE DOMAIN name_of AS citext;
CREATE TYPE pair AS (a int, b text, c timestamptz);
CREATE TYPE nested AS (p pair, q pair[]);
CREATE TYPE float_range AS RANGE (subtype = float8);
CREATE TYPE text_range AS RANGE (subtype = text, collation = "C");
CREATE TABLE counted (a int, b int);
INSERT INTO counted SELECT i / 10, i / 20 FROM generate_series(1, 1000) i;
CREATE STATISTICS counted_statistics (ndistinct, dependencies, mcv) ON a, b FROM counted;
ANALYZE counted;
"#;

/// A column's type, and its values as SQL expressions, to be cast to the type. NULL goes without saying, except where
/// there is no other value.
pub const TYPES: &[(&str, &[&str])] = &[
    // Numbers
    ("int2", &["0", "1", "-1", "32767", "-32768"]),
    (
        "int4",
        &["0", "1", "127", "128", "-129", "2147483647", "-2147483648"],
    ),
    (
        "int8",
        &[
            "0",
            "1",
            "8388607",
            "-8388609",
            "9007199254740993",
            "9223372036854775807",
            "'-9223372036854775808'",
        ],
    ),
    ("oid", &["0", "2147483648", "4294967295"]),
    ("bool", &["true", "false"]),
    (
        "float4",
        &[
            "0",
            "'-0'",
            "0.1",
            "1.5",
            "16777217",
            "1e10",
            "'1e-45'",
            "'-1.1754942e-38'",
            "'3.4028235e38'",
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
        ],
    ),
    (
        "float8",
        &[
            "0",
            "'-0'",
            "0.1",
            "0.30000000000000004",
            "1e15",
            "1e16",
            "123456789012345680",
            "9007199254740993",
            "1e-5",
            "'5e-324'",
            "'2.2250738585072011e-308'",
            "'2.2250738585072014e-308'",
            "'1.7976931348623157e308'",
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
        ],
    ),
    (
        "numeric",
        &[
            "0",
            "1.0",
            "1.00",
            "'-0.00'",
            "1e-20",
            "1e20",
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "repeat('9', 131072)",
            "'-0.' || repeat('1', 16383)",
            "repeat('7', 131072) || '.' || repeat('3', 16383)",
        ],
    ),
    ("numeric(12,2)", &["0", "1", "'-9999999999.99'", "'NaN'"]),
    ("numeric(3,-2)", &["12345"]),
    (
        "money",
        &[
            "0",
            "1234.56",
            "'-92233720368547758.08'",
            "'92233720368547758.07'",
        ],
    ),
    // Text
    (
        "text",
        &[
            "''",
            "' '",
            "'a  '",
            "'NULL'",
            "'\\N'",
            "'\\.'",
            "E'a\\tb\\nc\\rd\\\\e\\bf\\x01\\x7f'",
            "'ä€😀'",
            "E'e\\u0301'",
            "'{\"}'",
            "'[1]'",
            "repeat('x', 100000)",
        ],
    ),
    ("varchar", &["''", "'a  '"]),
    ("varchar(5)", &["''", "'abcde'", "'ä€😀'", "'a    '"]),
    (
        "char(5)",
        &["''", "'a'", "'abcde'", "E'a\\t'", "' a'", "'ä€😀'"],
    ),
    ("char", &["' '", "'a'"]),
    ("bpchar", &["''", "'a  '"]),
    ("name", &["''", "'a name'", "repeat('n', 63)"]),
    (
        "\"char\"",
        &[
            "''",
            "'a'",
            "'\\'",
            "'\"'",
            "(-1)::int::\"char\"",
            "(-128)::int::\"char\"",
        ],
    ),
    ("text COLLATE \"C\"", &["'a'"]),
    ("citext", &["''", "'Foo'", "'fOO  '"]),
    (
        "mood",
        &[
            "'very sad'",
            "'sad'",
            "'NULL'",
            "'a,b \"c\" {d} \\e'",
            "'happy'",
        ],
    ),
    ("\"Odd \"\"schema\"\"\".mood", &["'other'", "''"]),
    (
        "uuid",
        &[
            "'00000000-0000-0000-0000-000000000000'",
            "'{A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11}'",
        ],
    ),
    // Bytes
    (
        "bytea",
        &[
            "''",
            "'\\x00'",
            "'\\xdeadbeef'",
            "'\\x5c7830'",
            "decode(repeat('00ff5c27', 100000), 'hex')",
        ],
    ),
    ("bit", &["B'0'", "B'1'"]),
    ("bit(3)", &["B'101'"]),
    ("varbit", &["B''", "B'0101010101'"]),
    // Dates and times
    (
        "timestamptz",
        &[
            "'2024-01-02 03:04:05.5+00'",
            "'2024-01-02 03:04:05.123456+14'",
            "'1970-01-01 00:00:00 UTC'",
            "'2024-03-31 02:30:00 Europe/Berlin'",
            "'1900-01-01 00:00:00 Europe/Amsterdam'",
            "'0001-01-01 00:00:00+00'",
            "'0001-12-31 23:59:59+00 BC'",
            "'4714-11-24 00:00:00+00 BC'",
            "'9999-12-31 23:59:59.999999+00'",
            "'10000-01-01 00:00:00+00'",
            "'294276-12-31 23:59:59.999999+00'",
            "'infinity'",
            "'-infinity'",
            "'2016-12-31 23:59:60+00'",
        ],
    ),
    ("timestamptz(0)", &["'2024-01-02 03:04:05.5+00'"]),
    (
        "timestamp",
        &[
            "'2024-01-02 03:04:05.5'",
            "'2024-01-02 03:04:05.000001'",
            "'2024-02-29 24:00:00'",
            "'0001-01-01 00:00:00'",
            "'0001-12-31 23:59:59.9 BC'",
            "'4714-11-24 00:00:00 BC'",
            "'9999-12-31 23:59:59.999999'",
            "'10000-01-01 00:00:00'",
            "'294276-12-31 23:59:59.999999'",
            "'infinity'",
            "'-infinity'",
        ],
    ),
    ("timestamp(3)", &["'2024-01-02 03:04:05.1235'"]),
    (
        "date",
        &[
            "'2024-02-29'",
            "'0001-01-01'",
            "'0001-12-31 BC'",
            "'4714-11-24 BC'",
            "'9999-12-31'",
            "'10000-01-01'",
            "'5874897-12-31'",
            "'infinity'",
            "'-infinity'",
        ],
    ),
    (
        "time",
        &[
            "'00:00:00'",
            "'03:04:05.5'",
            "'23:59:59.999999'",
            "'24:00:00'",
            "'23:59:60'",
        ],
    ),
    ("time(2)", &["'03:04:05.567'"]),
    (
        "timetz",
        &[
            "'00:00:00+00'",
            "'03:04:05.5+05:30'",
            "'24:00:00-15:59:59'",
            "'12:00:00-07'",
        ],
    ),
    (
        "interval",
        &[
            "'0'",
            "'1 year -2 months 3 days -04:05:06.789'",
            "'-1 day +00:00:01'",
            "'178000000 years'",
            "'-178000000 years'",
            "'0.000001 s'",
            "'1 month'",
            "'30 days'",
            "'-1 month 30 days'",
        ],
    ),
    ("interval hour to minute", &["'1 day 02:03:04'"]),
    // JSON and XML
    (
        "json",
        &[
            "'null'",
            "'{\"b\": 1,  \"a\": 2, \"a\": 3}'",
            "'1.0'",
            "'\"\\u00e4\\u0000\"'",
            "' [1, 2 ] '",
            "'123456789012345678901234567890.1234567890'",
        ],
    ),
    (
        "jsonb",
        &[
            "'null'",
            "'{\"b\": 1,  \"a\": 2, \"a\": 3}'",
            "'[1.0, 1.00, 1e2]'",
            "'\"ä\\n\"'",
        ],
    ),
    ("jsonpath", &["'$.a[*] ? (@ > 1)'", "'strict $'"]),
    (
        "xml",
        &[
            "'<a b=\"c\">d</a>'",
            "'text, no element'",
            "'<?xml version=\"1.0\"?><a/>'",
        ],
    ),
    // Networks
    (
        "inet",
        &[
            "'192.168.0.1'",
            "'192.168.0.1/24'",
            "'::ffff:1.2.3.4/128'",
            "'2001:db8::1/64'",
        ],
    ),
    ("cidr", &["'192.168.0.0/24'", "'2001:db8::/32'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("macaddr8", &["'08:00:2b:01:02:03:04:05'"]),
    // Geometry
    ("point", &["'(0.1,-0)'", "'(NaN,Infinity)'"]),
    ("line", &["'{1,-1,0.1}'"]),
    ("lseg", &["'[(0,0),(1,1)]'"]),
    ("box", &["'(3,4),(1,2)'"]),
    ("path", &["'[(0,0),(1,1)]'", "'((0,0),(1,1))'"]),
    ("polygon", &["'((0,0),(1,1),(1,0))'"]),
    ("circle", &["'<(0,0),0.1>'"]),
    // Ranges
    (
        "int4range",
        &["'empty'", "'[1,10)'", "'(,)'", "'[2147483646,2147483647)'"],
    ),
    ("int8range", &["'[1,10]'"]),
    ("numrange", &["'[1.0,1.00]'", "'(NaN,)'"]),
    (
        "daterange",
        &["'[2024-01-01,infinity]'", "'[4714-11-24 BC,)'"],
    ),
    ("tsrange", &["'[2024-01-01 00:00:00.5,2024-01-02)'"]),
    (
        "tstzrange",
        &[
            "'[2024-01-01 00:00:00.5+05,2024-01-02 00:00+00)'",
            "'[,infinity]'",
        ],
    ),
    ("text_range", &["'[\"a,b\",\"c\"\"d\")'", "'[\"\",z]'"]),
    ("float_range", &["'[0.1,0.30000000000000004)'"]),
    ("int4multirange", &["'{}'", "'{[1,3),[5,7)}'"]),
    ("int8multirange", &["'{[1,3)}'"]),
    ("nummultirange", &["'{[1.0,2.00)}'"]),
    ("datemultirange", &["'{[2024-01-01,2024-01-02)}'"]),
    ("tsmultirange", &["'{[2024-01-01,2024-01-02)}'"]),
    (
        "tstzmultirange",
        &["'{[2024-01-01 00:00+05,2024-01-02 00:00+00)}'"],
    ),
    // Text search
    (
        "tsvector",
        &[
            "''",
            "'''a b'':1A,2 \"c\"'",
            "to_tsvector('english', 'The quick brown foxes')",
        ],
    ),
    ("tsquery", &["''", "'a & !b <-> c:*A'"]),
    ("gtsvector", &["NULL"]),
    // Names of other objects
    ("regclass", &["'pg_class'", "'0'", "'4294967295'"]),
    ("regproc", &["'now'"]),
    ("regprocedure", &["'lower(text)'"]),
    ("regoper", &["'||/'", "'0'"]),
    ("regoperator", &["'+(integer,integer)'"]),
    ("regtype", &["'timestamp with time zone'", "'int[]'"]),
    ("regrole", &["'pg_read_all_data'"]),
    ("regnamespace", &["'pg_catalog'"]),
    ("regconfig", &["'english'"]),
    ("regdictionary", &["'simple'"]),
    ("regcollation", &["'\"C\"'"]),
    // Of the system
    ("tid", &["'(0,1)'", "'(4294967295,65535)'"]),
    ("xid", &["'4294967295'"]),
    ("xid8", &["'18446744073709551615'"]),
    ("cid", &["'7'"]),
    ("pg_lsn", &["'0/0'", "'FFFFFFFF/FFFFFFFF'"]),
    ("pg_snapshot", &["'10:20:10,14,15'"]),
    ("txid_snapshot", &["'10:20:10,14,15'"]),
    ("refcursor", &["'a cursor'"]),
    ("int2vector", &["''", "'1 -2 3'"]),
    ("oidvector", &["'1 4294967295'"]),
    ("aclitem", &["makeaclitem(10, 10, 'SELECT', true)"]),
    (
        "pg_node_tree",
        &["(SELECT ev_action FROM pg_rewrite ORDER BY oid LIMIT 1)"],
    ),
    (
        "pg_ndistinct",
        &["(SELECT stxdndistinct FROM pg_statistic_ext_data LIMIT 1)"],
    ),
    (
        "pg_dependencies",
        &["(SELECT stxddependencies FROM pg_statistic_ext_data LIMIT 1)"],
    ),
    (
        "pg_mcv_list",
        &["(SELECT stxdmcv FROM pg_statistic_ext_data LIMIT 1)"],
    ),
    ("pg_brin_bloom_summary", &["NULL"]),
    ("pg_brin_minmax_multi_summary", &["NULL"]),
    // Domains, composites, extensions
    ("positive", &["7"]),
    ("small", &["1", "99"]),
    ("moment", &["'2024-01-02 03:04:05.5+05'"]),
    ("code", &["'a'"]),
    ("numbers", &["'{1,NULL,3}'", "'{}'", "'[0:1]={1,2}'"]),
    ("area", &["'(3,4),(1,2)'"]),
    ("name_of", &["'Foo'"]),
    (
        "pair",
        &[
            "ROW(1, 'a \"b\", (c)\\', '2024-01-02 03:04:05.5+05')",
            "ROW(NULL, '', NULL)",
            "ROW(NULL, NULL, NULL)",
        ],
    ),
    (
        "nested",
        &["ROW(ROW(1, 'x', NULL), ARRAY[ROW(2, '\"', NULL)::pair, NULL])"],
    ),
    ("hstore", &["''", "'a=>1, \"b c\"=>NULL, \"d\"=>\"\\\"\"'"]),
    // Arrays
    (
        "int4[]",
        &[
            "'{}'",
            "'{1,NULL,-3}'",
            "'{{1,2},{3,NULL}}'",
            "'{{{{{{1}}}}}}'",
            "'[2:4]={1,2,3}'",
            "'[-1:0][5:6]={{1,2},{3,4}}'",
        ],
    ),
    ("int4[3][3]", &["'{1}'"]),
    ("int8[]", &["'{9223372036854775807,-9223372036854775808}'"]),
    ("bool[]", &["'{t,f,NULL}'"]),
    (
        "float4[]",
        &["'{0.1,1e-45,NaN,Infinity,-Infinity,-0,1e20}'"],
    ),
    (
        "float8[]",
        &["'{0.1,5e-324,NaN,Infinity,-Infinity,-0,1e20,1e15,1e16,NULL}'"],
    ),
    ("numeric(6,2)[]", &["'{1,NaN,NULL}'"]),
    (
        "text[]",
        &[
            "'{}'",
            "ARRAY['', ' ', 'NULL', 'null', NULL]",
            "ARRAY['a,b', '{', '}', '\"', '\\', '\\\"', ';', '[1:1]={x}']",
            "ARRAY[E'\\n\\t\\r\\b\\f\\x01\\x7f\\x0b', 'ä€😀', '</script>', '/']",
            "ARRAY[['a', NULL], ['\"', '']]",
            "'[0:1]={a,\"b c\"}'",
            "ARRAY[repeat('\"', 10000)]",
        ],
    ),
    ("char(3)[]", &["ARRAY['a', '', ' b']"]),
    ("\"char\"[]", &["ARRAY['a', '', (-1)::int::\"char\"]"]),
    ("bytea[]", &["ARRAY['\\x00ff'::bytea, '', NULL]"]),
    ("uuid[]", &["'{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}'"]),
    (
        "timestamptz[]",
        &["'{2024-01-02 03:04:05.5+05,infinity,NULL,0044-03-15 12:00:00+00 BC}'"],
    ),
    ("timestamp[]", &["'{2024-01-02 03:04:05}'"]),
    ("date[]", &["'{2024-01-02,-infinity,0044-03-15 BC}'"]),
    ("time[]", &["'{03:04:05,24:00:00}'"]),
    ("interval[]", &["'{1 day -00:00:01}'"]),
    (
        "json[]",
        &["ARRAY['{\"a\": [1, \"x\"]}'::json, 'null', NULL]"],
    ),
    ("jsonb[]", &["ARRAY['\"\\\\\"'::jsonb]"]),
    (
        "mood[]",
        &["ARRAY['NULL', 'a,b \"c\" {d} \\e', NULL]::mood[]"],
    ),
    ("citext[]", &["'{Foo,foo}'"]),
    (
        "box[]",
        &["'{(3,4),(1,2);(5,6),(0,0)}'", "'{{(1,1),(0,0)};{NULL}}'"],
    ),
    ("point[]", &["'{\"(1,2)\",\"(3,4)\"}'"]),
    ("small[]", &["'{1,99}'"]),
    ("moment[]", &["'{2024-01-02 03:04:05.5+05}'"]),
    ("numbers[]", &["ARRAY['{1,2}'::numbers, '{}', NULL]"]),
    ("area[]", &["ARRAY['(3,4),(1,2)'::area]"]),
    ("pair[]", &["ARRAY[ROW(1, 'a,\"b\\', NULL)::pair, NULL]"]),
    ("int4range[]", &["ARRAY['[1,2)'::int4range, 'empty']"]),
    ("hstore[]", &["ARRAY['a=>\"b\\\"\"'::hstore]"]),
    ("int2vector[]", &["ARRAY['1 2'::int2vector]"]),
    ("oid[]", &["'{4294967295}'"]),
    ("name[]", &["'{a,NULL}'"]),
    ("money[]", &["'{1.5,-2}'"]),
];
