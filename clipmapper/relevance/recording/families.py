"""Which attention sub-layers the recorder knows, and where in them their input and their contribution are.

One line a kind. Classes are named by their full name and found by it, so that no library is imported that
is not in use. ``docs/recorder.md`` shows how to add one.
"""

from torch import nn

from clipmapper.relevance.recording.families_of_transformers import TRANSFORMERS
from clipmapper.relevance.sublayer import Sublayer, pre_norm

_TIMM = {"streams": {"": "image"}, "projection": "attn.proj"}


def _torch_layer(attention: str, dropout: str, norm: str, **more) -> tuple[Sublayer, Sublayer]:
    """A sub-layer of torch's own transformer, norm first or last."""
    made = {"added": dropout, "multihead": attention, "projection": f"{attention}.out_proj", "block": True}
    if more:  # cross-attention, whose input is what the norm is given, or what it gives
        first, last = {"before": norm, **more}, {"before": attention, **more}
    else:
        first = last = {}
    return (
        Sublayer(**made, **first, when="norm_first"),
        Sublayer(**made, **last, when="not norm_first", post_norm=norm),
    )


SUBLAYERS: dict[str, tuple[Sublayer, ...]] = {
    # CLIPmapper's mapper
    "clipmapper.models.attention.AttentionSublayer": (
        Sublayer(context="context", adds_outside=True, projection="output"),
    ),
    # open_clip
    "open_clip.transformer.ResidualAttentionBlock": (
        pre_norm("ls_1", context="k_x", multihead="attn", projection="attn.out_proj", scale="ls_1"),
    ),
    "open_clip.transformer.CustomResidualAttentionBlock": (
        pre_norm("ls_1", projection="attn.out_proj", scale="ls_1"),
    ),
    "open_clip.transformer.AttentionalPooler": (
        Sublayer(
            before=None, added="attn", context="x", streams={"": "pool"}, projection="attn.out_proj"
        ),
    ),
    # timm
    "timm.models.vision_transformer.Block": (pre_norm("drop_path1", scale="ls1", **_TIMM),),
    "timm.models.vision_transformer.ResPostBlock": (pre_norm("drop_path1", streams={"": "image"}),),
    "timm.models.vision_transformer_relpos.RelPosBlock": (pre_norm("drop_path1", scale="ls1", **_TIMM),),
    "timm.models.beit.Block": (pre_norm("drop_path1", scale="gamma_1", **_TIMM),),
    "timm.models.eva.EvaBlock": (pre_norm("drop_path1", scale="gamma_1", **_TIMM),),
    "timm.models.eva.EvaBlockPostNorm": (pre_norm("drop_path1", streams={"": "image"}),),
    "timm.layers.attention_pool.AttentionPoolLatent": (
        Sublayer(before=None, added="proj_drop", context="x", streams={"": "pool"}, projection="proj"),
    ),
    # torch
    "torch.nn.modules.transformer.TransformerEncoderLayer": _torch_layer("self_attn", "dropout1", "norm1"),
    "torch.nn.modules.transformer.TransformerDecoderLayer": (
        *_torch_layer("self_attn", "dropout1", "norm1"),
        *_torch_layer("multihead_attn", "dropout2", "norm2", context="key", context_at="multihead_attn"),
    ),
    "torch.nn.modules.activation.MultiheadAttention": (
        Sublayer(context="key", multihead="", adds_outside=True, projection="out_proj"),
    ),
    **TRANSFORMERS,
}  # fmt: skip


def sublayers_of(module: nn.Module) -> tuple[Sublayer, ...]:
    """The attention sub-layers of this very module, () if it is of no known class."""
    for kind in type(module).__mro__:
        found = SUBLAYERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return tuple(sublayer for sublayer in found if sublayer.applies(module))
    return ()
