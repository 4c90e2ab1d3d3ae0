# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Set-up shared by ci/demo, ci/test and images/build. Source it; by itself it
# runs nothing. Everything it installs comes from the machine's own apt sources.
# shellcheck shell=bash

# Elapsed seconds count from the first script of a run, also in its children.
: "${VUD_START:=$(date +%s)}"
export VUD_START

# The oldest compiler the crate builds with; Cargo.toml says the same.
VUD_MIN_RUST=1.88

# step TEXT... - one progress line with the elapsed seconds.
step() {
    printf '[%4ds] %s\n' "$(($(date +%s) - VUD_START))" "$*"
}

# die TEXT... - one clear line, then exit 1.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# version_at_least HAVE WANT - true when HAVE is WANT or newer.
version_at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# apt_update_once - at most one apt-get update in a run, also over its children.
apt_update_once() {
    [ -z "${VUD_APT_UPDATED:-}" ] || return 0
    step "apt-get update"
    apt-get -qq update
    export VUD_APT_UPDATED=1
}

# need_apt PACKAGE... - installs what is missing, and nothing else.
need_apt() {
    local package missing=()
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "not root, and these packages are missing: ${missing[*]}"
    apt_update_once
    step "apt-get install ${missing[*]}"
    # The output matters only when it fails.
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -y -qq --no-install-recommends \
        install "${missing[@]}" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get install failed: ${missing[*]}"
    fi
    rm -f "$log"
}

# have_rust - true when PATH has a compiler that is new enough, with its tools.
have_rust() {
    local version
    version=$(rustc --version 2>/dev/null | awk '{ print $2 }') || return 1
    [ -n "$version" ] && version_at_least "$version" "$VUD_MIN_RUST" &&
        cargo --version >/dev/null 2>&1 &&
        cargo clippy --version >/dev/null 2>&1 &&
        cargo fmt --version >/dev/null 2>&1
}

# need_rust - the machine's own toolchain when it will do, else Debian 12's
# rustc-web family, which bookworm-security keeps at the version browsers need.
need_rust() {
    if ! have_rust; then
        need_apt rustc-web cargo-web rust-web-clippy rustfmt-web
        hash -r
        have_rust || die "rustc >= $VUD_MIN_RUST with cargo, clippy and rustfmt is needed;" \
            "found $(rustc --version 2>/dev/null || echo none) at $(command -v rustc || echo nowhere)"
    fi
    # Crates with C parts, the linker, what cargo trusts the registry by, and what virtiofsd links.
    need_apt gcc libc6-dev ca-certificates libcap-ng-dev
    step "rust: $(rustc --version)"
}

# need_guest - everything the guest tests boot, in target/guest, and strace, which
# counts and spoils the daemon's system calls in some of them. Quick when built.
need_guest() {
    need_apt strace
    "$(dirname "${BASH_SOURCE[0]}")/../images/build"
}

# need_guest_tools - the same, and a disk of test programs for shares.
need_guest_tools() {
    need_apt strace
    "$(dirname "${BASH_SOURCE[0]}")/../images/build" tools
}
