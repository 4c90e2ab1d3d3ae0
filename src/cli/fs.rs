// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of `vhost-user-dax fs`. Options of virtiofsd have its names and its meaning.

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

#[derive(Clone, Copy, ValueEnum)]
enum Dax {
    Inode,
    Always,
    Never,
}

#[derive(Clone, Copy, ValueEnum)]
enum FileHandles {
    Never,
    #[value(alias = "fallback")]
    Prefer,
    Mandatory,
}

/// Share a host directory with one VM (virtio-fs), with a window into the host's page cache (DAX).
///
/// The guest mounts it with 'mount -t virtiofs TAG /mnt', and with '-o dax' to map each file
/// instead of asking for it piece by piece. Without a window (any vhost-user-fs front-end, or
/// --window-size 0) it is what virtiofsd is.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct FsArgs {
    #[command(flatten)]
    pub common: Common,

    /// The directory to share
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    shared_dir: Option<PathBuf>,

    /// The name by which the guest mounts it: 1 to 36 bytes
    #[arg(long, value_name = "NAME", required_unless_present = "print_capabilities")]
    tag: Option<Tag>,

    /// How much of the files the guest can have mapped at once; 0: no window
    #[arg(long, value_name = "SIZE", default_value = "256M", help_heading = "Window")]
    window_size: WindowSize,

    /// Which files a guest maps that leaves it to us: those that are large enough, all, or none
    #[arg(long, value_name = "POLICY", default_value = "inode", help_heading = "Window")]
    dax: Dax,

    /// With --dax=inode: map files that are larger than this
    #[arg(long, value_name = "SIZE", default_value_t = DEFAULT_DAX_THRESHOLD, help_heading = "Window")]
    dax_threshold: Size,

    /// Let the front-end send its memory table piece by piece. 'on': the VM can pause with maps,
    /// but a reset under a live mount kills QEMU 11.1. 'off': the other way round
    #[arg(long, value_name = "on|off", default_value = "on", help_heading = "Window")]
    mem_slots: OnOff,

    /// Request queues, 1 to 31; the front-end's num_vqs is this and 1
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=31))]
    num_request_queues: u16,

    /// The most threads that serve requests, at least 2; they come and go as needed
    #[arg(long, value_name = "N", default_value_t = DEFAULT_THREADS)]
    thread_pool_size: usize,

    /// Refuse every change; there is no window then
    #[arg(long)]
    readonly: bool,

    /// How much the guest may cache of what it does not map: auto, always, never or metadata.
    /// Attributes of files that it may map (with -o dax all, with -o dax=inode large ones) are
    /// asked for each time
    #[arg(long, value_name = "POLICY", default_value = "auto", value_parser = cache_policy)]
    cache: CachePolicy,

    /// Let the guest collect writes before it sends them, if it maps no files
    #[arg(long)]
    writeback: bool,

    /// Honour O_DIRECT where the guest asks for it
    #[arg(long)]
    allow_direct_io: bool,

    /// With --cache=never or metadata: let the guest mmap files as shared
    #[arg(long)]
    allow_mmap: bool,

    /// Don't send attributes with directory entries
    #[arg(long)]
    no_readdirplus: bool,

    /// Extended attributes. The guest's root can set trusted.* and security.* on the host's files:
    /// see --xattrmap
    #[arg(long, help_heading = "Attributes and owners")]
    xattr: bool,

    /// Rename extended attributes between guest and host, for example ':map::user.virtiofs.:'
    #[arg(long, value_name = "RULES", value_parser = xattrmap, help_heading = "Attributes and owners")]
    xattrmap: Option<XattrMap>,

    /// POSIX ACLs (and --xattr with them): never, auto or always
    #[arg(long, value_name = "MODE", require_equals = true, num_args = 0..=1, default_value = "never",
          default_missing_value = "always", help_heading = "Attributes and owners")]
    posix_acl: NegotiationMode,

    /// Security labels (and --xattr with them): never, auto or always
    #[arg(long, value_name = "MODE", require_equals = true, num_args = 0..=1, default_value = "never",
          default_missing_value = "always", help_heading = "Attributes and owners")]
    security_label: NegotiationMode,

    /// Without a window: clear setuid and setgid bits ourselves, not by a request of the guest
    #[arg(long, overrides_with = "no_killpriv_v2", help_heading = "Attributes and owners")]
    killpriv_v2: bool,

    #[arg(long, hide = true)]
    no_killpriv_v2: bool,

    /// Translate user numbers, for example 'map:0:100000:65536' (guest 0 is host 100000, and so on)
    #[arg(long, value_name = "RULE", value_parser = id_rule,
          help_heading = "Attributes and owners")]
    translate_uid: Vec<IdMap>,

    /// Translate group numbers, the same way
    #[arg(long, value_name = "RULE", value_parser = id_rule,
          help_heading = "Attributes and owners")]
    translate_gid: Vec<IdMap>,

    /// Not as root: enter a user namespace with this map, ':inside:outside:count:'; there is no
    /// window then
    #[arg(long, value_name = "MAP", value_parser = user_map::<UidMap>,
          help_heading = "Attributes and owners")]
    uid_map: Vec<UidMap>,

    /// The same for groups
    #[arg(long, value_name = "MAP", value_parser = user_map::<GidMap>,
          help_heading = "Attributes and owners")]
    gid_map: Vec<GidMap>,

    #[arg(long, hide = true, overrides_with = "no_announce_submounts")]
    announce_submounts: bool,

    /// Don't tell the guest which directories are mount points
    #[arg(long)]
    no_announce_submounts: bool,

    /// How inodes are held: by file handles where possible (prefer) or always (mandatory), or by a
    /// descriptor each (never), of which there are --rlimit-nofile
    #[arg(long, value_name = "MODE", require_equals = true, default_value = "prefer")]
    inode_file_handles: FileHandles,

    /// Keep O_NOATIME where the guest asks for it
    #[arg(long)]
    preserve_noatime: bool,

    /// How many descriptors the daemon may have open: 1000000 or the hard limit unless set; 0
    /// leaves the limit as it is
    #[arg(long, value_name = "N")]
    rlimit_nofile: Option<u64>,
}

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
Exit codes: 0 the VM has gone, or SIGTERM or SIGINT came; 1 a session or the start failed;
2 a bad option.";

