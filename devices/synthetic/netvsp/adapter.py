"""The NIC as its guest sees it by queries and sets: addresses, filter, offloads, spreading, statistics.

What each object holds: Microsoft's documentation of NDIS OIDs; the values are those of Hyper-V's switch where OpenVMM
(vm/devices/net/netvsp/src/lib.rs) tells them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_TSO_ECN
from devices.synthetic.netvsp import ndis
from devices.synthetic.netvsp.ndis import RSS_NONE, Offload, Rss
from devices.synthetic.netvsp.oids import Oid
from devices.synthetic.netvsp.protocol import CAPABILITY_8021Q, CAPABILITY_RSC
from devices.synthetic.netvsp.rndis import Refused, Status
from pyvmm.core import _hot

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.core._hot import NetDevice

#: Bits per second that the guest is told; frames are as fast as they are.
LINK_SPEED = 10_000_000_000
#: Groups that a guest may list; further ones it gets by asking for all.
MAX_GROUPS = 64
_HEADER_SIZE = 14
_ADDRESS_SIZE = 6
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_BUFFER_SPACE = 256 << 10
#: The bytes of Microsoft's MAC addresses, as Hyper-V's switch says.
_VENDOR_ID = 0x00155D
_VENDOR = b"Microsoft Corporation"
#: What Linux takes for the name that nobody has chosen.
_FRIENDLY_NAME = "Network Adapter"
_FRIENDLY_NAME_SIZE = 512
_DRIVER_VERSION = 0x0100
#: Lookahead may be copied, transfers don't pend, no loopback, 802.1p priority, 802.1Q VLANs.
_MAC_OPTIONS = 0x1 | 0x4 | 0x8 | 0x40 | 0x200
_PACKET_FILTER_BITS = 0x1 | 0x2 | 0x4 | 0x8 | 0x20

#: What each kind of offload is to the C code.
_RECEIVE_BITS = {
    Offload.RECEIVE_IP4: _hot.RECEIVE_IP4,
    Offload.RECEIVE_TCP4: _hot.RECEIVE_TCP4,
    Offload.RECEIVE_UDP4: _hot.RECEIVE_UDP4,
    Offload.RECEIVE_TCP6: _hot.RECEIVE_TCP6,
    Offload.RECEIVE_UDP6: _hot.RECEIVE_UDP6,
    Offload.RSC4: _hot.RECEIVE_RSC4,
    Offload.RSC6: _hot.RECEIVE_RSC6,
}
#: Partial checksums may be of any of these.
_ANY_CHECKSUM = Offload.RECEIVE_TCP4 | Offload.RECEIVE_UDP4 | Offload.RECEIVE_TCP6 | Offload.RECEIVE_UDP6
#: What is on when a guest begins. Of what it receives nothing is: a guest that says nothing, as iPXE, checks by itself.
_AT_FIRST = ndis.SEND | ndis.LSO


class Adapter:
    """A NIC with address `mac` whose guest may have `channels`; `device` does as the guest sets."""

    def __init__(self, mac: bytes, channels: int, device: NetDevice) -> None:
        self.mac = mac
        self._channels = channels
        self._device = device
        #: Whether the cable is plugged in.
        self.link_up = False
        self.begin((0, 0), 0, 0)

    def begin(self, ndis_version: tuple[int, int], frame_size: int, capabilities: int) -> None:
        """A guest begins: of this NDIS version, with frames of up to so many bytes, and these NVSP capabilities."""
        self._ndis = ndis_version
        self._frame_size = frame_size
        self._tags_beside = bool(capabilities & CAPABILITY_8021Q)
        self._supported = ndis.SEND | ndis.RECEIVE | ndis.LSO
        if capabilities & CAPABILITY_RSC:
            self._supported |= ndis.RSC
        self.reset()

    def reset(self) -> None:
        """Forget what the guest has set: nothing is received."""
        self._filter = 0
        self._address = self.mac
        self._groups: list[bytes] = []
        self._offloads = _AT_FIRST
        self._rss = RSS_NONE
        self._apply()

    # Queries ------------------------------------------------------------------------------------------

    def query(self, oid: int, data: bytes) -> bytes:
        """The value of an object; raises Refused."""
        if oid in _COUNTERS:
            count = sum(self._device.statistics()[name] for name in _COUNTERS[oid])
            wide = oid in _ALWAYS_WIDE or len(data) >= _U64.size
            return _U64.pack(count) if wide else _U32.pack(count & 0xFFFF_FFFF)
        if oid in _CONSTANTS:
            return _CONSTANTS[oid]
        if oid in _QUERIES:
            return _QUERIES[oid](self)
        raise Refused(Status.NOT_SUPPORTED)

    def _supported_list(self) -> bytes:
        oids = sorted({*_COUNTERS, *_CONSTANTS, *_QUERIES, *_SETS})
        return struct.pack(f"<{len(oids)}I", *oids)

    def current_config(self) -> bytes:
        """The offloads that are on, as NDIS_OFFLOAD."""
        return ndis.offload(self._offloads, self._ndis)

    # Sets ---------------------------------------------------------------------------------------------

    def set(self, oid: int, data: bytes) -> None:
        """Set an object; raises Refused."""
        if oid not in _SETS:
            raise Refused(Status.NOT_SUPPORTED)
        _SETS[oid](self, data)

    def _set_filter(self, data: bytes) -> None:
        if len(data) < _U32.size:
            raise Refused(Status.INVALID_LENGTH)
        self._filter = _U32.unpack_from(data)[0] & _PACKET_FILTER_BITS
        self._apply_filter()

    def _set_groups(self, data: bytes) -> None:
        if len(data) % _ADDRESS_SIZE:
            raise Refused(Status.INVALID_LENGTH)
        if len(data) > MAX_GROUPS * _ADDRESS_SIZE:
            raise Refused(Status.MULTICAST_FULL)
        self._groups = [data[at : at + _ADDRESS_SIZE] for at in range(0, len(data), _ADDRESS_SIZE)]
        self._apply_filter()

    def _set_offloads(self, data: bytes) -> None:
        self._change_offloads(ndis.change_offloads(self._offloads, data))

    def _set_rss(self, data: bytes) -> None:
        self._rss = ndis.change_rss(self._rss, data, self._channels)
        self._device.set_rss(*self._rss)

    def _set_config(self, data: bytes) -> None:
        name, value = ndis.config_parameter(data)
        if name == ndis.ADDRESS_NAME:
            self._address = ndis.parse_address(value) or self.mac
            self._apply_filter()
        self._change_offloads(ndis.change_offload_by_name(self._offloads, name, value))

    def _change_offloads(self, offloads: Offload) -> None:
        self._offloads = offloads & self._supported
        self._apply_offloads()

    # What follows ---------------------------------------------------------------------------------------

    def _apply(self) -> None:
        self._apply_filter()
        self._apply_offloads()
        self._device.set_rss(*self._rss)

    def _apply_filter(self) -> None:
        self._device.set_filter(self._filter, self._address, self._groups)

    def _apply_offloads(self) -> None:
        bits = sum(bit for offload, bit in _RECEIVE_BITS.items() if self._offloads & offload)
        self._device.set_offloads(bits | (_hot.RECEIVE_VLAN if self._tags_beside else 0))

    def port_offloads(self) -> int:
        """What the NIC's port may leave to the guest, OFFLOAD_* bits."""
        if self._offloads & _ANY_CHECKSUM != _ANY_CHECKSUM:
            return 0
        bits = OFFLOAD_CHECKSUM
        bits |= OFFLOAD_TSO4 if self._offloads & Offload.RSC4 else 0
        bits |= OFFLOAD_TSO6 if self._offloads & Offload.RSC6 else 0
        return bits | (OFFLOAD_TSO_ECN if bits != OFFLOAD_CHECKSUM else 0)

    # State ----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """What the guest has set, as plain data."""
        return {
            "filter": self._filter,
            "address": self._address,
            "groups": list(self._groups),
            "offloads": int(self._offloads),
            "rss": [self._rss.key, list(self._rss.table), self._rss.hashes],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned, after `begin`."""
        key, table, hashes = state["rss"]
        self._filter, self._address, self._groups = state["filter"], state["address"], list(state["groups"])
        self._offloads = Offload(state["offloads"])
        self._rss = Rss(key, tuple(table), hashes)
        self._apply()

    def inspect(self) -> dict[str, Any]:
        """What the guest has set, for people."""
        return {
            "address": self._address.hex(":"),
            "filter": [name for bit, name in _FILTER_NAMES.items() if self._filter & bit],
            "groups": [group.hex(":") for group in self._groups],
            "offloads": [bit.name for bit in Offload if self._offloads & bit],
            "rss_entries": len(self._rss.table),
        }


_FILTER_NAMES = {0x1: "directed", 0x2: "multicast", 0x4: "all_multicast", 0x8: "broadcast", 0x20: "promiscuous"}

#: The device's counters that make up an object; 32 bits wide unless the guest has room for 64.
_COUNTERS: dict[int, tuple[str, ...]] = {
    Oid.GEN_XMIT_OK: ("sent_frames",),
    Oid.GEN_RCV_OK: ("received_frames",),
    Oid.GEN_XMIT_ERROR: ("sent_invalid", "sent_errors"),
    Oid.GEN_RCV_ERROR: ("received_runts", "received_oversized", "received_errors"),
    Oid.GEN_RCV_NO_BUFFER: ("received_no_room",),
    Oid.GEN_BYTES_RCV: ("received_bytes",),
    Oid.GEN_BYTES_XMIT: ("sent_bytes",),
    Oid.GEN_RCV_DISCARDS: ("received_no_room",),
    Oid.GEN_XMIT_DISCARDS: ("sent_unplugged",),
}
_ALWAYS_WIDE = {Oid.GEN_BYTES_RCV, Oid.GEN_BYTES_XMIT, Oid.GEN_RCV_DISCARDS, Oid.GEN_XMIT_DISCARDS}

_CONSTANTS: dict[int, bytes] = {
    Oid.GEN_HARDWARE_STATUS: _U32.pack(0),  # ready
    Oid.GEN_MEDIA_SUPPORTED: _U32.pack(0),  # Ethernet
    Oid.GEN_MEDIA_IN_USE: _U32.pack(0),
    Oid.GEN_TRANSMIT_BUFFER_SPACE: _U32.pack(_BUFFER_SPACE),
    Oid.GEN_RECEIVE_BUFFER_SPACE: _U32.pack(_BUFFER_SPACE),
    Oid.GEN_VENDOR_ID: _U32.pack(_VENDOR_ID),
    Oid.GEN_VENDOR_DESCRIPTION: _VENDOR,
    Oid.GEN_DRIVER_VERSION: struct.pack("<H", _DRIVER_VERSION),
    Oid.GEN_VENDOR_DRIVER_VERSION: struct.pack("<H", _DRIVER_VERSION),
    Oid.GEN_MAC_OPTIONS: _U32.pack(_MAC_OPTIONS),
    Oid.GEN_MAXIMUM_SEND_PACKETS: _U32.pack(0xFFFF_FFFF),
    Oid.GEN_FRIENDLY_NAME: _FRIENDLY_NAME.encode("utf-16-le").ljust(_FRIENDLY_NAME_SIZE, b"\0"),
    Oid.GEN_LINK_SPEED: _U32.pack(LINK_SPEED // 100),
    Oid.GEN_MAX_LINK_SPEED: struct.pack("<QQ", LINK_SPEED, LINK_SPEED),
    Oid.ETH_MAXIMUM_LIST_SIZE: _U32.pack(MAX_GROUPS),
    Oid.ETH_RCV_ERROR_ALIGNMENT: _U32.pack(0),
    Oid.ETH_XMIT_ONE_COLLISION: _U32.pack(0),
    Oid.ETH_XMIT_MORE_COLLISIONS: _U32.pack(0),
    Oid.OFFLOAD_ENCAPSULATION: ndis.encapsulation(),
}


def _frame(adapter: Adapter) -> bytes:
    return _U32.pack(adapter._frame_size)


def _payload(adapter: Adapter) -> bytes:
    return _U32.pack(adapter._frame_size - _HEADER_SIZE)


_QUERIES: dict[int, Callable[[Adapter], bytes]] = {
    Oid.GEN_SUPPORTED_LIST: Adapter._supported_list,
    Oid.GEN_MAXIMUM_LOOKAHEAD: _payload,
    Oid.GEN_CURRENT_LOOKAHEAD: _payload,
    Oid.GEN_MAXIMUM_FRAME_SIZE: _payload,
    Oid.GEN_MAXIMUM_TOTAL_SIZE: _frame,
    Oid.GEN_TRANSMIT_BLOCK_SIZE: _frame,
    Oid.GEN_RECEIVE_BLOCK_SIZE: _frame,
    Oid.GEN_CURRENT_PACKET_FILTER: lambda adapter: _U32.pack(adapter._filter),
    Oid.GEN_MEDIA_CONNECT_STATUS: lambda adapter: _U32.pack(not adapter.link_up),
    Oid.GEN_LINK_STATE: lambda adapter: ndis.link_state(adapter.link_up, LINK_SPEED),
    Oid.GEN_RECEIVE_SCALE_CAPABILITIES: lambda adapter: ndis.rss_capabilities(adapter._channels),
    Oid.ETH_PERMANENT_ADDRESS: lambda adapter: adapter.mac,
    Oid.ETH_CURRENT_ADDRESS: lambda adapter: adapter._address,
    Oid.ETH_MULTICAST_LIST: lambda adapter: b"".join(adapter._groups),
    Oid.TCP_OFFLOAD_CURRENT_CONFIG: Adapter.current_config,
    Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES: lambda adapter: ndis.offload(adapter._supported, adapter._ndis),
}


def _accept(adapter: Adapter, data: bytes) -> None:
    """Of no consequence here."""


_SETS: dict[int, Callable[[Adapter, bytes], None]] = {
    Oid.GEN_CURRENT_PACKET_FILTER: Adapter._set_filter,
    Oid.GEN_CURRENT_LOOKAHEAD: _accept,
    Oid.GEN_PROTOCOL_OPTIONS: _accept,
    Oid.GEN_NETWORK_LAYER_ADDRESSES: _accept,
    Oid.GEN_LINK_PARAMETERS: _accept,
    Oid.GEN_RNDIS_CONFIG_PARAMETER: Adapter._set_config,
    Oid.GEN_RECEIVE_SCALE_PARAMETERS: Adapter._set_rss,
    Oid.ETH_MULTICAST_LIST: Adapter._set_groups,
    Oid.OFFLOAD_ENCAPSULATION: lambda adapter, data: ndis.check_encapsulation(data),
    Oid.TCP_OFFLOAD_PARAMETERS: Adapter._set_offloads,
}
