"""Runs inside the lab for test_switch.py: four stock guests, each with a NIC on a switch of either data plane."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.lab.guest_vm import ShellVm, attempt

RESULTS = Path(os.environ.get("PYVMM_LAB_RESULTS", "."))
FOLDER = Path("/tmp/switches")
PLANES = ("kernel", "process")  # switches, and the guests' NICs on them, are called so
VLANS = {"a": "vlan=10", "b": "vlan=10", "c": "vlan=20", "d": "trunk=10,20"}
FOREIGN_MAC = "00:15:5d:ff:ff:ff"
NAT_GUEST, NAT_MAC = "b", "00:15:5d:0a:03:02"
SECONDS = 500
_CAPTURE_S = 60


def pyvmm(*arguments: str) -> dict[str, Any]:
    """A command of pyvmm with its JSON."""
    command = [sys.executable, "-m", "pyvmm", *arguments, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        reply = json.loads(done.stdout)
    except ValueError:
        reply = None
    return {"exit": done.returncode, "reply": reply, "stderr": done.stderr}


def mac(plane: str, guest: str) -> str:
    """The address of a guest's NIC on the switch of that plane."""
    return f"00:15:5d:0a:0{PLANES.index(plane) + 1}:0{ord(guest) - ord('a') + 1}"


def address(plane: str, guest: str, vlan: int = 10) -> str:
    """A guest's address there; each VLAN has a network of its own, and guest c has one in that of VLAN 10 too."""
    return f"10.{vlan}.{PLANES.index(plane) + 1}.{ord(guest) - ord('a') + 1}"


