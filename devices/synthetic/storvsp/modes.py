"""Mode pages of a disk: caching, where the guest may turn the write cache off, and control. SPC-4 7.5, SBC-3 6.4."""

from __future__ import annotations

import struct

from devices.storage.plans import Fail
from devices.storage.sense import (
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETERS,
    PARAMETER_LIST_LENGTH,
    SAVING_NOT_SUPPORTED,
)

_CACHING, _CONTROL, _ALL = 0x08, 0x0A, 0x3F
_WCE = 0x04
#: Page control: changeable values, and saved ones.
_CHANGEABLE, _SAVED = 1, 3
_HEADER_6, _HEADER_10 = struct.Struct(">BBBB"), struct.Struct(">HBBB1xH")


class ModePages:
    """The pages of one logical unit. Callers take turns."""

    def __init__(self, readonly: bool) -> None:
        self._readonly = readonly
        #: Whether writes may stay in a cache until they are flushed.
        self.write_cache = True

    def _pages(self, control: int) -> dict[int, bytes]:
        wce = _WCE if self.write_cache or control == _CHANGEABLE else 0
        if control not in (0, _CHANGEABLE):  # defaults
            wce = _WCE
        # Control: sense data of the fixed format, global log parameters, commands in any order.
        rules = bytes(2) if control == _CHANGEABLE else bytes((0x02, 0x10))
        return {_CACHING: struct.pack(">B17x", wce), _CONTROL: rules + bytes(8)}

    def sense(self, cdb: bytes, ten: bool) -> bytes | Fail:
        """The parameter list for MODE SENSE, of six or `ten` bytes."""
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == _SAVED:
            return Fail(SAVING_NOT_SUPPORTED)
        pages = self._pages(control)
        if page == _ALL and subpage in (0, 0xFF):
            wanted = list(pages)
        elif page in pages and not subpage:
            wanted = [page]
        else:
            return Fail(INVALID_FIELD_IN_CDB)
        body = b"".join(bytes((number, len(pages[number]))) + pages[number] for number in wanted)
        # WP, and DPOFUA: the FUA bit of writes is honoured. No block descriptors.
        specific = 0x10 | (0x80 if self._readonly else 0)
        if ten:
            return _HEADER_10.pack(6 + len(body), 0, specific, 0, 0) + body
        return _HEADER_6.pack(3 + len(body), 0, specific, 0) + body

    def select(self, data: bytes, ten: bool) -> Fail | None:
        """Take over the parameter list of MODE SELECT if nothing but the write cache differs; else tell why not."""
        header = _HEADER_10 if ten else _HEADER_6
        if len(data) < header.size:
            return Fail(PARAMETER_LIST_LENGTH)
        _, medium, _, *_, descriptors = header.unpack_from(data)
        if medium or descriptors:
            return Fail(INVALID_FIELD_IN_PARAMETERS)
        pages, now = data[header.size :], self._pages(0)
        wce = self.write_cache
        while pages:
            if len(pages) < 2:
                return Fail(PARAMETER_LIST_LENGTH)
            number, length = pages[0], pages[1]
            values, pages = pages[2 : 2 + length], pages[2 + length :]
            # PS and SPF, bits 7 and 6, are reserved here, or not ours.
            if number not in now or length != len(now[number]):
                return Fail(INVALID_FIELD_IN_PARAMETERS)
            if len(values) < length:
                return Fail(PARAMETER_LIST_LENGTH)
            if number == _CACHING:
                wce = bool(values[0] & _WCE)
                values = bytes((values[0] & ~_WCE | now[number][0] & _WCE,)) + values[1:]
            if values != now[number]:
                return Fail(INVALID_FIELD_IN_PARAMETERS)
        self.write_cache = wce
        return None
