//! A server in a container.
//!
//! testcontainers makes, starts and removes it; the engine's own calls are used for signals and inspection, for which
//! testcontainers has none. Its client belongs to the harness's runtime, so everything here runs there.

use std::{sync::Arc, time::Duration};

use testcontainers::{
    ContainerAsync, ContainerRequest, GenericImage, ImageExt,
    bollard::{
        exec::{CreateExecOptions, StartExecResults},
        query_parameters::{KillContainerOptions, LogsOptionsBuilder},
    },
    core::{IntoContainerPort, client::docker_client_instance},
    runners::AsyncRunner,
};
use tokio_stream::StreamExt;

use super::{Options, PASSWORD, Stop, USER};
use crate::{port, runtime, watcher::Watcher};

/// How long an engine may take to say that it is there.
const ENGINE_ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// How long an image may take to come over the network.
const PULL_MAX: Duration = Duration::from_secs(300);

/// Where the configuration lies in the container. Not the data directory: that is made by the image's entry point.
const CONFIG_FILE: &str = "/etc/anabranch.conf";

/// Removes a container and its volumes, with whatever client there is. Each engine's socket is tried, as the client's
/// default may be another engine than the one that testcontainers found.
const WATCH: &str = r#"
for i in 1 2 3; do
  for client in docker podman; do
    "$client" rm --force --volumes "$1" && exit 0
  done
  for socket in /var/run/docker.sock "$XDG_RUNTIME_DIR/docker.sock" "$HOME/.docker/run/docker.sock" "$HOME/.docker/desktop/docker.sock"; do
    curl --fail --silent --unix-socket "$socket" -X DELETE "http://engine/containers/$1?force=1&v=1" && exit 0
  done
done"#;

#[derive(Debug)]
pub(super) struct Container {
    image: String,
    host: String,
    port: u16,
    container: Arc<ContainerAsync<GenericImage>>,
    // After the container, which removes itself when it can: then the watcher finds nothing to do.
    _watcher: Watcher,
}

/// Whether an engine answers and has `image`, or can get it; else what is wrong.
pub(super) async fn can_run(image: &str) -> Result<(), String> {
    let image = image.to_owned();
    here(async move {
        let engine = docker_client_instance()
            .await
            .map_err(|error| format!("no Docker engine: {error}"))?;
        match tokio::time::timeout(ENGINE_ANSWERS_WITHIN, engine.ping()).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return Err("no Docker engine answers".into()),
        }
        if engine.inspect_image(&image).await.is_ok() {
            return Ok(());
        }
        let pulled = tokio::time::timeout(PULL_MAX, generic(&image).pull_image()).await;
        match pulled {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!(
                "a Docker engine answers, but image {image} can't be had: {error}"
            )),
            Err(_) => Err(format!(
                "a Docker engine answers, but image {image} does not come"
            )),
        }
    })
    .await
}

impl Container {
    pub(super) async fn start(image: &str, options: &Options) -> Self {
        let image = image.to_owned();
        let options = options.clone();
        here(async move { Self::create(image, &options).await }).await
    }

    async fn create(image: String, options: &Options) -> Self {
        let name = format!(
            "anabranch-test-{}-{:08x}",
            std::process::id(),
            rand::random::<u32>()
        );
        let watcher = Watcher::start(WATCH, [&name], None).expect("start a container's watcher");
        let port = port::free();
        let container = ContainerRequest::from(generic(&image))
            .with_container_name(&name)
            .with_mapped_port(port, 5432.tcp())
            .with_env_var("POSTGRES_USER", USER)
            .with_env_var("POSTGRES_PASSWORD", PASSWORD)
            .with_env_var("POSTGRES_INITDB_ARGS", options.initdb_arguments().join(" "))
            .with_copy_to(CONFIG_FILE, options.config_file().into_bytes())
            // Parallel queries and large buffers need more than Docker's 64 MB.
            .with_shm_size(1 << 30)
            .with_cmd(["-c", &format!("config_file={CONFIG_FILE}")])
            .start()
            .await
            .unwrap_or_else(|error| panic!("start a container of {image}: {error}"));
        let host = container.get_host().await.expect("ask for Docker's host");
        // Docker publishes on IPv4 for sure, and `localhost` may be tried as IPv6 first.
        let host = match host.to_string().as_str() {
            "localhost" => "127.0.0.1".to_owned(),
            other => other.to_owned(),
        };
        Self {
            image,
            host,
            port,
            container: Arc::new(container),
            _watcher: watcher,
        }
    }

    pub(super) fn image(&self) -> &str {
        &self.image
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) async fn stop(&self, how: Stop) {
        let signal = match how {
            Stop::Fast => "SIGINT",
            Stop::Immediate => "SIGQUIT",
            // The kernel kills all processes of a container with its first one.
            Stop::Kill => "SIGKILL",
        };
        let container = self.container.clone();
        here(async move {
            let engine = docker_client_instance().await.expect("reach Docker");
            let options = KillContainerOptions {
                signal: signal.into(),
            };
            engine
                .kill_container(container.id(), Some(options))
                .await
                .expect("signal a container");
            while container.is_running().await.expect("ask for a container") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    pub(super) async fn start_again(&self) {
        let container = self.container.clone();
        here(async move { container.start().await })
            .await
            .expect("start a container again");
    }

    pub(super) async fn has_ended(&self) -> bool {
        let container = self.container.clone();
        !here(async move { container.is_running().await })
            .await
            .unwrap_or(false)
    }

    pub(super) async fn log(&self) -> String {
        let container = self.container.clone();
        here(async move {
            let engine = docker_client_instance().await.expect("reach Docker");
            let options = LogsOptionsBuilder::new().stdout(true).stderr(true).build();
            let mut logs = engine.logs(container.id(), Some(options));
            let mut text = String::new();
            while let Some(Ok(part)) = logs.next().await {
                text.push_str(&part.to_string());
            }
            text
        })
        .await
    }

    pub(super) async fn tool(
        &self,
        name: &str,
        database: &str,
        arguments: &[&str],
    ) -> (bool, String) {
        let arguments = std::iter::once(&name).chain(arguments);
        let options = CreateExecOptions {
            cmd: Some(arguments.map(|&argument| argument.to_owned()).collect()),
            env: Some(vec![
                "PGHOST=127.0.0.1".into(),
                format!("PGUSER={USER}"),
                format!("PGPASSWORD={PASSWORD}"),
                format!("PGDATABASE={database}"),
            ]),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..CreateExecOptions::default()
        };
        let container = self.container.clone();
        // Not testcontainers' own `exec`: what it gives can't leave its thread.
        here(async move {
            let engine = docker_client_instance().await.expect("reach Docker");
            let exec = engine
                .create_exec(container.id(), options)
                .await
                .expect("prepare to run in a container");
            let started = engine.start_exec(&exec.id, None).await;
            let mut text = String::new();
            if let StartExecResults::Attached { mut output, .. } =
                started.expect("run in a container")
            {
                while let Some(part) = output.next().await {
                    text.push_str(&part.expect("read what it prints").to_string());
                }
            }
            let ended = engine.inspect_exec(&exec.id).await;
            (ended.expect("ask how it ended").exit_code == Some(0), text)
        })
        .await
    }
}

fn generic(image: &str) -> GenericImage {
    // A colon after the last slash starts the tag; one before it is a registry's port.
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => GenericImage::new(name, tag),
        _ => GenericImage::new(image, "latest"),
    }
}

/// Runs on the harness's runtime.
async fn here<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match runtime().spawn(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
