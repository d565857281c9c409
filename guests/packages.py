"""Debian packages as files: downloaded and verified by apt, unpacked under ``~/.cache/pyvmm``.

Nothing is installed, so no root is needed. A package once unpacked is used from then on, without asking apt again and
without a network; delete the cache folder to get newer ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_APT_TIMEOUT = 600


class RecipeError(Exception):
    """A guest or the lab can't be prepared; the message is one line and says what to do."""


@dataclass(frozen=True)
class KernelPackage:
    """An unpacked ``linux-image`` package."""

    release: str
    """What ``uname -r`` prints under that kernel."""

    image: Path
    """The bzImage."""

    modules: Path
    """The folder holding ``modules.dep``."""


def cache_dir() -> Path:
    """Return pyvmm's cache folder (``$XDG_CACHE_HOME/pyvmm``, by default ``~/.cache/pyvmm``), which need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pyvmm"


def kernel(flavour: str) -> KernelPackage:
    """Return the kernel that the meta-package ``linux-image-FLAVOUR`` stands for (``amd64``, ``cloud-amd64``).

    Raises RecipeError when it is neither cached nor to be had.
    """
    cached = _newest_cached(flavour)
    if cached is None:
        name = _dependency(f"linux-image-{flavour}")
        cached = unpack(name)
        _index_modules(cached, name.removeprefix("linux-image-"))
    release = next(path.name for path in (cached / "lib/modules").iterdir())
    return KernelPackage(release, cached / "boot" / f"vmlinuz-{release}", cached / "lib/modules" / release)


def unpack(package: str) -> Path:
    """Download `package` and unpack it into the cache; return its folder, named NAME_VERSION_ARCHITECTURE.

    apt checks the archive's signature and the package's checksum. Raises RecipeError.
    """
    packages = cache_dir() / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages, prefix="incoming-") as scratch:
        # apt drops its privileges to download, so its user must be able to write here; without this it only warns.
        options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        _apt("apt-get", *options, "download", package, cwd=Path(scratch))
        archive = next(Path(scratch).glob("*.deb"))
        tree = Path(scratch) / "tree"
        _run(["dpkg", "-x", str(archive), str(tree)])
        target = packages / archive.stem
        try:
            tree.rename(target)
        except OSError:  # somebody else unpacked it meanwhile
            if not target.is_dir():
                raise
    return target


def _newest_cached(flavour: str) -> Path | None:
    candidates = [
        path
        for path in (cache_dir() / "packages").glob(f"linux-image-*-{flavour}_*")
        if re.fullmatch(rf"linux-image-[\d.]+-\d+-{flavour}_.+", path.name)
        and any(path.glob("lib/modules/*/modules.dep"))
    ]
    return max(candidates, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], default=None)


def _dependency(meta_package: str) -> str:
    listing = _apt("apt-cache", "depends", "--no-recommends", "--no-suggests", meta_package)
    found = re.search(r"^\s+Depends: (linux-image-\S+)$", listing, re.MULTILINE)
    if not found:
        raise RecipeError(f"{meta_package} depends on no kernel image; is this Debian?")
    return found.group(1)


def _index_modules(tree: Path, release: str) -> None:
    depmod = shutil.which("depmod") or "/sbin/depmod"
    _run([depmod, "-b", str(tree), release])


def _apt(*command: str, cwd: Path | None = None) -> str:
    """Run an apt command; when it fails, refresh the package lists if allowed to and try once more."""
    try:
        return _run(list(command), cwd)
    except RecipeError as error:
        if os.geteuid() != 0:
            raise RecipeError(f"{error} (as root, `apt-get update` may help)") from None
    _run(["apt-get", "update", "-q"])
    return _run(list(command), cwd)


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_APT_TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
            check=True,
        )
    except FileNotFoundError:
        raise RecipeError(f"{command[0]} is missing; `make setup` installs it") from None
    except subprocess.TimeoutExpired:
        raise RecipeError(f"{' '.join(command)} did not finish in {_APT_TIMEOUT} s") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or [f"exit status {error.returncode}"]
        raise RecipeError(f"{' '.join(command)} failed: {lines[-1]}") from None
    return done.stdout
