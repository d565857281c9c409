"""What a logical unit says about itself: standard INQUIRY data and vital product data pages.

SPC-4 sections 6.6 and 7.8, SBC-3 section 6.6. Vendor, product and revision are those of Hyper-V's virtual
disks, which Linux's storvsc driver and Windows look for.
"""

from __future__ import annotations

import struct

#: The most that one command may carry, here and in the channel properties. Hyper-V has 512 KiB. Linux makes its longest
#: scatter list of it, and Windows its largest transfer; the page numbers of a MiB are 2 KiB of the guest's ring.
MAX_TRANSFER_BYTES = 1 << 20
#: The most that one WRITE SAME may fill, so that no command keeps its queue busy for long.
MAX_WRITE_SAME_BYTES = 32 << 20
#: The most that one UNMAP may discard, and in how many descriptors.
MAX_UNMAP_BYTES = 4 << 30
MAX_UNMAP_DESCRIPTORS = 256

_VENDOR = b"Msft    "
_PRODUCT = b"Virtual Disk    "
_REVISION = b"1.0 "
#: IEEE company id of Microsoft's virtual disks.
_OUI = 0x002248

_VERSION_SPC_4 = 6
_PERIPHERAL_ABSENT = 0x7F


def standard(peripheral: int, vendor: bytes, product: bytes, revision: bytes) -> bytes:
    """The 36 bytes of standard INQUIRY data: SPC-4, response format 2, command queueing."""
    return struct.pack(">BBBBBBBB8s16s4s", peripheral, 0, _VERSION_SPC_4, 2, 31, 0, 0, 0x02, vendor, product, revision)


#: A direct-access block device.
STANDARD = standard(0x00, _VENDOR, _PRODUCT, _REVISION)
#: Nothing at this LUN. LUN 0 of a controller answers for the controller, so it still bears a name.
ABSENT_LUN_0 = standard(_PERIPHERAL_ABSENT, _VENDOR, _PRODUCT, _REVISION)
ABSENT = standard(_PERIPHERAL_ABSENT, b"", b"", b"")


def vpd_page(page: int, identity: bytes, block_size: int, physical_size: int, thin: bool, zeroes: bool) -> bytes | None:
    """Return a whole VPD page, or None if there is no such page.

    `identity` is sixteen bytes; sizes are in bytes; `thin` says that UNMAP works and `zeroes` that unmapped
    blocks then read as zeros.
    """
    if page == 0x00:
        body = bytes((0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2))
    elif page == 0x80:
        body = identity.hex().encode()
    elif page == 0x83:
        body = _designators(identity)
    elif page == 0xB0:
        body = _block_limits(block_size, physical_size, thin)
    elif page == 0xB1:
        body = struct.pack(">H58x", 1)  # rotation rate: non-rotating
    elif page == 0xB2:
        # LBPU | LBPWS | LBPWS10, LBPRZ; provisioning type 2 is thin.
        support = (0xE0 | (0x04 if zeroes else 0)) if thin else 0
        body = struct.pack(">BBBx", 0, support, 2 if thin else 0)
    else:
        return None
    return struct.pack(">BBH", 0x00, page, len(body)) + body


def _designators(identity: bytes) -> bytes:
    # NAA 6 (IEEE registered extended): nibble 6, 24-bit company id, 100 bits of ours.
    name = (6 << 124 | _OUI << 100 | int.from_bytes(identity, "big") >> 28).to_bytes(16, "big")
    t10 = _VENDOR + identity.hex().encode()
    # Code set 1 binary or 2 ASCII; designator type 3 NAA or 1 T10 vendor id; both of the logical unit.
    return struct.pack(">BBBB", 1, 3, 0, len(name)) + name + struct.pack(">BBBB", 2, 1, 0, len(t10)) + t10


def _block_limits(block_size: int, physical_size: int, thin: bool) -> bytes:
    granularity = physical_size // block_size
    return struct.pack(
        ">BBHIIIIIIIQ20x",
        0x01,  # WSNZ: WRITE SAME of 0 blocks is refused
        0,  # no COMPARE AND WRITE
        granularity,
        MAX_TRANSFER_BYTES // block_size,
        0,  # optimal transfer length: not stated
        0,  # no PRE-FETCH
        MAX_UNMAP_BYTES // block_size if thin else 0,
        MAX_UNMAP_DESCRIPTORS if thin else 0,
        granularity if thin else 0,
        0x8000_0000 if thin else 0,  # UGAVALID: aligned to block 0
        MAX_WRITE_SAME_BYTES // block_size,
    )
