"""The lab itself: its hosts are separate, run what they are told to, and reach one another."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.fixture import LAB, Lab, command, until
from lab.plan import NAMES, PROJECT, Bandwidth, LabError, Plan

KINDS = ("net", "mnt", "pid", "uts", "ipc", "cgroup", "time")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("own") as raised:
        yield raised


# Plans


def test_bandwidth_is_read_as_tc_does() -> None:
    assert [Bandwidth.parse(each).bits for each in ("800kbit", "100Mbit", "2.5gbit")] == [
        800_000,
        100_000_000,
        2_500_000_000,
    ]


@pytest.mark.parametrize("text", ["", "1", "1gb", "-1gbit", "0mbit", "1 gbit", "1gbit;ls"])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a bandwidth"):
        Bandwidth.parse(text)
    assert command("up", "--name", "never", f"--bandwidth={text}").returncode == 2


@pytest.mark.parametrize(("name", "hosts"), [("x", 0), ("x", 9), ("../x", 2), ("", 2), ("a.1", 2)])
def test_what_cannot_be_planned_is_refused(name: str, hosts: int) -> None:
    with pytest.raises(LabError):
        Plan.make(name, hosts)


def test_hosts_of_a_plan_differ_in_everything() -> None:
    hosts = Plan.make("x", len(NAMES)).hosts
    for seen in (
        {each.name for each in hosts},
        {each.ipv4 for each in hosts},
        {each.ipv6 for each in hosts},
        {int(each.monotonic_offset) for each in hosts},
        {int(each.boottime_offset - each.monotonic_offset) for each in hosts},
        {each.first_pid for each in hosts},
    ):
        assert len(seen) == len(NAMES) + 1


# Commands


def test_a_commands_output_and_status_are_its_own(lab: Lab) -> None:
    done = lab.exec("alpha", "sh", "-c", "cat; echo complaint >&2; exit 7", input="given", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "given", "complaint\n")


def test_output_is_passed_byte_for_byte(lab: Lab) -> None:
    given = bytes(range(256)) * 4096
    process = lab.popen("alpha", "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.communicate(given, timeout=30)[0] == given


def test_a_failing_command_raises_with_what_it_said(lab: Lab) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        lab.exec("alpha", "sh", "-c", "echo because >&2; exit 3")
    assert caught.value.returncode == 3
    assert any("because" in note for note in caught.value.__notes__)


def test_a_command_ended_by_a_signal_has_a_shells_status(lab: Lab) -> None:
    assert lab.exec("alpha", "sh", "-c", "kill -TERM $$", check=False).returncode == 128 + signal.SIGTERM


def test_what_cannot_be_executed_is_said(lab: Lab) -> None:
    missing = lab.exec("alpha", "no-such-command", check=False)
    assert (missing.returncode, "no-such-command" in missing.stderr) == (127, True)
    assert lab.exec("alpha", "/etc/hosts", check=False).returncode == 126
    with pytest.raises(RuntimeError, match="no-such-command: No such file"):
        lab.spawn("alpha", "no-such-command")


def test_unknown_hosts_and_labs_are_said(lab: Lab) -> None:
    host = lab.exec("omega", "true", check=False)
    assert host.returncode == 125 and "no host 'omega'" in host.stderr
    other = command("exec", "--name", "no-such-lab", "alpha", "--", "true")
    assert other.returncode == 125 and "'no-such-lab' is not up" in other.stderr
    assert command("status", "--name", "no-such-lab").returncode == 1
    assert command("address", "--name", "no-such-lab", "alpha").returncode == 1


def test_usage_errors_have_their_own_status(lab: Lab) -> None:
    assert command("exec", "alpha", "true").returncode == 2
    assert command("status", "--", "true").returncode == 2
    assert command("fly").returncode == 2


def test_options_of_the_command_are_not_the_labs(lab: Lab) -> None:
    assert lab.exec("alpha", "echo", "-d", "--name", "--", "x").stdout == "-d --name -- x\n"


def test_every_host_and_the_client_has_its_name_and_environment(lab: Lab) -> None:
    for host in ("alpha", "beta", "client"):
        shown = lab.exec(host, "sh", "-c", 'hostname; echo "$HOME $LANG"; command -v python3').stdout.split()
        assert shown == [host, "/root", "C.UTF-8", str(Path(sys.executable).with_name("python3"))]


def test_the_callers_directory_is_kept_where_all_hosts_have_it(lab: Lab, tmp_path: Path) -> None:
    own = Path("/tmp")  # each host has one, but another
    kept = {PROJECT: PROJECT, lab.shared: lab.shared, tmp_path: Path("/"), own: Path("/")}
    for directory, seen in kept.items():
        done = command("exec", "--name", lab.name, "alpha", "--", "pwd", cwd=directory)
        assert done.stdout.strip() == str(seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(lab: Lab, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    process = lab.popen("alpha", "sh", "-c", script, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "caught\n"
    assert process.returncode == 9


def test_a_command_dies_with_the_exec_that_started_it(lab: Lab) -> None:
    script = "echo $$; exec sleep 1000"
    process = lab.popen("alpha", "sh", "-c", script, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=30)
    until(lambda: lab.exec("alpha", "test", "-e", f"/proc/{pid}", check=False).returncode == 1, "sleep ends")


def test_a_commands_parent_is_in_its_host(lab: Lab) -> None:
    """With its parent outside, both killed could leave a zombie that keeps the host from ending."""
    parent = lab.exec("alpha", "sh", "-c", "ps -o ppid= -p $PPID").stdout.strip()
    assert parent == "1"


def test_commands_start_with_default_signals_and_no_descriptors(lab: Lab) -> None:
    stray, other = os.pipe()
    try:
        show = "grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd"
        line = ["exec", "--name", lab.name, "alpha", "--", "bash", "-c", show]
        done = command(*line, pass_fds=[stray, other])
    finally:
        os.close(stray)
        os.close(other)
    words = done.stdout.split()
    assert [int(word, 16) for word in words[1:4:2]] == [0, 0]
    assert words[4:] == ["0", "1", "2", "3"]  # 3 is what ls reads the directory by


# Detached commands


@pytest.fixture
def sleeper(lab: Lab) -> Iterator[int]:
    pid = lab.spawn("alpha", "sleep", "1000")
    yield pid
    lab.exec("alpha", "kill", str(pid), check=False)


def test_a_detached_command_has_the_pid_that_is_printed(lab: Lab, sleeper: int) -> None:
    assert lab.exec("alpha", "cat", f"/proc/{sleeper}/comm").stdout == "sleep\n"
    shown = lab.exec("alpha", "ps", "-o", "ppid=,sid=,pgid=,tty=", "-p", str(sleeper)).stdout.split()
    assert shown == ["1", str(sleeper), str(sleeper), "?"]


def test_a_detached_command_is_seen_in_its_host_alone(lab: Lab, sleeper: int) -> None:
    assert lab.exec("beta", "cat", f"/proc/{sleeper}/comm", check=False).stdout != "sleep\n"
    assert "sleep" not in lab.exec("beta", "ps", "-eo", "comm=").stdout.split()


def test_the_machines_number_of_a_process_is_found(lab: Lab, sleeper: int) -> None:
    outside = lab.pid_outside("alpha", sleeper)
    assert Path(f"/proc/{outside}/comm").read_text() == "sleep\n"
    status = Path(f"/proc/{outside}/status").read_text()
    assert re.search(rf"NSpid:.*\s{sleeper}$", status, re.MULTILINE)
    with pytest.raises(ProcessLookupError):
        lab.pid_outside("beta", sleeper)


def test_the_machines_number_is_found_through_a_further_pid_namespace(lab: Lab) -> None:
    outer = lab.spawn("alpha", "unshare", "--pid", "--fork", "--kill-child", "sleep", "1000")
    inner = until(lambda: lab.exec("alpha", "pgrep", "-P", str(outer), check=False).stdout, "the child")
    outside = lab.pid_outside("alpha", int(inner))
    until(lambda: Path(f"/proc/{outside}/comm").read_text() == "sleep\n", "it executes sleep")
    lab.exec("alpha", "kill", "-KILL", str(outer))
    until(lambda: not Path(f"/proc/{outside}").exists(), "the end of both")


def test_output_of_a_detached_command_is_kept(lab: Lab) -> None:
    pid = lab.spawn("beta", "sh", "-c", "echo out; echo err >&2; readlink /proc/self/fd/0")
    until(lambda: "null" in lab.log("beta", pid), "all of its output")
    assert lab.log("beta", pid) == "out\nerr\n/dev/null\n"
    for host in ("alpha", "beta"):
        assert lab.exec(host, "cat", f"{lab.shared}/beta-{pid}.log").stdout == lab.log("beta", pid)


def test_a_log_that_cannot_be_written_is_said() -> None:
    with Lab("unwritable", hosts=1) as raised:
        raised.exec("alpha", "mount", "-t", "tmpfs", "-o", "ro", "none", str(raised.shared))
        with pytest.raises(RuntimeError, match=r"alpha-[0-9]+\.log: Read-only file system"):
            raised.spawn("alpha", "true")


def test_status_shows_hosts_and_detached_commands(lab: Lab, sleeper: int) -> None:
    shown = json.loads(command("status", "--json", "--name", lab.name).stdout)
    assert [each["name"] for each in shown["hosts"]] == ["alpha", "beta", "client"]
    alpha = shown["hosts"][0]
    assert alpha["alive"] and alpha["ipv4"] == lab.address("alpha") and alpha["ipv6"] == "fd77::11"
    assert os.readlink(f"/proc/{alpha['pid']}/ns/net") != os.readlink("/proc/self/ns/net")
    assert shown["shared"] == str(lab.shared)
    mine = next(each for each in alpha["detached"] if each["pid"] == sleeper)
    log = f"{lab.shared}/alpha-{sleeper}.log"
    assert mine == {"pid": sleeper, "command": "sleep", "log": log}
    assert sleeper not in [each["pid"] for each in shown["hosts"][1]["detached"]]
    text = command("status", "--name", lab.name)
    assert text.returncode == 0
    assert re.search(r"^alpha +up ", text.stdout, re.MULTILINE) and log in text.stdout


def test_orphans_are_reaped(lab: Lab) -> None:
    pid = int(lab.exec("alpha", "sh", "-c", "setsid sh -c 'sleep 0.1' & echo $!").stdout)
    gone = ["test", "!", "-e", f"/proc/{pid}"]
    until(lambda: lab.exec("alpha", *gone, check=False).returncode == 0, "the orphan is reaped")


# Separateness


def test_hosts_share_no_namespace(lab: Lab) -> None:
    places = ["alpha", "beta", "client"]
    script = "".join(f"readlink /proc/self/ns/{kind};" for kind in KINDS)
    seen = [lab.exec(place, "sh", "-c", script).stdout.split() for place in places]
    seen.append([os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS])
    for kind, namespaces in zip(KINDS, zip(*seen, strict=True), strict=True):
        assert len(set(namespaces)) == len(places) + 1, kind


def test_clocks_differ_by_what_is_planned(lab: Lab) -> None:
    script = "from time import *; print(clock_gettime(CLOCK_MONOTONIC), clock_gettime(CLOCK_BOOTTIME))"
    for host in Plan.make("x", 2).hosts:
        before = time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)
        there = [float(each) for each in lab.exec(host.name, "python3", "-c", script).stdout.split()]
        after = time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)
        assert before[0] < there[0] - host.monotonic_offset < after[0]
        assert before[1] < there[1] - host.boottime_offset < after[1]


@pytest.mark.parametrize("directory", ["/tmp", "/run", "/var/lib", "/dev/shm", "/root"])
def test_a_host_has_its_own(lab: Lab, directory: str) -> None:
    path = Path(directory, f"{lab.name}-probe")
    lab.exec("alpha", "touch", str(path))
    assert lab.exec("beta", "test", "-e", str(path), check=False).returncode == 1
    assert not path.exists()


def test_the_rest_of_the_file_system_is_common(lab: Lab) -> None:
    script = f"stat -c %d:%i /usr/bin/env {sys.executable} {LAB}"
    here = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert lab.exec("alpha", "sh", "-c", script).stdout == lab.exec("beta", "sh", "-c", script).stdout == here


def test_hosts_share_a_directory(lab: Lab) -> None:
    path = lab.shared / "probe"
    lab.exec("alpha", "sh", "-c", f"echo given > {path}")
    for host in ("alpha", "beta", "client"):
        assert lab.exec(host, "stat", "-c", "%d:%i", str(path)).stdout == identity(path)
        assert lab.exec(host, "findmnt", "-no", "TARGET", "-T", str(path)).stdout.strip() == str(lab.shared)
    assert lab.exec("beta", "cat", str(path)).stdout == path.read_text() == "given\n"


def identity(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}\n"


def test_an_unnamed_file_in_the_shared_directory_can_be_given_a_name(lab: Lab) -> None:
    """O_TMPFILE, then linkat(2): what not every file system can do."""
    script = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_TMPFILE | os.O_RDWR); os.write(fd, b'late');"
        "os.link(str(fd), sys.argv[1] + '/named', src_dir_fd=os.open('/proc/self/fd', os.O_PATH))"
    )
    lab.exec("alpha", "python3", "-c", script, str(lab.shared))
    assert lab.exec("beta", "cat", f"{lab.shared}/named").stdout == "late"


def test_labs_do_not_share_with_one_another(lab: Lab) -> None:
    (lab.shared / "mine").touch()
    with Lab("neighbour", hosts=1) as other:
        assert list(other.shared.iterdir()) == []
        listing = other.exec("alpha", "ls", str(lab.shared.parent)).stdout
        assert listing.split() == [other.name]


def test_terminals_work(lab: Lab) -> None:
    script = "import pty; pty.spawn(['tty'])"
    assert lab.exec("alpha", "python3", "-c", script).stdout.strip() == "/dev/pts/0"


def test_network_settings_and_rules_are_a_hosts_own(lab: Lab) -> None:
    forward = "/proc/sys/net/ipv4/ip_forward"
    lab.exec("alpha", "sh", "-c", f"echo 1 > {forward}; nft add table inet probe; ls -d /sys/class/net/eth0")
    assert lab.exec("alpha", "cat", forward).stdout == "1\n"
    assert "probe" in lab.exec("alpha", "nft", "list", "tables").stdout
    assert lab.exec("beta", "cat", forward).stdout == "0\n"
    assert lab.exec("beta", "nft", "list", "tables").stdout == ""
    lab.exec("alpha", "sh", "-c", f"echo 0 > {forward}; nft delete table inet probe")


# The network between hosts

RECEIVE = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    peer, _ = server.accept()
    total = 0
    while chunk := peer.recv(1 << 16):
        total += len(chunk)
    peer.sendall(b"%d" % total)
    peer.close()
"""
SEND = """
import socket, sys, time
port, size, *names = sys.argv[1:]
for name in names:
    peer = socket.create_connection((name, int(port)), timeout=60)
    begin = time.monotonic()
    peer.sendall(bytes(int(size)))
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(100) == size.encode()
    print(time.monotonic() - begin)
"""


