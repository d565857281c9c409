"""What ATA devices and their channel share: register bits, the task file, and what a command asks for.

Sources: ATA/ATAPI-8 (T13 1699-D) for commands, ATA/ATAPI-7 volume 2 for the parallel interface's registers.
"""

from __future__ import annotations

from devices.saved import saved_bool, saved_bytes, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.storage.backend import Disk

SECTOR = 512

# Status.
BSY, DRDY, DF, DSC, DRQ, ERR = 0x80, 0x40, 0x20, 0x10, 0x08, 0x01
#: A device that waits for a command.
READY = DRDY | DSC
# Error.
UNC, IDNF, ABRT = 0x40, 0x10, 0x04
#: What EXECUTE DEVICE DIAGNOSTIC and a reset leave in the error register: passed.
DIAGNOSTIC_PASSED = 0x01
# Device control.
N_IEN, SRST, HOB = 0x02, 0x04, 0x80
# Device.
DEV, LBA = 0x10, 0x40

# Registers of the command block, by offset.
DATA, FEATURES, COUNT, LOW, MID, HIGH, DEVICE, COMMAND = range(8)
ERROR, STATUS = FEATURES, COMMAND

#: What the count register of a packet command tells: the host gives a command packet; data goes to the host.
COMMAND_PHASE, INPUT = 0x01, 0x02

#: Bytes of a command packet.
PACKET_SIZE = 12
#: Transfer modes of SET FEATURES: PIO 0-4 with and without IORDY, multiword DMA 0-2, Ultra DMA 0-2.
MODES = frozenset((0x00, 0x01, *range(0x08, 0x0D), 0x20, 0x21, 0x22, 0x40, 0x41, 0x42))

COUNTERS = ("reads", "writes", "bytes_read", "bytes_written", "flushes", "trims", "errors")

# Directions of a transfer, as the host sees them.
NONE, IN, OUT = 0, 1, 2
# What is left to do with the medium once a command's data, if it has any, is there.
NOTHING, FLUSH, VERIFY, TRIM, PACKET = range(5)


class CommandError(Exception):
    """A command ends with these bits in the error register."""

    def __init__(self, error: int) -> None:
        super().__init__(f"error {error:#04x}")
        self.error = error


