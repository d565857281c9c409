"""``pyvmm enlightenments``: what pyvmm can offer guests of Hyper-V, and what a running guest makes of it."""

from __future__ import annotations

import argparse
import json

from pyvmm.cli import CliError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rich.console import Console

    from pyvmm.cli.parser import Parser

_KVM_DEVICE = "/dev/kvm"


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``enlightenments`` command."""
    parser = subparsers.add_parser(
        "enlightenments",
        help="show what guests can have of Hyper-V",
        description="Show what pyvmm can offer guests of Hyper-V, and what a running guest makes of it.",
        epilog="exit status: 0 done, 1 refused by the VM, 2 usage, 3 no VM at the socket",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, prog="pyvmm enlightenments")
    action = actions.add_parser(
        "list", help="all enlightenments: CPUID bits, MSRs, hypercalls, needs, profiles, source"
    )
    action.add_argument("--profile", metavar="SPEC", help="only those that SPEC selects, such as linux,+ipi")
    _add_output(action)
    action.set_defaults(run=_list)
    action = actions.add_parser(
        "show",
        help="what a running guest has enabled and used, how often, what went wrong, and what to look at",
        description="Show what a running guest makes of its enlightenments. Ctrl-C ends --watch.",
    )
    action.add_argument(
        "target", metavar="VM.toml|SOCKET", help="the VM's file, which names its control socket, or that"
    )
    action.add_argument("--watch", action="store_true", help="go on showing, with rates since the last time")
    action.add_argument("--interval", metavar="S", type=_seconds, default=1.0, help="seconds between two times (1)")
    action.add_argument("-o", "--output", choices=("table", "json"), default="table", help="form of the output")
    action.set_defaults(run=_show)
    action = actions.add_parser("profiles", help="the profiles, and why they are what they are")
    _add_output(action)
    action.set_defaults(run=_profiles)
    action = actions.add_parser("schema", help="print the JSON schema of custom profiles")
    action.set_defaults(run=_schema)


def _add_output(action: Parser) -> None:
    action.add_argument("-o", "--output", choices=("table", "json", "name"), default="table", help="form of the output")


def _list(args: argparse.Namespace) -> int:
    from enlightenments.catalog import ENLIGHTENMENTS
    from enlightenments.describe import describe
    from enlightenments.selection import parse_spec

    try:
        names = parse_spec(args.profile).names if args.profile is not None else frozenset(ENLIGHTENMENTS)
    except ValueError as error:
        raise CliError(str(error)) from error
    entries = describe(names, _host_features(_KVM_DEVICE))
    _print(args.output, "enlightenments", entries, _show_list)
    return 0


def _profiles(args: argparse.Namespace) -> int:
    from enlightenments.describe import profiles

    _print(args.output, "profiles", profiles(), _show_profiles)
    return 0


def _schema(_: argparse.Namespace) -> int:
    from enlightenments.custom_profile import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _show(args: argparse.Namespace) -> int:
    from pyvmm.cli.enlightenments_show import run

    return run(args)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _host_features(device: str) -> set[str] | None:
    """What this host has of `HOST_FEATURES`; None if its KVM cannot be asked."""
    from pyvmm.core.kvm.errors import KvmError
    from pyvmm.core.kvm.system import System
    from pyvmm.machine.processor import host_features

    try:
        with System(device) as system:
            return host_features(system, system.supported_cpuid())
    except KvmError:
        return None


def _print(output: str, title: str, entries: list[dict[str, Any]], show: Any) -> None:
    if output == "json":
        print(json.dumps({title: entries}, indent=2))
    elif output == "name":
        for entry in entries:
            print(entry["name"])
    else:
        from rich.console import Console

        show(Console(highlight=False), entries)


def _show_list(console: Console, entries: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    from enlightenments.describe import cpuid_text, short_list

    table = Table("enlightenment", box=box.SIMPLE)
    table.add_column("what it is, and what guests gain", min_width=30)
    table.add_column("turns on")
    for entry in entries:
        about = [f"{entry['purpose']}: {entry['gain']}", f"[dim]{entry['source']}[/]"]
        if entry["needs"]:
            about.append(f"[dim]needs {', '.join(entry['needs'])}[/]")
        if entry["host"] is not None:
            state = {True: "[green]here[/]", False: "[yellow]not here[/]", None: "not known here"}
            host = entry["host"]
            about.append(f"[dim]needs of the host {host['description']}:[/] {state[host['available']]}")
        parts = (
            *cpuid_text(entry["cpuid"]),
            *short_list(entry["msrs"]),
            *(f"{call['code']} {call['name']}" for call in entry["hypercalls"]),
        )
        about.append(f"[dim]in {', '.join(entry['profiles']) or 'no profile'}[/]")
        table.add_row(entry["name"], "\n".join(about), "\n".join(parts), end_section=True)
    console.print(table)


def _show_profiles(console: Console, entries: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table("profile", "why", "enlightenments", box=box.SIMPLE)
    for entry in entries:
        about = [entry["reason"], f"[dim]{entry['source']}[/]"]
        if entry["version"]:
            about.append(f"[dim]version {entry['version']}[/]")
        table.add_row(entry["name"], "\n".join(about), ", ".join(entry["enlightenments"]) or "none")
    console.print(table)
