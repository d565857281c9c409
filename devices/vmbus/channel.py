"""An open VMBus channel as its device sees it: packets in, packets out, signals as the ring rules want them.

Ring rules: Linux 6.1 drivers/hv/ring_buffer.c, openvmm vmbus_ring and vmbus_async.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from itertools import islice

from devices.vmbus.packets import ChannelViolation, completion, packet_size
from pyvmm.core._hot import RingError
from pyvmm.core.memory import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol, TypeVar

    from devices.vmbus.vsp import Vsp
    from pyvmm.core._hot import Memory, Packet, Ring, SynIC
    from pyvmm.core.clock import Clock
    from pyvmm.core.worker import Worker

if TYPE_CHECKING:

    class Engine(Protocol):
        """C code that serves a channel's rings before Python does, such as `pyvmm.core._hot.StorageQueue`."""

        @property
        def name(self) -> str:
            """What serves the channel, for people."""

        def serve(self) -> tuple[bool, int, list[Packet], list[Packet], bool]:
            """Do what is to be done, on the channel's worker; see `StorageQueue.serve`."""

        def quiesce(self) -> tuple[list[Packet], list[Packet]]:
            """Return once nothing is under way; see `StorageQueue.quiesce`."""

        def set_target(self, synic: SynIC | None, sint: int, flag: int, /) -> None:
            """Signal the guest by this event flag from now on; any thread."""

        def inspect(self) -> dict[str, int]:
            """Counters ``packets_in``, ``packets_out`` and ``signals``."""

    E = TypeVar("E", bound=Engine)

#: Packets that may wait for room in the outgoing ring.
PENDING_LIMIT = 4096
#: Packets taken off the ring at a time, and how often before other work of the worker gets its turn.
BATCH = 64
BATCHES = 16
#: How often a full outgoing ring is looked at when the guest is too old to tell of room (before protocol 2.4).
POLL_NS = 1_000_000


