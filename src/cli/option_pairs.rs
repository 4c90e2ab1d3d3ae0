// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Options that contradict each other. What only repeats a default is no contradiction: all of
//! these look at what the command line names. Those of virtiofsd are taken as virtiofsd takes them,
//! with a warning, so that whoever starts it can start this.

use clap::ArgMatches;
use clap::parser::ValueSource;
use log::warn;

use vhost_user_dax::fs::WindowSize;

/// The command line of `fs`, as far as it names something.
struct Named<'a>(&'a ArgMatches);

impl Named<'_> {
    fn any(&self, id: &str) -> bool {
        self.0.value_source(id) == Some(ValueSource::CommandLine)
    }

    fn is(&self, id: &str, value: &str) -> bool {
        let given = self.0.get_raw(id).and_then(Iterator::last);
        self.any(id) && given.is_some_and(|given| given.eq_ignore_ascii_case(value))
    }

    /// A window of some size is asked for.
    fn window(&self) -> bool {
        self.any("window_size") && !self.window_of_none()
    }

    fn window_of_none(&self) -> bool {
        self.0.get_one::<WindowSize>("window_size") == Some(&WindowSize::NONE)
    }

    /// What takes the window away, as the user wrote it.
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

/// A line for the user where two options of `fs` can't both be had.
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
        "--dax-threshold and --dax=always: all files are mapped then; leave one out, or take --dax=inode"
            .into()
    })
}

/// Says which of virtiofsd's options of this command line come to nothing.
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
            "--allow-mmap does nothing without --cache=never or metadata: the guest always may",
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
