"""The NIC's fast path by itself: its rings and signals, control messages, settings that change, and what is saved."""

from __future__ import annotations

import os
import select
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from devices.vmbus.packets import (
    COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_TRANSFER_PAGES,
)
from pyvmm.core._hot import NetQueue, SynIC
from pyvmm.core.memory import PAGE_SIZE
from tests.fakes import frames
from tests.fakes.net_rig import (
    BUFFER_ID,
    COMPLETE,
    DIRECTED,
    MAC,
    NO_SECTION,
    PROMISCUOUS,
    RNDIS,
    SECTION,
    SUCCESS,
    Queue,
    Rig,
    frame_of,
    readable,
    rndis,
    small_rig,
)
from tests.fakes.ring import MASK, OUT

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(name="rig")
def make_rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


# Rings ----------------------------------------------------------------------------------------------------


def test_one_signal_a_batch_and_none_while_the_guest_reads(rig: Rig) -> None:
    for section in range(8):
        rig.send(rndis(frame_of(60)), section=section)
    rig.queue.run()
    assert rig.queue.signals == 1
    assert len(rig.statuses()) == 8
    rig.queue.to_guest.set_word(MASK, 1)
    rig.send(rndis(frame_of(60)))
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert rig.queue.signals == 1
    assert rig.queue.engine.inspect() == {"packets_in": 9, "packets_out": 10, "signals": 1}
    assert rig.queue.engine.name == "direct"


def test_the_guest_is_signalled_without_python_once_there_is_a_target(rig: Rig) -> None:
    synic = SynIC(rig.memory.hot, -1, 0, 0)
    for msr, value in ((0x40000080, 1), (0x40000082, 40 * PAGE_SIZE | 1), (0x40000092, 0x31)):
        assert synic.write_msr(msr, value, 0)
    rig.queue.engine.set_target(synic, 2, 9)
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert rig.queue.signals == 0
    assert synic.take_interrupts() == [0x31]
    assert rig.queue.engine.inspect()["signals"] == 1
    for bad in ((synic, 16, 0), (synic, 2, 2048)):
        with pytest.raises(ValueError, match="no event flag"):
            rig.queue.engine.set_target(*bad)


def test_the_ring_is_left_unmasked_when_there_is_nothing_to_do(rig: Rig) -> None:
    rig.send(rndis(frame_of(60)))
    assert rig.queue.to_host.word(MASK) == 1
    rig.queue.run()
    assert rig.queue.to_host.word(MASK) == 0


def test_what_a_full_ring_has_no_room_for_goes_to_python_in_order() -> None:
    rig = Rig(ring_pages=2)
    expected: list[bytes] = []
    completed: list[int] = []
    while True:
        number = rig.send(rndis(frame_of(60)))
        rig.arrive(frame_of(60, len(expected)))
        expected.append(frame_of(60, len(expected)))
        completed.append(number)
        _, unsent = rig.queue.run()
        rig.sent()
        if unsent:
            break
    packets = rig.queue.take() + unsent
    assert [number for kind, _, number, _, _ in packets if kind == PACKET_COMPLETION] == completed
    seen = []
    for kind, flags, _, header, payload in packets:
        if kind != PACKET_TRANSFER_PAGES:
            continue
        assert flags == COMPLETION_REQUESTED
        assert len(payload) == 28 or payload[28:] == bytes(len(payload) - 28)
        size, offset = struct.unpack_from("<II", header, 8)
        seen.append(rig.read_section(offset, size)[112:])
    assert seen + [frame for frame in expected if frame not in seen] == expected
    for kind, _, number, _, _ in packets:
        if kind == PACKET_TRANSFER_PAGES:
            rig.give_back(number)
    assert rig.queue.run() == (0, [])
    rig.close()


def test_a_read_index_that_is_none_gives_what_is_to_be_sent_to_python(rig: Rig) -> None:
    rig.send(rndis(frame_of(60)))
    rig.queue.to_guest.set_word(OUT, 12)
    left, unsent = rig.queue.run()
    assert left == 0
    assert [packet[0] for packet in unsent] == [PACKET_COMPLETION]


@pytest.mark.parametrize("index", [4, 1 << 20, 0xFFFFFFF8])
def test_a_write_index_that_is_none_is_pythons_to_name(rig: Rig, index: int) -> None:
    rig.queue.to_host.set_word(0, index)
    assert rig.queue.run() == (1, [])


def test_messages_are_as_long_as_the_protocols_version_has_them(rig: Rig) -> None:
    assert rig.device.message_size == 28
    rig.device.message_size = 40
    rig.send(rndis(frame_of(60)))
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert [len(packet[4]) for packet in rig.queue.take()] == [40, 40]
    for bad in (15, 41, -1):
        with pytest.raises((ValueError, OverflowError)):
            rig.device.message_size = bad


# Control messages -----------------------------------------------------------------------------------------


