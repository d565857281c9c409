"""The lab: this checkout on an ordinary Linux KVM, anywhere.

QEMU emulates an AMD processor with SVM in software; Debian's kernel in it offers a real ``kvm_amd``. The host's root
is mounted read-only under a throw-away overlay, so the same checkout, virtual environment and caches are found inside
at the same paths. See docs/lab.md.
"""

from __future__ import annotations

from guests.lab.machine import LabError, LabStandstill, LabTimeout, Result, run

__all__ = ["LabError", "LabStandstill", "LabTimeout", "Result", "run"]
