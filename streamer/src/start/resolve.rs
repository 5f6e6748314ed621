//! What is to become of each table at a start: the shapes' names, the catalog and the mirror make a [`Resolved`]. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    mirror::{Entry, REMEDY, State},
    postgres::{
        catalog::{Name, Refusal, difference},
        witness::{Witness, untold},
    },
    table::{Oid, Table},
};

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// In the mirror, and as it was: followed on.
    pub keep: Vec<Arc<Table>>,
    /// New, or of no use as the mirror has it: copied.
    pub copy: Vec<Arc<Table>>,
    /// In the mirror, and can't be followed on; why.
    pub stop: Vec<(Arc<Table>, String)>,
    /// In the mirror, and was stopped before.
    pub stopped: Vec<Arc<Table>>,
    /// In the mirror, and not named any more.
    pub drop: Vec<Arc<Table>>,
    /// Not in the mirror, and can't be replicated.
    pub refused: Vec<Refusal>,
    /// What a person should know of it.
    pub notes: Vec<String>,
}

/// Decides. `read` answers `names` in order. `published` is each table's witness as the mirror remembers it, and
/// `witnesses` as it is now: a table of which Postgres did not tell everything lacks changes.
pub fn resolve(
    names: &[Name],
    read: Vec<Result<Table, Refusal>>,
    entries: &[Entry],
    published: &BTreeMap<Oid, Witness>,
    witnesses: &HashMap<Oid, Witness>,
) -> Resolved {
    let mut resolved = Resolved::default();
    for (name, read) in names.iter().zip(read) {
        let entry = entries
            .iter()
            .find(|entry| entry.table.schema == name.schema && entry.table.name == name.name)
            .filter(|entry| entry.state != State::Copying);
        match (entry, read) {
            (None, Ok(table)) => resolved.copy.push(Arc::new(table)),
            (None, Err(refusal)) => resolved.refused.push(refusal),
            // Another table of the same name: the old one goes, the new one comes.
            (Some(entry), Ok(table)) if table.oid != entry.table.oid => {
                let name = table.full_name();
                let note = format!("table {name} was dropped and made again: it is copied anew");
                resolved.notes.push(note);
                resolved.copy.push(Arc::new(table));
            }
            (Some(entry), read) if entry.state != State::Live => {
                let State::Stopped { reason, .. } = &entry.state else {
                    continue;
                };
                let name = entry.table.full_name();
                let now = match read {
                    Ok(_) => String::new(),
                    Err(refusal) => format!(" (and now: {})", refusal.reason),
                };
                let note = format!("table {name} stays stopped: {reason}{now}; {REMEDY}");
                resolved.notes.push(note);
                resolved.stopped.push(entry.table.clone());
            }
            (Some(entry), Err(refusal)) => {
                resolved.stop.push((entry.table.clone(), refusal.reason));
            }
            (Some(entry), Ok(table)) => {
                let oid = table.oid;
                if let Some(changed) = difference(&entry.table, &table) {
                    let reason = format!("while the streamer was away {changed}");
                    resolved.stop.push((entry.table.clone(), reason));
                } else if let Some(untold) = untold(published.get(&oid), witnesses.get(&oid)) {
                    let note = format!("table {}: {untold}: it is copied anew", table.full_name());
                    resolved.notes.push(note);
                    resolved.copy.push(Arc::new(table));
                } else {
                    resolved.keep.push(entry.table.clone());
                }
            }
        }
    }
    let used = |oid: Oid| {
        let stop = resolved.stop.iter().map(|(table, _)| table);
        (resolved.keep.iter())
            .chain(&resolved.copy)
            .chain(&resolved.stopped)
            .chain(stop)
            .any(|table| table.oid == oid)
    };
    let drop: Vec<_> = entries
        .iter()
        .filter(|entry| !used(entry.table.oid))
        .map(|entry| entry.table.clone())
        .collect();
    for table in &drop {
        let name = table.full_name();
        if !resolved.all().iter().any(|other| other.full_name() == name) {
            let note = format!("table {name} is named by no shape any more: it is forgotten");
            resolved.notes.push(note);
        }
    }
    resolved.drop = drop;
    resolved
}

impl Resolved {
    /// The tables that must be published.
    pub fn followed(&self) -> Vec<Arc<Table>> {
        self.keep.iter().chain(&self.copy).cloned().collect()
    }

