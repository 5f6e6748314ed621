//! Who a caller is: the token in `authorization: Bearer …`, or the certificate that it showed, becomes a [`Principal`].
//!
//! Everything is refused that is not proved. Each key allows exactly one algorithm, so neither `none` nor a public key
//! used as an HMAC secret gets through; `exp` is mandatory. Errors say what is wrong with a token, never what is in it.
//! What a principal may see is decided elsewhere, by the shapes.
//!
//! What lets somebody in may end while he is connected: a key is no longer published, a token or a subject is revoked. Whoever
//! holds a principal asks again ([`Verifier::holds`]) when something [changed](Verifier::changes).
//!
//! - [`key`]: keys and sets of them. [`jwks`]: fetches the published ones.
//! - [`certificate`]: the name in a certificate.
//! - [`revoked`]: the list of who is no longer let in.
//! - [`mint`](mint()): tokens for trying things out.

pub mod certificate;
pub mod jwks;
pub mod key;
mod mint;
pub mod revoked;

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest};
use jsonwebtoken::{Algorithm, Validation, decode, decode_header, errors::ErrorKind};
use serde_json::{Map, Value};
use tokio::sync::watch;

use self::{
    certificate::Certificate,
    jwks::Published,
    key::{Key, KeyId},
    revoked::Revoked,
};
pub use self::{
    key::HS256_KEY_BYTES_MIN,
    mint::{MINTED_TTL_MAX, mint},
};
use crate::config;

/// Longest token that is looked at. HTTP servers commonly allow 8 KiB for a header; this also bounds the claims.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// What the clocks of issuer and streamer may differ by.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// The claims that a newer token of the same principal has others of.
const CLAIMS_OF_A_TOKEN: [&str; 4] = ["exp", "iat", "nbf", "jti"];

/// Who proved to be somebody.
#[derive(Clone, Debug, PartialEq)]
pub struct Principal {
    /// The claim `sub`, if there is one.
    pub subject: Option<String>,
    /// All claims. Shared with whoever else keeps them as long as a call goes on.
    pub claims: Arc<Map<String, Value>>,
    /// Its calls end then: `exp` and the leeway, or the end of the certificate. Static tokens do not expire.
    pub expires: Option<SystemTime>,
    /// What it was proved by.
    pub proof: Proof,
    /// The name in the certificate that it showed, whatever else it was proved by.
    pub certificate: Option<Arc<str>>,
}

/// What a principal was proved by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A static token.
    Token,
    /// A token under this key.
    Key(KeyId),
    /// Its certificate.
    Certificate,
}

impl Principal {
    /// Whether it may see and do the same: the claims are the same but for those that are of the token itself.
    pub fn is_same(&self, other: &Principal) -> bool {
        self.lasting() == other.lasting()
    }

    /// Whose limits count: all replicas of one subject have them together. A static token has none.
    pub fn account(&self) -> Option<String> {
        if self.proof == Proof::Token {
            return None;
        }
        Some(match &self.subject {
            Some(subject) => format!("sub {subject}"),
            None => {
                let claims = Value::from(self.lasting()).to_string();
                format!("claims {:x?}", sha256(claims.as_bytes()).as_ref())
            }
        })
    }

    fn lasting(&self) -> Map<String, Value> {
        let mut claims = Map::clone(&self.claims);
        claims.retain(|name, _| !CLAIMS_OF_A_TOKEN.contains(&name.as_str()));
        claims
    }
}

/// What a caller shows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shown<'a> {
    /// The value of its header `authorization`.
    pub authorization: Option<&'a str>,
    /// The certificate of its connection, which was verified.
    pub certificate: Option<&'a Certificate>,
}

/// A caller is refused. All of them are UNAUTHENTICATED.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is none.
    #[error("no token: send `authorization: Bearer TOKEN`")]
    Missing,
    /// No static token is like that, and it is not a JWT.
    #[error("the token is not known here")]
    Unknown,
    /// Longer than [`TOKEN_BYTES_MAX`].
    #[error("the token is longer than 8 KiB")]
    TooLong,
    /// Not a JWT, or claims that are not a JSON object.
    #[error("the token is malformed")]
    Malformed,
    /// Any algorithm but that of the configured key, or critical extensions.
    #[error("the token is not signed with the algorithm of the configured key")]
    Algorithm,
    /// Its `kid` is none of the published ones, or there are several and it names none.
    #[error("the token is signed with a key that is not, or no longer, published")]
    Key,
    /// By somebody else.
    #[error("the token's signature is wrong")]
    Signature,
    /// `exp` is past, or the certificate's end.
    #[error("the token has expired; connect again with a new one")]
    Expired,
    /// `nbf` is ahead.
    #[error("the token is not valid yet")]
    NotYet,
    /// For somebody else.
    #[error("the token is for another audience")]
    Audience,
    /// From somebody else.
    #[error("the token is from another issuer")]
    Issuer,
    /// `exp`, or a configured `aud` or `iss`.
    #[error("the token lacks a mandatory claim: exp, or aud or iss where they are configured")]
    Claim,
    /// It, or who it is of, is in the list of those that are no longer let in.
    #[error("the token, or whom it is of, was revoked")]
    Revoked,
    /// There is no token, and no name in the certificate.
    #[error(
        "the certificate has no name: neither a URI nor a DNS name as subjectAltName, nor one common name"
    )]
    Nameless,
}

