use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32 + 4).to_be_bytes();
    [&[kind], &length[..], payload].concat()
}

/// Reads a message without a kind.
async fn startup(socket: &mut TcpStream) -> Vec<u8> {
    let Ok(length) = socket.read_u32().await else {
        return Vec::new(); // the client had enough
    };
    let mut payload = vec![0; length as usize - 4];
    socket.read_exact(&mut payload).await.unwrap();
    payload
}

/// What the server says to the startup message; then it closes. The startup messages that it saw.
async fn connect_to(
    answers: &'static [(u8, &'static [u8])],
    parameters: &str,
) -> (Result<Wire, Error>, Vec<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Ok((mut socket, _)) = listener.accept().await {
            let first = startup(&mut socket).await;
            if first == SSL_REQUEST_BODY {
                socket.write_all(b"N").await.unwrap();
                seen.push(startup(&mut socket).await);
            } else {
                seen.push(first);
            }
            for (kind, payload) in answers {
                socket.write_all(&message(*kind, payload)).await.unwrap();
            }
            let mut rest = Vec::new();
            let _ = socket.read_to_end(&mut rest).await;
            seen.push(rest);
            if seen.len() == 4 || !answers.iter().any(|(kind, _)| *kind == b'E') {
                return seen;
            }
        }
        seen
    });
    let url = format!("postgres://u:CANARY@127.0.0.1:{port}/db?connect_timeout=2{parameters}");
    let result = Wire::connect(&Target::parse(&url).unwrap(), "test", &[("x", "y")]).await;
    let seen = tokio::time::timeout(std::time::Duration::from_secs(1), server).await;
    (result, seen.map(Result::unwrap).unwrap_or_default())
}

const SSL_REQUEST_BODY: &[u8] = &[4, 210, 22, 47];

async fn error_of(answers: &'static [(u8, &'static [u8])], parameters: &str) -> Error {
    let (result, seen) = connect_to(answers, parameters).await;
    for bytes in seen.iter().skip(1).step_by(2) {
        let shown = String::from_utf8_lossy(bytes);
        assert!(!shown.contains("CANARY"), "the password was sent: {shown}");
    }
    let Err(error) = result else {
        panic!("connected");
    };
    assert!(!error.to_string().contains("CANARY"), "{error}");
    error
}

#[tokio::test]
async fn the_password_is_not_told_in_the_clear() {
    let error = error_of(&[(b'R', &[0, 0, 0, 3])], "").await;
    assert!(
        matches!(&error, Error::Definite(text) if text.contains("in the clear")),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_that_is_not_authenticated_is_refused_where_binding_is_required() {
    for answers in [
        &[(b'R', &[0, 0, 0, 0][..])][..],
        &[(b'R', &[0, 0, 0, 5, 1, 2, 3, 4])],
        &[(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0")],
        &[(b'R', b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")],
    ] {
        // Leaked, since a task of the test has it.
        let answers: &'static _ = Box::leak(answers.to_vec().into_boxed_slice());
        let error = error_of(answers, "&channel_binding=require").await;
        assert!(
            matches!(&error, Error::Definite(text) if text.contains("binding")),
            "{error}"
        );
    }
}

#[tokio::test]
async fn an_error_is_classified_and_its_detail_is_kept_back() {
    let error = error_of(
        &[(b'E', b"SFATAL\0VFATAL\0C28P01\0Mno\0DCANARY\0HCANARY\0\0")],
        "&sslmode=disable",
    )
    .await;
    assert!(
        matches!(&error, Error::Definite(text) if text.ends_with("FATAL 28P01: no")),
        "{error}"
    );
    let error = error_of(&[(b'E', b"VFATAL\0C57P03\0Mstarting\0\0")], "").await;
    assert!(matches!(&error, Error::Transient(_)), "{error}");
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused_before_there_is_room_for_it() {
    let (result, _) = connect_to(&[(b'R', &[0; 2_000_000])], "&sslmode=disable").await;
    let Err(Error::Transient(text)) = result else {
        panic!("accepted");
    };
    assert!(text.contains("2000005 bytes"), "{text}");
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    for mode in ["require", "verify-full"] {
        let error = error_of(&[], &format!("&sslmode={mode}")).await;
        assert!(
            matches!(&error, Error::Definite(text) if text.contains("no TLS")),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let url = format!("postgres://u@127.0.0.1:{port}/db?connect_timeout=2");
    let result = Wire::connect(&Target::parse(&url).unwrap(), "test", &[]).await;
    let Err(Error::Transient(text)) = result else {
        panic!("connected");
    };
    assert!(text.contains("connect_timeout"), "{text}");
}

#[tokio::test]
async fn the_startup_message_asks_for_replication_and_pins_what_is_printed() {
    let (_, seen) = connect_to(&[(b'R', &[0, 0, 0, 3])], "&options=-c%20a%3Db").await;
    let startup = String::from_utf8_lossy(&seen[0]).into_owned();
    assert!(startup.starts_with("\0\x03\0\0user\0u\0database\0db\0replication\0database\0"));
    for part in [
        "\0application_name\0test\0",
        "\0options\0 -c x=y -c a=b -c DateStyle=ISO,YMD -c TimeZone=UTC ",
    ] {
        assert!(startup.contains(part), "{startup}");
    }
}

/// Callers run in spawned tasks.
#[test]
fn connecting_may_move_between_threads() {
    fn movable(_: impl Send) {}
    let target = Target::parse("postgres://u@h").unwrap();
    movable(Wire::connect(&target, "x", &[]));
    movable(sql::Client::connect(&target, "x"));
}
