"""IDE disks on VMBus: offers that guests can pair with the drives, and the same bytes on both ways."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import pytest

from devices.synthetic.storvsp.ide import IdeAccelerator
from devices.vmbus.bus import VmBus
from pyvmm.core.memory import GuestMemory
from tests.fakes.disks import MemoryDisk
from tests.fakes.ide import IdeGuest
from tests.fakes.scsi import read10, write10
from tests.fakes.storvsc import READ_TYPE, InlineLane, Loopback, LoopbackBus, StorVsc
from tests.fakes.storvsp_rig import INQUIRY, REPORT_LUNS, SIZE, TEST_UNIT_READY
from tests.fakes.vmbus_guest import V5_3, FakeGuest, FakePorts

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACES = [(0, 0), (0, 1), (1, 0), (1, 1)]


def driver(vsp: IdeAccelerator) -> StorVsc:
    memory = GuestMemory(1 << 20)
    vsp.attached(cast("VmBus", LoopbackBus(memory)), ())
    guest = StorVsc(Loopback(vsp, memory), range(16, 32))
    guest.initialize()
    return guest


@pytest.fixture
def bus() -> Iterator[tuple[VmBus, FakeGuest]]:
    errors: list[BaseException] = []
    memory, ports = GuestMemory(4 << 20), FakePorts()
    bus = VmBus(memory, ports, errors.append)
    for channel, unit in reversed(PLACES):
        bus.add_device(IdeAccelerator(channel, unit, MemoryDisk(SIZE, name=f"{channel}{unit}")))
    yield bus, FakeGuest(ports, memory)
    bus.stop()
    assert errors == []


def test_each_disk_has_an_offer_whose_instance_tells_its_place(bus: tuple[VmBus, FakeGuest]) -> None:
    offers = bus[1].connect(V5_3)
    assert [str(offer.interface_id) for offer in offers] == ["32412632-86cb-44a2-9b5c-50d1417354f5"] * 4
    for offer, (channel, unit) in zip(offers, PLACES, strict=True):
        instance = offer.instance_id.bytes_le
        # As storvsc_get_ide_info of Linux's storvsc_drv.c takes them.
        assert int.from_bytes(instance[:4], "little") == channel
        assert int.from_bytes(instance[4:6], "little") == unit
        assert instance[6:] == bytes.fromhex("99880000000000000000")
        assert offer.flags == 1
        assert offer.user_defined[:16] == bytes((0, 0, channel, unit, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0))
        assert offer.user_defined[16:] == bytes(104)


@pytest.mark.parametrize(("path", "target"), [(0, 0), (1, 1), (1, 0)])
def test_the_disk_answers_at_whatever_path_and_target_the_guest_says(path: int, target: int) -> None:
    guest = driver(IdeAccelerator(1, 1, MemoryDisk(SIZE)))
    assert guest.read(INQUIRY, 36, path=path, target=target).data[8:24] == b"Msft    Virtual "
    assert guest.read(REPORT_LUNS, 1024, path=path, target=target).data[:16] == bytes((0, 0, 0, 8, *bytes(12)))
    assert guest.finish(guest.start(TEST_UNIT_READY, lun=1, path=path, target=target)).srb_status & 0x3F == 0x20
    assert guest.finish(guest.start(read10(0, 1), 512, READ_TYPE, path=path, target=target)).srb_status == 1


def test_both_ways_lead_to_the_same_sectors() -> None:
    disk = MemoryDisk(SIZE)
    ide = IdeGuest({(0, 0): disk})
    guest = driver(IdeAccelerator(0, 0, disk))
    data = os.urandom(1024)
    assert guest.write(write10(5, 2), data).srb_status == 1
    assert ide.read_sectors(5, 2) == data
    data = os.urandom(512)
    ide.write_sectors(9, data)
    assert guest.read(read10(9, 1), 512).data == data


def test_saved_state_is_restored() -> None:
    vsp = IdeAccelerator(0, 1, MemoryDisk(SIZE))
    driver(vsp)
    other = IdeAccelerator(0, 1, MemoryDisk(SIZE), make_lane=InlineLane)
    other.restore(vsp.save())
    assert other.inspect()["state"] == "ready"
    with pytest.raises(ValueError, match=r"ide0\.1: the disks differ"):
        IdeAccelerator(0, 1, MemoryDisk(SIZE // 2)).restore(vsp.save())
