"""Runs inside the lab for test_network.py: one stock guest with NICs of both kinds, and what its host does to them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lab.guest_vm import ShellVm, attempt

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
FOLDER = Path("/tmp/network")
MAC, LEGACY_MAC, ADDED_MAC = "00:15:5d:01:02:03", "00:15:5d:01:02:04", "00:15:5d:01:02:05"
HOST, HOST_V6 = "10.9.0.1", "fd09::1"
LEGACY_HOST = "10.9.1.1"
ADDED_HOST = "10.9.2.1"
VPS = 4
PATIENCE_S = 120.0
_PORT = 5000


def run(*command: str) -> str:
    """What a command of the host says; it has to succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tap(name: str, *addresses: str, mtu: int = 1500) -> None:
    """A TAP with addresses of the host."""
    run("ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr")
    run("ip", "link", "set", name, "mtu", str(mtu), "up")
    for address in addresses:
        run("ip", "address", "add", address, "dev", name, *(("nodad",) if ":" in address else ()))


def pings(address: str, *options: str) -> int:
    """How many of three pings to the guest were answered."""
    said = subprocess.run(["ping", "-c3", "-i0.2", "-W3", *options, address], capture_output=True, text=True).stdout
    return said.count("bytes from")


def settled(vm: ShellVm, command: str, expected: str) -> str:
    """What the guest says to a command, asked until it is as expected or patience ends."""
    deadline = time.monotonic() + PATIENCE_S
    while (said := vm.says(command)) != expected and time.monotonic() < deadline and vm.process.poll() is None:
        time.sleep(0.5)
    return said


def answers(vm: ShellVm, address: str, *options: str) -> int:
    """How many of the guest's three pings to the host were answered."""
    said = vm.says(f"/bin/ping -c3 -i0.2 -W3 {' '.join(options)} {address} | grep -c 'bytes from'")
    return int(said) if said.isdigit() else -1


def iperf(address: str, *options: str) -> dict[str, Any]:
    """A transfer with the server in the guest: bytes that arrived, bits a second, or the error."""
    command = ["iperf3", "--client", address, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    told = json.loads(done.stdout or "{}")
    received = told.get("end", {}).get("sum_received", {})
    return {"error": told.get("error"), "bytes": received.get("bytes", 0), "rate": received.get("bits_per_second", 0)}


def transfers(vm: ShellVm, guest: str, data: Path) -> dict[str, Any]:
    """The file to the guest and back by TCP, in one stream each."""
    found: dict[str, Any] = {}
    patience = PATIENCE_S + (data.stat().st_size >> 20)
    number = vm.send(f"timeout {patience:.0f} nc -l -p {_PORT} >/tmp/data")
    start = time.monotonic()
    with connected(guest, patience) as stream, data.open("rb") as file:
        stream.sendfile(file)
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)
    found["there_seconds"], found["there"] = time.monotonic() - start, vm.wait(number)
    found["guest_sum"] = vm.says("sha256sum /tmp/data").split(" ")[0]
    with socket.create_server((HOST, _PORT)) as server, (RESULTS / "returned").open("wb") as file:
        server.settimeout(patience)
        start = time.monotonic()
        number = vm.send(f"nc {HOST} {_PORT} </tmp/data")
        with server.accept()[0] as stream, stream.makefile("rb") as reader:
            shutil.copyfileobj(reader, file, 1 << 20)
    found["back_seconds"], found["back"] = time.monotonic() - start, vm.wait(number)
    vm.run("rm /tmp/data")
    return found


