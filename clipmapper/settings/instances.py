"""Objects of the settings."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from clipmapper.errors import UserError
from clipmapper.settings.keys import name_today


def built(settings: Mapping):
    """Call what the ``_target_`` of a section stands for with the rest of the section.

    For settings that the user gave on the command line or wrote in YAML, never for what a file says. Values
    are handed over as they are: Hydra would look for ``${…}`` and for more targets in them. Raises
    ``UserError`` for a target that is not there, that Hydra holds dangerous, or that does not take these
    settings.
    """
    try:
        return prepared(settings)()
    except InstantiationException as error:  # of what it gives Hydra may think as of the target
        raise _refused(settings["_target_"], error) from error


def prepared(settings: Mapping) -> Callable[[], Any]:
    """Bind the target of a section to the rest of it, for :func:`built` to call; raises as that."""
    values = dict(settings)
    target = named(values.pop("_target_"))
    try:
        inspect.signature(target).bind(**values)
    except TypeError as error:
        raise UserError(
            f"_target_={settings['_target_']}: cannot be called with these settings ({error})"
        ) from error
    except ValueError:  # of something built in that does not say what it takes
        pass
    return partial(target, **values)


def named(target: str) -> Callable:
    """Return what a ``_target_`` of the user's settings stands for, not called; raises as :func:`built`."""
    try:
        return instantiate({"_target_": name_today(target), "_partial_": True})
    except InstantiationException as error:
        raise _refused(target, error) from error


def _refused(target: str, error: InstantiationException) -> UserError:
    reason = " ".join(str(error).partition(", set env")[0].partition("\nfull_key")[0].split())
    return UserError(f"_target_={target}: {reason}")
