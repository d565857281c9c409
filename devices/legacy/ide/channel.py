"""One IDE channel as a state machine: registers and interrupts of two devices, PIO and DMA transfers, bus master.

No I/O here: what has to be done on a medium leaves as a `Job`, and comes back by `finish`. Sources: ATA/ATAPI-7
volume 2 (registers and protocols); SFF-8038i (bus master).
"""

from __future__ import annotations

import threading

from devices.legacy.ide.ata import (
    ABRT,
    BSY,
    COMMAND,
    COMMAND_PHASE,
    DEV,
    DEVICE,
    DRDY,
    DRQ,
    ERR,
    ERROR,
    HOB,
    IN,
    INPUT,
    N_IEN,
    NONE,
    OUT,
    PACKET,
    READY,
    SRST,
    STATUS,
    CommandError,
    Job,
    Transfer,
)
from devices.saved import check_version, saved_bool, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.legacy.ide.ata import Drive

#: The most that is read ahead or gathered for PIO.
CHUNK = 128 << 10

_EXECUTE_DIAGNOSTIC, _DEVICE_RESET = 0x90, 0x08

# Bus master command and status.
_START, _TO_MEMORY = 0x01, 0x08
ACTIVE, DMA_ERROR, INTERRUPT = 0x01, 0x02, 0x04
_DRIVE_CAPABLE = 0x60


class DmaFailure(Exception):
    """A bus-master transfer could not be carried out: `short` if its table is too short, else no RAM is there."""

    def __init__(self, short: bool) -> None:
        super().__init__("short table" if short else "no RAM")
        self.short = short


