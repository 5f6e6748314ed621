//! What the catalogs say of tables, at a real Postgres: what is read, what is refused, and whether the SQL that is
//! said to mend it does.

use anabranch_streamer::{
    postgres::{
        catalog::{Name, Refusal, difference, read, read_again},
        sql::Client,
        target::Target,
    },
    table::{Collation, Identity, Kind, Table},
};
use anabranch_tests::{
    announce,
    postgres::{Database, Server},
};

async fn connect(database: &Database) -> Client {
    let target = Target::parse(database.url()).unwrap();
    Client::connect(&target, "catalog").await.unwrap()
}

async fn fresh() -> (Database, Client) {
    let database = Server::shared().await.database().await;
    let client = connect(&database).await;
    (database, client)
}

fn name(schema: &str, name: &str) -> Name {
    Name {
        schema: schema.into(),
        name: name.into(),
    }
}

async fn one(client: &Client, table: &str) -> Result<Table, Refusal> {
    read(client, &[name("public", table)])
        .await
        .unwrap()
        .remove(0)
}

#[tokio::test]
async fn odd_tables_are_read_as_they_are() {
    let (database, client) = fresh().await;
    let setup = r#"
        CREATE EXTENSION citext SCHEMA public;
        CREATE SCHEMA "Sch ""a"".b";
        CREATE TYPE mood AS ENUM ('sad', 'happy');
        ALTER TYPE mood ADD VALUE 'ok' BEFORE 'happy';
        CREATE DOMAIN small AS int CHECK (VALUE < 100);
        CREATE DOMAIN smaller AS small;
        CREATE DOMAIN boxes AS box[];
        CREATE TABLE "Sch ""a"".b"."Select ""x"".y" (
            gone int,
            "Group" varchar(10) NOT NULL,
            "b" smaller,
            c mood[],
            d numeric(12,2),
            e citext NOT NULL,
            f int GENERATED ALWAYS AS (1 + 1) STORED,
            g boxes,
            "ä ö" timestamptz(3)[][],
            h int2vector,
            i bigint NOT NULL,
            PRIMARY KEY (i, "Group") INCLUDE (d)
        );
        ALTER TABLE "Sch ""a"".b"."Select ""x"".y" DROP COLUMN gone;
        CREATE INDEX "By b" ON "Sch ""a"".b"."Select ""x"".y" (b DESC, "ä ö") INCLUDE (d);
        CREATE UNIQUE INDEX uniq ON "Sch ""a"".b"."Select ""x"".y" (d);
        CREATE INDEX partial ON "Sch ""a"".b"."Select ""x"".y" (d) WHERE b > 1;
        CREATE INDEX expression ON "Sch ""a"".b"."Select ""x"".y" (d, (b + 1));
        CREATE INDEX hashed ON "Sch ""a"".b"."Select ""x"".y" USING hash (d);
        CREATE INDEX generated ON "Sch ""a"".b"."Select ""x"".y" (f);
    "#;
    // One by one: a new label can't be used in the transaction that adds it.
    for statement in setup.split(";\n") {
        database.execute(statement).await;
    }
    let asked = [name("Sch \"a\".b", "Select \"x\".y")];
    let table = read(&client, &asked).await.unwrap().remove(0).unwrap();
    let found: Vec<_> = table
        .columns
        .iter()
        .map(|column| {
            (
                column.name.as_str(),
                column.attnum,
                column.postgres_type.as_str(),
                column.not_null,
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("Group", 2, "character varying(10)", true),
            ("b", 3, "smaller", false),
            ("c", 4, "mood[]", false),
            ("d", 5, "numeric(12,2)", false),
            ("e", 6, "citext", true),
            ("g", 8, "boxes", false),
            ("ä ö", 9, "timestamp(3) with time zone[]", false),
            ("h", 10, "int2vector", false),
            ("i", 11, "bigint", true),
        ]
    );
    let array = |kind: Kind, delimiter| Kind::Array(Box::new(kind), delimiter);
    let labels = ["sad", "ok", "happy"].map(String::from).to_vec();
    let kinds: Vec<_> = table
        .columns
        .iter()
        .map(|column| column.kind.clone())
        .collect();
    assert_eq!(
        kinds,
        [
            Kind::Text,
            Kind::Integer,
            array(Kind::Enum(labels), ','),
            Kind::Numeric,
            Kind::Citext,
            array(Kind::Other, ';'),
            array(Kind::Timestamptz, ','),
            Kind::Other,
            Kind::Integer,
        ]
    );
    let typmods = database
        .query(
            "SELECT atttypmod, atttypid, attrelid FROM pg_attribute WHERE attname = 'Group'",
            &[],
        )
        .await;
    assert_eq!(table.columns[0].typmod, typmods[0].get::<_, i32>(0));
    assert_eq!(table.columns[0].type_oid, typmods[0].get::<_, u32>(1));
    assert_eq!(table.oid, typmods[0].get::<_, u32>(2));
    assert_eq!(
        (&table.key[..], &table.identity),
        (&[8, 0][..], &Identity::Key)
    );
    let indexes: Vec<_> = table
        .indexes
        .iter()
        .map(|index| (index.name.as_str(), &index.columns[..]))
        .collect();
    assert_eq!(indexes, [("By b", &[1, 6][..]), ("uniq", &[3][..])]);
    assert_eq!(table.version, 1);
    // By OID it is the same.
    let again = read_again(&client, &[table.oid]).await.unwrap();
    assert_eq!(again, [Some(Ok(table))]);
}

#[tokio::test]
async fn identities_are_told_apart() {
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE TABLE t (a int, b int, c int NOT NULL, d int NOT NULL, PRIMARY KEY (b, a));
             CREATE UNIQUE INDEX u ON t (d, c);
             CREATE UNIQUE INDEX same ON t (a, b);",
        )
        .await;
    let identity = async |sql: &str| {
        database.execute(&format!("ALTER TABLE t {sql}")).await;
        let table = one(&client, "t").await.unwrap();
        (table.key, table.identity)
    };
    let key = || vec![1, 0];
    assert_eq!(
        identity("REPLICA IDENTITY FULL").await,
        (key(), Identity::Full)
    );
    let index = Identity::Index(vec![2, 3]);
    assert_eq!(
        identity("REPLICA IDENTITY USING INDEX u").await,
        (key(), index)
    );
    assert_eq!(
        identity("REPLICA IDENTITY USING INDEX same").await,
        (key(), Identity::Key)
    );
    assert_eq!(
        identity("REPLICA IDENTITY DEFAULT").await,
        (key(), Identity::Key)
    );
    database
        .execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await;
    assert_eq!(
        identity("REPLICA IDENTITY USING INDEX u").await,
        (vec![3, 2], Identity::Key)
    );
}

