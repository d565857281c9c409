"""Runs inside the lab for test_load_balancing.py: two stock guests serve the web behind one address."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyvmm.host.balancer import status, store
from tests.lab.guest_vm import Vm

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
FOLDER = Path("/tmp/balancer")
VIP = "192.168.77.100"
SECONDS = 500.0
PATIENCE_S = 120.0


def pyvmm(*words: str) -> dict[str, Any]:
    """A pyvmm command: how it ended, and what it said."""
    done = subprocess.run([sys.executable, "-m", "pyvmm", *words], capture_output=True, text=True, check=False)
    return {"exit": done.returncode, "stderr": done.stderr}


def start(name: str, address: str, vmlinux: str, initrd: str) -> Vm:
    """A VM with a NIC on the switch."""
    folder = FOLDER / name
    folder.mkdir()
    words = f"console=ttyS0 quiet panic=-1 net.address={address}/24 net.name={name}"
    return Vm(
        folder,
        SECONDS,
        *("--name", name, "--kernel", vmlinux, "--initrd", initrd, "--cmdline", words, "--memory", "256M"),
        *("--nic", "switch=lan"),
    )


def get(path: str) -> bytes:
    """A file from one of the servers; raises OSError."""
    connection = http.client.HTTPConnection(VIP, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


def ask(count: int) -> dict[str, int]:
    """Who answers `count` requests; ``failed`` for those that nobody answers."""
    found: Counter[str] = Counter()
    for _ in range(count):
        try:
            found[get("/name").decode().strip()] += 1
        except OSError:
            found["failed"] += 1
    return dict(found)


def states() -> list[str]:
    """How the load balancer sees its VMs."""
    return [backend["state"] for backend in status.of(store.load("web"))["backends"]]


def busy() -> list[int]:
    """How many connections each VM has."""
    return [backend["connections"] for backend in status.of(store.load("web"))["backends"]]


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether `condition` holds before patience ends."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def drain_during_a_transfer() -> dict[str, Any]:
    """Begin to read a large file, drain the VM that it comes from, and read on."""
    connection = http.client.HTTPConnection(VIP, timeout=60)
    connection.request("GET", "/large")
    response = connection.getresponse()
    first = response.read(65536)
    eventually(lambda: sum(busy()) == 1)  # the requests before have ended there too
    source = ("web1", "web2")[busy().index(1)]
    found: dict[str, Any] = {"source": source, "drain": pyvmm("lb", "drain", "web", f"{source}:80")["exit"]}
    found["drained"] = eventually(lambda: "draining" in states())
    found["others"] = ask(20)
    found["sum"] = hashlib.sha256(first + response.read()).hexdigest()
    connection.close()
    found["undrain"] = pyvmm("lb", "undrain", "web", f"{source}:80")["exit"]
    found["back"] = eventually(lambda: states() == ["up", "up"])
    return found


def run(vmlinux: str, initrd: str) -> dict[str, Any]:
    """Go through the steps."""
    found: dict[str, Any] = {
        "switch": pyvmm("switch", "create", "lan", "--type", "internal", "--address", "192.168.77.1/24")
    }
    vms = {name: start(name, f"192.168.77.{host}", vmlinux, initrd) for name, host in (("web1", 11), ("web2", 12))}
    ready = [vm.until("ready") for vm in vms.values()]
    found["ready"] = all(ready)
    if found["ready"]:
        backends = ("--backend", "web1:80,weight=3", "--backend", "web2:80")
        found["create"] = pyvmm("lb", "create", "web", "--vip", f"{VIP}:80", *backends, "--check", "http:/name")
        found["up"] = eventually(lambda: states() == ["up", "up"])
        found["weighted"] = ask(40)
        found["drain"] = drain_during_a_transfer()
        vms["web2"].process.kill()
        found["noticed"] = eventually(lambda: states()[1] in ("down", "away"))
        found["after"] = ask(40)
        found["shown"] = status.of(store.load("web"))
        found["delete"] = pyvmm("lb", "delete", "web")
    for vm in vms.values():
        vm.process.terminate()
    found["vms"] = {name: vm.end() for name, vm in vms.items()}
    found["end"] = pyvmm("switch", "delete", "lan")
    found["left"] = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=False).stdout
    return found


def main() -> None:
    FOLDER.mkdir()
    os.environ.update(PYVMM_STATE_DIR=str(FOLDER / "state"), PYVMM_RUNTIME_DIR=str(FOLDER / "run"))
    (RESULTS / "balancer.json").write_text(json.dumps(run(*sys.argv[1:])))


if __name__ == "__main__":
    main()
