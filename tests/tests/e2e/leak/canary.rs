//! Words that are nowhere by chance, and where they are.
//!
//! Each begins with the name of another animal, so that it is found without asking for each; and is of letters that HTTP/2's
//! headers take five bits for, so that it is found there too (see `wire`).

use std::collections::{BTreeMap, BTreeSet};

use memchr::memmem;
use rand::{Rng, rngs::StdRng};

/// What each begins with. No letter of its own comes again behind it but at other places.
const MARKER: &str = "coati";

/// What the rest is of: without `o`, so that the marker is nowhere else.
const LETTERS: &[u8] = b"012aceist";

/// So many of them.
const LETTERS_COUNT: usize = 20;

/// So much of one is that one: a page of SQLite may hold a part.
const SURE_BYTES: usize = MARKER.len() + 12;

/// All that there are.
#[derive(Default)]
pub struct Canaries {
    /// With what they were made for.
    known: BTreeMap<String, String>,
}

impl Canaries {
    /// A new one.
    pub fn make(&mut self, rng: &mut StdRng, of: &str) -> String {
        let letters = (0..LETTERS_COUNT).map(|_| LETTERS[rng.random_range(0..LETTERS.len())]);
        let canary: String = MARKER.chars().chain(letters.map(char::from)).collect();
        self.known.insert(canary.clone(), of.to_owned());
        canary
    }

    pub fn count(&self) -> usize {
        self.known.len()
    }

    /// What one was made for.
    pub fn of(&self, canary: &str) -> &str {
        &self.known[canary]
    }

    /// Which of them are in there, also if only most of one is.
    pub fn found(&self, bytes: &[u8]) -> BTreeSet<String> {
        let places = memmem::find_iter(bytes, MARKER);
        places
            .filter_map(|at| self.like(&bytes[at..]))
            .map(str::to_owned)
            .collect()
    }

    /// The one that this begins with, or with so much of it that it is no other.
    fn like(&self, bytes: &[u8]) -> Option<&str> {
        let letter = |byte: &&u8| byte.is_ascii_alphanumeric();
        let word: Vec<u8> = bytes.iter().take_while(letter).copied().collect();
        let word = String::from_utf8(word).expect("letters");
        let before = self.known.range(..=word.clone()).next_back();
        let after = self.known.range(word.clone()..).next();
        let near = before.into_iter().chain(after);
        let (same, canary) = near
            .map(|(canary, _)| (common(canary, &word), canary))
            .max()?;
        (same >= SURE_BYTES).then_some(canary)
    }

    /// Which are in a log: as they are, or as the numbers that `{:?}` makes of bytes.
    pub fn found_in_log(&self, log: &[u8]) -> BTreeSet<String> {
        let mut found = self.found(log);
        let marker: Vec<_> = MARKER.bytes().map(|byte| byte.to_string()).collect();
        for at in memmem::find_iter(log, &marker.join(", ")) {
            let numbers = log[at..].split(|byte| !byte.is_ascii_digit());
            let numbers = numbers.filter(|number| !number.is_empty());
            let bytes = numbers
                .map_while(|number| std::str::from_utf8(number).ok()?.parse().ok())
                .take(MARKER.len() + LETTERS_COUNT);
            let bytes: Vec<u8> = bytes.collect();
            found.extend(self.like(&bytes).map(str::to_owned));
        }
        found
    }
}

/// Bytes that both begin with.
fn common(one: &str, other: &str) -> usize {
    let both = one.bytes().zip(other.bytes());
    both.take_while(|(one, other)| one == other).count()
}

#[test]
fn a_canary_is_not_found() {
    let mut rng = anabranch_tests::seed::Seed::new().rng("canary");
    let mut canaries = Canaries::default();
    let all: Vec<_> = (0..1000)
        .map(|_| canaries.make(&mut rng, "a test"))
        .collect();
    let (there, other) = (&all[17], &all[18]);
    let only = BTreeSet::from([there.clone()]);
    for text in [
        there.clone(),
        format!("\u{0}xcoati{there}e"),
        format!("{MARKER} {}, and {}", &there[..18], &other[..12]),
    ] {
        assert_eq!(canaries.found(text.as_bytes()), only, "{text}");
    }
    let log = format!("row: {:?}", format!("x{there}").as_bytes());
    assert_eq!(canaries.found_in_log(log.as_bytes()), only);
    for none in [
        String::new(),
        MARKER.into(),
        format!("{}-{other}", &there[..10]),
    ] {
        assert!(!canaries.found(none.as_bytes()).contains(there), "{none}");
    }
    assert_eq!(canaries.found(all.concat().as_bytes()).len(), all.len());
    assert_eq!((canaries.count(), canaries.of(there)), (1000, "a test"));
}
