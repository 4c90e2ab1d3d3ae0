// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of `vhost-user-dax fs`. Options that virtiofsd also has keep its names and its
//! meaning.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use nix::sys::resource::{Resource, getrlimit};
use virtiofsd::idmap::{GidMap, UidMap};
use virtiofsd::limits::setup_rlimit_nofile;
use virtiofsd::passthrough::xattrmap::{ErrorKind, XattrMap};
use virtiofsd::passthrough::{CachePolicy, InodeFileHandlesMode, NegotiationMode};
use virtiofsd::soft_idmap::cmdline::IdMap;

use vhost_user_dax::fs::config::{DEFAULT_DAX_THRESHOLD, DEFAULT_THREADS};
use vhost_user_dax::fs::descriptors::left_for_guest;
use vhost_user_dax::fs::{DaxPolicy, FsConfig, Tag, WindowSize};
use vhost_user_dax::session::DaemonError;
use vhost_user_dax::session::config::{ConfigError, FsRunConfig};
use vhost_user_dax::support::size::Size;

use super::{Common, OnOff};

/// `{"type": ...}` of QEMU's back-end program conventions (docs/interop/vhost-user.json).
pub const CAPABILITIES: &str = r#"{"type": "fs", "features": ["separate-options"]}"#;

/// `--dax`
#[derive(Clone, Copy, ValueEnum)]
enum Dax {
    /// files larger than --dax-threshold
    Inode,
    /// all files; the daemon does not start if it can't have a window
    Always,
    /// no file: there is no window
    Never,
}

/// `--inode-file-handles`
#[derive(Clone, Copy, ValueEnum)]
enum FileHandles {
    /// one descriptor for each inode; 2 times the LOOKUPs and 3 times the GETATTRs per second
    Never,
    /// file handles if the file system and CAP_DAC_READ_SEARCH allow them, else as `never`
    #[value(alias = "fallback")]
    Prefer,
    /// file handles; the daemon does not start if they can't be used
    Mandatory,
}

/// Share a host directory with one VM (virtio-fs), with a window into the host's page cache (DAX)
///
/// The guest mounts the share by its tag. Through the window its programs load and store in the
/// host's page cache directly; a file that is not mapped is read and written by requests. The
/// window is a shared memory region of the device, into which the front-end (QEMU 11.1 or newer)
/// maps the files. Without a window (another front-end, or --window-size 0) the daemon works as
/// virtiofsd does. Options that virtiofsd has, too, have its names and its meaning.
#[derive(Args)]
#[command(after_help = EXAMPLES, override_usage = USAGE)]
pub struct FsArgs {
    #[command(flatten)]
    pub common: Common,

    /// Host directory that is shared; required
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    shared_dir: Option<PathBuf>,

    /// Name by which the guest mounts the share, 1 to 36 bytes; required
    #[arg(long, value_name = "NAME", required_unless_present = "print_capabilities")]
    tag: Option<Tag>,

    /// Size of the window: largest length of all file ranges mapped at one time; 0: no window
    ///
    /// A multiple of 2 MiB, at most 768M. QEMU 11.1 ends at the 513th memory region of a VM, and
    /// each 2 MiB that is mapped is one region, so the windows of all fs devices of a VM should
    /// have at most 768M together. In the guest a window costs 32,880 bytes of memory for each
    /// 2 MiB.
    #[arg(long, value_name = "SIZE", default_value = "256M", help_heading = "Window")]
    window_size: WindowSize,

    /// Files that the guest maps, if its mount leaves the choice to the daemon
    ///
    /// A mount with `-o dax=inode`, or without the option dax, leaves the choice to the daemon. A
    /// mount with `-o dax` or `-o dax=always` maps all files, a mount with `-o dax=never` none.
    #[arg(long, value_name = "POLICY", default_value = "inode", help_heading = "Window")]
    dax: Dax,

    /// With --dax=inode: size above which a file is mapped
    ///
    /// A file up to this size is read by requests, of which one reads up to 1 MiB.
    #[arg(long, value_name = "SIZE", default_value_t = DEFAULT_DAX_THRESHOLD, help_heading = "Window")]
    dax_threshold: Size,

