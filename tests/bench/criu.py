"""What a person would otherwise use: `criu`, where one on PATH works, on this machine alone, images on tmpfs.

It dumps and restores the same workload without any network between: the least that a move with it can cost.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from lab.fixture import until
from programs.status import BUILD, wait_for_status

from bench import trace as traces
from bench.results import Limit

TMPFS: Final = Path("/dev/shm")
CASES: Final = ((16, 0), (64, 50), (1024, 50))  # MiB, MB/s written
BASELINE: Final = 0.5
COMMON: Final = ("--manage-cgroups=ignore", "-v2")


def limits(repeat: int) -> list[Limit]:
    """The workload's longest gap for each case; or why there is none, in criu's own words."""
    refusal = trouble()
    if refusal is not None:
        return [refusal]
    name = f"criu {_version()}"
    return [
        _limit(f"{name}, {size} MiB, {rate} MB/s: longest gap", size, rate, repeat) for size, rate in CASES
    ]


def trouble() -> Limit | None:
    """Why criu cannot be used here; None if it can."""
    if shutil.which("criu") is None:
        return Limit(name="criu", unit="", values=(), error="there is none on PATH")
    done = _run("check", check=False)
    if done.returncode == 0:
        return None
    return Limit(
        name=f"criu {_version()}", unit="", values=(), error=said(done.stdout + done.stderr), how="criu check"
    )


def said(output: str) -> str:
    """Its first error that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error") and "exited, status" not in line]
    return (errors or lines[-1:] or ["it says nothing"])[0]


def _version() -> str:
    found = re.search(r"Version: (\S+)", _run("--version", check=False).stdout)
    return found[1] if found else "?"


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["criu", *command], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"criu {command[0]}: {said(done.stdout + done.stderr)}")
    return done


def _limit(name: str, megabytes: int, rate: int, repeat: int) -> Limit:
    how = "dump and restore, images on tmpfs, no network"
    try:
        gaps = tuple(_gap(megabytes, rate) for _ in range(repeat))
    except (RuntimeError, TimeoutError) as error:
        return Limit(name=name, unit="ms", values=(), error=str(error), how=how)
    return Limit(name=name, unit="ms", values=gaps, how=how)


def _gap(megabytes: int, rate: int) -> float:
    """One dump and restore."""
    with tempfile.TemporaryDirectory(dir=TMPFS, prefix="bench-criu-") as name:
        place = Path(name)
        process = _start(place, megabytes, rate)
        try:
            began = time.time()
            _round_trip(process, place / "images")
            ended = time.time() + 0.1
            time.sleep(0.2)
        except BaseException:
            _end(process, signal.SIGKILL)
            raise
        _end(process, signal.SIGTERM)
        gap = traces.longest_gap(traces.read(place / "trace"), (began, ended))
    if gap is None:
        raise RuntimeError("the workload has no heartbeat after criu")
    return gap


def _start(place: Path, megabytes: int, rate: int) -> subprocess.Popen[bytes]:
    (place / "images").mkdir()
    options = ["--megabytes", str(megabytes), "--rate", str(rate)]
    files = [word for kind in ("status", "log", "trace") for word in (f"--{kind}", str(place / kind))]
    command = [str(BUILD / "heartbeat"), *options, *files]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
    wait_for_status(place / "status", deadline=60)
    time.sleep(BASELINE)
    return process


def _round_trip(process: subprocess.Popen[bytes], images: Path) -> None:
    _run("dump", "-t", str(process.pid), "-D", str(images), *COMMON)
    process.wait(30)
    _run("restore", "-d", "-D", str(images), *COMMON)


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Of the first or of the restored one: they have the same pid."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, number)
        until(lambda: process.poll() is not None and not _alive(process.pid), "the workload ends", 60)
    finally:
        os.close(pidfd)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
