//! Against other SQLites in processes of their own: the `sqlite3` program, and Python's.
//!
//! What is true is told by the file itself: each local transaction has a tag, and an entry for each of its rows.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rusqlite::Connection;
use tempfile::TempDir;

use super::{
    super::{
        tests::{Shell, beside, sqlite3},
        transaction,
    },
    *,
};

/// A capture as small as it can be, and tables for it.
const TABLES: &str = "
    CREATE TABLE _anabranch_head(id INTEGER PRIMARY KEY CHECK(id = 1), last INTEGER NOT NULL) STRICT;
    INSERT INTO _anabranch_head VALUES(1, 0);
    CREATE TABLE entries(id INTEGER PRIMARY KEY, tag TEXT NOT NULL);
    CREATE TABLE work(tag TEXT, pad BLOB);
    CREATE TABLE other(v);
    CREATE TRIGGER capture AFTER INSERT ON work BEGIN
      UPDATE _anabranch_head SET last = last + 1;
      INSERT INTO entries SELECT last, NEW.tag FROM _anabranch_head;
    END;";

struct Folder {
    directory: TempDir,
    /// Our writing connection. It also keeps the WAL there when nobody else has the file open.
    own: Connection,
}

impl Folder {
    fn new(before: &str) -> Folder {
        let directory = tempfile::tempdir().unwrap();
        let mut own = Connection::open(directory.path().join("app.db")).unwrap();
        // As our own does: asking each millisecond, it gets the lock from a program that hardly lets go of it.
        transaction::wait_for_locks(&mut own, Duration::from_secs(10), &Following::default())
            .unwrap();
        own.execute_batch(&format!(
            "{before}; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; {TABLES}"
        ))
        .unwrap();
        Folder { directory, own }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("app.db")
    }

    fn wal(&self) -> PathBuf {
        beside(&self.path(), "-wal")
    }

    fn wal_bytes(&self) -> u64 {
        fs::metadata(self.wal()).unwrap().len()
    }

    /// Opened, and looked at: from now on everything is exact.
    fn boundaries(&self) -> Boundaries {
        let mut boundaries = Boundaries::open(&self.path(), 0).unwrap();
        assert!(exact(&mut boundaries).is_empty());
        boundaries
    }

    /// The newest entry of each local transaction that was committed.
    fn ends(&self) -> Vec<i64> {
        self.own
            .prepare("SELECT max(id) FROM entries GROUP BY tag ORDER BY 1")
            .unwrap()
            .query_map([], |row| row.get(0))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap()
    }

    fn python(&self, name: &str, transactions: usize, rows_max: usize, seed: u64) -> Child {
        let mut python = Command::new("python3");
        python
            .args(["-c", include_str!("writer.py")])
            .arg(self.path())
            .args([name, &transactions.to_string(), &seed.to_string()])
            .arg(rows_max.to_string())
            .stdin(Stdio::null())
            .spawn()
            .expect("this test needs Python 3 with its sqlite3 module")
    }
}

fn one(tag: &str) -> String {
    format!("INSERT INTO work(tag) VALUES('{tag}');")
}

/// Looks, and takes only exact answers.
fn exact(boundaries: &mut Boundaries) -> Vec<i64> {
    let look = boundaries.look().unwrap();
    assert!(look.proved, "{look:?}");
    look.ends
}

/// As [`Following::make_way`] does it.
fn make_way(boundaries: &mut Boundaries, writer: &Connection) -> bool {
    boundaries.make_way_beside_writers().unwrap()
        || match Write::begin(writer) {
            // Programs that leave no gap between their transactions.
            Err(Error::Transient(_)) => false,
            begun => boundaries
                .make_way_without_writers(&begun.unwrap())
                .unwrap(),
        }
}

/// How many transactions the long variant of a test is to have.
fn transactions(default: usize) -> usize {
    env::var("ANABRANCH_BOUNDARIES").map_or(default, |n| n.parse().unwrap())
}

