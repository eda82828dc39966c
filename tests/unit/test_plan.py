"""Plans: whatever is in a file, it is a plan, or what is wrong is said with the place where it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.api import MoveOptions, SshOptions
from agent.hook_api import Select
from migrate.config import CONFIG
from migrate.plan import kinds, tree
from migrate.plan.model import Move, Plan, Rule
from migrate.plan.parse import InvalidPlan, parse, parse_object, parse_section
from migrate.plan.schema import LIMITS, SECTIONS, SSH, Key, ListOf, Section
from migrate.plan.tree import MAX_BYTES, MAX_DEPTH, MAX_NODES
from migrate.plan.write import to_object
from migrate.targets import PID_MAX

ROOT = Path(__file__).resolve().parents[2]
BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
PLAN = """\
version: 1
defaults:
  ssh: {identity: [/key, "~/other"], config: /config, agent_command: sudo migrate-agent}
  limits: {downtime_limit: 20ms, max_rounds: 7, bandwidth: 100mbit}
  verify: true
  compression_level: 3
  on_failure: continue
  parallel: 2
moves:
  - name: cache
    select: {name: redis-server}
    source: root@alpha
    destination: beta:2222
    address: 192.0.2.10
    limits:
      max_rounds: 9
      freeze_timeout: 1.5s
    verify: no
    copy_files: true
  - select:
      pid: 4711
    source: local
    destination: '[fd00::2]'
    address: [192.0.2.11, FD00:0::9]
    compression: none
drain:
  - select: {pidfile: /run/app.pid}
    destinations: [beta, gamma]
    address: none
    leave_stopped: true
  - select: {name: nginx}
    name: web
    destinations: delta
