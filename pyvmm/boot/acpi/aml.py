"""AML, the byte code of ACPI's definition blocks, put together from its grammar.

Every function returns the bytes of one term; terms nest as arguments. Source: ACPI specification 6.5, chapter 20
(ACPI Machine Language) and section 6.4 (resource data types).
"""

from __future__ import annotations

import struct

_ZERO, _ONE = b"\x00", b"\x01"


def _sized(opcode: bytes, content: bytes) -> bytes:
    """Return `opcode` and `content` with the PkgLength that counts itself and the content (20.2.4)."""
    total = len(content) + 1
    if total < 1 << 6:
        return opcode + bytes([total]) + content
    for following in (1, 2, 3):
        total = len(content) + 1 + following
        if total < 1 << 4 + 8 * following:
            lead = following << 6 | total & 0xF
            return opcode + bytes([lead]) + (total >> 4).to_bytes(following, "little") + content
    raise ValueError(f"AML package of {len(content)} bytes is too long")


def name_string(path: str) -> bytes:
    r"""Return a NameString such as ``\_SB.VMOD`` or ``_HID``; segments are padded to four characters by ``_``."""
    root = path.startswith("\\")
    segments = [segment.ljust(4, "_").encode("ascii") for segment in path[root:].split(".") if segment]
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"AML name {path!r} has a segment of more than four characters")
    prefix = {0: b"\x00", 1: b"", 2: b"\x2e"}.get(len(segments), b"\x2f" + bytes([len(segments)]))
    return (b"\\" if root else b"") + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """Return the shortest encoding of an unsigned 64-bit number."""
    if value == 0:
        return _ZERO
    if value == 1:
        return _ONE
    for prefix, size in ((b"\x0a", 1), (b"\x0b", 2), (b"\x0c", 4)):
        if value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    """Return an ASCII string."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(identifier: str) -> bytes:
    """Return a seven-character id such as ``PNP0501`` in its compressed form (19.6.36)."""
    letters = [ord(letter) - ord("A") + 1 for letter in identifier[:3]]
    vendor = letters[0] << 10 | letters[1] << 5 | letters[2]
    return integer(int.from_bytes(struct.pack(">HH", vendor, int(identifier[3:], 16)), "little"))


def buffer(data: bytes) -> bytes:
    """Return a buffer of exactly `data`."""
    return _sized(b"\x11", integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """Return a package of up to 255 elements."""
    return _sized(b"\x12", bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """Return ``Name (path, value)``."""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Return ``Scope (path) { terms }``."""
    return _sized(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Return ``Device (path) { terms }``."""
    return _sized(b"\x5b\x82", name_string(path) + b"".join(terms))


def method(path: str, *terms: bytes, serialized: bool = False) -> bytes:
    """Return ``Method (path) { terms }``, without arguments."""
    return _sized(b"\x14", name_string(path) + bytes([serialized << 3]) + b"".join(terms))


def return_value(value: bytes) -> bytes:
    """Return ``Return (value)``."""
    return b"\xa4" + value


def bit_and(left: bytes, right: bytes, target: bytes) -> bytes:
    """Return ``And (left, right, target)``."""
    return b"\x7b" + left + right + target


def bit_or(left: bytes, right: bytes, target: bytes) -> bytes:
    """Return ``Or (left, right, target)``."""
    return b"\x7d" + left + right + target


def resources(*descriptors: bytes) -> bytes:
    """Return ``ResourceTemplate () { descriptors }``; the end tag's checksum 0 says that there is none."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(port: int, size: int) -> bytes:
    """Return ``IO (Decode16, port, port, 1, size)``: `size` ports from `port`."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def irq_no_flags(irq: int) -> bytes:
    """Return ``IRQNoFlags () {irq}``: an ISA interrupt, edge triggered and active high."""
    return struct.pack("<BH", 0x22, 1 << irq)


# Windows that a bus hands down to its children: ResourceProducer, PosDecode, MinFixed, MaxFixed.


def bus_numbers(first: int, count: int) -> bytes:
    """Return a WordBusNumber window."""
    return struct.pack("<BHBBB5H", 0x88, 0x0D, 2, 0x0C, 0, 0, first, first + count - 1, 0, count)


def io_window(base: int, size: int) -> bytes:
    """Return a WordIO window, EntireRange."""
    return struct.pack("<BHBBB5H", 0x88, 0x0D, 1, 0x0C, 0x03, 0, base, base + size - 1, 0, size)


def dword_memory(base: int, size: int, *, cacheable: bool = False) -> bytes:
    """Return a DWordMemory window, ReadWrite."""
    kind = 0x03 if cacheable else 0x01
    return struct.pack("<BHBBB5I", 0x87, 0x17, 0, 0x0C, kind, 0, base, base + size - 1, 0, size)


def qword_memory(base: int, size: int) -> bytes:
    """Return a QWordMemory window, Cacheable, ReadWrite."""
    return struct.pack("<BHBBB5Q", 0x8A, 0x2B, 0, 0x0C, 0x03, 0, base, base + size - 1, 0, size)