def controls_of(rig: Rig, complete: bool = True) -> list[bytes]:
    found = []
    for kind, _, number, header, payload in rig.queue.take():
        assert kind == PACKET_TRANSFER_PAGES
        assert struct.unpack_from("<III", payload) == (RNDIS, 1, NO_SECTION)
        assert struct.unpack_from("<HxxI", header) == (BUFFER_ID, 1)
        size, offset = struct.unpack_from("<II", header, 8)
        assert offset < 16 * SECTION
        found.append(rig.read_section(offset, size))
        if complete:
            rig.give_back(number)
    return found


def test_control_messages_wait_for_their_sections_in_order(rig: Rig) -> None:
    rig.queue.run()
    messages = [b"control %d" % number for number in range(80)]
    assert [rig.queue.engine.send_control(message) for message in messages] == [True] * 64 + [False] * 16
    assert readable(rig.queue.doorbell)
    rig.queue.run()
    found = controls_of(rig)
    assert len(found) == 16
    while len(found) < 64:
        rig.queue.run()
        found += controls_of(rig)
    assert found == messages[:64]
    assert rig.queue.engine.send_control(b"x" * SECTION)
    assert not rig.queue.engine.send_control(b"x" * (SECTION + 1))
    assert not rig.queue.engine.send_control(b"")


def test_data_never_uses_the_sections_of_control_messages() -> None:
    rig = small_rig()
    for at in range(6):
        rig.arrive(frame_of(100, at))
    assert rig.queue.engine.send_control(b"hello")
    rig.queue.run()
    packets = rig.queue.take()
    offsets = [struct.unpack_from("<I", packet[3], 12 + 8 * at)[0] for packet in packets[1:] for at in range(4)]
    assert sorted(offsets) == [SECTION * at for at in range(16, 20)]
    rig.close()


def test_control_messages_need_no_link_and_no_filter() -> None:
    rig = Rig(connect=False)
    rig.device.set_filter(0, MAC)
    assert rig.queue.engine.send_control(b"hello")
    rig.queue.run()
    assert controls_of(rig) == [b"hello"]
    rig.device.set_receive_buffer(None)
    assert not rig.queue.engine.send_control(b"hello")
    rig.close()


def test_control_messages_for_a_receive_buffer_are_not_put_into_another(rig: Rig) -> None:
    for _ in range(20):
        assert rig.queue.engine.send_control(b"x" * SECTION)
    rig.device.set_receive_buffer([(512 * PAGE_SIZE, 17 * 1280)], BUFFER_ID, 1280)
    rig.queue.run()
    assert rig.queue.take() == []


# Life -----------------------------------------------------------------------------------------------------


def test_a_new_queue_takes_the_place_of_the_channels_one_before(rig: Rig) -> None:
    old = rig.queue
    new = Queue(rig, 0, 5)
    rig.arrive(frame_of(60))
    assert old.run() == (0, [])
    assert readable(rig.end.fileno())
    new.run()
    rig.queue = rig.queues[0] = new
    assert len(rig.received()) == 1
    old.close()


def test_nobody_touches_the_rings_after_quiesce_until_the_next_serve(rig: Rig) -> None:
    rig.queue.run()
    assert rig.queue.engine.quiesce() == ([], [])
    rig.arrive(frame_of(60))
    rig.device.set_filter(DIRECTED | PROMISCUOUS, MAC)
    assert rig.queue.engine.send_control(b"hello")
    assert not readable(rig.queue.doorbell)
    assert rig.queue.take() == []
    rig.queue.run()
    assert len(rig.queue.take()) == 2


def test_a_saved_nic_knows_what_the_guest_holds() -> None:
    rig, other = small_rig(), small_rig()
    for at in range(3):
        rig.arrive(frame_of(60, at))
        rig.queue.run()
    held = [packet[2] for packet in rig.queue.take()]
    for number in range(18):
        assert rig.queue.engine.send_control(b"control %d" % number)
    rig.queue.run()
    rig.queue.take()
    rig.queue.engine.quiesce()
    state = rig.device.save()
    assert len(state["held"]) == 19
    other.device.restore(state)
    assert other.device.save() == state
    # One section is free; the guest gives the others back under the numbers that it knows.
    for at in range(4):
        other.arrive(frame_of(60, at))
    other.queue.run()
    assert len(other.received(complete=False)) == 1
    for number in held:
        other.give_back(number)
    assert other.queue.run() == (0, [])
    assert len(other.received(complete=False)) == 3
    for rig_ in (rig, other):
        rig_.close()


def test_frames_of_a_coalesced_one_are_saved_in_order(rig: Rig) -> None:
    rig.device.set_offloads(0x20)
    frame = frames.packet4(frames.tcp(bytes(9000), source="10.0.0.1", to="10.0.0.2"), frames.TCP)
    made = frames.partial(frame, 1448)
    rig.arrive(made[10:], made[:10])
    rig.queue.run()
    ((_, chain),) = rig.device.save()["held"]
    (packet,) = rig.queue.take()
    assert [SECTION * at for at in chain] == [struct.unpack_from("<I", packet[3], 12 + 8 * at)[0] for at in range(6)]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"generation": 1, "held": [(0, [99])], "controls": []},
        {"generation": 1, "held": [(0, [17]), (0, [17])], "controls": []},
        {"generation": 1, "held": [(64, [17])], "controls": []},
        {"generation": 1, "held": [(0, [])], "controls": []},
        {"generation": 1, "held": [], "controls": ["text"]},
        {"generation": "1", "held": [], "controls": []},
        {"generation": 1, "held": [5], "controls": []},
    ],
)
def test_a_damaged_state_is_refused(state: dict[str, object]) -> None:
    rig = small_rig()
    with pytest.raises(ValueError, match="damaged"):
        rig.device.restore(state)
    rig.close()


