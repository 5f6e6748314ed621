//! One bad write for each way in which Postgres refuses one, each between good ones: the good ones arrive, the bad ones are told
//! with their reason, and the rows are as before.

use anabranch_tests::wait::{DEADLINE, until};

use crate::conflicts::edge::Edge;

const TABLES: &str = "
    CREATE TABLE parents (id int PRIMARY KEY);
    INSERT INTO parents VALUES (1);
    CREATE TABLE t (id int PRIMARY KEY, v varchar(3), n int CONSTRAINT positive CHECK (n > 0),
        u int CONSTRAINT one_u UNIQUE, p int CONSTRAINT has_parent REFERENCES parents,
        late int CONSTRAINT has_parent_late REFERENCES parents DEFERRABLE INITIALLY DEFERRED,
        r int4range, f float8 NOT NULL DEFAULT 0, day date, sum numeric(4,1), j json, b bool,
        CONSTRAINT apart EXCLUDE USING gist (r WITH &&));
    CREATE VIEW small AS SELECT * FROM parents WHERE id < 100 WITH CHECK OPTION;
    INSERT INTO t (id, v, n, u, r) VALUES (1, 'one', 1, 1, '[1,10)'), (2, 'her', 5000, NULL, NULL);
    INSERT INTO t (id, v, n) SELECT g, 'old', 1 FROM generate_series(100, 150) g;
    CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.v = 'P01' THEN RAISE EXCEPTION 'not today' USING DETAIL = 'a secret'; END IF;
        IF NEW.v = '440' THEN INSERT INTO public.small VALUES (1000); END IF;
        RETURN NEW; END $$;
    CREATE TRIGGER complain BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION complain();
    CREATE TABLE hidden (id int PRIMARY KEY, owner text NOT NULL);
    INSERT INTO hidden VALUES (1, 'nobody'), (2, 'edge-1');
    ALTER TABLE hidden ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON hidden TO {app} USING (owner = current_setting('request.jwt.claims')::json->>'sub');
    CREATE TABLE closed (id int PRIMARY KEY, note text);
    INSERT INTO closed VALUES (1, 'as it was');
    GRANT ALL ON t, hidden, parents, small TO {app};
    GRANT SELECT ON closed TO {app}";

/// A row that only Postgres has is in the way of one of them.
const SEEN: &str = "SELECT * FROM t WHERE n < 1000 OR n IS NULL";

