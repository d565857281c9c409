"""What may be set of a port of a switch: Hyper-V's settings of a virtual network adapter."""

from __future__ import annotations

from enum import StrEnum

import msgspec

#: VLAN ids that frames can have.
MIN_VLAN, MAX_VLAN = 1, 4094


class VlanMode(StrEnum):
    """How frames of a port are tagged on its link (Set-VMNetworkAdapterVlan)."""

    UNTAGGED = "untagged"  # one VLAN without a number, which only untagged ports and trunks with native id 0 share
    ACCESS = "access"  # untagged on the link, in VLAN `vlan` on the switch; tagged frames from the NIC are dropped
    TRUNK = "trunk"  # tagged on the link with one of `allowed`; untagged frames are in VLAN `native`


class PortSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port of a switch and the NIC at its end; `msgspec.structs.replace` changes it."""

    vm: str
    nic: str
    #: ``00:15:5d:xx:xx:xx``, lower case.
    mac: str
    mode: VlanMode = VlanMode.UNTAGGED
    #: Of an access port.
    vlan: int = 0
    #: Of a trunk. `native` is 0 for the VLAN without a number.
    allowed: tuple[int, ...] = ()
    native: int = 0
    #: Whether frames from the NIC may have source addresses that are not its own.
    mac_spoofing: bool = False
    #: Drop from the NIC what only a DHCP or DHCPv6 server sends, or router advertisements and redirects.
    dhcp_guard: bool = False
    router_guard: bool = False
    #: Most bits per second that the NIC may send, and be sent; None for no limit.
    bandwidth: int | None = None
    #: Whether the cable is plugged in.
    link: bool = True


def check(settings: PortSettings) -> None:
    """Raise ValueError, with one line for people, unless the parts of `settings` fit together."""
    where = f"port of {settings.vm}'s {settings.nic}"
    if settings.mode is VlanMode.ACCESS and not MIN_VLAN <= settings.vlan <= MAX_VLAN:
        raise ValueError(f"{where}: vlan {settings.vlan} is not {MIN_VLAN} to {MAX_VLAN}")
    if settings.mode is VlanMode.TRUNK:
        if not settings.allowed:
            raise ValueError(f"{where}: a trunk needs the VLANs that it carries")
        for vlan in settings.allowed:
            if not MIN_VLAN <= vlan <= MAX_VLAN:
                raise ValueError(f"{where}: vlan {vlan} is not {MIN_VLAN} to {MAX_VLAN}")
        if settings.native and not MIN_VLAN <= settings.native <= MAX_VLAN:
            raise ValueError(f"{where}: native vlan {settings.native} is not {MIN_VLAN} to {MAX_VLAN}")
    if settings.bandwidth is not None and settings.bandwidth < MIN_BANDWIDTH:
        raise ValueError(f"{where}: bandwidth {settings.bandwidth} is less than {MIN_BANDWIDTH} bits/s")


#: The least limit in bits/s: below it TCP would take the link for broken.
MIN_BANDWIDTH = 64_000


class PortStatistics(msgspec.Struct, kw_only=True):
    """Counted at the port: `received` is what came from the NIC, `sent` what went to it. Dropped by reason."""

    received_frames: int = 0
    received_bytes: int = 0
    sent_frames: int = 0
    sent_bytes: int = 0
    dropped: dict[str, int] = {}
