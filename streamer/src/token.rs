//! Resume tokens: what a replica gives back to prove what it holds.
//!
//! A token says "this replica holds these subscriptions as of this position", under a MAC whose key lies in
//! `anabranch.source`, so every streamer of the source can issue and verify it. It is bound to the replica's id and
//! to the subject of its access token, which are not in it but under the MAC: another replica's token proves nothing.
//!
//! It is not secret and grants nothing: access is decided by the access token alone. What it guards is belief: a streamer
//! sends deletes only to a replica that provably had the rows. A token that can't be verified is the same as none.
//!
//! Layout, big-endian: version `1` (1 byte), epoch (8), LSN (8), count of fingerprints (2), the fingerprints (16 each),
//! HMAC-SHA256 over the binding and all that precedes (32).

use std::sync::Arc;

use anabranch_proto::{Epoch, Lsn, Position};
use aws_lc_rs::{constant_time::verify_slices_are_equal, hmac};
use bytes::Bytes;

/// Version of the layout, and the first byte.
const VERSION: u8 = 1;

/// What is in front of the MAC's text, so that the key can serve other purposes too.
const PURPOSE: &[u8] = b"anabranch resume token\0";

const HEAD_BYTES: usize = 1 + 8 + 8 + 2;
const MAC_BYTES: usize = 32;

/// A definition with its parameters bound, as `shape::Bound::fingerprint` tells them apart.
pub type Fingerprint = [u8; 16];

/// Most subscriptions that a token can prove. It travels in every message, so it must stay small.
pub const FINGERPRINTS_MAX: usize = 1024;

/// The key of a source.
#[derive(Clone)]
pub struct Key(Arc<hmac::Key>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(***)")
    }
}

/// What a token proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The replica's content is as of this.
    pub position: Position,
    /// And holds these subscriptions.
    pub fingerprints: Vec<Fingerprint>,
}

/// Issues and verifies the tokens of one replica. A session keeps one, and there are thousands: so it has the text that is
/// hashed first, and not the state that this leads to, which is of 1.2 KiB and takes as long to copy as the text to hash.
pub struct Holder {
    key: Key,
    binding: Box<[u8]>,
}

impl Key {
    /// A key of at least 32 bytes, as `anabranch.source` has it.
    pub fn new(bytes: &[u8]) -> Key {
        Key(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, bytes)))
    }

    /// Binds to a replica and the subject of its access token.
    pub fn bind(&self, replica_id: &str, subject: Option<&str>) -> Holder {
        let mut binding = PURPOSE.to_vec();
        // With its length in front, no id can run into the subject; without a subject is not an empty one.
        binding.extend((replica_id.len() as u64).to_be_bytes());
        binding.extend(replica_id.as_bytes());
        match subject {
            None => binding.push(0),
            Some(subject) => {
                binding.push(1);
                binding.extend((subject.len() as u64).to_be_bytes());
                binding.extend(subject.as_bytes());
            }
        }
        Holder {
            key: self.clone(),
            binding: binding.into(),
        }
    }
}

impl Holder {
    /// The token for a position. Fingerprints above [`FINGERPRINTS_MAX`] are left out: those tables will be sent anew.
    pub fn issue(&self, position: Position, fingerprints: &[Fingerprint]) -> Bytes {
        let fingerprints = &fingerprints[..fingerprints.len().min(FINGERPRINTS_MAX)];
        let count = fingerprints.len() as u16;
        let mut token = Vec::with_capacity(HEAD_BYTES + fingerprints.len() * 16 + MAC_BYTES);
        token.push(VERSION);
        token.extend_from_slice(&position.epoch.0.to_be_bytes());
        token.extend_from_slice(&position.lsn.0.to_be_bytes());
        token.extend_from_slice(&count.to_be_bytes());
        token.extend_from_slice(fingerprints.as_flattened());
        let mac = self.mac(&token);
        token.extend_from_slice(mac.as_ref());
        token.into()
    }

