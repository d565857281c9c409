"""The parser of the whole command line."""

from __future__ import annotations

import argparse

from pyvmm.cli import COMMANDS, CliError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


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
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="pyvmm")
    for command in commands:
        module = __import__(f"pyvmm.cli.{command}", fromlist=["add_parser"])
        module.add_parser(subparsers)
    return parser
