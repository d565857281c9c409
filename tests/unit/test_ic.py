from __future__ import annotations

import json
import struct
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.synthetic.ic.component import IntegrationComponent
from devices.synthetic.ic.heartbeat import Heartbeat
from devices.synthetic.ic.shutdown import Shutdown, ShutdownResult
from devices.synthetic.ic.timesync import TimeSync
from devices.vmbus.packets import ChannelViolation, completion, inband
from tests.fakes.board import ManualClock, ManualTimers
from tests.fakes.ic_guest import IcGuest, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.vmbus.bus import VmBus
    from pyvmm.core.worker import Worker

SECOND = 1_000_000_000
SHUTDOWN_VERSIONS = [(3, 2), (3, 1), (3, 0), (1, 0)]
HEARTBEAT_VERSIONS = [(3, 0), (1, 0)]
TIMESYNC_VERSIONS = [(4, 0), (3, 0), (1, 0)]


class _Timer:
    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class FakeWorker(ManualTimers):
    """A worker whose time is moved by hand; its timers can be cancelled."""

    def call_at(self, deadline_ns: int, action: Callable[[], None]) -> Any:
        timer = _Timer(action)
        super().call_at(deadline_ns, lambda: timer.action and timer.action())
        return timer


class Host:
    """The three components on one worker."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.worker = FakeWorker(self.clock)
        self.heartbeat = Heartbeat(self.clock)
        self.shutdown = Shutdown(self.clock, self.heartbeat)
        self.timesync = TimeSync(self.clock, lambda: self.clock.now_ns() // 100, self.heartbeat)
        assert [component.worker_count for component in self.components()] == [0, 1, 0]
        self.heartbeat.attached(cast("VmBus", None), [cast("Worker", self.worker)])
        for component in self.components():
            component.reset()

    def components(self) -> list[IntegrationComponent]:
        return [self.shutdown, self.heartbeat, self.timesync]

    def advance(self, seconds: float, *guests: IcGuest) -> None:
        """Let time pass in steps of half a second, with these guests answering."""
        for _ in range(int(seconds * 2)):
            self.worker.advance(SECOND // 2)
            for guest in guests:
                guest.serve()


@pytest.fixture
def host() -> Host:
    return Host()


def connected(component: IntegrationComponent, versions: list[tuple[int, int]], status: int = 0) -> IcGuest:
    guest = IcGuest(component, versions, status=status)
    guest.open()
    guest.serve()
    return guest


def ask(shutdown: Shutdown, guest: IcGuest, **options: Any) -> ShutdownResult:
    """Make a request that the guest answers at once."""
    guest.channel.on_sent = guest.serve
    result = shutdown.request(timeout_s=0, **options)
    guest.channel.on_sent = lambda: None
    return result


# Negotiation.


def test_opening_offers_all_versions(host: Host) -> None:
    for component, versions in (
        (host.shutdown, SHUTDOWN_VERSIONS),
        (host.heartbeat, HEARTBEAT_VERSIONS),
        (host.timesync, TIMESYNC_VERSIONS),
    ):
        guest = IcGuest(component, versions)
        guest.open()
        (offer,) = guest.take()
        assert (offer.type, offer.flags, offer.status) == (0, 3, 0)
        assert offer.offered() == ([(1, 0), (3, 0)], sorted(versions))


@pytest.mark.parametrize("version", SHUTDOWN_VERSIONS)
@pytest.mark.parametrize("framework", [(1, 0), (3, 0)])
def test_each_version_shuts_down(host: Host, version: tuple[int, int], framework: tuple[int, int]) -> None:
    guest = IcGuest(host.shutdown, [version], [framework])
    guest.open()
    guest.serve()
    assert ask(host.shutdown, guest).accepted
    message = guest.received[-1]
    assert (message.framework, message.version, message.type, message.flags) == (framework, version, 3, 3)


def test_a_guest_without_a_common_version_is_left_alone(host: Host) -> None:
    guest = connected(host.heartbeat, [(9, 9)])
    host.advance(20, guest)
    assert len(guest.received) == 1
    assert host.heartbeat.status == "no-contact"
    shutdown_guest = connected(host.shutdown, [(9, 9)])
    assert host.shutdown.request().outcome == "no-driver"
    assert len(shutdown_guest.received) == 1


def test_reopening_negotiates_anew(host: Host) -> None:
    guest = connected(host.timesync, [(4, 0)])
    guest.close()
    assert host.timesync.inspect()["message_version"] is None
    guest.versions = [(1, 0)]
    guest.open()
    guest.serve()
    assert host.timesync.inspect()["message_version"] == "1.0"
    assert guest.received[-1].body[24] == 1  # a sync again


# Shutdown.


@pytest.mark.parametrize(
    ("restart", "force", "flags"), [(False, True, 1), (True, True, 3), (False, False, 0), (True, False, 2)]
)
def test_shutdown_request_tells_what_is_wanted(host: Host, restart: bool, force: bool, flags: int) -> None:
    guest = connected(host.shutdown, SHUTDOWN_VERSIONS)
    assert ask(host.shutdown, guest, restart=restart, force=force) == ("accepted", 0)
    message = guest.received[-1]
    assert struct.unpack_from("<III", message.body) == (0x80000000, 0, flags)
    assert len(message.body) == 12 + 2048  # Linux drops a shorter one


def test_a_refusal_comes_back_with_its_status(host: Host) -> None:
    guest = connected(host.shutdown, SHUTDOWN_VERSIONS, status=0x80004005)
    result = ask(host.shutdown, guest)
    assert (result.outcome, result.status, result.accepted) == ("refused", 0x80004005, False)
    assert str(result) == "refused: failed (0x80004005)"


def test_without_a_driver_shutdown_says_so_at_once(host: Host) -> None:
    assert host.shutdown.request(timeout_s=1000).outcome == "no-driver"
    IcGuest(host.shutdown, SHUTDOWN_VERSIONS).open()
    assert host.shutdown.request(timeout_s=1000).outcome == "no-driver"  # still negotiating


def test_a_silent_guest_does_not_hold_the_caller(host: Host) -> None:
    guest = connected(host.shutdown, SHUTDOWN_VERSIONS)
    assert host.shutdown.request(timeout_s=0).outcome == "no-answer"
    late = guest.take()[0]
    assert host.shutdown.request(timeout_s=0).outcome == "no-answer"
    guest.answer(late)  # must not count for the second request, nor for the next
    assert host.shutdown.inspect()["unexpected_messages"] == 1
    assert ask(host.shutdown, guest).accepted


def test_a_full_ring_is_no_answer(host: Host) -> None:
    guest = connected(host.shutdown, SHUTDOWN_VERSIONS)
    guest.channel.room = 0
    assert host.shutdown.request(timeout_s=1000).outcome == "no-answer"


def in_background(host: Host, guest: IcGuest) -> tuple[threading.Thread, list[ShutdownResult]]:
    """Start a request and return once it is sent."""
    results: list[ShutdownResult] = []
    sent = threading.Event()
    guest.channel.on_sent = sent.set
    thread = threading.Thread(target=lambda: results.append(host.shutdown.request(timeout_s=60)))
    thread.start()
    assert sent.wait(60)
    guest.channel.on_sent = lambda: None
    return thread, results


def test_a_waiting_request_is_answered_from_the_worker_and_others_are_busy(host: Host) -> None:
    guest = connected(host.shutdown, SHUTDOWN_VERSIONS)
    thread, results = in_background(host, guest)
    assert host.shutdown.request().outcome == "busy"
    guest.serve()
    thread.join(60)
    assert results == [("accepted", 0)]


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_a_guest_that_leaves_ends_the_wait(host: Host, leave: str) -> None:
    guest = connected(host.shutdown, SHUTDOWN_VERSIONS)
    thread, results = in_background(host, guest)
    guest.close() if leave == "close" else host.shutdown.reset()
    thread.join(60)
    assert results == [("disconnected", None)]


# Heartbeat.


@pytest.mark.parametrize("version", HEARTBEAT_VERSIONS)
def test_heartbeat_asks_every_two_seconds_in_sequence(host: Host, version: tuple[int, int]) -> None:
    assert host.heartbeat.status == "no-contact"
    guest = connected(host.heartbeat, [version])
    assert host.heartbeat.status == "ok"
    host.advance(10, guest)
    beats = [message for message in guest.received if message.type == 1]
    assert [struct.unpack_from("<Q", beat.body)[0] for beat in beats] == [0, 1, 2, 3, 4, 5]
    assert {beat.version for beat in beats} == {version}


def test_heartbeat_is_lost_after_five_beats_and_found_again(host: Host) -> None:
    guest = connected(host.heartbeat, HEARTBEAT_VERSIONS)
    host.advance(11)
    assert host.heartbeat.status == "ok"
    host.advance(1)
    assert host.heartbeat.status == "lost-communication"
    host.advance(100)
    assert len(guest.channel.sent) == 1  # one unanswered beat at most
    guest.serve()
    assert host.heartbeat.status == "ok"


def test_heartbeat_with_wrong_sequence_counts_as_missed(host: Host) -> None:
    guest = connected(host.heartbeat, HEARTBEAT_VERSIONS)
    for _ in range(5):
        host.advance(2)
        (beat,) = guest.take()
        guest.reply(beat, beat.body)  # sequence not raised
    assert host.heartbeat.status == "lost-communication"


def test_a_guest_that_never_counts_right_is_never_in_contact(host: Host) -> None:
    guest = IcGuest(host.heartbeat, HEARTBEAT_VERSIONS)
    guest.open()
    guest.answer(guest.take()[0])
    guest.reply(beat := guest.take()[0], beat.body)
    assert host.heartbeat.status == "no-contact"


def test_state_of_the_guests_programs_is_shown(host: Host) -> None:
    guest = connected(host.heartbeat, HEARTBEAT_VERSIONS)
    host.advance(2)
    (beat,) = guest.take()
    guest.reply(beat, struct.pack("<QII", struct.unpack_from("<Q", beat.body)[0] + 1, 2, 0))
    assert host.heartbeat.inspect()["applications"] == "critical"


def test_closing_the_channel_ends_contact(host: Host) -> None:
    guest = connected(host.heartbeat, HEARTBEAT_VERSIONS)
    guest.close()
    assert host.heartbeat.status == "no-contact"
    host.advance(30)
    assert guest.channel.sent == []


def test_a_pause_does_not_count_as_silence(host: Host) -> None:
    guest = connected(host.heartbeat, HEARTBEAT_VERSIONS)
    host.heartbeat.pause()
    host.advance(3600)
    assert guest.channel.sent == []
    host.heartbeat.resume()
    host.advance(10, guest)
    assert host.heartbeat.status == "ok"
    assert host.heartbeat.inspect()["sequence"] == 6


# Time synchronisation.


def utc_of(message: Message) -> float:
    parent_time: int = struct.unpack_from("<Q", message.body)[0]
    return (parent_time - 116444736000000000) / 1e7


def times(guest: IcGuest) -> list[Message]:
    return [message for message in guest.received if message.type == 4]


def test_version_4_carries_reference_time(host: Host) -> None:
    guest = connected(host.timesync, TIMESYNC_VERSIONS)
    host.advance(15, guest)
    messages = times(guest)
    assert [message.body[16] for message in messages] == [1, 2, 2, 2]
    assert [utc_of(message) for message in messages] == [1_600_000_000 + 5 * n for n in range(4)]
    assert [struct.unpack_from("<Q", message.body, 8)[0] for message in messages] == [
        10_000_000 + 50_000_000 * n for n in range(4)
    ]
    assert {len(message.body) for message in messages} == {24}


@pytest.mark.parametrize("version", [(3, 0), (1, 0)])
def test_older_versions_carry_host_time_alone(host: Host, version: tuple[int, int]) -> None:
    guest = connected(host.timesync, [version])
    host.advance(5, guest)
    messages = times(guest)
    assert [message.body[24] for message in messages] == [1, 2]
    assert [message.body[8:24] for message in messages] == [bytes(16)] * 2
    assert [utc_of(message) for message in messages] == [1_600_000_000, 1_600_000_005]


def test_resuming_syncs_at_once(host: Host) -> None:
    guest = connected(host.timesync, TIMESYNC_VERSIONS)
    host.timesync.pause()
    host.advance(3600)
    assert guest.channel.sent == []
    host.timesync.resume()
    host.worker.advance(0)
    guest.serve()
    assert times(guest)[-1].body[16] == 1
    assert utc_of(times(guest)[-1]) == 1_600_003_600
    host.advance(5, guest)
    assert times(guest)[-1].body[16] == 2


def test_resuming_syncs_a_guest_that_owes_an_answer(host: Host) -> None:
    guest = connected(host.timesync, TIMESYNC_VERSIONS)
    host.advance(5)
    host.timesync.pause()
    host.timesync.resume()
    host.worker.advance(0)
    assert [message.body[16] for message in guest.take()] == [2, 1]


def test_a_silent_guest_is_sent_one_sample(host: Host) -> None:
    guest = connected(host.timesync, TIMESYNC_VERSIONS)
    host.advance(600)
    assert len(guest.channel.sent) == 1


def test_a_sync_that_found_no_room_is_made_up_for(host: Host) -> None:
    guest = connected(host.timesync, TIMESYNC_VERSIONS)
    host.timesync.pause()
    host.timesync.resume()
    guest.channel.room = 0
    host.advance(1)
    guest.channel.room = 10
    host.advance(5, guest)
    assert times(guest)[-1].body[16] == 1


# Saving.


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("moment", ["closed", "negotiating", "negotiated", "unanswered"])
def test_state_survives_saving(index: int, moment: str) -> None:
    host, other = Host(), Host()
    component, restored = host.components()[index], other.components()[index]
    guest = IcGuest(component, [(3, 0)])
    if moment != "closed":
        guest.open()
    if moment in ("negotiated", "unanswered"):
        guest.serve()
    if moment == "unanswered":
        host.worker.advance(5 * SECOND)
        if component is host.shutdown:
            host.shutdown.request(timeout_s=0)
        assert guest.channel.sent
    component.pause()
    state = component.save()

    restored.reset()
    restored.pause()
    restored.restore(state)
    assert restored.save() == state
    if moment != "closed":
        restored.reattach(guest.channel)
    guest.component = restored
    restored.resume()
    other.worker.advance(0)
    guest.serve()
    other.advance(6, guest)
    if moment == "closed":
        assert guest.received == []
        return
    assert restored.inspect()["message_version"] == "3.0"
    if isinstance(restored, Shutdown):
        assert ask(restored, guest).accepted
    elif isinstance(restored, Heartbeat):
        assert restored.status == "ok"
    else:
        assert restored.inspect()["syncs_sent"] == 1
    assert restored.inspect()["unexpected_messages"] == 0 or moment == "unanswered"


def test_damaged_state_is_refused(host: Host) -> None:
    connected(host.heartbeat, HEARTBEAT_VERSIONS)
    good = host.heartbeat.save()
    damages: list[tuple[str, object]] = [
        ("version", 2),
        ("versions", [[3, 0]]),
        ("versions", [[3, 0], [7, 7]]),
        ("versions", None),
        ("transaction", 256),
        ("awaited", -2),
        ("sequence", "x"),
        ("missed", 99),
    ]
    for key, value in damages:
        with pytest.raises(ValueError):
            host.heartbeat.restore({**good, key: value})


def test_inspection_is_plain_json(host: Host) -> None:
    connected(host.heartbeat, HEARTBEAT_VERSIONS)
    for component in host.components():
        json.dumps(component.inspect())


# Guests that break the rules.


@pytest.mark.parametrize(
    "body",
    [
        b"",
        struct.pack("<HHI", 1, 1, 0),
        struct.pack("<HHI", 65535, 65535, 0),
        struct.pack("<HHIHHHH", 1, 2, 0, 3, 0, 3, 0),
        struct.pack("<HHIHHHH", 1, 1, 0, 9, 0, 3, 0),
        struct.pack("<HHIHHHH", 1, 1, 0, 3, 0, 9, 0),
    ],
)
def test_a_false_negotiation_answer_closes_the_channel(host: Host, body: bytes) -> None:
    guest = IcGuest(host.heartbeat, HEARTBEAT_VERSIONS)
    guest.open()
    (offer,) = guest.take()
    with pytest.raises(ChannelViolation):
        guest.reply(offer, body)


def test_cut_off_messages_close_the_channel(host: Host) -> None:
    guest = connected(host.heartbeat, HEARTBEAT_VERSIONS)
    host.advance(2)
    (beat,) = guest.take()
    with pytest.raises(ChannelViolation):
        guest.raw(bytes(19))
    with pytest.raises(ChannelViolation):
        guest.reply(beat, beat.body, size=65535)
    with pytest.raises(ChannelViolation):
        guest.reply(beat, b"short")


def test_answers_that_nobody_asked_for_change_nothing(host: Host) -> None:
    guest = connected(host.heartbeat, HEARTBEAT_VERSIONS)
    host.advance(2)
    (beat,) = guest.take()
    before = host.heartbeat.save()
    guest.reply(beat, beat.body, transaction=beat.transaction + 1)
    guest.reply(beat, beat.body, kind=3)
    guest.reply(beat, beat.body, kind=0)
    guest.reply(beat, beat.body, flags=3)
    host.heartbeat.packets(guest.channel, [completion(7)])
    assert host.heartbeat.save() == before
    guest.answer(beat)
    guest.answer(beat)  # once too often
    assert host.heartbeat.inspect()["unexpected_messages"] == 5
    assert guest.channel.sent == []


@given(
    st.sampled_from([0, 1, 2]),
    st.lists(
        st.one_of(
            st.tuples(st.just("raw"), st.binary(max_size=120)),
            st.tuples(st.just("reply"), st.binary(max_size=60)),
            st.tuples(st.just("serve"), st.just(b"")),
            st.tuples(st.just("wait"), st.just(b"")),
            st.tuples(st.just("reopen"), st.just(b"")),
            st.tuples(st.just("shutdown"), st.just(b"")),
        ),
        max_size=25,
    ),
)
def test_a_hostile_guest_only_loses_its_channel(index: int, steps: list[tuple[str, bytes]]) -> None:
    host = Host()
    component = host.components()[index]
    guest = IcGuest(component, [(3, 0)])
    guest.open()
    for step, data in steps:
        try:
            if step == "raw":
                component.packets(guest.channel, [inband(data)])
            elif step == "reply":
                for message in guest.take():
                    guest.reply(message, data)
            elif step == "serve":
                guest.serve()
            elif step == "wait":
                host.worker.advance(3 * SECOND)
            elif step == "reopen":
                guest.close()
                guest.open()
            else:
                host.shutdown.request(timeout_s=0)
        except ChannelViolation:
            guest.close()
            guest.open()
        assert len(guest.channel.sent) <= 1 + len(steps)
        assert len(host.worker.pending) <= 1 + 2 * len(steps)
    component.inspect()
    component.pause()
    component.save()
