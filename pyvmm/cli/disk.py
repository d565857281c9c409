"""``pyvmm disk``: make, look at, check, convert, merge and compare disk images."""

from __future__ import annotations

import argparse
import signal

from pyvmm.cli import CliError
from pyvmm.cli.parser import Parser
from pyvmm.machine.config import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

EXIT_IO = 4

_FORMATS = ("raw", "vhd", "vhdx", "iso")
_KINDS = ("dynamic", "fixed", "differencing")
_EPILOG = (
    "exit status: 0 done, or nothing found wrong, or no difference; 1 check: errors remain, diff: there are "
    "differences; 2 usage, or an image is missing, damaged or in use; 3 check: all that was wrong is repaired; "
    "4 reading or writing failed; 129, 130 and 143 stopped by SIGHUP, SIGINT and SIGTERM"
)


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``disk`` command."""
    parser = subparsers.add_parser(
        "disk",
        help="make, check, convert, merge and compare disk images",
        description="Make, look at, check, convert, merge and compare disk images. A format goes by the suffix: "
        ".img and .raw, .vhd, .vhdx, .iso; others are raw.",
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True, prog="pyvmm disk", parser_class=_ActionParser
    )

    def action(name: str, text: str) -> Parser:
        added = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EPILOG)
        added.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")
        return added

    create = action("create", "make an image that reads as zeros, or as its parent does")
    create.add_argument("path", metavar="PATH")
    create.add_argument("size", metavar="SIZE", nargs="?", type=parse_size, help="such as 8G; with --parent its size")
    _add_shape(create)
    create.add_argument("--parent", metavar="PATH", help="the image that a differencing image differs from")

    info = action("info", "show what an image is, and all its parents")
    info.add_argument("path", metavar="PATH")

    check = action("check", "look for damage in an image")
    check.add_argument("path", metavar="PATH")
    check.add_argument("--repair", action="store_true", help="put right what can be put right without loss")

    resize = action("resize", "change the size of a disk; what is added reads as zeros")
    resize.add_argument("path", metavar="PATH")
    resize.add_argument("size", metavar="SIZE|+SIZE|-SIZE", type=_size_change, help="such as 16G or +512M")
    resize.add_argument("--shrink", action="store_true", help="allow a smaller size: what lies beyond it is lost")

    convert = action("convert", "copy a disk into a new image of any format, its parents' data included")
    convert.add_argument("path", metavar="SRC", help="the image to read")
    convert.add_argument("target", metavar="DST", help="the image to make; or, with --force, a block device")
    convert.add_argument("--source-format", choices=_FORMATS, help="format of the first image")
    convert.add_argument(
        "--no-flush",
        dest="flush",
        action="store_const",
        const=False,
        help="leave it to the host when to store the new image, as qemu-img does: faster, but a crash of the host "
        "soon afterwards may cost it",
    )
    _add_shape(convert)

    merge = action("merge", "write what a differencing image holds into its parent, and remove the image")
    merge.add_argument("path", metavar="PATH", help="the differencing image")
    merge.add_argument(
        "--into", metavar="PATH", help="a parent further down, or a new image; a new one leaves all others alone"
    )
    merge.add_argument("--force", action="store_true", help="replace what is at --into, unless it is a parent")
    merge.add_argument("--keep", action="store_true", help="keep the image: it goes on reading as it does")

    diff = action("diff", "compare two disks, or an image with its parent")
    diff.add_argument("path", metavar="PATH")
    diff.add_argument("other", metavar="PATH", nargs="?", help="what to compare it with (default: its parent)")
    diff.add_argument("-q", "--quiet", action="store_true", help="print nothing and end at the first difference")
    diff.add_argument("--other-format", choices=_FORMATS, help="format of the second image")

    for added in (create, info, check, resize, convert, merge, diff):
        of = "of the new image" if added is convert else "of the first image" if added is diff else "of the image"
        added.add_argument("--format", choices=_FORMATS, help=f"format {of} (default: by its suffix)")
    parser.set_defaults(run=run)


def _add_shape(parser: Parser) -> None:
    parser.add_argument("--kind", choices=_KINDS, help="how it takes room: as it is written (dynamic), or all at once")
    parser.add_argument("--block-size", metavar="SIZE", type=parse_size, help="of a dynamic or differencing image")
    parser.add_argument("--sector-size", type=int, choices=(512, 4096), help="as the guest addresses it")
    parser.add_argument("--physical-sector-size", type=int, choices=(512, 4096), help="as the guest is told of")
    parser.add_argument("--force", action="store_true", help="replace an existing file, once the new one is complete")


class _ActionParser(Parser):
    """Takes paths and sizes before, between and after options, and a word such as -1G for a size."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._negative_number_matcher = _Sizes()  # type: ignore[assignment]
        self._mixing = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._mixing:
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False


class _Sizes:
    """What tells argparse which words with a dash are values."""

    def match(self, word: str) -> bool:
        return word[:1] == "-" and word[1:2].isdigit()


def _size_change(text: str) -> tuple[str, int]:
    """The sign, or "", and the bytes."""
    sign = text[:1] if text[:1] in ("+", "-") else ""
    return sign, parse_size(text[len(sign) :])


def run(args: argparse.Namespace) -> int:
    """Carry out one action. The first signal ends it in order, with nothing half-made left behind."""
    from devices.storage.backend import DiskError
    from pyvmm.cli import disk_actions

    def stop(number: int, _: FrameType | None) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)  # so that a second one does not end the tidying up
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise CliError(f"stopped by {signal.Signals(number).name}", 128 + number)

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handlers[number] = signal.signal(number, stop)
    try:
        act = getattr(disk_actions, args.action)
        status: int = act(args)
        return status
    except DiskError as error:
        raise CliError(str(error)) from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise CliError(f"{error.filename or args.path}: {error.strerror}", EXIT_IO) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
