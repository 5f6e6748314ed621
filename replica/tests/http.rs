//! The local HTTP interface, over a real file and a scripted streamer.

mod fake;

use std::{collections::HashSet, time::Duration};

use anabranch_replica::Sidecar;
use fake::{Call, Fake, Replica, at, change, copy, heartbeat, soon};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpSocket, TcpStream, UnixStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

async fn copied() -> (Fake, Replica, Call) {
    let mut fake = Fake::start().await;
    let replica = Replica::start(&fake.url()).await;
    let mut call = fake.call().await;
    call.send(copy(100, &[(1, "one")])).await;
    call.acked(at(100)).await;
    (fake, replica, call)
}

#[tokio::test]
async fn status_hides_something() {
    let (fake, replica, call) = copied().await;
    call.keep_heard(100);
    replica
        .until("to be up to date", |status| status.caught_up())
        .await;
    let (code, status) = replica.json("/status").await;
    assert_eq!(code, 200);
    for (key, expected) in [
        ("position", json!(at(100).to_string())),
        ("epoch", json!("0000000000000007")),
        ("lsn", json!("0/64")),
        ("connected", json!(true)),
        ("caught_up", json!(true)),
        ("lag_ms", json!(0)),
        ("pending", json!(0)),
        ("rejected", json!(0)),
        ("last_error", Value::Null),
        ("streamer", json!(format!("{}/", fake.url()))),
        ("version", json!(env!("CARGO_PKG_VERSION"))),
        (
            "tables",
            json!([{ "table": "items", "state": "live", "reason": null, "lsn": "0/64" }]),
        ),
        ("commit_time", json!("2023-11-14T22:13:20.0001Z")),
    ] {
        assert_eq!(status[key], expected, "{key} in {status:#}");
    }
    for key in [
        "replica_id",
        "received_time",
        "database",
        "write_lock_max_ms",
    ] {
        assert!(!status[key].is_null(), "{key} in {status:#}");
    }
    assert!(!status.to_string().contains("\"t\""), "the token is told");
}

#[tokio::test]
async fn a_web_page_in_a_browser_asks_under_a_foreign_name() {
    let (_fake, replica, _call) = copied().await;
    let port = replica.port;
    for (head, expected) in [
        (
            format!("GET /status HTTP/1.1\r\nHost: localhost:{port}\r\n"),
            200,
        ),
        (
            format!("GET /status HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"),
            200,
        ),
        (
            format!("GET /status HTTP/1.1\r\nHost: evil.example:{port}\r\n"),
            421,
        ),
        (
            format!("GET /metrics HTTP/1.1\r\nHost: evil.example:{port}\r\n"),
            421,
        ),
        (
            format!("GET /nothing HTTP/1.1\r\nHost: evil.example:{port}\r\n"),
            421,
        ),
        ("GET /status HTTP/1.1\r\nHost: localhost:1\r\n".into(), 421),
        ("GET /status HTTP/1.1\r\n".into(), 421),
        (
            format!("GET /status HTTP/1.1\r\nHost: localhost:{port}\r\nHost: evil.example\r\n"),
            421,
        ),
        (
            format!("GET http://evil.example:{port}/status HTTP/1.1\r\nHost: localhost:{port}\r\n"),
            421,
        ),
        (
            format!("POST /status HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 0\r\n"),
            405,
        ),
        (
            format!("POST /flush HTTP/1.1\r\nHost: evil.example:{port}\r\nContent-Length: 0\r\n"),
            421,
        ),
        (
            format!("GET /flush HTTP/1.1\r\nHost: localhost:{port}\r\n"),
            405,
        ),
        (
            format!("POST /flush HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 0\r\n"),
            200,
        ),
        (
            format!("GET /nothing HTTP/1.1\r\nHost: localhost:{port}\r\n"),
            404,
        ),
    ] {
        let (code, body) = replica
            .request(&format!("{head}Connection: close\r\n\r\n"))
            .await;
        assert_eq!(code, expected, "{head}: {body}");
        assert!(code == 200 || !body.contains("position"), "{body}");
    }
}

