//! Where Postgres is, and how to get in: a connection URL as libpq reads it.
//!
//! A URL is complete: neither `PGPASSWORD` and its like, nor a password file, nor a service file is read, so that what
//! the configuration says is what happens. Hosts, users and files therefore have no defaults of the environment;
//! all other defaults are libpq's. A parameter that we do not honour is refused by name rather than ignored.
//!
//! Reference: <https://www.postgresql.org/docs/current/libpq-connect.html>.

use std::{fmt, path::PathBuf, time::Duration};

/// How long one address may take to let us in, where the URL has no `connect_timeout`. libpq would wait for ever; a
/// host that swallows packets must not keep us from trying the next one.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A parsed connection URL. Its `Debug` and `Display` never show the password.
#[derive(Clone)]
pub struct Target {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) password: Option<String>,
    pub(super) database: String,
    pub(super) encryption: Encryption,
    pub(super) roots: Roots,
    /// Files of the client's certificate and its key.
    pub(super) identity: Option<(PathBuf, PathBuf)>,
    pub(super) channel_binding: ChannelBinding,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) options: String,
    pub(super) application_name: Option<String>,
    pub(super) session: Session,
}

/// One place to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// A name or an address, and a port.
    Tcp(String, u16),
    /// Path of a socket.
    Unix(PathBuf),
}

/// `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// `sslrootcert`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Roots {
    /// Not given.
    Unset,
    /// Those of the operating system.
    System,
    /// Those in a file, and no others.
    File(PathBuf),
}

/// `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChannelBinding {
    Disable,
    Prefer,
    Require,
}

/// `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Session {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
}

/// Said where a part of the URL makes no sense, since the usual reason is a password with special characters; the
/// part itself is never shown, since it may be a piece of that password.
const ENCODE: &str = "; special characters in user and password must be percent-encoded (@ is %40, / is %2F, : is %3A)";

impl Target {
    /// The role that logs in.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Reads `postgres://user:password@host:port/db?sslmode=…&sslrootcert=…` (also `options`, `connect_timeout`,
    /// several hosts, unix sockets as `host=/run/postgresql`), as libpq does.
    ///
    /// An error says what is wrong, and shows neither the password nor anything that could be a part of it.
    pub fn parse(url: &str) -> Result<Target, String> {
        let rest = url
            .strip_prefix("postgres://")
            .or_else(|| url.strip_prefix("postgresql://"))
            .ok_or("a connection URL begins with postgres://")?;

        // As in libpq: what is before an @ that comes before any / is user and password.
        let authority_end = rest.find('/').unwrap_or(rest.len());
        let (credentials, rest) = match rest[..authority_end].find('@') {
            Some(at) => (Some(&rest[..at]), &rest[at + 1..]),
            None => (None, rest),
        };
        let (user, password) = match credentials.map(|c| c.split_once(':').unwrap_or((c, ""))) {
            None => (None, None),
            Some((user, password)) => (
                Some(decode(user, "the user")?),
                Some(decode(password, "the password")?),
            ),
        };
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        let (authority, database) = match rest.split_once('/') {
            Some((authority, database)) => (authority, Some(database)),
            None => (rest, None),
        };
        if authority.contains('@') || database.is_some_and(|d| d.contains(['@', '/'])) {
            return Err(format!("the URL has an @ or / too many{ENCODE}"));
        }

        let mut given = Given::default();
        let not_empty = |text: String| (!text.is_empty()).then_some(text);
        given.user = user.and_then(not_empty);
        given.password = password.and_then(not_empty);
        given.database = match database {
            Some(database) => not_empty(decode(database, "the database")?),
            None => None,
        };
        for host in authority.split(',') {
            let (host, port) = split_port(host)?;
            given.hosts.push(decode(host, "the host")?);
            given.ports.push(decode(port, "the port")?);
        }
        for parameter in query.into_iter().flat_map(|query| query.split('&')) {
            given.parameter(parameter)?;
        }
        given.into_target()
    }
}

/// What the URL says, as text.
#[derive(Default)]
struct Given {
    hosts: Vec<String>,
    ports: Vec<String>,
    user: Option<String>,
    password: Option<String>,
    database: Option<String>,
    encryption: Option<Encryption>,
    roots: Option<Roots>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    channel_binding: Option<ChannelBinding>,
    connect_timeout: Option<Option<Duration>>,
    options: Option<String>,
    application_name: Option<String>,
    session: Option<Session>,
}

