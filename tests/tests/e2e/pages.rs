//! What the streamer's port answers beside replicas: its pages, and gRPC's own services, before, while and after there is
//! something to tell.

use std::net::UdpSocket;

use anabranch_proto::Lsn;
use anabranch_tests::{
    announce,
    http::{self, Answer},
    peers::{Replica, Streamer},
    postgres::Server,
    proxy::{Cut, Proxy},
    wait::{DEADLINE, until},
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, header};
use serde_json::Value;
use tempfile::TempDir;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

const T: &str = "SELECT * FROM t";
const SETUP: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a row that is nobody''s business')";

/// What a page of `address` answers, with this token.
async fn page(address: &str, path: &str, token: Option<&str>) -> Answer {
    let mut request = Request::get(path);
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let response = http::send(address, request.body(Full::default()).unwrap())
        .await
        .unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    Answer {
        status,
        body: String::from_utf8_lossy(&body).into_owned(),
    }
}

/// The value of a metric of the streamer.
async fn metric(streamer: &Streamer, name: &str) -> u64 {
    let text = streamer.get("/metrics").await.unwrap().ok().unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("anabranch_streamer_{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in:\n{text}"))
        .parse()
        .unwrap()
}

async fn status(streamer: &Streamer) -> Value {
    streamer.get("/status").await.unwrap().json().unwrap()
}

fn lsn(status: &Value, name: &str) -> Lsn {
    status[name].as_str().unwrap().parse().unwrap()
}

async fn channel(address: &str) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
    endpoint.connect().await.unwrap()
}

