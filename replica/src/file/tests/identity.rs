//! A file that was restored or copied: what of its writes is sent again under a new id, and what waits until it is here.

use rusqlite::types::Value;

use super::{local::*, *};

/// What another copy of the file made: the entries with these ids were claimed.
fn judge(file: &File, claimed: &[(i64, Option<&str>)], kept_since: u64, lsn: u64) -> Judgement {
    let asked = file.pending(0).unwrap();
    let claim = |(id, nonce): &(i64, anabranch_proto::Nonce)| {
        let (_, outcome) = claimed.iter().find(|(claimed, _)| claimed == id)?;
        let claim = Claim {
            outcome: outcome.map(str::to_owned),
            sqlstate: outcome.map(|_| "23514".to_owned()),
        };
        Some((*nonce, claim))
    };
    let judged = Judged {
        claimed: asked.iter().filter_map(claim).collect(),
        kept_since,
        lsn: Lsn(lsn),
    };
    let mut judgement = Judgement::default();
    judgement.add(&asked, &judged);
    judgement
}

/// `t` with rows 1 to 5, and a local transaction for each of `assigned`, which sets `a` of that row.
fn start_with(folder: &Folder, assigned: &[i64]) -> File {
    let sheet = Sheet::simple();
    let mut file = folder.open();
    let mut elements = vec![first(&[]), sheet.declare()];
    elements.extend(receipts());
    let rows: Vec<_> = (1..=5).map(|id| [I(id), T("old"), N, T("0")]).collect();
    let rows: Vec<&[_]> = rows.iter().map(|row| &row[..]).collect();
    elements.push(upserts(1, &rows));
    elements.push(commit(10));
    file.apply(&down(elements)).unwrap();
    for id in assigned {
        set(folder, *id);
        folder.assign(&mut file);
    }
    file
}

fn set(folder: &Folder, id: i64) {
    let row = vec![
        id.into(),
        text(&format!("own {id}")),
        Value::Null,
        text("0"),
    ];
    folder.write(|program| Sheet::simple().update(program, &[id.into()], &row));
}

fn shown(folder: &Folder) -> String {
    folder.query("SELECT group_concat(a, ',') FROM (SELECT a FROM t ORDER BY id)")[0].clone()
}

fn pending(folder: &Folder) -> String {
    folder.query("SELECT pending FROM _anabranch_status")[0].clone()
}

/// A new stream, which has nothing else to say.
fn again(file: &mut File, lsn: u64) {
    file.begin_stream().unwrap();
    let mut elements = vec![first(&[]), Sheet::simple().declare()];
    elements.extend(receipts());
    elements.push(commit(lsn));
    file.apply(&down(elements)).unwrap();
}

