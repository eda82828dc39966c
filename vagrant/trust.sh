#!/bin/bash
# Make this machine known to the others and them to it, with what the Vagrantfile has put into /tmp/keys: names and
# addresses, this machine's host key and everybody's public one, and root's key.
#
#   trust.sh NAME
set -euo pipefail

readonly NAME=$1 KEYS=/tmp/keys

# Images have the machine's own name at 127.0.1.1; a service that binds to its name would then be for nobody else.
sed -i '/^127\.0\.1\.1[[:space:]]/d' /etc/hosts
while read -r line; do
    grep -qxF "$line" /etc/hosts || echo "$line" >>/etc/hosts
done <"$KEYS/hosts"

install -d -m 700 /root/.ssh
install -m 600 "$KEYS/root" /root/.ssh/id_ed25519
install -m 644 "$KEYS/root.pub" /root/.ssh/id_ed25519.pub
install -m 600 "$KEYS/root.pub" /root/.ssh/authorized_keys
install -m 644 "$KEYS/known_hosts" /root/.ssh/known_hosts

install -m 600 "$KEYS/$NAME" /etc/ssh/ssh_host_ed25519_key
install -m 644 "$KEYS/$NAME.pub" /etc/ssh/ssh_host_ed25519_key.pub
systemctl reload ssh

rm -rf "$KEYS"
