"""How a load balancer and its VMs are: the definition, and what HAProxy has counted."""

from __future__ import annotations

from pyvmm.host.balancer import process, store
from pyvmm.host.balancer.definition import Balancer, join
from pyvmm.host.balancer.haproxy import Runtime, server_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Ours, and HAProxy's names of its counters (management guide, section 9.1).
_COUNTERS = {
    "connections": "scur",
    "connections_total": "stot",
    "bytes_in": "bin",
    "bytes_out": "bout",
    "connect_errors": "econ",
    "redispatched": "wredis",
    "checks_failed": "chkfail",
    "times_down": "chkdown",
}


def of(balancer: Balancer) -> dict[str, Any]:
    """Everything as plain data. Counters start anew when HAProxy gets a new configuration: a VM comes or goes."""
    pid = process.pid_of(balancer.name)
    rows: dict[str, dict[str, str]] = {}
    if pid is not None:
        try:
            rows = Runtime(store.folder(balancer.name) / "haproxy.sock").statistics()
        except OSError:
            pass  # it is just starting
    return {
        "name": balancer.name,
        "vip": join(balancer.vip, balancer.port),
        "algorithm": str(balancer.algorithm),
        "affinity_seconds": balancer.affinity_seconds,
        "check": balancer.check,
        "running": pid is not None,
        "pid": pid,
        "backends": [
            _backend(balancer, index, rows.get(server_name(index), {})) for index in range(len(balancer.backends))
        ],
    }


def _backend(balancer: Balancer, index: int, row: dict[str, str]) -> dict[str, Any]:
    backend = balancer.backends[index]
    status = row.get("status", "")
    if not status:
        state = "unknown"
    elif status.startswith("MAINT"):
        state = "away"
    elif not status.startswith("UP"):
        state = "down"
    else:
        state = "draining" if backend.draining else "up"
    return {
        "backend": backend.name,
        "vm": backend.vm,
        "port": backend.port,
        "weight": backend.weight,
        "draining": backend.draining,
        "address": row["addr"].rpartition(":")[0].strip("[]") if state not in ("unknown", "away") else None,
        "state": state,
        "last_check": row.get("last_chk") or row.get("check_status") or None,
        **{name: int(row[theirs]) if row.get(theirs) else 0 for name, theirs in _COUNTERS.items()},
    }
