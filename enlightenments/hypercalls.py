"""Hypercalls that Python answers, with the TLFS's status for every bad input.

TLFS v6.0b, chapter 3 (calling convention) and chapter 11.10 (HvPostMessage). HvSignalEvent is answered in C,
see ``pyvmm/core/hot/vp.c``.
"""

from __future__ import annotations

from enlightenments.tlfs import (
    HVCALL_POST_MESSAGE,
    INSUFFICIENT_BUFFERS,
    INVALID_ALIGNMENT,
    INVALID_CONNECTION_ID,
    INVALID_HYPERCALL_CODE,
    INVALID_HYPERCALL_INPUT,
    INVALID_PARAMETER,
    SUCCESS,
)
from pyvmm.core.memory import PAGE_SIZE, GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enlightenments.ports import MessageHandler
    from pyvmm.core.memory import GuestMemory

_FAST = 1 << 16
_MESSAGE_HEADER = 16
_MESSAGE_PAYLOAD = 240
#: Message types from here on are the hypervisor's own.
_HYPERVISOR_MESSAGES = 0x8000_0000


class Hypercalls:
    """The calls of one partition. `offered` are the call codes that the partition's enlightenments include."""

    def __init__(self, memory: GuestMemory, offered: frozenset[int]) -> None:
        self._memory = memory
        self._calls = {
            code: call for code, call in {HVCALL_POST_MESSAGE: self._post_message}.items() if code in offered
        }
        self.message_ports: dict[int, MessageHandler] = {}

    def call(self, control: int, input_gpa: int) -> int:
        """Answer one hypercall; return its result value. All calls here are simple: no repetitions, no header."""
        call = self._calls.get(control & 0xFFFF)
        if call is None:
            return INVALID_HYPERCALL_CODE
        if control & ~(0xFFFF | _FAST):
            return INVALID_HYPERCALL_INPUT
        return call(bool(control & _FAST), input_gpa)

    def _post_message(self, fast: bool, input_gpa: int) -> int:
        if fast:  # its input is too long for registers
            return INVALID_HYPERCALL_INPUT
        if input_gpa % 8 or input_gpa % PAGE_SIZE > PAGE_SIZE - _MESSAGE_HEADER - _MESSAGE_PAYLOAD:
            return INVALID_ALIGNMENT
        try:
            block = self._memory.read(input_gpa, _MESSAGE_HEADER + _MESSAGE_PAYLOAD)
        except GuestMemoryError:  # "GPA pointer not within the bounds of the GPA space", TLFS's common status codes
            return INVALID_ALIGNMENT
        connection_id = int.from_bytes(block[0:4], "little")
        message_type = int.from_bytes(block[8:12], "little")
        size = int.from_bytes(block[12:16], "little")
        if size > _MESSAGE_PAYLOAD or not 0 < message_type < _HYPERVISOR_MESSAGES:
            return INVALID_PARAMETER
        handler = self.message_ports.get(connection_id)
        if handler is None:
            return INVALID_CONNECTION_ID
        if not handler(message_type, block[_MESSAGE_HEADER : _MESSAGE_HEADER + size]):
            return INSUFFICIENT_BUFFERS
        return SUCCESS
