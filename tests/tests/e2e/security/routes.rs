//! Which pages the two programs have, found in their code, and who may see each: a page that is added shows nothing to anybody
//! who may not, or this fails.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::Path};

use anabranch_tests::{
    http::{self, Answer},
    issuer::Signer,
    peers::Replica,
    wait::DEADLINE,
};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Fixture, claims};
use crate::pages::own_address;

/// Where a page is: the method that it is asked by, and its path.
type Route = (String, String);

/// All that is told to axum's routers in the code of a crate, by file.
fn routes(of: &str) -> Vec<(String, Route)> {
    fn files(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => files(&path, found),
                false => found.push(path),
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(of);
    let mut paths = Vec::new();
    files(&root.join("src"), &mut paths);
    let mut found = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        for call in text.split(".route(\"").skip(1) {
            let (page, rest) = call.split_once('"').unwrap();
            let method = rest.trim_start_matches([',', ' ', '\n']);
            let method = method.split('(').next().unwrap().to_uppercase();
            found.push((name.clone(), (method, page.to_owned())));
        }
        // Nothing else makes a page.
        for other in [".route_service(", ".nest(", ".nest_service("] {
            assert!(!text.contains(other), "{other} in {name}");
        }
    }
    found
}

/// Those of one or more files.
fn of(all: &[(String, Route)], files: &[&str]) -> BTreeSet<Route> {
    let named = all.iter().filter(|(file, _)| files.contains(&&**file));
    named.map(|(_, route)| route.clone()).collect()
}

/// Sends this head, and reads what comes within some seconds or until the end.
async fn raw(address: &str, head: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{head}Connection: close\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut bytes)).await;
    read.expect("it is answered").unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Answer {
        status: status.unwrap_or_else(|| panic!("no answer: {text:?}")),
        body: body.to_owned(),
    }
}

