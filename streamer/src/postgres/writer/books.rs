//! What is asked and noted beside the writing itself: where a replica's writes stand, what became of entries, ids of
//! sequences, what is forgotten, and the facts of tables. One connection for all, made when it is first needed: each of
//! these is a short statement, and seldom.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anabranch_proto::{Lsn, Nonce};

use super::{
    FLUSH, Replica, SETTINGS,
    facts::{self, Facts},
    nonces,
    outcome::Error,
    value::Param,
};
use crate::{
    postgres::{
        setup::{CLAIMS_KEPT_DAYS, SETTLED_KEPT},
        sql::{self, Client},
        target::Target as Server,
    },
    table::{Oid, Table},
    write::Hash,
};

/// As many claims are forgotten by one statement.
const PRUNED_AT_ONCE: i32 = 1000;

/// Which entries are claimed.
const JUDGE: &str =
    "SELECT nonce::pg_catalog.text, outcome, sqlstate FROM anabranch.judge($1::pg_catalog.uuid[])";

/// Asked behind that, when it is durable: up to where the WAL is; and from when on claims are kept for sure.
const JUDGED: &str = "SELECT pg_catalog.pg_current_wal_flush_lsn()::pg_catalog.text, \
     greatest(0, floor(extract('epoch' from pg_catalog.now() - pg_catalog.make_interval(days => $1))))::pg_catalog.int8";

/// Forgets claims that are too old, some at a time.
const PRUNE: &str = "SELECT anabranch.prune($1, $2)";

const SETTLE: &str = "SELECT anabranch.settle($1::pg_catalog.text, $2::pg_catalog.text, $3::pg_catalog.int8, $4::pg_catalog.int4)";

const STANDING: &str =
    "SELECT subject, seq, hash FROM anabranch.replicas WHERE replica = $1::pg_catalog.text";

const LEASE: &str = "SELECT first, last, step FROM anabranch.lease($1::pg_catalog.oid, $2::pg_catalog.int2, $3::pg_catalog.text, $4::pg_catalog.int4)";

/// Facts by table and role, as of a version of the table.
type FactsKnown = HashMap<(Oid, Option<String>), (u32, Arc<Facts>)>;

/// What writers of a server share.
pub struct Books {
    server: Server,
    client: tokio::sync::Mutex<Option<Arc<Client>>>,
    facts: Mutex<FactsKnown>,
}

/// Ids of a sequence, `step` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// The first.
    pub first: i64,
    /// The last, the first too if there is one only.
    pub last: i64,
    /// Never 0.
    pub step: i64,
}

/// What became of entries that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// Those that were answered.
    pub claimed: Vec<Claimed>,
    /// Of entries that were captured at or after this it is known; in seconds since 1970.
    pub kept_since: u64,
    /// Their effects are in the WAL up to here, durably.
    pub lsn: Lsn,
}

/// An entry that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Which.
    pub nonce: Nonce,
    /// As what it was rejected; `None`: it took effect.
    pub outcome: Option<String>,
    /// Why.
    pub sqlstate: Option<String>,
}

impl Books {
    /// Not connected yet.
    pub fn new(server: Server) -> Books {
        Books {
            server,
            client: tokio::sync::Mutex::default(),
            facts: Mutex::default(),
        }
    }

    /// The last transaction of a replica that is answered, and its hash.
    pub async fn standing(&self, replica: &Replica) -> Result<Option<(u64, Hash)>, Error> {
        let row = self
            .ask(async |client| client.query_opt(STANDING, &[&replica.id]).await)
            .await?;
        let Some(row) = row else {
            return Ok(None);
        };
        if row.get::<_, &str>(0) != replica.subject {
            return Err(Error::OtherSubject);
        }
        let hash = row.get::<_, &[u8]>(2).try_into();
        let hash = hash.map_err(|_| Error::Definite("anabranch.replicas holds no hash".into()))?;
        Ok(Some((row.get::<_, i64>(1).cast_unsigned(), hash)))
    }

    /// What became of entries, whichever copy of the file sent them.
    pub async fn judge(&self, asked: &[Nonce]) -> Result<Judged, Error> {
        let asked = nonces(asked.iter().copied());
        let days = CLAIMS_KEPT_DAYS as i32;
        let (rows, judged) = self
            .ask(async |client| {
                let rows = client.query(JUDGE, &[&asked]).await?;
                // A claim is seen before it is durable: a crash could take it back behind what we say, and with it that WAL.
                client.batch_execute(FLUSH).await?;
                Ok((rows, client.query_one(JUDGED, &[&days]).await?))
            })
            .await?;
        let mut claimed = Vec::with_capacity(rows.len());
        for row in rows {
            let nonce = row.get::<_, &str>(0).replace('-', "");
            let nonce = u128::from_str_radix(&nonce, 16);
            let nonce = nonce.map_err(|_| Error::Definite("a nonce is no uuid".into()))?;
            claimed.push(Claimed {
                nonce: Nonce::from_bytes(nonce.to_be_bytes()),
                outcome: row.get(1),
                sqlstate: row.get(2),
            });
        }
        let lsn = judged.get::<_, &str>(0).parse();
        Ok(Judged {
            claimed,
            kept_since: judged.get::<_, i64>(1).cast_unsigned(),
            lsn: lsn.map_err(|_| Error::Definite("an LSN can't be read".into()))?,
        })
    }

