//! `replica.toml`: read once at start, checked whole, then never looked at again.
//!
//! Every key may also come from the environment: `ANABRANCH_` + the key in capitals, `__` between levels and a number for
//! a place in a list (`ANABRANCH_SUBSCRIBE__0__SHAPE`). What is wrong is said with file, line, column, field and what
//! would be right; a token is never part of it. Relative paths are relative to the working directory, as they are for
//! every program that opens the same database.
//!
//! - [`memory`]: how `memory_max` is divided.
//! - `tree`: file and environment as one tree that still knows where each value came from.

pub mod memory;
mod tree;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anabranch_proto::SUBSCRIPTIONS_MAX;
use hyper::Uri;
use serde::Deserialize;
use toml::Spanned;

use self::tree::{Place, Source, Tree};
pub use self::{
    memory::{MEMORY_MAX_DEFAULT, MEMORY_MAX_MIN, Memory},
    tree::{ENVIRONMENT_PREFIX, Error},
};

/// Where the local HTTP interface listens, unless told otherwise.
pub const HTTP_DEFAULT: &str = "127.0.0.1:7430";

/// Permission bits of the database that is created: the data is its owner's only, unless told otherwise.
pub const FILE_MODE_DEFAULT: u32 = 0o600;

/// Longest token: what servers commonly take as one header field, 8 KiB, less its name.
pub const TOKEN_BYTES_MAX: usize = 8_000;

/// What a replica is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// `http://` or `https://`, host and port of the streamer.
    pub streamer: Uri,
    /// Certificates in PEM; read again at each connection, so that renewed ones are taken.
    pub tls: Tls,
    /// What proves who we are.
    pub token: Token,
    /// The SQLite file.
    pub database: PathBuf,
    /// Where the local HTTP interface listens; `None`: nowhere.
    pub http: Option<Address>,
    /// Whether the streamer may pack messages.
    pub zstd: bool,
    /// How `memory_max` is divided.
    pub memory: Memory,
    /// Permission bits of files that are created.
    pub file_mode: u32,
    /// What to follow; at least one.
    pub subscriptions: Vec<Subscription>,
    /// Intervals and limits of time. Not in the file: the protocol fixes them, and only tests have a reason to differ.
    pub timing: Timing,
}

/// Files in PEM for the connection to the streamer. Without `ca` the roots that the system trusts.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// The authority that signed the streamer's certificate; the system's are then not asked.
    pub ca: Option<PathBuf>,
    /// Our own certificate and its key, where the streamer wants one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// One `[[subscribe]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// Name of a shape that the streamer defines.
    pub shape: String,
    /// Those of its parameters that the replica may choose; the values are JSON text.
    pub params: BTreeMap<String, String>,
}

/// A place to listen at, for this machine only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Loopback TCP.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(f, "http://{address}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where the token is.
#[derive(Clone, Debug)]
pub enum Token {
    /// In the config.
    Given(Secret),
    /// In a file, read at each connection, and looked at while it stands.
    File(PathBuf),
    /// There is none: the certificate tells who we are.
    Certificate,
}

impl Token {
    /// The token as it is now, if there is to be one.
    pub fn read(&self) -> Result<Option<Secret>, TokenError> {
        match self {
            Token::Certificate => Ok(None),
            Token::Given(secret) => Ok(Some(secret.clone())),
            Token::File(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| TokenError {
                    path: path.clone(),
                    what: error.to_string(),
                })?;
                Secret::new(text.trim())
                    .map(Some)
                    .map_err(|what| TokenError {
                        path: path.clone(),
                        what,
                    })
            }
        }
    }
}

