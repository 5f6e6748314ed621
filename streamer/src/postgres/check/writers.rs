//! Looks at who makes local writes: whether they may, and whether Postgres holds them to anything.
//!
//! All of it is worth a warning only. A right that is missing may be missing on purpose: then writes are rejected with 42501.

use super::{
    super::{
        catalog::Name,
        setup::{Writing, qualified},
        sql::{Client, Error, identifier},
    },
    Finding,
};

/// A role, and what it is to Postgres.
struct Role {
    name: String,
    is_superuser: bool,
    bypasses: bool,
}

/// Looks at the login role and those that it becomes, and at the tables that replicas may write.
pub async fn check(
    client: &Client,
    writing: Writing<'_>,
    tables: &[Name],
) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    let logs_in = [writing.role.to_owned()];
    // Those whose rights decide.
    let deciding = if writing.roles.is_empty() {
        &logs_in
    } else {
        writing.roles
    };
    for role in roles(client, deciding).await? {
        findings.extend(unbound(&role));
        for table in tables {
            findings.extend(rights(client, &role, table).await?);
        }
    }
    if !writing.roles.is_empty() {
        for role in may_create(client, writing.roles).await? {
            findings.push(creates(&role));
        }
        for login in roles(client, &logs_in).await? {
            if login.is_superuser {
                findings.push(login_is_superuser(&login.name));
            }
        }
        for role in missing(client, writing.roles).await? {
            findings.push(Finding::warning(
                format!("auth.role allows the role {role:?}, which is not there: writes of its tokens are refused"),
                format!("CREATE ROLE {};\nGRANT it what it may do, and restart a streamer that runs", identifier(&role)),
            ));
        }
    }
    for table in tables {
        findings.extend(sees(client, writing.role, table).await?);
    }
    Ok(findings)
}

fn login_is_superuser(name: &str) -> Finding {
    Finding::warning(
        format!(
            "the role {} that logs in to write is a superuser",
            identifier(name)
        ),
        "Name a role in postgres.write_url that has no more rights than it needs; `setup` makes it",
    )
}

/// One that row-level security does not count for.
fn unbound(role: &Role) -> Option<Finding> {
    let what = match role {
        Role {
            is_superuser: true, ..
        } => "a superuser: no grant and no policy holds its writes back",
        Role { bypasses: true, .. } => "BYPASSRLS: no policy holds its writes back",
        _ => return None,
    };
    let name = identifier(&role.name);
    Some(Finding::warning(
        format!(
            "local writes are made as {name}, which is {what}, and replicas may do what it may"
        ),
        "Name other roles in auth.role, or another one in postgres.write_url",
    ))
}

async fn roles(client: &Client, names: &[String]) -> Result<Vec<Role>, Error> {
    let rows = client
        .client
        .query(
            "SELECT rolname::text, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = ANY ($1) ORDER BY rolname",
            &[&names],
        )
        .await?;
    let role = |row: &tokio_postgres::Row| Role {
        name: row.get(0),
        is_superuser: row.get(1),
        bypasses: row.get(2),
    };
    Ok(rows.iter().map(role).collect())
}

/// What the role that logs in looks at last, it compares with operators of `public` too.
fn creates(name: &str) -> Finding {
    let name = identifier(name);
    Finding::warning(
        format!(
            "the role {name} may create operators and functions in schema public, and the role that logs in to write would run them"
        ),
        format!("REVOKE CREATE ON SCHEMA public FROM PUBLIC, {name};"),
    )
}