impl Given {
    fn parameter(&mut self, parameter: &str) -> Result<(), String> {
        let (name, value) = parameter
            .split_once('=')
            .ok_or_else(|| format!("a parameter after the ? has no ={ENCODE}"))?;
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            return Err(format!(
                "a parameter after the ? has no proper name{ENCODE}"
            ));
        }
        let value = decode(value, name)?;
        let text = value.as_str();
        let unknown = |right: &str| Err(format!("{name} must be {right}"));
        match name {
            "host" => self.hosts = text.split(',').map(str::to_owned).collect(),
            "port" => self.ports = text.split(',').map(str::to_owned).collect(),
            "user" => self.user = Some(value),
            "password" => self.password = Some(value),
            "dbname" => self.database = Some(value),
            "options" => self.options = Some(value),
            "application_name" => self.application_name = Some(value),
            "sslmode" => {
                self.encryption = Some(match text {
                    "disable" => Encryption::Disable,
                    "allow" => Encryption::Allow,
                    "prefer" => Encryption::Prefer,
                    "require" => Encryption::Require,
                    "verify-ca" => Encryption::VerifyCa,
                    "verify-full" => Encryption::VerifyFull,
                    _ => {
                        return unknown(
                            "disable, allow, prefer, require, verify-ca or verify-full",
                        );
                    }
                })
            }
            "ssl" if text == "true" => self.encryption = Some(Encryption::Require),
            "sslrootcert" if text == "system" => self.roots = Some(Roots::System),
            "sslrootcert" => self.roots = Some(Roots::File(value.into())),
            "sslcert" => self.certificate = Some(value.into()),
            "sslkey" => self.key = Some(value.into()),
            "channel_binding" => {
                self.channel_binding = Some(match text {
                    "disable" => ChannelBinding::Disable,
                    "prefer" => ChannelBinding::Prefer,
                    "require" => ChannelBinding::Require,
                    _ => return unknown("disable, prefer or require"),
                })
            }
            "target_session_attrs" => {
                self.session = Some(match text {
                    "any" => Session::Any,
                    "read-write" => Session::ReadWrite,
                    "read-only" => Session::ReadOnly,
                    "primary" => Session::Primary,
                    "standby" => Session::Standby,
                    _ => return unknown("any, read-write, read-only, primary or standby"),
                })
            }
            "connect_timeout" => {
                let seconds: i64 = text
                    .trim()
                    .parse()
                    .map_err(|_| "connect_timeout must be a number of seconds")?;
                // As in libpq: zero or less waits without limit, and one is rounded up to two.
                self.connect_timeout = Some(match u64::try_from(seconds) {
                    Ok(0) | Err(_) => None,
                    Ok(seconds) => Some(Duration::from_secs(seconds.max(2))),
                });
            }
            // What we do anyway, spelled out.
            "gssencmode" if matches!(text, "disable" | "prefer") => {}
            "client_encoding" if matches!(text, "auto" | "UTF8" | "utf8") => {}
            "sslsni" if text == "1" => {}
            "sslcompression" if text == "0" => {}
            "gssencmode" | "client_encoding" | "sslsni" | "sslcompression" | "ssl" => {
                return Err(format!("this value of {name} is not supported"));
            }
            _ if parameter.contains('@') => {
                return Err(format!("a parameter after the ? is not supported{ENCODE}"));
            }
            _ => return Err(format!("the parameter {name} is not supported")),
        }
        Ok(())
    }

    fn into_target(self) -> Result<Target, String> {
        let user = self
            .user
            .ok_or("the URL has no user: postgres://USER@host/database")?;
        let encryption = self.encryption.unwrap_or(match self.roots {
            Some(Roots::System) => Encryption::VerifyFull,
            _ => Encryption::Prefer,
        });
        let roots = self.roots.unwrap_or(Roots::Unset);
        match (encryption, &roots) {
            (Encryption::VerifyFull, _) => {}
            (_, Roots::System) => {
                return Err("sslrootcert=system needs sslmode=verify-full, since any server may have a certificate of a public authority".into());
            }
            (Encryption::VerifyCa, Roots::Unset) => {
                return Err("sslmode=verify-ca needs sslrootcert, since any server may have a certificate of a public authority; verify-full does not".into());
            }
            _ => {}
        }
        let identity = match (self.certificate, self.key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err("sslcert and sslkey need each other".into()),
        };
        Ok(Target {
            hosts: hosts(self.hosts, &self.ports)?,
            database: self.database.unwrap_or_else(|| user.clone()),
            user,
            password: self.password,
            encryption,
            roots,
            identity,
            channel_binding: self.channel_binding.unwrap_or(ChannelBinding::Prefer),
            connect_timeout: self.connect_timeout.unwrap_or(Some(CONNECT_TIMEOUT)),
            options: self.options.unwrap_or_default(),
            application_name: self.application_name,
            session: self.session.unwrap_or(Session::Any),
        })
    }
}