class Switch:
    """The switch of one plane under the four guests, which are told what to do there."""

    def __init__(self, plane: str, guests: dict[str, ShellVm]) -> None:
        self.plane, self.guests = plane, guests

    def port(self, guest: str, *options: str) -> dict[str, Any]:
        """Show or set a guest's port."""
        return pyvmm("switch", "port", self.plane, guest, *options)

    def pings(self, sender: str, target: str, interface: str = "", wait: int = 3) -> int:
        """How many of three pings were answered."""
        command = f"/bin/ping -c3 -i0.2 -W{wait} -I {interface or self.plane} {target} | grep -c 'bytes from'"
        return int(self.guests[sender].says(command) or -1)

    def capture(self, guest: str, interface: str = "") -> None:
        """Begin to write what a guest sees on its NIC."""
        self.guests[guest].run(
            f"timeout {_CAPTURE_S} tcpdump -Z root -i {interface or self.plane} -U -w /tmp/seen >/tmp/tcpdump 2>&1 & "
            "wait_for 'grep -q listening /tmp/tcpdump'"
        )

    def captured(self, guest: str, words: str) -> list[str]:
        """End that; the frames that `words`, tcpdump's filter, fit."""
        self.guests[guest].run("killall tcpdump; wait_for '! pidof tcpdump'")
        return self.guests[guest].says(f"tcpdump -Z root -r /tmp/seen -n -e '{words}' 2>/dev/null").splitlines()

    def set_up(self) -> None:
        """Names and addresses."""
        for guest, vm in self.guests.items():
            vm.run(f"name {mac(self.plane, guest)} {self.plane}")
            if guest == "d":
                for vlan in (10, 20):
                    link = f"{self.plane}.{vlan}"
                    vm.run(f"ip link add link {self.plane} name {link} type vlan id {vlan} && ip link set {link} up")
                    vm.run(f"ip address add {address(self.plane, guest, vlan)}/24 dev {link}")
            else:
                for vlan in (10, 20):
                    vm.run(f"ip address add {address(self.plane, guest, vlan)}/24 dev {self.plane}")

    def vlans(self) -> dict[str, Any]:
        """Who reaches whom, and what guest c of VLAN 20 sees of those in VLAN 10."""
        plane = self.plane
        mirrors = {guest: f"/tmp/switches/{plane}-{guest}.pcap" for guest in "cd"}
        found: dict[str, Any] = {
            "mirror": {guest: self.port(guest, "--mirror", path) for guest, path in mirrors.items()}
        }
        self.capture("c")
        found["pings"] = {
            "a to b": self.pings("a", address(plane, "b")),
            "b to a": self.pings("b", address(plane, "a")),
            "a to d": self.pings("a", address(plane, "d")),
            "d to a": self.pings("d", address(plane, "a"), f"{plane}.10"),
            "c to d": self.pings("c", address(plane, "d", 20)),
            "d to c": self.pings("d", address(plane, "c", 20), f"{plane}.20"),
            "a to c": self.pings("a", address(plane, "c"), wait=1),
            "c to a": self.pings("c", address(plane, "a", 20), wait=1),
            "d to c, VLAN 10": self.pings("d", address(plane, "c"), f"{plane}.10", wait=1),
        }
        # Broadcasts, multicasts, and addresses that the switch does not know: all that goes to every port.
        for command in (
            f"arping -c 3 -w 3 -b -I {plane} {address(plane, 'c')}",
            f"/bin/ping -c 2 -W 1 -I {plane} 224.0.0.1",
            f"ip neighbour replace 10.10.9.9 lladdr 00:15:5d:0a:09:09 dev {plane} nud permanent;"
            f"ip route add 10.10.9.9 dev {plane}; /bin/ping -c 2 -W 1 10.10.9.9",
            # A tag of its own does not get it into the other VLAN.
            f"ip link add link {plane} name forged type vlan id 20; ip link set forged up; "
            f"arping -c 3 -w 3 -b -I forged {address(plane, 'c')}; ip link delete forged",
        ):
            self.guests["a"].run(command)
        found["seen by c"] = {
            "of a": self.captured("c", f"ether src {mac(plane, 'a')}"),
            "of d": len(self.captured("c", f"ether src {mac(plane, 'd')}")),
        }
        for guest, path in mirrors.items():
            self.port(guest, "--mirror", "none")
            said = subprocess.run(["tcpdump", "-r", path, "-n", "-e"], capture_output=True, text=True, check=False)
            found[f"mirror of {guest}"] = {
                "lines": len(said.stdout.splitlines()),
                **{f"of {other}": said.stdout.count(f" {mac(plane, other)} > ") for other in VLANS},
                "VLAN 10": said.stdout.count("vlan 10,"),
                "VLAN 20": said.stdout.count("vlan 20,"),
                "first": said.stdout.splitlines()[:3],
            }
        return found

    def spoofing(self) -> dict[str, Any]:
        """Frames from an address that is not the NIC's own: dropped, until the port allows it."""
        self.guests["a"].run(
            f"ip link add link {self.plane} name foreign address {FOREIGN_MAC} type macvlan; ip link set foreign up; "
            "ip address add 10.30.0.1/24 dev foreign"
        )
        found = {}
        for allowed in ("off", "on"):
            set_port = self.port("a", "--mac-spoofing", allowed)
            self.capture("b")
            self.guests["a"].run("arping -c 3 -w 3 -b -I foreign 10.30.0.9")
            seen = self.captured("b", f"ether src {FOREIGN_MAC}")
            found[allowed] = {"set": set_port["exit"], "seen": len(seen), "port": self.port("a")["reply"]}
        self.guests["a"].run("ip link delete foreign")
        self.port("a", "--mac-spoofing", "off")
        return found

    def dhcp(self) -> dict[str, Any]:
        """A server in guest b, behind the guard and not."""
        b, plane = self.guests["b"], self.plane
        network = address(plane, "x").rsplit(".", 1)[0]
        b.run(
            f"printf 'start {network}.100\\nend {network}.110\\ninterface {plane}\\nlease_file /tmp/l\\n' >/tmp/udhcpd"
        )
        b.run("touch /tmp/l; udhcpd /tmp/udhcpd")
        found = {}
        for guard in ("on", "off"):
            set_port = self.port("b", "--dhcp-guard", guard)
            lease = self.guests["a"].says(f"udhcpc -i {plane} -n -q -t 2 -T 1 -s /bin/true 2>&1 | grep -c obtained")
            found[guard] = {"set": set_port["exit"], "leases": lease, "dropped": self.dropped("b")}
        b.run("killall udhcpd")
        return found

    def dropped(self, guest: str) -> dict[str, int]:
        """Why and how often the guest's frames were dropped at its port."""
        reply = self.port(guest)["reply"] or {}
        counts: dict[str, int] = reply.get("statistics", {}).get("dropped", {})
        return counts

    def together(self) -> dict[str, Any]:
        """All four in no VLAN: each reaches each, and two pairs transfer at once."""
        plane, guests = self.plane, self.guests
        found: dict[str, Any] = {"set": [self.port(guest, "--untagged")["exit"] for guest in guests]}
        guests["d"].run(f"ip address add {address(plane, 'd')}/24 dev {plane}; ip link set {plane}.10 down")
        found["pings"] = {
            f"{one} to {other}": self.pings(one, address(plane, other))
            for one in guests
            for other in guests
            if one != other
        }
        for server in "bd":
            guests[server].run(f"iperf3 --server --daemon --one-off --bind {address(plane, server)}")
        numbers = {
            client: guests[client].send(f"iperf3 --client {address(plane, server)} --time 3 --json")
            for client, server in (("a", "b"), ("c", "d"))
        }
        found["transfers"] = {}
        for client, number in numbers.items():
            status, said = guests[client].wait(number)
            told: dict[str, Any] = json.loads(said) if said.startswith("{") else {"error": said}
            arrived = told.get("end", {}).get("sum_received", {}).get("bytes", 0)
            found["transfers"][client] = {"exit": status, "bytes": arrived, "error": told.get("error")}
        found["show"] = pyvmm("switch", "show", plane)
        return found


