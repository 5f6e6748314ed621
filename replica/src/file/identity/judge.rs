//! What a copy has to send, and what another one has sent already. Pure.

use std::collections::HashMap;

use anabranch_proto::{Lsn, Nonce};

/// What Postgres remembers of some entries.
#[derive(Clone, Debug, Default)]
pub struct Judged {
    /// Those that were answered.
    pub claimed: HashMap<Nonce, Claim>,
    /// Of entries that were captured at or after this it is known for sure; in seconds since 1970.
    pub kept_since: u64,
    /// Their effects are in the content from this on.
    pub lsn: Lsn,
}

/// An answered entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// As what it was rejected; `None`: it took effect.
    pub outcome: Option<String>,
    /// Why.
    pub sqlstate: Option<String>,
}

/// Entries that were rejected elsewhere as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Elsewhere {
    /// They begin behind this entry.
    pub after: i64,
    pub last: i64,
    pub outcome: String,
    pub sqlstate: Option<String>,
}

/// What became of the pending entries of a file.
///
/// All copies send in the order of the file, and entries have their place before a file is copied. So of those that two
/// copies share one of them sends a first part, and all up to the last that is claimed were answered. A claim is of the
/// last entry of a transaction, or of each where it may be several.
#[derive(Clone, Debug, Default)]
pub struct Judgement {
    /// All up to this one were answered elsewhere.
    pub(super) upto: i64,
    pub(super) rejected: Vec<Elsewhere>,
    /// The last that was captured so long ago that its claim may have been forgotten.
    pub(super) old: i64,
    pub(super) lsn: Lsn,
}

impl Judgement {
    /// Takes what is known of the next pending entries, in their order.
    pub fn add(&mut self, asked: &[(i64, Nonce)], judged: &Judged) {
        for (id, nonce) in asked {
            let Some(claim) = judged.claimed.get(nonce) else {
                if nonce.seconds() < judged.kept_since {
                    self.old = *id;
                }
                continue;
            };
            if let Some(outcome) = &claim.outcome {
                self.rejected.push(Elsewhere {
                    after: self.upto,
                    last: *id,
                    outcome: outcome.clone(),
                    sqlstate: claim.sqlstate.clone(),
                });
            }
            self.upto = *id;
        }
        self.lsn = self.lsn.max(judged.lsn);
    }

