"""Runs nftables' program: rules are changed in one go or not at all."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from devices.network.plane import PlaneError

_SECONDS = 30.0
#: Where Debian has administrators' programs, which services may lack.
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def change(rules: str) -> None:
    """Have the kernel take `rules`, which are as in a file of nft(8); raises PlaneError."""
    _run(["-f", "-"], rules)


def remove_table(family: str, name: str) -> None:
    """Remove a table with all that is in it, if it is there."""
    change(f"table {family} {name}\ndelete table {family} {name}\n")


def counters(family: str, table: str) -> dict[str, int]:
    """The packets that a table's named counters have counted; raises PlaneError."""
    listed: dict[str, Any] = json.loads(_run(["-j", "list", "counters", "table", family, table], ""))
    found = (each["counter"] for each in listed["nftables"] if "counter" in each)
    return {counter["name"]: counter["packets"] for counter in found}


def _run(options: list[str], text: str) -> str:
    environment = {**os.environ, "PATH": PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["nft", *options],
            input=text,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env=environment,
        )
    except FileNotFoundError as error:
        raise PlaneError("nft is missing (apt install nftables)") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlaneError(f"nft: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "rror:" in line), done.stderr.strip())
        lacks = "; the host's kernel lacks a part of nftables (CONFIG_NF_TABLES and its bridge and inet families)"
        raise PlaneError(f"nft: {said}{lacks if 'No such file' in said or 'not supported' in said else ''}")
    return done.stdout
