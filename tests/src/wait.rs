//! Waiting for conditions.

use std::{
    fmt,
    panic::Location,
    time::{Duration, Instant},
};

/// How long a test waits for something that should be there in a moment. Generous, since a busy machine is no failure.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Time between two looks. A look is cheap, and a test that waits for 1,000 things must not wait long for each.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What a look gives: the awaited, or what was seen instead.
pub trait Look {
    /// What was waited for.
    type Seen;
    /// `Err`: not yet; for a person, what there was instead.
    fn seen(self) -> Result<Self::Seen, String>;
}

impl Look for bool {
    type Seen = ();
    fn seen(self) -> Result<(), String> {
        self.then_some(()).ok_or_else(|| "false".into())
    }
}

impl<T> Look for Option<T> {
    type Seen = T;
    fn seen(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing".into())
    }
}

impl<T, E: fmt::Debug> Look for Result<T, E> {
    type Seen = T;
    fn seen(self) -> Result<T, String> {
        self.map_err(|error| format!("{error:?}"))
    }
}

/// Looks until it sees what it waits for. Panics, with what it saw last, when `deadline` is over: also when a look
/// itself hangs.
///
/// ```no_run
/// # async fn test(replica: anabranch_tests::peers::Replica) {
/// use anabranch_tests::wait::{until, DEADLINE};
/// until("the replica is ready", DEADLINE, || async { replica.get("/readyz").await?.ok() }).await;
/// # }
/// ```
#[track_caller]
pub fn until<L: Look, F: Future<Output = L>, M: FnMut() -> F>(
    what: &str,
    deadline: Duration,
    mut look: M,
) -> impl Future<Output = L::Seen> + use<L, F, M> {
    let caller = Location::caller();
    let what = what.to_owned();
    async move {
        let start = Instant::now();
        let mut last = "nothing: it never came to an end".to_owned();
        loop {
            let left = deadline.saturating_sub(start.elapsed());
            match tokio::time::timeout(left, look()).await.map(Look::seen) {
                Ok(Ok(seen)) => return seen,
                Ok(Err(instead)) => last = instead,
                Err(_) => {}
            }
            if start.elapsed() >= deadline {
                panic!(
                    "{caller}: waited {deadline:?} in vain until {what}; the last look saw: {last}"
                );
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
