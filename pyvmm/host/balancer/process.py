"""The process of one load balancer, which HAProxy lives and dies with; how it is started, told and ended."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from devices.network import places
from devices.network.errors import SwitchError
from pyvmm.host.balancer import store
from pyvmm.host.balancer.definition import BalancerError
from pyvmm.host.balancer.follower import Follower

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.host.balancer.definition import Balancer

#: What a started process says once it listens.
LISTENS = "ok"
#: How often the VMs are looked at, in seconds.
LOOK_S = 1.0
_LOCK, _VIP, _ANSWER = "lock", "vip", "answer"
_START_S = 20.0
_STOP_S = 15.0


def locate() -> dict[str, str]:
    """The address of each VM that is plugged into a switch and has been heard there, IPv4 before IPv6.

    Where the host has addresses on the switch, those of its networks come before others.
    """
    from devices.network import client, definition, protocol

    found: dict[str, str] = {}
    for switch in definition.names():
        try:
            shown = client.ask(switch, protocol.Show())
        except SwitchError:  # nobody is plugged in where no service runs
            continue
        networks = [ipaddress.ip_interface(address).network for address in shown["addresses"]]
        for port in shown["ports"]:
            addresses = [ipaddress.ip_address(address) for address in port["addresses"]]
            usable = [address for address in addresses if not address.is_link_local]
            if port["link"] and usable:
                near = [address for address in usable if any(address in network for network in networks)]
                found.setdefault(port["vm"], str(min(near or usable, key=lambda address: address.version)))
    return found


def serve(name: str, listening: Callable[[], None]) -> None:
    """Run load balancer `name` until SIGTERM or SIGINT; call `listening` once clients can connect.

    SIGHUP has it look at its definition and its VMs at once. Raises BalancerError.
    """
    from pyvmm.host.balancer import vip

    signals = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with _locked(name):
        folder = store.folder(name)
        _remove_vip(folder)  # of an earlier life that was killed
        balancer = store.load(name)
        interface = vip.add(balancer.vip)
        if interface is not None:
            (folder / _VIP).write_text(f"{balancer.vip} {interface}")
        follower = Follower(folder, lambda: store.load(name), locate, _user(), _say)
        try:
            follower.step()
            follower.wait(_START_S)
            listening()
            while True:
                told = signal.sigtimedwait(signals, LOOK_S)
                if told is not None and told.si_signo != signal.SIGHUP:
                    break
                error = ""
                try:
                    follower.step()
                except BalancerError as refused:
                    error = str(refused)
                    _say(error)
                if told is not None:
                    _answer(folder, follower.balancer, error)
        finally:
            follower.stop()
            _remove_vip(folder)


def start(name: str) -> None:
    """Start load balancer `name` in a process of its own and return once it listens; raises BalancerError."""
    reader, writer = os.pipe()
    with open(reader, "rb") as told:
        try:
            with open(_log(name), "wb") as log:
                subprocess.Popen(
                    [sys.executable, "-m", "pyvmm.host.balancer", name, str(writer)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writer,),
                    start_new_session=True,
                ).wait()  # it leaves the work to a child, which nobody has to wait for
        finally:
            os.close(writer)
        said = told.read().decode(errors="replace")
    if said != LISTENS:
        raise BalancerError(said or f"load balancer {name} did not start: see {_log(name)}")


def pid_of(name: str) -> int | None:
    """The process of load balancer `name`, None if it doesn't run."""
    try:
        with open(store.folder(name) / _LOCK, "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


def apply(balancer: Balancer) -> None:
    """Have the process of a load balancer, if it runs, work by this definition; return once it does.

    Raises BalancerError if HAProxy refuses it.
    """
    answer = store.folder(balancer.name) / _ANSWER
    deadline = time.monotonic() + _START_S
    while (pid := pid_of(balancer.name)) is not None:
        answer.unlink(missing_ok=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)
        while not answer.exists() and pid_of(balancer.name) == pid and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            digest, _, error = answer.read_text().partition(" ")
        except FileNotFoundError:
            digest = error = ""
        if error:
            raise BalancerError(error)
        if digest == _digest(balancer):
            return
        if time.monotonic() > deadline:
            raise BalancerError(
                f"load balancer {balancer.name}: process {pid} does not answer: see {_log(balancer.name)}"
            )


def _digest(balancer: Balancer | None) -> str:
    return hashlib.sha256(msgspec.json.encode(balancer)).hexdigest()


def _answer(folder: Path, balancer: Balancer | None, error: str) -> None:
    part = folder / f"{_ANSWER}.new"
    part.write_text(f"{_digest(balancer)} {error}")
    part.rename(folder / _ANSWER)


def stop(name: str) -> bool:
    """End load balancer `name` with all its connections; return whether it ran. Raises BalancerError."""
    pid = pid_of(name)
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while pid_of(name) == pid:
        if time.monotonic() > deadline:
            raise BalancerError(f"load balancer {name}: process {pid} does not end")
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold the lock of load balancer `name`, which has our process's number."""
    with open(store.folder(name) / _LOCK, "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BalancerError(f"load balancer {name} runs already") from None
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def _log(name: str) -> Path:
    path = store.folder(name) / "log"
    places.make_folder(str(path))
    return path


def _remove_vip(folder: Path) -> None:
    from pyvmm.host.balancer import vip

    note = folder / _VIP
    if note.exists():
        address, _, interface = note.read_text().partition(" ")
        vip.remove(address, interface)
        note.unlink()


def _user() -> str | None:
    """Whom HAProxy shall run as: Debian's package makes a user for it."""
    if os.geteuid():
        return None
    import pwd

    try:
        return pwd.getpwnam("haproxy").pw_name
    except KeyError:
        return None


def _say(line: str) -> None:
    print(line, flush=True)