    /// What a token proves; `None` if it proves nothing. Takes any bytes.
    pub fn verify(&self, token: &[u8]) -> Option<Proof> {
        let (said, mac) = token.split_last_chunk::<MAC_BYTES>()?;
        let (head, fingerprints) = said.split_first_chunk::<HEAD_BYTES>()?;
        let expected = self.mac(said);
        verify_slices_are_equal(mac, expected.as_ref()).ok()?;
        // From here on it is our own word, but perhaps that of a newer version.
        let (&[version], numbers) = head.split_first_chunk::<1>()?;
        let (epoch, numbers) = numbers.split_first_chunk::<8>()?;
        let (lsn, count) = numbers.split_first_chunk::<8>()?;
        let count = u16::from_be_bytes(count.try_into().ok()?);
        let (fingerprints, rest) = fingerprints.as_chunks::<16>();
        if version != VERSION || usize::from(count) != fingerprints.len() || !rest.is_empty() {
            return None;
        }
        Some(Proof {
            position: Position {
                epoch: Epoch(u64::from_be_bytes(*epoch)),
                lsn: Lsn(u64::from_be_bytes(*lsn)),
            },
            fingerprints: fingerprints.to_vec(),
        })
    }

    fn mac(&self, said: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key.0);
        context.update(&self.binding);
        context.update(said);
        context.sign()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> Key {
        Key::new(&[7; 32])
    }

    fn position() -> Position {
        Position {
            epoch: Epoch(0xC0FFEE),
            lsn: Lsn(0xFFFF_FFFF_0000_0001),
        }
    }

    #[test]
    fn the_layout_and_its_mac_are_as_documented() {
        // Computed the long way round, with the one-shot function over the concatenation.
        let mut said = b"anabranch resume token\0".to_vec();
        said.extend([0, 0, 0, 0, 0, 0, 0, 2]);
        said.extend(b"r1");
        said.push(1);
        said.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        said.extend(b"s");
        let bound = said.len();
        said.push(1);
        said.extend(0xC0FFEEu64.to_be_bytes());
        said.extend(0xFFFF_FFFF_0000_0001u64.to_be_bytes());
        said.extend([0, 1]);
        said.extend([9; 16]);
        let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]), &said);
        let mut expected = said[bound..].to_vec();
        expected.extend(mac.as_ref());
        let token = key().bind("r1", Some("s")).issue(position(), &[[9; 16]]);
        assert_eq!(token[..], expected[..]);
    }

    #[test]
    fn a_token_proves_nothing_for_another_replica_subject_or_source() {
        let token = key().bind("ab", Some("c")).issue(position(), &[]);
        assert!(key().bind("ab", Some("c")).verify(&token).is_some());
        for other in [
            key().bind("a", Some("bc")),
            key().bind("ab", None),
            key().bind("ab", Some("")),
            key().bind("abc", Some("")),
            key().bind("AB", Some("c")),
            Key::new(&[8; 32]).bind("ab", Some("c")),
        ] {
            assert_eq!(other.verify(&token), None);
        }
    }

    #[test]
    fn more_subscriptions_than_fit_are_not_proved() {
        let holder = key().bind("r", None);
        let many = vec![[1; 16]; FINGERPRINTS_MAX + 1];
        let proof = holder.verify(&holder.issue(position(), &many));
        let proof = proof.map(|proof| proof.fingerprints.len());
        assert_eq!(proof, Some(FINGERPRINTS_MAX));
    }

    proptest! {
        #[test]
        fn what_is_issued_is_proved_and_any_changed_byte_is_not(
            epoch: u64, lsn: u64, fingerprints: Vec<Fingerprint>, at: prop::sample::Index, flip in 1u8..,
        ) {
            let position = Position { epoch: Epoch(epoch), lsn: Lsn(lsn) };
            let holder = key().bind("replica", Some("subject"));
            let token = holder.issue(position, &fingerprints);
            let proof = Some(Proof { position, fingerprints });
            prop_assert_eq!(holder.verify(&token), proof);
            let mut changed = token.to_vec();
            changed[at.index(token.len())] ^= flip;
            prop_assert_eq!(holder.verify(&changed), None);
            prop_assert_eq!(holder.verify(&token[..at.index(token.len())]), None);
        }

        #[test]
        fn any_bytes_are_no_proof_and_no_panic(bytes: Vec<u8>) {
            prop_assert_eq!(key().bind("replica", None).verify(&bytes), None);
        }
    }
}
