"""The controller on a real bus, with real rings and workers."""

from __future__ import annotations

import random
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from devices.vmbus.packets import PACKET_INBAND
from tests.fakes.data_paths import data_path as data_path
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import read10, write10
from tests.fakes.storvsc import READ_TYPE, WRITE_TYPE, StorVsc
from tests.fakes.storvsp_bus import PATIENCE, Rig, channel_of
from tests.fakes.storvsp_bus import make as make
from tests.fakes.storvsp_rig import ENUMERATE, SIZE, TEST_UNIT_READY
from tests.fakes.vmbus_guest import RESCIND, V0_13, V1_1, V2_4, V5_3, FakeGuest

if TYPE_CHECKING:
    pass


def pending(rig: Rig) -> int:
    return int(rig.bus.inspect()["channels"][0]["pending"])


@pytest.mark.parametrize(
    ("vmbus", "storage", "body"),
    [(V0_13, 0x0200, 0x24), (V1_1, 0x0402, 0x24), (V2_4, 0x0501, 0x34), (V5_3, 0x0602, 0x34)],
)
def test_guests_of_every_age_write_and_read(make: Any, vmbus: int, storage: int, body: int) -> None:
    disk = MemoryDisk(SIZE)
    driver = make({0: disk}, vmbus=vmbus).driver
    driver.body = body
    assert driver.initialize([storage])[0] == storage
    assert driver.write(write10(8, 8), b"abcd" * 1024, offset=77).srb_status == 1
    assert disk.data[4096:8192] == b"abcd" * 1024
    assert driver.read(read10(8, 8), 4096).data == b"abcd" * 1024


def test_four_channels_at_once_keep_the_data(make: Any) -> None:
    disk = MemoryDisk(4 << 20)
    rig = make({0: disk}, 3)
    rig.driver.initialize(subchannels=3)
    drivers = [rig.driver]
    for index, offer in enumerate([rig.guest.next_offer() for _ in range(3)], 1):
        assert offer.subchannel_index == index
        drivers.append(rig.open(offer, index))
    failures: list[str] = []

    def work(index: int, driver: StorVsc) -> None:
        # Each has a quarter of the disk to itself.
        chance = random.Random(index)
        model = bytearray(1 << 20)
        for _ in range(30):
            blocks = chance.randint(1, 256)
            lba, offset = chance.randint(0, 2048 - blocks), chance.randint(0, 4095)
            data = chance.randbytes(blocks * 512)
            driver.write(write10(index * 2048 + lba, blocks), data, offset=offset)
            model[lba * 512 : lba * 512 + len(data)] = data
            lba = chance.randint(0, 2048 - blocks)
            found = driver.read(read10(index * 2048 + lba, blocks), len(data), offset=4095 - offset)
            if found.data != model[lba * 512 : lba * 512 + len(data)]:
                failures.append(f"channel {index}, LBA {lba}")
        if disk.data[index << 20 : index + 1 << 20] != model:
            failures.append(f"channel {index} at the end")

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(drivers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert rig.vsp.inspect()["luns"]["0"]["commands"] == 4 * 60


def test_guest_that_does_not_take_completions_is_held_back_without_loss(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)})
    rig.driver.initialize()
    channel = channel_of(rig.driver)
    body = struct.pack("<HBBBBBBBBBBI20s", 0x34, 0, 0, 0, 0, 0, 0, 6, 20, 2, 0, 0, TEST_UNIT_READY).ljust(0x34, b"\0")
    packet = struct.pack("<III", 3, 1, 0) + body
    sent = 0
    # Until the host's ring to the guest is full, and then the guest's to the host.
    while sent < 10_000:
        if channel.try_send((PACKET_INBAND, 1, 1000 + sent, b"", packet)):
            sent += 1
        elif pending(rig):
            break
        else:
            rig.vsp.workers[0].run(lambda: None)
    assert 200 < sent < 1000
    assert pending(rig) <= 64
    answered: list[int] = []
    while len(answered) < sent:
        answered += [transaction_id for _, _, transaction_id, _, _ in channel.receive()]
    assert answered == list(range(1000, 1000 + sent))
    assert rig.driver.command(TEST_UNIT_READY).srb_status == 1
    assert pending(rig) == 0


