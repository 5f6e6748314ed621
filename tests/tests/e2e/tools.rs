//! `shapes diff` and `explain`: what they say is what happens, and what Postgres says.

use std::{collections::BTreeSet, path::PathBuf, process::Output};

use anabranch_tests::{
    nested::generator,
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    programs,
    proxy::{Proxy, Way},
    seed::Seed,
};
use rand::seq::IndexedRandom;
use rusqlite::Connection;
use serde_json::{Value, json};

/// What nobody may see of a claim.
const SECRET: &str = "team of which nobody may know";

const TABLES: &str = "
    CREATE TABLE items (code text PRIMARY KEY, grp int NOT NULL, team text NOT NULL, owner int, pad text NOT NULL);
    INSERT INTO items SELECT 'item ' || g, g % 10, CASE g % 3 WHEN 0 THEN 'team of which nobody may know' WHEN 1 THEN 'b' ELSE 'c' END,
      g % 7, repeat(md5(g::text), 4) FROM generate_series(1, 3000) g;
    CREATE TABLE members (team text, person int, role text, PRIMARY KEY (team, person));
    INSERT INTO members VALUES ('b', 1, 'lead'), ('b', 2, 'guest'), ('c', 2, 'lead');
    CREATE TABLE labels (grp int PRIMARY KEY, label text);
    INSERT INTO labels SELECT g, 'label ' || g FROM generate_series(0, 9) g;
    CREATE TABLE fresh (id int PRIMARY KEY, v int);
    INSERT INTO fresh SELECT g, g FROM generate_series(1, 100) g";

/// The program, with this config.
fn run(arguments: &[&str], config: &std::path::Path) -> Output {
    std::process::Command::new(programs::directory().join("anabranch-streamer"))
        .args(arguments)
        .arg("--config")
        .arg(config)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn parsed(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
        panic!("no JSON: {}{}", text(&output.stdout), text(&output.stderr));
    })
}

/// The streamer's config after a change of it, in another file.
fn changed(streamer: &Streamer, name: &str, change: impl FnOnce(&mut toml::Table)) -> PathBuf {
    let text = std::fs::read_to_string(streamer.config_file()).unwrap();
    let mut config: toml::Table = text.parse().unwrap();
    change(&mut config);
    let file = streamer.dir().join(name);
    std::fs::write(&file, toml::to_string(&config).unwrap()).unwrap();
    file
}

fn shape<'c>(config: &'c mut toml::Table, name: &str) -> &'c mut toml::Table {
    config["shape"][name].as_table_mut().unwrap()
}

fn id_of(replica: &Replica) -> String {
    let file = replica.open();
    file.query_row("SELECT replica_id FROM _anabranch_state", [], |row| {
        row.get(0)
    })
    .unwrap()
}

/// The rows of a table, as text; none if there is no such table.
fn rows(file: &Connection, table: &str) -> BTreeSet<String> {
    let Ok(mut statement) = file.prepare(&format!("SELECT * FROM {table}")) else {
        return BTreeSet::new();
    };
    let width = statement.column_count();
    let rows = statement.query_map([], |row| {
        let values = (0..width).map(|i| row.get_ref(i).map(|value| format!("{value:?}")));
        Ok(values.collect::<Result<Vec<_>, _>>()?.join("|"))
    });
    rows.unwrap().map(Result::unwrap).collect()
}

fn of_table<'d>(diff: &'d Value, replica: &str, table: &str) -> &'d Value {
    let replicas = diff["replicas"].as_array().unwrap();
    let of = replicas.iter().find(|of| of["replica"] == replica);
    let tables = of.unwrap()["tables"].as_array().unwrap();
    let table = format!("public.{table}");
    tables
        .iter()
        .find(|of| of["table"] == table)
        .unwrap_or(&Value::Null)
}

