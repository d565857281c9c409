"""The ``pyvmm`` command. Each subcommand is a module with ``add_parser(subparsers)`` and ``run(args) -> int``.

Only the module of the command that was asked for is imported, because `pyvmm run` is judged by the time until its
guest executes the first instruction.
"""

from __future__ import annotations

import os
import sys

from pyvmm.machine.config import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

COMMANDS = ("run", "ctl", "disk", "switch", "lb", "enlightenments", "config", "doctor", "completion")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HOST = 5
EXIT_INTERRUPTED = 130


class CliError(Exception):
    """Ends the command with one line on standard error and `exit_code`."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; errors become one line on standard error."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        from pyvmm.cli.parser import build_parser

        args = build_parser(words[:1] if words and words[0] in COMMANDS else COMMANDS).parse_args(words)
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


def entry() -> NoReturn:
    """The console script: `main`, and an end at once, since the kernel frees everything faster than the interpreter."""
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError):  # closed, or nobody reads it any more
            pass
    os._exit(status)


def _debug() -> None:
    if os.environ.get("PYVMM_DEBUG") == "1":
        import traceback

        traceback.print_exc()


def _fail(message: str, status: int) -> int:
    print("pyvmm: error:", " ".join(message.split()), file=sys.stderr)
    return status
