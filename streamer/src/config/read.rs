//! What each key means, and which values are right.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use super::{
    Auth, Config, Postgres, Secret, SqlPlace, StaticToken, access, memory,
    tree::{self, Complaints, Entry, Node, Origin, Section, Text},
    writes,
};
use crate::{
    policy::Wanted,
    postgres::target::Target,
    shape::{self, ParamSource, Source},
};

const ROOTS: [&str; 13] = [
    "listen",
    "data_dir",
    "memory_max",
    "row_bytes_max",
    "change_index_bytes_max",
    "change_index_hours_max",
    "wal_retained_max",
    "subquery_depth_max",
    "tls",
    "postgres",
    "auth",
    "shape",
    "table",
];

/// Names are at most as long as Postgres' own.
pub(super) const NAME_BYTES_MAX: usize = 63;

/// A static token is typed by hand, but must not be guessed at once: it is for development, not for children.
const TOKEN_BYTES_MIN: usize = 4;

pub(super) fn config(
    path: &Path,
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
    complaints: &Complaints,
) -> Option<Config> {
    let mut root = tree::parse(text, complaints);
    let mut warnings: Vec<String> = tree::overlay(&mut root, environment, &ROOTS, complaints)
        .into_iter()
        .map(|name| {
            format!("environment variable {name} names no key of the config; it is ignored")
        })
        .collect();

    let files = super::FILES.map(|field| {
        let origin = tree::origin_of(&root, field);
        (field, super::place(path, text, &origin))
    });
    let mut root = Section::new("", root, complaints)?;
    let listen = listen(&mut root);
    let data_dir = path_of(&mut root, "data_dir").unwrap_or_else(|| super::DATA_DIR_DEFAULT.into());
    let memory_max = sized(
        &mut root,
        "memory_max",
        super::MEMORY_MAX_DEFAULT,
        super::MEMORY_MAX_MIN..=1 << 50,
        "must be at least \"64MiB\"",
    );
    let row_limit = memory::row_bytes_limit(memory_max);
    let row_bytes_max = sized(
        &mut root,
        "row_bytes_max",
        memory::row_bytes_default(memory_max),
        1 << 16..=row_limit,
        &format!(
            "must be between \"64KiB\" and {row_limit}, a third of memory_max (and 1000000000): a row is held twice"
        ),
    );
    let change_index_bytes_max = sized(
        &mut root,
        "change_index_bytes_max",
        super::CHANGE_INDEX_BYTES_MAX_DEFAULT,
        super::MIB..=1 << 50,
        "must be at least \"1MiB\"",
    );
    let wal_retained_max = sized(
        &mut root,
        "wal_retained_max",
        super::WAL_RETAINED_MAX_DEFAULT,
        64 * super::MIB..=1 << 50,
        "must be at least \"64MiB\"",
    );
    let change_index_hours_max = count(
        &mut root,
        "change_index_hours_max",
        super::CHANGE_INDEX_HOURS_MAX_DEFAULT,
        1..=87600,
        "a number of hours from 1 to 87600",
    );
    let subquery_depth_max = count(
        &mut root,
        "subquery_depth_max",
        super::SUBQUERY_DEPTH_MAX_DEFAULT,
        1..=shape::SUBQUERIES_MAX as u32,
        &format!(
            "a number of levels from 1 to {}, as many as a SELECT has subqueries at most",
            shape::SUBQUERIES_MAX
        ),
    );
    let tls = root.section("tls").and_then(access::tls);
    let postgres = match root.section("postgres") {
        Some(section) => postgres(section),
        None => {
            let message = "is missing: postgres://USER@HOST:PORT/DATABASE";
            complaints.add(&Origin::File(0..0), "postgres.url", message);
            None
        }
    };
    let loopback = listen.is_none_or(|listen| listen.ip().is_loopback());
    let auth = match root.section("auth") {
        Some(section) => auth(section, loopback, complaints),
        None => Auth::default(),
    };
    let (shapes, places) = match root.section("shape") {
        Some(section) => shapes(section, path, text, complaints),
        None => Default::default(),
    };
    let policies = match root.section("table") {
        Some(section) => writes::policies(section, complaints),
        None => Wanted::default(),
    };
    root.finish();

    access::warn(&auth, tls.as_ref(), &mut warnings);
    if shapes.is_empty() {
        warnings.push("no [shape.NAME]: there is nothing to subscribe to".into());
    }
    if !loopback && tls.is_none() {
        warnings.push(
            "`listen` is open to the network without [tls]: tokens and rows travel in the clear, unless a proxy in front ends TLS".into(),
        );
    }
    Some(Config {
        listen: listen?,
        data_dir,
        memory_max,
        row_bytes_max,
        change_index_bytes_max,
        change_index_hours_max,
        wal_retained_max,
        subquery_depth_max,
        tls,
        postgres: postgres?,
        auth,
        shapes,
        policies,
        warnings,
        places,
        files: files.into(),
    })
}

