"""The VMBus control plane as a state machine without threads or files.

Messages of the guest go in at `Server.handle`; messages to it and everything that has to be done go out through
`Actions`, whose calls return when they are done. A message that breaks the protocol is noted and ignored.

Facts: Linux 6.1 drivers/hv/{connection,channel,channel_mgmt}.c, openvmm vmbus_server channels.rs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from devices.vmbus import messages
from devices.vmbus.gpadl import Gpadl, GpadlError, GpadlTable
from devices.vmbus.messages import MessageError, encode, version_text
from pyvmm.core.memory import PAGE_SIZE, GuestMemory, GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any
    from uuid import UUID

SINT = 2
MAX_CHANNELS = 2047
NO_INTERRUPTS = 0xFFFF_FFFF

STATUS_SUCCESS = 0
STATUS_UNSUCCESSFUL = 0xC000_0001 - (1 << 32)
STATUS_CONNECTION_REFUSED = 0xC000_0236 - (1 << 32)

CONNECTION_FAILED = 2

# States of an offer.
HIDDEN = "hidden"  # the guest doesn't know of it
OFFERED = "offered"
OPEN = "open"
RESCINDED = "rescinded"  # the guest was told, and has yet to release the channel id
# `Offer.opened` says whether a rescinded channel is still open.


@dataclass(frozen=True)
class OpenRequest:
    """A guest's OpenChannel, checked: the page numbers of both rings are in RAM and nobody else's."""

    open_id: int
    gpadl_id: int
    downstream: int
    target_vp: int
    user_data: bytes
    incoming: Sequence[int]
    outgoing: Sequence[int]


@dataclass(eq=False)
class Offer:
    """One channel that a device offers. The state machine owns everything from `channel_id` on."""

    device: str
    interface_id: UUID
    instance_id: UUID
    order: int = 0
    subchannel_index: int = 0
    flags: int = 0
    mmio_megabytes: int = 0
    user_defined: bytes = b""
    channel_id: int = 0
    state: str = HIDDEN
    opened: OpenRequest | None = None
    #: Its device has been taken off the bus; it goes once the guest has released it.
    removed: bool = False
    #: What the guest did to have the channel closed; it is not offered again until the guest reconnects.
    broken: str | None = None

    @property
    def key(self) -> tuple[bytes, int, bytes, int]:
        """Sorts offers so that the same devices get the same channel ids at every connection."""
        return self.interface_id.bytes, self.order, self.instance_id.bytes, self.subchannel_index


class Actions:
    """What the state machine asks of the bus."""

    def send(self, message: bytes, vp: int, sint: int) -> None:
        """Post a message, after those posted before."""
        raise NotImplementedError

    def open_channel(self, offer: Offer, request: OpenRequest) -> str | None:
        """Open a channel; return why not, or None."""
        raise NotImplementedError

    def close_channel(self, offer: Offer) -> None:
        """Close a channel; on return nothing touches guest memory for it."""
        raise NotImplementedError

    def retarget_channel(self, offer: Offer, vp: int) -> None:
        """Interrupt `vp` for this channel from now on."""
        raise NotImplementedError

    def gpadl_released(self, offer: Offer, gpadl_id: int) -> None:
        """The guest takes a GPADL back; on return its device doesn't touch it."""
        raise NotImplementedError

    def set_interrupt_page(self, gpa: int | None) -> None:
        """Signal channels by this page and the shared event port (protocol before 2.4), or no more."""
        raise NotImplementedError

    def offer_gone(self, offer: Offer) -> None:
        """The guest doesn't know of a removed offer any more; it has left the state machine."""
        raise NotImplementedError

    def violation(self, text: str) -> None:
        """The guest broke the protocol."""
        raise NotImplementedError


@dataclass
class Connection:
    """What was agreed with the guest."""

    version: int
    target_vp: int
    message_connection: int
    interrupt_page: int | None
    offers_requested: bool = False


