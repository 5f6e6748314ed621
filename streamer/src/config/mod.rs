//! `streamer.toml` and the environment, read strictly: an unknown key, a wrong type or a value out of range refuses
//! to start, with file, line, field and what would be right; all of them at once where possible.
//!
//! A key that is not known is refused rather than ignored: nobody shall believe in what the config says and nobody does.
//! Secrets are held in [`Secret`]s and in `Target`, which never print them. Paths are relative to the working directory.

mod access;
mod memory;
mod read;
mod tree;
mod writes;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

pub use access::{Jwks, Limits};
pub use memory::Memory;
use tree::{Complaint, Complaints, Origin};
pub use writes::Role;

use crate::{mirror, policy, postgres::target::Target, shape};

pub(crate) const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Loopback: nothing is open to the network unless somebody says so.
pub const LISTEN_DEFAULT: &str = "127.0.0.1:7420";
/// Where systemd's `StateDirectory=anabranch` and the container image put it.
pub const DATA_DIR_DEFAULT: &str = "/var/lib/anabranch";
/// Holds the hot part of a database of some gigabytes, and fits on the smallest machine that runs Postgres.
pub const MEMORY_MAX_DEFAULT: u64 = 256 * MIB;
/// Below this the parts get too small to work: a message, a chunk and a page cache need their place.
pub const MEMORY_MAX_MIN: u64 = 64 * MIB;
/// Some ten million changed rows: a replica that was away for as long resumes without a new copy.
pub const CHANGE_INDEX_BYTES_MAX_DEFAULT: u64 = 4 * GIB;
/// A week offline costs the rows that differ.
pub const CHANGE_INDEX_HOURS_MAX_DEFAULT: u32 = 7 * 24;
/// What the slot may hold back on the server before it is called a danger.
pub const WAL_RETAINED_MAX_DEFAULT: u64 = 10 * GIB;
/// Subqueries within subqueries, so many levels at most: each row is looked at with rows of so many tables, each once for
/// those of the one before, and by then few people know what a shape means.
pub const SUBQUERY_DEPTH_MAX_DEFAULT: u32 = 4;
/// Publication and slot bear the program's name: whoever finds them on the server knows whose they are.
pub const PUBLICATION_DEFAULT: &str = "anabranch";
/// See [`PUBLICATION_DEFAULT`].
pub const SLOT_DEFAULT: &str = "anabranch";

/// The streamer's config, complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// gRPC and HTTP on one port.
    pub listen: SocketAddr,
    /// Holds the mirror and the spool.
    pub data_dir: PathBuf,
    /// Cap of memory, caches included.
    pub memory_max: u64,
    /// A row above this stops its table.
    pub row_bytes_max: u64,
    /// The change index is trimmed above this.
    pub change_index_bytes_max: u64,
    /// And what is older than this.
    pub change_index_hours_max: u32,
    /// WAL that the slot may hold back before a warning.
    pub wal_retained_max: u64,
    /// How deep subqueries may be nested.
    pub subquery_depth_max: u32,
    /// TLS of `listen`.
    pub tls: Option<Tls>,
    /// Where the data comes from.
    pub postgres: Postgres,
    /// Who may connect.
    pub auth: Auth,
    /// What may be subscribed to, by name.
    pub shapes: Vec<shape::Source>,
    /// How conflicting writes are settled.
    pub policies: policy::Wanted,
    /// What is worth saying although it is allowed.
    pub warnings: Vec<String>,
    /// Where each SELECT of `shapes` is written.
    places: Vec<Vec<SqlPlace>>,
    /// Where each of [`FILES`] is written, or what should hold it.
    files: BTreeMap<&'static str, Place>,
}

/// The keys that name a file, or an address, which the streamer reads at its start.
pub const FILES: [&str; 8] = [
    "tls.cert",
    "tls.key",
    "tls.client_ca",
    "auth.jwt.hs256_file",
    "auth.jwt.public_key_file",
    "auth.jwt.jwks",
    "auth.jwt.jwks_ca",
    "auth.revoked_file",
];

/// `[tls]`: PEM files.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// `client_ca`: the authority of certificates that clients show; `None`: none is asked for.
    pub client_ca: Option<PathBuf>,
    /// `client_required`: without one, no connection.
    pub client_required: bool,
}

/// `[postgres]`.
#[derive(Clone, Debug)]
pub struct Postgres {
    /// `url`.
    pub target: Target,
    /// `write_url`, or else `url`: where local writes go.
    pub write_target: Target,
    /// `publication`.
    pub publication: String,
    /// `slot`.
    pub slot: String,
    /// `streaming`: large transactions are sent before they commit.
    pub streaming: bool,
}

