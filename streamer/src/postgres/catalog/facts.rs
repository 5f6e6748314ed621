//! What is read from the catalogs, as it is there.
//!
//! The statement answers with one JSON document, since its parts (tables, columns, types, indexes, collations) must
//! come from one snapshot and have nothing in common as rows. Columns that only some versions of Postgres have
//! (`datlocprovider`, `colllocale`) are asked for through `to_jsonb`, which knows no missing column.

use std::collections::HashMap;

use serde::Deserialize;

use super::{
    super::sql::{Client, Error},
    Name,
};

/// Which tables.
pub(super) enum Asked<'a> {
    Names(&'a [Name]),
    Oids(&'a [u32]),
}

/// Everything about the tables that were asked for.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Facts {
    /// One for each that was asked for, in order.
    pub relations: Vec<Option<Relation>>,
    /// For each that is missing: one of which the name differs only by case, quoted.
    pub alike: Vec<Option<String>>,
    /// By table, in the order of `attnum`.
    pub columns: HashMap<u32, Vec<Attribute>>,
    /// By table, in the order of their OIDs.
    pub indexes: HashMap<u32, Vec<IndexFacts>>,
    /// All types of the columns, and those that these are made of.
    pub types: HashMap<u32, Type>,
    /// All collations of the columns.
    pub collations: HashMap<u32, Locale>,
    /// The database's own: what the collation named `default` stands for.
    pub database: Locale,
}

/// `pg_class`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Relation {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// `relkind`.
    pub kind: char,
    /// `relpersistence`.
    pub persistence: char,
    /// `relreplident`.
    pub identity: char,
    pub is_partition: bool,
    /// Tables inherit from it.
    pub has_children: bool,
}

/// `pg_attribute`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Attribute {
    pub attnum: i16,
    pub name: String,
    /// `atttypid`.
    pub type_oid: u32,
    pub typmod: i32,
    /// `format_type()`.
    pub postgres_type: String,
    /// Enforced, and for all rows.
    pub not_null: bool,
    /// `attcollation`; 0: none.
    pub collation: u32,
    /// `attgenerated` is set: stored or virtual.
    pub generated: bool,
}

/// `pg_type`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Type {
    pub name: String,
    /// The extension that it belongs to.
    pub extension: Option<String>,
    /// Of a domain: what it is over.
    pub base: Option<u32>,
    /// Of an array that prints as one (`int2vector` does not): its elements.
    pub element: Option<u32>,
    /// What separates values of this type in an array.
    pub delimiter: char,
    /// Of an enum, in its order.
    pub labels: Option<Vec<String>>,
}

/// `pg_index`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct IndexFacts {
    pub name: String,
    pub is_primary: bool,
    /// `indisreplident`.
    pub is_identity: bool,
    pub is_unique: bool,
    /// Not deferrable.
    pub is_immediate: bool,
    pub is_valid: bool,
    /// Neither partial nor on expressions.
    pub is_plain: bool,
    pub is_btree: bool,
    /// `attnum`s of its key, without what it only includes.
    pub key: Vec<i16>,
}

/// Of a collation, or of the database.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Locale {
    /// `collprovider`: `d`efault, lib`c`, `i`cu, `b`uiltin.
    pub provider: char,
    /// Its name, as its provider has it.
    pub locale: Option<String>,
    pub is_deterministic: bool,
}

/// Reads everything about `asked`.
pub(super) async fn read(client: &Client, asked: Asked<'_>) -> Result<Facts, Error> {
    let (oids, names): (Vec<Option<u32>>, Vec<Option<&Name>>) = match asked {
        Asked::Names(names) => names.iter().map(|name| (None, Some(name))).unzip(),
        Asked::Oids(oids) => oids.iter().map(|oid| (Some(*oid), None)).unzip(),
    };
    let schemas: Vec<_> = names
        .iter()
        .map(|name| name.map(|name| &name.schema))
        .collect();
    let names: Vec<_> = names
        .iter()
        .map(|name| name.map(|name| &name.name))
        .collect();
    // Compiling the statement takes seconds, running it milliseconds; and the planner's guess says to compile it.
    client.client.batch_execute("SET jit = off").await?;
    let row = client
        .client
        .query_one(QUERY, &[&oids, &schemas, &names])
        .await?;
    let json: &str = row.try_get(0)?;
    serde_json::from_str(json).map_err(|error| {
        Error::Definite(format!("the catalogs hold what is not expected: {error}"))
    })
}

