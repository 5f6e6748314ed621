//! Tokens to try things out with, where the config holds the signing key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Map, Value};

use super::{Error, TOKEN_BYTES_MAX, key::secret};
use crate::config;

/// The longest life of a minted token: it is for trying things out.
pub const MINTED_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

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
