"""The catalogue and its profiles as plain data, for people and scripts."""

from __future__ import annotations

from enlightenments.catalog import ENLIGHTENMENTS, HOST_FEATURES
from enlightenments.selection import PROFILES
from enlightenments.tlfs import HYPERCALL_NAMES, MSR_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import Any

    from enlightenments.catalog import Enlightenment


def describe(names: Collection[str], host_features: Collection[str] | None) -> list[dict[str, Any]]:
    """The catalogue's entries called `names`, in its order.

    `host_features` are those of `HOST_FEATURES` that this host has, None if that is not known.
    """
    return [_describe(entry, host_features) for entry in ENLIGHTENMENTS.values() if entry.name in names]


def _describe(entry: Enlightenment, host_features: Collection[str] | None) -> dict[str, Any]:
    host = None
    if entry.host is not None:
        available = None if host_features is None else entry.host in host_features
        host = {"feature": entry.host, "description": HOST_FEATURES[entry.host], "available": available}
    return {
        "name": entry.name,
        "purpose": entry.purpose,
        "gain": entry.gain,
        "cpuid": [{"leaf": f"{leaf:#x}", "register": register, "bit": bit} for leaf, register, bit in entry.bits],
        "msrs": [{"number": f"{msr:#x}", "name": MSR_NAMES[msr]} for msr in entry.msrs],
        "hypercalls": [{"code": f"{code:#x}", "name": HYPERCALL_NAMES[code]} for code in entry.hypercalls],
        "needs": list(entry.needs),
        "host": host,
        "profiles": [title for title, profile in PROFILES.items() if entry.name in profile.names],
        "source": entry.source,
    }


def profiles() -> list[dict[str, Any]]:
    """All profiles."""
    return [
        {
            "name": title,
            "reason": profile.reason,
            "source": profile.source,
            "version": ".".join(map(str, (*profile.version[1:], profile.version[0]))) if profile.version else None,
            "enlightenments": [name for name in ENLIGHTENMENTS if name in profile.names],
        }
        for title, profile in PROFILES.items()
    ]


def cpuid_text(bits: Iterable[dict[str, Any]]) -> list[str]:
    """``leaf 3 eax 1, 9`` and the like, from what `describe` calls ``cpuid``."""
    found: dict[str, list[str]] = {}
    for bit in bits:
        found.setdefault(f"leaf {int(bit['leaf'], 16) & 0xFF:x} {bit['register']}", []).append(str(bit["bit"]))
    return [f"{register} {', '.join(numbers)}" for register, numbers in found.items()]


def short_list(msrs: Iterable[dict[str, Any]]) -> list[str]:
    """``0x40000090 SINT0..SINT15`` for MSRs that are numbered, ``0x40000084 EOM`` for the others."""
    families: dict[str, list[dict[str, Any]]] = {}
    for msr in msrs:
        families.setdefault("".join(c for c in msr["name"] if not c.isdigit()), []).append(msr)
    return [
        f"{found[0]['number']} {found[0]['name']}" + (f"..{found[-1]['name']}" if len(found) > 1 else "")
        for found in families.values()
    ]