/// Statement, with an id that nothing else has; SQLSTATE, outcome, constraint.
const BAD: &[(&str, &str, &str, Option<&str>)] = &[
    // 22: data.
    (
        "INSERT INTO t(id, v) VALUES({id}, 'long')",
        "22001",
        "error",
        None,
    ),
    (
        "INSERT INTO t(id, n) VALUES({id}, 1 << 40)",
        "22003",
        "error",
        None,
    ),
    (
        "UPDATE t SET sum = '12345.5' WHERE id = 1",
        "22003",
        "error",
        None,
    ),
    (
        "UPDATE t SET day = 'tomorrow?' WHERE id = 1",
        "22007",
        "error",
        None,
    ),
    (
        "UPDATE t SET day = '2024-02-31' WHERE id = 1",
        "22008",
        "error",
        None,
    ),
    (
        "UPDATE t SET r = '[5,1)' WHERE id = 1",
        "22000",
        "error",
        None,
    ),
    (
        "UPDATE t SET v = 'a' || char(0) WHERE id = 1",
        "22021",
        "error",
        None,
    ),
    // Types.
    ("UPDATE t SET r = 'x' WHERE id = 1", "22P02", "error", None),
    ("UPDATE t SET j = '{' WHERE id = 1", "22P02", "error", None),
    ("UPDATE t SET b = 7 WHERE id = 1", "22018", "error", None),
    // 23: constraints, the deferred one too.
    ("UPDATE t SET f = NULL WHERE id = 1", "23502", "error", None),
    (
        "INSERT INTO t(id, p) VALUES({id}, 9)",
        "23503",
        "error",
        Some("has_parent"),
    ),
    (
        "INSERT INTO t(id, late) VALUES({id}, 9)",
        "23503",
        "error",
        Some("has_parent_late"),
    ),
    (
        "INSERT INTO t(id, u) VALUES({id}, 1)",
        "23505",
        "error",
        Some("one_u"),
    ),
    (
        "INSERT INTO t(id, n) VALUES(2, 1)",
        "23505",
        "insert_exists",
        Some("t_pkey"),
    ),
    (
        "UPDATE t SET n = -1 WHERE id = 1",
        "23514",
        "error",
        Some("positive"),
    ),
    (
        "INSERT INTO t(id, r) VALUES({id}, '[5,6)')",
        "23P01",
        "error",
        Some("apart"),
    ),
    // 42501: by grant, by row-level security (which hides the row from an UPDATE).
    (
        "INSERT INTO closed VALUES(2, 'mine')",
        "42501",
        "error",
        None,
    ),
    (
        "UPDATE closed SET note = 'mine' WHERE id = 1",
        "42501",
        "error",
        None,
    ),
    ("DELETE FROM closed WHERE id = 1", "42501", "error", None),
    (
        "INSERT INTO hidden VALUES(3, 'nobody')",
        "42501",
        "error",
        None,
    ),
    (
        "UPDATE hidden SET owner = 'nobody' WHERE id = 2",
        "42501",
        "error",
        None,
    ),
    (
        "UPDATE hidden SET owner = 'edge-1' WHERE id = 1",
        "AB100",
        "update_missing",
        None,
    ),
    // 44, P0001.
    (
        "INSERT INTO t(id, v) VALUES({id}, '440')",
        "44000",
        "error",
        None,
    ),
    (
        "INSERT INTO t(id, v) VALUES({id}, 'P01')",
        "P0001",
        "error",
        None,
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_write_blocks_good_ones_or_is_not_told_or_not_undone() {
    let edge = Edge::start(
        TABLES,
        &[
            ("t", SEEN),
            ("hidden", "SELECT * FROM hidden"),
            ("closed", "SELECT * FROM closed"),
        ],
        "",
    )
    .await;
    let state = "SELECT (SELECT string_agg(t::text, ' ' ORDER BY id) FROM t WHERE id < 100 OR id >= 1000)
        || (SELECT string_agg(t::text, ' ' ORDER BY id) FROM hidden t) || (SELECT string_agg(t::text, ' ') FROM closed t)";
    let before = edge.text(state).await;
    let program = edge.program();
    let good = |number: usize, v: &str| {
        let sql = format!("UPDATE t SET v = '{v}' WHERE id = {}", 100 + number);
        assert_eq!(program.execute(&sql, []).unwrap(), 1);
    };
    for (number, (sql, ..)) in BAD.iter().enumerate() {
        good(number, "new");
        let sql = sql.replace("{id}", &(1000 + number).to_string());
        // In its transaction another one, which is undone with it.
        let made = program.execute_batch(&format!(
            "BEGIN IMMEDIATE; UPDATE t SET v = 'bad' WHERE id = {}; {sql}; COMMIT",
            100 + BAD.len() + number
        ));
        made.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    good(0, "end");
    edge.until_answered().await;
    edge.same().await;
    assert_eq!(edge.text(state).await, before);
    let arrived = "SELECT concat_ws(' ', count(*) FILTER (WHERE v = 'new'), count(*) FILTER (WHERE v = 'end'),
                          count(*) FILTER (WHERE v = 'bad')) FROM t";
    let expected = format!("{} 1 0", BAD.len() - 1);
    assert_eq!(edge.text(arrived).await, expected);

    let rejected = edge.rejected();
    assert_eq!(rejected.len(), 2 * BAD.len(), "{rejected:#?}");
    for ((sql, sqlstate, outcome, constraint), told) in BAD.iter().zip(rejected.chunks(2)) {
        let [with, bad] = told else { unreachable!() };
        // What is found at the end is no single entry's fault.
        let is_late = *constraint == Some("has_parent_late");
        let expected = if is_late { "error" } else { "rolled_back" };
        assert_eq!(with.outcome, expected, "{sql}: {with:?}");
        assert_eq!(
            (
                bad.sqlstate.as_deref(),
                &*bad.outcome,
                bad.constraint.as_deref()
            ),
            (Some(*sqlstate), *outcome, *constraint),
            "{sql}: {bad:?}"
        );
        assert!(
            sql.to_lowercase().starts_with(&*bad.operation),
            "{sql}: {bad:?}"
        );
        assert!(
            !bad.message.as_deref().unwrap().contains("secret"),
            "{sql}: {bad:?}"
        );
    }
}

/// The streamer can reach Postgres and can't write: no write is at fault, so all wait, and the file says so.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_why_writes_wait() {
    let edge = Edge::start(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'old'); GRANT ALL ON t TO {app}",
        &[("t", "SELECT * FROM t")],
        "",
    )
    .await;
    let rename = |from: &str, to: &str| {
        format!(
            "DO $$ DECLARE f text; BEGIN
                 SELECT oid::regprocedure INTO f FROM pg_proc WHERE proname = '{from}' AND pronamespace = 'anabranch'::regnamespace;
                 EXECUTE 'ALTER FUNCTION ' || f || ' RENAME TO {to}'; END $$"
        )
    };
    edge.database.execute(&rename("claim", "gone")).await;
    let program = edge.program();
    program.execute("UPDATE t SET v = 'new'", []).unwrap();
    let error = || {
        let sql = "SELECT coalesce(last_error, '') FROM _anabranch_status";
        edge.replica
            .open()
            .query_row(sql, [], |row| row.get::<_, String>(0))
            .unwrap()
    };
    until("the file says why", DEADLINE, || async {
        error().contains("local writes wait")
    })
    .await;
    let status = edge.replica.get("/status").await.unwrap().json().unwrap();
    assert!(
        status["last_error"]
            .as_str()
            .unwrap()
            .contains("can't write to Postgres"),
        "{status:#}"
    );
    assert_eq!(
        (&status["connected"], &status["pending"]),
        (&true.into(), &1.into())
    );
    edge.database.execute(&rename("gone", "claim")).await;
    edge.until_answered().await;
    edge.same().await;
    until("the file says no more", DEADLINE, || async {
        error().is_empty()
    })
    .await;
    assert!(edge.rejected().is_empty());
}
