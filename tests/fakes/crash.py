"""A file on a medium that forgets: what was not flushed may be lost, torn and reordered by a power cut.

`CrashFile` stands in for `HostFile`. Its `Medium` keeps the content that is durable, the content that reads see, and
the changes between the two. The model is that of a page cache over a file system with a journal: the medium writes
whole atoms (512 or 4096 bytes), each with the content that it had after any one of the changes; the file's size is one
that it had. A flush brings everything down.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from devices.storage.file import HostFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from random import Random

#: No file of this process ever has this descriptor, so whoever uses it past the file layer fails.
_NO_FD = 1 << 30


class _Change:
    """One unflushed operation: the atoms as it left them (None reads as zeros), and the size where it changed that."""

    __slots__ = ("atoms", "cuts", "size")

    def __init__(self, atoms: dict[int, bytes | None], size: int | None = None, cuts: bool = False) -> None:
        self.atoms = atoms
        self.size = size
        self.cuts = cuts  # a truncation: its size and its atoms come or stay away together


class Medium:
    """The sparse content of one file, durable and cached, in atoms of `atom` bytes."""

    def __init__(self, atom: int = 512) -> None:
        self.atom = atom
        self.size = 0
        self.cached: dict[int, bytes] = {}
        self._durable: dict[int, bytes] = {}
        self._durable_size = 0
        self._changes: list[_Change] = []

    def read(self, offset: int, length: int) -> bytes:
        atom = self.atom
        first, last = offset // atom, (offset + length - 1) // atom
        zeros = bytes(atom)
        data = b"".join(self.cached.get(index, zeros) for index in range(first, last + 1))
        return data[offset - first * atom :][:length]

    def write(self, offset: int, data: bytes) -> None:
        if data:
            end = offset + len(data)
            self._change(_Change(self._cut(offset, data), size=end if end > self.size else None))

    def write_zeros(self, offset: int, length: int) -> None:
        """Zero a range of the file; as when punching a hole, its size stays."""
        end = min(offset + length, self.size)
        if offset < end:
            self._change(_Change(self._zeroed(offset, end)))

    def truncate(self, size: int) -> None:
        self._change(_Change(self._zeroed(size, self.size), size=size, cuts=True))

    def flush(self) -> None:
        for change in self._changes:
            for index in change.atoms:
                if index in self.cached:
                    self._durable[index] = self.cached[index]
                else:
                    self._durable.pop(index, None)
        self._durable_size = self.size
        self._changes.clear()

    def crash(self, rng: Random) -> Medium:
        """The medium as one possible power cut at this instant leaves it."""
        after = Medium(self.atom)
        after.cached = dict(self._durable)
        after.size = self._durable_size
        sizes = sum(change.size is not None for change in self._changes)
        sizes = rng.choice((0, sizes, rng.randint(0, sizes)))  # the first of the new sizes survive
        keep, tear = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)), rng.choice((0.0, 0.5))
        for change in self._changes:
            if change.size is not None:
                sizes -= 1
                if sizes > 0 or (sizes == 0 and (change.cuts or rng.random() >= tear)):
                    after.size = change.size
                elif sizes == 0:  # the write extended the file in steps
                    after.size = max(after.size, rng.randint(after.size, change.size) // self.atom * self.atom)
            if sizes >= 0 if change.cuts else rng.random() < keep:
                after._survive(change, rng, 0.0 if change.cuts else tear)
        # Nothing of what lies beyond the end comes back when the file grows again.
        for index in [index for index in after.cached if (index + 1) * self.atom > after.size]:
            rest = after.size - index * self.atom
            content = after.cached.pop(index)
            if rest > 0:
                after.cached[index] = content[:rest].ljust(self.atom, b"\0")
        after._durable = dict(after.cached)
        after._durable_size = after.size
        return after

    def _survive(self, change: _Change, rng: Random, tear: float) -> None:
        indices = list(change.atoms)
        if rng.random() < tear:
            cut = rng.randrange(len(indices) + 1)
            indices = rng.choice((indices[:cut], indices[cut:], [index for index in indices if rng.random() < 0.5]))
        for index in indices:
            self._put(index, change.atoms[index])

    def _change(self, change: _Change) -> None:
        for index, content in change.atoms.items():
            self._put(index, content)
        if change.size is not None:
            self.size = change.size
        self._changes.append(change)

    def _put(self, index: int, content: bytes | None) -> None:
        if content is None:
            self.cached.pop(index, None)
        else:
            self.cached[index] = content

    def _cut(self, offset: int, data: bytes) -> dict[int, bytes | None]:
        """The atoms that `data` at `offset` touches, with it in them."""
        atom, end = self.atom, offset + len(data)
        first, last = offset // atom, (end - 1) // atom
        head, tail = offset - first * atom, (last + 1) * atom - end
        if head or tail:
            before = self.read(first * atom, head) if head else b""
            data = before + data + (self.read(end, tail) if tail else b"")
        return {index: data[(index - first) * atom :][:atom] for index in range(first, last + 1)}

    def _zeroed(self, offset: int, end: int) -> dict[int, bytes | None]:
        atoms: dict[int, bytes | None] = {}
        whole = range(-(-offset // self.atom), end // self.atom)
        if len(whole) > len(self.cached):
            atoms.update((index, None) for index in self.cached if index in whole)
        else:
            atoms.update((index, None) for index in whole)
        for start, stop in ((offset, whole.start * self.atom), (max(offset, whole.stop * self.atom), end)):
            if start < (stop := min(stop, end)):
                atoms.update(self._cut(start, bytes(stop - start)))
        return atoms


class CrashFile(HostFile):
    """`HostFile` on a `Medium`.

    `on_change` is called after each operation that changes the medium or flushes it, which is each step at
    which a power cut makes a difference. `fail_after` arranges for one operation to fail.
    """

    def __init__(self, medium: Medium, path: str = "crash.img", readonly: bool = False) -> None:
        self.medium = medium
        self.path = path
        self.readonly = readonly
        self.is_block = False
        self.fd = _NO_FD
        self.on_change: Callable[[], None] = lambda: None
        self.failed = False
        self._unflushed = False
        self._countdown = 0
        self._error = 0

    def fail_after(self, steps: int, error: int) -> None:
        """Let the operation after the next `steps` fail with `error`, an errno; -1 steps to let none fail."""
        self._countdown = steps + 1
        self._error = error

    def key(self) -> tuple[int, int]:
        return 0, id(self.medium)

    def size(self) -> int:
        self._enter()
        return self.medium.size

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        self._enter(fallible=True)
        length = sum(map(len, views))
        if not length:
            return
        data = memoryview(self.medium.read(offset, min(length, max(0, self.medium.size - offset))))
        for view in views:
            piece, data = data[: len(view)], data[len(view) :]
            view[: len(piece)] = piece
            if len(piece) < len(view):
                raise OSError(errno.EIO, f"end of image at {self.medium.size}")

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        data = b"".join(views)
        try:
            self._enter(changes=True, fallible=True)
        except OSError:
            # Half of what failed may have been written all the same.
            self.medium.write(offset, data[: len(data) // 2 // self.medium.atom * self.medium.atom])
            raise
        self.medium.write(offset, data)
        self.on_change()

    def flush(self) -> None:
        if self._unflushed:
            raise OSError(errno.EIO, "an earlier flush failed")
        try:
            self._enter(fallible=True)
        except OSError:
            self._unflushed = True
            raise
        self.medium.flush()
        self.on_change()

    def trim(self, offset: int, length: int) -> None:
        self.write_zeros(offset, length)

    def write_zeros(self, offset: int, length: int) -> None:
        self._enter(changes=True, fallible=True)
        self.medium.write_zeros(offset, length)
        self.on_change()

    def truncate(self, size: int) -> None:
        self._enter(changes=True, fallible=True)
        self.medium.truncate(size)
        self.on_change()

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        self._enter()
        atom, end = self.medium.atom, offset + length
        start, stored = offset, offset // atom in self.medium.cached
        for index in range(offset // atom, -(-end // atom)):
            if (index in self.medium.cached) != stored:
                if start < index * atom:
                    yield start, index * atom - start, stored
                start, stored = max(start, index * atom), not stored
        if start < end:
            yield start, end - start, stored

    def close(self) -> None:
        self.fd = -1

    def _enter(self, changes: bool = False, fallible: bool = False) -> None:
        if self.fd < 0 or (changes and self.readonly):
            raise OSError(errno.EBADF, "closed" if self.fd < 0 else "opened readonly")
        if fallible and self._countdown:
            self._countdown -= 1
            if not self._countdown:
                self.failed = True
                raise OSError(self._error, "arranged by the test")
