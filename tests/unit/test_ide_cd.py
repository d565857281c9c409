"""An IDE CD drive through the controller's ports: packets by PIO and DMA, errors, changes of the disc."""

from __future__ import annotations

import errno
import struct
import threading

import pytest

from devices.storage.cdb import Op
from devices.storage.mmc import MediumLocked
from tests.fakes.disks import MemoryDisk, disc
from tests.fakes.ide import BSY, DRQ, ERR, READY, IdeGuest, text
from tests.fakes.ide import identify as identify_disk

ABRT = 0x04
BUFFER = 0x10000
SIGNATURE = (1, 1, 0x14, 0xEB)


class CdGuest(IdeGuest):
    """A guest with a CD at 1:0, which has taken note of the power-on."""

    def __init__(self, medium: MemoryDisk, lazy: bool = False) -> None:
        super().__init__({(1, 0): medium, (0, 0): MemoryDisk(1 << 20)}, lazy)
        self.channel = 1
        self.fails(Op.TEST_UNIT_READY)

    def packet(self, *cdb: int, limit: int = 0xFFFE, dma: bool = False) -> None:
        """Give a command packet."""
        for register, value in ((6, 0xA0), (1, dma), (4, limit & 0xFF), (5, limit >> 8), (7, 0xA0)):
            self.put(register, value)
        assert self.alternate() == READY | DRQ
        assert (self.get(2) & 3, self.line.level) == (1, False), "the packet is asked for, without an interrupt"
        self.give(bytes(cdb).ljust(12, b"\0"))

    def ask(self, *cdb: int, limit: int = 0xFFFE) -> bytes:
        """A command that brings data, by PIO as a driver reads it."""
        self.packet(*cdb, limit=limit)
        data = bytearray()
        while True:
            assert self.line.level, "no interrupt for a phase"
            status = self.status()
            assert status & (BSY | ERR) == 0, f"status {status:#x}, error {self.error():#x}"
            if not status & DRQ:
                assert self.get(2) & 3 == 3, "the last phase is that of the status"
                return bytes(data)
            assert self.get(2) & 3 == 2
            size = self.get(4) | self.get(5) << 8
            assert 0 < size <= limit
            data += self.data(size + size % 2)[:size]

    def fails(self, *cdb: int) -> int:
        """A command that is refused; return the sense key that the error register tells."""
        self.packet(*cdb)
        if not self.lazy:
            assert self.line.level
        assert self.status() & (BSY | DRQ | ERR) == ERR
        assert self.get(2) & 3 == 3
        return self.error() >> 4

    def sense(self) -> tuple[int, int, int]:
        data = self.ask(Op.REQUEST_SENSE, 0, 0, 0, 18)
        return data[2], data[12], data[13]


@pytest.fixture
def medium() -> MemoryDisk:
    return disc()


@pytest.fixture
def guest(medium: MemoryDisk) -> CdGuest:
    return CdGuest(medium)


def read_10(lba: int, count: int) -> tuple[int, ...]:
    return (Op.READ_10, 0, *lba.to_bytes(4, "big"), 0, *count.to_bytes(2, "big"))


def test_a_reset_leaves_the_signature_of_a_packet_device(guest: CdGuest) -> None:
    guest.control(0x04)
    guest.control(0x00)
    assert guest.alternate() == 0
    assert tuple(map(guest.get, (2, 3, 4, 5))) == SIGNATURE
    guest.put(4, 0)
    guest.put(7, 0x08)
    assert tuple(map(guest.get, (2, 3, 4, 5))) == SIGNATURE


def test_identify_is_refused_with_the_signature_and_identify_packet_tells(guest: CdGuest) -> None:
    guest.command(0xEC)
    assert (guest.status(), guest.error()) == (READY | ERR, ABRT)
    assert tuple(map(guest.get, (2, 3, 4, 5))) == SIGNATURE
    assert guest.command(0xA1) == READY | DRQ
    found = struct.unpack("<256H", guest.data(512))
    assert text(found, 27, 20) == "Virtual CD"
    assert found[0] == 0x85C0
    assert found[82] & 0x0210 == 0x0210, "packets and DEVICE RESET"
    guest.channel = 0
    identify_disk(guest)
    assert guest.command(0xA1) == READY | ERR


def test_the_first_command_after_power_on_hears_of_it(medium: MemoryDisk) -> None:
    guest = IdeGuest({(1, 0): medium})
    cd = object.__new__(CdGuest)
    cd.__dict__.update(guest.__dict__)
    cd.channel = 1
    assert cd.fails(Op.TEST_UNIT_READY) == 6
    assert cd.sense() == (6, 0x29, 0)
    assert cd.sense() == (0, 0, 0)
    assert cd.ask(Op.TEST_UNIT_READY) == b""


@pytest.mark.parametrize("limit", [2048, 0xFFFE, 2047, 3000, 0])
def test_sectors_come_in_blocks_of_what_the_host_takes(guest: CdGuest, medium: MemoryDisk, limit: int) -> None:
    guest.packet(*read_10(3, 70), limit=limit)
    data = bytearray()
    most = 0
    while guest.status() & DRQ:
        size = guest.get(4) | guest.get(5) << 8
        most = max(most, size)
        data += guest.data(size)
    assert data == medium.data[3 * 2048 : 73 * 2048]
    assert most == (limit & ~1 or 0xFFFE)
    assert guest.get(2) & 3 == 3


