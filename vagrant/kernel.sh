#!/bin/bash
# Install a kernel that has what migrate needs (docs/operations.md): Debian 12's is too old, its backports' is not.
# The machine has to be restarted then.
set -euo pipefail

readonly LIST=/etc/apt/sources.list.d/backports.list

if [ "$(dpkg --print-architecture)" != amd64 ]; then
    echo "kernel: only x86-64 machines are supported" >&2
    exit 1
fi
if [ ! -e "$LIST" ]; then
    # from where the machine has its other packages
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | sort -u | head -n 1)
    echo "deb ${mirror:?the machine has no package source for bookworm} bookworm-backports main" >"$LIST"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends -t bookworm-backports linux-image-amd64
fi
