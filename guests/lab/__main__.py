"""``python -m guests.lab -- COMMAND``: run a command in the lab."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from guests.lab.machine import LabError, LabTimeout, run
from guests.packages import RecipeError

_EXIT_LAB_FAILED = 125
_EXIT_TIMEOUT = 124
_EXIT_INTERRUPTED = 128 + signal.SIGINT
_EXIT_TERMINATED = 128 + signal.SIGTERM


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m guests.lab",
        description="Run COMMAND in the lab: this checkout on an ordinary Linux KVM that QEMU emulates.",
        epilog="Exit status: COMMAND's; 124 when the time ran out; 125 when the lab itself failed.",
    )
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="processors (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=4096, metavar="MIB", help="memory in MiB (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="folder shared with the lab, at the same path inside"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds for all of it, the lab's boot included")
    parser.add_argument("--verbose", action="store_true", help="tell how long the lab and the command took")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    # An exception lets the session clean up; nobody waits for a killed lab's answer.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_TERMINATED))
    try:
        result = run(
            options.command,
            cpus=options.cpus,
            memory_mib=options.memory,
            results=options.results,
            timeout=options.timeout,
            on_stdout=lambda data: _write_all(sys.stdout.fileno(), data),
            on_stderr=lambda data: _write_all(sys.stderr.fileno(), data),
        )
    except (LabError, RecipeError) as error:
        if isinstance(error, LabError) and error.console and not isinstance(error, LabTimeout):
            print(error.console, file=sys.stderr)
        print(f"lab: {error}", file=sys.stderr)
        return _EXIT_TIMEOUT if isinstance(error, LabTimeout) else _EXIT_LAB_FAILED
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    if options.verbose:
        print(f"lab: up in {result.boot_seconds:.1f} s, ended after {result.seconds:.1f} s", file=sys.stderr)
    return result.returncode


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    sys.exit(main())