fn seed() -> u64 {
    let seed = env::var("ANABRANCH_SEED").map_or_else(
        |_| uuid::Uuid::new_v4().as_u64_pair().0,
        |seed| seed.parse().unwrap(),
    );
    println!("ANABRANCH_SEED={seed}");
    seed
}

/// A random sequence good enough for pauses.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn a_boundary_is_not_missed_or_merged_whatever_programs_do() {
    const WRITERS: usize = 4;
    let seed = seed();
    let each = transactions(400) / WRITERS;
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    let mut children: Vec<_> = (0..WRITERS)
        .map(|n| folder.python(&format!("w{n}"), each, 2_000, seed))
        .collect();
    let mut chance = Chance(seed);
    let (mut ends, mut looks, mut ways) = (Vec::new(), 0, 0);
    let mut running = true;
    while running {
        running = children
            .iter_mut()
            .any(|child| child.try_wait().unwrap().is_none());
        // At times as fast as it goes, at times so seldom that whole WALs could come and go.
        match chance.below(4) {
            0 => thread::park_timeout(Duration::from_millis(chance.below(200))),
            1 => thread::park_timeout(Duration::from_millis(chance.below(5))),
            _ => {}
        }
        if chance.below(20) == 0 {
            // Where programs leave no gap between their transactions, ours may not get its turn.
            let ours = folder.own.execute_batch("INSERT INTO other VALUES('ours')");
            assert!(ours.is_ok() || folder.own.is_autocommit());
        }
        let look = boundaries.look().unwrap();
        assert!(look.proved, "{look:?}");
        looks += 1;
        ends.extend(look.ends);
        if look.wal_pages > 2_000 && make_way(&mut boundaries, &folder.own) {
            ways += 1;
        }
    }
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    ends.extend(exact(&mut boundaries));
    println!(
        "{} local transactions in {looks} looks; made way {ways} times",
        ends.len()
    );
    assert_eq!(ends, folder.ends());
    assert!(ends.len() > each * WRITERS / 2);
}

#[test]
fn a_writer_that_is_killed_leaves_no_boundary_that_is_none() {
    let seed = seed();
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    let mut chance = Chance(seed);
    let mut ends = exact(&mut boundaries);
    for round in 0..transactions(200) / 20 {
        let mut children: Vec<_> = (0..2)
            .map(|n| folder.python(&format!("r{round} w{n}"), 1_000_000, 300, seed))
            .collect();
        let until = folder.ends().len() + 10 + chance.below(20) as usize;
        while folder.ends().len() < until {
            ends.extend(exact(&mut boundaries));
        }
        for child in &mut children {
            child.kill().unwrap();
            ends.extend(exact(&mut boundaries));
            child.wait().unwrap();
            ends.extend(exact(&mut boundaries));
        }
    }
    ends.extend(exact(&mut boundaries));
    assert_eq!(ends, folder.ends());
}

#[test]
fn a_wal_that_comes_and_goes_between_two_looks_is_not_missed() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    let mut shell = Shell::open(&folder.path());
    shell.run("PRAGMA busy_timeout = 1;");
    let (mut ends, mut tag) = (exact(&mut boundaries), 0);
    for mode in ["PASSIVE", "FULL", "RESTART", "TRUNCATE"] {
        for autocheckpoint in [0, 1] {
            for looks_of_5 in 0..32u32 {
                shell.run(&format!("PRAGMA wal_autocheckpoint = {autocheckpoint};"));
                for step in 0..5 {
                    tag += 1;
                    shell.run(&one(&tag.to_string()));
                    shell.run(&format!("PRAGMA wal_checkpoint({mode});"));
                    if looks_of_5 >> step & 1 == 1 {
                        ends.extend(exact(&mut boundaries));
                    }
                }
            }
        }
    }
    ends.extend(exact(&mut boundaries));
    assert_eq!(ends, folder.ends());
    assert_eq!(ends.len(), tag);
}

