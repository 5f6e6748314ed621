//! A server from programs on this machine.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Options, PASSWORD, Stop, USER};
use crate::{port, process, watcher::Watcher};

/// Who servers run as where we are root, since they refuse to be: `nobody`.
const NOBODY: u32 = 65534;

/// Stops whatever runs in the directory, and removes it.
const WATCH: &str = r#""$1"/pg_ctl stop -D "$2"/data -m immediate -s -t 20; rm -rf "$2""#;

#[derive(Debug)]
pub(super) struct Cluster {
    bin: PathBuf,
    /// Holds `data`, `log`, and the Unix socket; short, since a socket's path has room for some hundred bytes only.
    dir: PathBuf,
    port: u16,
    postmaster: Mutex<Option<Child>>,
    _watcher: Watcher,
}

impl Cluster {
    pub(super) async fn start(bin: &Path, options: &Options) -> Self {
        let (bin, options) = (bin.to_owned(), options.clone());
        tokio::task::spawn_blocking(move || Self::create(bin, &options))
            .await
            .expect("make a cluster")
    }

    fn create(bin: PathBuf, options: &Options) -> Self {
        let cluster = Self::place(bin);
        cluster.initdb(options);
        cluster.run();
        cluster
    }

    /// A cluster without anything in it.
    fn place(bin: PathBuf) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("anabranch-pg-")
            .tempdir()
            .expect("make a directory for a cluster")
            .keep();
        if let Some(user) = server_user() {
            std::os::unix::fs::chown(&dir, Some(user), Some(user))
                .expect("give the cluster's directory to the server's user");
        }
        let watcher = Watcher::start(WATCH, [bin.as_os_str(), dir.as_os_str()], server_user())
            .expect("start the watcher of a cluster");
        Self {
            bin,
            dir,
            port: port::free(),
            postmaster: Mutex::new(None),
            _watcher: watcher,
        }
    }

    pub(super) async fn standby(&self) -> Self {
        let (bin, port) = (self.bin.clone(), self.port.to_string());
        let made = tokio::task::spawn_blocking(move || {
            let standby = Self::place(bin);
            let mut copy = standby.command("pg_basebackup");
            copy.args(["--checkpoint=fast", "--write-recovery-conf", "--pgdata"])
                .arg(standby.dir.join("data"))
                .args(["--host=127.0.0.1", "--username", USER, "--port", &port])
                .env("PGPASSWORD", PASSWORD);
            succeed(copy);
            standby.configure("");
            standby.run();
            standby
        });
        made.await.expect("make a standby")
    }

    pub(super) async fn save(&self) {
        self.replace("data", "saved").await;
    }

    pub(super) async fn put_back(&self) {
        self.replace("saved", "data").await;
    }

    async fn replace(&self, from: &str, to: &str) {
        assert!(self.pid().is_none(), "its files are in use");
        let (from, to) = (self.dir.join(from), self.dir.join(to));
        let replaced = tokio::task::spawn_blocking(move || {
            let _ = fs::remove_dir_all(&to);
            let mut copy = Command::new("cp");
            copy.arg("--archive").arg(from).arg(to);
            succeed(copy);
        });
        replaced.await.expect("copy files");
    }

    fn initdb(&self, options: &Options) {
        let password = self.dir.join("password");
        fs::write(&password, PASSWORD).expect("write the password");
        let mut command = self.command("initdb");
        command
            .arg("--pgdata")
            .arg(self.dir.join("data"))
            .arg("--username")
            .arg(USER)
            .arg("--pwfile")
            .arg(&password)
            .args(["--auth-local=trust", "--auth-host=scram-sha-256"])
            .args(options.initdb_arguments());
        succeed(command);
        self.configure(&options.config_file());
    }

    /// Adds to postgresql.conf, and says there where this cluster is.
    fn configure(&self, settings: &str) {
        let ours = format!(
            "\n{settings}port = {}\nunix_socket_directories = '{}'\n",
            self.port,
            self.dir.display()
        );
        let path = self.dir.join("data/postgresql.conf");
        let theirs = fs::read_to_string(&path).expect("read postgresql.conf");
        fs::write(&path, theirs + &ours).expect("write postgresql.conf");
    }

    fn run(&self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .expect("open the server's log");
        let mut postmaster = self.postmaster.lock().expect("no panic under this lock");
        assert!(postmaster.is_none(), "this server is already running");
        let child = self
            .command("postgres")
            .arg("-D")
            .arg(self.dir.join("data"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log)
            .spawn()
            .expect("start postgres");
        *postmaster = Some(child);
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            // Not ours: another user may not even look there.
            .env("HOME", &self.dir)
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .current_dir(&self.dir)
            .process_group(0);
        if let Some(user) = server_user() {
            command.uid(user).gid(user);
        }
        command
    }

    pub(super) fn bin(&self) -> &Path {
        &self.bin
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        let postmaster = self.postmaster.lock().expect("no panic under this lock");
        postmaster.as_ref().map(Pid::from_child)
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) async fn stop(&self, how: Stop) {
        let postmaster = self
            .postmaster
            .lock()
            .expect("no panic under this lock")
            .take();
        let mut postmaster = postmaster.expect("this server is running");
        let pid = Pid::from_child(&postmaster);
        match how {
            Stop::Fast => signal(pid, Signal::INT),
            Stop::Immediate => signal(pid, Signal::QUIT),
            Stop::Kill => {
                // The postmaster first: it would start what died again. Its children are found before they are
                // orphans.
                let children = process::children(pid);
                signal(pid, Signal::KILL);
                children
                    .iter()
                    .for_each(|&child| signal(child, Signal::KILL));
                while children.iter().any(|&child| process::is_alive(child)) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
        while postmaster
            .try_wait()
            .expect("ask for the end of postgres")
            .is_none()
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(super) async fn start_again(&self) {
        self.run();
    }

    pub(super) fn has_ended(&self) -> bool {
        let mut postmaster = self.postmaster.lock().expect("no panic under this lock");
        match &mut *postmaster {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => true,
        }
    }

    pub(super) fn log(&self) -> String {
        let log = fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    pub(super) async fn tool(
        &self,
        name: &str,
        database: &str,
        arguments: &[&str],
    ) -> (bool, String) {
        let mut command = self.command(name);
        command
            .args(arguments)
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", USER)
            .env("PGPASSWORD", PASSWORD)
            .env("PGDATABASE", database)
            .stdin(Stdio::null());
        let output = tokio::task::spawn_blocking(move || command.output())
            .await
            .expect("join a tool")
            .unwrap_or_else(|error| panic!("run {name}: {error}"));
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text.into_owned())
    }
}

impl Drop for Cluster {
    /// Reaps the postmaster; that it ends is the watcher's work.
    fn drop(&mut self) {
        let postmaster = self.postmaster.get_mut().ok().and_then(Option::take);
        if let Some(mut postmaster) = postmaster {
            signal(Pid::from_child(&postmaster), Signal::QUIT);
            let _ = postmaster.wait();
        }
    }
}

fn succeed(mut command: Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} failed:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn server_user() -> Option<u32> {
    rustix::process::geteuid().is_root().then_some(NOBODY)
}

fn signal(pid: Pid, signal: Signal) {
    // One that is gone already is as we want it.
    let _ = kill_process(pid, signal);
}
