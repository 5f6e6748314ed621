use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256,
        RsaKeyPair,
    },
};
use serde_json::json;

use super::*;

const KEY: &str = "0123456789abcdef0123456789abcdef";

/// Base64url by hand: these tests make tokens that no library would make.
fn base64(bytes: &[u8], alphabet: &[u8; 64]) -> String {
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .fold(0u32, |word, &byte| word << 8 | u32::from(byte))
            << (8 * (3 - chunk.len()));
        for i in 0..=chunk.len() {
            out.push(char::from(alphabet[(word >> (18 - 6 * i)) as usize & 63]));
        }
    }
    out
}

fn url64(bytes: &[u8]) -> String {
    base64(
        bytes,
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_",
    )
}

fn token(header: Value, claims: Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let text = format!(
        "{}.{}",
        url64(header.to_string().as_bytes()),
        url64(claims.to_string().as_bytes())
    );
    let signature = sign(text.as_bytes());
    format!("{text}.{}", url64(&signature))
}

fn hmac(text: &[u8]) -> Vec<u8> {
    hmac_with(KEY.as_bytes(), text)
}

fn hmac_with(key: &[u8], text: &[u8]) -> Vec<u8> {
    use aws_lc_rs::hmac;
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text)
        .as_ref()
        .to_vec()
}

fn now() -> u64 {
    jsonwebtoken::get_current_timestamp()
}

fn file(content: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    fs::write(file.path(), content).expect("written");
    file
}

fn config(key: config::JwtKey) -> config::Auth {
    config::Auth {
        tokens: vec![config::StaticToken {
            token: "dev-1".to_owned().into(),
            claims: Map::from_iter([("sub".into(), "edge-1".into()), ("team".into(), 7.into())]),
        }],
        jwt: Some(config::Jwt {
            key,
            audience: vec!["anabranch".into(), "other".into()],
            issuer: Some("https://issuer".into()),
        }),
        ..config::Auth::default()
    }
}

/// A verifier whose keys are in files.
fn verifier_of(config: &config::Auth) -> Result<Verifier, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(Verifier::new(config))
}

fn hs256() -> (tempfile::NamedTempFile, config::Auth, Verifier) {
    let key = file(format!("{KEY}\n").as_bytes());
    let config = config(config::JwtKey::Hs256File(key.path().into()));
    let verifier = verifier_of(&config).expect("verifier");
    (key, config, verifier)
}

fn good() -> Value {
    json!({"sub": "edge-2", "exp": now() + 100, "aud": "anabranch", "iss": "https://issuer", "team": 9})
}

fn with(key: &str, value: Value) -> Value {
    let mut claims = good();
    match value {
        Value::Null => claims.as_object_mut().expect("object").remove(key),
        value => claims
            .as_object_mut()
            .expect("object")
            .insert(key.into(), value),
    };
    claims
}

fn verify(verifier: &Verifier, token: &str) -> Result<Principal, Refused> {
    let authorization = format!("Bearer {token}");
    verifier.admit(Shown {
        authorization: Some(&authorization),
        certificate: None,
    })
}

#[test]
fn a_good_token_becomes_a_principal_that_expires() {
    let (_key, _, verifier) = hs256();
    let claims = good();
    let header = json!({"alg": "HS256", "typ": "JWT"});
    let principal = verify(&verifier, &token(header, claims.clone(), hmac)).expect("verified");
    assert_eq!(principal.subject.as_deref(), Some("edge-2"));
    assert_eq!(principal.claims["team"], 9);
    let exp = claims["exp"].as_u64().expect("exp");
    assert_eq!(
        principal.expires,
        Some(UNIX_EPOCH + Duration::from_secs(exp) + LEEWAY)
    );
}

#[test]
fn claims_that_do_not_hold_are_refused_by_name() {
    let (_key, _, verifier) = hs256();
    for (claims, expected) in [
        (with("exp", Value::Null), Refused::Claim),
        (with("exp", json!("soon")), Refused::Claim),
        (with("exp", json!(-1)), Refused::Claim),
        (with("exp", json!(now() - 61)), Refused::Expired),
        (with("nbf", json!(now() + 70)), Refused::NotYet),
        (with("nbf", json!("later")), Refused::Claim),
        (with("aud", json!("somebody")), Refused::Audience),
        (with("aud", json!(["somebody", "else"])), Refused::Audience),
        (with("aud", Value::Null), Refused::Claim),
        (with("iss", json!("https://evil")), Refused::Issuer),
        (with("iss", Value::Null), Refused::Claim),
        (json!([1]), Refused::Malformed),
    ] {
        let made = token(json!({"alg": "HS256"}), claims.clone(), hmac);
        assert_eq!(verify(&verifier, &made), Err(expected), "{claims}");
    }
    for claims in [
        with("exp", json!(now() - 50)),
        with("nbf", json!(now() + 50)),
        with("aud", json!(["x", "other"])),
    ] {
        let made = token(json!({"alg": "HS256"}), claims.clone(), hmac);
        assert!(verify(&verifier, &made).is_ok(), "{claims}");
    }
}

