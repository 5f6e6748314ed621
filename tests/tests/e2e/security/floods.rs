//! Bytes that no client of ours sends: lines 7 and 13 of the checklist. Each is sent while a healthy replica is served.

use std::time::{Duration, Instant};

use anabranch_tests::{
    peers::Replica,
    postgres::Database,
    wait::{DEADLINE, until},
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::Fixture;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// How long the streamer leaves a connection on which nothing is asked, and some more.
const IDLE_OVER: Duration = Duration::from_secs(60);

/// `:method POST`, `:scheme http`, `:path /` of the static table of HPACK.
const FIELDS: [u8; 3] = [0x83, 0x86, 0x84];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Sends a preface and these frames again and again until the streamer ends the connection; how many bytes it took.
async fn until_cut(address: &str, mut more: impl FnMut() -> Vec<u8>, bytes_max: usize) -> usize {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    // What it says is of no interest, but must not fill up.
    let drain = tokio::spawn(async move {
        let mut bytes = [0; 4096];
        while read.read(&mut bytes).await.is_ok_and(|count| count > 0) {}
    });
    let hello = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    write.write_all(&hello).await.unwrap();
    let mut sent = 0;
    while sent < bytes_max && !drain.is_finished() {
        let bytes = more();
        sent += bytes.len();
        let written = tokio::time::timeout(DEADLINE, write.write_all(&bytes)).await;
        match written {
            Ok(Ok(())) => {}
            Ok(Err(_)) => break,
            Err(_) => panic!("it takes nothing any more, and lives"),
        }
        tokio::task::yield_now().await;
    }
    until("the connection ends", IDLE_OVER, || async {
        drain.is_finished()
    })
    .await;
    sent
}

/// The longest of some commits until the replica has them.
async fn delay(database: &Database, replica: &Replica, from: i64) -> Duration {
    let mut longest = Duration::ZERO;
    for id in from..from + 20 {
        let began = Instant::now();
        database
            .execute(&format!("INSERT INTO t VALUES ({id}, 1, 'live')"))
            .await;
        until("the row is there", DEADLINE, || async {
            let sql = "SELECT count(*) FROM t WHERE id = ?1";
            let count: i64 = replica
                .open()
                .query_row(sql, [id], |row| row.get(0))
                .unwrap();
            count == 1
        })
        .await;
        longest = longest.max(began.elapsed());
    }
    longest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_frames_or_idle_connections_keep_a_healthy_replica_waiting() {
    let fixture = Fixture::start(|config| config).await;
    let address = fixture.streamer.address().to_owned();
    let replica = Replica::config(&fixture.streamer)
        .token(&fixture.token("a", 1))
        .subscribe("s")
        .start()
        .await;
    let alone = delay(&fixture.database, &replica, 1000).await;
    let memory = fixture.streamer.memory_peak_bytes();

    // Connections that say nothing, half a request, or a preface, and then nothing more.
    let mut idle = Vec::new();
    for i in 0..1000 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        match i % 3 {
            0 => {}
            1 => stream
                .write_all(b"GET /status HTTP/1.1\r\nHost: ")
                .await
                .unwrap(),
            _ => stream.write_all(PREFACE).await.unwrap(),
        }
        idle.push(stream);
    }
    let opened = Instant::now();

    // CONTINUATION without end, in small and in large pieces.
    for piece in [&[][..], &[0; 10][..], &[0x40; 16_000][..]] {
        let mut first = true;
        let flood = || {
            if std::mem::take(&mut first) {
                return frame(HEADERS, 0, 1, &FIELDS);
            }
            frame(CONTINUATION, 0, 1, piece).repeat(10)
        };
        let sent = until_cut(&address, flood, 64 << 20).await;
        assert!(sent < 16 << 20, "{sent} bytes of CONTINUATION were taken");
    }
    // Streams that are taken back at once.
    let mut stream = 1;
    let reset = || {
        let mut bytes = Vec::new();
        for _ in 0..100 {
            bytes.extend(frame(HEADERS, END_HEADERS, stream, &FIELDS));
            bytes.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
            stream += 2;
        }
        bytes
    };
    let sent = until_cut(&address, reset, 64 << 20).await;
    assert!(sent < 16 << 20, "{sent} bytes of resets were taken");
    // More headers than there may be, of a request that is whole.
    let fields = [
        &FIELDS[..],
        &[0x40, 1, b'a', 0x7f, 0x81, 0x7c],
        &[b'x'; 16_000],
    ]
    .concat();
    let mut stream = 1;
    let large = || {
        stream += 2;
        frame(HEADERS, END_HEADERS, stream, &fields)
    };
    until_cut(&address, large, 4 << 20).await;
    // Pings, which are answered, and yet no end of them.
    let mut pings = 0;
    let ping = || {
        pings += 1;
        frame(PING, 0, 0, &[7; 8])
    };
    until_cut(&address, ping, 1 << 20).await;

    let flooded = delay(&fixture.database, &replica, 2000).await;
    println!("alone {alone:?}, beside floods and idle connections {flooded:?}");
    assert!(
        flooded < 2 * alone + Duration::from_millis(500),
        "{flooded:?} instead of {alone:?}"
    );
    let grown = fixture.streamer.memory_peak_bytes() - memory;
    println!("{} KiB more for all of it", grown >> 10);
    assert!(grown < 64 << 20, "{grown} bytes more");

    // They end by themselves.
    for mut stream in idle {
        let left = (opened + IDLE_OVER).saturating_duration_since(Instant::now());
        let left = left.max(Duration::from_millis(10));
        let ended = async { while stream.read_u8().await.is_ok() {} };
        let ended = tokio::time::timeout(left, ended).await;
        assert!(
            ended.is_ok(),
            "an idle connection is open after {IDLE_OVER:?}"
        );
    }
    let mine = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(&fixture.database, &mine).await;
}

/// A call of gRPC, but for its messages.
pub(super) struct Post<'a> {
    pub path: &'a str,
    pub token: &'a str,
    /// Beside those that every call has.
    pub headers: &'a [(&'static str, &'a str)],
}

