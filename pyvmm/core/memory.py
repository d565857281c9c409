"""Guest RAM: anonymous memory files mapped into this process, and the only way to touch them.

Layout of a PC: RAM from 0 up to the hole below 4 GiB, the rest from 4 GiB on.
"""

from __future__ import annotations

import mmap
import os

from pyvmm.core import _hot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_SIZE = 4096
#: Guest physical addresses [HOLE_START, HOLE_END) hold no RAM: MMIO windows, IOAPIC, LAPIC, firmware.
HOLE_START = 0xC000_0000
HOLE_END = 0x1_0000_0000

_MAP_NORESERVE = 0x4000


class GuestMemoryError(Exception):
    """An access outside guest RAM. `gpa` and `size` say which."""

    def __init__(self, gpa: int, size: int, why: str = "no RAM there") -> None:
        super().__init__(f"guest memory access of {size} bytes at GPA {gpa:#x}: {why}")
        self.gpa = gpa
        self.size = size


class Region:
    """A run of guest physical addresses backed by one mapping."""

    __slots__ = ("gpa", "map", "readonly", "size", "view")

    def __init__(self, gpa: int, mapping: mmap.mmap, readonly: bool) -> None:
        self.gpa = gpa
        self.map = mapping
        self.size = len(mapping)
        self.readonly = readonly
        self.view = memoryview(mapping)


class GuestMemory:
    """The RAM of one VM, and its ROMs.

    `size` is in bytes, a multiple of the page size. Pages cost host memory only once they are touched, so
    `size` may exceed the host's. With `huge_pages` the kernel is asked for transparent huge pages.
    """

    def __init__(self, size: int, huge_pages: bool = False) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"memory size {size} is not a positive multiple of {PAGE_SIZE}")
        self.size = size
        self.regions: list[Region] = []
        #: The same regions for C code.
        self.hot = _hot.Memory()
        fd = os.memfd_create("pyvmm-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            low = min(size, HOLE_START)
            self._map(fd, 0, low, 0, huge_pages)
            if size > low:
                self._map(fd, HOLE_END, size - low, low, huge_pages)
        finally:
            os.close(fd)  # the mappings live on

    def _map(self, fd: int, gpa: int, length: int, offset: int, huge_pages: bool) -> None:
        mapping = mmap.mmap(fd, length, mmap.MAP_SHARED | _MAP_NORESERVE, offset=offset)
        if huge_pages:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._add(Region(gpa, mapping, False))

    def _add(self, region: Region) -> None:
        self.hot.add(region.gpa, region.map, region.readonly)
        self.regions.append(region)

    def add_rom(self, gpa: int, image: bytes) -> Region:
        """Map `image` read-only for the guest at page-aligned `gpa`; its length is a multiple of the page size.

        Raises ValueError if it is not, or if something is there already.
        """
        if gpa % PAGE_SIZE or len(image) % PAGE_SIZE or not image:
            raise ValueError(f"a ROM of {len(image)} bytes at {gpa:#x} is not made of whole pages")
        mapping = mmap.mmap(-1, len(image), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping[:] = image
        region = Region(gpa, mapping, True)
        self._add(region)
        return region

    @property
    def top(self) -> int:
        """The first GPA above all RAM."""
        return max(region.gpa + region.size for region in self.regions if not region.readonly)

    def ram_ranges(self) -> Iterator[tuple[int, int]]:
        """(GPA, length) of each run of RAM, lowest first."""
        for region in self.regions:
            if not region.readonly:
                yield region.gpa, region.size

    def view(self, gpa: int, size: int, *, write: bool = False) -> memoryview:
        """Return a zero-copy view of `size` bytes at `gpa`.

        Raises GuestMemoryError if any byte lies outside one region, or in a ROM when `write` is set.
        """
        if size >= 0:
            for region in self.regions:
                offset = gpa - region.gpa
                if offset >= 0 and offset + size <= region.size:
                    if write and region.readonly:
                        raise GuestMemoryError(gpa, size, "read-only memory")
                    return region.view[offset : offset + size]
        raise GuestMemoryError(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of `size` bytes at `gpa`; raises GuestMemoryError."""
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `gpa`; raises GuestMemoryError."""
        self.view(gpa, len(data), write=True)[:] = data

    def forget_page(self, gpa: int) -> None:
        """Unmap the page of RAM at `gpa`, if there is any, until it is touched again. Its contents stay.

        KVM drops its own mapping too, so that the guest's next access to the page faults on the host.
        """
        for region in self.regions:
            offset = gpa - region.gpa
            if 0 <= offset < region.size and not region.readonly:
                region.map.madvise(mmap.MADV_DONTNEED, offset // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE)
