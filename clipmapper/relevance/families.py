"""Which attention sub-layers the recorder knows, and where in them their input and their contribution are.

One line a kind. Classes are named by their full name and found by it, so that no library is imported that
is not in use. ``docs/recorder.md`` shows how to add one.
"""

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


def _pre_norm(attention: str, **more) -> Sublayer:
    """A block ``x + attention(norm(x))`` whose attention is a module of its own."""
    return Sublayer(added=attention, block=True, **more)


_TEXT, _IMAGE = {"": "text"}, {"": "image"}
_HF = "transformers.models."
_OUT = {"projection": "output.dense", "post_norm": "output.LayerNorm"}  # of BERT and its descendants
_BERT = Sublayer(added="output.dropout", context="encoder_hidden_states", streams=_TEXT, **_OUT)
_LLAMA = (_pre_norm("self_attn", streams=_TEXT, projection="self_attn.o_proj"),)
_T5_SELF = (Sublayer(added="dropout", projection="SelfAttention.o"),)
_T5_CROSS = (Sublayer(added="dropout", context="key_value_states", projection="EncDecAttention.o"),)
_TIMM = {"streams": _IMAGE, "projection": "attn.proj"}


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
        _pre_norm("ls_1", context="k_x", multihead="attn", projection="attn.out_proj", scale="ls_1"),
    ),
    "open_clip.transformer.CustomResidualAttentionBlock": (
        _pre_norm("ls_1", projection="attn.out_proj", scale="ls_1"),
    ),
    "open_clip.transformer.AttentionalPooler": (
        Sublayer(
            before=None, added="attn", context="x", streams={"": "pool"}, projection="attn.out_proj"
        ),
    ),
    # timm
    "timm.models.vision_transformer.Block": (_pre_norm("drop_path1", scale="ls1", **_TIMM),),
    "timm.models.vision_transformer.ResPostBlock": (_pre_norm("drop_path1", streams=_IMAGE),),
    "timm.models.vision_transformer_relpos.RelPosBlock": (_pre_norm("drop_path1", scale="ls1", **_TIMM),),
    "timm.models.beit.Block": (_pre_norm("drop_path1", scale="gamma_1", **_TIMM),),
    "timm.models.eva.EvaBlock": (_pre_norm("drop_path1", scale="gamma_1", **_TIMM),),
    "timm.models.eva.EvaBlockPostNorm": (_pre_norm("drop_path1", streams=_IMAGE),),
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
    # transformers: images
    f"{_HF}vit.modeling_vit.ViTLayer": (
        _pre_norm("attention", streams=_IMAGE, projection="attention.o_proj"),
    ),
    f"{_HF}dinov2.modeling_dinov2.Dinov2Layer": (
        _pre_norm("layer_scale1", streams=_IMAGE, projection="attention.o_proj", scale="layer_scale1"),
    ),
    # transformers: text
    f"{_HF}bert.modeling_bert.BertAttention": (_BERT,),
    f"{_HF}roberta.modeling_roberta.RobertaAttention": (_BERT,),
    f"{_HF}xlm_roberta.modeling_xlm_roberta.XLMRobertaAttention": (_BERT,),
    f"{_HF}distilbert.modeling_distilbert.TransformerBlock": (
        _pre_norm("attention", streams=_TEXT, projection="attention.out_lin", post_norm="sa_layer_norm"),
    ),
    f"{_HF}gpt2.modeling_gpt2.GPT2Block": (
        _pre_norm("attn", streams=_TEXT, projection="attn.c_proj"),
        Sublayer(
            before="ln_cross_attn", added="crossattention", context="encoder_hidden_states",
            context_at="crossattention", when="crossattention", projection="crossattention.c_proj",
            block=True,
        ),
    ),
    f"{_HF}llama.modeling_llama.LlamaDecoderLayer": _LLAMA,
    f"{_HF}mistral.modeling_mistral.MistralDecoderLayer": _LLAMA,
    f"{_HF}qwen2.modeling_qwen2.Qwen2DecoderLayer": _LLAMA,
    f"{_HF}t5.modeling_t5.T5LayerSelfAttention": _T5_SELF,
    f"{_HF}t5.modeling_t5.T5LayerCrossAttention": _T5_CROSS,
    f"{_HF}mt5.modeling_mt5.MT5LayerSelfAttention": _T5_SELF,
    f"{_HF}mt5.modeling_mt5.MT5LayerCrossAttention": _T5_CROSS,
    f"{_HF}m2m_100.modeling_m2m_100.M2M100EncoderLayer": (
        _pre_norm("self_attn", streams=_TEXT, projection="self_attn.out_proj"),
    ),
    # transformers: images and text
    f"{_HF}clip.modeling_clip.CLIPEncoderLayer": (_pre_norm("self_attn", projection="self_attn.out_proj"),),
    f"{_HF}siglip.modeling_siglip.SiglipEncoderLayer": (
        _pre_norm("self_attn", projection="self_attn.out_proj"),
    ),
    f"{_HF}siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": (
        Sublayer(
            before=None, added="attention", context="hidden_state", streams={"": "pool"},
            projection="attention.out_proj",
        ),
    ),
    f"{_HF}lxmert.modeling_lxmert.LxmertSelfAttentionLayer": (
        Sublayer(added="output.dropout", streams={"r_layers": "image", "": "text"}, **_OUT),
    ),
    f"{_HF}lxmert.modeling_lxmert.LxmertCrossAttentionLayer": (
        Sublayer(added="output.dropout", context="ctx_tensor", **_OUT),
    ),
    f"{_HF}visual_bert.modeling_visual_bert.VisualBertAttention": (
        Sublayer(added="output.dropout", streams={"": "joint"}, **_OUT),
    ),
    f"{_HF}vilt.modeling_vilt.ViltLayer": (
        _pre_norm("attention", streams={"": "joint"}, projection="attention.output.dense"),
    ),
    f"{_HF}blip.modeling_blip.BlipEncoderLayer": (
        _pre_norm("self_attn", streams=_IMAGE, projection="self_attn.projection"),
    ),
    f"{_HF}blip.modeling_blip_text.BlipTextAttention": (_BERT,),
}  # fmt: skip


def sublayers_of(module: nn.Module) -> tuple[Sublayer, ...]:
    """The attention sub-layers of this very module, () if it is of no known class."""
    for kind in type(module).__mro__:
        found = SUBLAYERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return tuple(sublayer for sublayer in found if sublayer.applies(module))
    return ()