/// Posts these bytes as a gRPC message stream; the gRPC status that comes.
pub(super) async fn post(address: &str, call: Post<'_>, body: Vec<u8>) -> String {
    let Post {
        path,
        token,
        headers,
    } = call;
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let mut request = Request::post(format!("http://{address}{path}"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body))).unwrap();
    let asked = async {
        let response = sender.send_request(request).await.unwrap();
        let of = |headers: &header::HeaderMap| {
            let status = headers.get("grpc-status")?.to_str().ok()?;
            Some(status.to_owned())
        };
        let early = of(response.headers());
        let body = response.into_body().collect().await.unwrap();
        early.or_else(|| of(body.trailers()?))
    };
    let status = tokio::time::timeout(DEADLINE, asked).await.unwrap();
    status.expect("there is a status")
}

/// Line 7: lengths of frames and fields beyond what is there, beyond 4 GiB, and below zero.
#[tokio::test(flavor = "multi_thread")]
async fn a_length_that_is_a_lie_is_believed() {
    let fixture = Fixture::start(|config| config).await;
    let token = fixture.token("a", 1);
    let address = fixture.streamer.address().to_owned();
    let message = |bytes: &[u8]| {
        let mut framed = vec![0];
        framed.extend((bytes.len() as u32).to_be_bytes());
        framed.extend(bytes);
        framed
    };
    // As a varint, 2^64 - 1 is -1 too.
    let most = [&[255; 9][..], &[1]].concat();
    let field = |number: u8, length: &[u8]| [&[number << 3 | 2][..], length].concat();
    let memory = fixture.streamer.memory_peak_bytes();
    let mut bodies = vec![
        // Frames: 4 GiB less one, 2 GiB, and one byte more than a message may have.
        vec![0, 255, 255, 255, 255],
        vec![0, 128, 0, 0, 0],
        vec![0, 0, 64, 0, 1],
        // Compressed, where nobody agreed to that.
        vec![1, 0, 0, 0, 1, 0],
        message(&[255; 100]),
        message(&[]),
    ];
    for length in [
        &most[..],
        &[255, 255, 255, 255, 15],
        &[255, 255, 255, 255, 7],
        &[5],
    ] {
        for number in 1..=7 {
            // The field itself, and one within it.
            let outer = field(number, length);
            bodies.push(message(&outer));
            let inner = field(3, length);
            let mut nested = field(number, &[inner.len() as u8]);
            nested.extend(inner);
            bodies.push(message(&nested));
        }
    }
    // Groups within groups, which a parser may go down after.
    bodies.push(message(&[0x0b; 10_000]));
    for path in [
        "/anabranch.v1.Anabranch/Replicate",
        "/anabranch.v1.Anabranch/Write",
    ] {
        for body in &bodies {
            let call = Post {
                path,
                token: &token,
                headers: &[],
            };
            let status = post(&address, call, body.clone()).await;
            // INVALID_ARGUMENT, RESOURCE_EXHAUSTED, OUT_OF_RANGE, UNIMPLEMENTED (of the compression), INTERNAL
            let expected = ["3", "8", "11", "12", "13"];
            assert!(expected.contains(&&*status), "{status} for {body:?}");
        }
    }
    let grown = fixture.streamer.memory_peak_bytes() - memory;
    println!("{} KiB more for all of it", grown >> 10);
    assert!(grown < 32 << 20, "{grown} bytes more");
    let replica = Replica::config(&fixture.streamer)
        .token(&token)
        .subscribe("s")
        .start()
        .await;
    let mine = [("t", "SELECT * FROM t WHERE team = 1")];
    replica.until_equal(&fixture.database, &mine).await;
}
