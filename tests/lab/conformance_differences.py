"""What the conformance kit finds differently under QEMU with KVM's own Hyper-V code and under pyvmm, and why.

docs/conformance.md has the same table for people. Sources: Linux 6.1 arch/x86/kvm/hyperv.c, QEMU 7.2 hw/hyperv and
target/i386/kvm/hyperv.c.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A test that one of the two does not have, for it depends on what CPUID offers.
ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """Values of tests under QEMU and under pyvmm. `right` says who does as the TLFS asks; `why` is one phrase."""

    qemu: str
    pyvmm: str
    right: str
    why: str
    tests: tuple[str, ...]


DIFFERENCES = (
    Difference("0x40000005", "0x40000006", "both", "leaf 6 is optional", ("cpuid.last_leaf",)),
    Difference("0xffffffff", "0x2", "both", "QEMU names no limit, pyvmm the VPs that there are", ("cpuid.max_vps",)),
    Difference(
        *("0x0", "0x1", "pyvmm"),
        "KVM writes the code into RAM, where it stays; the page is an overlay",
        ("msr.hypercall_page_uncovers",),
    ),
    Difference(
        *("0x0", "0xd", "both"),
        "reserved bits are to be preserved; what becomes of others is free",
        ("msr.hypercall_reserved_bit",),
    ),
    Difference(
        *("0x0", "0xd", "both"),
        "pyvmm gives #GP to a write that the lock bit forbids, KVM ignores it",
        ("lock.page_cannot_move", "lock.page_cannot_go"),
    ),
    Difference(
        *("0x0", "0xd", "pyvmm"),
        "KVM keeps whatever is written",
        (
            *("msr.reenlightenment_reserved_bit", "msr.reenlightenment_vector_15", "msr.reenlightenment_bad_vp"),
            "msr.tsc_emulation_reserved_bit",
        ),
    ),
    Difference("0x0", "0x2f", "both", "KVM keeps reserved bits, pyvmm gives #GP", ("stimer.reserved_bits",)),
    Difference(
        *("0x1", "0x0", "pyvmm"),
        "KVM looks at SINT 0 only when the timer was disabled before",
        ("stimer.sint0_disabled",),
    ),
    Difference(
        *("0x2", "0x1", "pyvmm"),
        "KVM fills the slot of a masked SINT, and again after EOM, as no interrupt went with the message",
        ("stimer.masked_one_message",),
    ),
    Difference(
        *("-", "0x1", "pyvmm"),
        "QEMU aborts when the message page is put where KVM has no memory slots",
        ("synic.simp_after_beyond_gpa_space",),
    ),
    Difference(*(ABSENT, "0x40070", "both"), "KVM does not offer polling SINTs (EDX bit 17)", ("synic.sint_polling",)),
    Difference(ABSENT, "0x1", "both", "the same", ("stimer.polling_message",)),
    Difference(ABSENT, "0x0", "both", "the same", ("stimer.polling_no_interrupt",)),
    Difference(
        *("0x12", "0x4", "pyvmm"),
        "QEMU wants 4 bytes of alignment, not 8, and looks at neither page nor GPA space",
        ("hypercall.post_misaligned", "hypercall.post_across_pages", "hypercall.post_beyond_gpa_space"),
    ),
    Difference("0x12", "0x4", "both", "no status is named for a GPA without RAM", ("hypercall.post_outside_ram",)),
    Difference("0x2", "0x3", "both", "no status is named for a call that cannot be fast", ("hypercall.post_fast",)),
    Difference("0x3", "0x5", "pyvmm", "QEMU takes the size for a wrong input value", ("hypercall.post_size_241",)),
    Difference(
        *("0x12", "0x5", "both"), "which of two errors is found first is free", ("hypercall.post_type_of_hypervisor",)
    ),
    Difference(
        *("0x4", "0x12", "pyvmm"),
        "KVM reads the input, and hands QEMU its value in place of its address",
        ("hypercall.signal_in_memory",),
    ),
    Difference(
        "0x11", "0x12", "pyvmm", "KVM answers invalid port to every flag but 0", ("hypercall.signal_flag_2048",)
    ),
    Difference("0x11", "0x5", "pyvmm", "the same", ("ports.signal_flag_beyond_port",)),
    Difference(
        *("0x0", "0x1", "pyvmm"),
        "QEMU's test device puts a message that it refuses in the place of the one that waits",
        ("ports.messages_in_order",),
    ),
    Difference(
        *("0x3", "0x5", "pyvmm"),
        "KVM takes the vector for a wrong input value",
        ("ipi.vector_15", "ipi.vector_256", "ipi.ex_vector_15"),
    ),
    Difference("0x3", "0x5", "both", "no status is named for another VTL", ("ipi.vtl_1",)),
    Difference(
        *("0x3", "0x4", "pyvmm"),
        "KVM reads the input wherever it is, and finds another vector there",
        ("ipi.misaligned", "ipi.across_pages"),
    ),
    Difference("0x0", "0x5", "pyvmm", "KVM takes every format but 0 for all VPs", ("ipi.ex_unknown_format",)),
    Difference(
        "0x3", "0x5", "both", "the format is wrong, and the size of the set too", ("flush.space_ex_unknown_format",)
    ),
    Difference(
        *("0x0", "0x4", "pyvmm"),
        "KVM reads the input wherever it is",
        ("flush.space_misaligned", "flush.space_across_pages", "flush.list_misaligned"),
    ),
    Difference("0x1fe00000000", "0x4", "pyvmm", "the same", ("flush.list_too_long",)),
    Difference(
        "0x0", "0x3", "pyvmm", "KVM flushes all where the list leaves the registers", ("flush.list_xmm_too_long",)
    ),
    Difference(
        *("0x0", "0x5", "pyvmm"),
        "KVM looks at no flag but all processors and all spaces",
        (
            *("flush.space_reserved_flag", "flush.space_reserved_high_flag", "flush.space_ex_reserved_flag"),
            "flush.list_non_global",
        ),
    ),
    Difference(
        *("0x0", "0x5", "pyvmm"),
        "KVM has nothing to do",
        ("flush.space_empty_mask", "flush.list_empty_mask"),
    ),
    Difference("0x0", "0x5", "pyvmm", "KVM flushes all spaces, and so asks for none", ("flush.space_of_no_cr3",)),
    Difference(
        *("0xffffffff", "0x3", "pyvmm"),
        "KVM refuses every start index but 0 with status 3",
        ("flush.list_from_start",),
    ),
)


def explained() -> dict[str, tuple[str, str]]:
    """Test name to its values under QEMU and under pyvmm."""
    return {test: (entry.qemu, entry.pyvmm) for entry in DIFFERENCES for test in entry.tests}


def table() -> str:
    """The Markdown table of docs/conformance.md."""
    lines = ["| test | QEMU | pyvmm | right | why |", "| --- | --- | --- | --- | --- |"]
    for entry in DIFFERENCES:
        tests = ", ".join(f"`{test}`" for test in entry.tests)
        lines.append(f"| {tests} | {entry.qemu} | {entry.pyvmm} | {entry.right} | {entry.why} |")
    return "\n".join(lines) + "\n"
