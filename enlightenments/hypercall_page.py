"""The hypercall page: code that the guest calls and that traps to us on every KVM.

A KVM without Hyper-V emulation answers VMCALL itself, so the page traps by a port write instead. Which of two
ports tells the caller's mode, and with it the register convention: one byte means "inc eax" to 32-bit code and
an empty prefix to 64-bit code. Everything but RAX (EDX:EAX) and the flags is as the caller left it.
"""

from __future__ import annotations

PORT_64 = 0xEA
PORT_32 = 0xEB

_CODE = bytes(
    (
        0x50,  # push rax            push eax
        0x31, 0xC0,  # xor eax, eax  xor eax, eax
        0x40, 0x74, 0x04,  # jz +4   inc eax; jz +4
        0x58,  #                     pop eax
        0xE6, PORT_32,  #            out PORT_32, al
        0xC3,  #                     ret
        0x58,  # pop rax
        0xE6, PORT_64,  # out PORT_64, al
        0xC3,  # ret
    )
)  # fmt: skip

#: What the guest finds on its page; the rest traps as a breakpoint.
CONTENT = _CODE.ljust(4096, b"\xcc")
