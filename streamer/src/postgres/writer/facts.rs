//! What the catalogs say of a table that is written, beyond what [`Table`] has: read when a connection first writes it,
//! and again when its schema changed. Rights are the role's that writes.

use tokio_postgres::Client;

use crate::{
    postgres::{catalog::defaults, sql::Error},
    table::{LeftOut, Table},
};

/// A table that is written.
#[derive(Clone, Debug)]
pub struct Facts {
    /// By place in [`Table::columns`].
    pub columns: Vec<ColumnFacts>,
    /// Name of each column of its row type, in order, and whether it is generated.
    pub row: Vec<(String, bool)>,
    /// The unique indexes over exactly the key.
    pub keys: Vec<String>,
    /// A trigger may suppress an UPDATE.
    pub suppresses: bool,
    /// A trigger or a rule may put a row elsewhere than it was written.
    pub diverts: bool,
    /// Functions of the application may run where it is written: a trigger's, its own, of a partition, or of a table that a foreign key
    /// changes along; or a rule's.
    pub runs_functions: bool,
    /// A foreign key may change the key of a row that nobody wrote.
    pub cascades: bool,
    /// The role may read `xmin`, which it may not by grants on columns.
    pub reads_xmin: bool,
}

/// A column of it.
#[derive(Clone, Debug, Default)]
pub struct ColumnFacts {
    /// Its type (a domain's base), with its schema, quoted, without typmod.
    pub type_name: String,
    /// It gets a value where an INSERT gives none: a default (its own or its type's), or an identity.
    pub has_default: bool,
    /// What it gets is not known where the INSERT is made.
    pub is_filled_in: bool,
    /// The role may name it in an INSERT.
    pub insertable: bool,
    /// Stored generated.
    pub generated: bool,
    /// `GENERATED ALWAYS AS IDENTITY`.
    pub always: bool,
}

/// Makes sure that the role may call what statements refuse by. Or else it would be missing only where something is to be refused,
/// and look like a right that the write has not.
async fn may_refuse(client: &Client, role: Option<&str>) -> Result<(), Error> {
    let rows = client
        .query(
            "SELECT r, pg_catalog.has_schema_privilege(r, 'anabranch', 'USAGE')
                   AND pg_catalog.has_function_privilege(r, 'anabranch.refuse(text, int)', 'EXECUTE')
               FROM coalesce($1, current_user::text) r",
            &[&role],
        )
        .await?;
    match rows.first() {
        Some(row) if !row.get::<_, bool>(1) => Err(Error::Definite(format!(
            "the role {:?} may not call anabranch.refuse, which all roles that write must: restart the streamer, which grants \
             that to the roles that are there as it starts",
            row.get::<_, &str>(0)
        ))),
        _ => Ok(()),
    }
}

/// Reads them, for a role; `None`: the one that is logged in.
pub async fn read(client: &Client, table: &Table, role: Option<&str>) -> Result<Facts, Error> {
    may_refuse(client, role).await?;
    let attributes = client
        .query(
            "SELECT attnum, attname::text,
                    atthasdef AND attgenerated = '' OR attidentity <> ''
                        OR EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.oid = atttypid AND t.typdefault IS NOT NULL),
                    attgenerated <> '', attidentity = 'a',
                    pg_catalog.has_column_privilege(coalesce($2, current_user::text), attrelid, attnum, 'INSERT')
               FROM pg_catalog.pg_attribute
              WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            &[&table.oid, &role],
        )
        .await?;
    let oids: Vec<u32> = table.columns.iter().map(|column| column.base_oid).collect();
    let types = client
        .query(
            "SELECT t.oid, pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(t.typname)
               FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
              WHERE t.oid = ANY ($1)",
            &[&oids],
        )
        .await?;
    let indexes = client
        .query(
            "SELECT c.relname::text, ARRAY(SELECT k.attnum FROM pg_catalog.unnest(i.indkey) WITH ORDINALITY k(attnum, place)
                                            WHERE k.place <= i.indnkeyatts)
               FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
              WHERE i.indrelid = $1 AND i.indisunique",
            &[&table.oid],
        )
        .await?;
    let mut key: Vec<_> = (table.key.iter())
        .map(|column| table.columns[*column].attnum)
        .collect();
    key.sort_unstable();
    // A policy may hide a row from an UPDATE, which then must not be taken for one that a trigger suppressed.
    let whole = client
        .query_opt(
            "SELECT NOT c.relrowsecurity AND EXISTS (
                 SELECT FROM pg_catalog.pg_trigger g
                  WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D' AND g.tgtype & 19 = 19),
                    c.relhasrules OR EXISTS (
                 SELECT FROM pg_catalog.pg_trigger g
                  WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D' AND g.tgtype & 3 = 3),
                    pg_catalog.has_column_privilege(coalesce($2, current_user::text), c.oid, (-2)::int2, 'SELECT'),
                    EXISTS (
                 SELECT FROM pg_catalog.pg_constraint f
                  WHERE f.conrelid = c.oid AND f.contype = 'f' AND f.confupdtype IN ('c', 'n', 'd') AND f.conkey && $3),
                    c.relhasrules OR c.relhassubclass OR EXISTS (
                 SELECT FROM pg_catalog.pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D')
                        OR EXISTS (
                 SELECT FROM pg_catalog.pg_constraint f
                  WHERE f.confrelid = c.oid AND f.contype = 'f'
                    AND (f.confupdtype IN ('c', 'n', 'd') OR f.confdeltype IN ('c', 'n', 'd')))
               FROM pg_catalog.pg_class c WHERE c.oid = $1",
            &[&table.oid, &role, &key],
        )
        .await?;
    let is = |place: usize| whole.as_ref().is_some_and(|row| row.get(place));

    let defaults = defaults::read(client, std::iter::once(table)).await?;
    let defaults = defaults.get(&table.oid);
    let columns = table.columns.iter().map(|column| {
        let left_out = defaults.and_then(|of_table| of_table.get(&column.attnum));
        let row = attributes
            .iter()
            .find(|row| row.get::<_, i16>(0) == column.attnum);
        let named = types
            .iter()
            .find(|row| row.get::<_, u32>(0) == column.base_oid);
        let (Some(row), Some(named)) = (row, named) else {
            let table = table.full_name();
            return Err(Error::Transient(format!(
                "the columns of {table} changed just now"
            )));
        };
        Ok(ColumnFacts {
            type_name: named.get(1),
            has_default: row.get(2),
            is_filled_in: left_out == Some(&LeftOut::Other),
            generated: row.get(3),
            always: row.get(4),
            insertable: row.get(5),
        })
    });
    Ok(Facts {
        columns: columns.collect::<Result<_, _>>()?,
        row: (attributes.iter())
            .map(|row| (row.get(1), row.get(3)))
            .collect(),
        keys: (indexes.iter())
            .filter(|row| {
                let mut columns: Vec<i16> = row.get(1);
                columns.sort_unstable();
                columns == key
            })
            .map(|row| row.get(0))
            .collect(),
        suppresses: is(0),
        diverts: is(1),
        reads_xmin: is(2),
        cascades: is(3),
        runs_functions: is(4),
    })
}
