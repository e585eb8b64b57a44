"""Output projections of attention modules, as maps from one head's values to the residual stream."""

from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from clipmapper.models.attention import AttentionSublayer

# The linear layer after attention, and what scales its output before it is added (LayerScale).
PROJECTION = {
    ResidualAttentionBlock: ("attn.out_proj", "ls_1"),
    TimmBlock: ("attn.proj", "ls1"),
    AttentionSublayer: ("output", ""),
}


def output_weight(module: nn.Module, heads: int) -> Float[Tensor, "heads channels width"] | None:
    """W_O (with the scale), cut into its heads; None for a kind of module that is not known here."""
    kind = next((k for k in PROJECTION if isinstance(module, k)), None)
    if kind is None:
        return None
    place, scale = PROJECTION[kind]
    weight = module.get_submodule(place).weight.detach().T
    gamma = getattr(module.get_submodule(scale), "gamma", None) if scale else None
    if gamma is not None:
        weight = weight * gamma.detach()
    return weight.unflatten(0, (heads, -1))
