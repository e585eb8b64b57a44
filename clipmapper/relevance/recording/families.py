"""Which attention sub-layers the recorder knows, and where in them their input and their contribution are.

One line a kind. Classes are named by their full name and found by it, so that no library is imported that
is not in use. ``docs/recorder.md`` shows how to add one. Most classes of Hugging Face
transformers are copies of a few, with other names.
"""

import functools
import re
from collections.abc import Iterable

from torch import nn

from clipmapper.errors import UserError
from clipmapper.relevance.sublayer import Sublayer, pre_norm

_TEXT, _IMAGE = {"": "text"}, {"": "image"}
_OUT = {"projection": "output.dense", "post_norm": "output.LayerNorm"}  # of BERT and its descendants
_BERT = (Sublayer(added="output.dropout", context="encoder_hidden_states", streams=_TEXT, **_OUT),)
_BERT_ENCODER = (Sublayer(added="output.dropout", streams=_TEXT, **_OUT),)
_QFORMER = (
    Sublayer(added="output.dropout", context="encoder_hidden_states", streams={"": "queries"}, **_OUT),
)
_VIT = (pre_norm("attention", streams=_IMAGE, projection="attention.o_proj"),)
_DINO = (pre_norm("layer_scale1", streams=_IMAGE, projection="attention.o_proj", scale="layer_scale1"),)
_CLIP = (pre_norm("self_attn", projection="self_attn.out_proj"),)
_BLIP = (pre_norm("self_attn", streams=_IMAGE, projection="self_attn.projection"),)
_POOL = (
    Sublayer(
        before=None, added="attention", context="hidden_state", streams={"": "pool"},
        projection="attention.out_proj",
    ),
)  # fmt: skip
_LLAMA = (pre_norm("self_attn", streams=_TEXT, projection="self_attn.o_proj"),)
# An RMSNorm between attention and the addition: no projection is all that is between.
_NORM_BEHIND = (pre_norm("post_attention_layernorm", streams=_TEXT),)
_T5_SELF = (Sublayer(added="dropout", projection="SelfAttention.o"),)
_T5_CROSS = (Sublayer(added="dropout", context="key_value_states", projection="EncDecAttention.o"),)

_SELF = {"added": "self_attn", "projection": "self_attn.out_proj", "block": True}
_CROSS = {
    "added": "encoder_attn", "context": "key_value_states", "context_at": "encoder_attn",
    "projection": "encoder_attn.out_proj", "block": True,
}  # fmt: skip
# BART: norms come after the additions; the input of its cross-attention is what the first one gives.
_BOTH = {"decoder": "decoder", "encoder": "encoder", "": "text"}  # "": one of them, recorded alone
_BART_ENCODER = (Sublayer(**_SELF, post_norm="self_attn_layer_norm", streams=_BOTH),)
_BART_DECODER = (
    *_BART_ENCODER,
    Sublayer(**_CROSS, before="encoder_attn", post_norm="encoder_attn_layer_norm"),
)
_CROSS_FIRST = Sublayer(**_CROSS, before="encoder_attn_layer_norm")
_MBART_ENCODER = (Sublayer(**_SELF, streams=_BOTH),)
_MBART_DECODER = (*_MBART_ENCODER, _CROSS_FIRST)
_WHISPER_ENCODER = (Sublayer(**_SELF),)
_WHISPER_DECODER = (*_WHISPER_ENCODER, _CROSS_FIRST)


def _named(
    names: str, ending: str, kinds: tuple[Sublayer, ...]
) -> Iterable[tuple[str, tuple[Sublayer, ...]]]:
    """For each ``module:Prefix`` in names, the class ``Prefix`` + ending of that module."""
    for name in names.split():
        module, prefix = name.split(":")
        yield _class(module, prefix + ending), kinds


def _class(module: str, name: str) -> str:
    folder = {"data2vec_text": "data2vec", "blip_text": "blip"}.get(module, module)
    return f"transformers.models.{folder}.modeling_{module}.{name}"


