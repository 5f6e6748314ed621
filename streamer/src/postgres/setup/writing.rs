//! What writes need in the database: two published tables, which are the receipts, one that remembers which entries were
//! answered, and the functions that are the only way to them.
//!
//! The functions run with the rights of whoever set the database up, so each names every object with its schema, has a
//! fixed `search_path`, and refuses inside a trigger: a trigger of the application could otherwise become the login role
//! again (`RESET ROLE`) and claim what it likes. So could a function of a policy, a check or a default, which is in no
//! trigger: but a claim comes before all effects, so each refuses where something was written before. Errors of ours are of class `AB`, which Postgres does not use; what a
//! program has to know is in the field COLUMN of the error, never only in its text.

use super::{super::catalog::Name, grants, identifier, sql};
use crate::postgres::sql::Client;

/// The local transaction is not the next one. COLUMN: the last that is there.
pub const OUT_OF_ORDER: &str = "AB001";
/// The local transaction follows another one than the one that is there. COLUMN: the last that is there.
pub const FORKED: &str = "AB002";
/// The replica's id belongs to somebody else.
pub const OTHER_SUBJECT: &str = "AB003";
/// An entry of the local transaction was answered before, under another number or another replica's id: the file is a copy.
pub const ALREADY_CLAIMED: &str = "AB004";
/// An effect was refused. COLUMN: the outcome; DATATYPE: which entry, if the statement is of several.
pub const REFUSED: &str = "AB100";

/// What writes need.
#[derive(Clone, Copy, Debug)]
pub struct Writing<'a> {
    /// The role that logs in to write.
    pub role: &'a str,
    /// The roles that it becomes to write. Empty: it writes as itself.
    pub roles: &'a [String],
    /// The tables that are written. The login role reads them, to see whether a replica may see what it wrote.
    pub tables: &'a [Name],
}

/// One row for each replica that ever wrote: its receipt.
const REPLICAS: &str = "\
CREATE TABLE IF NOT EXISTS anabranch.replicas (
  replica text PRIMARY KEY,
  subject text NOT NULL,
  seq     bigint NOT NULL,
  hash    bytea NOT NULL,
  seen    timestamptz NOT NULL DEFAULT now()
)";

/// One row for each local transaction that was rejected, at least until its replica has it (`settled`, since `at`). It is kept
/// behind that too: a backup of the file that is restored has not heard of it.
const REJECTIONS: &str = "\
CREATE TABLE IF NOT EXISTS anabranch.rejections (
  replica         text NOT NULL,
  subject         text NOT NULL,
  seq             bigint NOT NULL,
  entry           int,
  outcome         text NOT NULL,
  sqlstate        text NOT NULL,
  message         text NOT NULL,
  constraint_name text,
  settled         boolean NOT NULL DEFAULT false,
  at              timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (replica, seq)
)";

/// Settled rejections are kept of so many local transactions of a replica: a program that does nothing but what is refused
/// must not fill the database, nor the files, which get them too.
pub const SETTLED_KEPT: u32 = 100_000;

/// How long it is remembered which entries were answered, and what was rejected of them: a backup that is restored, or a copy that is started, should not be
/// older, or nobody can tell what became of what was pending in it. A row takes about 100 bytes with its index.
pub const CLAIMS_KEPT_DAYS: u32 = 30;

/// One row for each local transaction that was answered, by the nonce of its last entry; for each entry of one that may be
/// several. Without an outcome it took effect. Its key is what keeps an entry from taking effect again, whichever copy of the
/// file sends it.
const CLAIMS: &str = "\
CREATE TABLE IF NOT EXISTS anabranch.claims (
  nonce    uuid PRIMARY KEY,
  outcome  text,
  sqlstate text,
  at       timestamptz NOT NULL DEFAULT now()
)";

/// A function of the schema `anabranch`.
struct Function {
    name: &'static str,
    /// Names and types of its arguments.
    arguments: &'static str,
    /// Types alone, as `oidvectortypes` prints them.
    types: &'static str,
    returns: &'static str,
    /// Runs with the rights of its owner, and for the login role only; else for those that write too.
    trusted: bool,
    body: &'static str,
}

