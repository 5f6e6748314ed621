//! TLS for a server.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::Server;

/// The authority that a server's certificate is of.
#[derive(Clone, Debug)]
pub struct Tls {
    /// What clients must trust (`sslrootcert`), PEM.
    pub authority: String,
}

/// Gives the server a key, a certificate and `ssl = on`, by SQL alone: the same with every backend.
pub(super) async fn enable(server: &Server) -> Tls {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("make a key");
    let authority = CertifiedIssuer::self_signed(authority, key).expect("make an authority");
    let key = KeyPair::generate().expect("make a key");
    let names = vec![
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        server.host().to_owned(),
    ];
    let certificate = CertificateParams::new(names)
        .and_then(|params| params.signed_by(&key, &authority))
        .expect("make a certificate");

    let client = server.connect("postgres").await;
    let directory: String = client
        .query_one("SELECT current_setting('data_directory')", &[])
        .await
        .expect("ask for the data directory")
        .get(0);
    for (file, content) in [
        ("tls.key", key.serialize_pem()),
        ("tls.crt", certificate.pem()),
    ] {
        // The text format of COPY doubles backslashes and escapes newlines; PEM has lines, so each is a row.
        let copy = format!(
            "COPY (SELECT regexp_split_to_table('{}', '\n')) TO PROGRAM 'umask 077; cat > {directory}/{file}'",
            content.trim_end()
        );
        client
            .batch_execute(&copy)
            .await
            .expect("write a file on the server");
    }
    drop(client);
    server
        .alter("ssl_key_file", &format!("{directory}/tls.key"))
        .await;
    server
        .alter("ssl_cert_file", &format!("{directory}/tls.crt"))
        .await;
    server.alter("ssl", "on").await;
    Tls {
        authority: authority.pem(),
    }
}