const SHAPES: &str = r#"
    [shape.own]
    params.team = { claim = "team" }
    tables = ["SELECT * FROM items WHERE team = $team AND grp < 6"]
    [shape.mine]
    params.me = { claim = "me" }
    tables = ["SELECT * FROM items WHERE team IN (SELECT team FROM members WHERE person = $me)", "SELECT * FROM labels"]
    [shape.plain]
    tables = ["SELECT * FROM labels WHERE grp < 4"]
    [shape.going]
    tables = ["SELECT * FROM labels WHERE grp = 4"]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn what_shapes_diff_says_is_what_replicas_gain_and_lose() {
    let database = Server::shared().await.database().await;
    database.execute(TABLES).await;
    let streamer = Streamer::config(&database)
        .toml(SHAPES)
        .token(
            "token-own",
            json!({ "sub": "own", "team": SECRET, "me": 9 }),
        )
        .token("token-mine", json!({ "sub": "mine", "me": 2 }))
        .start()
        .await;
    let mut replicas = Vec::new();
    for (token, shape) in [
        ("token-own", "own"),
        ("token-mine", "mine"),
        ("token-mine", "plain"),
        ("token-mine", "going"),
    ] {
        let proxy = Proxy::to(streamer.address()).await;
        let replica = Replica::config(&streamer)
            .set("zstd", false)
            .token(token)
            .subscribe(shape)
            .through(&proxy)
            .start()
            .await;
        replica.until_caught_up(&database).await;
        let id = id_of(&replica);
        replicas.push((replica, proxy, id));
    }
    // A condition narrower, one with a subquery that has no index yet, another column list, a table that is new, and a shape
    // that is gone; `plain` stays as it is.
    let new = changed(&streamer, "new.toml", |config| {
        let tables = |sql: &[&str]| -> toml::Value {
            let all: Vec<_> = sql.iter().map(|sql| toml::Value::from(*sql)).collect();
            all.into()
        };
        shape(config, "own").insert(
            "tables".into(),
            tables(&["SELECT * FROM items WHERE team = $team AND grp > 3 OR EXISTS (SELECT 1 FROM labels WHERE labels.grp = items.owner AND label = 'label 6')"]),
        );
        shape(config, "mine").insert(
            "tables".into(),
            tables(&[
                "SELECT code, grp, owner FROM items WHERE team IN (SELECT team FROM members WHERE person = $me AND role = 'lead')",
                "SELECT * FROM fresh",
            ]),
        );
        config["shape"].as_table_mut().unwrap().remove("going");
    });
    let output = run(&["shapes", "diff", "--json"], &new);
    let diff = parsed(&output);
    println!("{diff:#}");
    // One of them would be refused.
    assert_eq!(output.status.code(), Some(1));
    let people = run(&["shapes", "diff"], &new);
    let table = text(&people.stdout);
    println!("{table}");
    for words in [
        "4 connected replicas, of which 1 would not notice anything",
        "would be refused: it subscribes to shape `going`, which is not defined",
        "public.fresh is not in the mirror",
    ] {
        assert!(table.contains(words), "{words}");
    }
    let ids: Vec<_> = replicas.iter().map(|(_, _, id)| id.clone()).collect();
    let refused = diff["replicas"].as_array().unwrap().iter();
    let refused: Vec<_> = refused.filter(|of| !of["refused"].is_null()).collect();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0]["replica"], *ids[3]);
    assert_eq!(of_table(&diff, &ids[1], "fresh")["figures"], Value::Null);

    // It happens so.
    let tables = ["items", "labels", "fresh"];
    let content = |replica: &Replica| tables.map(|table| rows(&replica.open(), table));
    let before: Vec<_> = replicas.iter().map(|(of, ..)| content(of)).collect();
    let bytes: Vec<_> = (replicas.iter())
        .map(|(_, proxy, _)| proxy.bytes(Way::Down))
        .collect();
    let old = streamer.dir().join("old.toml");
    std::fs::copy(streamer.config_file(), &old).unwrap();
    assert!(streamer.terminate().await.success());
    std::fs::copy(&new, streamer.config_file()).unwrap();
    streamer.start().await;
    database
        .execute("UPDATE fresh SET v = v + 1 WHERE id = 1")
        .await;
    for (replica, ..) in &replicas[..3] {
        replica.until_caught_up(&database).await;
    }
    for place in 0..3 {
        let (replica, proxy, id) = &replicas[place];
        let after = content(replica);
        let (mut sent, mut keys) = (0, 0);
        for (table, (before, after)) in tables.iter().zip(before[place].iter().zip(&after)) {
            let figures = &of_table(&diff, id, table)["figures"];
            let rows = |what: &str| figures[what]["rows"].as_u64().unwrap_or(0);
            if *table == "fresh" {
                continue;
            }
            let of_mine = place == 1 && *table == "items";
            if of_mine {
                // Columns went: compared by the key, which stands first.
                let key = |row: &String| row.split('|').next().unwrap().to_owned();
                let before: BTreeSet<_> = before.iter().map(key).collect();
                let after: BTreeSet<_> = after.iter().map(key).collect();
                assert_eq!(rows("gained"), after.difference(&before).count() as u64);
                assert_eq!(rows("lost"), before.difference(&after).count() as u64);
                assert!(rows("lost") > 0);
            } else {
                let (gained, lost) = (after.difference(before), before.difference(after));
                assert_eq!(rows("gained"), gained.count() as u64, "{id} {table}");
                assert_eq!(rows("lost"), lost.count() as u64, "{id} {table}");
            }
            assert_eq!(rows("resent"), 0);
            sent += figures["gained"]["bytes"].as_u64().unwrap_or(0);
            keys += rows("lost") * 40;
        }
        let really = proxy.bytes(Way::Down) - bytes[place];
        println!("replica {id}: {sent} bytes of rows, {really} bytes in all");
        assert!(really > sent && really < sent + keys + 60_000, "{really}");
    }
    assert!(
        of_table(&diff, &ids[0], "items")["figures"]["gained"]["rows"]
            .as_u64()
            .unwrap()
            > 100
    );

    // Back again is the same, the other way round.
    let back = parsed(&run(&["shapes", "diff", "--json"], &old));
    let (there, back) = (
        &of_table(&diff, &ids[0], "items")["figures"],
        &of_table(&back, &ids[0], "items")["figures"],
    );
    assert_eq!(there["gained"], back["lost"]);
    assert_eq!(there["lost"], back["gained"]);

    // No claim is seen, nor logged.
    for seen in [table, diff.to_string(), streamer.log()] {
        assert!(!seen.contains(SECRET));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_shapes_diff_from_computing_is_said_as_by_check() {
    let database = Server::shared().await.database().await;
    database.execute(TABLES).await;
    let streamer = Streamer::config(&database)
        .toml(SHAPES)
        .token("dev-1", json!({ "sub": "a", "me": 2 }))
        .start()
        .await;
    let replica = Replica::config(&streamer).subscribe("mine").start().await;
    let other = Replica::config(&streamer)
        .subscribe("mine")
        .subscribe("plain")
        .start()
        .await;
    let of_sql = |name: &str, sql: &str| {
        changed(&streamer, name, |config| {
            let sql = vec![toml::Value::from(sql)];
            shape(config, "mine").insert("tables".into(), sql.into());
        })
    };
    // No SQL: the config alone is wrong.
    let file = of_sql("sql.toml", "SELECT * FROM items WHERE lower(team) = 'x'");
    let (check, diff) = (run(&["check"], &file), run(&["shapes", "diff"], &file));
    assert_eq!(
        (check.status.code(), diff.status.code()),
        (Some(2), Some(2))
    );
    assert_eq!(text(&check.stderr), text(&diff.stderr));
    // SQL that does not fit its table, a table that is none.
    for sql in [
        "SELECT * FROM items WHERE nothing = 1 AND owner = $me",
        "SELECT * FROM nowhere WHERE owner = $me",
    ] {
        let file = of_sql("table.toml", sql);
        let (check, diff) = (run(&["check"], &file), run(&["shapes", "diff"], &file));
        assert_eq!(
            (check.status.code(), diff.status.code()),
            (Some(1), Some(1))
        );
        let (check, diff) = (text(&check.stdout), text(&diff.stdout));
        println!("{diff}");
        assert!(diff.starts_with("error: ") && check.contains(diff.trim()));
    }
    // A claim that the token lacks; columns that differ in two shapes of one replica.
    let file = changed(&streamer, "claim.toml", |config| {
        let mine = shape(config, "mine");
        let params: toml::Table = "team = { claim = 'team' }".parse().unwrap();
        mine.insert("params".into(), params.into());
        let sql = "SELECT * FROM items WHERE team = $team";
        mine.insert("tables".into(), vec![toml::Value::from(sql)].into());
    });
    let diff = run(&["shapes", "diff"], &file);
    assert_eq!(diff.status.code(), Some(1));
    let lines = text(&diff.stdout);
    let reason = "would be refused: the token has no claim `team`, which shape `mine` needs";
    assert_eq!(lines.matches(reason).count(), 2, "{lines}");
    let file = changed(&streamer, "columns.toml", |config| {
        let sql = "SELECT grp FROM labels WHERE grp < 4";
        shape(config, "plain").insert("tables".into(), vec![toml::Value::from(sql)].into());
    });
    let diff = parsed(&run(&["shapes", "diff", "--json"], &file));
    let refused = diff["replicas"].as_array().unwrap().iter();
    let refused: Vec<_> = refused.filter(|of| !of["refused"].is_null()).collect();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0]["replica"], id_of(&other));
    let reason = refused[0]["refused"].as_str().unwrap();
    assert!(reason.contains("different columns"), "{reason}");
    drop(replica);
    // No streamer.
    assert!(streamer.terminate().await.success());
    for arguments in [
        &["shapes", "diff"][..],
        &[
            "explain",
            "--replica",
            "x",
            "--table",
            "items",
            "--key",
            "x",
        ],
    ] {
        let output = run(arguments, &streamer.config_file());
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        assert!(error.contains("no streamer runs on data_dir"), "{error}");
    }
}