class Channel:
    """One open channel. Made by the bus; handed to `Vsp.open` and `Vsp.packets`.

    `send`, `complete`, `stop_receiving`, `start_receiving` and `fail` may be called from any thread; `receive` only
    on the channel's worker. Once the channel is closed they do nothing.
    """

    def __init__(
        self,
        vsp: Vsp,
        channel_id: int,
        subchannel_index: int,
        target_vp: int,
        user_data: bytes,
        rings: tuple[Ring, Ring],
        worker: Worker,
        signal: Callable[[Channel], None],
        aim: Callable[[Channel, Engine], None],
        on_broken: Callable[[Channel, str], None],
        clock: Clock,
        poll_for_space: bool = False,
    ) -> None:
        self.vsp = vsp
        #: The channel id (relid), 1-2047.
        self.id = channel_id
        #: 0 for the device's primary channel.
        self.subchannel_index = subchannel_index
        #: The VP that the guest wants interrupted; 0xffffffff for none.
        self.target_vp = target_vp
        #: The 120 bytes that the guest passed when it opened the channel.
        self.user_data = user_data
        self.incoming, self.outgoing = rings
        self.worker = worker
        #: Serves the rings before Python does, once `use_engine` has set it.
        self.engine: Engine | None = None
        self._event = -1
        #: Why the channel was given up; None while all is well.
        self.broken: str | None = None
        #: The eventfd behind the channel's event port.
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signal_guest = signal
        self._aim = aim
        self._on_broken = on_broken
        self._clock = clock
        self._poll_for_space = poll_for_space
        self._polling = False
        self._lock = threading.Lock()
        self._serving = threading.Lock()
        self._pending: deque[Packet] = deque()
        self._open = True
        self._held = False
        self._suspended = False
        self._counts = {"packets_in": 0, "packets_out": 0, "signals": 0}

    # What devices use ------------------------------------------------------------------------------

    def send(self, packets: Sequence[Packet]) -> bool:
        """Send packets in order, with one signal at most.

        What the ring has no room for waits here, and nothing more is received until it has gone. Returns False, with
        nothing sent, if that queue is too long already or the channel is closed. Raises ValueError for a packet
        that can never fit the ring.
        """
        for packet in packets:
            if packet_size(packet) > self.outgoing.size - 8:
                raise ValueError(f"{packet_size(packet)}-byte packet for a ring of {self.outgoing.size} bytes")
        with self._lock:
            if not self._open or len(self._pending) + len(packets) > PENDING_LIMIT:
                return False
            waiting = bool(self._pending)
            self._pending.extend(packets)
            if waiting:
                return True
            return self._flush()

    def complete(self, transaction_id: int, payload: bytes = b"") -> bool:
        """Send the completion of a request; False as with `send`."""
        return self.send((completion(transaction_id, payload),))

    def receive(self, limit: int = BATCH) -> list[Packet]:
        """Take up to `limit` packets off the ring, signalling the guest if it waits for the room made.

        Only for a device that wants packets out of turn; `Vsp.packets` gets them as they arrive. Raises RingError.
        """
        packets, signal = self.incoming.read(limit)
        self._counts["packets_in"] += len(packets)
        if signal:
            self._signal()
        return packets

    def make_engine(self, make: Callable[[Memory, Ring, Ring, int], E]) -> E:
        """Return C code for these rings and this doorbell, which `use_engine` sets to work."""
        return make(self.vsp.bus.memory.hot, self.incoming, self.outgoing, self.doorbell)

    def use_engine(self, engine: Engine, event: int = -1) -> None:
        """Have C code take from the rings what it knows, from now on; `Vsp.packets` gets the rest.

        It also gets its turn each time that the file `event` has something to read that it had not before.
        """
        self._aim(self, engine)
        self.engine = engine
        if event >= 0:
            self._event = event
            self.worker.add_file(event, self._service)
        self.kick()

    def stop_receiving(self) -> None:
        """Leave further packets in the ring, which holds the guest back; at most `BATCH` may still be on their way."""
        self._held = True

    def start_receiving(self) -> None:
        """Go on after `stop_receiving`."""
        self._held = False
        self.kick()

    def fail(self, reason: str) -> None:
        """Give the channel up because of what the guest did: it is closed and its offer rescinded."""
        with self._lock:
            if not self._open:
                return
            self._break(reason)

    def inspect(self) -> dict[str, Any]:
        """Return live state as plain JSON data."""
        engine = self.engine
        return {
            "id": self.id,
            "subchannel": self.subchannel_index,
            "target_vp": self.target_vp,
            "incoming": self.incoming.inspect(),
            "outgoing": self.outgoing.inspect(),
            "pending": len(self._pending),
            "held": self._held,
            "broken": self.broken,
            "engine": engine and engine.name,
            **self._count(),
        }

    def _count(self) -> dict[str, int]:
        by_engine = self.engine.inspect() if self.engine is not None else {}
        return {name: count + by_engine.get(name, 0) for name, count in self._counts.items()}

    # What the bus uses -----------------------------------------------------------------------------

    def attach(self) -> None:
        """Begin to serve the ring on the channel's worker."""
        self.worker.add_event(self.doorbell, self._service)
        self.kick()

    def detach(self) -> None:
        """Stop touching the rings. Runs on the channel's worker, or while that is paused."""
        self.worker.remove_event(self.doorbell)
        if self._event >= 0:
            self.worker.remove_event(self._event)
        with self._lock:
            self._open = False
            self._pending.clear()
        if self.engine is not None:
            self.engine.quiesce()

    def dispose(self) -> None:
        """Close the doorbell, once no event port leads to it."""
        os.close(self.doorbell)

    def suspend(self) -> None:
        """Take nothing more off the ring until `resume`; return once the device has what was taken."""
        self._suspended = True
        with self._serving:
            self._try(self._settle)

    def resume(self) -> None:
        """Go on after `suspend`."""
        self._suspended = False
        self.kick()

    def kick(self) -> None:
        """Have the worker look at the rings. Any thread, until `dispose`."""
        with self._lock:
            if self._open:
                os.eventfd_write(self.doorbell, 1)

    def retarget(self, vp: int) -> None:
        """Interrupt another VP from now on."""
        self.target_vp = vp
        if self.engine is not None:
            self._aim(self, self.engine)

    def unstick(self) -> None:
        """Signal the guest whether or not it needs it, and look at the rings."""
        if self._open:
            self._signal()
            self.kick()

    def save(self) -> list[Packet]:
        """Return the packets that wait for room."""
        return list(self._pending)

    def restore(self, pending: Sequence[Packet]) -> None:
        """Take over what `save` returned, before `attach`."""
        self._pending.extend(pending)

    # Inside ------------------------------------------------------------------------------------------

    def _signal(self) -> None:
        self._counts["signals"] += 1
        self._signal_guest(self)

    def _break(self, reason: str) -> None:
        self._open = False
        self._pending.clear()
        self.broken = reason
        self._on_broken(self, reason)

    def _flush(self) -> bool:
        """Write pending packets until there are none or no room is left. Called with the lock held."""
        had = bool(self._pending)
        signal = False
        try:
            while self._pending:
                written, wanted = self.outgoing.write(list(islice(self._pending, BATCH)))
                signal |= wanted
                self._counts["packets_out"] += written
                for _ in range(written):
                    self._pending.popleft()
                if written or not self._pending:
                    continue
                # At least a quarter of the ring, lest the guest signals for every packet that it reads.
                needed = max(packet_size(self._pending[0]), self.outgoing.size // 4 & ~7)
                if not self.outgoing.await_space(needed):
                    if self._poll_for_space and not self._polling:
                        self._polling = True
                        self.worker.call_at(self._clock.now_ns() + POLL_NS, self._poll)
                    break
            else:
                if had:
                    self.outgoing.await_space(0)
        except RingError as error:
            self._break(f"outgoing ring: {error}")
            return False
        if signal:
            self._signal()
        return True

    def _poll(self) -> None:
        self._polling = False
        self.kick()

    def _service(self) -> None:
        with self._serving:
            self._try(self._move_packets)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except RingError as error:
            self.fail(f"incoming ring: {error}")
        except (ChannelViolation, GuestMemoryError) as error:
            self.fail(str(error))

    def _move_packets(self) -> None:
        """Move packets until there are none, or there is no room, or others want their turn."""
        for _ in range(BATCHES):
            with self._lock:
                if not self._open or not self._flush() or self._pending or self._held or self._suspended:
                    return
            packets, idle = self._take() if self.engine is None else self._run(self.engine)
            if packets:
                self.vsp.packets(self, packets)
            elif idle:
                return
        self.kick()

    def _take(self) -> tuple[list[Packet], bool]:
        """Packets off the ring, and whether the ring's doorbell tells of the next one."""
        packets = self.receive()
        if packets or not self.incoming.mask(False):
            return packets, not packets
        self.incoming.mask(True)
        return [], False

    def _run(self, engine: Engine) -> tuple[list[Packet], bool]:
        """Let the engine work; what `_take` returns, without what it dealt with."""
        idle, left, packets, unsent, signal = engine.serve()
        if signal:
            self._signal()
        with self._lock:
            self._pending.extend(unsent)
        if left:
            packets += self.receive(left)
        return packets, idle

    def _settle(self) -> None:
        """Return once the engine has nothing under way."""
        if self.engine is not None:
            packets, unsent = self.engine.quiesce()
            with self._lock:
                self._pending.extend(unsent)
            if packets:
                self.vsp.packets(self, packets)
