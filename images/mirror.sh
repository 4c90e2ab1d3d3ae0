# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# Finds the Debian mirror of this machine; mirror, proxy and checks are those of its apt. To be
# sourced after ci/lib.sh.
# shellcheck shell=bash

# The keyring of Debian's whole archive, which signs newer releases, too.
# shellcheck disable=SC2034  # used by the scripts that source this file
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# apt_targets - prints the URIs and releases of this machine's apt sources, in either format.
# shellcheck disable=SC2016  # apt expands these variables, not the shell
apt_targets() {
    apt-get indextargets --format '$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)' |
        awk '$1 == "Packages" && $4 == "main" { print $2, $3 }'
}

# debian_mirror - prints the mirror of the release that this machine runs.
debian_mirror() {
    local codename mirror
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    [ -n "$(apt_targets)" ] || apt_update_once >&2
    mirror=$(apt_targets | awk -v name="$codename" '
        $2 == name || $2 == "stable" || $2 == "oldstable" || $2 == "testing" { print $1; exit }')
    [ -n "$mirror" ] || die "no Debian mirror in this machine's apt sources for '$codename'"
    printf '%s\n' "${mirror%/}"
}

# machine_apt_options - prints the machine's apt options for proxy, retries and checks.
machine_apt_options() {
    apt-config dump | grep -E '^Acquire::' | grep -vE '^Acquire::(IndexTargets|Languages|Changelogs)' || true
}
