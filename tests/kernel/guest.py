"""A machine with Debian 12's kernel, emulated: it sees this host's file system, runs one command, and ends.

    tests/kernel/run COMMAND...

The root directory is the host's by 9p, read-only; /tmp, /run, /var/tmp and /dev/shm are the guest's
own memory. There is no network but loopback. Software emulation (TCG) needs no right of any kind, and
is some ten times slower.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Final

from kernel.initramfs import initramfs
from kernel.packages import fetch

_STATUS: Final = re.compile(r"\nguest: status (\d+)\n\Z")
# no five-level paging and no protection against each other's speculation: it is only slower by them
_COMMAND_LINE: Final = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no5lvl random.trust_cpu=on"
_EMULATOR: Final = [
    *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
    *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
]


class GuestFailed(Exception):
    """The machine did not come to the end of its command; the message has what it said."""


@dataclass(frozen=True)
class Result:
    """What a command in a guest came to."""

    status: int
    output: str


def run(command: Sequence[str], directory: str = "/", seconds: float = 600, megabytes: int = 1536) -> Result:
    """Run a command as root in a guest of its own. GuestFailed if it or the guest does not end in time."""
    script = f"cd {join([directory])} && {join(command)}\n"
    with tempfile.TemporaryDirectory(prefix="migrate-guest-") as place:
        output, console = Path(place) / "output", Path(place) / "console"
        kernel = fetch()
        (Path(place) / "initramfs").write_bytes(initramfs(kernel.modules, kernel.busybox, script))
        arguments = [
            *(*_EMULATOR, "-m", str(megabytes)),
            *("-kernel", str(kernel.image), "-initrd", f"{place}/initramfs"),
            *("-append", _COMMAND_LINE, "-serial", f"file:{console}", "-serial", f"file:{output}"),
        ]
        ended = _emulate(arguments, seconds)
        text = _text(output)
        found = _STATUS.search(text)
        if found is None:
            why = (
                f"ended without a word ({ended})" if ended is not None else f"did not end in {seconds:.0f} s"
            )
            raise GuestFailed(f"the guest {why}\n--- console\n{_text(console)}\n--- output\n{text}")
        return Result(int(found[1]), text[: found.start()])


def _text(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().decode("utf-8", "replace")
    return ""


def _emulate(arguments: list[str], seconds: float) -> str | None:
    """How the emulator ended; None if it had to be killed."""
    emulator = subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = emulator.communicate(timeout=seconds)
        return f"status {emulator.returncode} {said.decode('utf-8', 'replace')}".strip()
    except subprocess.TimeoutExpired:
        return None
    finally:
        emulator.kill()
        emulator.wait()


def main() -> int:
    """The command line's: prints the command's output and ends with its status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the emulator does not outlive us
    result = run(sys.argv[1:], str(Path.cwd()))
    print(result.output, end="")
    return result.status