    /// Protocol feature CONFIGURE_MEM_SLOTS: the front-end sends its memory table region by region
    ///
    /// With `on`, start QEMU with `-action reboot=shutdown`: a reset of the guest while a file is
    /// mapped ends QEMU 11.1. docs/front-ends.md has a table of what each value survives.
    #[arg(long, value_name = "on|off", default_value = "on", help_heading = "Window")]
    mem_slots: OnOff,

    /// Number of request queues, 1 to 31
    ///
    /// The device has one queue more (hiprio), so num_vqs of QEMU's -device is this number plus 1.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=31))]
    num_request_queues: u16,

    /// Largest number of threads that serve requests, at least 2
    ///
    /// Threads are started and ended as needed. A quarter of them is kept free of requests that may
    /// take long. A number below 2 is taken for 2.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_THREADS)]
    thread_pool_size: usize,

    /// Refuse each change of the share; there is no window then
    ///
    /// QEMU maps a window always for writing, so a window can't be read-only.
    #[arg(long)]
    readonly: bool,

    /// What the guest may cache of names, attributes and data: auto, always, never or metadata
    ///
    /// `auto`: names and attributes for 1 second, data until the next open. `always`: names and
    /// attributes for 1 day, data without a limit. `never`: nothing. `metadata`: names and
    /// attributes for 1 day, no data. Attributes of files that the guest may map are not cached
    /// with any policy: a store through the window changes times and blocks without a request.
    #[arg(long, value_name = "POLICY", default_value = "auto", value_parser = cache_policy)]
    cache: CachePolicy,

    /// Let the guest collect writes in its page cache; only without a window
    ///
    /// A guest with a window is not offered this: such a guest keeps mtime itself, and would not
    /// see an mtime that was changed by stores through the window.
    #[arg(long)]
    writeback: bool,

    /// Open a file with O_DIRECT if the guest requests it
    #[arg(long)]
    allow_direct_io: bool,

    /// With --cache=never or metadata: allow the guest mmap with MAP_SHARED
    ///
    /// With --cache=auto and always the guest may do so without this option.
    #[arg(long)]
    allow_mmap: bool,

    /// Send directory entries without the attributes of the files (READDIR, not READDIRPLUS)
    ///
    /// --cache=never implies it.
    #[arg(long)]
    no_readdirplus: bool,

    /// Extended attributes
    ///
    /// The guest's root can then set trusted.* and security.* (file capabilities, labels) on the
    /// host's files, and the host's kernel honours them. --xattrmap ':map::user.virtiofs.:' keeps
    /// all names below user. on the host.
    #[arg(long, help_heading = "Attributes and owners")]
    xattr: bool,

    /// Extended attributes under other names on the host; implies --xattr
    ///
    /// The rules are those of virtiofsd. The rule in the example puts user.virtiofs. before each
    /// name of the guest. The last rule must match all names.
    #[arg(long, value_name = "RULES", value_parser = xattrmap, help_heading = "Attributes and owners")]
    xattrmap: Option<XattrMap>,

