//! The program: arguments, exit status, signals, output.

mod fake;

use std::{
    path::Path,
    process::{Output, Stdio},
};

use fake::{Fake, at, copy, soon};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
};

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch-replica"));
    command.env_clear().kill_on_drop(true).stdin(Stdio::null());
    command
}

/// In no number, time or name that a log may hold.
const TOKEN: &str = "canary-that-nothing-else-says";

async fn output(command: &mut Command) -> Output {
    soon("the program's end", command.output()).await.unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn write_config(directory: &Path, url: &str, extra: &str) -> std::path::PathBuf {
    let path = directory.join("replica.toml");
    let database = directory.join("app.db");
    let config = format!(
        "streamer = \"{url}\"\ntoken = \"{TOKEN}\"\ndatabase = \"{}\"\n{extra}\n[[subscribe]]\nshape = \"all\"\n",
        database.display()
    );
    std::fs::write(&path, config).unwrap();
    path
}

struct Running {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    said: String,
}

impl Running {
    fn start(config: &Path, arguments: &[&str]) -> Self {
        let mut child = program()
            .args(["run", "--config"])
            .arg(config)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        Running {
            child,
            log,
            said: String::new(),
        }
    }

    /// Reads the log up to a line that has `what`.
    async fn says(&mut self, what: &'static str) -> String {
        let found = soon(what, async {
            while let Some(line) = self.log.next_line().await.unwrap() {
                self.said += &line;
                self.said += "\n";
                if line.contains(what) {
                    return Some(line);
                }
            }
            None
        })
        .await;
        found.unwrap_or_else(|| panic!("`{what}` is not in\n{}", self.said))
    }

    async fn end(&mut self, signal: Option<&str>) -> i32 {
        if let Some(signal) = signal {
            let pid = self.child.id().unwrap().to_string();
            let sent = Command::new("kill")
                .args([signal, &pid])
                .status()
                .await
                .unwrap();
            assert!(sent.success());
        }
        let status = soon("the program's end", self.child.wait()).await.unwrap();
        while let Some(line) = self.log.next_line().await.unwrap() {
            self.said += &line;
            self.said += "\n";
        }
        assert!(!self.said.contains(TOKEN), "the token is in the log");
        status.code().expect("an exit status, not a signal")
    }
}

#[tokio::test]
async fn wrong_usage_or_config_does_not_exit_with_2() {
    let directory = tempfile::tempdir().unwrap();
    let good = write_config(directory.path(), "http://127.0.0.1:1", "http = \"\"");
    let bad = directory.path().join("bad.toml");
    std::fs::write(
        &bad,
        "streamer = \"http://127.0.0.1:1\"\nhttp = \"0.0.0.0:1\"\n",
    )
    .unwrap();
    for (arguments, expected) in [
        (vec!["run"], "--config"),
        (vec!["walk"], "unrecognized"),
        (
            vec!["run", "--config", "/nowhere.toml"],
            "/nowhere.toml: No such file",
        ),
        (
            vec!["run", "--config", bad.to_str().unwrap()],
            "missing field `database`",
        ),
        (
            vec!["status", "--config", good.to_str().unwrap()],
            "`http` is off",
        ),
    ] {
        let output = output(program().args(&arguments)).await;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    let output = output(program().arg("--version")).await;
    assert!(output.status.success());
    assert!(text(&output.stdout).contains(env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn a_life_leaves_something_unsaid() {
    let mut fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s.sock");
    let config = write_config(
        directory.path(),
        &fake.url(),
        &format!("http = \"unix:{}\"", socket.display()),
    );

    // Nobody there: 1.
    let asked = output(program().args(["status", "--config"]).arg(&config)).await;
    assert_eq!(asked.status.code(), Some(1));
    assert!(text(&asked.stderr).contains("is it running?"));

    let mut running = Running::start(&config, &[]);
    running.says("starting").await;
    running.says("HTTP at unix:").await;
    let mut call = fake.call().await;
    call.send(copy(100, &[(1, "one")])).await;
    call.acked(at(100)).await;
    call.keep_heard(100);
    running.says("streaming from").await;
    running.says("first complete commit").await;
    running.says("caught up").await;

    let asked = output(program().args(["status", "--config"]).arg(&config)).await;
    let shown = text(&asked.stdout);
    assert!(asked.status.success(), "{}", text(&asked.stderr));
    assert!(
        shown.contains("up to date") && shown.contains("items live"),
        "{shown}"
    );
    let asked = output(
        program()
            .args(["status", "--json", "--config"])
            .arg(&config),
    )
    .await;
    let json: serde_json::Value = serde_json::from_slice(&asked.stdout).unwrap();
    assert_eq!(json["position"], at(100).to_string());

    assert_eq!(running.end(Some("-TERM")).await, 0, "{}", running.said);
    assert!(running.said.contains("SIGTERM: stopping") && running.said.contains("stopped"));
    assert!(!socket.exists());
}

#[tokio::test]
async fn an_interrupt_or_a_definite_error_exits_wrongly() {
    let fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(directory.path(), &fake.url(), "http = \"\"");
    let mut running = Running::start(&config, &["--log-format", "json"]);
    let line = running.says("no HTTP").await;
    serde_json::from_str::<serde_json::Value>(&line).expect("a line of JSON");

    // A second one on the same file is refused, and the first goes on.
    let mut second = Running::start(&config, &[]);
    assert_eq!(second.end(None).await, 1, "{}", second.said);
    assert!(second.said.contains("ERROR"), "{}", second.said);
    assert_eq!(running.end(Some("-INT")).await, 0, "{}", running.said);
}

#[tokio::test]
async fn a_file_that_is_locked_at_the_start_is_waited_for() {
    let fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(directory.path(), &fake.url(), "http = \"\"");
    let program = rusqlite::Connection::open(directory.path().join("app.db")).unwrap();
    program
        .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE own(id); BEGIN IMMEDIATE")
        .unwrap();

    // Told to end while it waits: that is a clean stop.
    let mut running = Running::start(&config, &[]);
    let line = running.says("can't be opened now").await;
    assert!(line.contains("write lock"), "{line}");
    assert_eq!(running.end(Some("-TERM")).await, 0, "{}", running.said);
    assert!(running.said.contains("SIGTERM: stopping") && running.said.contains("stopped"));

    // It goes on by itself when the lock is gone.
    let mut running = Running::start(&config, &[]);
    running.says("can't be opened now").await;
    program.execute_batch("COMMIT").unwrap();
    running.says("no HTTP").await;
    assert_eq!(running.end(Some("-INT")).await, 0, "{}", running.said);
}
