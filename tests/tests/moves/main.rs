//! Rows that move in and out of shapes with subqueries, in one process: mirror, router and catch-ups are driven directly, by
//! random histories, and what replicas are told is compared with what the shapes mean, found out in the most simple way.
//!
//! With real programs, and Postgres itself to say what shapes mean, it is `moves` of the end-to-end tests; but here are
//! thousands of histories in the time of one.

mod cost;
mod driver;
mod scene;
mod source;

use std::time::Instant;

use anabranch_tests::seed::VARIABLE;
use driver::{Counts, Driver};

/// Histories, where `ANABRANCH_HISTORIES` does not say how many.
const HISTORIES: u64 = 40;

/// Steps of each.
const STEPS: usize = 120;

#[test]
fn whoever_is_told_of_moves_has_what_the_shapes_mean() {
    let seeds: Vec<u64> = match std::env::var(VARIABLE) {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => {
            let histories = std::env::var("ANABRANCH_HISTORIES")
                .map_or(HISTORIES, |text| text.parse().expect("a number"));
            let first: u64 = rand::random();
            (0..histories).map(|n| first.wrapping_add(n)).collect()
        }
    };
    let start = Instant::now();
    let mut counts = Counts::default();
    for seed in &seeds {
        println!("{VARIABLE}={seed}");
        let mut driver = Driver::new(*seed);
        for _ in 0..STEPS {
            driver.step();
        }
        driver.end();
        counts.add(&driver.counts);
    }
    println!(
        "{} histories in {:?}: {counts:#?}",
        seeds.len(),
        start.elapsed()
    );
    let all_happened = counts.moved > 0 && counts.caught_up > 0 && counts.reshaped > 0;
    assert!(all_happened || seeds.len() == 1);
    // Else nothing of that was proved.
    let given_up = [
        counts.given_up,
        counts.given_up_reading,
        counts.given_up_asking,
        counts.given_up_telling,
    ];
    assert!(!given_up.contains(&0) || seeds.len() < 20, "{given_up:?}");
}