/// SQL that makes a table `t`, what the refusal says, and whether there is SQL that mends it.
const REFUSED: &[(&str, &str, bool)] = &[
    ("SELECT 1", "does not exist", false),
    (
        "CREATE TABLE \"T\" (a int PRIMARY KEY)",
        "is public.\"T\" meant",
        false,
    ),
    ("CREATE VIEW t AS SELECT 1 AS a", "a view", false),
    (
        "CREATE MATERIALIZED VIEW t AS SELECT 1 AS a",
        "a materialized view",
        false,
    ),
    ("CREATE SEQUENCE t", "a sequence", false),
    (
        "CREATE TABLE u (a int); CREATE INDEX t ON u (a)",
        "not a table",
        false,
    ),
    ("CREATE TYPE t AS (a int)", "not a table", false),
    (
        "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; CREATE FOREIGN TABLE t (a int) SERVER s",
        "a foreign table",
        false,
    ),
    (
        "CREATE TABLE t (a int PRIMARY KEY) PARTITION BY RANGE (a)",
        "partitioned",
        false,
    ),
    (
        "CREATE TABLE p (a int PRIMARY KEY) PARTITION BY RANGE (a); CREATE TABLE t PARTITION OF p DEFAULT",
        "a partition",
        false,
    ),
    (
        "CREATE TABLE t (a int PRIMARY KEY); CREATE TABLE child () INHERITS (t)",
        "inherit",
        false,
    ),
    (
        "CREATE UNLOGGED TABLE t (a int PRIMARY KEY)",
        "unlogged",
        true,
    ),
    // A key of its owner's choice is asked for.
    ("CREATE TABLE t (a int)", "no primary key", false),
    (
        "CREATE TABLE t (a int); ALTER TABLE t REPLICA IDENTITY FULL",
        "no primary key",
        false,
    ),
    ("CREATE TABLE t ()", "no primary key", false),
    (
        "CREATE TABLE t (a int UNIQUE, b int NOT NULL, c int NOT NULL, UNIQUE (b, c))",
        "no primary key",
        true,
    ),
    (
        "CREATE TABLE t (a int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY NOTHING",
        "replica identity is NOTHING",
        true,
    ),
    (
        "CREATE TABLE t (a int NOT NULL UNIQUE); ALTER TABLE t REPLICA IDENTITY NOTHING",
        "replica identity is NOTHING",
        true,
    ),
    (
        "CREATE TABLE t (a int, \"B\" int, PRIMARY KEY (\"B\", a) DEFERRABLE)",
        "deferrable",
        true,
    ),
    (
        "CREATE TABLE t (a int PRIMARY KEY DEFERRABLE, b int NOT NULL UNIQUE); ALTER TABLE t REPLICA IDENTITY FULL",
        "deferrable",
        true,
    ),
    (
        "CREATE TABLE t (a int PRIMARY KEY, b int NOT NULL); CREATE UNIQUE INDEX u ON t (b);
         ALTER TABLE t REPLICA IDENTITY USING INDEX u; DROP INDEX u",
        "is gone",
        true,
    ),
    ("CREATE TABLE t (a float8 PRIMARY KEY)", "NaN", false),
    (
        "CREATE DOMAIN f AS real; CREATE TABLE t (a int, b f, PRIMARY KEY (a, b))",
        "NaN",
        false,
    ),
    (
        "CREATE TABLE t (a regclass PRIMARY KEY)",
        "name of another object",
        false,
    ),
    (
        "CREATE TABLE t (a int PRIMARY KEY, b float8 NOT NULL); CREATE UNIQUE INDEX u ON t (b);
         ALTER TABLE t REPLICA IDENTITY USING INDEX u",
        "NaN",
        false,
    ),
    (
        "CREATE TABLE t (a int, b int GENERATED ALWAYS AS (a) STORED PRIMARY KEY)",
        "is generated",
        false,
    ),
    (
        "CREATE TABLE t (a int PRIMARY KEY, \"A\" int)",
        "ignores case",
        false,
    ),
];

