// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sandbox options of both devices, with virtiofsd's names and meanings.

use clap::{Args, ValueEnum};

use vhost_user_dax::sandbox::{ModCaps, SandboxMode, SandboxOptions, SeccompMode};

#[derive(Clone, Copy, ValueEnum)]
enum Sandbox {
    /// Mount, PID, network, IPC and UTS namespaces; a root directory with nothing but the share
    Namespace,
    /// The share as root directory; for root only, and without a window
    Chroot,
    /// The host's file tree, restricted by Landlock where the kernel has it
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum Seccomp {
    /// Ends the process; the daemon logs the call and exits with code 1
    Kill,
    /// Carries the call out; the kernel logs it
    Log,
    /// Ends the process with a core dump
    Trap,
    /// No filter
    None,
}

/// Restrictions of the process that serves the guest.
#[derive(Args)]
pub struct SandboxArgs {
    /// Restriction of what the process that serves the guest sees of the host
    ///
    /// By default it is 'namespace', in a user namespace if the daemon does not run as root. If the
    /// host permits no namespaces, the default is 'none', and the log has a line that says why. An
    /// option 'namespace' on the command line is refused there. SECURITY.md lists what each process
    /// is left with.
    #[arg(long, value_name = "MODE", ignore_case = true, help_heading = "Sandbox")]
    sandbox: Option<Sandbox>,

    /// Reaction to a system call that the daemon does not need
    ///
    /// A filter lists the system calls that the daemon needs. A call that is not in the list is the
    /// sign of an attack, or of a fault of the list.
    #[arg(
        long,
        value_name = "ACTION",
        default_value = "kill",
        ignore_case = true,
        help_heading = "Sandbox"
    )]
    seccomp: Seccomp,

    /// Capabilities to add to (+) or to remove from (-) those of the process that serves the guest
    ///
    /// A list of names, separated by colons, each with a sign: '+sys_admin:-mknod'. Without
    /// SYS_ADMIN extended attributes 'trusted.*' and 'security.*' are refused.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true, help_heading = "Sandbox")]
    modcaps: Option<ModCaps>,
}

impl From<&SandboxArgs> for SandboxOptions {
    fn from(args: &SandboxArgs) -> Self {
        Self {
            mode: args.sandbox.map(|mode| match mode {
                Sandbox::Namespace => SandboxMode::Namespace,
                Sandbox::Chroot => SandboxMode::Chroot,
                Sandbox::None => SandboxMode::None,
            }),
            seccomp: match args.seccomp {
                Seccomp::Kill => SeccompMode::Kill,
                Seccomp::Log => SeccompMode::Log,
                Seccomp::Trap => SeccompMode::Trap,
                Seccomp::None => SeccompMode::None,
            },
            modcaps: args.modcaps.unwrap_or_default(),
        }
    }
}
