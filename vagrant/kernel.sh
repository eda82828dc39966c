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
    echo 'deb http://deb.debian.org/debian bookworm-backports main' >"$LIST"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends -t bookworm-backports linux-image-amd64
fi