/// Answers with one text. `$1`: OIDs; `$2`, `$3`: schemas and names where those are NULL.
///
/// Functions are named with their schema, since one in `public` with closer argument types would be preferred, and
/// would run with our rights.
const QUERY: &str = "
WITH RECURSIVE asked AS MATERIALIZED (
    SELECT a.place, a.schema, a.name, coalesce(a.oid, (
        SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = a.schema AND c.relname = a.name)) AS oid
    FROM unnest($1::pg_catalog.oid[], $2::pg_catalog.text[], $3::pg_catalog.text[])
        WITH ORDINALITY AS a(oid, schema, name, place)
), relation AS MATERIALIZED (
    SELECT c.*, n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid IN (SELECT oid FROM asked)
), attribute AS MATERIALIZED (
    SELECT * FROM pg_catalog.pg_attribute
    WHERE attrelid IN (SELECT oid FROM relation) AND attnum > 0 AND NOT attisdropped
), type AS NOT MATERIALIZED (
    SELECT t.*, CASE WHEN typtype = 'd' THEN typbasetype END AS base,
        CASE WHEN typoutput = 'pg_catalog.array_out'::pg_catalog.regproc THEN typelem END AS element
    FROM pg_catalog.pg_type t
), needed(oid) AS (
    SELECT atttypid FROM attribute
    UNION
    SELECT coalesce(type.base, type.element) FROM needed JOIN type USING (oid)
    WHERE type.base IS NOT NULL OR type.element IS NOT NULL
)
SELECT pg_catalog.json_build_object(
'relations', (
    SELECT coalesce(pg_catalog.json_agg(CASE WHEN relation.oid IS NOT NULL THEN pg_catalog.json_build_object(
        'oid', relation.oid::int8, 'schema', nspname, 'name', relname, 'kind', relkind,
        'persistence', relpersistence, 'identity', relreplident, 'is_partition', relispartition,
        'has_children', EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = relation.oid)
    ) END ORDER BY place), '[]')
    FROM asked LEFT JOIN relation USING (oid)),
'alike', (
    SELECT coalesce(pg_catalog.json_agg(CASE WHEN asked.oid IS NULL THEN (
        SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE pg_catalog.lower(n.nspname::text) = pg_catalog.lower(asked.schema) AND pg_catalog.lower(c.relname::text) = pg_catalog.lower(asked.name)
            AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
        ORDER BY n.nspname, c.relname LIMIT 1
    ) END ORDER BY place), '[]')
    FROM asked),
'columns', (
    SELECT coalesce(pg_catalog.json_object_agg(attrelid::int8, columns), '{}') FROM (
        SELECT attrelid, pg_catalog.json_agg(pg_catalog.json_build_object(
            'attnum', attnum, 'name', attname, 'type_oid', atttypid::int8, 'typmod', atttypmod,
            'postgres_type', pg_catalog.format_type(atttypid, atttypmod),
            'not_null', attnotnull AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_constraint
                WHERE conrelid = attrelid AND contype = 'n' AND NOT convalidated AND attnum = ANY(conkey)),
            'collation', attcollation::int8, 'generated', attgenerated <> ''
        ) ORDER BY attnum) AS columns
        FROM attribute GROUP BY attrelid) a),
'types', (
    SELECT coalesce(pg_catalog.json_object_agg(type.oid::int8, pg_catalog.json_build_object(
        'name', typname, 'base', base::int8, 'element', element::int8, 'delimiter', typdelim,
        'extension', (
            SELECT extname FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
            WHERE d.classid = 'pg_catalog.pg_type'::regclass AND d.objid = type.oid AND d.objsubid = 0
                AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'),
        'labels', CASE WHEN typtype = 'e' THEN (
            SELECT coalesce(pg_catalog.json_agg(enumlabel ORDER BY enumsortorder), '[]')
            FROM pg_catalog.pg_enum WHERE enumtypid = type.oid) END
    )), '{}')
    FROM needed JOIN type USING (oid)),
'indexes', (
    SELECT coalesce(pg_catalog.json_object_agg(indrelid::int8, indexes), '{}') FROM (
        SELECT indrelid, pg_catalog.json_agg(pg_catalog.json_build_object(
            'name', c.relname, 'is_primary', indisprimary, 'is_identity', indisreplident,
            'is_unique', indisunique, 'is_immediate', indimmediate,
            'is_valid', indisvalid AND indisready AND indislive,
            'is_plain', indpred IS NULL AND indexprs IS NULL, 'is_btree', amname = 'btree',
            'key', (indkey::int2[])[0:indnkeyatts - 1]
        ) ORDER BY indexrelid) AS indexes
        FROM pg_catalog.pg_index
        JOIN pg_catalog.pg_class c ON c.oid = indexrelid
        JOIN pg_catalog.pg_am am ON am.oid = c.relam
        WHERE indrelid IN (SELECT oid FROM relation) GROUP BY indrelid) i),
'collations', (
    SELECT coalesce(pg_catalog.json_object_agg(c.oid::int8, pg_catalog.json_build_object(
        'provider', collprovider, 'is_deterministic', collisdeterministic,
        'locale', CASE WHEN collprovider = 'c' THEN collcollate::text
            ELSE coalesce(pg_catalog.to_jsonb(c)->>'colllocale', pg_catalog.to_jsonb(c)->>'colliculocale', collcollate::text) END
    )), '{}')
    FROM pg_catalog.pg_collation c WHERE c.oid IN (SELECT attcollation FROM attribute)),
'database', (
    SELECT pg_catalog.json_build_object(
        'provider', coalesce(pg_catalog.to_jsonb(d)->>'datlocprovider', 'c'), 'is_deterministic', true,
        'locale', CASE WHEN coalesce(pg_catalog.to_jsonb(d)->>'datlocprovider', 'c') = 'c' THEN datcollate::text
            ELSE coalesce(pg_catalog.to_jsonb(d)->>'datlocale', pg_catalog.to_jsonb(d)->>'daticulocale') END)
    FROM pg_catalog.pg_database d WHERE datname = pg_catalog.current_database())
)::text";
