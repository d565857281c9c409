"""A guest's side of the IDE controller: its ports, without a machine. I/O on disks happens when the test says so."""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from devices.legacy.ide.controller import CHANNELS, PiixIde
from devices.legacy.pci import PciBus
from pyvmm.core.bus import Bus
from pyvmm.core.memory import GuestMemory
from tests.fakes.board import RecordingLine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.storage.backend import Disk

MIB = 1 << 20
MASTER = 0xFFA0
#: Where the tests keep their table of physical regions.
TABLE = 0x1000
BSY, DRDY, DF, DSC, DRQ, ERR = 0x80, 0x40, 0x20, 0x10, 0x08, 0x01
READY = DRDY | DSC


class ManualWorker:
    """Keeps what it is to do until `work`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: deque[Callable[[], None]] = deque()
        self.paused = False
        self.stopped = False

    def start(self) -> None:
        """There is no thread."""

    def call_soon(self, action: Callable[[], None]) -> None:
        self.calls.append(action)

    def run(self, action: Callable[[], Any]) -> Any:
        self.work()
        return action()

    def work(self) -> None:
        while self.calls:
            self.calls.popleft()()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def stop(self) -> None:
        self.stopped = True


class IdeGuest:
    """Drives one channel at a time; `lazy` leaves work on disks undone until `work`."""

    def __init__(self, disks: Mapping[tuple[int, int], Disk], lazy: bool = False) -> None:
        self.lazy = lazy
        self.memory = GuestMemory(MIB)
        self.lines: dict[int, RecordingLine] = {}
        self.workers: list[ManualWorker] = []
        self.pio = Bus("pio")
        self.bus = PciBus(self.pio, Bus("mmio"))
        for port in self.bus.ports():
            self.pio.register(*port)
        self.ide = PiixIde(disks, self.memory, self._line, self._worker, MASTER)
        self.bus.add(7, 1, self.ide)
        self.bus.reset()
        self.channel = 0

    def _line(self, number: int) -> RecordingLine:
        return self.lines.setdefault(number, RecordingLine())

    def _worker(self, name: str) -> Any:
        self.workers.append(ManualWorker(name))
        return cast("Any", self.workers[-1])

    def work(self) -> None:
        """Have the disks do what is waiting."""
        for worker in self.workers:
            worker.work()

    # Registers.

    @property
    def base(self) -> int:
        return CHANNELS[self.channel][0]

    @property
    def line(self) -> RecordingLine:
        return self.lines[CHANNELS[self.channel][2]]

    def put(self, register: int, value: int) -> None:
        self.pio.write(self.base + register, 1, value)
        if not self.lazy:
            self.work()

    def get(self, register: int) -> int:
        return self.pio.read(self.base + register, 1)

    def control(self, value: int) -> None:
        self.pio.write(CHANNELS[self.channel][1], 1, value)

    def alternate(self) -> int:
        return self.pio.read(CHANNELS[self.channel][1], 1)

    def status(self) -> int:
        return self.get(7)

    def error(self) -> int:
        return self.get(1)

    # Commands.

    def command(
        self, code: int, lba: int = 0, count: int = 0, features: int = 0, unit: int = 0, wide: bool = False
    ) -> int:
        """Give a command with an LBA; return the alternate status."""
        self.put(6, 0xE0 | unit << 4 | (0 if wide else lba >> 24 & 0xF))
        if wide:
            for register, value in (
                (1, features >> 8),
                (2, count >> 8),
                (3, lba >> 24),
                (4, lba >> 32),
                (5, lba >> 40),
            ):
                self.put(register, value & 0xFF)
        for register, value in ((1, features), (2, count), (3, lba), (4, lba >> 8), (5, lba >> 16)):
            self.put(register, value & 0xFF)
        self.put(7, code)
        return self.alternate()

    def data(self, length: int, size: int = 2) -> bytes:
        """Read the data register by a string instruction."""
        data = self.pio.read_string(self.base, size, length // size)
        if not self.lazy:
            self.work()
        return data

    def give(self, data: bytes, size: int = 2) -> None:
        """Write the data register by a string instruction."""
        self.pio.write_string(self.base, size, data)
        if not self.lazy:
            self.work()

    def read_sectors(self, lba: int, count: int, code: int = 0x20, wide: bool = False, block: int = 512) -> bytes:
        """Read by PIO as a driver does: an interrupt and a look at the status for each block."""
        data = bytearray()
        self.command(code, lba, count, wide=wide)
        while len(data) < count * 512:
            assert self.line.level, "no interrupt for a block"
            status = self.status()
            assert status & (BSY | DRQ | ERR) == DRQ, f"status {status:#x}"
            data += self.data(min(block, count * 512 - len(data)))
        assert self.status() == READY
        return bytes(data)

    def write_sectors(self, lba: int, data: bytes, code: int = 0x30, wide: bool = False, block: int = 512) -> None:
        """Write by PIO as a driver does."""
        self.command(code, lba, len(data) // 512, wide=wide)
        for start in range(0, len(data), block):
            if start:
                assert self.line.level, "no interrupt for a block"
            assert self.status() & (BSY | DRQ | ERR) == DRQ
            self.give(data[start : start + block])
        assert self.line.level, "no interrupt at the end"
        assert self.status() == READY

    # Bus master.

    def table(self, *regions: tuple[int, int], end: bool = True) -> None:
        """Write a table of (address, bytes)."""
        entries = [struct.pack("<II", address, length & 0xFFFF) for address, length in regions]
        if end:
            entries[-1] = struct.pack("<II", regions[-1][0], regions[-1][1] & 0xFFFF | 1 << 31)
        self.memory.write(TABLE, b"".join(entries))
        self.pio.write(self.master + 4, 4, TABLE)

    @property
    def master(self) -> int:
        return MASTER + 8 * self.channel

    def start(self, to_memory: bool = True) -> None:
        """Start the bus master."""
        self.pio.write(self.master, 1, 0x09 if to_memory else 0x01)
        if not self.lazy:
            self.work()

    def stop(self) -> int:
        """Stop the bus master; return its status, which is then cleared."""
        status = self.pio.read(self.master + 2, 1)
        self.pio.write(self.master, 1, 0)
        self.pio.write(self.master + 2, 1, 0x06)
        return status & 0x07

    def dma(
        self, code: int, lba: int, count: int, *regions: tuple[int, int], wide: bool = True, features: int = 0
    ) -> int:
        """A whole command by DMA; return the bus master's status."""
        self.table(*regions)
        self.command(code, lba, count, wide=wide, features=features)
        self.start(code in (0x25, 0xC8))
        return self.stop()


def words(data: bytes) -> tuple[int, ...]:
    return struct.unpack("<256H", data)


def identify(guest: IdeGuest, unit: int = 0) -> tuple[int, ...]:
    assert guest.command(0xEC, unit=unit) == READY | DRQ
    assert guest.line.level
    data = guest.data(512)
    assert guest.status() == READY
    assert sum(data) & 0xFF == 0
    return words(data)


def text(found: tuple[int, ...], word: int, count: int) -> str:
    return struct.pack(f">{count}H", *found[word : word + count]).decode().strip()
