//! SQLites that run what they are told, one statement after the other.

use std::{
    io::{BufRead, BufReader, Read, Write, pipe},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
};

use rusqlite::Connection;

#[path = "../../../oldest/locate.rs"]
mod oldest;

/// Whose SQLite it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Ours, in this process, which is not the replica's.
    Bundled,
    /// The `sqlite3` program.
    Shell,
    /// Python's module.
    Python,
    /// The oldest that may be.
    Oldest,
}

pub const ENGINES: [Engine; 4] = [
    Engine::Bundled,
    Engine::Shell,
    Engine::Python,
    Engine::Oldest,
];

/// Reads statements that end with a NUL, as `anabranch-oldest` does.
const PYTHON: &str = r"
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
statement = b''
while byte := sys.stdin.buffer.read1(1):
    if byte != b'\0':
        statement += byte
        continue
    try:
        db.execute(statement.decode()).fetchall()
    except sqlite3.Error as error:
        sys.stdout.write(str(error))
    sys.stdout.write('\0')
    sys.stdout.flush()
    statement = b''
";

/// What the `sqlite3` program prints when a statement is done.
const DONE: &str = "-- done --";

/// An open file.
pub enum Sql {
    Here(Connection),
    There {
        child: Child,
        input: ChildStdin,
        output: BufReader<Box<dyn Read + Send>>,
        is_shell: bool,
    },
}

impl Engine {
    pub fn open(self, file: &Path) -> Sql {
        let mut command = match self {
            Engine::Bundled => return Sql::Here(Connection::open(file).unwrap()),
            Engine::Shell => Command::new("sqlite3"),
            Engine::Python => Command::new("python3"),
            Engine::Oldest => Command::new(oldest::program()),
        };
        match self {
            Engine::Shell => command.arg("-batch"),
            Engine::Python => command.args(["-c", PYTHON]),
            Engine::Bundled | Engine::Oldest => &mut command,
        };
        // Errors in between what is printed.
        let (output, errors) = pipe().unwrap();
        let mut child = command
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(errors.try_clone().unwrap())
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("this test needs {command:?}: {error}"));
        // It has the other end of the pipe.
        drop(command);
        Sql::There {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(Box::new(output)),
            child,
            is_shell: self == Engine::Shell,
        }
    }
}

impl Sql {
    /// Runs one statement.
    pub fn run(&mut self, statement: &str) -> Result<(), String> {
        let (input, output) = match self {
            Sql::Here(connection) => {
                return connection
                    .execute_batch(statement)
                    .map_err(|error| error.to_string());
            }
            Sql::There {
                input,
                output,
                is_shell: true,
                ..
            } => {
                writeln!(input, "{statement};\n.print '{DONE}'").unwrap();
                return until_done(output);
            }
            Sql::There { input, output, .. } => (input, output),
        };
        input.write_all(statement.as_bytes()).unwrap();
        input.write_all(&[0]).unwrap();
        input.flush().unwrap();
        let mut error = Vec::new();
        output.read_until(0, &mut error).unwrap();
        assert_eq!(error.pop(), Some(0), "it ended: {error:?}");
        match error.is_empty() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&error).into_owned()),
        }
    }
}

/// Reads what the `sqlite3` program prints.
fn until_done(output: &mut impl BufRead) -> Result<(), String> {
    let mut error = String::new();
    loop {
        let mut line = String::new();
        assert!(output.read_line(&mut line).unwrap() > 0, "it ended");
        if line.trim_end() == DONE {
            break;
        }
        // A PRAGMA answers.
        if line.contains("rror") {
            error.push_str(&line);
        }
    }
    match error.is_empty() {
        true => Ok(()),
        false => Err(error),
    }
}

impl Drop for Sql {
    fn drop(&mut self) {
        if let Sql::There { child, .. } = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
