//! Memory: what a large transaction takes of small caps, and what a replica that hardly reads costs the others.

use std::time::Duration;

use anabranch_tests::{
    peers::{Replica, Streamer},
    proxy::{Proxy, Way},
};

use crate::{lab::Lab, latency, report::Report};

/// The caps of the streamer and the replica, and what they are called.
const CAPS: [(&str, u64); 2] = [("256MiB", 256 << 20), ("128MiB", 128 << 20)];

/// What a replica on a line that is hardly one gets.
const THIN_BYTES_PER_SECOND: u64 = 2_000;

/// M1: initial copy, then one transaction that updates every row, with small caps.
pub async fn large_transaction(lab: &Lab, report: &mut Report) {
    let streamer = Streamer::config(&lab.database)
        .set("memory_max", CAPS[0].0)
        .shape("all", &["SELECT * FROM events"])
        .start()
        .await;
    let replica = Replica::config(&streamer)
        .set("memory_max", CAPS[1].0)
        .subscribe("all")
        .start()
        .await;
    replica.until_caught_up(&lab.database).await;
    let peaks = |what: &str, report: &mut Report| {
        let peaks = [streamer.memory_peak_bytes(), replica.memory_peak_bytes()];
        for ((who, peak), (cap, bytes)) in ["streamer", "replica"].iter().zip(peaks).zip(CAPS) {
            let verdict = if peak <= bytes { "holds" } else { "TOO MUCH" };
            report.note(format!(
                "M1   {who} after {what}: peak {} MiB of {cap}: {verdict}",
                peak >> 20
            ));
        }
    };
    peaks("the initial copy", report);
    lab.database
        .execute("UPDATE events SET amount = amount + 1, ok = NOT ok")
        .await;
    replica.until_caught_up(&lab.database).await;
    peaks("a transaction that updates all rows", report);
    replica.terminate().await;
    streamer.terminate().await;
    lab.drop_slots().await;
}

/// M2: latency of a live replica and memory of the streamer, alone and beside a replica that hardly reads.
pub async fn stalled_beside_live(lab: &Lab, seconds: Duration, report: &mut Report) {
    let streamer = Streamer::config(&lab.database)
        .shape("all", &["SELECT * FROM events"])
        .start()
        .await;
    let live = Replica::config(&streamer).subscribe("all").start().await;
    live.until_caught_up(&lab.database).await;
    let measure = async |name, report: &mut Report| {
        let eye = latency::Eye::Sqlite(live.file());
        latency::measure(lab, eye, ("M2", name), seconds, report).await;
        let peak = streamer.memory_peak_bytes() >> 20;
        report.note(format!("M2   {name}: peak of the streamer {peak} MiB"));
    };
    measure("a live replica alone", report).await;
    let proxy = Proxy::to(streamer.address()).await;
    let thin = Replica::config(&streamer)
        .through(&proxy)
        .subscribe("all")
        .start()
        .await;
    thin.until_caught_up(&lab.database).await;
    proxy.set(|faults| faults.throttle(Way::Down, THIN_BYTES_PER_SECOND));
    measure("beside a stalled one", report).await;
    proxy.set(|faults| faults.heal());
    thin.until_caught_up(&lab.database).await;
    for replica in [&live, &thin] {
        replica.terminate().await;
    }
    streamer.terminate().await;
    lab.drop_slots().await;
}