#[tokio::test]
async fn what_can_not_be_followed_is_refused_by_name_and_mended_by_what_is_said() {
    let server = Server::shared().await;
    for (sql, reason, mends) in REFUSED {
        let database = server.database().await;
        database.execute(sql).await;
        let client = connect(&database).await;
        let refusal = match one(&client, "t").await {
            Err(refusal) => refusal,
            Ok(table) => panic!("{sql}: {table:?}"),
        };
        assert!(refusal.reason.contains(reason), "{sql}: {refusal}");
        assert_eq!(refusal.table, "public.t");
        if *mends {
            let remedy = refusal.remedy.unwrap_or_else(|| panic!("{sql}: no remedy"));
            database.execute(&remedy).await;
            let mended = one(&client, "t").await;
            assert!(mended.is_ok(), "{sql}; {remedy}: {mended:?}");
            // And Postgres lets the application go on once it is published.
            database
                .execute("CREATE PUBLICATION p FOR TABLE t; DELETE FROM t")
                .await;
        }
    }
}

#[tokio::test]
async fn system_tables_and_our_own_are_refused() {
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE SCHEMA anabranch; CREATE TABLE anabranch.source (a int PRIMARY KEY);
             CREATE TABLE _anabranch_x (a int PRIMARY KEY); CREATE TABLE \"Sqlite_x\" (a int PRIMARY KEY);",
        )
        .await;
    client
        .client
        .batch_execute("CREATE TEMPORARY TABLE brief (a int PRIMARY KEY)")
        .await
        .unwrap();
    let row = client
        .client
        .query_one("SELECT pg_my_temp_schema()::regnamespace::text", &[])
        .await
        .unwrap();
    let asked = [
        name("pg_catalog", "pg_class"),
        name("information_schema", "sql_features"),
        name("anabranch", "source"),
        name(row.get(0), "brief"),
        name("public", "_anabranch_x"),
        name("public", "Sqlite_x"),
    ];
    let reasons = [
        "system",
        "system",
        "streamer's own",
        "temporary",
        "reserved",
        "reserved",
    ];
    for (judged, reason) in read(&client, &asked)
        .await
        .unwrap()
        .into_iter()
        .zip(reasons)
    {
        let refusal = judged.unwrap_err();
        assert!(refusal.reason.contains(reason), "{refusal}");
    }
}

