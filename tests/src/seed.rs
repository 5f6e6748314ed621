//! Chance that can be had again.

use std::fmt;

use rand::{Rng, SeedableRng, rngs::StdRng};

/// The environment variable that gives the seed of a run again.
pub const VARIABLE: &str = "ANABRANCH_SEED";

/// What all chance in a test comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub u64);

impl Seed {
    /// From [`VARIABLE`], or else a new one. Printed first, so that a test that fails says how to fail again.
    pub fn new() -> Self {
        let seed = match std::env::var(VARIABLE) {
            Ok(text) => Self(
                text.trim()
                    .parse()
                    .unwrap_or_else(|_| panic!("{VARIABLE}={text} is not a number")),
            ),
            Err(_) => Self(rand::rng().random()),
        };
        println!("{seed}");
        seed
    }

    /// A generator. Parts of a test that run at the same time take one each, by `name`: a shared one would give
    /// other numbers whenever they run in another order.
    pub fn rng(self, name: &str) -> StdRng {
        // FNV-1a: the standard hasher does not promise to stay as it is.
        let name = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        StdRng::seed_from_u64(self.0 ^ name)
    }
}

impl Default for Seed {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{VARIABLE}={}", self.0)
    }
}
