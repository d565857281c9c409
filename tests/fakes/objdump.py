"""Looks through a bare-metal guest's code for what KVM's instruction emulator lacks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_LACKING = {"int3", "fwait", "wait", "clac", "stac", "popcnt", "cmpxchg16b", "xsave", "xrstor", "xgetbv", "endbr64"}
#: In protected mode, that is; iretq it has.
_LACKING_32 = {"iret", "iretd", "endbr32"}


def lacking_instructions(elf: Path, bits: int) -> set[str]:
    """The mnemonics in `elf` that the emulator lacks, and lines with vector and floating-point registers."""
    machine = "i386" if bits == 32 else "i386:x86-64"
    command = ["objdump", "-d", "--no-show-raw-insn", "-m", machine, str(elf)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    mnemonics = {line.split("\t")[1].split()[0] for line in listing.splitlines() if line.count("\t") == 1}
    assert len(mnemonics) > 20, "no code found"
    found = mnemonics & (_LACKING | (_LACKING_32 if bits == 32 else set()))
    return found | set(re.findall(r".*(?:%[xyz]mm|%st\b).*", listing))
