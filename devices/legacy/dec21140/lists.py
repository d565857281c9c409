"""The receive and transmit lists: frames out of guest memory and into it.

Source: 21140A Hardware Reference Manual, chapter 4. What reaches beyond guest memory raises GuestMemoryError.
"""

from __future__ import annotations

import zlib

from devices.legacy.dec21140.descriptors import (
    DATA_TYPE_SHIFT,
    DESCRIPTOR_ERROR,
    ERROR_SUMMARY,
    FILTER_TYPE0,
    FILTER_TYPE1,
    FILTERING_FAIL,
    FIRST,
    FIRST_SEGMENT,
    FRAME_LIMIT,
    FRAME_TYPE,
    LAST,
    LAST_SEGMENT,
    LENGTH_SHIFT,
    MULTICAST,
    NO_CRC,
    NO_PADDING,
    ON_COMPLETION,
    OWN,
    SETUP,
    TOO_LONG,
    Descriptor,
)
from devices.saved import check_version, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.core.memory import GuestMemory

#: Bytes of frames without FCS: the least on the wire, the most with one 802.1Q tag, the longest without.
MIN_FRAME, MAX_FRAME, _UNTAGGED = 60, 1518, 1514
#: A transmitter that sends more than this in one frame jabbers.
JABBER_LIMIT = 2048
FCS = 4
_HEADER = 14
#: Greater values of the type field are types, not lengths.
_LARGEST_LENGTH = 1500
_LARGEST_SKIP = 4 * 31


class _List:
    """Where a process is in its list of descriptors."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.base = 0
        #: The current descriptor.
        self.position = 0
        #: Bytes between neighbouring descriptors.
        self.skip = 0

    def start(self, base: int) -> None:
        """Begin at `base`."""
        self.base = self.position = base

    def save(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {"version": 1, "base": self.base, "position": self.position, "skip": self.skip}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""
        check_version(state, 1)
        self.base = saved_int(state, "base", 0, 0xFFFF_FFFC)
        self.position = saved_int(state, "position", 0, 0xFFFF_FFFC)
        self.skip = saved_int(state, "skip", 0, _LARGEST_SKIP)

    def _read(self, address: int) -> Descriptor:
        return Descriptor(self._memory, address)

    def _after(self, descriptor: Descriptor) -> int:
        return descriptor.next(self.base, self.skip)


#: What the transmit list asks for: to send a frame, to take a setup frame, to close what makes no frame, to wait as the
#: guest still owns the rest of a frame, and a frame without an end.
FRAME, SETUP_FRAME, NOTHING, PARTIAL, JABBERING = range(5)


class Outgoing:
    """One request of the transmit list: its descriptors and its kind. `data` is that of a setup frame, whose filtering
    type it tells, or of a frame without its FCS, padded.
    """

    __slots__ = ("data", "descriptors", "kind")

    def __init__(self, kind: int, descriptors: list[Descriptor], data: bytes = b"") -> None:
        self.kind = kind
        self.descriptors = descriptors
        self.data = data

    @property
    def on_completion(self) -> bool:
        """Whether the guest wants an interrupt when it is done."""
        return bool(self.descriptors[-1].control & ON_COMPLETION)

    @property
    def filtering_type(self) -> int:
        """0 to 3, of a setup frame."""
        control = self.descriptors[0].control
        return (2 if control & FILTER_TYPE1 else 0) | (1 if control & FILTER_TYPE0 else 0)


class TransmitList(_List):
    """What the guest wants to send."""

    def peek(self) -> Outgoing | None:
        """Return the next request; None if the guest owns what comes next."""
        descriptor = self._read(self.position)
        if not descriptor.status & OWN:
            return None
        if descriptor.control & SETUP:
            return Outgoing(SETUP_FRAME, [descriptor], self._memory.read(*descriptor.buffers[0]))
        if descriptor.control & FIRST_SEGMENT:
            return self._frame(descriptor)
        return Outgoing(NOTHING, [descriptor])

    def _frame(self, descriptor: Descriptor) -> Outgoing:
        control = descriptor.control
        descriptors: list[Descriptor] = []
        data = bytearray()
        while True:
            descriptors.append(descriptor)
            for address, size in descriptor.buffers:
                if size:
                    data += self._memory.view(address, size)
            if len(data) > JABBER_LIMIT or len(descriptors) == FRAME_LIMIT:
                return Outgoing(JABBERING, descriptors)
            if descriptor.control & LAST_SEGMENT:
                break
            descriptor = self._read(self._after(descriptor))
            if not descriptor.status & OWN:
                return Outgoing(PARTIAL, descriptors)
            if descriptor.control & (SETUP | FIRST_SEGMENT):
                return Outgoing(NOTHING, descriptors)
        if control & NO_CRC:
            del data[-FCS:]  # the guest has made one
        elif not control & NO_PADDING:
            data = data.ljust(MIN_FRAME, b"\0")
        return Outgoing(FRAME if len(data) >= _HEADER else NOTHING, descriptors, bytes(data))

    def close(self, request: Outgoing, status: int = 0) -> None:
        """Give the descriptors back to the guest, the last one with `status`, and go on behind them."""
        *others, last = request.descriptors
        for descriptor in others:
            descriptor.close(self._memory, 0)
        last.close(self._memory, status)
        self.position = self._after(last)


class ReceiveList(_List):
    """The room that the guest has for frames."""

    def store(self, frame: bytes, data_type: int, failed: bool) -> bool:
        """Put a frame without its FCS into the guest's buffers; return whether there was room for its begin.

        `data_type` is 0 for frames from the network, and the loopback mode for others. `failed` says that the filter
        does not take it. A frame for which the room is too small is cut.
        """
        descriptor = self._read(self.position)
        if not descriptor.status & OWN:
            return False
        data = frame.ljust(MIN_FRAME, b"\0")
        data += zlib.crc32(data).to_bytes(FCS, "little")
        told = _about(data, data_type, failed)
        at, first = 0, FIRST
        for left in range(FRAME_LIMIT - 1, -1, -1):
            for address, size in descriptor.buffers:
                if size and at < len(data):
                    piece = data[at : at + size]
                    self._memory.write(address, piece)
                    at += len(piece)
            following = self._after(descriptor)
            if at == len(data):
                descriptor.close(self._memory, told | LAST | first)
                self.position = following
                return True
            another = None
            if left and following != descriptor.address:
                another = self._read(following)
            if another is None or not another.status & OWN:
                descriptor.close(self._memory, told | LAST | first | DESCRIPTOR_ERROR | ERROR_SUMMARY)
                self.position = following
                return True
            descriptor.close(self._memory, first)
            descriptor, first = another, 0
        raise AssertionError("the last round returns")


def _about(data: bytes, data_type: int, failed: bool) -> int:
    """Return what RDES0 tells of a frame with its FCS."""
    status = len(data) << LENGTH_SHIFT | data_type << DATA_TYPE_SHIFT
    if failed:
        status |= FILTERING_FAIL
    if data[0] & 1:
        status |= MULTICAST
    if int.from_bytes(data[12:14], "big") > _LARGEST_LENGTH:
        status |= FRAME_TYPE
    if len(data) - FCS > _UNTAGGED:
        status |= TOO_LONG  # which is for the driver to judge, and no error
    return status
