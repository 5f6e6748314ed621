//! Who may see what: what is tried by somebody who should not, and what ends when it should.
//!
//! The checklist is that of credentials and reading; writes have theirs in `roles`, `rights` and `writer`.

mod bombs;
mod canaries;
mod certificates;
mod credentials;
mod floods;
mod injection;
mod lies;
mod limits;
mod messages;
mod owners;
mod published;
mod routes;
mod tenants;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anabranch_tests::{
    caller::channel,
    issuer::Signer,
    peers::{Replica, Streamer, StreamerConfig},
    postgres::{Database, Server},
};
use prost::Message;
use prost_types::FileDescriptorSet;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, Request, Status, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// Rows of teams 1, 2 and 3, each with its team's word in it; and what each team may see.
const SETUP: &str = "CREATE TABLE t (id int PRIMARY KEY, team int NOT NULL, v text);
    INSERT INTO t SELECT g, g % 3 + 1, 'canary-of-team-' || g % 3 + 1 FROM generate_series(1, 30) g";
const SHAPE: &str = "[shape.s]\nparams.team = { claim = \"team_id\" }\ntables = [\"SELECT * FROM t WHERE team = $team\"]\nwritable = true";

/// Of the roles that tests make.
const PASSWORD: &str = "a role's own";

/// Makes a role that may log in, and connects as it. Its name begins with that of the database.
async fn role(database: &Database, name: &str, attributes: &str) -> tokio_postgres::Client {
    let name = format!("{} {name}", database.name());
    let password = PASSWORD.replace('\'', "''");
    let sql = format!("CREATE ROLE \"{name}\" LOGIN {attributes} PASSWORD '{password}'");
    database.execute(&sql).await;
    let url = database.url_as(&name, PASSWORD);
    let connected = tokio_postgres::connect(&url, tokio_postgres::NoTls).await;
    let (client, connection) = connected.unwrap();
    tokio::spawn(connection);
    client
}

/// A database, a streamer that believes one key, and files of a test.
struct Fixture {
    database: Database,
    streamer: Streamer,
    signer: Signer,
    dir: TempDir,
}

impl Fixture {
    async fn start(change: impl FnOnce(StreamerConfig) -> StreamerConfig) -> Fixture {
        let database = Server::shared().await.database().await;
        database.execute(SETUP).await;
        let dir = TempDir::new().unwrap();
        let signer = Signer::new("a");
        let key = dir.path().join("issuer.pem");
        fs::write(&key, signer.public_pem()).unwrap();
        let config = Streamer::config(&database)
            .toml(SHAPE)
            .set("auth.jwt.public_key_file", key.to_str().unwrap())
            .set("auth.jwt.audience", "anabranch");
        let streamer = change(config).start().await;
        Fixture {
            database,
            streamer,
            signer,
            dir,
        }
    }

    /// A token for ten minutes.
    fn token(&self, subject: &str, team: i64) -> String {
        self.signer.token(&claims(subject, team, 600))
    }

    async fn channel(&self) -> Channel {
        channel(self.streamer.address()).await
    }

    /// A file with a token.
    fn token_file(&self, name: &str, token: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, token).unwrap();
        path
    }

    /// A replica that reads its token from there.
    async fn replica_by(&self, token_file: &Path) -> Replica {
        Replica::config(&self.streamer)
            .token_file(token_file)
            .subscribe("s")
            .start()
            .await
    }
}

/// What a good token says, for so many seconds without the leeway.
fn claims(subject: &str, team: i64, seconds: i64) -> Value {
    let exp = anabranch_tests::issuer::at(seconds);
    json!({ "sub": subject, "aud": "anabranch", "exp": exp, "team_id": team })
}

/// What `/status` says last went wrong.
async fn last_error(replica: &Replica) -> anyhow::Result<String> {
    let status = replica.get("/status").await?.json()?;
    Ok(status["last_error"].as_str().unwrap_or_default().to_owned())
}

/// The file as a program opens it.
fn program(replica: &Replica) -> rusqlite::Connection {
    let file = rusqlite::Connection::open(replica.file()).unwrap();
    file.busy_timeout(anabranch_tests::wait::DEADLINE).unwrap();
    file
}

