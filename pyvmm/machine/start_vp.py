"""Starting a VP in a given state, for HvStartVirtualProcessor. TLFS v6.0b, chapters 7.9.5, 7.9.6 and 7.10.3.

HV_INITIAL_VP_CONTEXT, 224 bytes: RIP, RSP, RFLAGS; CS, DS, ES, FS, GS, SS, TR, LDTR (base, limit, selector,
attributes); IDTR, GDTR (6 bytes of nothing, limit, base); EFER, CR0, CR3, CR4, PAT.
"""

from __future__ import annotations

import struct

from enlightenments.tlfs import INVALID_REGISTER_VALUE, INVALID_VP_STATE, SUCCESS
from pyvmm.core.kvm import abi
from pyvmm.core.kvm.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.kvm.vp import Vp

_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_TABLES = ("idt", "gdt")
_GENERAL = struct.Struct("<3Q")
_SEGMENT = struct.Struct("<QIHH")
_TABLE = struct.Struct("<6xHQ")
_CONTROL = struct.Struct("<5Q")
_MSR_PAT = 0x277
_MP_RUNNABLE, _MP_UNINITIALIZED = 0, 1


def start(vp: Vp, context: bytes) -> int:
    """Start a VP that has not been started; return a hypercall status. On the VP's own thread."""
    if vp.get_mp_state() != _MP_UNINITIALIZED:
        return INVALID_VP_STATE
    rip, rsp, rflags = _GENERAL.unpack_from(context)
    sregs = vp.get_sregs()
    position = _GENERAL.size
    for name in _SEGMENTS:
        setattr(sregs, name, _segment(*_SEGMENT.unpack_from(context, position)))
        position += _SEGMENT.size
    for name in _TABLES:
        table = getattr(sregs, name)
        table.limit, table.base = _TABLE.unpack_from(context, position)
        position += _TABLE.size
    sregs.efer, sregs.cr0, sregs.cr3, sregs.cr4, pat = _CONTROL.unpack_from(context, position)
    try:
        vp.set_sregs(sregs)
        vp.set_regs(abi.Regs(rip=rip, rsp=rsp, rflags=rflags | 2))
    except KvmError:
        return INVALID_REGISTER_VALUE
    if vp.set_msrs([(_MSR_PAT, pat)]) != 1:
        return INVALID_REGISTER_VALUE
    vp.set_mp_state(_MP_RUNNABLE)
    return SUCCESS


def _segment(base: int, limit: int, selector: int, attributes: int) -> abi.Segment:
    present = attributes >> 7 & 1
    return abi.Segment(
        base=base,
        limit=limit,
        selector=selector,
        type=attributes & 0xF,
        s=attributes >> 4 & 1,
        dpl=attributes >> 5 & 3,
        present=present,
        avl=attributes >> 12 & 1,
        l=attributes >> 13 & 1,
        db=attributes >> 14 & 1,
        g=attributes >> 15,
        unusable=1 - present,
    )