def test_sectors_come_by_dma(guest: CdGuest, medium: MemoryDisk) -> None:
    guest.table((BUFFER, 4096), (BUFFER + 0x2000, 2048))
    guest.packet(*read_10(10, 3), dma=True)
    guest.start()
    assert guest.stop() == 4
    assert guest.status() == READY
    assert guest.get(2) & 3 == 3
    assert guest.memory.read(BUFFER, 4096) + guest.memory.read(BUFFER + 0x2000, 2048) == medium.data[20480:26624]


def test_answers_come_by_dma_too(guest: CdGuest) -> None:
    guest.table((BUFFER, 512))
    guest.packet(Op.INQUIRY, 0, 0, 0, 36, dma=True)
    guest.start()
    assert guest.stop() == 5, "the table has room for more"
    assert guest.memory.read(BUFFER + 8, 24) == b"Msft    Virtual CD/ROM  "


def test_an_answer_of_odd_length_ends_with_a_byte_of_padding(guest: CdGuest) -> None:
    assert len(guest.ask(Op.INQUIRY, 0, 0, 0, 35)) == 35
    assert guest.ask(Op.READ_CAPACITY_10) == struct.pack(">II", 199, 2048)


def test_refusals_are_told_by_sense_key_and_then_by_sense_data(guest: CdGuest) -> None:
    assert guest.fails(0xFF) == 5
    assert guest.sense() == (5, 0x20, 0)
    assert guest.fails(*read_10(200, 1)) == 5
    assert guest.fails(*read_10(200, 1)) == 5
    assert guest.sense() == (5, 0x21, 0)
    guest.ask(Op.TEST_UNIT_READY)
    assert guest.sense() == (0, 0, 0), "another command's success ends it"


def test_read_errors_of_the_host_are_medium_errors(guest: CdGuest, medium: MemoryDisk) -> None:
    medium.fail = OSError(errno.EIO, "scratched")
    assert guest.fails(*read_10(0, 1)) == 3
    assert guest.sense() == (3, 0x11, 0)
    guest.table((BUFFER, 2048))
    guest.packet(*read_10(0, 1), dma=True)
    guest.start()
    assert guest.stop() == 4
    assert guest.error() >> 4 == 3


def test_transfer_modes_are_set_and_others_refused(guest: CdGuest) -> None:
    assert guest.command(0xEF, features=3, count=0x22) == READY
    assert guest.command(0xEF, features=3, count=0x46) == READY | ERR
    assert guest.command(0xEF, features=2) == READY | ERR


def test_another_disc_is_seen_after_a_unit_attention(guest: CdGuest, medium: MemoryDisk) -> None:
    new = disc(50)
    assert guest.ide.change_disc(1, 0, new, False) is medium
    assert guest.fails(Op.TEST_UNIT_READY) == 6
    assert guest.sense() == (6, 0x28, 0)
    assert guest.ask(*read_10(7, 1)) == new.data[14336:16384]


def test_a_disc_is_changed_once_no_command_reads_it(medium: MemoryDisk) -> None:
    guest = CdGuest(medium, lazy=True)
    guest.packet(*read_10(0, 1))
    medium.gate.clear()
    thread = threading.Thread(target=guest.work)
    thread.start()
    assert medium.reached.wait(10)
    medium.gate.set()
    thread.join()
    guest.ide.change_disc(1, 0, None, False)
    assert guest.data(2048) == medium.data[:2048], "what had been read is the guest's"


def test_a_command_whose_disc_was_taken_ends_with_a_medium_error(medium: MemoryDisk) -> None:
    guest = CdGuest(medium, lazy=True)
    guest.packet(*read_10(0, 100))
    guest.work()
    guest.bus.pause()
    guest.ide.change_disc(1, 0, None, True)
    guest.bus.resume()
    guest.data(65534)
    guest.data(65534)
    guest.data(4)
    guest.work()
    assert guest.status() == READY | ERR
    assert guest.error() >> 4 == 3


def test_the_guest_keeps_a_locked_disc(guest: CdGuest) -> None:
    guest.ask(Op.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 1)
    with pytest.raises(MediumLocked):
        guest.ide.change_disc(1, 0, None, False)
    assert guest.ide.change_disc(1, 0, None, True) is not None


def test_a_packet_under_way_and_sense_data_are_saved(guest: CdGuest, medium: MemoryDisk) -> None:
    guest.fails(*read_10(500, 1))
    other = CdGuest(medium)
    other.bus.restore(guest.bus.save())
    assert other.sense() == (5, 0x21, 0)
    guest.packet(*read_10(5, 2), limit=1024)
    start = guest.data(1500)
    other.bus.restore(guest.bus.save())
    assert start + other.data(4096 - 1500) == medium.data[5 * 2048 : 7 * 2048]


def test_a_reset_of_the_board_opens_the_lock(guest: CdGuest) -> None:
    guest.ask(Op.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 1)
    guest.bus.reset()
    assert guest.fails(Op.TEST_UNIT_READY) == 6
    assert guest.ide.change_disc(1, 0, None, False) is not None
