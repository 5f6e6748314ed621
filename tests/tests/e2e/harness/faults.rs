//! The proxy's faults are what they are called, seen from both ends of a connection.

use std::{io::ErrorKind, time::Duration};

use anabranch_tests::{
    proxy::{Cut, Proxy, Way},
    wait::{DEADLINE, until},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

/// Long enough to tell nothing from something.
const SILENCE: Duration = Duration::from_millis(300);

/// A connection through a proxy, seen from both ends.
async fn connected() -> (Proxy, TcpStream, TcpStream) {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::to(&server.local_addr().unwrap().to_string()).await;
    let client = TcpStream::connect(proxy.address()).await.unwrap();
    let (server, _) = server.accept().await.unwrap();
    (proxy, client, server)
}

async fn arrives(bytes: &[u8], from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(bytes).await.unwrap();
    let mut read = vec![0; bytes.len()];
    let arrived = timeout(DEADLINE, to.read_exact(&mut read)).await;
    arrived.expect("it arrives").unwrap();
    assert_eq!(read, bytes);
}

async fn is_silent(stream: &mut TcpStream) {
    let read = timeout(SILENCE, stream.read(&mut [0])).await;
    assert!(read.is_err(), "{read:?}");
}

#[tokio::test]
async fn bytes_pass_are_counted_and_recorded() {
    let (proxy, mut client, mut server) = connected().await;
    arrives(b"not recorded", &mut client, &mut server).await;
    proxy.record();
    arrives(b"question", &mut client, &mut server).await;
    arrives(b"answer", &mut server, &mut client).await;
    assert_eq!(proxy.recorded(Way::Up), "question");
    assert_eq!(proxy.recorded(Way::Down), "answer");
    assert_eq!((proxy.bytes(Way::Up), proxy.bytes(Way::Down)), (20, 6));
    assert_eq!((proxy.accepted(), proxy.open()), (1, 1));
    assert_eq!(proxy.take_recorded(Way::Down), [(0, "answer".into())]);
    arrives(b"another", &mut server, &mut client).await;
    assert_eq!(proxy.take_recorded(Way::Down), [(0, "another".into())]);
    assert!(proxy.recorded(Way::Down).is_empty());
}

#[tokio::test]
async fn a_reset_is_an_error_and_a_close_is_an_end_on_both_sides() {
    let (proxy, mut client, mut server) = connected().await;
    arrives(b"x", &mut client, &mut server).await;
    proxy.cut(Cut::Reset);
    for stream in [&mut client, &mut server] {
        let error = timeout(DEADLINE, stream.read(&mut [0])).await.unwrap();
        assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let (proxy, mut client, mut server) = connected().await;
    arrives(b"x", &mut client, &mut server).await;
    proxy.cut(Cut::Close);
    for stream in [&mut client, &mut server] {
        let read = timeout(DEADLINE, stream.read(&mut [0])).await.unwrap();
        assert_eq!(read.unwrap(), 0);
    }
    until("the proxy knows", DEADLINE, || async { proxy.open() == 0 }).await;
}

#[tokio::test]
async fn an_end_of_one_direction_leaves_the_other_open() {
    let (_proxy, mut client, mut server) = connected().await;
    client.shutdown().await.unwrap();
    let read = timeout(DEADLINE, server.read(&mut [0])).await.unwrap();
    assert_eq!(read.unwrap(), 0);
    arrives(b"still here", &mut server, &mut client).await;
}

#[tokio::test]
async fn a_connection_is_cut_in_the_middle_of_a_message() {
    let (proxy, mut client, mut server) = connected().await;
    arrives(b"whole", &mut client, &mut server).await;
    proxy.set(|faults| faults.cut_after(Way::Up, 3, Cut::Close));
    client.write_all(b"broken").await.unwrap();
    let mut read = Vec::new();
    let end = timeout(DEADLINE, server.read_to_end(&mut read)).await;
    end.expect("it ends").unwrap();
    assert_eq!(read, b"bro");
}

#[tokio::test]
async fn what_is_stalled_comes_later_and_what_is_swallowed_never() {
    let (proxy, mut client, mut server) = connected().await;
    proxy.set(|faults| faults.stall(Way::Down));
    server.write_all(b"late").await.unwrap();
    is_silent(&mut client).await;
    arrives(b"the other way is open", &mut client, &mut server).await;
    proxy.set(|faults| faults.heal());
    arrives(b"", &mut server, &mut client).await;
    let mut read = [0; 4];
    client.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"late");

    proxy.set(|faults| faults.swallow(Way::Down));
    // Far more than all buffers between them hold: a swallowing connection takes everything.
    server.write_all(&vec![7; 20_000_000]).await.unwrap();
    is_silent(&mut client).await;
    // Nor is there ever a gap with bytes behind it.
    proxy.set(|faults| faults.heal());
    server.write_all(b"behind the gap").await.unwrap();
    is_silent(&mut client).await;
}

#[tokio::test]
async fn a_stalled_sender_is_made_to_wait() {
    let (proxy, _client, mut server) = connected().await;
    proxy.set(|faults| faults.stall(Way::Down));
    let sent = timeout(SILENCE, server.write_all(&vec![7; 40_000_000])).await;
    assert!(sent.is_err(), "somebody took 40 MB");
}

#[tokio::test]
async fn delays_and_throttles() {
    let (proxy, mut client, mut server) = connected().await;
    proxy.set(|faults| faults.delay(Way::Up, Duration::from_millis(200)));
    let start = Instant::now();
    arrives(b"later", &mut client, &mut server).await;
    assert!(start.elapsed() >= Duration::from_millis(200));
    let start = Instant::now();
    arrives(b"at once", &mut server, &mut client).await;
    assert!(start.elapsed() < Duration::from_millis(200));

    proxy.set(|faults| {
        faults.heal();
        faults.throttle(Way::Up, 100_000);
    });
    let start = Instant::now();
    arrives(&[7; 50_000], &mut client, &mut server).await;
    // The last tenth of a second's worth arrives before its pause.
    assert!(start.elapsed() >= Duration::from_millis(380), "{start:?}");
}

#[tokio::test]
async fn nobody_listens_or_nobody_answers() {
    let (proxy, ..) = connected().await;
    proxy.set(|faults| faults.refuse());
    // The reset may come so soon that connecting fails already.
    let refused = match TcpStream::connect(proxy.address()).await {
        Ok(mut refused) => timeout(DEADLINE, refused.read(&mut [0]))
            .await
            .unwrap()
            .err(),
        Err(error) => Some(error),
    };
    assert_eq!(refused.unwrap().kind(), ErrorKind::ConnectionReset);
    proxy.set(|faults| {
        faults.heal();
        faults.hang();
    });
    let mut hanging = TcpStream::connect(proxy.address()).await.unwrap();
    hanging.write_all(b"hello?").await.unwrap();
    is_silent(&mut hanging).await;
}

#[tokio::test]
async fn waiting_in_vain_says_what_was_seen() {
    let waiting = tokio::spawn(until("pigs fly", Duration::from_millis(50), || async {
        Err::<(), _>("a pig on the ground")
    }));
    let panic = waiting.await.unwrap_err().into_panic();
    let said = panic.downcast_ref::<String>().unwrap();
    assert!(said.contains("faults.rs"), "{said}");
    assert!(said.contains("until pigs fly"), "{said}");
    assert!(said.contains("a pig on the ground"), "{said}");

    let hanging = tokio::spawn(until(
        "it answers",
        Duration::from_millis(50),
        std::future::pending::<bool>,
    ));
    assert!(timeout(DEADLINE, hanging).await.unwrap().is_err());
}
