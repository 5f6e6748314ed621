//! The streamer as a role of its own, as the README makes it: no superuser, and owner of nothing. What it may not do it
//! says as SQL, and that SQL is enough.

use anabranch_tests::{
    peers::{Replica, Streamer, TOKEN},
    postgres::{Database, Options, Server},
    wait::{DEADLINE, until},
};

const PASSWORD: &str = "the role's own";

const TABLES: &str = "
    CREATE TABLE issues (id int PRIMARY KEY, title text, team int);
    CREATE TABLE comments (id int PRIMARY KEY, issue int REFERENCES issues, body text);
    INSERT INTO issues SELECT g, 'issue ' || g, g % 3 FROM generate_series(1, 60) g;
    INSERT INTO comments SELECT g, g, 'comment ' || g FROM generate_series(1, 60) g";
const ISSUES: &str = "SELECT * FROM issues WHERE team = 1";
const COMMENTS: &str = "SELECT * FROM comments";

/// A server whose settings nobody warns about.
async fn server() -> Server {
    Server::start(Options::new().set("fsync", "on")).await
}

/// Makes a role with these attributes.
async fn role(database: &Database, name: &str, attributes: &str) {
    database
        .execute(&format!(
            "CREATE ROLE \"{name}\" LOGIN {attributes} PASSWORD '{}'",
            PASSWORD.replace('\'', "''")
        ))
        .await;
}

fn streamer(database: &Database, role: &str, tables: &[&str]) -> Streamer {
    Streamer::config(database)
        .set("postgres.url", database.url_as(role, PASSWORD))
        .shape("s", tables)
        .prepare()
}

/// Exit code, and what was said.
fn run(streamer: &Streamer, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = streamer.command(arguments[0]);
    let output = command.args(&arguments[1..]).output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code(), said.concat())
}

/// The one script in what was said, without what stands around it.
fn script(said: &str) -> String {
    let lines = said.lines().map(str::trim_start);
    let from_begin = lines.skip_while(|line| !line.starts_with("-- In database"));
    let mut script = String::new();
    for line in from_begin {
        script += line;
        script += "\n";
        if line == "COMMIT;" {
            return script;
        }
    }
    panic!("there is no whole script in this:\n{said}");
}

