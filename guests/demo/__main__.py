"""``python -m guests.demo``: the probe on ``/dev/kvm``, then a stock Debian guest with its disk on VMBus."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from guests import linux
from guests.bare.build import BuildError
from guests.demo import show, verdict
from guests.demo.place import Place, SessionError, kvm_problem, place_for_linux, place_for_probe, run_session
from guests.packages import RecipeError
from guests.probe.build import build as build_probe
from guests.probe.report import parse

_GUEST_SCRIPT = Path(__file__).with_name("guest.sh")
_EXIT_INTERRUPTED = 128 + signal.SIGINT


class Failed(Exception):
    """A part was not as expected; the message is one line, and the rest has been shown."""


def show_probe(console: Console, place: Place) -> str:
    """Run the probe and show what it found; return that in a phrase. Raises Failed, BuildError, SessionError."""
    _headline(console, "The probe, our bare-metal guest", place)
    with show.Steps(console, "building the probe") as steps, _results() as results:
        elf = build_probe()
        steps.step(f"running it {place}")
        found = run_session(place, Path(results), "probe", str(elf), on_step=steps.step)
    report = parse(found["console"])
    if report.findings:
        console.print(show.probe_table(report))
    problem = report.problem
    if problem is None and found["exit"]:
        problem = f"pyvmm ended with status {found['exit']}, not 0"
    if problem is not None:
        console.print(show.problems_view([], {"COM1": found["console"], "pyvmm's stderr": found["stderr"]}))
        raise Failed(f"the probe: {problem}")
    console.print(f"{len(report.findings)} findings, all as expected, in {found['seconds']:.1f} s.")
    return f"{len(report.findings)} findings of the probe on {found['kvm']}"


def show_linux(console: Console, place: Place) -> str:
    """Run the stock guest and show what it found; return that in a phrase. Raises Failed, RecipeError, SessionError."""
    _headline(console, "A stock Debian guest with its disk on VMBus", place)
    with show.Steps(console, "preparing Debian's kernel (downloaded the first time)") as steps, _results() as results:
        images = linux.build(_GUEST_SCRIPT)
        steps.step(f"booting it {place}")
        found = run_session(
            place,
            Path(results),
            "linux",
            *(str(images.vmlinux), str(images.initrd), linux.COMMAND_LINE),
            on_step=steps.step,
        )
        guest = verdict.guest(found, verdict.file_in_image(Path(results, "disk.img"), "letter"))
    console.print(show.guest_view(guest))
    console.print(
        Text(
            f"Shutdown by integration service: {'obeyed' if guest.obeyed else 'NOT obeyed'} "
            f"({show.plain(guest.shutdown_told)}); exit status of pyvmm: {guest.status}"
        )
    )
    if problems := verdict.problems(guest):
        logs = {"the guest's console": guest.console, "pyvmm's stderr": guest.stderr}
        console.print(show.problems_view(problems, logs))
        raise Failed("the stock guest: " + ", ".join(problem.what for problem in problems) + " not as expected")
    return f"Linux {guest.kernel} on {found['kvm']}{' in the lab' if place.in_lab else ''}"


def _headline(console: Console, title: str, place: Place) -> None:
    console.rule(Text(title, "bold"), align="left")
    console.print(Text(f"Runs {place}: {place.why}."))


def _results() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pyvmm-demo-")


def main() -> int:
    """Show both parts; return 0 only if all was as expected."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    console = show.console()
    problem = kvm_problem()
    shown, failures = [], []
    for part, place in ((show_probe, place_for_probe(problem)), (show_linux, place_for_linux(problem))):
        try:
            shown.append(part(console, place))
        except (Failed, RecipeError, BuildError, SessionError) as error:
            if isinstance(error, SessionError):
                console.print(show.problems_view([], {"the session's log": error.log}))
            failures.append(str(error))
        except KeyboardInterrupt:
            return _EXIT_INTERRUPTED
    console.rule()
    took = f"{time.monotonic() - started:.0f} s"
    if failures:
        console.print(Text(f"demo: FAILED after {took}: {'; '.join(failures)}", "bold red"), soft_wrap=True)
        return 1
    console.print(Text(f"demo: all as expected in {took}: {', '.join(shown)}", "bold green"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