/// How long it gets depends on how fast the disk is; that it is started over again and again does not.
#[test]
fn the_wal_of_a_program_that_writes_all_the_time_is_never_started_over() {
    const PAGES_MAX: u32 = 1_000;
    const STARTED_OVER_MIN: u32 = 4;
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    // 40 pages a transaction, without a pause, until it hears the end of its input.
    let script = "
import select, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
number = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    number += 1
    connection.execute('BEGIN IMMEDIATE')
    for row in range(4):
        connection.execute('INSERT INTO work VALUES (?, zeroblob(40000))', (str(number),))
    connection.execute('COMMIT')
";
    let mut child = Command::new("python3")
        .args(["-c", script])
        .arg(folder.path())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut ends, mut longest, mut before, mut started_over) = (Vec::new(), 0, 0, 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while started_over < STARTED_OVER_MIN {
        assert!(child.try_wait().unwrap().is_none(), "the program failed");
        assert!(
            Instant::now() < deadline,
            "started over {started_over} times, {longest} pages at most"
        );
        let look = boundaries.look().unwrap();
        assert!(look.proved);
        ends.extend(look.ends);
        longest = longest.max(look.wal_pages);
        started_over += u32::from(look.wal_pages < before);
        before = look.wal_pages;
        if look.wal_pages > PAGES_MAX {
            make_way(&mut boundaries, &folder.own);
        }
    }
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    ends.extend(exact(&mut boundaries));
    assert_eq!(ends, folder.ends());
    println!("{longest} pages at most");
}

#[test]
fn a_program_can_start_the_wal_over_once_we_have_looked_again() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    let mut shell = Shell::open(&folder.path());
    for mode in ["RESTART", "TRUNCATE"] {
        shell.run(&one(mode));
        assert_eq!(exact(&mut boundaries).len(), 1);
        assert!(boundaries.is_pinned());
        let blocked = shell.run(&format!("PRAGMA wal_checkpoint({mode});"));
        assert!(blocked[0].starts_with("1|"), "{blocked:?}");
        // It was written back all the same.
        exact(&mut boundaries);
        exact(&mut boundaries);
        assert!(!boundaries.is_pinned());
        let through = shell.run(&format!("PRAGMA wal_checkpoint({mode});"));
        assert!(through[0].starts_with("0|"), "{through:?}");
    }
    assert_eq!(folder.wal_bytes(), 0);
    shell.run(&one("after"));
    assert_eq!(exact(&mut boundaries), [3]);
}

#[test]
fn a_reader_of_a_program_makes_no_way_impossible_only_while_it_lasts() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    let mut reader = Shell::open(&folder.path());
    reader.run("BEGIN; SELECT count(*) FROM work;");
    folder.own.execute_batch(&one("a")).unwrap();
    assert!(!make_way(&mut boundaries, &folder.own));
    reader.run("COMMIT;");
    assert!(make_way(&mut boundaries, &folder.own));
    assert_eq!(exact(&mut boundaries), [1]);
    // Others' writes are told, too, that came while way was made; and the next one starts the WAL over.
    folder.own.execute_batch(&one("b")).unwrap();
    let look = boundaries.look().unwrap();
    assert_eq!((look.ends, look.proved), (vec![2], true));
    assert!(look.wal_pages < 10);
}

#[test]
fn a_checkpoint_waits_for_a_holder_that_is_older_than_what_was_read() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    folder.own.execute_batch(&one("a")).unwrap();
    assert_eq!(exact(&mut boundaries), [1]);
    folder.own.execute_batch(&one("b")).unwrap();
    // As if that was committed after the holder began, and before the length of the WAL was asked for.
    boundaries.published = boundaries.wal.published(&boundaries.asking).unwrap();
    boundaries.look().unwrap();
    let mut shell = Shell::open(&folder.path());
    let done = shell.run("PRAGMA wal_checkpoint(FULL);");
    assert!(done[0].starts_with("0|"), "{done:?}");
}

#[test]
fn a_transaction_that_captures_nothing_is_no_boundary() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    folder
        .own
        .execute_batch("INSERT INTO other VALUES(1); CREATE TABLE mine(v); INSERT INTO mine VALUES(1); UPDATE _anabranch_head SET last = last")
        .unwrap();
    assert!(exact(&mut boundaries).is_empty());
    let mut shell = Shell::open(&folder.path());
    shell.run("BEGIN; SAVEPOINT s; INSERT INTO work(tag) VALUES('gone'); ROLLBACK TO s; INSERT INTO other VALUES(2); COMMIT;");
    assert!(exact(&mut boundaries).is_empty());
    shell.run(&one("there"));
    assert_eq!(exact(&mut boundaries), [1]);
}

