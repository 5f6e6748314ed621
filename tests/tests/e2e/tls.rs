//! TLS towards Postgres and between replica and streamer: encrypted, to whom it was meant, and nobody in between.

use std::sync::Arc;

use anabranch_tests::{
    authority::{Authority, Certificate},
    peers::{Replica, Streamer},
    port,
    postgres::{Database, Options, Server},
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const T: &str = "SELECT * FROM t";

/// Asks Postgres for TLS.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// So that `check` finds nothing wrong but with the connection.
async fn make_table(database: &Database) {
    database
        .execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'copied')")
        .await;
    let streamer = Streamer::config(database).shape("s", &[T]).prepare();
    let output = streamer.command("setup").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// A streamer of the database at `host:port`, with these parameters of its URL.
fn streamer(database: &Database, host: &str, port: u16, parameters: &str) -> Streamer {
    let url = database.url_at(host, port);
    Streamer::config(database)
        .set("postgres.url", format!("{url}?{parameters}"))
        .shape("s", &[T])
        .prepare()
}

/// Exit code, and what was said.
fn check(streamer: &Streamer) -> (Option<i32>, String) {
    let output = streamer.command("check").output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code(), said.concat())
}

/// A server of its own that speaks TLS, its authority, and a database with the table.
async fn encrypted() -> (Server, Authority, Database) {
    let server = Server::start(Options::new()).await;
    let authority = server.enable_tls().await;
    let ask = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    until("Postgres speaks TLS", DEADLINE, || async {
        let said = server.tool("psql", "postgres", &["-XAtc", ask]).await;
        said.trim() == "t"
    })
    .await;
    let database = server.database().await;
    make_table(&database).await;
    (server, authority, database)
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_reached_by_tls_bound_to_its_channel_and_only_under_its_name() {
    let (server, authority, database) = encrypted().await;
    let roots = authority.file("roots.pem", &authority.pem());
    let roots = roots.to_str().unwrap();
    let others = Authority::new();
    let wrong = others.file("roots.pem", &others.pem());
    let wrong = wrong.to_str().unwrap();

    for (host, parameters, complaint) in [
        (
            "127.0.0.1",
            format!("sslmode=verify-full&sslrootcert={wrong}"),
            "BadSignature",
        ),
        (
            "127.0.0.1",
            format!("sslmode=verify-ca&sslrootcert={wrong}"),
            "BadSignature",
        ),
        // The certificate is not for this address, which leads to the same server.
        (
            "127.0.0.2",
            format!("sslmode=verify-full&sslrootcert={roots}"),
            "not valid for name",
        ),
    ] {
        let refused = streamer(&database, host, server.port(), &parameters);
        let (code, said) = check(&refused);
        assert_eq!(code, Some(1), "{parameters}: {said}");
        assert!(said.contains(complaint), "{parameters}: {said}");
        refused.spawn();
        assert_eq!(refused.exit().await.code(), Some(1));
        assert!(refused.log().contains(complaint), "{}", refused.log());
    }
    let any_name = format!("sslmode=verify-ca&sslrootcert={roots}");
    let (code, said) = check(&streamer(&database, "127.0.0.2", server.port(), &any_name));
    assert_eq!(code, Some(0), "{said}");

    let parameters = format!(
        "sslmode=verify-full&sslrootcert={roots}&channel_binding=require&application_name=ours"
    );
    let streamer = streamer(&database, "localhost", server.port(), &parameters);
    streamer.start().await;
    let replica = Replica::config(&streamer).subscribe("s").start().await;
    database
        .execute("INSERT INTO t VALUES (2, 'streamed')")
        .await;
    replica.until_equal(&database, &[("t", T)]).await;
    let kinds = database
        .query(
            "SELECT backend_type, bool_and(ssl) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
             WHERE application_name = 'ours' GROUP BY backend_type ORDER BY backend_type",
            &[],
        )
        .await;
    let kinds: Vec<(String, bool)> = kinds.iter().map(|row| (row.get(0), row.get(1))).collect();
    let encrypted = |kind: &str| (kind.to_owned(), true);
    assert_eq!(kinds, [encrypted("client backend"), encrypted("walsender")]);
}

/// Somebody between the two, who ends TLS with a certificate of his own, and speaks TLS to Postgres. Where he listens.
async fn interpose(server: &Server, authority: &Authority) -> u16 {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let Certificate { certificate, key } = Authority::new().certify(&["localhost"]);
    let acceptor = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap())
        .unwrap();
    let connector = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (acceptor, connector) = (
        TlsAcceptor::from(Arc::new(acceptor)),
        TlsConnector::from(Arc::new(connector)),
    );
    let port = port::free();
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let server = format!("{}:{}", server.host(), server.port());
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await?;
            let (acceptor, connector, server) =
                (acceptor.clone(), connector.clone(), server.clone());
            tokio::spawn(async move {
                client.read_exact(&mut [0; SSL_REQUEST.len()]).await?;
                client.write_all(b"S").await?;
                let mut client = acceptor.accept(client).await?;
                let mut onward = TcpStream::connect(server).await?;
                onward.write_all(&SSL_REQUEST).await?;
                onward.read_exact(&mut [0]).await?;
                let name = ServerName::try_from("localhost").expect("a name");
                let mut onward = connector.connect(name, onward).await?;
                copy_bidirectional(&mut client, &mut onward).await
            });
        }
        #[expect(unreachable_code, reason = "it tells the type")]
        std::io::Result::Ok(())
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn channel_binding_keeps_out_who_reads_along() {
    let (server, authority, database) = encrypted().await;
    let port = interpose(&server, &authority).await;
    // He gets through where nobody asks who he is, so it is not his fault that he doesn't below.
    let open = streamer(
        &database,
        "127.0.0.1",
        port,
        "sslmode=require&channel_binding=disable",
    );
    let (code, said) = check(&open);
    assert_eq!(code, Some(0), "{said}");
    for binding in ["require", "prefer"] {
        let parameters = format!("sslmode=require&channel_binding={binding}");
        let bound = streamer(&database, "127.0.0.1", port, &parameters);
        let (code, said) = check(&bound);
        assert_eq!(code, Some(1), "{binding}: {said}");
        assert!(said.contains("channel binding"), "{binding}: {said}");
        bound.spawn();
        assert_eq!(bound.exit().await.code(), Some(1));
    }
    // And where there is no TLS there is nothing to bind to.
    let plain = streamer(
        &database,
        server.host(),
        server.port(),
        "sslmode=disable&channel_binding=require",
    );
    let (code, said) = check(&plain);
    assert_eq!(code, Some(1), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_speaks_tls_to_its_streamer_and_to_nobody_else() {
    let database = Server::shared().await.database().await;
    make_table(&database).await;
    let authority = Authority::new();
    let shown = authority.certify(&["localhost"]);
    let certificate = authority.file("streamer.crt", &shown.certificate);
    let key = authority.file("streamer.key", &shown.key);
    let streamer = Streamer::config(&database)
        .set("tls.cert", certificate.to_str().unwrap())
        .set("tls.key", key.to_str().unwrap())
        .shape("s", &[T])
        .prepare();
    streamer.spawn();
    let proxy = Proxy::to(streamer.address()).await;
    proxy.record();
    let ca = authority.file("ca.crt", &authority.pem());
    let replica = Replica::config_at(&format!("https://localhost:{}", proxy.port()))
        .set("ca", ca.to_str().unwrap())
        .subscribe("s")
        .start()
        .await;
    database
        .execute("INSERT INTO t VALUES (2, 'streamed')")
        .await;
    replica.until_equal(&database, &[("t", T)]).await;
    // A handshake record of TLS, and not the preface of HTTP/2.
    assert_eq!(proxy.recorded(Way::Up)[0], 22);

    let others = Authority::new();
    let wrong = others.file("ca.crt", &others.pem());
    for (url, ca, complaint) in [
        ("https://localhost", &wrong, "BadSignature"),
        ("https://127.0.0.1", &ca, "not valid for name"),
        ("http://localhost", &ca, ""),
    ] {
        let refused = Replica::config_at(&format!("{url}:{}", proxy.port())).subscribe("s");
        let refused = match url.starts_with("https") {
            true => refused.set("ca", ca.to_str().unwrap()),
            false => refused,
        };
        let refused = refused.prepare();
        refused.spawn();
        until("it is refused, and says so", DEADLINE, || async {
            let status = refused.get("/status").await?.json()?;
            let error = status["last_error"].as_str().unwrap_or_default().to_owned();
            anyhow::ensure!(!error.is_empty() && error.contains(complaint), "{status}");
            anyhow::ensure!(status["position"].is_null(), "{status}");
            Ok(())
        })
        .await;
    }
}