/// A key can't be used, or a token can't be minted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: io::Error,
    },
    /// It is not a key.
    #[error("{}: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What it should be.
        reason: &'static str,
    },
    /// The file of the authority of the published keys' server.
    #[error("{0}")]
    Authority(String),
    /// The published keys can't be had.
    #[error("{0}")]
    Published(String),
    /// It is no list of who is revoked.
    #[error("{0}")]
    Revoked(String),
    /// The request can't be met.
    #[error("{0}")]
    Mint(String),
}

/// Verifies what callers show.
pub struct Verifier {
    tokens: Vec<Static>,
    jwt: Option<Jwt>,
    client_certificates: bool,
    revoked: Revoked,
    /// Counts up when somebody may no longer be let in.
    changes: Arc<watch::Sender<u64>>,
}

struct Static {
    /// A digest, so that comparing takes as long for all lengths.
    digest: digest::Digest,
    principal: Principal,
}

struct Jwt {
    keys: Keys,
    validation: Validation,
}

enum Keys {
    One(Box<Key>),
    Published(Box<Published>),
}

impl Verifier {
    /// Reads the keys, or fetches them. Logs a warning if others can read a secret.
    pub async fn new(config: &config::Auth) -> Result<Verifier, Error> {
        let changes = Arc::new(watch::Sender::new(0));
        let tokens = config
            .tokens
            .iter()
            .map(|token| Static {
                digest: sha256(token.token.reveal().as_bytes()),
                principal: principal(token.claims.clone(), None, Proof::Token),
            })
            .collect();
        let jwt = match &config.jwt {
            Some(jwt) => Some(Jwt::new(jwt, &changes).await?),
            None => None,
        };
        Ok(Verifier {
            tokens,
            jwt,
            client_certificates: config.client_certificates,
            revoked: Revoked::read(config.revoked_file.as_deref(), &changes)?,
            changes,
        })
    }

    /// Who a caller is. Nothing is fetched for it.
    pub fn admit(&self, shown: Shown<'_>) -> Result<Principal, Refused> {
        let mut principal = match (shown.authorization, shown.certificate) {
            (None, Some(certificate)) if self.client_certificates => certificate.principal()?,
            (authorization, _) => self.verify(authorization)?,
        };
        principal.certificate = shown.certificate.and_then(Certificate::name);
        self.holds(&principal)?;
        Ok(principal)
    }

    /// Who a caller is. If its key is not known the keys are fetched again, unless they just were: it may be a new one.
    pub async fn admit_late(&self, shown: Shown<'_>) -> Result<Principal, Refused> {
        match (self.admit(shown), self.published()) {
            (Err(Refused::Key), Some(published)) => {
                published.fetch_for_unknown().await;
                self.admit(shown)
            }
            (admitted, _) => admitted,
        }
    }

    /// Whether somebody who was let in may still be here.
    pub fn holds(&self, principal: &Principal) -> Result<(), Refused> {
        if (principal.expires).is_some_and(|expires| expires <= SystemTime::now()) {
            return Err(Refused::Expired);
        }
        if let (Proof::Key(id), Some(published)) = (&principal.proof, self.published())
            && !published.holds(id)
        {
            return Err(Refused::Key);
        }
        if self.revoked.has(principal) {
            return Err(Refused::Revoked);
        }
        Ok(())
    }

