"""``torch.nn.MultiheadAttention`` made to go through fused attention while a forward is recorded."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

# Positions of arguments of nn.MultiheadAttention.forward(query, key, value, ...).
_NEED_WEIGHTS = 4


@contextmanager
def without_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these modules compute no attention weights (then they would not use fused attention).

    Callers that asked for weights are given None. The fast path for inference, which is no attention that
    could be differentiated, is off.
    """
    with ExitStack() as stack:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for module in modules:
            if isinstance(module, nn.MultiheadAttention):
                hook = module.register_forward_pre_hook(_need_no_weights, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _need_no_weights(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if len(args) > _NEED_WEIGHTS:
        return (*args[:_NEED_WEIGHTS], False, *args[_NEED_WEIGHTS + 1 :]), kwargs
    return args, {**kwargs, "need_weights": False}
