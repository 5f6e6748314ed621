use std::ffi::OsString;

use super::*;

const GOOD: &str = r#"
streamer = "http://127.0.0.1:7420"
token    = "dev-1"
database = "app.db"

[[subscribe]]
shape  = "team"
params = { team = 7, name = "blue", ids = [1, 2] }
"#;

fn parse_with(text: &str, environment: &[(&str, &str)]) -> Result<Config, Error> {
    let environment: Vec<(OsString, OsString)> = environment
        .iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    Config::parse(text, "replica.toml", environment)
}

fn parse(text: &str) -> Result<Config, Error> {
    parse_with(text, &[])
}

#[track_caller]
fn refused(text: &str, expected: &str) {
    let error = parse(text).expect_err("must be refused").to_string();
    assert!(
        error.contains(expected),
        "`{error}` does not say `{expected}`"
    );
}

#[test]
fn defaults_differ_from_what_is_documented() {
    let config = parse(GOOD).unwrap();
    assert_eq!(
        config.http,
        Some(Address::Tcp("127.0.0.1:7430".parse().unwrap()))
    );
    assert_eq!(config.memory, Memory::split(128 << 20));
    assert_eq!(config.file_mode, 0o600);
    assert_eq!(config.database, PathBuf::from("app.db"));
    assert_eq!(config.token.read().unwrap().unwrap().reveal(), "dev-1");
    let params: Vec<_> = config.subscriptions[0]
        .params
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(
        params,
        [("ids", "[1,2]"), ("name", "\"blue\""), ("team", "7")]
    );
    assert!(!config.zstd);
    assert!(config.warnings().is_empty());
}

#[test]
fn an_error_does_not_tell_its_place() {
    refused("streamer = 5", "replica.toml:1:12: streamer: ");
    refused(
        &GOOD.replace("database", "databse"),
        "replica.toml:4:1: databse: unknown field `databse`, expected one of",
    );
    refused(
        &format!("{GOOD}\nshap = 1"),
        "replica.toml:10:1: subscribe.shap: unknown field `shap`",
    );
    refused(&GOOD.replace("\"app.db\"", "app.db"), "replica.toml:4:12: ");
    refused(
        &GOOD.replace("\"app.db\"", "\"\""),
        "replica.toml:4:12: database: is empty",
    );
    refused(
        &GOOD.replace("database = \"app.db\"", ""),
        "missing field `database`",
    );
    refused(
        &GOOD.replace("\"blue\"", "nan"),
        "replica.toml:8:29: subscribe.params.name: ",
    );
    refused(
        &GOOD.replace("shape  = \"team\"", "shape=\"\""),
        "replica.toml:7:7: subscribe.shape: is empty",
    );
    refused("streamer = \"éé\" x", "replica.toml:1:17: ");
}

#[test]
fn what_would_be_right_is_not_said() {
    let with = |line: &str| GOOD.replace("[[subscribe]]", &format!("{line}\n[[subscribe]]"));
    refused(
        &with("http = \"0.0.0.0:7430\""),
        "replica.toml:6:8: http: `0.0.0.0:7430` can be reached from other machines",
    );
    refused(&with("http = \"7430\""), "write \"127.0.0.1:7430\"");
    refused(&with("http = \"unix:\""), "has no path");
    refused(&with("memory_max = \"lots\""), "such as \"128MiB\"");
    refused(&with("memory_max = \"1MiB\""), "at least \"48MiB\"");
    refused(&with("memory_max = -1"), "can't be negative");
    refused(&with("memory_max = true"), "such as \"128MiB\"");
    refused(&with("file_mode = \"0999\""), "such as \"0600\"");
    refused(&with("file_mode = \"0400\""), "keeps the owner out");
    refused(&with("file_mode = 384"), "expected a string");
    refused(&with("ca = \"ca.pem\""), "needs a streamer with https");
    refused(
        &GOOD.replace("http://127.0.0.1:7420", "127.0.0.1:7420"),
        "write it as \"https://host:7420\"",
    );
    refused(&GOOD.replace("http:", "ftp:"), "`ftp` is not http or https");
    refused(&GOOD.replace(":7420", ":7420/x"), "has a path");
    refused(
        &format!("{GOOD}\n[[subscribe]]\nshape = \"a\"\n[[subscribe]]\nshape = \"a\""),
        "twice",
    );
    refused(
        &GOOD.replace("[[subscribe]]\nshape  = \"team\"", "[x]"),
        "unknown field `x`",
    );
}

#[test]
fn tls_files_that_are_unusable_are_only_noticed_later() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.pem");
    let https = GOOD.replace("http:", "https:");
    let with = |key: &str| {
        https.replace(
            "[[subscribe]]",
            &format!("{key} = \"{}\"\n[[subscribe]]", path.display()),
        )
    };
    refused(&with("ca"), "No such file");
    std::fs::write(&path, "hello").unwrap();
    refused(&with("ca"), "is not PEM");
    std::fs::write(&path, "-----BEGIN CERTIFICATE-----").unwrap();
    assert_eq!(parse(&with("ca")).unwrap().tls.ca, Some(path.clone()));
    refused(&with("cert"), "`key` is missing");
    refused(&with("key"), "`cert` is missing");
}

#[test]
fn there_is_not_exactly_one_token() {
    refused(
        &GOOD.replace("token    = \"dev-1\"", ""),
        "token: is missing",
    );
    refused(
        &GOOD.replace("[[subscribe]]", "token_file = \"t\"\n[[subscribe]]"),
        "replica.toml:6:14: token_file: `token` is given too",
    );
}

