"""Which enlightenments a VM has: profiles, and the specification that a user writes."""

from __future__ import annotations

from enlightenments.catalog import ENLIGHTENMENTS, HOST_FEATURES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import Any

#: Never notify of long spin waits.
SPINLOCKS_NEVER = 0xFFFF_FFFF
VENDOR_ID_LENGTH = 12
SETTINGS = ("spinlocks", "vendor-id", "version")


class Profile:
    """A named set to start from. `reason` says why it is what it is, `source` where that is from.

    `version` is what `Selection.version` is, None for the usual one.
    """

    __slots__ = ("names", "reason", "source", "version")

    def __init__(
        self, names: Iterable[str], reason: str, source: str, version: tuple[int, int, int] | None = None
    ) -> None:
        self.names = frozenset(names)
        self.reason = reason
        self.source = source
        self.version = version


#: Answered in user space these cost a guest more than its own APIC does, which KVM emulates in the kernel.
_ON_REQUEST = {"tlbflush", "tlbflush-ext", "ipi", "vapic"}

PROFILES = {
    "full": Profile(
        frozenset(ENLIGHTENMENTS) - _ON_REQUEST,
        "everything but flushes, IPIs and APIC registers, which KVM's own APIC does faster than user space can",
        "measurements in docs/enlightenments.md",
    ),
    "minimal": Profile(
        ("base", "vpindex"),
        "what a guest needs to take a hypervisor for Hyper-V",
        "Microsoft's Requirements for Implementing the Microsoft Hypervisor Interface (2012)",
    ),
    "none": Profile((), "no hypervisor at all", "TLFS 2.1"),
    "windows-server-2008": Profile(
        ("base", "vpindex", "reset", "runtime", "time", "synic", "stimer", "spinlocks", "relaxed", "vmbus"),
        "Hyper-V's first interface: no frequencies, no direct timers, no idling, no crash report, no advice on EOIs",
        "TLFS v2.0, appendices F and G",
        (6001, 6, 0),
    ),
    # QEMU's advice leaves out reset, which newer Hyper-V does not have; crash, which ends the VM before Windows can
    # write its dump; re-enlightenment, which guests with tsc-invariant do not need. What neither QEMU nor
    # cloud-hypervisor offer Windows is left out too: idle, vp-registers, start-vp, ext-hypercalls.
    "windows-11": Profile(
        (
            *("base", "vpindex", "runtime", "time", "frequencies", "tsc-invariant", "synic", "avic", "stimer"),
            *("stimer-direct", "spinlocks", "xmm-input", "relaxed", "vmbus"),
        ),
        "what QEMU's manual advises for Windows, but for what is slower here: a crash writes its dump",
        "QEMU docs/system/i386/hyperv.rst, Recommendations; cloud-hypervisor arch/src/x86_64/mod.rs",
    ),
    # Linux idles by MSR only together with ipi, for spinlocks; it never uses reset, runtime, relaxed or the spin wait
    # call; xmm-input, vp-registers and start-vp only in confidential VMs; re-enlightenment only for guests of its own.
    "linux": Profile(
        (
            *("base", "vpindex", "time", "frequencies", "tsc-invariant", "synic", "avic", "stimer"),
            *("stimer-direct", "crash", "vmbus"),
        ),
        "what Linux 6.x uses",
        "Linux arch/x86/kernel/cpu/mshyperv.c, arch/x86/hyperv/, drivers/clocksource/hyperv_timer.c",
    ),
}


class Selection:
    """The enlightenments of one VM and their settings.

    `wanted` are the names that the user asked for one by one. `spinlocks` is how often a guest tries for a lock before
    it tells of that; `version` is (build, major, minor) and `vendor_id` 12 bytes, both for CPUID.
    """

    __slots__ = ("names", "spinlocks", "vendor_id", "version", "wanted")

    def __init__(
        self,
        names: Collection[str],
        *,
        wanted: Collection[str] = (),
        spinlocks: int = 4095,
        # The build of Windows Server 2022, whose interface this is a subset of.
        version: tuple[int, int, int] = (20348, 10, 0),
        vendor_id: bytes = b"Microsoft Hv",
    ) -> None:
        self.names = frozenset(names)
        self.wanted = frozenset(wanted) & self.names
        self.spinlocks = spinlocks if "spinlocks" in self.names else SPINLOCKS_NEVER
        self.version = version
        self.vendor_id = vendor_id

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def on_host(self, features: Collection[str]) -> Selection:
        """What a host with `features` (of `HOST_FEATURES`) can offer of this.

        Raises ValueError if something is missing that the user asked for by name.
        """
        lacking = {name for name in self.names if ENLIGHTENMENTS[name].host not in (None, *features)}
        for name in sorted(self.wanted):
            for need in sorted(lacking & {name, *_all_needs(name)}):
                host = ENLIGHTENMENTS[need].host
                assert host is not None
                raise ValueError(f"the enlightenment {name} needs {HOST_FEATURES[host]}; this host has none")
        return self._with(names=_without(self.names, lacking))

    def changed(self, add: Collection[str], remove: Collection[str], settings: dict[str, Any]) -> Selection:
        """This with enlightenments added, others removed with what needs them, and settings as `__init__` has them.

        Raises ValueError for what contradicts itself.
        """
        for name in add:
            for need in (name, *_all_needs(name)):
                if need in remove:
                    why = "it is removed too" if need == name else f"it needs {need}, which is removed"
                    raise ValueError(f"{name} cannot be added: {why}")
        names = _without(self.names, remove) | set(add)
        for name in add:
            for need in ENLIGHTENMENTS[name].needs:
                if need not in names:
                    raise ValueError(f"{name} needs {need}; add that too")
        if "spinlocks" in settings and "spinlocks" not in names:
            raise ValueError("the setting spinlocks needs the enlightenment spinlocks")
        if settings and not names:
            raise ValueError("without enlightenments no guest sees their settings")
        return self._with(names=names, wanted=(self.wanted | set(add)), **settings)

    def _with(self, **changes: Any) -> Selection:
        values = {name: getattr(self, name) for name in ("wanted", "spinlocks", "version", "vendor_id")}
        if "spinlocks" not in self.names:
            del values["spinlocks"]  # no count of ours
        return Selection(**{**values, **changes})


