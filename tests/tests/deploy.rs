//! The reference configs are read by the programs, and what they say of defaults is so.

use std::path::Path;

const STREAMER: &str = include_str!("../../deploy/streamer.toml");
const REPLICA: &str = include_str!("../../deploy/replica.toml");

#[test]
fn the_streamers_reference_is_read_and_equals_the_defaults() {
    let read = |text: &str| {
        anabranch_streamer::config::Config::read(Path::new("streamer.toml"), text, [])
            .unwrap_or_else(|error| panic!("{error}"))
    };
    let reference = read(STREAMER);
    let least = read(
        "[postgres]\nurl = \"postgres://u@h/d\"\n[auth]\ntokens = [ { token = \"dev-1\", claims = {} } ]\n\
         [shape.s]\ntables = [ \"SELECT * FROM t\" ]",
    );
    assert_eq!(reference.defaulted(), least.defaulted());
    // What has a default is in the reference, and not as a comment.
    for (key, value) in least.defaulted() {
        let name = key.rsplit('.').next().unwrap();
        let said = STREAMER.lines().any(|line| {
            let mut parts = line.splitn(2, '=').map(str::trim);
            parts.next() == Some(name) && parts.next() == Some(&value)
        });
        assert!(said, "{key} = {value} is not in deploy/streamer.toml");
    }
}

#[test]
fn the_replicas_reference_is_read_and_equals_the_defaults() {
    let read = |text: &str| {
        anabranch_replica::Config::parse(text, "replica.toml", [])
            .unwrap_or_else(|error| panic!("{error:?}"))
    };
    let reference = read(REPLICA);
    let least = read(
        "streamer = \"http://127.0.0.1:7420\"\ntoken = \"dev-1\"\ndatabase = \"app.db\"\n[[subscribe]]\nshape = \"team\"",
    );
    assert_eq!(format!("{reference:?}"), format!("{least:?}"));
    for key in ["file_mode", "http", "memory_max"] {
        assert!(
            REPLICA
                .lines()
                .any(|line| line.starts_with(&format!("{key} = "))),
            "{key}"
        );
    }
}

#[test]
fn the_compositions_configs_are_read() {
    let streamer = include_str!("../../deploy/compose/streamer.toml");
    anabranch_streamer::config::Config::read(Path::new("streamer.toml"), streamer, [])
        .unwrap_or_else(|error| panic!("{error}"));
    let replica = include_str!("../../deploy/compose/replica.toml");
    anabranch_replica::Config::parse(replica, "replica.toml", [])
        .unwrap_or_else(|error| panic!("{error:?}"));
}
