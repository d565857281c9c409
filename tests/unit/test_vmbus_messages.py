"""The message table: sizes as guests have them, encoder and decoder, and no crash whatever is posted."""

from __future__ import annotations

import struct
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.vmbus import messages
from devices.vmbus.messages import MESSAGES, MessageError, decode, describe, encode

# Whole messages, header included: sizes of the structures in Linux 6.1 include/linux/hyperv.h.
SIZES = {
    "OFFER_CHANNEL": 196,
    "RESCIND_CHANNEL_OFFER": 12,
    "OPEN_CHANNEL": 148,
    "OPEN_CHANNEL_RESULT": 20,
    "CLOSE_CHANNEL": 12,
    "GPADL_HEADER": 20,
    "GPADL_BODY": 16,
    "GPADL_CREATED": 20,
    "GPADL_TEARDOWN": 16,
    "GPADL_TORNDOWN": 12,
    "REL_ID_RELEASED": 12,
    "INITIATE_CONTACT": 40,
    "VERSION_RESPONSE": 16,
    "UNLOAD": 8,
    "TL_CONNECT_REQUEST": 40,
    "MODIFY_CHANNEL": 16,
    "MODIFY_CHANNEL_RESPONSE": 16,
}


def test_numbers_run_from_1_to_29() -> None:
    assert [message.number for message in MESSAGES] == list(range(1, 30))


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_sizes_are_those_of_the_guests_structures(name: str, size: int) -> None:
    (message,) = (message for message in MESSAGES if message.name == name)
    data = struct.pack("<II", message.number, 0) + bytes(240)
    assert decode(data[:size])[0] is message
    if size > 8:
        with pytest.raises(MessageError, match=f"{name} of {size - 1} bytes is too short"):
            decode(data[: size - 1])
    assert len(message.layout.build(decode(data[:size])[1])) == size - 8


def test_an_offer_has_every_field_in_its_place() -> None:
    data = encode(
        "OFFER_CHANNEL",
        interface_id=UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"),
        instance_id=UUID(int=1),
        flags=0x11,
        mmio_megabytes=8,
        user_defined=bytes(range(120)),
        subchannel_index=3,
        channel_id=5,
        is_dedicated=1,
        connection_id=0x2005,
    )
    assert data[:24].hex() == "0100000000000000d96361baa104294db60572e2ffb1dc7f"
    assert data[56:60] == bytes((0x11, 0, 8, 0))
    assert data[60:180] == bytes(range(120))
    assert data[180:] == struct.pack("<HHIBBHI", 3, 0, 5, 0xFF, 0, 1, 0x2005)


def test_decoding_undoes_encoding() -> None:
    message, fields = decode(encode("GPADL_CREATED", channel_id=7, gpadl_id=0xE1E10, status=-1))
    assert (message.name, fields.channel_id, fields.gpadl_id, fields.status) == ("GPADL_CREATED", 7, 0xE1E10, -1)


def test_bytes_after_a_message_are_ignored() -> None:
    assert decode(encode("CLOSE_CHANNEL", channel_id=7) + b"junk")[1].channel_id == 7


def test_traces_name_the_version_and_count_bytes() -> None:
    contact = struct.pack("<IIIIQQQ", 14, 0, 0x50003, 0, 2, 0, 0)
    assert describe(contact).startswith("INITIATE_CONTACT version=5.3 target_vp=0 ")
    assert describe(struct.pack("<IIII", 9, 0, 1, 2) + bytes(16)) == (
        "GPADL_BODY message_number=1 gpadl_id=2 data=<16 bytes>"
    )


@given(st.binary(max_size=240) | st.builds(lambda n, b: struct.pack("<II", n, 0) + b, st.integers(0, 40), st.binary()))
def test_any_bytes_decode_or_raise_message_error(data: bytes) -> None:
    try:
        decode(data)
    except MessageError:
        pass
    assert describe(data)


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs/vmbus.md").read_text()
    assert messages.table() in text
