//! TLS for a server.

use super::Server;
use crate::authority::Authority;

/// Gives the server a key, a certificate and `ssl = on`, by SQL alone: the same with every backend.
pub(super) async fn enable(server: &Server) -> Authority {
    let authority = Authority::new();
    let shown = authority.certify(&["localhost", "127.0.0.1", server.host()]);
    let client = server.connect("postgres").await;
    let directory: String = client
        .query_one("SELECT current_setting('data_directory')", &[])
        .await
        .expect("ask for the data directory")
        .get(0);
    for (file, content) in [("tls.key", &shown.key), ("tls.crt", &shown.certificate)] {
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
    authority
}
