"""``pyvmm lb``: load balancers that spread connections over VMs."""

from __future__ import annotations

import argparse

from pyvmm.cli import EXIT_FAILED, CliError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parser import Parser

EXIT_MISSING = 3
ALGORITHMS = ("round-robin", "least-connections", "source")


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``lb`` command."""
    parser = subparsers.add_parser(
        "lb",
        help="spread connections over VMs",
        description="Load balancers: an address whose connections are spread over VMs, by HAProxy.",
        epilog="exit status: 0 done, 1 refused, 2 usage, 3 no such load balancer",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, prog="pyvmm lb")

    def action(name: str, text: str, named: bool = True) -> Parser:
        made = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if named:
            made.add_argument("name", metavar="NAME", help="the load balancer")
        made.add_argument("-o", "--output", choices=("table", "json"), default="table", help="form of the output")
        made.set_defaults(run=_run, action=name.replace("-", "_"))
        return made

    create = action("create", "make a load balancer and start it")
    create.add_argument(
        "--vip", required=True, metavar="IP:PORT", help="where clients connect; the host gets the address"
    )
    create.add_argument(
        "--backend",
        dest="backends",
        action="append",
        default=[],
        metavar="VM:PORT[,weight=N][,address=IP]",
        help="a VM's port; the VM's address is found on its switch unless given; may be given again",
    )
    create.add_argument("--algorithm", choices=ALGORITHMS, default=ALGORITHMS[0], help="who gets a new connection")
    create.add_argument(
        "--affinity",
        metavar="S",
        type=int,
        default=0,
        help="send a client that returns within S seconds to the same VM",
    )
    create.add_argument("--check", metavar="tcp|http[:/PATH]", default="tcp", help="how a VM shows that it serves")
    create.add_argument("--interval", metavar="S", type=float, default=1.0, help="seconds between checks; 1 by default")
    create.add_argument(
        "--fall", metavar="N", type=int, default=2, help="failed checks that take a VM out; 2 by default"
    )
    create.add_argument("--rise", metavar="N", type=int, default=1, help="good checks that take it in; 1 by default")

    action("list", "list the load balancers", named=False)
    action("show", "show a load balancer, its VMs and what it has counted")
    action("start", "start a load balancer that does not run, as after the host's restart")
    action("stop", "end a load balancer with its connections, and keep its definition")
    action("delete", "end and forget a load balancer")
    add = action("add", "spread connections over one more VM")
    add.add_argument("backend", metavar="VM:PORT[,weight=N][,address=IP]")
    for name, text in (
        ("remove", "take a VM out; connections to it go on"),
        ("drain", "send a VM no new connections, for those that it has to end"),
        ("undrain", "send a VM new connections again"),
    ):
        action(name, text).add_argument("backend", metavar="VM:PORT")
    weigh = action("weigh", "give a VM another share of the connections")
    weigh.add_argument("backend", metavar="VM:PORT")
    weigh.add_argument("weight", metavar="N", help="1 to 256")


def _run(args: argparse.Namespace) -> int:
    from devices.network.errors import SwitchError
    from pyvmm.cli import lb_actions
    from pyvmm.host.balancer.definition import BalancerError
    from pyvmm.host.balancer.store import MissingBalancer

    try:
        return int(getattr(lb_actions, args.action)(args))
    except MissingBalancer as error:
        raise CliError(str(error), EXIT_MISSING) from error
    except (BalancerError, SwitchError) as error:
        raise CliError(str(error), EXIT_FAILED) from error
