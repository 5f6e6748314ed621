//! What the file says of itself.

use super::*;

const STATUS: &str = "SELECT epoch, lsn, commit_time, connected, caught_up, pending, rejected, last_error FROM _anabranch_status";

#[test]
fn the_status_has_the_columns_that_tools_rely_on() {
    let folder = Folder::new();
    let mut file = folder.open();
    let columns = |name: &str| {
        folder.query(&format!(
            "SELECT group_concat(name) FROM pragma_table_info('{name}')"
        ))
    };
    assert_eq!(
        columns("_anabranch_status"),
        ["'epoch,lsn,commit_time,received_time,connected,caught_up,pending,rejected,last_error'"]
    );
    assert_eq!(
        columns("_anabranch_tables"),
        ["'table_name,state,reason,lsn'"]
    );
    assert_eq!(
        columns("_anabranch_columns"),
        ["'table_name,column_name,postgres_type,position,is_key'"]
    );
    assert_eq!(
        folder.query(STATUS),
        ["NULL|NULL|NULL|0|0|0|0|NULL"],
        "before the first commit"
    );
    file.apply(&start(0x16B_3748, &[])).unwrap();
    assert_eq!(
        folder.query(STATUS),
        ["'00000000c0ffee00'|'0/16B3748'|'2023-11-14 22:13:43.803720Z'|1|1|0|0|NULL"]
    );
    assert_eq!(
        folder.query("SELECT received_time GLOB '20??-??-?? ??:??:??.??????Z', abs(julianday('now') - julianday(received_time)) * 86400 < 60 FROM _anabranch_status"),
        ["1|1"]
    );
    assert_eq!(
        sqlite3(
            folder.path(),
            "SELECT lsn, connected FROM _anabranch_status"
        ),
        "0/16B3748|1\n"
    );
}

#[test]
fn a_killed_sidecar_cannot_lie() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[])).unwrap();
    let shows = |age: i64| {
        folder.program(&format!(
            "UPDATE _anabranch_state SET heartbeat_time = strftime('%Y-%m-%d %H:%M:%f', 'now', '{age} seconds') || '000Z'"
        ));
        folder.query("SELECT connected, caught_up FROM _anabranch_status")
    };
    assert_eq!(shows(0), ["1|1"]);
    assert_eq!(shows(-13), ["1|1"]);
    assert_eq!(shows(-16), ["0|0"]);
    assert_eq!(shows(-100_000), ["0|0"]);
    assert_eq!(shows(100), ["0|0"], "the clock was set back");
    folder.program("UPDATE _anabranch_state SET heartbeat_time = NULL");
    assert_eq!(
        folder.query("SELECT connected, caught_up FROM _anabranch_status"),
        ["0|0"]
    );
    // Opened again, it is not connected yet.
    file.report(true, None).unwrap();
    assert_eq!(shows(0), ["1|1"]);
    drop(file);
    let _file = folder.open();
    assert_eq!(shows(0), ["0|0"]);
}

#[test]
fn caught_up_means_as_far_as_postgres_is() {
    let folder = Folder::new();
    let mut file = folder.open();
    let caught_up = || folder.query("SELECT connected, caught_up FROM _anabranch_status");
    file.apply(&start(0x100_0000, &[])).unwrap();
    assert_eq!(caught_up(), ["1|1"]);
    let behind = element(Kind::Commit(v1::Commit {
        position: Some(position(0x100_0100).into()),
        commit_time: 0,
        source_lsn: 0x100_0200,
    }));
    file.apply(&down(vec![begin(&[]), behind])).unwrap();
    assert_eq!(caught_up(), ["1|0"]);
    assert_eq!(
        folder.query("SELECT commit_time FROM _anabranch_status"),
        ["NULL"]
    );
    file.apply(&down(vec![begin(&[]), commit(0x100_0200)]))
        .unwrap();
    assert_eq!(caught_up(), ["1|1"]);
    // The start of a page is as far as just behind its header.
    file.apply(&down(vec![begin(&[]), commit(0x100_2000)]))
        .unwrap();
    file.apply(&down(vec![heartbeat(0x100_2000, 0x100_2018)]))
        .unwrap();
    file.report(true, None).unwrap();
    assert_eq!(caught_up(), ["1|1"]);
    file.apply(&down(vec![heartbeat(0x100_2000, 0x100_2020)]))
        .unwrap();
    file.report(true, None).unwrap();
    assert_eq!(caught_up(), ["1|0"]);
    // The streamer lost Postgres.
    let lost = element(Kind::Heartbeat(v1::Heartbeat {
        position: Some(position(0x100_3000).into()),
        source_lsn: 0x100_3000,
        source_connected: false,
    }));
    file.apply(&down(vec![lost])).unwrap();
    file.report(true, None).unwrap();
    assert_eq!(caught_up(), ["1|0"]);
    file.apply(&down(vec![heartbeat(0x100_3000, 0x100_3000)]))
        .unwrap();
    file.report(true, None).unwrap();
    assert_eq!(caught_up(), ["1|1"]);
    file.report(false, Some("no route to host")).unwrap();
    assert_eq!(caught_up(), ["0|0"]);
    assert_eq!(
        folder.query("SELECT last_error FROM _anabranch_status"),
        ["'no route to host'"]
    );
    file.begin_stream().unwrap();
    file.report(true, None).unwrap();
    assert_eq!(caught_up(), ["1|0"], "nothing was heard on the new stream");
}

