"""The ``pyvmm`` command. Each subcommand is a module with ``add_parser(subparsers)`` and ``run(args) -> int``.

Only the module of the command that was asked for is imported, because `pyvmm run` is judged by the time
until its guest executes the first instruction.
"""

from __future__ import annotations

import argparse
import os
import sys

from pyvmm.machine.config import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

COMMANDS = ("run", "ctl", "config", "doctor", "completion")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HOST = 5
EXIT_INTERRUPTED = 130


class CliError(Exception):
    """Ends the command with one line on standard error and `exit_code`."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _plain_formatter(prog: str) -> argparse.HelpFormatter:
    """The formatter that argparse asks for while options are added: no terminal size is looked up for it."""
    return argparse.HelpFormatter(prog, width=80)


class Parser(argparse.ArgumentParser):
    """Reports errors as CliError and loads rich only to print help."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_plain_formatter)  # type: ignore[arg-type]

    def format_help(self) -> str:
        from rich_argparse import RichHelpFormatter

        self.formatter_class = RichHelpFormatter
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message}; see '{self.prog} --help'")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from pyvmm import __version__

        print(f"pyvmm {__version__}")
        parser.exit()


def build_parser(commands: Sequence[str] = COMMANDS) -> Parser:
    """The parser of the whole command line, with the subcommands named."""
    parser = Parser(prog="pyvmm", description="Virtual machines that look like Hyper-V, on Linux KVM.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="pyvmm")
    for command in commands:
        module = __import__(f"pyvmm.cli.{command}", fromlist=["add_parser"])
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; errors become one line on standard error."""
    words = sys.argv[1:] if argv is None else list(argv)
    commands = words[:1] if words and words[0] in COMMANDS else COMMANDS
    try:
        args = build_parser(commands).parse_args(words)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (ConfigError, CliError) as error:
        _debug()
        return _fail(str(error), getattr(error, "exit_code", EXIT_USAGE))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: say nothing, not even when the interpreter flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - a bug of ours still ends in one line
        _debug()
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        return _fail(f"internal error: {text}; set PYVMM_DEBUG=1 for the traceback", EXIT_FAILED)


def _debug() -> None:
    if os.environ.get("PYVMM_DEBUG") == "1":
        import traceback

        traceback.print_exc()


def _fail(message: str, status: int) -> int:
    print("pyvmm: error:", " ".join(message.split()), file=sys.stderr)
    return status
