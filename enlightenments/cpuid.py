"""The CPUID leaves by which a guest recognises Hyper-V. TLFS v6.0b, chapter 2."""

from __future__ import annotations

from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.tlfs import FEATURES, RECOMMENDATIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enlightenments.selection import Selection

INTERFACE = b"Hv#1"
LAST_LEAF = 0x4000_0006


def hypervisor_leaves(
    chosen: Selection, vp_count: int, physical_address_bits: int
) -> dict[int, tuple[int, int, int, int]]:
    """Leaf number to (eax, ebx, ecx, edx) for the enlightenments `chosen`; empty if there are none."""
    if not chosen.names:
        return {}
    registers = {
        (leaf, register): 0 for leaf in (FEATURES, RECOMMENDATIONS) for register in ("eax", "ebx", "ecx", "edx")
    }
    for name in chosen.names:
        for leaf, register, bit in ENLIGHTENMENTS[name].bits:
            registers[leaf, register] |= 1 << bit
    registers[RECOMMENDATIONS, "ebx"] = chosen.spinlocks
    registers[RECOMMENDATIONS, "ecx"] = physical_address_bits & 0x7F
    vendor = [int.from_bytes(chosen.vendor_id[i : i + 4], "little") for i in (0, 4, 8)]
    build, major, minor = chosen.version
    leaves = {
        0x4000_0000: (LAST_LEAF, vendor[0], vendor[1], vendor[2]),
        0x4000_0001: (int.from_bytes(INTERFACE, "little"), 0, 0, 0),
        0x4000_0002: (build, major << 16 | minor, 0, 0),
        0x4000_0005: (vp_count, vp_count, 0, 0),
        0x4000_0006: (0, 0, 0, 0),
    }
    for leaf in (FEATURES, RECOMMENDATIONS):
        leaves[leaf] = (
            registers[leaf, "eax"],
            registers[leaf, "ebx"],
            registers[leaf, "ecx"],
            registers[leaf, "edx"],
        )
    return dict(sorted(leaves.items()))
