//! The reference configs are read by the programs, and what they say of defaults is so.

use std::path::Path;

const STREAMER: &str = include_str!("../../deploy/streamer.toml");
const REPLICA: &str = include_str!("../../deploy/replica.toml");
const STREAMER_UNIT: &str = include_str!("../../deploy/systemd/anabranch-streamer.service");
const REPLICA_UNIT: &str = include_str!("../../deploy/systemd/anabranch-replica.service");

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
    // What has a default is in the reference, and not as a comment; but for what follows from another key: written out,
    // it would be in the way of whoever changes that one.
    for (key, value) in least.defaulted() {
        let name = key.rsplit('.').next().unwrap();
        let mark = if name == "row_bytes_max" { "# " } else { "" };
        let said = STREAMER.lines().any(|line| {
            let mut parts = line
                .strip_prefix(mark)
                .unwrap_or_default()
                .splitn(2, '=')
                .map(str::trim);
            parts.next() == Some(name) && parts.next() == Some(&value)
        });
        assert!(said, "{key} = {value} is not in deploy/streamer.toml");
    }
}

#[test]
fn the_streamers_reference_is_read_with_any_memory_max() {
    for memory_max in ["64MiB", "128MiB", "4GiB"] {
        let text = STREAMER.replace("\"256MiB\"", &format!("\"{memory_max}\""));
        assert_ne!(text, STREAMER);
        let config =
            anabranch_streamer::config::Config::read(Path::new("streamer.toml"), &text, [])
                .unwrap_or_else(|error| panic!("{error}"));
        assert!(
            config.row_bytes_max <= config.memory_max / 3,
            "{memory_max}"
        );
    }
}

