//! Line 20: the owner of a table would like to run code with the rights of the role that copies it. It is in the table's policies,
//! indexes, constraints, types and defaults, and in functions and operators that fit the streamer's own statements better than
//! Postgres' do (CVE-2018-1058). None of it runs as that role.

use std::collections::BTreeSet;

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::{Database, Options, Server},
};
use tokio_postgres::Client;

use super::role;

/// What is only ever to be called by its owner. The server's log tells by whom it is.
const TRAP: &str = "
    CREATE FUNCTION public.trap(what text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
        RAISE LOG 'trap % as %', what, current_user; RETURN what; END $$";

const TABLES: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE FUNCTION trap(mood) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT public.trap('cast'::text) $$;
    CREATE CAST (mood AS text) WITH FUNCTION trap(mood) AS IMPLICIT;
    CREATE FUNCTION same(mood, mood) RETURNS bool LANGUAGE sql IMMUTABLE AS $$ SELECT public.trap('operator'::text) <> '' $$;
    CREATE OPERATOR public.= (LEFTARG = mood, RIGHTARG = mood, FUNCTION = same);
    CREATE DOMAIN small AS text DEFAULT public.trap('default of a domain'::text) CHECK (public.trap('check of a domain'::text) <> '');
    CREATE TYPE pair AS (a mood, b small);
    CREATE TABLE plain (
        id int PRIMARY KEY,
        v text DEFAULT public.trap('default'::text) CHECK (public.trap('check'::text) <> ''),
        g text GENERATED ALWAYS AS (public.trap('generated'::text) || id::text) STORED,
        m mood, s small, p pair, a mood[]);
    CREATE INDEX ON plain ((public.trap('expression of an index'::text) || v));
    CREATE INDEX ON plain (m) WHERE public.trap('condition of an index'::text) <> '';
    CREATE STATISTICS known ON (public.trap('statistics'::text) || v), id FROM plain;
    CREATE FUNCTION fired() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM public.trap('trigger'::text); RETURN coalesce(NEW, OLD); END $$;
    CREATE TRIGGER fired BEFORE INSERT OR UPDATE OR DELETE ON plain FOR EACH ROW EXECUTE FUNCTION fired();
    CREATE RULE also AS ON UPDATE TO plain DO ALSO SELECT public.trap('rule'::text);
    INSERT INTO plain (id, m, s, p, a) SELECT g, 'sad', 's', '(happy,t)', '{sad}' FROM generate_series(1, 20) g;
    ANALYZE plain;
    CREATE TABLE guarded (id int PRIMARY KEY, v text);
    INSERT INTO guarded SELECT g, 'v' FROM generate_series(1, 20) g;
    ALTER TABLE guarded ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    CREATE POLICY own ON guarded USING (public.trap('policy'::text) <> '');
    CREATE VIEW lure AS SELECT 1 AS id, public.trap('view'::text) AS v;
    CREATE MATERIALIZED VIEW frozen AS SELECT 1 AS id;
    CREATE UNIQUE INDEX ON frozen (id)";

/// A server that logs, a database in it, and somebody who owns tables there, and may make things in `public`.
async fn owned() -> (Server, Database, Client) {
    let options = Options::new()
        .set("log_statement", "all")
        .set("log_line_prefix", "<%a> ")
        .set("log_parameter_max_length", "0");
    let server = Server::start(options).await;
    let database = server.database().await;
    let owner = role(&database, "owner", "").await;
    let name = database.name();
    database
        .execute(&format!(
            "GRANT CREATE ON SCHEMA public TO \"{name} owner\"; GRANT CREATE ON DATABASE {name} TO \"{name} owner\""
        ))
        .await;
    owner.batch_execute(TRAP).await.unwrap();
    (server, database, owner)
}

/// A streamer whose role is no superuser, with what it takes from whoever sets it up.
async fn streamer(database: &Database, tables: &[&str]) -> Streamer {
    drop(role(database, "streamer", "REPLICATION").await);
    let name = format!("{} streamer", database.name());
    let streamer = Streamer::config(database)
        .set("postgres.url", database.url_as(&name, super::PASSWORD))
        .shape("s", tables)
        .prepare();
    let output = streamer.command("setup").arg("--print").output().unwrap();
    let script = String::from_utf8(output.stdout).unwrap();
    database.execute(&script).await;
    streamer
}

/// What was called, and by whom, since the log was so long.
async fn traps(server: &Server, database: &Database, since: usize) -> BTreeSet<String> {
    let log = server.log().await;
    let streamer = format!(" as {} streamer", database.name());
    let all = log[since..]
        .lines()
        .filter_map(|line| line.split_once("LOG:  trap "));
    all.map(|(_, trap)| trap.to_owned())
        .filter(|trap| trap.ends_with(&streamer))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn code_of_a_tables_owner_runs_as_the_role_that_copies_it() {
    let (server, database, owner) = owned().await;
    owner.batch_execute(TABLES).await.unwrap();
    // Settings that the database's owner may give to all its sessions.
    let name = database.name();
    database
        .execute(&format!(
            "CREATE SCHEMA first; GRANT ALL ON SCHEMA first TO PUBLIC;
             ALTER DATABASE {name} SET search_path = first, public;
             ALTER DATABASE {name} SET row_security = on"
        ))
        .await;
    owner
        .batch_execute("CREATE FUNCTION first.trap(text) RETURNS text LANGUAGE sql AS $$ SELECT public.trap('first'::text) $$")
        .await
        .unwrap();
    let select = "SELECT id, v, m, s, p, a FROM plain";
    let streamer = streamer(&database, &[select, "SELECT * FROM guarded"]).await;
    let began = server.log().await.len();

    // A policy that is not to be passed over is not run either: it refuses, and says why.
    streamer.spawn();
    assert_eq!(streamer.exit().await.code(), Some(1));
    let log = streamer.log();
    assert!(
        log.contains("row-level security") && log.contains("guarded"),
        "{log}"
    );
    assert_eq!(traps(&server, &database, began).await, BTreeSet::new());
    database
        .execute(&format!("ALTER ROLE \"{name} streamer\" BYPASSRLS"))
        .await;
    streamer.start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    let rows = async || {
        let sql =
            "SELECT (SELECT count(*) FROM plain WHERE m = 'happy'), (SELECT count(*) FROM guarded)";
        let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
        replica.until_caught_up(&database).await;
        (replica.open()).query_row(sql, [], row).unwrap()
    };
    assert_eq!(rows().await, (0, 20));
    owner
        .batch_execute("UPDATE plain SET m = 'happy' WHERE id < 6; DELETE FROM plain WHERE id = 1")
        .await
        .unwrap();
    assert_eq!(rows().await, (4, 20));
    for command in ["check", "setup"] {
        let output = streamer.command(command).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(traps(&server, &database, began).await, BTreeSet::new());
    // They are traps: whoever reads the table as any other does is caught.
    let read = format!(
        "GRANT SELECT ON guarded, lure TO \"{name} streamer\"; ALTER ROLE \"{name} streamer\" NOBYPASSRLS;
         SET ROLE \"{name} streamer\"; SELECT m::text FROM plain; SELECT * FROM guarded; SELECT * FROM lure; RESET ROLE"
    );
    database.execute(&read).await;
    let caught = traps(&server, &database, began).await;
    for what in ["cast", "policy", "view", "expression of an index"] {
        let caller = format!("{what} as {name} streamer");
        assert!(caught.contains(&caller), "{what} is no trap: {caught:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_table_is_read() {
    let (server, database, owner) = owned().await;
    owner.batch_execute(TABLES).await.unwrap();
    database
        .execute("CREATE FOREIGN DATA WRAPPER nobody; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nobody;
                  CREATE FOREIGN TABLE away (id int) SERVER elsewhere; CREATE SEQUENCE numbers")
        .await;
    let began = server.log().await.len();
    for (table, complaint) in [
        ("lure", "it is a view"),
        ("frozen", "it is a materialized view"),
        ("away", "it is a foreign table"),
        ("numbers", "it is a sequence"),
        ("pg_catalog.pg_authid", "it is a system catalog"),
        ("information_schema.tables", "it is"),
        ("anabranch.source", "Anabranch's own"),
    ] {
        let streamer = Streamer::config(&database)
            .shape("s", &[&format!("SELECT * FROM {table}")])
            .prepare();
        let output = streamer.command("check").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(
            [Some(1), Some(2)].contains(&output.status.code()),
            "{table}: {said}"
        );
        assert!(said.contains(complaint), "{table}: {said}");
        streamer.spawn();
        assert_eq!(
            streamer.exit().await.code(),
            output.status.code(),
            "{table}"
        );
    }
    let log = server.log().await;
    assert!(!log[began..].contains("LOG:  trap "), "something was read");
}

/// Functions of a name that the streamer calls, with closer types of arguments; and operators.
const OVERLOADS: &str = r#"
    DO $do$ DECLARE
        few text[] := '{name,text,oid,"char",int2,int4,int8,bool,varchar,pg_lsn,bytea,text[],name[],oid[],int2[],xid,regclass,timestamptz}';
        fewer text[] := '{name,text,oid,int4,"char",varchar}';
        f record; made int := 0;
    BEGIN
        FOR f IN
            SELECT n.name, args, (SELECT coalesce(max(CASE WHEN t.typtype = 'p' THEN NULL ELSE format_type(t.oid, NULL) END), 'text')
                                    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_type t ON t.oid = p.prorettype
                                   WHERE p.proname = n.name AND p.pronamespace = 'pg_catalog'::regnamespace) AS returns
              FROM unnest('{NAMES}'::text[]) n(name), LATERAL (
                   SELECT ARRAY[a] FROM unnest(few) a
                    UNION ALL SELECT ARRAY[a, b] FROM unnest(few) a, unnest(few) b
                    UNION ALL SELECT ARRAY[a, b, c] FROM unnest(fewer) a, unnest(fewer) b, unnest(fewer) c
                    UNION ALL SELECT ARRAY['text', a, b, c] FROM unnest(fewer) a, unnest(fewer) b, unnest(fewer) c) all_args(args)
             WHERE EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.proname = n.name AND p.pronamespace = 'pg_catalog'::regnamespace
                       AND (p.pronargs = cardinality(args) OR p.provariadic <> 0))
               AND to_regprocedure(format('pg_catalog.%I(%s)', n.name, array_to_string(args, ','))) IS NULL
        LOOP
            EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS %s LANGUAGE plpgsql STABLE AS %L', f.name, array_to_string(f.args, ','), f.returns,
                format('BEGIN RAISE LOG ''trap %s(%s) as %%'', current_user; RETURN NULL; END', f.name, array_to_string(f.args, ',')));
            made := made + 1;
        END LOOP;
        IF made < 1000 THEN RAISE EXCEPTION 'only % traps', made; END IF;
        FOR f IN
            SELECT o.name, a, b, CASE o.name WHEN '||' THEN 'text' WHEN '&' THEN 'int4' WHEN '-' THEN 'int4' ELSE 'bool' END AS returns
              FROM unnest('{=,<>,<,>,<=,>=,||,&,-,~,&&}'::text[]) o(name), unnest(few) a, unnest(few) b
             WHERE to_regoperator(format('pg_catalog.%s(%s,%s)', o.name, a, b)) IS NULL
        LOOP
            EXECUTE format('CREATE FUNCTION public."trap of %s"(%s, %s) RETURNS %s LANGUAGE plpgsql STABLE AS %L', f.name, f.a, f.b, f.returns,
                format('BEGIN RAISE LOG ''trap %s %s %s as %%'', current_user; RETURN NULL; END', f.a, f.name, f.b));
            EXECUTE format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = public."trap of %1$s")', f.name, f.a, f.b);
        END LOOP;
    END $do$"#;

/// Names of what is called in what the streamer has Postgres run.
fn called(log: &str) -> BTreeSet<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let calls = log.match_indices('(').map(|(at, _)| {
        let before = log[..at].trim_end_matches(' ');
        let start = before.rfind(|c| !is_word(c)).map_or(0, |at| at + 1);
        before[start..].to_lowercase()
    });
    calls.filter(|name| !name.is_empty()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_or_an_operator_in_public_that_fits_better_runs_as_the_streamer() {
    let (server, database, owner) = owned().await;
    owner
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text DEFAULT 'a', UNIQUE (v)); INSERT INTO t VALUES (1, 'one')")
        .await
        .unwrap();
    let select = "SELECT * FROM t";
    let streamer = streamer(&database, &[select]).await;
    let run = async || {
        let began = server.log().await.len();
        for command in ["check", "setup"] {
            let output = streamer.command(command).output().unwrap();
            let caught = traps(&server, &database, began).await;
            assert_eq!(caught, BTreeSet::new(), "{command}");
            assert!(output.status.success(), "{command:?}: {output:?}");
        }
        streamer.start().await;
        let replica = Replica::config(&streamer).subscribe("s").start().await;
        let write =
            "INSERT INTO public.t SELECT max(id) + 1, pg_catalog.random()::text FROM public.t";
        owner.batch_execute(write).await.unwrap();
        replica.until_equal(&database, &[("t", select)]).await;
        // What is looked at from time to time is looked at, too, when it begins.
        streamer.kill();
    };
    let began = server.log().await.len();
    run().await;
    let names = called(&server.log().await[began..]);
    assert!(names.contains("has_table_privilege"), "{names:?}");
    let names: Vec<_> = names.into_iter().collect();
    // Else they would catch whoever makes them.
    let overloads = OVERLOADS.replace("NAMES", &names.join(","));
    let made = format!("SET search_path = pg_catalog; {overloads}");
    owner.batch_execute(&made).await.unwrap();
    let began = server.log().await.len();
    // From a mirror that is there, and from nothing.
    run().await;
    std::fs::remove_dir_all(streamer.dir().join("data")).unwrap();
    let slot = format!(
        "SELECT pg_drop_replication_slot('anabranch_{}')",
        database.name()
    );
    database.execute(&slot).await;
    run().await;
    assert_eq!(traps(&server, &database, began).await, BTreeSet::new());
}
