"""The families of Hugging Face transformers. Most are copies of a few, with other names of classes."""

from collections.abc import Iterable

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
