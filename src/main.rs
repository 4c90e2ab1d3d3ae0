// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: arguments to settings, errors to one line and an exit code.

mod fs_args;
mod option_pairs;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use log::LevelFilter;

use vhost_user_dax::config::{ConfigError, PmemConfig, PmemSize, SocketSpec};
use vhost_user_dax::daemon::{DaemonError, run_fs, run_pmem};
use vhost_user_dax::persist::PersistMode;
use vhost_user_dax::pmem::PmemFileSpec;
use vhost_user_dax::stderr;

use fs_args::FsArgs;

const EXIT_FAILURE: u8 = 1;
const EXIT_USAGE: u8 = 2;

/// Host files, mapped straight into virtual machines: a vhost-user daemon.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Pmem(PmemArgs),
    Fs(Box<FsArgs>),
}

/// How both devices are reached, and how they talk.
#[derive(Args)]
struct Common {
    /// Listen on this Unix socket; a dead socket there is replaced. Only this user may connect (mode 0600)
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"], conflicts_with = "fd")]
    socket_path: Option<PathBuf>,

    /// Let this group connect, too (mode 0660)
    #[arg(long, value_name = "NAME", conflicts_with = "fd")]
    socket_group: Option<String>,

    /// Listen on this inherited descriptor, as systemd's socket activation passes it (3)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    fd: Option<RawFd>,

    /// What makes the guest's bytes durable: the kernel ('sync'), this daemon by cache lines where the bytes
    /// lie in persistent memory or memory ('cacheline'), or what that asks for ('auto')
    #[arg(long, value_name = "HOW", default_value = "auto")]
    persist: Persist,

    /// When the VM goes, wait for the next one instead of exiting
    #[arg(long)]
    keep_listening: bool,

    /// How much to say on stderr: error, warn, info, debug or trace; RUST_LOG overrides it
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LevelFilter,

    /// Print what this back-end is, as QEMU's conventions want it (JSON), and exit
    #[arg(long)]
    print_capabilities: bool,
}

impl Common {
    /// None if clap has let neither through, which it does not.
    fn socket(&self) -> Option<SocketSpec> {
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
enum Persist {
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
enum OnOff {
    On,
    Off,
}

/// Serve a host file to one VM as persistent memory (virtio-pmem).
///
/// The guest gets /dev/pmem0: make a file system on it, mount it with '-o dax', and programs in
/// the guest load and store in the host's page cache directly. An fsync in the guest is an
/// fdatasync of the file on the host.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
struct PmemArgs {
    #[command(flatten)]
    common: Common,

    /// The file to serve, or a device-DAX node (/dev/dax0.0); its size must be a multiple of 2 MiB
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    file: Option<PathBuf>,

    /// Create the file with this size if it is missing, else check that it has this size
    #[arg(long, value_name = "SIZE")]
    size: Option<PmemSize>,

    /// Don't allocate the blocks of a new file; a full disk then kills the VM
    #[arg(long)]
    sparse: bool,

    /// Let the front-end send its memory table piece by piece: 'on' in a VM that has an fs device, too
    #[arg(long, value_name = "on|off", default_value = "off")]
    mem_slots: OnOff,
}

const EXAMPLES: &str = "\
Example:
  vhost-user-dax pmem --socket-path /run/pmem0.sock --file /srv/pmem0.img --size 1G &
  qemu-system-x86_64 ... \\
    -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\
    -chardev socket,id=c0,path=/run/pmem0.sock \\
    -device vhost-user-test-device-pci,chardev=c0,virtio-id=27,num_vqs=1,vq_size=128,config_size=16
  guest# mkfs.ext4 -b 4096 /dev/pmem0 && mount -o dax /dev/pmem0 /mnt

QEMU must be 11.1 or newer.
Exit codes: 0 the VM has gone, or SIGTERM or SIGINT came; 1 the session failed; 2 a bad option.";

/// `{"type": ...}` of QEMU's back-end program conventions (docs/interop/vhost-user.json).
const PMEM_CAPABILITIES: &str = r#"{"type": "pmem", "features": []}"#;

fn main() -> ExitCode {
    let (command, matches) = match parse() {
        Ok(parsed) => parsed,
        Err(e) => return usage_error(&e),
    };
    let (common, capabilities) = match &command {
        Command::Pmem(args) => (&args.common, PMEM_CAPABILITIES),
        Command::Fs(args) => (&args.common, fs_args::CAPABILITIES),
    };
    if common.print_capabilities {
        println!("{capabilities}");
        return ExitCode::SUCCESS;
    }
    stderr::init(common.log_level);
    if let Command::Fs(_) = command
        && let Some((_, matches)) = matches.subcommand()
    {
        if let Some(line) = option_pairs::contradiction(matches) {
            return failure(&ConfigError::Option(line).into());
        }
        option_pairs::warn_of_idle(matches);
    }
    let ended = match command {
        Command::Pmem(args) => pmem_config(args).map(|config| run_pmem(&config)),
        Command::Fs(args) => args.config().map(|config| config.and_then(|config| run_fs(&config))),
    };
    // None: clap has asked for what is missing before.
    let Some(ended) = ended else { return ExitCode::from(EXIT_USAGE) };
    match ended {
        Ok(()) => {
            log::logger().flush();
            ExitCode::SUCCESS
        }
        Err(e) => failure(&e),
    }
}

/// The arguments, and which of them the command line names.
fn parse() -> Result<(Command, ArgMatches), clap::Error> {
    let matches = Cli::command().try_get_matches()?;
    Ok((Cli::from_arg_matches(&matches)?.command, matches))
}

fn failure(e: &DaemonError) -> ExitCode {
    stderr::last_words(&e.to_string());
    ExitCode::from(match e {
        DaemonError::Config(_) => EXIT_USAGE,
        DaemonError::Start(_) | DaemonError::Session(_) => EXIT_FAILURE,
    })
}

/// One line, not clap's usual page; help and version are not errors.
fn usage_error(e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = e.print();
        return ExitCode::from(EXIT_USAGE);
    }
    let text = e.to_string();
    let what: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let asked = std::env::args().nth(1).filter(|word| word == "fs");
    let command = asked.as_deref().unwrap_or("pmem");
    eprintln!("vhost-user-dax: {what} (try 'vhost-user-dax {command} --help')");
    ExitCode::from(EXIT_USAGE)
}

fn pmem_config(args: PmemArgs) -> Option<PmemConfig> {
    let socket = args.common.socket()?;
    let file = PmemFileSpec { path: args.file?, size: args.size, sparse: args.sparse };
    let mem_slots = args.mem_slots == OnOff::On;
    Some(PmemConfig {
        socket,
        file,
        persist: args.common.persist.into(),
        mem_slots,
        keep_listening: args.common.keep_listening,
    })
}
