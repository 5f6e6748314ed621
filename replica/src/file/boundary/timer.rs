//! A timer for pauses below a millisecond, to which the runtime's timers round up, and then some.

use std::{os::fd::OwnedFd, time::Duration};

use rustix::{
    io::{Errno, retry_on_intr},
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};
use tokio::io::unix::AsyncFd;

use super::super::Error;

/// Rings once each time it is set.
pub struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    /// One that does not ring until it is set. Needs a tokio runtime with I/O enabled.
    pub fn new() -> Result<Timer, Error> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(failed)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for descriptors that do not own themselves; an OwnedFd does"
        )]
        let timer = AsyncFd::new(timer).map_err(|error| failed(&error))?;
        Ok(Timer(timer))
    }

    /// It rings after this time, and not at an earlier one that it was set to.
    pub fn set(&self, after: Duration) -> Result<(), Error> {
        let nothing = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Zero would be never.
        let after = after.max(Duration::from_nanos(1));
        let time = Itimerspec {
            it_interval: nothing,
            it_value: Timespec {
                tv_sec: after.as_secs() as i64,
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &time).map_err(failed)?;
        Ok(())
    }

    /// Returns when it has rung. Dropping it loses nothing.
    pub async fn rings(&self) -> Result<(), Error> {
        loop {
            let mut ready = self.0.readable().await.map_err(|error| failed(&error))?;
            let read = retry_on_intr(|| rustix::io::read(self.0.get_ref(), &mut [0; 8]));
            // Also where it has rung: the next ring is then told by the runtime, behind what else is ready.
            ready.clear_ready();
            match read {
                Ok(_) => return Ok(()),
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Transient(format!("a timer: {error}"))
}
