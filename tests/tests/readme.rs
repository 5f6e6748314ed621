//! What the README lists is what there is.

use std::collections::BTreeSet;

const README: &str = include_str!("../../README.md");

/// Name and kind of each metric in what `/metrics` says, with the names that its samples have.
fn exposed(text: &str) -> BTreeSet<(String, String)> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|line| {
            let (name, kind) = line.split_once(' ').unwrap();
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            (format!("{name}{suffix}"), kind.to_owned())
        })
        .collect()
}

/// The same of the tables in the README.
fn listed(prefix: &str) -> BTreeSet<(String, String)> {
    let rows = README.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter(|row| row.starts_with(prefix))
        .map(|row| {
            let mut cells = row.split('|').map(|cell| cell.trim().trim_end_matches('`'));
            let name = cells.next().unwrap();
            (name.to_owned(), cells.next().unwrap().to_owned())
        })
        .collect()
}

#[test]
fn the_metrics_of_the_readme_are_those_of_the_programs() {
    let streamer = anabranch_streamer::metrics::Metrics::new().render();
    assert_eq!(listed("anabranch_streamer_"), exposed(&streamer));

    let metrics = anabranch_replica::metrics::Metrics::new();
    metrics.failed("connect");
    let replica = metrics.render(&Default::default(), 0, Default::default());
    assert_eq!(listed("anabranch_replica_"), exposed(&replica));
}

/// The columns of the views and tables that programs may read, which are listed in the order that they have.
#[test]
fn the_columns_of_the_readme_are_those_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.db");
    let settings = anabranch_replica::file::Settings {
        path: path.clone(),
        mode: 0o600,
        cache_bytes: 1 << 20,
        hold_bytes_max: 1 << 20,
    };
    drop(anabranch_replica::file::File::open(&settings).unwrap());
    let sqlite = rusqlite::Connection::open(&path).unwrap();
    for name in [
        "status", "tables", "columns", "dropped", "outbox", "rejected", "ids",
    ] {
        let name = format!("_anabranch_{name}");
        let sql = format!("SELECT name FROM pragma_table_info('{name}') ORDER BY cid");
        let mut statement = sqlite.prepare(&sql).unwrap();
        let columns = statement
            .query_map([], |row| row.get::<_, String>(0))
            .unwrap();
        let columns: Vec<String> = columns.map(Result::unwrap).collect();
        assert!(!columns.is_empty(), "{name}");
        let row = README
            .lines()
            .find(|line| line.starts_with(&format!("| `{name}` |")));
        let mut rest = row.unwrap_or_else(|| panic!("no {name}"));
        for column in columns {
            let quoted = format!("`{column}`");
            let at = rest
                .find(&quoted)
                .unwrap_or_else(|| panic!("{name}.{column} is not listed, or not in its place"));
            rest = &rest[at + quoted.len()..];
        }
    }
}
