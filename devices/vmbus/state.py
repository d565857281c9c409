"""The control plane's state as plain data, and back."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from devices.saved import saved_bool, saved_int
from devices.vmbus.messages import VERSIONS
from devices.vmbus.server import (
    HIDDEN,
    MAX_CHANNELS,
    NO_INTERRUPTS,
    OFFERED,
    OPEN,
    RESCINDED,
    Connection,
    Offer,
    OpenRequest,
    Server,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def save_server(server: Server) -> dict[str, Any]:
    """Return connection, GPADLs and what the guest knows of each offer."""
    connection = server.connection
    return {
        "connection": connection
        and {
            "version": connection.version,
            "target_vp": connection.target_vp,
            "message_connection": connection.message_connection,
            "interrupt_page": connection.interrupt_page,
            "offers_requested": connection.offers_requested,
        },
        "gpadls": server.gpadls.save(),
        "offers": [
            {
                "device": offer.device,
                "subchannel_index": offer.subchannel_index,
                "channel_id": offer.channel_id,
                "state": offer.state,
                "removed": offer.removed,
                "broken": offer.broken,
                "opened": offer.opened
                and {
                    "open_id": offer.opened.open_id,
                    "gpadl_id": offer.opened.gpadl_id,
                    "downstream": offer.opened.downstream,
                    "target_vp": offer.opened.target_vp,
                    "user_data": offer.opened.user_data,
                },
            }
            for offer in server.offers
        ],
    }


def restore_server(server: Server, state: dict[str, Any]) -> None:
    """Bring a server with its devices' offers, and nothing else, to a saved state.

    Raises ValueError, KeyError, TypeError or struct.error for state that was not saved by this program for this VM.
    """
    if state["connection"] is not None:
        server.connection = _connection(server, state["connection"])
    server.gpadls.restore(state["gpadls"])
    primaries = {offer.device: offer for offer in server.offers}
    for entry in state["offers"]:
        primary = primaries.get(entry["device"])
        if entry["removed"]:
            # Its device has gone; only the channel id is still the guest's.
            offer = Offer(entry["device"], UUID(int=0), UUID(int=0), removed=True)
            server.offers.append(offer)
        elif primary is None:
            raise ValueError(f"vmbus state has a channel of {entry['device']}, which is not on the bus")
        elif entry["subchannel_index"]:
            offer = replace(primary, subchannel_index=entry["subchannel_index"], mmio_megabytes=0, opened=None)
            server.offers.append(offer)
        else:
            offer = primary
        offer.channel_id = saved_int(entry, "channel_id", 0, MAX_CHANNELS)
        offer.state, offer.broken = entry["state"], entry["broken"]
        if offer.state not in (HIDDEN, OFFERED, OPEN, RESCINDED):
            raise ValueError(f"vmbus state has an offer in state {offer.state!r}")
        if entry["opened"] is not None:
            offer.opened = _opened(server, offer, entry["opened"])
    ids = [offer.channel_id for offer in server.offers if offer.channel_id]
    if len(set(ids)) != len(ids):
        raise ValueError("vmbus state has two channels with one id")


def _connection(server: Server, entry: dict[str, Any]) -> Connection:
    if entry["version"] not in VERSIONS:
        raise ValueError(f"vmbus state has protocol {entry['version']!r}")
    page = entry["interrupt_page"]
    if page is not None and not server.page_valid(page):
        raise ValueError(f"vmbus state has an interrupt page at {page:#x}")
    return Connection(
        entry["version"],
        saved_int(entry, "target_vp", 0, server.vp_count - 1),
        saved_int(entry, "message_connection", 1, 4),
        page,
        saved_bool(entry, "offers_requested"),
    )


def _opened(server: Server, offer: Offer, entry: dict[str, Any]) -> OpenRequest:
    gpadl = server.gpadls.get(entry["gpadl_id"])
    if gpadl is None or not gpadl.complete or gpadl.channel_id != offer.channel_id or not offer.channel_id:
        raise ValueError(f"vmbus state has no GPADL {entry['gpadl_id']:#x} for channel {offer.channel_id}")
    if entry["target_vp"] != NO_INTERRUPTS:
        saved_int(entry, "target_vp", 0, server.vp_count - 1)
    incoming, outgoing = server.gpadls.use_as_ring(gpadl, entry["downstream"])
    return OpenRequest(**entry, incoming=incoming, outgoing=outgoing)
