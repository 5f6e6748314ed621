//! Says everything that is wrong with server, role, publication, tables and shapes, each with what mends it.
//!
//! It changes nothing. `anabranch-streamer check` prints all of it; a start looks at the same, part by part.

mod writers;

use std::fmt;

use super::{
    catalog::{self, Name},
    replication::Replication,
    setup::{self, Wanted, qualified},
    sql::{Client, Error, identifier},
};
use crate::{config::Config, policy::Policies, receipts, shape, start::writing};

/// Oldest version of Postgres: earlier ones have no row filters and column lists in their catalogs, and are out of support.
const VERSION_MIN: i32 = 150_000;

/// Minor versions below these lose changes of transactions that run while a table is added to a publication.
const MINOR_MIN: [(i32, i32); 3] = [(15, 13), (16, 9), (17, 5)];

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Works, with a risk.
    Warning,
    /// Does not work.
    Error,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub what: String,
    /// What mends it: SQL, or a sentence.
    pub remedy: Option<String>,
}

impl Finding {
    fn error(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Error,
            what: what.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn warning(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Warning,
            ..Finding::error(what, remedy)
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}", self.what)?;
        for line in self.remedy.iter().flat_map(|remedy| remedy.lines()) {
            write!(f, "\n    {line}")?;
        }
        Ok(())
    }
}

/// Looks at everything.
pub async fn check(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for warning in &config.warnings {
        findings.push(Finding {
            severity: Severity::Warning,
            what: warning.clone(),
            remedy: None,
        });
    }
    let names = match shape::tables_named(&config.shapes) {
        Ok(names) => names
            .into_iter()
            .map(|(schema, name)| Name { schema, name })
            .collect(),
        Err(refused) => {
            findings.extend(refused.iter().map(|refused| of_shape(config, refused)));
            Vec::new()
        }
    };
    if let Err(error) = with_server(config, &names, &mut findings).await {
        findings.push(Finding {
            severity: Severity::Error,
            what: error.to_string(),
            remedy: None,
        });
    }
    findings
}

async fn with_server(
    config: &Config,
    names: &[Name],
    findings: &mut Vec<Finding>,
) -> Result<(), Error> {
    let postgres = &config.postgres;
    let client = Client::connect(&postgres.target, "anabranch check").await?;
    let wal_retained_max = Some(config.wal_retained_max);
    findings.extend(server(&client, &postgres.slot, wal_retained_max).await?);
    if findings.iter().any(is_version) {
        return Ok(());
    }
    if let Err(error) = Replication::connect(&postgres.target, "anabranch check").await {
        let role = role(&client).await?;
        findings.push(Finding::error(
            format!("no replication connection: {error}"),
            format!(
                "ALTER ROLE {} REPLICATION;\nand a line for this role and database in pg_hba.conf; a pooler must not be in between",
                identifier(&role)
            ),
        ));
    }

    let mut tables = Vec::new();
    let mut usable = Vec::new();
    for (name, table) in names.iter().zip(catalog::read(&client, names).await?) {
        match table {
            Ok(table) => {
                tables.push(table.into());
                usable.push(name.clone());
            }
            Err(refusal) => findings.push(of_table(&refusal)),
        }
    }
    // A shape over a table that was refused would be refused too, for no reason of its own.
    if tables.len() == names.len() {
        match shape::compile(&config.shapes, &tables) {
            Ok(shapes) => findings.extend(scanned(config, &shapes)),
            Err(refused) => {
                findings.extend(refused.iter().map(|refused| of_shape(config, refused)));
            }
        }
    }
    findings.extend(row_security(&client, &usable).await?);
    findings.extend(publication(&client, &postgres.publication, &usable).await?);
    let rules = tables.len() == names.len();
    if let (true, Err(refused)) = (rules, Policies::new(&config.policies, &tables)) {
        findings.extend(refused.into_iter().map(|what| Finding {
            severity: Severity::Error,
            what,
            remedy: None,
        }));
    }
    let named = usable.clone();
    if config.takes_writes() {
        usable.extend(receipts::names());
    }
    let wanted = Wanted {
        publication: &postgres.publication,
        published: &usable,
        readable: &usable,
        writing: writing(config, &named),
    };
    if let Some(writing) = wanted.writing {
        let written = shape::tables_writable(&config.shapes);
        let written: Vec<_> = named
            .iter()
            .filter(|name| written.contains(&(name.schema.clone(), name.name.clone())))
            .cloned()
            .collect();
        findings.extend(writers::check(&client, writing, &written).await?);
    }
    let script = setup::plan(&client, wanted).await?;
    if !script.statements.is_empty() {
        findings.push(Finding::error(
            "the database is not set up completely (a start does this by itself if its role may)",
            script.to_string(),
        ));
    }
    Ok(())
}

