"""Gradient checkpointing, switched off for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils import checkpoint


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Within, ``torch.utils.checkpoint`` runs what it is given like any other part of the model.

    It would run the forward a second time in the backward, behind the back of the hooks and patches that are
    in place while a forward is recorded. What is replaced is what torch's own function calls (of either
    kind), because modules hold that function itself (timm and open_clip import it by name).
    """
    # (The first has another name from release to release.)
    kind = "_checkpoint_without_reentrant_generator"
    generators = [name for name in vars(checkpoint) if name.startswith(kind)]
    replaced = dict.fromkeys(generators, _nothing_around) | {"CheckpointFunction": _Plain}
    before = {name: getattr(checkpoint, name) for name in replaced}
    vars(checkpoint).update(replaced)
    try:
        yield
    finally:
        vars(checkpoint).update(before)


def _nothing_around(*args, **kwargs) -> Iterator[None]:
    yield


class _Plain:
    @staticmethod
    def apply(function: Callable, preserve: bool, *args):
        return function(*args)
