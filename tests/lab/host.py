"""A host's first process: it makes the host out of new namespaces, starts its sshd, and reaps what ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import NoReturn

from lab import filesystem, kernel, network
from lab.keys import Keys
from lab.link import Link
from lab.plan import HOST_DIRECTORY, Host, LabError, Plan

_SSHD_DEADLINE = 20.0  # seconds

_SSHD = """\
ListenAddress 0.0.0.0
ListenAddress ::
HostKey {directory}/ssh_host_ed25519_key
PidFile {directory}/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
MaxStartups 200
MaxSessions 200
Subsystem sftp internal-sftp
SetEnv {environment}
"""


def run(host: Host, plan: Plan, keys: Keys, link: Link) -> NoReturn:
    """Be `host`, as pid 1 of new pid and time namespaces, until killed. `link` leads to the supervisor.

    Says "unshared" when the network namespace is there for its cable, waits for "connected", says "up".
    """
    try:
        kernel.set_death_signal(signal.SIGKILL)
        kernel.set_name(f"host-{host.name}")
        kernel.unshare(kernel.OWN)
        link.say("unshared")
        link.expect("connected")
        _build(host, plan, keys)
        link.say("up")
        link.close()
    except BaseException as err:
        link.fail(f"{host.name}: {err}")
        os._exit(1)
    _reap()


def _build(host: Host, plan: Plan, keys: Keys) -> None:
    os.chdir("/")
    os.umask(0o022)
    socket.sethostname(host.name)
    filesystem.make(host, plan, keys)
    network.configure(host, plan.bandwidth)
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(host.first_pid - 1))
    _start_sshd(plan)


def _start_sshd(plan: Plan) -> None:
    environment = " ".join(f'"{name}={value}"' for name, value in plan.environment.items())
    config = HOST_DIRECTORY / "sshd_config"
    config.write_text(_SSHD.format(directory=HOST_DIRECTORY, environment=environment))
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's empty directory for privilege separation
    command = ("/usr/sbin/sshd", "-D", "-f", str(config), "-E", str(HOST_DIRECTORY / "sshd.log"))
    with subprocess.Popen(command, start_new_session=True, env=plan.environment) as sshd:
        _wait_for_sshd(sshd)
        sshd.returncode = 0  # reaped by pid 1's own loop from here


def _wait_for_sshd(sshd: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SSHD_DEADLINE
    while time.monotonic() < deadline and sshd.poll() is None:
        if socket.socket().connect_ex(("127.0.0.1", 22)) == 0:
            return
        time.sleep(0.01)
    raise LabError(f"sshd does not listen: {(HOST_DIRECTORY / 'sshd.log').read_text().strip()}")


def _reap() -> NoReturn:
    """Reap every child, ours and adopted, as pid 1 must (pid_namespaces(7))."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                pass
        except ChildProcessError:
            pass
        signal.sigwait({signal.SIGCHLD})
