#!/bin/bash
# Install what the project needs on a Debian 12 host: to run, to build its test programs, and to be tested with.
# Does only what is missing, so a second run is quick and needs neither root nor a network.
set -euo pipefail

# What must be there, and the package that brings it: a command, or a file by its full path.
readonly NEEDED="
/usr/bin/python3                      python3
git                                   git
make                                  make
gcc                                   gcc
/usr/include/stdio.h                  libc6-dev
/usr/include/linux/userfaultfd.h      linux-libc-dev
/etc/ssl/certs/ca-certificates.crt    ca-certificates
ps                                    procps
hostname                              hostname
unshare                               util-linux
ip                                    iproute2
nft                                   nftables
ssh                                   openssh-client
sshd                                  openssh-server
redis-server                          redis-server
redis-cli                             redis-tools
nginx                                 nginx-light
memcached                             memcached
node                                  nodejs
qemu-system-x86_64                    qemu-system-x86
curl                                  curl
"
readonly POLICY=/usr/sbin/policy-rc.d

PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

is_there() {
    case $1 in
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

# The python3 that comes first on PATH makes the virtual environment; Debian's has venv in a package of its own.
can_make_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null
}

missing_packages() {
    local needed package
    while read -r needed package; do
        if [ -n "$needed" ] && ! is_there "$needed"; then
            echo "$package"
        fi
    done <<<"$NEEDED"
    can_make_venv || echo python3-venv
}

# Installing a server must not start it (deb-systemd-invoke(1p), invoke-rc.d(8)): the tests start their own.
forbid_services() {
    if [ ! -e "$POLICY" ]; then
        trap 'rm -f "$POLICY"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$POLICY"
        chmod 755 "$POLICY"
    fi
}

must_be_root_to() {
    if [ "$(id -u)" != 0 ]; then
        echo "provision: only root can $*" >&2
        exit 1
    fi
}

install_packages() {
    must_be_root_to install "$@"
    echo "provision: installing $*"
    export DEBIAN_FRONTEND=noninteractive
    forbid_services
    apt-get update -q
    apt-get install -q -y --no-install-recommends "$@"
}

# No package brings it, and bare images have none; the lab gives each of its hosts its own in that place.
make_hosts_file() {
    must_be_root_to make /etc/hosts
    printf '127.0.0.1 localhost\n::1 localhost ip6-localhost\n' >/etc/hosts
}

check_python() {
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "provision: Python 3.11 or newer is needed, and $(command -v python3) is $(python3 --version)" >&2
        exit 1
    fi
    if ! can_make_venv; then
        echo "provision: $(command -v python3) has no venv or no ensurepip; put another python3 first on PATH" >&2
        exit 1
    fi
}

mapfile -t packages < <(missing_packages)
if [ "${#packages[@]}" != 0 ]; then
    install_packages "${packages[@]}"
fi
[ -e /etc/hosts ] || make_hosts_file
check_python