"""


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(InvalidPlan) as caught:
        parse(text if isinstance(text, bytes) else text.encode())
    return [str(problem) for problem in caught.value.problems]


def move(**keys: object) -> str:
    """A plan with one move, `keys` set in it (None: left out), each on a line from the third on."""
    keys = {"select": "{pid: 1}", "source": "alpha", "destination": "beta"} | keys
    lines = "".join(f"    {name}: {value}\n" for name, value in keys.items() if value is not None)
    return f"version: 1\nmoves:\n  -\n{lines}"


# What is read.


def test_every_key_has_its_meaning() -> None:
    common: dict[str, Any] = {"downtime_limit_ms": 20.0, "bandwidth": 12_500_000, "compression_level": 3}
    assert parse(PLAN.encode()) == Plan(
        ssh=SshOptions(identity=("/key", "~/other"), config=("/config",), agent_command="sudo migrate-agent"),
        on_failure="continue",
        parallel=2,
        moves=(
            Move(
                name="cache",
                select=Select(name="redis-server"),
                source="root@alpha",
                destination="beta:2222",
                options=MoveOptions(
                    **common,
                    addresses=("192.0.2.10",),
                    max_rounds=9,
                    freeze_timeout_ms=1500.0,
                    copy_files=True,
                ),
            ),
            Move(
                select=Select(pid=4711),
                source="local",
                destination="[fd00::2]",
                options=MoveOptions(
                    **common,
                    max_rounds=7,
                    verify=True,
                    addresses=("192.0.2.11", "fd00::9"),
                    compression="none",
                ),
            ),
        ),
        drain=(
            Rule(
                select=Select(pidfile="/run/app.pid"),
                destinations=("beta", "gamma"),
                options=MoveOptions(**common, max_rounds=7, verify=True, addresses=(), leave_stopped=True),
            ),
            Rule(
                select=Select(name="nginx"),
                name="web",
                destinations=("delta",),
                options=MoveOptions(**common, max_rounds=7, verify=True),
            ),
        ),
    )


def test_what_yaml_takes_for_something_else_is_still_a_name() -> None:
    """`no` is a truth value to YAML, 12 a number, 2001-01-01 a date."""
    plan = parse(move(select="{name: no}", source="12", destination="2001-01-01", name="~x").encode())
    assert plan.moves[0].select == Select(name="no")
    assert (plan.moves[0].source, plan.moves[0].destination, plan.moves[0].name) == ("12", "2001-01-01", "~x")


def test_empty_sections_are_as_good_as_none() -> None:
    plan = parse(b"version: 1\ndefaults:\nmoves:\ndrain: []\n")
    assert plan == Plan()


def test_aliases_are_followed() -> None:
    plan = parse(b"version: 1\nmoves:\n- select: &s {pid: 1}\n  source: a\n  destination: b\n"
                 b"- select: *s\n  source: c\n  destination: b\n")  # fmt: skip
    assert [each.select.pid for each in plan.moves] == [1, 1]


def test_a_byte_order_mark_is_no_part_of_it() -> None:
    assert parse(b"\xef\xbb\xbf" + PLAN.encode()) == parse(PLAN.encode())
    assert problems(b"\xef\xbb\xbfversion: 2\nmoves: []") == ["1:10: here must be 1, not 2"]


# What is refused, with line and column.


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # bad YAML
        ("version: 1\nmoves:\n\t- a", "3:1: not YAML: found character '\\t' that cannot start any token"),
        ("version: 1\nmoves: [", "2:9: not YAML: expected the node content"),
        ("a: b: c", "1:5: not YAML: mapping values are not allowed here"),
        ("version: 1\n---\nversion: 1", "2:1: not YAML: but found another document"),
        ("moves: *x", "1:8: not YAML: found undefined alias 'x'"),
        ("", "1:1: it is empty"),
        ("# nothing\n", "1:1: it is empty"),
        ("version: 1\nname: \x01", "2:7: the character 1 is not allowed in YAML"),
        (b"version: 1\nna\xff", "2:3: it is not UTF-8"),
        ('version: "\\UFFFFFFFF"', "1:13: an escape that is no character"),
        # bounds
        (b"#" * (MAX_BYTES + 1), "1:1: it has 262,145 bytes; a plan has 262,144 at most"),
        ("[" * 100_000, f"1:{MAX_DEPTH + 1}: not YAML: nested deeper than {MAX_DEPTH}"),
        ("moves: [" + "1," * 50_000 + "]", f"1:40003: not YAML: more than {MAX_NODES:,} values"),
        ("moves: &a [*a]", f"1:8: nested deeper than {MAX_DEPTH}"),
        # shapes
        ("[]", "1:1: here must be keys (version, defaults, moves, drain) and their values, not a list"),
        ("version: 1", "1:1: the keys 'moves' and 'drain' are both missing: there is nothing to do"),
        ("moves: []", "1:1: the key 'version' is missing"),
        ("version: 2\nmoves: []", "1:10: here must be 1, not 2"),
        ("version: 1\nmoves: {}", "2:8: here must be a list ('- …' on each line), not keys and values"),
        ("version: 1\nmoves:\n  - redis", "3:5: here must be keys (name, select,"),
        ("version: 1\nmoves: []\n? [a]\n: 1", "3:3: a key must be a word"),
        ("version: 1\nmoves: !!python/name:os.system []", "2:8: tags such as"),
        ("version: !x 1\nmoves: []", "1:10: tags such as '!x' have no meaning in a plan"),
        # keys
        ("version: 1\nmoves: []\ndrian: []", "3:1: there is no key 'drian' here; is 'drain' meant?"),
        ("version: 1\nmoves: []\nmoves: []", "3:1: the key 'moves' is there twice"),
        ("version: 1\nmoves: []\n<<: {}", "3:1: there is no key '<<' here; write what moves have in common"),
        ("version: 1\nmoves: []\nparallel: 2",
         "3:1: there is no key 'parallel' here; it belongs under 'defaults'"),
        ("version: 1\nmoves: []\nxyzzy: 2", "3:1: there is no key 'xyzzy' here; known are version, defaults"),
        (move(destination=None), "4:5: the key 'destination' is missing"),
        (move(downtime_limit="5ms"), "7:5: there is no key 'downtime_limit' here; it belongs under 'limits'"),
        (move(limits="{downtime-limit: 5ms}"),
         "7:14: there is no key 'downtime-limit' here; is 'downtime_limit'"),
        # values
        (move(select="redis"), "4:13: here must be keys (pid, pidfile, name) and their values, not 'redis'"),
        (move(select="{}"), "4:13: one of pid, pidfile and name is missing"),
        (move(select=""), "4:12: here must be keys (pid, pidfile, name) and their values, not nothing"),
        (move(select="{pid: 1, name: a}"),
         "4:13: one of pid, pidfile and name is enough; here are pid and name"),
        (move(select="{pid: 0}"), f"4:19: here must be a whole number from 1 to {PID_MAX}, not 0"),
        (move(select="{pid: '7'}"), f"4:19: here must be a whole number from 1 to {PID_MAX}, not '7'"),
        (move(select="{pid: 0x10}"), f"4:19: here must be a whole number from 1 to {PID_MAX}, not '0x10'"),
        (move(select="{pid: 1_0}"), f"4:19: here must be a whole number from 1 to {PID_MAX}, not '1_0'"),
        (move(select="{pidfile: a.pid}"), "4:23: 'a.pid' is not an absolute path"),
        (move(select="{name: /usr/bin/redis}"), "4:20: '/usr/bin/redis' is no name of a process"),
        (move(source="be/ta"), "5:13: 'be/ta': 'be/ta' is not a host name"),
        (move(destination="-oProxyCommand=id"),
         "6:18: '-oProxyCommand=id': '-oProxyCommand=id' is not a host name"),
        (move(destination="[beta]"),
         "6:18: here must be a host, `[user@]host[:port]`, as in root@beta, not a list"),
        (move(destination="alpha"), "6:18: 'alpha' is the source already"),
        (move(verify="maybe"), "7:13: here must be true or false, not 'maybe'"),
        (move(verify='"true"'), "7:13: here must be true or false, not 'true'"),
        (move(compression="lzma"), "7:18: here must be zstd or none, not 'lzma'"),
        (move(compression_level="20"), "7:24: here must be a whole number from -50 to 19, not 20"),
        (move(limits="{downtime_limit: 50}"), "7:30: '50' is not a duration"),
        (move(limits="{downtime_limit: 0ms}"), "7:30: '0ms': a duration must be longer than nothing"),
        (move(limits="{freeze_timeout: 25000min}"),
         "7:30: '25000min' is too long to be meant: at most a day"),
        (move(limits="{bandwidth: fast}"), "7:25: 'fast' is not a rate"),
        (move(limits="{bandwidth: 2000000GiB}"), "7:25: '2000000GiB' is too much to be meant"),
        (move(limits=f"{{bandwidth: {'9' * 400}GB}}"),
         "7:25: '9999999999999999999999999999999999999999…' is too much"),
        (move(limits="[1]"), "7:13: here must be keys (downtime_limit, max_rounds,"),
        (move(address="alpha"), "7:14: 'alpha' is not an IP address"),
        (move(address="[]"), "7:14: the list is empty"),
        (move(address="[10.0.0.1, 10.0.0.1]"), "7:25: '10.0.0.1' is there twice"),
        (move(address="[10.0.0.1, none]"), "7:14: none cannot be combined with other addresses"),
        (move(name='"a\\nb"'), "7:11: 'a\\nb': write at least one letter, and none that cannot be printed"),
        (move(name='"\\ud800"'), "7:11: '\\ud800' has half a character in it"),
        (move(name="x" * 5000), "7:11: too long: 5,000 characters"),
        ("version: 1\ndefaults: {on_failure: halt}\nmoves: []",
         "2:24: here must be stop or continue, not 'halt'"),
        ("version: 1\ndefaults: {parallel: 99}\nmoves: []",
         "2:22: here must be a whole number from 1 to 16, not 99"),
        ("version: 1\ndrain:\n- select: {name: a}\n  destinations: []", "4:17: the list is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(text: str | bytes, problem: str) -> None:
    found = problems(text)
    assert any(each.startswith(problem) for each in found), found


def test_everything_that_is_wrong_is_said_at_once_and_in_order() -> None:
    text = PLAN.replace("100mbit", "fast").replace("4711", "none")
    text = text.replace("delta", "del/ta").replace("name: web", "nam: web")
    assert [each.partition(": ")[0] for each in problems(text)] == ["4:60", "21:12", "32:5", "33:19"]


def test_the_same_twice() -> None:
    one = "  - {name: a, select: {pid: 1}, source: alpha, destination: beta}\n"
    text = f"version: 1\nmoves:\n{one}{one}{one.replace('alpha', 'gamma').replace('name: a', 'name: b')}"
    assert problems(text) == [
        "4:12: this name is taken already: line 3",
        "4:23: the same is selected already: line 3",
    ]
    rule = "  - {select: {name: a}, destinations: beta}\n"
    assert problems(f"version: 1\ndrain:\n{rule}{rule}") == ["4:14: the same is selected already: line 3"]


def test_the_billion_laughs_are_not_laughed() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (problem,) = problems("\n".join(lines))
    assert f"more than {MAX_NODES:,} values, with what aliases (*) repeat" in problem


def test_an_object_has_paths_in_the_place_of_lines() -> None:
    wrong = {"version": 1, "moves": [{"select": {"pid": True}, "source": None, "destination": ["b"], "x": 1}]}
    with pytest.raises(InvalidPlan) as caught:
        parse_object(wrong)
    assert [str(each).partition(":")[0] for each in caught.value.problems] == [
        "moves[0].select.pid",
        "moves[0].source",
        "moves[0].destination",
        "moves[0].x",
    ]
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InvalidPlan, match="nested deeper than"):
        parse_object({"version": 1, "moves": deep})
    with pytest.raises(InvalidPlan, match="more than"):
        parse_object({"version": 1, "moves": [0] * (MAX_NODES + 1)})


# Whatever it is.


def assert_inside(text: str, problem: str) -> None:
    line, column, message = problem.split(":", 2)
    lines = BREAK.split(text.removeprefix("\ufeff"))
    assert 1 <= int(line) <= len(lines), problem
    assert 1 <= int(column) <= len(lines[int(line) - 1]) + 1, problem
    assert message.strip() and message.isprintable(), problem


def read(text: bytes) -> None:
    """A plan, or problems, each with a place in the file; nothing else."""
    try:
        assert isinstance(parse(text), Plan)
    except InvalidPlan as error:
        assert error.problems
        for problem in error.problems:
            assert_inside(text.decode("utf-8", "replace"), str(problem))


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    read(data)


@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,? \n\t\\x0123\u2028\x85\ud7ff", max_size=80))
@example("%YAML 3.1\n---\na")
@example("!!set {a}")
@example("a: |2\n x")
def test_any_text(text: str) -> None:
    read(text.encode())


@settings(deadline=None)
@given(st.data())
def test_a_plan_with_a_part_cut_out_or_put_in(data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(PLAN)))
    end = data.draw(st.integers(begin, min(len(PLAN), begin + 40)))
    read((PLAN[:begin] + data.draw(st.text("a1:[]{}*&\n -\"'", max_size=6)) + PLAN[end:]).encode())


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.just("10ms")
)
KEYS = st.sampled_from([key.name for section in SECTIONS for key in section.keys] + ["other"])
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=6))
def test_any_object(value: dict[str, Any]) -> None:
    """As an object it is wrong for the same reasons as its YAML."""
    try:
        assert isinstance(parse_object({**value, "version": 1}), Plan)
    except InvalidPlan as error:
        assert all(str(problem) for problem in error.problems)
    read(yaml.safe_dump({**value, "version": 1}, allow_unicode=True).encode())


# There and back.

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
HOSTS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "root@", "no@"]),
    st.sampled_from(["alpha", "yes", "10.0.0.1", "[fd00::1]", "on.example", "1"]),
    st.sampled_from(["", ":22", ":2222"]),
)
PATHS = st.builds("/{}".format, NAMES)
SELECTS = st.one_of(
    st.builds(Select, pid=st.integers(1, PID_MAX)),
    st.builds(Select, pidfile=PATHS),
    st.builds(Select, name=NAMES.filter(lambda name: "/" not in name)),
)
DURATIONS = st.floats(1e-6, 86_400_000.0)
OPTIONS = st.builds(
    MoveOptions,
    downtime_limit_ms=DURATIONS,
    max_rounds=st.integers(1, 1_000_000),
    freeze_timeout_ms=DURATIONS,
    bandwidth=st.none() | st.integers(1024, 1 << 50),
    compression=st.sampled_from(["zstd", "none"]),
    compression_level=st.integers(-50, 19),
    addresses=st.none() | st.lists(st.ip_addresses().map(str), max_size=3, unique=True).map(tuple),
    verify=st.booleans(),
    leave_stopped=st.booleans(),
    copy_files=st.booleans(),
)
MOVES = st.builds(
    Move,
    name=st.none() | NAMES,
    select=SELECTS,
    source=HOSTS | st.just("local"),
    destination=HOSTS,
    options=OPTIONS,
)
RULES = st.builds(
    Rule,
    name=st.none() | NAMES,
    select=SELECTS,
    destinations=st.lists(HOSTS, min_size=1, max_size=3, unique=True).map(tuple),
    options=OPTIONS,
)


def singular(plan: Plan) -> bool:
    """Whether nothing is there twice."""
    names = [each.name for each in plan.moves] + [each.name for each in plan.drain]
    said = [name for name in names if name is not None]
    selects: list[object] = [(move.select, move.source) for move in plan.moves]
    selects += [rule.select for rule in plan.drain]
    whole = len(set(said)) == len(said) and len(set(selects)) == len(selects)
    return whole and all(move.source != move.destination for move in plan.moves)


PLANS = st.builds(
    Plan,
    moves=st.lists(MOVES, max_size=3).map(tuple),
    drain=st.lists(RULES, max_size=3).map(tuple),
    ssh=st.builds(
        SshOptions,
        identity=st.lists(PATHS, max_size=2, unique=True).map(tuple),
        config=st.lists(PATHS, max_size=2, unique=True).map(tuple),
        agent_command=NAMES,
    ),
    on_failure=st.sampled_from(["stop", "continue"]),
    parallel=st.integers(1, 16),
).filter(singular)


@settings(deadline=None)
@given(PLANS, st.booleans())
def test_a_plan_that_is_written_reads_as_the_same(plan: Plan, flow: bool) -> None:
    written = to_object(plan)
    assert parse(yaml.safe_dump(written, allow_unicode=True, default_flow_style=flow).encode()) == plan
    assert parse(json.dumps(written, indent=1).encode()) == plan
    assert parse_object(msgspec.json.decode(msgspec.json.encode(written))) == plan


# What is documented.


def value(key: Key) -> str:
    if isinstance(key.kind, Section):
        return f"keys of [{key.name}](#{key.name})"
    return f"list, see [{key.name}](#{key.name})" if isinstance(key.kind, ListOf) else key.kind.about


def table(section: Section) -> str:
    """The reference of a section, as it is in docs/plans.md."""
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key in section.keys:
        default = "**required**" if key.required else key.default
        rows.append(f"| `{key.name}` | {value(key)} | {default} | {key.about} |")
    return "\n".join(rows)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.path or "top")
def test_the_reference_has_every_key(section: Section) -> None:
    page = (ROOT / "docs/plans.md").read_text()
    heading = f"### {section.path}\n" if section.path else "### The file\n"
    assert heading in page
    assert table(section) in page, f"docs/plans.md must have:\n{table(section)}"


def test_defaults_are_the_command_lines() -> None:
    """What the reference says of what is not written is what happens then."""
    said = {key.name: key.default for section in SECTIONS for key in section.keys}
    assert parse(move().encode()).moves[0].options == MoveOptions()
    limits = [said[name] for name in ("downtime_limit", "max_rounds", "freeze_timeout")]
    options = parse(
        move(limits="{{downtime_limit: {}, max_rounds: {}, freeze_timeout: {}}}".format(*limits)).encode()
    )
    assert options.moves[0].options == MoveOptions()
    assert (said["compression"], said["compression_level"]) == ("zstd", str(MoveOptions().compression_level))


def test_the_example_of_defaults_has_every_key() -> None:
    """They are what they are without it, so that a person can start from it."""
    text = (ROOT / "configs/config.yaml").read_text()
    found = parse_section(text.encode(), CONFIG)
    defaults = parse(move().encode()).moves[0].options
    assert found["limits"] == {
        "downtime_limit": defaults.downtime_limit_ms,
        "max_rounds": defaults.max_rounds,
        "freeze_timeout": defaults.freeze_timeout_ms,
        "reconnect": defaults.reconnect_ms,
    }
    assert found["compression"] == defaults.compression
    assert found["compression_level"] == defaults.compression_level
    assert found["ssh"]["agent_command"] == SshOptions().agent_command
    for key in (*CONFIG.keys, *SSH.keys, *LIMITS.keys):
        assert re.search(rf"^ *(# )?{key.name}: ?", text, re.M), key.name


def test_the_examples_in_the_documentation_are_plans() -> None:
    page = (ROOT / "docs/plans.md").read_text()
    examples = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    assert examples
    for each in examples:
        parse(each.encode())


def test_a_long_list_is_compared_with_itself_once() -> None:
    """What is there twice is found by a look, not by comparing each with all before it."""
    compared, problems = 0, list[tree.Problem]()

    class Word(str):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, str(other))

        __hash__ = str.__hash__

    place = tree.Place()
    nodes = tuple(tree.Scalar(place, f"host-{number}", "text") for number in range(1000))
    each = kinds.text(Word, "a word", "x")
    found = kinds.several(each, "").read(tree.Items(place, nodes), problems.append)
    assert not problems
    assert len(found) == 1000 and compared < 5000
