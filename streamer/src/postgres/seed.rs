//! Chance that can be had again, for tests.

use rand::{SeedableRng, rngs::StdRng};

/// A generator from `ANABRANCH_SEED`, or else from a new seed; which is printed, so that a test that fails says how
/// to fail again.
pub fn seeded() -> StdRng {
    let seed = std::env::var("ANABRANCH_SEED")
        .map(|seed| seed.parse().expect("ANABRANCH_SEED is a number"))
        .unwrap_or_else(|_| rand::random());
    println!("ANABRANCH_SEED={seed}");
    StdRng::seed_from_u64(seed)
}
