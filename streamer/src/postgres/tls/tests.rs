use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SignatureAlgorithm,
    date_time_ymd,
};
use rustls::{ServerConfig, pki_types::PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Issuer {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap()
}

/// A server's certificate for `db.example`, and its key.
struct Server {
    certificate: CertificateDer<'static>,
    pem: String,
    key: KeyPair,
}

fn server(issuer: Option<&Issuer>, algorithm: &'static SignatureAlgorithm, until: i32) -> Server {
    let mut parameters = CertificateParams::new(vec!["db.example".into()]).unwrap();
    parameters.not_after = date_time_ymd(until, 1, 1);
    let key = KeyPair::generate_for(algorithm).unwrap();
    let certificate = match issuer {
        Some(issuer) => parameters.signed_by(&key, issuer).unwrap(),
        None => {
            // As `openssl req -x509` makes them.
            parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            parameters.self_signed(&key).unwrap()
        }
    };
    Server {
        certificate: certificate.der().clone(),
        pem: certificate.pem(),
        key,
    }
}

fn written(directory: &tempfile::TempDir, name: &str, pem: &str) -> PathBuf {
    let path = directory.path().join(name);
    std::fs::write(&path, pem).unwrap();
    path
}

/// Whether a client with this URL, which takes the server for `name`, accepts the server.
async fn accepts(url: &str, name: &str, server: &Server) -> Result<(), String> {
    let target = Target::parse(url).unwrap();
    let client = config(&target)?;
    let key = PrivatePkcs8KeyDer::from(server.key.serialize_der());
    let server = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![server.certificate.clone()], key.into())
        .unwrap();
    let (ours, theirs) = duplex(100_000);
    let serving = tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let mut stream = acceptor.accept(theirs).await?;
        stream.write_all(b"x").await?;
        stream.flush().await
    });
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let result = match connector.connect(name, ours).await {
        Ok(mut stream) => {
            assert_eq!(stream.read_u8().await.unwrap(), b'x');
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    };
    let _ = serving.await.unwrap();
    result
}

#[tokio::test]
async fn each_mode_verifies_what_libpq_verifies() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, other) = (authority("ours"), authority("other"));
    let roots = written(&directory, "ours.pem", &ours.pem());
    let others = written(&directory, "other.pem", &other.pem());
    let good = server(Some(&ours), &PKCS_ECDSA_P256_SHA256, 2090);
    let expired = server(Some(&ours), &PKCS_ECDSA_P256_SHA256, 2000);
    let both = written(&directory, "both.pem", &(other.pem() + &ours.pem()));

    let url = |mode: &str, roots: Option<&PathBuf>| {
        let roots = roots.map(|roots| format!("&sslrootcert={}", roots.display()));
        format!("postgres://u@h?sslmode={mode}{}", roots.unwrap_or_default())
    };
    for (mode, roots, name, server, accepted) in [
        ("require", None, "db.example", &good, true),
        ("require", None, "wrong.example", &expired, true),
        ("prefer", None, "wrong.example", &expired, true),
        // With roots the chain is verified, whatever the mode.
        ("require", Some(&roots), "wrong.example", &good, true),
        ("require", Some(&others), "db.example", &good, false),
        ("prefer", Some(&others), "db.example", &good, false),
        ("verify-ca", Some(&roots), "wrong.example", &good, true),
        ("verify-ca", Some(&roots), "db.example", &expired, false),
        ("verify-ca", Some(&others), "db.example", &good, false),
        ("verify-full", Some(&roots), "db.example", &good, true),
        ("verify-full", Some(&both), "db.example", &good, true),
        ("verify-full", Some(&roots), "wrong.example", &good, false),
        ("verify-full", Some(&others), "db.example", &good, false),
        ("verify-full", Some(&roots), "db.example", &expired, false),
        ("verify-full", None, "db.example", &good, false),
    ] {
        let url = url(mode, roots);
        let result = accepts(&url, name, server).await;
        assert_eq!(result.is_ok(), accepted, "{url} {name}: {result:?}");
    }
}

#[tokio::test]
async fn a_self_signed_certificate_is_trusted_if_it_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let mine = server(None, &PKCS_ECDSA_P256_SHA256, 2090);
    let another = server(None, &PKCS_ECDSA_P256_SHA256, 2090);
    let expired = server(None, &PKCS_ECDSA_P256_SHA256, 2000);
    for (trusted, server, name, accepted) in [
        (&mine, &mine, "db.example", true),
        (&mine, &mine, "wrong.example", false),
        (&mine, &another, "db.example", false),
        (&expired, &expired, "db.example", false),
    ] {
        let roots = written(&directory, "roots.pem", &trusted.pem);
        let url = format!(
            "postgres://u@h?sslmode=verify-full&sslrootcert={}",
            roots.display()
        );
        let result = accepts(&url, name, server).await;
        assert_eq!(result.is_ok(), accepted, "{name}: {result:?}");
    }
}

#[tokio::test]
async fn files_that_are_missing_or_empty_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let empty = written(&directory, "empty.pem", "");
    for path in [&empty, &directory.path().join("missing.pem")] {
        let path = path.display().to_string();
        for url in [
            format!("postgres://u@h?sslmode=verify-full&sslrootcert={path}"),
            format!("postgres://u@h?sslcert={path}&sslkey={path}"),
        ] {
            let error = config(&Target::parse(&url).unwrap()).unwrap_err();
            assert!(error.contains(&path), "{error}");
        }
    }
}

/// Hashes of certificates as the `openssl` program gives them, made with `openssl dgst`, would need that program; but
/// which function is used is told by the length, and that it is over the whole certificate by a second computation.
#[test]
fn the_channel_is_bound_by_the_hash_of_the_certificates_signature() {
    let issuer = authority("ours");
    let of = |algorithm| server(Some(&issuer), algorithm, 2090).certificate;
    let certificate = of(&PKCS_ECDSA_P384_SHA384);
    // The issuer signs with P-256, so SHA-256 it is, whatever the server's own key.
    let hash = end_point(&certificate).unwrap();
    assert_eq!(hash, digest::digest(&digest::SHA256, &certificate).as_ref());
    let self_signed = server(None, &PKCS_ECDSA_P384_SHA384, 2090).certificate;
    let hash = end_point(&self_signed).unwrap();
    assert_eq!(hash, digest::digest(&digest::SHA384, &self_signed).as_ref());
    assert_eq!(
        end_point(&server(None, &PKCS_ED25519, 2090).certificate),
        None
    );
    assert_eq!(end_point(b"no certificate"), None);
}
