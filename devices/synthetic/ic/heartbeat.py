"""The heartbeat: asks the guest every two seconds whether it is still there.

Linux 6.1 drivers/hv/hv_util.c (``heartbeat_onchannelcallback``): the guest answers with the sequence number plus one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from devices.saved import saved_bool, saved_int
from devices.synthetic.ic.component import IntegrationComponent
from devices.synthetic.ic.protocol import (
    HEARTBEAT,
    HEARTBEAT_BODY,
    HEARTBEAT_REPLY,
    HEARTBEAT_STATES,
    HEARTBEAT_VERSIONS,
    parse,
)

if TYPE_CHECKING:
    from pyvmm.core.clock import Clock

PERIOD_NS = 2_000_000_000
#: Beats that may go by without an answer before communication counts as lost.
LOST_AFTER = 5


class Heartbeat(IntegrationComponent):
    """Host side of the heartbeat. A beat is sent only when the one before was answered."""

    interface_id = UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
    instance_id = UUID("fd149e91-82e0-4a7d-afa6-2a4166cbd7c0")
    message_type = HEARTBEAT
    message_versions = HEARTBEAT_VERSIONS

    def __init__(self, clock: Clock, leader: IntegrationComponent | None = None) -> None:
        super().__init__("heartbeat", clock, leader)

    def _forget(self) -> None:
        super()._forget()
        self._sequence = 0
        self._answered = False
        self._missed = 0
        self._state = 0

    @property
    def status(self) -> str:
        """``no-contact`` before the guest's first answer, then ``ok`` or ``lost-communication``."""
        with self._lock:
            if not self._answered:
                return "no-contact"
            return "lost-communication" if self._missed >= LOST_AFTER else "ok"

    def ready(self) -> None:
        self._beat()

    def resumed(self) -> None:
        self.schedule(PERIOD_NS)

    def tick(self) -> None:
        if self.awaiting:
            self._missed = min(self._missed + 1, LOST_AFTER)
            self.schedule(PERIOD_NS)
        else:
            self._beat()

    def _beat(self) -> None:
        self.transact(HEARTBEAT_BODY.build({"sequence": self._sequence, "state": 0}))
        self.schedule(PERIOD_NS)

    def answered(self, status: int, body: bytes) -> None:
        sequence = parse(HEARTBEAT_REPLY, body, "heartbeat").sequence
        if sequence != (self._sequence + 1) & 0xFFFF_FFFF_FFFF_FFFF:
            self._missed = min(self._missed + 1, LOST_AFTER)
            return
        self._sequence = sequence
        self._answered = True
        self._missed = 0
        self._state = int.from_bytes(body[8:12], "little")

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                **super().save(),
                "sequence": self._sequence,
                "answered": self._answered,
                "missed": self._missed,
                "state": self._state,
            }

    def restore(self, state: dict[str, Any]) -> None:
        sequence = saved_int(state, "sequence", 0, 0xFFFF_FFFF_FFFF_FFFF)
        answered = saved_bool(state, "answered")
        missed = saved_int(state, "missed", 0, LOST_AFTER)
        guest_state = saved_int(state, "state", 0, 0xFFFF_FFFF)
        with self._lock:
            super().restore(state)
            self._sequence, self._answered, self._missed, self._state = sequence, answered, missed, guest_state

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            known = self._state < len(HEARTBEAT_STATES)
            return {
                **super().inspect(),
                "status": self.status,
                "sequence": self._sequence,
                "applications": HEARTBEAT_STATES[self._state] if known else f"{self._state:#x}",
            }
