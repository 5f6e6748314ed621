use anabranch_proto::Position;

use super::*;
use crate::{
    mirror::{Mirror, Settings},
    postgres::witness::Witness,
};

const SLOT: &str = "anabranch";

/// Everything is as it should be: position 0/200, slot made at 0/100 and confirmed up to 0/180.
fn healthy() -> (Observed, Remembered) {
    let source = Source {
        system: 7,
        timeline: 2,
        database: 5,
        nonce: "aa".into(),
    };
    let observed = Observed {
        system: 7,
        timeline: 2,
        database: 5,
        database_name: "app".into(),
        flushed: Lsn(0x300),
        in_recovery: false,
        nonce: Some("aa".into()),
        continuity: Some("n1".into()),
        publication: Some(77),
        slot: Some(Slot {
            name: SLOT.into(),
            plugin: Some("pgoutput".into()),
            database: Some("app".into()),
            temporary: false,
            two_phase: false,
            active_pid: None,
            lost: None,
            confirmed: Some(Lsn(0x180)),
            retained_bytes: Some(0),
        }),
    };
    let remembered = Remembered {
        source: Some(source),
        slot: Some(Incarnation {
            name: SLOT.into(),
            consistent_point: "0/100".into(),
        }),
        intent: None,
        nonces: vec!["n1".into()],
        publication: Some(77),
        published: [(1, WITNESS)].into(),
        complete: true,
        position: Lsn(0x200),
    };
    (observed, remembered)
}

fn slot(observed: &mut Observed) -> &mut Slot {
    observed.slot.as_mut().expect("slot")
}

const WITNESS: Witness = Witness {
    membership: 2,
    file: 3,
    columns: 4,
};

type Change = fn(&mut Observed, &mut Remembered);

#[test]
fn what_is_proved_goes_on() {
    let cases: &[(&str, Change)] = &[
        ("clean restart", |_, _| {}),
        ("crash of Postgres, the slot went back", |o, _| {
            slot(o).confirmed = Some(Lsn(0x100));
        }),
        ("all is confirmed", |o, _| {
            slot(o).confirmed = Some(Lsn(0x200))
        }),
        ("idle server, its WAL ends at our position", |o, _| {
            o.flushed = Lsn(0x200)
        }),
        ("killed within a renewal, before the UPDATE", |_, r| {
            r.nonces = vec!["n1".into(), "n2".into()];
        }),
        ("killed within a renewal, after the UPDATE", |o, r| {
            r.nonces = vec!["n1".into(), "n2".into()];
            o.continuity = Some("n2".into());
        }),
        ("LSN with its high bits set", |o, r| {
            o.flushed = Lsn(u64::MAX);
            r.position = Lsn(u64::MAX);
            slot(o).confirmed = Some(Lsn(1 << 63));
        }),
    ];
    for (name, change) in cases {
        let (mut observed, mut remembered) = healthy();
        change(&mut observed, &mut remembered);
        assert_eq!(
            judge(&observed, &remembered, SLOT),
            Verdict::Continue,
            "{name}"
        );
    }
}

