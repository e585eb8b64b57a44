"""Checks of what a recording gives, and of what it must not leave behind."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from clipmapper.relevance import METHODS

METHOD_NAMES = ("weighted", "gae", "rollout")
HOOKS = [
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
]  # fmt: skip


def maps(trace):
    return {(n, s): v for n in METHOD_NAMES for s, v in METHODS[n](trace).streams.items()}


def marks(model):
    """Everything that a recording could leave behind."""
    hooks = {
        (name, kind): len(getattr(module, kind)) for name, module in model.named_modules() for kind in HOOKS
    }
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    own = {name: "forward" in vars(module) for name, module in model.named_modules()}
    gradients = [name for name, weight in model.named_parameters() if weight.grad is not None]
    return hooks, flags, modes, own, gradients, F.scaled_dot_product_attention, torch.is_grad_enabled()


@contextmanager
def unmarked(model):
    before = marks(model)
    assert not any(before[0].values()), "a fresh model has no hooks"
    yield
    assert marks(model) == before
