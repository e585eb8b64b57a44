"""Attention that is computed step by step, noticed by its softmax."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def softmax_noticed(notice: Callable[[], None]) -> Iterator[None]:
    """Within, ``notice`` is called after every softmax whose result looks like attention probabilities.

    That is [..., heads, queries, keys] or [batch, tokens, tokens]. Probabilities of classes are not; nor is
    attention whose author has written out the softmax.
    """

    def noticing(original: Callable) -> Callable:
        def softmax(*args, **kwargs):
            result = original(*args, **kwargs)
            if _is_attention(result):
                notice()
            return result

        return softmax

    with ExitStack() as stack:
        for owner in (torch, F, torch.Tensor):
            if "softmax" in vars(owner):
                stack.callback(setattr, owner, "softmax", owner.softmax)
            else:
                stack.callback(delattr, owner, "softmax")  # a tensor inherits it
            owner.softmax = noticing(owner.softmax)
        yield


def _is_attention(result: Tensor) -> bool:
    return result.ndim > 3 or (result.ndim == 3 and result.shape[1] == result.shape[2] > 1)
