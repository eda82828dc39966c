"""The `migrate` command: its subcommands, its exit codes, and what happens to errors on their way out."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Final

import click

from migrate.commands.check import check
from migrate.commands.move import move
from migrate.commands.ps import ps
from migrate.errors import MEANING, ExitCode, Failure

_EXIT_CODES: Final = "\b\nExit codes:\n" + "\n".join(
    f"  {code}  {meaning}" for code, meaning in MEANING.items()
)


def _version() -> str:
    try:
        return metadata.version("migrate")
    except metadata.PackageNotFoundError:
        return "(not installed)"


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EXIT_CODES,
)
@click.version_option(_version(), prog_name="migrate")
def cli() -> None:
    """Move a running Linux process from one host to another without its users noticing.

    \b
      migrate check alpha:1234 beta       what would happen
      migrate move alpha:1234 beta        do it
      migrate move 1234 root@beta:2222    from this host
      migrate ps alpha                    what runs there
    """


@cli.command()
def version() -> None:
    """The installed version."""
    click.echo(f"migrate {_version()}")


for _command in (check, move, ps):
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
