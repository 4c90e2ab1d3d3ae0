// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The parent process: it stays in the host's namespaces, hands signals on to the worker, waits for
//! its end, says what ended it, and cleans up behind it. It hears of nothing that a guest does.

use std::process;

use log::{error, warn};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::seccomp::LastCall;
use super::tables::name_of;

/// The exit code where the worker was ended by a signal.
const FAILURE: i32 = 1;

/// A process that is beside the worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Helper {
    pub(super) pid: Pid,
    pub(super) last_call: LastCall,
}

/// Signals that are handed on to the worker, which knows what they mean.
const HANDED_ON: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Blocks the signals that [`supervise`] waits for. To be called before the worker is forked.
///
/// # Errors
/// The system's.
pub(super) fn block() -> nix::Result<SigSet> {
    let mut signals: SigSet = HANDED_ON.into_iter().collect();
    signals.thread_block()?;
    // The worker has no use for it, and it is harmless there.
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    Ok(signals)
}

/// Waits until the worker has ended, and ends this process as the worker did.
pub(super) fn supervise(
    signals: &SigSet,
    worker: Pid,
    last_call: LastCall,
    helper: Option<Helper>,
    clean_up: &dyn Fn(),
) -> ! {
    let code = loop {
        if let Some(code) = reap(worker, last_call, helper) {
            break code;
        }
        match signals.wait() {
            Ok(Signal::SIGCHLD) | Err(_) => {}
            // ESRCH: it has ended, and is about to be reaped.
            Ok(signal) => drop(kill(worker, signal)),
        }
    };
    clean_up();
    log::logger().flush();
    process::exit(code)
}

/// The exit code, once the worker has ended.
fn reap(worker: Pid, last_call: LastCall, helper: Option<Helper>) -> Option<i32> {
    loop {
        match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == worker => {
                // Where a tracer keeps the kernel from ending it, it ends by itself.
                if last_call.number().is_some() {
                    error!("{}", ended("worker", Signal::SIGSYS, last_call));
                }
                return Some(code);
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == worker => {
                error!("{}", ended("worker", signal, last_call));
                return Some(FAILURE);
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) => {
                if let Some(helper) = helper.filter(|helper| helper.pid == pid) {
                    warn!("{}", ended("broker", signal, helper.last_call));
                }
            }
            Ok(WaitStatus::StillAlive) => return None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => {
                error!("the worker is gone: {e}");
                return Some(FAILURE);
            }
        }
    }
}

fn ended(what: &str, signal: Signal, last_call: LastCall) -> String {
    match (signal, last_call.number()) {
        (Signal::SIGSYS, Some(number)) => format!(
            "the {what} process was killed by a forbidden system call: {}; this is a bug, or an \
             attack: report it, see SECURITY.md ('--seccomp log' lets such calls pass)",
            name_of(number)
        ),
        (Signal::SIGSYS, None) => {
            format!(
                "the {what} process was killed by a forbidden system call; the audit log has it"
            )
        }
        (signal, _) => format!("the {what} process was ended by {signal}"),
    }
}
