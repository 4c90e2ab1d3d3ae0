// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Options that contradict each other. Only options that the command line names count: a default
//! value contradicts nothing. Options of virtiofsd that have no effect are accepted with a warning,
//! as virtiofsd accepts them, so that a program that starts virtiofsd can start this daemon.

use clap::ArgMatches;
use clap::parser::ValueSource;
use log::warn;

use vhost_user_dax::fs::WindowSize;

/// The options of `fs` that the command line names.
struct Named<'a>(&'a ArgMatches);

impl Named<'_> {
    fn any(&self, id: &str) -> bool {
        self.0.value_source(id) == Some(ValueSource::CommandLine)
    }

    fn is(&self, id: &str, value: &str) -> bool {
        let given = self.0.get_raw(id).and_then(Iterator::last);
        self.any(id) && given.is_some_and(|given| given.eq_ignore_ascii_case(value))
    }

    /// Whether the command line has a window size of at least 2 MiB.
    fn window(&self) -> bool {
        self.any("window_size") && !self.window_of_none()
    }

    fn window_of_none(&self) -> bool {
        self.0.get_one::<WindowSize>("window_size") == Some(&WindowSize::NONE)
    }

    /// The option by which there is no window, as the user wrote it.
    fn without_window(&self) -> Option<&'static str> {
        [
            (self.window_of_none(), "--window-size 0"),
            (self.is("dax", "never"), "--dax=never"),
            (self.any("readonly"), "--readonly"),
            (self.any("uid_map"), "--uid-map"),
            (self.any("gid_map"), "--gid-map"),
        ]
        .into_iter()
        .find_map(|(given, name)| given.then_some(name))
    }
}

/// The error line for two options of `fs` that exclude each other.
pub fn contradiction(matches: &ArgMatches) -> Option<String> {
    let named = Named(matches);
    let without = named.without_window();
    let wants_window = [
        (named.is("dax", "always"), "--dax=always"),
        (named.window(), "--window-size"),
        (named.any("dax_threshold"), "--dax-threshold"),
        (named.is("persist", "cacheline"), "--persist=cacheline"),
    ];
    for (wanted, name) in wants_window {
        if let Some(without) = without.filter(|_| wanted) {
            return Some(format!(
                "{name} and {without}: there is no window then; leave one of the two out"
            ));
        }
    }
    let threshold = named.any("dax_threshold") && named.is("dax", "always");
    threshold.then(|| {
        "--dax-threshold and --dax=always: all files are mapped then; leave one out, or use \
         --dax=inode"
            .into()
    })
}

/// Logs a warning for each option of virtiofsd that has no effect on this command line.
pub fn warn_of_idle(matches: &ArgMatches) {
    let named = Named(matches);
    for (idle, line) in [
        (
            named.any("writeback") && named.is("cache", "never"),
            "--writeback does nothing with --cache=never: no write is held back",
        ),
        (
            named.any("allow_mmap")
                && !(named.is("cache", "never") || named.is("cache", "metadata")),
            "--allow-mmap does nothing without --cache=never or metadata: the guest may always use \
             mmap",
        ),
        (
            named.any("writeback") && named.any("readonly"),
            "--writeback does nothing with --readonly: there are no writes",
        ),
        (
            named.any("killpriv_v2") && named.any("readonly"),
            "--killpriv-v2 does nothing with --readonly: there are no writes",
        ),
    ] {
        if idle {
            warn!("{line}");
        }
    }
}
