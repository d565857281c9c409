"""Settings of the kernel under /proc/sys, by their path there, as an interface's name may have dots."""

from __future__ import annotations

from devices.network.plane import PlaneError


def get(name: str) -> str | None:
    """The value of such as ``net/ipv4/ip_forward``; None if the kernel has no such setting."""
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlaneError(f"{error.filename}: {error.strerror}") from error


def put(name: str, value: str) -> None:
    """Set it, if the kernel has such a setting; raises PlaneError."""
    try:
        with open(f"/proc/sys/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise PlaneError(f"{error.filename}: {error.strerror}") from error
