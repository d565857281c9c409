"""``python -m tests.bench [NAME...]``: take the figures and show them."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pyvmm.core.kvm.system import kvm_kind
from pyvmm.machine.outcome import MachineError
from tests.bench import disk, exits, idle, net, packets, startup, storage, switch
from tests.bench.figures import Figure, Samples
from tests.bench.native import BenchError

#: Name, what it takes the figures with, and how often it repeats.
_BENCHMARKS: dict[str, tuple[Callable[[Path, int], list[Figure]], int]] = {
    "startup": (startup.measure, 20),
    "pio": (exits.pio, 9),
    "doorbell": (exits.doorbell, 9),
    "msr": (exits.msr, 9),
    "page": (exits.page, 1),
    "hypercall": (exits.hypercall, 9),
    "storage": (storage.measure_all, 7),
    "packets": (packets.measure_all, 7),
    "convert": (disk.convert, 5),
    "open": (disk.open_large, 9),
    "idle": (idle.measure, 3),
    "switch": (switch.measure, 5),
    "net": (net.measure, 7),
}
#: Take minutes.
_ONLY_BY_NAME = ("idle", "net")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure pyvmm against QEMU and against a bare KVM loop in C, in turn.",
        epilog="Exit status: 0 measured, whatever came out; 1 something could not be measured.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(_BENCHMARKS)} (default: all but the last two)"
    )
    parser.add_argument("-n", "--rounds", type=int, metavar="N", help="repetitions of each")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")
    options = parser.parse_args()
    for name in options.names:
        if name not in _BENCHMARKS:
            parser.error(f"there is no benchmark {name!r}; choose from {', '.join(_BENCHMARKS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds is at least 1")
    results: dict[str, list[Figure]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
            for name in options.names or [name for name in _BENCHMARKS if name not in _ONLY_BY_NAME]:
                measure, rounds = _BENCHMARKS[name]
                print(f"bench: {name} ...", file=sys.stderr, flush=True)
                results[name] = measure(Path(folder), options.rounds or rounds)
    except (BenchError, MachineError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.output == "json":
        figures = {name: [figure.as_dict() for figure in found] for name, found in results.items()}
        print(json.dumps({"host": _host(), "benchmarks": figures}, indent=2))
    else:
        _show(results)
    return 0


def _host() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "kvm": kvm_kind(),
        "load": os.getloadavg()[0],
    }


def _show(results: dict[str, list[Figure]]) -> None:
    host = _host()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(
        title=f"pyvmm on {host['cpus']} x {host['cpu']}, {host['kvm']}, load {host['load']:.1f}",
        caption="median (least-most); ratios below 1 are in pyvmm's favour; pairs: median of neighbours' ratios\n"
        "a second: of the medians; a ratio of 1.3 is 0.77 of the rival's rate",
        box=box.SIMPLE if console.is_terminal else box.ASCII2,
    )
    for heading in ("figure", "unit", "pyvmm", "rival"):
        table.add_column(heading)
    for heading in ("a second", "ratio", "pairs", "aim"):
        table.add_column(heading, justify="right")
    for figures in results.values():
        for figure in figures:
            table.add_row(*_row(figure))
        table.add_section()
    console.print(table)


def _row(figure: Figure) -> list[str]:
    ratio, pairs, rates = figure.ratio, figure.pair_ratio, figure.rates
    met = figure.limit is None or ratio is None or ratio <= figure.limit
    return [
        figure.title,
        figure.unit,
        _span(figure.ours),
        f"{figure.rival.name} {figure.rival.median:.1f}" if figure.rival else "",
        "" if rates is None else f"{rates[0]:,.0f} : {rates[1]:,.0f}",
        "" if ratio is None else f"{ratio:.2f}" if met else f"[bold red]{ratio:.2f}[/]",
        "" if pairs is None else f"{pairs:.2f}",
        "" if figure.limit is None else f"<= {figure.limit:.3g}",
    ]


def _span(samples: Samples) -> str:
    return f"{samples.median:.1f} ({min(samples.values):.1f}-{max(samples.values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
