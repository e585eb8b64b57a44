"""Modules that are given tokens with a gradient and give back tokens without one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils import checkpoint


class GradientCuts:
    """Notices where a forward leaves the autograd graph, while it runs.

    A quantised layer, a ``detach()``, a block under ``no_grad`` or a way through NumPy computes the same
    numbers, and what is before it gets no gradient: maps would be zeros, or those of a part of the model,
    without a word. ``first`` is the line for the first such module, None where there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.first: str | None = None
        self._names = {module: name for name, module in model.named_modules()}

    def watch(self, stack: ExitStack, modules: Iterable[nn.Module]) -> None:
        """Until ``stack`` is left."""
        for module in modules:
            if _has_weights(module):
                stack.callback(module.register_forward_hook(self._ended, with_kwargs=True).remove)

    def note(self, name: str, kind: str) -> None:
        """This one passes no gradient."""
        if self.first is None:
            off = "" if torch.is_grad_enabled() else " (gradients are switched off in it, as by no_grad)"
            self.first = f"{name}: {kind} passes no gradient{off}"

    def _ended(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if self.first is not None or type(output) is not Tensor or _passes(output):
            return
        # As many tokens as it was given: what a module only reads off a tensor's shape (position embeddings)
        # is no token of it.
        for given in (*args, *kwargs.values()):
            if type(given) is Tensor and given.requires_grad and given.ndim > 1:
                if output.is_floating_point() and output.shape[:-1] == given.shape[:-1]:
                    self.note(self._names.get(module) or "the model", type(module).__name__)
                return


def _passes(output: Tensor) -> bool:
    """Operators without a derivative (quantised ones) have a node in the graph that passes nothing."""
    return output.requires_grad and not (
        output.grad_fn is not None and output.grad_fn.name().endswith("NotImplemented")
    )


def _has_weights(module: nn.Module) -> bool:
    """Parameters, or the packed ones of a quantised layer, which are none to torch."""
    if next(module.parameters(), None) is not None or isinstance(module, torch.jit.ScriptModule):
        return True
    return any("quantized" in type(part).__module__ for part in module.modules())


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