/// Pairs hosts and ports: one port is for all hosts, else there is one for each.
fn hosts(hosts: Vec<String>, ports: &[String]) -> Result<Vec<Host>, String> {
    let count = hosts.len();
    if ports.len() > 1 && ports.len() != count {
        return Err(format!("{} ports for {count} hosts", ports.len()));
    }
    let place = |(index, host): (usize, String)| {
        let port = match ports.get(if ports.len() == 1 { 0 } else { index }) {
            None => 5432,
            Some(port) if port.is_empty() => 5432,
            Some(port) => port
                .parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| format!("a port is not a number from 1 to 65535{ENCODE}"))?,
        };
        if host.is_empty() {
            Err("the URL has no host: postgres://user@HOST/database, or host=/run/postgresql after the ? for a unix socket".into())
        } else if host.starts_with('/') {
            Ok(Host::Unix(
                [host, format!(".s.PGSQL.{port}")].iter().collect(),
            ))
        } else if host.starts_with('@') {
            Err("abstract unix sockets are not supported".into())
        } else {
            Ok(Host::Tcp(host, port))
        }
    };
    hosts.into_iter().enumerate().map(place).collect()
}

/// `host`, `host:port`, `[address]` or `[address]:port`.
fn split_port(text: &str) -> Result<(&str, &str), String> {
    let Some(bracketed) = text.strip_prefix('[') else {
        let (host, port) = text.split_once(':').unwrap_or((text, ""));
        if port.contains(':') {
            return Err(format!(
                "a host has several colons: an IPv6 address goes into [brackets]{ENCODE}"
            ));
        }
        return Ok((host, port));
    };
    let (host, rest) = bracketed
        .split_once(']')
        .ok_or("an IPv6 address has no closing ]")?;
    match rest.strip_prefix(':') {
        Some(port) => Ok((host, port)),
        None if rest.is_empty() => Ok((host, "")),
        None => Err("only :port may follow the ] of an IPv6 address".into()),
    }
}

