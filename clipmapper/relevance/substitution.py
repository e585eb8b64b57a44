"""Running a model with other attention matrices in place of its own."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipmapper.relevance.methods.effective import effective_matrix, efficient_matrix
from clipmapper.relevance.trace import Attention, Node

Matrix = Callable[[Attention], Float[Tensor, "batch heads queries keys"]]


def uniform_matrix(step: Attention) -> Float[Tensor, "batch heads queries keys"]:
    """The same attention to every key that a query may read."""
    allowed = step.allowed().expand(step.probabilities().shape).to(step.query.dtype)
    return _distributed(allowed)


def random_matrix(seed: int) -> Matrix:
    """Rows drawn uniformly from all distributions over the keys that a query may read."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(step: Attention) -> Float[Tensor, "batch heads queries keys"]:
        shape = step.probabilities().shape
        # Exponential numbers, divided by their sum, are uniform on the simplex.
        drawn = -torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
        drawn = drawn.to(step.query.device, step.query.dtype) * step.allowed()
        return _distributed(drawn)

    return matrix


def _distributed(rows: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows keys"]:
    """Divide each row by its sum; a query that may read nothing reads nothing."""
    total = rows.sum(dim=-1, keepdim=True)
    return rows / total.masked_fill(total == 0, 1.0)


def substitutes(seed: int) -> dict[str, Matrix]:
    """Return the matrices that the attention-causality experiment puts in place of A."""
    return {
        "effective": effective_matrix,
        "efficient": efficient_matrix,
        "random": random_matrix(seed),
        "uniform": uniform_matrix,
    }


@contextmanager
def substituted_attention(
    matrix: Matrix | None, layers: Collection[int] | None = None
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Calls of ``scaled_dot_product_attention`` number ``layers`` (None: all) use ``matrix`` for A.

    They are counted from 0 in the order in which they run. Gives a list that holds, after the forward, A and
    what took its place for every call that was changed. ``matrix`` None changes nothing (to count the calls:
    the list then holds A twice). Restored on leaving, also after an exception.
    """
    original = F.scaled_dot_product_attention
    seen: list[tuple[Tensor, Tensor]] = []
    count = 0

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        nonlocal count
        number, count = count, count + 1
        if layers is not None and number not in layers:
            options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
            return original(query, key, value, **options, **more)
        if more.get("enable_gqa"):
            heads = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
        nodes = Node("queries", 0), Node("keys", 0), Node("queries", 1)
        x = query.transpose(1, 2).flatten(2)
        step = Attention(
            f"call {number}", *nodes, query, key, value, query, attn_mask, scale, is_causal, x, x
        )  # fmt: skip
        own = step.probabilities()
        other = own if matrix is None else matrix(step)
        seen.append((own, other))
        return other.to(value.dtype) @ value

    # Without gradients nn.MultiheadAttention would take a kernel of its own, past the function patched here.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = attention
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast)


def names_of_calls(model: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Return, for every call of ``scaled_dot_product_attention`` in a forward, the path of its module.

    Their order is that of the numbers that :func:`substituted_attention` counts by. A module that is called
    twice is named twice. Restored on leaving, also after an exception.
    """
    paths = {module: path for path, module in model.named_modules()}
    inside: list[str] = []
    names: list[str] = []

    def note(step: Attention) -> Tensor:
        names.append(inside[-1] if inside else "")
        return step.probabilities()

    def enter(module: nn.Module, args: tuple) -> None:
        inside.append(paths[module])

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        inside.pop()

    with ExitStack() as stack:
        for module in paths:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(substituted_attention(note))
        forward()
    return names


def total_variation(a: Float[Tensor, "*rows keys"], b: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """½ ‖a − b‖₁, between 0 and 1 for distributions."""
    return (a - b).abs().sum(dim=-1) / 2


def jensen_shannon(a: Float[Tensor, "*rows keys"], b: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """Jensen–Shannon distance: square root of the divergence to base 2, between 0 and 1."""
    middle = (a + b) / 2

    def divergence(p: Tensor) -> Tensor:
        ratio = torch.where(p > 0, p / middle.masked_fill(middle == 0, 1.0), torch.ones_like(p))
        return (p * ratio.log2()).sum(dim=-1)

    return ((divergence(a) + divergence(b)) / 2).clamp(min=0).sqrt()
