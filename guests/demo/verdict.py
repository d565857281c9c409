"""What the stock guest and its host should have found, compared with what they did."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devices.synthetic.ic.heartbeat import Heartbeat
from devices.synthetic.ic.shutdown import Shutdown
from devices.synthetic.ic.timesync import TimeSync
from devices.synthetic.storvsp.protocol import INTERFACE_TYPE as SCSI
from guests import linux
from guests.packages import RecipeError

#: Interface GUID of each device that pyvmm offers: its name, and the stock driver that serves it.
DEVICES = {
    SCSI: ("SCSI controller", "hv_storvsc"),
    str(Shutdown.interface_id): ("shutdown", "hv_utils"),
    str(Heartbeat.interface_id): ("heartbeat", "hv_utils"),
    str(TimeSync.interface_id): ("time sync", "hv_utils"),
}


@dataclass(frozen=True)
class Channel:
    """A device on the guest's VMBus. `driver` is empty where none is bound; `count` is that of its channels."""

    device: str
    interface: str
    count: int
    driver: str

    @property
    def name(self) -> str:
        return DEVICES[self.interface][0] if self.interface in DEVICES else self.interface


@dataclass(frozen=True)
class Problem:
    """Something that isn't as it should be."""

    what: str
    expected: str
    found: str


@dataclass
class Guest:
    """What one run of the stock guest showed; `letter` is what the guest read back, `letter_on_disk` the host."""

    kernel: str = ""
    dmesg: list[str] = field(default_factory=list)
    clocksource: str = ""
    channels: list[Channel] = field(default_factory=list)
    disk: str = ""
    letter: str = ""
    letter_sum: str = ""
    letter_on_disk: bytes = b""
    shutdown: dict[str, Any] | None = None
    status: int = 0
    console: str = ""
    stderr: str = ""

    @property
    def sum_on_disk(self) -> str:
        """The SHA-256 of the letter that the host found."""
        return hashlib.sha256(self.letter_on_disk).hexdigest()

    @property
    def obeyed(self) -> bool:
        """Whether the guest shut down when it was asked to."""
        reply = (self.shutdown or {}).get("reply") or {}
        return reply.get("obeyed") is True

    @property
    def shutdown_told(self) -> str:
        """What `pyvmm ctl shutdown` said."""
        if self.shutdown is None:
            return "never asked, as the guest did not get that far"
        reply = self.shutdown["reply"] or {}
        return str(reply.get("message") or reply.get("error") or self.shutdown["stderr"].strip())


def guest(found: dict[str, Any], letter_on_disk: bytes) -> Guest:
    """Read what the session left in linux.json."""
    told = linux.results(found["console"])
    channels = []
    for key, value in told.items():
        if key.startswith("channel_") and (match := re.fullmatch(r"(\S+) (\d+) ?(\S*)", value)):
            channels.append(Channel(key.removeprefix("channel_"), match[1], int(match[2]), match[3]))
    return Guest(
        kernel=told.get("kernel", ""),
        dmesg=_numbered(told, "dmesg"),
        clocksource=told.get("clocksource", ""),
        channels=channels,
        disk=told.get("disk", ""),
        letter="".join(f"{line}\n" for line in _numbered(told, "letter")),
        letter_sum=told.get("sum", ""),
        letter_on_disk=letter_on_disk,
        shutdown=found["shutdown"],
        status=found["exit"],
        console=found["console"],
        stderr=found["stderr"],
    )


def file_in_image(image: Path, name: str) -> bytes:
    """Return a file of the ext4 file system in `image`, empty if it isn't there; needs no mount and so no root."""
    program = shutil.which("debugfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise RecipeError("debugfs is missing; `make setup` installs it")
    return subprocess.run([program, "-R", f"cat /{name}", str(image)], capture_output=True, check=False).stdout


def problems(guest: Guest) -> list[Problem]:
    """What is not as it should be with a stock Debian 12 kernel."""
    said = "\n".join(guest.dmesg)
    detected = re.search(r"Hypervisor detected: (.*)", said)
    version = re.search(r"Vmbus version:(\S+)", said)
    bound = sorted((channel.name, channel.driver or "no driver") for channel in guest.channels)
    checks = [
        ("hypervisor that Linux detected", "Microsoft Hyper-V", detected[1] if detected else ""),
        ("VMBus protocol", "5.3", version[1] if version else ""),
        ("clocksource", "hyperv_clocksource_tsc_page", guest.clocksource),
        ("devices and drivers on VMBus", _pairs(sorted(DEVICES.values())), _pairs(bound)),
        ("letter on the disk, as the host reads it", guest.letter, guest.letter_on_disk.decode(errors="replace")),
        ("SHA-256 of the letter, as the guest reads it", guest.sum_on_disk, guest.letter_sum),
        ("shutdown by the integration service", "obeyed", "obeyed" if guest.obeyed else guest.shutdown_told),
        ("exit status of pyvmm", "0", str(guest.status)),
    ]
    wrong = [Problem(*check) for check in checks if check[1] != check[2]]
    if not guest.letter:
        wrong.append(Problem("letter, as the guest reads it back", "some lines", ""))
    return wrong


def _pairs(pairs: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name}: {driver}" for name, driver in pairs)


def _numbered(told: dict[str, str], name: str) -> list[str]:
    """The values of NAME_1, NAME_2 ... up to the first that is missing."""
    values: list[str] = []
    while (value := told.get(f"{name}_{len(values) + 1}")) is not None:
        values.append(value)
    return values