    /// The tables that shapes are compiled against: also those that are stopped, as the mirror has them.
    pub fn all(&self) -> Vec<Arc<Table>> {
        let stop = self.stop.iter().map(|(table, _)| table);
        (self.keep.iter())
            .chain(&self.copy)
            .chain(&self.stopped)
            .chain(stop)
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Lsn;

    use super::*;
    use crate::table::{Collation, Column, Identity, Kind};

    fn table(oid: Oid, name: &str, columns: usize) -> Table {
        Table {
            oid,
            schema: "public".into(),
            name: name.into(),
            columns: (0..columns)
                .map(|i| Column {
                    name: format!("c{i}"),
                    attnum: i as i16 + 1,
                    type_oid: 20,
                    base_oid: 20,
                    typmod: -1,
                    postgres_type: "bigint".into(),
                    kind: Kind::Integer,
                    not_null: true,
                    collation: Collation::Bytes,
                })
                .collect(),
            key: vec![0],
            identity: Identity::Key,
            indexes: Vec::new(),
            version: 1,
        }
    }

    fn refusal(name: &str) -> Refusal {
        Refusal {
            table: format!("public.{name}"),
            reason: "does not exist".into(),
            remedy: None,
        }
    }

    fn entry(oid: Oid, name: &str, state: State) -> Entry {
        Entry {
            table: Arc::new(table(oid, name, 2)),
            state,
            floor: Lsn(1),
        }
    }

    const WITNESS: Witness = Witness {
        membership: 9,
        file: 1,
        columns: 1,
    };

    fn stopped() -> State {
        State::Stopped {
            lsn: Lsn(5),
            reason: "x".into(),
        }
    }

    /// One table `t`, what the catalog says of it, and the mirror's entries; its witness then and now.
    fn resolve_one(
        read: Result<Table, Refusal>,
        entries: &[Entry],
        then: Option<Witness>,
        now: Option<Witness>,
    ) -> [Vec<Oid>; 5] {
        let names = [Name {
            schema: "public".into(),
            name: "t".into(),
        }];
        let published = then.map(|then| (1, then)).into_iter().collect();
        let witnesses = now.map(|now| (1, now)).into_iter().collect();
        let resolved = resolve(&names, vec![read], entries, &published, &witnesses);
        let oids = |tables: &[Arc<Table>]| tables.iter().map(|table| table.oid).collect();
        assert_eq!(resolved.all().len() + resolved.refused.len(), 1);
        [
            oids(&resolved.keep),
            oids(&resolved.copy),
            resolved.stop.iter().map(|(table, _)| table.oid).collect(),
            oids(&resolved.stopped),
            oids(&resolved.drop),
        ]
    }

    #[test]
    fn each_table_is_kept_copied_stopped_or_dropped() {
        let live = entry(1, "t", State::Live);
        let same = || Ok(table(1, "t", 2));
        let none = Vec::new;
        let member = Some(WITNESS);
        for (case, read, entries, then, now, expected) in [
            (
                "as it was",
                same(),
                vec![live.clone()],
                member,
                member,
                [vec![1], none(), none(), none(), none()],
            ),
            (
                "new",
                same(),
                vec![],
                None,
                None,
                [none(), vec![1], none(), none(), none()],
            ),
            (
                "killed in its copy",
                same(),
                vec![entry(1, "t", State::Copying)],
                member,
                member,
                [none(), vec![1], none(), none(), none()],
            ),
            (
                "column added",
                Ok(table(1, "t", 3)),
                vec![live.clone()],
                member,
                member,
                [none(), none(), vec![1], none(), none()],
            ),
            (
                "dropped",
                Err(refusal("t")),
                vec![live.clone()],
                member,
                None,
                [none(), none(), vec![1], none(), none()],
            ),
            (
                "dropped and made again",
                Ok(table(2, "t", 2)),
                vec![live.clone()],
                member,
                None,
                [none(), vec![2], none(), none(), vec![1]],
            ),
            (
                "stopped before",
                same(),
                vec![entry(1, "t", stopped())],
                member,
                member,
                [none(), none(), none(), vec![1], none()],
            ),
            (
                "stopped before, and dropped",
                Err(refusal("t")),
                vec![entry(1, "t", stopped())],
                member,
                None,
                [none(), none(), none(), vec![1], none()],
            ),
            (
                "taken out of the publication",
                same(),
                vec![live.clone()],
                member,
                None,
                [none(), vec![1], none(), none(), none()],
            ),
            (
                "taken out and put back",
                same(),
                vec![live.clone()],
                member,
                Some(Witness {
                    membership: 10,
                    ..WITNESS
                }),
                [none(), vec![1], none(), none(), none()],
            ),
            (
                "rewritten",
                same(),
                vec![live.clone()],
                member,
                Some(Witness {
                    file: 2,
                    columns: 2,
                    ..WITNESS
                }),
                [none(), vec![1], none(), none(), none()],
            ),
            (
                "the witness never written down",
                same(),
                vec![live.clone()],
                None,
                None,
                [none(), vec![1], none(), none(), none()],
            ),
            (
                "another is not named any more",
                same(),
                vec![live.clone(), entry(3, "u", State::Live)],
                member,
                member,
                [vec![1], none(), none(), none(), vec![3]],
            ),
            (
                "renamed, and the shapes follow",
                same(),
                vec![entry(1, "old", State::Live)],
                member,
                member,
                [none(), vec![1], none(), none(), none()],
            ),
        ] {
            assert_eq!(resolve_one(read, &entries, then, now), expected, "{case}");
        }
    }

    #[test]
    fn a_new_table_that_can_t_be_replicated_is_refused() {
        let names = [Name {
            schema: "public".into(),
            name: "t".into(),
        }];
        let read = vec![Err(refusal("t"))];
        let resolved = resolve(&names, read, &[], &BTreeMap::new(), &HashMap::new());
        assert_eq!(resolved.refused.len(), 1);
        assert!(resolved.all().is_empty());
    }
}