fn is_version(finding: &Finding) -> bool {
    finding.severity == Severity::Error && finding.what.starts_with("Postgres ")
}

/// A shape that was refused, with its place in the config.
pub fn of_shape(config: &Config, refused: &shape::Refused) -> Finding {
    let place = config.place_in_sql(&refused.shape, refused.index, refused.line, refused.column);
    let what = match place {
        Some(place) => format!("{place}: shape {}: {}", refused.shape, refused.reason),
        None => refused.to_string(),
    };
    Finding {
        severity: Severity::Error,
        what,
        remedy: None,
    }
}

/// What each change of a table costs, where that grows with the sessions.
pub fn scanned(config: &Config, shapes: &[shape::Shape]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for shape in shapes {
        for (index, select) in shape.selects.iter().enumerate() {
            let Some(reason) = select.scan_reason() else {
                continue;
            };
            let place = config.place_in_sql(&shape.name, index, 1, 1);
            let place = place.map_or_else(String::new, |place| format!("{place}: "));
            findings.push(Finding::warning(
                format!(
                    "{place}shape {}, table {}: this condition is evaluated for every change of the table, for each of its \
                     sessions: {reason}",
                    shape.name,
                    select.table.full_name()
                ),
                "Where sessions are many, join to it with AND a comparison of a column with a parameter",
            ));
        }
    }
    findings
}

/// A table that was refused.
pub fn of_table(refusal: &catalog::Refusal) -> Finding {
    Finding {
        severity: Severity::Error,
        what: format!("table {}: {}", refusal.table, refusal.reason),
        remedy: refusal.remedy.clone(),
    }
}

/// The errors among findings, as one text; `None` if there are none. Warnings are logged.
pub fn errors(findings: Vec<Finding>) -> Option<String> {
    let mut errors = Vec::new();
    for finding in findings {
        match finding.severity {
            Severity::Warning => tracing::warn!("{finding}"),
            Severity::Error => errors.push(finding.to_string()),
        }
    }
    (!errors.is_empty()).then(|| errors.join("\n"))
}

async fn role(client: &Client) -> Result<String, Error> {
    let row = client
        .client
        .query_one("SELECT current_user::text", &[])
        .await?;
    Ok(row.get(0))
}

/// Looks at version, settings and role. `slot` is ours; WAL that it holds back above `wal_retained_max` is warned about.
/// `None`: by somebody else.
pub async fn server(
    client: &Client,
    slot: &str,
    wal_retained_max: Option<u64>,
) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    let sql = &client.client;
    let row = sql
        .query_one(
            "SELECT pg_catalog.current_setting('server_version_num')::int, pg_catalog.current_setting('server_version'),
                    pg_catalog.current_setting('wal_level'),
                    pg_catalog.current_setting('max_replication_slots')::int, (SELECT pg_catalog.count(*) FROM pg_replication_slots)::int,
                    pg_catalog.current_setting('max_wal_senders')::int, (SELECT pg_catalog.count(*) FROM pg_stat_replication)::int,
                    EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1),
                    (SELECT pg_catalog.pg_encoding_to_char(encoding)::text FROM pg_database WHERE datname = pg_catalog.current_database()),
                    pg_catalog.current_setting('fsync') = 'on', pg_catalog.current_setting('full_page_writes') = 'on',
                    r.rolname::text,
                    r.rolsuper OR r.rolreplication OR EXISTS (
                        SELECT FROM pg_roles g WHERE g.rolname = 'rds_replication' AND pg_catalog.pg_has_role(g.oid, 'MEMBER')),
                    pg_catalog.pg_is_in_recovery()
               FROM pg_roles r WHERE r.rolname = current_user",
            &[&slot],
        )
        .await?;
    let version: i32 = row.get(0);
    findings.extend(version_findings(version, row.get(1)));
    if version < VERSION_MIN {
        return Ok(findings);
    }
    if row.get::<_, &str>(2) != "logical" {
        findings.push(Finding::error(
            format!(
                "wal_level is {}, and must be logical",
                row.get::<_, &str>(2)
            ),
            "ALTER SYSTEM SET wal_level = logical;\nand restart Postgres",
        ));
    }
    let exists: bool = row.get(7);
    for (name, max, used, needed) in [
        (
            "max_replication_slots",
            row.get::<_, i32>(3),
            row.get::<_, i32>(4),
            1,
        ),
        ("max_wal_senders", row.get(5), row.get(6), 2),
    ] {
        if !exists && used + needed > max {
            findings.push(Finding::error(
                format!("{name} is {max}, of which {used} are in use; {needed} more are needed"),
                format!(
                    "ALTER SYSTEM SET {name} = {};\nand restart Postgres",
                    max + 10
                ),
            ));
        }
    }
    if row.get::<_, &str>(8) == "SQL_ASCII" {
        findings.push(Finding::error(
            "the database's encoding is SQL_ASCII: its text has no known encoding",
            "Create a database with encoding UTF8, and restore a dump into it",
        ));
    }
    if !row.get::<_, bool>(9) || !row.get::<_, bool>(10) {
        findings.push(Finding::warning(
            "fsync or full_page_writes is off: after a crash Postgres may have lost commits that replicas have",
            "ALTER SYSTEM RESET fsync; ALTER SYSTEM RESET full_page_writes; SELECT pg_reload_conf();",
        ));
    }
    if !row.get::<_, bool>(12) {
        let role = identifier(row.get(11));
        findings.push(Finding::error(
            format!("the role {role} may not replicate"),
            format!("ALTER ROLE {role} REPLICATION;"),
        ));
    }
    if row.get(13) {
        findings.push(Finding::error(
            "the server is in recovery: a standby can't be a source in this version",
            "Let postgres.url lead to the primary",
        ));
    }
    findings.extend(slot_findings(client, slot, wal_retained_max).await?);
    Ok(findings)
}

fn version_findings(version: i32, text: &str) -> Option<Finding> {
    if version < VERSION_MIN {
        return Some(Finding::error(
            format!("Postgres {text} is too old"),
            "Postgres 15 or later is needed",
        ));
    }
    let (major, minor) = (version / 10_000, version % 10_000);
    let (_, fixed) = MINOR_MIN
        .into_iter()
        .find(|(of, fixed)| *of == major && minor < *fixed)?;
    Some(Finding::warning(
        format!(
            "Postgres {text} may lose changes of transactions that run while a table is added to a publication"
        ),
        format!("Update it to {major}.{fixed} or later"),
    ))
}

async fn slot_findings(
    client: &Client,
    slot: &str,
    wal_retained_max: Option<u64>,
) -> Result<Option<Finding>, Error> {
    let row = client
        .client
        .query_opt(
            "SELECT coalesce(wal_status, ''), coalesce(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn), 0)::float8
               FROM pg_replication_slots WHERE slot_name = $1 AND NOT pg_catalog.pg_is_in_recovery()",
            &[&slot],
        )
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let (status, retained) = (row.get::<_, &str>(0), row.get::<_, f64>(1) as u64);
    Ok(match status {
        "lost" => Some(Finding::error(
            format!("slot {slot} was invalidated by the server: its WAL was removed"),
            "See what a start says of it",
        )),
        "unreserved" => Some(Finding::warning(
            format!("slot {slot} is about to lose its WAL"),
            "Start the streamer at once, or raise max_slot_wal_keep_size",
        )),
        _ if wal_retained_max.is_some_and(|max| retained > max) => Some(retains(slot, retained)),
        _ => None,
    })
}

/// The slot holds back more than `wal_retained_max`.
pub fn retains(slot: &str, bytes: u64) -> Finding {
    Finding::warning(
        format!(
            "slot {slot} holds back {} MiB of WAL, more than wal_retained_max",
            bytes >> 20
        ),
        "Start the streamer; if it runs, look for transactions that are open for long:\n\
         SELECT pid, xact_start, state FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start;\n\
         SELECT gid, prepared FROM pg_prepared_xacts ORDER BY prepared;",
    )
}

/// Bytes of WAL that the server keeps for the slot; `None`: there is no such slot, or it was invalidated.
pub async fn retained(client: &Client, slot: &str) -> Result<Option<u64>, Error> {
    let row = client
        .client
        .query_opt(
            "SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn)::float8
               FROM pg_replication_slots WHERE slot_name = $1",
            &[&slot],
        )
        .await?;
    Ok(row
        .and_then(|row| row.get::<_, Option<f64>>(0))
        .map(|bytes| bytes as u64))
}

