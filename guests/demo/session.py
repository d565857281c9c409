"""``python -m guests.demo.session RESULTS JOB ...``: run one guest here, be that the host or the lab.

It tells its progress on stdout, a line for each step, and leaves JOB.json in the folder RESULTS:

* ``probe ELF``: ``kvm``, ``exit``, ``stderr``, ``console`` and ``seconds`` of the probe's run.
* ``linux VMLINUX INITRD CMDLINE``: the first four of the stock guest's run, and ``shutdown``: ``exit``, ``reply`` and
  ``stderr`` of ``pyvmm ctl shutdown``, or null when the guest never got that far. Its disk's image is ``disk.img``.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pyvmm.core.kvm.system import kvm_kind

CPUS = 4
GUEST_SECONDS = 100
_SHUTDOWN_SECONDS = 20
_DISK_BYTES = 64 << 20
_PYVMM = [sys.executable, "-m", "pyvmm"]


def probe(elf: str) -> dict[str, Any]:
    """Run the probe; return what it and pyvmm said."""
    from guests.probe.__main__ import run

    with tempfile.TemporaryDirectory(prefix="pyvmm-demo-") as work:
        ended = run(Path(elf), Path(work), cpus=CPUS)
        console = Path(work, "com1.txt")
        text = console.read_text(errors="replace") if console.exists() else ""
    return {"exit": ended.status, "stderr": ended.stderr, "console": text, "seconds": ended.seconds}


def linux(vmlinux: str, initrd: str, cmdline: str, *, image: Path) -> dict[str, Any]:
    """Run the stock guest until it is off; return what it and pyvmm said, with its disk copied to `image`."""
    # Not in RESULTS, which may be a share: slow, without fallocate and without sockets.
    with tempfile.TemporaryDirectory(prefix="pyvmm-demo-") as name:
        work = Path(name)
        with (work / "disk.img").open("wb") as disk:
            disk.truncate(_DISK_BYTES)
        control = str(work / "control")
        command = [*_PYVMM, "run", "--kernel", vmlinux, "--initrd", initrd, "--cmdline", cmdline]
        command += ["--cpus", str(CPUS), "--memory", "512M", "--disk", str(work / "disk.img")]
        command += ["--control", control, "--timeout", str(GUEST_SECONDS)]
        with (
            (work / "stderr").open("wb") as stderr,
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as process,
        ):
            try:
                console, shutdown = _follow(process, control)
            except BaseException:
                process.terminate()
                raise
        subprocess.run(["cp", "--sparse=always", str(work / "disk.img"), str(image)], check=True)
        said = (work / "stderr").read_text(errors="replace")
    return {"exit": process.returncode, "stderr": said, "console": console, "shutdown": shutdown}


def _follow(process: subprocess.Popen[bytes], control: str) -> tuple[str, dict[str, Any] | None]:
    """Read the console to its end, which pyvmm's own timeout bounds; shut the guest down when it is ready for that."""
    console = ""
    shutdown = None
    assert process.stdout is not None
    for data in process.stdout:
        line = data.decode(errors="replace")
        console += line
        if step := re.match(r"RESULT step=(.*)", line.strip()):
            print(step[1], flush=True)
        elif shutdown is None and line.strip() == "RESULT ready=shutdown":
            print("pyvmm asks the guest to shut down", flush=True)
            command = [*_PYVMM, "ctl", control, "shutdown", "--timeout", str(_SHUTDOWN_SECONDS), "-o", "json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            shutdown = {"exit": done.returncode, "reply": _json(done.stdout), "stderr": done.stderr}
    return console, shutdown


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results, job, *arguments = sys.argv[1:]
    found = probe(*arguments) if job == "probe" else linux(*arguments, image=Path(results, "disk.img"))
    Path(results, f"{job}.json").write_text(json.dumps({"kvm": kvm_kind(), **found}))


if __name__ == "__main__":
    main()