/// Those of the roles that may create in `public`. A superuser may do anything anyhow.
async fn may_create(client: &Client, names: &[String]) -> Result<Vec<String>, Error> {
    let sql = "SELECT rolname::text FROM pg_roles, pg_namespace WHERE nspname = 'public' AND rolname = ANY ($1)
                  AND NOT rolsuper AND pg_catalog.has_schema_privilege(pg_roles.oid, pg_namespace.oid, 'CREATE') ORDER BY 1";
    let rows = client.client.query(sql, &[&names]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn missing(client: &Client, names: &[String]) -> Result<Vec<String>, Error> {
    let sql = "SELECT w.name FROM pg_catalog.unnest($1::text[]) w(name) WHERE w.name NOT IN (SELECT rolname FROM pg_roles) ORDER BY 1";
    let rows = client.client.query(sql, &[&names]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Whether a role may do anything to a table, and whether the table's policies count for it.
async fn rights(client: &Client, role: &Role, table: &Name) -> Result<Vec<Finding>, Error> {
    let row = client
        .client
        .query_opt(
            "SELECT pg_catalog.has_schema_privilege($3::text::name, n.oid, 'USAGE'),
                    pg_catalog.has_any_column_privilege($3::text::name, c.oid, 'INSERT')
                        OR pg_catalog.has_any_column_privilege($3::text::name, c.oid, 'UPDATE')
                        OR pg_catalog.has_table_privilege($3::text::name, c.oid, 'DELETE'),
                    c.relrowsecurity AND NOT c.relforcerowsecurity AND pg_catalog.pg_has_role($3::text::name, c.relowner, 'USAGE')
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE n.nspname = $1 AND c.relname = $2",
            &[&table.schema, &table.name, &role.name],
        )
        .await?;
    let Some(row) = row else {
        return Ok(Vec::new());
    };
    let (name, qualified) = (identifier(&role.name), qualified(table));
    let mut findings = Vec::new();
    if !row.get::<_, bool>(0) {
        let schema = identifier(&table.schema);
        findings.push(Finding::warning(
            format!("{qualified} is writable, and the role {name} may not use its schema"),
            format!("GRANT USAGE ON SCHEMA {schema} TO {name};"),
        ));
    }
    if !row.get::<_, bool>(1) {
        findings.push(Finding::warning(
            format!("{qualified} is writable, and the role {name} may not write it"),
            format!("GRANT SELECT, INSERT, UPDATE, DELETE ON {qualified} TO {name};"),
        ));
    }
    if row.get(2) && !role.is_superuser && !role.bypasses {
        findings.push(Finding::warning(
            format!("the role {name} owns {qualified}, whose policies do not count for it"),
            format!("ALTER TABLE {qualified} FORCE ROW LEVEL SECURITY;"),
        ));
    }
    Ok(findings)
}

/// Whether the role that logs in can look at the rows that were written.
async fn sees(client: &Client, role: &str, table: &Name) -> Result<Option<Finding>, Error> {
    let blind = client
        .client
        .query_opt(
            "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, pg_roles r
              WHERE n.nspname = $1 AND c.relname = $2 AND r.rolname = $3
                AND c.relrowsecurity AND NOT r.rolsuper AND NOT r.rolbypassrls
                AND (c.relforcerowsecurity OR NOT pg_catalog.pg_has_role(r.oid, c.relowner, 'USAGE'))
                AND NOT EXISTS (
                    SELECT FROM pg_policy y
                     WHERE y.polrelid = c.oid AND y.polpermissive AND y.polcmd IN ('r', '*')
                       AND EXISTS (SELECT FROM pg_catalog.unnest(y.polroles) p(oid)
                                    WHERE CASE WHEN p.oid = 0 THEN true ELSE pg_catalog.pg_has_role(r.oid, p.oid, 'USAGE') END))",
            &[&table.schema, &table.name, &role],
        )
        .await?;
    Ok(blind.map(|_| {
        let (name, table) = (identifier(role), qualified(table));
        Finding::warning(
            format!(
                "{table} has row-level security, which shows the role {name} that logs in to write no row: nobody can tell \
                 whether replicas write what their shapes show them"
            ),
            format!("CREATE POLICY anabranch_looks ON {table} FOR SELECT TO {name} USING (true);"),
        )
    }))
}
