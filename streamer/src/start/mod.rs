//! From a config to a mirror that is complete at a position, with a slot that streams from there.
//!
//! In an order in which a kill at any moment leaves something that the next start understands, and nothing is done
//! to the database before everything that can be refused was looked at:
//!
//! 1. connect; look at the server; read the tables that the shapes name; open the mirror; judge its history
//!    ([`history`]); compile the shapes. All that is wrong is said, with what mends it.
//! 2. A *fresh* start writes its intent down, claims the slot's name, creates the slot with an exported snapshot, copies
//!    all tables from it, and begins the epoch at the slot's consistent point. Cut off, it is begun again from nothing;
//!    a slot that is left is dropped only if it is provably ours.
//! 3. One that goes on stops tables that changed meanwhile, forgets those that no shape names any more, and copies new
//!    ones: published first, then copied from the snapshot of a temporary slot. Whatever was open when that began to be
//!    created has ended at its consistent point L; so what commits after L started after the table was published,
//!    and is streamed with it. The mirror skips what is at or below L for that table.
//!
//! It makes no sessions and streams nothing. The mirror is only touched on blocking threads.

mod resolve;
mod slot;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use anabranch_proto::{Lsn, Position};
use tokio::sync::watch::Sender;

use self::resolve::Resolved;
pub use self::watch::{WATCH_EVERY, watch};
use crate::{
    config::Config,
    definition,
    mirror::{self, Mirror, Reader},
    policy::Policies,
    postgres::{
        catalog::{self, Name},
        check,
        copy::{self, Progress, Snapshot},
        history::{self, Incarnation, Remembered, Verdict},
        replication::Replication,
        setup::{self, Wanted, Writing},
        sql::{self, Client},
        witness::Witness,
    },
    receipts,
    shape::{self, Shape},
    table::{Defaults, Oid, Table},
    token,
};

/// A start failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Trying again later may help.
    #[error("{0}")]
    Transient(String),
    /// Somebody must do something; the text says what.
    #[error("{0}")]
    Definite(String),
}

impl From<sql::Error> for Error {
    fn from(error: sql::Error) -> Self {
        match error {
            sql::Error::Transient(text) => Error::Transient(text),
            sql::Error::Definite(text) => Error::Definite(text),
        }
    }
}

impl From<setup::Error> for Error {
    fn from(error: setup::Error) -> Self {
        match error {
            setup::Error::Sql(error) => error.into(),
            error => Error::Definite(error.to_string()),
        }
    }
}

impl From<mirror::Error> for Error {
    fn from(error: mirror::Error) -> Self {
        match error {
            // A full disk, above all: it may be free again in a minute.
            mirror::Error::Sqlite(_) => Error::Transient(error.to_string()),
            error => Error::Definite(error.to_string()),
        }
    }
}

/// What sessions need of a start.
pub struct Opening {
    /// Compiled against the tables as the mirror has them.
    pub shapes: Vec<Shape>,
    /// How replicas get their receipts; `None`: no shape takes writes.
    pub receipts: Option<Shape>,
    /// How conflicting writes are settled.
    pub policies: Policies,
    /// What columns hold that an INSERT leaves out.
    pub defaults: Defaults,
    /// Authenticates resume tokens.
    pub token_key: token::Key,
    /// For catch-ups.
    pub readers: Vec<Reader>,
}

/// Lets replicas in while the initial copy goes on.
pub type Early<'a> = Box<dyn FnOnce(Opening) -> Result<(), Error> + Send + 'a>;

/// Ready to stream.
pub struct Started {
    /// At `position`, all tables complete or stopped.
    pub mirror: Mirror,
    /// `None`: replicas were let in already.
    pub opening: Option<Opening>,
    /// The tables to follow.
    pub tables: HashMap<Oid, Arc<Table>>,
    /// Where streaming goes on.
    pub position: Position,
    /// No session may see the mirror before its position is at least this: tables that were copied now are as of up
    /// to here.
    pub serve_from: Lsn,
    /// The witness of each table, for [`watch`].
    pub witnesses: BTreeMap<Oid, Witness>,
}

