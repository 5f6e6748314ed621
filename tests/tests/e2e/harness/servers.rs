//! Servers and databases.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use anabranch_tests::{
    peers::Streamer,
    postgres::{Backend, Options, Server, Stop, backend},
    process,
    wait::{DEADLINE, until},
};
use rustix::process::Pid;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpStream,
};

#[tokio::test]
async fn a_database_sees_nothing_of_another() {
    let server = Server::shared().await;
    let (one, two) = (server.database().await, server.database().await);
    one.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    two.execute("CREATE TABLE t (id text PRIMARY KEY)").await;
    one.execute("INSERT INTO t VALUES (1)").await;
    assert!(two.query("SELECT * FROM t", &[]).await.is_empty());
    assert_ne!(one.url(), two.url());
}

#[tokio::test]
async fn a_dropped_database_leaves_no_slot_that_keeps_wal() {
    let server = Server::shared().await;
    let database = server.database().await;
    let name = database.name().to_owned();
    let slot = format!("SELECT pg_create_logical_replication_slot('{name}', 'test_decoding')");
    database.execute(&slot).await;
    let open = database.connect().await;
    drop(database);
    let admin = server.connect("postgres").await;
    until("slot and database are gone", DEADLINE, || async {
        let left = "SELECT slot_name::text FROM pg_replication_slots WHERE slot_name = $1
                    UNION ALL SELECT datname::text FROM pg_database WHERE datname = $1";
        let left = admin.query(left, &[&name]).await.expect("ask");
        left.is_empty()
    })
    .await;
    assert!(open.is_closed());
}

#[tokio::test]
async fn a_restarted_server_keeps_what_was_committed() {
    let server = Server::start(Options::new().set("wal_sender_timeout", "5s")).await;
    let database = server.database().await;
    database
        .execute("CREATE TABLE t (id bigserial PRIMARY KEY, how text)")
        .await;
    let port = server.port();
    for how in [Stop::Fast, Stop::Immediate, Stop::Kill] {
        database
            .execute(&format!("INSERT INTO t (how) VALUES ('{how:?}')"))
            .await;
        server.stop(how).await;
        assert!(database.try_execute("SELECT 1").await.is_err());
        server.start_again().await;
    }
    assert_eq!(server.port(), port);
    let rows = database.query("SELECT how FROM t ORDER BY id", &[]).await;
    let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(rows, ["Fast", "Immediate", "Kill"]);
    let timeout = database.query("SHOW wal_sender_timeout", &[]).await;
    assert_eq!(timeout[0].get::<_, String>(0), "5s");
}

#[tokio::test]
async fn a_server_has_the_settings_that_were_chosen() {
    let options = Options::new().segment_mb(1).set("max_connections", "40");
    let server = Server::start(options).await;
    let database = server.database().await;
    server.alter("wal_sender_timeout", "7s").await;
    server.restart(Stop::Fast).await;
    let rows = database
        .query(
            "SELECT name || '=' || current_setting(name) FROM pg_settings WHERE name IN
               ('wal_level', 'wal_segment_size', 'max_connections', 'wal_sender_timeout') ORDER BY 1",
            &[],
        )
        .await;
    let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        rows,
        [
            "max_connections=40",
            "wal_level=logical",
            "wal_segment_size=1MB",
            "wal_sender_timeout=7s"
        ]
    );
}

#[tokio::test]
async fn a_server_with_tls_and_the_tools_of_postgres() {
    let server = Server::start(Options::new()).await;
    let tls = server.enable_tls().await;
    assert!(tls.pem().starts_with("-----BEGIN CERTIFICATE-----"));
    let database = server.database().await;
    let target = format!("dbname={} sslmode=require", database.name());
    let arguments = [
        "-XAtc",
        "SELECT 'tls is ' || ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
        &target,
    ];
    // A reload takes a moment to reach the postmaster.
    until("connections are encrypted", DEADLINE, || async {
        let said = server.tool("psql", database.name(), &arguments[..2]).await;
        said.starts_with("tls is true").then_some(())
    })
    .await;
    let said = server.tool("psql", database.name(), &arguments).await;
    assert_eq!(said.trim(), "tls is true");
    server
        .tool("pgbench", database.name(), &["-i", "-q", "-s", "1"])
        .await;
    let count = database
        .query("SELECT count(*) FROM pgbench_accounts", &[])
        .await;
    assert_eq!(count[0].get::<_, i64>(0), 100_000);
}

#[tokio::test]
async fn a_wish_that_cannot_be_met_is_refused_and_never_replaced() {
    for (wish, complaint) in [
        ("dokcer", "is none of docker, docker:IMAGE"),
        ("local:/nowhere", "/nowhere holds no initdb and postgres"),
    ] {
        let error = backend::resolve(wish).await.unwrap_err();
        assert!(error.contains(complaint), "{error}");
    }
    if let Backend::Docker { .. } = Server::shared().await.backend() {
        let error = backend::resolve("docker:anabranch-has-no-such-image:1").await;
        let error = error.unwrap_err();
        assert!(error.contains("can't be had"), "{error}");
    }
}

/// Not a test: the process that [`a_killed_test_process_leaves_nothing_behind`] kills.
#[tokio::test]
#[ignore = "another test runs this in a process of its own, and kills that"]
async fn a_process_that_will_be_killed() {
    let server = Server::start(Options::new()).await;
    let database = server.database().await;
    let streamer = Streamer::config(&database).prepare();
    streamer.spawn();
    let pid = streamer.pid().expect("it runs").as_raw_nonzero();
    println!("listens on {}:{} {pid}", server.host(), server.port());
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_killed_test_process_leaves_nothing_behind() {
    let mut command = Command::new(std::env::current_exe().expect("a program knows where it is"));
    command
        .args(["--ignored", "--exact", "--nocapture"])
        .arg("harness::servers::a_process_that_will_be_killed")
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .expect("start a test process");
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    let said = loop {
        let line = tokio::time::timeout(Duration::from_secs(120), lines.next_line()).await;
        let line = line.expect("the server starts in time");
        let line = line.expect("read its output").expect("it says where");
        // The name of the test may stand before it on the line.
        if let Some((_, said)) = line.split_once("listens on ") {
            break said.to_owned();
        }
    };
    let (address, pid) = said.split_once(' ').expect("address and process");
    let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
    let pid = pid.expect("a process id");
    assert!(process::is_alive(pid), "its streamer runs");
    TcpStream::connect(address).await.expect("it listens");
    child.start_kill().expect("kill -9");
    until(
        "nobody listens and nothing runs any more",
        DEADLINE,
        || async { TcpStream::connect(address).await.is_err() && !process::is_alive(pid) },
    )
    .await;
}
