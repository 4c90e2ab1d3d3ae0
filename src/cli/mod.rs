// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: arguments to settings, errors to one line.

mod fs;
mod option_pairs;
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

/// The exit code for a bad option.
pub const EXIT_USAGE: u8 = 2;

/// The exit code for everything else that fails.
pub const EXIT_FAILURE: u8 = 1;

/// Host files, mapped straight into virtual machines: a vhost-user daemon.
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
    /// The options of both devices, and what `--print-capabilities` prints.
    pub fn common(&self) -> (&Common, &'static str) {
        match self {
            Self::Pmem(args) => (&args.common, pmem::CAPABILITIES),
            Self::Fs(args) => (&args.common, fs::CAPABILITIES),
        }
    }
}

/// How both devices are reached, and how they talk.
#[derive(Args)]
pub struct Common {
    /// Listen on this Unix socket; a dead socket there is replaced. Only this user may connect
    /// (mode 0600)
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"], conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Let this group connect, too (mode 0660)
    #[arg(long, value_name = "NAME", conflicts_with = "fd")]
    pub socket_group: Option<String>,

    /// Listen on this inherited descriptor, as systemd's socket activation passes it (3)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub fd: Option<RawFd>,

    /// What makes the guest's bytes durable: the kernel ('sync'), this daemon by cache lines where
    /// the bytes lie in persistent memory or memory ('cacheline'), or what that asks for ('auto')
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub persist: Persist,

    #[command(flatten)]
    pub sandbox: sandbox::SandboxArgs,

    /// When the VM goes, wait for the next one instead of exiting
    #[arg(long)]
    pub keep_listening: bool,

    /// How much to say on stderr: off, error, warn, info, debug or trace; RUST_LOG overrides it
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = log_level)]
    pub log_level: LevelFilter,

    /// Print what this back-end is, as QEMU's conventions want it (JSON), and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

fn log_level(text: &str) -> Result<LevelFilter, &'static str> {
    text.parse().map_err(|_| "take off, error, warn, info, debug or trace")
}

impl Common {
    /// None if clap has let neither through, which it does not.
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
    Auto,
    Sync,
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

/// A switch that has a default.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

/// The arguments, and which of them the command line names.
pub fn parse() -> Result<(Command, ArgMatches), clap::Error> {
    let matches = Cli::command().try_get_matches()?;
    Ok((Cli::from_arg_matches(&matches)?.command, matches))
}

/// One line, not clap's usual page; help and version are not errors.
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

/// Prints what was asked for on stdout.
pub fn print_line(line: &str) -> ExitCode {
    printed(writeln!(io::stdout(), "{line}"))
}

/// The exit code of what goes to stdout.
fn printed(written: io::Result<()>) -> ExitCode {
    match written.and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            stderr::last_words(&format!("stdout can't be written: {e}"));
            ExitCode::from(EXIT_FAILURE)
        }
    }
}