/// Starts. What is copied can be watched in `progress`; each batch of it counts in `copied`. A fresh start lets replicas
/// in by `early`.
///
/// Dropped in the middle it leaves what a kill leaves; blocking threads end by themselves.
pub async fn start(
    config: &Config,
    progress: &Progress,
    copied: &Sender<u64>,
    early: Early<'_>,
) -> Result<Started, Error> {
    let postgres = &config.postgres;
    let client = Client::connect(&postgres.target, "anabranch start").await?;
    // What the slot holds back is warned about by whoever streams from it.
    let findings = check::server(&client, &postgres.slot, None).await?;
    if check::errors(findings).is_some() {
        // Whoever mends this wants to know everything else too.
        refuse(check::errors(check::check(config).await))?;
    }
    let mut replication = Replication::connect(&postgres.target, "anabranch start").await?;

    let mut names = names(config)?;
    let settings = config.mirror();
    let (mirror, remembered) = blocking(move || {
        make_private_directory(&settings.directory)?;
        let mirror = Mirror::open(&settings)?;
        let remembered = Remembered::read(&mirror)?;
        Ok::<_, Error>((mirror, remembered))
    })
    .await??;
    let observed = history::observe(
        &client,
        &mut replication,
        &postgres.slot,
        &postgres.publication,
    )
    .await?;
    let verdict = history::judge(&observed, &remembered, &postgres.slot);
    let fresh = match verdict {
        Verdict::Continue => None,
        Verdict::Fresh { drop_slot } => Some(drop_slot),
        Verdict::Wait { what } => return Err(Error::Transient(what)),
        broken @ Verdict::Broken { .. } => return Err(Error::Definite(broken.to_string())),
    };

    let entries = match fresh {
        None => mirror.tables(),
        Some(_) => Vec::new(),
    };
    let witnesses = match setup::published(&client, &postgres.publication).await? {
        Some(published) => (published.tables.iter())
            .map(|(table, (witness, _))| (*table, *witness))
            .collect(),
        None => HashMap::new(),
    };
    let mut read = catalog::read(&client, &names).await?;
    if config.takes_writes() && read.iter().all(Result::is_ok) {
        // Ours must be there to be looked at. Nothing of the application's is touched by making them.
        let wanted = Wanted {
            publication: &postgres.publication,
            published: &[],
            readable: &[],
            writing: writing(config, &names),
        };
        setup::ensure(&client, wanted).await?;
        let ours = receipts::names();
        read.extend(catalog::read(&client, &ours).await?);
        names.extend(ours);
    }
    let resolved = resolve::resolve(&names, read, &entries, &remembered.published, &witnesses);
    let findings = resolved.refused.iter().map(check::of_table).collect();
    refuse(check::errors(findings))?;
    compile(config, &resolved.all())?;
    let to_copy: Vec<Name> = resolved.copy.iter().map(|table| name(table)).collect();
    let mut findings = check::row_security(&client, &to_copy).await?;
    findings.extend(check::publication(&client, &postgres.publication, &names).await?);
    refuse(check::errors(findings))?;

    let mut start = Start {
        config,
        client,
        replication,
        mirror: Arc::new(Mutex::new(mirror)),
        progress,
        copied,
    };
    let opened = fresh.is_some();
    match fresh {
        Some(drop_slot) => start.fresh(drop_slot, &resolved, early).await?,
        None => start.resume(&resolved, &witnesses).await?,
    }
    start.finish(opened).await
}

/// The parts that a start works with.
struct Start<'a> {
    config: &'a Config,
    client: Client,
    replication: Replication,
    /// Only ever locked by one blocking thread at a time.
    mirror: Arc<Mutex<Mirror>>,
    progress: &'a Progress,
    copied: &'a Sender<u64>,
}

