"""A partition with two VPs and no KVM."""

from __future__ import annotations

from enlightenments.cpuid import hypervisor_leaves
from enlightenments.partition import Partition
from enlightenments.selection import parse_spec
from enlightenments.tlfs import INVALID_VP_STATE, SUCCESS
from pyvmm.core import _hot
from pyvmm.core.memory import GuestMemory
from pyvmm.core.trace import Tracer

SIZE = 1 << 20
TSC_KHZ = 2_000_000
VP_COUNT = 2


class Vm:
    """Its MSRs and hypercalls, and what the guest asked of the machine."""

    def __init__(self, spec: str = "full", tracer: Tracer | None = None) -> None:
        selection = parse_spec(spec)
        self.memory = GuestMemory(SIZE)
        self.memory.add_rom(0xFFFFF000, b"R" * 0x1000)
        self.resets = 0
        self.crashes: list[tuple[list[int], str]] = []
        self.started: list[tuple[int, int, bytes]] = []
        self.partition = Partition(
            self.memory,
            selection,
            VP_COUNT,
            tracer or Tracer(),
            self._reset,
            lambda parameters, message: self.crashes.append((parameters, message)),
            self._start_vp,
            hypervisor_leaves(selection, VP_COUNT, 46),
        )
        self.partition.set_reference_time(TSC_KHZ, 0)
        self.vps = []
        assert self.partition.reference is not None
        for index in range(VP_COUNT):
            synic = self.partition.add_synic(-1, index)
            self.vps.append(
                _hot.Vp(
                    -1,
                    index,
                    bytearray(16384),  # type: ignore[arg-type]
                    self.memory.hot,
                    synic,
                    self.partition.doorbells,
                    self.partition.reference,
                    None,
                    None,
                    self.partition,
                )
            )
            self.partition.add_vp(self.vps[-1])

    def _reset(self) -> None:
        self.resets += 1

    def _start_vp(self, caller: int, index: int, context: bytes) -> int:
        self.started.append((caller, index, context))
        return INVALID_VP_STATE if len(self.started) > 1 else SUCCESS

    def call(self, control: int, input: int = 0, output: int = 0, xmm: bytes | None = None, vp: int = 0) -> int:
        """Make a hypercall; return its result."""
        return self.vps[vp].hypercall(control, input, output, *([] if xmm is None else [xmm]))

    def read(self, msr: int, vp: int = 0) -> int | None:
        return self.partition.read_msr(vp, msr)

    def write(self, msr: int, value: int, vp: int = 0) -> bool:
        return self.partition.write_msr(vp, msr, value)

    def page(self, gpa: int) -> bytes:
        return self.memory.read(gpa, 4096)

    @property
    def hypercalls_trap(self) -> bool:
        states = {vp.hypercalls_enabled for vp in self.vps}
        assert len(states) == 1
        return states.pop()
