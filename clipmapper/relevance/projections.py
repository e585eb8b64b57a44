"""Output projections of attention modules, as maps from one head's values to the residual stream."""

from jaxtyping import Float
from torch import Tensor, nn

# The linear layer after attention, and what scales its output before it is added (LayerScale). By name, so
# that no library is imported that the model at hand does not use.
PROJECTION = {
    "open_clip.transformer.ResidualAttentionBlock": ("attn.out_proj", "ls_1"),
    "timm.models.vision_transformer.Block": ("attn.proj", "ls1"),
    "clipmapper.models.attention.AttentionSublayer": ("output", ""),
}


def output_weight(module: nn.Module, heads: int) -> Float[Tensor, "heads channels width"] | None:
    """W_O (with the scale), cut into its heads; None for a kind of module that is not known here."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    kind = next((name for name in names if name in PROJECTION), None)
    if kind is None:
        return None
    place, scale = PROJECTION[kind]
    weight = module.get_submodule(place).weight.detach().T
    gamma = getattr(module.get_submodule(scale), "gamma", None) if scale else None
    if gamma is not None:
        weight = weight * gamma.detach()
    return weight.unflatten(0, (heads, -1))
