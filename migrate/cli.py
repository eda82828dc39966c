"""The `migrate` command: its subcommands, its exit codes, and what happens to errors on their way out."""

from __future__ import annotations

import sys
from typing import Final

import click

from agent.version import installed
from migrate import config
from migrate.commands.abort import abort
from migrate.commands.attach import attach
from migrate.commands.check import check
from migrate.commands.hook import hook
from migrate.commands.move import move
from migrate.commands.plan import plan
from migrate.commands.ps import ps
from migrate.commands.report import report
from migrate.commands.resolve import resolve
from migrate.commands.status import status
from migrate.completion import SHELLS, script
from migrate.errors import MEANING, ExitCode, Failure

_ALONE: Final = ("version", "completion")  # these work whatever the person's defaults are
_EXIT_CODES: Final = "\b\nExit codes:\n" + "\n".join(
    f"  {code}  {meaning}" for code, meaning in MEANING.items()
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EXIT_CODES,
)
@click.version_option(installed(), prog_name="migrate")
@click.pass_context
def cli(context: click.Context) -> None:
    """Move a running Linux process from one host to another without its users noticing.

    \b
      migrate check alpha:1234 beta       what would happen
      migrate move alpha:1234 beta        do it
      migrate move 1234 root@beta:2222    from this host
      migrate ps alpha                    what runs there
      migrate status alpha                what is being moved from there, and what was
      migrate plan apply moves.yaml       many moves
      migrate hook drain alpha --plan …   empty a host

    Defaults for --identity, --ssh-config, --agent-command, the limits, compression and --log-format may be in
    ~/.config/migrate/config.yaml.
    """
    if context.invoked_subcommand not in _ALONE and not {"-h", "--help"} & set(sys.argv[1:]):
        config.apply(context)


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options and hosts.

    \b
      bash: eval "$(migrate completion bash)" in ~/.bashrc
      zsh:  eval "$(migrate completion zsh)" in ~/.zshrc, after compinit
      fish: migrate completion fish >~/.config/fish/completions/migrate.fish
    """
    click.echo(script(cli, shell, "migrate"))


@cli.command()
def version() -> None:
    """The installed version."""
    click.echo(f"migrate {installed()}")


for _command in (check, move, ps, status, attach, abort, resolve, report, plan, hook):
    cli.add_command(_command)


def main() -> None:
    """The entry point: every error ends in its documented exit code, and with --json in one JSON object."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        _fail(Failure("usage", error.format_message(), "coordinator", ExitCode.USAGE))
    except Failure as failure:
        print(f"migrate: {failure}", file=sys.stderr)
        _fail(failure)
    except (click.Abort, KeyboardInterrupt):
        _fail(Failure("aborted", "interrupted", "coordinator", ExitCode.REFUSED))
    except Exception as error:
        import traceback

        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        _fail(Failure("internal", message, "coordinator", ExitCode.INTERNAL))


def _fail(failure: Failure) -> None:
    if "--json" in sys.argv[1:]:
        from migrate.job import print_json

        print_json(failure.report())
    sys.exit(failure.code)


if __name__ == "__main__":
    main()