def serve(lab: Lab, host: str, port: int) -> int:
    pid = lab.spawn(host, "python3", "-c", RECEIVE, str(port))
    until(lambda: lab.log(host, pid) == "ready\n", "the server listens")
    return pid


def send(lab: Lab, source: str, port: int, size: int, *destinations: str) -> list[float]:
    """Seconds that `size` bytes took to each."""
    told = lab.exec(source, "python3", "-c", SEND, str(port), str(size), *destinations).stdout
    return [float(seconds) for seconds in told.split()]


def test_every_host_reaches_every_other_by_name_and_both_addresses(lab: Lab) -> None:
    for destination in ("alpha", "beta", "client"):
        pid = serve(lab, destination, 7100)
        names = [destination, lab.address(destination), lab.address(destination, ipv6=True)]
        for source in ("alpha", "beta", "client"):
            assert len(send(lab, source, 7100, 1000, *names)) == len(names)
        lab.exec(destination, "kill", str(pid))


def test_a_service_address_moves_from_host_to_host(lab: Lab) -> None:
    for address in ("10.77.0.100/24", "fd77::100/64"):
        for host in ("alpha", "beta"):
            lab.exec(host, "ip", "address", "add", address, "dev", "eth0")
            pid = serve(lab, host, 7101)
            script = f"ip neighbour flush dev eth0; python3 -c '{SEND}' 7101 10 {address.split('/')[0]}"
            assert float(lab.exec("client", "bash", "-c", script).stdout) > 0
            lab.exec(host, "kill", str(pid))
            lab.exec(host, "ip", "address", "del", address, "dev", "eth0")


