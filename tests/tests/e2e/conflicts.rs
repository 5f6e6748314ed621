//! A program and Postgres change the same while they do not hear of each other: what becomes of it is what the config says, and
//! what is rejected can be tried again or forgotten.

pub mod edge;

use anabranch_tests::{
    http,
    wait::{DEADLINE, until},
};
use serde_json::json;

use self::edge::{Edge, Rejected};

const TABLES: &str = "
    CREATE TABLE c (id int PRIMARY KEY, team int NOT NULL DEFAULT 1, last text, first text, hits int, price numeric(30,2));
    INSERT INTO c SELECT g, 1, 'l', 'f', 10, 10.50 FROM generate_series(1, 19) g;
    CREATE TABLE f (id int PRIMARY KEY, a text, b text);
    INSERT INTO f SELECT g, 'a', 'b' FROM generate_series(1, 5) g;
    CREATE TABLE m (id int PRIMARY KEY, a text, b int);
    INSERT INTO m SELECT g, 'old', g FROM generate_series(1, 3) g;
    CREATE FUNCTION merge_m(old m, new m, now m) RETURNS m LANGUAGE plpgsql AS $$ BEGIN
        IF new.a = 'keep' THEN RETURN NULL; END IF;
        now.a := concat_ws('/', old.a, new.a, now.a);
        RETURN now;
    END $$;
    GRANT ALL ON c, f, m TO {app}";

const C: (&str, &str) = ("c", "SELECT * FROM c WHERE team = 1");
const F: (&str, &str) = ("f", "SELECT * FROM f");
const M: (&str, &str) = ("m", "SELECT * FROM m");

const CONFIG: &str = r#"
    [table."public.c"]
    column.first = "first-write"
    column.hits = "add"
    column.price = "add"
    [table."public.f"]
    conflict = "first-write"
    [table."public.m"]
    conflict = { function = "public.merge_m" }
"#;

/// What a program writes while nothing runs but itself, each in its own transaction.
const HERE: &[&str] = &[
    // last-write: only what it changed.
    "UPDATE c SET last = 'mine' WHERE id = 1",
    // first-write: somebody else was first, or changed only something else.
    "UPDATE c SET first = 'mine', last = 'mine' WHERE id = 2",
    "UPDATE c SET first = 'mine' WHERE id = 3",
    // add: of integers, of decimals, where a NULL is involved, and twice.
    "UPDATE c SET hits = hits + 5 WHERE id = 4",
    "UPDATE c SET price = printf('%.2f', price + 2.25) WHERE id = 5",
    "UPDATE c SET hits = 7 WHERE id = 6",
    "UPDATE c SET hits = hits + 1 WHERE id = 7",
    "UPDATE c SET hits = hits + 1 WHERE id = 7",
    // SQLite has no decimals: that many digits it rounds.
    "UPDATE c SET price = price + 12345678901234567.25 WHERE id = 8",
    // Gone: an UPDATE, a DELETE. There already: an INSERT. Elsewhere: before, and afterwards.
    "UPDATE c SET last = 'mine', hits = 11 WHERE id = 9",
    "DELETE FROM c WHERE id = 10",
    "INSERT INTO c(id, team, last, first, hits, price) VALUES(20, 1, 'mine', 'mine', 1, '1.00')",
    "UPDATE c SET last = 'mine' WHERE id = 11",
    "DELETE FROM c WHERE id = 12",
    "UPDATE c SET team = 2 WHERE id = 13",
    // A whole table of first-write.
    "UPDATE f SET a = 'mine' WHERE id = 1",
    "UPDATE f SET a = 'mine' WHERE id = 2",
    "DELETE FROM f WHERE id = 3",
    "DELETE FROM f WHERE id = 4",
    // A function: it makes a row of all three, or keeps the current one.
    "UPDATE m SET a = 'new' WHERE id = 1",
    "UPDATE m SET a = 'keep' WHERE id = 2",
    "UPDATE m SET a = 'new' WHERE id = 3",
];

