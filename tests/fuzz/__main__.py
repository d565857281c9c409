"""``python -m tests.fuzz [NAME...]``: fuzz until the time is up, or something is found."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from guests.bare.build import BuildError
from tests.fuzz import native, partition, vhd, vhdx, vp
from tests.fuzz.native import FuzzError


def _hot(seed: int, seconds: float) -> str:
    with tempfile.TemporaryDirectory(prefix="pyvmm-fuzz-") as folder:
        return native.run(native.build(Path(folder)), seed, seconds)


_FUZZERS: dict[str, Callable[[int, float], str]] = {
    "hot": _hot,
    "partition": partition.run,
    "vp": vp.run,
    "vhd": vhd.run,
    "vhdx": vhdx.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Fuzz what guests can reach: the C extension under a KVM that does anything (hot), a partition's "
        "MSRs and hypercalls by Hypothesis (partition), both through a VP on /dev/kvm (vp), disk images (vhd, vhdx).",
        epilog="Exit status: 0 nothing found; 1 something found, with the seed that repeats it.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(_FUZZERS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="for all together (default: 60)")
    parser.add_argument("--seed", type=int, metavar="N", help="the first seed (default: a random one)")
    options = parser.parse_args()
    for name in options.names:
        if name not in _FUZZERS:
            parser.error(f"there is no fuzzer {name!r}; choose from {', '.join(_FUZZERS)}")
    names = options.names or list(_FUZZERS)
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    for name in names:
        print(f"fuzz: {name}, seed {seed} ...", file=sys.stderr, flush=True)
        try:
            print(f"{name}: {_FUZZERS[name](seed, options.seconds / len(names))}", flush=True)
        except (FuzzError, BuildError) as error:
            print(f"fuzz: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