def held_up(lab: Lab, host: str) -> int:
    """How often what `host` sends had to wait for its limit: 0 if it has none."""
    shown = json.loads(lab.exec(host, "tc", "-s", "-j", "qdisc", "show", "dev", "eth0").stdout)
    return sum(each["overlimits"] for each in shown if each["kind"] == "tbf")


def test_a_bandwidth_limit_limits_both_directions(lab: Lab) -> None:
    size, bits = 1_500_000, 40_000_000
    with Lab("slow", hosts=1, bandwidth="40mbit") as slow:
        for host in ("alpha", "client"):
            serve(slow, host, 7102)
        for source, destination in (("alpha", "client"), ("client", "alpha")):
            assert send(slow, source, 7102, size, destination)[0] > 0.9 * (size * 8 / bits)
            assert held_up(slow, source) > 0
            assert held_up(lab, source) == 0


# ssh

ASYNCSSH = """
import asyncio, asyncssh, sys
async def main():
    async with asyncssh.connect(sys.argv[1]) as peer:
        done = await peer.run("hostname; command -v python3", check=True)
        print(done.stdout, end="")
asyncio.run(main())
"""


@pytest.mark.parametrize("tool", ["ssh", "asyncssh"])
def test_hosts_reach_one_another_by_ssh_without_questions(lab: Lab, tool: str) -> None:
    python = str(Path(sys.executable).with_name("python3"))
    pairs = [("alpha", "beta"), ("beta", "alpha"), ("client", "alpha"), ("alpha", "alpha")]
    for source, name in [*pairs, ("beta", lab.address("client")), ("beta", lab.address("client", ipv6=True))]:
        remote = ["hostname; command -v python3"]
        line = ["ssh", name, *remote] if tool == "ssh" else ["python3", "-c", ASYNCSSH, name]
        expected = name if name in ("alpha", "beta") else "client"
        assert lab.exec(source, *line).stdout.split() == [expected, python]


