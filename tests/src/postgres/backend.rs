//! Where servers come from.
//!
//! [`VARIABLE`] settles it: `docker`, `docker:IMAGE`, `local` (the newest found) or `local:/path/to/bin`. Without it:
//! Docker, where an engine answers and has the image or can pull it, and else the newest local programs. Where
//! neither is to be had, tests fail; they never pass because there was nothing to test against.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use tokio::sync::OnceCell;

use super::docker;

/// The environment variable that chooses.
pub const VARIABLE: &str = "ANABRANCH_TEST_POSTGRES";

/// The image that is used where no other is named: the official one.
pub const IMAGE: &str = "postgres:17";

/// The oldest major version that the streamer takes.
const MAJOR_MIN: u32 = 15;

/// Where servers come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A container per server.
    Docker {
        /// With its tag; one that behaves like the official image.
        image: String,
    },
    /// A process of our own per server.
    Local {
        /// The directory of `initdb`, `postgres` and the tools.
        bin: PathBuf,
    },
}

/// The backend of this process, settled and announced by the first call.
pub async fn choose() -> &'static Backend {
    static CHOSEN: OnceCell<Backend> = OnceCell::const_new();
    CHOSEN
        .get_or_init(|| async {
            let wanted = std::env::var(VARIABLE).unwrap_or_default();
            let (backend, reason) = resolve(&wanted).await.unwrap_or_else(|error| {
                let refusal = format!("no Postgres to test against: {error}");
                crate::announce(&refusal);
                panic!("{refusal}");
            });
            let from = match &backend {
                Backend::Docker { image } => format!("image {image} in Docker"),
                Backend::Local { bin } => format!("{} in {}", version(bin), bin.display()),
            };
            crate::announce(&format!("Postgres for tests: {from} ({reason})"));
            backend
        })
        .await
}

/// What `wanted`, the content of [`VARIABLE`], leads to, and why; or what is missing.
pub async fn resolve(wanted: &str) -> Result<(Backend, String), String> {
    let asked_for = format!("{VARIABLE}={wanted}");
    match wanted.split_once(':').unwrap_or((wanted, "")) {
        ("", "") => {
            let docker = match docker(IMAGE).await {
                Ok(backend) => return Ok((backend, "an engine answers".into())),
                Err(error) => error,
            };
            match newest_local() {
                Ok(bin) => Ok((Backend::Local { bin }, docker)),
                Err(local) => Err(format!(
                    "{docker}, and {local}. Install Docker, or a Postgres server of version {MAJOR_MIN} or later \
                     (Debian: apt install postgresql postgresql-contrib), or name its directory: \
                     {VARIABLE}=local:/path/to/bin"
                )),
            }
        }
        ("docker", image) => {
            let image = if image.is_empty() { IMAGE } else { image };
            Ok((docker(image).await?, asked_for))
        }
        ("local", "") => {
            let bin = newest_local()?;
            Ok((Backend::Local { bin }, asked_for))
        }
        ("local", bin) => {
            let bin = PathBuf::from(bin);
            if !is_complete(&bin) {
                return Err(format!("{} holds no initdb and postgres", bin.display()));
            }
            is_new_enough(&bin, &version(&bin))?;
            Ok((Backend::Local { bin }, asked_for))
        }
        _ => Err(format!(
            "{asked_for} is none of docker, docker:IMAGE, local, local:/path/to/bin"
        )),
    }
}

async fn docker(image: &str) -> Result<Backend, String> {
    docker::can_run(image).await?;
    Ok(Backend::Docker {
        image: image.into(),
    })
}

/// The directory of the newest complete set of programs, where packagers put them; or why there is none.
fn newest_local() -> Result<PathBuf, String> {
    let listed = |dir: &str, bin: &str| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().join(bin)).collect()
    };
    let mut found = listed("/usr/lib/postgresql", "bin");
    // `/usr/pgsql-17/bin`, and Homebrew's `postgresql@17`.
    found.extend(listed("/usr", "bin"));
    found.extend(listed("/opt/homebrew/opt", "bin"));
    found.extend(listed("/usr/local/opt", "bin"));
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        found.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    let newest = found
        .into_iter()
        .filter(|bin| is_complete(bin))
        .max_by_key(|bin| major(&version(bin)))
        .ok_or("there are no local server programs (initdb, postgres)")?;
    is_new_enough(&newest, &version(&newest))?;
    Ok(newest)
}

/// What is said of programs that are too old for any test to mean something.
fn is_new_enough(bin: &Path, version: &str) -> Result<(), String> {
    if major(version) < MAJOR_MIN {
        return Err(format!(
            "{} holds {version}, and {MAJOR_MIN} or later is needed",
            bin.display()
        ));
    }
    Ok(())
}

/// The major version in what `postgres --version` says; 0 if there is none in it.
fn major(version: &str) -> u32 {
    let number = version.rsplit(' ').find_map(|word| {
        let digits: String = word.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    number.unwrap_or(0)
}

fn is_complete(bin: &Path) -> bool {
    ["initdb", "postgres", "pg_ctl"]
        .iter()
        .all(|program| bin.join(program).is_file())
}

/// As `postgres --version` says it: `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn version(bin: &Path) -> String {
    let output = Command::new(bin.join("postgres")).arg("--version").output();
    let said = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let said = said.unwrap_or_else(|error| error.to_string());
    match said.split_once(" (Debian") {
        Some((short, _)) => short.into(),
        None => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_too_old_is_refused_with_its_version() {
        for (version, major_version) in [
            ("postgres (PostgreSQL) 9.6.24", 9),
            ("postgres (PostgreSQL) 14.13", 14),
            ("postgres (PostgreSQL) 15.18", 15),
            ("postgres (PostgreSQL) 18beta1", 18),
        ] {
            assert_eq!(major(version), major_version);
            let refused = is_new_enough(Path::new("/a/bin"), version);
            assert_eq!(refused.is_err(), major_version < 15, "{version}");
            if let Err(words) = refused {
                assert_eq!(
                    words,
                    format!("/a/bin holds {version}, and 15 or later is needed")
                );
            }
        }
    }
}
