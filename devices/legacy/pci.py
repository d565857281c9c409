"""The PCI bus: configuration space of its functions, and which ports and addresses they decode.

Sources: PCI Local Bus Specification 3.0, chapter 6 (configuration space) and section 3.2.2.3.2 (configuration
mechanism #1).
"""

from __future__ import annotations

import struct
import threading

from devices.saved import check_version, saved_bytes, saved_int
from pyvmm.core.bus import BusHandler
from pyvmm.core.device import Device
from pyvmm.core.irq import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.legacy.ports import PortRange
    from pyvmm.core.bus import Bus

ADDRESS_PORT, DATA_PORT = 0xCF8, 0xCFC

# Configuration space of a function, header type 0.
COMMAND, BARS, SUBSYSTEM_IDS, ROM_BAR, INTERRUPT_LINE, INTERRUPT_PIN = 0x04, 0x10, 0x2C, 0x30, 0x3C, 0x3D
#: Command register: answers I/O, answers memory accesses, may be bus master.
IO_SPACE, MEMORY_SPACE, BUS_MASTER = 0x1, 0x2, 0x4
_STATUS_MEDIUM_DEVSEL = 0x0280
_MULTI_FUNCTION = 0x80

_ENABLE = 1 << 31
_ONES = 0xFFFF_FFFF


class Bar:
    """A base address register: `size` (a power of two) ports, or bytes of 32-bit memory, that `handler` answers."""

    def __init__(self, size: int, handler: BusHandler, name: str, memory: bool = False) -> None:
        self.size = size
        self.handler = handler
        self.name = name
        self.memory = memory


class _NoInterrupt(IrqLine):
    """What a function without an interrupt pin drives."""

    def set(self, level: bool) -> None:
        """Lead nowhere."""


