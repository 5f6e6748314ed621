//! What the config says of who is let in: certificates, keys, and how much one may do.

use std::{path::PathBuf, time::Duration};

use hyper::Uri;

use super::{
    Auth, Jwt, JwtKey, Tls,
    read::path_of,
    tree::{self, Complaints, Node, Section, Text},
};

/// How often the published keys are fetched. A key that was taken out is good for so long still; issuers commonly announce a new
/// one days ahead, and one that is not known is fetched at once.
pub const JWKS_REFRESH_DEFAULT: Duration = Duration::from_secs(300);

/// `auth.jwt.jwks`: where keys are published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwks {
    /// https, or http on this machine.
    pub url: Uri,
    /// `jwks_ca`: the authority of that server's certificate; `None`: those that the system trusts.
    pub ca: Option<PathBuf>,
    /// `jwks_refresh_seconds`.
    pub refresh: Duration,
}

/// `auth.limits`: what one subject may do. Static tokens, which are for development, are not limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Streams at once, and as many calls that write. A subject is a person or a machine with some replicas.
    pub streams_max: u32,
    /// Calls of both kinds that are begun; as many may come at once. After a restart of the streamer all come back, some of them
    /// more than once.
    pub calls_per_minute: u32,
    /// Local transactions; ten times as many may come at once. As many as Postgres makes on two cores: one replica may have them all.
    pub writes_per_second: u32,
    /// Their bytes; ten times as many may come at once. WAL is several times as much.
    pub write_bytes_per_second: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            streams_max: 100,
            calls_per_minute: 600,
            writes_per_second: 5_000,
            write_bytes_per_second: 8 * super::MIB,
        }
    }
}

pub(super) fn tls(mut section: Section<'_>) -> Option<Tls> {
    let missing = ["cert", "key"].map(|name| (name, !section.has(name)));
    let cert = path_of(&mut section, "cert");
    let key = path_of(&mut section, "key");
    let client_ca = path_of(&mut section, "client_ca");
    let client_required = section.flag("client_required");
    let origin = section.origin.clone();
    for (name, missing) in missing {
        if missing {
            let message = "is missing: [tls] needs both cert and key, PEM files";
            section.complain(&origin, name, message);
        }
    }
    if client_required.is_some() && client_ca.is_none() {
        let message = "needs client_ca: the authority that signs the certificates of clients";
        section.complain(&origin, "client_required", message);
    }
    section.finish();
    Some(Tls {
        cert: cert?,
        key: key?,
        client_ca,
        client_required: client_required.unwrap_or(true),
    })
}

pub(super) fn jwt(mut section: Section<'_>, complaints: &Complaints) -> Option<Jwt> {
    let hs256 = path_of(&mut section, "hs256_file");
    let public = path_of(&mut section, "public_key_file");
    let is_published = section.has("jwks");
    let jwks = jwks(&mut section);
    let audience = match section.take("audience") {
        None => Vec::new(),
        Some(node) => audience(node, &section.field("audience"), complaints),
    };
    let issuer = section.text("issuer").map(|issuer| issuer.text);
    let key = match (hs256, public, is_published) {
        (Some(path), None, false) => Some(JwtKey::Hs256File(path)),
        (None, Some(path), false) => Some(JwtKey::PublicKeyFile(path)),
        (None, None, true) => jwks.map(JwtKey::Jwks),
        _ => {
            let origin = section.origin.clone();
            let message = "needs exactly one of hs256_file, public_key_file and jwks";
            complaints.add(&origin, &section.path, message);
            None
        }
    };
    section.finish();
    Some(Jwt {
        key: key?,
        audience,
        issuer,
    })
}

