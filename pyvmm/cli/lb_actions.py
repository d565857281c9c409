"""What ``pyvmm lb`` does: one function per action, named like it, which returns the exit status.

They raise BalancerError, and SwitchError where the host has no place for files.
"""

from __future__ import annotations

import json

import msgspec

from pyvmm.host.balancer import process, status, store
from pyvmm.host.balancer.definition import (
    Algorithm,
    Backend,
    Balancer,
    BalancerError,
    parse_backend,
    parse_vip,
    parse_weight,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any


def create(args: argparse.Namespace) -> int:
    """Make a load balancer and start it; if that fails there is none."""
    vip, port = parse_vip(args.vip)
    balancer = Balancer(
        name=args.name,
        vip=vip,
        port=port,
        backends=[parse_backend(text) for text in args.backends],
        algorithm=Algorithm(args.algorithm),
        affinity_seconds=args.affinity,
        check=args.check,
        interval=args.interval,
        fall=args.fall,
        rise=args.rise,
    )
    if args.name in store.names():
        raise BalancerError(f"there is a load balancer {args.name} already")
    store.save(balancer)
    try:
        process.start(args.name)
    except BaseException:
        store.remove(args.name)
        raise
    return _show(args)


def list(args: argparse.Namespace) -> int:  # noqa: A001 - named like the action
    """List all."""
    rows = []
    for name in store.names():
        found = status.of(store.load(name))
        up = sum(backend["state"] == "up" for backend in found["backends"])
        rows.append({**{key: found[key] for key in ("name", "vip", "algorithm", "running")}, "up": up})
        rows[-1]["backends"] = len(found["backends"])
    if args.output == "json":
        print(json.dumps(rows, indent=2))
    else:
        _table({key: key for key in ("name", "vip", "algorithm", "running", "up", "backends")}, rows)
    return 0


def show(args: argparse.Namespace) -> int:
    """Show one."""
    return _show(args)


def start(args: argparse.Namespace) -> int:
    """Start one that does not run."""
    store.load(args.name)
    process.start(args.name)
    return _show(args)


def stop(args: argparse.Namespace) -> int:
    """End one."""
    store.load(args.name)
    if not process.stop(args.name):
        raise BalancerError(f"load balancer {args.name} does not run")
    return 0


def delete(args: argparse.Namespace) -> int:
    """End and forget one."""
    store.load(args.name)
    process.stop(args.name)
    store.remove(args.name)
    return 0


def add(args: argparse.Namespace) -> int:
    """Add a backend."""
    balancer = store.load(args.name)
    balancer.backends.append(parse_backend(args.backend))
    return _change(args, balancer)


def remove(args: argparse.Namespace) -> int:
    """Remove a backend."""
    balancer = store.load(args.name)
    balancer.backends.remove(balancer.backend(args.backend))
    return _change(args, balancer)


def drain(args: argparse.Namespace) -> int:
    """Send a backend nothing new."""
    return _set(args, draining=True)


def undrain(args: argparse.Namespace) -> int:
    """Send a backend new connections again."""
    return _set(args, draining=False)


def weigh(args: argparse.Namespace) -> int:
    """Change a backend's weight."""
    return _set(args, weight=parse_weight(args.weight))


def _set(args: argparse.Namespace, **values: Any) -> int:
    balancer = store.load(args.name)
    backend: Backend = balancer.backend(args.backend)
    for key, value in values.items():
        setattr(backend, key, value)
    return _change(args, balancer)


def _change(args: argparse.Namespace, balancer: Balancer) -> int:
    before = store.load(balancer.name)
    store.save(balancer)
    try:
        process.apply(balancer)
    except BalancerError:
        store.save(before)
        raise
    if args.output == "json":
        print(json.dumps(msgspec.to_builtins(balancer), indent=2))
    return 0


def _show(args: argparse.Namespace) -> int:
    found = status.of(store.load(args.name))
    if args.output == "json":
        print(json.dumps(found, indent=2))
        return 0
    running = f"process {found['pid']}" if found["running"] else "not running"
    affinity = f", affinity {found['affinity_seconds']} s" if found["affinity_seconds"] else ""
    print(f"{found['name']}: {found['vip']}, {found['algorithm']}{affinity}, check {found['check']}, {running}")
    _table(
        {
            "backend": "backend",
            "address": "address",
            "state": "state",
            "weight": "weight",
            "connections": "open",
            "connections_total": "total",
            "bytes_in": "in",
            "bytes_out": "out",
        },
        found["backends"],
    )
    return 0


def _table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns.values(), box=box.SIMPLE)
    for row in rows:
        table.add_row(*("-" if row[column] is None else str(row[column]) for column in columns))
    Console(highlight=False).print(table)
