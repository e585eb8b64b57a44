"""Where in a module an attention sub-layer's input and its contribution are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """The modules behind attention, by whose present weights methods ask.

    ``linear``: the output projection (``nn.Linear``, or GPT-2's ``Conv1D``, which keeps its weight turned).
    ``scale``: what its output is multiplied with, channel by channel, before it is added (LayerScale).
    ``norm``: the LayerNorm that the sum goes through (post-LayerNorm blocks); None: the sum is the stream.
    """

    linear: nn.Module
    scale: nn.Module | Tensor | None = None
    norm: nn.Module | None = None

    def weight(self, heads: int) -> Float[Tensor, "heads channels width"]:
        """W_O (with the scale), cut into its heads."""
        weight = self.linear.weight.detach()
        if isinstance(self.linear, nn.Linear):
            weight = weight.T
        scale = self.scale
        for name in ("gamma", "lambda1"):
            scale = getattr(scale, name, scale)
        if isinstance(scale, Tensor):
            weight = weight * scale.detach()
        return weight.unflatten(0, (heads, -1))

    def normalised(
        self, stream: Float[Tensor, "*any width"], parts: Float[Tensor, "*more width"]
    ) -> Float[Tensor, "*more width"]:
        """``parts`` of the sum ``stream``, through the norm as it acts on the sum (σ a constant)."""
        if self.norm is None:
            return parts
        deviation = (stream.var(dim=-1, unbiased=False, keepdim=True) + self.norm.eps).sqrt()
        return (parts - parts.mean(dim=-1, keepdim=True)) / deviation * self.norm.weight.detach()

    @torch.no_grad()
    def normed(self, stream: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
        """The norm itself, in the precision of ``stream``."""
        norm = self.norm
        weight, bias = (None if t is None else t.to(stream.dtype) for t in (norm.weight, norm.bias))
        return nn.functional.layer_norm(stream, norm.normalized_shape, weight, bias, norm.eps)


def projection_of(module: nn.Module, linear: str, scale: str | None, norm: str | None) -> Projection | None:
    """Find the parts by the paths of a family's line; None where this version of the module lacks one, or
    its weights can't be read (quantised ones)."""
    try:
        found = [None if path is None else _at(module, path) for path in (linear, scale, norm)]
        return Projection(*found) if isinstance(found[0].weight, Tensor) else None
    except AttributeError:
        return None


def _at(module: nn.Module, path: str) -> nn.Module | Tensor:
    value = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def is_linear(
    projection: Projection,
    mixed: Float[Tensor, "batch heads queries channels"],
    added: Float[Tensor, "batch queries width"],
    rounded: bool,
) -> bool:
    """Whether what is added is the projection of what was mixed (plus a bias), as seen at two tokens.

    ``rounded``: the model computed with less than float32.
    """
    mixed, added = mixed.detach(), added.detach()
    rows = mixed.transpose(1, 2).flatten(0, 1)[[0, -1]].flatten(1)
    ends = added.flatten(0, 1)[[0, -1]]
    moved = (rows[1] - rows[0]) @ projection.weight(mixed.shape[1]).flatten(0, 1).to(rows)
    tolerance = 1e-1 if rounded else 1e-3
    return bool((moved - (ends[1] - ends[0])).norm() <= tolerance * ends.norm() + 1e-9)


@dataclass(frozen=True)
class Sublayer:
    """Where an attention sub-layer is in a module of some class.

    Paths are of submodules, relative to that module; "" is the module itself.

    Parameters
    ----------
    before : the first argument of this module is the residual stream before the sub-layer. None: attention
        that pools, with nothing to add its result to (its queries are learned).
    added : the output of this module (its first, if there are several) is what is added to the stream.
    again : that module runs once more for the MLP, which is no end of a sub-layer.
    context : name of the argument that holds the tokens that are read; None there, or here: its own.
    context_at : whose argument that is.
    when : the module has an attribute of this name that is true ("not x": false).
    multihead : the nn.MultiheadAttention whose ``batch_first`` says which axis counts the tokens.
    adds_outside : the addition is not done by the module, but by whoever calls it.
    streams : name of the stream by what occurs in the module's path ("" matches any); see ``streams.py``.
    projection : the linear layer whose output is ``added``. Some methods need it.
    scale : what multiplies that output, channel by channel, before it is added (LayerScale).
    post_norm : the LayerNorm that the sum goes through, where norms come after the addition.
    block : the module is a whole block, whose output is the stream after the MLP.
    """

    before: str | None = ""
    added: str = ""
    again: bool = False
    context: str | None = None
    context_at: str = ""
    when: str | None = None
    multihead: str | None = None
    adds_outside: bool = False
    streams: Mapping[str, str] = field(default_factory=dict)
    projection: str | None = None
    scale: str | None = None
    post_norm: str | None = None
    block: bool = False

    def applies(self, module: nn.Module) -> bool:
        if self.when is None:
            return True
        value = getattr(module, self.when.removeprefix("not "), None)
        return bool(value) != self.when.startswith("not ")

    def projected(self, module: nn.Module) -> Projection | None:
        if self.projection is None:
            return None
        return projection_of(module, self.projection, self.scale, self.post_norm)

    def tokens_first(self, module: nn.Module) -> bool:
        if self.multihead is None:
            return False
        return not getattr(module.get_submodule(self.multihead), "batch_first", True)


def pre_norm(attention: str, **more) -> Sublayer:
    """A block ``x + attention(norm(x))`` whose attention is a module of its own."""
    return Sublayer(added=attention, block=True, **more)