class Channel:
    """`drives` are device 0 and device 1, None where there is none.

    `submit` is handed jobs, to be carried out in order; `line` drives the interrupt line. Both are called with the
    channel's lock held. Other methods may be called from any thread.
    """

    def __init__(
        self,
        drives: tuple[Drive | None, Drive | None],
        submit: Callable[[Job], None],
        line: Callable[[bool], None],
    ) -> None:
        self.drives = drives
        #: Guards all state; also held while a job puts data into guest memory.
        self.lock = threading.Lock()
        self._submit = submit
        self._line = line
        self._selected = 0
        self._control = 0
        self._pending = [False, False]
        self._level = False
        #: The command under way, its device, and its job if there is one.
        self._transfer: Transfer | None = None
        self._active = 0
        self._job: Job | None = None
        self._master_command = 0
        self._master_status = 0
        self._table = 0

    # Registers --------------------------------------------------------------------------------------------

    def read(self, register: int) -> int:
        """Read a register of the command block, from the error register on."""
        with self.lock:
            drive = self.drives[self._selected]
            if drive is None:
                return 0
            registers = drive.registers
            if register == STATUS:
                self._interrupt(self._selected, False)
                return registers.status
            if register == DEVICE:
                return registers.device | 0xA0
            if register == ERROR:
                return registers.error
            return (registers.previous if self._control & HOB else registers.current)[register]

    def read_alternate(self) -> int:
        """Read the status, and leave the interrupt as it is."""
        with self.lock:
            drive = self.drives[self._selected]
            return 0 if drive is None else drive.registers.status

    def write(self, register: int, value: int) -> None:
        """Write a register of the command block, from the features on."""
        with self.lock:
            self._control &= ~HOB
            if register == COMMAND:
                self._command(value)
                return
            if self._job is not None:  # the registers are the busy device's
                return
            if register == DEVICE:
                self._selected = 1 if value & DEV else 0
                self._update_line()
            for drive in self.drives:
                if drive is None:
                    continue
                if register == DEVICE:
                    drive.registers.device = value
                else:
                    drive.registers.write(register, value)

    def write_control(self, value: int) -> None:
        """Write the device control register."""
        with self.lock:
            before, self._control = self._control, value
            if value & SRST and not before & SRST:
                self._reset_drives()
                for drive in filter(None, self.drives):
                    drive.registers.status = BSY
            elif before & SRST and not value & SRST:
                for drive in filter(None, self.drives):
                    drive.reset()
            self._update_line()

    def _reset_drives(self) -> None:
        self._abandon()
        self._selected = 0
        self._pending = [False, False]
        for drive in filter(None, self.drives):
            drive.reset()

    def _abandon(self) -> None:
        """Forget the command under way. Its job, should it still run, changes nothing in the guest any more."""
        self._transfer = None
        if self._job is not None:
            self._job.cancelled = True
            self._job = None
        self._master_status &= ~ACTIVE

    # Interrupts.

    def _interrupt(self, device: int, pending: bool) -> None:
        self._pending[device] = pending
        self._update_line()

    def _update_line(self) -> None:
        level = self._pending[self._selected] and not self._control & N_IEN
        if level != self._level:
            self._level = level
            if level:
                self._master_status |= INTERRUPT
            self._line(level)

    # Commands ---------------------------------------------------------------------------------------------

    def _command(self, code: int) -> None:
        if self._control & SRST:
            return
        if code == _EXECUTE_DIAGNOSTIC:
            if self._job is None:
                self._reset_drives()
                self._interrupt(0, self.drives[0] is not None)
            return
        device = self._selected
        drive = self.drives[device]
        if drive is None:
            return
        if code == _DEVICE_RESET and drive.takes_reset:
            if self._active == device:
                self._abandon()
            drive.reset()
            return
        if self._transfer is not None:
            return  # one command at a time; a reset is the way out
        self._interrupt(device, False)
        self._active = device
        drive.registers.error = 0
        self._carry_out(lambda: drive.execute(code))

    def _carry_out(self, command: Callable[[], Transfer | None]) -> None:
        try:
            transfer = command()
        except CommandError as error:
            self._end(error.error)
            return
        if transfer is None:
            self._end()
            return
        self._transfer = transfer
        if transfer.dma:
            self._device().registers.status = READY | DRQ
            if self._master_status & ACTIVE:
                self._run_dma()
        elif transfer.direction == NONE:
            self._start(NONE, transfer.left)
        elif transfer.direction == OUT:
            self._gather()
            self._request(interrupt=False)
        elif transfer.offset is None:
            self._request()
        else:
            self._start(IN, min(transfer.left, CHUNK))

    def _device(self) -> Drive:
        drive = self.drives[self._active]
        assert drive is not None
        return drive

    def _under_way(self) -> Transfer:
        assert self._transfer is not None
        return self._transfer

    def _end(self, error: int = 0) -> None:
        """The command is over, and the host hears of it."""
        drive = self._device()
        if self._transfer is not None and self._transfer.packet:
            drive.registers.put(count=INPUT | COMMAND_PHASE)
        self._transfer = None
        drive.registers.error = error
        drive.registers.status = READY | (ERR if error else 0)
        self._interrupt(self._active, True)

    def _start(self, direction: int, length: int, data: bytearray | None = None) -> None:
        """Have the medium worked on; the device is busy until that is done."""
        transfer = self._under_way()
        drive = self._device()
        drive.registers.status = DRDY | BSY
        self._job = Job(drive, direction, transfer.offset, length, data or bytearray())
        self._job.work = transfer.work
        self._job.sync = transfer.sync
        self._job.table = self._table if transfer.dma else None
        self._submit(self._job)

    def finish(self, job: Job, more: bool = False, error: Exception | None = None) -> None:
        """A job is done.

        `more` says that there were more regions than data; `error` is a CommandError, a DmaFailure, or what went wrong
        in reaching the medium.
        """
        with self.lock:
            if job.cancelled:
                return
            self._job = None
            transfer = self._under_way()
            if job.table is not None and not more:
                self._master_status &= ~ACTIVE
            if isinstance(error, DmaFailure):
                self._dma_failed(error)
            elif isinstance(error, CommandError):
                self._end(error.error)
            elif error is not None:
                self._end(self._device().medium_error(job))
            elif transfer.dma or job.direction == NONE:
                self._end()
            else:
                assert transfer.offset is not None
                transfer.offset += job.length
                transfer.left -= job.length
                if job.direction == IN:
                    transfer.buffer, transfer.at = job.data, 0
                    self._request()
                elif transfer.left:
                    self._gather()
                    self._request()
                else:
                    self._end()

    # PIO --------------------------------------------------------------------------------------------------

    def _gather(self) -> None:
        """Make room for what the host will write."""
        transfer = self._under_way()
        transfer.buffer = bytearray(min(transfer.left, CHUNK))
        transfer.at = 0

    def _request(self, interrupt: bool = True) -> None:
        """The host may move the next block."""
        transfer = self._under_way()
        transfer.end = min(transfer.at + transfer.block, len(transfer.buffer))
        registers = self._device().registers
        registers.status = READY | DRQ
        if transfer.packet:
            size = transfer.end - transfer.at
            if transfer.work == PACKET:
                registers.put(count=COMMAND_PHASE)
            else:
                registers.put(count=INPUT, mid=size & 0xFF, high=size >> 8)
        if interrupt:
            self._interrupt(self._active, True)

    def _moving(self, direction: int) -> Transfer | None:
        """The transfer whose data the data register gives access to now."""
        transfer = self._transfer
        if transfer is None or transfer.dma or self._job is not None or self._active != self._selected:
            return None
        return transfer if transfer.direction == direction else None

    def read_data(self, size: int) -> bytes:
        """Read `size` bytes from the data register; zeros where there are none."""
        with self.lock:
            data = bytearray()
            while len(data) < size:
                transfer = self._moving(IN)
                if transfer is None:
                    break
                start = transfer.at
                transfer.at = min(start + size - len(data), transfer.end)
                data += transfer.buffer[start : transfer.at]
                if transfer.at == transfer.end:
                    self._block_read(transfer)
            return bytes(data).ljust(size, b"\0")

    def _block_read(self, transfer: Transfer) -> None:
        if transfer.at < len(transfer.buffer):
            self._request()
        elif transfer.left:
            self._start(IN, min(transfer.left, CHUNK))
        elif transfer.packet:
            self._end()
        else:
            self._transfer = None
            self._device().registers.status = READY

    def write_data(self, data: bytes) -> None:
        """Write to the data register; what no device waits for is dropped."""
        with self.lock:
            while data:
                transfer = self._moving(OUT)
                if transfer is None:
                    return
                start = transfer.at
                transfer.at = min(start + len(data), transfer.end)
                transfer.buffer[start : transfer.at] = data[: transfer.at - start]
                data = data[transfer.at - start :]
                if transfer.at == transfer.end:
                    self._block_written(transfer)

    def _block_written(self, transfer: Transfer) -> None:
        if transfer.work == PACKET:
            self._carry_out(lambda: self._device().packet(bytes(transfer.buffer)))
        elif transfer.at < len(transfer.buffer):
            self._request()
        else:
            self._start(OUT, len(transfer.buffer), transfer.buffer)

    # Bus master -------------------------------------------------------------------------------------------

    def _run_dma(self) -> None:
        transfer = self._under_way()
        if bool(self._master_command & _TO_MEMORY) != (transfer.direction == IN):
            self._dma_failed(DmaFailure(short=False))
            return
        self._start(transfer.direction, transfer.left or len(transfer.buffer), transfer.buffer)

    def _dma_failed(self, failure: DmaFailure) -> None:
        self._master_status &= ~ACTIVE
        if failure.short:
            # The device has data left that nobody takes: no interrupt comes. SFF-8038i, section 3.1.
            self._transfer = None
            self._device().registers.status = READY
        else:
            self._master_status |= DMA_ERROR
            self._end(ABRT)

    def read_master(self, offset: int) -> int:
        """Read a byte of the bus master's registers."""
        with self.lock:
            if offset == 0:
                return self._master_command
            if offset == 2:
                return self._master_status | _DRIVE_CAPABLE
            return self._table >> 8 * (offset - 4) & 0xFF if offset >= 4 else 0

    def write_master(self, offset: int, value: int) -> None:
        """Write a byte of the bus master's registers."""
        with self.lock:
            if offset == 0:
                self._write_master_command(value & (_START | _TO_MEMORY))
            elif offset == 2:
                self._master_status &= ~(value & (DMA_ERROR | INTERRUPT))
            elif offset >= 4:
                shift = 8 * (offset - 4)
                self._table = (self._table & ~(0xFF << shift) | value << shift) & 0xFFFF_FFFC

    def _write_master_command(self, value: int) -> None:
        before, self._master_command = self._master_command, value
        transfer = self._transfer
        if value & _START and not before & _START:
            self._master_status |= ACTIVE
            if transfer is not None and transfer.dma and self._job is None:
                self._run_dma()
        elif before & _START and not value & _START:
            self._master_status &= ~ACTIVE
            if transfer is not None and transfer.dma and self._job is not None:
                # Stopped in the middle: whatever the medium still does, guest memory is the guest's again.
                self._abandon()
                registers = self._device().registers
                registers.error, registers.status = ABRT, READY | ERR

    # Life cycle -------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """The state after power-on or a reset of the board."""
        with self.lock:
            self._abandon()
            for drive in filter(None, self.drives):
                drive.power_on()
            self._selected = self._control = self._active = 0
            self._master_command = self._master_status = self._table = 0
            self._pending = [False, False]
            self._level = False
            self._line(False)

    def resume(self) -> None:
        """Drive the line again after a restore."""
        with self.lock:
            self._line(self._level)

    def save(self) -> dict[str, Any]:
        """Return the state; no job is under way."""
        with self.lock:
            assert self._job is None
            return {
                "version": 1,
                "drives": [drive and {**drive.save(), "registers": drive.registers.save()} for drive in self.drives],
                "selected": self._selected,
                "control": self._control,
                "pending": list(self._pending),
                "level": self._level,
                "active": self._active,
                "transfer": self._transfer and self._transfer.save(),
                "master_command": self._master_command,
                "master_status": self._master_status,
                "table": self._table,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raises ValueError if it doesn't fit the drives."""
        check_version(state, 1)
        saved = state.get("drives")
        if type(saved) is not list or [bool(drive) for drive in saved] != [bool(drive) for drive in self.drives]:
            raise ValueError("saved state: other IDE drives than this VM has")
        pending, level = state.get("pending"), saved_bool(state, "level")
        if type(pending) is not list or [type(value) for value in pending] != [bool, bool]:
            raise ValueError("saved state: pending interrupts are not two truth values")
        selected, active = saved_int(state, "selected", 0, 1), saved_int(state, "active", 0, 1)
        control = saved_int(state, "control", 0, 0xFF)
        command, status = saved_int(state, "master_command", 0, 0x09), saved_int(state, "master_status", 0, 0x07)
        table = saved_int(state, "table", 0, 0xFFFF_FFFC)
        transfer = None
        if state.get("transfer") is not None:
            drive = self.drives[active]
            if drive is None:
                raise ValueError("saved state: a command of a drive that is not there")
            transfer = Transfer.restored(state["transfer"], drive.medium.size if drive.medium is not None else 0, CHUNK)
        with self.lock:
            for drive, drive_state in zip(self.drives, saved, strict=True):
                if drive is not None:
                    drive.restore(drive_state)
                    drive.registers.restore(drive_state["registers"])
            self._selected, self._active, self._control = selected, active, control
            self._pending, self._level, self._transfer = pending, level, transfer
            self._master_command, self._master_status, self._table = command, status, table

    def inspect(self) -> dict[str, Any]:
        """Return the drives, and what is under way."""
        with self.lock:
            return {
                "drives": [drive and drive.inspect() for drive in self.drives],
                "busy": self._transfer is not None,
                "dma": bool(self._master_status & ACTIVE),
            }
