"""``pyvmm run``: start a VM in the foreground."""

from __future__ import annotations

# The module `signal` wraps this one in enums, which take longer to import than a VM to make.
import _signal  # type: ignore[import-not-found]
import gc
import os
import sys
from types import SimpleNamespace

from pyvmm.cli import EXIT_FAILED, EXIT_INTERRUPTED, CliError
from pyvmm.core.trace import CATEGORIES, GuestLog, Tracer
from pyvmm.machine.config import DESCRIPTIONS, ConfigError, VmConfig, check_files, parse_disk, parse_size, validate
from pyvmm.machine.console import open_console

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, TextIO

    from pyvmm.cli.parser import Parser
    from pyvmm.machine.console import Console
    from pyvmm.machine.control import ControlServer
    from pyvmm.machine.machine import Machine, Outcome

_EPILOG = (
    "exit status: 0 the guest powered off, 1 pyvmm failed, 2 usage, 3 the guest reset under --no-reboot, 4 the guest "
    "crashed, 5 the host lacks something, 124 timeout, 130 quit by Ctrl-C or at the console, 129 and 143 stopped by "
    "SIGHUP and SIGTERM; with --testdev the status that the guest chose"
)


class Option:
    """One option: either `read` makes its value from the text that follows it, or it is a switch that sets `value`.

    `field` is a field of VmConfig, or of the command itself. A `repeated` option collects a list.
    """

    __slots__ = ("field", "flag", "help", "metavar", "read", "repeated", "value")

    def __init__(
        self,
        flag: str,
        metavar: str | None = None,
        read: Callable[[str], object] = str,
        *,
        field: str | None = None,
        value: bool = True,
        repeated: bool = False,
        help: str | None = None,
    ) -> None:
        self.flag = flag
        self.field = field or flag[2:].replace("-", "_")
        self.metavar = metavar
        self.read = read
        self.value = value
        self.repeated = repeated
        self.help = help or DESCRIPTIONS[self.field]


OPTIONS = (
    Option("--kernel", "FILE"),
    Option("--initrd", "FILE"),
    Option("--cmdline", "TEXT"),
    Option("--firmware", "FILE"),
    Option("--cpus", "N", int),
    Option("--memory", "SIZE", parse_size),
    Option("--huge-pages"),
    Option(
        "--disk",
        "PATH[,readonly][,controller=N]",
        parse_disk,
        field="disks",
        repeated=True,
        help="add a raw disk image; may be given again",
    ),
    Option("--enlightenments", "SPEC"),
    Option("--com1", "stdio|file:P|unix:P|none"),
    Option("--control", "SOCKET"),
    Option("--timeout", "S", float),
    Option("--no-reboot", field="reboot", value=False, help="end with status 3 when the guest resets"),
    Option("--testdev"),
    Option("--trace", "LIST", help=f"write events to stderr: {','.join(CATEGORIES)} or all"),
    Option("--report", "FILE", help="write what 'ctl inspect' shows to FILE at the end, as JSON"),
)


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``run`` command. An option that is not given leaves no trace in the namespace."""
    import argparse

    parser = subparsers.add_parser(
        "run",
        help="start a VM in the foreground",
        description="Start a VM in the foreground, from options, or from a VM file that options override.",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("vm", nargs="?", metavar="VM.toml", default=None, help="VM file; see 'pyvmm config'")
    for option in OPTIONS:
        settings: dict[str, Any] = {"dest": option.field, "help": option.help}
        if option.metavar is None:
            settings["action"] = "store_true" if option.value else "store_false"
        else:
            settings.update(metavar=option.metavar, type=option.read, action="append" if option.repeated else "store")
        parser.add_argument(option.flag, **settings)
    parser.set_defaults(run=run)


def read_plain(words: list[str]) -> SimpleNamespace | None:
    """What argparse makes of these words, 8 ms sooner; None where it is to judge for itself: help, errors, rarities."""
    options = {option.flag: option for option in OPTIONS}
    values: dict[str, Any] = {"vm": None, "run": run}
    rest = iter(words)
    for word in rest:
        flag, equals, text = word.partition("=")
        option = options.get(flag)
        if option is None:
            if not word or word.startswith("-") or values["vm"] is not None:
                return None
            values["vm"] = word
        elif option.metavar is None:
            if equals:
                return None
            values[option.field] = option.value
        else:
            if not equals:
                text = next(rest, "-")
                if text.startswith("-"):
                    return None
            try:
                value = option.read(text)
            except (ConfigError, ValueError):
                return None
            if option.repeated:
                values.setdefault(option.field, []).append(value)
            else:
                values[option.field] = value
    return SimpleNamespace(**values)


def run(args: argparse.Namespace | SimpleNamespace) -> int:
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


def resolve(args: argparse.Namespace | SimpleNamespace) -> VmConfig:
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
        from pyvmm.machine.machine import Machine, MachineError

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
        return outcome
    except MachineError as error:
        raise CliError(str(error), error.exit_code) from error
    finally:
        if control is not None:
            control.close()
        machine.close()
        for number, handler in handlers.items():
            _signal.signal(number, handler)


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

    return {number: _signal.signal(number, stop) for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)}


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
