"""Plans: what a SCSI command means for a disk, for somebody else to carry out. Sizes are bytes.

The command sets make them (hard disks `devices.synthetic.storvsp.scsi`, CD and DVD drives `devices.storage.mmc`); the
controllers, which hold disk and data buffer, carry them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.storage.sense import Sense


@dataclass(frozen=True, slots=True)
class Reply:
    """Done: give the initiator `data`, cut to its buffer."""

    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Fail:
    """Refused with CHECK CONDITION."""

    sense: Sense


@dataclass(frozen=True, slots=True)
class Conflict:
    """Refused with RESERVATION CONFLICT."""


@dataclass(slots=True)
class Read:
    """Read into the data buffer."""

    offset: int
    length: int


@dataclass(slots=True)
class Write:
    """Write from the data buffer; with `fua` it must be on stable storage before the status is given."""

    offset: int
    length: int
    fua: bool


@dataclass(frozen=True, slots=True)
class Verify:
    """Read and throw away: is the medium readable?"""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Bring the cache to stable storage."""


@dataclass(frozen=True, slots=True)
class Unmap:
    """Discard each (offset, length); with `fua` that must be on stable storage before the status is given."""

    ranges: list[tuple[int, int]]
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """Repeat `block` all over the range; `discard` allows to do so by discarding if that reads the same.

    With `fua` it must be on stable storage before the status is given.
    """

    offset: int
    length: int
    block: bytes
    discard: bool
    fua: bool = False


@dataclass(frozen=True, slots=True)
class LbaStatus:
    """Tell from `offset` on which blocks are stored, in up to `room` bytes. SBC-3 section 5.5."""

    offset: int
    room: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """First fetch `length` bytes out of the data buffer; `parse` then says the rest."""

    length: int
    parse: Callable[[bytes], Plan]


Plan = Reply | Fail | Conflict | Read | Write | Verify | Flush | Unmap | Fill | LbaStatus | Parameters