const THERE: &str = "
    UPDATE c SET last = 'theirs', first = 'theirs' WHERE id = 1;
    UPDATE c SET first = 'theirs' WHERE id = 2;
    UPDATE c SET last = 'theirs' WHERE id = 3;
    UPDATE c SET hits = hits + 100 WHERE id IN (4, 7);
    UPDATE c SET price = price + 0.01 WHERE id IN (5, 8);
    UPDATE c SET hits = NULL WHERE id = 6;
    DELETE FROM c WHERE id IN (9, 10);
    INSERT INTO c VALUES (20, 1, 'theirs', 'theirs', 2, 2);
    UPDATE c SET team = 2 WHERE id IN (11, 12);
    UPDATE f SET a = 'theirs' WHERE id = 1;
    UPDATE f SET b = 'theirs' WHERE id IN (2, 3);
    UPDATE m SET a = 'theirs' WHERE id IN (1, 2)";

async fn met() -> Edge {
    let edge = Edge::start(TABLES, &[C, F, M], CONFIG).await;
    edge.streamer.kill();
    let program = edge.program();
    for sql in HERE {
        assert_eq!(program.execute(sql, []).unwrap(), 1, "{sql}");
    }
    edge.database.execute(THERE).await;
    edge.streamer.start().await;
    edge.until_answered().await;
    edge
}

