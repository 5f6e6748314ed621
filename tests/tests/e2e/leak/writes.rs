//! Writes of programs, most of which are rejected: what they are told must not tell of what is not theirs.

use anabranch_tests::wait::{DEADLINE, until};

use super::{Scene, data::TEAMS};

/// What a program writes, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Write {
    Accepted,
    /// DETAIL has the slot, which the writer chose.
    SlotOfAnother,
    /// DETAIL has the span of a row of another team.
    SpanOfAnother,
    /// DETAIL has the whole row, with the secret.
    Unchecked,
    KeyOfAnother,
    OutOfShape,
    /// Of a row that went to another team meanwhile.
    Missing,
}

impl Scene {
    /// A program writes a booking, and is answered.
    pub async fn write(&mut self, place: usize, write: Write) {
        let secret = self.data(|data| data.canary("bookings.secret"));
        self.database
            .execute(&format!("UPDATE words SET word = '{secret}'"))
            .await;
        let (note, of_span) = (self.written(place, "note"), self.written(place, "span"));
        self.next_id += 1;
        let team = self.tenants[place].team;
        let foreign =
            format!("SELECT id, slot, team FROM bookings WHERE team <> {team} ORDER BY id LIMIT 1");
        let foreign = &self.database.query(&foreign, &[]).await[0];
        let (foreign_id, foreign_slot, foreign_team): (i32, i32, i32) =
            (foreign.get(0), foreign.get(1), foreign.get(2));
        let own = self.next_id;
        let id = match write {
            Write::KeyOfAnother => i64::from(foreign_id),
            _ => own,
        };
        let team = match write {
            Write::OutOfShape => i64::from(foreign_team),
            _ => team,
        };
        let slot = match write {
            Write::SlotOfAnother => i64::from(foreign_slot),
            _ => own,
        };
        let span = match write {
            Write::SpanOfAnother => format!("[{foreign_id:04}a,{foreign_id:04}zz)"),
            _ => format!("[{own:04}{of_span},{own:04}z)"),
        };
        let note = match write {
            Write::Unchecked => format!("no {note}"),
            _ => note,
        };
        self.tenants[place].program(&format!(
            "INSERT INTO bookings (id, team, span, slot, note) VALUES ({id}, {team}, '{span}', {slot}, '{note}')"
        ));
        self.answered(place).await;
    }

    /// A word that a program makes up.
    fn written(&mut self, place: usize, column: &str) -> String {
        let of = format!("bookings.{column}, by {}", self.tenants[place].subject);
        let canary = self.canaries.make(&mut self.rng, &of);
        self.tenants[place].writes(&canary);
        canary
    }

    async fn answered(&mut self, place: usize) {
        let file = self.tenants[place].replica.open();
        until("the write is answered", DEADLINE, || async {
            let pending: i64 =
                file.query_row("SELECT pending FROM _anabranch_status", [], |row| {
                    row.get(0)
                })?;
            anyhow::ensure!(pending == 0, "{pending} pending");
            Ok(())
        })
        .await;
        self.observe().await;
    }

    /// While it is cut off a booking becomes another team's, with other words, and a program that does not know changes it.
    pub async fn write_missing(&mut self, place: usize) {
        let row = self
            .database
            .query("SELECT min(id) FROM bookings", &[])
            .await;
        let id: i32 = row[0].get(0);
        let mine = self.tenants[place].team;
        self.give(id, mine).await;
        self.tenants[place].until_at(self.number).await;
        self.cut(place).await;
        self.give(id, mine % TEAMS + 1).await;
        let note = self.written(place, "note");
        let sql = format!("UPDATE bookings SET note = '{note}' WHERE id = {id}");
        self.tenants[place].program(&sql);
        self.come_back(place, false).await;
        self.answered(place).await;
    }

    /// A booking becomes a team's.
    async fn give(&mut self, id: i32, team: i64) {
        let sql = self.data(|data| {
            let (note, secret) = (data.canary("bookings.note"), data.canary("bookings.secret"));
            format!(
                "UPDATE bookings SET team = {team}, note = '{note}', secret = '{secret}' WHERE id = {id};"
            )
        });
        self.commit_for_good(&sql).await;
    }
}