/// `check` complains, a start refuses with exit code 1, and both and `setup` say the same script.
async fn says_what_to_run(streamer: &Streamer) -> String {
    let (code, said) = run(streamer, &["check"]);
    assert_eq!(code, Some(1), "{said}");
    let wanted = script(&said);
    let (code, said) = run(streamer, &["setup", "--print"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(script(&said), wanted);
    let (code, said) = run(streamer, &["setup"]);
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(script(&said), wanted);
    let logged = streamer.log().len();
    streamer.spawn();
    assert_eq!(streamer.exit().await.code(), Some(1));
    let log = streamer.log();
    assert_eq!(script(&log[logged..]), wanted);
    assert!(!log.contains(PASSWORD), "{log}");
    wanted
}

fn is_quiet(streamer: &Streamer) {
    let (code, said) = run(streamer, &["check"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(said.trim(), "Everything is as it should be.");
    let (code, said) = run(streamer, &["setup"]);
    assert_eq!((code, said.trim()), (Some(0), "-- Nothing is missing."));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sql_that_a_plain_role_is_told_to_have_run_is_enough() {
    let server = server().await;
    let database = server.database().await;
    database.execute(TABLES).await;
    // As in the README.
    role(&database, "ana-branch", "REPLICATION").await;
    database
        .execute("GRANT SELECT ON issues, comments TO \"ana-branch\"")
        .await;
    let streamer = streamer(&database, "ana-branch", &[ISSUES, COMMENTS]);
    let wanted = says_what_to_run(&streamer).await;
    let left =
        "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)
                + (SELECT count(*) FROM pg_namespace WHERE nspname = 'anabranch')";
    let left: i64 = database.query(left, &[]).await[0].get(0);
    assert_eq!(left, 0, "something was made before it was refused");

    database.execute(&wanted).await;
    is_quiet(&streamer);
    streamer.start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let all = [("issues", ISSUES), ("comments", COMMENTS)];
    replica.until_equal(&database, &all).await;
    database
        .execute("BEGIN; UPDATE issues SET team = 1 WHERE id = 3; UPDATE comments SET body = 'changed' WHERE id < 9; COMMIT")
        .await;
    replica.until_equal(&database, &all).await;
    is_quiet(&streamer);
    streamer.kill();
    streamer.start().await;
    database.execute("DELETE FROM comments WHERE id = 7").await;
    replica.until_equal(&database, &all).await;
    // Others may not read what authenticates resume tokens.
    role(&database, "other", "").await;
    let other = Streamer::config(&database)
        .set("postgres.url", database.url_as("other", PASSWORD))
        .shape("s", &[ISSUES])
        .prepare();
    let (code, said) = run(&other, &["check"]);
    assert_eq!(code, Some(1), "{said}");
    let readable: bool = database
        .query(
            "SELECT has_table_privilege('other', 'anabranch.source', 'SELECT')",
            &[],
        )
        .await[0]
        .get(0);
    assert!(!readable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_a_plain_role_may_not_withdraw_or_publish_is_said_and_harms_nobody() {
    let server = server().await;
    let database = server.database().await;
    database.execute(TABLES).await;
    role(&database, "ana-branch", "REPLICATION").await;
    database
        .execute("GRANT SELECT ON issues, comments TO \"ana-branch\"")
        .await;
    let streamer = streamer(&database, "ana-branch", &[ISSUES, COMMENTS]);
    let (_, said) = run(&streamer, &["setup", "--print"]);
    database.execute(&script(&said)).await;
    streamer.start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let all = [("issues", ISSUES), ("comments", COMMENTS)];
    replica.until_equal(&database, &all).await;

    let reshape = async |tables: &[&str]| {
        assert!(streamer.terminate().await.success());
        streamer.reconfigure("shape.s.tables", tables.to_vec());
        streamer.log().len()
    };
    let logged = reshape(&[ISSUES]).await;
    streamer.start().await;
    let withdraw = "ALTER PUBLICATION \"anabranch\" DROP TABLE \"public\".\"comments\"";
    let log = streamer.log();
    let warned: Vec<_> = log[logged..]
        .lines()
        .filter(|line| line.contains(withdraw))
        .collect();
    assert!(
        warned.len() == 1 && warned[0].contains("WARN"),
        "{}",
        &log[logged..]
    );
    // Both tables go on being written, and the one that is left is followed.
    let write =
        "UPDATE issues SET title = title || '!'; UPDATE comments SET body = 'not for anybody'";
    database.execute(write).await;
    replica.until_equal(&database, &all[..1]).await;
    until("the table has left the file", DEADLINE, || async {
        let sql = "SELECT count(*) FROM sqlite_schema WHERE name = 'comments'";
        let file = replica.open();
        file.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap() == 0
    })
    .await;
    is_quiet(&streamer);

    // It comes back while it is still published: nobody has to be asked.
    reshape(&[ISSUES, COMMENTS]).await;
    streamer.start().await;
    database.execute(write).await;
    replica.until_equal(&database, &all).await;

    // It goes for good, by the SQL that was logged; then it can't come back without somebody who may.
    let logged = reshape(&[ISSUES]).await;
    database.execute(withdraw).await;
    streamer.start().await;
    assert!(!streamer.log()[logged..].contains(withdraw));
    database.execute(write).await;
    replica.until_equal(&database, &all[..1]).await;
    reshape(&[ISSUES, COMMENTS]).await;
    let wanted = says_what_to_run(&streamer).await;
    assert!(wanted.contains("ADD TABLE"), "{wanted}");
    // Meanwhile the shape as it was may be gone back to.
    streamer.reconfigure("shape.s.tables", vec![ISSUES]);
    streamer.start().await;
    database.execute(write).await;
    replica.until_equal(&database, &all[..1]).await;
    reshape(&[ISSUES, COMMENTS]).await;
    database.execute(&wanted).await;
    streamer.start().await;
    is_quiet(&streamer);
    database.execute(write).await;
    replica.until_equal(&database, &all).await;
}

/// A role that may only log in, tables in a schema that it may not use, and policies that hide rows from it.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_nothing_is_told_all_that_it_lacks() {
    let server = server().await;
    let database = server.database().await;
    database
        .execute(
            "CREATE SCHEMA \"In House\";
             CREATE TABLE \"In House\".\"Pay Roll\" (id int PRIMARY KEY, owner name, v int);
             INSERT INTO \"In House\".\"Pay Roll\" SELECT g, 'nobody', g FROM generate_series(1, 50) g;
             ALTER TABLE \"In House\".\"Pay Roll\" ENABLE ROW LEVEL SECURITY;
             CREATE POLICY own ON \"In House\".\"Pay Roll\" USING (owner = current_user)",
        )
        .await;
    role(&database, "bare", "").await;
    let select = "SELECT * FROM \"In House\".\"Pay Roll\"";
    let streamer = streamer(&database, "bare", &[select]);
    let (code, said) = run(&streamer, &["check"]);
    assert_eq!(code, Some(1), "{said}");
    streamer.spawn();
    assert_eq!(streamer.exit().await.code(), Some(1));
    for said in [&said, &streamer.log()] {
        for words in [
            "the role \"bare\" may not replicate",
            "row-level security",
            "GRANT USAGE ON SCHEMA \"In House\" TO \"bare\"",
        ] {
            assert!(said.contains(words), "{words:?} is not in this:\n{said}");
        }
    }
    // Everything that was said to mend it and is SQL.
    let remedies = said
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with("ALTER ROLE") && line.ends_with(';'));
    let mut remedies: Vec<_> = remedies.map(str::to_owned).collect();
    remedies.push(script(&said));
    for remedy in remedies {
        database.execute(&remedy).await;
    }
    is_quiet(&streamer);
    streamer.start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let table = [("In House.Pay Roll", select)];
    replica.until_equal(&database, &table).await;
    database
        .execute("UPDATE \"In House\".\"Pay Roll\" SET v = v + 1")
        .await;
    replica.until_equal(&database, &table).await;
}

/// From a database in which nothing of what writes need is there, not even the role that makes them.
#[tokio::test(flavor = "multi_thread")]
async fn the_sql_that_writes_need_is_not_enough_or_not_as_it_is_printed() {
    let server = server().await;
    let database = server.database().await;
    database
        .execute(
            "CREATE SCHEMA app;
             CREATE TABLE app.notes (id int PRIMARY KEY, team int, body text);
             INSERT INTO app.notes VALUES (1, 1, 'one');
             ALTER TABLE app.notes ENABLE ROW LEVEL SECURITY;
             CREATE ROLE app_user;
             CREATE POLICY own ON app.notes TO app_user USING (team = 1)",
        )
        .await;
    role(&database, "ana-branch", "REPLICATION BYPASSRLS").await;
    let select = "SELECT * FROM app.notes WHERE team = 1";
    let streamer = Streamer::config(&database)
        .set("postgres.url", database.url_as("ana-branch", PASSWORD))
        .set(
            "postgres.write_url",
            database.url_as("new writer", PASSWORD),
        )
        .shape("s", &[select])
        .set("shape.s.writable", true)
        .set("auth.role.claim", "role")
        .set("auth.role.allowed", vec!["app_user"])
        .token(
            TOKEN,
            serde_json::json!({ "sub": "edge-1", "role": "app_user" }),
        )
        .prepare();
    // With the blanks before each line.
    let (code, said) = run(&streamer, &["check"]);
    assert_eq!(code, Some(1), "{said}");
    let from = said.find("    -- In database").unwrap();
    let upto = said.find("    COMMIT;").unwrap();
    database
        .execute(&format!("{}COMMIT;", &said[from..upto]))
        .await;
    let (code, said) = run(&streamer, &["setup"]);
    assert_eq!((code, said.trim()), (Some(0), "-- Nothing is missing."));
    database
        .execute(&format!(
            "ALTER ROLE \"new writer\" PASSWORD '{}'",
            PASSWORD.replace('\'', "''")
        ))
        .await;

    // What the role that writes lacks, it may lack on purpose.
    let (code, said) = run(&streamer, &["check"]);
    assert_eq!(code, Some(0), "{said}");
    let remedies = said.lines().map(str::trim_start);
    let remedies: Vec<_> = remedies.filter(|line| line.ends_with(';')).collect();
    assert_eq!(
        remedies,
        [
            "GRANT USAGE ON SCHEMA \"app\" TO \"app_user\";",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON \"app\".\"notes\" TO \"app_user\";",
            "CREATE POLICY anabranch_looks ON \"app\".\"notes\" FOR SELECT TO \"new writer\" USING (true);",
        ],
        "{said}"
    );
    database.execute(&remedies.concat()).await;
    is_quiet(&streamer);

    // Up to Postgres 14 everybody could; a database that was upgraded may still let them.
    database
        .execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
        .await;
    let (code, said) = run(&streamer, &["check"]);
    assert_eq!(code, Some(0), "{said}");
    let revoke = "REVOKE CREATE ON SCHEMA public FROM PUBLIC, \"app_user\";";
    assert!(said.contains(revoke), "{said}");
    database.execute(revoke).await;
    is_quiet(&streamer);

    streamer.start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    replica
        .until_equal(&database, &[("app.notes", select)])
        .await;
    let program = rusqlite::Connection::open(replica.file()).unwrap();
    let write = "UPDATE \"app.notes\" SET body = 'written' WHERE id = 1";
    assert_eq!(program.execute(write, []).unwrap(), 1);
    until("the write arrives", DEADLINE, || async {
        let row = database.query("SELECT body FROM app.notes", &[]).await;
        row[0].get::<_, &str>(0) == "written"
    })
    .await;

    // What nothing holds back is said.
    database
        .execute("ALTER ROLE app_user BYPASSRLS; ALTER ROLE \"new writer\" SUPERUSER")
        .await;
    let (code, said) = run(&streamer, &["check"]);
    assert_eq!(code, Some(0), "{said}");
    for words in [
        "\"app_user\", which is BYPASSRLS",
        "\"new writer\" that logs in to write is a superuser",
    ] {
        assert!(said.contains(words), "{words:?} is not in this:\n{said}");
    }
    database
        .execute("ALTER ROLE app_user NOBYPASSRLS; ALTER TABLE app.notes OWNER TO app_user")
        .await;
    let (_, said) = run(&streamer, &["check"]);
    assert!(said.contains("FORCE ROW LEVEL SECURITY"), "{said}");
}