def test_a_host_whose_key_is_not_the_known_one_is_not_trusted(lab: Lab) -> None:
    """So that the trust between hosts is shown to rest on their keys."""
    forged = "sed 's/^beta,[^ ]*/other/; s/^alpha,/beta,/' ~/.ssh/known_hosts > /tmp/known"
    lab.exec("client", "sh", "-c", forged)
    line = ["ssh", "-o", "UserKnownHostsFile=/tmp/known", "-o", "BatchMode=yes", "beta", "true"]
    done = lab.exec("client", *line, check=False)
    assert done.returncode == 255 and "verification failed" in done.stderr


def test_project_commands_are_on_the_path_everywhere(lab: Lab) -> None:
    path = lab.exec("alpha", "sh", "-c", "echo $PATH").stdout
    assert path.split(":")[0] == str(Path(sys.executable).parent)
    assert lab.exec("alpha", "ssh", "beta", "echo $PATH").stdout == path


# Two labs side by side


def test_labs_do_not_see_one_another(lab: Lab) -> None:
    pid = serve(lab, "alpha", 7103)
    with Lab("beside", hosts=1) as other:
        assert other.address("alpha") == lab.address("alpha")
        refused = other.exec("client", "python3", "-c", SEND, "7103", "10", "alpha", check=False)
        assert "ConnectionRefusedError" in refused.stderr
        mine, theirs = (each.exec("client", "cat", "/root/.ssh/known_hosts").stdout for each in (lab, other))
        assert not set(re.findall(r"AAAA\S+", mine)) & set(re.findall(r"AAAA\S+", theirs))
        assert other.exec("beta", "true", check=False).returncode == 125
    assert send(lab, "client", 7103, 10, "alpha")  # it is not touched by the other's end
    lab.exec("alpha", "kill", str(pid))


def test_a_lab_that_is_up_is_not_raised_again(lab: Lab) -> None:
    again = command("up", "--name", lab.name)
    assert again.returncode == 1 and "is up" in again.stderr
    assert lab.exec("alpha", "hostname").stdout == "alpha\n"


def test_hosts_of_a_large_lab_all_come_up() -> None:
    with Lab("large", hosts=len(NAMES)) as raised:
        for host in Plan.make("x", len(NAMES)).hosts:
            assert raised.exec("client", "ssh", host.name, "hostname").stdout.strip() == host.name
