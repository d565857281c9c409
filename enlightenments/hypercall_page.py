"""The hypercall page: code that the guest calls and that traps to us on every KVM.

A KVM without Hyper-V emulation answers VMCALL itself, so the page traps by a port write instead. Which of two
ports tells the caller's mode, and with it the register convention: one byte means "inc eax" to 32-bit code and
an empty prefix to 64-bit code. Everything but RAX (EDX:EAX) and the flags is as the caller left it.

What busy guests call most is HvSignalEvent, so its fast form has a port of its own in 64-bit mode: EAX says which
connection, and where KVM knows that (an ioeventfd) nothing leaves the kernel. The status is RAX less RDX: 0 if nobody
has touched RAX, or what user space made of it.
"""

from __future__ import annotations

PORT_64 = 0xEA
PORT_32 = 0xEB
PORT_SIGNAL = 0xEC

_CODE = bytes(
    (
        0x50,  # push rax            push eax
        0x31, 0xC0,  # xor eax, eax  xor eax, eax
        0x40, 0x74, 0x04,  # jz +4   inc eax; jz +4
        0x58,  #                     pop eax
        0xE6, PORT_32,  #            out PORT_32, al
        0xC3,  #                     ret
        0x58,  # pop rax
        0x48, 0x81, 0xF9, 0x5D, 0x00, 0x01, 0x00,  # cmp rcx, 0x1005d
        0x75, 0x0D,  # jne +13
        0x89, 0xD0,  # mov eax, edx
        0x48, 0x39, 0xD0,  # cmp rax, rdx: a flag number is not KVM's to check
        0x75, 0x06,  # jne +6
        0xE7, PORT_SIGNAL,  # out PORT_SIGNAL, eax
        0x48, 0x29, 0xD0,  # sub rax, rdx
        0xC3,  # ret
        0xE6, PORT_64,  # out PORT_64, al
        0xC3,  # ret
    )
)  # fmt: skip

#: What the guest finds on its page; the rest traps as a breakpoint.
CONTENT = _CODE.ljust(4096, b"\xcc")
