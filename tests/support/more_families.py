"""More families of transformers' models, tiny and with random weights."""

import pytest
import torch
import torch.nn.functional as F

from support import families as base
from support.families import HEADS, IMAGE, LAYERS, SMALL, WORDS, Case, D, ids, pixels, ready
from support.naive_any import Spec, number, selfs

transformers = pytest.importorskip("transformers")


def made(name, config, **more):
    return ready(getattr(transformers, name)(getattr(transformers, config)(**more)))


def images(name, config, path, a, tokens, y, **more):
    """An image encoder whose blocks are given x, and add what comes out of ``a``."""
    case = Case(
        made(name, config, **{**IMAGE, **more}), {"pixel_values": pixels(2)}, y,
        selfs("image", path, LAYERS, "", a), number(image=tokens), [0], lambda o: o.attentions,
    )  # fmt: skip
    return case


def logits(o):
    return o.logits[:, 2]


def state(o):
    return o.last_hidden_state[:, 0, 2]


def hf_deit():
    return images("DeiTModel", "DeiTConfig", "layers", "attention", 11, state)


def hf_vit_msn():
    return images(
        "ViTMSNForImageClassification", "ViTMSNConfig", "vit.layers", "attention", 10, logits, num_labels=5
    )


def hf_ijepa():
    case = images(
        "IJepaModel", "IJepaConfig", "layers", "attention", 9, lambda o: o.last_hidden_state[:, 4, 2]
    )
    case.reads = [4]
    return case


def hf_vit_mae():
    """ViT-MAE keeps 4 of 9 patches, in random order; its stream is no grid."""
    case = images("ViTMAEModel", "ViTMAEConfig", "layers", "attention", 5, state, mask_ratio=0.5)
    case.inputs["noise"] = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    case.streams = {"kept patches": "image"}
    return case


def hf_dinov2_with_registers():
    return images(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "encoder.layer", "layer_scale1", 14, state,
        mlp_ratio=2, layerscale_value=0.5, num_register_tokens=4,
    )  # fmt: skip


def hf_dinov3():
    return images(
        "DINOv3ViTModel", "DINOv3ViTConfig", "model.layer", "layer_scale1", 14, state, layerscale_value=0.5,
        num_register_tokens=4,
    )  # fmt: skip


def hf_beit():
    return images(
        "BeitForImageClassification", "BeitConfig", "beit.layers", "drop_path", 10, logits,
        use_relative_position_bias=True, layer_scale_init_value=0.5, use_mean_pooling=False, num_labels=5,
    )  # fmt: skip


TEXT = {
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", "roberta.encoder.layer"),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", "electra.encoder.layer"),
    "ernie": ("ErnieForSequenceClassification", "ErnieConfig", "ernie.encoder.layer"),
    "data2vec_text": (
        "Data2VecTextForSequenceClassification", "Data2VecTextConfig", "data2vec_text.encoder.layer"
    ),
    "layoutlm": ("LayoutLMForSequenceClassification", "LayoutLMConfig", "layoutlm.encoder.layer"),
}  # fmt: skip


def encoder_of_text(kind):
    name, config, path = TEXT[kind]
    pad = 1 if kind in ("camembert", "data2vec_text") else 0
    model = made(name, config, **WORDS, num_labels=3, pad_token_id=pad)
    return base.encoder_of_text(
        model, path, "attention", "attention.output.dropout", lambda o: o.logits[:, 1], pad
    )


def hf_mpnet():
    model = made("MPNetForSequenceClassification", "MPNetConfig", **WORDS, num_labels=3)
    case = base.encoder_of_text(
        model, "mpnet.encoder.layer", "attention", "attention.dropout", lambda o: o.logits[:, 1], 1
    )
    case.attentions = None
    return case


def hf_modernbert():
    model = made(
        "ModernBertForSequenceClassification", "ModernBertConfig", **WORDS, num_labels=3, pad_token_id=0,
        local_attention=4, global_attn_every_n_layers=2,
    )  # fmt: skip
    return base.encoder_of_text(model, "model.layers", "", "attn", lambda o: o.logits[:, 1])


def hf_albert():
    """One layer's weights, three times."""
    model = made(
        "AlbertForSequenceClassification", "AlbertConfig", **{**WORDS, "num_hidden_layers": 3},
        embedding_size=8, num_labels=3,
    )  # fmt: skip
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
    case = base.encoder_of_text(model, "", "", "", lambda o: o.logits[:, 1])
    case.specs = [Spec("text", "text", layer, f"{layer}.output_dropout")] * 3
    return case


HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


