"""The process that holds a lab together: in the bridge's network namespace, the parent of all hosts.

    up ──fork──> supervisor ──fork──> each host's pid 1
    up                 supervisor                   host
    |                      | <-------- unshared ------- |
    |                      | (cable)                    |
    |                      | --------- connected -----> |
    |                      | <-------- up ------------- |
    | <------- up -------- |
    | (state saved)        |
    | -------- stay -----> |
    | <------- staying --- |

Until "stay" the supervisor dies with `up`; hosts always die with the supervisor (PR_SET_PDEATHSIG). So
whatever is killed, and whenever, nothing stays of a lab that is not whole: the kernel alone sees to that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from typing import NoReturn

from lab import host as host_process
from lab import kernel, network, processes, state
from lab.keys import Keys
from lab.link import Link
from lab.plan import Host, Plan


class _Child:
    """A host being raised: its pid 1 and the link to it."""

    def __init__(self, host: Host, pid: int, link: Link) -> None:
        self.host = host
        self.pid = pid
        self.link = link


def run(plan: Plan, keys: Keys, link: Link, tether: int | None, parent: int) -> NoReturn:
    """Be the supervisor of `plan`'s lab, a child of `parent`, until killed or `tether` reads end of file."""
    try:
        _detach(plan, link, tether, parent)
        kernel.unshare(kernel.CLONE_NEWNET)
        network.make_bridge()
        children = _raise_hosts(plan, keys)
        link.say("up", hosts={child.host.name: child.pid for child in children})
        link.expect("stay")
        kernel.set_death_signal(0)
        link.say("staying")
        link.close()
    except BaseException as err:
        link.fail(str(err) or repr(err))
        os._exit(1)
    _watch(plan, [child.pid for child in children], tether)


def _detach(plan: Plan, link: Link, tether: int | None, parent: int) -> None:
    kernel.set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    os.chdir("/")
    processes.redirect()
    processes.close_others(link.fileno(), *([] if tether is None else [tether]))
    kernel.set_name(f"lab-{plan.name}")


def _raise_hosts(plan: Plan, keys: Keys) -> list[_Child]:
    """Start all hosts; they build themselves side by side."""
    children = [_fork_host(each, plan, keys) for each in plan.hosts]
    for child in children:
        child.link.expect("unshared")
        network.connect(child.host, child.pid, plan.bandwidth)
        child.link.say("connected")
    for child in children:
        child.link.expect("up")
        child.link.close()
    return children


def _fork_host(host: Host, plan: Plan, keys: Keys) -> _Child:
    ours, theirs = Link.pair()

    def work() -> NoReturn:
        processes.close_others(theirs.fileno())
        host_process.run(host, plan, keys, theirs)

    with _namespaces_for_children(host):
        pid = processes.fork_into(work)
    theirs.close()
    return _Child(host, pid, ours)


@contextlib.contextmanager
def _namespaces_for_children(host: Host) -> Iterator[None]:
    """Children forked inside are in new pid and time namespaces, clocks set ahead (time_namespaces(7))."""
    kinds = {"pid": kernel.CLONE_NEWPID, "time": kernel.CLONE_NEWTIME}
    ours = {kind: os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in kinds}
    kernel.unshare(kernel.CHILDREN)
    try:
        with open("/proc/self/timens_offsets", "w") as offsets:
            offsets.write(_offset("monotonic", host.monotonic_offset))
            offsets.write(_offset("boottime", host.boottime_offset))
        yield
    finally:
        for kind, fd in ours.items():
            kernel.setns(fd, kinds[kind])
            os.close(fd)


def _offset(clock: str, seconds: float) -> str:
    whole, fraction = divmod(round(seconds * 1e9), 10**9)
    return f"{clock} {whole} {fraction}\n"


def _watch(plan: Plan, hosts: list[int], tether: int | None) -> NoReturn:
    """Reap hosts that die; end with the last. When `tether` ends, end the lab and remove its directory."""
    poller = select.poll()
    pidfds = {os.pidfd_open(pid): pid for pid in hosts}
    for fd in [*pidfds, *([] if tether is None else [tether])]:
        poller.register(fd, select.POLLIN)
    while pidfds:
        for fd, _ in poller.poll():
            if fd == tether:
                _end(pidfds)
                state.forget(plan.name)
                os._exit(0)
            os.waitpid(pidfds.pop(fd), 0)
            poller.unregister(fd)
            os.close(fd)
    os._exit(0)


def _end(pidfds: dict[int, int]) -> None:
    for fd, pid in pidfds.items():
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.waitpid(pid, 0)
