"""The commands: thin mains over Hydra configurations, for ``scripts/`` and for the ``clipmapper`` command."""

import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NoReturn, TypeVar

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, InstantiationException
from omegaconf import Container
from omegaconf.errors import OmegaConfBaseException

from clipmapper.config import (
    ExplainConfig,
    PerturbConfig,
    PretrainConfig,
    Section,
    TrainConfig,
    register,
)
from clipmapper.config_checks import check_overrides, checked, describe_failure, setting_named
from clipmapper.errors import UserError, UserErrors
from clipmapper.own_line import print_on_own_line
from clipmapper.shipped import shipped_root

_Schema = TypeVar("_Schema", bound=Section)


def train(arguments: Sequence[str] | None = None) -> None:
    """Train CLIPmapper and explain it."""

    def work(config: TrainConfig) -> float | None:
        from clipmapper.training.interruption import RunInterrupted
        from clipmapper.training.run import train
        from clipmapper.training.run_folder import objective

        try:
            return objective(train(config))
        except RunInterrupted as stop:
            raise KeyboardInterrupt(str(stop)) from stop

    _run("train", TrainConfig, work, arguments)


def explain(arguments: Sequence[str] | None = None) -> None:
    """Explain one answer of a trained CLIPmapper."""

    def work(config: ExplainConfig) -> None:
        from clipmapper.training.run_explain import explain_file

        explain_file(config)

    _run("explain", ExplainConfig, work, arguments)


def perturb(arguments: Sequence[str] | None = None) -> None:
    """Compare explanation methods by perturbation."""

    def work(config: PerturbConfig) -> None:
        from clipmapper.training.run_perturb import perturb_checkpoint

        perturb_checkpoint(config)

    _run("perturb", PerturbConfig, work, arguments)


def pretrain_clip(arguments: Sequence[str] | None = None) -> None:
    """Train the small CLIP of the built-in scenes."""

    def work(config: PretrainConfig) -> None:
        from clipmapper.training.interruption import RunInterrupted
        from clipmapper.training.pretrain import run_pretraining

        try:
            scores = run_pretraining(config)
        except RunInterrupted as stop:
            raise KeyboardInterrupt(str(stop)) from stop
        for name, score in scores.items():
            print(f"{name}: {score:.3f}")

    _run("pretrain_clip", PretrainConfig, work, arguments)


_COMMANDS = {"train": train, "explain": explain, "perturb": perturb, "pretrain_clip": pretrain_clip}


def main() -> None:
    """``clipmapper COMMAND [key=value …]``."""
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in _COMMANDS:
        _COMMANDS[name](arguments)
    elif name in ("-h", "--help", "help"):
        print("usage: clipmapper COMMAND [key=value ...]\n\ncommands:")
        for command, function in _COMMANDS.items():
            print(f"  {command:<15}{function.__doc__}")
        print("\nclipmapper COMMAND --help lists the command's settings; --version prints the version.")
    elif name == "--version":
        print(f"clipmapper {version('clipmapper')}")
    else:
        what = f"unknown command {name!r}" if name else "no command"
        _fail(f"{what}; usage: clipmapper {'|'.join(_COMMANDS)} [key=value ...]")


def _run(
    name: str, schema: type[_Schema], work: Callable[[_Schema], object], arguments: Sequence[str] | None
) -> None:
    """Compose the configuration ``name``, check it and hand it to ``work``.

    Ends with exit status 2 and one line on stderr for a mistake of the user's, 130 when interrupted.
    """
    original, composing = sys.argv, True

    def task(config: Container) -> object:
        nonlocal composing
        composing = False
        # Lightning starts further processes (several devices) by the command line as it was given.
        sys.argv = original
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                found = work(checked(config, schema))
        except UserErrors as error:
            _fail(*error.lines)
        except UserError as error:
            # Here and not below: Hydra would print a line of its own before it lets the exception through.
            _fail(str(error))
        except InstantiationException as error:
            # Of errors of Hydra's within a run, only a mistyped _target_ is a mistake in the settings.
            if not str(error).startswith("Error locating target"):
                raise
            _fail(str(error).partition(", set env")[0])
        composing = True  # the next of a sweep
        return found  # a sweeper may look for the highest

    register()
    # Hydra prints errors itself, on several lines and with exit status 1, unless told to let them through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    conf = shipped_root() / "conf"
    # The groups are those of training, and Hydra's, which Hydra checks; the other commands have none.
    folders = [path for path in conf.iterdir() if path.is_dir() and path.name != "hydra"]
    folders = folders if schema is TrainConfig else []
    groups = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    try:
        given = list(original[1:] if arguments is None else arguments)
        if "--version" in given:
            print(f"clipmapper {version('clipmapper')}")
            return
        flags = _parsed(given)
        sys.argv = [original[0], *(given if flags.multirun else _quoted(given, schema))]
        check_overrides(_parsed(sys.argv[1:]).overrides, schema, groups, sweep=flags.multirun)
        hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(task)()
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if not composing:
            raise
        _fail(describe_failure(error, schema, groups))
    except KeyboardInterrupt as stop:
        _interrupted(schema, stop)
    except SystemExit as leaving:
        # Lightning turns Ctrl-C into exit status 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            _interrupted(schema, leaving.__context__)
        raise
    finally:
        sys.argv = original


def _parsed(arguments: Sequence[str]) -> Namespace:
    """Hydra's flags, and the overrides."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; settings are given as key=value, without dashes")

    parser = get_args_parser()
    parser.error = refuse  # argparse's own error is preceded by many lines of usage
    return parser.parse_args(arguments)


def _quoted(arguments: Sequence[str], schema: type[Section]) -> list[str]:
    """Free text (a question, a path) in the quotes of Hydra's grammar, which would trip over its commas.

    Not for a sweep, where a comma separates values.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        found = setting_named(key.lstrip("+"), schema) if equals else None
        already = value == "null" or re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL)
        if found and found[0].metadata.get("text") and not already:
            escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + (match[2] and r"\'"), value)
            argument = f"{key}='{escaped}'"
        quoted.append(argument)
    return quoted


def _interrupted(schema: type[Section], stop: KeyboardInterrupt) -> NoReturn:
    what = f"interrupted: {stop}" if str(stop) else "interrupted"
    more = "; the same command with resume=true goes on" if setting_named("resume", schema) else ""
    print(f"{what}{more}", file=sys.stderr)
    sys.exit(130)


def _warn(message: Warning | str, *_) -> None:
    """A warning as one line, without the line of code that gave it."""
    print_on_own_line(f"warning: {' '.join(str(message).split())}")


def _fail(*messages: str) -> NoReturn:
    for message in messages:
        print_on_own_line(f"error: {' '.join(message.split())}", ends=True)
    sys.exit(2)
