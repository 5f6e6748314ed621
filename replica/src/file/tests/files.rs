//! Files that can't be opened, or go away.

use std::{fs, os::unix::fs::PermissionsExt};

use super::*;

fn definite(result: Result<File, Error>) -> String {
    match result {
        Err(Error::Definite(text)) => text,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it was opened"),
    }
}

#[test]
fn a_second_replica_of_one_file_is_refused() {
    let folder = Folder::new();
    let file = folder.open();
    let name = folder.path().display().to_string();
    let text = definite(File::open(&folder.settings));
    assert!(text.contains(&name), "{text}");
    // Nor by another name of it.
    let link = folder.directory.path().join("link.db");
    std::os::unix::fs::symlink(folder.path(), &link).unwrap();
    definite(File::open(&settings(&link)));
    definite(File::open(&settings(
        &folder.directory.path().join(".").join("app.db"),
    )));
    drop(file);
    drop(File::open(&settings(&link)).unwrap());
    folder.open();
}

#[test]
fn permissions_are_as_configured_for_all_files() {
    for mode in [0o600, 0o640, 0o666] {
        let folder = Folder::new();
        let mut settings = folder.settings.clone();
        settings.mode = mode;
        let mut file = File::open(&settings).unwrap();
        file.begin_stream().unwrap();
        file.apply(&start(1, &[])).unwrap();
        for suffix in ["", "-wal", "-shm"] {
            let path = beside(folder.path(), suffix);
            let bits = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(bits, mode, "{}", path.display());
        }
    }
}

#[test]
fn what_is_no_database_is_refused() {
    let folder = Folder::new();
    fs::write(
        folder.path(),
        "this is not a database, whatever its name says\n".repeat(100),
    )
    .unwrap();
    let text = definite(File::open(&folder.settings));
    assert!(text.contains("not a SQLite database"), "{text}");
    assert!(
        fs::read_to_string(folder.path())
            .unwrap()
            .starts_with("this is not")
    );
    // A directory, a path that leads nowhere, an unwritable place.
    definite(File::open(&settings(folder.directory.path())));
    definite(File::open(&settings(
        &folder.directory.path().join("no").join("app.db"),
    )));
    definite(File::open(&settings(Path::new("/proc/app.db"))));
}

#[test]
fn a_file_of_another_version_is_refused() {
    let folder = Folder::new();
    drop(folder.open());
    for (to, said) in [("format + 1", "newer"), ("1", "older")] {
        folder.program(&format!("UPDATE _anabranch_state SET format = {to}"));
        let text = definite(File::open(&folder.settings));
        assert!(text.contains(said), "{text}");
    }
}

#[test]
fn an_empty_file_is_as_good_as_none() {
    let folder = Folder::new();
    fs::write(folder.path(), "").unwrap();
    let mut file = folder.open();
    file.apply(&start(1, &[])).unwrap();
}

#[test]
fn a_file_in_another_journal_mode_is_switched_to_wal() {
    let folder = Folder::new();
    folder.program("PRAGMA journal_mode = DELETE; CREATE TABLE own(id)");
    let mut file = folder.open();
    assert_eq!(folder.query("PRAGMA journal_mode"), ["'wal'"]);
    // A program can't switch it off while we have it open.
    let program = Connection::open(folder.path()).unwrap();
    let switched: rusqlite::Result<String> =
        program.query_row("PRAGMA journal_mode = DELETE", [], |row| row.get(0));
    assert!(switched.map_or(true, |mode| mode == "wal"));
    file.report(true, None).unwrap();
    // In between, it can; then we switch it on again.
    drop((file, program));
    folder.program("PRAGMA journal_mode = DELETE");
    folder.open().apply(&start(1, &[])).unwrap();
    assert_eq!(folder.query("PRAGMA journal_mode"), ["'wal'"]);
}

#[test]
fn a_file_that_is_deleted_or_replaced_is_noticed() {
    let gone = |take_away: &dyn Fn(&Path)| {
        let folder = Folder::new();
        let mut file = folder.open();
        file.apply(&start(1, &[])).unwrap();
        take_away(folder.path());
        for result in [
            file.apply(&down(vec![begin(&[]), commit(2)])).map(drop),
            file.report(true, None),
            file.begin_stream(),
        ] {
            match result {
                Err(Error::Definite(text)) => assert!(text.contains("app.db"), "{text}"),
                other => panic!("{other:?}"),
            }
        }
    };
    gone(&|path| fs::remove_file(path).unwrap());
    gone(&|path| fs::rename(path, beside(path, "-moved")).unwrap());
    gone(&|path| fs::remove_file(beside(path, "-wal")).unwrap());
    gone(&|path| {
        fs::copy(path, beside(path, "-copy")).unwrap();
        fs::rename(beside(path, "-copy"), path).unwrap();
    });
}