impl Start<'_> {
    async fn on_mirror<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Mirror) -> Result<T, mirror::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let mirror = self.mirror.clone();
        let work = move || work(&mut mirror.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(blocking(work).await??)
    }

    async fn fresh(
        &mut self,
        drop_slot: bool,
        resolved: &Resolved,
        early: Early<'_>,
    ) -> Result<(), Error> {
        let postgres = &self.config.postgres;
        let slot = postgres.slot.clone();
        if drop_slot {
            tracing::info!("an initial copy was cut off; it starts again from nothing");
            self.replication.drop_slot(&slot).await?;
        }
        let (publication, witnesses) = self.set_up(resolved).await?;
        let observed = history::observe(
            &self.client,
            &mut self.replication,
            &slot,
            &postgres.publication,
        )
        .await?;
        if observed.slot.is_some() {
            return Err(Error::Transient(format!(
                "slot {slot} has just been created by somebody else"
            )));
        }
        let source = observed.source();

        let (claim, intended) = (slot.clone(), source.clone());
        let claim = self
            .on_mirror(move |mirror| {
                let claim = Remembered::intend(mirror, &intended, &claim)?;
                Remembered::published(mirror, publication, &witnesses)?;
                Ok(claim)
            })
            .await?;
        history::claim(&self.client, &slot, &postgres.publication, &claim).await?;
        let claimed = claim.clone();
        self.on_mirror(move |mirror| Remembered::end_renewal(mirror, &claimed))
            .await?;

        let created = slot::create(&self.client, &mut self.replication, &slot, false).await?;
        if !history::stands(&self.client, &slot, &claim).await? {
            // Another streamer intended the same at the same time. This slot is what this connection has just made.
            self.replication.drop_slot(&slot).await?;
            return Err(Error::Definite(format!(
                "another streamer claimed slot {slot} at the same moment: give each a slot of its own (postgres.slot)"
            )));
        }
        let at = created.consistent_point;
        let incarnation = Incarnation {
            name: slot.clone(),
            consistent_point: at.to_string(),
        };
        self.on_mirror(move |mirror| Remembered::created(mirror, &incarnation))
            .await?;
        tracing::info!(slot, %at, "slot created");
        self.prepare_lookups(&resolved.all()).await?;
        early(self.opening(&resolved.all()).await?)?;
        self.copy(&created.snapshot, &resolved.copy, at).await?;

        let epoch = source.epoch();
        self.on_mirror(move |mirror| {
            mirror.begin_epoch(epoch, None, at)?;
            Remembered::completed(mirror)
        })
        .await?;
        self.copied.send_modify(|count| *count += 1);
        tracing::info!(%epoch, %at, tables = resolved.copy.len(), "initial copy complete");
        Ok(())
    }

    /// `judged`: the witnesses when `resolved` was made.
    async fn resume(
        &mut self,
        resolved: &Resolved,
        judged: &HashMap<Oid, Witness>,
    ) -> Result<(), Error> {
        let postgres = &self.config.postgres;
        for note in &resolved.notes {
            tracing::warn!("{note}");
        }
        let stop: Vec<_> = (resolved.stop.iter())
            .map(|(table, reason)| (table.oid, reason.clone()))
            .collect();
        // Also what is copied anew: once it is published again, nothing else would tell that it lacks changes.
        let drop: Vec<_> = (resolved.drop.iter())
            .chain(&resolved.copy)
            .map(|table| table.oid)
            .collect();
        self.on_mirror(move |mirror| {
            for (table, reason) in &stop {
                mirror.stop_table(*table, reason)?;
            }
            mirror.commit()?;
            for entry in mirror.tables() {
                if drop.contains(&entry.table.oid) {
                    mirror.drop_table(entry.table.oid)?;
                }
            }
            Ok(())
        })
        .await?;

        let (publication, mut witnesses) = self.set_up(resolved).await?;
        // What happened since then to a table that is kept has yet to be noticed.
        let kept = resolved.keep.iter().map(|table| table.oid);
        witnesses.extend(kept.filter_map(|oid| Some((oid, *judged.get(&oid)?))));
        self.on_mirror(move |mirror| Remembered::published(mirror, publication, &witnesses))
            .await?;
        self.prepare_lookups(&resolved.all()).await?;
        if !resolved.copy.is_empty() {
            // Unique, since the server may take a while to notice that an earlier connection ended.
            let random = uuid::Uuid::new_v4().simple().to_string();
            let temporary = format!("{:.40}_copy_{:.8}", postgres.slot, random);
            let created =
                slot::create(&self.client, &mut self.replication, &temporary, true).await?;
            self.copy(&created.snapshot, &resolved.copy, created.consistent_point)
                .await?;
        }
        let published = setup::published(&self.client, &postgres.publication).await?;
        let copied = |oid| resolved.copy.iter().any(|table| table.oid == oid);
        let gone: Vec<Name> = (resolved.drop.iter())
            .filter(|table| !copied(table.oid))
            .filter_map(|table| published.as_ref()?.tables.get(&table.oid))
            .map(|(_, name)| name.clone())
            .collect();
        setup::withdraw(&self.client, &postgres.slot, &postgres.publication, &gone).await;
        Ok(())
    }

    /// Makes what is missing in the database; the publication, and each table's witness.
    async fn set_up(&self, resolved: &Resolved) -> Result<(Oid, BTreeMap<Oid, Witness>), Error> {
        let publication = &self.config.postgres.publication;
        let followed = resolved.followed();
        let published: Vec<_> = followed.iter().map(|table| name(table)).collect();
        let readable: Vec<_> = resolved.copy.iter().map(|table| name(table)).collect();
        let named = names(self.config)?;
        let wanted = Wanted {
            publication,
            published: &published,
            readable: &readable,
            writing: writing(self.config, &named),
        };
        setup::ensure(&self.client, wanted).await?;
        let published = setup::published(&self.client, publication)
            .await?
            .ok_or_else(|| Error::Transient("the publication was dropped just now".into()))?;
        let witnesses = (followed.iter())
            .filter_map(|table| Some((table.oid, published.tables.get(&table.oid)?.0)))
            .collect::<BTreeMap<_, _>>();
        if witnesses.len() < followed.len() {
            return Err(Error::Transient(
                "a table was dropped, or taken out of the publication, just now".into(),
            ));
        }
        Ok((published.oid, witnesses))
    }

    /// Copies tables from a snapshot that `self.replication` holds.
    async fn copy(&mut self, snapshot: &str, tables: &[Arc<Table>], at: Lsn) -> Result<(), Error> {
        let postgres = &self.config.postgres;
        let snapshot = Snapshot::import(&postgres.target, snapshot, tables.len()).await?;
        snapshot.lock(&self.client, tables).await?;
        let (sender, mut receiver) = copy::channel();
        let bytes_max = self.config.memory().copy_bytes_max;
        let (copied, filled) = {
            let owned = tables.to_vec();
            let progress = self.progress;
            let copying = async move {
                // The sender ends with it, and with that the other side.
                let sender = sender;
                snapshot.copy(&owned, bytes_max, &sender, progress).await
            };
            let (owned, copied) = (tables.to_vec(), self.copied.clone());
            let filling = self
                .on_mirror(move |mirror| copy::fill(mirror, &owned, at, &mut receiver, &copied));
            tokio::join!(copying, filling)
        };
        // Where the mirror failed, the copy failed because of it.
        match (filled?, copied) {
            (_, Err(error)) => Err(error.into()),
            (false, Ok(())) => Err(Error::Transient("the copy was cut off".into())),
            (true, Ok(())) => Ok(()),
        }
    }

    /// What conditions that look into other tables need of the mirror: indexes, and that no table goes on without one that it
    /// needs.
    async fn prepare_lookups(&self, tables: &[Arc<Table>]) -> Result<(), Error> {
        let (mut indexes, mut dependents) = (Vec::new(), Vec::new());
        for select in (compile(self.config, tables)?.iter()).flat_map(|shape| &shape.selects) {
            indexes.extend(select.indexes());
            let needed = select
                .subqueries()
                .iter()
                .map(|step| step.subquery.table.oid);
            dependents.extend(needed.map(|needed| (needed, select.table.oid)));
        }
        self.on_mirror(move |mirror| {
            // And what is needed to tell a replica how a shape differs from what it was.
            mirror.trim_definitions(definition::now(), mirror::DEFINITIONS_BYTES_MAX)?;
            indexes.extend(mirror.definition_indexes()?);
            mirror.set_indexes(&indexes)?;
            mirror.set_dependents(&dependents)
        })
        .await
    }

    /// What sessions need. The mirror's tables are `tables`, or will be.
    async fn opening(&self, tables: &[Arc<Table>]) -> Result<Opening, Error> {
        let secrets = setup::secrets(&self.client).await?;
        let count = self.config.memory().readers;
        let readers = self
            .on_mirror(move |mirror| (0..count).map(|_| mirror.reader()).collect())
            .await?;
        let (shapes, receipts) = receipts::split(compile(self.config, tables)?);
        Ok(Opening {
            shapes,
            receipts,
            policies: policies(self.config, tables)?,
            defaults: catalog::defaults::read(
                &self.client.client,
                tables.iter().map(|table| &**table),
            )
            .await?,
            token_key: token::Key::new(&secrets.token_key),
            readers,
        })
    }

    async fn finish(self, opened: bool) -> Result<Started, Error> {
        let entries = self.on_mirror(|mirror| Ok(mirror.tables())).await?;
        let all: Vec<_> = entries.iter().map(|entry| entry.table.clone()).collect();
        let opening = match opened {
            true => None,
            false => Some(self.opening(&all).await?),
        };
        let remembered = self.on_mirror(|mirror| Remembered::read(mirror)).await?;
        let mirror = Arc::into_inner(self.mirror)
            .ok_or_else(|| Error::Definite("the mirror is still in use".into()))?
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let serve_from = entries.iter().map(|entry| entry.floor).max();
        let live = entries
            .into_iter()
            .filter(|entry| entry.state == mirror::State::Live)
            .map(|entry| (entry.table.oid, entry.table));
        let position = mirror.position();
        Ok(Started {
            opening,
            tables: live.collect(),
            position,
            serve_from: serve_from.unwrap_or_default().max(position.lsn),
            witnesses: remembered.published,
            mirror,
        })
    }
}