class TaskFile:
    """The registers FEATURES to HIGH of one device, and what was in each before the last write to it."""

    __slots__ = ("current", "device", "error", "previous", "status")

    def __init__(self) -> None:
        self.current = [0] * 6
        self.previous = [0] * 6
        self.device = 0
        self.status = 0
        self.error = 0

    def write(self, register: int, value: int) -> None:
        """Take a byte into a register."""
        self.previous[register] = self.current[register]
        self.current[register] = value

    def put(self, **values: int) -> None:
        """Set registers as an answer: count, low, mid, high."""
        for register, name in ((COUNT, "count"), (LOW, "low"), (MID, "mid"), (HIGH, "high")):
            if name in values:
                self.current[register] = values[name]

    @property
    def features(self) -> int:
        """The low byte of the features."""
        return self.current[FEATURES]

    @property
    def count(self) -> int:
        """The low byte of the count."""
        return self.current[COUNT]

    @property
    def count_16(self) -> int:
        """The count of a 48-bit command."""
        return self.previous[COUNT] << 8 | self.current[COUNT]

    @property
    def lba_28(self) -> int:
        """The address of a 28-bit command."""
        current = self.current
        return (self.device & 0xF) << 24 | current[HIGH] << 16 | current[MID] << 8 | current[LOW]

    @property
    def lba_48(self) -> int:
        """The address of a 48-bit command."""
        current, previous = self.current, self.previous
        low = current[HIGH] << 16 | current[MID] << 8 | current[LOW]
        return previous[HIGH] << 40 | previous[MID] << 32 | previous[LOW] << 24 | low

    def put_lba(self, lba: int, wide: bool) -> None:
        """Set the address registers, of a 48-bit command if `wide`."""
        self.put(low=lba & 0xFF, mid=lba >> 8 & 0xFF, high=lba >> 16 & 0xFF)
        if wide:
            self.previous[LOW], self.previous[MID], self.previous[HIGH] = (
                lba >> shift & 0xFF for shift in (24, 32, 40)
            )
        else:
            self.device = self.device & 0xF0 | lba >> 24 & 0xF

    def save(self) -> dict[str, Any]:
        """Return the registers."""
        return {
            "current": bytes(self.current),
            "previous": bytes(self.previous),
            "device": self.device,
            "status": self.status,
            "error": self.error,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raises ValueError if it can't be."""
        current, previous = saved_bytes(state, "current", 6, 6), saved_bytes(state, "previous", 6, 6)
        self.device = saved_int(state, "device", 0, 0xFF)
        self.status, self.error = saved_int(state, "status", 0, 0xFF), saved_int(state, "error", 0, 0xFF)
        self.current, self.previous = list(current), list(previous)


class Drive:
    """One device of a channel: what its commands mean, with no I/O. `slave` says that it is device 1."""

    #: Whether DEVICE RESET works, as it does for packet devices.
    takes_reset = False

    def __init__(self, slave: bool, serial: str) -> None:
        self.slave = slave
        #: At most 20 characters.
        self.serial = serial
        self.registers = TaskFile()
        #: The transfer mode that was set last, one of `MODES`.
        self.mode = 0
        #: What was done on the medium since the start; only the channel's thread counts.
        self.counters = dict.fromkeys(COUNTERS, 0)

    @property
    def medium(self) -> Disk | None:
        """What jobs work on."""
        raise NotImplementedError

    def power_on(self) -> None:
        """All settings as they come from the factory."""
        raise NotImplementedError

    def reset(self) -> None:
        """A software reset, or a diagnostic: the device's signature stands in the registers, settings stay."""
        raise NotImplementedError

    def execute(self, code: int) -> Transfer | None:
        """Begin a command; None if it is over already. Raises CommandError if it is refused."""
        raise NotImplementedError

    def packet(self, cdb: bytes) -> Transfer | None:
        """Begin the command of a packet, as `execute` does."""
        raise CommandError(ABRT)

    def trim_ranges(self, data: bytes) -> list[tuple[int, int]]:
        """The ranges of a TRIM as (offset, length) in bytes. Raises CommandError if one can't be."""
        raise CommandError(ABRT)

    def medium_error(self, job: Job) -> int:
        """The error register if the medium can't be reached."""
        raise NotImplementedError

    def save(self) -> dict[str, Any]:
        """Return the settings, as plain data with a ``version``."""
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raises ValueError if it doesn't fit."""
        raise NotImplementedError

    def inspect(self) -> dict[str, Any]:
        """Return what the device is, and its settings."""
        raise NotImplementedError


class Transfer:
    """A command under way: `length` bytes to or from the host, and then `work` on the medium.

    Data is the medium's from `offset` on; where that is None, it is `data` for the host, or the operand of `work`.
    `block` is how many bytes the host moves at once by PIO. With `sync`, written data is brought to stable storage
    before the command is over. `packet` says that it is a phase of an ATAPI command.
    """

    __slots__ = ("at", "block", "buffer", "direction", "dma", "end", "left", "offset", "packet", "sync", "work")

    def __init__(
        self,
        direction: int,
        length: int = 0,
        *,
        offset: int | None = None,
        data: bytes = b"",
        block: int = SECTOR,
        dma: bool = False,
        work: int = NOTHING,
        sync: bool = False,
        packet: bool = False,
    ) -> None:
        self.direction = direction
        self.dma = dma
        self.offset = offset
        #: Bytes still to be moved between the medium, or for the operand's sake the host, and `buffer`.
        self.left = length
        self.block = block
        self.work = work
        self.sync = sync
        self.packet = packet
        #: What the host reads or writes by PIO; it stands at `at`, and its block ends at `end`.
        self.buffer = bytearray(data)
        self.at = 0
        self.end = 0

    def save(self) -> dict[str, Any]:
        """Return all of it."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return {**state, "buffer": bytes(self.buffer)}

    @classmethod
    def restored(cls, state: dict[str, Any], size: int, chunk: int) -> Transfer:
        """The transfer that `save` returned, on a medium of `size` bytes; raises ValueError if it can't be one."""
        transfer = cls(saved_int(state, "direction", NONE, OUT))
        transfer.dma = saved_bool(state, "dma")
        transfer.sync = saved_bool(state, "sync")
        transfer.packet = saved_bool(state, "packet")
        transfer.work = saved_int(state, "work", NOTHING, PACKET)
        transfer.block = saved_int(state, "block", 1, 1 << 16)
        transfer.left = saved_int(state, "left", 0, 1 << 32)
        if state.get("offset") is not None:
            transfer.offset = saved_int(state, "offset", 0, size)
            if transfer.offset + transfer.left > size:
                raise ValueError("saved state: a transfer goes beyond the end of its disk")
        transfer.buffer = bytearray(saved_bytes(state, "buffer", 0, chunk))
        transfer.end = saved_int(state, "end", 0, len(transfer.buffer))
        transfer.at = saved_int(state, "at", 0, transfer.end)
        if not transfer.dma and transfer.at == transfer.end:
            raise ValueError("saved state: a transfer that has nothing to move")
        return transfer


class Job:
    """Work on the medium of `drive` for the channel's thread: all of a transfer by DMA, or what PIO needs next.

    `length` bytes from `offset` on are read into `data`, or written out of it; a job by DMA has a `table` of physical
    regions instead. Once `cancelled`, its end interests nobody, and it must not touch guest memory any more.
    """

    __slots__ = ("cancelled", "data", "direction", "drive", "length", "offset", "sync", "table", "work")

    def __init__(self, drive: Drive, direction: int, offset: int | None, length: int, data: bytearray) -> None:
        self.drive = drive
        self.direction = direction
        self.offset = offset
        self.length = length
        self.data = data
        self.work = NOTHING
        self.sync = False
        self.table: int | None = None
        self.cancelled = False
