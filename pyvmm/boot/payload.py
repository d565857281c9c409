"""The compressed kernel inside a bzImage.

A payload ends with four bytes that hold its unpacked size: gzip has them of itself, the kernel's build appends them
to the others (arch/x86/boot/compressed/mkpiggy.c). LZ4 is the "legacy" frame of lz4_Frame_format.md.
"""

from __future__ import annotations

import struct

from pyvmm.boot.entry import BootError

_LZ4_MAGIC = 0x184C2102
_LZ4_BLOCK_SIZE = 8 << 20
#: A kernel packed with the strongest preset of xz needs 65 MiB to unpack, one of zstd a window of 128 MiB.
_XZ_MEMORY_LIMIT = 256 << 20
_ZSTD_WINDOW_LIMIT = 128 << 20


class _Corrupt(Exception):
    pass


def unpack(name: str, payload: bytes, limit: int) -> bytes:
    """Return the unpacked payload; raise BootError naming `name` if it is corrupt or unpacks to more than `limit`."""
    compression = compression_of(payload)
    if compression is None:
        raise BootError(f"{name}: unknown kernel compression (payload begins with {payload[:6].hex(' ')})")
    decompress = _DECOMPRESSORS.get(compression)
    if decompress is None:
        raise BootError(f"{name}: kernel compressed with {compression}, only gzip, xz, lz4 and zstd are supported")
    size = int.from_bytes(payload[-4:], "little")
    if size > limit:
        raise BootError(f"{name}: kernel unpacks to {size >> 20} MiB, guest memory is {limit >> 20} MiB")
    try:
        image = decompress(payload, size)
    except _Corrupt as error:
        raise BootError(f"{name}: corrupt {compression} payload: {error}") from error
    if len(image) != size:
        raise BootError(f"{name}: corrupt {compression} payload: it does not unpack to {size} bytes")
    return image


def compression_of(data: bytes) -> str | None:
    """Return the name of the format that `data` begins with, or None."""
    return next((compression for magic, compression in _MAGICS if data.startswith(magic)), None)


# Each returns up to one byte more than `size`, so that an overlong payload is noticed but not unpacked.


def _gzip(payload: bytes, size: int) -> bytes:
    import zlib

    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        image = stream.decompress(payload, size + 1)
    except zlib.error as error:
        raise _Corrupt(error) from error
    if not stream.eof and len(image) <= size:
        raise _Corrupt("truncated")
    return image


def _xz(payload: bytes, size: int) -> bytes:
    import lzma

    try:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_LIMIT)
        image = stream.decompress(payload[:-4], size + 1)
    except lzma.LZMAError as error:
        raise _Corrupt(error) from error
    if not stream.eof and len(image) <= size:
        raise _Corrupt("truncated")
    return image


def _zstd(payload: bytes, size: int) -> bytes:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_LIMIT)
    chunks = []
    wanted = size + 1
    try:
        with decompressor.stream_reader(payload[:-4]) as reader:
            while wanted and (chunk := reader.read(wanted)):
                chunks.append(chunk)
                wanted -= len(chunk)
    except zstandard.ZstdError as error:
        raise _Corrupt(error) from error
    return b"".join(chunks)


def _lz4(payload: bytes, size: int) -> bytes:
    import lz4.block  # type: ignore[import-untyped]

    blocks = memoryview(payload)[4:-4]
    chunks = []
    wanted = size + 1
    while blocks and wanted > 0:
        if len(blocks) < 4:
            raise _Corrupt("truncated")
        (length,) = struct.unpack_from("<I", blocks)
        blocks = blocks[4:]
        if length == _LZ4_MAGIC:
            continue
        if not 0 < length <= len(blocks):
            raise _Corrupt("truncated")
        try:
            chunk = lz4.block.decompress(blocks[:length], uncompressed_size=min(_LZ4_BLOCK_SIZE, wanted))
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise _Corrupt(error) from error
        chunks.append(chunk)
        wanted -= len(chunk)
        blocks = blocks[length:]
    return b"".join(chunks)


_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (struct.pack("<I", _LZ4_MAGIC), "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
    (b"\x89LZO", "lzo"),
)
_DECOMPRESSORS = {"gzip": _gzip, "xz": _xz, "lz4": _lz4, "zstd": _zstd}
