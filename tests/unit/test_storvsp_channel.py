"""The controller behind real rings and workers."""

from __future__ import annotations

import random
import struct
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from devices.synthetic.storvsp.vsp import StorVsp
from devices.vmbus.channel import Channel
from devices.vmbus.packets import PACKET_INBAND
from pyvmm.core._hot import Ring
from pyvmm.core.clock import Clock
from pyvmm.core.memory import GuestMemory
from pyvmm.core.worker import Worker
from tests.fakes.disks import MemoryDisk
from tests.fakes.storvsc import READ_TYPE, WRITE_TYPE, LoopbackBus, StorVsc
from tests.unit.test_storvsp import ENUMERATE, SIZE, TEST_UNIT_READY, read10, write10

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.vmbus.bus import VmBus
    from pyvmm.core._hot import Packet

PATIENCE = 30.0
RING_PAGES = 3


class RingEnd:
    """The guest's end of a channel: it signals the host always, and sleeps until it is signalled itself."""

    def __init__(self, rig: Rig, index: int) -> None:
        self.memory = rig.memory
        self.woken = threading.Event()
        self.broken = threading.Event()
        base = 1 + index * 2 * RING_PAGES
        down, up = range(base, base + RING_PAGES), range(base + RING_PAGES, base + 2 * RING_PAGES)
        host = Ring(self.memory.hot, down), Ring(self.memory.hot, up)
        self.outgoing, self.incoming = Ring(self.memory.hot, down), Ring(self.memory.hot, up)
        host[0].init_incoming()
        host[1].init_outgoing()
        self.channel = Channel(
            rig.vsp, index + 1, index, 0, b"", host, rig.vsp.worker_for(index),
            lambda channel: self.woken.set(), lambda channel, reason: self.broken.set(), Clock(),
        )  # fmt: skip
        rig.vsp.open(self.channel)
        self.channel.attach()

    def offer(self, packet: Packet) -> bool:
        """Put a packet into the ring if there is room."""
        written, _ = self.outgoing.write([packet])
        self.channel.kick()
        return written == 1

    def send(self, packet: Packet) -> None:
        assert self.offer(packet), "no room"

    def receive(self) -> list[Packet]:
        while True:
            packets, wanted = self.incoming.read(1000)
            if wanted:
                self.channel.kick()
            if packets:
                return packets
            assert self.woken.wait(PATIENCE), f"the host stays silent: {self.channel.inspect()}"
            self.woken.clear()


class Rig:
    def __init__(self, disks: dict[int, MemoryDisk], subchannels: int = 0) -> None:
        self.memory = GuestMemory(4 << 20)
        self.errors: list[BaseException] = []
        self.vsp = StorVsp(0, disks, subchannels)
        self.workers = [Worker(f"test{index}", self.errors.append) for index in range(self.vsp.worker_count)]
        for worker in self.workers:
            worker.start()
        self.vsp.attached(cast("VmBus", LoopbackBus(self.memory)), self.workers)
        self.guests: list[StorVsc] = []

    def guest(self) -> StorVsc:
        """Open the next channel; its driver has 128 pages of its own."""
        index = len(self.guests)
        pages = list(range(100 + 128 * index, 228 + 128 * index))
        random.Random(index).shuffle(pages)
        self.guests.append(StorVsc(RingEnd(self, index), pages))
        return self.guests[-1]


def end(guest: StorVsc) -> RingEnd:
    return cast("RingEnd", guest.end)


@pytest.fixture
def make() -> Iterator[Any]:
    rigs: list[Rig] = []

    def build(disks: dict[int, MemoryDisk], subchannels: int = 0) -> Rig:
        rigs.append(Rig(disks, subchannels))
        return rigs[-1]

    yield build
    for rig in rigs:
        for unit in rig.vsp._luns.values():
            cast("MemoryDisk", unit.disk).gate.set()
        for worker in rig.workers:
            worker.resume()
            worker.stop()
        assert rig.errors == []