#[test]
fn a_full_disk_undoes_what_was_begun_and_the_same_message_goes_on_later() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("a")]])).unwrap();
    let limit = |file: &File, pages: i64| {
        file.connection
            .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |row| {
                row.get::<_, i64>(0)
            })
            .unwrap()
    };
    let big = "x".repeat(200_000);
    let apply = down(vec![begin(&[]), upserts(1, &[&[I(2), T(&big)]]), commit(2)]);
    let full = limit(&file, 1);
    for _ in 0..3 {
        match file.apply(&apply) {
            Err(Error::Full(text)) => assert!(text.contains("full"), "{text}"),
            other => panic!("{other:?}"),
        }
        // It may be our own WAL that filled the disk.
        let wal = beside(folder.path(), "-wal");
        assert_eq!(fs::metadata(wal).unwrap().len(), 0);
        assert_eq!(folder.query("SELECT id FROM t"), ["1"]);
        assert_eq!(file.position(), Some(position(1)));
        // There may be room for the news.
        file.report(true, Some("the disk is full")).unwrap();
    }
    limit(&file, full + 1000);
    file.apply(&apply).unwrap();
    assert_eq!(
        folder.query("SELECT id, length(v) FROM t"),
        ["1|1", "2|200000"]
    );
    // In the middle of a reset, in the middle of a row.
    limit(&file, 1_000_000);
    let ops = packed(
        &[&[I(1), T("A")], &[I(3), T(&big)], &[I(4), T("d")]],
        &[&[I(1)]],
    );
    file.apply(&down(vec![begin(&[1]), upserts(1, &[&[I(9), T("i")]])]))
        .unwrap();
    file.apply(&down(vec![rows(1, ops.slice(..100_000), true)]))
        .unwrap();
    limit(&file, 1);
    let rest = down(vec![rows(1, ops.slice(100_000..), false), commit(3)]);
    for _ in 0..3 {
        assert!(matches!(file.apply(&rest), Err(Error::Full(_))));
        assert_eq!(folder.query("SELECT id FROM t"), ["1", "2"]);
    }
    limit(&file, 1_000_000);
    file.apply(&rest).unwrap();
    assert_eq!(
        folder.query("SELECT id, length(v) FROM t"),
        ["3|200000", "4|1", "9|1"]
    );
    assert_tidy(&folder);
}

#[test]
fn a_file_may_be_handed_to_the_thread_that_owns_it() {
    fn is_send<T: Send>() {}
    is_send::<File>();
}

#[test]
fn a_backup_that_is_restored_under_us_is_not_taken_for_the_newest_rows() {
    let rows: &[&[ValueRef<'_>]] = &[&[I(1), T("new")], &[I(2), T("new")]];
    // What is noticed by: a commit, a heartbeat, a report, the end of a reset.
    for step in ["commit", "heartbeat", "report", "reset"] {
        // What is restored: an older state, one of before the first commit, another program's database, no row at all.
        for backup in ["older", "empty", "foreign", "no row"] {
            let what = format!("{backup}, {step}");
            let folder = Folder::new();
            let old = folder.directory.path().join("backup.db");
            let mut file = folder.open();
            if backup == "older" {
                file.apply(&start(1, &[&[I(1), T("old")], &[I(3), T("old")]]))
                    .unwrap();
            }
            match backup {
                "foreign" => Connection::open(&old)
                    .unwrap()
                    .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE own(id)")
                    .unwrap(),
                _ => folder.program(&format!("VACUUM INTO '{}'", old.display())),
            }
            file.begin_stream().unwrap();
            file.apply(&start(10, rows)).unwrap();
            let id = file.replica_id().to_owned();
            if step == "reset" {
                file.apply(&down(vec![begin(&[1]), upserts(1, rows)]))
                    .unwrap();
            }
            match backup {
                "no row" => folder.program("DELETE FROM _anabranch_state"),
                _ => assert_eq!(
                    sqlite3(folder.path(), &format!(".restore '{}'", old.display())),
                    ""
                ),
            }
            file.written = None;
            let noticed = match step {
                "commit" => file
                    .apply(&down(vec![
                        begin(&[]),
                        upserts(1, &[&[I(5), N]]),
                        commit(11),
                    ]))
                    .map(drop),
                "heartbeat" => file.apply(&down(vec![heartbeat(11, 11)])).map(drop),
                "report" => file.report(true, None),
                _ => file.apply(&down(vec![commit(11)])).map(drop),
            };
            assert!(
                matches!(noticed, Err(Error::Stream(_))),
                "{what}: {noticed:?}"
            );
            // The position is not told over rows that are older.
            let (lsn, at) = match backup {
                "older" => ("'0/1'", Some(position(1))),
                _ => ("NULL", None),
            };
            let state = "SELECT lsn, caught_up FROM _anabranch_status";
            assert_eq!(folder.query(state), [format!("{lsn}|0")], "{what}");
            assert_eq!((file.position(), file.replica_id()), (at, &*id), "{what}");
            assert_eq!(file.resume_token(), "", "{what}");
            // The stream at hand is over.
            let more = file.apply(&down(vec![begin(&[]), commit(12)]));
            assert!(matches!(more, Err(Error::Stream(_))), "{what}: {more:?}");
            // It says so in the log once: then it is known.
            file.report(false, None).unwrap();
            file.begin_stream().unwrap();
            file.apply(&start(13, rows))
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(
                folder.query("SELECT * FROM t"),
                ["1|'new'", "2|'new'"],
                "{what}"
            );
            assert_eq!(file.position(), Some(position(13)), "{what}");
            assert_tidy(&folder);
        }
    }
}
