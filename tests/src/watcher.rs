//! Ends what a test started, however the test ends.
//!
//! A destructor does not run when a test process is killed, and what it started would stay for ever. So each such
//! thing has a watcher: a shell that waits on a pipe which only we hold. The kernel closes the pipe when we die, the
//! shell's `read` ends, and it runs the one command that it was given. Signals of the terminal (Ctrl-C) are not for
//! it: it has its own process group and ignores them.

use std::{
    ffi::OsStr,
    io::{self, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, Stdio},
};

/// Runs a command when it is dropped, or when this process is gone.
#[derive(Debug)]
pub struct Watcher {
    pipe: Option<ChildStdin>,
    shell: Child,
}

impl Watcher {
    /// `script` is for `sh`, and sees `args` as `$1`, `$2`, … It must not do harm where the thing never came to be,
    /// since the watcher is started first. `user`: the user and group id that it runs as, if not our own.
    pub fn start(
        script: &str,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        user: Option<u32>,
    ) -> io::Result<Self> {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!(
                "trap '' INT TERM HUP; if read -r done; then exit 0; fi; {script}"
            ))
            .arg("watcher")
            .args(args)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let mut shell = command.spawn()?;
        Ok(Self {
            pipe: shell.stdin.take(),
            shell,
        })
    }

    /// Forgets the thing: it is gone already, and its id may soon belong to something else.
    pub fn disarm(mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(b"done\n");
        }
        // Drop waits for the shell to end.
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.shell.wait();
    }
}