fn cache_policy(text: &str) -> Result<CachePolicy, &'static str> {
    text.parse().map_err(|_| "take auto, always, never or metadata")
}

fn id_rule(text: &str) -> Result<IdMap, String> {
    text.parse().map_err(|e| format!("{e}; write a rule like map:0:100000:65536"))
}

fn user_map<T: FromStr>(text: &str) -> Result<T, &'static str> {
    text.parse().map_err(|_| "write ':INSIDE:OUTSIDE:COUNT:', for example ':0:1000:1:'")
}

/// virtiofsd's own text is a structure of the program.
fn xattrmap(text: &str) -> Result<XattrMap, String> {
    // Names that only a rule for all names takes: where there is none, virtiofsd's code panics.
    let is_terminated = |map: XattrMap| {
        map.map_client_xattr(c"\x01")?;
        map.map_server_xattrlist(b"\x01\0".to_vec())?;
        Ok(map)
    };
    XattrMap::try_from(text).and_then(is_terminated).map_err(|e| {
        let at = e.rule.map_or_else(String::new, |rule| format!("rule {rule}: "));
        let what = match e.cause {
            ErrorKind::InvalidScope { got, .. } => {
                format!("'{got}' is no scope, which is all, server or client")
            }
            ErrorKind::InvalidType { got, .. } => {
                format!("'{got}' is no type, which is prefix, ok, bad, unsupported or map")
            }
            ErrorKind::InvalidDelimiter => "it does not begin and end with one delimiter".into(),
            ErrorKind::IncompleteRule => "it lacks a field".into(),
            ErrorKind::MapRuleViolation => "a map rule must be the only one, and the last".into(),
            ErrorKind::NoRulesProvided => "there is no rule".into(),
            ErrorKind::UnterminatedMapping => {
                "the last rule must take all names, as ':ok:all:::' does".into()
            }
        };
        format!("{at}{what}; write rules like ':map::user.virtiofs.:'")
    })
}

/// Sets the limit, and returns what is in force.
fn limit_descriptors(wanted: Option<u64>) -> Result<u64, String> {
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard);
    setup_rlimit_nofile(wanted).map_err(|e| match wanted {
        Some(wanted) if e.starts_with(NOT_PERMITTED) => format!(
            "--rlimit-nofile {wanted}: more than the hard limit of {hard} descriptors takes \
             CAP_SYS_RESOURCE; take at most {hard}, or 0, which leaves the limit as it is"
        ),
        _ => format!("--rlimit-nofile: {e}; take a smaller number, or 0"),
    })
}

/// How virtiofsd's text of a setrlimit(2) that failed begins. A debug text of the error follows.
const NOT_PERMITTED: &str = "Failed to increase the limit";

/// The numbers of guest users or host users that a rule is for.
type Ids = Option<(u32, u32)>;

/// The first number and the count, of the guest's and of the host's, that no other rule may have.
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

/// Two rules for one number: virtiofsd's code would refuse them, and name no option.
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

/// virtiofsd's code adds without a look: past the last id it would begin at 0 again, which is root.
/// And -1 is nobody.
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
        Some(rule) => Err(format!(
            "{option} {rule}: goes past the last id, 4294967294; take a smaller number"
        )),
        // The sums of the ranges are known to end by now.
        None => check_overlaps(option, rules),
    }
}

impl FsArgs {
    /// None if something is missing that clap asks for.
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
