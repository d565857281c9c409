"""The stock Linux guest's recipe, on a machine without Hyper-V: QEMU's."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from guests import linux

pytestmark = pytest.mark.lab

_SCRIPT = """
result kernel $(uname -r)
dd if=/dev/zero of=/tmp/disk bs=1M count=16 2>/dev/null
mkfs.ext4 -q /tmp/disk && result filesystem $(dd if=/tmp/disk bs=1 skip=1080 count=2 2>/dev/null | xxd -p)
result modules $(cut -d' ' -f1 /proc/modules | sort)
result extra $(cat /data/extra)
"""


@pytest.mark.parametrize("flavour", ["cloud", "generic"])
def test_init_loads_modules_runs_the_script_and_powers_off(flavour: str) -> None:
    images = linux.build(_SCRIPT, flavour=flavour, files={"data/extra": b"more"})
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    ended = subprocess.run(
        [
            *(qemu, "-accel", "tcg", "-cpu", "max", "-m", "384", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-serial", "stdio", "-kernel", str(images.vmlinux), "-initrd", str(images.initrd)),
            *("-append", linux.COMMAND_LINE),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = linux.results(ended.stdout.decode(errors="replace"))
    assert found["kernel"] in images.kernel.name
    assert found["filesystem"] == "53ef"
    assert found["extra"] == "more"
    assert "sd_mod" in found["modules"].split()
