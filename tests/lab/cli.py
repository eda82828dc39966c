"""The lab's command line."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from lab import enter, keys, processes, state, supervisor
from lab.link import Link
from lab.plan import Bandwidth, LabError, Plan, shared, variable

USAGE, FAILED = 2, 1
T = TypeVar("T")


def main(arguments: list[str], description: str) -> int:
    """Run one command; its exit status. `exec` has its command's status, and 125 if the lab itself failed."""
    head, command = _split(arguments)
    options = _parser(description).parse_args(head)
    if (options.command == "exec") != bool(command):
        print("lab: exec, and only exec, takes `-- CMD…`", file=sys.stderr)
        return USAGE
    options.argv = command
    try:
        return int(_COMMANDS[options.command](options))
    except (LabError, OSError) as err:
        print(f"lab: {err}", file=sys.stderr)
        return 125 if options.command == "exec" else FAILED


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and the command after the first `--`."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """What reads an argument, its error said by argparse."""

    def checked(text: str) -> T:
        try:
            return read(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return checked


def _parser(description: str) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="lab")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab", description=description, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", parents=[common], help="raise the hosts")
    up.add_argument("--hosts", type=int, default=2)
    bandwidth = _argument(Bandwidth.parse)
    up.add_argument("--bandwidth", type=bandwidth, help="limit of each host's link, each way, e.g. 1gbit")
    up.add_argument(
        "--variable",
        type=_argument(variable),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the environment of every command in a host, also of those that come by ssh; repeatable",
    )
    up.add_argument("--tether", type=int, metavar="FD", help="the lab ends when FD reads end of file")
    execute = commands.add_parser("exec", parents=[common], help="run a command in a host")
    execute.add_argument("-d", "--detach", action="store_true")
    execute.add_argument("host")
    address = commands.add_parser("address", parents=[common], help="print a host's address")
    address.add_argument("host")
    address.add_argument("--ipv6", action="store_true")
    status = commands.add_parser("status", parents=[common], help="what is up")
    status.add_argument("--json", action="store_true")
    commands.add_parser("down", parents=[common], help="remove the lab")
    return parser


def _up(options: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise LabError("only root can make hosts")
    plan = Plan.make(options.name, options.hosts, options.bandwidth, dict(options.variable))
    state.claim(plan.name, plan.environment)
    try:
        _raise(plan, keys.generate(plan), options.tether)
    except BaseException:
        state.remove(plan.name)
        raise
    return 0


def _raise(plan: Plan, made: keys.Keys, tether: int | None) -> None:
    ours, theirs = Link.pair()
    parent = os.getpid()
    pid = processes.fork_into(lambda: supervisor.run(plan, made, theirs, tether, parent))
    theirs.close()
    leader = state.Process.of(pid)
    state.save(state.LabState(plan.name, leader, plan.environment, {}))
    pids = ours.expect("up")["hosts"]
    hosts = {
        host.name: state.HostState(host.name, state.Process.of(pids[host.name]), host.ipv4, host.ipv6)
        for host in plan.hosts
    }
    state.save(state.LabState(plan.name, leader, plan.environment, hosts))
    ours.say("stay")
    ours.expect("staying")


def _lab(options: argparse.Namespace) -> state.LabState:
    lab = state.load(options.name)
    if lab is None:
        raise LabError(f"lab {options.name!r} is not up")
    return lab


def _exec(options: argparse.Namespace) -> int:
    lab = _lab(options)
    environment = dict(lab.environment)
    if not options.detach and "TERM" in os.environ:
        environment["TERM"] = os.environ["TERM"]
    enter.enter(lab.host(options.host))
    if not options.detach:
        return enter.run(options.argv, environment)
    print(enter.start(options.argv, environment, functools.partial(lab.log, options.host)))
    return 0


def _address(options: argparse.Namespace) -> int:
    host = _lab(options).host(options.host)
    print(host.ipv6 if options.ipv6 else host.ipv4)
    return 0


def _status(options: argparse.Namespace) -> int:
    lab = _lab(options)
    hosts = [_describe(lab, host) for host in lab.hosts.values()]
    directory = str(shared(lab.name))
    if options.json:
        about = {"name": lab.name, "supervisor": lab.supervisor.pid, "shared": directory, "hosts": hosts}
        print(json.dumps(about, indent=1))
    else:
        print(f"shared   {directory}")
        _print_hosts(hosts)
    return 0 if hosts and all(each["alive"] for each in hosts) else FAILED


def _describe(lab: state.LabState, host: state.HostState) -> dict[str, Any]:
    alive = host.init.alive()
    detached = lab.detached(host.name).items() if alive else ()
    return {
        "name": host.name,
        "alive": alive,
        "pid": host.init.pid,
        "ipv4": host.ipv4,
        "ipv6": host.ipv6,
        "detached": [
            {"pid": pid, "command": name, "log": str(lab.log(host.name, pid))} for pid, name in detached
        ],
    }


def _print_hosts(hosts: list[dict[str, Any]]) -> None:
    for host in hosts:
        life = "up" if host["alive"] else "dead"
        print(f"{host['name']:8} {life:4} pid {host['pid']:<7} {host['ipv4']:12} {host['ipv6']}")
        for each in host["detached"]:
            print(f"         pid {each['pid']:<7} {each['command'] or '(ended)':16} {each['log']}")


def _down(options: argparse.Namespace) -> int:
    state.remove(options.name)
    return 0


_COMMANDS = {"up": _up, "exec": _exec, "address": _address, "status": _status, "down": _down}
