"""Activations that keep less for their backward: the same numbers, and less kept."""

import open_clip
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import QuickGELUActivation

from clipmapper.models.mapper_blocks import QuickGELU
from clipmapper.relevance.backward.lean_activations import lean_quick_gelu
from clipmapper.relevance.backward.rules import backward_rules

KINDS = (QuickGELU, open_clip.transformer.QuickGELU, QuickGELUActivation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_equal_to_the_last_bit(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(3, 50, generator=generator)).to(dtype).requires_grad_()
    toward = torch.randn(3, 50, generator=generator).to(dtype)
    expected = kind()(x)
    found = lean_quick_gelu(x)
    assert torch.equal(found, expected)
    of_expected, of_found = (torch.autograd.grad(y, x, toward)[0] for y in (expected, found))
    assert torch.equal(of_found, of_expected)


def test_it_can_be_differentiated_twice():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lean_quick_gelu, x)
    assert torch.autograd.gradgradcheck(lean_quick_gelu, x)


def test_gradients_of_several_scalars_at_once():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    y, toward = lean_quick_gelu(x), torch.eye(7, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, toward, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in toward])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_while_recorded_only_the_input_is_kept(kind):
    kept = []

    def numbers(module: torch.nn.Module) -> int:
        kept.clear()
        x = torch.randn(2, 8, requires_grad=True)
        with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            module(x)
        return len(set(kept))

    module = kind()
    assert numbers(module) == 2
    with backward_rules("plain"):
        assert numbers(module) == 1
    assert numbers(module) == 2  # nothing is left behind
