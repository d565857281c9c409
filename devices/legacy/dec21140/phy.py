"""An MII PHY at address 1 and the serial bus to it. It has one link partner, with 100BASE-TX full duplex.

Sources: IEEE 802.3-2008, clause 22.2.4 (registers and management frames) and 28.2.4 (autonegotiation); National
Semiconductor DP83840A data sheet (identity).
"""

from __future__ import annotations

import struct

from devices.saved import check_version, saved_bool, saved_bytes, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ADDRESS = 1

# The bus, as CSR9 has it.
CLOCK, TO_PHY, READING, FROM_PHY = 1 << 16, 1 << 17, 1 << 18, 1 << 19

CONTROL, STATUS, ADVERTISEMENT, PARTNER, EXPANSION = 0, 1, 4, 5, 6
_REGISTERS = 32
_RESET = 0x8000
_CAPABILITIES, _NEGOTIATED, LINK_UP = 0x7809, 0x0020, 0x0004
#: At power-on: autonegotiation on and at 100BASE-TX full duplex; 10BASE-T and 100BASE-TX, half and full duplex.
_POWER_ON = {CONTROL: 0x3100, 2: 0x2000, 3: 0x5C01, ADVERTISEMENT: 0x01E1}
_WRITABLE = {CONTROL: 0x7D80, ADVERTISEMENT: 0xBFFF}
_PARTNER_ABILITIES, _PARTNER_NEGOTIATES = 0x45E1, 1

#: A management frame from its start: 01, operation (2 bits), PHY (5), register (5), turnaround (2), data (16).
_HEADER_BITS, _FRAME_BITS = 14, 32
_READ, _WRITE = 0b0110, 0b0101


class Phy:
    """The PHY. `output` is what the bus reads from it: high while it has nothing to say."""

    def __init__(self) -> None:
        self.link = False
        self.output = True
        self._lost = False
        self._clock = False
        self._line = True
        self._bits, self._count = 0, 0  # of the management frame under way; no bits: there is none
        self._reading = 0
        self._reset()

    def _reset(self) -> None:
        self._registers = [_POWER_ON.get(register, 0) for register in range(_REGISTERS)]

    def set_link(self, up: bool) -> None:
        """The cable is plugged in or not."""
        self.link = up
        self._lost |= not up

    def read(self, register: int) -> int:
        """Read a register. A link that was lost reads so once, whatever it is now."""
        if register == STATUS:
            lost, self._lost = self._lost, not self.link
            return _CAPABILITIES | (_NEGOTIATED if self.link else 0) | (0 if lost or not self.link else LINK_UP)
        if register == PARTNER:
            return _PARTNER_ABILITIES if self.link else 0
        if register == EXPANSION:
            return _PARTNER_NEGOTIATES if self.link else 0
        return self._registers[register]

    def write(self, register: int, value: int) -> None:
        """Write a register. A reset, or negotiation, is over at once."""
        if register == CONTROL and value & _RESET:
            self._reset()
        elif register in _WRITABLE:
            self._registers[register] = value & _WRITABLE[register]

    def drive(self, pins: int) -> None:
        """The CLOCK, TO_PHY and READING bits of CSR9 are now so."""
        clock = bool(pins & CLOCK)
        rises = clock and not self._clock
        self._clock = clock
        if rises:
            self._step(bool(pins & (TO_PHY | READING)))  # a line that nobody drives is high

    def _step(self, bit: bool) -> None:
        line, self._line = self._line, bit
        if not self._count:
            if line and not bit:
                self._bits, self._count = 0, 1
            return
        self._bits = self._bits << 1 | bit
        self._count += 1
        if self._count == 2 and not bit:
            self._count = 0
        elif self._count >= _HEADER_BITS:
            self._frame()

    def _frame(self) -> None:
        header = self._bits >> self._count - _HEADER_BITS
        operation, register = header >> 10, header & 31
        addressed = header >> 5 & 31 == ADDRESS
        over = self._count == _FRAME_BITS
        if addressed and operation == _READ:
            if self._count == _HEADER_BITS:
                self._reading = self.read(register)
            else:  # a zero, then the data from its highest bit on
                self.output = over or bool(self._reading >> _FRAME_BITS - 1 - self._count & 1)
        elif addressed and operation == _WRITE and over:
            self.write(register, self._bits & 0xFFFF)
        if over:
            self._count = 0

    def save(self) -> dict[str, Any]:
        """Return the state, but for the link, as plain data."""
        return {
            "version": 1,
            "registers": struct.pack(f"<{_REGISTERS}H", *self._registers),
            "lost": self._lost,
            "clock": self._clock,
            "line": self._line,
            "bits": self._bits,
            "count": self._count,
            "reading": self._reading,
            "output": self.output,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""
        check_version(state, 1)
        self._registers = list(
            struct.unpack(f"<{_REGISTERS}H", saved_bytes(state, "registers", 2 * _REGISTERS, 2 * _REGISTERS))
        )
        self._lost = saved_bool(state, "lost")
        self._clock = saved_bool(state, "clock")
        self._line = saved_bool(state, "line")
        self._bits = saved_int(state, "bits", 0, 0xFFFF_FFFF)
        self._count = saved_int(state, "count", 0, _FRAME_BITS - 1)
        self._reading = saved_int(state, "reading", 0, 0xFFFF)
        self.output = saved_bool(state, "output")
