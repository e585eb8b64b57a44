"""Where in a module an attention sub-layer's input and its contribution are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from clipmapper.relevance.projections import Projection, projection_of


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
