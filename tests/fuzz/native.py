"""The C harness: pyvmm/core/hot with address and undefined-behaviour sanitizers, under a KVM that does anything."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

_HERE = Path(__file__).parent
_HOT = _HERE.parents[1] / "pyvmm" / "core" / "hot"
#: What hot/kvm.c stands in for.
_WRAPPED = (
    *("ioctl", "timer_create", "timer_settime", "timer_delete", "timerfd_create", "nanosleep"),
    "hot_reference_now",
)
_NO_LIMIT = 1 << 62


class FuzzError(Exception):
    """A harness cannot be built, or has found something; the message is for people."""


def build(folder: Path) -> Path:
    """Build the harness into `folder`; return the program. Raises FuzzError."""
    program = folder / "hot"
    command = ["gcc", "-std=c11", "-O1", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    command += [f"-I{sysconfig.get_path('include')}", f"-L{sysconfig.get_config_var('LIBDIR')}"]
    command += [f"-Wl,--wrap={name}" for name in _WRAPPED]
    command += [
        "-o",
        str(program),
        *(str(path) for folder in (_HERE / "hot", _HOT) for path in sorted(folder.glob("*.c"))),
    ]
    command += [f"-lpython{sysconfig.get_config_var('LDVERSION')}"]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FuzzError(f"cannot build the C harness: {error}") from error
    return program


def run(program: Path, first_seed: int, seconds: float, lives: int = _NO_LIMIT) -> str:
    """Fuzz for `seconds` (0: no limit) or so many `lives`; return what was done. Raises FuzzError for a finding."""
    # Python's own objects live on at exit.
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }
    command = [str(program), str(first_seed), str(seconds), str(lives)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise FuzzError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.rstrip()}")
    return done.stdout.strip()