def connected(guest: str, patience: float) -> socket.socket:
    """A connection to the port on which the guest is about to listen."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection((guest, _PORT), timeout=patience)
        except ConnectionRefusedError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def addresses(vm: ShellVm) -> dict[str, Any]:
    """What the guest gets from a DHCP server and router advertisements, and whether pings pass both ways."""
    found: dict[str, Any] = {"named": vm.run(f"name {MAC} lan")}
    found["driver"] = vm.says("basename $(readlink /sys/class/net/lan/device/driver)")
    found["state"] = settled(vm, "cat /sys/class/net/lan/operstate", "up")
    found["lease"] = vm.says("lease lan | tail -1")
    found["ping_out"] = answers(vm, HOST)
    found["ping_in"] = pings(found["lease"])
    slaac = "ip -6 address show dev lan scope global | grep -o 'fd09:[^/]*'"
    settled(vm, f"{slaac} | wc -l", "1")
    found["slaac"] = vm.says(slaac)
    found["ping6_out"] = answers(vm, HOST_V6, "-6")
    found["ping6_in"] = pings(found["slaac"], "-6")
    return found


def queues(vm: ShellVm, guest: str) -> dict[str, Any]:
    """Offloads, channels, and how many packets each took of eight streams each way."""
    found: dict[str, Any] = {"features": vm.says("ethtool -k lan"), "channels": vm.says("ethtool -l lan")}
    found["link"] = vm.says("ethtool lan; ethtool -i lan; ethtool -x lan")
    vm.run("iperf3 --server --daemon")
    found["before"] = vm.says("ethtool -S lan")
    found["in"] = iperf(guest, "--parallel", "8", "--time", "3")
    found["out"] = iperf(guest, "--parallel", "8", "--time", "3", "--reverse")
    found["after"] = vm.says("ethtool -S lan")
    return found


def jumbo(vm: ShellVm, guest: str) -> dict[str, Any]:
    """Frames of 9000 bytes, both ways."""
    found: dict[str, Any] = {"set": vm.run("ip link set lan mtu 9000")}
    settled(vm, "cat /sys/class/net/lan/operstate", "up")
    vm.run(f"ip address replace {guest}/24 dev lan")
    found["out"] = answers(vm, HOST, "-M", "do", "-s", "8900")
    found["in"] = pings(guest, "-M", "do", "-s", "8900")
    found["tcp"] = iperf(guest, "--time", "1")
    return found


def flap(vm: ShellVm, guest: str) -> dict[str, Any]:
    """The cable out and in."""
    found: dict[str, Any] = {"down": vm.ctl("nic", "set", "0", "link=down")}
    found["down_seen"] = settled(vm, "cat /sys/class/net/lan/carrier", "0")
    found["down_pings"] = pings(guest, "-W1")
    found["up"] = vm.ctl("nic", "set", "0", "link=up")
    found["up_seen"] = settled(vm, "cat /sys/class/net/lan/carrier", "1")
    settled(vm, f"/bin/ping -c1 -W1 {HOST} | grep -c 'bytes from'", "1")
    found["up_pings"] = pings(guest)
    return found


def hot(vm: ShellVm, guest: str) -> dict[str, Any]:
    """NICs come and go while another is under load, the last one under load itself."""
    tap("added", f"{ADDED_HOST}/24")
    found: dict[str, Any] = {"rounds": []}
    load = subprocess.Popen(
        ["iperf3", "--client", guest, "--time", "300", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for last in (False, True):
        step: dict[str, Any] = {"add": vm.ctl("nic", "add", f"tap=added,mac={ADDED_MAC}")}
        step["named"] = vm.run(f"name {ADDED_MAC} added && ip address add 10.9.2.2/24 dev added")
        step["pings"] = pings("10.9.2.2")
        if last:
            step["own_load"] = vm.run(f"iperf3 --client {ADDED_HOST} --time 100 >/tmp/load 2>&1 & sleep 1")
        step["remove"] = vm.ctl("nic", "remove", "2")
        step["gone"] = settled(vm, f"nic {ADDED_MAC}", "")
        found["rounds"].append(step)
    found["load_alive"] = load.poll() is None
    load.send_signal(2)
    found["load"] = json.loads(load.communicate()[0] or "{}").get("end", {}).get("sum_sent", {}).get("bytes", 0)
    return found


def legacy(vm: ShellVm) -> dict[str, Any]:
    """The other kind of NIC in the same guest."""
    found: dict[str, Any] = {"named": vm.run(f"name {LEGACY_MAC} old && ip address add 10.9.1.2/24 dev old")}
    found["driver"] = vm.says("basename $(readlink /sys/class/net/old/device/driver)")
    settled(vm, f"/bin/ping -c1 -W1 {LEGACY_HOST} | grep -c 'bytes from'", "1")
    found["out"] = answers(vm, LEGACY_HOST)
    found["in"] = pings("10.9.1.2")
    found["tcp"] = iperf("10.9.1.2", "--time", "2")
    found["tcp_back"] = iperf("10.9.1.2", "--time", "2", "--reverse")
    return found


def life(vmlinux: str, initrd: str, data: str) -> dict[str, Any]:
    """One guest from its boot to its shutdown."""
    tap("lan", f"{HOST}/24", f"{HOST_V6}/64", mtu=9000)
    tap("old", f"{LEGACY_HOST}/24")
    serve = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=lan", "--enable-ra"]
    serve += ["--bind-interfaces", "--dhcp-range=10.9.0.100,10.9.0.200", "--dhcp-range=fd09::,ra-only"]
    server = subprocess.Popen([*serve, "--dhcp-leasefile=/tmp/network/leases"])
    megabytes = Path(data).stat().st_size >> 20  # the guest keeps them in a tmpfs, which takes half its memory
    vm = ShellVm(
        FOLDER,
        500 + megabytes,
        *("--kernel", vmlinux, "--initrd", initrd, "--cmdline", "console=ttyS0 quiet panic=-1"),
        *("--cpus", str(VPS), "--memory", f"{384 + 2 * megabytes}M"),
        *("--nic", f"tap=lan,mac={MAC}", "--nic", f"tap=old,type=legacy,mac={LEGACY_MAC}"),
    )
    found: dict[str, Any] = {}
    try:
        if vm.until("ready", "shell"):
            found["addresses"] = addresses(vm)
            guest = found["addresses"]["lease"]
            steps: dict[str, Callable[[], dict[str, Any]]] = {
                "queues": lambda: queues(vm, guest),
                "transfers": lambda: transfers(vm, guest, Path(data)),
                "legacy": lambda: legacy(vm),
                "flap": lambda: flap(vm, guest),
                "hot": lambda: hot(vm, guest),
                "jumbo": lambda: jumbo(vm, guest),
            }
            for name, step in steps.items():
                found[name] = attempt(name, step)
            found["taint"] = vm.says("cat /proc/sys/kernel/tainted")
            found["messages"] = vm.says("/bin/dmesg --level warn,err,crit,alert,emerg")
            found["inspect"] = vm.ctl("inspect")
            found["shutdown"] = vm.ctl("shutdown")
    finally:
        server.terminate()
    return {**found, **vm.end()}


def main() -> None:
    FOLDER.mkdir()
    (RESULTS / "network.json").write_text(json.dumps(life(*sys.argv[1:])))


if __name__ == "__main__":
    main()