    /// POSIX ACLs: never, auto or always; --posix-acl alone is always; implies --xattr
    ///
    /// `auto`: if the guest's kernel supports them. `always`: a guest whose kernel does not support
    /// them can't mount. ACLs are not translated, so --translate-uid and --translate-gid are
    /// refused together with this option.
    #[arg(long, value_name = "MODE", require_equals = true, num_args = 0..=1, default_value = "never",
          default_missing_value = "always", help_heading = "Attributes and owners")]
    posix_acl: NegotiationMode,

    /// Security labels of new files: never, auto or always; --security-label alone is always;
    /// implies --xattr
    ///
    /// `auto`: if the guest's kernel supports them. `always`: a guest whose kernel does not support
    /// them can't mount.
    #[arg(long, value_name = "MODE", require_equals = true, num_args = 0..=1, default_value = "never",
          default_missing_value = "always", help_heading = "Attributes and owners")]
    security_label: NegotiationMode,

    /// Clear setuid and setgid bits on the host at a write (FUSE_HANDLE_KILLPRIV_V2); only without
    /// a window
    ///
    /// With a window this has no effect, and a warning is logged at start: the guest clears the
    /// bits by requests, since a store through the window makes no request at which the daemon
    /// could.
    #[arg(long, overrides_with = "no_killpriv_v2", help_heading = "Attributes and owners")]
    killpriv_v2: bool,

    #[arg(long, hide = true)]
    no_killpriv_v2: bool,

    /// Rule by which user ids differ between guest and host; can be given several times
    ///
    /// `map:GUEST:HOST:COUNT` maps COUNT ids in both directions. `forbid-guest:GUEST:COUNT` refuses
    /// ids of the guest. The other types are guest, host, squash-guest and squash-host, as in
    /// virtiofsd. An id that no rule has is the same on both sides, 0 as well. Two rules for one id
    /// are refused. Id 4294967295 is refused in any case.
    #[arg(long, value_name = "RULE", value_parser = id_rule,
          help_heading = "Attributes and owners")]
    translate_uid: Vec<IdMap>,

    /// Rule by which group ids differ between guest and host; can be given several times
    ///
    /// The rules are those of --translate-uid.
    #[arg(long, value_name = "RULE", value_parser = id_rule,
          help_heading = "Attributes and owners")]
    translate_gid: Vec<IdMap>,

    /// Not as root: user ids of a user namespace that the daemon enters; there is no window then
    ///
    /// The form is `:INSIDE:OUTSIDE:COUNT:`, as for virtiofsd. A map of other ids than the daemon's
    /// own needs newuidmap (Debian package uidmap) and a range in /etc/subuid. Can be given several
    /// times.
    #[arg(long, value_name = "MAP", value_parser = user_map::<UidMap>,
          help_heading = "Attributes and owners")]
    uid_map: Vec<UidMap>,

    /// Not as root: group ids of a user namespace that the daemon enters; there is no window then
    ///
    /// The form is that of --uid-map. The range is in /etc/subgid.
    #[arg(long, value_name = "MAP", value_parser = user_map::<GidMap>,
          help_heading = "Attributes and owners")]
    gid_map: Vec<GidMap>,

    #[arg(long, hide = true, overrides_with = "no_announce_submounts")]
    announce_submounts: bool,

    /// Show the guest a mount point in the share as a plain directory
    #[arg(long)]
    no_announce_submounts: bool,

    /// How the daemon holds the inodes that the guest knows
    ///
    /// With file handles only open files hold descriptors, so a share may have more files than the
    /// daemon may have descriptors. If `prefer` can't use file handles, a warning is logged at
    /// start.
    #[arg(long, value_name = "MODE", require_equals = true, default_value = "prefer")]
    inode_file_handles: FileHandles,

    /// Open a file with O_NOATIME if the guest requests it
    #[arg(long)]
    preserve_noatime: bool,

    /// Number of descriptors that the daemon may have open (RLIMIT_NOFILE)
    ///
    /// Unless set: 1,000,000, or the hard limit if that is lower. 0 leaves the soft limit as it is.
    /// With the defaults of all other options 2,525 is the smallest number; the error for a smaller
    /// one names a number that is enough. A smaller window and fewer threads need fewer
    /// descriptors.
    #[arg(long, value_name = "N")]
    rlimit_nofile: Option<u64>,
}

const USAGE: &str =
    "vhost-user-dax fs --socket-path <PATH> --shared-dir <PATH> --tag <NAME> [OPTIONS]";

const EXAMPLES: &str = "\
Example:
  vhost-user-dax fs --socket-path /run/fs0.sock --shared-dir /srv/share --tag share &
  qemu-system-x86_64 ... -action reboot=shutdown \\
    -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\
    -chardev socket,id=c0,path=/run/fs0.sock \\
    -device vhost-user-test-device-pci,chardev=c0,virtio-id=26,num_vqs=2,vq_size=128,config_size=44
  guest# mount -t virtiofs -o dax share /mnt

The window needs QEMU 11.1 or newer, Linux 6.9 or newer on the host, and root.
Without a window: -device vhost-user-fs-pci,chardev=c0,tag=share, or cloud-hypervisor's --fs.
Exit codes: 0 the VM has ended, or SIGTERM or SIGINT came; 1 the session failed, or the system
refused a thread or a system call at start; 2 a bad option.";

