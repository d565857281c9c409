"""``pyvmm switch``: virtual switches, and the ports that VMs have on them."""

from __future__ import annotations

import argparse

from pyvmm.cli import EXIT_FAILED, EXIT_HOST, EXIT_USAGE, CliError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parser import Parser

EXIT_MISSING = 3
TYPES = ("private", "internal", "external", "nat")
PLANES = ("auto", "kernel", "process")

_STATUSES = {"usage": EXIT_USAGE, "missing": EXIT_MISSING, "stopped": EXIT_MISSING, "host": EXIT_HOST}


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``switch`` command."""
    parser = subparsers.add_parser(
        "switch",
        help="make and show virtual switches, and set their ports",
        description="Make and show virtual switches, and set the ports that VMs have on them.",
        epilog="exit status: 0 done, 1 refused, 2 usage, 3 no such switch, VM or NIC, 5 the host lacks something",
    )
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True, prog="pyvmm switch"
    )

    def action(name: str, text: str, named: bool = True) -> Parser:
        made = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if named:
            made.add_argument("name", metavar="NAME", help="the switch")
        made.add_argument("-o", "--output", choices=("table", "json"), default="table", help="form of the output")
        return made

    create = action("create", "make a switch")
    create.add_argument(
        "--type",
        choices=TYPES,
        help="who is on it beside VMs: nobody (default), the host, a network, or the host with NAT",
    )
    create.add_argument("--interface", metavar="IF", help="the host's interface that joins an external switch")
    create.add_argument(
        "--share", action="store_true", help="move that interface's addresses and routes to the switch, for the host"
    )
    create.add_argument(
        "--address",
        metavar="CIDR",
        dest="addresses",
        action="append",
        help="the host's address on it, such as 192.168.77.1/24; a nat switch finds a free one; may be given again",
    )
    create.add_argument("--plane", choices=PLANES, help="what carries the frames; see 'pyvmm doctor'")
    create.add_argument("--mtu", metavar="N", type=int, help="bytes of payload in a frame, 1500 by default, up to 9000")
    create.add_argument(
        "--forward",
        metavar="tcp|udp:[ADDR:]PORT:VM:PORT",
        dest="forwards",
        action="append",
        help="a port of the host that leads to one of a VM on a nat switch; may be given again",
    )

    action("list", "list the switches", named=False)
    action("show", "show a switch, its ports and what they have counted")
    action("start", "start a switch that does not run, as after the host's restart; its first VM does so too")
    delete = action("delete", "end and forget a switch")
    delete.add_argument("--force", action="store_true", help="also while VMs are on it")
    _add_port(action("port", "show a VM's port, or set it until the VM ends"))
    parser.set_defaults(run=run)


def _add_port(port: Parser) -> None:
    port.add_argument("vm", metavar="VM[:NIC]", help="the VM, and its NIC if it has several there")
    vlan = port.add_mutually_exclusive_group()
    vlan.add_argument("--vlan", metavar="N", type=int, help="untagged access to VLAN N, 1 to 4094")
    vlan.add_argument("--trunk", metavar="N,N...", help="VLANs that it carries with their tags")
    vlan.add_argument("--untagged", action="store_true", help="in no VLAN, as a new port is")
    port.add_argument("--native", metavar="N", type=int, help="the VLAN of a trunk's untagged frames; 0 for none")
    for name, text in (
        ("mac-spoofing", "let the guest send from other MAC addresses than the NIC's own"),
        ("dhcp-guard", "drop what only a DHCP server sends"),
        ("router-guard", "drop what only a router sends: advertisements and redirects"),
    ):
        port.add_argument(f"--{name}", choices=("on", "off"), help=text)
    port.add_argument("--bandwidth", metavar="RATE|none", help="limit of bits per second, each way, such as 100M")
    port.add_argument("--link", choices=("up", "down"), help="plug its cable in or out")
    port.add_argument("--mirror", metavar="FILE|none", help="write its frames to a new pcap file, or stop that")


def run(args: argparse.Namespace) -> int:
    """Carry out one action."""
    from devices.network.errors import SwitchError
    from pyvmm.cli import switch_actions

    try:
        status: int = getattr(switch_actions, args.action)(args)
        return status
    except SwitchError as error:
        raise CliError(str(error), _STATUSES.get(error.kind, EXIT_FAILED)) from error
