"""QEMU's Hyper-V test device: what a guest sends comes back at the SINT it named."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.legacy import hyperv_testdev as testdev
from devices.legacy.hyperv_testdev import HypervTestdev
from pyvmm.core.device import GuestViolation
from pyvmm.core.worker import Worker
from tests.fakes.board import board_bus
from tests.fakes.vmbus_guest import FakePorts

if TYPE_CHECKING:
    from collections.abc import Iterator

MESSAGE_TYPE = 1


class Guest:
    """A test device on its bus, over fake ports and a real worker."""

    def __init__(self, vp_count: int = 2, capacity: int = 1 << 30) -> None:
        self.errors: list[BaseException] = []
        self.worker = Worker("board", self.errors.append)
        self.worker.start()
        self.ports = FakePorts(vp_count, capacity)
        self.device = HypervTestdev(self.ports, self.worker)
        self.device.reset()
        self.bus = board_bus(self.device)

    def command(self, control: int, vp: int = 0, sint: int = 0, connection: int = 0) -> None:
        self.bus.write(0x3000, 4, connection << 24 | control << 16 | vp << 8 | sint)

    def close(self) -> None:
        self.device.close()
        self.worker.stop()
        assert not self.errors


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_setting_the_sint_of_a_route_raises_it(guest: Guest) -> None:
    guest.command(testdev.ROUTE_CREATE, vp=1, sint=3)
    guest.command(testdev.ROUTE_SET_SINT, vp=1, sint=3)
    guest.command(testdev.ROUTE_SET_SINT, vp=1, sint=3)
    assert guest.ports.raised == [(1, 3), (1, 3)]
    guest.command(testdev.ROUTE_DESTROY, vp=1, sint=3)
    with pytest.raises(GuestViolation, match="command 0x30103 is about what was never made"):
        guest.command(testdev.ROUTE_SET_SINT, vp=1, sint=3)


def test_a_message_comes_back_where_its_connection_leads(guest: Guest) -> None:
    guest.command(testdev.MESSAGE_CREATE, vp=1, sint=8, connection=0x10)
    assert guest.ports.hv_post_message(0x10, b"hello", MESSAGE_TYPE) is True
    assert guest.ports.take_message(1, 8) == b"hello"
    guest.command(testdev.MESSAGE_DESTROY, connection=0x10)
    assert guest.ports.hv_post_message(0x10, b"hello", MESSAGE_TYPE) is None


def test_a_message_that_finds_no_room_is_refused() -> None:
    guest = Guest(capacity=1)
    guest.command(testdev.MESSAGE_CREATE, sint=8, connection=0x10)
    assert guest.ports.hv_post_message(0x10, b"1") is True
    assert guest.ports.hv_post_message(0x10, b"2") is False
    guest.close()


def test_an_event_sets_the_flag_of_its_connections_number(guest: Guest) -> None:
    guest.command(testdev.EVENT_CREATE, vp=1, sint=9, connection=0x20)
    guest.command(testdev.EVENT_CREATE, vp=0, sint=9, connection=0xFF)
    assert guest.ports.hv_signal_event(0x20)
    assert guest.ports.hv_signal_event(0xFF)
    guest.ports.wait_for(lambda: guest.ports.flags == {(1, 9, 0x20), (0, 9, 0xFF)}, "flags")
    guest.command(testdev.EVENT_DESTROY, connection=0x20)
    assert not guest.ports.hv_signal_event(0x20)


@pytest.mark.parametrize(
    ("control", "vp", "sint", "message"),
    [
        (testdev.ROUTE_CREATE, 2, 0, "no SINT 0 of VP 2"),
        (testdev.MESSAGE_CREATE, 0, 16, "no SINT 16 of VP 0"),
        (testdev.ROUTE_DESTROY, 0, 0, "never made"),
        (testdev.MESSAGE_DESTROY, 0, 0, "never made"),
        (testdev.EVENT_DESTROY, 0, 0, "never made"),
        (testdev.MESSAGE_CREATE, 0, 0, "connection id 0x33 is taken"),
        (testdev.EVENT_CREATE, 0, 0, "connection id 0x33 is taken"),
    ],
)
def test_what_cannot_be_done_stops_the_vm(guest: Guest, control: int, vp: int, sint: int, message: str) -> None:
    guest.command(testdev.MESSAGE_CREATE, connection=0x33)
    guest.command(testdev.EVENT_CREATE, connection=0x33)
    with pytest.raises(GuestViolation, match=message):
        guest.command(control, vp, sint, connection=0x33 if "taken" in message else 0x44)


def test_unknown_commands_narrow_writes_and_reads_do_nothing(guest: Guest) -> None:
    guest.command(0)
    guest.command(8, vp=99, sint=99)
    guest.bus.write(0x3000, 2, 0xFFFF)
    guest.bus.write(0x3002, 1, testdev.ROUTE_DESTROY)
    assert guest.bus.read(0x3000, 4) == 0
    assert guest.device.inspect() == {"routes": [], "messages": {}, "events": {}}


def fill(guest: Guest) -> None:
    guest.command(testdev.ROUTE_CREATE, vp=1, sint=3)
    guest.command(testdev.MESSAGE_CREATE, vp=1, sint=8, connection=0x10)
    guest.command(testdev.EVENT_CREATE, vp=0, sint=9, connection=0x20)
    guest.command(testdev.EVENT_CREATE, vp=1, sint=9, connection=0x21)


def test_a_reset_forgets_everything_and_closes_its_files(guest: Guest) -> None:
    fill(guest)
    eventfds = list(guest.ports.event_ports.values())
    assert len(eventfds) == 2
    guest.device.reset()
    for eventfd in eventfds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(eventfd)
    assert (guest.ports.handlers, guest.ports.event_ports) == ({}, {})
    with pytest.raises(GuestViolation):
        guest.command(testdev.ROUTE_SET_SINT, vp=1, sint=3)


def test_no_event_comes_back_in_a_pause_and_none_is_lost(guest: Guest) -> None:
    fill(guest)
    guest.device.pause()
    assert guest.ports.hv_signal_event(0x20)
    guest.worker.run(lambda: None)
    assert guest.ports.flags == set()
    guest.device.resume()
    guest.ports.take_flag_of(0, 9, 0x20)


def test_a_restored_device_goes_on_where_the_saved_one_was(guest: Guest) -> None:
    fill(guest)
    guest.device.pause()
    assert guest.ports.hv_signal_event(0x21)
    state = guest.device.save()
    other = Guest()
    other.device.pause()
    other.device.restore(state)
    assert other.device.save() == state
    assert other.device.inspect() == guest.device.inspect()
    other.worker.run(lambda: None)
    assert other.ports.flags == set()
    for vm in (guest, other):
        vm.device.resume()
        vm.ports.take_flag_of(1, 9, 0x21)
    other.command(testdev.ROUTE_SET_SINT, vp=1, sint=3)
    assert other.ports.hv_post_message(0x10, b"hello") is True
    assert (other.ports.raised, other.ports.take_message(1, 8)) == ([(1, 3)], b"hello")
    other.close()


@pytest.mark.parametrize(
    "broken",
    [
        {"version": 0},
        {"routes": [[5, 0]]},
        {"routes": [[0, 1, 2]]},
        {"messages": [["x", 0, 0]]},
        {"messages": [[1, 0, 0], [1, 0, 0]]},
        {"events": [[256, 0, 0, False]]},
        {"events": [[0x20, 0, 16, True]]},
        {"events": None},
    ],
)
def test_saved_state_that_does_not_fit_is_refused_and_leaves_nothing(guest: Guest, broken: dict[str, Any]) -> None:
    state = {"version": 1, "routes": [[1, 3]], "messages": [[0x10, 1, 8]], "events": [], **broken}
    with pytest.raises(ValueError, match="saved state"):
        guest.device.restore(state)
    assert guest.device.save() == {"version": 1, "routes": [], "messages": [], "events": []}


def test_vps_may_use_it_at_the_same_time(guest: Guest) -> None:
    errors: list[BaseException] = []

    def work(vp: int) -> None:
        try:
            for _ in range(100):
                guest.command(testdev.EVENT_CREATE, vp=vp, sint=9, connection=0x20 + vp)
                guest.ports.hv_signal_event(0x20 + vp)
                guest.command(testdev.EVENT_DESTROY, connection=0x20 + vp)
        except BaseException as error:  # noqa: BLE001 - for the test to see
            errors.append(error)

    threads = [threading.Thread(target=work, args=(vp,)) for vp in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert guest.ports.flags <= {(0, 9, 0x20), (1, 9, 0x21)}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1) | st.builds(lambda c, r: c << 16 | r, st.integers(1, 7), st.just(0x108))))
def test_whatever_the_guest_writes_only_its_vm_ends(values: list[int]) -> None:
    guest = Guest()
    for value in values:
        try:
            guest.bus.write(0x3000, 4, value)
        except GuestViolation as violation:
            assert "\n" not in str(violation)  # noqa: PT017 - both ends are right
    guest.close()
