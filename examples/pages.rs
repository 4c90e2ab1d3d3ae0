// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo run --example pages -- DIRECTORY DATE` writes the man pages, with this date, and the shell
//! completions there.
//!
//! Both are made from the definitions of the command line in `src/cli`. `ci/package` runs this
//! program. It is an example and no build script, so that a plain `cargo build` needs neither
//! clap_mangen nor clap_complete.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

// The parser and the error texts have no caller in this program.
#[allow(dead_code, unused_imports, unreachable_pub)]
#[path = "../src/cli/mod.rs"]
mod cli;

const NAME: &str = "vhost-user-dax";

/// A section of the page of a subcommand, whose name stands for KIND and before the `@` of UNIT.
const FILES: &str = r#".SH FILES
.TP
.I /etc/vhost\-user\-dax/NAME.conf
The settings of the systemd units
.BI vhost\-user\-dax\-UNIT@ NAME .socket
and
.BI vhost\-user\-dax\-UNIT@ NAME .service \fR.
Examples are in
.IR /usr/share/doc/vhost\-user\-dax/examples .
.TP
.I /run/vhost\-user\-dax/KIND\-NAME.sock
The socket of these units, to which the VM's vhost\-user front\-end connects.
"#;

const EXIT_STATUS: &str = r#".SH "EXIT STATUS"
.TP
.B 0
The VM has gone, or SIGTERM or SIGINT came.
.TP
.B 1
The session failed, or the system refused a thread or a system call.
.TP
.B 2
An option is wrong. One line on stderr says which, and nothing was created or changed.
"#;

/// Writes the man page `title` into `directory`. `others` are the pages under SEE ALSO.
fn page(
    command: &Command,
    title: &str,
    others: &[&str],
    date: &str,
    directory: &Path,
) -> io::Result<()> {
    let man = Man::new(command.clone())
        .title(title.to_uppercase())
        .section("1")
        .date(date)
        .manual("User Commands")
        .source(format!("{NAME} {}", env!("CARGO_PKG_VERSION")));
    let mut out = File::create(directory.join(format!("{title}.1")))?;
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut out)?;
    }
    man.render_options_section(&mut out)?;
    if let Some(subcommand) = title.strip_prefix("vhost-user-dax-") {
        let units = format!("{subcommand}@");
        out.write_all(FILES.replace("UNIT@", &units).replace("KIND", subcommand).as_bytes())?;
    }
    out.write_all(EXIT_STATUS.as_bytes())?;
    if let Some(examples) = command.get_after_help() {
        out.write_all(verbatim("EXAMPLES AND NOTES", &examples.to_string()).as_bytes())?;
    }
    let others: Vec<String> =
        others.iter().map(|other| format!(".BR {} (1)", other.replace('-', "\\-"))).collect();
    write!(out, ".SH \"SEE ALSO\"\n{}\n", others.join(",\n"))
}

/// A section whose lines are printed as they are.
fn verbatim(heading: &str, text: &str) -> String {
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq"))
        .map(|line| if line.starts_with('.') { format!("\\&{line}") } else { line })
        .collect();
    format!(".SH \"{heading}\"\n.nf\n{}\n.fi\n", lines.join("\n"))
}

/// clap_complete 4.6 takes a hyphen in the program's name for the end of a subcommand, in the labels
/// of the bash script but not in the variable that is compared with them. No option is offered then.
fn mend_bash(script: &Path) -> io::Result<()> {
    let separated = format!("{}__subcmd__", NAME.replace('-', "__subcmd__"));
    let joined = format!("{}__subcmd__", NAME.replace('-', "__"));
    fs::write(script, fs::read_to_string(script)?.replace(&separated, &joined))
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, date] = &arguments[..] else {
        return Err(io::Error::other("usage: pages DIRECTORY DATE"));
    };
    let directory = Path::new(directory);
    fs::create_dir_all(directory)?;
    let mut command = cli::Cli::command().name(NAME).bin_name(NAME).disable_help_subcommand(true);
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let script = generate_to(shell, &mut command.clone(), NAME, directory)?;
        if shell == Shell::Bash {
            mend_bash(&script)?;
        }
    }
    command.build();
    let names: Vec<String> =
        command.get_subcommands().map(|of| format!("{NAME}-{}", of.get_name())).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    page(&command, NAME, &names, date, directory)?;
    for (subcommand, name) in command.get_subcommands().zip(&names) {
        page(subcommand, name, &[NAME], date, directory)?;
    }
    Ok(())
}
