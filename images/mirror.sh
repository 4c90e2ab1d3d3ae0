# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Where this machine gets Debian from: mirror, proxy and checks are those of its own apt.
# Source it after ci/lib.sh.
# shellcheck shell=bash

# Of Debian's archive as a whole, so newer releases are signed by it, too.
# shellcheck disable=SC2034  # for who sources this
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# apt_targets - what this machine's apt reads, in either format of its sources.
# shellcheck disable=SC2016  # the words are apt's, not the shell's
apt_targets() {
    apt-get indextargets --format '$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)' |
        awk '$1 == "Packages" && $4 == "main" { print $2, $3 }'
}

# debian_mirror - the mirror of the release this machine runs.
debian_mirror() {
    local codename mirror
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    [ -n "$(apt_targets)" ] || apt_update_once >&2
    mirror=$(apt_targets | awk -v name="$codename" '
        $2 == name || $2 == "stable" || $2 == "oldstable" || $2 == "testing" { print $1; exit }')
    [ -n "$mirror" ] || die "no Debian mirror in this machine's apt sources for '$codename'"
    printf '%s\n' "${mirror%/}"
}

# machine_apt_options - proxy, retries, checks: whatever the machine sets.
machine_apt_options() {
    apt-config dump | grep -E '^Acquire::' | grep -vE '^Acquire::(IndexTargets|Languages|Changelogs)' || true
}
