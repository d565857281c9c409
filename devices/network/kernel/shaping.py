"""Limits of bandwidth: a token bucket on a TAP's way to its NIC, and another, behind an ifb, on the way from there.

A bucket queues what a policer would drop, so TCP gets the rate that the limit says.

Sources: tc-tbf(8), Linux 6.1 net/sched/sch_tbf.c, drivers/net/ifb.c.
"""

from __future__ import annotations

from typing import Any

from devices.network.kernel.links import Links, attempt

_ROOT, _INGRESS = 0xFFFFFFFF, 0xFFFFFFF2  # TC_H_ROOT; TC_H_CLSACT with TC_H_MIN_INGRESS
_NEEDS = "traffic control (CONFIG_NET_SCH_TBF, NET_SCH_INGRESS, NET_CLS_MATCHALL, NET_ACT_MIRRED)"
#: What passes at once, and what may wait: so much time's worth, but some.
_BURST_S, _QUEUE_S = 0.01, 0.1
_LEAST_QUEUE = 128 << 10
#: Bits per second above which a bucket's 32-bit rate in bytes ends; more is no limit.
_MOST = 32 * 10**9


def set_limit(links: Links, index: int, ifb: str, limit: int | None, mtu: int) -> None:
    """Let the TAP `index` pass so many bits/s each way; what waited for an earlier limit is dropped."""
    links.remove(ifb)
    with attempt("traffic control", _NEEDS):
        for qdisc in _qdiscs(links, index):
            if qdisc.get("TCA_KIND") in ("tbf", "clsact"):
                links.route.tc("del", index=index, handle=qdisc["handle"], parent=qdisc["parent"])
    if limit is None or limit > _MOST:
        return
    _add_bucket(links, index, limit, mtu)
    mirror = links.make_ifb(ifb)
    _add_bucket(links, mirror, limit, mtu)
    redirect = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": mirror}
    with attempt("traffic control", _NEEDS):
        links.route.tc("add", "clsact", index)
        links.route.tc("add-filter", "matchall", index, parent=_INGRESS, action=redirect)


def dropped(links: Links, *indexes: int) -> int:
    """How many frames these interfaces' buckets have dropped."""
    with attempt("traffic control"):
        buckets = [qdisc for index in indexes for qdisc in _qdiscs(links, index) if qdisc.get("TCA_KIND") == "tbf"]
    return sum(bucket.get(("TCA_STATS2", "TCA_STATS_QUEUE"))["drops"] for bucket in buckets)


def _qdiscs(links: Links, index: int) -> list[Any]:
    return [qdisc for qdisc in links.route.get_qdiscs(index=index) if qdisc["index"] == index]


def _add_bucket(links: Links, index: int, limit: int, mtu: int) -> None:
    rate = limit // 8
    burst = max(int(rate * _BURST_S), 2 * (mtu + 22))
    queue = max(int(rate * _QUEUE_S), _LEAST_QUEUE)
    with attempt("traffic control", _NEEDS):
        links.route.tc("add", "tbf", index, parent=_ROOT, rate=rate, burst=burst, limit=queue)
