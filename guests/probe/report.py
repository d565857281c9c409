"""Reads what the probe wrote to COM1, and says what each finding should be and which text asks for it.

The probe judges its findings itself; a line is ``probe: topic.name = value ok`` or
``probe: topic.name = value bad expected``, and ``probe: done PASSED FAILED`` is the last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: What a finding must be, for people. Sources by topic: the TLFS v6.0b's chapters on feature discovery (cpuid), the
#: hypercall interface, inter-partition communication (synic, posting, signalling) and timers; Linux ``drivers/hv`` and
#: ``drivers/scsi/storvsc_drv.c`` (vmbus, storage). A key also stands for that name with a number after it
#: (``vmbus.offer`` for ``vmbus.offer12``).
EXPECTATIONS = {
    "cpuid.hypervisor_present": "CPUID 1 ECX bit 31 set",
    "cpuid.vendor": "'Microsoft Hv', the name that Linux asks for",
    "cpuid.leaf0": "highest leaf 0x40000005 or above",
    "cpuid.leaf1": "interface 'Hv#1'",
    "cpuid.leaf2": "any version",
    "cpuid.leaf3": "hypercall and VP index MSRs, no root privileges, both frequency bits or none",
    "cpuid.leaf4": "any recommendations",
    "cpuid.leaf5": "at least as many VPs as the MADT has processors",
    "cpuid.leaf6": "any hardware features",
    "msr.guest_os_id_at_reset": "0",
    "msr.hypercall_without_os_id": "the enable bit stays 0 while the guest OS id is 0",
    "msr.guest_os_id": "reads back",
    "msr.hypercall": "reads back enabled",
    "msr.hypercall_page": "code at its start",
    "msr.hypercall_os_id_cleared": "the enable bit goes when the guest OS id is cleared",
    "msr.hypercall_beyond_gpa_space": "#GP",
    "msr.hypercall_reserved_bit": "#GP or ignored; the page stays enabled",
    "msr.vp_index": "0 on the first VP",
    "msr.vp_index_readonly": "#GP on write",
    "msr.time_ref_count": "rises with every read",
    "msr.time_ref_count_readonly": "#GP on write",
    "msr.reference_tsc": "reads back enabled",
    "msr.reference_tsc_sequence": "not 0, which would send the guest to the MSR",
    "msr.reference_tsc_agrees": "page and TIME_REF_COUNT tell the same time, to 100 ns",
    "msr.tsc_frequency": "0.1 to 10 GHz",
    "msr.tsc_frequency_readonly": "#GP on write",
    "msr.apic_frequency": "1 MHz to 10 GHz",
    "msr.vp_runtime": "rising, not 0",
    "msr.vp_assist_page": "reads back; Linux sets it whatever is offered",
    "msr.scontrol_at_reset": "0, SynIC off",
    "msr.sversion": "1",
    "msr.sversion_readonly": "#GP on write",
    "msr.siefp_at_reset": "0",
    "msr.simp_at_reset": "0",
    "msr.eom": "write accepted",
    "msr.sints_masked_at_reset": "all 16 SINTs 0x10000",
    "msr.sint_vector_below_16": "#GP when unmasked",
    "msr.sint": "reads back",
    "msr.stimers_at_reset": "0 in all eight",
    "msr.stimer_count": "reads back",
    "msr.stimer_config": "reads back",
    "msr.crash_parameters": "all five read back",
    "msr.crash_control": "crash notification offered (bit 63)",
    "msr.unknown_read": "#GP",
    "msr.unknown_write": "#GP",
    "msr.access_unlike_privileges": "0: an MSR is readable if and only if CPUID 0x40000003 EAX offers it",
    "hypercall.unknown_code": "status 2, invalid hypercall code",
    "hypercall.unknown_code_fast": "status 2, invalid hypercall code",
    "hypercall.post_bad_connection": "status 0x12, invalid connection id",
    "hypercall.post_misaligned": "status 4, invalid alignment",
    "hypercall.post_across_pages": "status 4, invalid alignment",
    "hypercall.post_size_241": "status 5, invalid parameter",
    "hypercall.post_type_reserved": "status 5, invalid parameter",
    "hypercall.post_beyond_gpa_space": "status 4, invalid alignment",
    "hypercall.post_outside_ram": "any error",
    "hypercall.post_rep_count": "status 3, invalid hypercall input",
    "hypercall.post_reserved_bit": "status 3, invalid hypercall input",
    "hypercall.post_fast": "status 3: its input does not fit into registers",
    "hypercall.signal_bad_connection": "status 0x12, invalid connection id",
    "hypercall.signal_in_memory": "status 0x12: the memory form works too",
    "hypercall.signal_rep_count": "status 3, invalid hypercall input",
    "hypercall.32bit_post_misaligned": "status 4, called from 32-bit code",
    "hypercall.32bit_signal": "status 0x12, called from 32-bit code",
    "hypercall.32bit_unknown_code": "status 2, called from 32-bit code",
    "synic.simp": "reads back enabled",
    "synic.siefp": "reads back enabled",
    "synic.simp_zeroed": "an empty message page",
    "synic.siefp_zeroed": "no event flags",
    "synic.timer_message": "type 0x80000010, timer expired",
    "synic.timer_payload_size": "24 bytes",
    "synic.timer_expiration": "the time that was asked for",
    "synic.timer_delivery": "not before the expiration, not after now",
    "synic.timer_interrupts": "one on the SINT's vector",
    "synic.timer_one_shot_disabled": "the enable bit goes when a one-shot timer expires",
    "synic.message_pending": "the flag that a second message waits",
    "synic.messages_after_eom": "the message of either timer came",
    "synic.periodic_ticks": "3 messages",
    "synic.periodic_time": "never ahead of time: 9 ms or more for 3 periods of 3 ms",
    "synic.direct_interrupts": "one on the timer's own vector",
    "synic.direct_no_message": "no message with it",
    "synic.timer_sint0_disabled": "a message timer on SINT 0 is disabled at once",
    "synic.timer_auto_enable": "writing the count enables the timer",
    "synic.timer_count0_disabled": "writing count 0 disables it",
    "synic.guest_idle": "wakes within a second with interrupts off",
    "synic.guest_idle_message": "the timer's message came",
    "synic.tsc_rate": "within 2 % of the TSC frequency MSR, against reference time",
    "smp.trampoline": "a free page below 1 MiB",
    "smp.started": "all application processors",
    "smp.apic_id_of_vp": "any; the VP's index is below the VP count",
    "smp.vp_indices": "one bit for each VP, none twice",
    "smp.timer_messages": "each VP received its own timer message and interrupt",
    "smp.reference_time_agrees": "each VP's reference TSC page tells the first VP's time",
    "smp.wake_interrupts": "an IPI from the last one",
    "vmbus.unknown_version": "refused with an answer",
    "vmbus.version": "5.3",
    "vmbus.message_connection": "a connection id for the following messages",
    "vmbus.request_offers_32bit": "status 0: a good hypercall from 32-bit code",
    "vmbus.offer": "first word of the interface GUID; channel id 1 to 2047, a connection of its own",
    "vmbus.offers": "all offers delivered",
    "vmbus.scsi_channel": "an offer of a SCSI controller",
    "vmbus.gpadl_with_body": "status 0 for 40 pages in two messages",
    "vmbus.gpadl_with_body_torn_down": "torn down",
    "vmbus.gpadl": "status 0 for the rings",
    "vmbus.open_id": "the one that was sent",
    "vmbus.open": "status 0",
    "vmbus.close": "posted",
    "vmbus.gpadl_torn_down": "torn down after close",
    "vmbus.unload": "answered",
    "storage.begin": "status 0",
    "storage.version": "0x602, 0x600 or 0x501",
    "storage.max_transfer": "a page or more",
    "storage.end": "status 0",
    "storage.inquiry": "a direct-access disk on LUN 0",
    "storage.last_sector": "not 0",
    "storage.sector_size": "512",
    "storage.sector0": "its first 16 bytes",
    "storage.write": "sector 1 written",
    "storage.synchronize_cache": "done",
    "storage.read_back": "sector 1 as written",
    "storage.read_beyond_end": "check condition, sense 5/21, LBA out of range",
    "storage.unknown_command": "check condition, sense 5/20, invalid command",
    "storage.absent_lun": "SRB status 0x20, invalid LUN",
    "storage.test_unit_ready": "more requests than the rings hold, so that both wrap",
    "storage.interrupts": "event flag interrupts on VMBus's vector",
}

_FINDING = re.compile(
    r"probe: (?P<topic>[a-z]+)\.(?P<name>\w+) = (?P<value>.*?) (?P<verdict>ok|bad)(?: (?P<expected>.*))?"
)
_DONE = re.compile(r"probe: done (\d+) (\d+)")


@dataclass(frozen=True)
class Finding:
    """One thing the probe looked at. `expected` is what the probe said, given only where `ok` is false."""

    topic: str
    name: str
    value: str
    ok: bool
    expected: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.topic}.{self.name}"


@dataclass
class Report:
    """A whole report. `notes` are the probe's other lines, such as an exception it died of."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    totals: tuple[int, int] | None = None

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.ok]

    @property
    def problem(self) -> str | None:
        """In one line, why the report is not all as expected; None if it is."""
        if self.failed:
            return f"{len(self.failed)} of {len(self.findings)} findings are not as expected"
        if self.totals is None:
            last = self.notes[-1] if self.notes else "nothing"
            return f"the probe did not finish; its last note: {last}"
        if self.totals != (len(self.findings), 0):
            return f"the probe counted {self.totals[0]} good and {self.totals[1]} bad, {len(self.findings)} arrived"
        return None


def parse(text: str) -> Report:
    """Read COM1's text; lines that are not the probe's are skipped."""
    report = Report()
    for line in text.splitlines():
        line = line.strip("\r\0")
        if match := _FINDING.fullmatch(line):
            topic, name, value, verdict, expected = match.groups()
            report.findings.append(Finding(topic, name, value, verdict == "ok", expected or ""))
        elif match := _DONE.fullmatch(line):
            report.totals = int(match[1]), int(match[2])
        elif line.startswith("probe: "):
            report.notes.append(line.removeprefix("probe: "))
    return report


def expectation(full_name: str) -> str | None:
    """What the finding must be, for people; None for a finding nobody knows."""
    known = EXPECTATIONS.get(full_name)
    return known if known is not None else EXPECTATIONS.get(full_name.rstrip("0123456789"))
