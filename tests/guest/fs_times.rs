// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What programs make of a file's times and blocks that was changed in place: the same with a window, where the
//! change makes no request, as on Debian's virtiofsd and on the guest's own memory.

use tempfile::TempDir;

use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

/// Larger than the daemon's own choice of what is mapped with `dax=inode`, and not in step with anything.
const BYTES: &str = "1234567";

/// What each program made of it.
fn run(vm: &mut Vm<'_>, dir: &str) -> Vec<String> {
    let report = vm.run("real-tools", &[&format!("{dir}/tools"), BYTES]);
    report.values("did").into_iter().map(str::to_owned).collect()
}

/// Shows: rsync, git, make, tar and cp see what was written and stored, keep the times that they set, and find
/// holes where there are some; setuid and setgid go with another user's write. With `--cache always` too.
#[test]
fn real_tools() {
    let Some(guest) = Guest::enter("real_tools") else { return };
    let dirs = [0; 3].map(|_| TempDir::new().unwrap());
    let shares = [
        Share::virtiofsd(dirs[0].path(), "virtiofsd"),
        Share::dax(dirs[1].path(), "always").args(&["--cache", "always"]),
        Share::dax(dirs[2].path(), "inode"),
    ];
    let shares = shares.map(|share| share.args(&["--killpriv-v2"]));
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    let mut results = vec![run(&mut vm, "/tmp")];
    for share in &shares {
        let dir = format!("/mnt/{}", share.tag());
        let mode = if share.tag() == "inode" { "dax=inode" } else { "dax=always" };
        vm.mount(share, &dir, mode);
        results.push(run(&mut vm, &dir));
    }
    vm.poweroff();
    let [memory, virtiofsd, ours @ ..] = &results[..] else { panic!("{results:?}") };
    assert_eq!(memory, virtiofsd, "virtiofsd (right) differs from the guest's memory");
    for (share, ours) in shares[1..].iter().zip(ours) {
        assert_eq!(virtiofsd, ours, "{} (right) differs from virtiofsd", share.tag());
    }
}