#[test]
fn a_secret_is_printed() {
    let canary = "canary7731";
    for text in [
        GOOD.replace("dev-1", &format!("{canary} x")),
        GOOD.replace("dev-1", &format!("{canary}\\u0000")),
        GOOD.replace("dev-1", &canary.repeat(1_000)),
        GOOD.replace("\"dev-1\"", "7731"),
        GOOD.replace("\"dev-1\"", "[7731]"),
        GOOD.replace("\"dev-1\"", &format!("\"{canary}")),
        GOOD.replace("\"dev-1\"", canary),
        GOOD.replace("127.0.0.1:7420", &format!("{canary}:{canary}@host")),
    ] {
        let error = parse(&text).expect_err("must be refused");
        assert!(!error.to_string().contains("7731"), "{error}");
        assert!(!format!("{error:?}").contains("7731"), "{error:?}");
    }
    let error = parse_with(GOOD, &[("ANABRANCH_TOKEN", "canary7731 x")])
        .unwrap_err()
        .to_string();
    assert!(!error.contains("7731"), "{error}");
    let config = parse(&GOOD.replace("dev-1", canary)).unwrap();
    assert!(!format!("{config:?}").contains("7731"));
}

#[test]
fn the_environment_is_not_above_the_file() {
    let config = parse_with(
        GOOD,
        &[
            ("ANABRANCH_TOKEN", "12"),
            ("ANABRANCH_HTTP", ""),
            ("ANABRANCH_MEMORY_MAX", "67108864"),
            ("ANABRANCH_SUBSCRIBE__0__SHAPE", "other"),
            ("ANABRANCH_SUBSCRIBE__0__PARAMS__TEAM", "8"),
            ("ANABRANCH_SUBSCRIBE__1__SHAPE", "7"),
            ("ANABRANCH_SUBSCRIBE__1__PARAMS__COLOUR", "green"),
            ("ANABRANCH_POSTGRES__URL", "postgres://a:b@c/d"),
            ("ANABRANCH_TEST_PG", "docker"),
            ("OTHER", "1"),
        ],
    )
    .unwrap();
    assert_eq!(config.token.read().unwrap().unwrap().reveal(), "12");
    assert_eq!(config.http, None);
    assert_eq!(config.memory.max, 64 << 20);
    assert_eq!(config.subscriptions[0].shape, "other");
    assert_eq!(config.subscriptions[0].params["team"], "8");
    assert_eq!(config.subscriptions[0].params["name"], "\"blue\"");
    assert_eq!(config.subscriptions[1].shape, "7");
    assert_eq!(config.subscriptions[1].params["colour"], "\"green\"");

    let all = [
        ("ANABRANCH_STREAMER", "https://db.example:7420"),
        ("ANABRANCH_TOKEN", "t"),
        ("ANABRANCH_DATABASE", "x.db"),
        (
            "ANABRANCH_SUBSCRIBE",
            "[{ shape = \"team\", params = { a = 1 } }]",
        ),
    ];
    assert_eq!(
        parse_with("", &all).unwrap().subscriptions[0].params["a"],
        "1"
    );
}

#[test]
fn an_error_in_the_environment_blames_the_file() {
    for (name, value, expected) in [
        (
            "ANABRANCH_HTTP",
            "0.0.0.0:1",
            "environment variable ANABRANCH_HTTP: http: `0.0.0.0:1` can be reached",
        ),
        (
            "ANABRANCH_SUBSCRIBE__0__SHAP",
            "x",
            "environment variable ANABRANCH_SUBSCRIBE__0__SHAP: subscribe.shap: unknown field",
        ),
        ("ANABRANCH_SUBSCRIBE__4__SHAPE", "x", "the next is 1"),
        (
            "ANABRANCH_SUBSCRIBE__X__SHAPE",
            "x",
            "is not a place in the list",
        ),
        ("ANABRANCH_SUBSCRIBE", "[", "is not a TOML value"),
        ("ANABRANCH_HTTP__PORT", "1", "`http` is a single value"),
    ] {
        let with_http = GOOD.replace("[[subscribe]]", "http = \"localhost:1\"\n[[subscribe]]");
        let error = parse_with(&with_http, &[(name, value)])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(expected),
            "`{error}` does not say `{expected}`"
        );
    }
}

#[test]
fn a_token_file_that_was_renewed_is_not_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    let text = GOOD.replace(
        "token    = \"dev-1\"",
        &format!("token_file = \"{}\"", path.display()),
    );
    let config = parse(&text).unwrap();
    assert!(
        config
            .token
            .read()
            .unwrap_err()
            .to_string()
            .contains("No such file")
    );
    std::fs::write(&path, "first\n").unwrap();
    assert_eq!(config.token.read().unwrap().unwrap().reveal(), "first");
    std::fs::write(&path, "second").unwrap();
    assert_eq!(config.token.read().unwrap().unwrap().reveal(), "second");
    std::fs::write(&path, " \n").unwrap();
    assert!(
        config
            .token
            .read()
            .unwrap_err()
            .to_string()
            .contains("is empty")
    );
}

#[test]
fn a_token_in_clear_text_goes_unnoticed() {
    for (url, warned) in [
        ("http://db.example:7420", true),
        ("https://db.example:7420", false),
        ("http://localhost:7420", false),
        ("http://[::1]:7420", false),
        ("http://10.0.0.1:7420", true),
    ] {
        let config = parse(&GOOD.replace("http://127.0.0.1:7420", url)).unwrap();
        assert_eq!(!config.warnings().is_empty(), warned, "{url}");
    }
}