fn listen(root: &mut Section<'_>) -> Option<SocketAddr> {
    match root.text("listen") {
        None => super::LISTEN_DEFAULT.parse().ok(),
        Some(Text { text, origin }) => match text.parse() {
            Ok(address) => Some(address),
            Err(_) => {
                let message =
                    "must be an IP address and a port, such as \"127.0.0.1:7420\" or \"[::]:7420\"";
                root.complain(&origin, "listen", message);
                None
            }
        },
    }
}

fn sized(
    section: &mut Section<'_>,
    key: &'static str,
    default: u64,
    range: std::ops::RangeInclusive<u64>,
    message: &str,
) -> u64 {
    match section.bytes(key) {
        Some((bytes, origin)) => {
            if !range.contains(&bytes) {
                section.complain(&origin, key, message);
            }
            bytes
        }
        None => default,
    }
}

fn count(
    root: &mut Section<'_>,
    key: &'static str,
    default: u32,
    range: RangeInclusive<u32>,
    example: &str,
) -> u32 {
    match root.number(key, example) {
        None => default,
        Some((count, origin)) => match u32::try_from(count) {
            Ok(count) if range.contains(&count) => count,
            _ => {
                root.complain(&origin, key, format!("must be {example}"));
                default
            }
        },
    }
}

pub(super) fn path_of(section: &mut Section<'_>, key: &'static str) -> Option<PathBuf> {
    let Text { text, origin } = section.text(key)?;
    if text.is_empty() {
        section.complain(&origin, key, "must be a path");
    }
    Some(text.into())
}

fn postgres(mut section: Section<'_>) -> Option<Postgres> {
    if !section.has("url") {
        let origin = section.origin.clone();
        let message = "is missing: postgres://USER@HOST:PORT/DATABASE";
        section.complain(&origin, "url", message);
    }
    let target = target_of(&mut section, "url");
    let write_target = target_of(&mut section, "write_url").or_else(|| target.clone());
    let publication = match section.text("publication") {
        None => super::PUBLICATION_DEFAULT.to_owned(),
        Some(Text { text, origin }) => {
            if text.is_empty() || text.len() > NAME_BYTES_MAX || text.contains('\0') {
                let message = "must be a name of 1 to 63 bytes";
                section.complain(&origin, "publication", message);
            }
            text
        }
    };
    let slot = match section.text("slot") {
        None => super::SLOT_DEFAULT.to_owned(),
        Some(Text { text, origin }) => {
            let right = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '_');
            if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.chars().all(right) {
                let message = "must be 1 to 63 of a-z, 0-9 and _, as Postgres has it for slots";
                section.complain(&origin, "slot", message);
            }
            text
        }
    };
    let streaming = section.flag("streaming").unwrap_or_default();
    section.finish();
    Some(Postgres {
        target: target?,
        write_target: write_target?,
        publication,
        slot,
        streaming,
    })
}

