"""What a differencing VHD says of its parent, read and written."""

from __future__ import annotations

import os

from devices.storage.chain import Layer, ParentLink, absolute_name, parent_paths, relative_name
from devices.storage.vhd.layout import EPOCH, LOCATOR, SECTOR, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile

#: Platform codes of names relative to the child, and of absolute ones, with how they are encoded. W2ru and W2ku are
#: those in use; Wi2r and Wi2k are their deprecated forms.
_RELATIVE = {b"W2ru": "utf-16-le", b"Wi2r": "cp1252"}
_ABSOLUTE = {b"W2ku": "utf-16-le", b"Wi2k": "cp1252"}
_URL = b"MacX"

#: Bytes of a name that are read at most; paths of Windows have up to 32767 characters.
MAX_LOCATOR = 1 << 16


def read_link(file: HostFile, header: Header) -> ParentLink:
    """The parent that `header` names; raises OSError."""
    relative, absolute = [], []
    for code, offset, length in header.locators():
        if not 0 < length <= MAX_LOCATOR or offset + length > file.size():
            continue  # what cannot be a name may be missing: others may lead to the parent
        raw = file.read_bytes(offset, length)
        if code in _RELATIVE:
            relative.append(_text(raw, _RELATIVE[code]))
        elif code in _ABSOLUTE:
            absolute.append(_text(raw, _ABSOLUTE[code]))
        elif code == _URL:
            absolute.append(_path_of_url(_text(raw, "utf-8")))
    names = [header.parent_name] if header.parent_name else []
    name = next(iter(relative + absolute + names), "")
    wanted = header.parent_id

    def mismatch(parent: Layer) -> str:
        return "" if parent.identity == wanted else f"its id is {parent.identity.hex()}, not {wanted.hex()}"

    return ParentLink(name, parent_paths(file.path, relative, absolute + names), "vhd", mismatch)


class NewLink:
    """What a new child writes of its parent: the fields of its header, and the `sectors` behind that."""

    def __init__(self, child: str, parent: Layer, offset: int) -> None:
        """Name `parent` in the image to be at the path `child`, with the names from `offset` on; raises DiskError."""
        from urllib.parse import quote

        path = os.path.realpath(parent.path)
        self.parent_id = parent.identity
        self.parent_timestamp = timestamp_of(path)
        self.parent_name = os.path.basename(path)
        names = (
            (b"W2ru", relative_name(child, path).encode("utf-16-le")),
            (b"W2ku", absolute_name(path).encode("utf-16-le")),
            (_URL, f"file://{quote(path)}".encode()),
        )
        self.sectors = b""
        self.locators = b""
        for code, name in names:
            room = -(-len(name) // SECTOR) * SECTOR
            # The specification counts this room in sectors, all known writers in bytes; readers go by the length.
            self.locators += LOCATOR.pack(code, room, len(name), 0, offset + len(self.sectors))
            self.sectors += name.ljust(room, b"\0")


def timestamp_of(path: str) -> int:
    """When a file was last written, in whole seconds since EPOCH."""
    return int(os.stat(path).st_mtime) - EPOCH


def _text(raw: bytes, encoding: str) -> str:
    return raw.decode(encoding, "replace").split("\0")[0]


def _path_of_url(url: str) -> str:
    from urllib.parse import unquote

    if not url.startswith("file://"):
        return url
    return unquote("/" + url[len("file://") :].partition("/")[2])
