"""A partition as its guest sees it through MSRs and hypercalls. TLFS v6.0b, chapters 3, 5, 8, 10, 11 and 12.

The SynIC, the timers, the hottest MSRs and hypercalls are C (`pyvmm.core._hot`); here is the rest.
"""

from __future__ import annotations

import time

from enlightenments import catalog, hypercall_page
from enlightenments.hypercalls import Hypercalls, layouts_of
from enlightenments.overlay import OverlayPage
from enlightenments.ports import Ports
from enlightenments.registers import Registers
from enlightenments.tlfs import (
    MSR_APIC_FREQUENCY,
    MSR_CRASH_CTL,
    MSR_CRASH_P0,
    MSR_GUEST_OS_ID,
    MSR_HYPERCALL,
    MSR_REENLIGHTENMENT_CONTROL,
    MSR_REFERENCE_TSC,
    MSR_RESET,
    MSR_TIME_REF_COUNT,
    MSR_TSC_EMULATION_CONTROL,
    MSR_TSC_EMULATION_STATUS,
    MSR_TSC_FREQUENCY,
    MSR_TSC_INVARIANT_CONTROL,
    MSR_VP_ASSIST_PAGE,
    MSR_VP_INDEX,
    MSR_VP_RUNTIME,
    hypercall_name,
    msr_name,
    status_name,
)
from pyvmm.core import _hot
from pyvmm.core.kvm.errors import KvmError
from pyvmm.core.memory import PAGE_SIZE, GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from enlightenments.hypercalls import Answer, StartVp
    from enlightenments.ports import MessageHandler
    from enlightenments.selection import Selection
    from pyvmm.core._hot import SynIC
    from pyvmm.core.kvm.vm import Vm as KvmVm
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.trace import Tracer

#: KVM's LAPIC timer counts nanoseconds (Linux ``arch/x86/kvm/lapic.h``, APIC_BUS_CYCLE_NS).
APIC_HZ = 1_000_000_000

_ENABLE = 1
_LOCKED = 2
_PAGE_ADDRESS = ~0xFFF & (1 << 64) - 1
_CRASH_NOTIFY = 1 << 63
_CRASH_MESSAGE = 1 << 62
_REENLIGHTENMENT_VECTOR = 0xFF
_REENLIGHTENMENT_ENABLE = 1 << 16
_REENLIGHTENMENT_VP = 0xFFFF_FFFF << 32


#: The MSRs of the whole partition in saved state.
_SAVED_MSRS = {
    "guest_os_id": "_guest_os_id",
    "hypercall": "_hypercall_msr",
    "reference_tsc": "_reference_msr",
    "reenlightenment": "_reenlightenment",
    "tsc_emulation": "_tsc_emulation",
    "tsc_emulated": "_tsc_emulated",
    "tsc_invariant": "_tsc_invariant",
}