/// `[auth]`.
#[derive(Clone, Debug, Default)]
pub struct Auth {
    /// `tokens`: for development.
    pub tokens: Vec<StaticToken>,
    /// `jwt`.
    pub jwt: Option<Jwt>,
    /// `role`.
    pub role: Option<Role>,
    /// `client_certificates`: one is as good as a token; its name is `sub`.
    pub client_certificates: bool,
    /// `revoked_file`: tokens and subjects that are no longer let in.
    pub revoked_file: Option<PathBuf>,
    /// `limits`: what one subject may do.
    pub limits: Limits,
}

/// A token that is written in the config.
#[derive(Clone, Debug)]
pub struct StaticToken {
    /// What the replica says.
    pub token: Secret,
    /// What it stands for.
    pub claims: serde_json::Map<String, serde_json::Value>,
}

/// `auth.jwt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwt {
    /// What signatures are verified with.
    pub key: JwtKey,
    /// A token must be meant for one of these, if there are any.
    pub audience: Vec<String>,
    /// A token must be from this issuer, if it is set.
    pub issuer: Option<String>,
}

/// What signatures are verified with. Each kind of key allows exactly one algorithm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwtKey {
    /// A file whose bytes (a line break at the end is not one of them) are the key of HS256.
    Hs256File(PathBuf),
    /// A PEM file with a public key: RSA (RS256), P-256 (ES256) or Ed25519 (EdDSA).
    PublicKeyFile(PathBuf),
    /// Keys that are published: the same kinds.
    Jwks(Jwks),
}

/// A text that never prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A place in the config, for people: `streamer.toml:12:5`, or an environment variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the file.
    File {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// In characters, from 1.
        column: u64,
    },
    /// In the environment.
    Variable(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line, column } => {
                write!(f, "{}:{line}:{column}", path.display())
            }
            Place::Variable(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// One thing that is wrong with the config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// Dotted path of the key; empty where the file is not even TOML.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.field {
            "" => write!(f, "{}: {}", self.place, self.message),
            field => write!(f, "{}: {field}: {}", self.place, self.message),
        }
    }
}

/// The config can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("{path}: {reason}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the system says.
        reason: std::io::Error,
    },
    /// Everything that is wrong with it, one line each.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Refused(Vec<Problem>),
}

/// Where one SELECT is written.
#[derive(Clone, Debug)]
enum SqlPlace {
    File {
        path: PathBuf,
        line: u64,
        column: u64,
        /// The string as it is written, quotes included.
        literal: String,
    },
    Variable(String),
}

impl Config {
    /// Reads a file, with the environment of this process laid over it. SQL that is no SELECT of ours is refused here,
    /// before anything is connected; what only the catalog can tell, by a start.
    pub fn load(path: &Path) -> Result<Config, Error> {
        let text = std::fs::read_to_string(path).map_err(|reason| Error::Unreadable {
            path: path.display().to_string(),
            reason,
        })?;
        let config = Config::read(path, &text, std::env::vars())?;
        let named = shape::tables_named(&config.shapes).map(drop);
        let depth_max = config.subquery_depth_max as usize;
        match named.and_then(|()| shape::check_depth(&config.shapes, depth_max)) {
            Ok(()) => Ok(config),
            Err(refused) => Err(config.refused_sql(refused)),
        }
    }

    fn refused_sql(&self, refused: Vec<shape::Refused>) -> Error {
        let problem = |refused: shape::Refused| {
            let at =
                self.place_in_sql(&refused.shape, refused.index, refused.line, refused.column)?;
            Some(Problem {
                place: at,
                field: format!("shape.{}.tables[{}]", refused.shape, refused.index),
                message: refused.reason,
            })
        };
        Error::Refused(refused.into_iter().filter_map(problem).collect())
    }

    /// The file that the key `field`, one of [`FILES`], names can't be used.
    pub fn refused_file(&self, field: &str, reason: &dyn fmt::Display) -> Error {
        Error::Refused(vec![Problem {
            place: self.files[field].clone(),
            field: field.to_owned(),
            message: reason.to_string(),
        }])
    }