/// The token file can't be used, for now.
#[derive(Debug, thiserror::Error)]
#[error("token_file {}: {what}", path.display())]
pub struct TokenError {
    path: PathBuf,
    what: String,
}

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Checks that it can travel as a header field.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            Err("the token is empty".into())
        } else if text.len() > TOKEN_BYTES_MAX {
            Err(format!("the token is longer than {TOKEN_BYTES_MAX} bytes"))
        } else if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Err("a token has visible ASCII characters only, and no blanks".into())
        } else {
            Ok(Secret(text.into()))
        }
    }

    /// The text, to be sent and for nothing else.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Intervals and limits of time.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Silence of the streamer after which the connection is taken to be dead.
    pub silence_max: Duration,
    /// How often an idle replica says `Ack`.
    pub ack_every: Duration,
    /// Least time between two `Ack`s: at some thousand commits a second one for each would be most of the work.
    pub ack_gap: Duration,
    /// Bounds of the pause before another attempt, where trying again soon may help.
    pub retry: (Duration, Duration),
    /// The same where a person or a token service must act first.
    pub slow_retry: (Duration, Duration),
    /// How often the token file is looked at, for a better one or a newer one.
    pub token_poll: Duration,
    /// How often the state row of the file is written, so that it can't lie about a sidecar that was killed.
    pub report_every: Duration,
    /// Bounds of the pause before a message is tried again on a file that is locked or full.
    pub file_retry: (Duration, Duration),
    /// How long the parts may take to end once they were told to.
    pub grace: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            silence_max: anabranch_proto::SILENCE_MAX,
            ack_every: anabranch_proto::ACK_EVERY,
            ack_gap: Duration::from_millis(50),
            // A streamer that is back is found within the latter, however long it was away.
            retry: (Duration::from_millis(100), Duration::from_secs(5)),
            slow_retry: (Duration::from_secs(15), Duration::from_secs(60)),
            token_poll: Duration::from_secs(1),
            report_every: Duration::from_secs(5),
            file_retry: (Duration::from_millis(20), Duration::from_secs(2)),
            grace: Duration::from_secs(10),
        }
    }
}

impl Config {
    /// Reads the file, and the environment over it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::unreadable(path, &error.to_string()))?;
        Self::parse(&text, &path.display().to_string(), std::env::vars_os())
    }

    /// Reads a config from its text; `name` is what errors call it.
    pub fn parse(
        text: &str,
        name: &str,
        environment: impl IntoIterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    ) -> Result<Self, Error> {
        let source = Source::new(text, name, environment, KEYS);
        let (tree, place) = Tree::parse(&source)?;
        let raw: Raw = tree.deserialize(&place)?;
        raw.check(&place)
    }

    /// What is allowed but probably not meant; to be logged at start.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.streamer.scheme_str() == Some("http") && !is_loopback(self.host()) {
            warnings.push(format!(
                "streamer {} is reached without TLS: the token and the data can be read on the way; use https",
                self.streamer
            ));
        }
        warnings
    }

    /// Host of the streamer, without the brackets of IPv6.
    pub fn host(&self) -> &str {
        host(&self.streamer)
    }
}

/// The host that an address names, without the brackets of IPv6.
pub fn host(uri: &Uri) -> &str {
    uri.host().unwrap_or_default().trim_matches(['[', ']'])
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// The keys at the top of `replica.toml`. Other variables of the environment are not ours: a streamer may share it.
const KEYS: &[&str] = &[
    "streamer",
    "ca",
    "cert",
    "key",
    "token",
    "token_file",
    "database",
    "http",
    "zstd",
    "memory_max",
    "file_mode",
    "subscribe",
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    streamer: Spanned<String>,
    ca: Option<Spanned<PathBuf>>,
    cert: Option<Spanned<PathBuf>>,
    key: Option<Spanned<PathBuf>>,
    token: Option<Spanned<Hidden>>,
    token_file: Option<Spanned<PathBuf>>,
    database: Spanned<PathBuf>,
    http: Option<Spanned<String>>,
    zstd: Option<bool>,
    memory_max: Option<Spanned<Size>>,
    file_mode: Option<Spanned<String>>,
    #[serde(default)]
    subscribe: Vec<Spanned<RawSubscription>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSubscription {
    shape: Spanned<String>,
    #[serde(default)]
    params: BTreeMap<String, Spanned<toml::Value>>,
}

/// A string whose value is not told when it turns out to be something else.
struct Hidden(String);

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(text) => Ok(Hidden(text)),
            _ => Err(serde::de::Error::custom("a token is a string in quotes")),
        }
    }
}

/// Bytes: a number, or a string with a unit.
enum Size {
    Bytes(u64),
    Text(String),
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(text) => Ok(Size::Text(text)),
            toml::Value::Integer(bytes) => u64::try_from(bytes)
                .map(Size::Bytes)
                .map_err(|_| serde::de::Error::custom("a size can't be negative")),
            _ => Err(serde::de::Error::custom(
                "a size is a string with a unit, such as \"128MiB\"",
            )),
        }
    }
}

