"""Persistent reservations, between initiators that share a disk. SPC-4 section 5.13."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from devices.storage import plans
from devices.storage.cdb import Op
from devices.storage.reservations import TYPES, Reservations
from devices.synthetic.storvsp.scsi import Target
from tests.fakes.disks import MemoryDisk

REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, REGISTER_AND_IGNORE, REGISTER_AND_MOVE = range(8)
READ_KEYS, READ_RESERVATION, REPORT_CAPABILITIES, READ_FULL_STATUS = range(4)
GOOD, CONFLICT = "good", "conflict"

WRITE = struct.pack(">BBIxHx", Op.WRITE_10, 0, 0, 1)
READ = struct.pack(">BBIxHx", Op.READ_10, 0, 0, 1)
TEST_UNIT_READY = bytes(6)


class Host:
    """One initiator."""

    def __init__(self, name: str, disk: MemoryDisk, reservations: Reservations) -> None:
        self.nexus = name.encode().ljust(8, b".")
        self.target = Target(disk, bytes(16), self.nexus, reservations)

    def run(self, cdb: bytes, data: bytes = b"", data_in: bool = False, size: int = 0) -> Any:
        """GOOD, CONFLICT, sense as (key, asc, ascq), or the data that a command returned."""
        plan = self.target.plan(cdb, size or len(data), data_in)
        if isinstance(plan, plans.Parameters):
            plan = plan.parse(data[: plan.length])
        if isinstance(plan, plans.Fail):
            return plan.sense[:3]
        if isinstance(plan, plans.Conflict):
            return CONFLICT
        return plan.data if isinstance(plan, plans.Reply) and plan.data else GOOD

    def out(self, action: int, key: int = 0, new: int = 0, kind: int = 0, flags: int = 0) -> Any:
        return self.run(
            struct.pack(">BBB2xIx", Op.PERSISTENT_RESERVE_OUT, action, kind, 24),
            struct.pack(">QQ4xB3x", key, new, flags),
        )

    def look(self, action: int, allocation: int = 4096) -> bytes:
        cdb = struct.pack(">BB5xHx", Op.PERSISTENT_RESERVE_IN, action, allocation)
        found = self.run(cdb, data_in=True, size=allocation)
        assert isinstance(found, bytes), found
        return found

    @property
    def keys(self) -> list[int]:
        data = self.look(READ_KEYS)
        (size,) = struct.unpack_from(">4xI", data)
        assert size == len(data) - 8
        return [int.from_bytes(data[at : at + 8], "big") for at in range(8, len(data), 8)]

    @property
    def reservation(self) -> tuple[int, int] | None:
        """Key and type."""
        data = self.look(READ_RESERVATION)
        (size,) = struct.unpack_from(">4xI", data)
        assert size == len(data) - 8 and size in (0, 16)
        return struct.unpack_from(">Q5xB", data, 8) if size else None

    @property
    def news(self) -> tuple[int, int, int] | None:
        """The pending unit attention."""
        found = self.run(TEST_UNIT_READY)
        return None if found == GOOD else found


@pytest.fixture
def hosts() -> tuple[Host, Host, Host]:
    disk, reservations = MemoryDisk(1 << 20), Reservations()
    a, b, c = (Host(name, disk, reservations) for name in "abc")
    return a, b, c


def register(*pairs: tuple[Host, int]) -> None:
    for host, key in pairs:
        assert host.out(REGISTER, 0, key) == GOOD


# Who may do what ----------------------------------------------------------------------------------------

# Types 1, 3: write exclusive, exclusive access; 5, 6: the same for registrants only; 7, 8: for all registrants.
_OTHER_REGISTRANT = {1: "r-", 3: "--", 5: "rw", 6: "rw", 7: "rw", 8: "rw"}
_STRANGER = {1: "r-", 3: "--", 5: "r-", 6: "--", 7: "r-", 8: "--"}


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_lets_holder_registrants_and_strangers_do_what_it_says(
    hosts: tuple[Host, Host, Host], kind: int
) -> None:
    holder, registrant, stranger = hosts
    register((holder, 1), (registrant, 2))
    assert holder.out(RESERVE, 1, kind=kind) == GOOD
    for host, may in ((holder, "rw"), (registrant, _OTHER_REGISTRANT[kind]), (stranger, _STRANGER[kind])):
        assert host.run(READ, data_in=True, size=512) == (GOOD if "r" in may else CONFLICT)
        assert host.run(WRITE, bytes(512)) == (GOOD if "w" in may else CONFLICT)
    assert holder.reservation == (0 if kind >= 7 else 1, kind)


_WRITING = [
    struct.pack(">BBIxHx", op, 0, 0, 1) for op in (Op.WRITE_10, Op.SYNCHRONIZE_CACHE_10, Op.WRITE_SAME_10, Op.UNMAP)
]
_WRITING += [bytes((Op.MODE_SELECT_6, 0x10, 0, 0, 0, 0)), bytes((Op.START_STOP_UNIT, 0, 0, 0, 0, 0))]
_READING = [bytes((Op.MODE_SENSE_6, 0, 8, 0, 255, 0)), struct.pack(">BB8xI2x", Op.SERVICE_ACTION_IN_16, 0x12, 64)]
_READING += [struct.pack(">BBBB2xI2x", Op.MAINTENANCE_IN, 0x0C, 0, 0, 4096), READ]
_ALWAYS = [TEST_UNIT_READY, bytes((Op.INQUIRY, 0, 0, 0, 36, 0)), bytes((Op.REQUEST_SENSE, 0, 0, 0, 18, 0))]
_ALWAYS += [struct.pack(">BB8xI2x", Op.SERVICE_ACTION_IN_16, 0x10, 32), bytes((Op.READ_CAPACITY_10, *bytes(9)))]
_ALWAYS += [bytes((Op.START_STOP_UNIT, 0, 0, 0, 1, 0))]


def test_exclusive_access_keeps_a_stranger_from_all_but_asking(hosts: tuple[Host, Host, Host]) -> None:
    holder, _, stranger = hosts
    register((holder, 1))
    assert holder.out(RESERVE, 1, kind=3) == GOOD
    for cdb in _ALWAYS:
        assert stranger.run(cdb, data_in=True, size=512) != CONFLICT, cdb
    for cdb in (*_READING, *_WRITING):
        assert stranger.run(cdb, data_in=True, size=512) == CONFLICT, cdb


def test_write_exclusive_keeps_a_stranger_from_writing_alone(hosts: tuple[Host, Host, Host]) -> None:
    holder, _, stranger = hosts
    register((holder, 1))
    assert holder.out(RESERVE, 1, kind=1) == GOOD
    for cdb in (*_ALWAYS, *_READING):
        assert stranger.run(cdb, data_in=True, size=512) != CONFLICT, cdb
    for cdb in _WRITING:
        assert stranger.run(cdb, bytes(512)) == CONFLICT, cdb


# Registering --------------------------------------------------------------------------------------------


def test_keys_are_registered_changed_and_removed(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    assert a.out(REGISTER, 5, 6) == CONFLICT  # it has no key yet that this could be
    register((a, 0x1111), (b, 0x2222))
    assert a.keys == [0x1111, 0x2222]
    assert a.out(REGISTER, 0, 7) == a.out(REGISTER, 0x2222, 7) == CONFLICT
    assert a.out(REGISTER, 0x1111, 0x3333) == GOOD
    assert b.out(REGISTER_AND_IGNORE, 99, 0x4444) == GOOD
    assert b.keys == [0x3333, 0x4444]
    assert a.out(REGISTER, 0x3333, 0) == GOOD
    assert b.out(REGISTER_AND_IGNORE, 0, 0) == GOOD
    assert b.out(REGISTER_AND_IGNORE, 0, 0) == GOOD  # nothing to remove is no error
    assert a.keys == []


def test_generation_counts_what_the_standard_counts(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts

    def generation() -> int:
        return int.from_bytes(a.look(READ_KEYS)[:4], "big")

    register((a, 1), (b, 2))
    assert generation() == 2
    a.out(RESERVE, 1, kind=1)
    a.out(RELEASE, 1, kind=1)
    a.out(RESERVE, 9, kind=1)
    assert generation() == 2
    a.out(PREEMPT, 1, 2, kind=1)
    assert generation() == 3
    a.out(CLEAR, 1)
    assert generation() == 4


@pytest.mark.parametrize(
    ("action", "kind", "flags", "answer"),
    [
        (REGISTER, 0, 1, (5, 0x26, 0)),  # APTPL
        (REGISTER, 0, 4, (5, 0x26, 0)),  # ALL_TG_PT
        (REGISTER, 0, 8, (5, 0x26, 0)),  # SPEC_I_PT
        (RESERVE, 0, 0, (5, 0x24, 0)),
        (RESERVE, 2, 0, (5, 0x24, 0)),
        (RESERVE, 0x11, 0, (5, 0x24, 0)),  # of a scope that is no more
        (REGISTER_AND_MOVE, 0, 0, (5, 0x24, 0)),
        (RESERVE, 1, 0, CONFLICT),  # not registered
        (RELEASE, 1, 0, CONFLICT),
        (CLEAR, 0, 0, CONFLICT),
        (PREEMPT, 1, 0, CONFLICT),
    ],
)
def test_what_is_not_offered_or_not_allowed_is_refused(
    hosts: tuple[Host, Host, Host], action: int, kind: int, flags: int, answer: Any
) -> None:
    assert hosts[0].out(action, 0, 1, kind, flags) == answer
    assert hosts[0].keys == []


def test_parameter_list_has_its_one_length(hosts: tuple[Host, Host, Host]) -> None:
    a = hosts[0]
    for size, answer in ((23, (5, 0x1A, 0)), (25, (5, 0x1A, 0)), (0, (5, 0x1A, 0))):
        assert a.run(struct.pack(">BBB2xIx", Op.PERSISTENT_RESERVE_OUT, 0, 0, size), bytes(32)) == answer
    assert a.run(struct.pack(">BBB2xIx", Op.PERSISTENT_RESERVE_OUT, 0, 0, 24), bytes(23)) == (5, 0x24, 0)
    assert a.run(struct.pack(">BB5xHx", Op.PERSISTENT_RESERVE_IN, 4, 64), data_in=True, size=64) == (5, 0x24, 0)


def test_number_of_registrations_is_bounded() -> None:
    disk, reservations = MemoryDisk(512), Reservations()
    found = [Host(f"h{number}", disk, reservations).out(REGISTER, 0, 1) for number in range(65)]
    assert found == [GOOD] * 64 + [(5, 0x26, 0)]


# Reserving and releasing --------------------------------------------------------------------------------


def test_second_reservation_conflicts_unless_it_is_the_same_again(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    register((a, 1), (b, 2))
    assert a.out(RESERVE, 1, kind=5) == a.out(RESERVE, 1, kind=5) == GOOD
    assert a.out(RESERVE, 1, kind=6) == b.out(RESERVE, 2, kind=5) == CONFLICT
    assert b.out(RELEASE, 2, kind=5) == GOOD  # not the holder: nothing happens
    assert a.out(RELEASE, 1, kind=1) == (5, 0x26, 4)
    assert a.reservation == (1, 5)
    assert a.out(RELEASE, 1, kind=5) == GOOD
    assert a.reservation is None
    assert b.news == (6, 0x2A, 4) and a.news is None and b.news is None


def test_reservation_of_all_registrants_belongs_to_each_and_ends_with_the_last(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    register((a, 1), (b, 2))
    assert a.out(RESERVE, 1, kind=7) == b.out(RESERVE, 2, kind=7) == GOOD
    assert a.out(REGISTER, 1, 0) == GOOD
    assert b.reservation == (0, 7) and a.run(WRITE, bytes(512)) == CONFLICT
    assert b.out(REGISTER, 2, 0) == GOOD
    assert a.reservation is None


def test_holder_that_unregisters_gives_up_its_reservation(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    register((a, 1), (b, 2))
    a.out(RESERVE, 1, kind=6)
    a.out(REGISTER, 1, 0)
    assert b.news == (6, 0x2A, 4)
    assert b.reservation is None and b.keys == [2]


def test_clear_removes_all_and_tells_the_others(hosts: tuple[Host, Host, Host]) -> None:
    a, b, c = hosts
    register((a, 1), (b, 2))
    a.out(RESERVE, 1, kind=3)
    assert b.out(CLEAR, 2) == GOOD
    assert b.keys == [] and b.reservation is None
    assert a.news == (6, 0x2A, 3) and b.news is None and c.news is None


# Preempting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [PREEMPT, PREEMPT_AND_ABORT])
def test_preempting_the_holder_takes_the_reservation_over(hosts: tuple[Host, Host, Host], action: int) -> None:
    a, b, c = hosts
    register((a, 1), (b, 2), (c, 3))
    a.out(RESERVE, 1, kind=1)
    assert b.out(action, 2, 1, kind=5) == GOOD
    assert b.keys == [2, 3] and b.reservation == (2, 5)
    assert a.news == (6, 0x2A, 5) and c.news == (6, 0x2A, 4)  # c: the type has changed


def test_preempting_another_key_only_removes_registrations(hosts: tuple[Host, Host, Host]) -> None:
    a, b, c = hosts
    register((a, 1), (b, 2), (c, 2))
    a.out(RESERVE, 1, kind=1)
    assert a.out(PREEMPT, 1, 2, kind=1) == GOOD
    assert a.keys == [1] and a.reservation == (1, 1)
    assert b.news == c.news == (6, 0x2A, 5)
    assert a.out(PREEMPT, 1, 2, kind=1) == CONFLICT  # nobody has that key
    assert a.out(PREEMPT, 1, 0, kind=1) == (5, 0x26, 0)


def test_preempting_all_registrants(hosts: tuple[Host, Host, Host]) -> None:
    a, b, c = hosts
    register((a, 1), (b, 2), (c, 3))
    a.out(RESERVE, 1, kind=8)
    assert b.out(PREEMPT, 2, 3, kind=1) == GOOD  # a key: that registration alone
    assert b.keys == [1, 2] and b.reservation == (0, 8)
    assert b.out(PREEMPT, 2, 0, kind=3) == GOOD  # 0: everybody else
    assert b.keys == [2] and b.reservation == (2, 3)


def test_own_reservation_can_be_changed_by_preempting_oneself(hosts: tuple[Host, Host, Host]) -> None:
    a = hosts[0]
    register((a, 1))
    a.out(RESERVE, 1, kind=1)
    assert a.out(PREEMPT, 1, 1, kind=3) == GOOD
    assert a.keys == [1] and a.reservation == (1, 3)


def test_others_are_told_when_nothing_is_locked(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    register((a, 1), (b, 2))
    # Whoever hears of it may at once have commands judged by the same reservations.
    heard: list[bool] = []
    reservations = a.target.reservations
    reservations.join(b.nexus, lambda sense: heard.append(reservations.conflict(b.nexus, WRITE)), lambda: None)
    a.out(RESERVE, 1, kind=3)
    assert a.out(PREEMPT, 1, 2, kind=3) == GOOD
    assert heard == [True]


# Reports ------------------------------------------------------------------------------------------------


def test_capabilities_offer_six_types_and_no_persistence(hosts: tuple[Host, Host, Host]) -> None:
    assert hosts[0].look(REPORT_CAPABILITIES) == bytes.fromhex("0008 00 80 ea01 0000")


def test_full_status_names_every_registrant(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    register((a, 1), (b, 2))
    a.out(RESERVE, 1, kind=1)
    data = a.look(READ_FULL_STATUS)
    assert struct.unpack_from(">II", data) == (2, 96)
    first, second = data[8:56], data[56:]
    assert struct.unpack_from(">Q4xBB4xHI", first) == (1, 1, 1, 1, 24)
    assert struct.unpack_from(">Q4xBB4xHI", second) == (2, 0, 0, 1, 24)
    assert first[24] == 0x06 and first[28:36] == a.nexus and second[28:36] == b.nexus
    assert a.look(READ_FULL_STATUS, 20) == data[:20]


# State --------------------------------------------------------------------------------------------------


def test_reservations_are_saved_and_restored(hosts: tuple[Host, Host, Host]) -> None:
    a, b, _ = hosts
    register((a, 1), (b, 2))
    a.out(RESERVE, 1, kind=6)
    state = a.target.reservations.save()
    fresh = Reservations()
    fresh.restore(state)
    assert fresh.save() == state and fresh.inspect() == a.target.reservations.inspect()
    assert fresh.conflict(b"c.......", WRITE) and not fresh.conflict(b.nexus, WRITE)
    for damage in ({"holder": b"nobody.."}, {"type": 2}, {"type": "x"}, {"keys": 3}, {"keys": [1]}, {"version": 9}):
        with pytest.raises(ValueError, match=r"saved|version"):
            Reservations().restore(state | damage)


def test_any_sequence_keeps_reservation_and_registrations_consistent() -> None:
    keys = st.integers(0, 3)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            disk, reservations = MemoryDisk(512), Reservations()
            self.hosts = [Host(name, disk, reservations) for name in "abc"]
            self.reservations = reservations

        @rule(who=st.integers(0, 2), action=st.integers(0, 8), key=keys, new=keys, kind=st.sampled_from(TYPES))
        def out(self, who: int, action: int, key: int, new: int, kind: int) -> None:
            answer = self.hosts[who].out(action, key, new, kind)
            assert answer in (GOOD, CONFLICT) or answer[0] in (5, 6)

        @invariant()
        def holder_is_registered_and_never_locked_out(self) -> None:
            state = self.reservations.save()
            registered = dict(state["keys"])
            assert 0 not in registered.values()
            if state["holder"] is not None:
                assert state["holder"] in registered
                assert not self.reservations.conflict(state["holder"], WRITE)
            else:
                assert not any(self.reservations.conflict(host.nexus, WRITE) for host in self.hosts)
            Reservations().restore(state)

    run_state_machine_as_test(Machine, settings=settings(max_examples=40, deadline=None))
