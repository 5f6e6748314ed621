//! A replica, what it has a right to, and what it was sent.
//!
//! A *segment* is what came since a moment at which the file was at a known transaction. In it may be what was shown as of the
//! file's transaction, and as of each one since, at which the replica was there; not what was shown only before, and not what was
//! shown only while it was away. So a key that is deleted must be one that the file may have.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anabranch_tests::{
    peers::Replica,
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};

use memchr::memmem;

use super::{canary::Canaries, data::Definitions, wire::Connection};

/// Why a replica is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Away {
    /// It does not run, so its file stays where it is.
    Killed,
    /// It runs, and its connections are reset.
    Cut,
    /// It runs, and is not let in.
    Refused,
}

pub struct Tenant {
    pub replica: Replica,
    /// What it subscribes to.
    tables: &'static [&'static str],
    pub proxy: Proxy,
    pub subject: String,
    pub me: i64,
    pub team: i64,
    pub away: Option<Away>,
    /// Its subject is not let in.
    pub revoked: bool,
    /// Transactions at which it was shown something, since the one of its file as of which the segment began.
    seen: Vec<(i64, BTreeSet<String>)>,
    /// What was shown while it was away.
    missed: BTreeSet<String>,
    /// What may come in this segment.
    allowed: BTreeSet<String>,
    /// What ever might come.
    ever: BTreeSet<String>,
    /// What its programs wrote, and so know.
    written: BTreeSet<String>,
    /// What came.
    came: BTreeSet<String>,
    connections: BTreeMap<u64, Connection>,
    pub body_bytes: usize,
}

