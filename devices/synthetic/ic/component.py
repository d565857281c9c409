"""What integration components have in common: version negotiation, transactions, a timer.

Flow: Linux 6.1 drivers/hv/hv_util.c and channel_mgmt.c (``vmbus_prep_negotiate_resp``). The host asks and the guest
answers by sending the request back changed; here at most one request waits for its answer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from devices.saved import check_version, saved_int
from devices.synthetic.ic.protocol import (
    FRAMEWORK_VERSIONS,
    NEGOTIATE,
    RESPONSE,
    TRANSACTION,
    Version,
    decode,
    decode_choice,
    encode,
    encode_offer,
)
from devices.vmbus.vsp import PipeVsp

if TYPE_CHECKING:
    from devices.vmbus.channel import Channel
    from pyvmm.core.clock import Clock
    from pyvmm.core.worker import Timer, Worker

_NO_ANSWER_AWAITED = -1


class IntegrationComponent(PipeVsp):
    """One component. With `leader`, a component that is put on the bus before, it uses that one's worker thread.

    Subclasses set `message_type` and `message_versions` and implement `ready`, `answered` and `tick`, which are called
    with the component's lock held.
    """

    message_type: int
    message_versions: tuple[Version, ...]

    def __init__(self, name: str, clock: Clock, leader: IntegrationComponent | None) -> None:
        super().__init__(name)
        self.worker_count = 1 if leader is None else 0
        self._leader = leader
        self._clock = clock
        self._lock = threading.RLock()
        self._timer: Timer | None = None
        self._paused = False
        self._unexpected = 0
        self._forget()

    def _forget(self) -> None:
        """Go back to before the guest's driver was there."""
        #: Framework and message version once they are negotiated.
        self.versions: tuple[Version, Version] | None = None
        self._transaction = 0
        self._awaited = _NO_ANSWER_AWAITED
        self._cancel()

    # For subclasses.

    def ready(self) -> None:
        """Versions were just negotiated."""

    def answered(self, status: int, body: bytes) -> None:
        """The guest answered the request; may raise ChannelViolation."""

    def tick(self) -> None:
        """The timer that `schedule` set went off."""

    def schedule(self, delay_ns: int) -> None:
        """Call `tick` once in `delay_ns`, instead of when it would have been."""
        self._cancel()
        if not self._paused:
            timer = self.worker_for(0).call_at(self._clock.now_ns() + delay_ns, lambda: self._expired(timer))
            self._timer = timer

    def transact(self, body: bytes) -> bool:
        """Send a request; only its answer is taken from now on. False if it could not be sent."""
        assert self.versions is not None
        before = self._awaited
        self._transaction = self._awaited = (self._transaction + 1) & 0xFF
        if not self.send_message(encode(*self.versions, self.message_type, self._transaction, body)):
            self._awaited = before
            return False
        return True

    @property
    def awaiting(self) -> bool:
        """Whether a request waits for its answer."""
        return self._awaited != _NO_ANSWER_AWAITED

    # The channel.

    def worker_for(self, subchannel_index: int) -> Worker:
        return super().worker_for(subchannel_index) if self._leader is None else self._leader.worker_for(0)

    def open(self, channel: Channel) -> None:
        with self._lock:
            self._forget()
            super().open(channel)
            self._awaited = self._transaction
            self.send_message(encode_offer(FRAMEWORK_VERSIONS, self.message_versions, self._transaction))

    def close(self, channel: Channel) -> None:
        with self._lock:
            super().close(channel)
            self._forget()

    def on_message(self, message: bytes) -> None:
        header, body = decode(message)
        with self._lock:
            expected_type = NEGOTIATE if self.versions is None else self.message_type
            if (
                header.flags & (TRANSACTION | RESPONSE) != TRANSACTION | RESPONSE
                or header.type != expected_type
                or header.transaction != self._awaited
            ):
                self._unexpected += 1  # an answer that came too late, or nonsense
                return
            self._awaited = _NO_ANSWER_AWAITED
            if self.versions is not None:
                self.answered(header.status, body)
                return
            self.versions = decode_choice(body, FRAMEWORK_VERSIONS, self.message_versions)
            if self.versions is not None:
                self.ready()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self, timer: Timer) -> None:
        with self._lock:
            if self._timer is timer:
                self._timer = None
                if self.versions is not None:
                    self.tick()

    # Life cycle.

    def reset(self) -> None:
        with self._lock:
            self._forget()
            self._unexpected = 0

    def pause(self) -> None:
        with self._lock:
            self._paused = True
            self._cancel()

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            if self.versions is not None:
                self.resumed()

    def resumed(self) -> None:
        """The VM goes on after a pause, with versions negotiated."""

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "version": 1,
                "versions": [list(version) for version in self.versions or ()],
                "transaction": self._transaction,
                "awaited": self._awaited,
            }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        transaction = saved_int(state, "transaction", 0, 0xFF)
        awaited = saved_int(state, "awaited", _NO_ANSWER_AWAITED, 0xFF)
        versions = self._checked_versions(state.get("versions"))
        with self._lock:
            self._transaction, self._awaited, self.versions = transaction, awaited, versions

    def _checked_versions(self, saved: object) -> tuple[Version, Version] | None:
        if saved == []:
            return None
        for framework in FRAMEWORK_VERSIONS:
            for message in self.message_versions:
                if saved == [list(framework), list(message)]:
                    return framework, message
        raise ValueError(f"saved state: versions {saved!r} are not known")

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            framework, message = self.versions or (None, None)
            return {
                "connected": self.channel is not None,
                "framework_version": framework and str(framework),
                "message_version": message and str(message),
                "awaiting_answer": self.awaiting,
                "unexpected_messages": self._unexpected,
            }
