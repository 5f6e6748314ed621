//! Certificates of clients and of streamers: line 12 of the checklist, and certificates in place of tokens.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

use anabranch_tests::{
    authority::{Authority, Certificate},
    issuer::Signer,
    peers::{Replica, ReplicaConfig, Streamer},
    postgres::{Database, Server},
    wait::{DEADLINE, until},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{claims, last_error};

/// A streamer that asks for certificates, and everybody's files.
struct Asking {
    database: Database,
    streamer: Streamer,
    ours: Authority,
    clients: Authority,
    signer: Signer,
    files: AtomicUsize,
}

impl Asking {
    async fn start(keys: &[(&str, bool)]) -> Asking {
        let database = Server::shared().await.database().await;
        database
            .execute(
                "CREATE TABLE t (id int PRIMARY KEY, owner text, v text);
                 INSERT INTO t VALUES (1, 'edge-1', 'a'), (2, 'edge-2', 'b')",
            )
            .await;
        let (ours, clients) = (Authority::new(), Authority::new());
        let signer = Signer::new("a");
        let shown = ours.certify(&["localhost"]);
        let path = |file: PathBuf| file.to_str().unwrap().to_owned();
        let mut config = Streamer::config(&database)
            .toml("[shape.s]\nparams.me = { claim = \"sub\" }\ntables = [\"SELECT * FROM t WHERE owner = $me\"]")
            .set("tls.cert", path(ours.file("streamer.crt", &shown.certificate)))
            .set("tls.key", path(ours.file("streamer.key", &shown.key)))
            .set("tls.client_ca", path(clients.file("clients.crt", &clients.pem())))
            .set("auth.jwt.public_key_file", path(ours.file("jwt.pem", &signer.public_pem())));
        for (key, value) in keys {
            config = config.set(key, *value);
        }
        let streamer = config.prepare();
        streamer.spawn();
        Asking {
            database,
            streamer,
            ours,
            clients,
            signer,
            files: AtomicUsize::new(0),
        }
    }

    /// A replica with this certificate, and this token or none.
    fn replica(&self, certificate: Option<&Certificate>, token: Option<&str>) -> ReplicaConfig {
        let (_, port) = self.streamer.address().rsplit_once(':').unwrap();
        let ca = self.ours.file("ca.crt", &self.ours.pem());
        let mut config = Replica::config_at(&format!("https://localhost:{port}"))
            .set("ca", ca.to_str().unwrap())
            .subscribe("s");
        if let Some(shown) = certificate {
            // Each has files of its own.
            let count = self.files.fetch_add(1, Ordering::Relaxed);
            let cert = self
                .clients
                .file(&format!("{count}.crt"), &shown.certificate);
            let key = self.clients.file(&format!("{count}.key"), &shown.key);
            config = config
                .set("cert", cert.to_str().unwrap())
                .set("key", key.to_str().unwrap());
        }
        match token {
            Some(token) => config.token(token),
            None => config.no_token(),
        }
    }

    async fn is_shown(&self, config: ReplicaConfig, owner: &str) {
        let replica = config.start().await;
        let sql = format!("SELECT * FROM t WHERE owner = '{owner}'");
        replica.until_equal(&self.database, &[("t", &sql)]).await;
    }

    async fn is_refused(&self, config: ReplicaConfig, complaint: &str) {
        let replica = config.prepare();
        replica.spawn();
        until(&format!("refused: {complaint}"), DEADLINE, || async {
            let error = last_error(&replica).await?;
            anyhow::ensure!(!error.is_empty() && error.contains(complaint), "{error}");
            Ok(())
        })
        .await;
        let rows = replica.open().prepare("SELECT * FROM t").map(|_| ());
        assert!(rows.is_err(), "{complaint}: it has the table");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_somebody_else_is_as_good_as_a_token() {
    let asking = Asking::start(&[("auth.client_certificates", true)]).await;
    let one = asking.clients.certify(&["edge-1"]);
    asking
        .is_shown(asking.replica(Some(&one), None), "edge-1")
        .await;
    // Where there is a token too, it counts.
    let token = asking.signer.token(&claims("edge-2", 1, 600));
    asking
        .is_shown(asking.replica(Some(&one), Some(&token)), "edge-2")
        .await;

    let stranger = Authority::new().certify(&["edge-1"]);
    let expired = asking.clients.certify_expired(&["edge-1"]);
    let servers = asking.ours.certify(&["edge-1"]);
    for bad in [&stranger, &expired, &servers] {
        asking.is_refused(asking.replica(Some(bad), None), "").await;
        // A token does not make up for it.
        asking
            .is_refused(asking.replica(Some(bad), Some(&token)), "")
            .await;
    }
    asking
        .is_refused(asking.replica(None, Some(&token)), "")
        .await;
    // One that names nobody.
    let nameless = asking.clients.certify_nameless();
    asking
        .is_refused(asking.replica(Some(&nameless), None), "UNAUTHENTICATED")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_alone_is_enough_where_it_should_not_be() {
    let asking = Asking::start(&[]).await;
    let one = asking.clients.certify(&["edge-1"]);
    let token = asking.signer.token(&claims("edge-1", 1, 600));
    asking
        .is_refused(asking.replica(Some(&one), None), "UNAUTHENTICATED")
        .await;
    asking
        .is_refused(asking.replica(None, Some(&token)), "")
        .await;
    asking
        .is_shown(asking.replica(Some(&one), Some(&token)), "edge-1")
        .await;

    // Asked for, and not insisted on: then one of the two is needed.
    let asking = Asking::start(&[
        ("auth.client_certificates", true),
        ("tls.client_required", false),
    ])
    .await;
    let one = asking.clients.certify(&["edge-1"]);
    let token = asking.signer.token(&claims("edge-2", 1, 600));
    asking
        .is_shown(asking.replica(Some(&one), None), "edge-1")
        .await;
    asking
        .is_shown(asking.replica(None, Some(&token)), "edge-2")
        .await;
    let stranger = Signer::new("a").token(&claims("edge-2", 1, 600));
    asking
        .is_refused(asking.replica(None, Some(&stranger)), "UNAUTHENTICATED")
        .await;
    // Who shows a bad token is not taken for his certificate.
    asking
        .is_refused(
            asking.replica(Some(&one), Some(&stranger)),
            "UNAUTHENTICATED",
        )
        .await;
}

/// Line 12, but for what `tls` tests already: another authority's, and another name's.
#[tokio::test(flavor = "multi_thread")]
async fn an_expired_or_self_signed_streamer_or_an_old_version_of_tls_is_accepted() {
    let ours = Authority::new();
    let ca = ours.file("ca.crt", &ours.pem());
    let alone = Authority::new();
    for (shown, complaint) in [
        (ours.certify_expired(&["localhost"]), "xpired"),
        (alone.certify(&["localhost"]), "BadSignature"),
    ] {
        // To each its own: a streamer that finds the slot of another one ends.
        let database = Server::shared().await.database().await;
        database
            .execute("CREATE TABLE t (id int PRIMARY KEY, owner text)")
            .await;
        let cert = ours.file("streamer.crt", &shown.certificate);
        let key = ours.file("streamer.key", &shown.key);
        let streamer = Streamer::config(&database)
            .shape("s", &["SELECT * FROM t"])
            .set("tls.cert", cert.to_str().unwrap())
            .set("tls.key", key.to_str().unwrap())
            .prepare();
        streamer.spawn();
        until("it listens", DEADLINE, || async {
            TcpStream::connect(streamer.address()).await
        })
        .await;
        let (_, port) = streamer.address().rsplit_once(':').unwrap();
        let replica = Replica::config_at(&format!("https://localhost:{port}"))
            .set("ca", ca.to_str().unwrap())
            .subscribe("s")
            .prepare();
        replica.spawn();
        until(&format!("refused: {complaint}"), DEADLINE, || async {
            let error = last_error(&replica).await?;
            anyhow::ensure!(error.contains(complaint), "{error}");
            Ok(())
        })
        .await;

        // A ClientHello of TLS 1.1, and one of 1.0: the answer is an alert (21), or nothing, and no ServerHello (22).
        for version in [2_u8, 1] {
            let mut stream = TcpStream::connect(streamer.address()).await.unwrap();
            stream.write_all(&client_hello(version)).await.unwrap();
            let mut answer = Vec::new();
            let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
            assert!(read.is_ok(), "it is not closed");
            assert_ne!(answer.first(), Some(&22), "TLS 1.{} is spoken", version - 1);
        }
        // Nor without TLS.
        let mut stream = TcpStream::connect(streamer.address()).await.unwrap();
        let request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
        assert!(!answer.starts_with(b"HTTP"), "it answers without TLS");
    }
}

/// As OpenSSL once said it: one suite of RSA with AES, no extension.
fn client_hello(minor: u8) -> Vec<u8> {
    let mut body = vec![3, minor];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0, 0x2f, 1, 0]);
    let mut handshake = vec![1, 0, 0, body.len() as u8];
    handshake.extend(body);
    let mut record = vec![22, 3, 1, 0, handshake.len() as u8];
    record.extend(handshake);
    record
}
