"""Why a guest had to be stopped, told so that somebody can act on it."""

from __future__ import annotations

from pyvmm.core.kvm import abi
from pyvmm.core.kvm.errors import KvmError
from pyvmm.core.kvm.system import kvm_kind
from pyvmm.core.memory import GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.core.kvm.vp import Vp
    from pyvmm.core.memory import GuestMemory

_INTERNAL_ERRORS = {
    1: "KVM cannot emulate the instruction",
    2: "simultaneous exceptions",
    3: "an event could not be delivered",
    4: "KVM met an unexpected exit of the processor",
}
_PVM_HINT = (
    "this host's KVM is kvm_pvm, which emulates a guest kernel's instructions and lacks many; "
    "run the guest in the lab: python -m guests.lab -- pyvmm run ..."
)
_LONGEST_INSTRUCTION = 15
_PAGE_PRESENT, _PAGE_LARGE = 1 << 0, 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000


def diagnose(vp: Vp, reason: int, memory: GuestMemory) -> str:
    """Tell, in a few lines, what stopped a VP: the cause, the mode, the instruction and the registers."""
    run = vp.run
    if reason == abi.EXIT_SHUTDOWN:
        cause = "triple fault: the guest could not handle an exception"
    elif reason == abi.EXIT_INTERNAL_ERROR:
        what = _INTERNAL_ERRORS.get(run.internal.suberror, f"suberror {run.internal.suberror}")
        cause = f"KVM gave up: {what}"
    elif reason == abi.EXIT_FAIL_ENTRY:
        cause = f"the processor refused the guest's state ({run.fail_entry.hardware_entry_failure_reason:#x})"
    else:
        cause = f"KVM exit {abi.EXIT_NAMES.get(reason, 'number')} ({reason}), which nothing here answers"
    lines = [f"VP {vp.index}: {cause}"]
    try:
        regs, sregs = vp.get_regs(), vp.get_sregs()
    except KvmError as error:
        lines.append(f"  its registers cannot be read: {error}")
    else:
        if reason == abi.EXIT_SHUTDOWN and (sregs.cs.base, regs.rip) == (0xFFFF_0000, 0xFFF0):
            lines.append("  KVM has reset the VP since: what follows is its power-on state")
        lines += _describe(regs, sregs, memory)
    if reason == abi.EXIT_INTERNAL_ERROR and run.internal.suberror == 1 and kvm_kind() == "kvm_pvm":
        lines.append(f"  hint: {_PVM_HINT}")
    return "\n".join(lines)


def _describe(regs: abi.Regs, sregs: abi.Sregs, memory: GuestMemory) -> list[str]:
    mode, bits = _mode(sregs)
    linear = (sregs.cs.base if bits != 64 else 0) + regs.rip & (0xFFFF_FFFF_FFFF_FFFF if bits == 64 else 0xFFFF_FFFF)
    lines = [f"  mode: {mode}, CPL {sregs.cs.dpl if sregs.cr0 & 1 else 0}"]
    code = _fetch(memory, sregs, linear)
    lines.append(f"  instruction at {sregs.cs.selector:04x}:{regs.rip:016x}: {_disassemble(code, regs.rip, bits)}")
    names = [name for name, _ in abi.Regs._fields_]  # type: ignore[misc]
    for start in range(0, len(names), 4):
        lines.append("  " + " ".join(f"{name:>6}={getattr(regs, name):016x}" for name in names[start : start + 4]))
    lines.append(f"  cr0={sregs.cr0:x} cr2={sregs.cr2:x} cr3={sregs.cr3:x} cr4={sregs.cr4:x} efer={sregs.efer:x}")
    return lines


def _mode(sregs: abi.Sregs) -> tuple[str, int]:
    if not sregs.cr0 & 1:
        return "real mode", 16
    if sregs.efer & 1 << 10 and sregs.cs.l:
        return "64-bit mode", 64
    bits = 32 if sregs.cs.db else 16
    return f"{bits}-bit protected mode{', paging' if sregs.cr0 & 1 << 31 else ''}", bits


def _fetch(memory: GuestMemory, sregs: abi.Sregs, linear: int) -> bytes:
    """The bytes at a linear address, as many as the guest's tables and RAM give."""
    code = b""
    while len(code) < _LONGEST_INSTRUCTION:
        address = linear + len(code)
        gpa = _translate(memory, sregs, address)
        if gpa is None:
            break
        try:
            code += memory.read(gpa, min(_LONGEST_INSTRUCTION - len(code), 4096 - gpa % 4096))
        except GuestMemoryError:
            break
    return code


def _translate(memory: GuestMemory, sregs: abi.Sregs, linear: int) -> int | None:
    """Walk the guest's page tables; None where nothing is mapped. Intel SDM volume 3A, chapter 4."""
    if not sregs.cr0 & 1 << 31:
        return linear
    if sregs.efer & 1 << 10:
        levels, size, index_bits = (5 if sregs.cr4 & 1 << 12 else 4), 8, 9
    elif sregs.cr4 & 1 << 5:
        levels, size, index_bits = 3, 8, 9
    else:
        levels, size, index_bits = 2, 4, 10
    table = sregs.cr3 & {2: 0xFFFF_F000, 3: 0xFFFF_FFE0}.get(levels, _ADDRESS)
    for level in range(levels, 0, -1):
        shift = 12 + index_bits * (level - 1)
        index = linear >> shift & (1 << index_bits) - 1
        if levels == 3 and level == 3:
            index &= 3
        try:
            entry = int.from_bytes(memory.read(table + index * size, size), "little")
        except GuestMemoryError:
            return None
        if not entry & _PAGE_PRESENT:
            return None
        if level == 1 or (entry & _PAGE_LARGE and level <= 3 and not (levels == 3 and level == 3)):
            offset = (1 << shift) - 1
            return entry & _ADDRESS & ~offset | linear & offset
        table = entry & _ADDRESS
    return None


def _disassemble(code: bytes, address: int, bits: int) -> str:
    if not code:
        return "(its address is not mapped)"
    import capstone  # type: ignore[import-untyped]  # costs start-up time and is only wanted here

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    for instruction in capstone.Cs(capstone.CS_ARCH_X86, modes[bits]).disasm(code, address, 1):
        return f"{instruction.mnemonic} {instruction.op_str}".strip() + f"  ({instruction.bytes.hex(' ')})"
    return f"unknown bytes {code.hex(' ')}"
