"""The commands: thin mains over Hydra configurations, for ``scripts/`` and for the ``clipmapper`` command."""

import gc
import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from typing import NoReturn, TypeVar

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import Container
from omegaconf.errors import OmegaConfBaseException

from clipmapper.commands.compose import data_settings, sized_by_init
from clipmapper.commands.mistakes import fail, mistakes_end_it
from clipmapper.errors import RunInterrupted, UserError, visible
from clipmapper.host.progress import print_on_own_line
from clipmapper.host.stopping import a_command
from clipmapper.settings.checks import check_overrides, checked, describe_failure
from clipmapper.settings.commands import (
    EvaluateConfig,
    ExplainConfig,
    ExportConfig,
    PerturbConfig,
    PretrainConfig,
)
from clipmapper.settings.compose import completed, config_groups, quoted
from clipmapper.settings.keys import Section
from clipmapper.settings.schema import TrainConfig
from clipmapper.settings.study import StudyConfig
from clipmapper.shipped import shipped_root
from clipmapper.tasks.registry import register_settings

# Hydra's flags that are followed by a value.
_TAKE_A_VALUE = {
    option
    for action in get_args_parser()._actions
    if action.nargs is None
    for option in action.option_strings
}
_Schema = TypeVar("_Schema", bound=Section)


def train(arguments: Sequence[str] | None = None) -> None:
    """Train CLIPmapper and explain it."""

    def work(config: TrainConfig) -> float | None:
        with lasting_imports():
            from clipmapper.commands.train import train
            from clipmapper.training.run_folder import objective

        return objective(train(sized_by_init(config, HydraConfig.get().overrides.task)))

    _run("train", TrainConfig, work, arguments)


def explain(arguments: Sequence[str] | None = None) -> None:
    """Explain one answer of a trained CLIPmapper."""

    def work(config: ExplainConfig) -> None:
        with lasting_imports():
            from clipmapper.commands.explain import explain_file

        explain_file(config)

    _run("explain", ExplainConfig, work, arguments)


def perturb(arguments: Sequence[str] | None = None) -> None:
    """Compare explanation methods by perturbation."""

    def work(config: PerturbConfig) -> None:
        with lasting_imports():
            from clipmapper.commands.perturb import perturb_checkpoint

        perturb_checkpoint(config)

    _run_on_data("perturb", PerturbConfig, work, arguments)


def study(arguments: Sequence[str] | None = None) -> None:
    """Compare methods over models, seeds and scores."""

    def work(config: StudyConfig) -> None:
        with lasting_imports():
            from clipmapper.commands.study import study

        study(config)

    _run_on_data("study", StudyConfig, work, arguments)


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """Score trained models on any data set."""

    def work(config: EvaluateConfig) -> None:
        with lasting_imports():
            from clipmapper.commands.evaluate import evaluate

        evaluate(config)

    _run_on_data("evaluate", EvaluateConfig, work, arguments)


def export(arguments: Sequence[str] | None = None) -> None:
    """Write a trained model as a folder, with its card."""

    def work(config: ExportConfig) -> None:
        with lasting_imports():
            from clipmapper.commands.export import export_checkpoint

        export_checkpoint(config)

    _run("export", ExportConfig, work, arguments)


def pretrain_clip(arguments: Sequence[str] | None = None) -> None:
    """Train the small CLIP of the built-in scenes."""

    def work(config: PretrainConfig) -> None:
        with lasting_imports():
            from clipmapper.commands.pretrain_clip import run_pretraining

        for name, score in run_pretraining(config).items():
            print(f"{name}: {score:.3f}")

    _run("pretrain_clip", PretrainConfig, work, arguments)


def make_shards(arguments: Sequence[str]) -> None:
    """Write a data set as WebDataset shards."""
    with lasting_imports():
        from clipmapper.commands.make_shards import main

    main(arguments)


def convert(arguments: Sequence[str]) -> None:
    """Turn a public data set's official files into a manifest."""
    with lasting_imports():
        from clipmapper.commands.convert import main

    main(arguments)


def attention_causality(arguments: Sequence[str]) -> None:
    """Replace attention and count changed predictions."""
    with lasting_imports():
        from clipmapper.commands.attention_causality import main

    main(arguments)


_SETTINGS = {
    "train": train,
    "explain": explain,
    "perturb": perturb,
    "evaluate": evaluate,
    "study": study,
    "export": export,
    "pretrain_clip": pretrain_clip,
}
_OPTIONS = {"make_shards": make_shards, "convert": convert, "attention_causality": attention_causality}
_COMMANDS = _SETTINGS | _OPTIONS


