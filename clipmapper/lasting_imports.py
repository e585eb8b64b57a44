"""Imports that the garbage collector need not look through."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
