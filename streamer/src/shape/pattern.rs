//! Patterns of LIKE, compiled once.
//!
//! Source: <https://www.postgresql.org/docs/15/functions-matching.html#FUNCTIONS-LIKE>. Characters, not bytes; `%`
//! spans line ends, too. A pattern is cut at its `%`; what is between them is found from left to right, the first
//! place always being right, so that no pattern takes exponential time.

/// A compiled pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// What must be there between the `%`, in order. One segment: there is no `%`, it must be all of the text.
    segments: Vec<Segment>,
}

/// What is between two `%`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Segment {
    pieces: Vec<Piece>,
    /// Characters that it takes.
    chars: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    /// This text.
    Text(String),
    /// So many characters, whichever.
    Any(usize),
}

impl Pattern {
    /// Compiles `pattern`. To Postgres one that ends in the escape character is an error of the rows that it gets
    /// to the end with; here it is none at all.
    pub fn new(pattern: &str, escape: Option<char>) -> Result<Pattern, &'static str> {
        let mut segments = vec![Segment::default()];
        let mut chars = pattern.chars();
        while let Some(char) = chars.next() {
            let last = segments.last_mut().expect("it starts with one segment");
            if Some(char) == escape {
                last.push(
                    chars
                        .next()
                        .ok_or("the pattern of LIKE must not end with the escape character")?,
                );
            } else if char == '%' {
                segments.push(Segment::default());
            } else if char == '_' {
                last.push_any();
            } else {
                last.push(char);
            }
        }
        Ok(Pattern { segments })
    }

    /// Whether all of `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        let (first, rest) = self
            .segments
            .split_first()
            .expect("a pattern has a segment");
        let Some(mut at) = first.matches_at(text, 0) else {
            return false;
        };
        let Some((last, middle)) = rest.split_last() else {
            return at == text.len();
        };
        for segment in middle {
            match segment.find(text, at) {
                Some(end) => at = end,
                None => return false,
            }
        }
        match last.start_at_end(text) {
            Some(start) => start >= at && last.matches_at(text, start).is_some(),
            None => false,
        }
    }
}

impl Segment {
    fn push(&mut self, char: char) {
        self.chars += 1;
        match self.pieces.last_mut() {
            Some(Piece::Text(text)) => text.push(char),
            _ => self.pieces.push(Piece::Text(char.to_string())),
        }
    }

    fn push_any(&mut self) {
        self.chars += 1;
        match self.pieces.last_mut() {
            Some(Piece::Any(count)) => *count += 1,
            _ => self.pieces.push(Piece::Any(1)),
        }
    }

    /// Where it ends if it begins at `at`.
    fn matches_at(&self, text: &str, mut at: usize) -> Option<usize> {
        for piece in &self.pieces {
            match piece {
                Piece::Text(piece) => {
                    if !text.as_bytes()[at..].starts_with(piece.as_bytes()) {
                        return None;
                    }
                    at += piece.len();
                }
                Piece::Any(count) => at = skip(text, at, *count)?,
            }
        }
        Some(at)
    }

    /// Where its first occurrence from `at` on ends.
    fn find(&self, text: &str, mut at: usize) -> Option<usize> {
        match self.pieces.first() {
            None => Some(at),
            Some(Piece::Text(start)) => loop {
                let found = at + text[at..].find(start.as_str())?;
                if let Some(end) = self.matches_at(text, found) {
                    return Some(end);
                }
                at = skip(text, found, 1)?;
            },
            Some(Piece::Any(_)) => loop {
                if let Some(end) = self.matches_at(text, at) {
                    return Some(end);
                }
                at = skip(text, at, 1)?;
            },
        }
    }

    /// Where it begins if it ends with the text.
    fn start_at_end(&self, text: &str) -> Option<usize> {
        match self.chars {
            0 => Some(text.len()),
            chars => text.char_indices().rev().nth(chars - 1).map(|(at, _)| at),
        }
    }
}

/// The place `count` characters after `at`.
fn skip(text: &str, at: usize, count: usize) -> Option<usize> {
    let mut chars = text[at..].chars();
    for _ in 0..count {
        chars.next()?;
    }
    Some(text.len() - chars.as_str().len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, word by word, in exponential time.
    fn naive(pattern: &[char], text: &[char]) -> bool {
        match pattern {
            [] => text.is_empty(),
            ['%', rest @ ..] => (0..=text.len()).any(|skipped| naive(rest, &text[skipped..])),
            ['_', rest @ ..] => !text.is_empty() && naive(rest, &text[1..]),
            ['\\', char, rest @ ..] | [char, rest @ ..] => {
                text.first() == Some(char) && naive(rest, &text[1..])
            }
        }
    }

    proptest! {
        #[test]
        fn matching_equals_the_definition(pattern in r"([a-bä%_]|\\[a%_\\]){0,9}", text in r"[a-bä%_\\]{0,9}") {
            let expected = naive(&pattern.chars().collect::<Vec<_>>(), &text.chars().collect::<Vec<_>>());
            prop_assert_eq!(Pattern::new(&pattern, Some('\\')).unwrap().matches(&text), expected);
        }
    }

    #[test]
    fn a_pattern_that_ends_in_its_escape_is_refused() {
        assert!(Pattern::new("a\\", Some('\\')).is_err());
        assert!(Pattern::new("a\\", None).unwrap().matches("a\\"));
        assert!(Pattern::new("a!", Some('!')).is_err());
        assert!(Pattern::new("a!%", Some('!')).unwrap().matches("a%"));
    }

    #[test]
    fn many_wildcards_do_not_take_exponential_time() {
        let pattern = Pattern::new(&"%a_".repeat(200), Some('\\')).unwrap();
        assert!(!pattern.matches(&"a".repeat(300)));
        assert!(pattern.matches(&"a".repeat(400)));
    }
}
