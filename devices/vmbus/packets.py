"""What travels in a channel's rings: packet types, GPA-direct ranges and pipe framing.

A packet is the tuple ``pyvmm.core._hot.Packet``: (type, flags, transaction id, extra header, payload).
Layouts: Linux 6.1 include/linux/hyperv.h (``vmpacket_descriptor``, ``gpa_range``, ``vmbuspipe_hdr``), openvmm
vmbus_ring.
"""

from __future__ import annotations

import struct

from pyvmm.core.memory import PAGE_SIZE, GuestMemory, GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.core._hot import Packet

PACKET_INBAND = 6
PACKET_TRANSFER_PAGES = 7
PACKET_GPA_DIRECT = 9
PACKET_COMPLETION = 0xB

#: Packet flag: the sender wants a completion packet with the same transaction id.
COMPLETION_REQUESTED = 1

PIPE_DATA = 1
_PIPE = struct.Struct("<II")
_RANGE = struct.Struct("<II")


class ChannelViolation(Exception):
    """The guest broke the protocol of one channel; the channel is closed and the message shown as the reason."""


def packet_size(packet: Packet) -> int:
    """Bytes that `packet` takes up in a ring: descriptor, header and payload padded to 8, and the footer."""
    return 16 + (len(packet[3]) + len(packet[4]) + 7 & ~7) + 8


def inband(payload: bytes, transaction_id: int = 0, flags: int = 0) -> Packet:
    """Return an in-band data packet."""
    return PACKET_INBAND, flags, transaction_id, b"", payload


def completion(transaction_id: int, payload: bytes = b"") -> Packet:
    """Return the completion of the request with `transaction_id`."""
    return PACKET_COMPLETION, 0, transaction_id, b"", payload


def gpa_direct_ranges(packet: Packet, limit: int = 1 << 24) -> list[list[tuple[int, int]]]:
    """Return the ranges of a GPA-direct packet, each as a list of (GPA, length) with neighbouring pages joined.

    `limit` bounds the bytes of all ranges together. Raises ChannelViolation unless the packet is GPA-direct, has at
    least one range and its page numbers fill its extra header as the ranges say.
    """
    kind, _, _, header, _ = packet
    if kind != PACKET_GPA_DIRECT:
        raise ChannelViolation(f"packet of type {kind} where GPA-direct was expected")
    if len(header) < 8:
        raise ChannelViolation(f"GPA-direct packet with a {len(header)}-byte header")
    count = int.from_bytes(header[4:8], "little")
    ranges: list[list[tuple[int, int]]] = []
    offset, total = 8, 0
    if not 1 <= count <= (len(header) - 8) // _RANGE.size:
        raise ChannelViolation(f"GPA-direct packet with {count} ranges in {len(header)} bytes of header")
    for _ in range(count):
        if offset + _RANGE.size > len(header):
            raise ChannelViolation(f"GPA-direct packet ends before its range {len(ranges)}")
        length, start = _RANGE.unpack_from(header, offset)
        offset += _RANGE.size
        total += length
        pages = (start + length + PAGE_SIZE - 1) // PAGE_SIZE
        if start >= PAGE_SIZE or total > limit or offset + 8 * pages > len(header):
            raise ChannelViolation(f"GPA-direct range of {length} bytes at page offset {start} does not fit its packet")
        ranges.append(list(page_runs(struct.unpack_from(f"<{pages}Q", header, offset), start, length)))
        offset += 8 * pages
    return ranges


def page_runs(pages: tuple[int, ...], start: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield (GPA, length) of `length` bytes that begin `start` bytes into `pages` (guest page numbers), joined."""
    run_gpa, run_length = 0, 0
    for page in pages:
        if not length:
            break
        gpa = page * PAGE_SIZE + start
        size = min(PAGE_SIZE - start, length)
        if run_length and gpa == run_gpa + run_length:
            run_length += size
        else:
            if run_length:
                yield run_gpa, run_length
            run_gpa, run_length = gpa, size
        length -= size
        start = 0
    if run_length:
        yield run_gpa, run_length


def gpa_direct_views(packet: Packet, memory: GuestMemory, write: bool, limit: int = 1 << 24) -> list[memoryview]:
    """Return zero-copy views of the guest memory that a GPA-direct packet names, in order over all its ranges.

    `write` says that the host will write there. Raises ChannelViolation for a malformed packet, more than `limit`
    bytes, or memory outside guest RAM.
    """
    try:
        return [
            memory.view(gpa, length, write=write) for runs in gpa_direct_ranges(packet, limit) for gpa, length in runs
        ]
    except GuestMemoryError as error:
        raise ChannelViolation(f"GPA-direct packet: {error}") from error


def pipe_message(payload: bytes) -> bytes:
    """Frame one message for a pipe channel: u32 type, u32 length, then the bytes."""
    return _PIPE.pack(PIPE_DATA, len(payload)) + payload


def parse_pipe_message(data: bytes) -> bytes:
    """Return the message in the payload of an in-band packet of a pipe channel; raises ChannelViolation."""
    if len(data) < _PIPE.size:
        raise ChannelViolation(f"pipe packet of {len(data)} bytes has no header")
    kind, length = _PIPE.unpack_from(data)
    if kind != PIPE_DATA:
        raise ChannelViolation(f"pipe packet of unknown type {kind}")
    if length > len(data) - _PIPE.size:
        raise ChannelViolation(f"pipe packet says {length} bytes but holds {len(data) - _PIPE.size}")
    return data[_PIPE.size : _PIPE.size + length]