_FETCH = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


def fetched(url: str, *prefix: str) -> str:
    """What a web server sends, or the last error of several attempts."""
    for _ in range(5):
        command = [*prefix, sys.executable, "-c", _FETCH, url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
        time.sleep(1)
    return done.stderr


def nat(vm: ShellVm) -> dict[str, Any]:
    """A NAT switch for a NIC that comes while the guest runs: its address, its way out, and the way in."""
    run = functools.partial(subprocess.run, shell=True, check=True)
    # Another host, which knows no way to the guest's network.
    run("ip netns add world; ip link add world type veth peer name host netns world")
    run("ip address add 203.0.113.1/24 dev world; ip link set world up")
    run("ip -n world address add 203.0.113.2/24 dev host; ip -n world link set host up")
    forward = f"tcp:8080:{NAT_GUEST}:80"
    found: dict[str, Any] = {
        "create": pyvmm("switch", "create", "nat", "--type", "nat", "--address", "10.40.0.1/24", "--forward", forward),
        "add": vm.ctl("nic", "add", f"switch=nat,mac={NAT_MAC}"),
        "named": vm.run(f"name {NAT_MAC} nat"),
        "lease": vm.says("lease nat | tail -1"),
        "ping": vm.says("/bin/ping -c3 -i0.2 -W3 10.40.0.1 | grep -c 'bytes from'"),
        "ping world": vm.says("/bin/ping -c3 -i0.2 -W3 203.0.113.2 | grep -c 'bytes from'"),
        "resolver": vm.says("cat /etc/resolv.conf"),
    }
    vm.run("mkdir /tmp/www; echo 'from the guest' >/tmp/www/index.html; httpd -p 80 -h /tmp/www")
    found["fetched inside"] = fetched(f"http://{found['lease']}/")
    found["fetched"] = fetched("http://203.0.113.1:8080/", "ip", "netns", "exec", "world")
    found["show"] = pyvmm("switch", "show", "nat")
    found["remove"] = vm.ctl("nic", "remove", str(len(PLANES)))
    found["delete"] = pyvmm("switch", "delete", "nat")
    run("ip netns delete world")
    return found


def start(vmlinux: str, initrd: str) -> dict[str, ShellVm]:
    """Four guests, side by side."""
    guests = {}
    for guest, vlan in VLANS.items():
        folder = FOLDER / guest
        folder.mkdir(parents=True)
        (folder / "vm.toml").write_text(f'name = "{guest}"\n')
        nics = [f"switch={plane},mac={mac(plane, guest)},{vlan}" for plane in PLANES]
        guests[guest] = ShellVm(
            folder,
            SECONDS,
            str(folder / "vm.toml"),
            *("--kernel", vmlinux, "--initrd", initrd, "--cmdline", "console=ttyS0 quiet panic=-1"),
            *("--memory", "256M", "--nic", nics[0], "--nic", nics[1]),
        )
    for vm in guests.values():
        vm.until("ready", "shell")
    return guests


def leftovers() -> dict[str, str]:
    """What the host still has of switches."""
    look = {"links": "ip -brief link", "rules": "nft list ruleset", "filters": "tc qdisc show"}
    look["processes"] = "ps -eo args | grep -c '[d]evices.network'"
    return {
        what: subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
        for what, command in look.items()
    }


def main() -> None:
    FOLDER.mkdir()
    before = leftovers()
    report: dict[str, Any] = {"before": before}
    report["create"] = [pyvmm("switch", "create", plane, "--plane", plane) for plane in PLANES]
    guests = start(*sys.argv[1:])
    for plane in PLANES:
        switch = Switch(plane, guests)
        switch.set_up()
        steps = {"vlans": switch.vlans, "spoofing": switch.spoofing, "dhcp": switch.dhcp, "together": switch.together}
        report[plane] = {name: attempt(f"{plane} {name}", step) for name, step in steps.items()}
    report["nat"] = attempt("nat", lambda: nat(guests[NAT_GUEST]))
    guests["a"].process.kill()
    guests["a"].process.wait()
    for guest in "bcd":
        guests[guest].ctl("shutdown")
    report["guests"] = {guest: vm.end() for guest, vm in guests.items()}
    report["shown"] = [pyvmm("switch", "show", plane) for plane in PLANES]
    report["delete"] = [pyvmm("switch", "delete", plane) for plane in PLANES]
    report["after"] = leftovers()
    (RESULTS / "switch.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
