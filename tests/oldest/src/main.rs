//! `anabranch-oldest FILE`: runs statements from stdin, each ended by a NUL, one after the other. Writes for each a NUL, after the
//! error if there was one.

use std::io::{BufRead, Write, stdin, stdout};

use rusqlite::Connection;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args_os().nth(1).ok_or("give the file")?;
    let connection = Connection::open(&file)?;
    // rusqlite's own default is not SQLite's.
    connection.busy_timeout(std::time::Duration::ZERO)?;
    let mut output = stdout().lock();
    for statement in stdin().lock().split(0) {
        let statement = String::from_utf8(statement?)?;
        if let Err(error) = run(&connection, &statement) {
            write!(output, "{error}")?;
        }
        output.write_all(&[0])?;
        output.flush()?;
    }
    Ok(())
}

fn run(connection: &Connection, statement: &str) -> rusqlite::Result<()> {
    let mut statement = connection.prepare(statement)?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(())
}
