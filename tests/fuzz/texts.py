"""Targets that are text: plans, the configuration, the API's requests, events and answers, records."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import msgspec
from fuzz.mutate import mutate_bytes, mutate_json
from fuzz.target import Target

from agent import api, front, hook_api
from agent.bounds import MALFORMED
from agent.front import BadRequest
from agent.recovery import verdict_of
from agent.server import hooks, store
from agent.server.connect import MARK
from agent.server.failures import Failed
from agent.server.route import body_of
from migrate import client, config, progress
from migrate.errors import Failure
from migrate.hello import Hello, connected_of
from migrate.plan import parse
from migrate.plan.model import Plan
from migrate.plan.write import to_object
from transport.lines import LineBuffer, LineTooLong

_CONFIGS = Path(__file__).parent.parent.parent / "configs"
_LINE = 1 << 16
_PLAN = b"""version: 1
defaults: {limits: {downtime_limit: 50ms, bandwidth: 1gbit}, ssh: {identity: [~/.ssh/id]}, on_failure: stop}
moves:
  - {name: "the \\u00e9 cache", select: {name: redis-server}, source: alpha, destination: "root@beta:2222"}
  - {select: {pid: 12}, source: local, destination: beta, address: [192.0.2.10, "2001:db8::1"], verify: yes}
drain:
  - &rule {select: {pidfile: /run/x.pid}, destinations: [beta, gamma], compression: none}
