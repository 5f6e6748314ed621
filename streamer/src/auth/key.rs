//! Keys that verify signatures: one of a file, or a set of published ones (JWKS, RFC 7517). Pure but for reading the files.
//!
//! Each key allows exactly one algorithm, which follows from what it is and not from what a token says. Of a set, the
//! token's `kid` picks the key, and is only ever compared: it is no path and no address. What is not certainly a public key for
//! signatures is left out.

use std::{fs, path::Path};

use aws_lc_rs::digest;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde_json::{Map, Value};

use super::Error;

/// RFC 7518, section 3.2: a key of the same size as the hash output (256 bits) or larger MUST be used.
pub const HS256_KEY_BYTES_MIN: usize = 32;

/// Keys of a published set: issuers have two or three.
pub const SET_KEYS_MAX: usize = 100;

/// A longer `kid` is nobody's.
const KID_BYTES_MAX: usize = 256;

/// The modulus of an RSA key of 2048 bits, in base64url.
const MODULUS_CHARS_MIN: usize = 342;

/// Tells one key from another, by what it is.
pub type KeyId = [u8; 32];

/// A key and the one algorithm that it is for.
#[derive(Clone)]
pub(super) struct Key {
    pub decoding: DecodingKey,
    pub algorithm: Algorithm,
    pub id: KeyId,
}

impl Key {
    fn new(decoding: DecodingKey, algorithm: Algorithm, parts: &[&str]) -> Key {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in parts {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        let mut id = KeyId::default();
        id.copy_from_slice(context.finish().as_ref());
        Key {
            decoding,
            algorithm,
            id,
        }
    }

    /// The secret of HS256 in a file.
    pub fn hs256(path: &Path) -> Result<Key, Error> {
        let secret = secret(path)?;
        Ok(Key::new(
            DecodingKey::from_secret(&secret),
            Algorithm::HS256,
            &[],
        ))
    }

    /// The public key in a PEM file.
    pub fn public(path: &Path) -> Result<Key, Error> {
        let (decoding, algorithm) = public_key(path)?;
        Ok(Key::new(decoding, algorithm, &[]))
    }

    /// The key of a set, or why it is none.
    fn published(key: &Map<String, Value>) -> Result<Key, &'static str> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        if key.contains_key("d") || text("kty") == Some("oct") {
            return Err("is a secret, and yet published");
        }
        if key.get("use").is_some_and(|usage| usage != "sig") {
            return Err("is not for signatures");
        }
        if let Some(operations) = key.get("key_ops") {
            let verifies = |operations: &Vec<Value>| operations.iter().any(|one| one == "verify");
            if !operations.as_array().is_some_and(verifies) {
                return Err("is not for verifying");
            }
        }
        let part = |name: &str| text(name).ok_or("lacks a part of its value");
        let (decoding, algorithm, names, parts) = match (text("kty"), text("crv")) {
            (Some("RSA"), _) => {
                let (n, e) = (part("n")?, part("e")?);
                if n.len() < MODULUS_CHARS_MIN {
                    return Err("is an RSA key of less than 2048 bits");
                }
                let decoding = DecodingKey::from_rsa_components(n, e);
                (decoding, Algorithm::RS256, &["RS256"][..], [n, e])
            }
            (Some("EC"), Some("P-256")) => {
                let (x, y) = (part("x")?, part("y")?);
                let decoding = DecodingKey::from_ec_components(x, y);
                (decoding, Algorithm::ES256, &["ES256"][..], [x, y])
            }
            (Some("OKP"), Some("Ed25519")) => {
                let x = part("x")?;
                let decoding = DecodingKey::from_ed_components(x);
                let names = &["EdDSA", "Ed25519"][..];
                (decoding, Algorithm::EdDSA, names, [x, ""])
            }
            _ => return Err("is of a kind that is not used here: RSA, P-256 and Ed25519 are"),
        };
        if let Some(named) = key.get("alg")
            && !names.iter().any(|name| named == name)
        {
            return Err("is for another algorithm than RS256, ES256 and EdDSA");
        }
        let decoding = decoding.map_err(|_| "is not in base64url")?;
        Ok(Key::new(
            decoding,
            algorithm,
            &[names[0], parts[0], parts[1]],
        ))
    }
}

/// Published keys.
#[derive(Default)]
pub(super) struct Set {
    keys: Vec<(Option<String>, Key)>,
    /// Why others were left out.
    pub left_out: Vec<&'static str>,
}

impl Set {
    /// Reads a set as it is published.
    pub fn parse(bytes: &[u8]) -> Result<Set, &'static str> {
        let value: Value = serde_json::from_slice(bytes).map_err(|_| "is no JSON")?;
        let Some(Value::Array(keys)) = value.get("keys") else {
            return Err("is no JSON Web Key Set: it has no list `keys`");
        };
        if keys.len() > SET_KEYS_MAX {
            return Err("has more than 100 keys");
        }
        let mut set = Set::default();
        for key in keys {
            match set.usable(key) {
                Ok(named) => set.keys.push(named),
                Err(reason) => set.left_out.push(reason),
            }
        }
        Ok(set)
    }

    fn usable(&self, key: &Value) -> Result<(Option<String>, Key), &'static str> {
        let key = key.as_object().ok_or("is no JSON object")?;
        let kid = match key.get("kid") {
            None => None,
            Some(Value::String(kid)) if kid.len() <= KID_BYTES_MAX => Some(kid.clone()),
            Some(_) => return Err("has a kid that is no text, or longer than 256 bytes"),
        };
        let usable = Key::published(key)?;
        let is_same = |(other, key): &(Option<String>, Key)| {
            *other == kid && key.algorithm == usable.algorithm
        };
        if self.keys.iter().any(is_same) {
            return Err("has the kid of one before it");
        }
        Ok((kid, usable))
    }

    /// The key of a token. One that names none is verified where there is only one.
    pub fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<&Key> {
        let (_, key) = match kid {
            Some(kid) => self
                .keys
                .iter()
                .find(|(name, key)| name.as_deref() == Some(kid) && key.algorithm == algorithm)?,
            None if self.keys.len() == 1 => &self.keys[0],
            None => return None,
        };
        Some(key)
    }

    /// Whether a key is in it, under whichever name.
    pub fn holds(&self, id: &KeyId) -> bool {
        self.keys.iter().any(|(_, key)| key.id == *id)
    }

    /// Whether tokens are verified by the same keys as by another.
    pub fn is_same(&self, other: &Set) -> bool {
        let ids = |set: &Set| -> Vec<(Option<String>, KeyId)> {
            let ids = set.keys.iter().map(|(kid, key)| (kid.clone(), key.id));
            ids.collect()
        };
        ids(self) == ids(other)
    }

    /// How many keys can be used.
    pub fn len(&self) -> usize {
        self.keys.len()
    }
}

pub(super) fn secret(path: &Path) -> Result<Vec<u8>, Error> {
    use std::os::unix::fs::PermissionsExt;

    let mut key = super::read(path)?;
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
    let pem = super::read(path)?;
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