TRANSFORMERS: dict[str, tuple[Sublayer, ...]] = dict((
    # images
    *_named("vit:ViT deit:DeiT vit_msn:ViTMSN ijepa:IJepa", "Layer", _VIT),
    # Some patches in random order; so its tokens are no grid.
    (_class("vit_mae", "ViTMAELayer"), (
        pre_norm(
            "attention", streams={"decoder": "decoder", "": "kept patches"}, projection="attention.o_proj"
        ),
    )),
    *_named("dinov2:Dinov2 dinov2_with_registers:Dinov2WithRegisters dinov3_vit:DINOv3ViT", "Layer", _DINO),
    (_class("beit", "BeitLayer"), (
        pre_norm("drop_path", again=True, streams=_IMAGE, projection="attention.o_proj", scale="lambda_1"),
    )),
    # text
    *_named(
        "bert:Bert roberta:Roberta xlm_roberta:XLMRoberta camembert:Camembert electra:Electra ernie:Ernie "
        "data2vec_text:Data2VecText",
        "Attention", _BERT,
    ),
    *_named(
        "altclip:AltRoberta chinese_clip:ChineseCLIPText layoutlm:LayoutLM", "Attention", _BERT_ENCODER
    ),
    (_class("albert", "AlbertAttention"), (
        Sublayer(added="output_dropout", streams=_TEXT, projection="dense", post_norm="LayerNorm"),
    )),
    (_class("distilbert", "TransformerBlock"), (
        pre_norm("attention", streams=_TEXT, projection="attention.out_lin", post_norm="sa_layer_norm"),
    )),
    (_class("mpnet", "MPNetAttention"), (
        Sublayer(added="dropout", streams=_TEXT, projection="attn.o", post_norm="LayerNorm"),
    )),
    (_class("modernbert", "ModernBertEncoderLayer"), (
        pre_norm("attn", streams=_TEXT, projection="attn.Wo"),
    )),
    # text, decoders
    (_class("gpt2", "GPT2Block"), (
        pre_norm("attn", streams=_TEXT, projection="attn.c_proj"),
        Sublayer(
            before="ln_cross_attn", added="crossattention", context="encoder_hidden_states",
            context_at="crossattention", when="crossattention", projection="crossattention.c_proj",
            block=True,
        ),
    )),
    *_named(
        "llama:Llama mistral:Mistral ministral:Ministral mixtral:Mixtral qwen2:Qwen2 qwen2_moe:Qwen2Moe "
        "qwen3:Qwen3 qwen3_moe:Qwen3Moe qwen2_vl:Qwen2VL qwen2_5_vl:Qwen2_5_VL qwen3_vl:Qwen3VLText "
        "gemma:Gemma phi3:Phi3 smollm3:SmolLM3 olmo:Olmo olmoe:Olmoe glm:Glm helium:Helium "
        "starcoder2:Starcoder2 seed_oss:SeedOss arcee:Arcee ernie4_5:Ernie4_5 cohere:Cohere "
        "stablelm:StableLm",
        "DecoderLayer", _LLAMA,
    ),
    *_named(
        "gemma2:Gemma2 gemma3:Gemma3 olmo2:Olmo2 olmo3:Olmo3 exaone4:Exaone4", "DecoderLayer", _NORM_BEHIND
    ),
    (_class("opt", "OPTDecoderLayer"), (
        Sublayer(**_SELF, streams=_TEXT, when="do_layer_norm_before"),
        Sublayer(**_SELF, streams=_TEXT, when="not do_layer_norm_before", post_norm="self_attn_layer_norm"),
    )),
    (_class("phi", "PhiDecoderLayer"), (
        pre_norm("self_attn", streams=_TEXT, projection="self_attn.dense"),
    )),
    (_class("gpt_neox", "GPTNeoXLayer"), (
        pre_norm("attention", streams=_TEXT, projection="attention.dense"),
    )),
    (_class("gptj", "GPTJBlock"), (pre_norm("attn", streams=_TEXT, projection="attn.out_proj"),)),
    (_class("falcon", "FalconDecoderLayer"), (
        pre_norm("self_attention", streams=_TEXT, projection="self_attention.dense"),
    )),
    # encoders and decoders, of text and of sound
    *_named("t5:T5 mt5:MT5 umt5:UMT5", "LayerSelfAttention", _T5_SELF),
    *_named("t5:T5 mt5:MT5", "LayerCrossAttention", _T5_CROSS),
    (_class("umt5", "UMT5LayerCrossAttention"), (
        Sublayer(added="dropout", context="encoder_hidden_states", projection="EncDecAttention.o"),
    )),
    *_named("bart:Bart marian:Marian blenderbot_small:BlenderbotSmall", "EncoderLayer", _BART_ENCODER),
    *_named("bart:Bart marian:Marian blenderbot_small:BlenderbotSmall", "DecoderLayer", _BART_DECODER),
    *_named(
        "mbart:MBart pegasus:Pegasus blenderbot:Blenderbot m2m_100:M2M100", "EncoderLayer", _MBART_ENCODER
    ),
    *_named("whisper:Whisper speech_to_text:Speech2Text", "EncoderLayer", _WHISPER_ENCODER),
    *_named(
        "mbart:MBart pegasus:Pegasus blenderbot:Blenderbot m2m_100:M2M100", "DecoderLayer", _MBART_DECODER
    ),
    *_named("whisper:Whisper speech_to_text:Speech2Text", "DecoderLayer", _WHISPER_DECODER),
    # images and text
    *_named(
        "clip:CLIP metaclip_2:MetaClip2 altclip:AltCLIP siglip:Siglip siglip2:Siglip2 owlvit:OwlViT "
        "owlv2:Owlv2 idefics3:Idefics3 smolvlm:SmolVLM", "EncoderLayer", _CLIP,
    ),
    *_named("siglip:Siglip siglip2:Siglip2", "MultiheadAttentionPoolingHead", _POOL),
    (_class("chinese_clip", "ChineseCLIPVisionLayer"), _CLIP),
    (_class("git", "GitVisionEncoderLayer"), _CLIP),
    (_class("git", "GitAttention"), _BERT_ENCODER),
    *_named("blip:Blip blip_2:Blip2", "EncoderLayer", _BLIP),
    (_class("blip_text", "BlipTextAttention"), _BERT),
    (_class("blip_2", "Blip2QFormerAttention"), _QFORMER),
    (_class("flava", "FlavaLayer"), (
        pre_norm(
            "attention", streams={"image_model": "image", "text_model": "text", "multimodal": "multimodal"},
            projection="attention.output.dense",
        ),
    )),
    (_class("lxmert", "LxmertSelfAttentionLayer"), (
        Sublayer(added="output.dropout", streams={"r_layers": "image", "": "text"}, **_OUT),
    )),
    (_class("lxmert", "LxmertCrossAttentionLayer"), (
        Sublayer(added="output.dropout", context="ctx_tensor", **_OUT),
    )),
    (_class("visual_bert", "VisualBertAttention"), (
        Sublayer(added="output.dropout", streams={"": "joint"}, **_OUT),
    )),
    (_class("vilt", "ViltLayer"), (
        pre_norm("attention", streams={"": "joint"}, projection="attention.output.dense"),
    )),
))  # fmt: skip


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
