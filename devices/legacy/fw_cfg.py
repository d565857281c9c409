"""QEMU's firmware configuration device, as far as a guest needs it to learn the size of its machine.

Source: QEMU, docs/specs/fw_cfg.rst, with the numbers of the items from its fw_cfg_keys.h. There is no DMA interface,
no file, and nothing that may be written.
"""

from __future__ import annotations

from devices.saved import check_version, saved_int
from pyvmm.core.bus import BusHandler
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from devices.legacy.ports import PortRange

#: The selector, 16 bits; its neighbour is the data register, 8 bits.
FW_CFG_PORT = 0x510

SIGNATURE, ID, RAM_SIZE, NB_CPUS, MAX_CPUS, FILE_DIR = 0x00, 0x01, 0x03, 0x05, 0x0F, 0x19
_TRADITIONAL_INTERFACE = 1
#: Bit 14 of the selector asks for a writable item; QEMU has ignored it since 2.4.
_WRITE_CHANNEL = 0x4000


class FwCfg(Device, BusHandler):
    """Items by number, read byte by byte; past an item's end, and of an item that is not there, all bytes are 0.

    `ram` is in bytes.
    """

    name = "fw-cfg"

    def __init__(self, ram: int, cpus: int) -> None:
        self._items = {
            SIGNATURE: b"QEMU",
            ID: _TRADITIONAL_INTERFACE.to_bytes(4, "little"),
            RAM_SIZE: ram.to_bytes(8, "little"),
            NB_CPUS: cpus.to_bytes(2, "little"),
            MAX_CPUS: cpus.to_bytes(2, "little"),
            FILE_DIR: (0).to_bytes(4, "big"),
        }
        self.reset()

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [(FW_CFG_PORT, 2, self, self.name)]

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return (1 << 8 * size) - 1
        item = self._items.get(self._selected, b"")
        if self._offset >= len(item):
            return 0
        self._offset += 1
        return item[self._offset - 1]

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 2 and offset == 0:
            self._selected = value & ~_WRITE_CHANNEL
            self._offset = 0

    def reset(self) -> None:
        self._selected = 0
        self._offset = 0

    def save(self) -> dict[str, Any]:
        return {"version": 1, "selected": self._selected, "offset": self._offset}

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        selected = saved_int(state, "selected", 0, 0xFFFF)
        self._offset = saved_int(state, "offset", 0, len(self._items.get(selected, b"")))
        self._selected = selected

    def inspect(self) -> dict[str, Any]:
        return {"selected": self._selected, "offset": self._offset}
