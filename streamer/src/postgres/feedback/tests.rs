use tokio::io::{AsyncReadExt, DuplexStream, duplex};

use super::*;

/// Fast, and lenient about a machine that is busy with something else.
const QUICK: Pace = Pace {
    status_every_min: Duration::from_millis(20),
    status_every_max: Duration::from_millis(300),
    answer_within: Duration::from_secs(1),
    write_within: Duration::from_millis(200),
};

/// A pace at which only questions are answered before a test is over.
const SILENT: Pace = Pace {
    status_every_min: Duration::from_secs(3600),
    status_every_max: Duration::from_secs(3600),
    ..QUICK
};

struct Server {
    confirmed: watch::Sender<Lsn>,
    asked: watch::Sender<Asked>,
    shutdown: CancellationToken,
    observed: Arc<Observed>,
    socket: DuplexStream,
    task: tokio::task::JoinHandle<Result<(), Error>>,
}

/// Has confirmed 5, and has told that.
async fn server(pace: Pace) -> Server {
    let (confirmed, confirmed_seen) = watch::channel(Lsn(5));
    let (asked, asked_seen) = watch::channel(Asked::default());
    let shutdown = CancellationToken::new();
    let observed = Arc::new(Observed::default());
    let (socket, ours) = duplex(100);
    let token = shutdown.clone();
    let task = run(
        pace,
        ours,
        confirmed_seen,
        asked_seen,
        token,
        observed.clone(),
    );
    let mut server = Server {
        confirmed,
        asked,
        shutdown,
        observed,
        socket,
        task: tokio::spawn(task),
    };
    assert_eq!(server.status().await, (5, 5, 5, false));
    server
}

impl Server {
    /// Written, flushed and applied LSN, and whether a reply is wanted, of the next status.
    async fn status(&mut self) -> (u64, u64, u64, bool) {
        let mut bytes = [0; 39];
        self.socket.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes[..6], *b"d\0\0\0\x26r");
        let lsn = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        (lsn(6), lsn(14), lsn(22), bytes[38] != 0)
    }

    fn ask(&self, after: u64) {
        self.asked.send_modify(|asked| {
            asked.answers += 1;
            asked.after = Lsn(after);
        });
    }
}

#[tokio::test]
async fn only_what_is_durable_is_confirmed_whatever_was_received() {
    let mut server = server(QUICK).await;
    server.observed.has_received(Lsn(900));
    let start = Instant::now();
    assert_eq!(server.status().await, (900, 5, 5, false));
    assert_eq!(server.status().await, (900, 5, 5, false));
    assert!(start.elapsed() >= QUICK.status_every_max);
    server.confirmed.send_replace(Lsn(7));
    assert_eq!(server.status().await, (900, 7, 7, false));
    assert_eq!(server.observed.confirmed(), Lsn(7));
}

#[tokio::test]
async fn many_confirmations_make_few_messages() {
    let mut server = server(QUICK).await;
    let start = Instant::now();
    let (mut statuses, mut lsn) = (0, 5);
    while start.elapsed() < QUICK.status_every_min * 15 {
        tokio::select! {
            status = server.status() => {
                statuses += 1;
                assert!(status.1 <= lsn);
            }
            () = tokio::task::yield_now() => {
                lsn += 1;
                server.confirmed.send_replace(Lsn(lsn));
            }
        }
    }
    assert!((1..=16).contains(&statuses), "{statuses}");
}

#[tokio::test]
async fn a_question_is_answered_at_once_when_all_is_confirmed() {
    let mut server = server(SILENT).await;
    server.ask(5);
    assert_eq!(server.status().await, (5, 5, 5, false));
    // Within a transaction there is nothing to wait for.
    server.ask(0);
    assert_eq!(server.status().await, (5, 5, 5, false));
    server.ask(8);
    server.confirmed.send_replace(Lsn(7));
    server.confirmed.send_replace(Lsn(8));
    assert_eq!(server.status().await, (8, 8, 8, false));
}

#[tokio::test]
async fn a_question_that_cannot_be_answered_ends_the_connection() {
    let mut server = server(SILENT).await;
    let start = Instant::now();
    server.ask(8);
    server.confirmed.send_replace(Lsn(7));
    // Asking again does not begin the wait anew: it ends although there is always a new question.
    let mut lsn = 9;
    let ended = loop {
        tokio::select! {
            ended = &mut server.task => break ended,
            () = tokio::task::yield_now() => {
                server.asked.send_modify(|asked| {
                    asked.answers += 1;
                    asked.after = Lsn(lsn);
                });
                lsn += 1;
            }
        }
    };
    assert!(matches!(ended.unwrap(), Err(Error::Transient(_))));
    assert!(start.elapsed() >= SILENT.answer_within);
}

#[tokio::test]
async fn questions_that_are_answered_in_time_are_not_added_up() {
    let mut server = server(QUICK).await;
    let start = Instant::now();
    let mut lsn = 10;
    // There is always one that is open.
    server.ask(lsn);
    while start.elapsed() < QUICK.answer_within * 2 {
        server.ask(lsn + 1);
        server.confirmed.send_replace(Lsn(lsn));
        while server.status().await.1 < lsn {}
        lsn += 1;
    }
    assert!(!server.task.is_finished());
}

#[tokio::test]
async fn a_sign_of_life_is_asked_for_when_wanted() {
    let mut server = server(QUICK).await;
    assert!(!server.status().await.3);
    server.asked.send_modify(|asked| asked.probes += 1);
    while !server.status().await.3 {}
    assert!(!server.status().await.3);
}

#[tokio::test]
async fn a_stop_says_the_last_position_and_goodbye() {
    let mut server = server(SILENT).await;
    server.confirmed.send_replace(Lsn(77));
    server.shutdown.cancel();
    assert_eq!(server.status().await, (77, 77, 77, false));
    server.task.await.unwrap().unwrap();
    let mut rest = Vec::new();
    server.socket.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"c\0\0\0\x04X\0\0\0\x04");
}

#[tokio::test]
async fn a_server_that_does_not_read_is_given_up() {
    let server = server(QUICK).await;
    let ended = server.task.await.unwrap();
    assert!(matches!(ended, Err(Error::Transient(_))));
}

#[tokio::test]
async fn it_ends_when_the_engine_is_gone() {
    let server = server(SILENT).await;
    drop(server.confirmed);
    server.task.await.unwrap().unwrap();
}