DECODERS = {
    "gemma": ("self_attn", {"head_dim": 4, "num_key_value_heads": 1}),
    "gemma2": (
        "post_attention_layernorm",
        {"head_dim": 4, "num_key_value_heads": 2, "attn_logit_softcapping": None, "sliding_window": 4},
    ),
    "gemma3": ("post_attention_layernorm", {"head_dim": 4, "num_key_value_heads": 2, "sliding_window": 4}),
    "olmo2": ("post_attention_layernorm", {}),
    "olmo3": ("post_attention_layernorm", {"sliding_window": 4}),
    "exaone4": ("post_attention_layernorm", {"num_key_value_heads": 2}),
    "ministral": ("self_attn", {"head_dim": 4, "num_key_value_heads": 2}),
    "mixtral": ("self_attn", {"num_key_value_heads": 2, "num_local_experts": 2}),
    "qwen2_moe": (
        "self_attn",
        {"num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
         "shared_expert_intermediate_size": 8},
    ),
    "qwen3": ("self_attn", {"head_dim": 4, "num_key_value_heads": 2}),
    "qwen3_moe": (
        "self_attn",
        {"head_dim": 4, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 2,
         "moe_intermediate_size": 8},
    ),
    "phi3": ("self_attn", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "smollm3": ("self_attn", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "olmo": ("self_attn", {}),
    "olmoe": ("self_attn", {"num_experts": 2, "num_experts_per_tok": 1}),
    "glm": ("self_attn", {"head_dim": 4, "num_key_value_heads": 2, "pad_token_id": 0}),
    "helium": ("self_attn", {"head_dim": 4, "num_key_value_heads": 2}),
    "starcoder2": ("self_attn", {"num_key_value_heads": 2}),
    "seed_oss": ("self_attn", {"head_dim": 4, "num_key_value_heads": 2}),
    "arcee": ("self_attn", {"num_key_value_heads": 2}),
    "ernie4_5": ("self_attn", {"head_dim": 4, "num_key_value_heads": 2}),
    "cohere": ("self_attn", {}),
    "stablelm": ("self_attn", {"num_key_value_heads": 2, "rope_parameters": HALF}),
    "opt": ("self_attn", {"ffn_dim": 24, "word_embed_proj_dim": D}),
    "phi": ("self_attn", {}),
    "gpt_neox": ("attention", {"use_parallel_residual": True}),
    "falcon, new": ("self_attention", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": (
        "self_attention", {"alibi": True, "multi_query": False, "parallel_attn": False}
    ),
    "gpt_neox, one after the other": ("attention", {"use_parallel_residual": False}),
    "opt, norm behind": (
        "self_attn", {"ffn_dim": 24, "word_embed_proj_dim": D, "do_layer_norm_before": False}
    ),
    "stablelm, side by side": (
        "self_attn", {"num_key_value_heads": 2, "rope_parameters": HALF, "use_parallel_residual": True}
    ),
    "gptj": ("attn", {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 24, "rotary_dim": 2,
                      "n_positions": 24}),
    "falcon": ("self_attention", {"alibi": False, "new_decoder_architecture": False}),
}  # fmt: skip


PATHS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "gptj": "transformer.h",
         "falcon": "transformer.h"}  # fmt: skip


def in_double(model, inputs):
    """Their routers' softmax is in float32, which is not what is compared here."""
    softmax = F.softmax
    F.softmax = lambda scores, *args, dtype=None, **kwargs: softmax(scores, *args, **kwargs)
    try:
        return model(**inputs)
    finally:
        F.softmax = softmax


def decoder(name):
    added, more = DECODERS[name]
    kind = name.split(",")[0]
    text = kind == "gemma3"
    config = transformers.AutoConfig.for_model("gemma3_text" if text else kind, **{**WORDS, **more})
    model = ready(transformers.AutoModelForCausalLM.from_config(config))
    if kind == "gemma2":
        model.config._attn_implementation_internal = "sdpa"
    case = base.decoder(model, PATHS.get(kind, "model.layers"), added)
    if "num_experts" in more or "num_local_experts" in more:
        model.set_experts_implementation("eager")
        case.forward = in_double
    if kind in ("gptj", "falcon"):
        case.attentions = None
    return case


ENCODER_DECODERS = {  # and whether norms come before
    "bart": False, "marian": False, "blenderbot-small": False, "mbart": True, "pegasus": True,
    "blenderbot": True, "m2m_100": True, "whisper": True, "speech_to_text": True,
}  # fmt: skip


def encoder_decoder(kind):
    """BART and its copies; Whisper and Speech2Text hear (in 4 and 2 times as many frames)."""
    first, sound = ENCODER_DECODERS[kind], kind in ("whisper", "speech_to_text")
    special = {"pad_token_id": 1, "decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(
        kind, d_model=D, vocab_size=40, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=24, decoder_ffn_dim=24,
        forced_eos_token_id=None, **special,
        **({"max_source_positions": 6, "max_target_positions": 24, "num_mel_bins": 5} if sound else
           {"max_position_embeddings": 24}),
        **({"input_feat_per_channel": 5, "conv_channels": 8} if kind == "speech_to_text" else {}),
    )  # fmt: skip
    whole = transformers.AutoModelForSpeechSeq2Seq if sound else transformers.AutoModelForSeq2SeqLM
    model = ready(whole.from_config(config))
    inputs, lengths = {"decoder_input_ids": ids(2, 4, seed=1)}, (None, None)
    if sound:
        generator = torch.Generator().manual_seed(0)
        shape = (2, 5, 12) if kind == "whisper" else (2, 24, 5)
        inputs["input_features"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:
        lengths = (6, 5)
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        inputs |= {"input_ids": torch.where(mask, ids(2, 6), 1), "attention_mask": mask.long()}
    specs = selfs("encoder", "model.encoder.layers", LAYERS, "", "self_attn")
    for n in range(LAYERS):
        at = f"model.decoder.layers.{n}"
        specs.append(Spec("decoder", "decoder", at, f"{at}.self_attn"))
        crossing = f"{at}.encoder_attn_layer_norm" if first else f"{at}.encoder_attn"
        specs.append(Spec("decoder", "encoder", crossing, f"{at}.encoder_attn"))

    return Case(
        model, inputs, lambda o: o.logits[:, 2, 9], specs, number(encoder=6, decoder=4), [6 + 2],
        base.attentions_of_both,
        lengths=lengths, text="encoder",
    )  # fmt: skip


def towers(kind, words, text, read, **more):
    """A similarity of an image and a text; ``text``: path, x and a of the text tower."""
    model = made(f"{kind}Model", f"{kind}Config", text_config=words, vision_config=IMAGE, **more)
    tokens = ids(2, 7)
    tokens[:, 4] = 39
    specs = selfs("image", "vision_model.encoder.layers", LAYERS, "", "self_attn")
    specs += selfs("text", *text)
    inputs = {"input_ids": tokens, "pixel_values": pixels(2)}
    return Case(
        model, inputs, lambda o: o.logits_per_image.diagonal(), specs, number(image=10, text=7),
        [0, 10 + read],
    )  # fmt: skip


BERT_TOWER = ("encoder.layer", LAYERS, "attention", "attention.output.dropout")


CLIP_TOWER = ("text_model.encoder.layers", LAYERS, "", "self_attn")


def hf_altclip():
    words = {**WORDS, "project_dim": 8, "pad_token_id": 1}
    return towers(
        "AltCLIP", words, ("text_model.roberta.encoder.layers", *BERT_TOWER[1:]), 0, projection_dim=8
    )


def hf_chinese_clip():
    return towers("ChineseCLIP", WORDS, ("text_model." + BERT_TOWER[0], *BERT_TOWER[1:]), 0, projection_dim=8)


def hf_metaclip_2():
    return towers("MetaClip2", {**WORDS, "eos_token_id": 39}, CLIP_TOWER, 4, projection_dim=8)


def hf_owlvit(kind="OwlViT"):
    return towers(kind, WORDS, CLIP_TOWER, 4, projection_dim=8)


def hf_owlv2():
    return hf_owlvit("Owlv2")


def hf_siglip2():
    """Patches come as such, with a mask, and the shape of their grid."""
    vision = {**SMALL, "patch_size": 4, "num_patches": 9}
    model = made("Siglip2Model", "Siglip2Config", text_config=WORDS, vision_config=vision)
    specs = selfs("image", "vision_model.encoder.layers", LAYERS, "", "self_attn")
    specs += [Spec("pool", "image", None, "vision_model.head.attention")]
    specs += selfs("text", *CLIP_TOWER)
    patches = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = {
        "input_ids": ids(2, 7), "pixel_values": patches,
        "pixel_attention_mask": torch.ones(2, 9).long(), "spatial_shapes": torch.tensor([[3, 3]] * 2),
    }  # fmt: skip
    return Case(
        model, inputs, lambda o: o.logits_per_image.diagonal(), specs, number(image=9, pool=1, text=7),
        [9, 10 + 6],
    )  # fmt: skip


def hf_flava():
    """Both towers, then a class token and all their tokens in one encoder."""
    more = {"num_hidden_layers": LAYERS}
    model = made(
        "FlavaModel", "FlavaConfig", image_config=IMAGE, text_config=WORDS, multimodal_config=SMALL | more,
        hidden_size=D, projection_dim=8,
    )  # fmt: skip
    specs = []
    for stream, name in (("image", "image"), ("text", "text"), ("joint", "multimodal")):
        specs += selfs(stream, f"{name}_model.encoder.layer", LAYERS, "", "attention")
    places = number(image=10, text=7, multimodal=18)
    places["joint"] = [places["multimodal"][0], *places["image"], *places["text"]]
    return Case(
        model, {"input_ids": ids(2, 7), "pixel_values": pixels(2)},
        lambda o: o.multimodal_embeddings[:, 0, 3], specs, places, places["joint"][:1],
        streams={name: name for name in ("image", "text", "multimodal")},
        forward=lambda model, inputs: model(**inputs, output_hidden_states=True),
    )  # fmt: skip


def hf_git():
    """The image's tokens, then the words, in one decoder."""
    model = made("GitForCausalLM", "GitConfig", vision_config=IMAGE, **WORDS)
    specs = selfs("image", "git.image_encoder.vision_model.encoder.layers", LAYERS, "", "self_attn")
    specs += selfs("joint", "git.encoder.layer", LAYERS, "attention", "attention.output.dropout")
    places = number(image=10, text=17)  # the words are where they are among all tokens
    places["joint"] = [*places["image"], *places["text"][10:]]
    return Case(
        model, {"input_ids": ids(2, 7), "pixel_values": pixels(2)}, lambda o: o.logits[:, -2, 9], specs,
        places, [10 + 15], streams={"image": "image", "text": "text"}, forward=in_double,
    )  # fmt: skip


def among_words(model, image, queries, layers, added, specs):
    """A decoder that has tokens of an image, or queries of it, at the places 2, 3, ... of its words."""
    count = queries or image
    tokens = ids(2, 5 + count)
    tokens[:, 2 : 2 + count] = 2
    places = number(image=image, **({"queries": queries} if queries else {}), text=5 + count)
    joint = list(places["text"])
    joint[2 : 2 + count] = places["queries"] if queries else places["image"]
    places["joint"] = joint
    specs = [*specs, *selfs("joint", layers, LAYERS, "", added)]
    names = ("image", "queries", "text") if queries else ("image", "text")
    return Case(
        model, {"input_ids": tokens, "pixel_values": pixels(2)}, lambda o: o.logits[:, -2, 9], specs, places,
        [joint[-2]], streams={name: name for name in names},
    )  # fmt: skip


def hf_paligemma():
    words = {**WORDS, "num_key_value_heads": 1, "head_dim": 4, "model_type": "gemma"}
    vision = {**IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False}
    model = made(
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", vision_config=vision, text_config=words,
        image_token_index=2, projection_dim=D,
    )  # fmt: skip
    specs = selfs("image", "model.vision_tower.encoder.layers", LAYERS, "", "self_attn")
    return among_words(model, 9, 0, "model.language_model.layers", "self_attn", specs)


def qformer(at, image):
    specs = selfs("image", f"{image}.encoder.layers", LAYERS, "", "self_attn")
    for n in range(LAYERS):
        for part, keys in (("attention", "queries"), ("crossattention", "image")):
            path = f"{at}.encoder.layer.{n}.{part}"
            specs.append(Spec("queries", keys, path, f"{path}.output.dropout"))
    return specs


def hf_blip2():
    """Learned queries read the image; a decoder has them among its words."""
    config = transformers.Blip2Config(
        vision_config=IMAGE,
        qformer_config={**WORDS, "encoder_hidden_size": D, "cross_attention_frequency": 1},
        text_config={**WORDS, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": D},
        num_query_tokens=3, image_token_index=2,
    )  # fmt: skip
    model = ready(transformers.Blip2ForConditionalGeneration(config))
    specs = qformer("qformer", "vision_model")
    return among_words(model, 10, 3, "language_model.model.decoder.layers", "self_attn", specs)


CASES = {make.__name__: make for make in (
    hf_deit, hf_vit_msn, hf_ijepa, hf_vit_mae, hf_dinov2_with_registers, hf_dinov3, hf_beit,
    hf_mpnet, hf_modernbert, hf_albert,
    hf_altclip, hf_chinese_clip, hf_metaclip_2, hf_owlvit, hf_owlv2, hf_siglip2, hf_flava, hf_git,
    hf_paligemma, hf_blip2,
)}  # fmt: skip


CASES["hf_umt5"] = lambda: base.hf_t5(transformers.UMT5Config, transformers.UMT5ForConditionalGeneration)


CASES |= {f"hf_{kind}": lambda kind=kind: encoder_of_text(kind) for kind in TEXT}


CASES |= {f"hf_{kind}": lambda kind=kind: decoder(kind) for kind in DECODERS}


CASES |= {f"hf_{kind}": lambda kind=kind: encoder_decoder(kind) for kind in ENCODER_DECODERS}
