"""Disks for tests: one in memory that can be told to fail, and the conformance test of every back end."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from devices.storage.backend import DATA, PARENT, ZERO, Disk, Extent
from pyvmm.core._hot import FastDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Gate(threading.Event):
    """An event that is set, and calls `on_clear` before it is cleared."""

    def __init__(self, on_clear: Callable[[], None]) -> None:
        super().__init__()
        self._on_clear = on_clear
        self.set()

    def clear(self) -> None:
        self._on_clear()
        super().clear()


class MemoryDisk(Disk):
    """A disk in a bytearray.

    `fail` is raised by the next operations as long as it is set. `gate`, once cleared, holds those operations that
    `gated` names until it is set again, and `reached` tells that one got there. With `by_c` set, C code may reach the
    data, until one of those or `slow_down` stops it.
    """

    format = "memory"
    #: Whether disks made from now on can be reached by C code.
    by_c = False

    def __init__(self, size: int, readonly: bool = False, name: str = "memory") -> None:
        self.path = name
        self.size = size
        self.sector_size = 512
        self.physical_sector_size = 4096
        self.readonly = readonly
        self.trim_zeroes = True
        self.data = bytearray(size)
        if self.by_c:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, fd)
            os.ftruncate(fd, size)
            self.data = cast("bytearray", memoryview(mmap.mmap(fd, size)))  # as far as tests use it
            self.fast = FastDisk(fd, size, self.sector_size, not readonly)
        self._fail: OSError | None = None
        self.gate = Gate(self.slow_down)
        self.gated = {"read", "write", "flush", "trim"}
        self.reached = threading.Event()
        self.flushes = 0
        self.closed = False

    @property
    def identity(self) -> bytes:
        return self.path.encode().ljust(16, b".")[:16]

    def slow_down(self) -> None:
        """Have C leave everything to the methods here."""
        if self.fast is not None:
            self.fast.close()

    @property
    def fail(self) -> OSError | None:
        return self._fail

    @fail.setter
    def fail(self, error: OSError | None) -> None:
        self.slow_down()
        self._fail = error

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        self._enter("read")
        for view in views:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        self._enter("write")
        for view in views:
            self.data[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self) -> None:
        self._enter("flush")
        self.flushes += 1

    def trim(self, offset: int, length: int) -> None:
        self._enter("trim")
        self.data[offset : offset + length] = bytes(length)

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Runs of sectors that hold nothing but zeros, or something else."""
        end = offset + length
        while offset < end:
            zero = not any(self.data[offset : offset + self.sector_size])
            until = offset + self.sector_size
            while until < end and zero != any(self.data[until : until + self.sector_size]):
                until += self.sector_size
            yield Extent(offset, until - offset, ZERO if zero else DATA)
            offset = until

    def resize(self, size: int) -> None:
        self.slow_down()
        self.data = bytearray(self.data) + bytes(size - self.size)
        self.size = size

    def close(self) -> None:
        self.closed = True

    def _enter(self, operation: str) -> None:
        assert not self.closed, "I/O on a closed disk"
        if operation in self.gated:
            self.reached.set()
            self.gate.wait(30)
        if self.fail is not None:
            raise self.fail


class LayeredDisk(MemoryDisk):
    """A disk that differs from `parent` in the sectors that were written, trimmed ones among them."""

    def __init__(self, size: int, parent: MemoryDisk | None = None, name: str = "layered") -> None:
        super().__init__(size, name=name)
        self.parent = parent
        self.kinds = [ZERO if parent is None else PARENT] * (size // 512)

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        assert all(len(view) % 512 == 0 for view in views)
        for view in views:
            for at in range(0, len(view), 512):
                kind = self.kinds[(offset + at) // 512]
                piece = view[at : at + 512]
                if kind == DATA:
                    super().read(offset + at, [piece])
                elif kind == PARENT and self.parent is not None and offset + at < self.parent.size:
                    self.parent.read(offset + at, [piece])
                else:
                    piece[:] = bytes(512)
            offset += len(view)

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        super().write(offset, views)
        self._mark(offset, sum(map(len, views)), DATA)

    def trim(self, offset: int, length: int) -> None:
        super().trim(offset, length)
        self._mark(offset, length, ZERO)

    def resize(self, size: int) -> None:
        self.data = self.data[:size].ljust(size, b"\0")
        self.kinds = self.kinds[: size // 512] + [ZERO] * ((size - self.size) // 512)
        self.size = size

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            start, kind = offset, self.kinds[offset // 512]
            while offset < end and self.kinds[offset // 512] == kind:
                offset += 512
            yield Extent(start, offset - start, kind)

    def _mark(self, offset: int, length: int, kind: str) -> None:
        self.kinds[offset // 512 : (offset + length) // 512] = [kind] * (length // 512)


def disc(sectors: int = 200) -> MemoryDisk:
    """A CD or DVD of random content."""
    medium = MemoryDisk(sectors * 2048, readonly=True)
    medium.data[:] = os.urandom(sectors * 2048)
    medium.sector_size = medium.physical_sector_size = 2048
    medium.optical = True
    return medium


def check_disk(make: Callable[[int], Disk], examples: int = 25) -> None:
    """Hold a back end against a bytearray through random reads, writes, trims and flushes.

    `make(size)` returns a fresh, zeroed, writable disk.
    """
    sector, sectors = 512, 64
    spans = st.integers(0, sectors - 1).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(1, sectors - start))
    )

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.disk = make(sector * sectors)
            self.model = bytearray(sector * sectors)
            assert self.disk.size == len(self.model)

        @rule(span=spans, seed=st.binary(min_size=1, max_size=3), cut=st.integers(1, 4096))
        def write(self, span: tuple[int, int], seed: bytes, cut: int) -> None:
            offset, length = span[0] * sector, span[1] * sector
            data = (seed * (length // len(seed) + 1))[:length]
            pieces = [memoryview(data)[at : at + cut] for at in range(0, length, cut)]
            self.disk.write(offset, pieces)
            self.model[offset : offset + length] = data

        @rule(span=spans, cut=st.integers(1, 4096))
        def read(self, span: tuple[int, int], cut: int) -> None:
            offset, length = span[0] * sector, span[1] * sector
            buffer = bytearray(b"\xee" * length)
            self.disk.read(offset, [memoryview(buffer)[at : at + cut] for at in range(0, length, cut)])
            assert buffer == self.model[offset : offset + length]

        @rule(span=spans)
        def trim(self, span: tuple[int, int]) -> None:
            offset, length = span[0] * sector, span[1] * sector
            self.disk.trim(offset, length)
            if self.disk.trim_zeroes:
                self.model[offset : offset + length] = bytes(length)
            else:
                self.disk.read(offset, [memoryview(self.model)[offset : offset + length]])

        @rule()
        def flush(self) -> None:
            self.disk.flush()

        def teardown(self) -> None:
            self.disk.close()
            self.disk.close()

    run_state_machine_as_test(Machine, settings=settings(max_examples=examples, deadline=None))