/// Whether there is something of what the pages show.
fn shows(answer: &Answer) -> bool {
    ["lsn", "anabranch_", "position", "epoch"]
        .iter()
        .any(|word| answer.body.contains(word))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_the_streamer_is_shown_to_who_is_led_to_it_or_brought_there() {
    let all = routes("streamer");
    // One that is not of these is a page that nobody thought about here.
    let files: BTreeSet<_> = all.iter().map(|(file, _)| &**file).collect();
    let known = ["src/connected.rs", "src/http.rs", "src/serve.rs"];
    assert_eq!(files, BTreeSet::from(known));
    let pages = of(&all, &["src/http.rs", "src/serve.rs"]);
    assert!(pages.len() >= 4, "{pages:?}");
    let is_open = |page: &str| ["/healthz", "/readyz"].contains(&page);

    let fixture = Fixture::start(|config| config).await;
    let address = fixture.streamer.address().to_owned();
    let (_, port) = address.rsplit_once(':').unwrap();
    let good = fixture.token("a", 1);
    let stranger = Signer::new("a").token(&claims("a", 1, 600));
    for (method, page) in &pages {
        let ask = async |target: &str, more: &str| {
            raw(&address, &format!("{method} {target} HTTP/1.1\r\n{more}")).await
        };
        let plain = ask(page, &format!("Host: {address}\r\n")).await;
        assert_eq!(plain.status, 200, "{page}: {plain:?}");
        if is_open(page) {
            assert!(plain.body.len() < 10 && !shows(&plain), "{plain:?}");
            continue;
        }
        assert!(shows(&plain), "{page} shows nothing: is it open?");
        // By a proxy on this machine; and by a page of somebody else's, whose name was made to point here.
        for headers in [
            format!("Host: {address}\r\nX-Forwarded-For: 127.0.0.1\r\n"),
            format!("Host: {address}\r\nX-FORWARDED-FOR:\r\n"),
            format!("Host: {address}\r\nForwarded: for=127.0.0.1\r\n"),
            format!("Host: {address}\r\nX-Real-IP: 127.0.0.1\r\n"),
            format!("Host: {address}\r\nVia: 1.1 localhost\r\n"),
            "Host: evil.example\r\n".into(),
            format!("Host: evil.example:{port}\r\n"),
            format!("Host: 127.0.0.1.evil.example:{port}\r\n"),
            format!("Host: localhost.evil.example:{port}\r\n"),
            format!("Host: localhost@evil.example:{port}\r\n"),
            format!("Host: 10.0.0.1:{port}\r\n"),
            format!("Host: 0.0.0.0:{port}\r\n"),
            "Host: evil.example/x\r\n".into(),
            "Host: a b\r\n".into(),
            "Host:\r\n".into(),
        ] {
            for authorization in [
                String::new(),
                "Authorization: Bearer x\r\n".into(),
                format!("Authorization: Bearer {stranger}\r\n"),
                format!("Authorization: Basic {good}\r\n"),
            ] {
                let answer = ask(page, &format!("{headers}{authorization}")).await;
                assert_eq!(answer.status, 401, "{page} {headers:?}: {answer:?}");
                assert!(!shows(&answer), "{page} {headers:?}: {answer:?}");
            }
            let known = format!("{headers}Authorization: Bearer {good}\r\n");
            let answer = ask(page, &known).await;
            assert_eq!(answer.status, 200, "{page} {headers:?}: {answer:?}");
        }
        // The name may be in the target too, and the header may be there twice.
        for (target, headers) in [
            (
                format!("http://evil.example:{port}{page}"),
                format!("Host: {address}\r\n"),
            ),
            (
                page.clone(),
                format!("Host: evil.example\r\nHost: {address}\r\n"),
            ),
            (
                page.clone(),
                format!("Host: {address}\r\nHost: evil.example\r\n"),
            ),
        ] {
            let answer = ask(&target, &headers).await;
            assert!(
                (400..500).contains(&answer.status),
                "{target} {headers:?}: {answer:?}"
            );
            assert!(!shows(&answer), "{target} {headers:?}: {answer:?}");
        }
        let named = by_http2(&address, &format!("http://evil.example:{port}{page}")).await;
        assert_eq!(named.status, 401, "{page}: {named:?}");
        let here = by_http2(&address, &format!("http://{address}{page}")).await;
        assert_eq!(here.status, 200, "{page}: {here:?}");
        // Spelled otherwise, or by another method, it is another page, or as well guarded.
        let evil = "Host: evil.example\r\n";
        let name = page.trim_start_matches('/');
        for target in [
            format!("/{page}"),
            format!("{page}/"),
            format!("{page}?token={good}"),
            format!("{page};x"),
            format!("/./{name}"),
            format!("/healthz/../{name}"),
            format!("/{}", name.to_uppercase()),
            format!("/%{:02x}{}", name.as_bytes()[0], &name[1..]),
            format!("{page}%00"),
        ] {
            for method in ["GET", "HEAD", "POST", "OPTIONS", "CONNECT", "TRACE", "X"] {
                let head = format!("{method} {target} HTTP/1.1\r\n{evil}");
                let answer = raw(&address, &head).await;
                // Of a call of gRPC that is not known the status is in the headers.
                let is_refused = (400..500).contains(&answer.status) || answer.body.is_empty();
                assert!(is_refused, "{head:?}: {answer:?}");
            }
        }
    }

    // What the commands ask is on a socket that only the streamer's user may open.
    let socket = fixture.streamer.dir().join("data/control");
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    let told = of(&all, &["src/connected.rs"]);
    for (_, page) in told {
        let answer = raw(
            &address,
            &format!("GET {page} HTTP/1.1\r\nHost: {address}\r\n"),
        )
        .await;
        assert!(
            answer.status == 404 || answer.body.is_empty(),
            "{page}: {answer:?}"
        );
    }
}

/// Whoever comes from another machine may say what he likes of where he is.
#[tokio::test(flavor = "multi_thread")]
async fn somebody_from_outside_is_taken_for_local_by_what_he_says() {
    let Some(outside) = own_address() else {
        anabranch_tests::announce(
            "NOT TESTED: pages asked for from outside: this machine has loopback only",
        );
        return;
    };
    let fixture = Fixture::start(|config| config.listen_everywhere()).await;
    let (_, port) = fixture.streamer.address().rsplit_once(':').unwrap();
    let address = format!("{outside}:{port}");
    for page in ["/status", "/metrics"] {
        for said in [
            format!("Host: 127.0.0.1:{port}\r\n"),
            format!("Host: localhost:{port}\r\nX-Forwarded-For: 127.0.0.1\r\n"),
            format!(
                "Host: localhost:{port}\r\nForwarded: for=127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n"
            ),
        ] {
            let answer = raw(&address, &format!("GET {page} HTTP/1.1\r\n{said}")).await;
            assert_eq!(answer.status, 401, "{page} {said:?}: {answer:?}");
        }
        let token = fixture.token("a", 1);
        let known =
            format!("GET {page} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n");
        assert_eq!(raw(&address, &known).await.status, 200);
    }
}

async fn by_http2(address: &str, url: &str) -> Answer {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let request = Request::get(url).body(Full::<bytes::Bytes>::default());
    let response = sender.send_request(request.unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    Answer {
        status,
        body: String::from_utf8_lossy(&body).into_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_the_replica_answers_or_acts_for_a_web_page_of_somebody_else() {
    let all = routes("replica");
    let files: BTreeSet<_> = all.iter().map(|(file, _)| &**file).collect();
    assert_eq!(files, BTreeSet::from(["src/http.rs"]));
    let pages = of(&all, &["src/http.rs"]);
    assert!(pages.len() >= 9, "{pages:?}");

    let fixture = Fixture::start(|config| config).await;
    let replica = Replica::config(&fixture.streamer)
        .token(&fixture.token("a", 1))
        .subscribe("s")
        .start()
        .await;
    let address = replica.address().to_owned();
    let (_, port) = address.rsplit_once(':').unwrap();
    for (method, page) in &pages {
        let ask =
            async |more: &str| raw(&address, &format!("{method} {page} HTTP/1.1\r\n{more}")).await;
        for host in [
            String::new(),
            "Host: evil.example\r\n".into(),
            format!("Host: evil.example:{port}\r\n"),
            format!("Host: 127.0.0.1.evil.example:{port}\r\n"),
            "Host: 127.0.0.1\r\n".into(),
            format!("Host: {address}\r\nHost: evil.example:{port}\r\n"),
        ] {
            let answer = ask(&host).await;
            assert!(
                [400, 421].contains(&answer.status),
                "{page} {host:?}: {answer:?}"
            );
            assert!(!shows(&answer), "{page} {host:?}: {answer:?}");
        }
        if method == "GET" {
            continue;
        }
        // A browser lets any page send a POST to any place, and only keeps the answer from it. It says whose page it is.
        let host = format!("Host: {address}\r\n");
        for origin in [
            "http://evil.example",
            "https://evil.example:7430",
            "http://127.0.0.1.evil.example",
            "http://localhost@evil.example",
            "null",
            "file://",
            "",
        ] {
            let answer = ask(&format!("{host}Origin: {origin}\r\n")).await;
            assert_eq!(answer.status, 403, "{page} {origin}: {answer:?}");
            assert!(!shows(&answer), "{page} {origin}: {answer:?}");
        }
        let fetched = ask(&format!("{host}Sec-Fetch-Site: cross-site\r\n")).await;
        assert_eq!(fetched.status, 403, "{page}: {fetched:?}");
        // A page of this machine, and what is no page.
        for origin in [
            "",
            "Origin: http://localhost:3000\r\n",
            "Origin: http://127.0.0.1:80\r\n",
        ] {
            let answer = ask(&format!("{host}{origin}")).await;
            assert!(
                ![403, 421].contains(&answer.status),
                "{page} {origin}: {answer:?}"
            );
        }
    }
    let status = http::get(&address, "/status").await.unwrap();
    assert_eq!(status.status, 200);
    assert!(shows(&status), "{status:?}");
}