impl Raw {
    fn check(self, place: &Place) -> Result<Config, Error> {
        let streamer = check_streamer(&self.streamer, place)?;
        let tls = self.check_tls(&streamer, place)?;
        let token = match (&self.token, &self.token_file) {
            (Some(token), None) => Token::Given(
                Secret::new(&token.get_ref().0).map_err(|what| place.error(token.span(), &what))?,
            ),
            (None, Some(file)) => Token::File(file.get_ref().clone()),
            (Some(_), Some(file)) => {
                return Err(place.error(file.span(), "`token` is given too; keep one of the two"));
            }
            (None, None) if tls.identity.is_some() => Token::Certificate,
            (None, None) => {
                return Err(place.whole(
                    "token",
                    "is missing: write `token = \"…\"` or `token_file = \"…\"`, or `cert` and `key` where the streamer takes a certificate instead",
                ));
            }
        };
        if self.database.get_ref().as_os_str().is_empty() {
            return Err(place.error(
                self.database.span(),
                "is empty; write the path of the SQLite file",
            ));
        }
        let http = match &self.http {
            None => parse_address(HTTP_DEFAULT).ok().flatten(),
            Some(text) => {
                parse_address(text.get_ref()).map_err(|what| place.error(text.span(), &what))?
            }
        };
        let memory = match &self.memory_max {
            None => Memory::split(MEMORY_MAX_DEFAULT),
            Some(size) => {
                let bytes = match size.get_ref() {
                    Size::Bytes(bytes) => *bytes,
                    Size::Text(text) => {
                        memory::parse_size(text).map_err(|what| place.error(size.span(), &what))?
                    }
                };
                if bytes < MEMORY_MAX_MIN {
                    let least = MEMORY_MAX_MIN >> 20;
                    return Err(place.error(
                        size.span(),
                        &format!("{bytes} bytes are too few; at least \"{least}MiB\""),
                    ));
                }
                Memory::split(bytes)
            }
        };
        let file_mode = match &self.file_mode {
            None => FILE_MODE_DEFAULT,
            Some(mode) => {
                parse_mode(mode.get_ref()).map_err(|what| place.error(mode.span(), &what))?
            }
        };
        // Within one machine there is no line to save.
        let zstd = (self.zstd).unwrap_or_else(|| !is_loopback(host(&streamer)));
        Ok(Config {
            streamer,
            tls,
            token,
            database: self.database.into_inner(),
            http,
            zstd,
            memory,
            file_mode,
            subscriptions: check_subscriptions(self.subscribe, place)?,
            timing: Timing::default(),
        })
    }

    fn check_tls(&self, streamer: &Uri, place: &Place) -> Result<Tls, Error> {
        let files = [&self.ca, &self.cert, &self.key];
        for file in files.into_iter().flatten() {
            if streamer.scheme_str() != Some("https") {
                return Err(
                    place.error(file.span(), "needs a streamer with https, this one is http")
                );
            }
            let bytes = std::fs::read(file.get_ref()).map_err(|error| {
                place.error(
                    file.span(),
                    &format!("{}: {error}", file.get_ref().display()),
                )
            })?;
            if !bytes.windows(11).any(|window| window == b"-----BEGIN ") {
                let path = file.get_ref().display();
                return Err(place.error(
                    file.span(),
                    &format!("{path} is not PEM: it has no -----BEGIN line"),
                ));
            }
        }
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((cert.get_ref().clone(), key.get_ref().clone())),
            (None, None) => None,
            (Some(cert), None) => {
                return Err(
                    place.error(cert.span(), "`key` is missing: a certificate needs its key")
                );
            }
            (None, Some(key)) => {
                return Err(
                    place.error(key.span(), "`cert` is missing: a key needs its certificate")
                );
            }
        };
        Ok(Tls {
            ca: self.ca.as_ref().map(|file| file.get_ref().clone()),
            identity,
        })
    }
}

fn check_streamer(text: &Spanned<String>, place: &Place) -> Result<Uri, Error> {
    let wrong = |what: &str| {
        place.error(
            text.span(),
            &format!("{what}; write it as \"https://host:7420\""),
        )
    };
    let uri: Uri = text.get_ref().parse().map_err(|_| wrong("is not a URL"))?;
    match uri.scheme_str() {
        Some("http" | "https") => {}
        Some(scheme) => return Err(wrong(&format!("`{scheme}` is not http or https"))),
        None => return Err(wrong("has no http:// or https://")),
    }
    // Printed by `status` and in logs, so nothing secret may be in it.
    if uri
        .authority()
        .is_some_and(|authority| authority.as_str().contains('@'))
    {
        return Err(wrong(
            "has a user or password; the token is what tells who we are",
        ));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(wrong("has no host"));
    }
    if uri
        .path_and_query()
        .is_some_and(|path| path.as_str() != "/")
    {
        return Err(wrong("has a path"));
    }
    Ok(uri)
}