#[tokio::test]
async fn an_identity_index_with_a_nullable_column_is_refused() {
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE TABLE t (a int NOT NULL); CREATE UNIQUE INDEX u ON t (a); ALTER TABLE t REPLICA IDENTITY USING INDEX u;",
        )
        .await;
    // Postgres itself does not allow it; a superuser does.
    assert!(
        database
            .try_execute("ALTER TABLE t ALTER a DROP NOT NULL")
            .await
            .is_err()
    );
    database
        .execute("UPDATE pg_attribute SET attnotnull = false WHERE attrelid = 't'::regclass AND attname = 'a'")
        .await;
    let refusal = one(&client, "t").await.unwrap_err();
    assert!(refusal.reason.contains("may be NULL"), "{refusal}");
    assert_eq!(
        refusal.remedy.unwrap(),
        "ALTER TABLE \"public\".\"t\" ALTER COLUMN \"a\" SET NOT NULL"
    );
}

#[tokio::test]
async fn tables_that_would_be_one_in_sqlite_are_refused_both() {
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE SCHEMA s; CREATE TABLE t (a int PRIMARY KEY); CREATE TABLE \"T\" (a int PRIMARY KEY);
             CREATE TABLE s.t (a int PRIMARY KEY); CREATE TABLE \"S.T\" (a int PRIMARY KEY); CREATE TABLE u (a int PRIMARY KEY)",
        )
        .await;
    let asked = [
        name("public", "t"),
        name("public", "T"),
        name("s", "t"),
        name("public", "S.T"),
        name("public", "u"),
    ];
    let judged = read(&client, &asked).await.unwrap();
    let others: Vec<_> = judged
        .iter()
        .map(|judged| judged.as_ref().err().map(|refusal| refusal.reason.clone()))
        .collect();
    for (reason, other) in others
        .iter()
        .zip(["public.T", "public.t", "public.S.T", "s.t"])
    {
        assert!(
            reason
                .as_ref()
                .unwrap()
                .contains(&format!("it and {other} would")),
            "{reason:?}"
        );
    }
    assert_eq!(others[4], None);
    // Each alone is fine.
    for asked in asked {
        assert!(read(&client, &[asked]).await.unwrap()[0].is_ok());
    }
}

/// Postgres decides by bytes whether an UPDATE changes the identity, so that rows are found by the text of their key
/// also where `=` is coarser. The reason why such keys are allowed; were it otherwise, the old row would stay for ever.
#[tokio::test]
async fn an_update_to_an_equal_key_comes_with_the_old_one() {
    let (database, client) = fresh().await;
    database.execute("CREATE EXTENSION citext").await;
    let mut keys = vec![
        ("citext", "'Foo'", "'fOO'"),
        ("numeric", "1.0", "1.00"),
        ("interval", "'1 day'", "'24 hours'"),
        ("jsonb", "'1.0'", "'1.00'"),
        ("numeric[]", "'{1.0}'", "'{1.00}'"),
    ];
    let icu = "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
    match database.try_execute(icu).await {
        Ok(()) => keys.push(("text COLLATE loose", "'Foo'", "'fOO'")),
        Err(_) => announce("this server has no ICU: keys under its collations are not tried"),
    }
    for (i, (sql_type, old, _)) in keys.iter().enumerate() {
        database
            .execute(&format!(
                "CREATE TABLE t{i} (k {sql_type} PRIMARY KEY); INSERT INTO t{i} VALUES ({old})"
            ))
            .await;
        let table = one(&client, &format!("t{i}")).await.unwrap();
        assert_eq!(
            (table.key, table.identity),
            (vec![0], Identity::Key),
            "{sql_type}"
        );
    }
    database
        .execute("CREATE PUBLICATION p FOR ALL TABLES")
        .await;
    let slot = format!("{}_s", database.name());
    database
        .execute(&format!(
            "SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"
        ))
        .await;
    for (i, (_, old, new)) in keys.iter().enumerate() {
        // Equal to Postgres, or this would prove nothing.
        database
            .execute(&format!(
                "UPDATE t{i} SET k = {new} WHERE k = {new} AND k = {old}"
            ))
            .await;
    }
    let changes = client
        .client
        .query(
            "SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, 'proto_version', '1',
             'publication_names', 'p') WHERE get_byte(data, 0) = ascii('U')",
            &[&slot],
        )
        .await
        .unwrap();
    assert_eq!(changes.len(), keys.len());
    for (change, key) in changes.iter().zip(&keys) {
        // U, the table's OID, K: the old key.
        assert_eq!(change.get::<_, &[u8]>(0)[5], b'K', "{key:?}");
    }
}

