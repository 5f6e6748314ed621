//! The certificate that the streamer shows, those that it asks clients for, and TLS towards whoever publishes keys.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};

use crate::{
    config::Tls,
    postgres::tls::{certificates, provider, roots_of_system},
};

/// The certificate or its key can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct Error {
    /// The key in the config.
    pub field: &'static str,
    path: PathBuf,
    reason: String,
}

/// Reads certificate chain and key, and the authority of clients.
pub fn server(tls: &Tls) -> Result<Arc<ServerConfig>, Error> {
    let (cert, key) = (("tls.cert", &*tls.cert), ("tls.key", &*tls.key));
    let chain: Result<Vec<_>, _> = CertificateDer::pem_reader_iter(&mut open(cert)?).collect();
    let chain = chain.map_err(|reason| error(cert, reason))?;
    let private =
        PrivateKeyDer::from_pem_reader(&mut open(key)?).map_err(|reason| error(key, reason))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|reason| error(cert, reason))?
        .with_client_cert_verifier(clients(tls)?)
        .with_single_cert(chain, private)
        .map_err(|reason| error(cert, reason))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Who verifies the certificates of clients. Without an authority nobody asks for one.
fn clients(tls: &Tls) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let Some(path) = &tls.client_ca else {
        return Ok(WebPkiClientVerifier::no_client_auth());
    };
    let failed = |reason: &dyn std::fmt::Display| error(("tls.client_ca", path.as_path()), reason);
    let roots = roots(path, "tls.client_ca").map_err(|reason| failed(&reason))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let verifier = if tls.client_required {
        verifier
    } else {
        verifier.allow_unauthenticated()
    };
    verifier.build().map_err(|reason| failed(&reason))
}

fn roots(path: &Path, what: &str) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, what)? {
        roots
            .add(certificate)
            .map_err(|error| format!("{what} {}: {error}", path.display()))?;
    }
    Ok(Arc::new(roots))
}

/// TLS towards an HTTP server whose certificate an authority of this file signed; without one, those that the system trusts.
pub fn client(ca: Option<&Path>) -> Result<Arc<ClientConfig>, String> {
    let roots = match ca {
        Some(path) => roots(path, "auth.jwt.jwks_ca")?,
        None => roots_of_system()?,
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS: {error}"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn open(file: (&'static str, &Path)) -> Result<BufReader<File>, Error> {
    File::open(file.1)
        .map(BufReader::new)
        .map_err(|reason| error(file, reason))
}

fn error((field, path): (&'static str, &Path), reason: impl ToString) -> Error {
    Error {
        field,
        path: path.into(),
        reason: reason.to_string(),
    }
}