fn target_of(section: &mut Section<'_>, key: &'static str) -> Option<Target> {
    let Text { text, origin } = section.text(key)?;
    match Target::parse(&text) {
        Ok(target) => Some(target),
        Err(reason) => {
            section.complain(&origin, key, reason);
            None
        }
    }
}

fn auth(mut section: Section<'_>, loopback: bool, complaints: &Complaints) -> Auth {
    let mut tokens = Vec::new();
    let field = section.field("tokens");
    for (i, item) in section
        .list("tokens")
        .unwrap_or_default()
        .into_iter()
        .enumerate()
    {
        let field = format!("{field}[{i}]");
        if !loopback {
            let message = "static tokens are for development, and refused unless `listen` is loopback; use auth.jwt";
            complaints.add(&item.origin, &field, message);
        }
        if let Some(item) = Section::new(&field, item, complaints) {
            tokens.extend(static_token(item, complaints));
        }
    }
    for (i, token) in tokens.iter().enumerate() {
        if tokens[..i]
            .iter()
            .any(|other: &StaticToken| other.token == token.token)
        {
            let origin = section.origin.clone();
            section.complain(
                &origin,
                "tokens",
                format!("[{i}] is the same token as one before it"),
            );
        }
    }
    let jwt = section
        .section("jwt")
        .and_then(|jwt| access::jwt(jwt, complaints));
    let role = section
        .section("role")
        .and_then(|role| writes::role(role, complaints));
    let client_certificates = section.flag("client_certificates").unwrap_or_default();
    let revoked_file = path_of(&mut section, "revoked_file");
    let limits = section.section("limits").map(access::limits);
    section.finish();
    Auth {
        tokens,
        jwt,
        role,
        client_certificates,
        revoked_file,
        limits: limits.unwrap_or_default(),
    }
}

fn static_token(mut section: Section<'_>, complaints: &Complaints) -> Option<StaticToken> {
    if !section.has("token") {
        let origin = section.origin.clone();
        section.complain(&origin, "token", "is missing");
    }
    let token = section.text("token").map(|Text { text, origin }| {
        let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
        if text.len() < TOKEN_BYTES_MIN || !printable {
            let message = "must be at least 4 printable ASCII characters without blanks";
            section.complain(&origin, "token", message);
        }
        Secret::from(text)
    });
    let claims = match section.take("claims") {
        None => serde_json::Map::new(),
        Some(node) => {
            let origin = node.origin.clone();
            match tree::json(node, &section.field("claims"), complaints) {
                Some(serde_json::Value::Object(claims)) => claims,
                Some(_) => {
                    section.complain(&origin, "claims", "must be a table: { sub = \"edge-1\" }");
                    serde_json::Map::new()
                }
                None => serde_json::Map::new(),
            }
        }
    };
    section.finish();
    Some(StaticToken {
        token: token?,
        claims,
    })
}

fn is_word(name: &str, more: &str) -> bool {
    name.len() <= NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '_' || more.contains(c))
}

fn shapes(
    mut section: Section<'_>,
    path: &Path,
    text: &str,
    complaints: &Complaints,
) -> (Vec<Source>, Vec<Vec<SqlPlace>>) {
    let mut shapes = Vec::new();
    for (name, Entry { key, node }) in section.rest() {
        if !is_word(&name, "-") {
            let message =
                "a shape's name must be a letter or _, then letters, digits, _ and -, 63 at most";
            section.complain(&key, &name, message);
        }
        if let Some(shape) = Section::new(&section.field(&name), node, complaints) {
            shapes.push(self::shape(name, shape, path, text, complaints));
        }
    }
    shapes.into_iter().unzip()
}

