"""A switch that the kernel carries: each port is a TAP on a bridge with VLAN filtering."""

from __future__ import annotations

from devices.network.plane import DataPlane


class KernelPlane(DataPlane):
    """Wants CAP_NET_ADMIN, and CAP_NET_RAW for mirrors."""

    name = "kernel"