#[test]
fn frames_before_their_commit_are_no_boundary() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    let mut shell = Shell::open(&folder.path());
    shell.run("PRAGMA cache_size = 5; PRAGMA wal_autocheckpoint = 0;");
    let rows = "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 500)
                INSERT INTO work SELECT 'spilled', zeroblob(1000) FROM n;";
    let before = folder.wal_bytes();
    shell.run(&format!("BEGIN; {rows} UPDATE work SET pad = 1; SELECT 1;"));
    assert!(folder.wal_bytes() > before + 100_000, "nothing was spilled");
    assert!(exact(&mut boundaries).is_empty());
    shell.run("ROLLBACK;");
    assert!(exact(&mut boundaries).is_empty());
    shell.run(&one("short"));
    assert_eq!(exact(&mut boundaries), [1]);
    shell.run(&format!("BEGIN; {rows}"));
    shell.run(&format!(
        "{rows} UPDATE work SET pad = 1 WHERE rowid < 300;"
    ));
    assert!(exact(&mut boundaries).is_empty());
    shell.run("COMMIT;");
    assert_eq!(exact(&mut boundaries), [1_001]);
    assert_eq!(folder.ends(), [1, 1_001]);
}

#[test]
fn a_group_that_was_written_but_never_published_is_no_boundary() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    folder.own.execute_batch(&one("a")).unwrap();
    assert_eq!(exact(&mut boundaries), [1]);
    // What a writer leaves that is killed between its last frame and its commit: in a copy of the file, so that the
    // WAL of the copy can be put after that of the original.
    let published = boundaries.published;
    let header = published.header.unwrap();
    let end = usize::try_from(header.frame_offset(published.frames + 1)).unwrap();
    let elsewhere = folder.directory.path().join("copy.db");
    for suffix in ["", "-wal"] {
        fs::copy(beside(&folder.path(), suffix), beside(&elsewhere, suffix)).unwrap();
    }
    let copy = Connection::open(&elsewhere).unwrap();
    copy.execute_batch(&one("never")).unwrap();
    let wal = fs::read(beside(&elsewhere, "-wal")).unwrap();
    assert_eq!(wal[..end], fs::read(folder.wal()).unwrap()[..end]);
    assert!(wal.len() > end);
    fs::write(folder.wal(), &wal).unwrap();
    let whole = (wal.len() - 32) / header.frame_bytes();
    let scanned = boundaries.wal.scan(
        header,
        header.start(),
        u32::try_from(whole).unwrap(),
        [None, None],
    );
    assert!(
        matches!(scanned, Ok(Scanned::Whole { broken: None, .. })),
        "a valid group"
    );
    assert!(exact(&mut boundaries).is_empty());
    folder
        .own
        .execute_batch("BEGIN; INSERT INTO work(tag) VALUES('b'), ('b'); COMMIT")
        .unwrap();
    assert_eq!(exact(&mut boundaries), [3]);
    assert_eq!(folder.ends(), [1, 3]);
}

