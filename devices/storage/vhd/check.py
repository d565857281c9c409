"""Checking a VHD image, and putting right what can be put right without guessing."""

from __future__ import annotations

import os

from devices.storage.backend import DiskError, Finding
from devices.storage.chain import open_parents
from devices.storage.vhd.disk import DynamicVhd, FixedVhd, VhdDisk
from devices.storage.vhd.image import Image
from devices.storage.vhd.layout import FIXED
from devices.storage.vhd.parent import timestamp_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.storage.file import HostFile


def check(file: HostFile, repair: bool) -> list[Finding]:
    """What is wrong with the image in `file`, and with `repair` put right.

    Raises DiskError for what is no image at all, OSError if the medium fails. What every writer does when it opens the
    image is all that is repaired; damage that has cost data, or may have, is left as it is.
    """
    image = Image(file)
    if any(finding.severity == "error" for finding in image.findings):
        return image.findings
    disk: VhdDisk = FixedVhd(file, image) if image.footer.kind == FIXED else DynamicVhd(file, image)
    for finding in image.findings:
        finding.repaired = repair
    try:
        open_parents(disk)
        image.findings += _parent_findings(disk, image)
    except DiskError as error:
        image.findings.append(Finding("error", str(error).removeprefix(f"{disk.path}: ")))
    finally:
        disk.close()
    return image.findings


def _parent_findings(disk: VhdDisk, image: Image) -> list[Finding]:
    if disk.parent is None or image.header is None:
        return []
    made = image.header.parent_timestamp
    if not made or timestamp_of(os.path.realpath(disk.parent.path)) <= made:
        return []
    what = f"{disk.parent.path} was written after this child was made; if its data changed, this disk is damaged"
    return [Finding("warning", what)]
