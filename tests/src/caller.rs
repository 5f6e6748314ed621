//! Calls as no replica of ours makes them: with any credentials, any Hello, and nothing that is read being believed.

use std::{collections::BTreeMap, time::Duration};

use anabranch_proto::{
    PROTOCOL_VERSION, ops, packed,
    v1::{self, anabranch_client::AnabranchClient, element, up, write_up},
};
use bytes::{Bytes, BytesMut};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Status, Streaming, transport::Channel};

/// Nothing here takes this long unless it never comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// One `Replicate`.
#[derive(Debug)]
pub struct Stream {
    up: mpsc::Sender<v1::Up>,
    down: Streaming<v1::Down>,
}

/// One `Write`.
#[derive(Debug)]
pub struct Write {
    up: mpsc::Sender<v1::WriteUp>,
    down: Streaming<v1::WriteDown>,
}

/// What a first transaction brought.
#[derive(Clone, Debug, Default)]
pub struct First {
    /// Tables that came whole.
    pub reset: usize,
    /// Bytes of rows, as they came.
    pub rows: Vec<u8>,
    /// The records of rows, each with the id of its table.
    pub records: Vec<(u32, Bytes)>,
    /// Proves them.
    pub resume_token: Vec<u8>,
}

/// A Hello for one shape.
pub fn hello(replica_id: &str, shape: &str) -> v1::Hello {
    v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        replica_id: replica_id.into(),
        subscriptions: subscribe(shape),
        ..v1::Hello::default()
    }
}

fn subscribe(shape: &str) -> Vec<v1::Subscription> {
    vec![v1::Subscription {
        shape: shape.into(),
        params: BTreeMap::new().into_iter().collect(),
    }]
}

/// Connects to `host:port`.
pub async fn channel(address: &str) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
    endpoint.connect().await.expect("connect")
}

fn with_token<T>(message: T, token: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        let value = format!("Bearer {token}").parse().expect("a header");
        request.metadata_mut().insert("authorization", value);
    }
    request
}

async fn patiently<T>(what: impl Future<Output = T>) -> T {
    let patience = tokio::time::timeout(PATIENCE, what).await;
    patience.expect("an answer comes")
}

/// Calls `Replicate`.
pub async fn replicate(
    channel: Channel,
    token: Option<&str>,
    hello: v1::Hello,
) -> Result<Stream, Status> {
    let (up, messages) = mpsc::channel(4);
    let first = v1::Up {
        kind: Some(up::Kind::Hello(hello)),
    };
    let messages = tokio_stream::once(first).chain(ReceiverStream::new(messages));
    let request = with_token(messages, token);
    let mut client = AnabranchClient::new(channel);
    let response = patiently(client.replicate(request)).await?;
    Ok(Stream {
        up,
        down: response.into_inner(),
    })
}

impl Stream {
    /// Says something.
    pub async fn say(&self, kind: up::Kind) {
        // If the call has ended, what is read next says why.
        let _ = self.up.send(v1::Up { kind: Some(kind) }).await;
    }

    /// Says a newer token.
    pub async fn renew(&self, token: &str) {
        let token = token.to_owned();
        self.say(up::Kind::Renew(v1::Renew { token })).await;
    }

    /// The next message.
    pub async fn next(&mut self) -> Result<v1::Down, Status> {
        match patiently(self.down.message()).await? {
            Some(message) => Ok(packed::unpack(message).expect("it can be unpacked")),
            None => Err(Status::ok("the call ended")),
        }
    }

    /// The first transaction.
    pub async fn first(&mut self) -> Result<First, Status> {
        let mut first = First::default();
        let mut rest = BytesMut::new();
        loop {
            let message = self.next().await?;
            first.rows.extend(message.encode_to_vec());
            for element in &message.elements {
                match &element.kind {
                    Some(element::Kind::Begin(begin)) => first.reset += begin.reset.len(),
                    Some(element::Kind::Rows(rows)) => {
                        rest.extend_from_slice(&rows.ops);
                        if !rows.continued {
                            let mut ops = std::mem::take(&mut rest).freeze();
                            while let Some((_, record)) = ops::take(&mut ops).expect("ops") {
                                first.records.push((rows.table, record));
                            }
                        }
                    }
                    Some(element::Kind::Commit(_)) => {
                        first.resume_token = message.resume_token.to_vec();
                        return Ok(first);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Reads, and says that it lives, until the call ends; why it did.
    pub async fn until_over(&mut self) -> Status {
        let mut said = tokio::time::Instant::now();
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
            if said.elapsed() > Duration::from_secs(2) {
                self.say(up::Kind::Ack(v1::Ack::default())).await;
                said = tokio::time::Instant::now();
            }
        }
    }
}

/// Calls `Write`.
pub async fn write(
    channel: Channel,
    token: Option<&str>,
    replica_id: &str,
    shape: &str,
) -> Result<Write, Status> {
    let (up, messages) = mpsc::channel(4);
    let hello = v1::WriteHello {
        protocol_version: PROTOCOL_VERSION,
        replica_id: replica_id.into(),
        subscriptions: subscribe(shape),
    };
    let first = v1::WriteUp {
        kind: Some(write_up::Kind::Hello(hello)),
    };
    let messages = tokio_stream::once(first).chain(ReceiverStream::new(messages));
    let request = with_token(messages, token);
    let mut client = AnabranchClient::new(channel);
    let response = patiently(client.write(request)).await?;
    Ok(Write {
        up,
        down: response.into_inner(),
    })
}

impl Write {
    /// Says something.
    pub async fn say(&self, kind: write_up::Kind) {
        // If the call has ended, what is read next says why.
        let _ = self.up.send(v1::WriteUp { kind: Some(kind) }).await;
    }

    /// The next that is said but `Alive`.
    pub async fn next(&mut self) -> Result<v1::write_down::Kind, Status> {
        loop {
            match patiently(self.down.message()).await? {
                Some(message) => match message.kind {
                    Some(v1::write_down::Kind::Alive(_)) => {}
                    Some(kind) => return Ok(kind),
                    None => return Err(Status::internal("an empty message")),
                },
                None => return Err(Status::ok("the call ended")),
            }
        }
    }

    /// Reads, and says that it lives, until the call ends; why it did.
    pub async fn until_over(&mut self) -> Status {
        loop {
            match patiently(self.down.message()).await {
                Err(status) => return status,
                Ok(None) => return Status::ok("the call ended"),
                Ok(Some(_)) => self.say(write_up::Kind::Alive(v1::Alive {})).await,
            }
        }
    }
}