fn jwks(section: &mut Section<'_>) -> Option<Jwks> {
    let url = section.text("jwks");
    let ca = path_of(section, "jwks_ca");
    let example = "a number of seconds from 1 to 86400";
    let refresh = section.number("jwks_refresh_seconds", example);
    let refresh = match refresh {
        None => JWKS_REFRESH_DEFAULT,
        Some((seconds @ 1..=86_400, _)) => Duration::from_secs(seconds),
        Some((_, origin)) => {
            let message = format!("must be {example}");
            section.complain(&origin, "jwks_refresh_seconds", message);
            JWKS_REFRESH_DEFAULT
        }
    };
    let Text { text, origin } = url?;
    match published_at(&text) {
        Ok(url) => Some(Jwks { url, ca, refresh }),
        Err(message) => {
            section.complain(&origin, "jwks", message);
            None
        }
    }
}

/// Whoever can change what is fetched can let in whom he likes, so it is fetched by TLS, or from this machine.
fn published_at(text: &str) -> Result<Uri, &'static str> {
    let url: Uri = text
        .parse()
        .map_err(|_| "must be a URL: https://login.example.org/.well-known/jwks.json")?;
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
    if host.is_empty() {
        return Err("has no host: https://login.example.org/.well-known/jwks.json");
    }
    // Printed in logs.
    if url.authority().is_some_and(|at| at.as_str().contains('@')) {
        return Err("must not hold a user or a password");
    }
    let is_local = host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback());
    match url.scheme_str() {
        Some("https") => Ok(url),
        Some("http") if is_local => Ok(url),
        _ => Err(
            "must be https (http only on this machine): whoever changes keys on the way lets himself in",
        ),
    }
}

fn audience(node: Node, field: &str, complaints: &Complaints) -> Vec<String> {
    let origin = node.origin.clone();
    let texts = match tree::json(node, field, complaints) {
        Some(serde_json::Value::String(text)) => vec![text],
        Some(serde_json::Value::Array(items)) => items
            .iter()
            .filter_map(|item| item.as_str().map(str::to_owned))
            .collect(),
        _ => Vec::new(),
    };
    // An empty list would turn the check off without a word.
    if texts.is_empty() {
        complaints.add(&origin, field, "must be a text, or a list of texts");
    }
    texts
}

pub(super) fn limits(mut section: Section<'_>) -> Limits {
    let mut number = |key, default| {
        let example = "a number from 1 to 1000000";
        match section.number(key, example) {
            None => default,
            Some((number @ 1..=1_000_000, _)) => number as u32,
            Some((_, origin)) => {
                section.complain(&origin, key, format!("must be {example}"));
                default
            }
        }
    };
    let default = Limits::default();
    let streams_max = number("streams_max", default.streams_max);
    let calls_per_minute = number("calls_per_minute", default.calls_per_minute);
    let writes_per_second = number("writes_per_second", default.writes_per_second);
    let write_bytes_per_second = match section.bytes("write_bytes_per_second") {
        None => default.write_bytes_per_second,
        Some((bytes, origin)) => {
            if !(1024..=1 << 40).contains(&bytes) {
                section.complain(
                    &origin,
                    "write_bytes_per_second",
                    "must be at least \"1KiB\"",
                );
            }
            bytes
        }
    };
    section.finish();
    Limits {
        streams_max,
        calls_per_minute,
        writes_per_second,
        write_bytes_per_second,
    }
}

/// What of it is allowed, and perhaps not meant.
pub(super) fn warn(auth: &Auth, tls: Option<&Tls>, warnings: &mut Vec<String>) {
    let asks = tls.is_some_and(|tls| tls.client_ca.is_some());
    let by_certificate = auth.client_certificates && asks;
    if auth.tokens.is_empty() && auth.jwt.is_none() && !by_certificate {
        warnings.push("no auth.tokens and no auth.jwt: no replica can connect".into());
    }
    if auth.client_certificates && !asks {
        warnings.push(
            "auth.client_certificates has no effect without tls.client_ca: no certificate is asked for".into(),
        );
    }
    if let Some(jwt) = &auth.jwt
        && matches!(jwt.key, JwtKey::Jwks(_))
        && jwt.audience.is_empty()
    {
        warnings.push(
            "auth.jwt.jwks without audience: a token that the issuer made for any other service is accepted here".into(),
        );
    }
}