#[test]
fn what_was_answered_elsewhere_is_sent_again_or_flickers() {
    let folder = Folder::new();
    let mut file = start_with(&folder, &[1, 2, 3, 4]);
    let former = file.replica_id().to_owned();
    // A transaction that is in Postgres, and not in this file.
    assert!(file.go_on(9, &[7; 32]).unwrap().is_none());
    assert!(file.go_on(2, &[7; 32]).unwrap().is_none());
    let judgement = judge(&file, &[(1, None), (2, Some("error"))], 0, 30_000);
    let adopted = file.adopt(Some(&judgement)).unwrap().unwrap();
    assert_eq!(
        (adopted.free, adopted.elsewhere, adopted.unknown),
        (2, 2, 0)
    );
    assert_eq!(adopted.former, former);
    assert_ne!(file.replica_id(), former);
    assert_eq!(file.token_id(), Some(former.clone()));
    // The late rest of the old stream is nobody's.
    assert!(file.apply(&down(vec![heartbeat(40_000, 40_000)])).is_err());

    // What is free follows nothing, and nothing else is sent.
    let mut from = file.go_on(0, &[]).unwrap().unwrap();
    let sent = file.outgoing(&mut from, 1 << 20).unwrap();
    let seqs: Vec<_> = sent.iter().map(|piece| piece.seq).collect();
    assert_eq!(seqs, [7, 8]);
    drop(file);
    let mut file = folder.open();
    let mut from = file.go_on(0, &[]).unwrap().unwrap();
    assert_eq!(file.outgoing(&mut from, 1 << 20).unwrap(), sent);

    // Nothing changes to the eye until what the other copy did is here.
    again(&mut file, 20_000);
    assert_eq!(file.token_id(), None);
    assert_eq!(shown(&folder), "'own 1,own 2,own 3,own 4,old'");
    assert_eq!(pending(&folder), "4");
    let theirs = [I(1), T("own 1"), N, T("0")];
    file.apply(&down(vec![
        begin(&[]),
        upserts(1, &[&theirs]),
        commit(25_000),
    ]))
    .unwrap();
    assert_eq!(pending(&folder), "4");
    // A heartbeat may be what brings it there.
    file.apply(&down(vec![heartbeat(30_000, 30_000)])).unwrap();
    assert_eq!(shown(&folder), "'own 1,old,own 3,own 4,old'");
    assert_eq!(pending(&folder), "2");
    assert_eq!(
        folder.query("SELECT id, outcome, sqlstate FROM _anabranch_rejected"),
        ["2|'error'|'23514'"]
    );
    // Its receipts count from there.
    let receipt = receipt(&file, 7);
    file.apply(&down(vec![begin(&[]), receipt, commit(40_000)]))
        .unwrap();
    assert_eq!(pending(&folder), "1");
    assert_eq!(shown(&folder), "'own 1,old,old,own 4,old'");
    assert!(!file.local().unwrap().in_doubt);
}

#[test]
fn what_nobody_can_tell_is_sent_silently() {
    let folder = Folder::new();
    let mut file = start_with(&folder, &[1, 2, 3]);
    let kept_since = u64::MAX;
    let judgement = judge(&file, &[(1, None)], kept_since, 30);
    let adopted = file.adopt(Some(&judgement)).unwrap().unwrap();
    assert_eq!(
        (adopted.free, adopted.elsewhere, adopted.unknown),
        (0, 1, 2)
    );
    again(&mut file, 30);
    assert_eq!(pending(&folder), "0");
    assert_eq!(
        folder.query("SELECT id, outcome FROM _anabranch_rejected ORDER BY id"),
        ["2|'unknown'", "3|'unknown'"]
    );
    // A person says that it was not made.
    folder.program("UPDATE _anabranch_rejected SET action = 'retry' WHERE id = 3");
    file.tidy(None).unwrap();
    assert_eq!(pending(&folder), "1");
    assert_eq!(shown(&folder), "'old,old,own 3,old,old'");
}

#[test]
fn a_fork_is_seen_only_when_something_is_pending() {
    let folder = Folder::new();
    let mut file = start_with(&folder, &[]);
    assert!(!file.local().unwrap().in_doubt);
    let foreign = upserts(RECEIPTS, &[&[T(file.replica_id()), I(3), B(&[7; 32])]]);
    file.apply(&down(vec![begin(&[]), foreign, commit(20)]))
        .unwrap();
    assert!(file.local().unwrap().in_doubt);
    let former = file.replica_id().to_owned();
    file.adopt(None).unwrap().unwrap();
    assert_ne!(file.replica_id(), former);
    assert!(!file.local().unwrap().in_doubt);
    again(&mut file, 30);
    set(&folder, 1);
    assert!(file.adopt(None).unwrap().is_none(), "something is pending");
}

#[test]
fn entries_that_no_transaction_has_yet_and_merged_ones_are_cut_where_the_other_copy_stopped() {
    let folder = Folder::new();
    let mut file = start_with(&folder, &[1]);
    for id in [2, 3, 4] {
        set(&folder, id);
    }
    let head = 4;
    file.assign(&[3], true).unwrap();
    let judgement = judge(&file, &[(1, None), (2, None)], 0, 20);
    let adopted = file.adopt(Some(&judgement)).unwrap().unwrap();
    assert_eq!((adopted.free, adopted.elsewhere), (1, 2));
    file.assign(&[head], false).unwrap();
    let mut from = file.go_on(0, &[]).unwrap().unwrap();
    let sent = file.outgoing(&mut from, 1 << 20).unwrap();
    let merged: Vec<_> = sent.iter().map(|piece| piece.merged).collect();
    assert_eq!(merged, [true, false]);
    // Once more before anything settled: what was answered elsewhere is asked for again.
    let judgement = judge(&file, &[(1, None), (2, None), (3, None)], 0, 20);
    let adopted = file.adopt(Some(&judgement)).unwrap().unwrap();
    assert_eq!((adopted.free, adopted.elsewhere), (1, 3));
    again(&mut file, 20);
    assert_eq!(pending(&folder), "1");
    // The token was given to the first id.
    assert_eq!(file.token_id(), None);
}