#[test]
fn a_head_table_whose_page_moves_is_followed() {
    let auto = "PRAGMA auto_vacuum = FULL; CREATE TABLE early(v); INSERT INTO early VALUES(zeroblob(100000))";
    for (before, moving) in [
        (
            "CREATE TABLE early(v); INSERT INTO early VALUES(zeroblob(100000)); CREATE TABLE later(v)",
            "DROP TABLE early; VACUUM;",
        ),
        (auto, "DROP TABLE early;"),
    ] {
        let folder = Folder::new(before);
        if before == auto {
            // It is the newest root page that moves, to where the dropped table was.
            folder
                .own
                .execute_batch(
                    "DROP TABLE _anabranch_head;
                     CREATE TABLE _anabranch_head(id INTEGER PRIMARY KEY CHECK(id = 1), last INTEGER NOT NULL) STRICT;
                     INSERT INTO _anabranch_head VALUES(1, 0)",
                )
                .unwrap();
        }
        let mut boundaries = folder.boundaries();
        let root = boundaries.place.snapshot.root;
        let mut shell = Shell::open(&folder.path());
        shell.run(&one("a"));
        shell.run(&one("b"));
        shell.run(moving);
        shell.run(&one("c"));
        shell.run(&one("d"));
        let look = boundaries.look().unwrap();
        let told = if moving.contains("VACUUM;") {
            // The schema changed twice, and the page moved: what was between could have been missed.
            look.ends
        } else {
            assert!(look.proved);
            look.ends
        };
        assert_ne!(boundaries.place.snapshot.root, root, "{moving}");
        assert!(folder.ends().ends_with(&told), "{told:?}");
        assert!(told.ends_with(&[3, 4]));
        shell.run("CREATE TABLE more(v); CREATE INDEX by_v ON more(v);");
        shell.run(&one("e"));
        shell.run("ALTER TABLE more ADD COLUMN w;");
        shell.run(&one("f"));
        assert_eq!(exact(&mut boundaries), [5, 6]);
    }
}

#[test]
fn a_head_table_that_is_made_later_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.db");
    let own = Connection::open(&path).unwrap();
    own.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE early(v)")
        .unwrap();
    let mut boundaries = Boundaries::open(&path, 0).unwrap();
    assert!(exact(&mut boundaries).is_empty());
    own.execute_batch(TABLES).unwrap();
    own.execute_batch("INSERT INTO work(tag) VALUES('a')")
        .unwrap();
    own.execute_batch("INSERT INTO work(tag) VALUES('b'), ('b')")
        .unwrap();
    assert_eq!(exact(&mut boundaries), [1, 3]);
}

#[test]
fn what_the_wal_still_tells_of_a_time_without_us_is_exact() {
    let folder = Folder::new("");
    let write = |tags: &[&str]| {
        for tag in tags {
            folder.own.execute_batch(&one(tag)).unwrap();
        }
    };
    write(&["a", "b", "c"]);
    let look = |known| Boundaries::open(&folder.path(), known).unwrap().look();
    let told = |known| look(known).map(|look| (look.ends, look.proved)).unwrap();
    assert_eq!(told(0), (vec![1, 2, 3], true));
    assert_eq!(told(2), (vec![3], true));
    assert_eq!(told(3), (vec![], true));
    // Id 2 is in no WAL any more.
    folder
        .own
        .execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")
        .unwrap();
    assert_eq!(told(3), (vec![], true));
    assert_eq!(told(2), (vec![3], true), "one entry is one transaction");
    assert_eq!(told(1), (vec![3], false), "two may be one or two");
    folder
        .own
        .execute_batch("INSERT INTO work(tag) VALUES('d'), ('d')")
        .unwrap();
    write(&["e"]);
    assert_eq!(told(5), (vec![6], true));
    assert_eq!(told(3), (vec![5, 6], false));
    // The file is older than what is known.
    assert_eq!(told(9), (vec![6], false));
}

#[test]
fn content_that_goes_back_is_told_as_a_gap() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    folder.own.execute_batch(&one("a")).unwrap();
    let old = folder.directory.path().join("old.db");
    sqlite3(&folder.path(), &format!(".backup '{}'", old.display()));
    folder.own.execute_batch(&one("b")).unwrap();
    assert_eq!(exact(&mut boundaries), [1, 2]);
    sqlite3(&folder.path(), &format!(".restore '{}'", old.display()));
    let look = boundaries.look().unwrap();
    assert_eq!((look.ends, look.proved), (vec![1], false));
    folder.own.execute_batch(&one("c")).unwrap();
    assert_eq!(exact(&mut boundaries), [2]);
}

