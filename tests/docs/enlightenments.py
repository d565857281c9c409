"""The tables of docs/enlightenments.md, from the catalogue and from what is absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.cpuid import LAST_LEAF
from enlightenments.describe import describe, profiles, short_list
from enlightenments.tlfs import FEATURES, HYPERCALL_NAMES, RECOMMENDATIONS
from tests.docs.absent import BITS, HYPERCALLS, MSRS

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "enlightenments.md"

_ANY_PARTITION = ("tests/unit/test_enlightenments_partition.py",)
_ANY_CALL = ("tests/unit/test_enlightenments_hypercalls.py",)
_SYNIC = ("tests/unit/test_hot_synic.py",)
_STIMER = ("tests/unit/test_hot_stimer.py",)
_CPUID = "tests/unit/test_enlightenments_cpuid.py"
#: By enlightenment: topics of the conformance kit, and tests of our own.
TESTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "base": (("msr", "hypercall", "lock"), (*_ANY_PARTITION, "tests/unit/test_hypercall_page.py")),
    "vpindex": (("msr",), _ANY_PARTITION),
    "reset": (("msr",), _ANY_PARTITION),
    "runtime": (("time",), _ANY_PARTITION),
    "time": (("time",), (*_ANY_PARTITION, "tests/unit/test_hot_reference.py")),
    "frequencies": (("time",), _ANY_PARTITION),
    "tsc-invariant": (("msr",), _ANY_PARTITION),
    "reenlightenment": (("msr",), _ANY_PARTITION),
    "synic": (("synic", "ports", "hypercall"), (*_SYNIC, "tests/unit/test_hot_doorbells.py", *_ANY_CALL)),
    "avic": (("autoeoi",), _SYNIC),
    "stimer": (("stimer",), _STIMER),
    "stimer-direct": (("stimer",), _STIMER),
    "idle": (("idle",), _ANY_PARTITION),
    "vapic": (("apic",), _ANY_PARTITION),
    "spinlocks": (("spinwait",), _ANY_CALL),
    "tlbflush": (("flush",), (*_ANY_CALL, "tests/kvm/test_tlb_flush.py")),
    "tlbflush-ext": (("flush",), _ANY_CALL),
    "ipi": (("ipi",), _ANY_CALL),
    "xmm-input": (("ipi", "flush"), _ANY_CALL),
    "vp-registers": (("registers",), _ANY_CALL),
    "start-vp": (("startvp",), _ANY_CALL),
    "ext-hypercalls": (("ext",), _ANY_CALL),
    "crash": (("msr",), (*_ANY_PARTITION, "tests/kvm/test_probe.py")),
    "relaxed": (("cpuid",), (_CPUID,)),
    "vmbus": ((), ("tests/unit/test_vmbus_control.py", "tests/lab/test_linux_guest.py")),
}
_ABSENT_MSR = "kit msr, test_enlightenments_absent"
_ABSENT_CALL = "kit hypercall, test_enlightenments_absent"
_ABSENT_BIT = "kit cpuid, test_enlightenments_absent"
_LEAF = "kit cpuid, test_enlightenments_cpuid"


def updated(page: str) -> str:
    """`page` with its tables made anew."""
    for name, make in _TABLES.items():
        pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, make=make: f"{match[1]}{make()}{match[2]}", page)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"docs/enlightenments.md has {count} places for the table {name!r}")
    return page


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (header, ("---",) * len(header), *rows)
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _tests(name: str) -> str:
    topics, files = TESTS[name]
    return ", ".join((*(f"kit {topic}" for topic in topics), *(Path(file).stem for file in files)))


def _catalogue() -> str:
    rows = []
    for entry in describe(set(ENLIGHTENMENTS), None):
        needs = [*entry["needs"], *([f"of the host: {entry['host']['description']}"] if entry["host"] else [])]
        where = ", ".join(entry["profiles"]) or "none"
        about = f"{entry['purpose']}: {entry['gain']}"
        rows.append((f"`{entry['name']}`", about, "; ".join(needs), where, entry["source"]))
    return _table(("name", "what it is, and what guests gain", "needs", "in profiles", "source"), rows)


def _profiles() -> str:
    rows = [
        (f"`{profile['name']}`", profile["reason"], profile["version"] or "", profile["source"])
        for profile in profiles()
    ]
    return _table(("profile", "why", "version", "source"), rows)


def _leaves() -> str:
    rows = [
        ("0x40000000", "last leaf; vendor", "offered, but with `none`", _LEAF),
        ("0x40000001", "`Hv#1`", "offered, but with `none`", _LEAF),
        ("0x40000002", "version; service pack, branch and number are 0", "offered, but with `none`", _LEAF),
    ]
    for leaf in (FEATURES, RECOMMENDATIONS):
        for register in ("eax", "ebx", "ecx", "edx"):
            offered = [
                (bit, bit, entry.purpose, f"offered by `{entry.name}`", _LEAF)
                for entry in ENLIGHTENMENTS.values()
                for of, where, bit in entry.bits
                if (of, where) == (leaf, register)
            ]
            absent = [
                (first, last, meaning, f"0: {reason}", _ABSENT_BIT)
                for of, where, first, last, meaning, reason in BITS
                if (of, where) == (leaf, register)
            ]
            for first, last, meaning, state, tests in sorted(offered + absent):
                bits = f"{first}" if first == last else f"{first}-{last}"
                rows.append((f"{leaf:#x} {register} {bits}", meaning, state, tests))
    rows += [
        (
            "0x40000004 ebx",
            "tries for a lock before a spin wait is told",
            "offered by `spinlocks`, else never",
            _LEAF,
        ),
        ("0x40000004 ecx", "bits of a physical address", "offered, but with `none`", _LEAF),
        ("0x40000005", "numbers of VPs and logical processors", "offered, but with `none`", _LEAF),
        ("0x40000006", "features of the hardware in use", "0: none that a guest could go by", _LEAF),
        (f"from {LAST_LEAF + 1:#x}", "root partition, nested hypervisors", "absent: for those only", _ABSENT_BIT),
    ]
    return _table(("leaf", "what", "state", "test"), rows)


def _msrs() -> str:
    rows = [
        (int(text.split()[0], 16), text, f"offered by `{entry['name']}`", _tests(entry["name"]))
        for entry in describe(set(ENLIGHTENMENTS), None)
        for text in short_list(entry["msrs"])
    ]
    for first, last, name, reason in MSRS:
        number = f"{first:#x}" if first == last else f"{first:#x}..{last:#x}"
        rows.append((first, f"{number} {name}", f"#GP: {reason}", _ABSENT_MSR))
    rows.append((1 << 32, "all others, 0x40000000 to 0x400001ff", "#GP", _ABSENT_MSR))
    return _table(("MSR", "state", "test"), (tuple(row[1:]) for row in sorted(rows)))


def _hypercalls() -> str:
    rows = [
        (code, f"{code:#06x} {HYPERCALL_NAMES[code]}", f"offered by `{entry.name}`", _tests(entry.name))
        for entry in ENLIGHTENMENTS.values()
        for code in entry.hypercalls
    ]
    for first, last, name, reason in HYPERCALLS:
        codes = f"{first:#06x}" if first == last else f"{first:#06x}..{last:#06x}"
        rows.append((first, f"{codes} {name}", f"status 2: {reason}", _ABSENT_CALL))
    rows.append((1 << 32, "all others", "status 2", _ABSENT_CALL))
    return _table(("call", "state", "test"), (tuple(row[1:]) for row in sorted(rows)))


_TABLES = {
    "catalogue": _catalogue,
    "profiles": _profiles,
    "leaves": _leaves,
    "MSRs": _msrs,
    "hypercalls": _hypercalls,
}
