"""The IDE controller of the PIIX4: two channels at their legacy ports, and bus master registers at BAR 4.

Sources: Intel 82371AB (PIIX4) data sheet, 290562, chapter 5; SFF-8038i. There is no native mode.
"""

from __future__ import annotations

from devices.legacy.ide.ata import DATA
from devices.legacy.ide.channel import Channel
from devices.legacy.ide.disk import HardDisk
from devices.legacy.ide.work import carry_out
from devices.legacy.pci import BUS_MASTER, COMMAND, IO_SPACE, Bar, PciFunction
from devices.legacy.ports import BytePorts
from pyvmm.core.bus import BusHandler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from devices.legacy.ide.ata import Drive, Job
    from devices.legacy.ports import PortRange
    from devices.storage.backend import Disk
    from pyvmm.core.irq import IrqLine
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.worker import Worker

#: Command block, control block (of which only the device control register answers), interrupt, by channel.
CHANNELS = ((0x1F0, 0x3F6, 14), (0x170, 0x376, 15))

#: Decode enable, in the timing register of each channel.
_TIMING, _DECODE = 0x40, 1 << 15
_MASTER_PORTS = 16


class _CommandBlock(BusHandler):
    """Eight ports, of which the first is as wide as the access."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def read(self, offset: int, size: int) -> int:
        if offset == DATA:
            return int.from_bytes(self._channel.read_data(size), "little")
        return self._channel.read(offset) | 0xFFFF_FF00

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == DATA:
            self._channel.write_data(value.to_bytes(size, "little"))
        else:
            self._channel.write(offset, value & 0xFF)

    def read_string(self, offset: int, size: int, count: int) -> bytes:
        if offset == DATA:
            return self._channel.read_data(size * count)
        return super().read_string(offset, size, count)

    def write_string(self, offset: int, size: int, data: bytes) -> None:
        if offset == DATA:
            self._channel.write_data(data)
        else:
            super().write_string(offset, size, data)


class _ControlPort(BusHandler):
    """Alternate status and device control, one byte."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def read(self, offset: int, size: int) -> int:
        return self._channel.read_alternate() | 0xFFFF_FF00

    def write(self, offset: int, size: int, value: int) -> None:
        self._channel.write_control(value & 0xFF)


def _legacy_ports(number: int, channel: Channel) -> list[tuple[bool, PortRange]]:
    block, control, _ = CHANNELS[number]
    name = f"IDE channel {number}"
    return [
        (False, (block, 8, _CommandBlock(channel), name)),
        (False, (control, 1, _ControlPort(channel), f"{name} control")),
    ]


def _drive(number: int, unit: int, disk: Disk | None) -> Drive | None:
    if disk is None:
        return None
    if not disk.optical:
        return HardDisk(disk, unit == 1)
    from devices.legacy.ide.cd import CdDrive  # with all that CDs need

    return CdDrive(disk, unit == 1, f"pyvmm ide {number}.{unit}".ljust(16).encode())


class PiixIde(PciFunction):
    """Function 1 at 07.1 with `disks` by channel and device. Each channel with a drive has a thread for its I/O.

    `master_base` is where firmware would put BAR 4.
    """

    def __init__(
        self,
        disks: Mapping[tuple[int, int], Disk],
        memory: GuestMemory,
        irq_line: Callable[[int], IrqLine],
        make_worker: Callable[[str], Worker],
        master_base: int,
    ) -> None:
        super().__init__("ide", (0x8086, 0x7111), 0x010180, 1)
        self._memory = memory
        self._workers: dict[int, Worker] = {}
        self._paused = False
        self.channels = [self._channel(number, disks, irq_line, make_worker) for number in range(len(CHANNELS))]
        self._legacy = [_legacy_ports(number, channel) for number, channel in enumerate(self.channels)]
        self.define(COMMAND, 2, IO_SPACE | BUS_MASTER, IO_SPACE | BUS_MASTER)
        for number in range(len(CHANNELS)):
            self.define(_TIMING + 2 * number, 2, _DECODE, 0xFFFF)
        self.define(0x44, 1, 0, 0xFF)  # slave timing
        self.define(0x48, 1, 0, 0x0F)  # Ultra DMA control and timing
        self.define(0x4A, 2, 0, 0x3333)
        master = BytePorts(self._read_master, self._write_master)
        self.define_bar(4, Bar(_MASTER_PORTS, master, "IDE bus master"), master_base)

    def _channel(
        self,
        number: int,
        disks: Mapping[tuple[int, int], Disk],
        irq_line: Callable[[int], IrqLine],
        make_worker: Callable[[str], Worker],
    ) -> Channel:
        drives = [_drive(number, unit, disks.get((number, unit))) for unit in range(2)]
        line = irq_line(CHANNELS[number][2])
        if not any(drives):
            return Channel((None, None), lambda job: None, line.set)
        worker = self._workers[number] = make_worker(f"ide{number}")
        worker.start()

        def submit(job: Job) -> None:
            worker.call_soon(lambda: carry_out(channel, job, self._memory))

        channel = Channel((drives[0], drives[1]), submit, line.set)
        return channel

    def _read_master(self, offset: int) -> int:
        return self.channels[offset >> 3].read_master(offset & 7) if offset < _MASTER_PORTS else 0xFF

    def _write_master(self, offset: int, value: int) -> None:
        if offset < _MASTER_PORTS:  # a wide access to the last port reaches beyond
            self.channels[offset >> 3].write_master(offset & 7, value)

    def decoded(self) -> list[tuple[bool, PortRange]]:
        ranges = super().decoded()
        if self.command & IO_SPACE:
            for number, legacy in enumerate(self._legacy):
                if self.read_config(_TIMING + 2 * number, 2) & _DECODE:
                    ranges += legacy
        return ranges

    def reset(self) -> None:
        super().reset()
        for channel in self.channels:
            channel.power_on()

    def pause(self) -> None:
        for worker in self._workers.values():
            worker.run(lambda: None)  # behind all jobs
            worker.pause()
        self._paused = True

    def resume(self) -> None:
        for channel in self.channels:
            channel.resume()
        self._paused = False
        for worker in self._workers.values():
            worker.resume()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.stop()

    def change_disc(self, number: int, unit: int, disc: Disk | None, force: bool) -> Disk | None:
        """Change what is in a CD drive once no command reads it; return the disc that was there.

        Raises MediumLocked if the guest holds on to that, unless `force`.
        """
        from devices.legacy.ide.cd import CdDrive

        drive = self.channels[number].drives[unit]
        assert isinstance(drive, CdDrive)
        if self._paused:  # all reads are over
            return drive.drive.change(disc, force)
        return self._workers[number].run(lambda: drive.drive.change(disc, force))

    def save(self) -> dict[str, Any]:
        return {**super().save(), "channels": [channel.save() for channel in self.channels]}

    def restore(self, state: dict[str, Any]) -> None:
        channels = state.get("channels")
        if type(channels) is not list or len(channels) != len(self.channels):
            raise ValueError("saved state: not two IDE channels")
        super().restore(state)
        for channel, saved in zip(self.channels, channels, strict=True):
            channel.restore(saved)

    def inspect(self) -> dict[str, Any]:
        return {**super().inspect(), "channels": [channel.inspect() for channel in self.channels]}
