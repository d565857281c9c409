"""What every format has to stand: a power cut at any step, with the image opening and holding what was flushed."""

from __future__ import annotations

import errno
import os
import random
import struct
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from devices.storage.backend import DiskError
from tests.fakes.crash import CrashFile, Medium

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from devices.storage.backend import Disk

#: Bytes that are written whole or not at all, and the model's grain.
_UNIT = 512
_ZERO = bytes(_UNIT)
_TAG = struct.Struct(">QQ")
#: After so many power cuts in one workload only some of the steps are tried.
_MANY = 150

_KINDS = (
    *("write", "write", "write", "zeros", "trim", "flush", "flush", "read", "resize"),
    *("reopen", "kill", "cut", "fail"),
)
_OPERATIONS = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.integers(0, 1 << 16), st.integers(0, 1 << 16)), min_size=6, max_size=40
)


def check_crashes(
    make: Callable[[CrashFile], Disk],
    reopen: Callable[[CrashFile], Disk],
    windows: Sequence[tuple[int, int]] = (),
    sizes: Sequence[int] = (),
    examples: int = 10,
    shrinks: bool = False,
) -> None:
    """Run random workloads on a format, and cut the power at every step of the file layer's calls.

    `make(file)` formats the empty `file` and opens the disk in it; `reopen(file)` opens it again. `windows`
    are the (offset, length) that are used and checked, where the whole disk would be too much; `sizes` those to
    resize to, also to smaller ones if the format `shrinks`. After each cut the image must open, at once or after
    further cuts in the middle of its recovery, and each sector must hold what it held at the last acknowledged flush,
    or what was written to it later. I/O errors may keep an operation from being done, but lose nothing either.
    PYVMM_CRASH_EXAMPLES in the environment sets another number of workloads, and has the shortest one that fails
    looked for.
    """

    wanted = os.environ.get("PYVMM_CRASH_EXAMPLES")
    phases = [phase for phase in settings().phases if wanted or phase not in (Phase.shrink, Phase.explain)]

    @settings(
        max_examples=int(wanted or examples),
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,  # so that what is raised is an AssertionError, and not a group of them
        suppress_health_check=list(HealthCheck),
    )
    @given(operations=_OPERATIONS, seed=st.integers(0, 1 << 32), atom=st.sampled_from((512, 4096)))
    def run(operations: list[tuple[str, int, int]], seed: int, atom: int) -> None:
        life = _Life(make, reopen, windows, sizes, shrinks, seed, atom)
        try:
            for operation in operations:
                life.do(*operation)
            life.do("cut", 0, 0)
        finally:
            life.abandon()

    run()


class _Model:
    """What each unit may hold: now, and after a power cut; and the sizes that the disk may have after one."""

    def __init__(self, now: dict[int, set[bytes]], size: int) -> None:
        self.now = now
        self.later = {unit: set(values) for unit, values in now.items()}
        self.sizes = {size}

    def copy(self) -> _Model:
        other = _Model(self.now, 0)
        other.later = {unit: set(values) for unit, values in self.later.items()}
        other.sizes = set(self.sizes)
        return other

    def flushed(self, size: int) -> None:
        self.later = {unit: set(values) for unit, values in self.now.items()}
        self.sizes = {size}