/// From the manual of CREATE DOMAIN. A replica that declared NOT NULL could not apply this row.
#[tokio::test]
async fn a_domain_that_is_not_null_does_not_keep_its_column_from_null() {
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE DOMAIN sure AS int NOT NULL; CREATE TABLE t (id int PRIMARY KEY, d sure, e sure NOT NULL);
             INSERT INTO t VALUES (1, (SELECT d FROM t WHERE false), 1);",
        )
        .await;
    let nulls = database.query("SELECT FROM t WHERE d IS NULL", &[]).await;
    assert_eq!(nulls.len(), 1);
    let table = one(&client, "t").await.unwrap();
    let declared: Vec<_> = table.columns.iter().map(|column| column.not_null).collect();
    assert_eq!(declared, [true, false, true]);
}

#[tokio::test]
async fn newer_servers_bring_virtual_columns_and_constraints_that_are_not_valid() {
    let server = Server::shared().await;
    if server.major() < 18 {
        announce(
            "virtual columns and NOT NULL … NOT VALID are of Postgres 18: not tried on this server",
        );
        return;
    }
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE TABLE t (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a + 1) VIRTUAL, c int, d int NOT NULL);
             INSERT INTO t (a, d) VALUES (1, 1);
             ALTER TABLE t ADD CONSTRAINT c_there NOT NULL c NOT VALID;",
        )
        .await;
    let declared = async || {
        let table = one(&client, "t").await.unwrap();
        let columns = table.columns.into_iter();
        columns
            .map(|column| (column.name, column.not_null))
            .collect::<Vec<_>>()
    };
    let expect = |c| {
        [
            ("a".to_owned(), true),
            ("c".to_owned(), c),
            ("d".to_owned(), true),
        ]
    };
    assert_eq!(declared().await, expect(false));
    database
        .execute("UPDATE t SET c = 1; ALTER TABLE t VALIDATE CONSTRAINT c_there")
        .await;
    assert_eq!(declared().await, expect(true));
}

