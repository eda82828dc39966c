"""The documentation says what the code says: the rendered page is current, every kind is explained."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from agent import protocol
from migrate.cli import cli
from migrate.errors import MEANING
from transport import link_errors

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
SOURCES = [path for name in ("agent", "migrate", "transport") for path in sorted((ROOT / name).rglob("*.py"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load()


def explained(page: str) -> set[str]:
    """What a page has in its tables' first column, in code type."""
    rows = re.findall(r"^\| ([^|]*) \|", (DOCS / page).read_text(), re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_page_is_what_the_code_says() -> None:
    assert generate.PAGE.read_text() == generate.render(), "run: python docs/generate.py"


def test_a_changed_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "page.md"
    monkeypatch.setattr(generate, "PAGE", copy)
    assert generate.main(["--check"]) == 1
    copy.write_text(generate.render().replace("eventfd", "eventfood"))
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0 == generate.main(["--check"])


def test_a_table_that_nobody_asks_for_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copy(generate.TEMPLATE, tmp_path))
    copy.write_text(copy.read_text().replace("{{tcp options}}\n", "\n"))
    monkeypatch.setattr(generate, "TEMPLATE", copy)
    with pytest.raises(ValueError, match="tcp options"):
        generate.render()


def test_a_field_that_nobody_describes_is_noticed() -> None:
    class State(msgspec.Struct):
        known: int
        new: int

    with pytest.raises(KeyError, match="new"):
        generate.fields(State, {"known": "…"})()
    with pytest.raises(ValueError, match="gone"):
        generate.fields(State, {"known": "…", "new": "…", "gone": "…"})()


def test_refusals_are_read_from_the_source(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "WHY = 'of the module'\n"
        "def blockers(x):\n"
        "    why = f'it is {x}'\n"
        "    yield Blocker(kind='first', what='', why=why, hint='leave it')\n"
        "    why = WHY\n"
        "    yield 'a-b' if x else 'c', why, ''\n"
        "    return Blocker(kind=x, what='', why='not known here')\n"
        "def nobody_calls():\n"
        "    return Blocker(kind='never', what='', why='never')\n"
    )
    assert [tuple(found) for found in generate._in_module(source, {"blockers"})] == [
        ("first", "it is …", "leave it"),
        ("a-b", "of the module", ""),
        ("c", "of the module", ""),
    ]


def test_every_module_that_refuses_has_a_section() -> None:
    known = {name for modules in generate.SECTIONS.values() for name in modules} | {"kinds.py", "api.py"}
    agent = ROOT / "agent"
    makers = {str(p.relative_to(agent)) for p in agent.rglob("*.py") if "Blocker(" in p.read_text()}
    assert makers <= known


def test_plans_are_for_what_is_refused() -> None:
    assert set(generate.PLANS) <= generate.all_kinds()


def test_every_blocker_has_its_advice() -> None:
    assert generate.all_kinds() <= explained("troubleshooting.md")


def test_every_notice_is_explained() -> None:
    kinds = {kind for p in SOURCES for kind in re.findall(r'Notice\(\s*kind="([a-z-]+)"', p.read_text())}
    assert kinds
    assert kinds <= explained("what-migrates.md")


def test_every_error_of_the_link_has_its_advice() -> None:
    found = (v for v in vars(link_errors).values() if isinstance(v, type))
    kinds = {v.kind for v in found if issubclass(v, link_errors.LinkError)}
    assert kinds - {"link"} <= explained("troubleshooting.md")


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_exit_codes(page: str) -> None:
    text = (ROOT / page).read_text()
    for code, meaning in MEANING.items():
        assert f"| {int(code)} | {meaning} |" in text


def test_every_option_is_listed() -> None:
    text = (ROOT / "README.md").read_text()
    for command in cli.commands.values():
        for parameter in command.params:
            for option in (o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("--")):
                assert f"`{option}" in text, f"{command.name} {option}"


def test_every_message_of_the_protocol_is_in_the_architecture() -> None:
    text = (DOCS / "architecture.md").read_text()
    for message in protocol.Message.__args__:
        assert f"`{message.__name__}`" in text


def test_every_file_of_the_agent_has_its_place() -> None:
    text = (DOCS / "architecture.md").read_text()
    elsewhere = ("commands", "migrate")
    names = {p.name for p in SOURCES if p.name != "__init__.py" and p.parent.name not in elsewhere}
    assert not [name for name in sorted(names) if f"`{name}`" not in text]


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if not target.startswith(("http:", "https:")):
            path, _, anchor = target.partition("#")
            aim = (page.parent / path) if path else page
            assert aim.exists(), target
            assert not anchor or anchor in anchors(aim), target