/// `127.0.0.1:7430`, `localhost:7430`, `[::1]:7430`, `unix:/path`; empty: `None`.
pub(crate) fn parse_address(text: &str) -> Result<Option<Address>, String> {
    const RIGHT: &str = "write \"127.0.0.1:7430\", \"unix:/run/anabranch.sock\", or \"\" for none";
    if text.is_empty() {
        return Ok(None);
    }
    if let Some(path) = text.strip_prefix("unix:") {
        if path.is_empty() {
            return Err(format!("`{text}` has no path; {RIGHT}"));
        }
        return Ok(Some(Address::Unix(path.into())));
    }
    let spelled = text
        .strip_prefix("localhost:")
        .map(|port| format!("127.0.0.1:{port}"));
    let address: SocketAddr = spelled
        .as_deref()
        .unwrap_or(text)
        .parse()
        .map_err(|_| format!("`{text}` is not an address with a port; {RIGHT}"))?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "`{text}` can be reached from other machines, and whoever reaches it needs no token; {RIGHT}"
        ));
    }
    Ok(Some(Address::Tcp(address)))
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = (!digits.is_empty() && digits.bytes().all(|b| (b'0'..=b'7').contains(&b)))
        .then(|| u32::from_str_radix(digits, 8).ok())
        .flatten()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| format!("`{text}` is not a mode; write it in octal, such as \"0600\""))?;
    if mode & 0o600 != 0o600 {
        return Err(format!("`{text}` keeps the owner out; at least \"0600\""));
    }
    Ok(mode)
}

fn check_subscriptions(
    raw: Vec<Spanned<RawSubscription>>,
    place: &Place,
) -> Result<Vec<Subscription>, Error> {
    if raw.is_empty() {
        return Err(place.whole(
            "subscribe",
            "is missing: write at least one\n  [[subscribe]]\n  shape = \"…\"",
        ));
    }
    if raw.len() > SUBSCRIPTIONS_MAX {
        return Err(place.whole(
            "subscribe",
            &format!(
                "has {} entries; at most {SUBSCRIPTIONS_MAX} are served",
                raw.len()
            ),
        ));
    }
    let mut subscriptions: Vec<Subscription> = Vec::with_capacity(raw.len());
    for entry in raw {
        let span = entry.span();
        let entry = entry.into_inner();
        if entry.shape.get_ref().is_empty() {
            return Err(place.error(
                entry.shape.span(),
                "is empty; write the name of a shape of the streamer",
            ));
        }
        let mut params = BTreeMap::new();
        for (name, value) in entry.params {
            let json = to_json(value.get_ref()).map_err(|what| place.error(value.span(), what))?;
            params.insert(name, json.to_string());
        }
        let subscription = Subscription {
            shape: entry.shape.into_inner(),
            params,
        };
        if subscriptions.contains(&subscription) {
            let what = format!(
                "shape `{}` is subscribed twice with the same params",
                subscription.shape
            );
            return Err(place.error(span, &what));
        }
        subscriptions.push(subscription);
    }
    Ok(subscriptions)
}

/// A parameter as the protocol wants it.
fn to_json(value: &toml::Value) -> Result<serde_json::Value, &'static str> {
    Ok(match value {
        toml::Value::String(text) => text.clone().into(),
        toml::Value::Integer(number) => (*number).into(),
        toml::Value::Boolean(truth) => (*truth).into(),
        toml::Value::Datetime(time) => time.to_string().into(),
        toml::Value::Float(number) => serde_json::Number::from_f64(*number)
            .ok_or("JSON has no such number; write it as a string")?
            .into(),
        toml::Value::Array(values) => values
            .iter()
            .map(to_json)
            .collect::<Result<Vec<_>, _>>()?
            .into(),
        toml::Value::Table(_) => {
            return Err("a parameter is a string, number, boolean, or a list of them");
        }
    })
}

#[cfg(test)]
mod tests;
