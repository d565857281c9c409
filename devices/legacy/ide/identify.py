"""IDENTIFY data: what a device says of itself. ATA/ATAPI-8, IDENTIFY DEVICE and IDENTIFY PACKET DEVICE."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.legacy.ide.cd import CdDrive
    from devices.legacy.ide.disk import HardDisk

#: Sectors that one block of a MULTIPLE command may have at most.
MAX_MULTIPLE = 128
#: Sectors of a block where no firmware has chosen another number.
DEFAULT_MULTIPLE = 16
#: Blocks of 64 ranges that one DATA SET MANAGEMENT command may have.
MAX_TRIM_BLOCKS = 8
#: Multiword DMA modes 0-2, Ultra DMA modes 0-2: what a PIIX4 does.
_MULTIWORD_DMA, _ULTRA_DMA = 0x07, 0x07
_LBA_28_MAX = 0x0FFF_FFFF

# Command sets of words 82 and 83; 85 and 86 tell whether they are enabled.
_NOP, _LOOK_AHEAD, _WRITE_CACHE, _PACKET, _POWER, _SMART = 1 << 14, 1 << 6, 1 << 5, 1 << 4, 1 << 3, 1 << 0
_DEVICE_RESET = 1 << 9
_FLUSH_EXT, _FLUSH, _LBA_48 = 1 << 13, 1 << 12, 1 << 10
_FUA = 1 << 6
#: Bit 14 set and 15 clear: the word is valid.
_VALID = 1 << 14


def _text(text: str, size: int) -> bytes:
    """ASCII, padded by blanks; the first character of each pair is the word's high byte."""
    data = text.encode("ascii", "replace").ljust(size)[:size]
    return bytes(data[index ^ 1] for index in range(size))


class _Words:
    def __init__(self) -> None:
        self.data = bytearray(512)

    def __setitem__(self, word: int, value: int) -> None:
        struct.pack_into("<H", self.data, 2 * word, value)

    def long(self, word: int, value: int, words: int = 2) -> None:
        self.data[2 * word : 2 * (word + words)] = value.to_bytes(2 * words, "little")

    def text(self, word: int, text: str, size: int) -> None:
        self.data[2 * word : 2 * word + size] = _text(text, size)

    def names(self, serial: str, model: str) -> None:
        self.text(10, serial, 20)
        self.text(23, "1.1.0", 8)
        self.text(27, model, 40)

    def transfer_modes(self, mode: int) -> None:
        """PIO 0-4 and the DMA modes, of which `mode` (the operand of SET FEATURES) is selected."""
        self[49] = 0x0F00  # DMA, LBA, IORDY and that it may be disabled
        self[51] = self[52] = 0x0200
        self[53] = 0x0007  # words 54-58, 64-70 and 88 are valid
        self[63] = _MULTIWORD_DMA | (1 << 8 + (mode & 7) if mode >> 3 == 4 else 0)
        self[64] = 0x03
        for word in range(65, 69):
            self[word] = 120
        self[80] = 0x01F0  # ATA/ATAPI-4 to ATA8-ACS
        self[88] = _ULTRA_DMA | (1 << 8 + (mode & 7) if mode >> 3 == 8 else 0)

    def finish(self) -> bytes:
        """Add signature and checksum."""
        self.data[510] = 0xA5
        self.data[511] = -sum(self.data[:511]) & 0xFF
        return bytes(self.data)


def disk(drive: HardDisk) -> bytes:
    """The 512 bytes that IDENTIFY DEVICE returns."""
    words = _Words()
    medium = drive.disk
    sectors = medium.size // 512
    words[0] = 0x0040  # a fixed device
    words[1], words[3], words[6] = drive.geometry
    words.names(drive.serial, "Virtual HD")
    words[47] = 0x8000 | MAX_MULTIPLE
    words[48] = _VALID  # no trusted computing
    words.transfer_modes(drive.mode)
    words[50] = _VALID
    cylinders, heads, per_track = drive.translation
    words[54], words[55], words[56] = cylinders, heads, per_track
    words.long(57, cylinders * heads * per_track)
    words[59] = 0x0100 | drive.multiple if drive.multiple else 0
    words.long(60, min(sectors, _LBA_28_MAX))
    always = _NOP | _LOOK_AHEAD | _POWER
    words[82] = always | _WRITE_CACHE | _SMART
    words[83] = _VALID | _FLUSH_EXT | _FLUSH | _LBA_48
    words[84] = _VALID | _FUA
    words[85] = (
        _NOP | _LOOK_AHEAD | _POWER | (_WRITE_CACHE if drive.write_cache else 0) | (_SMART if drive.smart else 0)
    )
    words[86] = _FLUSH_EXT | _FLUSH | _LBA_48
    words[87] = _VALID | _FUA
    words[93] = 0x6100 if drive.slave else 0x6001  # an 80-conductor cable; which device answers diagnostics
    words.long(100, sectors, 4)
    exponent = (medium.physical_sector_size // 512).bit_length() - 1
    words[106] = _VALID | (1 << 13 | exponent if exponent else 0)
    if not medium.readonly:
        words[69] = (1 << 14 | 1 << 5) if medium.trim_zeroes else 0  # trimmed sectors read the same again, and as zeros
        words[105] = MAX_TRIM_BLOCKS
        words[169] = 0x0001  # TRIM
    words[209] = _VALID  # logical sector 0 begins a physical one
    words[217] = 0x0001  # not a rotating medium
    return words.finish()


def cd(drive: CdDrive) -> bytes:
    """The 512 bytes that IDENTIFY PACKET DEVICE returns."""
    words = _Words()
    words[0] = 0x85C0  # packets of 12 bytes, taken within 50 us without an interrupt; CD-ROM, removable medium
    words.names(drive.serial, "Virtual CD")
    words.transfer_modes(drive.mode)
    words[82] = words[85] = _NOP | _DEVICE_RESET | _PACKET | _POWER
    words[83] = words[84] = words[87] = _VALID
    words[93] = 0x6100 if drive.slave else 0x6001
    return words.finish()
