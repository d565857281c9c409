"""The binding's numbers and structures against the system's own header."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from pyvmm.core.kvm import abi, capabilities

HEADER = Path("/usr/include/linux/kvm.h")

STRUCTURES = {
    "kvm_segment": abi.Segment,
    "kvm_dtable": abi.DescriptorTable,
    "kvm_regs": abi.Regs,
    "kvm_sregs": abi.Sregs,
    "kvm_userspace_memory_region": abi.UserspaceMemoryRegion,
    "kvm_cpuid_entry2": abi.CpuidEntry,
    "kvm_msr_entry": abi.MsrEntry,
    "kvm_msr_filter_range": abi.MsrFilterRange,
    "kvm_msr_filter": abi.MsrFilter,
    "kvm_enable_cap": abi.EnableCap,
    "kvm_pit_config": abi.PitConfig,
    "kvm_irq_level": abi.IrqLevel,
    "kvm_ioeventfd": abi.IoEventFd,
    "kvm_mp_state": abi.MpState,
    "kvm_device_attr": abi.DeviceAttr,
    "kvm_vcpu_events": abi.VcpuEvents,
    "kvm_lapic_state": abi.LapicState,
}

#: Structure and field there, class and field here.
FIELDS = [
    ("kvm_run", "immediate_exit", abi.Run, "immediate_exit"),
    ("kvm_run", "exit_reason", abi.Run, "exit_reason"),
    ("kvm_run", "cr8", abi.Run, "cr8"),
    ("kvm_run", "apic_base", abi.Run, "apic_base"),
    ("kvm_run", "internal", abi.Run, "exit"),
    ("kvm_run", "internal.suberror", abi.Run, "exit"),
    ("kvm_run", "system_event", abi.Run, "exit"),
    ("kvm_run", "fail_entry", abi.Run, "exit"),
    ("kvm_sregs", "tr", abi.Sregs, "tr"),
    ("kvm_sregs", "gdt", abi.Sregs, "gdt"),
    ("kvm_sregs", "cr0", abi.Sregs, "cr0"),
    ("kvm_sregs", "efer", abi.Sregs, "efer"),
    ("kvm_sregs", "interrupt_bitmap", abi.Sregs, "interrupt_bitmap"),
    ("kvm_segment", "l", abi.Segment, "l"),
    ("kvm_segment", "unusable", abi.Segment, "unusable"),
    ("kvm_regs", "rip", abi.Regs, "rip"),
    ("kvm_regs", "r8", abi.Regs, "r8"),
    ("kvm_msr_filter_range", "bitmap", abi.MsrFilterRange, "bitmap"),
    ("kvm_ioeventfd", "fd", abi.IoEventFd, "fd"),
    ("kvm_ioeventfd", "flags", abi.IoEventFd, "flags"),
    ("kvm_vcpu_events", "sipi_vector", abi.VcpuEvents, "sipi_vector"),
    ("kvm_vcpu_events", "flags", abi.VcpuEvents, "flags"),
    ("kvm_vcpu_events", "exception_payload", abi.VcpuEvents, "exception_payload"),
]

#: Structures that are only sizes here.
SIZES = {
    "struct kvm_irqchip": abi.IRQCHIP_SIZE,
    "struct kvm_pit_state2": abi.PIT_STATE_SIZE,
    "struct kvm_cpuid2": abi.CPUID_HEADER_SIZE,
    "struct kvm_msrs": abi.MSRS_HEADER_SIZE,
    "struct kvm_msr_list": abi.MSR_INDEX_LIST_HEADER,
    "((struct kvm_run *)0)->internal": ctypes.sizeof(abi.RunInternal),
    "struct kvm_xcrs": abi.XCRS_SIZE,
    "struct kvm_xsave": abi.XSAVE_SIZE,
    "struct kvm_debugregs": abi.DEBUGREGS_SIZE,
}

VALUES = {
    "KVM_API_VERSION": abi.API_VERSION,
    "KVM_MEM_READONLY": abi.MEM_READONLY,
    "KVM_CPUID_FLAG_SIGNIFCANT_INDEX": abi.CPUID_FLAG_SIGNIFICANT_INDEX,
    "KVM_MSR_FILTER_READ": abi.MSR_FILTER_READ,
    "KVM_MSR_FILTER_WRITE": abi.MSR_FILTER_WRITE,
    "KVM_MSR_EXIT_REASON_UNKNOWN": abi.MSR_EXIT_REASON_UNKNOWN,
    "KVM_MSR_EXIT_REASON_FILTER": abi.MSR_EXIT_REASON_FILTER,
    "KVM_VCPU_TSC_CTRL": abi.VCPU_TSC_CTRL,
    "KVM_VCPU_TSC_OFFSET": abi.VCPU_TSC_OFFSET,
    "KVM_MP_STATE_RUNNABLE": abi.MP_STATE_RUNNABLE,
    "KVM_MP_STATE_UNINITIALIZED": abi.MP_STATE_UNINITIALIZED,
    "KVM_SYSTEM_EVENT_SHUTDOWN": abi.SYSTEM_EVENT_SHUTDOWN,
    "KVM_SYSTEM_EVENT_RESET": abi.SYSTEM_EVENT_RESET,
    "KVM_SYSTEM_EVENT_CRASH": abi.SYSTEM_EVENT_CRASH,
    "KVM_EXIT_IO": abi.EXIT_IO,
    "KVM_EXIT_MMIO": abi.EXIT_MMIO,
    "KVM_EXIT_SHUTDOWN": abi.EXIT_SHUTDOWN,
    "KVM_EXIT_FAIL_ENTRY": abi.EXIT_FAIL_ENTRY,
    "KVM_EXIT_INTR": abi.EXIT_INTR,
    "KVM_EXIT_INTERNAL_ERROR": abi.EXIT_INTERNAL_ERROR,
    "KVM_EXIT_SYSTEM_EVENT": abi.EXIT_SYSTEM_EVENT,
    "KVM_EXIT_X86_RDMSR": abi.EXIT_RDMSR,
    "KVM_EXIT_X86_WRMSR": abi.EXIT_WRMSR,
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """C expressions and what the compiler says of them."""
    if not HEADER.exists():
        pytest.fail(f"{HEADER} is missing: install linux-libc-dev")
    expressions = [f"sizeof(struct {name})" for name in STRUCTURES]
    expressions += [f"offsetof(struct {structure}, {field})" for structure, field, _, _ in FIELDS]
    expressions += [f"sizeof({name})" for name in SIZES]
    expressions += [*VALUES, *abi.IOCTL_NAMES.values(), *(name for name, *_ in capabilities.CAPABILITIES)]
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({expression}));\n' for expression in expressions)
    source = f"#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{\n{lines}}}\n"
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text(source)
    subprocess.run(["gcc", "-o", str(folder / "abi"), str(folder / "abi.c")], check=True)
    output = subprocess.run([str(folder / "abi")], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, output.split()), strict=True))


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_have_the_headers_size(header: dict[str, int], name: str) -> None:
    assert ctypes.sizeof(STRUCTURES[name]) == header[f"sizeof(struct {name})"]


@pytest.mark.parametrize(("structure", "field", "ours", "name"), FIELDS)
def test_fields_lie_where_the_header_has_them(
    header: dict[str, int], structure: str, field: str, ours: type[ctypes.Structure], name: str
) -> None:
    assert getattr(ours, name).offset == header[f"offsetof(struct {structure}, {field})"]


@pytest.mark.parametrize("name", SIZES)
def test_opaque_blobs_have_the_headers_size(header: dict[str, int], name: str) -> None:
    assert SIZES[name] == header[f"sizeof({name})"]


@pytest.mark.parametrize("name", VALUES)
def test_constants_are_the_headers(header: dict[str, int], name: str) -> None:
    assert VALUES[name] == header[name]


@pytest.mark.parametrize(("number", "name"), abi.IOCTL_NAMES.items())
def test_requests_are_the_headers(header: dict[str, int], number: int, name: str) -> None:
    assert number == header[name]


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, number, *_ in capabilities.CAPABILITIES])
def test_capabilities_are_the_headers(header: dict[str, int], name: str, number: int) -> None:
    assert number == header[name]
