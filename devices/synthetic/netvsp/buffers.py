"""The buffers that a guest lends its NIC, by GPADLs: one where frames and answers arrive, one from which it sends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.synthetic.netvsp.protocol import NO_SECTION, SEND_SECTION_SIZE
from devices.synthetic.netvsp.rndis import MAX_MESSAGE
from devices.vmbus.packets import PACKET_GPA_DIRECT, gpa_direct_ranges, page_runs

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.vmbus.gpadl import Gpadl
    from pyvmm.core._hot import NetDevice, Packet
    from pyvmm.core.memory import GuestMemory

Runs = list[tuple[int, int]]


class Buffers:
    """The buffers of `device`; `find` finds the GPADLs of its guest."""

    def __init__(self, device: NetDevice, find: Callable[[int], Gpadl | None]) -> None:
        self._device = device
        self._find = find
        #: GPADLs of the buffers in use, and the number that the guest knows the one for receiving by.
        self.receive: int | None = None
        self.send: int | None = None
        self._receive_id = 0
        self._send_runs: Runs = []

    def lend_receive(self, gpadl_id: int, buffer_id: int, section_size: int) -> int:
        """Use a receive buffer; return how many sections it has, none if it is of no use."""
        runs = self._runs(gpadl_id)
        try:
            sections = self._device.set_receive_buffer(runs, buffer_id, section_size) if runs else 0
        except ValueError:
            return 0
        if sections:
            self.receive, self._receive_id = gpadl_id, buffer_id
        return sections

    def lend_send(self, gpadl_id: int) -> int:
        """Use a send buffer; return how many sections it has, none if it is of no use."""
        runs = self._runs(gpadl_id)
        try:
            sections = self._device.set_send_buffer(runs, SEND_SECTION_SIZE) if runs else 0
        except ValueError:
            return 0
        if runs and sections:
            self.send, self._send_runs = gpadl_id, runs
        return sections

    def drop_receive(self) -> None:
        """Let go of the receive buffer."""
        self.receive = None
        self._device.set_receive_buffer(None)

    def drop_send(self) -> None:
        """Let go of the send buffer."""
        self.send = None
        self._send_runs = []
        self._device.set_send_buffer(None)

    def release(self, gpadl_id: int) -> None:
        """Let go of a GPADL."""
        if gpadl_id == self.receive:
            self.drop_receive()
        if gpadl_id == self.send:
            self.drop_send()

    def _runs(self, gpadl_id: int) -> Runs | None:
        """The memory of a GPADL, if that is one range."""
        gpadl = self._find(gpadl_id)
        if gpadl is None or len(gpadl.ranges) != 1:
            return None
        (part,) = gpadl.ranges
        return list(page_runs(part.pages, part.offset, part.length))

    def gather(self, memory: GuestMemory, packet: Packet, section: int, size: int) -> bytes:
        """The bytes of a control message: those in a section of the send buffer, then those in the packet's pages.

        Raises ValueError, ChannelViolation or GuestMemoryError.
        """
        runs: Runs = []
        if section != NO_SECTION:
            start = section * SEND_SECTION_SIZE
            if size > SEND_SECTION_SIZE or start + size > sum(length for _, length in self._send_runs):
                raise ValueError(f"RNDIS message in section {section} of the send buffer, {size} bytes")
            runs += _slice(self._send_runs, start, size)
        if packet[0] == PACKET_GPA_DIRECT:
            for part in gpa_direct_ranges(packet):
                runs += part
        if sum(length for _, length in runs) > MAX_MESSAGE:
            raise ValueError(f"RNDIS control message of more than {MAX_MESSAGE} bytes")
        return b"".join(memory.read(gpa, length) for gpa, length in runs)

    def save(self) -> dict[str, Any]:
        """Which buffers are in use, and which of their sections the guest holds, as plain data."""
        return {
            "receive": self.receive,
            "receive_id": self._receive_id,
            "send": self.send,
            "device": self._device.save(),
        }

    def restore(self, state: dict[str, Any], section_size: int) -> None:
        """Take over what `save` returned, once the guest's GPADLs are there; raises ValueError."""
        receive, send = state["receive"], state["send"]
        if receive is not None and not self.lend_receive(receive, state["receive_id"], section_size):
            raise ValueError(f"its receive buffer, GPADL {receive:#x}, is not there")
        if send is not None and not self.lend_send(send):
            raise ValueError(f"its send buffer, GPADL {send:#x}, is not there")
        self._device.restore(state["device"])


def _slice(runs: Runs, start: int, size: int) -> Runs:
    """The part of `runs` that is `size` bytes from `start`, which is inside."""
    found: Runs = []
    for gpa, length in runs:
        if start < length and size:
            step = min(length - start, size)
            found.append((gpa + start, step))
            start, size = 0, size - step
        else:
            start -= min(start, length)
    return found