#[tokio::test]
async fn waiting_for_a_position_ends_too_early_or_never() {
    let (_fake, replica, call) = copied().await;
    let (code, body) = replica.json("/wait?position=0/64&timeout=0").await;
    assert_eq!(
        (code, &body),
        (
            200,
            &json!({ "position": at(100).to_string(), "reached": true })
        )
    );
    let (code, body) = replica.json("/wait?position=0/65&timeout=0.05").await;
    assert_eq!(
        (code, &body),
        (
            504,
            &json!({ "position": at(100).to_string(), "reached": false })
        )
    );
    let (code, body) = replica
        .json("/wait?position=0000000000000008@0/1&timeout=5")
        .await;
    assert_eq!((code, &body["reached"]), (409, &json!(false)));
    assert!(
        body["error"].as_str().unwrap().contains("another history"),
        "{body}"
    );
    for query in ["", "?position=100", "?position=0/1&timeout=1000"] {
        let (code, body) = replica.json(&format!("/wait{query}")).await;
        assert_eq!(code, 400, "{query}");
        assert!(body["error"].as_str().is_some_and(|text| !text.is_empty()));
    }
    // Many at once, registered while commits come.
    let commits = async {
        for lsn in (200..=2_000).step_by(100) {
            call.send(change(lsn, &[(1, &lsn.to_string())])).await;
        }
    };
    let waits = async {
        for lsn in (150..=1_950).step_by(100) {
            let position = format!("{}@0/{lsn:X}", at(0).epoch);
            let (code, body) = replica
                .json(&format!("/wait?position={position}&timeout=20"))
                .await;
            assert_eq!((code, &body["reached"]), (200, &json!(true)), "{body}");
            // Who was told so finds it in the file.
            let there: i64 = replica.items()[0].1.parse().unwrap();
            assert!(there >= lsn, "{there} at {lsn}");
        }
    };
    tokio::join!(commits, waits);
    // A heartbeat moves the position too, on an idle source.
    call.send(heartbeat(9_000, 9_000)).await;
    assert_eq!(replica.get("/wait?position=0/2328&timeout=20").await.0, 200);
    // Right behind a page header: nothing will ever be there.
    call.send(heartbeat(16_384, 16_384)).await;
    assert_eq!(replica.get("/wait?position=0/4018&timeout=20").await.0, 200);
}

#[tokio::test]
async fn waiters_outlive_the_sidecar() {
    let (_fake, replica, _call) = copied().await;
    let mut waiting = TcpStream::connect(("127.0.0.1", replica.port))
        .await
        .unwrap();
    let head = format!(
        "GET /wait?position=F/0&timeout=300 HTTP/1.1\r\nHost: localhost:{}\r\n\r\n",
        replica.port
    );
    waiting.write_all(head.as_bytes()).await.unwrap();
    let mut changes = Reader::open(&replica, None).await;
    // It is registered when the metric says so.
    soon("the waiter", async {
        while !replica
            .get("/metrics")
            .await
            .1
            .contains("anabranch_replica_waiters 1")
        {}
    })
    .await;
    soon("the end", replica.sidecar.shutdown()).await.unwrap();
    let mut answer = String::new();
    soon("an answer", waiting.read_to_string(&mut answer))
        .await
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert_eq!(changes.next().await, None);
}

/// A reader of `/changes`.
struct Reader(BufReader<TcpStream>);

#[derive(Debug, Default, PartialEq)]
struct Event {
    id: String,
    event: String,
    data: String,
}

impl Reader {
    async fn open(replica: &Replica, last: Option<&str>) -> Self {
        // A small window: what the system keeps for us is not the replica's doing.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(8 * 1024).unwrap();
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], replica.port));
        let mut stream = socket.connect(address).await.unwrap();
        let last = last
            .map(|id| format!("Last-Event-ID: {id}\r\n"))
            .unwrap_or_default();
        // HTTP/1.0 answers without chunks, so that lines are lines.
        let head = format!(
            "GET /changes HTTP/1.0\r\nHost: localhost:{}\r\n{last}\r\n",
            replica.port
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut reader = Reader(BufReader::new(stream));
        let mut head = HashSet::new();
        loop {
            let line = reader.line().await.expect("a head");
            if line.is_empty() {
                break;
            }
            head.insert(line.to_lowercase());
        }
        assert!(
            head.iter().any(|line| line.starts_with("http/1.0 200")),
            "{head:?}"
        );
        assert!(head.contains("content-type: text/event-stream"), "{head:?}");
        reader
    }

    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = soon("a line", self.0.read_line(&mut line)).await.unwrap();
        (read > 0).then(|| line.trim_end().to_owned())
    }

    async fn next(&mut self) -> Option<Event> {
        let mut event = Event::default();
        loop {
            let line = self.line().await?;
            match line.split_once(": ") {
                Some(("id", id)) => event.id = id.into(),
                Some(("event", name)) => event.event = name.into(),
                Some(("data", data)) => event.data = data.into(),
                _ if line.is_empty() && event != Event::default() => return Some(event),
                _ => {}
            }
        }
    }
}

