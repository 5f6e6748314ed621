//! The stream to the streamer: what networks, streamers and files do to it.

mod fake;

use std::time::Duration;

use anabranch_proto::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use anabranch_replica::{Error, Sidecar};
use fake::{
    Fake, Replica, at, begin, change, commit, copy, heartbeat, message, nothing_new, rows, soon,
    table, upserts,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    transport::{Certificate, Identity, ServerTlsConfig},
};

fn owned(rows: &[(i64, &str)]) -> Vec<(i64, String)> {
    rows.iter()
        .map(|(id, body)| (*id, (*body).to_owned()))
        .collect()
}

#[tokio::test]
async fn hello_does_not_say_who_we_are_and_what_we_want() {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let call = fake.call().await;
    assert_eq!(call.authorization.as_deref(), Some("Bearer t"));
    assert_eq!(call.hello.protocol_version, PROTOCOL_VERSION);
    assert_eq!(
        call.hello.replica_id,
        &*replica.sidecar.status().borrow().replica_id
    );
    assert!(!call.hello.replica_id.is_empty());
    assert!(call.hello.resume_token.is_empty());
    assert_eq!(call.hello.subscriptions.len(), 1);
    assert_eq!(call.hello.subscriptions[0].shape, "all");
    assert_eq!(call.hello.subscriptions[0].params["team"], "7");
    replica.sidecar.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_row_is_acknowledged_before_it_is_in_the_file() {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let mut call = fake.call().await;
    assert_eq!(
        call.ack().await,
        None,
        "before the first commit there is no position"
    );
    call.send(copy(100, &[(1, "one")])).await;
    call.acked(at(100)).await;
    assert_eq!(replica.items(), owned(&[(1, "one")]));
    call.send(change(110, &[(1, "eins"), (2, "zwei")])).await;
    call.acked(at(110)).await;
    assert_eq!(replica.items(), owned(&[(1, "eins"), (2, "zwei")]));
    let status = replica
        .until("to be up to date", |status| status.caught_up())
        .await;
    assert_eq!((status.position, status.last_error), (Some(at(110)), None));
    // Idle, it goes on to say that it lives.
    assert_eq!(call.ack().await, Some(at(110)));
    assert_eq!(call.ack().await, Some(at(110)));
}

#[tokio::test]
async fn the_resume_token_is_not_given_back() {
    let mut fake = Fake::start().await;
    let mut replica = Replica::start(&fake.url()).await;
    let mut call = fake.call().await;
    call.send(copy(100, &[(1, "one")])).await;
    call.acked(at(100)).await;
    // The connection breaks in the middle of a transaction.
    call.send(message(vec![
        begin(false, &[]),
        rows(upserts(&[(2, "half")]), false),
    ]))
    .await;
    drop(call);
    let mut call = fake.call().await;
    assert_eq!(call.hello.resume_token, "100");
    assert_eq!(replica.items(), owned(&[(1, "one")]));
    call.send(nothing_new(105)).await;
    call.acked(at(105)).await;
    assert_eq!(replica.items(), owned(&[(1, "one")]));
    // And after a restart of the replica.
    let id = call.hello.replica_id.clone();
    replica.sidecar.shutdown().await.unwrap();
    replica = Replica::start_in(replica.directory, &fake.url(), "token = \"t\"", |_| {}).await;
    assert_eq!(replica.sidecar.position(), Some(at(105)));
    let call = fake.call().await;
    assert_eq!(
        (call.hello.resume_token, call.hello.replica_id),
        ("105".into(), id)
    );
}

#[tokio::test]
async fn a_row_in_pieces_is_put_together_wrongly() {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let mut call = fake.call().await;
    let long: String = ('a'..='z').cycle().take(3 * MESSAGE_BYTES_MAX).collect();
    let mut ops = upserts(&[(1, &long), (2, "two")]);
    call.send(message(vec![begin(true, &[1]), table()])).await;
    while ops.len() > 1_000_000 {
        call.send(message(vec![rows(ops.split_to(1_000_000), true)]))
            .await;
    }
    call.send(message(vec![rows(ops, false), commit(100, 100)]))
        .await;
    call.acked(at(100)).await;
    assert_eq!(replica.items(), owned(&[(1, &long), (2, "two")]));
}

#[tokio::test]
async fn a_streamer_that_hangs_on_a_living_connection_is_waited_for() {
    // Its HTTP/2 answers pings: only the stream is silent.
    let mut fake = Fake::start().await;
    let replica = Replica::start_impatient(&fake.url()).await;
    let silent = fake.call().await;
    silent.send(copy(100, &[])).await;
    replica
        .until("the first commit", |status| status.position.is_some())
        .await;
    let mut again = fake.call().await;
    again.send(nothing_new(100)).await;
    again.acked(at(100)).await;
    let text = replica.get("/metrics").await.1;
    assert!(
        text.contains("failures_total{cause=\"silence\"} 1"),
        "{text}"
    );
    assert!(silent.down.is_closed());
}

#[tokio::test]
async fn a_port_that_never_answers_is_waited_for() {
    // The connection is made by the system; nobody ever reads it.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", mute.local_addr().unwrap());
    let replica = Replica::start_impatient(&url).await;
    let said = replica
        .until("the error", |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(said.contains("within 1s"), "{said}");
    assert!(!replica.sidecar.status().borrow().connected);
    replica.sidecar.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_streamer_that_comes_later_is_not_found() {
    let placeholder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = placeholder.local_addr().unwrap();
    drop(placeholder);
    let replica = Replica::start(&format!("http://{address}")).await;
    let said = replica
        .until("the error", |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(said.contains("refused"), "{said}");
    let mut fake = Fake::start_at(address, None).await;
    let mut call = fake.call().await;
    call.send(copy(100, &[])).await;
    call.acked(at(100)).await;
    let status = replica
        .until("to be up to date", |status| status.caught_up())
        .await;
    assert_eq!(status.last_error, None);
}

#[tokio::test]
async fn a_message_above_the_limit_is_taken() {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let call = fake.call().await;
    let long = "x".repeat(MESSAGE_BYTES_MAX + 128 * 1024);
    call.send(copy(100, &[(1, &long)])).await;
    let said = replica
        .until("the error", |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(said.starts_with("OUT_OF_RANGE"), "{said}");
    assert_eq!(replica.sidecar.position(), None);
}

#[tokio::test]
async fn a_web_page_is_taken_for_a_streamer() {
    let router = axum::Router::new()
        .fallback(async || ([("content-type", "text/html")], "<html>Sign in</html>"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let portal = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });

    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let mut call = fake.call().await;
    call.send(copy(100, &[(1, "precious")])).await;
    call.acked(at(100)).await;
    replica.sidecar.shutdown().await.unwrap();

    let replica = Replica::start_in(replica.directory, &url, "token = \"t\"", |_| {}).await;
    let said = replica
        .until("the error", |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(
        said.contains("does not speak gRPC (content-type text/html)"),
        "{said}"
    );
    assert_eq!(replica.items(), owned(&[(1, "precious")]));
    assert_eq!(replica.sidecar.position(), Some(at(100)));
    portal.abort();
}

#[tokio::test]
async fn a_renewed_token_is_not_read() {
    let mut fake = Fake::start().await;
    *fake.required.lock().unwrap() = Some("new".into());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    std::fs::write(&path, "old\n").unwrap();
    let extra = format!("token_file = \"{}\"", path.display());
    // The slow retry of these tests takes ten minutes: only a look at the file can be in time.
    let replica = Replica::start_in(directory, &fake.url(), &extra, |_| {}).await;
    let said = replica
        .until("the refusal", |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert_eq!(&*said, "UNAUTHENTICATED: the token is expired");
    assert!(!fake.has_call());
    std::fs::write(&path, "new\n").unwrap();
    let mut call = fake.call().await;
    assert_eq!(call.authorization.as_deref(), Some("Bearer new"));
    call.send(copy(100, &[])).await;
    call.acked(at(100)).await;
}

#[tokio::test]
async fn a_pause_that_the_streamer_asks_for_is_not_kept() {
    let mut fake = Fake::start().await;
    let mut metadata = tonic::metadata::MetadataMap::new();
    metadata.insert(anabranch_proto::PUSHBACK, 2_000.into());
    let refusal = Status::with_metadata(tonic::Code::ResourceExhausted, "too many", metadata);
    *fake.refusal.lock().unwrap() = Some(refusal);
    let replica = Replica::start(&fake.url()).await;
    replica
        .until("the refusal", |status| status.last_error.is_some())
        .await;
    let refused = std::time::Instant::now();
    *fake.refusal.lock().unwrap() = None;
    fake.call().await;
    let waited = refused.elapsed();
    // Its own pause would be of a tenth of a second. Some time has passed until the refusal was seen.
    assert!(waited > Duration::from_millis(1_500), "{waited:?}");
    assert!(waited < Duration::from_secs(10), "{waited:?}");
}

#[tokio::test]
async fn a_newer_token_is_not_said_to_the_stream() {
    let mut fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    std::fs::write(&path, "old\n").unwrap();
    let extra = format!("token_file = \"{}\"", path.display());
    let _replica = Replica::start_in(directory, &fake.url(), &extra, |_| {}).await;
    let mut call = fake.call().await;
    call.send(copy(100, &[])).await;
    std::fs::write(&path, "new\n").unwrap();
    let renewed = soon("a newer token", async {
        loop {
            let said = call.up.message().await.unwrap().unwrap().kind.unwrap();
            if let anabranch_proto::v1::up::Kind::Renew(renew) = said {
                return renew.token;
            }
        }
    });
    assert_eq!(renewed.await, "new");
}

#[tokio::test]
async fn a_token_file_that_comes_late_stops_the_sidecar() {
    let mut fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    let extra = format!("token_file = \"{}\"", path.display());
    let replica = Replica::start_in(directory, &fake.url(), &extra, |_| {}).await;
    let said = replica
        .until("the error", |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(said.contains("No such file"), "{said}");
    std::fs::write(&path, "t").unwrap();
    assert_eq!(fake.call().await.authorization.as_deref(), Some("Bearer t"));
}

#[tokio::test]
async fn a_refusal_is_tried_again_at_once() {
    for refusal in [
        Status::permission_denied("shape `all` needs the claim team_id"),
        Status::not_found("there is no shape `all`"),
        Status::invalid_argument("no"),
        Status::failed_precondition("history is broken"),
    ] {
        let mut fake = Fake::start().await;
        *fake.refusal.lock().unwrap() = Some(refusal.clone());
        let replica = Replica::start(&fake.url()).await;
        let said = replica
            .until("the refusal", |status| status.last_error.is_some())
            .await
            .last_error
            .unwrap();
        assert!(said.ends_with(refusal.message()), "{said}");
        // Had it been tried again at once, the call would come before this answer.
        *fake.refusal.lock().unwrap() = None;
        assert_eq!(replica.get("/healthz").await.0, 200);
        assert!(!fake.has_call());
        replica.sidecar.shutdown().await.unwrap();
    }
    let mut fake = Fake::start().await;
    *fake.refusal.lock().unwrap() = Some(Status::unavailable("starting"));
    let replica = Replica::start(&fake.url()).await;
    replica
        .until("the refusal", |status| status.last_error.is_some())
        .await;
    *fake.refusal.lock().unwrap() = None;
    fake.call().await;
}

#[tokio::test]
async fn a_file_that_refuses_the_stream_ends_the_sidecar() {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let call = fake.call().await;
    call.send(copy(100, &[(1, "one")])).await;
    // Rows of a table that was never declared.
    let undeclared = anabranch_proto::v1::Rows {
        table: 9,
        ops: upserts(&[(2, "two")]),
        continued: false,
    };
    let undeclared = anabranch_proto::v1::Element {
        kind: Some(anabranch_proto::v1::element::Kind::Rows(undeclared)),
    };
    call.send(message(vec![
        begin(false, &[]),
        undeclared,
        commit(110, 110),
    ]))
    .await;
    let mut call = fake.call().await;
    assert_eq!(call.hello.resume_token, "100");
    assert!(replica.sidecar.status().borrow().last_error.is_some());
    call.send(nothing_new(120)).await;
    call.acked(at(120)).await;
    assert_eq!(replica.items(), owned(&[(1, "one")]));
    assert_eq!(replica.sidecar.status().borrow().last_error, None);
}

#[tokio::test]
async fn a_locked_file_makes_the_replica_look_dead_or_take_too_much() {
    let mut fake = Fake::start().await;
    let replica = Replica::start_in(
        tempfile::tempdir().unwrap(),
        &fake.url(),
        "token = \"t\"",
        |config| {
            config.memory.queue_bytes_max = 1 << 20;
            config.memory.stream_window_bytes = 1 << 20;
            config.memory.connection_window_bytes = 1 << 20;
            config.timing.silence_max = fake::SILENCE_MAX;
        },
    )
    .await;
    let mut call = fake.call().await;
    call.send(copy(100, &[])).await;
    call.acked(at(100)).await;
    let program = replica.foreign();
    program.execute_batch("BEGIN IMMEDIATE").unwrap();

    // Transactions of 64 KiB, until flow control stops us.
    let body = "x".repeat(64 * 1024);
    let down = call.down.clone();
    let sender = tokio::spawn(async move {
        for i in 1..=200 {
            down.send(Ok(change(100 + i, &[(i as i64, &body)])))
                .await
                .unwrap();
        }
    });
    let said = replica
        .until("the trouble", |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(said.contains("lock"), "{said}");
    // For longer than silence may last the sidecar says that it lives, and keeps its stream.
    for _ in 0..20 {
        assert_eq!(call.ack().await, Some(at(100)));
    }
    assert!(
        !sender.is_finished(),
        "13 MB fit into queue and windows of 1 MB"
    );
    let metrics = replica.get("/metrics").await.1;
    let queued = metrics
        .lines()
        .find_map(|line| line.strip_prefix("anabranch_replica_queue_bytes "))
        .unwrap();
    assert!(queued.parse::<u64>().unwrap() <= 2 << 20, "{queued}");

    program.execute_batch("ROLLBACK").unwrap();
    call.acked(at(300)).await;
    sender.await.unwrap();
    assert_eq!(replica.items().len(), 200);
    assert!(!fake.has_call(), "the stream was never broken");
}

#[tokio::test]
async fn a_message_on_a_thin_line_is_given_up() {
    // 16 KiB each half second: a message takes longer than silence may last.
    let mut fake = Fake::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let target = fake.address;
    let line = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (client, _) = listener.accept().await.unwrap();
        let server = tokio::net::TcpStream::connect(target).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let upward = tokio::io::copy(&mut from_client, &mut to_server);
        let downward = async {
            let mut tick = tokio::time::interval(Duration::from_millis(100));
            let mut buffer = [0; 4 * 1024];
            loop {
                let read = from_server.read(&mut buffer).await?;
                if read == 0 {
                    return Ok::<_, std::io::Error>(());
                }
                tick.tick().await;
                to_client.write_all(&buffer[..read]).await?;
            }
        };
        let _ = tokio::join!(upward, downward);
    });
    let replica = Replica::start_in(
        tempfile::tempdir().unwrap(),
        &url,
        "token = \"t\"",
        |config| {
            config.timing.silence_max = Duration::from_millis(700);
        },
    )
    .await;
    let mut call = fake.call().await;
    let body = "x".repeat(100 * 1024);
    call.send(copy(100, &[(1, &body)])).await;
    call.acked(at(100)).await;
    let metrics = replica.get("/metrics").await.1;
    assert!(!metrics.contains("failures_total{"), "{metrics}");
    line.abort();
}

#[tokio::test]
async fn freshness_is_told_that_is_not_so() {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let call = fake.call().await;
    assert_eq!(replica.get("/readyz").await.0, 503);
    call.send(copy(100, &[])).await;
    replica
        .until("to be up to date", |status| status.caught_up())
        .await;
    assert_eq!(replica.get("/readyz").await.0, 200);
    call.send(heartbeat(100, 5_000)).await;
    replica
        .until("to be behind", |status| {
            status.connected && !status.caught_up()
        })
        .await;
    call.send(heartbeat(5_000, 5_000)).await;
    replica
        .until("to be up to date", |status| status.caught_up())
        .await;
    *fake.refusal.lock().unwrap() = Some(Status::unavailable("stopping"));
    drop(call);
    let status = replica
        .until("to be cut off", |status| !status.connected)
        .await;
    assert!(!status.caught_up());
    assert_eq!(
        replica.get("/readyz").await.0,
        200,
        "what is there is still complete"
    );
    // The same in the file, for whoever has only that.
    let foreign = replica.foreign();
    soon("the file to say so", async {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        loop {
            tick.tick().await;
            let said: (i64, i64) = foreign
                .query_row(
                    "SELECT connected, caught_up FROM _anabranch_status",
                    [],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )
                .unwrap();
            if said == (0, 0) {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_backup_that_is_restored_is_gone_on_with() {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let mut call = fake.call().await;
    call.send(copy(100, &[(1, "old"), (2, "old")])).await;
    call.acked(at(100)).await;
    let backup = replica.directory.path().join("backup.db");
    let vacuum = format!("VACUUM INTO '{}'", backup.display());
    replica.foreign().execute_batch(&vacuum).unwrap();
    call.send(change(110, &[(1, "new"), (3, "new")])).await;
    call.acked(at(110)).await;
    let restored = std::process::Command::new("sqlite3")
        .arg(&replica.database)
        .arg(format!(".restore '{}'", backup.display()))
        .status()
        .expect(
            "this test needs the `sqlite3` program: install it (Debian: apt-get install sqlite3)",
        );
    assert!(restored.success());
    call.keep_heard(120);
    // Nothing of what is there is believed, and no position that it does not have is told.
    let mut call = fake.call().await;
    assert_eq!(call.hello.resume_token, "");
    assert_eq!(replica.sidecar.position(), Some(at(100)));
    let content = [(1, "new"), (2, "old"), (3, "new")];
    call.send(copy(120, &content)).await;
    call.acked(at(120)).await;
    assert_eq!(replica.items(), owned(&content));
}

#[tokio::test]
async fn two_replicas_share_a_file() {
    let fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let config = fake::config(
        &fake.url(),
        replica.directory.path(),
        "token = \"t\"\nhttp = \"\"",
    );
    match Sidecar::start(config, None, CancellationToken::new()).await {
        Err(Error::File(error)) => assert!(!error.to_string().is_empty()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_file_that_is_gone_is_written_on_and_on() {
    let mut fake = Fake::start().await;
    let mut replica = Replica::start(&fake.url()).await;
    let call = fake.call().await;
    call.send(copy(100, &[])).await;
    replica
        .until("the first commit", |status| status.position.is_some())
        .await;
    for name in ["app.db", "app.db-wal", "app.db-shm"] {
        let _ = std::fs::remove_file(replica.directory.path().join(name));
    }
    // The heartbeat of the state row notices it, and everything ends, HTTP as well.
    match soon("the end", replica.sidecar.ended()).await {
        Err(Error::File(error)) => println!("{error}"),
        other => panic!("{other:?}"),
    }
    assert!(
        tokio::net::TcpStream::connect(("127.0.0.1", replica.port))
            .await
            .is_err()
    );
    soon("the stream's end", call.down.closed()).await;
}

struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority {
            issuer: rcgen::Issuer::new(params, key),
            pem,
        }
    }

    fn sign(&self, name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (
            params.signed_by(&key, &self.issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }
}

#[tokio::test]
async fn tls_believes_a_stranger() {
    let (ours, stranger) = (Authority::new(), Authority::new());
    let server = |(cert, key): (String, String)| {
        ServerTlsConfig::new()
            .identity(Identity::from_pem(cert, key))
            .client_ca_root(Certificate::from_pem(&ours.pem))
    };
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ca = write("ca.pem", &ours.pem);
    let (cert, key) = ours.sign("replica");
    let identity = format!(
        "cert = \"{}\"\nkey = \"{}\"",
        write("cert.pem", &cert),
        write("key.pem", &key)
    );
    let any = "127.0.0.1:0".parse().unwrap();

    let mut good = Fake::start_at(any, Some(server(ours.sign("localhost")))).await;
    let url = format!("https://localhost:{}", good.address.port());
    let extra = format!("token = \"t\"\nca = \"{ca}\"\n{identity}");
    let replica = Replica::start_in(tempfile::tempdir().unwrap(), &url, &extra, |_| {}).await;
    let mut call = good.call().await;
    call.send(copy(100, &[(1, "one")])).await;
    call.acked(at(100)).await;
    assert_eq!(replica.items(), owned(&[(1, "one")]));

    // Signed by a stranger; signed by ours for another name; without the certificate that it wants.
    let foreign = Fake::start_at(any, Some(server(stranger.sign("localhost")))).await;
    let misnamed = Fake::start_at(any, Some(server(ours.sign("elsewhere")))).await;
    let no_identity = format!("token = \"t\"\nca = \"{ca}\"");
    let no_ca = format!("token = \"t\"\n{identity}");
    for (fake, extra) in [
        (&foreign, &extra),
        (&misnamed, &extra),
        (&good, &no_identity),
        (&good, &no_ca),
    ] {
        let url = format!("https://localhost:{}", fake.address.port());
        let replica = Replica::start_in(tempfile::tempdir().unwrap(), &url, extra, |_| {}).await;
        let said = replica
            .until("the error", |status| status.last_error.is_some())
            .await
            .last_error
            .unwrap();
        assert!(said.to_lowercase().contains("certificate"), "{said}");
        assert_eq!(replica.sidecar.position(), None);
    }
    assert!(!good.has_call());
}
