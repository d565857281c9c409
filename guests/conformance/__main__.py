"""``python -m guests.conformance``: build the conformance kit and print its path, or run it and show its tests."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from guests.bare.build import BuildError
from guests.bare.run import Run
from guests.conformance.build import WIDTHS, build
from guests.conformance.run import pyvmm_command, qemu_command, run_command
from guests.conformance.tests import topics


def _show(result: Run, whole: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("test", "value", "", "TLFS", "expected"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("test", "TLFS"))
    styles = {"ok": "green", "bad": "bold red", "skip": "yellow"}
    for finding in result.report.findings:
        if finding.ok and not whole:
            continue
        section, _, rest = finding.note.partition(" ")
        verdict = Text(finding.verdict, style=styles[finding.verdict])
        table.add_row(finding.full_name, Text(finding.value), verdict, section, Text(rest))
    console = Console()
    if table.row_count:
        console.print(table)
    counts = ", ".join(f"{len(result.report.of(verdict))} {verdict}" for verdict in styles)
    console.print(f"{len(result.report.findings)} tests in {result.seconds:.1f} s: {counts}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m guests.conformance",
        description="Build the conformance kit and print the path of its ELF file, or run it and show its tests.",
        epilog="Exit status with --run: 0 if all tests are good or skipped, 1 otherwise.",
    )
    parser.add_argument("--run", action="store_true", help="run it under pyvmm")
    parser.add_argument("--bits", type=int, choices=WIDTHS, default=64, help="the guest's mode (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="VPs (default: %(default)s)")
    parser.add_argument("--enlightenments", default="full", metavar="SPEC", help="as for pyvmm run")
    parser.add_argument("--topics", default="", metavar="LIST", help=f"of {','.join(topics())} (default: all)")
    parser.add_argument("--qemu", action="store_true", help="run it under QEMU with KVM's own Hyper-V code instead")
    parser.add_argument("--all", action="store_true", help="show the good tests too")
    return parser


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if unknown := set(filter(None, options.topics.split(","))) - set(topics()):
        parser.error(f"no topic {', '.join(sorted(unknown))}; there are {', '.join(topics())}")
    try:
        elf = build(options.bits)
    except BuildError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    if not options.run and not options.qemu:
        print(elf)
        return 0
    with tempfile.TemporaryDirectory(prefix="pyvmm-kit-") as work:
        console = Path(work) / "com1.txt"
        if options.qemu:
            command = qemu_command(elf, console, cpus=options.cpus, topics=options.topics)
        else:
            command = pyvmm_command(
                elf, console, cpus=options.cpus, topics=options.topics, enlightenments=options.enlightenments
            )
        result = run_command(command, console)
    if result.report.findings:
        _show(result, options.all)
    if result.stderr:
        print(result.stderr.rstrip(), file=sys.stderr)
    if result.problem is not None:
        print(f"conformance: {result.problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