def parse_spec(spec: str) -> Selection:
    """Turn ``PROFILE[,+NAME|,-NAME|,SETTING=VALUE]...`` into a selection; the first word may be left out (full).

    A first word that ends in ``.toml`` is the path of a custom profile, see `enlightenments.custom_profile`. Raises
    ValueError that says what is unknown or contradictory.
    """
    words = [word for word in (part.strip() for part in spec.split(",")) if word]
    if not words:
        raise ValueError("the enlightenments are empty; write 'none' for none")
    base = _starting_point("full" if words[0][0] in "+-" or _is_setting(words[0]) else words.pop(0))
    added: list[str] = []
    removed: list[str] = []
    settings: dict[str, Any] = {}
    try:
        for word in words:
            if word[0] in "+-":
                (added if word[0] == "+" else removed).append(check_name(word[1:]))
                continue
            if not _is_setting(word):
                raise ValueError(f"{word!r} is not the first word; write +NAME, -NAME or SETTING=VALUE")
            key, _, value = word.partition("=")
            if key.replace("-", "_") in settings:
                raise ValueError(f"{key} is set twice")
            settings.update(parse_setting(key, value))
        return base.changed(added, removed, settings)
    except ValueError as error:
        raise ValueError(f"enlightenments {spec!r}: {error}") from error


def profile(name: str) -> Selection:
    """The selection that is the profile `name`; raises ValueError if there is none."""
    found = PROFILES.get(name)
    if found is None:
        raise _unknown("enlightenment profile", name, PROFILES)
    if found.version is None:
        return Selection(found.names)
    return Selection(found.names, version=found.version)


def check_name(name: str) -> str:
    """The `name` of an enlightenment; raises ValueError if it is none."""
    if name not in ENLIGHTENMENTS:
        raise _unknown("enlightenment", name, ENLIGHTENMENTS)
    return name


def parse_setting(key: str, text: str) -> dict[str, Any]:
    """A setting as `Selection.__init__` takes it; raises ValueError."""
    if key == "spinlocks":
        return {"spinlocks": _parse_spinlocks(text)}
    if key == "vendor-id":
        if not (0 < len(text) <= VENDOR_ID_LENGTH and text.isascii() and text.isprintable()):
            raise ValueError(f"vendor-id {text!r} is not 1 to {VENDOR_ID_LENGTH} printable ASCII characters")
        return {"vendor_id": text.encode().ljust(VENDOR_ID_LENGTH, b"\0")}
    if key == "version":
        return {"version": _parse_version(text)}
    raise _unknown("setting", key, SETTINGS)


def _starting_point(word: str) -> Selection:
    if not word.endswith(".toml"):
        return profile(word)
    from enlightenments.custom_profile import load  # which brings a TOML parser

    return load(word)


def _is_setting(word: str) -> bool:
    return "=" in word and "/" not in word.partition("=")[0]


def _number(text: str, most: int) -> int | None:
    """A whole number from 0 to `most`, decimal or as 0xFFF; None for anything else."""
    try:
        number = int(text, 16 if text[:2] in ("0x", "0X") else 10)
    except ValueError:
        return None
    return number if text.isalnum() and text.isascii() and 0 <= number <= most else None


def _parse_spinlocks(text: str) -> int:
    if text == "never":
        return SPINLOCKS_NEVER
    number = _number(text, SPINLOCKS_NEVER)
    if not number:
        raise ValueError(f"spinlocks {text!r} is neither a number of tries, 1 to 0xffffffff, nor never")
    return number


def _parse_version(text: str) -> tuple[int, int, int]:
    parts = text.split(".")
    if len(parts) == 3:
        major, minor, build = (
            _number(part, most) for part, most in zip(parts, (0xFFFF, 0xFFFF, 0xFFFF_FFFF), strict=True)
        )
        if major is not None and minor is not None and build is not None:
            return build, major, minor
    raise ValueError(f"version {text!r} is not MAJOR.MINOR.BUILD of 16, 16 and 32 bits, such as 10.0.20348")


def _all_needs(name: str) -> set[str]:
    """What `name` needs, directly or not."""
    needs = set(ENLIGHTENMENTS[name].needs)
    return needs.union(*(_all_needs(need) for need in needs))


def _without(names: frozenset[str], removed: Collection[str]) -> frozenset[str]:
    """`names` but for those `removed`, and those that need them."""
    if not removed:
        return names
    return frozenset(name for name in names if name not in removed and _all_needs(name).isdisjoint(removed))


def _unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    import difflib

    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    return ValueError(f"unknown {what} {name!r}; {hint}")