fn explain(streamer: &Streamer, replica: &str, table: &str, key: &[&str]) -> Output {
    let mut arguments = vec!["explain", "--json", "--replica", replica, "--table", table];
    for key in key {
        arguments.extend(["--key", key]);
    }
    run(&arguments, &streamer.config_file())
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_says_condition_by_condition_why_a_row_is_there_or_not() {
    let database = Server::shared().await.database().await;
    database.execute(TABLES).await;
    let streamer = Streamer::config(&database)
        .toml(SHAPES)
        .token("dev-1", json!({ "sub": "a", "me": 2, "team": SECRET }))
        .start()
        .await;
    let replica = Replica::config(&streamer)
        .subscribe("mine")
        .subscribe("own")
        .start()
        .await;
    replica.until_caught_up(&database).await;
    let id = id_of(&replica);
    let one = parsed(&explain(&streamer, &id, "items", &["item 1"]));
    println!("{one:#}");
    assert_eq!(one["shown"], true);
    let of = |shape: &str| {
        let shapes = one["shapes"].as_array().unwrap();
        shapes.iter().find(|of| of["shape"] == shape).unwrap()
    };
    assert_eq!(of("mine")["truth"], "true");
    let inner = &of("mine")["condition"]["inner"];
    assert_eq!(
        (&inner["table"], &inner["rows"], &inner["met"]),
        (&json!("public.members"), &json!(2), &json!(1))
    );
    let shown = inner["shown"].as_array().unwrap();
    let truths: Vec<_> = shown.iter().map(|row| &row["condition"]["truth"]).collect();
    assert_eq!(truths.len(), 2);
    assert!(truths.contains(&&json!("true")) && truths.contains(&&json!("false")));
    let own = &of("own")["condition"];
    assert_eq!(
        (&own["part"], &own["truth"]),
        (&json!("AND"), &json!("false"))
    );
    assert_eq!(own["parts"][0]["part"], "team = $team");
    assert_eq!(own["parts"][0]["values"], json!([["team", "b"]]));
    assert_eq!(own["parts"][0]["truth"], "false");
    assert_eq!(own["parts"][1]["truth"], "true");
    assert!(one["sent"].as_str().is_some() && one["position"].as_str().is_some());
    // As people see it.
    let arguments = [
        "explain",
        "--replica",
        &id,
        "--table",
        "items",
        "--key",
        "item 1",
    ];
    let people = text(&run(&arguments, &streamer.config_file()).stdout);
    println!("{people}");
    assert!(
        people.contains("false   team = $team   [team is b]"),
        "{people}"
    );

    // What is not there; what is in no shape of the replica; composite keys; what is stopped.
    let none = parsed(&explain(&streamer, &id, "items", &["item x"]));
    assert_eq!(
        (&none["row"], &none["shown"]),
        (&Value::Null, &json!(false))
    );
    assert!(
        none["verdict"]
            .as_str()
            .unwrap()
            .contains("no row of this key")
    );
    for key in [
        &["team=b", "person=1"][..],
        &["[\"b\",1]"],
        &["{\"team\":\"b\",\"person\":1}"],
    ] {
        let inner = parsed(&explain(&streamer, &id, "public.members", key));
        let verdict = inner["verdict"].as_str().unwrap();
        assert!(verdict.contains("none of the shapes"), "{verdict}");
        assert_eq!(inner["shown"], false);
        assert!(!inner["row"].is_null());
    }
    database
        .execute("ALTER TABLE labels ADD COLUMN more int; UPDATE labels SET label = 'x'")
        .await;
    replica.until_caught_up(&database).await;
    let stopped = parsed(&explain(&streamer, &id, "labels", &["3"]));
    let state = stopped["table_state"].as_str().unwrap();
    assert!(state.contains("is stopped since"), "{state}");
    assert_eq!(stopped["shown"], true);
    // Who is not connected; and who asks wrongly.
    let absent = parsed(&explain(&streamer, "nobody", "items", &["item 1"]));
    assert_eq!(
        (&absent["connected"], &absent["shown"]),
        (&json!(false), &Value::Null)
    );
    assert_eq!(absent["shapes"].as_array().unwrap().len(), 2);
    for (table, key, words) in [
        ("nowhere", &["1"][..], "public.nowhere is not in the mirror"),
        ("labels", &["x"], "must be a whole number"),
        ("members", &["b"], "--key team=VALUE --key person=VALUE"),
    ] {
        let output = explain(&streamer, &id, table, key);
        assert_eq!(output.status.code(), Some(2));
        let error = text(&output.stderr);
        assert!(error.contains(words), "{error}");
    }
    for seen in [people, one["shapes"].to_string(), streamer.log()] {
        assert!(!seen.contains(SECRET), "{seen}");
    }
    // What was asked for is nowhere in the log.
    assert!(!streamer.log().contains("item 1"));
}

/// What each part of the answer says must come to what stands above it, by SQL's own rules.
fn check_tree(part: &Value) {
    let truth = |part: &Value| match part["truth"].as_str().unwrap() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    };
    let empty = Vec::new();
    let parts = part["parts"].as_array().unwrap_or(&empty);
    let truths: Vec<_> = parts.iter().map(truth).collect();
    let any = |wanted| truths.contains(&wanted);
    let expected = match part["part"].as_str().unwrap() {
        "AND" if any(Some(false)) => Some(false),
        "AND" if any(None) => None,
        "AND" => Some(true),
        "OR" if any(Some(true)) => Some(true),
        "OR" if any(None) => None,
        "OR" => Some(false),
        "NOT" => truths[0].map(|truth| !truth),
        "IS TRUE" => Some(truths[0] == Some(true)),
        "IS FALSE" => Some(truths[0] == Some(false)),
        "IS UNKNOWN" => Some(truths[0].is_none()),
        _ => truth(part),
    };
    assert_eq!(truth(part), expected, "{part:#}");
    parts.iter().for_each(check_tree);
    for row in part["inner"]["shown"].as_array().unwrap_or(&empty) {
        if !row["condition"].is_null() {
            check_tree(&row["condition"]);
        }
    }
}

