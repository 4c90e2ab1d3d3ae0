// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: arguments to settings, errors to one line and an exit code.

use std::io::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use log::LevelFilter;

use vhost_user_dax::config::{PmemConfig, PmemSize, SocketSpec};
use vhost_user_dax::daemon::{DaemonError, run_pmem};
use vhost_user_dax::pmem::PmemFileSpec;

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
}

/// Serve a host file to one VM as persistent memory (virtio-pmem).
///
/// The guest gets /dev/pmem0: make a file system on it, mount it with '-o dax', and programs in
/// the guest load and store in the host's page cache directly. An fsync in the guest is an
/// fdatasync of the file on the host.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
struct PmemArgs {
    /// Listen on this Unix socket; a dead socket there is replaced
    #[arg(long, value_name = "PATH", required_unless_present_any = ["fd", "print_capabilities"], conflicts_with = "fd")]
    socket_path: Option<PathBuf>,

    /// Listen on this inherited descriptor, as systemd's socket activation passes it (3)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    fd: Option<RawFd>,

    /// The file to serve; its size must be a multiple of 2 MiB
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    file: Option<PathBuf>,

    /// Create the file with this size if it is missing, else check that it has this size
    #[arg(long, value_name = "SIZE")]
    size: Option<PmemSize>,

    /// Don't allocate the blocks of a new file; a full disk then kills the VM
    #[arg(long)]
    sparse: bool,

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

const EXAMPLES: &str = "\
Example:
  vhost-user-dax pmem --socket-path /run/pmem0.sock --file /srv/pmem0.img --size 1G &
  qemu-system-x86_64 ... \\
    -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\
    -chardev socket,id=c0,path=/run/pmem0.sock \\
    -device vhost-user-test-device-pci,chardev=c0,virtio-id=27,num_vqs=1,vq_size=128,config_size=16
  guest# mkfs.ext4 /dev/pmem0 && mount -o dax /dev/pmem0 /mnt

QEMU must be 11.1 or newer.
Exit codes: 0 the VM has gone, or SIGTERM or SIGINT came; 1 the session failed; 2 a bad option.";

/// `{"type": ...}` of QEMU's back-end program conventions (docs/interop/vhost-user.json).
const PMEM_CAPABILITIES: &str = r#"{"type": "pmem", "features": []}"#;

fn main() -> ExitCode {
    let Command::Pmem(args) = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(e) => return usage_error(&e),
    };
    if args.print_capabilities {
        println!("{PMEM_CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    init_log(args.log_level);
    let ended = match config(args) {
        Some(config) => run_pmem(&config),
        None => return ExitCode::from(EXIT_USAGE), // clap has asked for both before.
    };
    let Err(e) = ended else { return ExitCode::SUCCESS };
    eprintln!("vhost-user-dax: {e}");
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
    eprintln!("vhost-user-dax: {what} (try 'vhost-user-dax pmem --help')");
    ExitCode::from(EXIT_USAGE)
}

fn config(args: PmemArgs) -> Option<PmemConfig> {
    let socket = match (args.fd, args.socket_path) {
        (Some(fd), _) => SocketSpec::Fd(fd),
        (None, path) => SocketSpec::Path(path?),
    };
    let file = PmemFileSpec { path: args.file?, size: args.size, sparse: args.sparse };
    Some(PmemConfig { socket, file, keep_listening: args.keep_listening })
}

/// Lines go to stderr without a time: systemd and libvirt add their own.
fn init_log(level: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    // The queue's crate logs each bad chain; ours are counted and held to a bounded rate.
    builder.filter_module("virtio_queue", LevelFilter::Off);
    if std::env::var_os("RUST_LOG").is_some() {
        builder.parse_default_env();
    }
    builder.format(|out, record| {
        let level = record.level().as_str().to_ascii_lowercase();
        writeln!(out, "vhost-user-dax: {level}: {}", record.args())
    });
    builder.init();
}