/// Undoes percent-encoding. `what` names the part for an error.
fn decode(text: &str, what: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            match (digit(), digit()) {
                (Some(high), Some(low)) if high + low > 0 => (high * 16 + low) as u8,
                (Some(_), Some(_)) => return Err(format!("{what} contains %00")),
                _ => return Err(format!("{what} has a % without two hexadecimal digits")),
            }
        } else {
            byte
        });
    }
    String::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "postgres://{}@", self.user)?;
        for (i, host) in self.hosts.iter().enumerate() {
            write!(f, "{}{host}", if i == 0 { "" } else { "," })?;
        }
        write!(f, "/{}", self.database)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Host::Tcp(host, port) => write!(f, "{host}:{port}"),
            Host::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts_of(url: &str) -> Vec<String> {
        let target = Target::parse(url).unwrap();
        target.hosts.iter().map(Host::to_string).collect()
    }

    fn error_of(url: &str) -> String {
        Target::parse(url).unwrap_err()
    }

    #[test]
    fn every_part_of_a_url_is_read() {
        let target = Target::parse(
            "postgresql://us%40er:p%3A%2F%40%20w%C3%A4@h:6432/my%20db?application_name=me&options=-c%20a%3Db\
             &connect_timeout=7&channel_binding=require&sslmode=verify-ca&sslrootcert=/ca.pem&sslcert=c&sslkey=k\
             &target_session_attrs=read-write&gssencmode=disable",
        )
        .unwrap();
        assert_eq!(target.user, "us@er");
        assert_eq!(target.password.as_deref(), Some("p:/@ wä"));
        assert_eq!(target.hosts, [Host::Tcp("h".into(), 6432)]);
        assert_eq!(target.database, "my db");
        assert_eq!(target.application_name.as_deref(), Some("me"));
        assert_eq!(target.options, "-c a=b");
        assert_eq!(target.connect_timeout, Some(Duration::from_secs(7)));
        assert_eq!(target.channel_binding, ChannelBinding::Require);
        assert_eq!(target.encryption, Encryption::VerifyCa);
        assert_eq!(target.roots, Roots::File("/ca.pem".into()));
        assert_eq!(target.identity, Some(("c".into(), "k".into())));
        assert_eq!(target.session, Session::ReadWrite);
    }

    #[test]
    fn defaults_are_those_of_libpq() {
        let target = Target::parse("postgres://u@h").unwrap();
        assert_eq!(target.database, "u");
        assert_eq!(target.password, None);
        assert_eq!(target.encryption, Encryption::Prefer);
        assert_eq!(target.channel_binding, ChannelBinding::Prefer);
        assert_eq!(target.hosts, [Host::Tcp("h".into(), 5432)]);
        // An empty password is none, and connect_timeout=1 is rounded up, 0 is none.
        assert_eq!(Target::parse("postgres://u:@h").unwrap().password, None);
        let timeout = |t: &str| {
            Target::parse(&format!("postgres://u@h?connect_timeout={t}"))
                .unwrap()
                .connect_timeout
        };
        assert_eq!(timeout("1"), Some(Duration::from_secs(2)));
        assert_eq!(timeout("0"), None);
        assert_eq!(
            Target::parse("postgres://u@h?sslrootcert=system")
                .unwrap()
                .encryption,
            Encryption::VerifyFull
        );
    }

    #[test]
    fn hosts_are_several_or_sockets_or_addresses() {
        assert_eq!(
            hosts_of("postgres://u@a:1,b,[::1]:3,[fe80::1]/d"),
            ["a:1", "b:5432", "[::1]:3", "[fe80::1]:5432"]
        );
        assert_eq!(
            hosts_of("postgres://u@/d?host=/run/postgresql&port=5433"),
            ["/run/postgresql/.s.PGSQL.5433"]
        );
        assert_eq!(
            hosts_of("postgres://u@%2Frun%2Fpg/d"),
            ["/run/pg/.s.PGSQL.5432"]
        );
        assert_eq!(
            hosts_of("postgres:///d?host=a,b&port=7&user=u"),
            ["a:7", "b:7"]
        );
        assert_eq!(
            hosts_of("postgres:///d?host=a,/s&port=7,8&user=u"),
            ["a:7", "/s/.s.PGSQL.8"]
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (url, part) in [
            ("mysql://u@h", "postgres://"),
            ("u@h", "postgres://"),
            ("postgres://h/d", "no user"),
            ("postgres://u@/d", "no host"),
            ("postgres://u@h:0/d", "port"),
            ("postgres://u@h:65536/d", "port"),
            ("postgres://u@[::1/d", "]"),
            ("postgres://u@[::1]5/d", "]"),
            ("postgres://u@::1/d", "brackets"),
            ("postgres://u@h/d?port=1,2", "2 ports for 1 hosts"),
            ("postgres://u@h/d?sslmode=on", "sslmode must be"),
            ("postgres://u@h/d?sslmode=verify-ca", "sslrootcert"),
            (
                "postgres://u@h/d?sslrootcert=system&sslmode=require",
                "verify-full",
            ),
            ("postgres://u@h/d?sslcert=a", "sslkey"),
            (
                "postgres://u@h/d?keepalives=0",
                "keepalives is not supported",
            ),
            ("postgres://u@h/d?gssencmode=require", "gssencmode"),
            ("postgres://u@h/d?connect_timeout=x", "connect_timeout"),
            ("postgres://u@h/d%2", "%"),
            ("postgres://u@h/d%00", "%00"),
            ("postgres://u@h/d%ff", "UTF-8"),
            ("postgres://u@h/d?x", "no ="),
        ] {
            let error = error_of(url);
            assert!(error.contains(part), "{url}: {error}");
        }
    }

    /// Passwords with special characters that were not encoded end up in any part of the URL.
    #[test]
    fn no_error_and_no_print_shows_a_piece_of_the_password() {
        let canary = "CANARY";
        for url in [
            "postgres://u:CANARY@h/d",
            "postgres://u:x@CANARY@h/d",
            "postgres://u:x/CANARY@h/d",
            "postgres://u:CANARY/x@h/d",
            "postgres://u:1/CANARY@h/d",
            "postgres://u:1/x?CANARY@h/d",
            "postgres://u:1/x?CANARY=@h/d",
            "postgres://u:CANARY%zz@h/d",
            "postgres://u:CANARY%00@h/d",
            "postgres://u:x:CANARY/@h/d",
            "postgres://u:CANARY",
            "postgres://:CANARY@h/d",
            "postgres://u@h/d?password=CANARY%",
            "postgres://u@h/d?password=CANARY",
        ] {
            let shown = match Target::parse(url) {
                Ok(target) => format!("{target} {target:?}"),
                Err(error) => error,
            };
            assert!(!shown.contains(canary), "{url}: {shown}");
        }
    }
}
