"""``pyvmm config``: check and show VM files."""

from __future__ import annotations

import argparse

from pyvmm.machine.config import ConfigError, VmConfig, check_files, validate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parser import Parser


def add_parser(subparsers: argparse._SubParsersAction[Parser]) -> None:
    """Add the ``config`` command."""
    parser = subparsers.add_parser("config", help="check and show VM files", description="Check and show VM files.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, prog="pyvmm config")
    action = actions.add_parser("validate", help="check a VM file and that the files it names are there")
    action.add_argument("vm", metavar="VM.toml")
    action.set_defaults(run=_validate)
    action = actions.add_parser("show", help="print a VM file with every default filled in and every path resolved")
    action.add_argument("vm", metavar="VM.toml")
    action.add_argument("-o", "--output", choices=("toml", "json"), default="toml", help="form of the output")
    action.set_defaults(run=_show)
    action = actions.add_parser("schema", help="print the JSON schema of VM files")
    action.set_defaults(run=_schema)


def _load(path: str) -> VmConfig:
    from pyvmm.machine.config_file import load

    config = load(path)
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def _validate(args: argparse.Namespace) -> int:
    config = _load(args.vm)
    try:
        check_files(config)
    except ConfigError as error:
        raise ConfigError(f"{args.vm}: {error}") from error
    print(f"{args.vm}: ok")
    return 0


def _show(args: argparse.Namespace) -> int:
    from pyvmm.machine.config_file import to_dict, to_toml

    config = _load(args.vm)
    if args.output == "json":
        _print_json(to_dict(config))
    else:
        print(to_toml(config), end="")
    return 0


def _schema(_: argparse.Namespace) -> int:
    from pyvmm.machine.config_file import schema

    _print_json(schema())
    return 0


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))