async fn health(address: &str, service: &str) -> Result<ServingStatus, Code> {
    let asked = HealthClient::new(channel(address).await)
        .check(HealthCheckRequest {
            service: service.into(),
        })
        .await;
    asked
        .map(|answer| answer.into_inner().status())
        .map_err(|status| status.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_say_what_is_before_during_and_after_a_loss_of_postgres() {
    let server = Server::shared().await;
    let database = server.database().await;
    database.execute(SETUP).await;
    let proxy = Proxy::to(&format!("{}:{}", server.host(), server.port())).await;
    proxy.set(|faults| faults.refuse());
    let streamer = Streamer::config(&database)
        .through(&proxy, &database)
        .shape("s", &[T])
        .prepare();
    streamer.spawn();
    // Before there is a mirror.
    until("it lives", DEADLINE, || async {
        streamer.get("/healthz").await?.ok()
    })
    .await;
    for path in ["/readyz", "/status", "/metrics"] {
        let answer = streamer.get(path).await.unwrap();
        assert_eq!(answer.status, 503, "{path}: {answer:?}");
        assert!(answer.body.contains("starting"), "{path}: {answer:?}");
    }
    assert_eq!(
        health(streamer.address(), "").await,
        Err(Code::Unavailable),
        "it serves nobody yet"
    );

    proxy.set(|faults| faults.heal());
    streamer.until_ready().await;
    let empty = status(&streamer).await;
    let (epoch, at) = (empty["epoch"].as_str().unwrap(), lsn(&empty, "lsn"));
    assert_eq!(empty["position"], format!("{epoch}@{at}"));
    assert_eq!(
        (&empty["connected"], &empty["replicas"]),
        (&true.into(), &0.into())
    );
    assert_eq!(metric(&streamer, "sessions").await, 0);

    let replica = Replica::config(&streamer).subscribe("s").start().await;
    database
        .execute("INSERT INTO t SELECT g, 'x' FROM generate_series(2, 100) g")
        .await;
    replica.until_equal(&database, &[("t", T)]).await;
    let written = database.lsn().await;
    until("the page is there too", DEADLINE, || async {
        let now = status(&streamer).await;
        let there = lsn(&now, "lsn") >= written
            && lsn(&now, "source_lsn") >= written
            && now["replicas"] == 1
            && now["connected"] == true;
        if there { Ok(()) } else { Err(now) }
    })
    .await;
    assert_eq!(metric(&streamer, "sessions").await, 1);
    assert!(metric(&streamer, "confirmed_lsn").await >= written.0);
    let disconnects = metric(&streamer, "disconnects_total").await;

    // Postgres is gone; the mirror still serves whoever comes.
    proxy.set(|faults| faults.refuse());
    proxy.cut(Cut::Reset);
    until("it says that Postgres is gone", DEADLINE, || async {
        let answer = streamer.get("/readyz").await?;
        anyhow::ensure!(answer.status == 503, "{answer:?}");
        Ok(())
    })
    .await;
    assert_eq!(status(&streamer).await["connected"], false);
    assert!(metric(&streamer, "disconnects_total").await > disconnects);
    assert_eq!(streamer.get("/healthz").await.unwrap().status, 200);
    let late = Replica::config(&streamer).subscribe("s").start().await;
    drop(replica);
    until("one replica is counted", DEADLINE, || async {
        let sessions = metric(&streamer, "sessions").await;
        if sessions == 1 { Ok(()) } else { Err(sessions) }
    })
    .await;

    proxy.set(|faults| faults.heal());
    streamer.until_ready().await;
    database.execute("DELETE FROM t WHERE id > 50").await;
    late.until_equal(&database, &[("t", T)]).await;
    assert_eq!(status(&streamer).await["connected"], true);
}

/// An address of this machine that is not loopback. There may be none; nothing is sent to find out.
pub fn own_address() -> Option<std::net::IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[tokio::test(flavor = "multi_thread")]
async fn from_outside_only_a_token_sees_more_than_yes_or_no() {
    let Some(outside) = own_address() else {
        announce("NOT TESTED: pages asked for from outside: this machine has loopback only");
        return;
    };
    let database = Server::shared().await.database().await;
    database.execute(SETUP).await;
    let dir = TempDir::new().unwrap();
    let key = dir.path().join("jwt.key");
    std::fs::write(&key, b"0123456789abcdef0123456789abcdef").unwrap();
    let streamer = Streamer::config(&database)
        .listen_everywhere()
        .set("auth.jwt.hs256_file", key.to_str().unwrap())
        .shape("s", &[T])
        .start()
        .await;
    let mint = |claims: &str| {
        let output = streamer.command("token").arg(claims).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let good = mint(r#"{"sub": "edge-1"}"#);
    let forged = good.chars().rev().collect::<String>();
    let (_, port) = streamer.address().rsplit_once(':').unwrap();
    let outside = format!("{outside}:{port}");
    for path in ["/healthz", "/readyz"] {
        let answer = page(&outside, path, None).await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        assert!(answer.body.len() < 10, "{path}: {answer:?}");
    }
    for path in ["/status", "/metrics"] {
        for token in [None, Some(forged.as_str()), Some("dev-1"), Some("")] {
            let answer = page(&outside, path, token).await;
            assert_eq!(answer.status, 401, "{path} {token:?}: {answer:?}");
            assert!(
                !answer.body.contains('/') && !answer.body.contains("anabranch"),
                "{path}: {answer:?}"
            );
        }
        let guarded = page(&outside, path, Some(&good)).await;
        assert_eq!(guarded.status, 200, "{path}: {guarded:?}");
        let local = page(streamer.address(), path, None).await;
        assert_eq!(local.status, 200, "{path}: {local:?}");
        assert!(local.body.contains("lsn"), "{path}: {local:?}");
    }
    // A replica needs its token from anywhere, also from this machine.
    let stranger = Replica::config(&streamer).subscribe("s").prepare();
    stranger.spawn();
    until("it is refused", DEADLINE, || async {
        let status = stranger.get("/status").await?.ok()?;
        anyhow::ensure!(status.contains("UNAUTHENTICATED"), "{status}");
        Ok(())
    })
    .await;
    let known = Replica::config_at(&format!("http://{outside}"))
        .token(&good)
        .subscribe("s")
        .start()
        .await;
    known.until_equal(&database, &[("t", T)]).await;
    for log in [streamer.log(), stranger.log(), known.log()] {
        assert!(!log.contains(&good), "a token is in a log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_answers_for_its_health_and_lists_its_services() {
    let database = Server::shared().await.database().await;
    database.execute(SETUP).await;
    let streamer = Streamer::config(&database).shape("s", &[T]).start().await;
    let address = streamer.address();
    assert_eq!(health(address, "").await, Ok(ServingStatus::Serving));
    assert_eq!(
        health(address, "no.such.Service").await,
        Err(Code::NotFound)
    );

    let mut reflection = ServerReflectionClient::new(channel(address).await);
    let mut ask = async |request: MessageRequest| {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(request),
        };
        let mut answers = reflection
            .server_reflection_info(tokio_stream::once(request))
            .await
            .unwrap()
            .into_inner();
        let answer = answers.message().await.unwrap().unwrap();
        answer.message_response.unwrap()
    };
    let listed = ask(MessageRequest::ListServices(String::new())).await;
    let MessageResponse::ListServicesResponse(listed) = listed else {
        panic!("{listed:?}")
    };
    let mut names: Vec<_> = listed.service.into_iter().map(|one| one.name).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "anabranch.v1.Anabranch",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection"
        ]
    );
    let described = MessageRequest::FileContainingSymbol("anabranch.v1.Anabranch".into());
    let described = ask(described).await;
    let MessageResponse::FileDescriptorResponse(described) = described else {
        panic!("{described:?}")
    };
    let files = described.file_descriptor_proto.concat();
    assert!(
        files
            .windows(b"Replicate".len())
            .any(|word| word == b"Replicate")
    );

    // Whoever asks again when it is over is told so by the connection.
    assert!(streamer.terminate().await.success());
    let gone = Channel::from_shared(format!("http://{address}")).unwrap();
    assert!(gone.connect().await.is_err());
}
