//! Shapes that change: what a replica is sent for it is the difference between what it was shown and what it is shown now,
//! computed in the mirror. What programs wrote meanwhile stays in sight, and arrives.
//!
//! The proxy counts and records what comes down, uncompressed. Keys are words, so that one that the replica had no right to
//! before or after would be found in the record.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anabranch_tests::{
    oracle::file,
    peers::{Replica, Streamer},
    postgres::{Database, Server},
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};
use rusqlite::Connection;
use serde_json::json;

/// 6,000 rows of about 300 bytes; the letter before a key's number is that of its group.
const TABLES: &str = "
    CREATE TABLE items (code text PRIMARY KEY, grp int NOT NULL, team int NOT NULL, owner int, title text, pad text NOT NULL);
    INSERT INTO items SELECT chr(97 + g % 10) || '-' || lpad(g::text, 6, '0'), g % 10, g / 10 % 3, g % 7, 'title ' || g,
      repeat(md5(g::text), 8) FROM generate_series(0, 5999) g;
    CREATE TABLE members (team int, person int, role text, PRIMARY KEY (team, person));
    INSERT INTO members VALUES (0, 1, 'lead'), (1, 1, 'guest'), (2, 2, 'lead');
    CREATE TABLE labels (grp int PRIMARY KEY, label text);
    INSERT INTO labels SELECT g, 'label ' || g FROM generate_series(0, 9) g";

/// The row that a program writes while the streamer is away. It is in every shape of this file.
const PENDING: &str = "d-000003";

struct Scene {
    database: Database,
    streamer: Streamer,
    proxy: Proxy,
    replica: Replica,
    /// Bytes of the first copy.
    copied: u64,
}

/// What a restart with another config came to.
struct Reshaped {
    /// Bytes that came down.
    bytes: u64,
    /// What came down.
    record: bytes::Bytes,
}

impl Reshaped {
    fn has(&self, words: &str) -> bool {
        let mut windows = self.record.windows(words.len());
        windows.any(|window| window == words.as_bytes())
    }
}

impl Scene {
    /// A replica of the shape `s`, as `toml` defines it, with a token that says person 1 of team 0.
    async fn start(toml: &str) -> Scene {
        let database = Server::shared().await.database().await;
        database.execute(TABLES).await;
        let streamer = Streamer::config(&database)
            .toml(toml)
            .token("dev-1", json!({ "sub": "p", "me": 1, "team": 0 }))
            .start()
            .await;
        let proxy = Proxy::to(streamer.address()).await;
        let replica = Replica::config(&streamer)
            .set("zstd", false)
            .subscribe("s")
            .through(&proxy)
            .start()
            .await;
        replica.until_caught_up(&database).await;
        let copied = proxy.bytes(Way::Down);
        Scene {
            database,
            streamer,
            proxy,
            replica,
            copied,
        }
    }

    fn program(&self) -> Connection {
        let program = Connection::open(self.replica.file()).unwrap();
        program.busy_timeout(Duration::from_secs(5)).unwrap();
        program
    }