/// The value of a metric of a program.
async fn metric(peer: &anabranch_tests::peers::Peer, name: &str) -> f64 {
    peer.metric(name).await.unwrap()
}

/// Calls any method with an empty message.
async fn call(channel: Channel, path: &str, authorization: Option<&str>) -> Status {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let mut request = Request::new(tokio_stream::once(()));
    if let Some(authorization) = authorization {
        let value = authorization.parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    let path = PathAndQuery::try_from(path.to_owned()).unwrap();
    match grpc
        .streaming(request, path, ProstCodec::<(), ()>::default())
        .await
    {
        Err(status) => status,
        Ok(response) => match response.into_inner().message().await {
            Err(status) => status,
            Ok(_) => Status::ok("it answers"),
        },
    }
}

/// The methods of all services that the program itself names, but for those that show no data: its health, and what its
/// services are.
async fn methods(streamer: &Streamer) -> Vec<String> {
    const OPEN: [&str; 2] = [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    ];
    let mut reflection = ServerReflectionClient::new(channel(streamer.address()).await);
    let mut ask = async |request: MessageRequest| {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(request),
        };
        let asked = reflection.server_reflection_info(tokio_stream::once(request));
        let answer = asked.await.unwrap().into_inner().message().await;
        answer.unwrap().unwrap().message_response.unwrap()
    };
    let listed = ask(MessageRequest::ListServices(String::new())).await;
    let MessageResponse::ListServicesResponse(listed) = listed else {
        panic!("{listed:?}")
    };
    let mut methods = Vec::new();
    for service in listed.service.into_iter().map(|service| service.name) {
        if OPEN.contains(&service.as_str()) {
            continue;
        }
        let asked = ask(MessageRequest::FileContainingSymbol(service.clone())).await;
        let MessageResponse::FileDescriptorResponse(files) = asked else {
            panic!("{asked:?}")
        };
        for file in &files.file_descriptor_proto {
            let file = prost_types::FileDescriptorProto::decode(&file[..]).unwrap();
            let package = file.package().to_owned();
            for found in &file.service {
                if format!("{package}.{}", found.name()) == service {
                    let names = found.method.iter().map(|method| method.name());
                    methods.extend(names.map(|name| format!("/{service}/{name}")));
                }
            }
        }
    }
    // What the program lists is at least what the protocol has.
    let protocol = FileDescriptorSet::decode(anabranch_proto::FILE_DESCRIPTOR_SET).unwrap();
    for file in &protocol.file {
        for service in &file.service {
            for method in &service.method {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                assert!(methods.contains(&path), "{path} is not in {methods:?}");
            }
        }
    }
    methods
}

/// Line 1 of the checklist. The calls are those that the streamer itself lists, so that a new one is among them.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_answered_without_credentials() {
    let fixture = Fixture::start(|config| config).await;
    let stranger = Signer::new("a").token(&claims("a", 1, 600));
    let good = fixture.token("a", 1);
    let channel = fixture.channel().await;
    let methods = methods(&fixture.streamer).await;
    assert!(methods.len() >= 2, "{methods:?}");
    for path in &methods {
        for authorization in [
            None,
            Some(String::new()),
            Some("Bearer".into()),
            Some("Bearer ".into()),
            Some(good.clone()),
            Some(format!("Basic {good}")),
            Some(format!("Bearer {stranger}")),
            Some(format!("Bearer {good}x")),
            Some(format!("Bearer {}", "x".repeat(9000))),
        ] {
            let status = call(channel.clone(), path, authorization.as_deref()).await;
            assert_eq!(status.code(), Code::Unauthenticated, "{path}: {status:?}");
            assert!(!status.message().contains(&good), "{status:?}");
        }
        // And it is the token that was missing, not the method.
        let authorization = format!("Bearer {good}");
        let status = call(channel.clone(), path, Some(&authorization)).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{path}: {status:?}");
    }
    for unknown in [
        "/anabranch.v1.Anabranch/Explain",
        "/anabranch.v1.Other/Replicate",
    ] {
        let status = call(channel.clone(), unknown, None).await;
        assert_eq!(status.code(), Code::Unimplemented, "{unknown}");
    }
    assert!(!fixture.streamer.log().contains(&good));
}