fn cache_policy(text: &str) -> Result<CachePolicy, &'static str> {
    text.parse().map_err(|_| "take auto, always, never or metadata")
}

fn id_rule(text: &str) -> Result<IdMap, String> {
    text.parse().map_err(|e| format!("{e}; write a rule like map:0:100000:65536"))
}

fn user_map<T: FromStr>(text: &str) -> Result<T, &'static str> {
    text.parse().map_err(|_| "write ':INSIDE:OUTSIDE:COUNT:', for example ':0:1000:1:'")
}

/// Replaces virtiofsd's error text, which is a debug print of a structure, by a sentence.
fn xattrmap(text: &str) -> Result<XattrMap, String> {
    // These names match only a rule for all names. Without such a rule virtiofsd's code panics.
    let is_terminated = |map: XattrMap| {
        map.map_client_xattr(c"\x01")?;
        map.map_server_xattrlist(b"\x01\0".to_vec())?;
        Ok(map)
    };
    XattrMap::try_from(text).and_then(is_terminated).map_err(|e| {
        let at = e.rule.map_or_else(String::new, |rule| format!("rule {rule}: "));
        let what = match e.cause {
            ErrorKind::InvalidScope { got, .. } => {
                format!("'{got}' is no scope; the scopes are all, server and client")
            }
            ErrorKind::InvalidType { got, .. } => {
                format!("'{got}' is no type; the types are prefix, ok, bad, unsupported and map")
            }
            ErrorKind::InvalidDelimiter => {
                "it does not begin and end with the same delimiter".into()
            }
            ErrorKind::IncompleteRule => "it lacks a field".into(),
            ErrorKind::MapRuleViolation => "a map rule must be the only one, and the last".into(),
            ErrorKind::NoRulesProvided => "it has no rule".into(),
            ErrorKind::UnterminatedMapping => {
                "the last rule must match all names, as ':ok:all:::' does".into()
            }
        };
        format!("{at}{what}; write rules like ':map::user.virtiofs.:'")
    })
}

/// Sets RLIMIT_NOFILE, and returns the soft limit in force.
fn limit_descriptors(wanted: Option<u64>) -> Result<u64, String> {
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard);
    setup_rlimit_nofile(wanted).map_err(|e| match wanted {
        Some(wanted) if e.starts_with(NOT_PERMITTED) => format!(
            "--rlimit-nofile {wanted}: more than the hard limit of {hard} descriptors needs \
             CAP_SYS_RESOURCE; take at most {hard}, or 0, which leaves the limit as it is"
        ),
        _ => format!("--rlimit-nofile: {e}; take a smaller number, or 0"),
    })
}

/// The first words of virtiofsd's error text for a setrlimit(2) that failed. A debug print of the
/// error follows them.
const NOT_PERMITTED: &str = "Failed to increase the limit";

/// First id and number of ids of the range that a rule translates on one side. None if it
/// translates none there.
type Ids = Option<(u32, u32)>;

/// The ranges of the guest's and of the host's ids that no other rule may translate.
fn sources(rule: &IdMap) -> (Ids, Ids) {
    match *rule {
        IdMap::Guest { from_guest, count, .. }
        | IdMap::SquashGuest { from_guest, count, .. }
        | IdMap::ForbidGuest { from_guest, count } => (Some((from_guest, count)), None),
        IdMap::Host { from_host, count, .. } | IdMap::SquashHost { from_host, count, .. } => {
            (None, Some((from_host, count)))
        }
        IdMap::Bidirectional { guest, host, count } => (Some((guest, count)), Some((host, count))),
    }
}

fn meet(one: Ids, other: Ids) -> bool {
    one.zip(other).is_some_and(|((one, count), (other, others))| {
        count > 0 && others > 0 && one < other + others && other < one + count
    })
}

/// Refuses two rules for one id. virtiofsd's code refuses them, too, but its error names no option.
fn check_overlaps(option: &str, rules: &[IdMap]) -> Result<(), String> {
    for (at, rule) in rules.iter().enumerate() {
        let (guest, host) = sources(rule);
        for earlier in rules.iter().take(at) {
            let (guests, hosts) = sources(earlier);
            let side = match (meet(guest, guests), meet(host, hosts)) {
                (true, _) => "the guest's",
                (_, true) => "the host's",
                _ => continue,
            };
            return Err(format!(
                "{option} {earlier} and {option} {rule}: both translate some of {side} ids; \
                 leave one out, or let their ranges not overlap"
            ));
        }
    }
    Ok(())
}

