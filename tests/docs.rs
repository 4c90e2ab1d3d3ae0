// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The documents: words that no file may have, lengths of pages, links, and the examples of
//! docs/options.md, each run with the real program.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Group, Pid, Uid, chown, getgid};

/// Phrases that no file has, each with what to write instead.
const WORDS: [(&str, &str); 4] = [
    ("so many", "the noun and the unit: \"number of waiters\""),
    ("the seed", "\"Linux 4.x fs/dax.c\", or \"random seed\""),
    ("our notes", "the page and the row: \"docs/front-ends.md Q3\""),
    ("stretch", "\"passthrough file\""),
];

/// Where the phrases are looked for. This file has them in its list.
const PLACES: [&str; 9] = [
    "src",
    "tests",
    "benches",
    "ci",
    "docs",
    "guest-tests",
    "README.md",
    "CHANGELOG.md",
    "ARCHITECTURE.md",
];

/// Pages with a largest number of lines.
const PAGES: &[(&str, usize)] = &[
    ("README.md", 120),
    // One screen and a half, and the list of locks.
    ("ARCHITECTURE.md", 150),
];

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-dax");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All text files at or below `path`, with their text. Build folders are left out.
fn files(path: PathBuf, found: &mut Vec<(PathBuf, String)>) {
    if path.is_dir() {
        if path.file_name() == Some(OsStr::new("target")) {
            return;
        }
        for entry in fs::read_dir(path).unwrap() {
            files(entry.unwrap().path(), found);
        }
    } else if path.extension() != Some(OsStr::new("svg")) && path != root().join(file!()) {
        let Ok(text) = fs::read_to_string(&path) else { return };
        found.push((path, text));
    }
}

/// Each line joined with the first word of the next one, so that a phrase is found across a line
/// break of prose or of a comment.
fn joined(text: &str) -> Vec<String> {
    let bare = |line: &str| {
        let line = line.trim_start().trim_start_matches(['/', '!', '#', '*', ' ']);
        line.trim_end().to_lowercase()
    };
    let lines: Vec<String> = text.lines().map(bare).collect();
    let next =
        |at: usize| lines.get(at + 1).and_then(|line| line.split(' ').next()).unwrap_or_default();
    lines.iter().enumerate().map(|(at, line)| format!("{line} {}", next(at))).collect()
}

/// Shows: no file has a word that means nothing outside of the heads of its authors.
#[test]
fn no_file_has_a_word_of_the_list() {
    let mut all = Vec::new();
    for place in PLACES {
        files(root().join(place), &mut all);
    }
    assert!(all.len() > 200, "only {} files were found", all.len());
    let mut found = Vec::new();
    for (path, text) in &all {
        for (at, line) in joined(text).iter().enumerate() {
            for (word, instead) in WORDS.iter().filter(|(word, _)| line.contains(word)) {
                let path = path.strip_prefix(root()).unwrap().display();
                found.push(format!("{path}:{}: \"{word}\": write {instead}", at + 1));
            }
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// Shows: no page is longer than its limit.
#[test]
fn pages_are_short() {
    for (page, most) in PAGES {
        let lines = fs::read_to_string(root().join(page)).unwrap().lines().count();
        assert!(lines <= *most, "{page} has {lines} lines; at most {most} are allowed");
    }
}

/// Shows: each function of the reading paths in ARCHITECTURE.md exists in its file, and each path
/// has as many files as its heading states.
#[test]
fn reading_paths_lead_somewhere() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (_, paths) = page.split_once("## Where to begin reading").unwrap();
    let (paths, _) = paths.split_once("Typical changes").unwrap();
    let paths = paths.split_whitespace().collect::<Vec<_>>().join(" ");
    for path in paths.split("- **").skip(1) {
        let steps = path.split('`').filter_map(|word| word.split_once(".rs: "));
        let steps: Vec<_> = steps.collect();
        assert!(steps.len() >= 8, "{path}");
        for (file, function) in &steps {
            let text = fs::read_to_string(root().join(format!("src/{file}.rs"))).unwrap();
            assert!(text.contains(&format!("fn {function}")), "{file}.rs has no {function}");
        }
        let before = if path.contains("first seven") { 7 } else { 0 };
        let stated = path.split([' ', ',']).find_map(|word| word.parse::<usize>().ok()).unwrap();
        assert_eq!(steps.len() + before, stated, "{path}");
    }
}

/// Shows: what a link in Markdown leads to is there, and each page of docs/ is linked in README.
#[test]
fn links_lead_somewhere() {
    let mut pages = Vec::new();
    for page in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "docs"] {
        files(root().join(page), &mut pages);
    }
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for (path, text) in &pages {
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            if file.contains("://") {
                continue;
            }
            let to = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(to.exists(), "{}: the link {link} leads nowhere", path.display());
            if !heading.is_empty() {
                let there = fs::read_to_string(&to).unwrap();
                let found =
                    there.lines().filter(|l| l.starts_with('#')).any(|l| anchor(l) == heading);
                assert!(found, "{}: {link}: no such heading", path.display());
            }
        }
        if path.parent() == Some(&root().join("docs")) {
            let name = format!("docs/{}", path.file_name().unwrap().to_str().unwrap());
            assert!(readme.contains(&format!("({name})")), "README does not link {name}");
        }
    }
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
    text.chars().filter(|c| c.is_alphanumeric() || ['-', '_'].contains(c)).collect()
}