/// What every trusted one begins with.
macro_rules! body {
    ($declared:literal, $body:literal) => {
        concat!(
            "\n#variable_conflict use_column\n",
            $declared,
            "BEGIN
  IF pg_catalog.pg_trigger_depth() > 0 THEN
    RAISE EXCEPTION 'anabranch: not within a trigger' USING ERRCODE = '42501';
  END IF;
  IF pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL THEN
    RAISE EXCEPTION 'anabranch: not in a transaction that has written' USING ERRCODE = '42501';
  END IF;
",
            $body,
            "END\n"
        )
    };
}

const FUNCTIONS: [Function; 7] = [
    Function {
        name: "claim",
        arguments: "replica text, subject text, seq bigint, previous bytea, hash bytea, nonces uuid[]",
        types: "text, text, bigint, bytea, bytea, uuid[]",
        returns: "void",
        trusted: true,
        // The UPDATE waits for another claim of the replica that is under way, and then finds that it is too late; the INSERT
        // for one of the same entries. A new id begins at any number: numbers of a file go on when it gets one.
        body: body!(
            "DECLARE\n  stored record;\n  is_next boolean;\n  count bigint;\n",
            "\
  IF $4 = pg_catalog.decode(pg_catalog.repeat('00', 32), 'hex') THEN
    INSERT INTO anabranch.replicas (replica, subject, seq, hash) VALUES ($1, $2, $3, $5) ON CONFLICT DO NOTHING;
  ELSE
    UPDATE anabranch.replicas r SET seq = $3, hash = $5, seen = pg_catalog.now()
     WHERE r.replica = $1 AND r.subject = $2 AND r.seq = $3 - 1 AND r.hash = $4;
  END IF;
  is_next := FOUND;
  IF is_next THEN
    INSERT INTO anabranch.claims (nonce) SELECT pg_catalog.unnest($6) ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS count = ROW_COUNT;
    IF count < pg_catalog.cardinality($6) THEN
      RAISE EXCEPTION 'anabranch: local transaction % was answered before, for another copy of the file', $3
        USING ERRCODE = 'AB004';
    END IF;
    RETURN;
  END IF;
  SELECT r.subject, r.seq, r.hash INTO stored FROM anabranch.replicas r WHERE r.replica = $1;
  IF FOUND AND stored.subject <> $2 THEN
    RAISE EXCEPTION 'anabranch: this replica id belongs to another subject' USING ERRCODE = 'AB003';
  END IF;
  IF stored.seq = $3 AND stored.hash <> $5
     OR stored.seq = $3 - 1 AND stored.hash <> $4
     OR stored.seq IS NULL AND $3 = 1 THEN
    RAISE EXCEPTION 'anabranch: local transaction % follows another one than the one that is here', $3
      USING ERRCODE = 'AB002', COLUMN = coalesce(stored.seq, 0)::pg_catalog.text;
  END IF;
  RAISE EXCEPTION 'anabranch: local transaction % is not the next one', $3
    USING ERRCODE = 'AB001', COLUMN = coalesce(stored.seq, 0)::pg_catalog.text;
"
        ),
    },
    Function {
        name: "reject",
        arguments: "replica text, subject text, seq bigint, previous bytea, hash bytea, nonces uuid[], entry int, \
                    outcome text, sqlstate text, message text, constraint_name text",
        types: "text, text, bigint, bytea, bytea, uuid[], integer, text, text, text, text",
        returns: "void",
        trusted: true,
        body: body!(
            "",
            "\
  PERFORM anabranch.claim($1, $2, $3, $4, $5, $6);
  INSERT INTO anabranch.rejections (replica, subject, seq, entry, outcome, sqlstate, message, constraint_name)
    VALUES ($1, $2, $3, $7, $8, $9, $10, $11);
  UPDATE anabranch.claims c SET outcome = $8, sqlstate = $9 WHERE c.nonce = ANY ($6);
"
        ),
    },
    Function {
        name: "settle",
        arguments: "replica text, subject text, seq bigint, kept integer",
        types: "text, text, bigint, integer",
        returns: "void",
        trusted: true,
        body: body!(
            "",
            "\
  UPDATE anabranch.rejections r SET settled = true, at = pg_catalog.now()
   WHERE r.replica = $1 AND r.subject = $2 AND r.seq <= $3 AND NOT r.settled;
  DELETE FROM anabranch.rejections r WHERE r.replica = $1 AND r.subject = $2 AND r.seq <= $3 - $4 AND r.settled;
"
        ),
    },
    Function {
        name: "judge",
        arguments: "nonces uuid[]",
        types: "uuid[]",
        returns: "TABLE (nonce uuid, outcome text, sqlstate text)",
        trusted: true,
        body: body!(
            "",
            "\
  RETURN QUERY SELECT c.nonce, c.outcome, c.sqlstate FROM anabranch.claims c WHERE c.nonce = ANY ($1);
"
        ),
    },
    Function {
        name: "prune",
        arguments: "days integer, rows integer",
        types: "integer, integer",
        returns: "bigint",
        trusted: true,
        // By both clocks: what is younger by that of the replica is still there, so of such an entry it is known for sure.
        body: body!(
            "DECLARE\n  count bigint;\n  others bigint;\n  since timestamptz := pg_catalog.now() - pg_catalog.make_interval(days => $1);\n",
            "\
  DELETE FROM anabranch.claims c WHERE c.nonce IN (
    SELECT o.nonce FROM anabranch.claims o
     WHERE o.nonce < pg_catalog.rpad(pg_catalog.lpad(pg_catalog.to_hex(
             pg_catalog.floor(pg_catalog.extract('epoch', since))::bigint), 16, '0'), 32, '0')::uuid
       AND o.at < since
     ORDER BY o.nonce LIMIT $2);
  GET DIAGNOSTICS count = ROW_COUNT;
  DELETE FROM anabranch.rejections r WHERE (r.replica, r.seq) IN (
    SELECT o.replica, o.seq FROM anabranch.rejections o WHERE o.settled AND o.at < since LIMIT $2);
  GET DIAGNOSTICS others = ROW_COUNT;
  RETURN greatest(count, others);
"
        ),
    },
    Function {
        name: "lease",
        arguments: "relation oid, place smallint, writer text, wanted int",
        types: "oid, smallint, text, integer",
        returns: "TABLE(first bigint, last bigint, step bigint)",
        trusted: true,
        // By nextval(), so that others who take ids meanwhile, the increment and the cache are as right as for them. Of a
        // sequence that nears its end only a part is taken: ids that are leased and not used are lost.
        body: body!(
            "DECLARE\n  sequence pg_catalog.pg_sequence;\n  id bigint;\n",
            "\
  SELECT s.* INTO sequence
    FROM pg_catalog.pg_attribute a
    LEFT JOIN pg_catalog.pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
     AND pg_catalog.pg_get_expr(f.adbin, f.adrelid) LIKE 'nextval(%::regclass)'
    JOIN pg_catalog.pg_depend d
      ON a.attidentity = '' AND d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass AND d.objid = f.oid
         AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
      OR a.attidentity <> '' AND d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.deptype = 'i'
         AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
         AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum
    JOIN pg_catalog.pg_sequence s ON s.seqrelid = CASE a.attidentity WHEN '' THEN d.refobjid ELSE d.objid END
   WHERE a.attrelid = $1 AND a.attnum = $2;
  IF NOT FOUND OR NOT pg_catalog.has_any_column_privilege(coalesce($3, session_user)::pg_catalog.name, $1, 'INSERT') THEN
    RETURN;
  END IF;
  wanted := least(wanted, 1 + pg_catalog.trunc(
    (CASE WHEN sequence.seqincrement > 0 THEN sequence.seqmax ELSE sequence.seqmin END
      - coalesce(pg_catalog.pg_sequence_last_value(sequence.seqrelid), sequence.seqstart)::pg_catalog.numeric)
    / sequence.seqincrement / 100));
  step := sequence.seqincrement;
  FOR i IN 1 .. wanted LOOP
    id := pg_catalog.nextval(sequence.seqrelid::pg_catalog.regclass);
    IF id - last = step THEN
      last := id;
    ELSE
      IF first IS NOT NULL THEN
        RETURN NEXT;
      END IF;
      first := id;
      last := id;
    END IF;
  END LOOP;
  RETURN NEXT;
"
        ),
    },
    Function {
        name: "refuse",
        arguments: "outcome text, entry int",
        types: "text, integer",
        returns: "void",
        trusted: false,
        body: "
BEGIN
  RAISE EXCEPTION 'anabranch: %', $1
    USING ERRCODE = 'AB100', COLUMN = $1, DATATYPE = CASE WHEN $2 IS NULL THEN '' ELSE $2::pg_catalog.text END;
END
",
    },
];

