// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: options become a configuration, errors become one line on stderr.

mod fs;
mod option_pairs;
#[cfg(test)]
mod options_page;
mod pmem;
mod sandbox;

use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use log::LevelFilter;

use vhost_user_dax::persist::PersistMode;
use vhost_user_dax::session::listener::SocketSpec;
use vhost_user_dax::support::stderr;

pub use fs::FsArgs;
pub use option_pairs::{contradiction, warn_of_idle};
pub use pmem::PmemArgs;

/// Exit code for a bad option.
pub const EXIT_USAGE: u8 = 2;

/// Exit code for all other failures.
pub const EXIT_FAILURE: u8 = 1;

/// Maps host files into virtual machines (vhost-user, virtio-pmem, virtio-fs with a DAX window)
///
/// One daemon process serves one device of one VM. The VM's front-end, which is QEMU 11.1 or newer
/// for a mapped file, connects to the daemon's socket.
#[derive(Parser)]
#[command(version, propagate_version = true, args_override_self = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    Pmem(PmemArgs),
    Fs(Box<FsArgs>),
}

impl Command {
    /// The options of both commands, and the JSON line of `--print-capabilities`.
    pub fn common(&self) -> (&Common, &'static str) {
        match self {
            Self::Pmem(args) => (&args.common, pmem::CAPABILITIES),
            Self::Fs(args) => (&args.common, fs::CAPABILITIES),
        }
    }
}

/// The options of both devices.
#[derive(Args)]
pub struct Common {
    /// Unix socket on which the daemon waits for the front-end (QEMU); required, or --fd
    ///
    /// The daemon replaces a socket file that no process listens on, and refuses one that a process
    /// listens on. The mode of the socket is 0600 regardless of the umask: only the daemon's user
    /// can connect. The directory should be one where other users can't write, such as /run.
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"], conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Group whose members can connect to the socket, too
    ///
    /// The mode of the socket is 0660 then. It is for a QEMU that runs as another user than the
    /// daemon. A process that can connect can do with the share or the file what the daemon can do.
    #[arg(long, value_name = "NAME", conflicts_with = "fd")]
    pub socket_group: Option<String>,

    /// Inherited descriptor of a listening socket, instead of --socket-path
    ///
    /// systemd's socket activation passes the first socket as descriptor 3. The socket keeps the
    /// mode and the owner that its creator gave it.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub fd: Option<RawFd>,

    /// Method by which the guest's stores become durable
    ///
    /// At start the daemon detects on what kind of storage the file or the share lies. It logs one
    /// line with the method, and with what that method guarantees at a power loss.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub persist: Persist,

    #[command(flatten)]
    pub sandbox: sandbox::SandboxArgs,

    /// When a VM has ended, wait for the next one instead of exiting
    ///
    /// One VM is served at a time. A front-end that connects meanwhile waits, and the log has a
    /// line about it. If a front-end can't be served for lack of descriptors or memory, the daemon
    /// tries again.
    #[arg(long)]
    pub keep_listening: bool,

    /// Least severe level of the lines on stderr: off, error, warn, info, debug or trace
    ///
    /// The environment variable RUST_LOG overrides it. With `off` one line is still printed: the
    /// reason for which the daemon ends.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = log_level)]
    pub log_level: LevelFilter,

    /// Print the device type and features as JSON, and exit
    ///
    /// The format is that of QEMU's conventions for back-end programs
    /// (docs/interop/vhost-user.json in QEMU's sources), which libvirt reads. No other option is
    /// needed beside it.
    #[arg(long)]
    pub print_capabilities: bool,
}

fn log_level(text: &str) -> Result<LevelFilter, &'static str> {
    text.parse().map_err(|_| "take off, error, warn, info, debug or trace")
}

impl Common {
    /// None if both --fd and --socket-path are missing; clap has refused such a command line
    /// before.
    pub fn socket(&self) -> Option<SocketSpec> {
        match (self.fd, &self.socket_path) {
            (Some(fd), _) => Some(SocketSpec::Fd(fd)),
            (None, path) => {
                let path = path.clone()?;
                Some(SocketSpec::Path { path, group: self.socket_group.clone() })
            }
        }
    }
}

/// `--persist`
#[derive(Clone, Copy, ValueEnum)]
pub enum Persist {
    /// cache lines on a device-DAX node, fdatasync on everything else
    Auto,
    /// fdatasync, or fsync for an fsync of the guest on a share; refused on a device-DAX node,
    /// which supports neither
    Sync,
    /// the daemon writes CPU cache lines back (CLWB, CLFLUSHOPT or CLFLUSH) and fences; only for
    /// files on a DAX file system, on a device-DAX node or in memory; refused in the page cache of
    /// a disk
    Cacheline,
}

impl From<Persist> for PersistMode {
    fn from(persist: Persist) -> Self {
        match persist {
            Persist::Auto => Self::Auto,
            Persist::Sync => Self::Sync,
            Persist::Cacheline => Self::Cacheline,
        }
    }
}

/// `--mem-slots`
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// a pause works with any number of maps; a reset while a file is mapped ends QEMU
    On,
    /// a reset works; a pause works with at most 8 memory regions in the VM
    Off,
}

/// Parses the arguments. The matches contain which options the command line has.
pub fn parse() -> Result<(Command, ArgMatches), clap::Error> {
    let matches = Cli::command().try_get_matches()?;
    Ok((Cli::from_arg_matches(&matches)?.command, matches))
}

/// Prints one line instead of clap's page. Help and version go to stdout and are no errors.
pub fn usage_error(e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return printed(e.print());
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = e.print();
        return ExitCode::from(EXIT_USAGE);
    }
    let text = e.to_string();
    let what: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let first = std::env::args_os().nth(1).unwrap_or_default();
    let of_command =
        [("pmem", "pmem "), ("fs", "fs ")].into_iter().find(|(name, _)| first == *name);
    let of_command = of_command.map_or("", |(_, word)| word);
    stderr::last_words(&format!("{what} (try 'vhost-user-dax {of_command}--help')"));
    ExitCode::from(EXIT_USAGE)
}

/// Prints a line on stdout that the user has requested.
pub fn print_line(line: &str) -> ExitCode {
    printed(writeln!(io::stdout(), "{line}"))
}

/// Exit code after a write to stdout.
fn printed(written: io::Result<()>) -> ExitCode {
    match written.and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            stderr::last_words(&format!("stdout can't be written: {e}"));
            ExitCode::from(EXIT_FAILURE)
        }
    }
}
