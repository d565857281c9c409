"""``pyvmm enlightenments show``: what a running guest makes of its enlightenments."""

from __future__ import annotations

import argparse
import json
import sys
import time

from pyvmm.cli import EXIT_FAILED, CliError
from pyvmm.cli.ctl import request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from rich.console import RenderableType

_REPLY_S = 30.0

#: What waits between two looks; tests have their own.
sleep = time.sleep


def run(args: argparse.Namespace) -> int:
    """Show the report of the VM at ``args.target``, once, or with ``args.watch`` until Ctrl-C or the VM's end."""
    path = _socket(args.target)
    first = _fetch(path)
    if not args.watch:
        _print(args.output, first)
        return 0
    try:
        if args.output == "json":
            for report in _follow(path, first, args.interval):
                print(json.dumps(report), flush=True)
        else:
            _live(path, first, args.interval)
    except KeyboardInterrupt:  # the way to end it
        return 0
    print("pyvmm: the VM has ended", file=sys.stderr)
    return 0


def _socket(target: str) -> str:
    if not target.endswith(".toml"):
        return target
    from pyvmm.machine.config_file import load

    control = load(target).control
    if control is None:
        raise CliError(f"{target} names no control socket; add control = PATH, or give the socket")
    return control


def _fetch(path: str) -> dict[str, Any]:
    reply = request(path, {"command": "enlightenments"}, _REPLY_S)
    if reply.pop("ok", None) is not True:
        raise CliError(str(reply.get("error")), EXIT_FAILED)
    del reply["version"]
    return reply


def _follow(path: str, report: dict[str, Any], interval: float) -> Iterator[dict[str, Any]]:
    """`report`, and then every `interval` seconds one with the rates since the last, until the VM is gone."""
    from enlightenments.observe import between

    yield report
    while True:
        sleep(interval)
        try:
            later = _fetch(path)
        except CliError:
            return
        yield between(report, later)
        report = later


def _live(path: str, first: dict[str, Any], interval: float) -> None:
    from rich.live import Live

    with Live(_table(first), auto_refresh=False) as live:
        for report in _follow(path, first, interval):
            live.update(_table(report), refresh=True)


def _print(output: str, report: dict[str, Any]) -> None:
    if output == "json":
        print(json.dumps(report, indent=2))
        return
    from rich.console import Console

    Console(highlight=False).print(_table(report))


def _table(report: dict[str, Any]) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table("enlightenment", box=box.SIMPLE)
    for title in ("offered", "enabled", "used"):
        table.add_column(title)
    for title in ("hits", "per second", "of exits", "errors"):
        table.add_column(title, justify="right")
    table.add_column("last error")
    for entry in report["enlightenments"]:
        error = entry["last_error"]
        table.add_row(
            entry["name"],
            *(_state(entry[key]) for key in ("offered", "enabled", "used")),
            str(entry["hits"]),
            f"{entry['hits_per_s']:.1f}",
            f"{entry['exit_share']:.1%}",
            str(entry["errors"]),
            f"{escape(error['text'])} ({error['seconds_ago']:.0f} s ago)" if error else "",
        )
    guest = escape(report["guest_os"]) or "a guest that has not told its name"
    head = f"{guest}; VM of {report['uptime_s']:.1f} s, {report['exits_per_s']:.0f} exits per second"
    notes = [
        f"[yellow]{escape(warning['enlightenment'])}:[/] {escape(warning['text'])}" for warning in report["warnings"]
    ]
    if report["synic"]["kvm_timers"]:
        notes.insert(0, "KVM runs the timers: their ticks, and accesses of their COUNT, are not seen here")
    return Group(head, table, *notes)


def _state(value: bool | None) -> str:
    return {True: "yes", False: "[dim]no[/]", None: ""}[value]
