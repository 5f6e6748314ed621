//! A ledger over copies: replicas are killed, put back to an earlier backup, or cloned to another node, at random, and several at
//! once. Each token is in Postgres once, or was lost with a file that was thrown away before it was answered.
//!
//! `ANABRANCH_COPIES=400` makes it long: that many steps.

use std::collections::BTreeSet;

use anabranch_tests::seed::Seed;
use rand::Rng;

use super::*;

/// Steps, where nobody says how many.
const STEPS: usize = 60;

/// Nodes at once.
const NODES_MAX: usize = 4;

/// A file that may be put back, with what was written to it by then.
struct Backup {
    file: PathBuf,
    tokens: BTreeSet<String>,
}

struct Node {
    replica: Replica,
    /// What was written to the file that it has now, and to those that this is a copy of.
    tokens: BTreeSet<String>,
}

async fn in_postgres(database: &Database) -> BTreeSet<String> {
    let rows = database.query("SELECT token FROM arrived", &[]).await;
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_lost_or_doubled_by_backups_and_copies() {
    let steps = std::env::var("ANABRANCH_COPIES").ok();
    let steps = steps.map_or(STEPS, |text| text.parse().expect("a number"));
    let mut rng = Seed::new().rng("copies");
    let (database, streamer, replica) = begin().await;
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = vec![Node {
        replica,
        tokens: BTreeSet::new(),
    }];
    let mut backups: Vec<Backup> = Vec::new();
    let mut made = BTreeSet::new();
    // Written to a file that was then thrown away: it is in Postgres, or it is not.
    let mut at_stake = BTreeSet::new();
    let mut kinds = [0; 6];
    for step in 0..steps {
        let place = rng.random_range(0..nodes.len());
        let many = nodes.len();
        let node = &mut nodes[place];
        let file = node.replica.file();
        for n in 0..rng.random_range(0..4) {
            let token = format!("{step:04}-{n}");
            write(&file, &token);
            made.insert(token.clone());
            node.tokens.insert(token);
        }
        let kind = rng.random_range(0..kinds.len());
        kinds[kind] += 1;
        match kind {
            // Offline, and back.
            0 => {
                node.replica.kill();
                let token = format!("{step:04}-offline");
                write(&file, &token);
                made.insert(token.clone());
                node.tokens.insert(token);
                node.replica.spawn();
            }
            1 => {
                node.replica.kill();
                let to = folder.path().join(step.to_string());
                copy(&file, &to);
                backups.push(Backup {
                    file: to,
                    tokens: node.tokens.clone(),
                });
                node.replica.spawn();
            }
            2 | 3 if !backups.is_empty() => {
                let backup = &backups[rng.random_range(0..backups.len())];
                node.replica.kill();
                at_stake.extend(node.tokens.difference(&backup.tokens).cloned());
                copy(&backup.file, &file);
                node.tokens.clone_from(&backup.tokens);
                node.replica.spawn();
            }
            4 if many < NODES_MAX => {
                node.replica.kill();
                let other = super::node(&streamer);
                copy(&file, &other.file());
                node.replica.spawn();
                other.spawn();
                let tokens = node.tokens.clone();
                nodes.push(Node {
                    replica: other,
                    tokens,
                });
            }
            5 => node.replica.until_answered().await,
            _ => {}
        }
    }
    let replicas: Vec<_> = nodes.iter().map(|node| &node.replica).collect();
    for replica in &replicas {
        replica.until_answered().await;
    }
    for replica in &replicas {
        replica.until_equal(&database, &SELECTS).await;
        assert_eq!(rejected(replica), "");
    }
    let there = in_postgres(&database).await;
    let kept: BTreeSet<_> = nodes.iter().flat_map(|node| &node.tokens).collect();
    let lost: Vec<_> = made.difference(&there).collect();
    println!(
        "{} tokens, {} nodes, {} backups, steps by kind {kinds:?}; {} are gone with a file that was thrown away",
        made.len(),
        nodes.len(),
        backups.len(),
        lost.len()
    );
    for token in &lost {
        assert!(
            at_stake.contains(*token) && !kept.contains(token),
            "{token} is lost"
        );
    }
    let counted = "SELECT (SELECT count(*) FROM arrived), (SELECT n FROM counter)";
    let row = &database.query(counted, &[]).await[0];
    let counted: [i64; 2] = [row.get(0), row.get(1)];
    assert_eq!(counted, [there.len() as i64; 2], "tokens, and the counter");
}
