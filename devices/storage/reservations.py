"""Persistent reservations of one logical unit, with no I/O. SPC-4 sections 5.13 and 6.15 to 6.17.

A logical unit has one `Reservations`, however many initiators reach it and over how many controllers. An initiator is
known by eight bytes (its I_T nexus). What is reserved outlives resets, and goes with the saved state of a VM, but not
the loss of power: APTPL is refused.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from devices.saved import check_version, saved_int
from devices.storage.cdb import Op
from devices.storage.plans import Conflict, Fail, Parameters, Reply
from devices.storage.sense import (
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETERS,
    INVALID_RELEASE,
    PARAMETER_LIST_LENGTH,
    REGISTRATIONS_PREEMPTED,
    RESERVATIONS_PREEMPTED,
    RESERVATIONS_RELEASED,
    Sense,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.storage.plans import Plan

#: Types of reservations.
WRITE_EXCLUSIVE, EXCLUSIVE_ACCESS = 1, 3
_REGISTRANTS_ONLY, _ALL_REGISTRANTS = (5, 6), (7, 8)
_WRITE_EXCLUSIVE_TYPES = (1, 5, 7)
TYPES = (1, 3, 5, 6, 7, 8)
#: The type mask of REPORT CAPABILITIES: all six.
_TYPE_MASK = 0xEA01

_REGISTER, _RESERVE, _RELEASE, _CLEAR, _PREEMPT, _PREEMPT_AND_ABORT, _REGISTER_AND_IGNORE = range(7)
_READ_KEYS, _READ_RESERVATION, _REPORT_CAPABILITIES, _READ_FULL_STATUS = range(4)
_SPEC_I_PT, _ALL_TG_PT, _APTPL = 0x08, 0x04, 0x01
#: Initiators that are remembered; a disk has one per controller that it is attached to.
_MAX_REGISTRATIONS = 64

#: What no reservation keeps anybody from doing. SPC-4 table 68, SBC-3 table 13.
_ALWAYS = frozenset(
    (
        *(Op.INQUIRY, Op.REPORT_LUNS, Op.REQUEST_SENSE, Op.TEST_UNIT_READY, Op.READ_CAPACITY_10),
        *(Op.PERSISTENT_RESERVE_IN, Op.PERSISTENT_RESERVE_OUT),  # the latter judges for itself
    )
)
#: What those may do that are kept from writing alone. Of SERVICE ACTION IN, READ CAPACITY would always be allowed.
_READING = frozenset(
    (
        *(Op.READ_6, Op.READ_10, Op.READ_12, Op.READ_16, Op.VERIFY_10, Op.VERIFY_16, Op.SERVICE_ACTION_IN_16),
        *(Op.MODE_SENSE_6, Op.MODE_SENSE_10, Op.MAINTENANCE_IN),
    )
)
_READ_CAPACITY_16 = 0x10


class Reservations:
    """Who has registered, and who holds the reservation; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attend: dict[bytes, Callable[[Sense], None]] = {}
        self._on_change: dict[bytes, Callable[[], None]] = {}
        #: What is to be told once the lock is free: whoever hears of it may wait for commands, and those for us.
        self._notices: list[tuple[bytes, Sense]] = []
        self._generation = 0
        self._keys: dict[bytes, int] = {}
        self._holder: bytes | None = None
        self._type = 0

    def join(self, nexus: bytes, attend: Callable[[Sense], None], on_change: Callable[[], None]) -> None:
        """`nexus` can reach the unit; `attend` is how it hears, as a unit attention, of what others do.

        `on_change` is called when `held` may have changed.
        """
        self._attend[nexus] = attend
        self._on_change[nexus] = on_change

    @property
    def held(self) -> bool:
        """Whether anybody holds a reservation."""
        return self._holder is not None

    def conflict(self, nexus: bytes, cdb: bytes) -> bool:
        """Whether a reservation keeps `nexus` from a command."""
        if self._holder is None:  # nearly always; a reservation made this moment counts from the next command on
            return False
        op = cdb[0]
        if op in _ALWAYS or (op == Op.SERVICE_ACTION_IN_16 and cdb[1] & 0x1F == _READ_CAPACITY_16):
            return False
        if op == Op.START_STOP_UNIT and cdb[4] & 0xF1 == 1:
            return False
        with self._lock:
            if self._holds(nexus) or (self._type in _REGISTRANTS_ONLY and nexus in self._keys):
                return False
            return not (op in _READING and self._type in _WRITE_EXCLUSIVE_TYPES)

    def _holds(self, nexus: bytes) -> bool:
        if self._holder is None:
            return False
        return nexus in self._keys if self._type in _ALL_REGISTRANTS else nexus == self._holder

    # PERSISTENT RESERVE IN ------------------------------------------------------------------------------

    def plan_in(self, cdb: bytes) -> Plan:
        """What to do for PERSISTENT RESERVE IN."""
        action, allocation = struct.unpack_from(">xB5xH", cdb)
        with self._lock:
            action &= 0x1F
            if action == _READ_KEYS:
                body = b"".join(key.to_bytes(8, "big") for key in self._keys.values())
            elif action == _READ_RESERVATION:
                body = self._reservation()
            elif action == _REPORT_CAPABILITIES:  # the type mask is valid, and nothing else offered
                return Reply(struct.pack(">HBBHxx", 8, 0, 0x80, _TYPE_MASK)[:allocation])
            elif action == _READ_FULL_STATUS:
                body = b"".join(map(self._full_status, self._keys))
            else:
                return Fail(INVALID_FIELD_IN_CDB)
            return Reply((struct.pack(">II", self._generation, len(body)) + body)[:allocation])

    def _reservation(self) -> bytes:
        if self._holder is None:
            return b""
        key = 0 if self._type in _ALL_REGISTRANTS else self._keys[self._holder]
        return struct.pack(">Q5xBxx", key, self._type)

    def _full_status(self, nexus: bytes) -> bytes:
        holds = self._holds(nexus)
        # A TransportID of SAS form (SPC-4 section 7.6.4.6), which has room for just such a name.
        transport = struct.pack(">B3x8s12x", 0x06, nexus)
        flags, kind = (1, self._type) if holds else (0, 0)
        return struct.pack(">Q4xBB4xHI", self._keys[nexus], flags, kind, 1, len(transport)) + transport

    # PERSISTENT RESERVE OUT -----------------------------------------------------------------------------

    def plan_out(self, nexus: bytes, cdb: bytes, length: int, data_in: bool) -> Plan:
        """What to do for PERSISTENT RESERVE OUT from `nexus`."""
        action, kind, size = struct.unpack_from(">xBB2xI", cdb)
        action &= 0x1F
        if action > _REGISTER_AND_IGNORE or size > length or (size and data_in):
            return Fail(INVALID_FIELD_IN_CDB)
        if size != 24:
            return Fail(PARAMETER_LIST_LENGTH)
        # Scope and type only matter where a reservation is made or released; the logical unit is the one scope left.
        if action in (_RESERVE, _RELEASE, _PREEMPT, _PREEMPT_AND_ABORT) and kind not in TYPES:
            return Fail(INVALID_FIELD_IN_CDB)
        return Parameters(size, lambda data: self._out(nexus, action, kind, data))

    def _out(self, nexus: bytes, action: int, kind: int, data: bytes) -> Plan:
        plan = self._change(nexus, action, kind, data)
        self._changed()
        return plan

    def _changed(self) -> None:
        with self._lock:
            notices, self._notices = self._notices, []
        for nexus, sense in notices:
            if nexus in self._attend:
                self._attend[nexus](sense)
        for on_change in list(self._on_change.values()):
            on_change()

    def _change(self, nexus: bytes, action: int, kind: int, data: bytes) -> Plan:
        key, new_key, flags = struct.unpack_from(">QQ4xB", data)
        if flags & (_SPEC_I_PT | _ALL_TG_PT | _APTPL):
            return Fail(INVALID_FIELD_IN_PARAMETERS)
        with self._lock:
            if action == _REGISTER_AND_IGNORE:
                return self._register(nexus, new_key)
            if key != self._keys.get(nexus, 0 if action == _REGISTER else None):
                return Conflict()
            if action == _REGISTER:
                return self._register(nexus, new_key)
            if action == _RESERVE:
                return self._reserve(nexus, kind)
            if action == _RELEASE:
                return self._release(nexus, kind)
            if action == _CLEAR:
                return self._clear(nexus)
            return self._preempt(nexus, kind, new_key)  # and abort: commands of others that are under way simply end

    def _register(self, nexus: bytes, key: int) -> Plan:
        if key == 0:
            if nexus in self._keys:
                self._count()
                self._unregister(nexus)
            return Reply()
        if nexus not in self._keys and len(self._keys) >= _MAX_REGISTRATIONS:
            return Fail(INVALID_FIELD_IN_PARAMETERS)
        self._count()
        self._keys[nexus] = key
        return Reply()

    def _unregister(self, nexus: bytes) -> None:
        del self._keys[nexus]
        if self._type in _ALL_REGISTRANTS and self._keys:
            if nexus == self._holder:
                self._holder = next(iter(self._keys))
        elif nexus == self._holder or not self._keys:
            self._drop(nexus)

    def _drop(self, nexus: bytes) -> None:
        """The reservation ends at the wish of `nexus`."""
        if self._holder is not None and self._type in (*_REGISTRANTS_ONLY, *_ALL_REGISTRANTS):
            self._tell(self._others(nexus), RESERVATIONS_RELEASED)
        self._holder = None

    def _reserve(self, nexus: bytes, kind: int) -> Plan:
        if self._holder is None:
            self._holder, self._type = nexus, kind
        elif not (self._holds(nexus) and self._type == kind):
            return Conflict()
        return Reply()

    def _release(self, nexus: bytes, kind: int) -> Plan:
        if self._holds(nexus):
            if self._type != kind:
                return Fail(INVALID_RELEASE)
            self._drop(nexus)
        return Reply()

    def _clear(self, nexus: bytes) -> Plan:
        self._count()
        self._tell(self._others(nexus), RESERVATIONS_PREEMPTED)
        self._keys.clear()
        self._holder = None
        return Reply()

    def _preempt(self, nexus: bytes, kind: int, key: int) -> Plan:
        all_registrants = self._holder is not None and self._type in _ALL_REGISTRANTS
        if key == 0:
            if not all_registrants:
                return Fail(INVALID_FIELD_IN_PARAMETERS)
            victims, takes_over = self._others(nexus), True
        else:
            victims = [other for other, found in self._keys.items() if found == key]
            takes_over = self._holder is not None and not all_registrants and self._keys[self._holder] == key
            if not victims:
                return Conflict()
        self._count()
        victims = [other for other in victims if other != nexus or not takes_over]
        for other in victims:
            del self._keys[other]
        self._tell([other for other in victims if other != nexus], REGISTRATIONS_PREEMPTED)
        if takes_over:
            if self._type != kind:
                self._tell(self._others(nexus), RESERVATIONS_RELEASED)
            self._holder, self._type = nexus, kind
        elif self._holder is not None and self._holder not in self._keys:
            self._holder = next(iter(self._keys), None)  # of a reservation that all registrants hold
        return Reply()

    def _count(self) -> None:
        self._generation = (self._generation + 1) & 0xFFFF_FFFF

    def _others(self, nexus: bytes) -> list[bytes]:
        return [other for other in self._keys if other != nexus]

    def _tell(self, nexuses: list[bytes], sense: Sense) -> None:
        self._notices += [(nexus, sense) for nexus in nexuses]

    # State ----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return registrations and reservation."""
        with self._lock:
            return {
                "version": 1,
                "generation": self._generation,
                "keys": [[nexus, key] for nexus, key in self._keys.items()],
                "holder": self._holder,
                "type": self._type,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raises ValueError if it doesn't fit."""
        check_version(state, 1)
        holder, kind = state.get("holder"), saved_int(state, "type", 0, max(TYPES))
        generation = saved_int(state, "generation", 0, 0xFFFF_FFFF)
        try:
            keys = {bytes(nexus): int(key) for nexus, key in state["keys"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"saved reservations are damaged: {error}") from error
        if holder is not None and (holder not in keys or kind not in TYPES):
            raise ValueError("saved reservation of somebody who is not registered")
        with self._lock:
            self._generation, self._keys = generation, keys
            self._holder, self._type = holder, kind
        self._changed()

    def inspect(self) -> dict[str, Any]:
        """Return registrations and reservation, as plain JSON data."""
        with self._lock:
            return {
                "generation": self._generation,
                "registrations": {nexus.hex(): f"{key:#x}" for nexus, key in self._keys.items()},
                "holder": self._holder.hex() if self._holder is not None else None,
                "type": self._type if self._holder is not None else None,
            }
