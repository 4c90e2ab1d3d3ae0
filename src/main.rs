// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line: turns arguments into settings, and an error into one line and an exit code.

mod cli;

use std::process::ExitCode;

use vhost_user_dax::sandbox;
use vhost_user_dax::session::config::ConfigError;
use vhost_user_dax::session::{DaemonError, run_fs, run_pmem};
use vhost_user_dax::support::stderr;

use cli::Command;

fn main() -> ExitCode {
    let (command, matches) = match cli::parse() {
        Ok(parsed) => parsed,
        Err(e) => return cli::usage_error(&e),
    };
    let (common, capabilities) = command.common();
    if common.print_capabilities {
        return cli::print_line(capabilities);
    }
    stderr::init(common.log_level);
    if let Command::Fs(_) = command
        && let Some((_, matches)) = matches.subcommand()
    {
        if let Some(line) = cli::contradiction(matches) {
            return failure(&ConfigError::Option(line).into());
        }
        cli::warn_of_idle(matches);
    }
    if let Err(e) = sandbox::check_proc() {
        return failure(&e.into());
    }
    let ended = match command {
        Command::Pmem(args) => args.config().map(|config| run_pmem(&config)),
        Command::Fs(args) => args.config().map(|config| config.and_then(|config| run_fs(&config))),
    };
    // None: clap has already reported a missing argument.
    let Some(ended) = ended else { return ExitCode::from(cli::EXIT_USAGE) };
    match ended {
        Ok(()) => {
            log::logger().flush();
            ExitCode::SUCCESS
        }
        Err(e) => failure(&e),
    }
}

fn failure(e: &DaemonError) -> ExitCode {
    stderr::last_words(&e.to_string());
    ExitCode::from(match e {
        DaemonError::Config(_) => cli::EXIT_USAGE,
        DaemonError::Start(_) | DaemonError::Session(_) => cli::EXIT_FAILURE,
    })
}