/// Refuses a rule that goes past the last id. virtiofsd's code adds without an overflow check: the
/// sum would wrap to 0, which is root. Id 4294967295 (-1) is no user.
fn check_rules(option: &str, rules: &[IdMap]) -> Result<(), String> {
    let ends = |rule: &IdMap| match *rule {
        IdMap::Guest { from_guest: one, to_host: other, count }
        | IdMap::Host { from_host: one, to_guest: other, count }
        | IdMap::Bidirectional { guest: one, host: other, count } => {
            one.checked_add(count).zip(other.checked_add(count)).is_some()
        }
        IdMap::SquashGuest { from_guest: one, to_host: other, count }
        | IdMap::SquashHost { from_host: one, to_guest: other, count } => {
            one.checked_add(count).zip(other.checked_add(1)).is_some()
        }
        IdMap::ForbidGuest { from_guest: one, count } => one.checked_add(count).is_some(),
    };
    match rules.iter().find(|rule| !ends(rule)) {
        Some(rule) => {
            Err(format!("{option} {rule}: goes past the last id, 4294967294; use smaller numbers"))
        }
        // The sums in check_overlaps do not overflow: the rules passed the check above.
        None => check_overlaps(option, rules),
    }
}

impl FsArgs {
    /// None if a required option is missing; clap has refused such a command line before.
    pub fn config(self) -> Option<Result<FsRunConfig, DaemonError>> {
        let socket = self.common.socket()?;
        let keep_listening = self.common.keep_listening;
        let sandbox = (&self.common.sandbox).into();
        let fs = FsConfig::new(self.shared_dir.clone()?, self.tag.clone()?, self.window_size);
        Some(self.checked(fs).map_or_else(
            |line| Err(ConfigError::Option(line).into()),
            |fs| Ok(FsRunConfig { socket, fs, sandbox, keep_listening }),
        ))
    }

    fn checked(self, fs: FsConfig) -> Result<FsConfig, String> {
        let acl = self.posix_acl != NegotiationMode::Never;
        if acl && !(self.translate_uid.is_empty() && self.translate_gid.is_empty()) {
            return Err(
                "--posix-acl and --translate-uid or -gid: ACLs are not translated; leave one out"
                    .into(),
            );
        }
        check_rules("--translate-uid", &self.translate_uid)?;
        check_rules("--translate-gid", &self.translate_gid)?;
        let files = limit_descriptors(self.rlimit_nofile)?;
        let config = FsConfig {
            dax: match self.dax {
                Dax::Never => DaxPolicy::Never,
                Dax::Inode => DaxPolicy::Inode(self.dax_threshold.0),
                Dax::Always => DaxPolicy::Always,
            },
            persist: self.common.persist.into(),
            mem_slots: self.mem_slots == OnOff::On,
            request_queues: self.num_request_queues,
            threads: self.thread_pool_size,
            readonly: self.readonly,
            cache: self.cache,
            writeback: self.writeback,
            allow_direct_io: self.allow_direct_io,
            allow_mmap: self.allow_mmap,
            readdirplus: !self.no_readdirplus,
            xattr: self.xattr,
            xattrmap: self.xattrmap,
            posix_acl: self.posix_acl,
            security_label: self.security_label,
            killpriv_v2: self.killpriv_v2,
            announce_submounts: !self.no_announce_submounts,
            inode_file_handles: match self.inode_file_handles {
                FileHandles::Never => InodeFileHandlesMode::Never,
                FileHandles::Prefer => InodeFileHandlesMode::Prefer,
                FileHandles::Mandatory => InodeFileHandlesMode::Mandatory,
            },
            preserve_noatime: self.preserve_noatime,
            uid_map: self.uid_map,
            gid_map: self.gid_map,
            translate_uid: self.translate_uid,
            translate_gid: self.translate_gid,
            ..fs
        };
        Ok(FsConfig { guest_fds: left_for_guest(files, &config)?, ..config })
    }
}