"""


def _plan(read: Callable[[bytes], Plan]) -> Callable[[bytes], bool]:
    def run(data: bytes) -> bool:
        try:
            plan = read(data)
        except parse.InvalidPlan as error:
            assert 0 < len(error.problems) <= parse.MAX_PROBLEMS
            assert all(str(problem) for problem in error.problems)
            return False
        assert parse.parse_object(to_object(plan)) == plan
        return True

    return run


def _plan_of_json(data: bytes) -> Plan:
    """As the API has it: the object inside a request."""
    try:
        wanted = msgspec.json.decode(data)
    except MALFORMED:
        wanted = data
    return parse.parse_object(wanted)


def _plans() -> list[bytes]:
    return [_PLAN, *(file.read_bytes() for file in sorted((_CONFIGS / "plans").glob("*.yaml")))]


def _plan_objects() -> list[bytes]:
    return [msgspec.json.encode(to_object(parse.parse(text))) for text in _plans()]


def _config(data: bytes) -> bool:
    try:
        values = parse.parse_section(data, config.CONFIG)
    except parse.InvalidPlan:
        return False
    assert all(isinstance(name, str) for name in values)
    return True


def _mutate_yaml(data: bytes, random: Random) -> bytes:
    """Lines and words in other places, and signs that mean something to YAML."""
    if random.random() < 0.4:
        return mutate_bytes(data, random)
    lines = data.split(b"\n")
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    signs = [b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"? ", b"- " * 20, b"{", b"[" * 20]
    match random.randrange(4):
        case 0:
            lines[at] = lines[other]
        case 1:
            lines.insert(at, b" " * random.randrange(5) + lines[other])
        case 2:
            position = random.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:position] + random.choice(signs) + lines[at][position:]
        case _:
            words = lines[at].split(b" ")
            odd = (b"0", b"1e400", b"9" * 30, b"~", b'"\\ud800"')
            words[random.randrange(len(words))] = random.choice(odd)
            lines[at] = b" ".join(words)
    return b"\n".join(lines)


# --- the API, as the agent reads it ---


def _request(data: bytes) -> bool:
    try:
        front.validate(body_of(data, api.Request))
        front.parse_request(data)
    except BadRequest:
        return False
    return True


def _requests() -> list[bytes]:
    ssh = api.SshOptions(identity=("/root/.ssh/id",), auth_socket="/tmp/agent")
    options = api.MoveOptions(bandwidth=1 << 20, addresses=("192.0.2.10", "2001:db8::1"), verify=True)
    one = api.Request(operation="move", pid=1234, destination="root@beta:22", options=options, ssh=ssh)
    return [msgspec.json.encode(one), b'{"operation": "check", "pid": 1, "destination": "beta"}']


def _abort(data: bytes) -> bool:
    return front.abort_reason(data) is not None


def _select(data: bytes) -> bool:
    try:
        hooks.must_select(body_of(data, hook_api.Select))
    except BadRequest:
        return False
    return True


def _drain(data: bytes) -> bool:
    """Files of this host are not opened for it."""
    try:
        wanted = body_of(data, hook_api.Drain)
        hooks.plan_of(msgspec.structs.replace(wanted, plan_file=None))
    except (BadRequest, Failed):
        return False
    return True


def _drains() -> list[bytes]:
    plan = to_object(parse.parse(_PLAN))
    return [msgspec.json.encode(hook_api.Drain(plan=plan, destinations=("beta",), reached_at="192.0.2.1"))]


# --- the API, as the tool reads it ---

_BLOCKER = api.Blocker(kind="unix-socket", what="fd 7", why="it is", hint="close it")
_ROUND = api.Round(number=1, pages_sent=5, pages_discarded=1, bytes=99, seconds=0.5, dirty_rate=1e6)
_REPORT = api.Report(
    outcome=api.Outcome.MIGRATED,
    source=api.Endpoint(host="alpha", pid=1),
    destination=api.Endpoint(host="beta"),
    pause_ms=11.4,
    rounds=(_ROUND,),
    phases=(api.Phase(name="stop", ms=0.5, where="source"),),
    blockers=(_BLOCKER,),
)
_CHECKED = api.CheckResult(
    source=_REPORT.source,
    destination=_REPORT.destination,
    command="sleep 1",
    memory_bytes=1,
    threads=1,
    mappings=1,
    descriptors=1,
    connections=0,
    dirty_tracking="userfaultfd",
)
_EVENTS: list[api.Event] = [
    api.StateChanged(state="freezing", detail="x"),
    api.Progress(round=1, pages_done=1, pages_total=2, bytes_sent=3, rate=4.5, estimated_pause_ms=15.0),
    api.RoundFinished(round=_ROUND, remaining_pages=3, estimated_pause_ms=15.5),
    api.Log(level="warning", message="a\x1b[2Jb"),
    api.Finished(report=_REPORT),
    api.Checked(result=_CHECKED),
]
_events = msgspec.json.Decoder(api.Event)
_drain_events = msgspec.json.Decoder(hook_api.DrainEvent)


def _event_lines(data: bytes) -> bool:
    """Lines as they come from an agent, shown in each way."""
    stream = io.StringIO()
    presenters: list[progress.Presenter] = [progress.PlainLines(stream, 0), progress.JsonLines(stream, 0)]
    count = 0
    try:
        for line in LineBuffer(_LINE).feed(data + b"\n"):
            event = _events.decode(line)
            count += 1
            for presenter in presenters:
                presenter.show(event)
            if isinstance(event, api.Progress):
                progress.describe_progress(event)
    except (*MALFORMED, LineTooLong):
        pass
    shown = stream.getvalue()
    assert "\x1b" not in shown
    return count > 0


def _drain_event_lines(data: bytes) -> bool:
    try:
        _drain_events.decode(data)
    except MALFORMED:
        return False
    return True


def _drain_event_seeds() -> list[bytes]:
    process = hook_api.Selected(pid=7, name="redis", command="redis x", user="root", started=99)
    tried = hook_api.Tried(destination="beta", check=_CHECKED)
    drained = hook_api.DrainedProcess(process=process, status="migrated", tried=(tried,), report=_REPORT)
    report = hook_api.DrainReport(outcome="migrated", host="alpha", processes=(drained,))
    events: list[hook_api.DrainEvent] = [
        hook_api.DrainStarted(processes=(drained,)),
        hook_api.DrainProgress(pid=7, destination="beta", of=_EVENTS[0]),
        hook_api.DrainSettled(process=drained),
        hook_api.Drained(report=report),
    ]
    return [msgspec.json.encode(event) for event in events]


_ANSWERS = (api.Connected, api.MigrationRecord, api.MigrationList, list[api.ProcessInfo], hook_api.Selection)


def _answer(data: bytes) -> bool:
    """Each answer's body, and an error's."""
    understood = False
    for kind in _ANSWERS:
        try:
            msgspec.json.decode(data, type=kind)
            understood = True
        except MALFORMED:
            continue
    for status in (404, 500):
        try:
            failure = client.failure(status, data)
        except MALFORMED:
            continue
        assert isinstance(failure, Failure)
        understood = True
    return understood


def _verdict(data: bytes) -> bool:
    try:
        verdict_of(data)
    except EOFError:
        return False
    return True


def _hello(data: bytes) -> bool:
    """What comes over the first connection, whole and byte by byte: the same line, and the same noise."""
    whole, pieces = Hello(), Hello()
    line = whole.feed(data)
    for at in range(len(data)):
        if (last := pieces.feed(data[at : at + 1])) is not None:
            assert last == line
            break
    else:
        assert line is None
    assert whole.noise == pieces.noise and MARK not in whole.noise
    return line is not None and connected_of(line) is not None


def _hellos() -> list[bytes]:
    health = api.Health(version="0.1", protocol=2, host="alpha", pid=7, running=0)
    line = MARK + msgspec.json.encode(api.Connected(health=health, reached_at="192.0.2.1")) + b"\n"
    return [line, b"Welcome to alpha\n" + line, MARK[:7] + line]


def _mutate_hello(data: bytes, random: Random) -> bytes:
    noise, mark, line = data.partition(MARK)
    if not mark or random.random() < 0.3:
        return mutate_bytes(data, random)
    return noise + mark + mutate_json(line.rstrip(b"\n"), random) + b"\n"


def _record() -> api.MigrationRecord:
    return api.MigrationRecord(
        id="01ARZ3NDEKTSV4RRFFQ69G5FAV",
        request=msgspec.json.decode(_requests()[0], type=api.Request),
        status="finished",
        state="live",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        report=_REPORT,
    )


def _answers() -> list[bytes]:
    health = api.Health(version="0.1", protocol=2, host="alpha", pid=7, running=0)
    process = api.ProcessInfo(
        pid=7,
        command="x",
        user="root",
        memory_bytes=1,
        threads=1,
        sockets=0,
        dirty_rate=None,
        blockers=(_BLOCKER,),
    )
    error = api.ErrorBody(error=api.ErrorInfo(kind="not-found", message="no", where="source"))
    some = api.MigrationList(migrations=(_record(),))
    found = [api.Connected(health=health), _record(), some, [process], error]
    return [msgspec.json.encode(one) for one in found]


def _stored(data: bytes) -> bool:
    try:
        found = store.stored(data)
    except MALFORMED:
        return False
    assert all(isinstance(bytes(event), bytes) for event in found.events)
    return True


def _records() -> list[bytes]:
    lines = tuple(msgspec.Raw(msgspec.json.encode(event)) for event in _EVENTS)
    return [msgspec.json.encode(store.Stored(_record(), lines))]


TARGETS = (
    Target("plan-yaml", _plan(parse.parse), _plans, _mutate_yaml),
    Target("plan-json", _plan(_plan_of_json), _plan_objects, mutate_json),
    Target("config", _config, lambda: [(_CONFIGS / "config.yaml").read_bytes()], _mutate_yaml),
    Target("api-request", _request, _requests, mutate_json),
    Target("api-abort", _abort, lambda: [b'{"abort": true, "reason": "x"}'], mutate_json),
    Target("api-select", _select, lambda: [b'{"pid": 7}', b'{"name": "redis"}'], mutate_json),
    Target("api-drain", _drain, _drains, mutate_json),
    Target("api-answer", _answer, _answers, mutate_json),
    Target("hello", _hello, _hellos, _mutate_hello),
    Target("verdict", _verdict, lambda: [b'{"state": "live", "evidence": "x", "pid": 7}'], mutate_json),
    Target("events", _event_lines, lambda: [*map(msgspec.json.encode, _EVENTS)], mutate_json),
    Target("drain-events", _drain_event_lines, _drain_event_seeds, mutate_json),
    Target("record", _stored, _records, mutate_json),
)