impl Function {
    fn signature(&self) -> String {
        format!("anabranch.{}({})", self.name, self.types)
    }

    fn create(&self) -> String {
        format!(
            "CREATE OR REPLACE FUNCTION anabranch.{}({}) RETURNS {}\n\
             LANGUAGE plpgsql {} SET search_path = pg_catalog, pg_temp AS $anabranch${}$anabranch$",
            self.name,
            self.arguments,
            self.returns,
            if self.trusted {
                "SECURITY DEFINER"
            } else {
                "SECURITY INVOKER"
            },
            self.body
        )
    }
}

/// What is missing. `reader` is the role that replicates, quoted.
pub(super) async fn plan(
    client: &Client,
    writing: Writing<'_>,
    reader: &str,
) -> Result<Vec<String>, sql::Error> {
    let mut statements = Vec::new();
    made(client, reader, &mut statements).await?;
    let login = identifier(writing.role);
    let known = client
        .client
        .query_opt(
            "SELECT rolname = current_user FROM pg_roles WHERE rolname = $1",
            &[&writing.role],
        )
        .await?;
    if known.is_none() {
        statements.push(format!("CREATE ROLE {login} LOGIN NOINHERIT"));
    }
    functions(client, writing, known.is_some(), &mut statements).await?;
    for role in writing.roles {
        let member = client
            .client
            .query_opt(
                "SELECT coalesce((SELECT pg_catalog.pg_has_role(l.oid, r.oid, 'MEMBER') FROM pg_roles l WHERE l.rolname = $1), false)
                   FROM pg_roles r WHERE r.rolname = $2",
                &[&writing.role, role],
            )
            .await?;
        // A role that is not there is not made: nobody knows what it should be allowed.
        if member.is_some_and(|row| !row.get::<_, bool>(0)) {
            statements.push(format!("GRANT {} TO {login}", identifier(role)));
        }
    }
    // One that is not there yet will have what everybody has.
    let reads = if known.is_some() {
        writing.role
    } else {
        "public"
    };
    statements.extend(grants(client, writing.tables, Some(reads), &login).await?);
    statements.extend(standing(client, writing.role, &login).await?);
    Ok(statements)
}