    /// Restarts the streamer after `change`. While it is away a program writes, and `sql` runs in Postgres. From the write on, a
    /// reader must see what the program wrote.
    async fn reshape(&self, change: impl FnOnce(&Scene), title: &str, sql: &str) -> Reshaped {
        assert!(self.streamer.terminate().await.success());
        self.program()
            .execute(
                "UPDATE items SET title = ?2 WHERE code = ?1",
                [PENDING, title],
            )
            .unwrap();
        let over = AtomicBool::new(false);
        let file = self.replica.file();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let file = file::open(&file).unwrap();
                let mut looks = 0;
                while !over.load(Ordering::SeqCst) {
                    let seen: Result<String, _> = file.query_row(
                        "SELECT title FROM items WHERE code = ?1",
                        [PENDING],
                        |row| row.get(0),
                    );
                    assert_eq!(seen.unwrap(), title, "a pending write was out of sight");
                    looks += 1;
                }
                looks
            });
            let done = tokio::task::block_in_place(|| {
                let reshaped = self.restarted(change, sql);
                tokio::runtime::Handle::current().block_on(reshaped)
            });
            over.store(true, Ordering::SeqCst);
            assert!(reader.join().unwrap() > 10);
            done
        })
    }

    /// The same, and no program writes.
    async fn reshape_alone(&self, change: impl FnOnce(&Scene), sql: &str) -> Reshaped {
        assert!(self.streamer.terminate().await.success());
        self.restarted(change, sql).await
    }

    async fn restarted(&self, change: impl FnOnce(&Scene), sql: &str) -> Reshaped {
        self.database.execute(sql).await;
        change(self);
        self.proxy.record();
        let before = self.proxy.bytes(Way::Down);
        self.streamer.start().await;
        if self.replica.pid().is_none() {
            self.replica.start().await;
        }
        let open = self.replica.open();
        until("the local write is answered", DEADLINE, || async {
            let pending: i64 = open
                .query_row("SELECT pending FROM _anabranch_status", [], |row| {
                    row.get(0)
                })
                .unwrap();
            let caught_up: bool = open
                .query_row("SELECT caught_up FROM _anabranch_status", [], |row| {
                    row.get(0)
                })
                .unwrap();
            anyhow::ensure!(pending == 0 && caught_up, "{pending} pending");
            Ok(())
        })
        .await;
        self.replica.until_caught_up(&self.database).await;
        Reshaped {
            bytes: self.proxy.bytes(Way::Down) - before,
            record: self.proxy.recorded(Way::Down),
        }
    }

    /// The file equals Postgres' answer, with what the program wrote.
    async fn same(&self, select: &str, title: &str) {
        self.replica
            .until_equal(&self.database, &[("items", select)])
            .await;
        let rows = self
            .database
            .query("SELECT title FROM items WHERE code = $1", &[&PENDING])
            .await;
        assert_eq!(rows[0].get::<_, &str>(0), title);
    }

    fn select(&self, select: &str) {
        self.streamer
            .reconfigure("shape.s.tables", vec![toml::Value::from(select)]);
    }
}

