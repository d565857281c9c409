"""What ``pyvmm switch`` does: one function per action, named like it, which returns the exit status.

They raise SwitchError.
"""

from __future__ import annotations

import json
import os
import sys

from devices.network import admin, client, definition, protocol
from devices.network.definition import PlaneChoice, SwitchDefinition, SwitchType
from devices.network.errors import SwitchError
from pyvmm.cli import EXIT_FAILED
from pyvmm.machine.config import ConfigError
from pyvmm.machine.nic_config import format_rate, parse_rate

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from rich.table import Table

#: What is not to be broken over two lines: MAC addresses.
_WIDTHS = {"addresses": 17}


def create(args: argparse.Namespace) -> int:
    """Make a switch."""
    kind = SwitchType(args.type or "private")
    values: dict[str, Any] = {"name": args.name, "type": kind, "interface": args.interface, "share": args.share}
    values["addresses"] = tuple(args.addresses or ())
    values["forwards"] = tuple(args.forwards or ())
    if args.plane is not None:
        values["plane"] = PlaneChoice(args.plane)
    if args.mtu is not None:
        values["mtu"] = args.mtu
    if kind is SwitchType.NAT and not any(":" not in address for address in values["addresses"]):
        values["addresses"] = (definition.free_network(definition.load_all()), *values["addresses"])
    admin.create(SwitchDefinition(**values))
    return show(args)


def list(args: argparse.Namespace) -> int:  # noqa: A001 - named like the action
    """List all; a broken definition is told of, and the status is 1 then."""
    rows = []
    status = 0
    for name in definition.names():
        try:
            rows.append(admin.describe(name))
        except SwitchError as error:
            print("pyvmm: error:", error, file=sys.stderr)
            status = EXIT_FAILED
    if args.output == "json":
        print(json.dumps(rows, indent=2))
        return status
    table = _table("switch", "type", "state", "interface", "address", "plane", "ports")
    for row in rows:
        table.add_row(
            row["name"],
            row["type"],
            row["state"],
            row["host_interface"] or row["interface"] or "-",
            "\n".join(row["addresses"]) or "-",
            row["plane"] or row["plane_choice"],
            str(len(row["ports"])),
        )
    _print(table)
    return status


def show(args: argparse.Namespace) -> int:
    """Show one with its ports."""
    found = admin.describe(args.name)
    if args.output == "json":
        print(json.dumps(found, indent=2))
        return 0
    _print(f"switch {found['name']}: {found['type']}, {_state(found)}")
    if found["plane"]:
        _print(f"plane: {found['plane']} ({found['plane_reason']})")
    for key in ("interface", "host_interface", "addresses", "mtu", "forwards"):
        if found[key]:
            _print(f"{key.replace('_', ' ')}: {_text(found[key])}")
    if found["ports"]:
        table = _table("port", "VM:NIC", "link", "VLAN", "addresses", "traffic")
        for port in found["ports"]:
            counted = port["statistics"]
            table.add_row(
                str(port["port"]),
                f"{port['vm']}:{port['nic']}",
                _link(port),
                _vlan(port),
                "\n".join((port["mac"], *port["addresses"])),
                f"in {_bytes(counted['received_bytes'])}, out {_bytes(counted['sent_bytes'])}, "
                f"dropped {sum(counted['dropped'].values())}",
            )
        _print(table)
    return 0


def start(args: argparse.Namespace) -> int:
    """Start one that does not run."""
    definition.load(args.name)
    client.start(args.name)
    return show(args)


def delete(args: argparse.Namespace) -> int:
    """End and forget one."""
    admin.delete(args.name, args.force)
    if args.output == "json":
        print(json.dumps({"name": args.name, "state": "deleted"}))
    return 0


