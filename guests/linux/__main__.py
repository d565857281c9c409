"""``python -m guests.linux``: build the stock Linux guest and print where its files are."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from guests.linux import COMMAND_LINE, build
from guests.packages import RecipeError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m guests.linux",
        description="Build the stock Linux guest and print, as shell assignments, the files to boot it with.",
    )
    parser.add_argument("--flavour", choices=("cloud", "generic"), default="cloud", help="Debian kernel flavour")
    parser.add_argument("--script", type=Path, metavar="FILE", help="what the guest runs (default: a shell)")
    options = parser.parse_args()
    try:
        images = build(options.script or "", flavour=options.flavour)
    except (RecipeError, OSError) as error:
        print(f"guests.linux: {error}", file=sys.stderr)
        return 1
    values = {"kernel": images.kernel, "vmlinux": images.vmlinux, "initrd": images.initrd, "cmdline": COMMAND_LINE}
    for name, value in values.items():
        print(f"{name}={shlex.quote(str(value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
