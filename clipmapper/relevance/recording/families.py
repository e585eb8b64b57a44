"""Which attention sub-layers the recorder knows, and where in them their input and their contribution are.

One line a kind. Classes are named by their full name and found by it, so that no library is imported that
is not in use. ``docs/recorder.md`` shows how to add one.
"""

import functools
import re

from torch import nn

from clipmapper.errors import UserError
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
    "clipmapper.models.mapper_blocks.AttentionSublayer": (
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


_TALKING = "mixes the attention of its heads behind the softmax, which is then no softmax of queries and keys"
_CLASS_ONLY = "changes the class token only, which it reads put together with the patches"
_BRIDGE = (
    "is in towers whose states go on by themselves and into cross-modal layers as well (bridges); two "
    "sub-layers that change the same state of tokens can't be recorded"
)
_NOT_SEEN = (
    "has its result multiplied in the block that calls it, not by a module; what is added to the tokens "
    "can't be seen"
)
_ONE_ROW = (
    "has the patches of all images in one row, not by samples, and merges them afterwards; record the part "
    "that reads words, as in record(model.model.language_model)"
)
_SPARSE = "attends in blocks or by an approximation; there is no softmax over all tokens to be recorded"

# By the full name of a class, or its end.
_REASONS = (
    (
        r"vision_transformer\.ParallelScalingBlock",
        "adds attention and MLP as one; what attention adds is not by itself",
    ),
    (
        r"vision_transformer\.DiffParallelScalingBlock",
        "adds the difference of two attentions and the MLP as one; what attention adds is not by itself",
    ),
    (
        r"vision_transformer\.ParallelThingsBlock",
        "has several attentions side by side that change the same state of its tokens; a sub-layer is one",
    ),
    (r"cait\.TalkingHeadAttn", _TALKING),
    (r"cait\.ClassAttn|ClassAttentionBlock|ClassAttention", _CLASS_ONLY),
    (r"XCA", "attends among channels, not among tokens; no token has attention to another"),
    (
        r"vision_transformer_sam\.Block|Sam\w*VisionLayer|Sam\w*VisionAttention",
        "keeps its tokens as an image, [batch, rows, columns, width], and attends within windows of it (SAM)",
    ),
    (
        r"\w*(?i:window|swin)\w*(?i:att)\w*",
        "attends within windows; hierarchical models (Swin) can't be recorded, since their layers do not "
        "have the same tokens. Use one without (ViT)",
    ),
    (r"BridgeTower\w*Attention", _BRIDGE),
    (r"Granite\w*Attention|InternVLVisionAttention", _NOT_SEEN),
    (r"Qwen\w*Vision(Block|Attention)|modeling_qwen\w*\.VisionAttention", _ONE_ROW),
    (
        r"InstructBlip\w*QFormerAttention",
        "attends to queries together with words, and goes on with the queries alone; tokens that part and "
        "meet again can't be recorded",
    ),
    (
        r"Deberta\w*Attention|DisentangledSelfAttention",
        "adds scores between contents and relative positions (disentangled attention), which the fused "
        "function can't",
    ),
    (r"GptOss\w*Attention", "has a learned sink in its softmax, which the fused function can't"),
    (r"(Longformer|BigBird|LED|LongT5|Reformer|Nystromformer|Yoso|Mra)\w*Attention", _SPARSE),
)  # fmt: skip


@functools.cache
def why_refused(kind: type[nn.Module]) -> str | None:
    """Say why attention of this class can't be recorded; None where nothing is known against it."""
    for ancestor in kind.__mro__:
        name = f"{ancestor.__module__}.{ancestor.__qualname__}"
        for pattern, why in _REASONS:
            if re.search(rf"(?:^|\.)(?:{pattern})$", name):
                return why
    return None


def refuse_capped_scores(path: str, block: nn.Module) -> None:
    """Raises ``UserError`` where a block's attention caps its scores (Gemma 2): the fused function can't."""
    for name, module in block.named_children():
        cap = vars(module).get("attn_logit_softcapping")
        if cap is not None:
            raise UserError(
                f"{path}.{name}: caps its scores (attn_logit_softcapping={cap}), which "
                "scaled_dot_product_attention can't; a model whose configuration has None there can be "
                "recorded"
            )
