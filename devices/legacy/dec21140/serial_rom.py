"""The serial ROM: what the board tells drivers of itself, in 64 words of a 93C46 on a MicroWire bus.

Sources: DIGITAL Semiconductor 21X4 Serial ROM Format, version 4.05 (layout, media codes, checksums); National
Semiconductor NM93C46 data sheet (bus). Virtual PC's adapter, which is Hyper-V's, has its medium set to 100BASE-TX full
duplex, without a PHY on the MII, as Linux's tulip says of it ("Using EEPROM-set media 100baseTx-FDX").
"""

from __future__ import annotations

import struct
import zlib

from devices.saved import check_version, saved_bool, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Virtual PC's (86Box, net_tulip.c).
SUBSYSTEM = (0x0A00, 0x2114)

_WORDS = 64
_FORMAT, _CONTROLLERS, _LEAF = 1, 1, 30
#: The selected connection: 100BASE-TX full duplex, without sensing others.
_SELECTED = 0x0205
#: No general-purpose pin is an output.
_PIN_OUTPUTS = 0
#: A compact block for each medium: code, what the pins are to be set to, and the command: bits of CSR6 that it wants,
#: and the pin that tells of a link (<3:1>; low if bit 7 is set). Full duplex stands behind half duplex.
_MEDIA = ((0x00, 0, 0x009E), (0x04, 0, 0x009E), (0x03, 0, 0x006D), (0x05, 0, 0x006D))
#: Pins that those blocks speak of: signal from a 100 Mb/s partner, and (low) link with a 10 Mb/s one.
PIN_SIGNAL, PIN_NO_LINK_10 = 1 << 6, 1 << 7

# The bus, as CSR9 has it.
SELECT, CLOCK, TO_ROM, FROM_ROM = 1, 2, 4, 8
_START, _OPCODE_BITS, _ADDRESS_BITS, _READ = 1, 3, 6, 0b110
_COMMAND_BITS = _OPCODE_BITS + _ADDRESS_BITS


def _block_checksum(data: bytearray) -> int:
    """The CRC of the identification block: x^8 + x^2 + x + 1, from the highest bit of each 16-bit word."""
    crc = 0xFF
    words = struct.unpack("<8H", data[:16])
    for byte in (*(half for word in words for half in (word >> 8, word & 0xFF)), data[17]):
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ (7 if crc & 0x80 else 0)) & 0xFF
    return crc


def contents(mac: bytes) -> bytes:
    """Return the 128 bytes of an adapter with the address `mac`."""
    data = bytearray(2 * _WORDS)
    struct.pack_into("<HH", data, 0, *SUBSYSTEM)
    data[16] = _block_checksum(data)
    struct.pack_into("<BB6sBH", data, 18, _FORMAT, _CONTROLLERS, mac, 0, _LEAF)
    struct.pack_into("<HBB", data, _LEAF, _SELECTED, _PIN_OUTPUTS, len(_MEDIA))
    for index, medium in enumerate(_MEDIA):
        struct.pack_into("<BBH", data, _LEAF + 4 + 4 * index, *medium)
    struct.pack_into("<H", data, 126, zlib.crc32(data[:126]) & 0xFFFF)
    return bytes(data)


class SerialRom:
    """The chip: its pins change by `drive`, and `output` is what it says. It is not written to."""

    def __init__(self, mac: bytes) -> None:
        self.data = contents(mac)
        self._words = struct.unpack(f"<{_WORDS}H", self.data)
        self._clock = False
        self._select()

    def _select(self) -> None:
        self._command = 0  # with its start bit, which tells how much there is of it
        self._out = 0  # bits of the word that are still to come
        self.output = True

    def drive(self, pins: int) -> None:
        """The SELECT, CLOCK and TO_ROM bits of CSR9 are now so."""
        clock = bool(pins & CLOCK)
        rises = clock and not self._clock
        self._clock = clock
        if not pins & SELECT:
            self._select()
        elif rises:
            self._step(bool(pins & TO_ROM))

    def _step(self, bit: bool) -> None:
        length = self._command.bit_length()
        if length < _COMMAND_BITS:
            self._command = self._command << 1 | bit
            if length == _COMMAND_BITS - 1 and self._command >> _ADDRESS_BITS == _READ:
                self._out = 16
                self.output = False  # a zero comes before the data
        elif self._out:
            self._out -= 1
            word = self._words[self._command & _WORDS - 1]
            self.output = bool(word >> self._out & 1)
        else:
            self.output = True

    def save(self) -> dict[str, Any]:
        """Return the state of the bus as plain data."""
        return {
            "version": 1,
            "clock": self._clock,
            "command": self._command,
            "out": self._out,
            "output": self.output,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""
        check_version(state, 1)
        self._clock = saved_bool(state, "clock")
        self._command = saved_int(state, "command", 0, (1 << _COMMAND_BITS) - 1)
        self._out = saved_int(state, "out", 0, 16)
        self.output = saved_bool(state, "output")