fn shape(select: &str) -> String {
    format!("[shape.s]\ntables = [\"{select}\"]\nwritable = true")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_condition_sends_the_rows_that_differ_and_no_key_of_neither() {
    let (old, new) = (
        "SELECT * FROM items WHERE grp BETWEEN 1 AND 5",
        "SELECT * FROM items WHERE grp BETWEEN 1 AND 4 OR grp = 6 AND team = 1",
    );
    let scene = Scene::start(&shape(old)).await;
    assert!(scene.copied > 800_000, "{}", scene.copied);
    let reshaped = scene
        .reshape(
            |scene| scene.select(new),
            "written",
            // Into the old one and out of it, while nobody looked; and a row that stays in both changes.
            "INSERT INTO items VALUES ('f-late', 5, 1, 1, 'x', 'x'), ('b-late', 1, 1, 1, 'x', 'x');
             UPDATE items SET grp = 9 WHERE code = 'b-000001'; DELETE FROM items WHERE code = 'c-000002';
             DELETE FROM items WHERE code = 'f-000005'; UPDATE items SET title = 'changed' WHERE code = 'b-000011'",
        )
        .await;
    scene.same(new, "written").await;
    println!("copied {}, then {}", scene.copied, reshaped.bytes);
    // 600 deletes of a key and 200 rows, of 3,000.
    assert!(reshaped.bytes < scene.copied / 8, "{}", reshaped.bytes);
    for there in [
        "b-late", "f-000015", "b-000001", "c-000002", "b-000011", "g-000016",
    ] {
        assert!(reshaped.has(there), "{there}");
    }
    for absent in ["f-late", "h-0", "i-0", "j-0", "a-0", "b-000021", "g-000006"] {
        assert!(!reshaped.has(absent), "{absent}");
    }
    // And back, while the replica is away.
    scene.replica.kill();
    let reshaped = scene
        .reshape(|scene| scene.select(old), "again", "SELECT 1")
        .await;
    scene.same(old, "again").await;
    println!("back {}", reshaped.bytes);
    assert!(reshaped.bytes < scene.copied / 3, "{}", reshaped.bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_with_subqueries_becomes_another_one() {
    let params = |select: &str| format!("{}\nparams.me = {{ claim = \"me\" }}", shape(select));
    let plain = "SELECT * FROM items WHERE grp < 5";
    let first = "SELECT * FROM items WHERE team IN (SELECT team FROM members WHERE person = $me) AND grp < 5";
    let second = "SELECT * FROM items WHERE team IN (SELECT team FROM members WHERE person = $me AND role = 'lead') AND grp < 6 \
                  OR owner = $me AND grp = 3";
    let third = "SELECT * FROM items WHERE NOT EXISTS (SELECT 1 FROM labels WHERE labels.grp = items.grp AND label IS NULL) \
                 AND team IN (SELECT team FROM members WHERE person = $me) AND grp < 5";
    let sql = |select: &str| select.replace("$me", "1");
    let scene = Scene::start(&params(first)).await;
    // The inner table changes in the same time: what was shown before is what it meant then.
    let reshaped = scene
        .reshape(
            |scene| scene.select(second),
            "one",
            "DELETE FROM members WHERE team = 0; INSERT INTO members VALUES (0, 1, 'lead'), (2, 1, 'guest');
             UPDATE members SET role = 'lead' WHERE team = 1; UPDATE members SET role = 'guest' WHERE team = 1",
        )
        .await;
    scene.same(&sql(second), "one").await;
    println!("copied {}, then {}", scene.copied, reshaped.bytes);
    // Of 2,000 rows: 1,000 go, 200 + 57 come.
    assert!(reshaped.bytes < scene.copied / 4, "{}", reshaped.bytes);
    assert!(!reshaped.has("g-0") && !reshaped.has("h-0"));
    assert!(!reshaped.has("c-000022"), "a row of team 2 of no right");

    // A table that the mirror did not have.
    let reshaped = scene
        .reshape(
            |scene| scene.select(third),
            "two",
            "UPDATE labels SET label = NULL WHERE grp = 1; UPDATE members SET role = 'x'",
        )
        .await;
    scene.same(&sql(third), "two").await;
    println!("a new inner table {}", reshaped.bytes);
    scene
        .database
        .execute("UPDATE labels SET label = NULL WHERE grp = 2; UPDATE labels SET label = 'y' WHERE grp = 1")
        .await;
    scene.same(&sql(third), "two").await;

    // A table of the old one that no shape names any more is not there to be asked: it is sent in full, and right.
    let reshaped = scene
        .reshape(
            |scene| {
                scene.streamer.rewrite(|config| {
                    let shape = config["shape"]["s"].as_table_mut().unwrap();
                    shape.remove("params");
                    shape.insert("tables".into(), vec![toml::Value::from(plain)].into());
                });
            },
            "three",
            "SELECT 1",
        )
        .await;
    scene.same(plain, "three").await;
    println!("without them {}", reshaped.bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_come_and_go_and_rows_that_have_nothing_new_are_not_sent() {
    let all = "SELECT * FROM items WHERE grp < 5";
    let less = "SELECT code, grp, title, owner FROM items WHERE grp < 5";
    let fewer = "SELECT code, grp, title FROM items WHERE grp < 4";
    let owners = "SELECT code, grp, owner, title FROM items WHERE grp < 4";
    let more = "SELECT code, grp, team, owner, title FROM items WHERE grp < 4";
    let scene = Scene::start(&shape(all)).await;
    scene
        .database
        .execute("UPDATE items SET owner = NULL WHERE owner <> 6")
        .await;
    scene.replica.until_caught_up(&scene.database).await;
    scene
        .program()
        .execute_batch(
            "CREATE TABLE noted (code TEXT);
             CREATE INDEX mine ON items(title);
             CREATE TRIGGER note AFTER UPDATE OF title ON items BEGIN INSERT INTO noted VALUES (new.code); END",
        )
        .unwrap();
    // A write that is pending under a column that is left out is rejected (`not_writable`), so none is here.
    let reshaped = scene
        .reshape_alone(
            |scene| scene.select(less),
            "UPDATE items SET title = 'changed' WHERE code = 'b-000011'; UPDATE items SET pad = 'other' WHERE code = 'b-000001'",
        )
        .await;
    scene.same(less, "title 3").await;
    println!("copied {}, columns less {}", scene.copied, reshaped.bytes);
    assert!(reshaped.bytes < 20_000, "{}", reshaped.bytes);
    assert!(reshaped.has("b-000011") && !reshaped.has("b-000001"));
    let columns = |scene: &Scene| {
        let content = file::read(&scene.replica.file(), &["items"]).unwrap();
        content.tables[0].as_ref().unwrap().columns.clone()
    };
    assert_eq!(columns(&scene), ["code", "grp", "owner", "title"]);
    // What programs have on it is there again, and works.
    let program = scene.program();
    let there: i64 = program
        .query_row(
            "SELECT count(*) FROM sqlite_schema WHERE name IN ('mine', 'note')",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(there, 2);
    drop(program);

    let reshaped = scene
        .reshape_alone(|scene| scene.select(fewer), "SELECT 1")
        .await;
    scene.same(fewer, "title 3").await;
    println!("a column and a group less {}", reshaped.bytes);
    assert!(reshaped.bytes < 60_000, "{}", reshaped.bytes);

    // A new column that is mostly NULL: those rows have nothing new.
    let reshaped = scene
        .reshape(|scene| scene.select(owners), "three", "SELECT 1")
        .await;
    scene.same(owners, "three").await;
    println!("a column that a seventh has {}", reshaped.bytes);
    assert!(reshaped.bytes < 40_000, "{}", reshaped.bytes);

    // One that is NOT NULL is in each row.
    let reshaped = scene
        .reshape(|scene| scene.select(more), "four", "SELECT 1")
        .await;
    scene.same(more, "four").await;
    println!("a column that all have {}", reshaped.bytes);
    assert!(reshaped.has("b-000021"));
    scene
        .database
        .execute("UPDATE items SET team = 9, title = 'z' WHERE grp = 1")
        .await;
    scene.same(more, "four").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_claims_and_other_choices_send_the_difference() {
    let toml = |from: &str| {
        format!(
            "[shape.s]\nwritable = true\nparams.team = {{ claim = \"team\" }}\nparams.to = {{ client = \"int8\" }}\n\
             tables = [\"SELECT * FROM items WHERE (team = $team OR grp = 3) AND {from}\"]"
        )
    };
    let database = Server::shared().await.database().await;
    database.execute(TABLES).await;
    let streamer = Streamer::config(&database)
        .toml(&toml("grp <= $to"))
        .token("dev-1", json!({ "sub": "p", "team": 0 }))
        .start()
        .await;
    let proxy = Proxy::to(streamer.address()).await;
    let chosen = |to: i64| {
        let mut chosen = toml::Table::new();
        chosen.insert("to".into(), to.into());
        chosen
    };
    let replica = Replica::config(&streamer)
        .set("zstd", false)
        .subscribe_with("s", chosen(5))
        .through(&proxy)
        .start()
        .await;
    replica.until_caught_up(&database).await;
    let scene = Scene {
        copied: proxy.bytes(Way::Down),
        database,
        streamer,
        proxy,
        replica,
    };
    let select = |team: i64, to: i64| {
        format!("SELECT * FROM items WHERE (team = {team} OR grp = 3) AND grp <= {to}")
    };
    scene.same(&select(0, 5), "title 3").await;
    // The token says another team.
    let mut token = toml::Table::new();
    token.insert("token".into(), "dev-1".into());
    token.insert("claims".into(), {
        let mut claims = toml::Table::new();
        claims.insert("sub".into(), "p".into());
        claims.insert("team".into(), 1.into());
        claims.into()
    });
    let reshaped = scene
        .reshape(
            |scene| {
                let tokens = vec![toml::Value::from(token)];
                scene.streamer.reconfigure("auth.tokens", tokens);
            },
            "one",
            "UPDATE items SET title = 'changed' WHERE code = 'd-000013'",
        )
        .await;
    scene.same(&select(1, 5), "one").await;
    println!("copied {}, another team {}", scene.copied, reshaped.bytes);
    // It has a third of the groups in common, and not those of team 2.
    assert!(reshaped.has("d-000013") && reshaped.has("a-000010") && reshaped.has("a-000000"));
    assert!(!reshaped.has("d-000033") && !reshaped.has("a-000020") && !reshaped.has("g-0"));

    // The replica chooses otherwise.
    scene.replica.kill();
    let reshaped = scene
        .reshape(
            |scene| {
                let mut subscription = toml::Table::new();
                subscription.insert("shape".into(), "s".into());
                subscription.insert("params".into(), chosen(4).into());
                let subscriptions = vec![toml::Value::from(subscription)];
                scene.replica.reconfigure("subscribe", subscriptions);
            },
            "two",
            "SELECT 1",
        )
        .await;
    scene.same(&select(1, 4), "two").await;
    println!("another choice {}", reshaped.bytes);
    assert!(reshaped.bytes < scene.copied / 10, "{}", reshaped.bytes);
    assert!(reshaped.has("f-000015") && !reshaped.has("a-000010"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_more_or_less_sends_what_it_alone_shows() {
    let (own, other) = (
        "SELECT * FROM items WHERE grp < 5",
        "SELECT * FROM items WHERE grp IN (4, 5)",
    );
    let labels = "SELECT * FROM labels";
    let toml = format!(
        "{}\n[shape.other]\ntables = [\"{other}\", \"{labels}\"]",
        shape(own)
    );
    let scene = Scene::start(&toml).await;
    let subscribe = |shapes: &'static [&str]| {
        move |scene: &Scene| {
            let subscriptions = shapes.iter().map(|shape| {
                let mut subscription = toml::Table::new();
                subscription.insert("shape".into(), (*shape).into());
                toml::Value::from(subscription)
            });
            let subscriptions: Vec<_> = subscriptions.collect();
            scene.replica.reconfigure("subscribe", subscriptions);
        }
    };
    let both = "SELECT * FROM items WHERE grp < 6";
    scene.replica.kill();
    let reshaped = scene
        .reshape(
            subscribe(&["s", "other"]),
            "one",
            "UPDATE items SET title = 'changed' WHERE code = 'b-000011'",
        )
        .await;
    scene.same(both, "one").await;
    scene
        .replica
        .until_equal(&scene.database, &[("labels", labels)])
        .await;
    println!("copied {}, one more {}", scene.copied, reshaped.bytes);
    // A fifth more.
    assert!(reshaped.bytes < scene.copied / 3, "{}", reshaped.bytes);
    assert!(reshaped.has("f-000005") && reshaped.has("label 3"));
    assert!(!reshaped.has("b-000021") && !reshaped.has("e-000004"));

    scene.replica.kill();
    let reshaped = scene.reshape(subscribe(&["s"]), "two", "SELECT 1").await;
    scene.same(own, "two").await;
    println!("and less {}", reshaped.bytes);
    assert!(reshaped.bytes < scene.copied / 10, "{}", reshaped.bytes);
    assert!(reshaped.has("f-000005") && !reshaped.has("e-000004") && !reshaped.has("b-0000"));
    let gone = file::read(&scene.replica.file(), &["labels"]).unwrap();
    assert!(gone.tables[0].is_none());
}

/// What was kept is not kept for ever, nor believed where a table is another one now.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_made_anew_is_sent_in_full_although_the_old_shape_is_known() {
    let (old, new) = (
        "SELECT * FROM items WHERE grp < 5",
        "SELECT * FROM items WHERE grp < 6",
    );
    let scene = Scene::start(&shape(old)).await;
    assert!(scene.streamer.terminate().await.success());
    scene
        .database
        .execute(
            "ALTER TABLE items RENAME TO former; CREATE TABLE items (LIKE former INCLUDING ALL);
             INSERT INTO items SELECT code, grp, team, owner, 'anew', pad FROM former WHERE team = 1; DROP TABLE former",
        )
        .await;
    scene.select(new);
    scene.streamer.start().await;
    scene
        .replica
        .until_equal(&scene.database, &[("items", new)])
        .await;
}
