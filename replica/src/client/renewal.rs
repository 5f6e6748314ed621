//! The token of a connection: a newer one in its file takes its place while the stream goes on.
//!
//! The streamer is told by a message, and answers nothing: if the token is not good, the stream ends when the old one does, and
//! the next attempt hears why. So the stream goes on with the one that the streamer last took for good, whatever becomes of the file.

use std::{convert::Infallible, sync::Arc};

use anabranch_proto::v1;
use tokio::sync::{mpsc, watch};
use tonic::{Request, metadata::MetadataValue};

use super::Failure;
use crate::config::{Config, Secret, Token};

/// The token as it is now. `None`: the certificate tells who we are.
pub(super) struct Access(watch::Sender<Option<Secret>>);

impl Access {
    /// Reads it.
    pub fn read(token: &Token) -> Result<Access, Failure> {
        let token = token
            .read()
            .map_err(|error| Failure::slow("token", error.to_string()))?;
        Ok(Access(watch::Sender::new(token)))
    }

    /// The token as it is now.
    pub fn token(&self) -> Option<Secret> {
        self.0.borrow().clone()
    }

    /// Tells when there is a newer one.
    pub fn newer(&self) -> watch::Receiver<Option<Secret>> {
        self.0.subscribe()
    }

    /// Puts it into a call.
    pub fn authorize<T>(&self, request: &mut Request<T>) -> Result<(), Failure> {
        let Some(token) = self.token() else {
            return Ok(());
        };
        let mut authorization = MetadataValue::try_from(format!("Bearer {}", token.reveal()))
            .map_err(|_| Failure::slow("token", "the token can't travel as a header field"))?;
        authorization.set_sensitive(true);
        request
            .metadata_mut()
            .insert("authorization", authorization);
        Ok(())
    }

    /// Looks at the file, and says a newer token to the stream.
    pub async fn renew(&self, config: &Arc<Config>, up: mpsc::Sender<v1::Up>) -> Infallible {
        if !matches!(config.token, Token::File(_)) {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(config.timing.token_poll).await;
            let looked = config.clone();
            // A file may be on a disk that does not answer.
            let read = tokio::task::spawn_blocking(move || looked.token.read()).await;
            let newer = match read {
                // While it is gone, or half written, there is no newer one.
                Ok(Err(_)) | Err(_) => continue,
                Ok(Ok(newer)) if newer == self.token() => continue,
                Ok(Ok(newer)) => newer,
            };
            let Some(token) = &newer else { continue };
            let renew = v1::Renew {
                token: token.reveal().to_owned(),
            };
            let kind = Some(v1::up::Kind::Renew(renew));
            if up.send(v1::Up { kind }).await.is_err() {
                // The stream has ended: the reader hears why.
                return std::future::pending().await;
            }
            tracing::info!("the token file has a newer token: the stream goes on with it");
            self.0.send_replace(newer);
        }
    }
}
