//! Who is no longer let in although a token or certificate says so: a file with a line each,
//!
//! ```text
//! # lost on 3 March
//! sub edge-7
//! jti 5c2a6e1b-6f0e-4f0e-9d62-0a8f0b1c2d3e
//! ```
//!
//! `sub` also stands for the name in a certificate. The file is looked at every second, and read again when it changed. While
//! it can't be read, what it said last goes on to count, and that is said; a line that is not understood makes the whole file so.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use super::{Error, Principal};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A hundred thousand lines or so. Who has more to revoke has tokens that live too long.
pub const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// What the page tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Lines that count.
    pub entries: usize,
    /// Why the file can't be read now.
    pub error: Option<String>,
}

/// The list.
pub(super) struct Revoked {
    path: Option<PathBuf>,
    list: RwLock<Arc<List>>,
    /// What the file was when it was last read, and what came of it.
    seen: Mutex<(Option<Look>, Option<String>)>,
    changes: Arc<watch::Sender<u64>>,
}

/// Tells one content of a file from another: inode, length, time of the last change in nanoseconds.
type Look = (u64, u64, i64, i64);

#[derive(Debug, Default, PartialEq, Eq)]
struct List {
    subjects: HashSet<String>,
    tokens: HashSet<String>,
}

impl Revoked {
    /// Reads the file, if there is to be one.
    pub fn read(path: Option<&Path>, changes: &Arc<watch::Sender<u64>>) -> Result<Revoked, Error> {
        let (look, list) = match path {
            None => (None, List::default()),
            Some(path) => {
                let look = look(path);
                let list = read(path).map_err(Error::Revoked)?;
                (look.ok(), list)
            }
        };
        Ok(Revoked {
            path: path.map(Path::to_owned),
            list: RwLock::new(Arc::new(list)),
            seen: Mutex::new((look, None)),
            changes: changes.clone(),
        })
    }

    /// Whether somebody, or his token, is in it.
    pub fn has(&self, principal: &Principal) -> bool {
        let list = self.list();
        let is_subject = |name: &str| list.subjects.contains(name);
        let token = principal.claims.get("jti").and_then(Value::as_str);
        principal.subject.as_deref().is_some_and(is_subject)
            || principal.certificate.as_deref().is_some_and(is_subject)
            || token.is_some_and(|token| list.tokens.contains(token))
    }

    /// Reads the file again when it changes, for ever.
    pub async fn keep(&self) {
        let Some(path) = &self.path else {
            return std::future::pending().await;
        };
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            // A file is looked at in an instant, and read when somebody changed it.
            tokio::task::block_in_place(|| self.look(path));
        }
    }

    fn look(&self, path: &Path) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = look(path);
        let failed = match (&now, &seen.0) {
            (Ok(now), Some(then)) if now == then => return,
            (Ok(_), _) => match read(path) {
                Ok(list) => {
                    self.take(list);
                    None
                }
                Err(reason) => Some(reason),
            },
            (Err(error), _) => Some(format!("{}: {error}", path.display())),
        };
        if failed.is_some() && failed != seen.1 {
            tracing::error!(
                reason = failed,
                "auth.revoked_file can't be read; what it said last counts on"
            );
        }
        *seen = (now.ok(), failed);
    }

    fn take(&self, list: List) {
        let entries = list.subjects.len() + list.tokens.len();
        tracing::info!(entries, "auth.revoked_file was read again");
        *self.list.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(list);
        self.changes.send_modify(|count| *count += 1);
    }

    fn list(&self) -> Arc<List> {
        self.list
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// `None`: there is to be no file.
    pub fn report(&self) -> Option<Report> {
        self.path.as_ref()?;
        let list = self.list();
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Report {
            entries: list.subjects.len() + list.tokens.len(),
            error: seen.1.clone(),
        })
    }
}

fn look(path: &Path) -> io::Result<Look> {
    let file = fs::metadata(path)?;
    Ok((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

fn read(path: &Path) -> Result<List, String> {
    let said = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
    let length = fs::metadata(path).map_err(|error| said(&error))?.len();
    if length > FILE_BYTES_MAX {
        return Err(said(&"is larger than 8 MiB"));
    }
    let text = fs::read_to_string(path).map_err(|error| said(&error))?;
    List::parse(&text).map_err(|line| {
        said(&format_args!(
            "line {line} is neither `sub SUBJECT` nor `jti ID`, nor a comment (#)"
        ))
    })
}

impl List {
    /// An error is the number of the line.
    fn parse(text: &str) -> Result<List, usize> {
        let mut list = List::default();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line.split_once(' ').map(|(kind, of)| (kind, of.trim())) {
                Some(("sub", subject)) => list.subjects.insert(subject.to_owned()),
                Some(("jti", id)) => list.tokens.insert(id.to_owned()),
                _ => return Err(i + 1),
            };
        }
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_misspelled_revokes_nobody_and_is_named() {
        let list = List::parse("# all of them\n\nsub edge 7 \n  jti x\n").unwrap();
        assert!(list.subjects.contains("edge 7") && list.tokens.contains("x"));
        for wrong in ["sub a\nedge-7", "sub a\nsubject b", "sub a\nsub"] {
            assert_eq!(List::parse(wrong), Err(2), "{wrong}");
        }
    }

    #[test]
    fn a_file_that_goes_lets_everybody_in_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "sub a\n").unwrap();
        let changes = Arc::new(watch::Sender::new(0));
        let revoked = Revoked::read(Some(file.path()), &changes).unwrap();
        let is_revoked = |name: &str| {
            let claims = serde_json::Map::from_iter([("sub".to_owned(), name.into())]);
            revoked.has(&super::super::principal(
                claims,
                None,
                super::super::Proof::Token,
            ))
        };
        assert!(is_revoked("a") && !is_revoked("b"));
        fs::write(file.path(), "sub a\nsub b\n").unwrap();
        revoked.look(file.path());
        assert!(is_revoked("a") && is_revoked("b"));
        assert_eq!(*changes.borrow(), 1);
        for broken in [Some("sub a\nwhat is this\n"), None] {
            match broken {
                Some(text) => fs::write(file.path(), text).unwrap(),
                None => fs::remove_file(file.path()).unwrap(),
            }
            revoked.look(file.path());
            assert!(is_revoked("a") && is_revoked("b"));
            assert!(revoked.report().unwrap().error.is_some());
        }
        fs::write(file.path(), "").unwrap();
        revoked.look(file.path());
        assert!(!is_revoked("a") && !is_revoked("b"));
        assert_eq!(revoked.report().unwrap(), Report::default());
    }
}