#[test]
fn no_other_algorithm_gets_through() {
    let (_key, _, verifier) = hs256();
    for alg in ["none", "None", "NONE", "nOnE", "", "HS1"] {
        let made = token(json!({"alg": alg}), good(), |_| Vec::new());
        assert!(verify(&verifier, &made).is_err(), "{alg}");
        let made = token(json!({"alg": alg}), good(), hmac);
        assert!(verify(&verifier, &made).is_err(), "{alg}");
    }
    for alg in ["HS384", "HS512", "RS256", "ES256", "EdDSA", "PS256"] {
        let made = token(json!({"alg": alg}), good(), hmac);
        assert_eq!(verify(&verifier, &made), Err(Refused::Algorithm), "{alg}");
    }
    let made = token(
        json!({"alg": "HS256", "crit": ["b64"], "b64": false}),
        good(),
        hmac,
    );
    assert_eq!(verify(&verifier, &made), Err(Refused::Algorithm));
    let made = token(json!({"alg": "HS256"}), good(), |text| {
        hmac_with(b"another key of at least 32 bytes", text)
    });
    assert_eq!(verify(&verifier, &made), Err(Refused::Signature));
}

#[test]
fn a_public_key_is_no_hmac_secret_and_each_kind_of_key_verifies_its_own() {
    let random = SystemRandom::new();
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("rsa key");
    let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("ec key");
    let ed = Ed25519KeyPair::generate().expect("ed key");
    let der = |key: PublicKeyX509Der<'_>| key.as_ref().to_vec();
    type Sign<'a> = Box<dyn Fn(&[u8]) -> Vec<u8> + 'a>;
    let keys: [(&str, Vec<u8>, Sign<'_>); 3] = [
        (
            "RS256",
            der(rsa.public_key().as_der().expect("der")),
            Box::new(|text| {
                let mut signature = vec![0; rsa.public_modulus_len()];
                rsa.sign(&RSA_PKCS1_SHA256, &random, text, &mut signature)
                    .expect("signed");
                signature
            }),
        ),
        (
            "ES256",
            der(ec.public_key().as_der().expect("der")),
            Box::new(|text| ec.sign(&random, text).expect("signed").as_ref().to_vec()),
        ),
        (
            "EdDSA",
            der(ed.public_key().as_der().expect("der")),
            Box::new(|text| ed.sign(text).as_ref().to_vec()),
        ),
    ];
    for (alg, der, sign) in &keys {
        let mut text = base64(
            der,
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
        );
        text.extend(std::iter::repeat_n('=', (4 - text.len() % 4) % 4));
        let pem = format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n");
        let key = file(pem.as_bytes());
        let config = config(config::JwtKey::PublicKeyFile(key.path().into()));
        let verifier = verifier_of(&config).expect("verifier");
        let made = token(json!({"alg": alg}), good(), sign);
        let verified = verify(&verifier, &made);
        assert!(verified.is_ok(), "{alg}: {verified:?}");
        // The classic confusion: the public key, which everybody has, as an HMAC secret.
        for secret in [pem.as_bytes(), pem.trim().as_bytes(), der] {
            let made = token(json!({"alg": "HS256"}), good(), |text| {
                hmac_with(secret, text)
            });
            assert_eq!(verify(&verifier, &made), Err(Refused::Algorithm), "{alg}");
        }
        let mint = mint(&config, Map::new(), Duration::from_secs(60));
        assert!(matches!(mint, Err(Error::Mint(_))));
    }
}

#[test]
fn garbage_is_refused_without_showing_it() {
    let (_key, _, verifier) = hs256();
    let long = "x".repeat(TOKEN_BYTES_MAX + 1);
    for garbage in [
        "canary",
        ".",
        "..",
        "...",
        "a.b.c",
        "canary.canary.canary",
        "e30.e30.",
        "\u{1F600}",
        &long,
    ] {
        let refused = verify(&verifier, garbage).expect_err(garbage);
        assert!(!format!("{refused} {refused:?}").contains("canary"));
    }
    assert_eq!(verify(&verifier, &long), Err(Refused::TooLong));
    for header in [
        None,
        Some(""),
        Some("Bearer"),
        Some("Basic dev-1"),
        Some("dev-1"),
    ] {
        assert_eq!(verifier.verify(header), Err(Refused::Missing), "{header:?}");
    }
    assert!(verifier.verify(Some("Bearer ")).is_err());
}

#[test]
fn static_tokens_are_known_whole_only() {
    let (_key, _, verifier) = hs256();
    let principal = verify(&verifier, "dev-1").expect("known");
    assert_eq!(principal.subject.as_deref(), Some("edge-1"));
    assert_eq!(principal.expires, None);
    assert!(verifier.verify(Some("bearer dev-1")).is_ok());
    for wrong in ["dev-", "dev-11", "DEV-1", ""] {
        assert!(verify(&verifier, wrong).is_err(), "{wrong}");
    }
}

#[test]
fn without_any_key_everybody_is_refused() {
    let verifier = verifier_of(&config::Auth::default()).expect("verifier");
    let made = token(json!({"alg": "HS256"}), good(), hmac);
    assert_eq!(verify(&verifier, &made), Err(Refused::Unknown));
}

#[test]
fn what_is_minted_is_verified() {
    let (_key, config, verifier) = hs256();
    let claims = Map::from_iter([("sub".into(), "edge-3".into()), ("exp".into(), 1.into())]);
    let minted = mint(&config, claims, Duration::from_secs(60)).expect("minted");
    let principal = verify(&verifier, &minted).expect("verified");
    assert_eq!(principal.subject.as_deref(), Some("edge-3"));
    let big = Map::from_iter([("x".into(), "x".repeat(TOKEN_BYTES_MAX).into())]);
    assert!(mint(&config, big, Duration::from_secs(60)).is_err());
    assert!(mint(&config, Map::new(), Duration::ZERO).is_err());
}

#[test]
fn keys_that_are_too_short_or_private_or_missing_are_refused() {
    let short = file(b"0123456789abcdef0123456789abcde\n\n");
    let private = file(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    let garbage = file(b"garbage");
    for key in [
        config::JwtKey::Hs256File(short.path().into()),
        config::JwtKey::PublicKeyFile(private.path().into()),
        config::JwtKey::PublicKeyFile(garbage.path().into()),
        config::JwtKey::Hs256File("/nonexistent/key".into()),
    ] {
        assert!(verifier_of(&config(key.clone())).is_err(), "{key:?}");
    }
}

/// What is in base64url, as JWKs have it.
fn coordinates(public: &[u8]) -> (String, String) {
    (url64(&public[1..33]), url64(&public[33..65]))
}

fn ec_jwk(key: &EcdsaKeyPair, kid: &str) -> Value {
    let (x, y) = coordinates(key.public_key().as_ref());
    json!({"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": kid, "x": x, "y": y})
}

fn set(keys: &[Value]) -> key::Set {
    key::Set::parse(json!({ "keys": keys }).to_string().as_bytes()).expect("a set")
}

#[test]
fn a_published_key_that_is_not_certainly_for_signatures_is_used() {
    use jsonwebtoken::Algorithm;

    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("ec key");
    let good = ec_jwk(&key, "a");
    let with = |name: &str, value: Value| {
        let mut key = good.clone();
        key[name] = value;
        key
    };
    for wrong in [
        with("use", json!("enc")),
        with("use", json!(7)),
        with("alg", json!("ES384")),
        with("alg", json!("HS256")),
        with("alg", json!("none")),
        with("alg", json!(["ES256"])),
        with("key_ops", json!(["sign"])),
        with("key_ops", json!("verify")),
        with("crv", json!("P-384")),
        with("crv", json!("secp256k1")),
        with("kty", json!("RSA")),
        with("kid", json!(7)),
        with("kid", json!("k".repeat(257))),
        with("x", json!("\u{e9}")),
        with("y", Value::Null),
        with("d", json!("AAAA")),
        json!({"kty": "oct", "k": url64(KEY.as_bytes()), "alg": "HS256", "kid": "a"}),
        json!({"kty": "RSA", "n": url64(&[255; 128]), "e": "AQAB", "kid": "a"}),
        json!({"kty": "OKP", "crv": "X25519", "x": url64(&[1; 32]), "kid": "a"}),
        json!("a"),
        Value::Null,
    ] {
        // One that is wrong spoils none beside it.
        let set = set(&[wrong.clone(), ec_jwk(&key, "good")]);
        assert_eq!((set.len(), set.left_out.len()), (1, 1), "{wrong}");
        assert!(set.find(Some("good"), Algorithm::ES256).is_some());
    }
    let mut plain = good.clone();
    for name in ["use", "alg"] {
        plain.as_object_mut().expect("object").remove(name);
    }
    assert_eq!(set(&[plain]).len(), 1);
    for wrong in ["", "[]", "{}", "{\"keys\": 1}", "{\"keys\": {}}", "<html>"] {
        assert!(key::Set::parse(wrong.as_bytes()).is_err(), "{wrong}");
    }
    let many: Vec<_> = (0..=key::SET_KEYS_MAX)
        .map(|i| ec_jwk(&key, &i.to_string()))
        .collect();
    let many = json!({ "keys": many }).to_string();
    assert!(key::Set::parse(many.as_bytes()).is_err());
}

#[test]
fn a_kid_leads_to_a_key_that_it_does_not_name() {
    use jsonwebtoken::Algorithm;

    let keys: Vec<_> = (0..2)
        .map(|_| EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("ec key"))
        .collect();
    let both = set(&[ec_jwk(&keys[0], "a"), ec_jwk(&keys[1], "b")]);
    let id = |set: &key::Set, kid| set.find(kid, Algorithm::ES256).map(|key| key.id);
    assert_ne!(id(&both, Some("a")), id(&both, Some("b")));
    for kid in [
        "",
        "A",
        "a ",
        "../a",
        "/etc/passwd",
        "http://localhost/a",
        "a\0",
    ] {
        assert_eq!(id(&both, Some(kid)), None, "{kid}");
    }
    // Two keys, and it says nothing.
    assert_eq!(id(&both, None), None);
    let one = set(&[ec_jwk(&keys[0], "a")]);
    assert_eq!(id(&one, None), id(&both, Some("a")));
    // The name is no other algorithm's, and a second key does not take it.
    assert!(one.find(Some("a"), Algorithm::HS256).is_none());
    let doubled = set(&[ec_jwk(&keys[0], "a"), ec_jwk(&keys[1], "a")]);
    assert_eq!(id(&doubled, Some("a")), id(&both, Some("a")));
    assert_eq!(doubled.left_out.len(), 1);
    // The same name for another key is another key.
    let replaced = set(&[ec_jwk(&keys[1], "a")]);
    assert!(!replaced.holds(&id(&one, Some("a")).expect("there")));
    assert!(!replaced.is_same(&one));
}

#[test]
fn a_newer_token_of_somebody_else_passes_for_the_same() {
    let of = |claims: Value| {
        let Value::Object(claims) = claims else {
            unreachable!("an object")
        };
        principal(claims, None, Proof::Key(Default::default()))
    };
    let old = of(json!({"sub": "a", "team": 1, "exp": 1, "iat": 1, "nbf": 1, "jti": "x"}));
    assert!(old.is_same(&of(json!({"sub": "a", "team": 1, "exp": 2, "jti": "y"}))));
    for other in [
        json!({"sub": "b", "team": 1}),
        json!({"sub": "a", "team": 2}),
        json!({"sub": "a"}),
        json!({"sub": "a", "team": 1, "role": "x"}),
        json!({"sub": "a", "team": "1"}),
    ] {
        assert!(!old.is_same(&of(other.clone())), "{other}");
    }
    // Limits are of the subject, whatever token it is; without one, of whoever has these claims.
    assert_eq!(old.account(), of(json!({"sub": "a"})).account());
    assert_ne!(of(json!({"x": 1})).account(), of(json!({"x": 2})).account());
    assert_eq!(
        of(json!({"x": 1, "exp": 1})).account(),
        of(json!({"x": 1})).account()
    );
    assert_eq!(principal(Map::new(), None, Proof::Token).account(), None);
}

/// A certificate with these names.
fn certificate(common: &[&str], names: Vec<rcgen::SanType>) -> Certificate {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    for name in common {
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, *name);
    }
    params.subject_alt_names = names;
    let key = rcgen::KeyPair::generate().expect("a key");
    let made = params.self_signed(&key).expect("a certificate");
    Certificate::parse(made.der()).expect("it is one")
}

#[test]
fn a_certificate_has_another_name_than_is_written() {
    use rcgen::SanType;

    let dns = |name: &str| SanType::DnsName(name.try_into().expect("a name"));
    let uri = |name: &str| SanType::URI(name.try_into().expect("a URI"));
    let ip = SanType::IpAddress([127, 0, 0, 1].into());
    for (common, names, expected) in [
        (&["cn"][..], vec![], Some("cn")),
        (
            &["cn"],
            vec![dns("a.example"), dns("b.example")],
            Some("a.example"),
        ),
        (
            &["cn"],
            vec![dns("a.example"), uri("spiffe://x/edge-1")],
            Some("spiffe://x/edge-1"),
        ),
        (&["cn"], vec![ip.clone()], Some("cn")),
        (&[], vec![ip], None),
        (&[], vec![], None),
        (&["with\nline"], vec![], None),
        (&[""], vec![], None),
    ] {
        let certificate = certificate(common, names);
        assert_eq!(certificate.name().as_deref(), expected, "{common:?}");
        let principal = certificate.principal();
        assert_eq!(
            principal
                .as_ref()
                .ok()
                .and_then(|one| one.subject.as_deref()),
            expected
        );
        assert!(principal.is_err() || principal.unwrap().expires.is_some());
    }
    assert!(Certificate::parse(b"").is_none());
    assert!(Certificate::parse(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]).is_none());
}
