"""Time synchronisation: tells the guest the host's UTC.

Linux 6.1 drivers/hv/hv_util.c (``timesync_onchannelcallback``): a message with the sync flag makes the guest step its
clock, one with the sample flag is a hint. From version 4 on, the VM's reference time tells how old it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from devices.saved import saved_bool
from devices.synthetic.ic.component import IntegrationComponent
from devices.synthetic.ic.protocol import (
    TIMESYNC,
    TIMESYNC_BODY,
    TIMESYNC_BODY_V4,
    TIMESYNC_SAMPLE,
    TIMESYNC_SYNC,
    TIMESYNC_VERSIONS,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core.clock import Clock

SAMPLE_PERIOD_NS = 5_000_000_000
#: 1 Jan 1970 in 100 ns since 1 Jan 1601.
UNIX_EPOCH = 116_444_736_000_000_000


class TimeSync(IntegrationComponent):
    """Host side of time synchronisation: a sync at first contact and after each pause, then samples.

    `reference_time` returns the VM's reference time in 100 ns. A sample is sent only when the guest has answered what
    was sent before; a sync is sent in any case.
    """

    interface_id = UUID("9527e630-d0ae-497b-adce-e80ab0175caf")
    instance_id = UUID("2dd1ce17-079e-403c-b352-a1921ee207ee")
    message_type = TIMESYNC
    message_versions = TIMESYNC_VERSIONS

    def __init__(
        self, clock: Clock, reference_time: Callable[[], int], leader: IntegrationComponent | None = None
    ) -> None:
        super().__init__("timesync", clock, leader)
        self._reference_time = reference_time

    def _forget(self) -> None:
        super()._forget()
        self._sync_due = True
        self._syncs = 0
        self._samples = 0

    def ready(self) -> None:
        self.tick()

    def resumed(self) -> None:
        self._sync_due = True
        self.schedule(0)  # from the worker, once the channel is served again

    def tick(self) -> None:
        self.schedule(SAMPLE_PERIOD_NS)
        if self._sync_due:
            if self.transact(self._message(TIMESYNC_SYNC)):
                self._sync_due = False
                self._syncs += 1
        elif not self.awaiting and self.transact(self._message(TIMESYNC_SAMPLE)):
            self._samples += 1

    def _message(self, flags: int) -> bytes:
        assert self.versions is not None
        reference_time = self._reference_time()
        parent_time = self._clock.utc_ns() // 100 + UNIX_EPOCH
        message: bytes
        if self.versions[1] >= Version(4, 0):
            fields = {"parent_time": parent_time, "reference_time": reference_time, "flags": flags}
            message = TIMESYNC_BODY_V4.build(fields)
        else:
            message = TIMESYNC_BODY.build({"parent_time": parent_time, "flags": flags})
        return message

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {**super().save(), "sync_due": self._sync_due}

    def restore(self, state: dict[str, Any]) -> None:
        sync_due = saved_bool(state, "sync_due")
        with self._lock:
            super().restore(state)
            self._sync_due = sync_due

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            return {**super().inspect(), "syncs_sent": self._syncs, "samples_sent": self._samples}
