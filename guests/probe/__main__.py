"""``python -m guests.probe``: build the probe and print its path, or run it and show what it found."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from guests.bare.build import BuildError
from guests.bare.run import Run, pyvmm
from guests.bare.run import run as run_guest
from guests.probe.build import build
from guests.probe.report import expectation

_DISK_BYTES = 1 << 20
#: The first 16 bytes of the disk, which the probe reports.
DISK_START = b"pyvmm probe disk"


def run(
    elf: Path,
    work: Path,
    *,
    cpus: int = 1,
    memory: str = "64M",
    cmdline: str = "",
    enlightenments: str = "full",
    disk: bool = True,
    timeout: float = 30.0,
) -> Run:
    """Run the probe under pyvmm, with ``com1.txt`` and, if it has a disk, ``disk.img`` made in `work`.

    `timeout` is in seconds. Without VMBus among the `enlightenments` there can be no disk.
    """
    console = work / "com1.txt"
    command = pyvmm(elf, console, cpus=cpus, memory=memory, cmdline=cmdline, enlightenments=enlightenments)
    command += ["--timeout", str(timeout)]
    if disk:
        image = work / "disk.img"
        image.write_bytes(DISK_START.ljust(_DISK_BYTES, b"\0"))
        command += ["--disk", str(image)]
    return run_guest("probe", command, console)


def _show(result: Run) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("topic", "finding", "value", "", "expected"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("topic", "finding"))
    topic = ""
    for finding in result.report.findings:
        verdict = Text("ok", style="green") if finding.ok else Text("BAD", style="bold red")
        expected = expectation(finding.full_name) or ""
        if not finding.ok and finding.note:
            expected = f"{finding.note}: {expected}" if expected else finding.note
        shown = "" if finding.topic == topic else finding.topic
        table.add_row(shown, finding.name, Text(finding.value), verdict, Text(expected))
        topic = finding.topic
    console = Console()
    console.print(table)
    good = len(result.report.findings) - len(result.report.failed)
    console.print(f"{good} of {len(result.report.findings)} findings as expected in {result.seconds:.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m guests.probe",
        description="Build the probe and print the path of its ELF file, or run it and show its findings.",
        epilog="Exit status with --run: 0 if all findings are as expected, 1 otherwise.",
    )
    parser.add_argument("--run", action="store_true", help="run it under pyvmm with a disk of its own")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="VPs (default: %(default)s)")
    parser.add_argument("--cmdline", default="", metavar="TEXT", help="such as probe=cpuid,msr; see docs/probe.md")
    parser.add_argument("--enlightenments", default="full", metavar="SPEC", help="as for pyvmm run")
    parser.add_argument("--no-disk", dest="disk", action="store_false", help="run it without a disk")
    options = parser.parse_args()
    try:
        elf = build()
    except BuildError as error:
        print(f"probe: {error}", file=sys.stderr)
        return 1
    if not options.run:
        print(elf)
        return 0
    with tempfile.TemporaryDirectory(prefix="pyvmm-probe-") as work:
        result = run(
            elf,
            Path(work),
            cpus=options.cpus,
            cmdline=options.cmdline,
            enlightenments=options.enlightenments,
            disk=options.disk,
        )
    if result.report.findings:
        _show(result)
    if result.stderr:
        print(result.stderr.rstrip(), file=sys.stderr)
    if result.problem is not None:
        print(f"probe: {result.problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