    /// Up to which entry nobody can tell, at least `upto`. `ends` are those of local transactions, of which none is cut.
    pub(super) fn unknown_upto(&self, upto: i64, ends: &[(i64, bool)]) -> i64 {
        if self.old <= upto {
            return upto;
        }
        let end = ends.iter().find(|(last, _)| *last >= self.old);
        end.map_or(self.old, |(last, _)| *last)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn entry(id: i64) -> (i64, Nonce) {
        (id, Nonce::new(NOW + id as u64, id as u64))
    }

    fn judged(claimed: &[i64], kept_since: u64) -> Judged {
        let claimed = claimed.iter().map(|id| (entry(*id).1, Claim::default()));
        Judged {
            claimed: claimed.collect(),
            kept_since,
            lsn: Lsn(7),
        }
    }

    fn judge(asked: &[(i64, Nonce)], judged: &Judged) -> Judgement {
        let mut judgement = Judgement::default();
        // Pages mean nothing.
        asked.chunks(2).for_each(|page| judgement.add(page, judged));
        judgement
    }

    #[test]
    fn all_up_to_the_last_that_is_claimed_is_answered() {
        let asked: Vec<_> = (3..=9).map(entry).collect();
        assert_eq!(judge(&asked, &judged(&[], NOW)).upto, 0);
        let judgement = judge(&asked, &judged(&[4, 7], NOW));
        assert_eq!((judgement.upto, judgement.lsn), (7, Lsn(7)));
        assert_eq!(judgement.unknown_upto(7, &[(9, false)]), 7);
    }

    #[test]
    fn what_was_rejected_elsewhere_is_told_with_what_was_one_with_it() {
        let asked: Vec<_> = (3..=9).map(entry).collect();
        let mut judged = judged(&[4, 7], NOW);
        let why = Claim {
            outcome: Some("error".into()),
            sqlstate: Some("23514".into()),
        };
        judged.claimed.insert(entry(7).1, why);
        let rejected = Elsewhere {
            after: 4,
            last: 7,
            outcome: "error".into(),
            sqlstate: Some("23514".into()),
        };
        assert_eq!(judge(&asked, &judged).rejected, [rejected]);
    }

    #[test]
    fn what_may_have_been_forgotten_is_not_sent() {
        let asked: Vec<_> = (3..=9).map(entry).collect();
        let ends = [(4, false), (6, false), (9, false)];
        let kept_since = NOW + 6;
        // Older than that are 3, 4 and 5; the transaction of 5 goes up to 6.
        assert_eq!(
            judge(&asked, &judged(&[], kept_since)).unknown_upto(0, &ends),
            6
        );
        let claimed = judged(&[4], kept_since);
        assert_eq!(judge(&asked, &claimed).unknown_upto(4, &ends), 6);
        // What is claimed tells of all before it.
        let claimed = judged(&[6], kept_since);
        assert_eq!(judge(&asked, &claimed).unknown_upto(6, &ends), 6);
    }

    /// A copy of a file, as far as its writes matter.
    #[derive(Clone, Debug)]
    struct Copy {
        pending: Vec<(i64, Nonce)>,
        last: i64,
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// A program writes.
        Write(usize),
        /// The next some entries are claimed as one: exactly, or merged.
        Send(usize, usize, bool),
        /// It is copied.
        Clone(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0usize..8).prop_map(Step::Write),
            4 => (0usize..8, 1usize..4, any::<bool>()).prop_map(|(c, n, m)| Step::Send(c, n, m)),
            1 => (0usize..8).prop_map(Step::Clone),
        ];
        prop::collection::vec(step, 1..80)
    }

    proptest! {
        /// Whatever copies send when, and wherever transactions were cut: each entry takes effect once.
        #[test]
        fn an_entry_takes_effect_once(steps in steps()) {
            let mut copies = vec![Copy { pending: Vec::new(), last: 0 }];
            let mut made = 0u64;
            // Where transactions of programs end, by nonce; what took effect; what is claimed.
            let mut effects: HashMap<Nonce, u32> = HashMap::new();
            let mut claimed = Judged { kept_since: NOW, ..Judged::default() };
            let mut send = |copy: &mut Copy, count: usize, merged: bool| {
                // One that was claimed meanwhile is in the way, and the copy judges.
                let count = count.min(copy.pending.len());
                let sent = &copy.pending[..count];
                // Exact ones are the same in all copies: here, of one entry each.
                let count = if merged { count } else { count.min(1) };
                let sent = &sent[..count];
                if sent.iter().any(|(_, nonce)| claimed.claimed.contains_key(nonce)) {
                    let judgement = judge(&copy.pending, &claimed);
                    copy.pending.retain(|(id, _)| *id > judgement.upto);
                    return;
                }
                for (_, nonce) in sent {
                    claimed.claimed.insert(*nonce, Claim::default());
                    *effects.entry(*nonce).or_default() += 1;
                }
                copy.pending.drain(..count);
            };
            for step in steps {
                let many = copies.len();
                match step {
                    Step::Write(place) => {
                        made += 1;
                        let copy = &mut copies[place % many];
                        copy.last += 1;
                        copy.pending.push((copy.last, Nonce::new(NOW, made)));
                    }
                    Step::Send(place, count, merged) => send(&mut copies[place % many], count, merged),
                    Step::Clone(place) if many < 8 => copies.push(copies[place % many].clone()),
                    Step::Clone(_) => {}
                }
            }
            for copy in &mut copies {
                while !copy.pending.is_empty() {
                    send(copy, 1, false);
                }
            }
            prop_assert_eq!(effects.len() as u64, made);
            prop_assert!(effects.values().all(|times| *times == 1));
        }
    }
}