class PciFunction(Device):
    """One function of a PCI device. `identity` is vendor and device id, `class_code` base class, sub-class, interface.

    Subclasses `define` further registers and set `bars`; where what they decode does not depend on BARs alone they
    override `decoded`.
    """

    def __init__(self, name: str, identity: tuple[int, int], class_code: int, revision: int) -> None:
        self.name = name
        self.bars: dict[int, Bar] = {}
        #: Where the interrupt pin leads: a level, shared with other functions.
        self.interrupt: IrqLine = _NoInterrupt()
        self._config = bytearray(256)
        self._writable = bytearray(256)
        self._power_on: bytes | None = None
        self.define(0x00, 2, identity[0])
        self.define(0x02, 2, identity[1])
        self.define(COMMAND, 2, 0)
        self.define(0x06, 2, _STATUS_MEDIUM_DEVSEL)
        self.define(0x08, 4, class_code << 8 | revision)
        self.define(INTERRUPT_LINE, 1, 0, 0xFF)

    def define(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        """Give a register its value at power-on, and the bits of it that the guest may change."""
        self._config[offset : offset + size] = value.to_bytes(size, "little")
        self._writable[offset : offset + size] = writable.to_bytes(size, "little")

    def define_bar(self, index: int, bar: Bar, base: int = 0) -> None:
        """Give the function a base address register, which stands at `base` at power-on."""
        self.bars[index] = bar
        # All 32 bits also for ports: SeaBIOS takes hardwired zeros above bit 15 for a size.
        mask = _ONES & ~(bar.size - 1)
        self.define(BARS + 4 * index, 4, base & mask | (0 if bar.memory else 1), mask)

    def connect_interrupt(self, pin: int, line: IrqLine, irq: int) -> None:
        """Give the function interrupt pin A to D (0 to 3), which drives `line`; firmware would note `irq` for it."""
        self.interrupt = line
        self.define(INTERRUPT_PIN, 1, pin + 1)
        self.define(INTERRUPT_LINE, 1, irq, 0xFF)

    def set_multi_function(self) -> None:
        """Say in the header that the device has other functions."""
        self.define(0x0E, 1, _MULTI_FUNCTION)

    def read_config(self, offset: int, size: int) -> int:
        """Read `size` bytes of configuration space."""
        return int.from_bytes(self._config[offset : offset + size], "little")

    def write_config(self, offset: int, value: int) -> None:
        """Write a byte of configuration space; read-only bits stay."""
        mask = self._writable[offset]
        self._config[offset] = self._config[offset] & ~mask | value & mask

    @property
    def command(self) -> int:
        """The command register."""
        return self.read_config(COMMAND, 2)

    def decoded(self) -> list[tuple[bool, PortRange]]:
        """What the function answers now: whether it is memory, and the range."""
        ranges: list[tuple[bool, PortRange]] = []
        for index, bar in self.bars.items():
            base = self.read_config(BARS + 4 * index, 4) & ~(bar.size - 1)
            enabled, end = (MEMORY_SPACE, _ONES) if bar.memory else (IO_SPACE, 0xFFFF)
            if self.command & enabled and 0 < base < end:
                ranges.append((bar.memory, (base, bar.size, bar.handler, bar.name)))
        return ranges

    def reset(self) -> None:
        if self._power_on is None:
            self._power_on = bytes(self._config)
        self._config[:] = self._power_on

    def close(self) -> None:
        """Give back what the function holds of the host."""

    def save(self) -> dict[str, Any]:
        return {"version": 1, "config": bytes(self._config)}

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        config = saved_bytes(state, "config", 256, 256)
        for offset in range(256):
            if (config[offset] ^ self._config[offset]) & ~self._writable[offset]:
                raise ValueError(f"saved state: {self.name} differs at {offset:#x} of its configuration space")
        self._config[:] = config

    def inspect(self) -> dict[str, Any]:
        identity, device = struct.unpack_from("<HH", self._config)
        return {
            "id": f"{identity:04x}:{device:04x}",
            "command": self.command,
            "bars": {str(index): f"{self.read_config(BARS + 4 * index, 4):#x}" for index in self.bars},
        }


class _AddressPort(BusHandler):
    """CONFIG_ADDRESS, which only double words reach."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        return self._bus.address if size == 4 else _ONES

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self._bus.address = value & (_ENABLE | 0xFF_FFFC)


class _DataPort(BusHandler):
    """CONFIG_DATA: the register that the address names, or bytes of it."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        return self._bus.read_config(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._bus.write_config(offset, size, value)


class PciBus(Device):
    """Bus 0 with its functions, which it resets, pauses and saves. Their ranges come and go on `pio` and `mmio`.

    A range that overlaps another device's is not decoded as long as that is there.
    """

    name = "pci"

    def __init__(self, pio: Bus, mmio: Bus) -> None:
        self._buses = (pio, mmio)
        self._lock = threading.Lock()
        #: CONFIG_ADDRESS.
        self.address = 0
        self.functions: dict[tuple[int, int], PciFunction] = {}
        self._decoded: set[tuple[bool, PortRange]] = set()

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [
            (ADDRESS_PORT, 1, _AddressPort(self), "PCI configuration address"),
            (DATA_PORT, 4, _DataPort(self), "PCI configuration data"),
        ]

    def add(self, device: int, number: int, function: PciFunction) -> None:
        """Put a function at its place, before the guest runs."""
        self.functions[device, number] = function

    def _addressed(self) -> PciFunction | None:
        address = self.address
        if not address & _ENABLE or address >> 16 & 0xFF:
            return None
        return self.functions.get((address >> 11 & 0x1F, address >> 8 & 7))

    def read_config(self, offset: int, size: int) -> int:
        """Read from the addressed register; all ones where no function is."""
        with self._lock:
            function = self._addressed()
            if function is None or offset + size > 4:
                return _ONES
            return function.read_config((self.address & 0xFC) + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write to the addressed register."""
        with self._lock:
            function = self._addressed()
            if function is None or offset + size > 4:
                return
            for index in range(size):
                function.write_config((self.address & 0xFC) + offset + index, value >> 8 * index & 0xFF)
            self._decode()

    def _decode(self) -> None:
        wanted = dict.fromkeys(entry for function in self.functions.values() for entry in function.decoded())
        for entry in self._decoded.difference(wanted):
            self._buses[entry[0]].unregister(entry[1][0])
        self._decoded.intersection_update(wanted)
        for entry in wanted:
            if entry not in self._decoded:
                try:
                    self._buses[entry[0]].register(*entry[1])
                except ValueError:  # something else is there
                    continue
                self._decoded.add(entry)

    def reset(self) -> None:
        with self._lock:
            self.address = 0
            for function in self.functions.values():
                function.reset()
            self._decode()

    def pause(self) -> None:
        for function in self.functions.values():
            function.pause()

    def resume(self) -> None:
        for function in self.functions.values():
            function.resume()

    def close(self) -> None:
        """Give back what the functions hold of the host."""
        for function in self.functions.values():
            function.close()

    def save(self) -> dict[str, Any]:
        with self._lock:
            functions = {place_name(place): function.save() for place, function in self.functions.items()}
            return {"version": 1, "address": self.address, "functions": functions}

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        address = saved_int(state, "address", 0, _ONES)
        functions = state.get("functions")
        if type(functions) is not dict or functions.keys() != set(map(place_name, self.functions)):
            raise ValueError("saved state: other PCI devices than this VM has")
        with self._lock:
            for place, function in self.functions.items():
                function.restore(functions[place_name(place)])
            self.address = address
            self._decode()

    def inspect(self) -> dict[str, Any]:
        return {place_name(place): function.inspect() for place, function in sorted(self.functions.items())}


def place_name(place: tuple[int, int]) -> str:
    """Device and function as everybody writes them: ``07.1``."""
    return f"{place[0]:02x}.{place[1]}"
