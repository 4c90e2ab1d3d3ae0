# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# What the cases share. Sourced by busybox sh; a case ends with 0, 77 (skipped)
# or anything else (failed), and says its data as key=value lines.
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

# load_modules LIST - each module of the list; one that is there already is fine.
load_modules() {
    modules=/modules/$(uname -r)
    [ -f "$modules/$1" ] || return 0
    while read -r module; do
        name=${module%.ko}
        [ -d "/sys/module/$(echo "$name" | tr - _)" ] || insmod "$modules/$module" ||
            fail "insmod $module"
    done <"$modules/$1"
}

# wait_until TRIES COMMAND... - tries every tenth of a second. Only for what has
# no event: the probe of virtio_pmem is asynchronous, and its device can't be
# opened in the first moments after it appears.
wait_until() {
    tries=$1
    shift
    while ! "$@" 2>/dev/null; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        sleep 0.1
    done
}

# pci_of SLOT - the PCI device in a slot: two hexadecimal digits, on a bus other than the first one BUS:SLOT.
pci_of() {
    case $1 in
    *:*) echo "/sys/bus/pci/devices/0000:$1.0" ;;
    *) echo "/sys/bus/pci/devices/0000:00:$1.0" ;;
    esac
}

# virtio_of SLOT - the virtio device of it.
virtio_of() {
    set -- "$(pci_of "$1")"/virtio*
    [ -d "$1" ] && basename "$1"
}

# pmem_of SLOT - the block device that virtio_pmem made of it.
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

# pattern SEED BYTES - the text that the host makes again on its own.
pattern() {
    yes "$1" | head -c "$2"
}

sha_of() {
    sha256sum "$1" | cut -d' ' -f1
}

# extents FILE - where the file's bytes are in the device, in bytes:
# extent=<logical>,<physical>,<length>. Delayed or unwritten ones are a failure:
# the bytes would not be there.
extents() {
    filefrag -b1 -v "$1" >/tmp/extents || fail "filefrag $1"
    if grep -E 'unwritten|delalloc|unknown|inline' /tmp/extents; then
        fail "$1 has extents without bytes in them"
    fi
    sed -n 's/^ *[0-9]*: *\([0-9]*\)\.\. *[0-9]*: *\([0-9]*\)\.\. *[0-9]*: *\([0-9]*\):.*/extent=\1,\2,\3/p' /tmp/extents
}

# report FILE - all that the host needs to check the file without mounting it.
report() {
    echo "bytes=$(stat -c %s "$1")"
    echo "sha256=$(sha_of "$1")"
    extents "$1"
}

# fio_table FILE - one line per group of a terse (version 3) report.
fio_table() {
    awk -F';' '{ printf "fio job=%s write_kib_s=%s write_iops=%s read_kib_s=%s read_iops=%s errors=%s\n",
        $3, $48, $49, $7, $8, $5 }' "$1"
}

# fio_fsyncs FILE - the fsyncs that fio's JSON report counted.
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

# need_tools - mounts the disk of test programs, once a boot.
need_tools() {
    export PATH="$PATH:/tools/bin" LD_LIBRARY_PATH=/tools/lib:/usr/lib/x86_64-linux-gnu
    [ ! -d /tools/bin ] || return 0
    mkdir -p /tools
    mount -t ext4 -o ro "$(disk_of tools)" /tools || fail "no disk of test programs"
}

# is_dax FILE - asks the file itself (STATX_ATTR_DAX); a mount option could be ignored.
is_dax() {
    attributes=$(xfs_io -r -c 'statx -r' "$1" | sed -n 's/^stat.attributes = //p')
    [ $((attributes & 0x200000)) -ne 0 ]
}
