"""``pyvmm run``: start a VM in the foreground."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys

from pyvmm.cli import EXIT_FAILED, EXIT_INTERRUPTED, CliError
from pyvmm.core.trace import CATEGORIES, GuestLog, Tracer
from pyvmm.machine.config import (
    DESCRIPTIONS,
    DISK_FORM,
    NIC_FORM,
    SMBIOS_IDENTITIES,
    VmConfig,
    check_files,
    parse_cdrom,
    parse_disk,
    parse_nic,
    parse_size,
    validate,
)
from pyvmm.machine.console import open_console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, TextIO

    from pyvmm.cli.parser import Parser
    from pyvmm.machine.console import Console
    from pyvmm.machine.control import ControlServer
    from pyvmm.machine.machine import Machine
    from pyvmm.machine.outcome import Outcome

_EPILOG = (
    "exit status: 0 the guest powered off, 1 pyvmm failed, 2 usage, 3 the guest reset under --no-reboot, 4 the guest "
    "crashed, 5 the host lacks something, 124 timeout, 130 quit by Ctrl-C or at the console, 129 and 143 stopped by "
    "SIGHUP and SIGTERM; with --testdev the status that the guest chose"
)


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``run`` command. An option that is not given leaves no trace in the namespace."""
    parser = subparsers.add_parser(
        "run",
        help="start a VM in the foreground",
        description="Start a VM in the foreground, from options, or from a VM file that options override.",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("vm", nargs="?", metavar="VM.toml", default=None, help="VM file; see 'pyvmm config'")
    add("--name", metavar="NAME", help=DESCRIPTIONS["name"])
    add("--kernel", metavar="FILE", help=DESCRIPTIONS["kernel"])
    add("--initrd", metavar="FILE", help=DESCRIPTIONS["initrd"])
    add("--cmdline", metavar="TEXT", help=DESCRIPTIONS["cmdline"])
    add("--firmware", metavar="FILE", help=DESCRIPTIONS["firmware"])
    add("--cpus", metavar="N", type=int, help=DESCRIPTIONS["cpus"])
    add("--memory", metavar="SIZE", type=parse_size, help=DESCRIPTIONS["memory"])
    add("--huge-pages", action="store_true", help=DESCRIPTIONS["huge_pages"])
    add(
        "--disk",
        metavar="PATH[,OPTION]...",
        dest="disks",
        action="append",
        type=parse_disk,
        help=f"add a disk image: {DISK_FORM}; may be given again",
    )
    add(
        "--cdrom",
        metavar="PATH",
        dest="disks",
        action="append",
        type=parse_cdrom,
        help="put an ISO image in an IDE CD drive, the first on the second channel",
    )
    add(
        "--nic",
        metavar="NETWORK[,OPTION]...",
        dest="nics",
        action="append",
        type=parse_nic,
        help=f"add a network adapter: {NIC_FORM}; may be given again",
    )
    add("--enlightenments", metavar="SPEC", help=DESCRIPTIONS["enlightenments"])
    add("--smbios", metavar="|".join(SMBIOS_IDENTITIES), help=DESCRIPTIONS["smbios"])
    add("--com1", metavar="stdio|file:P|unix:P|none", help=DESCRIPTIONS["com1"])
    add("--control", metavar="SOCKET", help=DESCRIPTIONS["control"])
    add("--timeout", metavar="S", type=float, help=DESCRIPTIONS["timeout"])
    add("--no-reboot", dest="reboot", action="store_false", help="end with status 3 when the guest resets")
    add("--testdev", action="store_true", help=DESCRIPTIONS["testdev"])
    add("--trace", metavar="LIST", help=f"write events to stderr: {','.join(CATEGORIES)} or all")
    add("--report", metavar="FILE", help="write what 'ctl inspect' shows to FILE at the end, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the VM to its end and return the exit status it gives."""
    given = vars(args)
    config = resolve(args)
    try:
        tracer = Tracer(name for name in given.get("trace", "").split(",") if name)
    except ValueError as error:
        raise CliError(f"--trace: {error}") from error
    report = _open_report(given["report"]) if "report" in given else None
    console = open_console(config.com1)
    try:
        outcome = _run_machine(config, tracer, console, report)
    finally:
        console.close()
        if report is not None:
            report.close()
    if outcome.message:
        print("pyvmm:", outcome.message, file=sys.stderr)
    return outcome.exit_code


def resolve(args: argparse.Namespace) -> VmConfig:
    """The VM that the file and options ask for; raises ConfigError unless it can be built."""
    if args.vm is None:
        config = VmConfig()
    else:
        from pyvmm.machine.config_file import load

        config = load(args.vm)
    given = vars(args)
    for name in VmConfig.__annotations__:
        if name in given:
            setattr(config, name, given[name])
    validate(config)
    check_files(config)
    return config


def _run_machine(config: VmConfig, tracer: Tracer, console: Console, report: TextIO | None) -> Outcome:
    gc.disable()  # all that is made up to the guest's first instruction stays
    try:
        from pyvmm.machine.machine import Machine
        from pyvmm.machine.outcome import MachineError

        machine = Machine(config, tracer=tracer, log=GuestLog(), console=console)
    except MachineError as error:
        raise CliError(str(error), error.exit_code) from error
    finally:
        gc.freeze()
        gc.enable()
    control: ControlServer | None = None
    handlers: dict[int, Any] = {}
    try:
        if config.control is not None:
            control = _serve(config.control, machine, config.name)
        console.on_quit = lambda: machine.stop(EXIT_INTERRUPTED, "quit at the console")
        handlers = _stop_on_signals(machine, console)
        outcome = machine.run()
        if report is not None:
            _write_report(report, machine.inspect())
    except MachineError as error:
        raise CliError(str(error), error.exit_code) from error
    finally:
        if control is not None:
            control.close()
        try:
            machine.close()
        except MachineError as error:
            raise CliError(str(error), error.exit_code) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return outcome


def _serve(path: str, machine: Machine, name: str) -> ControlServer:
    from pyvmm.machine.control import Commands, ControlServer

    control = ControlServer(path, Commands(machine, name))
    control.start()
    return control


def _stop_on_signals(machine: Machine, console: Console) -> dict[int, Any]:
    """Have the first signal stop the VM and the second one end the process; return the handlers of before."""
    stopping = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            console.close()
            os._exit(128 + number)
        stopping = True
        import signal
        import threading

        # Not here: this thread may hold the very locks that stopping takes.
        message = f"stopped by {signal.Signals(number).name}"
        threading.Thread(target=machine.stop, args=(128 + number, message), name="stop").start()

    return {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def _open_report(path: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CliError(f"report {path}: {why}") from error


def _write_report(report: TextIO, tree: dict[str, Any]) -> None:
    import json

    try:
        json.dump(tree, report, indent=2)
        report.write("\n")
        report.flush()
    except OSError as error:
        raise CliError(f"report {report.name}: {error.strerror}", EXIT_FAILED) from error