#[test]
fn what_another_subject_is_not_shown_looks_as_if_it_were_pending() {
    let folder = Folder::new();
    let mut file = start_with(&folder, &[1, 2]);
    let receipt = receipt(&file, 2);
    file.apply(&down(vec![begin(&[]), receipt, commit(20)]))
        .unwrap();
    assert_eq!(pending(&folder), "0");
    // The stream of another subject has no row, as if it were lost.
    file.begin_stream().unwrap();
    let mut elements = vec![first(&[RECEIPTS]), Sheet::simple().declare()];
    elements.extend(receipts());
    elements.push(commit(30));
    file.apply(&down(elements)).unwrap();
    assert_eq!(pending(&folder), "2");
    assert_eq!(shown(&folder), "'own 1,own 2,old,old,old'");
    // It is the other subject: all of it was answered once.
    drop(file);
    let mut file = folder.open();
    file.adopt(None).unwrap().unwrap();
    again(&mut file, 40);
    assert_eq!(pending(&folder), "0");
    assert_eq!(shown(&folder), "'old,old,old,old,old'");
}

#[test]
fn what_was_rejected_stays_listed_whatever_token_is_used() {
    for is_back in [true, false] {
        let folder = Folder::new();
        let mut file = start_with(&folder, &[1, 2, 3]);
        let mut elements = vec![begin(&[]), receipt(&file, 3)];
        elements.extend([1, 2, 3].map(|seq| rejection(&file, seq, None)));
        elements.push(commit(20));
        file.apply(&down(elements)).unwrap();
        folder.program("DELETE FROM _anabranch_rejected WHERE id = 2");
        folder.program("UPDATE _anabranch_rejected SET action = 'keep' WHERE id = 3");
        let listed = "SELECT id, outcome, sqlstate, message IS NOT NULL, action FROM _anabranch_rejected ORDER BY id";
        let before = folder.query(listed);
        assert_eq!(before.len(), 2);

        // The stream of another subject has neither receipts nor rejections.
        let stream = |file: &mut File, answers: Vec<anabranch_proto::v1::Element>, lsn| {
            file.begin_stream().unwrap();
            let mut elements = vec![first(&[RECEIPTS, REJECTIONS]), Sheet::simple().declare()];
            elements.extend(receipts());
            elements.extend(answers);
            elements.push(commit(lsn));
            file.apply(&down(elements)).unwrap();
        };
        stream(&mut file, Vec::new(), 30);
        assert_eq!(folder.query(listed), before);
        // It could take effect yet, for all that is known: so it is not made again now.
        folder.program("UPDATE _anabranch_rejected SET action = 'retry' WHERE id = 3");
        assert_eq!(file.retry_rejected().unwrap(), 0);
        folder.program("UPDATE _anabranch_rejected SET action = 'keep' WHERE id = 3");
        if is_back {
            let mut answers = vec![receipt(&file, 3)];
            answers.extend([1, 2, 3].map(|seq| rejection(&file, seq, None)));
            stream(&mut file, answers, 40);
        } else {
            file.adopt(None).unwrap().unwrap();
            again(&mut file, 40);
        }
        assert_eq!(pending(&folder), "0");
        assert_eq!(folder.query(listed), before);
        folder.program("UPDATE _anabranch_rejected SET action = 'retry' WHERE id = 3");
        assert_eq!(file.retry_rejected().unwrap(), 1);
        assert_eq!(shown(&folder), "'old,old,own 3,old,old'");
    }
}
