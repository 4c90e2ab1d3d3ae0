// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The options of the sandbox: of both devices, with virtiofsd's names and meaning.

use clap::{Args, ValueEnum};

use vhost_user_dax::sandbox::{ModCaps, SandboxMode, SandboxOptions, SeccompMode};

#[derive(Clone, Copy, ValueEnum)]
enum Sandbox {
    Namespace,
    Chroot,
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum Seccomp {
    Kill,
    Log,
    Trap,
    None,
}

/// What the process that serves the guest is left with.
#[derive(Args)]
pub struct SandboxArgs {
    /// What hides the host's file tree from the process that serves the guest: namespaces (in a
    /// user namespace, if the daemon is not root), chroot (root only; no window), or nothing.
    /// Unless set: namespace, where the host permits it
    #[arg(long, value_name = "MODE", ignore_case = true, help_heading = "Sandbox")]
    sandbox: Option<Sandbox>,

    /// What a system call does that the daemon has no use for
    #[arg(
        long,
        value_name = "ACTION",
        default_value = "kill",
        ignore_case = true,
        help_heading = "Sandbox"
    )]
    seccomp: Seccomp,

    /// Capabilities that are kept in addition (+), or not (-), for example '+sys_admin:-mknod'
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