#[test]
fn a_wal_that_was_replaced_is_noticed() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    folder.own.execute_batch(&one("a")).unwrap();
    assert_eq!(exact(&mut boundaries), [1]);
    let other = folder.directory.path().join("other");
    fs::copy(folder.wal(), &other).unwrap();
    fs::rename(&other, folder.wal()).unwrap();
    assert!(matches!(boundaries.look(), Err(Error::Definite(_))));
    assert!(matches!(boundaries.make_durable(), Err(Error::Definite(_))));
    fs::remove_file(folder.wal()).unwrap();
    assert!(matches!(boundaries.look(), Err(Error::Definite(_))));
}

#[test]
fn a_wal_that_was_damaged_is_told_as_a_gap_and_followed_again_later() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    folder.own.execute_batch(&one("a")).unwrap();
    assert_eq!(exact(&mut boundaries), [1]);
    folder.own.execute_batch(&one("b")).unwrap();
    folder.own.execute_batch(&one("c")).unwrap();
    // A byte of a frame's salts, which SQLite does not look at while its index is there.
    let header = boundaries.published.header.unwrap();
    let offset = usize::try_from(header.frame_offset(boundaries.published.frames + 1)).unwrap();
    let mut wal = fs::read(folder.wal()).unwrap();
    wal[offset + 8] ^= 1;
    fs::write(folder.wal(), &wal).unwrap();
    let look = boundaries.look().unwrap();
    assert_eq!((look.ends, look.proved), (vec![3], false));
    let two = "INSERT INTO work(tag) VALUES('d'), ('d')";
    folder.own.execute_batch(two).unwrap();
    let look = boundaries.look().unwrap();
    assert_eq!((look.ends, look.proved), (vec![5], false));
    assert!(boundaries.make_way_beside_writers().unwrap_or(true));
    boundaries.look().unwrap();
    folder
        .own
        .execute_batch("PRAGMA wal_checkpoint(FULL)")
        .unwrap();
    boundaries.look().unwrap();
    folder.own.execute_batch(&one("e")).unwrap();
    boundaries.look().unwrap();
    folder.own.execute_batch(&one("f")).unwrap();
    assert_eq!(exact(&mut boundaries), [7]);
}

#[test]
fn an_entry_is_durable_only_after_it_was_looked_at() {
    let folder = Folder::new("");
    let mut boundaries = folder.boundaries();
    folder.own.execute_batch(&one("a")).unwrap();
    assert_eq!(boundaries.make_durable().unwrap(), 0);
    assert_eq!(exact(&mut boundaries), [1]);
    assert_eq!(boundaries.make_durable().unwrap(), 1);
    boundaries.sync_failed = true;
    assert!(matches!(boundaries.make_durable(), Err(Error::Definite(_))));
}

#[test]
fn pages_of_each_size_and_a_device_that_tears_them_are_followed() {
    for page_bytes in [512, 1_024, 65_536] {
        let folder = Folder::new(&format!("PRAGMA page_size = {page_bytes}"));
        let mut boundaries = folder.boundaries();
        let torn = format!("file:{}?psow=0", folder.path().display());
        let mut shell = Shell::open(Path::new(&torn));
        shell.run("PRAGMA synchronous = FULL;");
        for tag in ["a", "b", "c"] {
            shell.run(&one(tag));
        }
        assert_eq!(exact(&mut boundaries), [1, 2, 3], "{page_bytes}");
    }
}

mod watch {
    use std::future::Future;

    use super::*;

    const PAUSE_MAX: Duration = Duration::from_secs(3_600);