class _Life:
    """One workload: a disk on its medium, beside the model of it."""

    def __init__(
        self,
        make: Callable[[CrashFile], Disk],
        reopen: Callable[[CrashFile], Disk],
        windows: Sequence[tuple[int, int]],
        sizes: Sequence[int],
        shrinks: bool,
        seed: int,
        atom: int,
    ) -> None:
        self.reopen = reopen
        self.rng = random.Random(seed)
        self.sizes = sizes
        self.shrinks = shrinks
        self.serial = 0
        self.cuts = 0
        self.file = CrashFile(Medium(atom))
        self.disk = make(self.file)
        self.disk.flush()
        self.windows = list(windows) or [(0, max(self.disk.size, *sizes, 0))]
        self.points = sorted(
            offset for start, length in self.windows for offset in range(start, start + length, self.disk.sector_size)
        )
        now = {
            point // _UNIT + step: {_ZERO} for point in self.points for step in range(self.disk.sector_size // _UNIT)
        }
        now.update((unit, {value}) for unit, value in self._content(self.disk))
        self.model = _Model(now, self.disk.size)
        #: A state that a cut in the middle of the last operation left, and what it may hold.
        self.middle: tuple[Medium, _Model] | None = None
        self.file.on_change = self._cut_here

    def abandon(self) -> None:
        """Leave the disk as a killed process would; only what it holds of the host is given back."""
        self.file.on_change = lambda: None
        self.file.close()
        try:
            self.disk.close()
        except OSError:
            pass

    def do(self, kind: str, first: int, second: int) -> None:
        if kind == "fail":
            self.file.fail_after(first % 6, (errno.EIO, errno.ENOSPC)[second % 2])
            return
        if kind != "cut":
            self.middle = None
        offset, length = self._span(first, second, limit=1 << 16 if kind == "write" else None)
        getattr(self, f"_{kind}")(offset, length)
        self.file.fail_after(-1, 0)

    def _write(self, offset: int, length: int) -> None:
        self.serial += 1
        units = range(offset // _UNIT, (offset + length) // _UNIT)
        data = b"".join(_TAG.pack(self.serial, unit) * (_UNIT // _TAG.size) for unit in units)
        values = {unit: data[index * _UNIT :][:_UNIT] for index, unit in enumerate(units)}
        cut = self.rng.choice((512, 1000, 4096, length))
        views = [memoryview(data)[at : at + cut] for at in range(0, length, cut)]
        self._change(values, lambda: self.disk.write(offset, views))

    def _zeros(self, offset: int, length: int) -> None:
        units = range(offset // _UNIT, (offset + length) // _UNIT)
        self._change(dict.fromkeys(units, _ZERO), lambda: self.disk.write_zeros(offset, length))

    def _trim(self, offset: int, length: int) -> None:
        units = range(offset // _UNIT, (offset + length) // _UNIT)
        surely = self.disk.trim_zeroes
        self._change(dict.fromkeys(units, _ZERO), lambda: self.disk.trim(offset, length), surely)

    def _resize(self, first: int, second: int) -> None:
        before = self.disk.size
        sizes = [size for size in self.sizes if size >= before or self.shrinks]
        if not sizes:
            return
        after = self.rng.choice(sizes)
        values = {unit: _ZERO for unit in self.model.now if unit * _UNIT >= min(before, after)}
        self.model.sizes.add(after)
        self._change(values, lambda: self.disk.resize(after))
        assert self.disk.size in ((before, after) if self.file.failed else (after,))

    def _change(self, values: dict[int, bytes], act: Callable[[], None], surely: bool = True) -> None:
        values = {unit: value for unit, value in values.items() if unit in self.model.now}
        for unit, value in values.items():
            self.model.later[unit].add(value)
        done = self._attempt(act)
        for unit, value in values.items():
            if done and surely:
                self.model.now[unit] = {value}
            else:
                self.model.now[unit] = self.model.now[unit] | {value}

    def _flush(self, *_: int) -> None:
        if self._attempt(self.disk.flush):
            self.model.flushed(self.disk.size)

    def _read(self, *_: int) -> None:
        self._attempt(lambda: self._check(self.disk, self.model.now, "reads"))

    def _reopen(self, *_: int) -> None:
        """Close the disk and open it again; what was written is durable then."""
        if self._attempt(self.disk.close):
            self.model.flushed(self.disk.size)
        self._verify(self.file.medium.crash(self.rng), self.model)
        self._kill()

    def _kill(self, *_: int) -> None:
        """End the process but not the machine: the host still has all that was written, and flushes none of it."""
        medium, model = self.file.medium, self.model
        self.abandon()
        self._start(medium, model)
        for unit, values in model.later.items():
            self.model.later[unit] |= values
        self.model.sizes |= model.sizes

    def _cut(self, *_: int) -> None:
        """Cut the power, now or in the middle of the last operation, and go on with what is left."""
        medium, model = self.file.medium.crash(self.rng), self.model
        if self.middle is not None and self.rng.random() < 0.5:
            medium, model = self.middle
        self.abandon()
        self._start(medium, model)

    def _start(self, medium: Medium, model: _Model) -> None:
        self.file = CrashFile(medium)
        self.disk = self._open(self.file)
        self.middle = None
        self._check(self.disk, model.later, "after a power cut holds")
        assert self.disk.size in model.sizes
        now = {unit: {_ZERO} for unit in self.model.now}
        now.update((unit, {value}) for unit, value in self._content(self.disk))
        self.model = _Model(now, self.disk.size)
        self.file.on_change = self._cut_here

    def _attempt(self, act: Callable[[], None]) -> bool:
        """Whether `act` was done; it may only fail once the file has failed."""
        try:
            act()
        except OSError:
            if not self.file.failed:
                raise
            return False
        return True

    def _cut_here(self) -> None:
        """Try what a power cut at this step would leave."""
        self.cuts += 1
        if self.cuts > _MANY and self.rng.random() > 0.1:
            return
        if self.middle is None or self.rng.random() < 0.3:
            self.middle = self.file.medium.crash(self.rng), self.model.copy()
        self._verify(self.file.medium.crash(self.rng), self.model)

    def _verify(self, medium: Medium, model: _Model, depth: int = 0) -> None:
        """Open what a power cut left, and what a second one leaves in the midst of that."""
        again: Medium | None = None
        steps = 0

        def on_change() -> None:
            nonlocal again, steps
            steps += 1
            if self.rng.randrange(steps) == 0:
                again = medium.crash(self.rng)

        file = CrashFile(medium)
        file.on_change = on_change
        disk = self._open(file)
        try:
            self._check(disk, model.later, "after a power cut holds")
            assert disk.size in model.sizes, f"{disk.size} bytes after a power cut, not one of {sorted(model.sizes)}"
            found = _Model({unit: {value} for unit, value in self._content(disk)}, disk.size)
        finally:
            disk.close()
        if self.rng.random() < 0.2:
            again = medium
        if again is not None and depth < 3:
            self._verify(again, found, depth + 1)

    def _open(self, file: CrashFile) -> Disk:
        try:
            return self.reopen(file)
        except DiskError as error:
            raise AssertionError(f"refused after a power cut: {error}") from error

    def _check(self, disk: Disk, may: dict[int, set[bytes]], what: str) -> None:
        for unit, value in self._content(disk):
            if value not in may[unit]:
                names = ", ".join(sorted(map(_name, may[unit])))
                raise AssertionError(f"sector {unit} {what} {_name(value)}, not one of: {names}")

    def _content(self, disk: Disk) -> Iterator[tuple[int, bytes]]:
        for offset, length in self.windows:
            length = min(length, disk.size - offset)
            if length <= 0:
                continue
            data = bytearray(b"\xee" * length)
            disk.read(offset, [memoryview(data)])
            for at in range(0, length, _UNIT):
                yield (offset + at) // _UNIT, bytes(data[at : at + _UNIT])

    def _span(self, first: int, second: int, limit: int | None) -> tuple[int, int]:
        """A range of the disk that starts and ends at points of the windows: small, or anything."""
        points = [point for point in self.points if point < self.disk.size]
        index = first % len(points)
        offset = points[index]
        if second % 2:
            end = offset + (1 + second // 2 % 8) * self.disk.sector_size
        else:
            end = points[index + second // 2 % (len(points) - index)] + self.disk.sector_size
        return offset, min(end, self.disk.size, offset + limit if limit else end) - offset


def _name(value: bytes) -> str:
    serial, unit = _TAG.unpack_from(value)
    if value == _ZERO:
        return "zeros"
    if value == _TAG.pack(serial, unit) * (_UNIT // _TAG.size) and serial < 1 << 32:
        return f"write {serial} of sector {unit}"
    return f"{value[:8].hex()}..."
