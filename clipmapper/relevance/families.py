"""Which attention sub-layers the recorder knows, and where in them their input and their contribution are.

One line a kind. Classes are named by their full name and found by it, so that no library is imported that
is not in use. ``docs/recorder.md`` shows how to add one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


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
    """

    before: str | None = ""
    added: str = ""
    context: str | None = None
    context_at: str = ""
    when: str | None = None
    multihead: str | None = None
    adds_outside: bool = False
    streams: Mapping[str, str] = field(default_factory=dict)

    def applies(self, module: nn.Module) -> bool:
        if self.when is None:
            return True
        value = getattr(module, self.when.removeprefix("not "), None)
        return bool(value) != self.when.startswith("not ")

    def tokens_first(self, module: nn.Module) -> bool:
        if self.multihead is None:
            return False
        return not getattr(module.get_submodule(self.multihead), "batch_first", True)


def _pre_norm(attention: str, **more) -> Sublayer:
    """A block ``x + attention(norm(x))`` whose attention is a module of its own."""
    return Sublayer(added=attention, **more)


_TEXT, _IMAGE = {"": "text"}, {"": "image"}
_HF = "transformers.models."
_BERT = Sublayer(added="output.dropout", context="encoder_hidden_states", streams=_TEXT)
_LLAMA = (_pre_norm("self_attn", streams=_TEXT),)

SUBLAYERS: dict[str, tuple[Sublayer, ...]] = {
    # CLIPmapper's mapper
    "clipmapper.models.attention.AttentionSublayer": (Sublayer(context="context", adds_outside=True),),
    # open_clip
    "open_clip.transformer.ResidualAttentionBlock": (
        _pre_norm("ls_1", context="k_x", multihead="attn"),
    ),
    "open_clip.transformer.CustomResidualAttentionBlock": (_pre_norm("ls_1"),),
    "open_clip.transformer.AttentionalPooler": (
        Sublayer(before=None, added="attn", context="x", streams={"": "pool"}),
    ),
    # timm
    "timm.models.vision_transformer.Block": (_pre_norm("drop_path1", streams=_IMAGE),),
    "timm.models.vision_transformer.ResPostBlock": (_pre_norm("drop_path1", streams=_IMAGE),),
    "timm.models.eva.EvaBlock": (_pre_norm("drop_path1", streams=_IMAGE),),
    "timm.models.eva.EvaBlockPostNorm": (_pre_norm("drop_path1", streams=_IMAGE),),
    "timm.layers.attention_pool.AttentionPoolLatent": (
        Sublayer(before=None, added="proj_drop", context="x", streams={"": "pool"}),
    ),
    # torch
    "torch.nn.modules.transformer.TransformerEncoderLayer": (
        Sublayer(added="dropout1", multihead="self_attn"),
    ),
    "torch.nn.modules.transformer.TransformerDecoderLayer": (
        Sublayer(added="dropout1", multihead="self_attn"),
        Sublayer(
            before="norm2", added="dropout2", context="key", context_at="multihead_attn",
            multihead="multihead_attn", when="norm_first",
        ),
        Sublayer(
            before="multihead_attn", added="dropout2", context="key", context_at="multihead_attn",
            multihead="multihead_attn", when="not norm_first",
        ),
    ),
    "torch.nn.modules.activation.MultiheadAttention": (
        Sublayer(context="key", multihead="", adds_outside=True),
    ),
    # transformers: images
    f"{_HF}vit.modeling_vit.ViTLayer": (_pre_norm("attention", streams=_IMAGE),),
    f"{_HF}dinov2.modeling_dinov2.Dinov2Layer": (_pre_norm("layer_scale1", streams=_IMAGE),),
    # transformers: text
    f"{_HF}bert.modeling_bert.BertAttention": (_BERT,),
    f"{_HF}roberta.modeling_roberta.RobertaAttention": (_BERT,),
    f"{_HF}distilbert.modeling_distilbert.TransformerBlock": (_pre_norm("attention", streams=_TEXT),),
    f"{_HF}gpt2.modeling_gpt2.GPT2Block": (
        _pre_norm("attn", streams=_TEXT),
        Sublayer(
            before="ln_cross_attn", added="crossattention", context="encoder_hidden_states",
            context_at="crossattention", when="crossattention",
        ),
    ),
    f"{_HF}llama.modeling_llama.LlamaDecoderLayer": _LLAMA,
    f"{_HF}mistral.modeling_mistral.MistralDecoderLayer": _LLAMA,
    f"{_HF}qwen2.modeling_qwen2.Qwen2DecoderLayer": _LLAMA,
    f"{_HF}t5.modeling_t5.T5LayerSelfAttention": (Sublayer(added="dropout"),),
    f"{_HF}t5.modeling_t5.T5LayerCrossAttention": (Sublayer(added="dropout", context="key_value_states"),),
    # transformers: images and text
    f"{_HF}clip.modeling_clip.CLIPEncoderLayer": (_pre_norm("self_attn"),),
    f"{_HF}siglip.modeling_siglip.SiglipEncoderLayer": (_pre_norm("self_attn"),),
    f"{_HF}siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": (
        Sublayer(before=None, added="attention", context="hidden_state", streams={"": "pool"}),
    ),
    f"{_HF}lxmert.modeling_lxmert.LxmertSelfAttentionLayer": (
        Sublayer(added="output.dropout", streams={"r_layers": "image", "": "text"}),
    ),
    f"{_HF}lxmert.modeling_lxmert.LxmertCrossAttentionLayer": (
        Sublayer(added="output.dropout", context="ctx_tensor"),
    ),
    f"{_HF}visual_bert.modeling_visual_bert.VisualBertAttention": (
        Sublayer(added="output.dropout", streams={"": "joint"}),
    ),
    f"{_HF}vilt.modeling_vilt.ViltLayer": (_pre_norm("attention", streams={"": "joint"}),),
    f"{_HF}blip.modeling_blip.BlipEncoderLayer": (_pre_norm("self_attn", streams=_IMAGE),),
    f"{_HF}blip.modeling_blip_text.BlipTextAttention": (_BERT,),
}  # fmt: skip


def sublayers_of(module: nn.Module) -> tuple[Sublayer, ...]:
    """The attention sub-layers of this very module, () if it is of no known class."""
    for kind in type(module).__mro__:
        found = SUBLAYERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return tuple(sublayer for sublayer in found if sublayer.applies(module))
    return ()