async fn shown_by(database: &Database, select: &str, at: &str) -> bool {
    let sql = format!("SELECT 1 FROM ({select}) AS shape WHERE {at}");
    !database.query(&sql, &[]).await.is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_explain_says_of_random_shapes_is_what_postgres_says_and_the_file_has() {
    let mut rng = Seed::new().rng("explain");
    let database = Server::shared().await.database().await;
    let schema = generator::schema(&mut rng, 4, 6);
    database.execute(&schema.sql()).await;
    for table in 0..schema.tables.len() {
        for _ in 0..30 {
            let row = generator::row(&mut rng, &schema, table);
            let values: Vec<_> = row.iter().map(|value| value.sql()).collect();
            let sql = format!(
                "INSERT INTO {} VALUES ({}) ON CONFLICT DO NOTHING",
                schema.tables[table].name,
                values.join(", ")
            );
            // It may refer to what is not there.
            let _ = database.try_execute(&sql).await;
        }
    }
    let principal = generator::principal(&mut rng, schema.width);
    let mut config = Streamer::config(&database);
    let shapes: Vec<_> = (0..24)
        .map(|number| generator::shape(&mut rng, &schema, format!("s{number}")))
        .collect();
    for shape in &shapes {
        let path = format!("shape.{}", shape.name);
        for param in shape.params(&schema) {
            config = config.set(&format!("{path}.params.{param}.claim"), param);
        }
        config = config.set(&format!("{path}.tables"), vec![shape.sql(&schema)]);
    }
    let streamer = config
        .token("dev-1", principal.claims("random").into())
        .start()
        .await;
    let mut replica = Replica::config(&streamer);
    for shape in &shapes {
        replica = replica.subscribe(&shape.name);
    }
    let replica = replica.start().await;
    replica.until_caught_up(&database).await;
    let id = id_of(&replica);
    let (mut asked, mut shown, mut subqueries) = (0, 0, 0);
    for place in 0..schema.tables.len() {
        let table = &schema.tables[place];
        let of_table: Vec<_> = shapes.iter().filter(|shape| shape.table == place).collect();
        let names: Vec<_> = (table.key.iter())
            .map(|key| table.columns[*key].name.as_str())
            .collect();
        let keys: Vec<_> = names.iter().map(|name| format!("{name}::text")).collect();
        let sql = format!("SELECT ARRAY[{}] FROM {}", keys.join(", "), table.name);
        let found: Vec<Vec<String>> = (database.query(&sql, &[]).await.iter())
            .map(|row| row.get(0))
            .collect();
        for _ in 0..12 {
            let Some(key) = found.choose(&mut rng) else {
                continue;
            };
            let pairs: Vec<_> = (names.iter().zip(key))
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            let pairs: Vec<_> = pairs.iter().map(String::as_str).collect();
            let explained = parsed(&explain(&streamer, &id, &table.name, &pairs));
            let at: Vec<_> = (names.iter().zip(key))
                .map(|(name, value)| format!("{name}::text = '{value}'"))
                .collect();
            let at = at.join(" AND ");
            let mut any = false;
            for shape in &of_table {
                let is = shown_by(&database, &shape.sql_for(&schema, &principal), &at).await;
                any |= is;
                let said = explained["shapes"].as_array().unwrap().iter();
                let said = said.into_iter().find(|of| of["shape"] == shape.name);
                let said = said.unwrap();
                assert_eq!(said["truth"] == "true", is, "{at}: {said:#}");
                if !said["condition"].is_null() {
                    check_tree(&said["condition"]);
                }
                subqueries += shape.condition.subqueries();
                asked += 1;
            }
            assert_eq!(explained["shown"], any, "{explained:#}");
            let is_there = replica
                .open()
                .prepare(&format!(
                    "SELECT 1 FROM {} WHERE {}",
                    table.name,
                    at.replace("::text", " || ''")
                ))
                .and_then(|mut statement| statement.exists([]))
                .unwrap_or_default();
            assert_eq!(is_there, any, "{at}");
            shown += usize::from(any);
        }
    }
    println!("{asked} conditions with {subqueries} subqueries; {shown} rows are shown");
    assert!(asked > 50 && subqueries > 50, "{asked} {subqueries}");
}
