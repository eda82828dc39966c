"""A person's defaults: what they say is what commands do, and what is wrong is named line by line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from migrate import config
from migrate.cli import cli
from migrate.errors import ExitCode, Failure
from migrate.options import Common
from migrate.plan import command as planned
from migrate.plan.parse import parse

EVERYTHING = """
ssh:
  identity: ~/.ssh/moving
  config: [/etc/one, /etc/two]
  agent_command: sudo migrate-agent
limits:
  downtime_limit: 20ms
  max_rounds: 7
  freeze_timeout: 5s
  bandwidth: 100mbit
compression: none
compression_level: 3
log_format: json
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    made = tmp_path / "migrate" / "config.yaml"
    made.parent.mkdir()
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What `migrate check` would do with its options."""
    found: dict[str, object] = {}
    from migrate import job

    def run(request: object, source: object, common: object) -> ExitCode:
        found.update(request=request, common=common)
        return ExitCode.DONE

    monkeypatch.setattr(job, "run", run)
    return found


def check(*options: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "1", "beta", *options], standalone_mode=False)
    assert ended.value.code == ExitCode.DONE


def test_everything_it_says_is_the_default(file: Path, seen: dict[str, object]) -> None:
    file.write_text(EVERYTHING)
    check()
    common, request = seen["common"], seen["request"]
    assert isinstance(common, Common)
    assert common.ssh.identity == ("~/.ssh/moving",) and common.ssh.config == ("/etc/one", "/etc/two")
    assert (common.ssh.agent_command, common.log_format) == ("sudo migrate-agent", "json")
    options = request.options  # type: ignore[attr-defined]
    assert (options.downtime_limit_ms, options.max_rounds, options.freeze_timeout_ms) == (20.0, 7, 5000.0)
    assert (options.bandwidth, options.compression, options.compression_level) == (12_500_000, "none", 3)


def test_the_command_line_is_stronger(file: Path, seen: dict[str, object]) -> None:
    file.write_text(EVERYTHING)
    check("--agent-command", "other", "--downtime-limit", "1s", "--log-format", "text", "-i", "key")
    common, request = seen["common"], seen["request"]
    assert isinstance(common, Common)
    assert (common.ssh.agent_command, common.ssh.identity, common.log_format) == ("other", ("key",), "text")
    assert common.typed == {"agent_command", "identity"}
    assert request.options.downtime_limit_ms == 1000.0  # type: ignore[attr-defined]
    assert request.options.max_rounds == 7  # type: ignore[attr-defined]


def test_a_plan_is_stronger_and_the_command_line_stronger_still(file: Path, seen: dict[str, object]) -> None:
    file.write_text(EVERYTHING)
    check("-i", "typed")
    common = seen["common"]
    assert isinstance(common, Common)
    text = "version: 1\ndefaults: {ssh: {agent_command: planned, identity: planned}}\nmoves: []\n"
    ssh = planned.reached_by(parse(text.encode()), common)
    assert (ssh.agent_command, ssh.identity, ssh.config) == ("planned", ("typed",), ("/etc/one", "/etc/two"))


def test_without_it_nothing_changes(file: Path, seen: dict[str, object]) -> None:
    check()
    assert config.load() == {}
    assert seen["request"].options.downtime_limit_ms == 50.0  # type: ignore[attr-defined]


def test_every_mistake_is_named_with_line_and_column(file: Path) -> None:
    file.write_text("ssh:\n  identty: x\nlimits:\n  downtime_limit: 20\n  downtime_limit: 1s\nspeed: 9\n")
    with pytest.raises(Failure) as caught:
        config.load()
    lines = str(caught.value).splitlines()
    assert [line.removeprefix(f"{file}:").split(": ")[0] for line in lines] == ["2:3", "4:19", "5:3", "6:1"]
    assert "is 'identity' meant?" in lines[0] and "not a duration" in lines[1]
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "1:1: it is empty"),
        (b"- ssh\n", "1:1: here must be keys"),
        (b"ssh: [\n", "not YAML"),
        (b"compression: lzma\n", "1:14: here must be zstd or none"),
        (b"\xff\n", "not UTF-8"),
        (b"log_format: !!python/object:os.system x\n", "have no meaning"),
    ],
)
def test_what_is_no_configuration(file: Path, data: bytes, words: str) -> None:
    file.write_bytes(data)
    with pytest.raises(Failure, match=words):
        config.load()


def test_a_file_that_cannot_be_read_is_named(file: Path) -> None:
    file.mkdir()
    with pytest.raises(Failure, match=f"{file}: Is a directory"):
        config.load()


def test_help_and_version_work_whatever_it_says(file: Path) -> None:
    file.write_text("nonsense")
    for arguments in (["version"], ["completion", "bash"]):
        cli.main(arguments, standalone_mode=False)
    with pytest.raises(Failure):
        cli.main(["ps"], standalone_mode=False)


def test_every_default_is_a_parameter_of_a_command(file: Path) -> None:
    file.write_text(EVERYTHING)
    parameters = {parameter.name for parameter in cli.commands["move"].params}
    assert set(config.load()) <= parameters
    assert isinstance(cli.commands["plan"], click.Group)


# Completion.


def complete(*words: str) -> list[str]:
    """What click offers for the last word, as the script for bash asks it."""
    environment = {
        **os.environ,
        "_MIGRATE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["migrate", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv = ['migrate']; from migrate.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return [line.removeprefix("plain,") for line in done.stdout.split()]


def test_commands_and_options_are_completed() -> None:
    assert complete("mo") == ["move"]
    assert {"--compression", "--compression-level"} <= set(complete("move", "--comp"))


def test_hosts_of_ssh_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text(
        "# Host no\nHost zeta-one *.zeta zeta-*\n  HostName zeta-not-this\n"
    )
    (tmp_path / ".ssh" / "known_hosts").write_text(
        "zeta-two,192.0.2.1 ssh-ed25519 AAAA\n|1|zeta|= ssh-ed25519 AAAA\n"
    )
    assert complete("ps", "zeta-") == ["zeta-one", "zeta-two"]
    assert complete("status", "root@zeta-t") == ["root@zeta-two"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completion", shell], standalone_mode=False)
    assert f"_MIGRATE_COMPLETE={shell}_complete" in capsys.readouterr().out
