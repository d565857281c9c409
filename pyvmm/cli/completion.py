"""``pyvmm completion``: the completion script of a shell."""

from __future__ import annotations

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parser import Parser

_FILE_METAVARS = ("FILE", "PATH", "SRC", "DST", "SOCKET", "VM.toml")


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``completion`` command."""
    parser = subparsers.add_parser(
        "completion",
        help="print a shell's completion script",
        description="Print the completion script of a shell: source <(pyvmm completion bash)",
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import shtab

    from pyvmm.cli.parser import build_parser

    parser = build_parser()
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Have shtab offer file names wherever the help text says that a file or socket is wanted."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _complete_files(child)
        elif isinstance(action.metavar, str) and action.metavar.startswith(_FILE_METAVARS):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