def test_pause_waits_for_the_command_under_way(make: Any) -> None:
    disk = MemoryDisk(SIZE)
    rig = make({0: disk})
    rig.driver.initialize()
    disk.gate.clear()
    request = rig.driver.start(read10(0, 1), 512, READ_TYPE)
    assert disk.reached.wait(PATIENCE)
    paused = threading.Event()

    def pause() -> None:
        rig.bus.pause()
        paused.set()

    pauser = threading.Thread(target=pause)
    pauser.start()
    assert not paused.wait(0.05)
    disk.gate.set()
    assert paused.wait(PATIENCE)
    pauser.join(PATIENCE)
    # Its completion is in the ring; what comes now stays in the ring.
    assert rig.driver.finish(request).srb_status == 1
    disk.reached.clear()
    rig.driver.poke(b"late" * 128)
    late = rig.driver.start(write10(0, 1), 512, WRITE_TYPE)
    assert not disk.reached.wait(0.05)
    rig.bus.resume()
    assert rig.driver.finish(late).srb_status == 1
    assert disk.data[:512] == b"late" * 128


def test_guest_goes_on_after_save_and_restore(make: Any) -> None:
    disk = MemoryDisk(SIZE)
    rig = make({0: disk}, 1)
    rig.driver.initialize(subchannels=1)
    sub = rig.open(rig.guest.next_offer(), 1)
    sub.write(write10(0, 1), b"before.." * 64)
    serial = rig.driver.read(bytes((0x12, 1, 0x80, 0, 36, 0)), 36).data
    rig.bus.pause()
    waiting = rig.driver.start(read10(0, 1), 512, READ_TYPE)
    state = rig.bus.save()
    copy = MemoryDisk(SIZE, name="copy")
    copy.data[:] = disk.data
    vsp = rig.plug({0: copy}, 1)
    rig.bus.pause()
    rig.bus.restore(state)
    rig.guest.ports = rig.ports
    rig.bus.resume()
    assert rig.driver.finish(waiting, 512).data == b"before.." * 64
    assert sub.write(write10(1, 1), b"after..." * 64).srb_status == 1
    assert copy.data[512:1024] == b"after..." * 64 and disk.data[512:1024] == bytes(512)
    assert rig.driver.read(bytes((0x12, 1, 0x80, 0, 36, 0)), 36).data == serial
    vsp.add_disk(1, MemoryDisk(SIZE))
    rig.driver.pump()
    assert rig.driver.notices == [ENUMERATE]


def test_guest_that_reloads_its_driver_starts_anew(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)})
    rig.driver.initialize()
    offer = channel_of(rig.driver).offer
    channel_of(rig.driver).close()
    again = rig.open(offer)
    assert again.operation(10)[0] == 0xC0000184
    again.initialize()
    assert again.command(TEST_UNIT_READY).srb_status == 1


def test_reset_of_the_vm_starts_anew_with_the_same_disks(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)})
    rig.driver.initialize()
    rig.driver.write(write10(0, 1), b"kept" * 128)
    rig.bus.reset()
    rig.guest = FakeGuest(rig.ports, rig.memory)
    (offer,) = rig.guest.connect()
    driver = rig.open(offer)
    driver.initialize()
    assert driver.read(read10(0, 1), 512).data == b"kept" * 128


def test_disks_come_and_go_under_load(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)})
    rig.driver.initialize()
    stop = threading.Event()
    seen: set[int] = set()

    def load() -> None:
        while not stop.is_set():
            seen.add(rig.driver.read(read10(0, 8), 4096, lun=1).srb_status & 0x3F)

    loader = threading.Thread(target=load)
    loader.start()
    for _ in range(50):
        rig.vsp.add_disk(1, MemoryDisk(SIZE))
        rig.vsp.remove_disk(1).close()  # MemoryDisk asserts that no I/O comes after this
    stop.set()
    loader.join(PATIENCE)
    assert not loader.is_alive()
    while len(rig.driver.notices) < 100:
        rig.driver.pump()
    assert seen <= {0x01, 0x20}
    assert set(rig.driver.notices) == {ENUMERATE}


def test_hostile_request_breaks_its_channel_and_no_other(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)}, 1)
    rig.driver.initialize(subchannels=1)
    offer = rig.guest.next_offer()
    sub = rig.open(offer, 1)
    sub.pages = [0xFFFFFFFFFF]
    sub.start(read10(0, 1), 512, READ_TYPE)
    assert rig.guest.expect(RESCIND) == struct.pack("<I", offer.channel_id)
    (broken,) = [found for found in rig.bus.inspect()["offers"] if found["broken"]]
    assert broken["subchannel"] == 1 and "no RAM there" in broken["broken"]
    assert rig.driver.command(TEST_UNIT_READY).srb_status == 1
