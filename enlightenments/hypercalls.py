"""Hypercalls: the parameters of all, and those that Python answers.

TLFS v6.0b, chapter 3 (conventions) and the calls' own chapters. What all calls share, and the calls that need no
Python, is in ``pyvmm/core/hot/hypercall.c``: a call comes here with its input checked for size and place.
"""

from __future__ import annotations

from enlightenments.tlfs import (
    HVCALL_EXT_QUERY_CAPABILITIES,
    HVCALL_FLUSH_LIST,
    HVCALL_FLUSH_LIST_EX,
    HVCALL_FLUSH_SPACE,
    HVCALL_FLUSH_SPACE_EX,
    HVCALL_GET_VP_REGISTERS,
    HVCALL_LONG_SPIN_WAIT,
    HVCALL_POST_MESSAGE,
    HVCALL_SEND_IPI,
    HVCALL_SEND_IPI_EX,
    HVCALL_SET_VP_REGISTERS,
    HVCALL_SIGNAL_EVENT,
    HVCALL_START_VP,
    HVCALL_VP_INDEX_FROM_APIC_ID,
    INSUFFICIENT_BUFFERS,
    INVALID_CONNECTION_ID,
    INVALID_PARAMETER,
    INVALID_PARTITION_ID,
    INVALID_VP_INDEX,
    SUCCESS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from enlightenments.ports import MessageHandler
    from enlightenments.registers import Registers

    #: Status, completed elements, and the output of the elements done now.
    Answer = tuple[int, int, bytes]
    #: Takes the calling VP, the VP to start and HV_INITIAL_VP_CONTEXT; returns a status.
    StartVp = Callable[[int, int, bytes], int]

_MESSAGE_HEADER = 16
_MESSAGE_PAYLOAD = 240
_VP_CONTEXT = 224

#: (code, header, element in, element out, output, whether more header may follow): sizes in bytes.
LAYOUTS = (
    (HVCALL_FLUSH_SPACE, 24, 0, 0, 0, False),
    (HVCALL_FLUSH_LIST, 24, 8, 0, 0, False),
    (HVCALL_LONG_SPIN_WAIT, 8, 0, 0, 0, False),
    (HVCALL_SEND_IPI, 16, 0, 0, 0, False),
    (HVCALL_FLUSH_SPACE_EX, 32, 0, 0, 0, True),
    (HVCALL_FLUSH_LIST_EX, 32, 8, 0, 0, True),
    (HVCALL_SEND_IPI_EX, 24, 0, 0, 0, True),
    (HVCALL_GET_VP_REGISTERS, 16, 4, 16, 0, False),
    (HVCALL_SET_VP_REGISTERS, 16, 32, 0, 0, False),
    (HVCALL_POST_MESSAGE, _MESSAGE_HEADER + _MESSAGE_PAYLOAD, 0, 0, 0, False),
    (HVCALL_SIGNAL_EVENT, 8, 0, 0, 0, False),
    (HVCALL_START_VP, 16 + _VP_CONTEXT, 0, 0, 0, False),
    (HVCALL_VP_INDEX_FROM_APIC_ID, 16, 4, 4, 0, False),
    (HVCALL_EXT_QUERY_CAPABILITIES, 0, 0, 0, 8, False),
)

#: Message types from here on are the hypervisor's own.
_HYPERVISOR_MESSAGES = 0x8000_0000
_PARTITION_SELF = (1 << 64) - 1
_VP_SELF = 0xFFFF_FFFE


def layouts_of(codes: Iterable[int]) -> list[tuple[int, int, int, int, int, bool]]:
    """The parameters of the calls with these codes."""
    offered = frozenset(codes)
    return [layout for layout in LAYOUTS if layout[0] in offered]


class Hypercalls:
    """The calls of one partition that Python answers."""

    def __init__(self, vp_count: int, registers: Registers, start_vp: StartVp) -> None:
        self._vp_count = vp_count
        self._registers = registers
        self._start = start_vp
        self.message_ports: dict[int, MessageHandler] = {}
        self._calls: dict[int, Callable[[int, bytes, int, int], Answer]] = {
            HVCALL_POST_MESSAGE: self._post_message,
            HVCALL_GET_VP_REGISTERS: self._get_registers,
            HVCALL_SET_VP_REGISTERS: self._set_registers,
            HVCALL_START_VP: self._start_vp,
            HVCALL_VP_INDEX_FROM_APIC_ID: self._vp_index_from_apic_id,
            HVCALL_EXT_QUERY_CAPABILITIES: lambda *_: (SUCCESS, 0, bytes(8)),  # there are none
        }

    def call(self, vp: int, code: int, input: bytes, start: int, count: int) -> Answer:
        """Answer a call of VP `vp` whose size has been checked: elements from `start` up to `count` are to be done."""
        return self._calls[code](vp, input, start, count)

    def _post_message(self, vp: int, input: bytes, start: int, count: int) -> Answer:
        """HvPostMessage, chapter 11.11.1."""
        connection_id = int.from_bytes(input[0:4], "little")
        message_type = int.from_bytes(input[8:12], "little")
        size = int.from_bytes(input[12:16], "little")
        if size > _MESSAGE_PAYLOAD or not 0 < message_type < _HYPERVISOR_MESSAGES:
            return INVALID_PARAMETER, 0, b""
        handler = self.message_ports.get(connection_id)
        if handler is None:
            return INVALID_CONNECTION_ID, 0, b""
        if not handler(message_type, input[_MESSAGE_HEADER : _MESSAGE_HEADER + size]):
            return INSUFFICIENT_BUFFERS, 0, b""
        return SUCCESS, 0, b""

    def _target(self, vp: int, input: bytes) -> tuple[int, int]:
        """(status, VP) of a header with partition, VP and VTL. A guest knows only itself, and only VTL 0."""
        if int.from_bytes(input[0:8], "little") != _PARTITION_SELF:
            return INVALID_PARTITION_ID, 0
        index = int.from_bytes(input[8:12], "little")
        if index == _VP_SELF:
            index = vp
        if index >= self._vp_count:
            return INVALID_VP_INDEX, 0
        return INVALID_PARAMETER if input[12] & 0xF else SUCCESS, index

    def _get_registers(self, vp: int, input: bytes, start: int, count: int) -> Answer:
        """HvGetVpRegisters, chapter 7.10.2."""
        status, target = self._target(vp, input)
        values = []
        done = start
        while not status and done < count:
            name = int.from_bytes(input[16 + 4 * done : 20 + 4 * done], "little")
            status, value = self._registers.get(vp, target, name)
            if not status:
                values.append(value.to_bytes(16, "little"))
                done += 1
        return status, done, b"".join(values)

    def _set_registers(self, vp: int, input: bytes, start: int, count: int) -> Answer:
        """HvSetVpRegisters, chapter 7.10.1."""
        status, target = self._target(vp, input)
        done = start
        while not status and done < count:
            element = input[16 + 32 * done : 48 + 32 * done]
            name, value = int.from_bytes(element[:4], "little"), int.from_bytes(element[16:], "little")
            status = self._registers.set(vp, target, name, value)
            done += not status
        return status, done, b""

    def _start_vp(self, vp: int, input: bytes, start: int, count: int) -> Answer:
        """HvStartVirtualProcessor, chapter 7.10.3."""
        status, target = self._target(vp, input)
        return status or self._start(vp, target, input[16:]), 0, b""

    def _vp_index_from_apic_id(self, vp: int, input: bytes, start: int, count: int) -> Answer:
        """HvGetVpIndexFromApicId, chapter 7.10.4: the APIC id of a VP is its index."""
        if int.from_bytes(input[0:8], "little") != _PARTITION_SELF:
            return INVALID_PARTITION_ID, start, b""
        if input[8]:
            return INVALID_PARAMETER, start, b""
        for done in range(start, count):
            if int.from_bytes(input[16 + 4 * done : 20 + 4 * done], "little") >= self._vp_count:
                return INVALID_PARAMETER, done, input[16 + 4 * start : 16 + 4 * done]
        return SUCCESS, count, input[16 + 4 * start : 16 + 4 * count]
