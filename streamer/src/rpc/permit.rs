//! What lets a call go on: somebody who was let in, may still be, and may show a newer token meanwhile.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::{Mutex, watch};
use tonic::Status;

use crate::auth::{Principal, Refused, Shown, Verifier};

/// Tokens are renewed once in this time at most; what comes sooner waits. Each costs the check of a signature.
const RENEW_EVERY: Duration = Duration::from_millis(500);

/// The clock may jump: it is looked at so often instead of trusting one long wait.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Who makes a call.
pub(super) struct Permit {
    verifier: Arc<Verifier>,
    principal: watch::Sender<Arc<Principal>>,
    renewing: Mutex<()>,
}

impl Permit {
    /// Of somebody who was just let in.
    pub fn new(verifier: Arc<Verifier>, principal: Principal) -> Permit {
        Permit {
            verifier,
            principal: watch::Sender::new(Arc::new(principal)),
            renewing: Mutex::default(),
        }
    }

    /// Until it expires, its key is no longer published, or it is revoked.
    pub async fn lost(&self) -> Status {
        let mut changes = self.verifier.changes();
        let mut renewed = self.principal.subscribe();
        loop {
            changes.mark_unchanged();
            let principal = renewed.borrow_and_update().clone();
            if let Err(refused) = self.verifier.holds(&principal) {
                return Status::unauthenticated(refused.to_string());
            }
            tokio::select! {
                _ = changes.changed() => {}
                _ = renewed.changed() => {}
                () = look(principal.expires) => {}
            }
        }
    }

    /// A newer token came. An error ends the call.
    pub async fn renew(&self, token: &str) -> Result<(), Status> {
        let _one = self.renewing.lock().await;
        tokio::time::sleep(RENEW_EVERY).await;
        let current = self.principal.borrow().clone();
        let authorization = format!("Bearer {token}");
        let shown = Shown {
            authorization: Some(&authorization),
            certificate: None,
        };
        let mut renewed = match self.verifier.admit_late(shown).await {
            Ok(renewed) => renewed,
            Err(refused) => {
                tracing::warn!(
                    subject = current.subject,
                    %refused,
                    "a newer token is refused; the call goes on until the one that it has ends"
                );
                return Ok(());
            }
        };
        renewed.certificate = current.certificate.clone();
        if !renewed.is_same(&current) {
            return Err(Status::aborted(
                "the newer token has other claims; connect again with it",
            ));
        }
        self.principal.send_replace(Arc::new(renewed));
        Ok(())
    }
}

/// Until a principal expires, or for a while.
async fn look(expires: Option<SystemTime>) {
    let Some(expires) = expires else {
        return std::future::pending().await;
    };
    let left = expires.duration_since(SystemTime::now());
    let left = left.unwrap_or_default().min(LOOK_EVERY);
    tokio::time::sleep(left + Duration::from_millis(1)).await;
}

/// As a status.
pub(super) fn unauthenticated(refused: Refused) -> Status {
    Status::unauthenticated(refused.to_string())
}