    /// Reads a text; `path` is only named in errors.
    pub fn read(
        path: &Path,
        text: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Config, Error> {
        let complaints = Complaints::default();
        let config = read::config(path, text, environment, &complaints);
        let mut complaints = complaints.into_inner();
        complaints.sort_by_key(|complaint| match &complaint.origin {
            Origin::File(at) => (0, at.start),
            Origin::Variable(_) => (1, 0),
        });
        match config {
            Some(config) if complaints.is_empty() => Ok(config),
            _ => Err(Error::Refused(
                complaints
                    .into_iter()
                    .map(|complaint| problem(path, text, complaint))
                    .collect(),
            )),
        }
    }

    /// Whether any shape takes local writes.
    pub fn takes_writes(&self) -> bool {
        self.shapes
            .iter()
            .any(|shape| shape.writable.contains(&true))
    }

    /// How memory is divided.
    pub fn memory(&self) -> Memory {
        Memory::new(self.memory_max, self.row_bytes_max)
    }

    /// How the mirror is to be opened.
    pub fn mirror(&self) -> mirror::Settings {
        let memory = self.memory();
        mirror::Settings {
            directory: self.data_dir.clone(),
            cache_bytes: memory.mirror_cache_bytes,
            reader_cache_bytes: memory.reader_cache_bytes,
            index_bytes_max: self.change_index_bytes_max,
            index_hours_max: self.change_index_hours_max,
            row_bytes_max: memory.row_bytes_max,
        }
    }

    /// The keys that have defaults, with their values as TOML: what a reference config is compared with.
    pub fn defaulted(&self) -> Vec<(&'static str, String)> {
        let text = |text: &dyn fmt::Display| format!("{:?}", text.to_string());
        let size = |bytes: u64| match bytes {
            bytes if bytes > 0 && bytes.is_multiple_of(GIB) => format!("\"{}GiB\"", bytes / GIB),
            bytes if bytes > 0 && bytes.is_multiple_of(MIB) => format!("\"{}MiB\"", bytes / MIB),
            bytes => bytes.to_string(),
        };
        vec![
            ("listen", text(&self.listen)),
            ("data_dir", text(&self.data_dir.display())),
            ("memory_max", size(self.memory_max)),
            ("row_bytes_max", size(self.row_bytes_max)),
            ("change_index_bytes_max", size(self.change_index_bytes_max)),
            ("subquery_depth_max", self.subquery_depth_max.to_string()),
            (
                "change_index_hours_max",
                self.change_index_hours_max.to_string(),
            ),
            ("wal_retained_max", size(self.wal_retained_max)),
            ("postgres.publication", text(&self.postgres.publication)),
            ("postgres.slot", text(&self.postgres.slot)),
            ("postgres.streaming", self.postgres.streaming.to_string()),
            (
                "auth.limits.streams_max",
                self.auth.limits.streams_max.to_string(),
            ),
            (
                "auth.limits.calls_per_minute",
                self.auth.limits.calls_per_minute.to_string(),
            ),
            (
                "auth.limits.writes_per_second",
                self.auth.limits.writes_per_second.to_string(),
            ),
            (
                "auth.limits.write_bytes_per_second",
                size(self.auth.limits.write_bytes_per_second),
            ),
        ]
    }

    /// Where a place within the SQL of a shape is written. `line` and `column` are from 1, as `shape::Refused` has them.
    pub fn place_in_sql(&self, shape: &str, index: usize, line: u64, column: u64) -> Option<Place> {
        let at = self.shapes.iter().position(|source| source.name == shape)?;
        let sql = self.shapes[at].tables.get(index)?;
        Some(match self.places[at].get(index)? {
            SqlPlace::Variable(name) => Place::Variable(name.clone()),
            SqlPlace::File {
                path,
                line: line_of_literal,
                column: column_of_literal,
                literal,
            } => {
                let offset = offset_of(sql, line, column);
                let written = tree::place_in_literal(literal, offset);
                let (lines, columns) = tree::line_and_column(literal, written);
                let (line, column) = match lines {
                    1 => (*line_of_literal, column_of_literal + columns - 1),
                    _ => (line_of_literal + lines - 1, columns),
                };
                Place::File {
                    path: path.clone(),
                    line,
                    column,
                }
            }
        })
    }
}

/// The byte at a line and a column, from 1, of a text.
fn offset_of(text: &str, line: u64, column: u64) -> usize {
    let line = usize::try_from(line.saturating_sub(1)).unwrap_or(usize::MAX);
    let column = usize::try_from(column.saturating_sub(1)).unwrap_or(usize::MAX);
    let start: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
    let within = text[start..]
        .char_indices()
        .nth(column)
        .map_or(text.len() - start, |(at, _)| at);
    start + within
}

fn place(path: &Path, text: &str, origin: &Origin) -> Place {
    match origin {
        Origin::File(at) => {
            let (line, column) = tree::line_and_column(text, at.start);
            Place::File {
                path: path.into(),
                line,
                column,
            }
        }
        Origin::Variable(name) => Place::Variable(name.clone()),
    }
}

fn problem(path: &Path, text: &str, complaint: Complaint) -> Problem {
    Problem {
        place: place(path, text, &complaint.origin),
        field: complaint.field,
        message: complaint.message,
    }
}

#[cfg(test)]
mod tests;
