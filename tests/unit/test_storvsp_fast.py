"""The fast path in its controller: the same answers as Python's, and all that begins, ends or takes turns with it."""

from __future__ import annotations

import io
import os
import resource
import struct
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.storage.images import open_image
from devices.storage.sense import CAPACITY_CHANGED
from devices.synthetic.storvsp.qos import Limits
from devices.synthetic.storvsp.scsi import Target
from devices.synthetic.storvsp.vsp import StorVsp
from devices.vmbus.packets import PACKET_GPA_DIRECT, PACKET_INBAND
from pyvmm.core._hot import FastDisk, StorageQueue
from pyvmm.core.memory import PAGE_SIZE, GuestMemory
from pyvmm.core.trace import Tracer
from tests.fakes.disks import MemoryDisk
from tests.fakes.scsi import read10, write10
from tests.fakes.storvsc import (
    READ_TYPE,
    UNKNOWN_TYPE,
    WRITE_TYPE,
    InlineLane,
    Loopback,
    LoopbackBus,
    StorVsc,
    gpa_range,
    scsi_packet,
)
from tests.fakes.storvsp_bus import Rig, channel_of
from tests.fakes.storvsp_bus import make as make
from tests.unit.test_hot_storage import FLUSH, PAGES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devices.vmbus.bus import VmBus
    from pyvmm.core._hot import Packet

# Both ways are one ----------------------------------------------------------------------------------------


class Twin:
    """A controller with two disks of 64 sectors, one read-only, served one way."""

    def __init__(self, by_c: bool) -> None:
        self.memory = GuestMemory(1 << 20)
        for page in range(256):
            self.memory.write(page * PAGE_SIZE, bytes((page,)) * PAGE_SIZE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryDisk, "by_c", by_c)
            self.disks = [MemoryDisk(64 * 512), MemoryDisk(64 * 512, readonly=True)]
        for disk in self.disks:
            disk.data[:] = bytes(range(256)) * 128
        self.vsp = StorVsp(0, dict(enumerate(self.disks)), make_lane=InlineLane)
        self.vsp.attached(cast("VmBus", LoopbackBus(self.memory)), ())
        self.end = Loopback(self.vsp, self.memory)
        StorVsc(self.end, PAGES).initialize()
        assert (self.end.device.engine is not None) == by_c
        self.end.device.sent.clear()

    def answer(self, packet: Packet) -> tuple[list[Packet], str | None]:
        self.end.send(packet)
        sent, self.end.device.sent = self.end.device.sent, []
        return sent, self.end.broken

    def state(self) -> list[bytes]:
        return [bytes(self.memory.view(0, 1 << 20)), *(bytes(disk.data) for disk in self.disks)]


lbas = st.one_of(st.integers(0, 70), st.sampled_from([63, 64, 2**21 - 1, 2**32 - 1, 2**64 - 1]))
counts = st.one_of(st.integers(0, 5), st.sampled_from([64, 65, 255, 256, 65535, 2**32 - 1]))
flag_bytes = st.sampled_from([0, 0, 0, 8, 0x10, 0x18, 0x20, 0xFF])