fn changed(lsn: u64, keys: &str) -> Option<Event> {
    Some(Event {
        id: at(lsn).to_string(),
        event: String::new(),
        data: format!("[{{\"keys\":{keys},\"table\":\"items\"}}]"),
    })
}

#[tokio::test]
async fn a_change_is_missed_by_one_who_connects_again() {
    let (_fake, replica, mut call) = copied().await;
    let mut reader = Reader::open(&replica, None).await;
    call.send(change(110, &[(1, "a"), (2, "b")])).await;
    assert_eq!(reader.next().await, changed(110, "[[1],[2]]"));
    drop(reader);
    call.send(change(120, &[(3, "c")])).await;
    call.acked(at(120)).await;
    let mut reader = Reader::open(&replica, Some(&at(110).to_string())).await;
    assert_eq!(reader.next().await, changed(120, "[[3]]"));
    call.send(change(130, &[(4, "d")])).await;
    assert_eq!(reader.next().await, changed(130, "[[4]]"));

    // Older than what is known, or from elsewhere: the tables are to be read again, then it goes on.
    for id in [
        at(50).to_string(),
        "nonsense".to_owned(),
        "0000000000000009@0/6E".to_owned(),
    ] {
        let mut reader = Reader::open(&replica, Some(&id)).await;
        let resync = reader.next().await.unwrap();
        assert_eq!(
            (resync.event.as_str(), resync.id),
            ("resync", at(130).to_string())
        );
    }
}

#[tokio::test]
async fn a_reader_that_is_stopped_takes_memory_without_bound() {
    let mut fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let replica = Replica::start_in(directory, &fake.url(), "token = \"t\"", |config| {
        config.memory.changes_bytes_max = 100_000;
    })
    .await;
    let mut call = fake.call().await;
    call.send(copy(100, &[(1, "one")])).await;
    call.acked(at(100)).await;
    let mut stopped = Reader::open(&replica, None).await;
    let mut in_process = replica.sidecar.changes(None);
    // Events of 20 KB: more than the system keeps for a connection, by far more than the ring does.
    let events = 500;
    for i in 1..=events {
        let keys: Vec<_> = (0..1_000).map(|key| (i64::MAX - key, "x")).collect();
        call.send(change(1_000 + i, &keys)).await;
    }
    call.acked(at(1_000 + events)).await;
    // What was on its way comes, then the word that something is missing, then the end.
    let (mut read, mut last) = (0, None);
    while let Some(event) = stopped.next().await {
        read += 1;
        last = Some(event);
    }
    println!("{read} of {events} events before the end");
    assert!(read < events);
    assert_eq!(last.unwrap().event, "resync");
    // The same for one in this process that did not read at all.
    let item = soon("an item", in_process.next()).await;
    assert!(
        matches!(item, Some(anabranch_replica::changes::Item::Resync(_))),
        "{item:?}"
    );
    assert_eq!(in_process.next().await, None);
}

#[tokio::test]
async fn connections_that_say_nothing_keep_others_out() {
    let (_fake, replica, _call) = copied().await;
    let mut mute = Vec::new();
    for _ in 0..200 {
        mute.push(
            TcpStream::connect(("127.0.0.1", replica.port))
                .await
                .unwrap(),
        );
    }
    let mut asking = JoinSet::new();
    let port = replica.port;
    for _ in 0..50 {
        asking.spawn(async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let head = format!(
                "GET /healthz HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        });
    }
    soon("all answers", asking.join_all()).await;
    // Half a request does not hold up the end either.
    mute[0].write_all(b"GET /status HT").await.unwrap();
    soon("the end", replica.sidecar.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_unix_socket_wants_a_host_or_stays_behind() {
    let mut fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("replica.sock");
    let config = fake::config(
        &fake.url(),
        directory.path(),
        &format!("token = \"t\"\nhttp = \"unix:{}\"", path.display()),
    );
    let sidecar = Sidecar::start(config, None, CancellationToken::new())
        .await
        .unwrap();
    let _call = fake.call().await;
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream
        .write_all(b"GET /status HTTP/1.1\r\nHost: whatever\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    soon("an answer", stream.read_to_string(&mut answer))
        .await
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    tokio::time::timeout(Duration::from_secs(10), sidecar.shutdown())
        .await
        .unwrap()
        .unwrap();
    assert!(!path.exists());
}