/// Compares with what Postgres itself does: sorts every code point under the collation, and as bytes.
#[tokio::test]
async fn only_collations_by_bytes_are_taken_for_such() {
    let server = Server::shared().await;
    let mut databases = vec![
        ("TEMPLATE template0 LOCALE 'C'", Collation::Bytes),
        ("TEMPLATE template0 LOCALE 'POSIX'", Collation::Bytes),
        ("TEMPLATE template0 LOCALE 'C.UTF-8'", Collation::Bytes),
    ];
    let admin = server.database().await;
    let has_icu = !admin
        .query("SELECT FROM pg_collation WHERE collname = 'en-x-icu'", &[])
        .await
        .is_empty();
    if has_icu {
        databases.push((
            "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en' LOCALE 'C'",
            Collation::Deterministic,
        ));
    } else {
        announce("this server has no ICU: its collations are not tried");
    }
    if server.major() >= 17 {
        databases.push((
            "TEMPLATE template0 LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'",
            Collation::Bytes,
        ));
    }
    if server.major() >= 18 {
        let unicode = "TEMPLATE template0 LOCALE_PROVIDER builtin BUILTIN_LOCALE 'PG_UNICODE_FAST' LOCALE 'C'";
        databases.push((unicode, Collation::Bytes));
    }
    for (options, expect) in databases {
        let database = server.database_with(options).await;
        let client = connect(&database).await;
        database
            .execute(
                "CREATE EXTENSION citext;
                 CREATE TABLE t (a text PRIMARY KEY, b text COLLATE \"C\", c varchar COLLATE \"POSIX\", d name, e int,
                    f text[], g citext, h citext[], i text COLLATE ucs_basic)",
            )
            .await;
        let table = one(&client, "t").await.unwrap();
        let found: Vec<_> = table
            .columns
            .iter()
            .map(|column| column.collation)
            .collect();
        let (bytes, not_even) = (Collation::Bytes, Collation::NonDeterministic);
        assert_eq!(
            found,
            [
                expect, bytes, bytes, bytes, bytes, expect, not_even, not_even, bytes
            ],
            "{options}"
        );
        let sorted = database
            .query(
                "SELECT bool_and(as_text = as_bytes) FROM (
                     SELECT row_number() OVER (ORDER BY c COLLATE \"default\") AS as_text,
                         row_number() OVER (ORDER BY convert_to(c, 'UTF8')) AS as_bytes
                     FROM (SELECT chr(n) || 'x' AS c FROM generate_series(1, 1114111, 7) n
                         WHERE n NOT BETWEEN 55296 AND 57343) c) s",
                &[],
            )
            .await;
        assert_eq!(sorted[0].get::<_, bool>(0), expect == bytes, "{options}");
    }
    if has_icu {
        let (database, client) = fresh().await;
        database
            .execute(
                "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
                 CREATE DOMAIN loosely AS text COLLATE loose;
                 CREATE TABLE t (a int PRIMARY KEY, b text COLLATE loose, c text COLLATE \"en-x-icu\", d loosely)",
            )
            .await;
        let table = one(&client, "t").await.unwrap();
        let found: Vec<_> = table
            .columns
            .iter()
            .map(|column| column.collation)
            .collect();
        use Collation::{Bytes, Deterministic, NonDeterministic};
        assert_eq!(
            found,
            [Bytes, NonDeterministic, Deterministic, NonDeterministic]
        );
    }
}

#[tokio::test]
async fn changes_of_a_table_are_noticed_and_named() {
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE SCHEMA s; CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN small AS int;
             CREATE TABLE t (a int PRIMARY KEY, b text, c mood, d varchar(5), e small NOT NULL, f small[]);",
        )
        .await;
    let mut known = one(&client, "t").await.unwrap();
    let mut changed = async |sql: &str| {
        // In parts, since an index may only be made the identity of a table that exists.
        for statement in sql.split("; ") {
            database.execute(statement).await;
        }
        let now = read_again(&client, &[known.oid])
            .await
            .unwrap()
            .remove(0)
            .unwrap()
            .unwrap();
        let difference = difference(&known, &now);
        known = now;
        difference
    };
    for (sql, expect) in [
        (
            "INSERT INTO t VALUES (1, 'x', 'sad', 'y', 1); ANALYZE t",
            None,
        ),
        (
            "CREATE INDEX i ON t (b); ALTER TABLE t ALTER b SET DEFAULT 'x'",
            None,
        ),
        ("ALTER TABLE t ADD CHECK (a > 0)", None),
        (
            "ALTER TABLE t RENAME TO u",
            Some("it was renamed from public.t to public.u"),
        ),
        (
            "ALTER TABLE u SET SCHEMA s",
            Some("it was renamed from public.u to s.u"),
        ),
        (
            "ALTER TABLE s.u SET SCHEMA public; ALTER TABLE u RENAME TO t",
            Some("it was renamed from s.u to public.t"),
        ),
        ("ALTER TABLE t ADD g int", Some("the column g was added")),
        (
            "ALTER TABLE t ADD h int GENERATED ALWAYS AS (7) STORED",
            None,
        ),
        (
            "ALTER TABLE t RENAME b TO bb",
            Some("the column b was renamed to bb"),
        ),
        ("ALTER TABLE t DROP g", Some("the column g was dropped")),
        (
            "ALTER TABLE t DROP bb; ALTER TABLE t ADD bb text",
            Some("the column bb was dropped"),
        ),
        (
            "ALTER TABLE t ALTER a TYPE bigint",
            Some("the type of the column a changed from integer to bigint"),
        ),
        (
            "ALTER TABLE t ALTER d TYPE varchar(9)",
            Some(
                "the type of the column d changed from character varying(5) to character varying(9)",
            ),
        ),
        (
            "ALTER TYPE mood ADD VALUE 'ok' AFTER 'sad'",
            Some("the type mood of the column c was altered"),
        ),
        (
            "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'",
            Some("the type mood of the column c was altered"),
        ),
        ("ALTER TABLE t ALTER bb TYPE text COLLATE \"C\"", None),
        (
            "DELETE FROM t; ALTER TABLE t ALTER bb SET NOT NULL",
            Some("the column bb is NOT NULL now"),
        ),
        (
            "ALTER TABLE t ALTER e DROP NOT NULL",
            Some("the column e may be NULL now"),
        ),
        (
            "ALTER TABLE t REPLICA IDENTITY FULL",
            Some("its replica identity changed from the key to FULL"),
        ),
        (
            "CREATE UNIQUE INDEX by_bb ON t (bb); ALTER TABLE t REPLICA IDENTITY USING INDEX by_bb",
            Some("its replica identity changed from FULL to an index on (bb)"),
        ),
        (
            "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ALTER a DROP NOT NULL",
            Some("the column a may be NULL now"),
        ),
    ] {
        assert_eq!(changed(sql).await.as_deref(), expect, "{sql}");
    }
    let mut known = known.clone();
    database
        .execute("ALTER TABLE t ADD PRIMARY KEY (a); ALTER TABLE t REPLICA IDENTITY DEFAULT")
        .await;
    let now = one(&client, "t").await.unwrap();
    known.columns[0].not_null = true;
    assert_eq!(
        difference(&known, &now).as_deref(),
        Some("its key changed from (bb) to (a)")
    );

    // The name is no identity.
    database
        .execute("ALTER TABLE t RENAME TO old; CREATE TABLE t (LIKE old INCLUDING ALL)")
        .await;
    let again = one(&client, "t").await.unwrap();
    assert_eq!(
        difference(&now, &again).as_deref(),
        Some("public.t was dropped, and made again")
    );
    database.execute("DROP TABLE old").await;
    assert_eq!(
        read_again(&client, &[now.oid, again.oid]).await.unwrap(),
        [None, Some(Ok(again.clone()))]
    );
    database.execute("ALTER TABLE t SET UNLOGGED").await;
    let refused = read_again(&client, &[again.oid])
        .await
        .unwrap()
        .remove(0)
        .unwrap();
    assert!(refused.unwrap_err().reason.contains("unlogged"));
}