fn shape(
    name: String,
    mut section: Section<'_>,
    path: &Path,
    file: &str,
    complaints: &Complaints,
) -> (Source, Vec<SqlPlace>) {
    let origin = section.origin.clone();
    let params = match section.section("params") {
        Some(params) => self::params(params, complaints),
        None => BTreeMap::new(),
    };
    let field = section.field("tables");
    let mut tables = Vec::new();
    let mut places = Vec::new();
    let missing = !section.has("tables");
    let items = section.list("tables");
    if missing || items.as_ref().is_some_and(Vec::is_empty) {
        let message = "is missing or empty: a list of SELECTs, one per table";
        section.complain(&origin, "tables", message);
    }
    for (i, item) in items.unwrap_or_default().into_iter().enumerate() {
        if let Some(Text { text, origin }) = tree::text(item, &format!("{field}[{i}]"), complaints)
        {
            places.push(sql_place(path, file, origin));
            tables.push(text);
        }
    }
    let writable = match section.take("writable") {
        Some(node) => writable(node, &section.field("writable"), &tables, complaints),
        None => vec![false; tables.len()],
    };
    section.finish();
    let source = Source {
        name,
        params,
        tables,
        writable,
    };
    (source, places)
}

/// Which of a shape's SELECTs may be written: all, none, or those over the tables that are named.
fn writable(node: Node, field: &str, tables: &[String], complaints: &Complaints) -> Vec<bool> {
    const FORM: &str =
        "must be true, false or a list of tables, such as [\"issues\", \"other.notes\"]";
    let origin = node.origin.clone();
    let mut all = vec![false; tables.len()];
    match tree::json(node, field, complaints) {
        Some(serde_json::Value::Bool(is)) => all.fill(is),
        Some(serde_json::Value::Array(items)) => {
            for item in items {
                let Some(name) = item.as_str() else {
                    complaints.add(&origin, field, FORM);
                    continue;
                };
                let wanted = writes::qualified(name);
                let is_of = |sql: &String| shape::table_named(sql).as_ref() == Some(&wanted);
                match tables.iter().position(is_of) {
                    Some(at) => all[at] = true,
                    // SQL that can't be read is complained of elsewhere.
                    None if tables.iter().any(|sql| shape::table_named(sql).is_none()) => {}
                    None => complaints.add(
                        &origin,
                        field,
                        format!("names `{name}`, and no SELECT of this shape is over that table"),
                    ),
                }
            }
        }
        Some(_) => complaints.add(&origin, field, FORM),
        None => {}
    }
    all
}

fn sql_place(path: &Path, file: &str, origin: Origin) -> SqlPlace {
    match origin {
        Origin::File(at) => {
            let (line, column) = tree::line_and_column(file, at.start);
            SqlPlace::File {
                path: path.into(),
                line,
                column,
                literal: file.get(at).unwrap_or_default().to_owned(),
            }
        }
        Origin::Variable(name) => SqlPlace::Variable(name),
    }
}

fn params(mut section: Section<'_>, complaints: &Complaints) -> BTreeMap<String, ParamSource> {
    let mut params = BTreeMap::new();
    for (name, Entry { key, node }) in section.rest() {
        if !is_word(&name, "") {
            let message =
                "a parameter's name must be a letter or _, then letters, digits and _, 63 at most";
            section.complain(&key, &name, message);
        }
        let field = section.field(&name);
        let Some(mut param) = Section::new(&field, node, complaints) else {
            continue;
        };
        let origin = param.origin.clone();
        let source = match (param.text("claim"), param.text("client")) {
            (Some(claim), None) if !claim.text.is_empty() => Some(ParamSource::Claim(claim.text)),
            (None, Some(client)) if !client.text.is_empty() => {
                Some(ParamSource::Client(client.text))
            }
            _ => {
                let message = "must be { claim = \"NAME\" } or { client = \"TYPE\" }";
                complaints.add(&origin, &field, message);
                None
            }
        };
        param.finish();
        params.extend(source.map(|source| (name, source)));
    }
    params
}
