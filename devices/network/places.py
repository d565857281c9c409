"""Where switches are kept: definitions in the state directory, what running ones need in the runtime directory.

Root has /var/lib/pyvmm and /run/pyvmm, others ~/.local/state/pyvmm and $XDG_RUNTIME_DIR/pyvmm; PYVMM_STATE_DIR and
PYVMM_RUNTIME_DIR override them. Switches have the folder ``switches`` in both.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat

from devices.network.errors import SwitchError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


def is_name(name: str) -> bool:
    """Whether `name` can be a switch's, and a part of a file's."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raise SwitchError unless `name` can be a switch's."""
    if not is_name(name):
        raise SwitchError(
            f"switch name {name!r}: up to 32 letters, digits, '-', '_' and '.', a letter or digit first", "usage"
        )


def state_dir() -> str:
    """Where definitions outlive the host's restarts. It need not exist."""
    given = os.environ.get("PYVMM_STATE_DIR")
    if given:
        return os.path.abspath(given)
    return "/var/lib/pyvmm" if os.geteuid() == 0 else os.path.expanduser("~/.local/state/pyvmm")


def runtime_dir() -> str:
    """Where sockets, locks, logs and leases are. It need not exist. Raises SwitchError if nothing says where it is."""
    given = os.environ.get("PYVMM_RUNTIME_DIR")
    if given:
        return os.path.abspath(given)
    if os.geteuid() == 0:
        return "/run/pyvmm"
    session = os.environ.get("XDG_RUNTIME_DIR")
    if not session:
        raise SwitchError("no directory for sockets: set XDG_RUNTIME_DIR or PYVMM_RUNTIME_DIR", "host")
    return os.path.join(session, "pyvmm")


def definition(name: str) -> str:
    """The TOML file that says what switch `name` is."""
    return os.path.join(state_dir(), "switches", f"{name}.toml")


def running(name: str, suffix: str) -> str:
    """The file of the running switch `name` that ends in `suffix`: ``sock``, ``lock``, ``log``, ``leases`` ..."""
    return os.path.join(runtime_dir(), "switches", f"{name}.{suffix}")


def make_folder(path: str) -> None:
    """Make the folder of `path`, with those above it, for its user alone; raises SwitchError."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.stat(folder)
    except OSError as error:
        raise SwitchError(f"{error.filename or folder}: {error.strerror}", "host") from error
    if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & 0o022:
        raise SwitchError(f"{folder}: others may write there; its owner should be you, and its mode 0700", "host")


def lock(name: str) -> int | None:
    """A descriptor that holds the lock of switch `name` until it is closed, or None if another process has it.

    Who has it may run the switch's service, or change what stands in the runtime directory while none runs.
    """
    path = running(name, "lock")
    make_folder(path)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.stat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):  # taken, or removed meanwhile with its switch
        pass
    os.close(file)
    return None


def tidy(name: str) -> None:
    """Remove the files of a switch that is no more; its lock is held."""
    if not os.path.exists(definition(name)):
        for suffix in ("addresses", "leases", "log", "lock"):
            try:
                os.unlink(running(name, suffix))
            except FileNotFoundError:
                pass