/// Makes `data_dir` if it is not there. What is in it are rows: nobody else may look.
fn make_private_directory(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;

    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(path).map_err(|error| {
        Error::Definite(format!(
            "data_dir {} can't be made: {error}",
            path.display()
        ))
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Definite(format!("start: {error}")))
}

/// Makes what the database lacks (or only looks, if `print`), and returns the SQL for it; empty if nothing is missing.
/// Nothing is published that can't be replicated: Postgres would refuse the application's UPDATEs of it.
pub async fn set_up(config: &Config, print: bool) -> Result<String, Error> {
    let client = Client::connect(&config.postgres.target, "anabranch setup").await?;
    let names = names(config)?;
    let mut tables = Vec::new();
    let mut findings = Vec::new();
    for read in catalog::read(&client, &names).await? {
        match read {
            Ok(table) => tables.push(Arc::new(table)),
            Err(refusal) => findings.push(check::of_table(&refusal)),
        }
    }
    refuse(check::errors(findings))?;
    shape::compile(&config.shapes, &tables).map_err(|refused| refused_shapes(config, &refused))?;
    let mut all = names.clone();
    if config.takes_writes() {
        all.extend(receipts::names());
    }
    let wanted = Wanted {
        publication: &config.postgres.publication,
        published: &all,
        readable: &all,
        writing: writing(config, &names),
    };
    let script = setup::plan(&client, wanted).await?;
    if script.statements.is_empty() {
        return Ok(String::new());
    }
    let text = script.to_string();
    if !print {
        setup::ensure(&client, wanted).await?;
    }
    Ok(text)
}

/// The tables that the shapes of the config name.
fn names(config: &Config) -> Result<Vec<Name>, Error> {
    match shape::tables_named(&config.shapes) {
        Ok(names) => Ok(names
            .into_iter()
            .map(|(schema, name)| Name { schema, name })
            .collect()),
        Err(refused) => Err(refused_shapes(config, &refused)),
    }
}

/// Who makes local writes, if any are taken. `tables`: those that the shapes of the config name.
pub fn writing<'a>(config: &'a Config, tables: &'a [Name]) -> Option<Writing<'a>> {
    config.takes_writes().then(|| Writing {
        role: config.postgres.write_target.user(),
        roles: (config.auth.role.as_ref()).map_or(&[], |role| &role.allowed),
        tables,
    })
}

fn compile(config: &Config, tables: &[Arc<Table>]) -> Result<Vec<Shape>, Error> {
    let mut sources = config.shapes.clone();
    if config.takes_writes() {
        sources.push(receipts::source());
    }
    shape::compile(&sources, tables).map_err(|refused| refused_shapes(config, &refused))
}

fn policies(config: &Config, tables: &[Arc<Table>]) -> Result<Policies, Error> {
    Policies::new(&config.policies, tables).map_err(|refused| Error::Definite(refused.join("\n")))
}

fn refused_shapes(config: &Config, refused: &[shape::Refused]) -> Error {
    let findings = refused
        .iter()
        .map(|refused| check::of_shape(config, refused));
    Error::Definite(check::errors(findings.collect()).unwrap_or_default())
}

fn refuse(errors: Option<String>) -> Result<(), Error> {
    match errors {
        Some(errors) => Err(Error::Definite(errors)),
        None => Ok(()),
    }
}

fn name(table: &Table) -> Name {
    Name {
        schema: table.schema.clone(),
        name: table.name.clone(),
    }
}
