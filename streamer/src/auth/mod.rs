//! Who a replica is: the token in `authorization: Bearer …` becomes a [`Principal`].
//!
//! Everything is refused that is not proved. Each key allows exactly one algorithm, so neither `none` nor a public key
//! used as an HMAC secret gets through; `exp` is mandatory. Errors say what is wrong with a token, never what is in it.
//! What a principal may see is decided elsewhere, by the shapes.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode,
    errors::ErrorKind,
};
use serde_json::{Map, Value};

use crate::config;

/// Longest token that is looked at. HTTP servers commonly allow 8 KiB for a header; this also bounds the claims.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// What the clocks of issuer and streamer may differ by.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// RFC 7518, section 3.2: a key of the same size as the hash output (256 bits) or larger MUST be used.
pub const HS256_KEY_BYTES_MIN: usize = 32;

/// The longest life of a minted token: it is for trying things out.
pub const MINTED_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// A verified token.
#[derive(Clone, Debug, PartialEq)]
pub struct Principal {
    /// The claim `sub`, if there is one.
    pub subject: Option<String>,
    /// All claims.
    pub claims: Map<String, Value>,
    /// The stream ends then: `exp` and the leeway. Static tokens do not expire.
    pub expires: Option<SystemTime>,
}

/// A token is refused. All of them are UNAUTHENTICATED.
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
    /// By somebody else.
    #[error("the token's signature is wrong")]
    Signature,
    /// `exp` is past.
    #[error("the token has expired")]
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
    /// The request can't be met.
    #[error("{0}")]
    Mint(String),
}

/// Verifies tokens.
pub struct Verifier {
    tokens: Vec<Static>,
    jwt: Option<Jwt>,
}

struct Static {
    /// A digest, so that comparing takes as long for all lengths.
    digest: digest::Digest,
    principal: Principal,
}

struct Jwt {
    key: DecodingKey,
    validation: Validation,
}

impl Verifier {
    /// Reads the keys. Logs a warning if others can read a secret.
    pub fn new(config: &config::Auth) -> Result<Verifier, Error> {
        let tokens = config
            .tokens
            .iter()
            .map(|token| Static {
                digest: sha256(token.token.reveal().as_bytes()),
                principal: principal(token.claims.clone(), None),
            })
            .collect();
        let jwt = config.jwt.as_ref().map(Jwt::new).transpose()?;
        Ok(Verifier { tokens, jwt })
    }

    /// Verifies the value of an `authorization` header.
    pub fn verify(&self, authorization: Option<&str>) -> Result<Principal, Refused> {
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
    fn new(config: &config::Jwt) -> Result<Jwt, Error> {
        let (key, algorithm) = match &config.key {
            config::JwtKey::Hs256File(path) => {
                (DecodingKey::from_secret(&secret(path)?), Algorithm::HS256)
            }
            config::JwtKey::PublicKeyFile(path) => public_key(path)?,
        };
        let mut validation = Validation::new(algorithm);
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
        Ok(Jwt { key, validation })
    }

    fn verify(&self, token: &str) -> Result<Principal, Refused> {
        // RFC 7515, section 4.1.11: an extension that is not understood must be refused, and we understand none.
        let header = decode_header(token).map_err(|error| refused(error.kind()))?;
        if header.crit.is_some() {
            return Err(Refused::Algorithm);
        }
        let claims = decode::<Map<String, Value>>(token, &self.key, &self.validation)
            .map_err(|error| refused(error.kind()))?
            .claims;
        let expires = claims
            .get("exp")
            .and_then(Value::as_f64)
            .and_then(|exp| Duration::try_from_secs_f64(exp).ok())
            .and_then(|exp| UNIX_EPOCH.checked_add(exp + LEEWAY))
            .ok_or(Refused::Claim)?;
        Ok(principal(claims, Some(expires)))
    }
}

/// Mints a token for trying things out, where the config holds the signing key. `claims` are added to `exp`, `iat`, and
/// the configured audience and issuer, and win over all of them but `exp`.
pub fn mint(
    config: &config::Auth,
    mut claims: Map<String, Value>,
    ttl: Duration,
) -> Result<String, Error> {
    let Some(jwt) = &config.jwt else {
        return Err(Error::Mint(
            "the config holds no signing key: set auth.jwt.hs256_file".into(),
        ));
    };
    let config::JwtKey::Hs256File(path) = &jwt.key else {
        return Err(Error::Mint(
            "auth.jwt holds a public key only: tokens are minted by whoever has the private one"
                .into(),
        ));
    };
    if ttl.is_zero() || ttl > MINTED_TTL_MAX {
        return Err(Error::Mint(
            "a token must live from 1 second to 30 days".into(),
        ));
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|_| Error::Mint("the clock is before 1970".into()))?;
    claims.insert("exp".into(), (now + ttl).as_secs().into());
    claims.entry("iat").or_insert_with(|| now.as_secs().into());
    if let Some(audience) = jwt.audience.first() {
        claims
            .entry("aud")
            .or_insert_with(|| audience.clone().into());
    }
    if let Some(issuer) = &jwt.issuer {
        claims.entry("iss").or_insert_with(|| issuer.clone().into());
    }
    let token = encode(
        &Header::new(Algorithm::HS256),
        &claims,
        &EncodingKey::from_secret(&secret(path)?),
    )
    .map_err(|error| Error::Mint(format!("the token can't be signed: {error}")))?;
    if token.len() > TOKEN_BYTES_MAX {
        return Err(Error::Mint(
            "the claims make a token longer than 8 KiB".into(),
        ));
    }
    Ok(token)
}

fn principal(claims: Map<String, Value>, expires: Option<SystemTime>) -> Principal {
    Principal {
        subject: claims.get("sub").and_then(Value::as_str).map(str::to_owned),
        claims,
        expires,
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

fn secret(path: &Path) -> Result<Vec<u8>, Error> {
    use std::os::unix::fs::PermissionsExt;

    let mut key = read(path)?;
    // What an editor adds at the end is not meant as part of the key.
    while key.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        key.pop();
    }
    if key.len() < HS256_KEY_BYTES_MIN {
        return Err(Error::Key {
            path: path.into(),
            reason: "a key of HS256 must have at least 32 bytes: openssl rand -hex 32",
        });
    }
    if let Ok(metadata) = fs::metadata(path) {
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            tracing::warn!(
                "others than its owner may use the signing key {} (mode {mode:o}): chmod 600 it",
                path.display()
            );
        }
    }
    Ok(key)
}

fn public_key(path: &Path) -> Result<(DecodingKey, Algorithm), Error> {
    let pem = read(path)?;
    if pem.windows(12).any(|window| window == b"PRIVATE KEY-") {
        return Err(Error::Key {
            path: path.into(),
            reason: "holds a private key, which has no business here; give the public one",
        });
    }
    DecodingKey::from_rsa_pem(&pem)
        .map(|key| (key, Algorithm::RS256))
        .or_else(|_| DecodingKey::from_ec_pem(&pem).map(|key| (key, Algorithm::ES256)))
        .or_else(|_| DecodingKey::from_ed_pem(&pem).map(|key| (key, Algorithm::EdDSA)))
        .map_err(|_| Error::Key {
            path: path.into(),
            reason: "must be a PEM file with a public key: RSA, P-256 or Ed25519",
        })
}

#[cfg(test)]
mod tests;