/// A directory in which the paths of the examples exist.
struct Place {
    dir: tempfile::TempDir,
    /// Any user finds it; the build folder need not be one where nobody may look.
    program: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for sub in ["run", "srv", "srv/share"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        fs::write(dir.path().join("srv/other.img"), vec![7; 4 << 20]).unwrap();
        // By cp: a process that another test forks meanwhile would keep a written file busy.
        let program = dir.path().join("daemon");
        assert!(Command::new("cp").arg(BINARY).arg(&program).status().unwrap().success());
        Self { dir, program }
    }

    /// A word of a command line, with paths of this directory, a group that exists and a small file.
    fn word(&self, word: &str, before: &str) -> String {
        let word = word.trim_matches('\'');
        if word.starts_with("/run/") || word.starts_with("/srv/") {
            return format!("{}{word}", self.dir.path().display());
        }
        match (before, word) {
            ("--socket-group", _) => Group::from_gid(getgid()).unwrap().unwrap().name,
            ("--size", "1G" | "512M") => "4M".into(),
            _ => word.into(),
        }
    }

    fn command(&self, line: &str, example: &str) -> Command {
        let mut words: Vec<&str> = line.split(' ').skip(1).collect();
        let inherits = example.starts_with("--fd");
        if inherits {
            words.drain(1..3);
        }
        words.extend(example.split(' '));
        let before = std::iter::once(&"").chain(&words);
        let words: Vec<String> =
            words.iter().zip(before).map(|(word, before)| self.word(word, before)).collect();
        let mut command = if inherits {
            let listener = UnixListener::bind(self.dir.path().join("run/fd.sock")).unwrap();
            let mut shell = Command::new("sh");
            shell.args(["-c", "exec \"$0\" \"$@\" 3<&0 0</dev/null"]).arg(&self.program);
            shell.stdin(OwnedFd::from(listener));
            shell
        } else {
            let mut program = Command::new(&self.program);
            program.stdin(Stdio::null());
            program
        };
        command.args(words).env_remove("RUST_LOG").stdout(Stdio::piped()).stderr(Stdio::piped());
        if example.contains("--uid-map") {
            for sub in ["", "run", "srv", "srv/share"] {
                let path = self.dir.path().join(sub);
                chown(&path, Some(1000.into()), Some(1000.into())).unwrap();
            }
            command.uid(1000).gid(1000);
        }
        command
    }
}

/// Why an example can't be run here.
fn missing(example: &str) -> Option<&'static str> {
    if example.contains("--uid-map") {
        let mut probe = Command::new("unshare");
        probe.args(["--user", "true"]).stderr(Stdio::null());
        if !Uid::effective().is_root() {
            return Some("not root, so no other user can start it");
        }
        let made = probe.uid(1000).gid(1000).status().is_ok_and(|status| status.success());
        return (!made).then_some("no user namespaces for users");
    }
    (example.contains("always") && !Uid::effective().is_root()).then_some("not root, so no window")
}

/// Shows: each example of docs/options.md starts a daemon that waits for a front-end and ends with
/// code 0 at SIGTERM, or prints and ends with code 0.
#[test]
fn each_example_of_the_options_runs() {
    let page = fs::read_to_string(root().join("docs/options.md")).unwrap();
    let lines: Vec<&str> = page.lines().filter(|l| l.starts_with("vhost-user-dax ")).collect();
    let mut of: &[&str] = &[];
    let mut ran = 0;
    for line in page.lines() {
        match line {
            "## Options of both commands" => of = &["fs", "pmem"],
            "## Options of `fs`" => of = &["fs"],
            "## Options of `pmem`" => of = &["pmem"],
            _ => {}
        }
        let Some((_, example)) = line.split_once("Example: `") else { continue };
        let example = example.strip_suffix('`').unwrap();
        if let Some(why) = missing(example) {
            println!("SKIPPED the example {example}: {why}");
            continue;
        }
        for name in of {
            let line = lines.iter().find(|line| line.split(' ').nth(1) == Some(name)).unwrap();
            runs(line, example);
            ran += 1;
        }
    }
    assert!(ran > 30, "only {ran} examples were run");
}

fn runs(line: &str, example: &str) {
    let place = Place::new();
    let mut child = place.command(line, example).spawn().unwrap();
    let prints = ["--print-capabilities", "--help", "--version"].contains(&example);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    if prints {
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!said.is_empty(), "{example} prints nothing");
    } else {
        while !said.contains("waiting for a front-end") {
            let got = stderr.read_line(&mut said).unwrap();
            assert_ne!(got, 0, "{line} {example}: the daemon ended: {said}");
        }
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    }
    let status = child.wait().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(0), "{line} {example}: {said}");
}
