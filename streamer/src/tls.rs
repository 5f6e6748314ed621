//! The certificate that the streamer shows.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use crate::{config::Tls, postgres::tls::provider};

/// The certificate or its key can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct Error {
    /// The key in the config.
    pub field: &'static str,
    path: PathBuf,
    reason: String,
}

/// Reads certificate chain and key.
pub fn server(tls: &Tls) -> Result<Arc<ServerConfig>, Error> {
    let (cert, key) = (("tls.cert", &*tls.cert), ("tls.key", &*tls.key));
    let chain: Result<Vec<_>, _> = CertificateDer::pem_reader_iter(&mut open(cert)?).collect();
    let chain = chain.map_err(|reason| error(cert, reason))?;
    let private =
        PrivateKeyDer::from_pem_reader(&mut open(key)?).map_err(|reason| error(key, reason))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|reason| error(cert, reason))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|reason| error(cert, reason))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
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