/// What lets the login role see how far a replica has come.
async fn standing(client: &Client, role: &str, quoted: &str) -> Result<Option<String>, sql::Error> {
    let may = client
        .client
        .query_opt(
            "SELECT pg_catalog.has_table_privilege(r.oid, c.oid, 'SELECT')
               FROM pg_roles r, pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE r.rolname = $1 AND n.nspname = 'anabranch' AND c.relname = 'replicas'",
            &[&role],
        )
        .await?;
    let may = may.is_some_and(|row| row.get(0));
    Ok((!may).then(|| format!("GRANT SELECT ON anabranch.replicas TO {quoted}")))
}

/// The tables.
async fn made(
    client: &Client,
    reader: &str,
    statements: &mut Vec<String>,
) -> Result<(), sql::Error> {
    let rows = client
        .client
        .query(
            "SELECT c.relname::text, pg_catalog.has_table_privilege(c.oid, 'SELECT')
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE n.nspname = 'anabranch'",
            &[],
        )
        .await?;
    let tables = [
        ("replicas", REPLICAS, true),
        ("rejections", REJECTIONS, true),
        ("claims", CLAIMS, false),
    ];
    for (name, create, is_read) in tables {
        let found = rows.iter().find(|row| row.get::<_, &str>(0) == name);
        if found.is_none() {
            statements.push(create.into());
            statements.push(format!("REVOKE ALL ON anabranch.{name} FROM PUBLIC"));
        }
        if is_read && !found.is_some_and(|row| row.get(1)) {
            statements.push(format!("GRANT SELECT ON anabranch.{name} TO {reader}"));
        }
    }
    Ok(())
}