    /// Forgets claims and settled rejections that are older than they are kept, some of them. True: there may be more.
    pub async fn prune(&self) -> Result<bool, Error> {
        let days = CLAIMS_KEPT_DAYS as i32;
        let row = self
            .ask(async |client| client.query_one(PRUNE, &[&days, &PRUNED_AT_ONCE]).await)
            .await?;
        Ok(row.get::<_, i64>(0) >= i64::from(PRUNED_AT_ONCE))
    }

    /// The replica has the rejections up to `seq`. Forgets those that are far behind that. Of an id that belongs to another
    /// subject nothing is: a rejection that is forgotten before its replica has it would look as if it had been applied.
    pub async fn settle(&self, replica: &Replica, seq: u64) -> Result<(), Error> {
        let params = [
            Param::Text(replica.id.clone()),
            Param::Text(replica.subject.clone()),
            Param::Text(seq.to_string()),
            Param::Text(SETTLED_KEPT.to_string()),
        ];
        self.ask(async |client| client.execute_raw(SETTLE, &params).await)
            .await?;
        Ok(())
    }

    /// Takes ids from the sequence that fills in the key of a table, for good. None: there is no such sequence, or the
    /// replica may not insert.
    pub async fn lease(
        &self,
        replica: &Replica,
        table: &Table,
        wanted: u32,
    ) -> Result<Vec<Block>, Error> {
        let Some(key) = table.integer_key() else {
            return Ok(Vec::new());
        };
        let oid = Param::Text(table.oid.to_string());
        let attnum = Param::Text(table.columns[key].attnum.to_string());
        let role = (replica.role.clone()).map_or(Param::Null, Param::Text);
        let wanted = Param::Text(wanted.to_string());
        let rows = self
            .ask(async |client| {
                let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
                    [&oid, &attnum, &role, &wanted];
                client.query(LEASE, &params).await
            })
            .await?;
        let block = |row: &tokio_postgres::Row| Block {
            first: row.get(0),
            last: row.get(1),
            step: row.get(2),
        };
        Ok(rows.iter().map(block).collect())
    }

    /// The facts of a table, for a role; `None`: the one that logs in.
    pub(super) async fn facts(
        &self,
        table: &Table,
        role: Option<&str>,
    ) -> Result<Arc<Facts>, Error> {
        let place = (table.oid, role.map(str::to_owned));
        if let Some((version, facts)) = self.known().get(&place)
            && *version == table.version
        {
            return Ok(Arc::clone(facts));
        }
        let client = self.client().await?;
        let read = facts::read(&client.client, table, role).await;
        let facts = Arc::new(self.kept(&client, read).await?);
        let kept = (table.version, Arc::clone(&facts));
        self.known().insert(place, kept);
        Ok(facts)
    }

    /// Reads all facts anew.
    pub(super) fn forget_facts(&self) {
        self.known().clear();
    }

    fn known(&self) -> MutexGuard<'_, FactsKnown> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask<T>(
        &self,
        ask: impl AsyncFnOnce(&tokio_postgres::Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, Error> {
        let client = self.client().await?;
        let asked = ask(&client.client).await;
        Ok(self.kept(&client, asked.map_err(sql::Error::from)).await?)
    }

    async fn client(&self) -> Result<Arc<Client>, sql::Error> {
        let mut held = self.client.lock().await;
        if let Some(client) = held.as_ref().filter(|held| !held.client.is_closed()) {
            return Ok(Arc::clone(client));
        }
        let client = Client::connect_to_write(&self.server, "anabranch books").await?;
        client.client.batch_execute(SETTINGS).await?;
        Ok(Arc::clone(held.insert(Arc::new(client))))
    }

    /// After what may pass another connection is made: the name of the server may stand for another one by now.
    async fn kept<T>(
        &self,
        client: &Arc<Client>,
        asked: Result<T, sql::Error>,
    ) -> Result<T, sql::Error> {
        if matches!(asked, Err(sql::Error::Transient(_))) {
            let mut held = self.client.lock().await;
            held.take_if(|held| Arc::ptr_eq(held, client));
        }
        asked
    }
}