/// The same words in both configs, and the same meaning.
#[test]
fn a_size_means_the_same_to_both_programs() {
    let streamer = |size: &str| {
        let text = STREAMER.replace("\"256MiB\"", size);
        anabranch_streamer::config::Config::read(Path::new("streamer.toml"), &text, [])
            .map(|config| config.memory_max)
            .map_err(|error| error.to_string())
    };
    let replica = |size: &str| {
        let text = REPLICA.replace("\"128MiB\"", size);
        anabranch_replica::Config::parse(&text, "replica.toml", [])
            .map(|config| config.memory.max)
            .map_err(|error| error.to_string())
    };
    for (size, bytes) in [
        ("1073741824", 1 << 30),
        ("\"1073741824\"", 1 << 30),
        ("\"1048576KiB\"", 1 << 30),
        ("\"300MiB\"", 300 << 20),
        ("\"2 GiB\"", 2 << 30),
        ("\"1TiB\"", 1 << 40),
    ] {
        assert_eq!(
            (streamer(size), replica(size)),
            (Ok(bytes), Ok(bytes)),
            "{size}"
        );
    }
    for size in [
        "500MB",
        "2GB",
        "1TB",
        "700000kB",
        "700000000B",
        "1gib",
        "1.5GiB",
        "1G",
        "",
    ] {
        let size = format!("\"{size}\"");
        for said in [streamer(&size), replica(&size)] {
            let said = said.expect_err("a size that is not ours");
            assert!(
                said.contains("KiB, MiB, GiB, TiB; not kB, MB, GB"),
                "{said}"
            );
        }
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

/// The words in backquotes or after `known here: ` of a complaint of an unknown key.
fn known(said: &str) -> Vec<String> {
    let list = said
        .split("known here: ")
        .nth(1)
        .or(said.split("expected one of ").nth(1));
    let list = list
        .unwrap_or_else(|| panic!("{said}"))
        .lines()
        .next()
        .unwrap();
    list.split(", ")
        .map(|key| key.trim_matches('`').to_owned())
        .collect()
}

/// The README sends people there for all keys.
#[test]
fn the_references_have_all_keys() {
    let names = |reference: &str, key: &str| {
        reference.lines().any(|line| {
            let line = line.trim_start_matches("# ").trim_start_matches(['[', ' ']);
            let rest = line.strip_prefix(key).unwrap_or("x");
            // Written, or within the braces of what holds it.
            rest.starts_with([' ', '=', ']', '.']) || reference.contains(&format!(" {key} = "))
        })
    };
    let path = Path::new("streamer.toml");
    for section in [
        "",
        "[tls]",
        "[postgres]",
        "[auth]",
        "[auth.jwt]",
        "[auth.limits]",
        "[shape.s]",
    ] {
        let text = format!("{section}\nunknown_key = 1\n");
        let said = anabranch_streamer::config::Config::read(path, &text, [])
            .unwrap_err()
            .to_string();
        let said = said
            .lines()
            .find(|line| line.contains("unknown_key: "))
            .unwrap();
        for key in known(said) {
            // Those of a later version, which are refused by name; and a word that only one kind of key has.
            let later = ["table", "write_url", "role", "writable"];
            let mentioned = STREAMER.contains(&format!("{key} for "))
                || STREAMER.contains(&format!(".{key}]"))
                || names(STREAMER, &key);
            assert!(later.contains(&&*key) || mentioned, "{section} {key}");
        }
    }
    let said = anabranch_replica::Config::parse("unknown_key = 1", "replica.toml", [])
        .unwrap_err()
        .to_string();
    for key in known(&said) {
        assert!(names(REPLICA, &key), "{key}");
    }
}

/// A reference with what it has as comments, but for `instead`: what the comments are in place of.
fn with_comments(reference: &str, instead: &[&str]) -> String {
    let is_key = |text: &str| {
        let name = text.split('=').next().unwrap_or_default().trim();
        text.starts_with('[')
            || (text.contains(" = ") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    };
    let is_replaced = |line: &&str| instead.iter().any(|start| line.starts_with(start));
    let lines = reference.lines().filter(|line| !is_replaced(line));
    lines
        .map(|line| match line.strip_prefix("# ") {
            Some(text) if is_key(text) => format!("{text}\n"),
            _ => format!("{line}\n"),
        })
        .collect()
}

#[test]
fn what_the_streamers_reference_has_as_comments_is_read_too() {
    let text = with_comments(STREAMER, &["tokens = ", "writable = false"]);
    let config = anabranch_streamer::config::Config::read(Path::new("streamer.toml"), &text, [])
        .unwrap_or_else(|error| panic!("{error}"));
    assert!(config.tls.is_some(), "{text}");
    assert!(config.auth.jwt.is_some(), "{text}");
    assert!(config.auth.role.is_some(), "{text}");
    assert!(
        config.takes_writes() && !config.policies.is_empty(),
        "{text}"
    );
}

#[test]
fn what_the_replicas_reference_has_as_comments_is_read_too() {
    let directory = tempfile::tempdir().unwrap();
    for file in ["ca.crt", "replica.crt", "replica.key"] {
        std::fs::write(directory.path().join(file), "-----BEGIN SOMETHING-----\n").unwrap();
    }
    let text = with_comments(REPLICA, &["token = "])
        .replace("http://127.0.0.1:7420", "https://127.0.0.1:7420")
        .replace("/etc/anabranch", directory.path().to_str().unwrap());
    let config = anabranch_replica::Config::parse(&text, "replica.toml", [])
        .unwrap_or_else(|error| panic!("{error:?}"));
    assert!(config.tls.ca.is_some(), "{text}");
    assert!(config.tls.identity.is_some(), "{text}");
    let token = anabranch_replica::config::Token::File(directory.path().join("token"));
    assert_eq!(format!("{:?}", config.token), format!("{token:?}"));
}

/// What a unit sets.
#[track_caller]
fn setting<'a>(unit: &'a str, key: &str) -> &'a str {
    let mut values = unit
        .lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let value = values.next().unwrap_or_else(|| panic!("no {key}"));
    assert_eq!(values.next(), None, "{key} is there twice");
    value
}

#[test]
fn units_leave_the_programs_what_their_defaults_take() {
    let streamer =
        anabranch_streamer::config::Config::read(Path::new("streamer.toml"), STREAMER, [])
            .unwrap_or_else(|error| panic!("{error}"));
    let replica = anabranch_replica::Config::parse(REPLICA, "replica.toml", [])
        .unwrap_or_else(|error| panic!("{error:?}"));
    for (unit, memory_max) in [
        (STREAMER_UNIT, streamer.memory_max),
        (REPLICA_UNIT, replica.memory.max),
    ] {
        let limit = setting(unit, "MemoryMax").strip_suffix('M').unwrap();
        let limit = limit.parse::<u64>().unwrap() << 20;
        assert!(limit > memory_max, "{limit} {memory_max}");
    }
    // The only directories that may be written: those that the configs name are there.
    let state = |unit| Path::new("/var/lib").join(setting(unit, "StateDirectory"));
    assert_eq!(state(STREAMER_UNIT), streamer.data_dir);
    assert!(replica.database.is_relative());
    let within = format!("%S/{}", setting(REPLICA_UNIT, "StateDirectory"));
    assert_eq!(setting(REPLICA_UNIT, "WorkingDirectory"), within);
    let socket = format!("unix:/run/{}/", setting(REPLICA_UNIT, "RuntimeDirectory"));
    assert!(REPLICA.contains(&socket), "{socket}");
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
