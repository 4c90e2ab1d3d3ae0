// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Generates docs/options.md from clap's definitions. The test fails if the page differs; `UPDATE=1
//! cargo test --bin vhost-user-dax options_page` writes the page again. tests/docs.rs runs each
//! example of the page with the real program.

use std::fmt::Write;
use std::{env, fs};

use clap::{Arg, Command};

use super::*;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/options.md");

/// The command lines to which the examples of the page are appended.
const LINES: [(&str, &str); 2] = [
    ("fs", "vhost-user-dax fs --socket-path /run/fs0.sock --shared-dir /srv/share --tag share"),
    ("pmem", "vhost-user-dax pmem --socket-path /run/pmem0.sock --file /srv/pmem0.img --size 1G"),
];

/// The example of each option, by the option's id.
#[rustfmt::skip]
const EXAMPLES: [(&str, &[(&str, &str)]); 3] = [
    ("both", &[
        ("socket_path", "--socket-path /run/other.sock"),
        ("socket_group", "--socket-group kvm"),
        ("fd", "--fd 3"),
        ("persist", "--persist sync"),
        ("sandbox", "--sandbox none"),
        ("seccomp", "--seccomp log"),
        ("modcaps", "--modcaps=-mknod"),
        ("keep_listening", "--keep-listening"),
        ("log_level", "--log-level debug"),
        ("print_capabilities", "--print-capabilities"),
        ("help", "--help"),
        ("version", "--version"),
    ]),
    ("fs", &[
        ("shared_dir", "--shared-dir /srv/share"),
        ("tag", "--tag projects"),
        ("num_request_queues", "--num-request-queues 4"),
        ("thread_pool_size", "--thread-pool-size 64"),
        ("readonly", "--readonly"),
        ("cache", "--cache never"),
        ("writeback", "--window-size 0 --writeback"),
        ("allow_direct_io", "--allow-direct-io"),
        ("allow_mmap", "--cache never --allow-mmap"),
        ("no_readdirplus", "--no-readdirplus"),
        ("no_announce_submounts", "--no-announce-submounts"),
        ("inode_file_handles", "--inode-file-handles=never"),
        ("preserve_noatime", "--preserve-noatime"),
        ("rlimit_nofile", "--rlimit-nofile 10000"),
        ("window_size", "--window-size 512M"),
        ("dax", "--dax always"),
        ("dax_threshold", "--dax-threshold 64K"),
        ("mem_slots", "--mem-slots off"),
        ("xattr", "--xattr"),
        ("xattrmap", "--xattrmap ':map::user.virtiofs.:'"),
        ("posix_acl", "--posix-acl"),
        ("security_label", "--security-label=auto"),
        ("killpriv_v2", "--window-size 0 --killpriv-v2"),
        ("translate_uid", "--translate-uid map:0:100000:65536"),
        ("translate_gid", "--translate-gid map:0:100000:65536"),
        ("uid_map", "--uid-map :0:1000:1: --gid-map :0:1000:1:"),
        ("gid_map", "--uid-map :0:1000:1: --gid-map :0:1000:1:"),
    ]),
    ("pmem", &[
        ("file", "--file /srv/other.img"),
        ("size", "--size 512M"),
        ("sparse", "--size 1T --sparse"),
        ("mem_slots", "--mem-slots on"),
    ]),
];

const HEAD: &str = "\
<!-- SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause -->
<!-- Made from src/cli: UPDATE=1 cargo test --bin vhost-user-dax options_page -->
# Options

This page has all options of the two commands `vhost-user-dax fs` (a host directory as a virtio-fs
device) and `vhost-user-dax pmem` (a host file as a virtio-pmem device).
`vhost-user-dax fs --help` and `vhost-user-dax pmem --help` print the same text.

- A value follows after a blank or after `=`. If the heading has a `=`, only `=` is accepted.
- A size is a number and a unit: `64K`, `512M`, `1G`, `1T`, in powers of 1024. Without a unit it is
  in bytes.
- If an option is given several times, the last one counts, as with virtiofsd. The rules of
  `--translate-uid`, `--translate-gid`, `--uid-map` and `--gid-map` add up.
- Options that contradict each other are refused with exit code 2, for example `--dax=always` and
  `--readonly`. An option of virtiofsd that has no effect is accepted with a warning, as virtiofsd
  accepts it: `--writeback` with `--cache=never`, or `--allow-mmap` with `--cache=auto`.

Each example on this page was run (tests/docs.rs), added to the end of one of these lines; `--fd`
takes the place of `--socket-path`:

```
";

fn page() -> String {
    let mut cli = Cli::command();
    cli.build();
    let both = Common::augment_args(Command::new("both"));
    let is_common = |arg: &Arg| {
        ["help", "version"].contains(&arg.get_id().as_str())
            || both.get_arguments().any(|common| common.get_id() == arg.get_id())
    };
    let mut page = HEAD.to_owned();
    for (_, line) in LINES {
        writeln!(page, "{line}").unwrap();
    }
    page.push_str("```\n");
    for (part, examples) in EXAMPLES {
        let name = if part == "both" { "fs" } else { part };
        let command = cli.find_subcommand(name).unwrap();
        let mut args: Vec<&Arg> = command
            .get_arguments()
            .filter(|arg| !arg.is_hide_set() && is_common(arg) == (part == "both"))
            .collect();
        // clap's help pages also print the options without a heading first.
        args.sort_by_key(|arg| arg.get_help_heading().is_some());
        let of = if part == "both" { "both commands".into() } else { format!("`{part}`") };
        writeln!(page, "\n## Options of {of}").unwrap();
        let mut heading = None;
        for arg in args {
            if arg.get_help_heading() != heading {
                heading = arg.get_help_heading();
                writeln!(page, "\n### {}", heading.unwrap()).unwrap();
            }
            let id = arg.get_id().as_str();
            let example = examples.iter().find(|(of, _)| *of == id);
            let (_, example) = example.unwrap_or_else(|| panic!("no example of {part} --{id}"));
            option(&mut page, arg, example);
        }
    }
    page
}

fn option(page: &mut String, arg: &Arg, example: &str) {
    let value = match arg.get_value_names() {
        _ if !arg.get_action().takes_values() => String::new(),
        Some([name]) if arg.get_num_args().is_some_and(|n| n.min_values() == 0) => {
            format!("[={name}]")
        }
        Some([name]) if arg.is_require_equals_set() => format!("={name}"),
        Some([name]) => format!(" {name}"),
        _ => String::new(),
    };
    writeln!(page, "\n#### `--{}{value}`\n", arg.get_long().unwrap()).unwrap();
    let default: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    if arg.get_action().takes_values() && !default.is_empty() {
        write!(page, "Default: `{}`. ", default.join(" ")).unwrap();
    }
    writeln!(page, "Example: `{example}`\n").unwrap();
    let help = arg.get_long_help().or(arg.get_help()).unwrap().to_string();
    let (short, long) = help.split_once("\n\n").unwrap_or((&help, ""));
    writeln!(page, "{short}.").unwrap();
    if !long.is_empty() {
        writeln!(page, "\n{long}").unwrap();
    }
    let mut values = arg.get_possible_values();
    // For a switch clap returns the values true and false, which it does not accept.
    values.retain(|_| arg.get_action().takes_values());
    if !values.is_empty() {
        page.push('\n');
    }
    for value in values {
        writeln!(page, "- `{}`: {}", value.get_name(), value.get_help().unwrap()).unwrap();
    }
}

/// Shows: docs/options.md is generated from clap's definitions.
#[test]
fn the_page_is_what_clap_says() {
    let page = page();
    if env::var_os("UPDATE").is_some() {
        fs::write(PAGE, &page).unwrap();
    }
    let written = fs::read_to_string(PAGE).unwrap();
    let differs = page.lines().zip(written.lines()).find(|(new, old)| new != old);
    assert!(
        page == written,
        "docs/options.md differs; run UPDATE=1 cargo test --bin vhost-user-dax \
         options_page\n{differs:?}"
    );
}

/// Shows: clap accepts each example, and no example contradicts itself or names an option twice.
#[test]
fn each_example_is_accepted() {
    for (part, examples) in EXAMPLES {
        for (id, example) in examples {
            if ["help", "version"].contains(id) {
                continue;
            }
            for (command, line) in LINES.iter().filter(|(name, _)| part == "both" || part == *name)
            {
                let words = line.split(' ').chain(example.split(' ')).map(|w| w.trim_matches('\''));
                let words: Vec<_> = if *id == "fd" {
                    words
                        .enumerate()
                        .filter(|(at, _)| ![2, 3].contains(at))
                        .map(|(_, w)| w)
                        .collect()
                } else {
                    words.collect()
                };
                let matches = Cli::command().try_get_matches_from(&words);
                let matches = matches.unwrap_or_else(|e| panic!("{words:?}: {e}"));
                let matches = matches.subcommand_matches(command).unwrap();
                if *command == "fs" {
                    assert_eq!(contradiction(matches), None, "{words:?}");
                }
            }
        }
    }
}
