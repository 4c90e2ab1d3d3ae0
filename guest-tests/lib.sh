# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Functions for the cases. busybox sh sources this file. A case ends with 0 (passed), 77 (skipped)
# or another code (failed), and prints its data as key=value lines.
# shellcheck shell=dash

pass() {
    exit 0
}

fail() {
    echo "FAIL: $*"
    exit 1
}

skip() {
    echo "SKIP: $*"
    exit 77
}

# load_modules LIST - loads each module of the list, unless it is loaded already.
load_modules() {
    modules=/modules/$(uname -r)
    [ -f "$modules/$1" ] || return 0
    while read -r module; do
        name=${module%.ko}
        [ -d "/sys/module/$(echo "$name" | tr - _)" ] || insmod "$modules/$module" ||
            fail "insmod $module"
    done <"$modules/$1"
}

# wait_until TRIES COMMAND... - repeats the command every 0.1 s until it succeeds. Only for
# conditions without an event: virtio_pmem probes asynchronously, and its device can't be opened in
# the first moments after it appears.
wait_until() {
    tries=$1
    shift
    while ! "$@" 2>/dev/null; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        sleep 0.1
    done
}

# pci_of SLOT - the sysfs folder of a PCI device. SLOT has two hexadecimal digits; on another bus
# than the first one it is BUS:SLOT.
pci_of() {
    case $1 in
    *:*) echo "/sys/bus/pci/devices/0000:$1.0" ;;
    *) echo "/sys/bus/pci/devices/0000:00:$1.0" ;;
    esac
}

# virtio_of SLOT - the virtio device in the slot.
virtio_of() {
    set -- "$(pci_of "$1")"/virtio*
    [ -d "$1" ] && basename "$1"
}

# pmem_of SLOT - the block device that virtio_pmem has made for the device in the slot.
pmem_of() {
    set -- "$(pci_of "$1")"/virtio*/ndbus*/region*/namespace*/block/pmem*
    [ -d "$1" ] && basename "$1"
}

openable() {
    dd if="$1" of=/dev/null bs=4096 count=1
}

pmem_ready() {
    pmem=$(pmem_of "$1") && openable "/dev/$pmem"
}

# pattern SEED BYTES - the same bytes as pattern() in tests/guest/disk.rs.
pattern() {
    yes "$1" | head -c "$2"
}

sha_of() {
    sha256sum "$1" | cut -d' ' -f1
}

# extents FILE - prints the extents of the file in the device, in bytes:
# extent=<logical>,<physical>,<length>. Fails for delayed or unwritten extents: the device does not
# have their bytes.
extents() {
    filefrag -b1 -v "$1" >/tmp/extents || fail "filefrag $1"
    if grep -E 'unwritten|delalloc|unknown|inline' /tmp/extents; then
        fail "$1 has extents whose bytes are not in the device"
    fi
    sed -n 's/^ *[0-9]*: *\([0-9]*\)\.\. *[0-9]*: *\([0-9]*\)\.\. *[0-9]*: *\([0-9]*\):.*/extent=\1,\2,\3/p' /tmp/extents
}

# report FILE - prints what the host needs to check the file without a mount.
report() {
    echo "bytes=$(stat -c %s "$1")"
    echo "sha256=$(sha_of "$1")"
    extents "$1"
}

# fio_table FILE - prints one line per group of fio's terse report (version 3).
fio_table() {
    awk -F';' '{ printf "fio job=%s write_kib_s=%s write_iops=%s read_kib_s=%s read_iops=%s errors=%s\n",
        $3, $48, $49, $7, $8, $5 }' "$1"
}

# fio_fsyncs FILE - the number of fsyncs in fio's JSON report.
fio_fsyncs() {
    # "sync" : { "total_ios" : N, ...
    sed -n '/"sync" *:/,/}/s/.*"total_ios" *: *\([0-9]*\).*/\1/p' "$1" | head -n 1
}

# disk_of SERIAL - the virtio-blk device with this serial number.
disk_of() {
    load_modules blk
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial")" != "$1" ] || echo "/dev/${disk##*/}"
    done
}

# need_tools - mounts the disk with the test programs, once per boot.
need_tools() {
    export PATH="$PATH:/tools/bin" LD_LIBRARY_PATH=/tools/lib:/usr/lib/x86_64-linux-gnu
    [ ! -d /tools/bin ] || return 0
    mkdir -p /tools
    mount -t ext4 -o ro "$(disk_of tools)" /tools || fail "no disk of test programs"
}

# is_dax FILE - checks STATX_ATTR_DAX of the file, because a mount option alone may have no effect.
is_dax() {
    attributes=$(xfs_io -r -c 'statx -r' "$1" | sed -n 's/^stat.attributes = //p')
    [ $((attributes & 0x200000)) -ne 0 ]
}
