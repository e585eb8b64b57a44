"""Objects of the settings."""

from collections.abc import Mapping

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from clipmapper.errors import UserError


def built(settings: Mapping):
    """What the ``_target_`` of a section stands for. A ``UserError`` of its comes through as it is."""
    try:
        return instantiate(dict(settings))
    except InstantiationException as error:
        # Hydra wraps what a constructor raises in an error of its own, with lines about where.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise
