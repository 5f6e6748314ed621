//! What must exist in the database: the schema `anabranch` with its tables, the publication, and the grants of the
//! role; and where replicas write, what `writing` has. [`plan`] finds what is missing, as SQL; [`execute`] runs it if the
//! role may, in one transaction; whoever may not is given the exact script for somebody who may.
//!
//! Tables are published by name, never `FOR ALL TABLES`: publishing a table without a key makes Postgres refuse the
//! application's UPDATEs, so nothing is published that was not looked at. What is published and not asked for is left
//! alone: another streamer may need it.

mod writing;

pub use writing::{
    ALREADY_CLAIMED, CLAIMS_KEPT_DAYS, FORKED, OTHER_SUBJECT, OUT_OF_ORDER, REFUSED, SETTLED_KEPT,
    Writing,
};

use std::{collections::HashMap, fmt};

use super::{
    catalog::Name,
    sql::{self, Client, identifier},
    witness::Witness,
};
use crate::{receipts, table::Oid};

/// How long ALTER PUBLICATION may wait for a table's lock: the application's statements would queue behind it.
const LOCK_WAIT: &str = "10s";

/// One row. The nonce makes the id of the epoch, the key authenticates resume tokens: all streamers of the source share
/// them. Two random UUIDs have 244 random bits.
const SOURCE: &str = "\
CREATE TABLE IF NOT EXISTS anabranch.source (
  only_row  boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  nonce     bytea NOT NULL DEFAULT decode(replace(gen_random_uuid()::text, '-', ''), 'hex'),
  token_key bytea NOT NULL DEFAULT decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex'),
  created   timestamptz NOT NULL DEFAULT now()
)";

/// One row for each slot; see the module `history`.
const STREAMERS: &str = "\
CREATE TABLE IF NOT EXISTS anabranch.streamers (
  slot        text PRIMARY KEY,
  nonce       text NOT NULL,
  publication text NOT NULL,
  renewed_at  timestamptz NOT NULL DEFAULT now()
)";

/// What is to exist.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Name of the publication.
    pub publication: &'a str,
    /// The tables that it must publish.
    pub published: &'a [Name],
    /// The tables that the role must be able to read: those that are to be copied.
    pub readable: &'a [Name],
    /// Replicas may write. Then the tables of [`receipts`] are published and read too.
    pub writing: Option<Writing<'a>>,
}

/// The SQL that makes what is missing. Its `Display` is a script for psql.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// For whom.
    pub role: String,
    /// To be run in this database.
    pub database: String,
    /// In order; empty if nothing is missing.
    pub statements: Vec<String>,
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A comment ends at a line break, so a name must not have one there.
        let database = self.database.replace(['\n', '\r'], " ");
        writeln!(
            f,
            "-- In database {database}, as a superuser or the owner of the tables:"
        )?;
        writeln!(f, "BEGIN;")?;
        for statement in &self.statements {
            writeln!(f, "{statement};")?;
        }
        write!(f, "COMMIT;")
    }
}

/// Setting up failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The role may not. Somebody who may has to run the script.
    #[error("the role {} may not set up the database ({reason}). Run this:\n\n{script}\n", script.role)]
    NotAllowed {
        /// What to run.
        script: Script,
        /// What Postgres said.
        reason: String,
    },
    /// Something else.
    #[error(transparent)]
    Sql(#[from] sql::Error),
}

/// What `anabranch.source` holds.
pub struct Secrets {
    /// The nonce, as hexadecimal digits.
    pub nonce: String,
    /// The key of resume tokens.
    pub token_key: Vec<u8>,
}

/// Finds what is missing. Changes nothing.
pub async fn plan(client: &Client, wanted: Wanted<'_>) -> Result<Script, sql::Error> {
    let sql = &client.client;
    let mut statements = Vec::new();
    // Not to_regclass(): it fails where the role may not use the schema.
    let row = sql
        .query_one(
            "SELECT current_user::text, pg_catalog.current_database()::text,
                    r.rolsuper OR r.rolreplication OR EXISTS (
                        SELECT FROM pg_roles g WHERE g.rolname = 'rds_replication' AND pg_catalog.pg_has_role(g.oid, 'MEMBER')),
                    n.oid IS NOT NULL, source.oid IS NOT NULL, streamers.oid IS NOT NULL,
                    coalesce(pg_catalog.has_schema_privilege(n.oid, 'USAGE'), false),
                    coalesce(pg_catalog.has_table_privilege(source.oid, 'SELECT'), false),
                    coalesce(pg_catalog.has_table_privilege(streamers.oid, 'SELECT')
                         AND pg_catalog.has_table_privilege(streamers.oid, 'INSERT')
                         AND pg_catalog.has_table_privilege(streamers.oid, 'UPDATE'), false)
               FROM pg_roles r
               LEFT JOIN pg_namespace n ON n.nspname = 'anabranch'
               LEFT JOIN pg_class source ON source.relnamespace = n.oid AND source.relname = 'source'
               LEFT JOIN pg_class streamers ON streamers.relnamespace = n.oid AND streamers.relname = 'streamers'
              WHERE r.rolname = current_user",
            &[],
        )
        .await?;
    let role: String = row.get(0);
    let database: String = row.get(1);
    let quoted = identifier(&role);
    let [
        may_replicate,
        schema,
        source,
        streamers,
        use_schema,
        read_source,
        write_streamers,
    ] = std::array::from_fn(|i| row.get::<_, bool>(i + 2));
    if !may_replicate {
        statements.push(format!("ALTER ROLE {quoted} REPLICATION"));
    }
    if !schema {
        statements.push("CREATE SCHEMA IF NOT EXISTS anabranch".into());
    }
    if !use_schema {
        statements.push(format!("GRANT USAGE ON SCHEMA anabranch TO {quoted}"));
    }
    let source_row = source
        && use_schema
        && read_source
        && !sql
            .query("SELECT FROM anabranch.source", &[])
            .await?
            .is_empty();
    if !source {
        statements.push(SOURCE.into());
        // The key must not be everybody's, whatever the default privileges are.
        statements.push("REVOKE ALL ON anabranch.source FROM PUBLIC".into());
    }
    if !source || (read_source && !source_row) {
        statements
            .push("INSERT INTO anabranch.source DEFAULT VALUES ON CONFLICT DO NOTHING".into());
    }
    if !read_source {
        statements.push(format!("GRANT SELECT ON anabranch.source TO {quoted}"));
    }
    if !streamers {
        statements.push(STREAMERS.into());
        statements.push("REVOKE ALL ON anabranch.streamers FROM PUBLIC".into());
    }
    if !write_streamers {
        statements.push(format!(
            "GRANT SELECT, INSERT, UPDATE ON anabranch.streamers TO {quoted}"
        ));
    }
    if let Some(writing) = wanted.writing {
        statements.extend(writing::plan(client, writing, &quoted).await?);
    }
    statements.extend(grants(client, wanted.readable, None, &quoted).await?);
    statements.extend(given_away(client, wanted.writing.map(|writing| writing.role)).await?);
    let mut published = wanted.published.to_vec();
    if wanted.writing.is_some() {
        let receipts = receipts::names().into_iter();
        published.extend(receipts.filter(|name| !wanted.published.contains(name)));
    }
    let wanted = Wanted {
        published: &published,
        ..wanted
    };
    statements.extend(publication(client, wanted).await?);
    Ok(Script {
        role,
        database,
        statements,
    })
}

/// What takes back what default privileges gave to others as it was made. With it they could read what was written and refused, or
/// forge receipts and resume tokens. What somebody granted otherwise is left alone: another streamer may need it. `login` is the role that logs in to write.
async fn given_away(client: &Client, login: Option<&str>) -> Result<Vec<String>, sql::Error> {
    let rows = client
        .client
        .query(
            "SELECT pg_catalog.format('REVOKE %s ON %s FROM %I', pg_catalog.string_agg(h.privilege_type, ', ' ORDER BY h.privilege_type), h.what, r.rolname)
               FROM (SELECT 'r' AS kind, c.relowner AS owner, 'anabranch.' || pg_catalog.quote_ident(c.relname) AS what, a.*
                       FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_catalog.aclexplode(c.relacl) a
                      WHERE n.nspname = 'anabranch' AND c.relkind = 'r'
                     UNION ALL
                     SELECT 'f', p.proowner,
                            pg_catalog.format('FUNCTION anabranch.%I(%s)', p.proname, pg_catalog.oidvectortypes(p.proargtypes)), a.*
                       FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace, pg_catalog.aclexplode(p.proacl) a
                      WHERE n.nspname = 'anabranch' AND p.prosecdef) h
               JOIN pg_roles r ON r.oid = h.grantee
              WHERE h.grantee <> h.owner AND r.rolname <> current_user AND r.rolname IS DISTINCT FROM $1
                AND EXISTS (SELECT FROM pg_default_acl d, pg_catalog.aclexplode(d.defaclacl) g
                             WHERE d.defaclrole = h.owner AND d.defaclobjtype = h.kind::\"char\" AND g.grantee = h.grantee)
              GROUP BY h.what, r.rolname ORDER BY h.what, r.rolname",
            &[&login],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// What lets a role read the tables: that of the session, or the one that is named. `role` is quoted.
async fn grants(
    client: &Client,
    tables: &[Name],
    named: Option<&str>,
    role: &str,
) -> Result<Vec<String>, sql::Error> {
    let (schemas, names): (Vec<_>, Vec<_>) = tables
        .iter()
        .map(|table| (&*table.schema, &*table.name))
        .unzip();
    let rows = client
        .client
        .query(
            "SELECT w.schema, w.name, pg_catalog.has_schema_privilege(coalesce($3::text, current_user::text)::name, n.oid, 'USAGE'),
                    (SELECT pg_catalog.bool_and(pg_catalog.has_column_privilege(coalesce($3::text, current_user::text)::name, c.oid, a.attnum, 'SELECT'))
                       FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
               FROM unnest($1::text[], $2::text[]) WITH ORDINALITY w(schema, name, i)
               JOIN pg_namespace n ON n.nspname = w.schema
               JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
              ORDER BY i",
            &[&schemas, &names, &named],
        )
        .await?;
    let mut statements: Vec<String> = Vec::new();
    for row in rows {
        let (schema, name): (String, String) = (row.get(0), row.get(1));
        if !row.get::<_, bool>(2) {
            let grant = format!("GRANT USAGE ON SCHEMA {} TO {role}", identifier(&schema));
            if !statements.contains(&grant) {
                statements.push(grant);
            }
        }
        if row.get::<_, Option<bool>>(3) == Some(false) {
            statements.push(format!(
                "GRANT SELECT ON {} TO {role}",
                qualified(&Name { schema, name })
            ));
        }
    }
    Ok(statements)
}

/// What makes the publication publish the tables.
async fn publication(client: &Client, wanted: Wanted<'_>) -> Result<Option<String>, sql::Error> {
    let name = identifier(wanted.publication);
    let list = |tables: &mut dyn Iterator<Item = &Name>| {
        tables
            .map(|table| format!("ONLY {}", qualified(table)))
            .collect::<Vec<_>>()
            .join(", ")
    };
    Ok(match published(client, wanted.publication).await? {
        None => {
            let tables = match wanted.published {
                [] => String::new(),
                tables => format!(" FOR TABLE {}", list(&mut tables.iter())),
            };
            Some(format!(
                "CREATE PUBLICATION {name}{tables} WITH (publish = 'insert, update, delete, truncate', publish_via_partition_root = false)"
            ))
        }
        Some(published) => {
            let missing = list(
                &mut wanted
                    .published
                    .iter()
                    .filter(|table| !published.tables.values().any(|(_, name)| name == *table)),
            );
            (!missing.is_empty()).then(|| format!("ALTER PUBLICATION {name} ADD TABLE {missing}"))
        }
    })
}

/// A publication as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Its OID.
    pub oid: Oid,
    /// OID of each table: its witness, and its name.
    pub tables: HashMap<Oid, (Witness, Name)>,
}

/// Reads a publication; `None` if it is not there. Only the tables that it names itself.
pub async fn published(
    client: &Client,
    publication: &str,
) -> Result<Option<Published>, sql::Error> {
    let rows = client
        .client
        .query(
            "SELECT p.oid, c.oid, n.nspname::text, c.relname::text,
                    (p.xmin::text::bigint << 32) | m.oid::bigint, c.relfilenode,
                    (SELECT pg_catalog.hashtextextended(coalesce(pg_catalog.string_agg(a.xmin::text, ' ' ORDER BY a.attnum), ''), 0)
                       FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0)
               FROM pg_publication p
               LEFT JOIN (pg_publication_rel m JOIN pg_class c ON c.oid = m.prrelid
                          JOIN pg_namespace n ON n.oid = c.relnamespace) ON m.prpubid = p.oid
              WHERE p.pubname = $1",
            &[&publication],
        )
        .await?;
    let Some(first) = rows.first() else {
        return Ok(None);
    };
    Ok(Some(Published {
        oid: first.get(0),
        tables: rows
            .iter()
            .filter_map(|row| {
                let table: Option<Oid> = row.get(1);
                let name = |row: &tokio_postgres::Row| Name {
                    schema: row.get(2),
                    name: row.get(3),
                };
                let witness = |row: &tokio_postgres::Row| Witness {
                    membership: row.get::<_, i64>(4).cast_unsigned(),
                    file: row.get(5),
                    columns: row.get(6),
                };
                table.map(|table| (table, (witness(row), name(row))))
            })
            .collect(),
    }))
}

/// Runs a script, whole or not at all.
pub async fn execute(client: &Client, script: Script) -> Result<(), Error> {
    if script.statements.is_empty() {
        return Ok(());
    }
    let text = format!(
        "BEGIN; SET LOCAL lock_timeout = '{LOCK_WAIT}'; {}; COMMIT",
        script.statements.join("; ")
    );
    let Err(error) = client.client.batch_execute(&text).await else {
        tracing::info!("set up: {}", script.statements.join("; "));
        return Ok(());
    };
    let code = error.code().map(|code| code.code().to_owned());
    let error = sql::Error::from(error);
    // Where the connection is lost this fails too, and there is nothing to roll back.
    let _ = client.client.batch_execute("ROLLBACK").await;
    Err(match code.as_deref() {
        Some("42501") => Error::NotAllowed {
            script,
            reason: error.to_string(),
        },
        // Somebody else did the same just now: duplicate schema, object, table, or the unique index below them.
        Some("42P06" | "42710" | "42P07" | "23505") => {
            sql::Error::Transient(error.to_string()).into()
        }
        _ => error.into(),
    })
}

/// Plans, runs, and makes sure that nothing is missing any more.
pub async fn ensure(client: &Client, wanted: Wanted<'_>) -> Result<(), Error> {
    execute(client, plan(client, wanted).await?).await?;
    // What is given to others as it is made can only be taken back then.
    execute(client, plan(client, wanted).await?).await?;
    let script = plan(client, wanted).await?;
    if script.statements.is_empty() {
        return Ok(());
    }
    Err(Error::NotAllowed {
        script,
        reason: "some statements had no effect".into(),
    })
}

/// Reads `anabranch.source`.
pub async fn secrets(client: &Client) -> Result<Secrets, sql::Error> {
    let row = client
        .client
        .query_one(
            "SELECT pg_catalog.encode(nonce, 'hex'), token_key FROM anabranch.source",
            &[],
        )
        .await?;
    Ok(Secrets {
        nonce: row.get(0),
        token_key: row.get(1),
    })
}

/// Takes tables out of the publication, if no other streamer uses it. Best effort: what is published and not wanted
/// costs bandwidth, nothing else, so a failure is only logged, with the SQL.
pub async fn withdraw(client: &Client, slot: &str, publication: &str, tables: &[Name]) {
    if tables.is_empty() {
        return;
    }
    let list: Vec<_> = tables.iter().map(qualified).collect();
    let statement = format!(
        "ALTER PUBLICATION {} DROP TABLE {}",
        identifier(publication),
        list.join(", ")
    );
    let others = client
        .client
        .query(
            "SELECT FROM anabranch.streamers WHERE publication = $1 AND slot <> $2",
            &[&publication, &slot],
        )
        .await;
    let done = match others {
        Ok(others) if others.is_empty() => {
            let text = format!("SET lock_timeout = '{LOCK_WAIT}'; {statement}");
            let done = client.client.batch_execute(&text).await;
            let _ = client.client.batch_execute("SET lock_timeout = 0").await;
            done
        }
        Ok(_) => return,
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => tracing::info!("no longer named by a shape: {statement}"),
        Err(error) => {
            let error = sql::Error::from(error);
            tracing::warn!(
                "a table that no shape names is still published ({error}); to mend it: {statement}"
            );
        }
    }
}

/// `"schema"."table"`.
pub fn qualified(name: &Name) -> String {
    format!("{}.{}", identifier(&name.schema), identifier(&name.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_one_transaction_and_no_name_breaks_out_of_its_comment() {
        let script = Script {
            role: "r".into(),
            database: "a\nDROP TABLE x;".into(),
            statements: vec!["SELECT 1".into(), "SELECT 2".into()],
        };
        assert_eq!(
            script.to_string(),
            "-- In database a DROP TABLE x;, as a superuser or the owner of the tables:\nBEGIN;\nSELECT 1;\nSELECT 2;\nCOMMIT;"
        );
    }

    #[test]
    fn names_are_quoted_whatever_is_in_them() {
        let name = Name {
            schema: "Se\"lect".into(),
            name: "a.b".into(),
        };
        assert_eq!(qualified(&name), "\"Se\"\"lect\".\"a.b\"");
    }
}
