"""``pyvmm ctl``: steer a running VM through its control socket."""

from __future__ import annotations

import argparse
import json
import os
import socket

from pyvmm.cli import EXIT_FAILED, CliError
from pyvmm.machine.config import DISK_FORM, NIC_FORM, ConfigError, parse_disk, parse_nic, parse_size
from pyvmm.machine.control import DEFAULT_SHUTDOWN_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pyvmm.cli.parser import Parser

EXIT_NO_VM = 3

#: How long a VM may take to answer, beyond what a shutdown is given.
_REPLY_S = 30.0
_MAX_REPLY = 64 << 20

_COMMANDS = {
    "shutdown": "ask the guest to shut down, through its integration service",
    "poweroff": "turn the VM off at once",
    "reset": "reset the VM at once",
    "pause": "stop the VM's processors, devices and clock",
    "resume": "go on after pause",
    "inspect": "show the live state of the VM, or a part of it",
    "add-disk": "plug in a disk",
    "remove-disk": "unplug a disk",
    "eject": "take the disc out of a CD or DVD drive",
    "insert": "put an ISO image into a CD or DVD drive",
    "resize-disk": "make a disk larger while the guest uses it",
    "nic": "plug in, unplug, set or list network adapters",
    "status": "show the VM's name, process and state",
}
_NIC_ACTIONS = {
    "add": "plug a synthetic NIC in",
    "remove": "unplug a synthetic NIC",
    "set": "connect a NIC elsewhere, plug its cable in or out, change VLANs, limits and guards",
    "list": "show the NICs and what their cables lead to",
}


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``ctl`` command."""
    parser = subparsers.add_parser(
        "ctl",
        help="steer a running VM",
        description="Steer a VM that was started with --control SOCKET.",
        epilog="exit status: 0 done, 1 refused by the VM or not obeyed by the guest, 2 usage, 3 no VM at SOCKET",
    )
    parser.add_argument("socket", metavar="SOCKET", help="the VM's control socket")
    actions = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, prog="pyvmm ctl SOCKET"
    )
    by_name: dict[str, Parser] = {}
    for name, text in _COMMANDS.items():
        by_name[name] = action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")
    by_name["shutdown"].add_argument(
        "--timeout", metavar="S", type=float, default=DEFAULT_SHUTDOWN_S, help="seconds that the guest is given"
    )
    by_name["shutdown"].add_argument("--restart", action="store_true", help="have the guest restart")
    by_name["inspect"].add_argument("path", metavar="NODE", nargs="?", default="", help="a part, such as board/devices")
    by_name["add-disk"].add_argument("disk", metavar="PATH[,OPTION]...", type=parse_disk, help=f"as {DISK_FORM}")
    for name in ("remove-disk", "resize-disk"):
        by_name[name].add_argument("place", metavar="CONTROLLER:LUN", type=_place)
    for name in ("eject", "insert"):
        by_name[name].add_argument("place", metavar="[ide]CONTROLLER:LUN", type=_drive)
    by_name["eject"].add_argument("--force", action="store_true", help="also if the guest has locked the drive")
    by_name["insert"].add_argument("image", metavar="PATH", help="ISO image")
    _add_nic_actions(by_name["nic"])
    by_name["resize-disk"].add_argument("size", metavar="SIZE", type=parse_size, help="the new size, such as 20G")
    parser.set_defaults(run=run)


def _add_nic_actions(parser: Parser) -> None:
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True, prog="pyvmm ctl SOCKET nic"
    )
    by_name: dict[str, Parser] = {}
    for name, text in _NIC_ACTIONS.items():
        by_name[name] = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        # A default here would undo what was said before the action.
        by_name[name].add_argument(
            "-o", "--output", choices=("text", "json"), default=argparse.SUPPRESS, help="form of the output"
        )
    by_name["add"].add_argument("spec", metavar="NETWORK[,OPTION]...", type=_nic_spec, help=f"as {NIC_FORM}")
    for name in ("remove", "set"):
        by_name[name].add_argument("nic", metavar="N", type=int, help="its number, as list shows it")
    by_name["set"].add_argument("spec", metavar="OPTION[,OPTION]...", help=f"what changes, of {NIC_FORM}")


def run(args: argparse.Namespace) -> int:
    """Send one command and print the reply; return 1 if the VM refused it or the guest did not obey."""
    reply = request(args.socket, _request(args), _REPLY_S + getattr(args, "timeout", 0.0))
    obeyed = reply.get("ok") is True and reply.get("obeyed", True) is True
    if args.output == "json":
        print(json.dumps(reply, indent=2))
    elif reply.get("ok") is not True:
        raise CliError(str(reply.get("error")), EXIT_FAILED)
    else:
        print("\n".join(_lines(args, reply)))
    return 0 if obeyed else EXIT_FAILED


def request(path: str, message: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Send `message` to the control socket at `path` and return the reply within `timeout` seconds.

    Raises CliError: status 3 if no VM listens there, 1 if it does not answer as it should.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(path)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CliError(f"no VM listens at {path}: {why}", EXIT_NO_VM) from error
        try:
            connection.sendall(json.dumps(message).encode() + b"\n")
            with connection.makefile("rb") as replies:
                line = replies.readline(_MAX_REPLY)
        except TimeoutError as error:
            raise CliError(f"the VM at {path} did not answer within {timeout:g} s", EXIT_FAILED) from error
        except OSError as error:
            raise CliError(f"the VM at {path} hung up: {error.strerror}", EXIT_FAILED) from error
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise CliError(f"the VM at {path} ended without an answer", EXIT_FAILED)
    return reply


def _request(args: argparse.Namespace) -> dict[str, Any]:
    message: dict[str, Any] = {"command": args.command}
    if args.command == "shutdown":
        message.update(timeout=args.timeout, restart=args.restart)
    elif args.command == "inspect":
        message.update(path=args.path)
    elif args.command == "add-disk":
        message.update((name, value) for name, value in vars(args.disk).items() if value is not None)
        message.update(path=os.path.abspath(args.disk.path))
    elif args.command == "nic":
        message.update(command="list-nics" if args.action == "list" else f"{args.action}-nic")
        message.update((name, getattr(args, name)) for name in ("nic", "spec") if name in args)
    if "place" in args:
        message.update(zip(("controller", "lun", "bus"), args.place, strict=False))
    if args.command == "resize-disk":
        message.update(size=args.size)
    elif args.command == "eject":
        message.update(force=args.force)
    elif args.command == "insert":
        message.update(path=os.path.abspath(args.image))
    return message


def _place(text: str) -> tuple[int, int]:
    controller, colon, lun = text.partition(":")
    if not (colon and controller.isdecimal() and lun.isdecimal() and len(text) < 8):
        raise ConfigError(f"{text!r} is not CONTROLLER:LUN, such as 0:1")
    return int(controller), int(lun)


def _nic_spec(text: str) -> str:
    parse_nic(text)
    return text


def _drive(text: str) -> tuple[int, int, str]:
    bus = "ide" if text.startswith("ide") else "scsi"
    return *_place(text.removeprefix("ide")), bus


def _lines(args: argparse.Namespace, reply: dict[str, Any]) -> list[str]:
    if "inspect" in reply:
        node = reply["inspect"]
        return list(_tree(node)) if isinstance(node, dict | list) else [_scalar(node)]
    if "nics" in reply or args.command == "nic":
        return _nic_table(reply.get("nics", [reply]))
    if "message" in reply:
        return [str(reply["message"])]
    return [f"{key}: {_scalar(value)}" for key, value in reply.items() if key not in ("ok", "version")]


def _nic_table(nics: list[dict[str, Any]]) -> list[str]:
    rows = [("NIC", "TYPE", "MAC", "NETWORK", "LINK")]
    for nic in nics:
        link = "up" if nic["link"] else f"lost: {nic['lost']}" if nic["lost"] else "down"
        rows.append((str(nic["nic"]), nic["type"], nic["mac"], nic["network"], link))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _tree(node: Any, indent: str = "") -> Iterator[str]:
    """Lines of ``key: value``, deeper levels indented."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        if isinstance(value, dict | list) and value:
            yield f"{indent}{key}:"
            yield from _tree(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