#[test]
fn a_position_is_told_only_when_it_is_in_the_file() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(10, &[])).unwrap();
    let in_file = || folder.query("SELECT lsn FROM _anabranch_status");
    // Just after a commit a heartbeat waits.
    let applied = file.apply(&down(vec![heartbeat(11, 11)])).unwrap();
    assert_eq!(
        (applied.position, file.position()),
        (None, Some(position(10)))
    );
    assert_eq!(in_file(), ["'0/A'"]);
    assert_eq!(file.resume_token(), "token 10");
    // Until the next report,
    file.report(true, None).unwrap();
    assert_eq!(file.position(), Some(position(11)));
    assert_eq!(in_file(), ["'0/B'"]);
    assert_eq!(file.resume_token(), "token 11");
    // or the next commit,
    file.apply(&down(vec![heartbeat(12, 12)])).unwrap();
    file.apply(&down(vec![heartbeat(13, 13), begin(&[]), commit(14)]))
        .unwrap();
    assert_eq!(in_file(), ["'0/E'"]);
    // or until nothing was written for half a second.
    file.written = None;
    let applied = file.apply(&down(vec![heartbeat(15, 15)])).unwrap();
    assert_eq!(applied.position, Some(position(15)));
    assert_eq!(in_file(), ["'0/F'"]);
    // One that came with a commit is committed with it.
    let applied = file
        .apply(&down(vec![begin(&[]), commit(16), heartbeat(17, 17)]))
        .unwrap();
    assert_eq!(
        (applied.position, applied.transactions),
        (Some(position(17)), 1)
    );
    assert_eq!(in_file(), ["'0/11'"]);
    assert_eq!(file.resume_token(), "token 17");
}

#[test]
fn a_stopped_table_is_told_with_its_reason_and_its_rows_stay() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(1, &[&[I(1), T("a")]])).unwrap();
    let state = |state: v1::table_state::State, reason: &str| {
        element(Kind::State(v1::TableState {
            table: 1,
            state: state.into(),
            reason: reason.into(),
        }))
    };
    let tables = || folder.query("SELECT * FROM _anabranch_tables");
    assert_eq!(tables(), ["'t'|'live'|NULL|'0/1'"]);
    let stop = state(
        v1::table_state::State::Stopped,
        "column v was dropped: say so",
    );
    file.apply(&down(vec![begin(&[]), stop, commit(2)]))
        .unwrap();
    file.apply(&down(vec![begin(&[]), commit(3)])).unwrap();
    assert_eq!(
        tables(),
        ["'t'|'stopped'|'column v was dropped: say so'|'0/2'"]
    );
    file.begin_stream().unwrap();
    file.apply(&resume(4)).unwrap();
    assert_eq!(
        tables(),
        ["'t'|'stopped'|'column v was dropped: say so'|'0/2'"]
    );
    assert_eq!(folder.query("SELECT * FROM t"), ["1|'a'"]);
    let live = state(v1::table_state::State::Live, "");
    file.apply(&down(vec![begin(&[]), live, commit(5)]))
        .unwrap();
    assert_eq!(tables(), ["'t'|'live'|NULL|'0/5'"]);
    // A reset makes it live too, unless the same transaction says otherwise.
    let stop = || state(v1::table_state::State::Stopped, "again");
    file.apply(&down(vec![begin(&[]), stop(), commit(6)]))
        .unwrap();
    file.apply(&down(vec![begin(&[1]), commit(7)])).unwrap();
    assert_eq!(tables(), ["'t'|'live'|NULL|'0/7'"]);
    file.apply(&down(vec![begin(&[1]), stop(), commit(8)]))
        .unwrap();
    assert_eq!(tables(), ["'t'|'stopped'|'again'|'0/8'"]);
}

#[test]
fn a_source_that_was_heard_long_ago_does_not_count_as_reached() {
    let folder = Folder::new();
    let mut file = folder.open();
    file.apply(&start(10, &[])).unwrap();
    let heard = file.stream.heard.unwrap();
    let max = crate::file::HEARD_AGE_MAX;
    let just_over = max + std::time::Duration::from_micros(1);
    for (now, expected) in [
        (heard.time, true),
        (heard.time + max, true),
        (heard.time + just_over, false),
        (heard.time - just_over, false),
    ] {
        let mut state = file.state.clone();
        file.note(&mut state, now);
        assert_eq!(state.caught_up, expected, "{now}");
    }
    // What a report writes is judged by it: a long transaction comes in, and nothing is heard but that.
    file.apply(&down(vec![begin(&[]), upserts(1, &[&[I(1), N]])]))
        .unwrap();
    if let Some(heard) = &mut file.stream.heard {
        heard.time -= just_over;
    }
    file.report(true, None).unwrap();
    assert_eq!(
        folder.query("SELECT connected, caught_up FROM _anabranch_status"),
        ["1|0"]
    );
}
