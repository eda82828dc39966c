#!/bin/bash
# Install the project in /opt/migrate for all users of the machine, with its libraries in a virtual environment.
set -euo pipefail

readonly SOURCE=/opt/migrate VENV=/opt/migrate-venv

[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "$SOURCE"
for program in migrate migrate-agent; do
    ln -sf "$VENV/bin/$program" "/usr/local/bin/$program"
done
install -D -m 644 "$SOURCE/configs/plans/node-drain.yaml" /etc/migrate/drain.yaml
