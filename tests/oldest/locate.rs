//! The program with the oldest SQLite, for tests of more than one crate: each includes this file.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Its version, as `sqlite_version()` says.
pub const VERSION: &str = "3.37.0";

/// Where it is. Built once per run, beside what this program itself was built into.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // `target/PROFILE/deps/TEST`, or with a triple before the profile.
        let current = std::env::current_exe().expect("a program knows where it is");
        let profile = current.ancestors().nth(2).expect("cargo's folders");
        let target = profile.parent().expect("a target directory").join("oldest");
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oldest"))
            .args(["build", "--quiet", "--locked", "--target-dir"])
            .arg(&target)
            .output()
            .expect("run cargo");
        assert!(
            output.status.success(),
            "building the program with SQLite {VERSION} failed:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        target.join("debug/anabranch-oldest")
    })
}
