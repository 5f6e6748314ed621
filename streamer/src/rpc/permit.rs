//! What lets a call go on: somebody who was let in, may still be, and may show a newer token meanwhile.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::sync::Notify;
use tonic::Status;

use crate::auth::{Principal, Refused, Shown, Verifier};

/// Tokens are renewed once in this time at most; what comes sooner waits. Each costs the check of a signature.
const RENEW_EVERY: Duration = Duration::from_millis(500);

/// The clock may jump: it is looked at so often instead of trusting one long wait.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Who makes a call.
pub(super) struct Permit {
    verifier: Arc<Verifier>,
    principal: Mutex<Arc<Principal>>,
    /// Told that there is a newer one.
    renewed: Notify,
    renewing: tokio::sync::Mutex<()>,
}

impl Permit {
    /// Of somebody who was just let in.
    pub fn new(verifier: Arc<Verifier>, principal: Principal) -> Permit {
        Permit {
            verifier,
            principal: Mutex::new(Arc::new(principal)),
            renewed: Notify::new(),
            renewing: tokio::sync::Mutex::default(),
        }
    }

    /// Until it expires, its key is no longer published, or it is revoked.
    pub async fn lost(&self) -> Status {
        let mut changes = self.verifier.changes();
        loop {
            changes.mark_unchanged();
            let principal = self.principal();
            if let Err(refused) = self.verifier.holds(&principal) {
                return Status::unauthenticated(refused.to_string());
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = self.renewed.notified() => {}
                () = look(principal.expires) => {}
            }
        }
    }

    /// A newer token came. An error ends the call.
    pub async fn renew(&self, token: &str) -> Result<(), Status> {
        let _one = self.renewing.lock().await;
        tokio::time::sleep(RENEW_EVERY).await;
        let current = self.principal();
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
        *self.lock() = Arc::new(renewed);
        self.renewed.notify_one();
        Ok(())
    }

    fn principal(&self) -> Arc<Principal> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Principal>> {
        self.principal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