/// Functions and types that somebody puts where ours are looked for must not run, nor be believed.
#[tokio::test]
async fn what_is_planted_in_the_search_path_is_not_called() {
    let (database, client) = fresh().await;
    database
        .execute(
            "CREATE FUNCTION trap() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE 'called'; END $$;
             CREATE FUNCTION public.lower(name) RETURNS text LANGUAGE sql AS 'SELECT trap()::text';
             CREATE FUNCTION public.format(text, name, name) RETURNS text LANGUAGE sql AS 'SELECT trap()::text';
             CREATE FUNCTION public.to_jsonb(pg_database) RETURNS jsonb LANGUAGE sql AS 'SELECT trap()::text::jsonb';
             CREATE FUNCTION public.to_jsonb(pg_collation) RETURNS jsonb LANGUAGE sql AS 'SELECT trap()::text::jsonb';
             CREATE FUNCTION step(json, json) RETURNS json LANGUAGE sql AS 'SELECT trap()::text::json';
             CREATE AGGREGATE public.json_agg(json) (sfunc = step, stype = json);
             CREATE TYPE citext AS ENUM ('not the real one');
             CREATE TABLE t (a text PRIMARY KEY, b citext);",
        )
        .await;
    let judged = read(&client, &[name("public", "t"), name("public", "T")])
        .await
        .unwrap();
    let labels = vec!["not the real one".to_owned()];
    assert_eq!(
        judged[0].as_ref().unwrap().columns[1].kind,
        Kind::Enum(labels)
    );
    assert!(
        judged[1]
            .as_ref()
            .unwrap_err()
            .reason
            .contains("is public.t meant")
    );
}

#[tokio::test]
async fn nothing_asked_is_nothing_answered() {
    let (_database, client) = fresh().await;
    assert!(read(&client, &[]).await.unwrap().is_empty());
    assert!(read_again(&client, &[]).await.unwrap().is_empty());
    assert_eq!(read_again(&client, &[4_000_000_000]).await.unwrap(), [None]);
}
