use super::*;

const MINIMAL: &str = "[postgres]\nurl = \"postgres://anabranch:hunter2@db:5432/app\"\n";

fn read(text: &str) -> Result<Config, Error> {
    read_with(text, &[])
}

fn read_with(text: &str, environment: &[(&str, &str)]) -> Result<Config, Error> {
    let environment = environment
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()));
    Config::read(Path::new("streamer.toml"), text, environment)
}

#[track_caller]
fn complaints(text: &str) -> Vec<String> {
    match read(text) {
        Ok(_) => panic!("accepted: {text}"),
        Err(Error::Refused(problems)) => problems.iter().map(ToString::to_string).collect(),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn defaults_are_those_of_the_constants() {
    let config = read(MINIMAL).expect("minimal config");
    assert_eq!(config.listen, LISTEN_DEFAULT.parse().expect("address"));
    assert_eq!(config.memory_max, 256 << 20);
    assert_eq!(config.row_bytes_max, 68 << 20);
    assert_eq!(config.postgres.slot, "anabranch");
    assert_eq!(config.change_index_hours_max, 168);
}

#[test]
fn defaults_written_out_are_the_same_config() {
    let config = read(MINIMAL).expect("minimal config");
    let mut text = String::new();
    for (key, value) in config.defaulted() {
        text.push_str(&format!("{key} = {value}\n"));
    }
    text.push_str("postgres.url = \"postgres://anabranch:hunter2@db:5432/app\"\n");
    let again = read(&text).expect("defaults written out");
    assert_eq!(again.defaulted(), config.defaulted());
}

#[test]
fn the_design_s_own_example_is_read() {
    let config = read(
        r#"
listen     = "127.0.0.1:7420"
data_dir   = "/var/lib/anabranch"
memory_max = "256MiB"

[postgres]
url         = "postgres://anabranch@db:5432/app"
publication = "anabranch"
slot        = "anabranch"

[auth]
tokens = [ { token = "dev-1", claims = { sub = "edge-1", team_id = 7, teams = [1, 2] } } ]

[shape.team]
params.team = { claim = "team_id" }
params.kind = { client = "int8" }
tables      = [ "SELECT * FROM issues WHERE team_id = $team" ]
writable    = false
"#,
    )
    .expect("example");
    assert_eq!(config.auth.tokens[0].token.reveal(), "dev-1");
    assert_eq!(config.auth.tokens[0].claims["team_id"], 7);
    let team = &config.shapes[0];
    assert_eq!(
        team.params["team"],
        shape::ParamSource::Claim("team_id".into())
    );
    assert_eq!(
        team.params["kind"],
        shape::ParamSource::Client("int8".into())
    );
    assert_eq!(team.tables.len(), 1);
}

#[test]
fn each_mistake_is_named_with_its_place_all_at_once() {
    let text = r#"listen = "localhost"
memory_max = "1MiB"
colour = 1
[postgres]
url = 5
slot = "Has-Capitals"
ulr = "x"
[shape.team]
tables = []
[shape.other]
tables = ["SELECT 1", 2]
params.p = { claim = "a", client = "b" }
"#;
    let complaints = complaints(text);
    for expected in [
        "streamer.toml:1:10: listen: must be an IP address and a port",
        "streamer.toml:2:14: memory_max: must be at least \"64MiB\"",
        "streamer.toml:3:1: colour: unknown key; known here: listen, data_dir",
        "streamer.toml:5:7: postgres.url: must be a text",
        "streamer.toml:6:8: postgres.slot: must be 1 to 63 of a-z, 0-9 and _",
        "streamer.toml:7:1: postgres.ulr: unknown key; known here: url, write_url, publication, slot, streaming",
        "streamer.toml:8:1: shape.team.tables: is missing or empty",
        "streamer.toml:11:23: shape.other.tables[1]: must be a text",
        "streamer.toml:12:12: shape.other.params.p: must be { claim",
    ] {
        assert!(
            complaints.iter().any(|line| line.starts_with(expected)),
            "{expected}\nnot in {complaints:#?}"
        );
    }
    assert_eq!(complaints.len(), 9, "{complaints:#?}");
}

#[test]
fn broken_toml_is_named_with_its_place_and_without_its_text() {
    let complaints = complaints("[postgres]\nurl = \"postgres://a:hunter2@db\nslot = \"x\"\n");
    assert!(
        complaints[0].starts_with("streamer.toml:2:"),
        "{complaints:?}"
    );
    assert!(!complaints.join("\n").contains("hunter2"), "{complaints:?}");
}

#[test]
fn a_missing_url_is_said() {
    assert!(complaints("")[0].contains("postgres.url: is missing"));
    assert!(complaints("[postgres]\nslot=\"a\"")[0].contains("postgres.url: is missing"));
}

#[test]
fn a_policy_that_there_is_not_is_refused() {
    let complaints = complaints(&format!("table.t.conflict = \"newest\"\n{MINIMAL}"));
    assert!(
        complaints[0].contains("must be \"last-write\""),
        "{complaints:?}"
    );
}

#[test]
fn published_keys_are_fetched_where_anybody_can_change_them() {
    let jwt = |jwt: &str| format!("auth.jwt = {{ {jwt} }}\n{MINIMAL}");
    for url in [
        "https://login.example.org/.well-known/jwks.json",
        "https://10.0.0.1:8443",
        "http://127.0.0.1:8080/jwks",
        "http://[::1]/jwks",
        "http://localhost/jwks",
    ] {
        let text = jwt(&format!("jwks = \"{url}\", audience = \"a\""));
        let config = read(&text).unwrap_or_else(|error| panic!("{url}: {error}"));
        assert!(matches!(config.auth.jwt.expect("jwt").key, JwtKey::Jwks(jwks) if jwks.url == url));
    }
    for (wrong, complaint) in [
        ("jwks = \"http://login.example.org/jwks\"", "must be https"),
        ("jwks = \"http://127.0.0.1.example.org/\"", "must be https"),
        ("jwks = \"file:///etc/jwks.json\"", "must be a URL"),
        ("jwks = \"ftp://localhost/jwks\"", "must be https"),
        ("jwks = \"/jwks\"", "has no host"),
        ("jwks = \"\"", "must be a URL"),
        (
            "jwks = \"https://u:hunter2@login/\"",
            "must not hold a user",
        ),
        (
            "jwks = \"https://x\", public_key_file = \"a\"",
            "exactly one of",
        ),
        ("jwks_ca = \"a\"", "exactly one of"),
        (
            "jwks = \"https://x\", jwks_refresh_seconds = 0",
            "from 1 to 86400",
        ),
        ("jwks = \"https://x\", audience = []", "must be a text"),
    ] {
        let said = complaints(&jwt(wrong)).join("\n");
        assert!(said.contains(complaint), "{wrong}: {said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
    let unbound = read(&jwt("jwks = \"https://x\"")).expect("config");
    assert!(
        unbound
            .warnings
            .iter()
            .any(|said| said.contains("audience"))
    );
}

#[test]
fn certificates_are_believed_in_that_nobody_asks_for() {
    let tls = |more: &str| format!("tls = {{ cert = \"a\", key = \"b\"{more} }}\n{MINIMAL}");
    let config = read(&tls(", client_ca = \"c\"")).expect("config");
    let asked = config.tls.expect("tls");
    assert_eq!(asked.client_ca, Some("c".into()));
    assert!(asked.client_required && !config.auth.client_certificates);
    let said = complaints(&tls(", client_required = true")).join("\n");
    assert!(said.contains("needs client_ca"), "{said}");
    let text = format!("auth.client_certificates = true\n{}", tls(""));
    let config = read(&text).expect("config");
    assert!(
        config
            .warnings
            .iter()
            .any(|said| said.contains("no effect"))
    );
}

#[test]
fn a_limit_of_nothing_is_accepted() {
    for (wrong, field) in [
        ("streams_max = 0", "streams_max"),
        ("calls_per_minute = -1", "calls_per_minute"),
        ("writes_per_second = 1000001", "writes_per_second"),
        ("write_bytes_per_second = \"1B\"", "write_bytes_per_second"),
        ("write_bytes_per_second = 10", "write_bytes_per_second"),
        ("writes_per_minute = 1", "writes_per_minute"),
    ] {
        let said = complaints(&format!("auth.limits = {{ {wrong} }}\n{MINIMAL}"));
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(
            said[0].contains(&format!("auth.limits.{field}: ")),
            "{said:?}"
        );
    }
}

#[test]
fn static_tokens_are_refused_on_an_open_address() {
    let auth = "[auth]\ntokens = [ { token = \"dev-1\" } ]\n";
    for (listen, right) in [
        ("127.0.0.1:1", true),
        ("127.9.9.9:1", true),
        ("[::1]:1", true),
        ("0.0.0.0:1", false),
        ("[::]:1", false),
        ("192.168.0.1:1", false),
    ] {
        let text = format!("listen = \"{listen}\"\n{MINIMAL}{auth}");
        assert_eq!(read(&text).is_ok(), right, "{listen}");
    }
}

#[test]
fn jwt_needs_one_key_and_an_audience_that_says_something() {
    for (jwt, right) in [
        ("hs256_file = \"k\"", true),
        (
            "public_key_file = \"k\", audience = \"a\", issuer = \"i\"",
            true,
        ),
        ("hs256_file = \"k\", audience = [\"a\", \"b\"]", true),
        ("hs256_file = \"k\", public_key_file = \"k\"", false),
        ("issuer = \"i\"", false),
        ("hs256_file = \"k\", audience = []", false),
        ("hs256_file = \"k\", audience = 7", false),
    ] {
        let text = format!("{MINIMAL}[auth]\njwt = {{ {jwt} }}\n");
        assert_eq!(read(&text).is_ok(), right, "{jwt}");
    }
}

#[test]
fn the_environment_lies_over_the_file() {
    let config = read_with(
        &format!("memory_max = \"128MiB\"\n{MINIMAL}slot = \"a\"\n[shape.Team]\ntables = [\"SELECT 1\"]\n"),
        &[
            ("ANABRANCH_MEMORY_MAX", "512MiB"),
            ("ANABRANCH_POSTGRES__SLOT", "b"),
            ("ANABRANCH_CHANGE_INDEX_HOURS_MAX", "24"),
            ("ANABRANCH_AUTH__TOKENS", "[{ token = \"true\", claims = { a = [1] } }]"),
            ("ANABRANCH_AUTH__JWT__HS256_FILE", "7"),
            ("ANABRANCH_SHAPE__TEAM__TABLES", "['SELECT 2', 'SELECT 3']"),
            ("ANABRANCH_SHAPE__NEW", "{ tables = ['SELECT 4'] }"),
            ("ANABRANCH_SHAPE__NEW__PARAMS__P", "{ claim = 'c' }"),
            ("ANABRANCH_LISTN", "typo"),
            ("ANABRANCH_TEST_PG", "docker"),
            ("PATH", "x"),
        ],
    )
    .expect("config");
    assert_eq!(config.memory_max, 512 << 20);
    assert_eq!(config.postgres.slot, "b");
    assert_eq!(config.change_index_hours_max, 24);
    assert_eq!(config.auth.tokens[0].token.reveal(), "true");
    assert_eq!(
        config.auth.jwt.expect("jwt").key,
        JwtKey::Hs256File("7".into())
    );
    let tables: Vec<_> = config
        .shapes
        .iter()
        .map(|shape| (&*shape.name, shape.tables.len(), shape.params.len()))
        .collect();
    assert_eq!(tables, [("Team", 2, 0), ("new", 1, 1)]);
    assert_eq!(
        config.warnings,
        ["environment variable ANABRANCH_LISTN names no key of the config; it is ignored"]
    );
}

#[test]
fn a_wrong_variable_is_named() {
    let Err(error) = read_with(
        MINIMAL,
        &[
            ("ANABRANCH_POSTGRES__SLT", "b"),
            ("ANABRANCH_TLS", "{ cert ="),
            ("ANABRANCH_MEMORY_MAX", "lots"),
        ],
    ) else {
        panic!("accepted");
    };
    let error = error.to_string();
    for expected in [
        "environment variable ANABRANCH_POSTGRES__SLT: postgres.slt: unknown key",
        "environment variable ANABRANCH_TLS: tls: must be a table",
        "environment variable ANABRANCH_MEMORY_MAX: memory_max: must be a size",
    ] {
        assert!(error.contains(expected), "{expected}\nnot in {error}");
    }
}

#[test]
fn secrets_do_not_print() {
    let config = read(&format!(
        "{MINIMAL}[auth]\ntokens = [ {{ token = \"canary-token\" }} ]\n"
    ))
    .expect("config");
    let printed = format!("{config:?}");
    assert!(!printed.contains("canary-token"), "{printed}");
    assert!(!printed.contains("hunter2"), "{printed}");
}

#[test]
fn a_place_in_a_select_is_a_place_in_the_file() {
    let text = format!(
        "{MINIMAL}[shape.a]\ntables = [\n  \"SELECT * FROM t WHERE é = 1\",\n  \"\"\"\n  SELECT *\n  FROM u\"\"\",\n]\n"
    );
    let config = read(&text).expect("config");
    let place = |index, line, column| {
        let place = config.place_in_sql("a", index, line, column);
        place.map(|place| place.to_string()).unwrap_or_default()
    };
    assert_eq!(place(0, 1, 1), "streamer.toml:5:4");
    assert_eq!(place(0, 1, 25), "streamer.toml:5:28");
    assert_eq!(place(1, 1, 3), "streamer.toml:7:3");
    assert_eq!(place(1, 2, 8), "streamer.toml:8:8");
    assert_eq!(place(2, 1, 1), "");
}

#[test]
fn sql_that_is_no_select_of_ours_is_refused_with_its_place_before_anything_is_connected() {
    let text = format!(
        "{MINIMAL}[shape.a]\ntables = [\n  \"SELECT * FROM t\",\n  \"SELECT * FROM t WHERE id IN (SELECT 1)\",\n  \"DELETE FROM u\",\n]\n"
    );
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("streamer.toml");
    std::fs::write(&path, &text).expect("write");
    let Err(Error::Refused(problems)) = Config::load(&path) else {
        panic!("accepted");
    };
    let said: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(
        said[0].contains(":6:") && said[0].contains("shape.a.tables[1]: "),
        "{said:?}"
    );
    assert!(said[1].contains(":7:4: shape.a.tables[2]: "), "{said:?}");
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_its_place() {
    let text = format!("{MINIMAL}[tls]\ncert = \"a.crt\"\nkey = \"a.key\"\n[auth]\n");
    let config = read_with(
        &text,
        &[("ANABRANCH_AUTH__JWT", "{ hs256_file = 'a.secret' }")],
    )
    .expect("config");
    let said = |field| config.refused_file(field, &"a.x: no such file").to_string();
    assert_eq!(
        said("tls.key"),
        "streamer.toml:5:7: tls.key: a.x: no such file"
    );
    assert_eq!(
        said("auth.jwt.hs256_file"),
        "environment variable ANABRANCH_AUTH__JWT: auth.jwt.hs256_file: a.x: no such file"
    );
}

#[test]
fn subqueries_are_nested_as_deep_as_the_config_says_and_the_refusal_names_the_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("streamer.toml");
    let load = |depth_max: &str, depth: usize| {
        let begin = "EXISTS (SELECT 1 FROM a WHERE ".repeat(depth);
        let sql = format!("SELECT * FROM a WHERE {begin}id = 1{}", ")".repeat(depth));
        let text = format!("{depth_max}\n{MINIMAL}[shape.deep]\ntables = [\"{sql}\"]\n");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    for (depth_max, levels) in [
        ("", 4),
        ("subquery_depth_max = 1", 1),
        ("subquery_depth_max = 7", 7),
    ] {
        assert_eq!(load(depth_max, levels), Ok(()));
        let error = load(depth_max, levels + 1).unwrap_err();
        assert!(error.contains("`subquery_depth_max`"), "{error}");
        assert!(error.contains("streamer.toml:"), "{error}");
    }
    for wrong in ["0", "17", "-1"] {
        let error = load(&format!("subquery_depth_max = {wrong}"), 1).unwrap_err();
        assert!(
            error.contains("subquery_depth_max: must be a number of levels from 1 to 16"),
            "{error}"
        );
    }
}
