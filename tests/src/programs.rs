//! The programs under test, built once per run.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The directory of `anabranch-streamer` and `anabranch-replica`, built first, in the profile of the running program
/// and where it was built itself: a test in release mode never runs debug programs, or old ones.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let current = std::env::current_exe().expect("a program knows where it is");
        let mut directory = current.parent().expect("it is in a directory");
        // Tests are in `target/PROFILE/deps`, programs in `target/PROFILE`.
        if directory.ends_with("deps") {
            directory = directory.parent().expect("deps is in a directory");
        }
        build(directory);
        directory.to_owned()
    })
}

fn build(directory: &Path) {
    let name = |path: &Path| {
        let name = path.file_name().expect("not the root");
        name.to_str().expect("cargo's names are text").to_owned()
    };
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .args(["build", "--quiet"])
        // With this package too, features are those that the tests were built with, and nothing is built twice.
        .args([
            "-p",
            "anabranch-tests",
            "-p",
            "anabranch-streamer",
            "-p",
            "anabranch-replica",
        ])
        .args(["--bin", "anabranch-streamer", "--bin", "anabranch-replica"]);
    match name(directory).as_str() {
        "debug" => {}
        profile => {
            command.args(["--profile", profile]);
        }
    }
    // `target/PROFILE`, or `target/TRIPLE/PROFILE` where one was named.
    let mut target = directory.parent().expect("a profile is in a directory");
    if !target.join("CACHEDIR.TAG").exists() {
        command.arg("--target").arg(name(target));
        target = target.parent().expect("a triple is in a directory");
    }
    command.arg("--target-dir").arg(target);
    let output = command.output().expect("run cargo");
    assert!(
        output.status.success(),
        "building the programs failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