def main() -> None:
    """``clipmapper COMMAND [key=value …]``; of some commands ``clipmapper COMMAND [--name value …]``."""
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in _COMMANDS:
        _COMMANDS[name](arguments)
    elif name in ("-h", "--help", "help"):
        print("usage: clipmapper COMMAND [key=value ...]\n\ncommands:")
        for command, function in _SETTINGS.items():
            print(f"  {command:<21}{function.__doc__}")
        print("\ncommands with options (--name value) of their own:")
        for command, function in _OPTIONS.items():
            print(f"  {command:<21}{function.__doc__}")
        print("\nclipmapper COMMAND --help lists the command's settings; --version prints the version.")
    elif name == "--version":
        print(f"clipmapper {version('clipmapper')}")
    else:
        what = f"unknown command {name!r}" if name else "no command"
        fail(f"{what}; usage: clipmapper {'|'.join(_COMMANDS)} [key=value ...]")


def _run_on_data(
    name: str, schema: type[_Schema], work: Callable[[_Schema], object], arguments: Sequence[str] | None
) -> None:
    """:func:`_run` of a command that takes ``data=… data.KEY=…`` as ``clipmapper train`` does."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What train's group `data` holds chooses other groups of train as well: it is composed by itself.
    of_data = [argument for argument in given if re.match(r"[+~]*data[=.]", argument)]

    def with_data(config: _Schema) -> None:
        config.data = data_settings(of_data) if of_data and of_data != ["data=null"] else None
        work(config)

    _run(name, schema, with_data, [argument for argument in given if argument not in of_data])


def _run(
    name: str, schema: type[_Schema], work: Callable[[_Schema], object], arguments: Sequence[str] | None
) -> None:
    """Compose the configuration ``name``, check it and hand it to ``work``.

    Ends with exit status 2 and one line on stderr for a mistake of the user's, 130 when interrupted.
    """
    with a_command(), mistakes_end_it():
        _composed(name, schema, work, arguments)


def _composed(
    name: str, schema: type[_Schema], work: Callable[[_Schema], object], arguments: Sequence[str] | None
) -> None:
    original, composing = sys.argv, True

    def task(config: Container) -> object:
        nonlocal composing
        composing = False
        # Lightning starts further processes (several devices) by the command line as it was given.
        sys.argv = original
        # Here and not below: Hydra would print a line of its own before it lets the exception through.
        with mistakes_end_it(), warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                found = work(checked(config, schema))
            except RunInterrupted as stop:
                raise KeyboardInterrupt(str(stop)) from stop
        composing = True  # the next of a sweep
        return found  # a sweeper may look for the highest

    register_settings()
    # Hydra prints errors itself, on several lines and with exit status 1, unless told to let them through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    conf = shipped_root() / "conf"
    groups = config_groups(schema)
    try:
        given = list(original[1:] if arguments is None else arguments)
        if "--version" in given:
            print(f"clipmapper {version('clipmapper')}")
            return
        given = _flags_first(given)
        flags = _parsed(given)
        given = quoted(given, schema, sweep=flags.multirun)
        sys.argv = [original[0], *(completed(given) if schema is TrainConfig else given)]
        check_overrides(_parsed(sys.argv[1:]).overrides, schema, groups, sweep=flags.multirun)
        hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if not composing:
            raise
        fail(describe_failure(error, schema, groups))
    except KeyboardInterrupt as stop:
        _interrupted(stop)
    except SystemExit as leaving:
        # Lightning turns Ctrl-C into exit status 1.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            _interrupted(leaving.__context__)
        raise
    finally:
        sys.argv = original


def _flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags before the overrides: argparse takes no overrides behind a flag that follows some."""
    given = ["", *arguments]
    overrides = [
        argument
        for before, argument in pairwise(given)
        if re.match(r"[^-][^=]*=|~", argument) and before not in _TAKE_A_VALUE
    ]
    rest = list(arguments)
    for override in overrides:
        rest.remove(override)
    return [*rest, *overrides]


def _parsed(arguments: Sequence[str]) -> Namespace:
    """Hydra's flags, and the overrides."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; settings are given as key=value, without dashes")

    parser = get_args_parser()
    parser.error = refuse  # argparse's own error is preceded by many lines of usage
    return parser.parse_args(arguments)


def _interrupted(stop: KeyboardInterrupt) -> NoReturn:
    print(f"interrupted: {visible(str(stop))}" if str(stop) else "interrupted", file=sys.stderr)
    sys.exit(130)


def _warn(message: Warning | str, *_) -> None:
    """A warning as one line, without the line of code that gave it."""
    print_on_own_line(f"warning: {' '.join(visible(str(message)).split())}")


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Modules that are imported within stay for good, and so does all that is there already: no garbage is
    looked for meanwhile, and in these objects never again.

    Of torch, Lightning and what they import those are a million. To look through them again and again is a
    quarter of a command's start, and takes 2 s at its end.
    """
    collecting, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collecting:
            gc.enable()