def _saved_u64(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is no MSR value")
    return value


class Partition(Ports):
    """The hypervisor interface of one VM.

    `leaves` are the hypervisor's CPUID leaves. `on_reset` and `on_crash` are called on a VP's thread when the guest
    asks for a reset or reports a crash (five parameters and the message, if any), `start_vp` when it starts one.
    """

    def __init__(
        self,
        memory: GuestMemory,
        chosen: Selection,
        vp_count: int,
        tracer: Tracer,
        on_reset: Callable[[], None],
        on_crash: Callable[[list[int], str], None],
        start_vp: StartVp,
        leaves: dict[int, tuple[int, int, int, int]],
    ) -> None:
        self.vp_count = vp_count
        self.chosen = chosen
        self.doorbells = _hot.Doorbells()
        self._kvm: KvmVm | None = None
        self._in_kernel: dict[int, int] = {}  # eventfds of the connections that KVM knows
        self.synics: list[_hot.SynIC] = []
        self.reference: _hot.ReferenceTime | None = None
        self._memory = memory
        self._tracer = tracer
        self._on_reset = on_reset
        self._on_crash = on_crash
        self._tsc_khz = 0
        self._vps: list[_hot.Vp] = []
        msrs = {msr for name in chosen.names for msr in catalog.ENLIGHTENMENTS[name].msrs}
        registers = Registers(msrs, leaves, self._read_any_msr, self._write_any_msr)
        self._hypercalls = Hypercalls(vp_count, registers, start_vp)
        self._hypercall_page = OverlayPage(memory)
        self._reference_page = OverlayPage(memory)
        self._power_on_state()
        self._readers: dict[int, Callable[[int], int]] = {
            MSR_GUEST_OS_ID: lambda vp: self._guest_os_id,
            MSR_HYPERCALL: lambda vp: self._hypercall_msr,
            MSR_VP_INDEX: lambda vp: vp,
            MSR_RESET: lambda vp: 0,
            MSR_VP_RUNTIME: lambda vp: time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID) // 100,
            MSR_REFERENCE_TSC: lambda vp: self._reference_msr,
            MSR_TSC_FREQUENCY: lambda vp: self._tsc_khz * 1000,
            MSR_APIC_FREQUENCY: lambda vp: APIC_HZ,
            MSR_VP_ASSIST_PAGE: lambda vp: self._assist[vp],
            MSR_REENLIGHTENMENT_CONTROL: lambda vp: self._reenlightenment,
            MSR_TSC_EMULATION_CONTROL: lambda vp: self._tsc_emulation,
            MSR_TSC_EMULATION_STATUS: lambda vp: self._tsc_emulated,
            MSR_TSC_INVARIANT_CONTROL: lambda vp: self._tsc_invariant,
            MSR_CRASH_CTL: lambda vp: _CRASH_NOTIFY | _CRASH_MESSAGE,
            **{MSR_CRASH_P0 + i: lambda vp, i=i: self._crash[i] for i in range(5)},  # type: ignore[misc]
        }
        self._writers: dict[int, Callable[[int, int], bool]] = {
            MSR_GUEST_OS_ID: self._write_guest_os_id,
            MSR_HYPERCALL: self._write_hypercall,
            MSR_RESET: self._write_reset,
            MSR_REFERENCE_TSC: self._write_reference_tsc,
            MSR_VP_ASSIST_PAGE: self._write_assist_page,
            MSR_REENLIGHTENMENT_CONTROL: self._write_reenlightenment,
            MSR_TSC_EMULATION_CONTROL: self._write_tsc_emulation,
            MSR_TSC_EMULATION_STATUS: self._write_tsc_emulated,
            MSR_TSC_INVARIANT_CONTROL: self._write_tsc_invariant,
            MSR_CRASH_CTL: self._write_crash_control,
            **{MSR_CRASH_P0 + i: lambda vp, value, i=i: self._write_crash(i, value) for i in range(5)},  # type: ignore[misc]
        }

    def _power_on_state(self) -> None:
        self._guest_os_id = 0
        self._hypercall_msr = 0
        self._reference_msr = 0
        self._reenlightenment = 0
        self._tsc_emulation = 0
        self._tsc_emulated = 0
        self._tsc_invariant = 0
        self._assist = [0] * self.vp_count
        self._crash = [0] * 5

    # Assembly --------------------------------------------------------------------------------------

    def set_reference_time(self, tsc_khz: int, tsc_offset: int) -> None:
        """Start reference time at 0, on the guest's TSC."""
        self._tsc_khz = tsc_khz
        self.reference = _hot.ReferenceTime(tsc_khz, tsc_offset)

    def add_synic(self, vm_fd: int, apic_id: int) -> _hot.SynIC:
        """Make the SynIC of the next VP."""
        synic = _hot.SynIC(self._memory.hot, vm_fd, len(self.synics), apic_id)
        synic.direct_timers = "stimer-direct" in self.chosen
        self.synics.append(synic)
        return synic

    def add_vp(self, vp: _hot.Vp) -> None:
        """Let the interface answer a VP, which comes in the order of the indices."""
        vp.offer_msrs(catalog.msr_bitmap(self.chosen.names))
        vp.offer_hypercalls(layouts_of(catalog.hypercalls_of(self.chosen.names)))
        vp.xmm_input = "xmm-input" in self.chosen
        vp.extended_ranges = "tlbflush-ext" in self.chosen
        vp.trace_msr = self._tracer.msr
        vp.trace_hypercall = self._tracer.hypercall
        vp.hypercalls_enabled = bool(self._hypercall_msr & _ENABLE)
        self._vps.append(vp)
        if len(self._vps) == self.vp_count:
            for each in self._vps:
                each.set_peers(tuple(self._vps))

    def reset(self) -> None:
        """Power-on state of all MSRs. The VPs are stopped; guest memory is no longer anybody's."""
        self._hypercall_page = OverlayPage(self._memory)
        self._reference_page = OverlayPage(self._memory)
        self._power_on_state()
        for synic in self.synics:
            synic.reset()
        self._show_hypercalls()

    def save(self) -> dict[str, Any]:
        """State of all MSRs as plain data."""
        return {
            "version": 1,
            **{key: getattr(self, attribute) for key, attribute in _SAVED_MSRS.items()},
            "tsc_khz": self._tsc_khz,
            "assist": list(self._assist),
            "crash": list(self._crash),
            "hypercall_page": self._hypercall_page.save(),
            "reference_page": self._reference_page.save(),
            "synics": [synic.save() for synic in self.synics],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raises ValueError."""
        try:
            if state["version"] != 1 or any(len(state[key]) != self.vp_count for key in ("synics", "assist")):
                raise ValueError("not of version 1 with as many VPs")
            _saved_u64(state["tsc_khz"])
            for key, attribute in _SAVED_MSRS.items():
                setattr(self, attribute, _saved_u64(state[key]))
            if self._reenlightenment & _REENLIGHTENMENT_ENABLE and self._reenlightenment >> 32 >= self.vp_count:
                raise ValueError("re-enlightenment of a VP that is not there")
            self._crash = [_saved_u64(value) for value in state["crash"]]
            if len(self._crash) != 5:
                raise ValueError("not five crash parameters")
            self._assist = [_saved_u64(value) for value in state["assist"]]
            self._hypercall_page.restore(state["hypercall_page"])
            self._reference_page.restore(state["reference_page"])
            for synic, saved in zip(self.synics, state["synics"], strict=True):
                synic.restore(saved)
        except (ValueError, KeyError, TypeError, GuestMemoryError) as error:
            raise ValueError(f"saved hypervisor state does not fit: {error}") from error
        self._show_hypercalls()
        if state["tsc_khz"] != self._tsc_khz and self._reenlightenment & _REENLIGHTENMENT_ENABLE:
            self.synics[self._reenlightenment >> 32].interrupt(self._reenlightenment & _REENLIGHTENMENT_VECTOR)

    def inspect(self) -> dict[str, Any]:
        """What the guest has set up."""
        return {
            "enlightenments": sorted(self.chosen.names),
            "guest_os_id": f"{self._guest_os_id:#x}",
            "hypercall_page": self._hypercall_page.gpa,
            "reference_page": self._reference_page.gpa,
            "reference_time": self.reference.now() if self.reference else 0,
            "assist_pages": list(self._assist),
            "reenlightenment": self._reenlightenment,
            "tsc_invariant": self._tsc_invariant,
            "crash": list(self._crash),
            "message_ports": sorted(self._hypercalls.message_ports),
            "doorbells": self.doorbells.inspect(),
            "synics": [synic.inspect() for synic in self.synics],
        }

    # What the VPs ask ------------------------------------------------------------------------------

    def read_msr(self, vp: int, index: int) -> int | None:
        """Answer a read that C does not; None for #GP."""
        reader = self._readers.get(index)
        return None if reader is None else reader(vp)

    def write_msr(self, vp: int, index: int, value: int) -> bool:
        """Answer a write that C does not; False for #GP."""
        writer = self._writers.get(index)
        return False if writer is None else writer(vp, value)

    def hypercall(self, vp: int, code: int, input: bytes, start: int, count: int) -> Answer:
        """Answer a hypercall that C does not: elements from `start` up to `count` are to be done."""
        return self._hypercalls.call(vp, code, input, start, count)

    def _read_any_msr(self, vp: int, index: int) -> int | None:
        if index == MSR_TIME_REF_COUNT:
            assert self.reference is not None
            return self.reference.now()
        value = self.synics[vp].read_msr(index)
        return self.read_msr(vp, index) if value is None else value

    def _write_any_msr(self, vp: int, index: int, value: int) -> bool:
        if index in self._writers:
            return self.write_msr(vp, index, value)
        assert self.reference is not None
        return self.synics[vp].write_msr(index, value, self.reference.now())

    def trace_msr(self, vp: int, write: bool, index: int, value: int, valid: bool) -> None:
        """Write a line about an MSR access."""
        what = "wrmsr" if write else "rdmsr"
        self._tracer.line("msr", f"vp{vp} {what} {msr_name(index)} = {value:#x}{'' if valid else ' -> #GP'}")

    def trace_hypercall(self, vp: int, control: int, input: int, result: int) -> None:
        """Write a line about a hypercall."""
        call = hypercall_name(control & 0xFFFF)
        self._tracer.line("hypercall", f"vp{vp} {call} control {control:#x} input {input:#x}: {status_name(result)}")

    # MSRs ------------------------------------------------------------------------------------------

    def _show_hypercalls(self) -> None:
        for vp in self._vps:
            vp.hypercalls_enabled = bool(self._hypercall_msr & _ENABLE)

    def _write_guest_os_id(self, vp: int, value: int) -> bool:
        self._guest_os_id = value
        if not value:  # a guest without identity has no hypercalls
            self._hypercall_msr &= ~_ENABLE
            self._hypercall_page.remove()
            self._show_hypercalls()
        return True

    def _write_hypercall(self, vp: int, value: int) -> bool:
        if self._hypercall_msr & _LOCKED or value & 0xFFC:
            return False
        if not self._guest_os_id:
            value &= ~_ENABLE
        if not value & _ENABLE:
            self._hypercall_page.remove()
        elif self._hypercall_page.gpa != value & _PAGE_ADDRESS and not self._hypercall_page.place(
            value & _PAGE_ADDRESS, hypercall_page.CONTENT
        ):
            return False
        self._hypercall_msr = value
        self._show_hypercalls()
        return True

    def _write_reset(self, vp: int, value: int) -> bool:
        if value & 1:
            self._on_reset()
        return True

    def _write_reference_tsc(self, vp: int, value: int) -> bool:
        if not value & _ENABLE:
            self._reference_page.remove()
        elif self._reference_page.gpa != value & _PAGE_ADDRESS and not self._reference_page.place(
            value & _PAGE_ADDRESS, self.reference_page()
        ):
            return False
        self._reference_msr = value
        return True

    def reference_page(self) -> bytes:
        """The reference TSC page. TLFS 12.7."""
        assert self.reference is not None
        sequence = 1  # 0 would tell the guest to use the MSR
        return b"".join(
            (
                sequence.to_bytes(8, "little"),
                self.reference.scale.to_bytes(8, "little"),
                self.reference.offset.to_bytes(8, "little", signed=True),
            )
        ).ljust(PAGE_SIZE, b"\0")

    def _write_assist_page(self, vp: int, value: int) -> bool:
        if value & _ENABLE and value != self._assist[vp]:
            try:
                self._memory.write(value & _PAGE_ADDRESS, bytes(PAGE_SIZE))
            except GuestMemoryError:
                return False
        self._assist[vp] = value
        if "vapic" in self.chosen:
            self._vps[vp].set_lazy_eoi(value & _PAGE_ADDRESS if value & _ENABLE else 0)
        return True

    def _write_reenlightenment(self, vp: int, value: int) -> bool:
        if value & ~(_REENLIGHTENMENT_VECTOR | _REENLIGHTENMENT_ENABLE | _REENLIGHTENMENT_VP):
            return False
        if value & _REENLIGHTENMENT_ENABLE and (value >> 32 >= self.vp_count or value & _REENLIGHTENMENT_VECTOR < 16):
            return False
        self._reenlightenment = value
        return True

    def _write_tsc_emulation(self, vp: int, value: int) -> bool:
        if value & ~1:
            return False
        self._tsc_emulation = value
        return True

    def _write_tsc_emulated(self, vp: int, value: int) -> bool:
        if value:  # only the hypervisor begins
            return False
        self._tsc_emulated = 0
        return True

    def _write_tsc_invariant(self, vp: int, value: int) -> bool:
        if value & ~1:
            return False
        self._tsc_invariant = value
        return True

    def _write_crash(self, number: int, value: int) -> bool:
        self._crash[number] = value
        return True

    def _write_crash_control(self, vp: int, value: int) -> bool:
        if value & _CRASH_NOTIFY:
            message = ""
            if value & _CRASH_MESSAGE:
                gpa, length = self._crash[3], min(self._crash[4], PAGE_SIZE)
                try:
                    text = self._memory.read(gpa, length).rstrip(b"\0").decode("utf-8", "replace")
                    message = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
                except GuestMemoryError as error:
                    message = f"(its message cannot be read: {error})"
            self._on_crash(list(self._crash), message)
        return True

    # Ports -----------------------------------------------------------------------------------------

    def connect_message_port(self, connection_id: int, handler: MessageHandler) -> None:
        """See `Ports`."""
        if connection_id in self._hypercalls.message_ports:
            raise ValueError(f"connection id {connection_id:#x} is taken")
        self._hypercalls.message_ports[connection_id] = handler

    def disconnect_message_port(self, connection_id: int) -> None:
        """See `Ports`."""
        self._hypercalls.message_ports.pop(connection_id, None)

    def forward(self, connection_id: int, message_type: int, payload: bytes) -> bool:
        """Hand a message to whoever is connected to `connection_id` now; False if nobody is or takes it."""
        handler = self._hypercalls.message_ports.get(connection_id)
        return handler is not None and handler(message_type, payload)

    def ring_in_kernel(self, vm: KvmVm) -> None:
        """Have KVM itself write to the eventfds of ports that are connected from now on, as far as it can.

        Such signals are no exits, so nobody counts them; where hypercalls are traced they go on as before.
        """
        if not self._tracer.hypercall:
            self._kvm = vm

    def connect_event_port(self, connection_id: int, eventfd: int) -> None:
        """See `Ports`."""
        self.doorbells.connect(connection_id, eventfd)
        if self._kvm is not None:
            try:
                self._kvm.connect_eventfd(hypercall_page.PORT_SIGNAL, connection_id, eventfd)
            except KvmError:  # too many: the signal leaves the guest, and `doorbells` has it
                return
            self._in_kernel[connection_id] = eventfd

    def disconnect_event_port(self, connection_id: int) -> None:
        """See `Ports`."""
        eventfd = self._in_kernel.pop(connection_id, None)
        if self._kvm is not None and eventfd is not None:
            self._kvm.connect_eventfd(hypercall_page.PORT_SIGNAL, connection_id, eventfd, connect=False)
        self.doorbells.disconnect(connection_id)

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        """See `Ports`."""
        if self._tracer.synic:
            self._tracer.line("synic", f"vp{vp} sint{sint} message type {message_type:#x}, {len(payload)} bytes")
        return self.synics[vp].post(sint, message_type, payload)

    def set_message_space_event(self, eventfd: int) -> None:
        """See `Ports`."""
        for synic in self.synics:
            synic.set_space_event(eventfd)

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        """See `Ports`."""
        if self._tracer.synic:
            self._tracer.line("synic", f"vp{vp} sint{sint} event flag {flag}")
        self.synics[vp].signal_event(sint, flag)

    def synic(self, vp: int) -> SynIC | None:
        """See `Ports`. While events are traced all of them have to pass here."""
        return None if self._tracer.synic else self.synics[vp]

    def raise_sint(self, vp: int, sint: int) -> None:
        """See `Ports`."""
        if self._tracer.synic:
            self._tracer.line("synic", f"vp{vp} sint{sint} raised")
        self.synics[vp].raise_sint(sint)
