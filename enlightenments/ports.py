"""The two ways in and out of a partition: message ports and event ports.

A guest posts messages and signals events to connection ids (HvPostMessage, HvSignalEvent); the host posts
messages to a SINT of a VP and sets event flags there. TLFS v6.0b, chapter 11.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.core._hot import SynIC

    #: Takes (message type, payload); returns False when it cannot take the message now.
    MessageHandler = Callable[[int, bytes], bool]


#: SINTs of each VP.
SINTS = 16


class Ports:
    """What a bus above the hypervisor interface uses. The partition implements it; tests have a fake."""

    #: Number of VPs of the partition; VP indices are 0 .. vp_count - 1.
    vp_count: int

    def connect_message_port(self, connection_id: int, handler: MessageHandler) -> None:
        """Let the guest post to `connection_id`. `handler` runs on the posting VP's thread and must be quick.

        Raises ValueError if the id is taken.
        """
        raise NotImplementedError

    def disconnect_message_port(self, connection_id: int) -> None:
        """Posting to `connection_id` fails from now on."""
        raise NotImplementedError

    def connect_event_port(self, connection_id: int, eventfd: int) -> None:
        """Have HvSignalEvent on `connection_id`, flag 0, write to `eventfd`, with no Python on the way.

        Raises ValueError if the id is taken, or RuntimeError if there are too many already.
        """
        raise NotImplementedError

    def disconnect_event_port(self, connection_id: int) -> None:
        """Signalling `connection_id` fails from now on; the eventfd may be closed after this returns."""
        raise NotImplementedError

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        """Queue a message of at most 240 bytes for a SINT, in order; any thread.

        Returns False if the queue is full: nothing was queued, and the eventfd given to
        `set_message_space_event` is written once there is room again.
        """
        raise NotImplementedError

    def set_message_space_event(self, eventfd: int) -> None:
        """Name the eventfd that tells of room after a False from `post_message`."""
        raise NotImplementedError

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        """Set an event flag (0-2047) of a SINT and interrupt the VP if it was clear; any thread.

        Dropped silently when the guest has not enabled that SINT, as on Hyper-V.
        """
        raise NotImplementedError

    def synic(self, vp: int) -> SynIC | None:
        """What C code signals events at instead of `signal_event`; None where it must not."""
        return None

    def raise_sint(self, vp: int, sint: int) -> None:
        """Interrupt a VP as a message or an event at that SINT would, without either; any thread.

        Dropped silently when the guest has not enabled that SINT.
        """
        raise NotImplementedError
