"""Small kernels to load: ELF executables, and bzImages around them in each compression."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Sequence

import lz4.block  # type: ignore[import-untyped]
import zstandard

#: (virtual address, physical address, bytes in the file, bytes in memory)
Segment = tuple[int, int, bytes, int]


def make_elf(segments: Sequence[Segment], entry: int, *, machine: int = 62, kind: int = 2, elf_class: int = 2) -> bytes:
    """Return an ELF file with one PT_LOAD per segment, after one PT_NOTE that is no one's business."""
    wide = elf_class == 2
    file_header = struct.Struct("<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH")
    program_header = struct.Struct("<IIQQQQQQ" if wide else "<IIIIIIII")
    header_size = 16 + file_header.size
    count = len(segments) + 1
    offset = header_size + count * program_header.size
    headers = program_header.pack(4, 0, 0, 0, 0, 0, 0, 0)
    contents = b""
    for vaddr, paddr, data, memsz in segments:
        place = (offset + len(contents), vaddr, paddr, len(data), memsz)
        headers += program_header.pack(1, 7, *place, 4096) if wide else program_header.pack(1, *place, 7, 4096)
        contents += data
    ident = b"\x7fELF" + bytes([elf_class, 1, 1]) + bytes(9)
    fields = file_header.pack(
        kind, machine, 1, entry, header_size, 0, 0, header_size, program_header.size, count, 0, 0, 0
    )
    return ident + fields + headers + contents


def make_multiboot_header(flags: int = 0, addresses: Sequence[int] = ()) -> bytes:
    """Return a Multiboot header with its address fields, if there are any."""
    checksum = -(0x1BADB002 + flags) & 0xFFFF_FFFF
    return struct.pack(f"<{3 + len(addresses)}I", 0x1BADB002, flags, checksum, *addresses)


def compress(data: bytes, compression: str) -> bytes:
    """Return a payload as the kernel's build makes it: with the unpacked size in the last four bytes."""
    size = struct.pack("<I", len(data))
    match compression:
        case "gzip":
            return gzip.compress(data)
        case "xz":
            filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
            return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters) + size
        case "lz4":
            payload = struct.pack("<I", 0x184C2102)
            for start in range(0, len(data), 1 << 16):
                block = lz4.block.compress(data[start : start + (1 << 16)], mode="high_compression", store_size=False)
                payload += struct.pack("<I", len(block)) + block
            return payload + size
        case "zstd":
            return zstandard.ZstdCompressor(level=19, write_checksum=True).compress(data) + size
    raise AssertionError(compression)


COMPRESSIONS = ("gzip", "xz", "lz4", "zstd")


def make_bzimage(
    payload: bytes, *, setup_sects: int = 4, initrd_addr_max: int = 0x7FFF_FFFF, cmdline_size: int = 2047
) -> bytes:
    """Return a bzImage with `payload` 0x40 bytes into its protected-mode part."""
    image = bytearray(((setup_sects or 4) + 1) * 512)
    image[0x1F1] = setup_sects
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x202] = b"\xeb\x6a"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<I", image, 0x22C, initrd_addr_max)
    struct.pack_into("<I", image, 0x230, 0x20_0000)
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<II", image, 0x248, 0x40, len(payload))
    struct.pack_into("<Q", image, 0x258, 0x100_0000)
    return bytes(image) + bytes(0x40) + payload + b"after the payload"