async fn rows(edge: &Edge, table: &str) -> String {
    let sql =
        format!("SELECT string_agg(replace(t::text, ',', ' '), ', ' ORDER BY id) FROM {table} t");
    edge.text(&sql).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_ends_as_no_policy_says() {
    let edge = met().await;
    assert_eq!(
        rows(
            &edge,
            "(SELECT id, team, last, first, hits, price FROM c WHERE id < 14 OR id = 20)"
        )
        .await,
        "(1 1 mine theirs 10 10.50), (2 1 l theirs 10 10.50), (3 1 theirs mine 10 10.50), (4 1 l f 115 10.50), \
         (5 1 l f 10 12.76), (6 1 l f 7 10.50), (7 1 l f 112 10.50), (8 1 l f 10 10.51), (11 2 l f 10 10.50), \
         (12 2 l f 10 10.50), (13 1 l f 10 10.50), (20 1 theirs theirs 2 2.00)"
    );
    assert_eq!(
        rows(&edge, "f").await,
        "(1 theirs b), (2 mine theirs), (3 a theirs), (5 a b)"
    );
    assert_eq!(
        rows(&edge, "m").await,
        "(1 old/new/theirs 1), (2 theirs 2), (3 old/new/old 3)"
    );
    edge.same().await;

    let rejected = edge.rejected();
    let told: Vec<_> = rejected
        .iter()
        .map(|one| {
            let Rejected {
                table,
                operation,
                key,
                changes,
                outcome,
                ..
            } = one;
            (&**table, &**operation, &**key, &**outcome, changes.clone())
        })
        .collect();
    let new =
        json!({ "id": 20, "team": 1, "last": "mine", "first": "mine", "hits": 1, "price": "1.00" });
    let row = json!({ "id": 3, "a": "a", "b": "b" });
    assert_eq!(
        told,
        [
            (
                "c",
                "update",
                "[2]",
                "conflict",
                json!({ "first": "mine", "last": "mine" })
            ),
            (
                "c",
                "update",
                "[8]",
                "error",
                json!({ "price": "12345678901234578.0" })
            ),
            (
                "c",
                "update",
                "[9]",
                "update_missing",
                json!({ "last": "mine", "hits": 11 })
            ),
            ("c", "insert", "[20]", "insert_exists", new),
            (
                "c",
                "update",
                "[11]",
                "update_missing",
                json!({ "last": "mine" })
            ),
            ("c", "update", "[13]", "out_of_shape", json!({ "team": 2 })),
            ("f", "update", "[1]", "conflict", json!({ "a": "mine" })),
            ("f", "delete", "[3]", "conflict", row),
        ]
    );
    assert!(
        rejected[1]
            .message
            .as_deref()
            .unwrap()
            .contains("15 digits")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_rejected_can_not_be_made_again_or_forgotten() {
    let edge = met().await;
    let before = edge.rejected().len();
    let program = edge.program();
    let by_key = |table: &str, key: &str| {
        let sql = "SELECT iif(table_name = 'f', txn, id) FROM _anabranch_rejected WHERE table_name = ?1 AND key = ?2";
        program
            .query_row(sql, [table, key], |row| row.get::<_, i64>(0))
            .unwrap()
    };

    // What was in the way is gone.
    edge.database
        .execute("INSERT INTO c VALUES (9, 1, 'back', 'back', 0, 0); UPDATE c SET team = 1 WHERE id = 11")
        .await;
    edge.same().await;
    // By SQL.
    let again =
        "UPDATE _anabranch_rejected SET action = 'retry' WHERE table_name = 'c' AND key = '[9]'";
    assert_eq!(program.execute(again, []).unwrap(), 1);
    let gone = "DELETE FROM _anabranch_rejected WHERE outcome = 'out_of_shape'";
    assert_eq!(program.execute(gone, []).unwrap(), 1);
    // By HTTP.
    let (again, gone) = (by_key("c", "[11]"), by_key("f", "[1]"));
    let post = async |path: String| {
        let answer = http::post(edge.replica.address(), &path).await.unwrap();
        (answer.status, answer.body)
    };
    let one = (200, r#"{"changes":1}"#.to_owned());
    assert_eq!(post(format!("/rejected/retry?id={again}")).await, one);
    assert_eq!(post(format!("/rejected/discard?txn={gone}")).await, one);
    for (path, expected) in [
        (format!("/rejected/discard?txn={gone}"), 404),
        ("/rejected/retry".to_owned(), 400),
        ("/rejected/retry?id=x".to_owned(), 400),
    ] {
        let (status, body) = post(path.clone()).await;
        assert_eq!(status, expected, "{path}: {body}");
    }
    until("two are made again", DEADLINE, || async {
        edge.rejected().len() == before - 4
    })
    .await;
    edge.until_answered().await;
    edge.same().await;
    let made = "SELECT string_agg(concat_ws(' ', last, hits), ', ' ORDER BY id) FROM c WHERE id IN (9, 11)";
    assert_eq!(edge.text(made).await, "mine 1, mine 10");
    assert_eq!(edge.rejected().len(), before - 4);
}

/// What was written on top of a rejected write is judged by itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_depends_on_a_rejected_write_is_rejected_or_kept_without_being_judged() {
    let edge = Edge::start(
        "CREATE TABLE parents (id int PRIMARY KEY, name text NOT NULL CHECK (name <> 'forbidden'));
         CREATE TABLE children (id int PRIMARY KEY, parent int REFERENCES parents, name text);
         INSERT INTO parents VALUES (1, 'one');
         GRANT ALL ON parents, children TO {app}",
        &[
            ("parents", "SELECT * FROM parents"),
            ("children", "SELECT * FROM children"),
        ],
        "",
    )
    .await;
    edge.streamer.kill();
    let program = edge.program();
    for sql in [
        "INSERT INTO parents VALUES(2, 'forbidden')",
        "INSERT INTO children VALUES(20, 2, 'of two')",
        "INSERT INTO children VALUES(10, 1, 'of one')",
        "UPDATE children SET name = 'of nobody' WHERE id = 20",
        "UPDATE children SET parent = 2 WHERE id = 10",
        "UPDATE children SET name = 'still of one' WHERE id = 10",
        "INSERT INTO parents VALUES(3, 'three')",
    ] {
        program.execute(sql, []).unwrap();
    }
    edge.streamer.start().await;
    edge.until_answered().await;
    edge.same().await;
    let told: Vec<_> = (edge.rejected().into_iter())
        .map(|one| (one.key, one.outcome, one.sqlstate.unwrap_or_default()))
        .collect();
    let told: Vec<_> = told
        .iter()
        .map(|(key, outcome, why)| (&**key, &**outcome, &**why))
        .collect();
    assert_eq!(
        told,
        [
            ("[2]", "error", "23514"),
            ("[20]", "error", "23503"),
            ("[20]", "update_missing", "AB100"),
            ("[10]", "error", "23503"),
        ]
    );
    assert_eq!(
        edge.text("SELECT string_agg(concat_ws(' ', id, parent, name), ', ') FROM children")
            .await,
        "10 1 still of one"
    );
    assert_eq!(
        edge.text("SELECT string_agg(name, ', ' ORDER BY id) FROM parents")
            .await,
        "one, three"
    );
}
