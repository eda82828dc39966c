"""What a person needs to see why a run went wrong, as text; lines and tables of a campaign."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults.hosts import Host
from faults.subject import Subject, pictures
from faults.verdict import Verdict

_LOG_LINES, _SHOWN = 60, 8


def keep(directory: Path, verdict: Verdict) -> None:
    """Write down what a run looked like."""
    if verdict.evidence:
        directory.mkdir(parents=True, exist_ok=True)
        name = verdict.case.name.replace("/", "_").replace(":", ".")
        path = directory / f"{name}.txt"
        path.write_text(verdict.evidence)
        print(f"      see {path}", file=sys.stderr, flush=True)


def line(number: int, verdict: Verdict) -> str:
    """A run in a line; its name is what repeats it alone (`--only`)."""
    fired = "" if len(verdict.fired) >= len(verdict.case.faults) else ", not reached"
    recovered = ", by a service" if verdict.recovered else ""
    times = f"{verdict.ended.seconds:.1f}+{verdict.settled_s:.1f} s, gap {verdict.gap_ms:.0f} ms"
    head = f"{number:5} {verdict.case.name}: {verdict.outcome}{fired}{recovered} ({times})"
    shown = [f"      VIOLATION {problem}" for problem in verdict.problems[:_SHOWN]]
    rest = [f"      and {len(verdict.problems) - _SHOWN} more"] if len(verdict.problems) > _SHOWN else []
    return "\n".join([head, *shown, *rest])


def of(verdict: Verdict, subject: Subject, hosts: dict[str, Host]) -> str:
    """Everything about a run, while the hosts are as it left them."""
    parts = dict(_parts(verdict, subject, hosts))
    return "".join(f"--- {title}\n{text.rstrip()}\n" for title, text in parts.items())


def _parts(verdict: Verdict, subject: Subject, hosts: dict[str, Host]) -> Iterator[tuple[str, str]]:
    case, ended = verdict.case, verdict.ended
    faults = [f"{n}. {fault}" for n, fault in enumerate(case.faults)]
    yield "case", "\n".join([case.name, f"from {verdict.source}, options {' '.join(case.options)}", *faults])
    yield "violations", "\n".join(map(str, verdict.problems))
    yield "fired", "\n".join(f"{one.seconds:.3f} s: fault {one.fault}, {one.asked}" for one in verdict.fired)
    yield "command", f"{ended.outcome}, status {ended.code}, {ended.seconds:.1f} s\n{ended.output}"
    yield "progress", ended.errors
    yield "copies", json.dumps(pictures(subject), indent=1)
    for name, host in hosts.items():
        yield f"processes of {name}", "\n".join(map(str, host.processes()))
        yield f"network of {name}", host.enter("sh", "-c", "ip -o address; ss -tan")
        yield f"files of {name}", "\n".join(host.leavings())
        yield f"log of {name}", "\n".join(host.log().splitlines()[-_LOG_LINES:])


def table(verdicts: Sequence[Verdict]) -> str:
    """By outcome, how often; and how long the process stood still in them."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    lines = [f"{'outcome':34} {'runs':>5} {'violated':>9} {'median gap':>11} {'longest gap':>12}"]
    for outcome, count in sorted(counts.items()):
        alike = [verdict for verdict in verdicts if verdict.outcome == outcome]
        gaps = sorted(verdict.gap_ms for verdict in alike)
        wrong = sum(bool(verdict.problems) for verdict in alike)
        lines.append(f"{outcome:34} {count:5} {wrong:9} {gaps[len(gaps) // 2]:8.0f} ms {gaps[-1]:9.0f} ms")
    kinds = Counter(kind for verdict in verdicts for kind in {problem.kind for problem in verdict.problems})
    lines += ["", f"violated runs: {sum(bool(verdict.problems) for verdict in verdicts)} of {len(verdicts)}"]
    lines += [f"  {kind:12} {count:5}" for kind, count in sorted(kinds.items())]
    unreached = [verdict.case.name for verdict in verdicts if not verdict.fired]
    return "\n".join([*lines, f"faults that never came: {len(unreached)}"])
