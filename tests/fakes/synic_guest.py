"""A guest that uses the SynIC of one VP, without KVM."""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.core import _hot

SCONTROL, SVERSION, SIEFP, SIMP, EOM, SINT0 = 0x40000080, 0x40000081, 0x40000082, 0x40000083, 0x40000084, 0x40000090
STIMER0_CONFIG = 0x400000B0
MASKED, AUTO_EOI, POLLING = 1 << 16, 1 << 17, 1 << 18

MESSAGE_PAGE = 0x2000
EVENT_PAGE = 0x3000
RAM_SIZE = 0x8000
VECTOR = 0x60


class Slot(NamedTuple):
    """What lies in a message slot."""

    type: int
    pending: bool
    sender: int
    payload: bytes


class SynicGuest:
    """RAM, a SynIC over it, and a guest's way to use both."""

    def __init__(self) -> None:
        self.ram = bytearray(RAM_SIZE)
        memory = _hot.Memory()
        memory.add(0, self.ram, False)
        self.rom = bytearray(b"R" * 0x1000)
        memory.add(0x100000, self.rom, True)
        self.synic = _hot.SynIC(memory, -1, 0, 0)
        self.synic.direct_timers = True
        self.now = 1000

    def write(self, index: int, value: int) -> bool:
        """WRMSR, and the scan that follows it; False for #GP."""
        valid = self.synic.write_msr(index, value, self.now)
        self.scan()
        return valid

    def read(self, index: int) -> int | None:
        return self.synic.read_msr(index)

    def scan(self) -> int:
        return self.synic.scan(self.now)

    def enable(self, *sints: int, flags: int = 0) -> None:
        """Turn the SynIC on with both pages, and `sints` with vector VECTOR + SINT."""
        assert self.write(SCONTROL, 1)
        assert self.write(SIMP, MESSAGE_PAGE | 1)
        assert self.write(SIEFP, EVENT_PAGE | 1)
        for sint in sints:
            assert self.write(SINT0 + sint, VECTOR + sint | flags)
        self.interrupts()

    def interrupts(self) -> list[int]:
        return self.synic.take_interrupts()

    def slot(self, sint: int) -> Slot:
        start = MESSAGE_PAGE + 256 * sint
        raw = bytes(self.ram[start : start + 256])
        return Slot(
            int.from_bytes(raw[:4], "little"),
            bool(raw[5] & 1),
            int.from_bytes(raw[8:16], "little"),
            raw[16 : 16 + raw[4]],
        )

    def clear_slot(self, sint: int) -> bool:
        """Free a slot as a guest does; return whether EOM has to follow."""
        start = MESSAGE_PAGE + 256 * sint
        self.ram[start : start + 4] = bytes(4)
        return bool(self.ram[start + 5] & 1)

    def take(self, sint: int) -> Slot | None:
        """Take the message out of a slot, with EOM where the rules ask for it; None if there is none."""
        slot = self.slot(sint)
        if not slot.type:
            return None
        if self.clear_slot(sint):
            self.write(EOM, 0)
        return slot

    def flags(self, sint: int) -> set[int]:
        """The event flags that are set."""
        start = EVENT_PAGE + 256 * sint
        bits = int.from_bytes(self.ram[start : start + 256], "little")
        return {flag for flag in range(2048) if bits >> flag & 1}

    def clear_flags(self, sint: int) -> None:
        start = EVENT_PAGE + 256 * sint
        self.ram[start : start + 256] = bytes(256)