@st.composite
def cdbs(draw: st.DrawFn) -> bytes:
    lba, count, flags = draw(lbas), draw(counts), draw(flag_bytes)
    write = draw(st.booleans())
    kind = draw(st.sampled_from([6, 10, 10, 10, 12, 16, "flush", "sync16"]))
    if kind == 6:
        return struct.pack(">IBB", (0x0A if write else 0x08) << 24 | lba & 0x1FFFFF, count & 0xFF, 0)
    if kind == 10:
        return struct.pack(">BBIxHx", 0x2A if write else 0x28, flags, lba & 0xFFFFFFFF, count & 0xFFFF)
    if kind == 12:
        return struct.pack(">BBIIxx", 0xAA if write else 0xA8, flags, lba & 0xFFFFFFFF, count)
    if kind == 16:
        return struct.pack(">BBQIxx", 0x8A if write else 0x88, flags, lba, count)
    if kind == "flush":
        return struct.pack(">BBIxHx", 0x35, 0, lba & 0xFFFFFFFF, count & 0xFFFF)
    return struct.pack(">BBQIxx", 0x91, 0, lba, count)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    cdb = draw(cdbs())
    size = draw(st.one_of(st.integers(0, 9).map(lambda n: n * 512), st.integers(0, 9000)))
    write = cdb[0] & 0x0F in (0x0A,)
    direction = draw(st.sampled_from([WRITE_TYPE if write else READ_TYPE] * 4 + [WRITE_TYPE, READ_TYPE, UNKNOWN_TYPE]))
    start = draw(st.one_of(st.just(0), st.integers(0, 4100)))
    numbers = st.lists(st.one_of(st.integers(100, 110), st.sampled_from([255, 256, 2**52, 2**64 - 1])), max_size=4)
    pages = draw(st.one_of(st.just(list(PAGES[:4])), st.just([120, 121, 122, 123]), numbers))
    kind = draw(st.sampled_from([PACKET_GPA_DIRECT] * 6 + [PACKET_INBAND]))
    said = size if draw(st.booleans()) else draw(st.integers(0, 9000))
    _, flags, number, _, payload = scsi_packet(
        draw(st.integers(0, 2**64 - 1)),
        cdb,
        said,
        direction,
        (),
        lun=draw(st.sampled_from([0, 0, 0, 1, 2])),
        target=draw(st.sampled_from([0, 0, 0, 0, 1])),
        body=draw(st.sampled_from([0x34, 0x34, 0x24, 0x3C, 0x1C])),
        cdb_length=draw(st.sampled_from([len(cdb)] * 5 + [0, 1, 6, 9, 10, 16, 17])),
    )
    header = gpa_range(size, start, pages, draw(st.sampled_from([1] * 8 + [0, 2])))
    if kind == PACKET_INBAND:
        header = b""
    if draw(st.integers(0, 19)) == 0:
        flags = 0
    changed = bytearray(payload)
    if draw(st.integers(0, 9)) == 0:
        changed[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
    return kind, flags, number, header, bytes(changed)


@settings(max_examples=int(os.environ.get("PYVMM_EXAMPLES", "60")), deadline=None)
@given(st.lists(packets(), min_size=1, max_size=8))
def test_any_packets_do_the_same_on_both_ways(sequence: list[Packet]) -> None:
    python, fast = Twin(False), Twin(True)
    for packet in sequence:
        assert fast.answer(packet) == python.answer(packet)
    assert fast.state() == python.state()


def taken_by_c(twin: Twin, lun: int = 0) -> bool:
    """Whether C serves a read now."""
    engine = twin.end.device.engine
    assert engine is not None
    before = engine.inspect()["packets_in"]
    StorVsc(twin.end, PAGES).read(read10(0, 1), 512, lun)
    return engine.inspect()["packets_in"] > before


def test_python_serves_reads_while_their_answer_depends_on_more_than_the_disk() -> None:
    twin = Twin(True)
    target = twin.vsp._commands.luns[0].target
    assert isinstance(target, Target)
    driver = StorVsc(twin.end, PAGES)
    assert taken_by_c(twin)
    target.attend(CAPACITY_CHANGED)
    assert not taken_by_c(twin)  # that one was told of it
    assert taken_by_c(twin)
    caching = struct.pack(">BBBBBB17x", 0, 0, 0, 0, 0x08, 18)
    select = bytes((0x15, 0x10, 0, 0, len(caching) + 1, 0))
    assert driver.write(select, caching + b"\0").srb_status == 1
    assert not taken_by_c(twin)
    assert driver.write(select, caching[:6] + b"\4" + caching[7:] + b"\0").srb_status == 1
    assert taken_by_c(twin)
    reserve_out = struct.Struct(">BBBxxIx")
    keys = struct.pack(">QQ8x", 0, 7)
    assert driver.write(reserve_out.pack(0x5F, 0, 0, 24), keys).srb_status == 1
    assert taken_by_c(twin)
    assert driver.write(reserve_out.pack(0x5F, 1, 1, 24), struct.pack(">Q16x", 7)).srb_status == 1
    assert not taken_by_c(twin)
    assert driver.write(reserve_out.pack(0x5F, 3, 0, 24), struct.pack(">Q16x", 7)).srb_status == 1
    assert taken_by_c(twin)


def test_disks_that_come_and_go_are_served_and_left_by_c() -> None:
    twin = Twin(True)
    assert twin.vsp.remove_disk(0) is twin.disks[0]
    assert not taken_by_c(twin)
    twin.vsp.add_disk(0, twin.disks[0])
    assert taken_by_c(twin)
    assert twin.vsp.inspect()["luns"]["0"]["reads"] == 1
    twin.vsp.add_disk(5, twin.disks[1], Limits(iops=10**6))
    assert not taken_by_c(twin, 5)


def test_while_requests_are_traced_python_serves_them() -> None:
    bus = LoopbackBus(GuestMemory(1 << 20))
    bus.tracer = Tracer(["storvsp"], io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryDisk, "by_c", True)
        vsp = StorVsp(0, {0: MemoryDisk(512)}, make_lane=InlineLane)
    vsp.attached(cast("VmBus", bus), ())
    end = Loopback(vsp, bus.memory)
    StorVsc(end, PAGES).initialize()
    assert end.device.engine is None


def test_the_fast_way_is_taken_by_what_drivers_send() -> None:
    # Otherwise the test above would compare Python with itself.
    twin = Twin(True)
    driver = StorVsc(twin.end, PAGES)
    assert driver.write(write10(8, 8), b"x" * 4096, offset=99).srb_status == 1
    assert driver.read(read10(8, 8), 4096, offset=7).data == b"x" * 4096
    assert driver.command(FLUSH).srb_status == 1
    assert twin.end.device.engine is not None
    assert twin.end.device.engine.inspect()["packets_in"] == 3
    found = twin.vsp.inspect()["luns"]["0"]
    assert (found["commands"], found["reads"], found["writes"], found["flushes"]) == (3, 1, 1, 1)
    assert (found["bytes_read"], found["bytes_written"]) == (4096, 4096)
    assert {kind: sum(buckets.values()) for kind, buckets in found["latency_us"].items()} == {
        "read": 1,
        "write": 1,
        "flush": 1,
    }


# The host's errors ----------------------------------------------------------------------------------------


def image_rig(make: Any, path: Path, size: int) -> tuple[StorVsc, Rig]:
    with path.open("wb") as file:
        file.truncate(size)
    disk = open_image(str(path))
    assert disk.fast is not None
    rig = make({0: disk})
    rig.driver.initialize()
    return rig.driver, rig


def test_an_image_truncated_underneath_is_a_medium_error(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    driver, rig = image_rig(make, path, 1 << 20)
    os.truncate(path, 4096)
    assert driver.read(read10(0, 8), 4096).srb_status == 1
    assert driver.read(read10(8, 8), 4096).code == (3, 0x11, 0)
    found = rig.vsp.inspect()["luns"]["0"]
    assert (found["commands"], found["reads"], found["errors"]) == (2, 1, 1)
    os.truncate(path, 1 << 20)
    assert driver.read(read10(8, 8), 4096).srb_status == 1


def test_a_write_that_the_host_refuses_is_a_write_error(make: Any, tmp_path: Path) -> None:
    driver, _ = image_rig(make, tmp_path / "disk.img", 1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        assert driver.write(write10(8, 16), bytes(8192)).code == (3, 0x0C, 0)
        assert driver.write(write10(64, 1, 8), bytes(512)).code == (3, 0x0C, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert driver.write(write10(8, 16), bytes(8192)).srb_status == 1


# With the bus ---------------------------------------------------------------------------------------------


class PipeDisk(MemoryDisk):
    """A disk whose reads of one sector, by C, last until `let_go` ends one of them."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.source, self.sink = os.pipe()
        self.fast = FastDisk(self.source, self.size, 512, True)

    def let_go(self) -> None:
        os.write(self.sink, b"p" * 512)

    def release(self) -> None:
        os.close(self.source)
        os.close(self.sink)


@pytest.fixture(name="pipe")
def make_pipe() -> Iterator[PipeDisk]:
    disk = PipeDisk()
    yield disk
    disk.release()


def reading(rig: Rig) -> int:
    """Have a read under way; return its id."""
    number = rig.driver.start(read10(0, 1), 512, READ_TYPE)
    engine = engine_of(rig)
    while engine.inspect()["packets_in"] == 0:
        pass
    return number


def engine_of(rig: Rig) -> Any:
    (channel,) = rig.vsp._channels.values()
    assert channel.engine is not None
    return channel.engine


def held_until(pipe: PipeDisk, action: Any) -> None:
    """`action` does not end before the read under way does, and then it does."""
    ended = threading.Event()

    def work() -> None:
        action()
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert not ended.wait(0.05)
    pipe.let_go()
    thread.join(30)
    assert ended.is_set()


def test_a_pause_waits_for_what_is_under_way_and_loses_nothing(make: Any, pipe: PipeDisk) -> None:
    rig = make({0: pipe})
    rig.driver.initialize()
    number = reading(rig)
    held_until(pipe, rig.bus.pause)
    rig.bus.resume()
    assert rig.driver.finish(number, 512).data == b"p" * 512


def test_what_failed_before_a_pause_is_answered_before_it_ends(make: Any, pipe: PipeDisk) -> None:
    rig = make({0: pipe})
    rig.driver.initialize()
    number = reading(rig)
    pipe.data[:512] = b"m" * 512
    os.write(pipe.sink, b"short")
    rig.bus.pause()
    assert rig.vsp.inspect()["in_flight"] == 0
    rig.bus.resume()
    assert rig.driver.finish(number, 512).data == b"m" * 512  # by Python, which knows no pipe


def test_closing_a_channel_waits_for_what_is_under_way(make: Any, pipe: PipeDisk) -> None:
    rig = make({0: pipe})
    rig.driver.initialize()
    reading(rig)
    held_until(pipe, channel_of(rig.driver).close)


def test_a_reset_of_the_vm_waits_for_what_is_under_way(make: Any, pipe: PipeDisk) -> None:
    rig = make({0: pipe})
    rig.driver.initialize()
    reading(rig)
    held_until(pipe, rig.bus.reset)


def test_removing_a_disk_waits_for_what_is_under_way(make: Any, pipe: PipeDisk) -> None:
    rig = make({0: pipe})
    rig.driver.initialize()
    number = reading(rig)
    held_until(pipe, lambda: rig.vsp.remove_disk(0))
    assert rig.driver.finish(number, 512).data == b"p" * 512


def test_a_bus_reset_is_answered_after_what_is_under_way(make: Any, pipe: PipeDisk) -> None:
    rig = make({0: pipe})
    rig.driver.initialize()
    number = reading(rig)
    reset = rig.driver.submit(PACKET_INBAND, b"", struct.pack("<III", 6, 1, 0) + bytes(0x34))
    pipe.let_go()
    order: list[int] = []
    while len(order) < 2:
        order += [packet[2] for packet in channel_of(rig.driver).receive()]
    assert order == [number, reset]


def test_commands_for_python_overtake_what_is_under_way(make: Any, pipe: PipeDisk) -> None:
    rig = make({0: pipe})
    rig.driver.initialize()
    number = reading(rig)
    assert rig.driver.command(bytes(6)).srb_status == 1
    pipe.let_go()
    assert rig.driver.finish(number).srb_status == 1


def test_a_retargeted_channel_signals_the_other_vp(make: Any) -> None:
    disk = MemoryDisk(1 << 20)
    rig = make({0: disk})
    rig.driver.initialize()
    (channel,) = rig.vsp._channels.values()
    aimed: list[int] = []
    cast("Any", channel)._aim = lambda channel, engine: aimed.append(channel.target_vp)
    channel.use_engine(channel.make_engine(StorageQueue))
    channel.retarget(3)
    assert aimed == [0, 3]


def test_counts_of_a_channel_include_what_its_engine_did(make: Any, tmp_path: Path) -> None:
    driver, rig = image_rig(make, tmp_path / "disk.img", 1 << 20)
    (before,) = rig.bus.inspect()["channels"]
    for _ in range(10):
        assert driver.read(read10(0, 8), 4096).srb_status == 1
    (after,) = rig.bus.inspect()["channels"]
    assert after["engine"] == "io_uring"
    assert after["packets_in"] - before["packets_in"] == after["packets_out"] - before["packets_out"] == 10
    assert engine_of(rig).inspect()["packets_in"] == 10
    channel_of(driver).close()
    assert rig.vsp.inspect()["luns"]["0"]["reads"] == 10
