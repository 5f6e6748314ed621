//! TLS towards Postgres: one cryptography provider, and what each `sslmode` verifies.
//!
//! As in libpq, what is verified follows from both `sslmode` and `sslrootcert`:
//!
//! | | no `sslrootcert` | a file | `system` |
//! |---|---|---|---|
//! | allow, prefer, require | nothing | the chain | refused |
//! | verify-ca | refused | the chain | refused |
//! | verify-full | the chain to the system's roots, and the name | the chain to the file's, and the name | as without |
//!
//! A certificate that is itself in the file of roots is trusted, also when it is self-signed and made for no
//! authority's use. Names are looked for in the certificate's alternative names only, not in its common name.
//! Files are read at each connect, so that a renewed one is used without a restart.

use std::{
    path::Path,
    sync::{Arc, LazyLock},
};

use aws_lc_rs::digest;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use x509_cert::{
    Certificate,
    der::{
        Decode,
        asn1::ObjectIdentifier,
        oid::db::rfc5912::{
            ECDSA_WITH_SHA_224, ECDSA_WITH_SHA_256, ECDSA_WITH_SHA_384, ECDSA_WITH_SHA_512,
            MD_5_WITH_RSA_ENCRYPTION, SHA_1_WITH_RSA_ENCRYPTION, SHA_224_WITH_RSA_ENCRYPTION,
            SHA_256_WITH_RSA_ENCRYPTION, SHA_384_WITH_RSA_ENCRYPTION, SHA_512_WITH_RSA_ENCRYPTION,
        },
    },
};

use super::target::{Encryption, Roots, Target};

/// The cryptography of the whole program.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    PROVIDER.clone()
}

/// The configuration for one connect. Reads files, so it may block. An error is for a person, and definite.
pub(super) fn config(target: &Target) -> Result<ClientConfig, String> {
    let (roots, trusted) = match &target.roots {
        Roots::File(path) => {
            let (roots, trusted) = roots_of_file(path)?;
            (Some(roots), trusted)
        }
        Roots::Unset if target.encryption != Encryption::VerifyFull => (None, Vec::new()),
        Roots::Unset | Roots::System => (Some(roots_of_system()?), Vec::new()),
    };
    let verifier = Verifier {
        roots,
        trusted,
        name: target.encryption == Encryption::VerifyFull,
        provider: provider(),
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS: {error}"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let Some((certificate, key)) = &target.identity else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(certificate, "sslcert")?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| format!("sslkey {}: {error}", key.display()))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| format!("sslcert and sslkey: {error}"))
}

/// Those in a PEM file, at least one.
pub fn certificates(path: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let unreadable = |error: &dyn std::fmt::Display| format!("{what} {}: {error}", path.display());
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(&error))?;
    if certificates.is_empty() {
        return Err(unreadable(&"no certificate in it"));
    }
    Ok(certificates)
}

type Trusted = (Arc<RootCertStore>, Vec<CertificateDer<'static>>);

fn roots_of_file(path: &Path) -> Result<Trusted, String> {
    let certificates = certificates(path, "sslrootcert")?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates.iter().cloned());
    Ok((Arc::new(roots), certificates))
}

/// The authorities that the system trusts.
pub fn roots_of_system() -> Result<Arc<RootCertStore>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let error = found.errors.first().map(ToString::to_string);
        let error = error.unwrap_or_else(|| "none are installed".into());
        return Err(format!("no certificate authority of the system: {error}"));
    }
    Ok(Arc::new(roots))
}

/// Hash of a server's certificate for the channel binding `tls-server-end-point`: the hash function of its
/// signature, but SHA-256 for MD5 and SHA-1 (RFC 5929, section 4.1). `None`: its signature has none (Ed25519, and
/// RSA-PSS, where Postgres itself found none before version 16).
pub(super) fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let parsed = Certificate::from_der(certificate).ok()?;
    let algorithm = hash(parsed.signature_algorithm.oid)?;
    Some(digest::digest(algorithm, certificate).as_ref().to_vec())
}

const ECDSA_WITH_SHA_1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.1");

fn hash(signature: ObjectIdentifier) -> Option<&'static digest::Algorithm> {
    match signature {
        MD_5_WITH_RSA_ENCRYPTION
        | SHA_1_WITH_RSA_ENCRYPTION
        | ECDSA_WITH_SHA_1
        | SHA_256_WITH_RSA_ENCRYPTION
        | ECDSA_WITH_SHA_256 => Some(&digest::SHA256),
        SHA_224_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_224 => Some(&digest::SHA224),
        SHA_384_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_384 => Some(&digest::SHA384),
        SHA_512_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_512 => Some(&digest::SHA512),
        _ => None,
    }
}

/// Verifies what the mode asks for. That the server has the key of the certificate it shows is always verified:
/// channel binding rests on it.
#[derive(Debug)]
struct Verifier {
    /// `None`: any certificate will do.
    roots: Option<Arc<RootCertStore>>,
    /// Certificates that are trusted themselves.
    trusted: Vec<CertificateDer<'static>>,
    /// Whether the name must be in the certificate.
    name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(roots) = &self.roots else {
            return Ok(ServerCertVerified::assertion());
        };
        let certificate = ParsedCertificate::try_from(end_entity)?;
        if self.trusted.contains(end_entity) {
            verify_time(end_entity, now)?;
        } else {
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                roots,
                intermediates,
                now,
                algorithms,
            )?;
        }
        if self.name {
            verify_server_name(&certificate, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// Whether a certificate that is trusted without a chain is valid now.
fn verify_time(certificate: &[u8], now: UnixTime) -> Result<(), rustls::Error> {
    let parsed = Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let validity = parsed.tbs_certificate.validity;
    let now = now.as_secs();
    if now < validity.not_before.to_unix_duration().as_secs() {
        Err(CertificateError::NotValidYet.into())
    } else if now > validity.not_after.to_unix_duration().as_secs() {
        Err(CertificateError::Expired.into())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