@dataclass
class Server:
    """The state of the bus: a connection or none, the offers, the GPADLs."""

    actions: Actions
    memory: GuestMemory
    vp_count: int
    max_version: int = messages.V5_3
    connection: Connection | None = None
    offers: list[Offer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gpadls = GpadlTable(self.memory)
        self._handlers = {
            "REQUEST_OFFERS": self._request_offers,
            "OPEN_CHANNEL": self._open_channel,
            "CLOSE_CHANNEL": self._close_channel,
            "GPADL_HEADER": self._gpadl_header,
            "GPADL_BODY": self._gpadl_body,
            "GPADL_TEARDOWN": self._gpadl_teardown,
            "REL_ID_RELEASED": self._rel_id_released,
            "UNLOAD": self._unload,
            "OPEN_RESERVED_CHANNEL": self._open_reserved,
            "CLOSE_RESERVED_CHANNEL": self._close_reserved,
            "TL_CONNECT_REQUEST": self._tl_connect,
            "MODIFY_CHANNEL": self._modify_channel,
        }

    # From the host ----------------------------------------------------------------------------------

    def add(self, offers: Iterable[Offer]) -> None:
        """Take up offers; the guest hears of them at once if it has asked for offers before."""
        added = sorted(offers, key=lambda offer: offer.key)
        self.offers += added
        if self.connection and self.connection.offers_requested:
            for offer in added:
                self._send_offer(self.connection, offer)

    def offer_subchannels(self, primary: Offer, count: int) -> None:
        """Offer sub-channels of an open channel until there are `count`. Guests before 2.4 know none."""
        if self.connection is None or self.connection.version < messages.WIN8 or primary.state != OPEN:
            return
        present = {
            offer.subchannel_index
            for offer in self.offers
            if offer.device == primary.device and offer.state != RESCINDED
        }
        self.add(
            Offer(
                primary.device,
                primary.interface_id,
                primary.instance_id,
                primary.order,
                index,
                primary.flags,
                user_defined=primary.user_defined,
            )
            for index in range(1, count + 1)
            if index not in present
        )

    def remove(self, offer: Offer) -> None:
        """Take an offer back for good: `Actions.offer_gone` tells when the guest has let go of it."""
        offer.removed = True
        if offer.state == HIDDEN:
            self._drop(offer)
        elif offer.state != RESCINDED:
            self._rescind(offer)

    def break_channel(self, offer: Offer, reason: str) -> None:
        """Close a channel whose guest side went wrong and rescind its offer."""
        if offer.opened is None:
            return
        offer.broken = reason
        self.actions.violation(f"channel {offer.channel_id} ({offer.device}) closed: {reason}")
        self._close(offer)
        if offer.state != RESCINDED:
            self._rescind(offer)

    def force_close(self, offer: Offer) -> None:
        """Close a rescinded channel that the guest keeps open."""
        self._close(offer)

    def disconnect(self) -> None:
        """Close all channels and forget all that the guest has set up; the offers stay."""
        connection, self.connection = self.connection, None
        for offer in self.offers:
            self._close_alone(offer)
        if connection and connection.interrupt_page is not None:
            self.actions.set_interrupt_page(None)
        self.gpadls.clear()
        for offer in list(self.offers):
            offer.state, offer.channel_id, offer.broken = HIDDEN, 0, None
            if offer.removed or offer.subchannel_index:
                self._drop(offer)

    # From the guest ---------------------------------------------------------------------------------

    def handle(self, data: bytes, connection_id: int) -> None:
        """Serve one message that the guest posted to `connection_id`."""
        try:
            message, fields = messages.decode(data)
        except MessageError as error:
            self.actions.violation(str(error))
            return
        if message.name == "INITIATE_CONTACT":
            self._initiate_contact(fields, connection_id)
            return
        handler = self._handlers.get(message.name)
        if handler is None:
            self.actions.violation(f"{message.name} is not for guests to send here")
        elif self.connection is None:
            self.actions.violation(f"{message.name} without a connection")
        elif message.since > self.connection.version:
            self.actions.violation(f"{message.name} at protocol {version_text(self.connection.version)}")
        else:
            handler(self.connection, fields)

    def _send(self, connection: Connection, name: str, **fields: Any) -> None:
        self.actions.send(encode(name, **fields), connection.target_vp, SINT)

    def _initiate_contact(self, fields: Any, connection_id: int) -> None:
        version = fields.version
        # Before 3.0 all messages go to VP 0, whatever the field holds.
        vp = fields.target_vp if version >= messages.WIN8_1 else 0
        if vp >= self.vp_count:
            self.actions.violation(f"INITIATE_CONTACT for VP {vp} of {self.vp_count}")
            return
        self.disconnect()
        sint, vtl = SINT, 0
        if version >= messages.V5_0:
            sint = fields.interrupt_page_or_target & 0xFF
        if version >= messages.V5_1:
            vtl = fields.interrupt_page_or_target >> 8 & 0xFF
        page = fields.interrupt_page_or_target if version < messages.WIN8 else 0
        refused = version not in messages.VERSIONS or version > self.max_version
        if not refused and (sint != SINT or vtl != 0):
            self.actions.violation(f"INITIATE_CONTACT for SINT {sint} of VTL {vtl}")
            refused = True
        if page and not self.page_valid(page):
            self.actions.violation(f"interrupt page at {page:#x} is not a page of guest RAM")
            refused = True
        state = STATUS_SUCCESS
        if bool(fields.parent_to_child_monitor) != bool(fields.child_to_parent_monitor):
            self.actions.violation("INITIATE_CONTACT with one monitor page of two")
            # Guests before 2.4 know no failure but "unsupported".
            refused = refused or version < messages.WIN8
            state = CONNECTION_FAILED
        if refused:
            response = {"supported": 0, "connection_state": 0, "version_or_connection_id": 0}
        else:
            answer = connection_id if version >= messages.V5_0 else version
            response = {"supported": 1, "connection_state": state, "version_or_connection_id": answer}
        if not refused and state == STATUS_SUCCESS:
            self.connection = Connection(version, vp, connection_id, page or None)
            if page:
                self.actions.set_interrupt_page(page)
        self.actions.send(encode("VERSION_RESPONSE", **response), vp, SINT)

    def page_valid(self, gpa: int) -> bool:
        """Whether `gpa` can be an interrupt page."""
        try:
            self.memory.view(gpa, PAGE_SIZE, write=True)
        except GuestMemoryError:
            return False
        return gpa % PAGE_SIZE == 0

    def _unload(self, connection: Connection, fields: Any) -> None:
        self.disconnect()
        self._send(connection, "UNLOAD_COMPLETE")

    # Offers -----------------------------------------------------------------------------------------

    def _request_offers(self, connection: Connection, fields: Any) -> None:
        if connection.offers_requested:
            self.actions.violation("REQUEST_OFFERS for the second time")
            return
        connection.offers_requested = True
        for offer in sorted(self.offers, key=lambda offer: offer.key):
            self._send_offer(connection, offer)
        self._send(connection, "ALL_OFFERS_DELIVERED")

    def _send_offer(self, connection: Connection, offer: Offer) -> None:
        used = {other.channel_id for other in self.offers}
        offer.channel_id = next((i for i in range(1, MAX_CHANNELS + 1) if i not in used), 0)
        if not offer.channel_id:
            self.actions.violation(f"no channel id is left for {offer.device}")
            return
        offer.state = OFFERED
        self._send(
            connection,
            "OFFER_CHANNEL",
            interface_id=offer.interface_id,
            instance_id=offer.instance_id,
            flags=offer.flags,
            mmio_megabytes=offer.mmio_megabytes,
            user_defined=offer.user_defined.ljust(120, b"\0"),
            subchannel_index=offer.subchannel_index,
            channel_id=offer.channel_id,
            # Guests from 1.1 on then signal this channel alone; 0.13 has no such field.
            is_dedicated=1,
            connection_id=offer.channel_id | SINT << 12,
        )

    def _rescind(self, offer: Offer) -> None:
        assert self.connection is not None
        offer.state = RESCINDED
        self._send(self.connection, "RESCIND_CHANNEL_OFFER", channel_id=offer.channel_id)

    def _drop(self, offer: Offer) -> None:
        self.offers.remove(offer)
        self.actions.offer_gone(offer)

    def _rel_id_released(self, connection: Connection, fields: Any) -> None:
        offer = self._find(fields.channel_id)
        if offer is None:
            self.actions.violation(f"REL_ID_RELEASED for unknown channel {fields.channel_id}")
            return
        self._close(offer)
        for gpadl in self.gpadls.of_channel(offer.channel_id):
            self.actions.gpadl_released(offer, gpadl.id)
            self.gpadls.remove(gpadl)
        offer.state, offer.channel_id = HIDDEN, 0
        if offer.removed or offer.subchannel_index:
            self._drop(offer)

    def _find(self, channel_id: int) -> Offer | None:
        if not channel_id:
            return None
        return next((offer for offer in self.offers if offer.channel_id == channel_id), None)

    # Channels ---------------------------------------------------------------------------------------

    def _open_channel(self, connection: Connection, fields: Any) -> None:
        offer = self._find(fields.channel_id)
        if offer is None or offer.opened is not None:
            what = "open" if offer else "unknown"
            self.actions.violation(f"OPEN_CHANNEL for {what} channel {fields.channel_id}")
            return
        error = self._try_open(connection, offer, fields)
        if error is not None:
            self.actions.violation(f"OPEN_CHANNEL {fields.channel_id} ({offer.device}) refused: {error}")
        status = STATUS_SUCCESS if error is None else STATUS_UNSUCCESSFUL
        self._send(
            connection, "OPEN_CHANNEL_RESULT", channel_id=fields.channel_id, open_id=fields.open_id, status=status
        )

    def _try_open(self, connection: Connection, offer: Offer, fields: Any) -> str | None:
        # The field means something else to guests before 2.4, whose channels all interrupt VP 0.
        vp = fields.target_vp if connection.version >= messages.WIN8 else 0
        if offer.state == RESCINDED:
            return "it has been rescinded"
        if vp >= self.vp_count and vp != NO_INTERRUPTS:
            return f"VP {vp} of {self.vp_count}"
        gpadl = self.gpadls.get(fields.gpadl_id)
        if gpadl is None or not gpadl.complete or gpadl.channel_id != offer.channel_id or gpadl.tearing_down:
            return f"GPADL {fields.gpadl_id:#x} is not this channel's"
        downstream = fields.downstream_page_offset
        try:
            incoming, outgoing = self.gpadls.use_as_ring(gpadl, downstream)
        except GpadlError as error:
            return str(error)
        request = OpenRequest(fields.open_id, gpadl.id, downstream, vp, fields.user_data, incoming, outgoing)
        refused = self.actions.open_channel(offer, request)
        if refused is not None:
            self.gpadls.release_ring(offer.channel_id)
            return refused
        offer.state, offer.opened = OPEN, request
        return None

    def _close_channel(self, connection: Connection, fields: Any) -> None:
        offer = self._find(fields.channel_id)
        if offer is None or (offer.opened is None and offer.state != RESCINDED):
            self.actions.violation(f"CLOSE_CHANNEL for channel {fields.channel_id}, which is not open")
            return
        self._close(offer)

    def _close(self, offer: Offer) -> None:
        """Close a channel if it is open, and with a primary channel its sub-channels, which vanish."""
        if self._close_alone(offer) and not offer.subchannel_index:
            for other in self.offers:
                if other.subchannel_index and other.device == offer.device:
                    self._close_alone(other)
                    if other.state == OFFERED:
                        self._rescind(other)

    def _close_alone(self, offer: Offer) -> bool:
        if offer.opened is None:
            return False
        opened, offer.opened = offer.opened, None
        self.actions.close_channel(offer)
        if offer.state == OPEN:
            offer.state = OFFERED
        self.gpadls.release_ring(offer.channel_id)
        gpadl = self.gpadls.get(opened.gpadl_id)
        if gpadl is not None and gpadl.tearing_down:
            self._finish_teardown(offer, gpadl)
        return True

    def _modify_channel(self, connection: Connection, fields: Any) -> None:
        offer = self._find(fields.channel_id)
        status = STATUS_SUCCESS
        if offer is None or offer.opened is None or fields.target_vp >= self.vp_count:
            self.actions.violation(f"MODIFY_CHANNEL {fields.channel_id} to VP {fields.target_vp}")
            status = STATUS_UNSUCCESSFUL
        else:
            self.actions.retarget_channel(offer, fields.target_vp)
        if connection.version >= messages.V5_3:
            self._send(connection, "MODIFY_CHANNEL_RESPONSE", channel_id=fields.channel_id, status=status)

    # Reserved channels outlive the connection for crash dumps; we keep none.

    def _open_reserved(self, connection: Connection, fields: Any) -> None:
        if self._reserved_target_valid(fields):
            self.actions.violation(f"OPEN_RESERVED_CHANNEL {fields.channel_id} refused: not supported")
            refusal = encode("OPEN_CHANNEL_RESULT", channel_id=fields.channel_id, open_id=0, status=STATUS_UNSUCCESSFUL)
            self.actions.send(refusal, fields.target_vp, fields.target_sint)

    def _close_reserved(self, connection: Connection, fields: Any) -> None:
        if self._reserved_target_valid(fields):
            answer = encode("CLOSE_RESERVED_RESPONSE", channel_id=fields.channel_id)
            self.actions.send(answer, fields.target_vp, fields.target_sint)

    def _reserved_target_valid(self, fields: Any) -> bool:
        if fields.target_vp < self.vp_count and fields.target_sint < 16:
            return True
        self.actions.violation(f"reserved channel for SINT {fields.target_sint} of VP {fields.target_vp}")
        return False

    def _tl_connect(self, connection: Connection, fields: Any) -> None:
        if connection.version >= messages.WIN10_RS3:
            self._send(
                connection,
                "TL_CONNECT_REQUEST_RESULT",
                endpoint_id=fields.endpoint_id,
                service_id=fields.service_id,
                status=STATUS_CONNECTION_REFUSED,
            )

    # GPADLs -----------------------------------------------------------------------------------------

    def _gpadl_header(self, connection: Connection, fields: Any) -> None:
        offer = self._find(fields.channel_id)
        if offer is None or self.gpadls.get(fields.gpadl_id) is not None:
            what = f"in use already: {fields.gpadl_id:#x}" if offer else f"of unknown channel {fields.channel_id}"
            self.actions.violation(f"GPADL_HEADER {what}")
            return
        gpadl = Gpadl(fields.gpadl_id, fields.channel_id, fields.length, fields.range_count)
        try:
            if offer.state == RESCINDED:
                raise GpadlError("its channel has been rescinded")
            self.gpadls.begin(gpadl)
        except GpadlError as error:
            self._gpadl_refused(connection, gpadl, error)
            return
        self._gpadl_data(connection, gpadl, fields.data)

    def _gpadl_body(self, connection: Connection, fields: Any) -> None:
        gpadl = self.gpadls.get(fields.gpadl_id)
        if gpadl is None or gpadl.complete:
            self.actions.violation(f"GPADL_BODY for GPADL {fields.gpadl_id:#x}, which waits for none")
            return
        self._gpadl_data(connection, gpadl, fields.data)

    def _gpadl_data(self, connection: Connection, gpadl: Gpadl, data: bytes) -> None:
        try:
            if self.gpadls.extend(gpadl, data):
                self._gpadl_created(connection, gpadl, STATUS_SUCCESS)
        except GpadlError as error:
            self._gpadl_refused(connection, gpadl, error)

    def _gpadl_refused(self, connection: Connection, gpadl: Gpadl, error: GpadlError) -> None:
        self.actions.violation(f"GPADL {gpadl.id:#x} of channel {gpadl.channel_id} refused: {error}")
        self._gpadl_created(connection, gpadl, STATUS_UNSUCCESSFUL)

    def _gpadl_created(self, connection: Connection, gpadl: Gpadl, status: int) -> None:
        self._send(connection, "GPADL_CREATED", channel_id=gpadl.channel_id, gpadl_id=gpadl.id, status=status)

    def _gpadl_teardown(self, connection: Connection, fields: Any) -> None:
        gpadl = self.gpadls.get(fields.gpadl_id)
        if gpadl is None or gpadl.channel_id != fields.channel_id or gpadl.tearing_down:
            self.actions.violation(f"GPADL_TEARDOWN for GPADL {fields.gpadl_id:#x} of channel {fields.channel_id}")
            return
        offer = self._find(gpadl.channel_id)
        assert offer is not None  # a channel's GPADLs go with its id
        if offer.opened is not None and offer.opened.gpadl_id == gpadl.id:
            gpadl.tearing_down = True
        else:
            self._finish_teardown(offer, gpadl)

    def _finish_teardown(self, offer: Offer, gpadl: Gpadl) -> None:
        gpadl.tearing_down = True  # its device finds it no longer, and is told to let go if it has before
        self.actions.gpadl_released(offer, gpadl.id)
        self.gpadls.remove(gpadl)
        if self.connection is not None:
            self._send(self.connection, "GPADL_TORNDOWN", gpadl_id=gpadl.id)
