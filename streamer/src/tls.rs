//! The certificate that the streamer shows.

use std::{fs::File, io::BufReader, path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use crate::{config::Tls, postgres::tls::provider};

/// The certificate or its key can't be used.
#[derive(Debug, thiserror::Error)]
#[error("tls: {path}: {reason}")]
pub struct Error {
    path: String,
    reason: String,
}

/// Reads certificate chain and key.
pub fn server(tls: &Tls) -> Result<Arc<ServerConfig>, Error> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_reader_iter(&mut open(&tls.cert)?).collect();
    let chain = chain.map_err(|reason| error(&tls.cert, reason))?;
    let key = PrivateKeyDer::from_pem_reader(&mut open(&tls.key)?)
        .map_err(|reason| error(&tls.key, reason))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|reason| error(&tls.cert, reason))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|reason| error(&tls.cert, reason))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn open(path: &Path) -> Result<BufReader<File>, Error> {
    File::open(path)
        .map(BufReader::new)
        .map_err(|reason| error(path, reason))
}

fn error(path: &Path, reason: impl ToString) -> Error {
    Error {
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}
