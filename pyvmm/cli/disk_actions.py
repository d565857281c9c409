"""What ``pyvmm disk`` does: one function per action, named like it, which returns the exit status.

They raise CliError, DiskError for an image that is refused, and OSError when reading or writing fails.
"""

from __future__ import annotations

import os
import stat

from devices.storage.images import check_image, open_image
from pyvmm.cli import CliError
from pyvmm.cli.progress import bar
from pyvmm.machine.config import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import Any

    from devices.storage.backend import Disk
    from devices.storage.diff import Difference

EXIT_NO = 1
EXIT_REPAIRED = 3

#: What `info` shows before all else.
_FIRST = ("path", "in_use", "problem", "format", "kind", "size", "size_on_disk", "block_size", "parent")
#: Ranges that are shown to people; -o json has more.
_SHOWN = 20


def create(args: argparse.Namespace) -> int:
    """Make an image."""
    from devices.storage.create import new_image

    with new_image(args.path, args.size, args.format, parent=args.parent, **_shape(args)) as disk:
        made = disk.inspect()
    _report(args, made, f"{args.path}: {disk.format}, {format_size(disk.size)}")
    return 0


def info(args: argparse.Namespace) -> int:
    """Show an image and its parents."""
    from devices.storage.info import describe

    found = describe(args.path, args.format)
    _report(args, found, "\n".join(_layer_lines(found)))
    return 0


def check(args: argparse.Namespace) -> int:
    """Look for damage; the status tells errors that remain from those repaired."""
    findings = check_image(args.path, args.format, args.repair)
    lines = [
        f"{args.path}: {item.severity}{' (repaired)' if item.repaired else ''}: {item.message}" for item in findings
    ]
    errors = [item for item in findings if item.severity == "error"]
    remain = [item for item in errors if not item.repaired]
    if remain and not args.repair:
        lines.append(f"{args.path}: --repair may put some of this right; keep a copy of the image first")
    plain = [{"severity": item.severity, "message": item.message, "repaired": item.repaired} for item in findings]
    _report(args, {"path": args.path, "findings": plain}, "\n".join(lines or [f"{args.path}: no errors"]))
    if remain:
        return EXIT_NO
    return EXIT_REPAIRED if any(item.repaired for item in findings) else 0


def resize(args: argparse.Namespace) -> int:
    """Change a disk's size."""
    disk = open_image(args.path, format=args.format)
    try:
        sign, amount = args.size
        was = disk.size
        size = was + amount if sign == "+" else was - amount if sign == "-" else amount
        if size <= 0:
            raise CliError(f"{args.path}: nothing would be left of its {format_size(was)}")
        if size < was and not args.shrink:
            raise CliError(
                f"{args.path}: {format_size(size)} is less than its {format_size(was)}, what lies beyond would be "
                "lost; make file systems and partitions smaller first, then add --shrink"
            )
        if size != was:
            disk.resize(size)
            disk.flush()
        _report(args, disk.inspect(), f"{args.path}: {format_size(was)} -> {format_size(disk.size)}")
    finally:
        disk.close()
    return 0


def convert(args: argparse.Namespace) -> int:
    """Copy a disk into a new image."""
    source = open_image(args.path, readonly=True, format=args.source_format)
    try:
        if os.path.exists(args.target) and stat.S_ISBLK(os.stat(args.target).st_mode):
            _copy_to_device(args, source, args.target)
        else:
            _copy_into(args, source, args.target)
    finally:
        source.close()
    return 0


def merge(args: argparse.Namespace) -> int:
    """Write an image's data into a parent and remove it; or with all its parents' into a new image."""
    from devices.storage.merge import depth_of, layers, merge, open_to_merge

    into, path, form = args.into, args.path, args.format
    if into is not None and (not os.path.exists(into) or (args.force and depth_of(into, path, form) is None)):
        if args.keep:
            raise CliError("--keep: a new image leaves all others alone anyway; leave the option out")
        source = open_image(path, readonly=True, format=form)
        try:
            args.format = None  # which was that of the image to read
            _copy_into(args, source, into)
        finally:
            source.close()
        return 0
    child, base = open_to_merge(path, form, into)
    try:
        with bar("merging", child.size) as progress:
            merge(child, base, progress)
        merged = [layer.path for layer in layers(child)[: layers(child).index(base)]]
        if not args.keep:
            for path in merged:  # from the top: what is left at any time is a chain of images
                os.unlink(path)
        done = {"into": base.path, "merged": merged, "removed": not args.keep, "size": base.size}
        _report(args, done, f"{base.path}: reads as {args.path} did{'' if args.keep else ', which is removed'}")
    finally:
        child.close()
    return 0


