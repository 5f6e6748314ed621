//! The board.

use crate::edge::Edge;

/// Prints the board; over itself, if `again`.
pub fn print(edges: &[Edge], again: bool) {
    if again {
        // Home, and clear to the end.
        print!("\x1b[H\x1b[2J");
    }
    println!(
        "{:<12} {:>8} {:>14} {:>12} {:>12} {:>12} {:>8} {:>9}",
        "replica", "rows", "position", "lag p50", "lag p99", "received", "pending", "rejected"
    );
    for edge in edges {
        let mut seen = edge.seen();
        seen.lags.make_contiguous().sort_by(f64::total_cmp);
        let at = |part: f64| match seen.lags.len() {
            _ if !seen.connected => "offline".to_owned(),
            0 => "–".to_owned(),
            count => format!("{:.1} ms", seen.lags[((count - 1) as f64 * part) as usize]),
        };
        println!(
            "{:<12} {:>8} {:>14} {:>12} {:>12} {:>8.1} MiB {:>8} {:>9}",
            edge.place.name,
            seen.rows,
            seen.position,
            at(0.5),
            at(0.99),
            edge.bytes() as f64 / f64::from(1 << 20),
            seen.pending,
            seen.rejected,
        );
    }
    if again {
        println!("\nThe files are plain SQLite. In another terminal:");
        for edge in edges {
            let (table, _) = &edge.place.tables[0];
            println!(
                "  sqlite3 {} 'SELECT * FROM {table} LIMIT 5'",
                edge.file().display()
            );
        }
        println!(
            "  sqlite3 {} 'SELECT * FROM _anabranch_status'",
            edges[0].file().display()
        );
        println!("\nCtrl-C ends it and cleans up.");
    }
}