#[test]
fn broken_history_is_noticed_and_said() {
    let cases: &[(&str, &str, Change)] = &[
        (
            "somebody else consumed the slot",
            "beyond the mirror's position",
            |o, _| {
                slot(o).confirmed = Some(Lsn(0x201));
            },
        ),
        (
            "data_dir restored",
            "beyond the mirror's position",
            |_, r| {
                r.position = Lsn(0x17F);
            },
        ),
        ("slot made again", "beyond the mirror's position", |o, _| {
            slot(o).confirmed = Some(Lsn(0x2F0));
        }),
        (
            "another slot from before ours",
            "before 0/100, where ours began",
            |o, _| {
                slot(o).confirmed = Some(Lsn(0xFF));
            },
        ),
        ("slot missing", "slot anabranch is gone", |o, _| {
            o.slot = None
        }),
        (
            "slot lost",
            "invalidated by the server: wal_removed",
            |o, _| {
                slot(o).lost = Some("wal_removed".into());
            },
        ),
        ("failover without the slot", "timeline 3", |o, _| {
            o.timeline = 3;
            o.slot = None;
        }),
        (
            "failover that lost commits of ours",
            "timeline 3",
            |o, _| {
                o.timeline = 3;
                o.flushed = Lsn(0x1F0);
            },
        ),
        ("failover with the slot behind us", "timeline 3", |o, _| {
            o.timeline = 3
        }),
        ("old primary", "left behind by a failover", |o, _| {
            o.timeline = 1
        }),
        ("restore to a point in time", "timeline 3", |o, _| {
            o.timeline = 3;
            o.flushed = Lsn(0x150);
        }),
        (
            "WAL ends before our position",
            "put back to an earlier state",
            |o, _| {
                o.flushed = Lsn(0x1FF);
            },
        ),
        (
            "disk put back, same timeline, LSNs written anew",
            "nonce in anabranch.streamers",
            |o, _| {
                o.continuity = Some("n0".into());
            },
        ),
        (
            "disk put back to before our row",
            "row of anabranch.streamers is gone",
            |o, _| {
                o.continuity = None;
            },
        ),
        (
            "a second streamer claimed our slot",
            "nonce in anabranch.streamers",
            |o, r| {
                o.continuity = Some("other".into());
                r.nonces = vec!["n1".into(), "n2".into()];
            },
        ),
        ("restored from a dump", "another cluster", |o, _| {
            o.system = 8;
            o.slot = None;
        }),
        ("upgraded with slots kept", "another cluster", |o, _| {
            o.system = 8
        }),
        (
            "database created again from a dump",
            "another database",
            |o, _| o.database = 6,
        ),
        ("schema dropped", "anabranch.source is gone", |o, _| {
            o.nonce = None
        }),
        ("schema created again", "not the one", |o, _| {
            o.nonce = Some("ab".into())
        }),
        ("slot of another plugin", "of another kind", |o, _| {
            slot(o).plugin = Some("wal2json".into());
        }),
        ("physical slot", "of another kind", |o, _| {
            slot(o).plugin = None;
            slot(o).database = None;
            slot(o).confirmed = None;
        }),
        ("slot of another database", "of another kind", |o, _| {
            slot(o).database = Some("other".into());
        }),
        ("slot of two-phase commit", "of another kind", |o, _| {
            slot(o).two_phase = true
        }),
        (
            "config names another slot",
            "data_dir belongs to slot old",
            |_, r| {
                r.slot = Some(Incarnation {
                    name: "old".into(),
                    consistent_point: "0/100".into(),
                });
            },
        ),
        ("facts lost", "does not say which slot", |_, r| {
            r.slot = None
        }),
        ("publication dropped", "publication was dropped", |o, _| {
            o.publication = None
        }),
        ("publication created again", "created again", |o, _| {
            o.publication = Some(78)
        }),
    ];
    for (name, expected, change) in cases {
        let (mut observed, mut remembered) = healthy();
        change(&mut observed, &mut remembered);
        match judge(&observed, &remembered, SLOT) {
            Verdict::Broken { what, remedy } => {
                assert!(what.contains(expected), "{name}: {what}");
                assert!(remedy.contains("data_dir"), "{name}: {remedy}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn what_may_pass_is_waited_for() {
    let cases: &[(&str, Change)] = &[
        ("standby", |o, _| o.in_recovery = true),
        ("standby that will be promoted", |o, _| {
            o.in_recovery = true;
            o.timeline = 1;
        }),
        ("slot active", |o, _| slot(o).active_pid = Some(4711)),
        (
            "killed in the initial copy, its walsender still there",
            |o, r| {
                r.complete = false;
                slot(o).confirmed = Some(Lsn(0x100));
                slot(o).active_pid = Some(4711);
            },
        ),
    ];
    for (name, change) in cases {
        let (mut observed, mut remembered) = healthy();
        change(&mut observed, &mut remembered);
        let verdict = judge(&observed, &remembered, SLOT);
        assert!(
            matches!(verdict, Verdict::Wait { .. }),
            "{name}: {verdict:?}"
        );
    }
}

#[test]
fn only_a_slot_that_is_provably_ours_is_ever_dropped() {
    let intended: Change = |o, r| {
        r.complete = false;
        r.slot = None;
        r.intent = Some(SLOT.into());
        r.position = Lsn(0);
        slot(o).confirmed = Some(Lsn(0x123));
    };
    let created: Change = |o, r| {
        r.complete = false;
        r.position = Lsn(0);
        slot(o).confirmed = Some(Lsn(0x100));
    };
    for (name, base) in [("intended", intended), ("created", created)] {
        let check = |case: &str, change: Change, expected: Option<Verdict>| {
            let (mut observed, mut remembered) = healthy();
            base(&mut observed, &mut remembered);
            change(&mut observed, &mut remembered);
            let verdict = judge(&observed, &remembered, SLOT);
            match expected {
                Some(expected) => assert_eq!(verdict, expected, "{name}: {case}"),
                None => assert!(
                    matches!(&verdict, Verdict::Broken { what, .. } if what.contains("slot anabranch exists")),
                    "{name}: {case}: {verdict:?}"
                ),
            }
        };
        check(
            "killed in the copy",
            |_, _| {},
            Some(Verdict::Fresh { drop_slot: true }),
        );
        check(
            "killed before the slot",
            |o, _| o.slot = None,
            Some(Verdict::Fresh { drop_slot: false }),
        );
        check(
            "killed before the slot, and then another cluster",
            |o, _| {
                o.slot = None;
                o.system = 9;
                o.nonce = None;
            },
            Some(Verdict::Fresh { drop_slot: false }),
        );
        check(
            "claimed by another streamer",
            |o, _| o.continuity = Some("x".into()),
            None,
        );
        check("no claim", |o, _| o.continuity = None, None);
        check("another cluster", |o, _| o.system = 9, None);
        check("another timeline", |o, _| o.timeline = 3, None);
        check("another database", |o, _| o.database = 6, None);
        check(
            "another plugin",
            |o, _| slot(o).plugin = Some("x".into()),
            None,
        );
        check("temporary", |o, _| slot(o).temporary = true, None);
        check(
            "slot of another database",
            |o, _| slot(o).database = Some("x".into()),
            None,
        );
        check(
            "nothing remembered",
            |_, r| *r = Remembered::default(),
            None,
        );
    }
    // Once its consistent point is known, a slot that somebody confirmed is not ours any more.
    let (mut observed, mut remembered) = healthy();
    remembered.complete = false;
    slot(&mut observed).confirmed = Some(Lsn(0x101));
    let verdict = judge(&observed, &remembered, SLOT);
    assert!(matches!(verdict, Verdict::Broken { .. }), "{verdict:?}");
    // An intent for another name says nothing of this one.
    let (mut observed, mut remembered) = healthy();
    intended(&mut observed, &mut remembered);
    remembered.intent = Some("other".into());
    let verdict = judge(&observed, &remembered, SLOT);
    assert!(matches!(verdict, Verdict::Broken { .. }), "{verdict:?}");
}

#[test]
fn a_new_streamer_starts_fresh() {
    let (mut observed, _) = healthy();
    observed.slot = None;
    observed.nonce = None;
    observed.continuity = None;
    observed.publication = None;
    let verdict = judge(&observed, &Remembered::default(), SLOT);
    assert_eq!(verdict, Verdict::Fresh { drop_slot: false });
}

#[test]
fn the_epoch_is_as_documented_and_differs_by_each_of_its_parts() {
    let source = Source {
        system: 7_123_456_789_012_345_678,
        timeline: 1,
        database: 16384,
        nonce: "00ff".into(),
    };
    let mut text = b"anabranch epoch\0".to_vec();
    text.extend(7_123_456_789_012_345_678u64.to_be_bytes());
    text.extend([0, 0, 0, 1, 0, 0, 0x40, 0]);
    text.extend(b"00ff");
    let digest = digest::digest(&digest::SHA256, &text);
    assert_eq!(source.epoch().0.to_be_bytes(), digest.as_ref()[..8]);
    let others = [
        Source {
            system: 1,
            ..source.clone()
        },
        Source {
            timeline: 2,
            ..source.clone()
        },
        Source {
            database: 2,
            ..source.clone()
        },
        Source {
            nonce: "00fe".into(),
            ..source.clone()
        },
    ];
    for other in others {
        assert_ne!(other.epoch(), source.epoch());
    }
}

fn mirror(directory: &std::path::Path) -> Mirror {
    Mirror::open(&Settings {
        directory: directory.into(),
        cache_bytes: 1 << 20,
        reader_cache_bytes: 1 << 20,
        index_bytes_max: 1 << 20,
        index_hours_max: 1,
        row_bytes_max: 1 << 20,
    })
    .expect("mirror")
}

/// What may be in the database at each moment is remembered at that moment, after a kill too.
#[test]
fn no_kill_forgets_what_may_be_in_the_database() {
    let directory = tempfile::tempdir().expect("directory");
    let source = healthy().1.source.expect("source");
    let again = |mirror: Mirror| {
        drop(mirror);
        let mirror = self::mirror(directory.path());
        let remembered = Remembered::read(&mirror).expect("remembered");
        (mirror, remembered)
    };

    let (mut mirror, remembered) = again(self::mirror(directory.path()));
    assert_eq!(remembered, Remembered::default());

    let first = Remembered::intend(&mut mirror, &source, SLOT).expect("intent");
    let (mut mirror, remembered) = again(mirror);
    assert_eq!(remembered.source.as_ref(), Some(&source));
    assert_eq!(remembered.intent.as_deref(), Some(SLOT));
    assert!(remembered.knows(Some(&first.to)));
    assert!(!remembered.knows(None));

    Remembered::end_renewal(&mut mirror, &first).expect("claimed");
    let made = Incarnation {
        name: SLOT.into(),
        consistent_point: "0/100".into(),
    };
    Remembered::created(&mut mirror, &made).expect("created");
    let (mut mirror, remembered) = again(mirror);
    assert_eq!(remembered.slot.as_ref(), Some(&made));
    assert_eq!(remembered.intent, None);
    assert!(!remembered.complete);

    mirror
        .begin_epoch(source.epoch(), None, Lsn(0x100))
        .expect("epoch");
    Remembered::published(&mut mirror, 77, &[(1, WITNESS)].into()).expect("published");
    Remembered::completed(&mut mirror).expect("completed");
    let second = Remembered::begin_renewal(&mut mirror).expect("renewal");
    let (mut mirror, remembered) = again(mirror);
    assert!(remembered.complete);
    assert_eq!(remembered.publication, Some(77));
    assert_eq!(remembered.published, [(1, WITNESS)].into());
    assert_eq!(remembered.position, Lsn(0x100));
    assert!(remembered.knows(Some(&first.to)) && remembered.knows(Some(&second.to)));

    // Cut off before its end was known: the same one is taken up again, and both are still accepted.
    let third = Remembered::begin_renewal(&mut mirror).expect("renewal");
    assert_eq!(third.to, second.to);
    assert!(third.from.contains(&first.to) && third.from.contains(&second.to));
    Remembered::end_renewal(&mut mirror, &third).expect("renewed");
    let (mirror, remembered) = again(mirror);
    assert_eq!(remembered.nonces, [second.to]);
    assert_eq!(
        mirror.position(),
        Position {
            epoch: source.epoch(),
            lsn: Lsn(0x100)
        }
    );
}
