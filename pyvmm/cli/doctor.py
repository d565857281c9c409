"""``pyvmm doctor``: what this host offers to VMs, what it lacks, and how to get that."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct

from pyvmm.cli import EXIT_HOST
from pyvmm.core.kvm import abi, capabilities
from pyvmm.core.kvm.errors import KvmError
from pyvmm.core.kvm.system import System, kvm_kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.cli.parser import Parser

_KVM_DEVICE = "/dev/kvm"
_NEWER_KERNEL = "run Linux 5.16 or later"
_KIND_NOTES = {
    "kvm_pvm": "KVM without hardware virtualisation: kernel code of guests is emulated, "
    "so run Linux guests in the lab: python -m guests.lab",
    "unknown": "no known KVM module: modprobe kvm_amd or kvm_intel",
}
#: (name, path where it may stand outside PATH, purpose, Debian package).
_TOOLS = (
    ("qemu-system-x86_64", "", "runs the lab", "qemu-system-x86"),
    ("busybox", "/bin/busybox", "userland of the lab and of Linux guests, linked statically", "busybox-static"),
    ("iasl", "", "checks our ACPI tables in tests", "acpica-tools"),
)


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``doctor`` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="show what this host offers and lacks",
        description="Show what this host offers to VMs, what it lacks, and how to get that.",
        epilog="exit status: 0 VMs can run here, 5 they cannot",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings and return 0 if VMs can run here, otherwise 5."""
    findings = examine(_KVM_DEVICE)
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _show(findings)
    return 0 if findings["ok"] else EXIT_HOST


def examine(device: str) -> dict[str, Any]:
    """Look at the host; `device` is the KVM device. ``ok`` says whether VMs can run."""
    kind = kvm_kind()
    kvm: dict[str, Any] = {
        "device": device,
        "present": os.path.exists(device),
        "usable": False,
        "kind": kind,
        "note": _KIND_NOTES.get(kind, ""),
        "api_version": None,
        "max_vps": None,
        "error": "",
    }
    found: list[dict[str, Any]] = []
    try:
        with System(device) as system:
            kvm.update(
                usable=True,
                api_version=abi.API_VERSION,
                max_vps=system.check_extension(capabilities.MAX_VCPUS),
            )
            for name, number, needed, purpose in capabilities.CAPABILITIES:
                value = system.check_extension(number)
                found.append(
                    {
                        "name": name,
                        "number": number,
                        "value": value,
                        "needed": needed,
                        "purpose": purpose,
                        "remedy": "" if value else _NEWER_KERNEL,
                    }
                )
    except KvmError as error:
        kvm["error"] = str(error)
    return {
        "ok": kvm["usable"] and all(row["value"] for row in found if row["needed"]),
        "kvm": kvm,
        "capabilities": found,
        "tools": [_tool(*tool) for tool in _TOOLS],
        "network": _network(),
    }


def _network() -> dict[str, Any]:
    """What switches can have of this host and user, and which data plane carries their frames."""
    from devices.network import planes
    from devices.network.definition import SwitchDefinition

    offers = planes.examine()
    plane, reason = planes.plane_for(SwitchDefinition(name="any"), offers)
    rows = [
        {"name": offer.name, "usable": offer.there, "purpose": offer.purpose, "missing": offer.why}
        for offer in offers.values()
    ]
    return {"plane": plane, "plane_reason": reason, "offers": rows}


def _tool(name: str, other_path: str, purpose: str, package: str) -> dict[str, Any]:
    path = shutil.which(name) or (other_path if os.access(other_path, os.X_OK) else None)
    usable = path is not None and (name != "busybox" or is_static(path))
    remedy = "" if usable else f"apt install {package}"
    return {"name": name, "path": path, "usable": usable, "purpose": purpose, "remedy": remedy}


def is_static(path: str) -> bool:
    """Whether `path` is a 64-bit ELF program that asks for no dynamic linker (ELF specification: PT_INTERP)."""
    try:
        with open(path, "rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
                return False
            (offset,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(offset)
            table = file.read(size * count)
    except (OSError, OverflowError, ValueError):
        return False
    if size < 4 or len(table) < size * count:
        return False
    return all(struct.unpack_from("<I", table, index * size)[0] != 3 for index in range(count))


def _show(findings: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    kvm = findings["kvm"]
    if kvm["usable"]:
        console.print(f"{kvm['device']}: {kvm['kind']}, API version {kvm['api_version']}, {kvm['max_vps']} VPs")
    else:
        console.print(f"[red]{kvm['device']}[/]: {escape(kvm['error'])}")
    if kvm["note"]:
        console.print(kvm["note"])
    if findings["capabilities"]:
        table = Table("capability", "no.", "value", "", "used for", box=box.SIMPLE)
        for row in findings["capabilities"]:
            needed = "needed" if row["needed"] else "optional"
            state = str(row["value"]) if row["value"] else f"[{'red' if row['needed'] else 'yellow'}]absent[/]"
            purpose = row["purpose"] if row["value"] else f"{row['purpose']}: {row['remedy']}"
            table.add_row(row["name"].removeprefix("KVM_CAP_"), str(row["number"]), state, needed, purpose)
        console.print(table)
    table = Table("optional tool", "path", "used for", box=box.SIMPLE)
    for row in findings["tools"]:
        place = row["path"] if row["usable"] else f"[yellow]missing[/]: {row['remedy']}"
        table.add_row(row["name"], place, row["purpose"])
    console.print(table)
    network = findings["network"]
    table = Table("for networks", "", "used for", box=box.SIMPLE)
    for row in network["offers"]:
        table.add_row(
            row["name"], "there" if row["usable"] else f"[yellow]missing[/]: {escape(row['missing'])}", row["purpose"]
        )
    console.print(table)
    console.print(f"Switches use the {network['plane']} data plane: {escape(network['plane_reason'])}.")
    console.print("[green]VMs can run here.[/]" if findings["ok"] else "[red]VMs cannot run here.[/]")
