"""Where load balancers are kept: a definition in the state directory, a folder in the runtime directory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from devices.network import places
from pyvmm.core import toml_file
from pyvmm.host.balancer.definition import Balancer, BalancerError, check, check_name


def definition_path(name: str) -> Path:
    """The TOML file that says what load balancer `name` is."""
    return Path(places.state_dir(), "balancers", f"{name}.toml")


def folder(name: str) -> Path:
    """What the running load balancer `name` has: its lock, log, and HAProxy's files."""
    return Path(places.runtime_dir(), "balancers", name)


def load(name: str) -> Balancer:
    """Load balancer `name`; raises BalancerError, a MissingBalancer if there is none."""
    check_name(name)
    path = definition_path(name)
    if not path.exists():
        raise MissingBalancer(f"no load balancer {name}: make it with pyvmm lb create {name}")
    try:
        balancer = toml_file.decode(toml_file.read(str(path)), str(path), Balancer)
    except ValueError as error:
        raise BalancerError(str(error)) from error
    if balancer.name != name:
        raise BalancerError(f"{path}: name: it says {balancer.name!r}")
    check(balancer)
    return balancer


def names() -> list[str]:
    """The names of all load balancers."""
    try:
        return sorted(path.stem for path in definition_path("x").parent.iterdir() if path.suffix == ".toml")
    except OSError:
        return []


def save(balancer: Balancer) -> None:
    """Write a definition, whole or not at all; raises BalancerError."""
    check(balancer)
    path = definition_path(balancer.name)
    try:
        places.make_folder(str(path))
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(_toml(balancer))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
    except OSError as error:
        raise BalancerError(f"{path}: {error.strerror}") from error


def remove(name: str) -> None:
    """Forget load balancer `name`, which does not run."""
    definition_path(name).unlink(missing_ok=True)
    shutil.rmtree(folder(name), ignore_errors=True)


def _toml(balancer: Balancer) -> str:
    values = msgspec.to_builtins(balancer)
    backends = values.pop("backends")
    # JSON's values are TOML's too.
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for backend in backends:
        lines += ["", "[[backends]]", *(f"{k} = {json.dumps(v)}" for k, v in backend.items() if v is not None)]
    return "\n".join(lines) + "\n"


class MissingBalancer(BalancerError):
    """There is no load balancer of that name."""