def diff(args: argparse.Namespace) -> int:
    """Compare two disks; 1 tells that they differ."""
    from devices.storage.diff import compare

    first = open_image(args.path, readonly=True, format=args.format)
    second: Disk | None = None
    try:
        if args.other is not None:
            second = open_image(args.other, readonly=True, format=args.other_format)
        other = second or first.parent
        if other is None:
            raise CliError(f"{args.path}: has no parent to compare it with; name another image")
        with bar("comparing", max(first.size, other.size)) as progress:
            found = compare(first, other, progress, stop_at_first=args.quiet)
        if not args.quiet:
            _report(args, _difference(first, other, found), "\n".join(_difference_lines(first, other, found)))
    finally:
        if second is not None:
            second.close()
        first.close()
    return EXIT_NO if found.ranges else 0


def _copy_into(args: argparse.Namespace, source: Disk, path: str) -> None:
    from devices.storage.copy import copy_disk
    from devices.storage.create import new_image

    shape = _shape(args)
    if shape.get("kind") == "differencing":
        raise CliError(f"{path}: a copy has no parent; choose dynamic or fixed, or make a child with create --parent")
    if "sector_size" not in shape and source.sector_size in (512, 4096):
        shape.update(sector_size=source.sector_size, physical_sector_size=source.physical_sector_size)
    if os.path.exists(path) and os.path.samefile(path, source.path):
        raise CliError(f"{path}: is the image to read; name another one")
    with (
        bar("converting", source.size) as progress,
        new_image(path, source.size, args.format, **shape) as target,
    ):
        copy_disk(source, target, progress, share=shape.get("kind") != "fixed")
    _report(args, target.inspect(), f"{path}: {target.format}, {format_size(target.size)}")


def _copy_to_device(args: argparse.Namespace, source: Disk, path: str) -> None:
    from devices.storage.copy import copy_extents

    if not args.force:
        raise CliError(f"{path}: a block device; all that it holds will be lost: add --force")
    if (args.format or "raw") != "raw" or _shape(args).keys() - {"force"}:
        raise CliError(f"{path}: a block device is a raw disk of its own size and sectors; leave the other options out")
    target = open_image(path, format="raw")
    try:
        if target.size < source.size:
            raise CliError(f"{path}: {format_size(target.size)} is too small for {format_size(source.size)}")
        with bar("converting", source.size) as progress:
            copy_extents(source, target, source.extents(0, source.size), progress)
            target.flush()
        _report(args, target.inspect(), f"{path}: raw, {format_size(target.size)}")
    finally:
        target.close()


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `new_image` that were given."""
    names = ("force", "flush", "kind", "block_size", "sector_size", "physical_sector_size")
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _report(args: argparse.Namespace, tree: dict[str, Any], text: str) -> None:
    if args.output == "json":
        import json

        text = json.dumps(tree, indent=2)
    print(text)


def _layer_lines(layer: dict[str, Any]) -> Iterator[str]:
    """``name: value`` for an image, then for each of its parents, parted by empty lines."""
    node: dict[str, Any] | None = layer
    while node is not None:
        width = max(map(len, node))
        for key in sorted(node, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST)):
            value = node[key]
            if key == "parent" and value:
                value = value["path"]
            if value is None or value is False:
                continue
            for line in _value_lines(key, value):
                yield f"{key.replace('_', ' '):{width}}  {line}"
                key = ""
        node = node.get("parent")
        if node is not None:
            yield ""


def _value_lines(key: str, value: Any) -> list[str]:
    if key == "geometry":
        return [f"{value['cylinders']} cylinders, {value['heads']} heads, {value['sectors']} sectors"]
    if isinstance(value, dict):
        return [f"{name} {_value_lines(name, item)[0]}" for name, item in value.items()]
    if value is True:
        return ["yes"]
    if isinstance(value, int) and "size" in key:
        return [f"{value} ({_rounded(value)})" if value >= 1024 else str(value)]
    text = str(value)
    # Images may hold any text, and a terminal obeys some of that.
    return [text if text.isprintable() else ascii(text)]


def _rounded(size: int) -> str:
    """A size as people read it; no other program does."""
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _difference(first: Disk, other: Disk, found: Difference) -> dict[str, Any]:
    return {
        "same": not found.ranges,
        "paths": [first.path, other.path],
        "sizes": [first.size, other.size],
        "differing": found.differing,
        "ranges": [{"offset": offset, "length": length} for offset, length in found.ranges],
        "all_ranges_listed": found.listed,
    }


def _difference_lines(first: Disk, other: Disk, found: Difference) -> Iterator[str]:
    for offset, length in found.ranges[:_SHOWN]:
        yield f"{offset:#014x} {length}"
    if len(found.ranges) > _SHOWN:
        yield f"... and {len(found.ranges) - _SHOWN} ranges more; -o json lists them"
    if first.size != other.size:
        yield f"sizes differ: {first.size} and {other.size}; only zeros are alike beyond the smaller"
    if found.ranges:
        yield f"{first.path} and {other.path} differ in {found.differing} bytes"
    else:
        yield f"{first.path} and {other.path} read the same"
