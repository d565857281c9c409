"""Graceful shutdown: asks the guest's operating system to power off or to restart.

Linux 6.1 drivers/hv/hv_util.c (``shutdown_onchannelcallback``): the guest says at once whether it will, then does it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from devices.synthetic.ic.component import IntegrationComponent
from devices.synthetic.ic.protocol import (
    SHUTDOWN,
    SHUTDOWN_BODY,
    SHUTDOWN_FORCE,
    SHUTDOWN_RESTART,
    SHUTDOWN_VERSIONS,
    STATUS_NAMES,
    STATUS_OK,
)

if TYPE_CHECKING:
    from devices.vmbus.channel import Channel
    from pyvmm.core.clock import Clock


class ShutdownResult(NamedTuple):
    """What became of a request.

    `outcome` is ``accepted``, ``refused``, ``no-driver`` (the guest has none, or none that speaks our versions),
    ``busy`` (another request waits), ``no-answer`` (in time) or ``disconnected`` (the guest's driver went away).
    """

    outcome: str
    #: The guest's status if it answered.
    status: int | None = None

    @property
    def accepted(self) -> bool:
        """Whether the guest is shutting down now."""
        return self.outcome == "accepted"

    def __str__(self) -> str:
        if self.status is None or self.accepted:
            return self.outcome
        return f"{self.outcome}: {STATUS_NAMES.get(self.status, 'status')} ({self.status:#010x})"


class _Request:
    """One caller that waits."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result = ShutdownResult("no-answer")

    def finish(self, result: ShutdownResult) -> None:
        self.result = result
        self.done.set()


class Shutdown(IntegrationComponent):
    """Host side of the shutdown component."""

    interface_id = UUID("0e0b6031-5213-4934-818b-38d90ced39db")
    instance_id = UUID("b6650ff7-33bc-4840-8048-e0676786f393")
    message_type = SHUTDOWN
    message_versions = SHUTDOWN_VERSIONS

    _request: _Request | None = None

    def __init__(self, clock: Clock, leader: IntegrationComponent | None = None) -> None:
        super().__init__("shutdown", clock, leader)

    def request(self, restart: bool = False, force: bool = True, timeout_s: float = 10.0) -> ShutdownResult:
        """Ask the guest to power off or restart and wait up to `timeout_s` seconds for its answer.

        `force` lets the guest end programs that refuse to. Any thread but the component's worker.
        """
        flags = (SHUTDOWN_FORCE if force else 0) | (SHUTDOWN_RESTART if restart else 0)
        request = _Request()
        with self._lock:
            if self.versions is None:
                return ShutdownResult("no-driver")
            if self._request is not None:
                return ShutdownResult("busy")
            self._request = request
            if not self.transact(SHUTDOWN_BODY.build({"flags": flags, "text": bytes(2048)})):
                self._request = None
                return ShutdownResult("no-answer")
        request.done.wait(timeout_s)
        with self._lock:
            if self._request is request:
                self._request = None
            return request.result

    def answered(self, status: int, body: bytes) -> None:
        self._finish(ShutdownResult("accepted" if status == STATUS_OK else "refused", status))

    def close(self, channel: Channel) -> None:
        super().close(channel)
        with self._lock:
            self._finish(ShutdownResult("disconnected"))

    def reset(self) -> None:
        super().reset()
        with self._lock:
            self._finish(ShutdownResult("disconnected"))

    def _finish(self, result: ShutdownResult) -> None:
        if self._request is not None:
            self._request.finish(result)
            self._request = None