def port(args: argparse.Namespace) -> int:
    """Show one port, or set it."""
    definition.load(args.name)
    changes = _changes(args)
    request: protocol.Request = protocol.Set(args.vm, changes) if changes else protocol.Show(args.vm)
    try:
        found = client.ask(args.name, request)
    except SwitchError as error:
        if error.kind == "stopped":
            raise SwitchError(f"switch {args.name}: no VM is on it", "missing") from error
        raise
    if args.mirror is not None:
        path = None if args.mirror == "none" else os.path.abspath(args.mirror)
        found = client.ask(args.name, protocol.Mirror(args.vm, path))
    del found["ok"]
    if args.output == "json":
        print(json.dumps(found, indent=2))
        return 0
    rate = found["bandwidth"]
    lines = {
        "port": f"{found['port']} of switch {args.name}",
        "VM": f"{found['vm']}, NIC {found['nic']}, process {found['pid']}",
        "MAC": found["mac"],
        "link": _link(found),
        "VLAN": _vlan(found),
        "MAC spoofing": _switched(found["mac_spoofing"]),
        "DHCP guard": _switched(found["dhcp_guard"]),
        "router guard": _switched(found["router_guard"]),
        "bandwidth": "no limit" if rate is None else f"{format_rate(rate)}bit/s",
        "mirror": found["mirror"] or "none",
        "addresses": _text(found["addresses"]) or "none known",
        "received": _counted(found["statistics"], "received"),
        "sent": _counted(found["statistics"], "sent"),
        "dropped": ", ".join(f"{why} {count}" for why, count in found["statistics"]["dropped"].items()) or "none",
    }
    for key, value in lines.items():
        _print(f"{key}: {value}")
    return 0


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """What is to be set of a port, by the names of `PortSettings`."""
    changes: dict[str, Any] = {}
    if args.vlan is not None:
        changes.update(mode="access", vlan=args.vlan, allowed=(), native=0)
    elif args.trunk is not None:
        changes.update(mode="trunk", vlan=0, allowed=_vlans(args.trunk), native=0)
    elif args.untagged:
        changes.update(mode="untagged", vlan=0, allowed=(), native=0)
    if args.native is not None:
        if args.vlan is not None or args.untagged:
            raise SwitchError("--native is for a trunk", "usage")
        changes["native"] = args.native
    for name in ("mac_spoofing", "dhcp_guard", "router_guard"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name) == "on"
    if args.bandwidth is not None:
        try:
            changes["bandwidth"] = None if args.bandwidth == "none" else parse_rate(args.bandwidth)
        except ConfigError as error:
            raise SwitchError(str(error), "usage") from error
    if args.link is not None:
        changes["link"] = args.link == "up"
    return changes


def _vlans(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and len(word) < 8 for word in words):
        raise SwitchError(f"trunk {text!r}: write VLANs with commas between, such as 10,20", "usage")
    return tuple(dict.fromkeys(int(word) for word in words))


def _state(found: dict[str, Any]) -> str:
    return f"{found['state']}, process {found['pid']}" if found["pid"] else str(found["state"])


def _link(port: dict[str, Any]) -> str:
    return "up" if port["link"] else "down"


def _vlan(port: dict[str, Any]) -> str:
    if port["mode"] == "trunk":
        native = f" native {port['native']}" if port["native"] else ""
        return f"trunk {','.join(map(str, port['allowed']))}{native}"
    return str(port["vlan"]) if port["mode"] == "access" else "untagged"


def _switched(value: bool) -> str:
    return "on" if value else "off"


def _counted(statistics: dict[str, Any], way: str) -> str:
    return f"{statistics[f'{way}_frames']} frames, {_bytes(statistics[f'{way}_bytes'])}"


def _bytes(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _text(value: str | int | Sequence[str]) -> str:
    return str(value) if isinstance(value, str | int) else ", ".join(value)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Column, Table

    return Table(*(Column(name, min_width=_WIDTHS.get(name), overflow="fold") for name in columns), box=box.SIMPLE)


def _print(what: str | Table) -> None:
    from rich.console import Console

    Console(highlight=False, markup=False, soft_wrap=isinstance(what, str)).print(what)