/// Looks at the publication, if it is there: everything that would make rows or kinds of change stay away in silence.
pub async fn publication(
    client: &Client,
    publication: &str,
    tables: &[Name],
) -> Result<Vec<Finding>, Error> {
    let sql = &client.client;
    let Some(row) = sql
        .query_opt(
            "SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate, pubviaroot, puballtables,
                    EXISTS (SELECT FROM pg_publication_namespace WHERE pnpubid = p.oid)
               FROM pg_publication p WHERE pubname = $1",
            &[&publication],
        )
        .await?
    else {
        return Ok(Vec::new());
    };
    let name = identifier(publication);
    let mut findings = Vec::new();
    if !row.get::<_, bool>(0) {
        findings.push(Finding::error(
            format!(
                "publication {name} does not publish all of insert, update, delete and truncate"
            ),
            format!("ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');"),
        ));
    }
    if row.get(1) {
        findings.push(Finding::error(
            format!("publication {name} publishes partitions as their root, which loses TRUNCATE, ATTACH and DETACH of a partition"),
            format!("ALTER PUBLICATION {name} SET (publish_via_partition_root = false);"),
        ));
    }
    if row.get(2) || row.get(3) {
        let whole = if row.get(2) {
            "ALL TABLES"
        } else {
            "TABLES IN SCHEMA"
        };
        findings.push(Finding::error(
            format!("publication {name} is FOR {whole}: it would publish tables that nobody looked at, and make Postgres refuse UPDATEs of those without a key"),
            "Name another publication in postgres.publication: it is created with the tables of the shapes only",
        ));
    }
    let filtered = sql
        .query(
            "SELECT n.nspname::text, c.relname::text, m.prqual IS NOT NULL, m.prattrs IS NOT NULL
               FROM pg_publication p JOIN pg_publication_rel m ON m.prpubid = p.oid
               JOIN pg_class c ON c.oid = m.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE p.pubname = $1 AND (m.prqual IS NOT NULL OR m.prattrs IS NOT NULL)",
            &[&publication],
        )
        .await?;
    for row in filtered {
        let table = Name {
            schema: row.get(0),
            name: row.get(1),
        };
        if !tables.contains(&table) {
            continue;
        }
        let what = match (row.get(2), row.get(3)) {
            (true, true) => "a row filter and a column list",
            (true, false) => "a row filter",
            _ => "a column list",
        };
        let table = qualified(&table);
        findings.push(Finding::error(
            format!("publication {name} has {what} for table {table}: the shapes choose rows and columns, and need all of them here"),
            format!("ALTER PUBLICATION {name} DROP TABLE {table};\nALTER PUBLICATION {name} ADD TABLE {table};"),
        ));
    }
    Ok(findings)
}

/// Looks for policies that would hide rows from the copy; the stream does not know them.
pub async fn row_security(client: &Client, tables: &[Name]) -> Result<Vec<Finding>, Error> {
    let (schemas, names): (Vec<_>, Vec<_>) = tables
        .iter()
        .map(|table| (&*table.schema, &*table.name))
        .unzip();
    let hidden = client
        .client
        .query(
            "SELECT w.schema, w.name, current_user::text
               FROM unnest($1::text[], $2::text[]) w(schema, name)
               JOIN pg_namespace n ON n.nspname = w.schema
               JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
              WHERE pg_catalog.row_security_active(c.oid)",
            &[&schemas, &names],
        )
        .await?;
    Ok(hidden
        .iter()
        .map(|row| {
            let table = Name {
                schema: row.get(0),
                name: row.get(1),
            };
            let role = identifier(row.get(2));
            Finding::error(
                format!(
                    "table {} has row-level security, which hides rows from the role {role}; the stream would have all of them",
                    qualified(&table)
                ),
                format!("ALTER ROLE {role} BYPASSRLS;"),
            )
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_refused_warned_about_or_fine() {
        let severity = |version| version_findings(version, "x").map(|found| found.severity);
        for (version, expected) in [
            (90_624, Some(Severity::Error)),
            (140_018, Some(Severity::Error)),
            (150_000, Some(Severity::Warning)),
            (150_012, Some(Severity::Warning)),
            (150_013, None),
            (160_008, Some(Severity::Warning)),
            (160_009, None),
            (170_004, Some(Severity::Warning)),
            (170_005, None),
            (180_000, None),
        ] {
            assert_eq!(severity(version), expected, "{version}");
        }
    }

    #[test]
    fn findings_print_their_remedy_below() {
        let finding = Finding::error("it is off", "turn it on;\nand off");
        assert_eq!(
            finding.to_string(),
            "error: it is off\n    turn it on;\n    and off"
        );
        let errors = errors(vec![Finding::warning("a", "b"), finding]);
        assert_eq!(
            errors.as_deref(),
            Some("error: it is off\n    turn it on;\n    and off")
        );
    }
}
