"""One VM: assembled from its configuration, run, controlled and taken apart.

The thread that calls `Machine.run` owns the life cycle: devices, VPs and the control socket only post events to it
and park the VPs; it decides. Order on resume: clock, devices, VPs; on pause the other way round.
"""

from __future__ import annotations

import threading

from enlightenments import tlfs
from enlightenments.selection import parse_spec
from pyvmm.boot import layout
from pyvmm.boot.entry import BootError
from pyvmm.core import _hot
from pyvmm.core.clock import Clock
from pyvmm.core.kvm import abi, capabilities
from pyvmm.core.kvm.errors import KvmError
from pyvmm.core.kvm.system import System
from pyvmm.core.memory import GuestMemory
from pyvmm.machine import kvm_timers
from pyvmm.machine.config import ConfigError
from pyvmm.machine.disks import Disks
from pyvmm.machine.guest_memory import load_guest
from pyvmm.machine.outcome import (
    EXIT_CRASH,
    EXIT_FAILED,
    EXIT_HOST,
    EXIT_POWEROFF,
    EXIT_RESET,
    EXIT_TIMEOUT,
    EXIT_USAGE,
    MachineError,
    Outcome,
    crash_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from enlightenments.selection import Selection
    from pyvmm.core.kvm.vp import Vp
    from pyvmm.core.trace import GuestLog, Tracer
    from pyvmm.machine.config import VmConfig
    from pyvmm.machine.console import Console
    from pyvmm.machine.nics import Nics, Slot
    from pyvmm.machine.processor import Processor
    from pyvmm.machine.synthetic import SyntheticDevices

_INSPECT_WAIT_S = 1.0

#: VMBus connection ids that a guest first posts to: from protocol 5.0 on the second.
_VMBUS_CONNECTIONS = (1, 4)


class Machine:
    """One VM. Raises MachineError from its making and from `run` if files or the host do not suffice."""

    def __init__(self, config: VmConfig, *, tracer: Tracer, log: GuestLog, console: Console) -> None:
        self.config = config
        self._tracer = tracer
        self._log = log
        self._console = console
        self._clock = Clock()
        self._condition = threading.Condition()  # guards _events and _state
        self._events: list[Outcome] = []
        self._state = "stopped"
        self._lifecycle = threading.RLock()  # one of pause, resume, reset, save at a time
        self._making = threading.Lock()  # of the next and the last of these
        self._synthetic: SyntheticDevices | None = None
        self._disks: Disks | None = None
        self._nics: Nics | None = None
        try:
            chosen = parse_spec(config.enlightenments)
        except ValueError as error:
            raise MachineError(str(error), EXIT_USAGE) from error
        if "vmbus" not in chosen and any(disk.bus == "scsi" for disk in config.disks):
            raise MachineError("--disk needs the enlightenment vmbus: its controller is a VMBus device", EXIT_USAGE)
        self._vmbus = "vmbus" in chosen
        try:
            self._disks = Disks(config.disks, self.synthetic, lambda: self.board)
            if config.nics:
                self.nics()
            self.memory = GuestMemory(config.memory, config.huge_pages)
            self._entry = load_guest(self.memory, self.config, self._vmbus)
            with System() as system:
                self._create_vm(system, chosen)
                self._assemble(system, chosen)
        except (BootError, ConfigError, KvmError, OSError) as error:
            self.close()
            code = EXIT_USAGE if isinstance(error, BootError | ConfigError) else EXIT_HOST
            raise MachineError(str(error), code) from error
        except BaseException:
            self.close()
            raise

    # Assembly --------------------------------------------------------------------------------------

    def _create_vm(self, system: System, chosen: Selection) -> None:
        system.require_capabilities()
        self._kvm_timers = kvm_timers.wanted(system, chosen, self._tracer)
        if self._kvm_timers:
            kvm_timers.reserve_page(self.memory)
        self._vm = system.create_vm()
        # In this order: once a VM has interrupt controllers, KVM takes some 10 ms to publish a filter or memory.
        self._vm.trap_msrs(tlfs.MSR_BASE, tlfs.MSR_COUNT, kvm_timers.COUNT_MSRS if self._kvm_timers else ())
        for region in self.memory.regions:
            self._vm.add_memory(region)
        self._vm.create_interrupt_controllers(layout.KVM_TSS_ADDRESS, layout.KVM_IDENTITY_MAP_ADDRESS)

    def _assemble(self, system: System, chosen: Selection) -> None:
        # KVM publishes interrupt controllers in the background, and the end of a VM waits for that: a VM that soon ends
        # gains by all that is only loaded now.
        from enlightenments.cpuid import hypervisor_leaves
        from enlightenments.partition import Partition
        from pyvmm.core.worker import Worker
        from pyvmm.machine.board import Board
        from pyvmm.machine.processor import Processor, guest_cpuid, host_features, power_on_states

        config = self.config
        supported = system.supported_cpuid()
        try:
            chosen = chosen.on_host(host_features(system, supported))
        except ValueError as error:
            raise MachineError(str(error), EXIT_HOST) from error
        self._worker = Worker("board", self._on_worker_error, self._clock)
        address_bits = next((leaf.eax & 0xFF for leaf in supported if leaf.function == 0x8000_0008), 36)
        hypervisor = hypervisor_leaves(chosen, config.cpus, address_bits)
        self.partition = Partition(
            self.memory,
            chosen,
            config.cpus,
            self._tracer,
            self._on_guest_reset,
            self._on_guest_crash,
            self._start_vp,
            hypervisor,
        )
        self.partition.ring_in_kernel(self._vm)
        assert self._disks is not None
        self.board = Board(
            self.memory,
            self._vm.irq_line,
            config.cpus,
            self._console.write,
            self._worker,
            lambda name: Worker(name, self._on_worker_error, self._clock),
            self._disks.ide(),
            self._nic_slots("legacy"),
            self._tracer,
            self._clock,
            lambda: self._post(Outcome("poweroff", EXIT_POWEROFF)),
            self._on_guest_reset,
        )
        if config.testdev:
            self.board.add_test_devices(
                self.memory,
                self._vm.irq_line,
                config.cpus,
                self._worker,
                self.partition,
                lambda status: self._post(Outcome("exit", status & 0xFF)),
            )
        self.processors: list[Processor] = []
        for index in range(config.cpus):
            vp, hot = self._make_vp(index, guest_cpuid(supported, hypervisor, index, config.cpus))
            self.processors.append(Processor(vp, hot, self._on_vp_exit, self._on_vp_error))
        self._power_on = power_on_states(self.processors, system.msr_indices())
        self._power_on_vm = self._vm.get_state()
        if self._vmbus:
            for connection_id in _VMBUS_CONNECTIONS:
                self.partition.connect_message_port(
                    connection_id,
                    lambda kind, payload, target=connection_id: self._first_message(target, kind, payload),  # type: ignore[misc]
                )

    def _make_vp(self, index: int, leaves: list[abi.CpuidEntry]) -> tuple[Vp, _hot.Vp]:
        from pyvmm.machine.processor import signatures

        vp = self._vm.create_vp(index)
        vp.set_cpuid(leaves)
        self._signatures = signatures(leaves)
        if index == 0:
            self.partition.set_reference_time(vp.tsc_khz(), vp.tsc_offset())
        reference = self.partition.reference
        assert reference is not None
        if index == 0 and self._kvm_timers:
            page = self.partition.reference_page()
            self._kvm_timers = kvm_timers.share_reference_time(self.memory, vp, reference, page)
            if not self._kvm_timers:
                self._vm.trap_msrs(tlfs.MSR_BASE, tlfs.MSR_COUNT)
        synic = self.partition.add_synic(self._vm.fd, index)
        hot = _hot.Vp(
            vp.fd,
            index,
            vp.run_map,
            self.memory.hot,
            synic,
            self.partition.doorbells,
            reference,
            self.board.pio,
            self.board.mmio,
            self.partition,
        )
        self.partition.add_vp(hot)
        if self._kvm_timers:
            vp.enable_capability(capabilities.HYPERV_SYNIC2)
            synic.kvm_timers = True
        return vp, hot

    # What happens on VP threads --------------------------------------------------------------------

    def _post(self, event: Outcome) -> None:
        """Tell the owner of the life cycle, and keep the guest from going on meanwhile."""
        with self._condition:  # one step, so that no `_release` comes between the event and the halt
            self._events.append(event)
            for processor in self.processors:
                processor.halt()
            self._condition.notify_all()

    def _on_guest_reset(self) -> None:
        self._post(Outcome("reset", EXIT_RESET))

    def _start_vp(self, caller: int, index: int, context: bytes) -> int:
        from pyvmm.machine.start_vp import start

        if index == caller:
            return tlfs.INVALID_VP_STATE
        target = self.processors[index]
        status = self.processors[caller].ask(target, lambda: start(target.vp, context))
        return tlfs.INVALID_VP_STATE if status is None else status

    def _on_guest_crash(self, parameters: list[int], message: str) -> None:
        text = "the guest reports a crash: " + " ".join(f"P{i}={value:#x}" for i, value in enumerate(parameters))
        self._post(Outcome("crash", EXIT_CRASH, f"{text}\n{message}".rstrip()))

    def _on_vp_exit(self, processor: Processor, reason: int) -> None:
        from pyvmm.machine.diagnosis import diagnose

        if reason == abi.EXIT_SYSTEM_EVENT and processor.vp.run.system_event.type == abi.SYSTEM_EVENT_RESET:
            self._on_guest_reset()
            return
        self._post(Outcome("crash", EXIT_CRASH, diagnose(processor.vp, reason, self.memory)))

    def _on_vp_error(self, processor: Processor, error: BaseException) -> None:
        self._post(crash_of(f"VP {processor.vp.index}", error))

    def _on_worker_error(self, error: BaseException) -> None:
        self._post(crash_of("a device", error))

    def _first_message(self, connection_id: int, kind: int, payload: bytes) -> bool:
        """A guest's first word to VMBus: only now are the bus and its devices made."""
        self.synthetic()
        return self.partition.forward(connection_id, kind, payload)

    def synthetic(self) -> SyntheticDevices:
        """The VMBus and its devices, made at first use: a guest that never asks for them starts faster.

        Raises MachineError if the VM has no VMBus.
        """
        if not self._vmbus:
            raise MachineError("the VM has no VMBus, so nothing can be plugged in", EXIT_USAGE)
        with self._making:
            if self._synthetic is None:
                from pyvmm.machine.synthetic import SyntheticDevices

                for connection_id in _VMBUS_CONNECTIONS:
                    self.partition.disconnect_message_port(connection_id)
                assert self._disks is not None
                self._synthetic = SyntheticDevices(
                    self.partition,
                    self.memory,
                    self._disks.controllers(),
                    self._disks.ide(),
                    self._nic_slots("synthetic"),
                    self._tracer,
                    self._log,
                    self._clock,
                    self._on_worker_error,
                )
            return self._synthetic

    # Life cycle ------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """running, paused or stopped."""
        return self._state

    def run(self) -> Outcome:
        """Start the guest and return once the VM has ended."""
        self.processors[0].enter(self._entry)
        self._worker.start()
        self.board.reset()
        for processor in self.processors:
            processor.start()
        self._console.start(self.board.uart.receive)
        with self._lifecycle:
            self._state = "running"
            self._release()
        deadline = None
        if self.config.timeout is not None:
            deadline = self._clock.now_ns() + int(self.config.timeout * 1e9)
        while True:
            event = self._next_event(deadline)
            if event.kind == "reset" and (self.config.reboot or event.exit_code != EXIT_RESET):
                try:
                    self._reset()
                except (BootError, KvmError, OSError) as error:
                    event = Outcome("crash", EXIT_CRASH, f"cannot start again: {error}")
                else:
                    continue
            self._console.lose_patience()  # a VP may be waiting for the reader
            self._stop()
            return event

    def _next_event(self, deadline: int | None) -> Outcome:
        """Wait for an event. It stays in the list until it has been dealt with: the VPs are not released before."""
        with self._condition:
            while not self._events or self._events[0].kind == "reset":
                left = None if deadline is None else (deadline - self._clock.now_ns()) / 1e9
                if left is not None and left <= 0:  # also for a guest that resets without end
                    return Outcome("timeout", EXIT_TIMEOUT, f"stopped after {self.config.timeout:g} s")
                if self._events:
                    break
                self._condition.wait(left)
            return self._events[0]

    def _halt(self) -> None:
        for processor in self.processors:
            processor.halt()
        for processor in self.processors:
            processor.wait_parked()

    def _release(self) -> None:
        with self._condition:
            if not self._events:
                for processor in self.processors:
                    processor.release()

    def _reset(self) -> None:
        with self._lifecycle:
            self._halt()
            with self._condition:
                self._events = [event for event in self._events if event.kind != "reset"]
            self.board.reset()
            if self._synthetic is not None:
                self._synthetic.reset()
            self.partition.reset()
            self._vm.set_state(self._power_on_vm)
            for processor, state in zip(self.processors, self._power_on, strict=True):
                processor.vp.set_state(state)
            self._entry = load_guest(self.memory, self.config, self._vmbus)
            self.processors[0].enter(self._entry)
            if self._state == "running":  # a paused VM starts again when it is resumed
                self._release()

    def _pause_devices(self) -> None:
        self.board.pause()
        if self._synthetic is not None:
            self._synthetic.pause()

    def _resume_devices(self) -> None:
        self.board.resume()
        if self._synthetic is not None:
            self._synthetic.resume()

    def _stop(self) -> None:
        with self._lifecycle:
            self._halt()
            self.board.uart.flush()
            self._state = "stopped"

    def close(self) -> None:
        """End all threads and give everything back. Harmless the second time.

        The disks are flushed; raises MachineError, with all given back, if one could not be.
        """
        for processor in getattr(self, "processors", ()):
            processor.end()
        if self._synthetic is not None:
            self._synthetic.close()
            self._synthetic = None
        if getattr(self, "board", None) is not None:
            self.board.close()
        if getattr(self, "_worker", None) is not None:
            self._worker.stop()
        if self._nics is not None:
            self._nics.close()
        lost = self._disks.close() if self._disks is not None else None
        for processor in getattr(self, "processors", ()):
            processor.vp.close()
        if getattr(self, "_vm", None) is not None:
            self._vm.close()
        if lost is not None:
            raise MachineError(lost, EXIT_FAILED)

    # Control: any thread ---------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the guest where it is; raises MachineError if it does not run."""
        with self._lifecycle:
            if self._state != "running":
                raise MachineError(f"the VM is {self._state}, not running", EXIT_USAGE)
            self._halt()
            self._pause_devices()
            self._state = "paused"

    def resume(self) -> None:
        """Go on after `pause`; raises MachineError if the VM is not paused."""
        with self._lifecycle:
            if self._state != "paused":
                raise MachineError(f"the VM is {self._state}, not paused", EXIT_USAGE)
            self._resume_devices()
            self._state = "running"
            self._release()

    def reset(self) -> None:
        """Reset the VM as its reset button would, also under --no-reboot."""
        self._post(Outcome("reset", EXIT_POWEROFF))

    def poweroff(self) -> None:
        """Cut the power."""
        self._post(Outcome("poweroff", EXIT_POWEROFF))

    def stop(self, exit_code: int, message: str = "") -> None:
        """End the VM from outside with an exit code."""
        self._post(Outcome("stopped", exit_code, message))

    def shutdown(self, timeout: float, restart: bool = False) -> dict[str, Any]:
        """Ask the guest, through its shutdown integration service, to shut down or restart."""
        if self._state != "running":
            raise MachineError(f"the VM is {self._state}, not running", EXIT_USAGE)
        if not self._vmbus:
            return {"obeyed": False, "message": "the VM has no VMBus, so no integration services"}
        return self.synthetic().shutdown(timeout, restart)

    @property
    def disks(self) -> Disks:
        """The VM's disks, to plug in and out."""
        assert self._disks is not None
        return self._disks

    def nics(self) -> Nics:
        """The VM's NICs, to plug in and out. Raises MachineError if those of its configuration cannot be had."""
        with self._making:
            if self._nics is None:
                from pyvmm.machine.nics import Nics

                self._nics = Nics(self.config, self.synthetic, self._log, self._clock, self._on_worker_error)
            return self._nics

    def _nic_slots(self, type: str) -> list[Slot]:
        return self._nics.slots(type) if self._nics is not None else []

    def inspect(self) -> dict[str, Any]:
        """The whole VM as a JSON tree."""
        from pyvmm.machine.counts import exits_by_name, total_counts

        vps = [processor.hot.counts() for processor in self.processors]
        return {
            "name": self.config.name,
            "state": self._state,
            "cpus": self.config.cpus,
            "memory": self.config.memory,
            **total_counts(vps),
            "vps": [
                {"exits": exits_by_name(counts), "registers": registers}
                for counts, registers in zip(vps, self._registers(), strict=True)
            ],
            "partition": self.partition.inspect(),
            "board": self.board.inspect(),
            "console": self._console.inspect(),
            "nics": self._nics.inspect() if self._nics is not None else [],
            "synthetic": self._synthetic.inspect() if self._synthetic is not None else None,
        }

    def enlightenments(self) -> dict[str, Any]:
        """What the guest makes of its enlightenments, see `enlightenments.observe`."""
        from enlightenments.observe import report

        return report(
            {
                "offered": self.partition.chosen.names,
                "vps": [processor.hot.counts() for processor in self.processors],
                "partition": self.partition.inspect(),
                "signatures": self._signatures,
                "vmbus": self._synthetic is not None,
            }
        )

    def _registers(self) -> list[dict[str, str] | None]:
        """Those of parked VPs: KVM makes whoever asks for those of a running one wait until it leaves the guest."""
        unknown: list[dict[str, str] | None] = [None] * len(self.processors)
        if not self._lifecycle.acquire(timeout=_INSPECT_WAIT_S):  # halting takes long: a device is busy
            return unknown
        try:
            parked = self._state != "running" and self._vm.fd >= 0
            return [processor.registers() for processor in self.processors] if parked else unknown
        finally:
            self._lifecycle.release()