def test_four_channels_at_once_keep_the_data(make: Any) -> None:
    disk = MemoryDisk(4 << 20)
    rig = make({0: disk}, 3)
    rig.guest().initialize(subchannels=3)
    for _ in range(3):
        rig.guest()
    failures: list[str] = []

    def work(index: int, guest: StorVsc) -> None:
        # Each has a quarter of the disk to itself.
        chance = random.Random(index)
        model = bytearray(1 << 20)
        for _ in range(60):
            blocks = chance.randint(1, 256)
            lba, offset = chance.randint(0, 2048 - blocks), chance.randint(0, 4095)
            data = chance.randbytes(blocks * 512)
            guest.write(write10(index * 2048 + lba, blocks), data, offset=offset)
            model[lba * 512 : lba * 512 + len(data)] = data
            lba = chance.randint(0, 2048 - blocks)
            found = guest.read(read10(index * 2048 + lba, blocks), len(data), offset=4095 - offset)
            if found.data != model[lba * 512 : lba * 512 + len(data)]:
                failures.append(f"channel {index}, LBA {lba}")
        if disk.data[index << 20 : index + 1 << 20] != model:
            failures.append(f"channel {index} at the end")

    threads = [threading.Thread(target=work, args=(index, guest)) for index, guest in enumerate(rig.guests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert rig.vsp.inspect()["luns"]["0"]["commands"] == 4 * 120


def test_guest_that_does_not_take_completions_is_held_back_without_loss(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)})
    guest = rig.guest()
    guest.initialize()
    channel = end(guest).channel
    sent = 0
    body = struct.pack("<HBBBBBBBBBBI20s", 0x34, 0, 0, 0, 0, 0, 0, 6, 20, 2, 0, 0, TEST_UNIT_READY).ljust(0x34, b"\0")
    packet = struct.pack("<III", 3, 1, 0) + body
    # Until the host's ring to the guest is full, and then the guest's to the host.
    while sent < 10_000:
        if end(guest).offer((PACKET_INBAND, 1, 1000 + sent, b"", packet)):
            sent += 1
        elif channel.inspect()["pending"]:
            break
        else:
            rig.workers[0].run(lambda: None)
    assert 100 < sent < 1000
    assert channel.inspect()["pending"] <= 64
    answered: list[int] = []
    while len(answered) < sent:
        answered += [transaction_id for _, _, transaction_id, _, _ in end(guest).receive()]
    assert answered == list(range(1000, 1000 + sent))
    assert channel.inspect()["pending"] == 0


def test_pause_waits_for_the_command_under_way(make: Any) -> None:
    disk = MemoryDisk(SIZE)
    rig = make({0: disk})
    guest = rig.guest()
    guest.initialize()
    disk.gate.clear()
    request = guest.start(read10(0, 1), 512, READ_TYPE)
    assert disk.reached.wait(PATIENCE)
    paused = threading.Event()

    def pause() -> None:
        rig.workers[0].pause()
        paused.set()

    pauser = threading.Thread(target=pause)
    pauser.start()
    assert not paused.wait(0.05)
    disk.gate.set()
    assert paused.wait(PATIENCE)
    pauser.join(PATIENCE)
    # Its completion is in the ring; what comes now stays in the ring.
    assert guest.finish(request).srb_status == 1
    guest.poke(b"late" * 128)
    end(guest).woken.clear()
    late = guest.start(write10(0, 1), 512, WRITE_TYPE)
    assert not end(guest).woken.wait(0.05)
    assert disk.data[:512] == bytes(512)
    rig.workers[0].resume()
    assert guest.finish(late).srb_status == 1
    assert disk.data[:512] == b"late" * 128


def test_disks_come_and_go_under_load(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)})
    guest = rig.guest()
    guest.initialize()
    stop = threading.Event()
    seen: set[int] = set()

    def load() -> None:
        while not stop.is_set():
            seen.add(guest.read(read10(0, 8), 4096, lun=1).srb_status & 0x3F)

    loader = threading.Thread(target=load)
    loader.start()
    for _ in range(50):
        rig.vsp.add_disk(1, MemoryDisk(SIZE))
        rig.vsp.remove_disk(1).close()  # MemoryDisk asserts that no I/O comes after this
    stop.set()
    loader.join(PATIENCE)
    while len(guest.notices) < 100:
        guest.pump()
    assert seen <= {0x01, 0x20}
    assert set(guest.notices) == {ENUMERATE}


def test_hostile_request_breaks_its_channel_and_no_other(make: Any) -> None:
    rig = make({0: MemoryDisk(SIZE)}, 1)
    guest = rig.guest()
    guest.initialize(subchannels=1)
    sub = rig.guest()
    sub.pages = [0xFFFFFFFFFF]
    sub.start(read10(0, 1), 512, READ_TYPE)
    assert end(sub).broken.wait(PATIENCE)
    assert "no RAM there" in (end(sub).channel.broken or "")
    assert guest.command(TEST_UNIT_READY).srb_status == 1