impl Tenant {
    /// Before it is started.
    pub fn new(
        replica: Replica,
        tables: &'static [&'static str],
        proxy: Proxy,
        subject: String,
        (me, team): (i64, i64),
    ) -> Tenant {
        proxy.record();
        Tenant {
            replica,
            tables,
            proxy,
            subject,
            me,
            team,
            away: None,
            revoked: false,
            seen: Vec::new(),
            missed: BTreeSet::new(),
            allowed: BTreeSet::new(),
            ever: BTreeSet::new(),
            written: BTreeSet::new(),
            came: BTreeSet::new(),
            connections: BTreeMap::new(),
            body_bytes: 0,
        }
    }

    /// By table, the SELECTs of its shapes as they are for this one.
    pub fn selects(&self, definitions: Definitions) -> Vec<(&'static str, String)> {
        let bound = |select: &str| {
            let select = select.replace("$me", &self.me.to_string());
            select.replace("$team", &self.team.to_string())
        };
        let own = (definitions.selects()).filter(|(table, _)| self.tables.contains(table));
        own.map(|(table, select)| (table, bound(select))).collect()
    }

    /// Postgres shows it this after that transaction.
    pub fn sees(&mut self, number: i64, shown: BTreeSet<String>) {
        if self.away.is_none() {
            self.allowed.extend(shown.iter().cloned());
            self.ever.extend(shown.iter().cloned());
            self.seen.push((number, shown));
        } else {
            self.missed.extend(shown);
        }
    }

    /// What was shown only while it was away, now that it is back.
    pub fn missed_for_good(&mut self) -> usize {
        let missed = std::mem::take(&mut self.missed);
        missed.difference(&self.allowed).count()
    }

    pub fn writes(&mut self, canary: &str) {
        self.written.insert(canary.to_owned());
    }

    /// A program writes the file.
    pub fn program(&self, sql: &str) {
        let program = rusqlite::Connection::open(self.replica.file()).expect("open the file");
        program.busy_timeout(DEADLINE).expect("set a timeout");
        program
            .execute_batch(sql)
            .unwrap_or_else(|error| panic!("{error}\n{sql}"));
    }

    /// The last transaction that the file has.
    pub fn at(&self) -> anyhow::Result<i64> {
        let sql = "SELECT coalesce(max(n), -1) FROM number";
        Ok(self.replica.open().query_row(sql, [], |row| row.get(0))?)
    }

    pub async fn until_at(&self, number: i64) {
        let what = format!("{} has transaction {number}", self.subject);
        until(&what, DEADLINE * 2, || async {
            let at = self.at()?;
            anyhow::ensure!(at >= number, "it has {at}");
            Ok(())
        })
        .await;
    }

    /// From here on it is away. Its connections are gone already.
    pub async fn leaves(&mut self, away: Away) {
        if away != Away::Refused {
            until("no connection is left", DEADLINE, || async {
                self.proxy.open() == 0
            })
            .await;
        }
        self.away = Some(away);
    }

    /// A new segment begins: before it is there again, or while it is there.
    pub fn begins_anew(&mut self, canaries: &Canaries) {
        let at = self.at().expect("read the file");
        self.judge(canaries);
        let stays = self.away.take() == Some(Away::Killed);
        self.seen
            .retain(|(number, _)| *number == at || (*number > at && !stays));
        self.allowed = self
            .seen
            .iter()
            .flat_map(|(_, shown)| shown.iter().cloned())
            .collect();
    }

    /// What came in this segment is what may.
    pub fn judge(&mut self, canaries: &Canaries) {
        let mut found = BTreeSet::new();
        for (number, bytes) in self.proxy.take_recorded(Way::Down) {
            let carried = self.connections.entry(number).or_default().read(&bytes);
            self.body_bytes += carried.body_bytes();
            found.extend(carried.texts().flat_map(|text| canaries.found(&text)));
        }
        let may = |canary: &String| self.allowed.contains(canary) || self.written.contains(canary);
        self.refuse(
            "was sent",
            canaries,
            found.iter().filter(|canary| !may(canary)),
        );
        self.came.extend(found);
    }

    /// What is in its files was shown at some time, and nothing is in its log.
    pub fn judge_files(&self, canaries: &Canaries) -> BTreeSet<String> {
        let may = |canary: &String| self.ever.contains(canary) || self.written.contains(canary);
        let mut there = BTreeSet::new();
        for (name, bytes) in files(self.replica.dir()) {
            if name == "log" {
                assert!(
                    memmem::find(&bytes, b"TRACE").is_some(),
                    "it logs less than it can"
                );
                let found = canaries.found_in_log(&bytes);
                self.refuse("has in its log", canaries, &found);
                continue;
            }
            let found = canaries.found(&bytes);
            let what = format!("has in {name}");
            self.refuse(&what, canaries, found.iter().filter(|canary| !may(canary)));
            there.extend(found);
        }
        there
    }

    /// It is there and has all: what is shown now came, and is in the file.
    pub fn judge_blindness(&self, there: &BTreeSet<String>) -> usize {
        let (_, now) = self.seen.last().expect("it sees something");
        for canary in now {
            assert!(
                there.contains(canary),
                "{}: {canary} is not found in the file",
                self.subject
            );
            let known = self.came.contains(canary) || self.written.contains(canary);
            assert!(known, "{}: {canary} was not seen to come", self.subject);
        }
        now.len()
    }

    fn refuse<'a>(
        &self,
        what: &str,
        canaries: &Canaries,
        leaked: impl IntoIterator<Item = &'a String>,
    ) {
        let leaked: Vec<_> = leaked
            .into_iter()
            .map(|canary| format!("{canary}, made for {}", canaries.of(canary)))
            .collect();
        assert!(
            leaked.is_empty(),
            "{} (me {}, team {}) {what} {} words that must not be there:\n{}",
            self.subject,
            self.me,
            self.team,
            leaked.len(),
            leaked.join("\n")
        );
    }
}

/// All files of a directory, read.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).expect("read a directory").flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        // One may go between the two: SQLite's.
        .filter_map(|entry| {
            Some((
                entry.file_name().to_string_lossy().into_owned(),
                fs::read(entry.path()).ok()?,
            ))
        })
        .collect()
}