/// Whether a function does the same. `check` prints scripts with blanks before each line, and they are pasted with them.
fn is_same_body(found: &str, wanted: &str) -> bool {
    let lines = |body: &str| -> Vec<String> {
        let lines = body.lines().map(|line| line.trim().to_owned());
        lines.filter(|line| !line.is_empty()).collect()
    };
    lines(found) == lines(wanted)
}

/// The functions, and who may call them.
async fn functions(
    client: &Client,
    writing: Writing<'_>,
    known: bool,
    statements: &mut Vec<String>,
) -> Result<(), sql::Error> {
    let sql = &client.client;
    // Not to_regprocedure(): it fails where the role may not use the schema.
    let found = sql
        .query(
            "SELECT p.oid, p.proname::text, pg_catalog.oidvectortypes(p.proargtypes), p.prosrc, p.prosecdef, p.proconfig,
                    EXISTS (SELECT FROM pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
                             WHERE a.grantee = 0)
               FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
              WHERE n.nspname = 'anabranch' AND p.proname = ANY ($1)",
            &[&FUNCTIONS.map(|function| function.name).to_vec()],
        )
        .await?;
    let mut writers: Vec<&str> = vec![writing.role];
    writers.extend(writing.roles.iter().map(String::as_str));
    let present = sql
        .query(
            "SELECT r.rolname::text,
                    coalesce((SELECT pg_catalog.has_schema_privilege(r.oid, n.oid, 'USAGE')
                                FROM pg_namespace n WHERE n.nspname = 'anabranch'), false)
               FROM pg_roles r WHERE r.rolname = ANY ($1)",
            &[&writers],
        )
        .await?;
    for writer in &writers {
        let uses = present.iter().find(|row| row.get::<_, &str>(0) == *writer);
        let exists = uses.is_some() || *writer == writing.role && !known;
        if exists && !uses.is_some_and(|row| row.get(1)) {
            let role = identifier(writer);
            statements.push(format!("GRANT USAGE ON SCHEMA anabranch TO {role}"));
        }
    }
    for function in &FUNCTIONS {
        let mut as_it_is = None;
        for row in &found {
            if row.get::<_, &str>(1) != function.name {
                continue;
            }
            let found_types: String = row.get(2);
            if found_types == function.types {
                as_it_is = Some(row);
            } else {
                let name = function.name;
                statements.push(format!("DROP FUNCTION anabranch.{name}({found_types})"));
            }
        }
        let config: Option<Vec<String>> = as_it_is.and_then(|row| row.get(5));
        let is_same = as_it_is.is_some_and(|row| {
            is_same_body(row.get(3), function.body) && row.get::<_, bool>(4) == function.trusted
        }) && config
            .is_some_and(|config| config == ["search_path=pg_catalog, pg_temp"]);
        if !is_same {
            statements.push(function.create());
        }
        let signature = function.signature();
        if as_it_is.is_none_or(|row| row.get(6)) {
            statements.push(format!("REVOKE ALL ON FUNCTION {signature} FROM PUBLIC"));
        }
        let oid: Option<u32> = as_it_is.map(|row| row.get(0));
        for writer in &writers {
            let exists = present.iter().any(|row| row.get::<_, &str>(0) == *writer)
                || *writer == writing.role;
            let is_login = *writer == writing.role;
            if !exists || (function.trusted && !is_login) {
                continue;
            }
            let may = match oid {
                Some(oid) if known || !is_login => sql
                    .query_one(
                        "SELECT pg_catalog.has_function_privilege($1, $2::oid, 'EXECUTE')",
                        &[writer, &oid],
                    )
                    .await?
                    .get(0),
                _ => false,
            };
            if !may {
                let role = identifier(writer);
                statements.push(format!("GRANT EXECUTE ON FUNCTION {signature} TO {role}"));
            }
        }
    }
    Ok(())
}