def test_the_port_can_be_changed_while_frames_move() -> None:
    rig = Rig(ring_pages=9)
    other = Rig(ring_pages=9)
    ends = [rig.end.fileno(), -1, other.end.fileno()]
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            rig.queue.engine.serve()

    worker = threading.Thread(target=work)
    worker.start()
    completed = 0
    try:
        for round_ in range(300):
            rig.device.set_port(ends[round_ % 3])
            sent = 0
            for section in range(8):
                sent += bool(rig.send(rndis(frame_of(60)), section=section))
            while sent:
                done = rig.statuses()
                sent -= len(done)
                completed += len(done)
                rig.sent()
                other.sent()
    finally:
        stop.set()
        worker.join()
    assert completed == 2400
    assert rig.device.statistics()["sent_frames"] + rig.device.statistics()["sent_unplugged"] == 2400
    rig.close()
    other.close()


def test_a_file_that_cannot_be_watched_is_refused(rig: Rig, tmp_path: object) -> None:
    fd = os.memfd_create("file")
    with pytest.raises(PermissionError):
        rig.device.set_port(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        rig.device.set_port(fd)
    rig.device.set_port(rig.end.fileno())
    rig.arrive(frame_of(60))
    rig.queue.run()
    assert len(rig.received()) == 1


def test_there_are_no_more_than_64_channels(rig: Rig) -> None:
    with pytest.raises(ValueError, match="no channel 64"):
        NetQueue(rig.device, 64, rig.memory.hot, *rig.queue.rings, rig.queue.doorbell)


def test_completions_say_how_the_message_was(rig: Rig) -> None:
    rig.send(rndis(frame_of(60)))
    rig.queue.run()
    ((_, _, _, header, payload),) = rig.queue.take()
    assert header == b""
    assert payload[:28] == struct.pack("<II20x", COMPLETE, SUCCESS)


def test_channels_on_threads_of_their_own_lose_nothing_and_keep_the_order_of_connections() -> None:
    rig = Rig(queues=3, ring_pages=9)
    rig.device.set_rss(bytes(range(1, 41)), [0, 1, 2, 1], 0x200)
    stop = threading.Event()

    def work(queue: Queue) -> None:
        while not stop.is_set():
            idle, _, _, unsent, _ = queue.engine.serve()
            assert not unsent
            if idle and select.select([queue.doorbell, queue.engine.event], [], [], 5)[0]:
                with suppress(BlockingIOError):
                    os.eventfd_read(queue.doorbell)

    workers = [threading.Thread(target=work, args=(queue,)) for queue in rig.queues]
    for worker in workers:
        worker.start()
    seen: dict[int, list[int]] = {}
    completed = sent = arrived = 0
    try:
        for round_ in range(200):
            for connection in range(6):
                packet = frames.tcp(b"", source="10.0.0.1", to="10.0.0.2", ports=(connection, 80), sequence=round_)
                rig.arrive(frames.packet4(packet, frames.TCP))
                arrived += 1
            for index in range(3):
                rig.send(rndis(frame_of(60)), section=index, queue=index)
                os.eventfd_write(rig.queues[index].doorbell, 1)
                sent += 1
            while completed < sent or sum(map(len, seen.values())) < arrived:
                for index, queue in enumerate(rig.queues):
                    for kind, _, number, header, payload in queue.take():
                        if kind == PACKET_COMPLETION:
                            assert struct.unpack_from("<II", payload) == (COMPLETE, SUCCESS)
                            completed += 1
                            continue
                        for at in range(8, len(header), 8):
                            size, offset = struct.unpack_from("<II", header, at)
                            data = rig.read_section(offset, size)[112:]
                            port, sequence = struct.unpack_from(">HxxI", data, 34)
                            seen.setdefault(port, []).append(sequence)
                        rig.give_back(number, index)
                        os.eventfd_write(queue.doorbell, 1)
            if round_ % 50 == 49:
                rig.device.set_filter(PROMISCUOUS | DIRECTED, MAC)
                rig.device.set_frame_size(1514)
                assert len(rig.sent()) == 150
    finally:
        stop.set()
        for queue, worker in zip(rig.queues, workers, strict=True):
            os.eventfd_write(queue.doorbell, 1)
            worker.join()
    assert seen == {connection: list(range(200)) for connection in range(6)}
    assert all(queue.engine.inspect()["packets_out"] > 200 for queue in rig.queues)
    rig.close()
