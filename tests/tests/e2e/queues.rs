//! A replica that is slower than what is written: its queue overflows, and it comes back by catching up, while a group
//! of the mirror stays open for long. That is where a wrong hand-over would lose or double transactions.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use anabranch_tests::{
    peers::{Replica, Streamer},
    postgres::Server,
    proxy::{Proxy, Way},
    wait::{DEADLINE, until},
};

/// Rows that each transaction changes, and bytes of each.
const ROWS: u64 = 10;
const ROW_BYTES: u64 = 16 * 1024;

/// Transactions that are written while the replica is slow: several times what sockets, HTTP/2 and the queue hold.
const WHILE_SLOW: u64 = 150;

/// How often it is slow, and catches up.
const TIMES: usize = 3;

const T: &str = "SELECT * FROM t WHERE team = 1";

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_overflows_while_a_group_is_stretched_loses_nothing() {
    let database = Server::shared().await.database().await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, team int, v int, body text);
             ALTER TABLE t ALTER body SET STORAGE EXTERNAL;
             INSERT INTO t SELECT g, g % 2, 0, '' FROM generate_series(1, 200) g",
        )
        .await;
    let streamer = Streamer::config(&database)
        // The least that is taken, and with it the smallest queue: half a megabyte.
        .set("memory_max", "64MiB")
        .env("ANABRANCH_FAILPOINT_GROUP_MS", "1500")
        .shape("s", &[T])
        .start()
        .await;
    let proxy = Proxy::to(streamer.address()).await;
    let slow = Replica::config(&streamer)
        .through(&proxy)
        // So that bytes tell what was sent.
        .set("zstd", false)
        .subscribe("s")
        .start()
        .await;
    let live = Replica::config(&streamer).subscribe("s").start().await;

    let catch_ups = async || -> u64 {
        let page = streamer.get("/metrics").await.unwrap().ok().unwrap();
        let mut lines = page.lines();
        let name = "anabranch_streamer_catch_ups_total ";
        let count = lines.find_map(|line| line.strip_prefix(name)).unwrap();
        count.parse().unwrap()
    };
    let (written, over) = (AtomicU64::new(0), AtomicU64::new(0));
    let load = async {
        let mut turn = 0;
        while over.load(SeqCst) == 0 {
            // Of the rows in the shape some go; one comes.
            database
                .execute(&format!(
                    "UPDATE t SET v = {turn}, team = CASE WHEN id % 10 = {turn} % 10 THEN 1 - team ELSE team END,
                                  body = repeat('{}', {ROW_BYTES} / 16)
                     WHERE id % 20 = {turn} % 20",
                    format_args!("{turn:016}")
                ))
                .await;
            turn += 1;
            written.store(turn, SeqCst);
        }
    };
    let slowness = async {
        for time in 0..TIMES {
            let (from, bytes) = (written.load(SeqCst), proxy.bytes(Way::Down));
            let served = catch_ups().await;
            proxy.set(|faults| faults.throttle(Way::Down, 200_000));
            until("much is written", 4 * DEADLINE, || async {
                written.load(SeqCst) >= from + WHILE_SLOW
            })
            .await;
            let lsn = database.lsn().await;
            // Of the transactions so far: those after them are sent too before the file is seen to be there.
            let transactions = written.load(SeqCst) - from;
            proxy.set(|faults| faults.heal());
            slow.until_at(lsn).await;
            let sent = proxy.bytes(Way::Down) - bytes;
            // About half of the rows are in the shape.
            let all = transactions * ROWS * ROW_BYTES / 2;
            println!(
                "{time}: {transactions} transactions, {all} bytes of them concern it, {sent} were sent"
            );
            // From its queue it would have got all of it, and more that was written meanwhile.
            assert!(
                sent < all && catch_ups().await > served,
                "the queue never overflowed: nothing was tried"
            );
        }
        over.store(1, SeqCst);
    };
    tokio::join!(load, slowness);
    for replica in [&slow, &live] {
        replica.until_equal(&database, &[("t", T)]).await;
    }
    // It was never so slow that it was taken for dead.
    let connected = streamer.log().matches("replica connected").count();
    assert_eq!(connected, 2, "{}", streamer.log());
}