    fn run<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test)
    }

    /// Whether it wakes within a time in which pauses alone would wake it only because they began short.
    async fn wakes(watch: &mut Watch, within: Duration) -> bool {
        tokio::time::timeout(within, watch.changed())
            .await
            .is_ok_and(|told| told.is_ok())
    }

    /// Pauses have become so long that only a write can wake it.
    async fn quiet(watch: &mut Watch) {
        while wakes(watch, Duration::from_millis(300)).await {}
    }

    #[test]
    fn each_commit_of_a_program_is_found_when_we_are_woken() {
        run(async {
            let folder = Folder::new("");
            let mut boundaries = folder.boundaries();
            let mut watch = Watch::new(&folder.path(), PAUSE_MAX).unwrap();
            let count = 60;
            let mut child = folder.python("w", count, 200, 1);
            let mut ends = Vec::new();
            let mut running = true;
            while running {
                running = child.try_wait().unwrap().is_none();
                let _ = wakes(&mut watch, Duration::from_millis(50)).await;
                ends.extend(exact(&mut boundaries));
            }
            assert!(child.wait().unwrap().success());
            assert_eq!(ends, folder.ends());
            // From long quiet, with a sync between the last frame and the commit.
            let mut shell = Shell::open(&folder.path());
            shell.run("PRAGMA synchronous = FULL;");
            for tag in ["a", "b", "c"] {
                quiet(&mut watch).await;
                shell.run(&one(tag));
                let began = Instant::now();
                let mut found = exact(&mut boundaries);
                while found.is_empty() {
                    assert!(wakes(&mut watch, Duration::from_secs(10)).await);
                    found = exact(&mut boundaries);
                }
                assert!(began.elapsed() < Duration::from_secs(10));
            }
        });
    }

    #[test]
    fn a_write_wakes_after_long_quiet_and_many_writes_wake_once() {
        run(async {
            let folder = Folder::new("");
            let mut watch = Watch::new(&folder.path(), PAUSE_MAX).unwrap();
            quiet(&mut watch).await;
            for n in 0..200 {
                folder.own.execute_batch(&one(&n.to_string())).unwrap();
            }
            let began = Instant::now();
            assert!(wakes(&mut watch, Duration::from_millis(250)).await);
            // What follows are pauses that double, not one wake for each write.
            let mut wakes_count = 1;
            while wakes(&mut watch, Duration::from_millis(300)).await {
                wakes_count += 1;
            }
            assert!(wakes_count < 20, "{wakes_count} in {:?}", began.elapsed());
        });
    }

    /// One that waits for our reader writes to the database, and then nothing more.
    #[test]
    fn a_checkpoint_wakes_after_long_quiet() {
        run(async {
            let folder = Folder::new("");
            let mut watch = Watch::new(&folder.path(), PAUSE_MAX).unwrap();
            folder.own.execute_batch(&one("a")).unwrap();
            quiet(&mut watch).await;
            folder
                .own
                .execute_batch("PRAGMA wal_checkpoint(PASSIVE)")
                .unwrap();
            assert!(wakes(&mut watch, Duration::from_millis(250)).await);
        });
    }

    #[test]
    fn a_wal_that_is_deleted_and_made_again_still_wakes() {
        run(async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("app.db");
            let open = || Connection::open(&path).unwrap();
            let first = open();
            first
                .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t(v)")
                .unwrap();
            drop(first);
            assert!(!beside(&path, "-wal").exists());
            // Before it is there.
            let mut watch = Watch::new(&path, PAUSE_MAX).unwrap();
            for round in 0..3 {
                quiet(&mut watch).await;
                let connection = open();
                connection.execute_batch("INSERT INTO t VALUES(1)").unwrap();
                assert!(
                    wakes(&mut watch, Duration::from_millis(250)).await,
                    "made, round {round}"
                );
                quiet(&mut watch).await;
                connection.execute_batch("INSERT INTO t VALUES(2)").unwrap();
                assert!(
                    wakes(&mut watch, Duration::from_millis(250)).await,
                    "written, round {round}"
                );
                drop(connection);
                assert!(!beside(&path, "-wal").exists());
            }
        });
    }

    #[test]
    fn a_wake_is_not_lost_when_others_are_always_ready_before_it() {
        run(async {
            let folder = Folder::new("");
            let mut watch = Watch::new(&folder.path(), PAUSE_MAX).unwrap();
            quiet(&mut watch).await;
            folder.own.execute_batch(&one("a")).unwrap();
            let began = Instant::now();
            let mut woke = false;
            while !woke && began.elapsed() < Duration::from_secs(10) {
                woke = tokio::select! {
                    told = watch.changed() => told.is_ok(),
                    () = tokio::task::yield_now() => false,
                };
            }
            assert!(woke);
        });
    }
}