    /// Tells when somebody who was let in may no longer be.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Keeps keys and list up to date, for ever.
    pub async fn keep(&self) {
        let keys = async {
            match self.published() {
                Some(published) => published.keep().await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(keys, self.revoked.keep());
    }

    /// Of the published keys, for the page.
    pub fn jwks(&self) -> Option<jwks::Report> {
        self.published().map(Published::report)
    }

    /// Of the list of who is revoked, for the page.
    pub fn revoked(&self) -> Option<revoked::Report> {
        self.revoked.report()
    }

    fn published(&self) -> Option<&Published> {
        match self.jwt.as_ref().map(|jwt| &jwt.keys) {
            Some(Keys::Published(published)) => Some(published),
            _ => None,
        }
    }

    /// Verifies the value of an `authorization` header.
    fn verify(&self, authorization: Option<&str>) -> Result<Principal, Refused> {
        let (scheme, token) = authorization
            .and_then(|value| value.split_once(' '))
            .ok_or(Refused::Missing)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Refused::Missing);
        }
        let token = token.trim();
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Refused::TooLong);
        }
        let digest = sha256(token.as_bytes());
        let mut found = None;
        // All are compared, so that the time tells nothing of which one it was.
        for known in &self.tokens {
            if verify_slices_are_equal(known.digest.as_ref(), digest.as_ref()).is_ok() {
                found = Some(&known.principal);
            }
        }
        match (found, &self.jwt) {
            (Some(principal), _) => Ok(principal.clone()),
            (None, Some(jwt)) => jwt.verify(token),
            (None, None) => Err(Refused::Unknown),
        }
    }
}

impl Jwt {
    async fn new(config: &config::Jwt, changes: &Arc<watch::Sender<u64>>) -> Result<Jwt, Error> {
        let keys = match &config.key {
            config::JwtKey::Hs256File(path) => Keys::One(Box::new(Key::hs256(path)?)),
            config::JwtKey::PublicKeyFile(path) => Keys::One(Box::new(Key::public(path)?)),
            config::JwtKey::Jwks(jwks) => {
                let published = Published::fetch(jwks.clone(), changes.clone()).await?;
                Keys::Published(Box::new(published))
            }
        };
        // Which algorithm it is, is said where the key is known; this one is replaced.
        let mut validation = Validation::new(Algorithm::ES256);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.validate_aud = !config.audience.is_empty();
        let mut required = vec!["exp"];
        if validation.validate_aud {
            validation.set_audience(&config.audience);
            required.push("aud");
        }
        if let Some(issuer) = &config.issuer {
            validation.iss = Some(HashSet::from([issuer.clone()]));
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        Ok(Jwt { keys, validation })
    }

    fn verify(&self, token: &str) -> Result<Principal, Refused> {
        // RFC 7515, section 4.1.11: an extension that is not understood must be refused, and we understand none.
        let header = decode_header(token).map_err(|error| refused(error.kind()))?;
        if header.crit.is_some() {
            return Err(Refused::Algorithm);
        }
        let key = match &self.keys {
            Keys::One(key) => Key::clone(key),
            Keys::Published(published) => published
                .find(header.kid.as_deref(), header.alg)
                .ok_or(Refused::Key)?,
        };
        let mut validation = self.validation.clone();
        validation.algorithms = vec![key.algorithm];
        let claims = decode::<Map<String, Value>>(token, &key.decoding, &validation)
            .map_err(|error| refused(error.kind()))?
            .claims;
        let expires = claims
            .get("exp")
            .and_then(Value::as_f64)
            .and_then(|exp| Duration::try_from_secs_f64(exp).ok())
            .and_then(|exp| UNIX_EPOCH.checked_add(exp + LEEWAY))
            .ok_or(Refused::Claim)?;
        Ok(principal(claims, Some(expires), Proof::Key(key.id)))
    }
}

fn principal(claims: Map<String, Value>, expires: Option<SystemTime>, proof: Proof) -> Principal {
    Principal {
        subject: claims.get("sub").and_then(Value::as_str).map(str::to_owned),
        claims: Arc::new(claims),
        expires,
        proof,
        certificate: None,
    }
}

fn refused(kind: &ErrorKind) -> Refused {
    match kind {
        ErrorKind::InvalidAlgorithm
        | ErrorKind::InvalidAlgorithmName
        | ErrorKind::MissingAlgorithm => Refused::Algorithm,
        ErrorKind::InvalidSignature => Refused::Signature,
        ErrorKind::ExpiredSignature => Refused::Expired,
        ErrorKind::ImmatureSignature => Refused::NotYet,
        ErrorKind::InvalidAudience => Refused::Audience,
        ErrorKind::InvalidIssuer => Refused::Issuer,
        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => Refused::Claim,
        _ => Refused::Malformed,
    }
}

fn sha256(bytes: &[u8]) -> digest::Digest {
    digest::digest(&digest::SHA256, bytes)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|reason| Error::Unreadable {
        path: path.into(),
        reason,
    })
}

#[cfg(test)]
mod tests;
