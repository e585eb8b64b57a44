"""Families of other people's models, tiny and with random weights; and each against naive float64 code."""

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from clipmapper.relevance import METHODS, record
from support import naive_any, naive_relevance, tiny_models
from support.naive_any import Spec, number, selfs

transformers = pytest.importorskip("transformers")

D, HEADS, LAYERS = 16, 4, 2
TOLERANCE = {"rtol": 1e-8, "atol": 1e-12}


@dataclass
class Case:
    """How a model is run, and by hand what the naive implementation needs to know of it."""

    model: nn.Module
    inputs: dict  # of a batch of 2
    y: object  # outputs -> [batch]
    specs: list[Spec]
    places: dict  # stream -> numbers of its tokens, of an unpadded sample
    reads: list  # numbers of tokens
    attentions: object = None  # outputs -> probabilities in order of specs; None: take slow attention
    streams: dict | None = None  # product's stream -> naive's, where they differ
    lengths: tuple = (None, None)  # unpadded length of the text of each sample
    text: str = "text"
    forward: object = None  # (model, inputs) -> outputs
    tokens_first: bool = False

    def run(self, model, inputs):
        return model(**inputs) if self.forward is None else self.forward(model, inputs)


def ready(model, seed=0):
    model = model.double().eval()
    tiny_models.randomise(model, seed)
    return model


def ids(batch, length, low=3, high=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (batch, length), generator=generator)


def pixels(batch, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


SMALL = {
    "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 24,
}  # fmt: skip


IMAGE = {**SMALL, "image_size": 12, "patch_size": 4}


WORDS = {**SMALL, "vocab_size": 40, "max_position_embeddings": 24}


def hf_vit():
    model = ready(transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=5)))
    return Case(
        model, {"pixel_values": pixels(2)}, lambda o: o.logits[:, 2],
        selfs("image", "vit.layers", LAYERS, "", "attention"),
        number(image=10), [0], lambda o: o.attentions,
    )  # fmt: skip


def hf_dinov2():
    config = transformers.Dinov2Config(
        hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, mlp_ratio=2, image_size=12,
        patch_size=4, layerscale_value=0.5,
    )  # fmt: skip
    model = ready(transformers.Dinov2Model(config))
    return Case(
        model, {"pixel_values": pixels(2)}, lambda o: o.pooler_output[:, 2],
        selfs("image", "encoder.layer", LAYERS, "", "layer_scale1"),
        number(image=10), [0], lambda o: o.attentions,
    )  # fmt: skip


def encoder_of_text(model, path, x, a, y, pad_id=0):
    tokens, lengths = ids(2, 7), (7, 5)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": torch.where(mask, tokens, pad_id), "attention_mask": mask.long()}
    return Case(
        model, inputs, y, selfs("text", path, LAYERS, x, a), number(text=7), [0],
        lambda o: o.attentions, lengths=lengths,
    )  # fmt: skip


def hf_bert():
    model = ready(transformers.BertForSequenceClassification(transformers.BertConfig(**WORDS, num_labels=3)))
    path = "bert.encoder.layer"
    return encoder_of_text(model, path, "attention", "attention.output.dropout", lambda o: o.logits[:, 1])


def hf_roberta():
    config = transformers.RobertaConfig(**WORDS, num_labels=3, pad_token_id=1)
    model = ready(transformers.RobertaForSequenceClassification(config))
    path = "roberta.encoder.layer"
    return encoder_of_text(
        model, path, "attention", "attention.output.dropout", lambda o: o.logits[:, 1], pad_id=1
    )


def hf_xlm_roberta():
    config = transformers.XLMRobertaConfig(**WORDS, num_labels=3, pad_token_id=1)
    model = ready(transformers.XLMRobertaForSequenceClassification(config))
    path = "roberta.encoder.layer"
    return encoder_of_text(
        model, path, "attention", "attention.output.dropout", lambda o: o.logits[:, 1], pad_id=1
    )


def hf_m2m100():
    """The encoder of NLLB, a text tower of open_clip's."""
    config = transformers.M2M100Config(
        d_model=D, encoder_layers=LAYERS, decoder_layers=1, encoder_attention_heads=HEADS, encoder_ffn_dim=24,
        vocab_size=40, max_position_embeddings=24, pad_token_id=1,
    )  # fmt: skip
    model = ready(transformers.M2M100Model(config).encoder)
    return encoder_of_text(model, "layers", "", "self_attn", lambda o: o.last_hidden_state[:, 0, 3], pad_id=1)


def hf_distilbert():
    config = transformers.DistilBertConfig(
        dim=D, n_layers=LAYERS, n_heads=HEADS, hidden_dim=24, vocab_size=40, max_position_embeddings=24
    )
    model = ready(transformers.DistilBertForSequenceClassification(config))
    path = "distilbert.transformer.layer"
    return encoder_of_text(model, path, "", "attention", lambda o: o.logits[:, 1])


def decoder(model, path, a):
    return Case(
        model, {"input_ids": ids(2, 7)}, lambda o: o.logits[:, 5, 9], selfs("text", path, LAYERS, "", a),
        number(text=7), [5], lambda o: o.attentions,
    )  # fmt: skip


def hf_gpt2():
    config = transformers.GPT2Config(
        n_embd=D, n_layer=LAYERS, n_head=HEADS, n_inner=24, vocab_size=40, n_positions=24
    )
    return decoder(ready(transformers.GPT2LMHeadModel(config)), "transformer.h", "attn")


def hf_llama():
    config = transformers.LlamaConfig(**WORDS, num_key_value_heads=2)
    return decoder(ready(transformers.LlamaForCausalLM(config)), "model.layers", "self_attn")


def hf_mistral():
    config = transformers.MistralConfig(**WORDS, num_key_value_heads=2, sliding_window=None)
    return decoder(ready(transformers.MistralForCausalLM(config)), "model.layers", "self_attn")


def hf_qwen2():
    config = transformers.Qwen2Config(**WORDS, num_key_value_heads=1)
    return decoder(ready(transformers.Qwen2ForCausalLM(config)), "model.layers", "self_attn")


def hf_gpt2_reading():
    """With cross-attention to tokens that no sub-layer of its own changes."""
    config = transformers.GPT2Config(
        n_embd=D, n_layer=LAYERS, n_head=HEADS, n_inner=24, vocab_size=40, n_positions=24,
        add_cross_attention=True,
    )  # fmt: skip
    specs = []
    for n in range(LAYERS):
        at = f"transformer.h.{n}"
        specs.append(Spec("text", "text", at, f"{at}.attn"))
        specs.append(Spec("text", "context", f"{at}.ln_cross_attn", f"{at}.crossattention"))
    read = torch.randn(2, 6, D, dtype=torch.float64)
    return Case(
        ready(transformers.GPT2LMHeadModel(config)), {"input_ids": ids(2, 7), "encoder_hidden_states": read},
        lambda o: o.logits[:, 5, 9], specs, number(text=7, context=6), [5],
    )  # fmt: skip


def hf_mt5():
    return hf_t5(transformers.MT5Config, transformers.MT5ForConditionalGeneration)


def attentions_of_both(o):
    """Sub-layers of an encoder and a decoder, in the order in which they ran."""
    decoders = [A for pair in zip(o.decoder_attentions, o.cross_attentions, strict=True) for A in pair]
    return [*o.encoder_attentions, *decoders]


def hf_t5(kind=transformers.T5Config, model=transformers.T5ForConditionalGeneration):
    config = kind(
        d_model=D, d_kv=4, d_ff=24, num_layers=LAYERS, num_heads=HEADS, vocab_size=40,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = ready(model(config))
    tokens, lengths = ids(2, 7), (7, 5)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    inputs = {
        "input_ids": tokens * mask, "attention_mask": mask.long(), "decoder_input_ids": ids(2, 4, seed=1),
    }  # fmt: skip
    specs = selfs("encoder", "encoder.block", LAYERS, "layer.0", "layer.0.dropout")
    for n in range(LAYERS):
        at = f"decoder.block.{n}.layer"
        specs.append(Spec("decoder", "decoder", f"{at}.0", f"{at}.0.dropout"))
        specs.append(Spec("decoder", "encoder", f"{at}.1", f"{at}.1.dropout"))

    return Case(
        model, inputs, lambda o: o.logits[:, 2, 9], specs, number(encoder=7, decoder=4), [7 + 2],
        attentions_of_both,
        lengths=lengths, text="encoder",
    )  # fmt: skip


def hf_clip():
    config = transformers.CLIPConfig(
        text_config={**WORDS, "eos_token_id": 39}, vision_config=IMAGE, projection_dim=8
    )
    model = ready(transformers.CLIPModel(config))
    tokens = ids(2, 7)
    tokens[0, 4] = tokens[1, 4] = 39
    specs = selfs("image", "vision_model.encoder.layers", LAYERS, "", "self_attn")
    specs += selfs("text", "text_model.encoder.layers", LAYERS, "", "self_attn")
    return Case(
        model, {"input_ids": tokens, "pixel_values": pixels(2)}, lambda o: o.logits_per_image.diagonal(),
        specs, number(image=10, text=7), [0, 10 + 4],
    )  # fmt: skip


def hf_siglip():
    config = transformers.SiglipConfig(text_config=WORDS, vision_config=IMAGE)
    model = ready(transformers.SiglipModel(config))
    specs = selfs("image", "vision_model.encoder.layers", LAYERS, "", "self_attn")
    specs += [Spec("pool", "image", None, "vision_model.head.attention")]
    specs += selfs("text", "text_model.encoder.layers", LAYERS, "", "self_attn")
    return Case(
        model, {"input_ids": ids(2, 7), "pixel_values": pixels(2)}, lambda o: o.logits_per_image.diagonal(),
        specs, number(image=9, pool=1, text=7), [9, 10 + 6],
    )  # fmt: skip


def hf_lxmert():
    config = transformers.LxmertConfig(
        vocab_size=40, hidden_size=D, num_attention_heads=HEADS, intermediate_size=24, l_layers=2, r_layers=1,
        x_layers=2, visual_feat_dim=6, num_qa_labels=5, max_position_embeddings=24,
    )  # fmt: skip
    model = ready(transformers.LxmertForQuestionAnswering(config))
    tokens, lengths = ids(2, 7), (7, 5)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    inputs = {
        "input_ids": tokens * mask, "attention_mask": mask.long(),
        "visual_feats": torch.randn(2, 6, 6, dtype=torch.float64),
        "visual_pos": torch.rand(2, 6, 4, dtype=torch.float64),
    }  # fmt: skip
    encoder = "lxmert.encoder"
    out = "output.dropout"
    specs = selfs("text", f"{encoder}.layer", 2, "attention", f"attention.{out}")
    specs += selfs("image", f"{encoder}.r_layers", 1, "attention", f"attention.{out}")
    for n in range(2):
        at, before = f"{encoder}.x_layers.{n}", len(specs)
        shared = f"{at}.visual_attention"
        specs.append(Spec("text", "image", shared, f"{shared}.{out}", before))
        specs.append(Spec("image", "text", shared, f"{shared}.{out}", before))
        for stream, part in (("text", "lang"), ("image", "visn")):
            specs.append(Spec(stream, stream, f"{at}.{part}_self_att", f"{at}.{part}_self_att.{out}"))
    return Case(
        model, inputs, lambda o: o.question_answering_score[:, 3], specs, number(text=7, image=6), [0],
        lengths=lengths,
    )  # fmt: skip


def hf_visual_bert():
    config = transformers.VisualBertConfig(**WORDS, visual_embedding_dim=6, num_labels=4)
    model = ready(transformers.VisualBertForVisualReasoning(config))
    inputs = {
        "input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7),
        "visual_embeds": torch.randn(2, 5, 6, dtype=torch.float64),
        "visual_attention_mask": torch.ones(2, 5), "visual_token_type_ids": torch.ones(2, 5).long(),
    }  # fmt: skip
    specs = selfs("joint", "visual_bert.encoder.layer", LAYERS, "attention", "attention.output.dropout")
    return Case(
        model, inputs, lambda o: o.logits[:, 1], specs, number(joint=12), [0], lambda o: o.attentions,
        text="joint",
    )  # fmt: skip


def hf_vilt():
    config = transformers.ViltConfig(**{**WORDS, **IMAGE}, num_labels=4, max_image_length=9)
    model = ready(transformers.ViltForQuestionAnswering(config))
    inputs = {
        "input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7).long(), "pixel_values": pixels(2),
        "pixel_mask": torch.ones(2, 12, 12).long(),
    }  # fmt: skip
    specs = selfs("joint", "vilt.encoder.layer", LAYERS, "", "attention")

    def forward(model, inputs):
        shuffle = torch.multinomial  # ViLT puts the patches in random order
        torch.multinomial = lambda weights, count, **more: torch.arange(count)
        try:
            return model(**inputs)
        finally:
            torch.multinomial = shuffle

    return Case(
        model, inputs, lambda o: o.logits[:, 1], specs, number(joint=17), [0], lambda o: o.attentions,
        text="joint", forward=forward,
    )  # fmt: skip


def hf_blip():
    words = {**WORDS, "encoder_hidden_size": D, "bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    config = transformers.BlipConfig(text_config=words, vision_config=IMAGE, projection_dim=8)
    config.text_config.encoder_hidden_size = D
    model = ready(transformers.BlipForImageTextRetrieval(config))
    specs = selfs("image", "vision_model.encoder.layers", LAYERS, "", "self_attn")
    for n in range(LAYERS):
        at = f"text_encoder.encoder.layer.{n}"
        for part, keys in (("attention", "text"), ("crossattention", "image")):
            specs.append(Spec("text", keys, f"{at}.{part}", f"{at}.{part}.output.dropout"))
    inputs = {"input_ids": ids(2, 7), "pixel_values": pixels(2)}
    return Case(
        model, inputs, lambda o: o.itm_score[:, 1], specs, number(image=10, text=7), [10],
    )  # fmt: skip


def hf_llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**IMAGE, "num_hidden_layers": 3}),
        text_config=transformers.LlamaConfig(**WORDS, num_key_value_heads=2), image_token_index=2,
    )  # fmt: skip
    model = ready(transformers.LlavaForConditionalGeneration(config))
    tokens = ids(2, 14)
    tokens[:, 2:11] = 2  # 9 patches; the class token is left behind
    specs = selfs("image", "model.vision_tower.encoder.layers", 3, "", "self_attn")
    # The projector is given the state before the last layer.
    specs += selfs("joint", "model.language_model.layers", LAYERS, "", "self_attn")
    case = Case(
        model, {"input_ids": tokens, "pixel_values": pixels(2)}, lambda o: o.logits[:, 12, 9], specs,
        {"image": list(range(10)), "text": [10 + n for n in range(14)]}, [10 + 10],
    )  # fmt: skip
    return case


def torch_encoder(batch_first=True, norm_first=False):
    layer = nn.TransformerEncoderLayer(D, HEADS, 24, batch_first=batch_first, norm_first=norm_first)
    model = ready(nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False))
    tokens = torch.randn(2, 7, D, dtype=torch.float64)
    return Case(
        model, {"src": tokens if batch_first else tokens.transpose(0, 1)},
        lambda o: o[:, 3, 2] if batch_first else o[3, :, 2],
        selfs("tokens", "layers", LAYERS, "", "dropout1"), number(tokens=7), [3],
        tokens_first=not batch_first,
    )  # fmt: skip


def torch_transformer(batch_first=True, norm_first=False):
    with warnings.catch_warnings():  # that nested tensors are not used
        warnings.simplefilter("ignore")
        model = nn.Transformer(D, HEADS, LAYERS, LAYERS, 24, batch_first=batch_first, norm_first=norm_first)
    ready(model)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    source, target = (torch.randn(2, n, D, dtype=torch.float64) for n in (7, 5))
    specs = selfs("encoder", "encoder.layers", LAYERS, "", "dropout1")
    for n in range(LAYERS):
        at = f"decoder.layers.{n}"
        specs.append(Spec("decoder", "decoder", at, f"{at}.dropout1"))
        crossing = "norm2" if norm_first else "multihead_attn"
        specs.append(Spec("decoder", "encoder", f"{at}.{crossing}", f"{at}.dropout2"))
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    return Case(
        model, {"src": turn(source), "tgt": turn(target), "tgt_mask": mask},
        lambda o: turn(o)[:, 3, 2], specs, number(encoder=7, decoder=5), [7 + 3],
        tokens_first=not batch_first,
    )  # fmt: skip


class Plain(nn.Module):
    """Bare nn.MultiheadAttention, post-norm; the second is called twice, and weights are asked for."""

    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Linear(5, D)
        self.one = nn.MultiheadAttention(D, HEADS, batch_first=batch_first)
        self.two = nn.MultiheadAttention(D, HEADS, batch_first=batch_first)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 3)
        self.tokens = 1 if batch_first else 0

    def forward(self, tokens, need_weights=True):
        x = self.embed(tokens)
        for layer in (self.one, self.two, self.two):
            x = self.norm(x + layer(x, x, x, need_weights=need_weights)[0])
        return self.head(x.select(self.tokens, 0))


def torch_multihead(batch_first=True):
    model = ready(Plain(batch_first))
    tokens = torch.randn(2, 7, 5, dtype=torch.float64)
    specs = [Spec("tokens", "tokens", path, path) for path in ("one", "two", "two")]
    return Case(
        model, {"tokens": tokens if batch_first else tokens.transpose(0, 1)}, lambda o: o[:, 1], specs,
        number(tokens=7), [0], tokens_first=not batch_first,
    )  # fmt: skip


def open_clip_model(tmp, kind):
    from clipmapper.models.clip_weights import build_clip

    return ready(build_clip(tiny_models.clip_config(tmp, kind), None))


def open_clip_similarity(tmp, kind):
    model = open_clip_model(tmp, kind)
    length = tiny_models.CONTEXT_LENGTH
    tokens = ids(2, length, high=30)
    tokens[:, 6] = 39  # the end token is the highest number
    text = "transformer" if kind == "causal" else "text.transformer"
    specs = selfs("image", "visual.transformer.resblocks", 2, "", "ls_1")
    specs += selfs("text", f"{text}.resblocks", 2, "", "ls_1")

    def forward(model, inputs):
        image, words = model.encode_image(inputs["image"]), model.encode_text(inputs["text"])
        return (nn.functional.normalize(image, dim=-1) * nn.functional.normalize(words, dim=-1)).sum(-1)

    appended = kind == "class_token"
    read = {"causal": 6, "unmasked": 6, "class_token": length}[kind]
    return Case(
        model, {"image": pixels(2), "text": tokens}, lambda o: o, specs,
        number(image=10, text=length + appended), [0, 10 + read], forward=forward,
    )  # fmt: skip


def open_clip_tower():
    import open_clip

    model = ready(open_clip.transformer.VisionTransformer(12, 4, D, LAYERS, HEADS, 2.0, output_dim=8))
    return Case(
        model, {"x": pixels(2)}, lambda o: o[:, 1],
        selfs("image", "transformer.resblocks", LAYERS, "", "ls_1"), number(image=10), [0],
    )  # fmt: skip


def open_clip_custom():
    """Queries and keys normalised, heads scaled, norms inside and behind attention, as its options allow."""
    import open_clip

    vision = open_clip.transformer.VisionTransformer(
        12, 4, D, LAYERS, HEADS, 2.0, output_dim=8, ls_init_value=0.5, qk_norm=True, scale_heads=True,
        scale_attn_inner=True, scale_attn=True, scale_fc=True,
    )  # fmt: skip
    assert type(vision.transformer.resblocks[0]).__name__ == "CustomResidualAttentionBlock"
    return Case(
        ready(vision), {"x": pixels(2)}, lambda o: o[:, 1],
        selfs("image", "transformer.resblocks", LAYERS, "", "ls_1"), number(image=10), [0],
    )  # fmt: skip


def open_clip_custom_text():
    """The same blocks behind a causal mask."""
    import open_clip

    text = open_clip.transformer.TextTransformer(
        7, 40, D, HEADS, LAYERS, 2.0, output_dim=8, qk_norm=True, scale_attn=True
    )
    assert type(text.transformer.resblocks[0]).__name__ == "CustomResidualAttentionBlock"
    tokens = ids(2, 7)
    tokens[:, 5] = 39  # the end token is the highest number
    return Case(
        ready(text), {"text": tokens}, lambda o: o[:, 1],
        selfs("text", "transformer.resblocks", LAYERS, "", "ls_1"), number(text=7), [5],
    )  # fmt: skip


def open_clip_coca():
    """Image tower, pooled into 1 + 3 tokens; text tower with a class token; a decoder that reads both."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 40, "width": D, "heads": HEADS, "layers": 2}
    vision = {
        "image_size": 12, "patch_size": 4, "layers": 2, "width": D, "head_width": 4, "output_tokens": True,
        "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2,
    }  # fmt: skip
    model = open_clip.CoCa(
        D,
        multimodal_cfg={**text, "mlp_ratio": 2},
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        vision_cfg=vision,
    )
    specs = selfs("image", "visual.transformer.resblocks", 2, "", "ls_1")
    specs.append(Spec("pool", "image", None, "visual.attn_pool.attn"))
    specs += selfs("text", "text.transformer.resblocks", 2, "", "ls_1")
    for n in range(2):
        at = "text_decoder"
        specs.append(Spec("words", "words", f"{at}.resblocks.{n}", f"{at}.resblocks.{n}.ls_1"))
        specs.append(Spec("words", "read", f"{at}.cross_attn.{n}", f"{at}.cross_attn.{n}.ls_1"))
    # The decoder is given all pooled tokens but the first, and the words but the last and the class token.
    places = number(image=10, pool=4, text=9)
    places |= {"read": places["pool"][1:], "words": places["text"][:7]}
    return Case(
        ready(model), {"image": pixels(2), "text": ids(2, 8)}, lambda o: o["logits"][:, 5, 9], specs, places,
        [places["text"][5]], streams={"image": "image", "pool": "pool", "text": "text"},
    )  # fmt: skip


def timm_vit(**more):
    import timm

    model = timm.models.vision_transformer.VisionTransformer(
        12, 4, embed_dim=D, depth=LAYERS, num_heads=HEADS, num_classes=5, init_values=0.5, **more
    )
    return ready(model)


def timm_relative_positions():
    """Biases of the scores, by MLP of a distance (relpos) with LayerScale."""
    import timm

    model = timm.models.vision_transformer_relpos.VisionTransformerRelPos(
        12, 4, embed_dim=D, depth=LAYERS, num_heads=HEADS, num_classes=5, class_token=True,
        global_pool="token", init_values=0.5,
    )  # fmt: skip
    return Case(
        ready(model), {"x": pixels(2)}, lambda o: o[:, 1],
        selfs("image", "blocks", LAYERS, "", "drop_path1"), number(image=10), [0],
    )  # fmt: skip


def timm_beit():
    """Biases of the scores, from a table of relative positions."""
    import timm

    model = timm.models.beit.Beit(
        12, 4, embed_dim=D, depth=LAYERS, num_heads=HEADS, num_classes=5, use_rel_pos_bias=True,
        use_abs_pos_emb=False, init_values=0.5, global_pool="token",
    )  # fmt: skip
    return Case(
        ready(model), {"x": pixels(2)}, lambda o: o[:, 1],
        selfs("image", "blocks", LAYERS, "", "drop_path1"), number(image=10), [0],
    )  # fmt: skip


class Repeating(nn.Module):
    """One block, three times, as in ALBERT."""

    def __init__(self, norm_first):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(D, HEADS, 24, batch_first=True, norm_first=norm_first)

    def forward(self, tokens):
        for _ in range(3):
            tokens = self.block(tokens)
        return tokens


def shared_block(norm_first=True):
    specs = [Spec("tokens", "tokens", "block", "block.dropout1")] * 3
    return Case(
        ready(Repeating(norm_first)), {"tokens": torch.randn(2, 7, D, dtype=torch.float64)},
        lambda o: o[:, 3, 2], specs, number(tokens=7), [3],
    )  # fmt: skip


def timm_norm_behind():
    from timm.models.vision_transformer import ResPostBlock

    return Case(
        timm_vit(block_fn=ResPostBlock), {"x": pixels(2)}, lambda o: o[:, 1],
        selfs("image", "blocks", LAYERS, "", "drop_path1"), number(image=10), [0],
    )  # fmt: skip


def timm_eva(**more):
    """Rotary positions and gated MLPs."""
    import timm

    model = timm.models.eva.Eva(
        12, 4, embed_dim=D, depth=LAYERS, num_heads=HEADS, num_classes=5, use_rot_pos_emb=True,
        swiglu_mlp=True, init_values=0.5, global_pool="token", ref_feat_shape=(3, 3), **more,
    )  # fmt: skip
    return Case(
        ready(model), {"x": pixels(2)}, lambda o: o[:, 1],
        selfs("image", "blocks", LAYERS, "", "drop_path1"), number(image=10), [0],
    )  # fmt: skip


def timm_eva_post_norm():
    return timm_eva(use_post_norm=True)


def timm_class_token():
    return Case(
        timm_vit(), {"x": pixels(2)}, lambda o: o[:, 1], selfs("image", "blocks", LAYERS, "", "drop_path1"),
        number(image=10), [0],
    )  # fmt: skip


def timm_pooled_by_attention():
    specs = selfs("image", "blocks", LAYERS, "", "drop_path1")
    specs.append(Spec("pool", "image", None, "attn_pool.proj_drop"))
    return Case(
        timm_vit(class_token=False, global_pool="map"), {"x": pixels(2)}, lambda o: o[:, 1], specs,
        number(image=9, pool=1), [9],
    )  # fmt: skip


CASES = {
    make.__name__: make
    for make in (
        hf_vit, hf_dinov2, hf_bert, hf_roberta, hf_distilbert, hf_gpt2, hf_llama, hf_t5, hf_clip, hf_siglip,
        hf_lxmert, hf_visual_bert, hf_vilt, hf_blip, open_clip_tower, open_clip_coca, timm_class_token,
        open_clip_custom, open_clip_custom_text, hf_xlm_roberta, hf_m2m100, hf_mt5,
        timm_relative_positions, timm_beit,
        timm_pooled_by_attention, hf_mistral, hf_qwen2, hf_gpt2_reading, shared_block, timm_norm_behind,
        timm_eva, timm_eva_post_norm,
    )
}  # fmt: skip


for first in (True, False):
    for make in (torch_encoder, torch_transformer):
        for norm in (True, False):
            name = f"{make.__name__}, batch_first={first}, norm_first={norm}"
            CASES[name] = lambda make=make, first=first, norm=norm: make(first, norm)
    CASES[f"torch_multihead, batch_first={first}"] = lambda first=first: torch_multihead(first)


def naive_runs(case, row, rules="plain", around=nullcontext):
    """The naive runs of one sample, without its padding, inside the context ``around(model)``."""
    model = copy.deepcopy(case.model)
    if case.attentions is not None:
        model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(
                lambda m, args, kwargs: (args, {**kwargs, "need_weights": False}), with_kwargs=True
            )
    model.requires_grad_(True)
    sample = slice(row, row + 1)
    inputs = {}
    for name, value in case.inputs.items():
        if name != "tgt_mask":
            value = value[:, sample] if case.tokens_first else value[sample]
            if value.is_floating_point() and not name.endswith("mask"):
                value = value.clone().requires_grad_()
        inputs[name] = value
    length = case.lengths[row]
    if length is not None:
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, :length]
    places, shift = dict(case.places), 0
    if length is not None:
        places = number(**{s: length if s == case.text else len(p) for s, p in places.items()})
        shift = case.lengths[0] - length
    reads = [r - shift if shift and r >= case.lengths[0] else r for r in case.reads]
    if case.attentions is not None:
        inputs["output_attentions"] = True

    def forward():
        outputs = case.run(model, inputs)
        return case.y(outputs)[0], None if case.attentions is None else case.attentions(outputs)

    with around(model):
        runs = naive_any.run(model, case.specs, places, reads, forward, case.tokens_first, rules)
    return runs, places


def check_joined(case, trace):
    """LLaVA: the naive run sees one stream of words and patches, the image tower's behind it.

    Relevance of the joint tokens as naive rows; of those that are patches taken on through the image tower.
    """
    results = {name: METHODS[name](trace) for name in ("weighted", "rollout")}
    for row in range(2):
        model = copy.deepcopy(case.model).requires_grad_(True)
        inputs = {name: value[row : row + 1] for name, value in case.inputs.items()}
        places = {"image": list(range(10)), "joint": list(range(10, 24))}

        def forward(model=model, inputs=inputs):
            return case.y(case.run(model, inputs))[0], None

        (run,) = naive_any.run(model, case.specs, places, case.reads, forward)
        # The third image layer does not reach y; the joint tokens 2..10 are the patches in state 2.
        language = naive_any.Run(
            [replace(s, keys_state=n) for n, s in enumerate(run.sublayers[3:])], 24, 10 + 12, run.logits
        )
        tower = naive_any.Run(run.sublayers[:2], 24, None, run.logits)
        for name, result in results.items():
            method = naive_relevance.METHODS[name]
            joint = method(language)[10:]
            image = torch.zeros(10, dtype=joint.dtype)
            for patch in range(9):
                tower.read = 1 + patch
                image += joint[2 + patch] * method(tower)[:10]
            text = joint.clone()
            text[2:11] = 0
            torch.testing.assert_close(result.streams["image"][row], image, **TOLERANCE)
            torch.testing.assert_close(result.streams["text"][row], text, **TOLERANCE)


def check(case):
    with torch.no_grad():
        plain = case.y(case.run(case.model, case.inputs))
        with record(case.model) as trace:
            y = case.y(case.run(case.model, case.inputs))
        trace.backward(y)
    torch.testing.assert_close(y.detach(), plain, rtol=0, atol=1e-9)
    assert len(trace.attention) == len(case.specs)
    names = case.streams or {stream: stream for stream in case.places}
    results = {name: METHODS[name](trace) for name in ("weighted", "gae", "rollout")}
    for row in range(2):
        runs, places = naive_runs(case, row)
        torch.testing.assert_close(runs[0].logits, plain[row], rtol=0, atol=1e-9)
        for name in naive_any.METHODS:
            values = naive_any.relevance(runs, name)
            assert (values > 0.001 * values.max()).sum() >= 3, "an example that proves nothing"
            assert set(results[name].streams) == set(names)
            for stream, source in names.items():
                found, expected = results[name].streams[stream][row], values[places[source]]
                torch.testing.assert_close(
                    found[: len(expected)], expected, **TOLERANCE,
                    msg=lambda m, n=name, s=stream, r=row: f"{n}, sample {r}, {s}: {m}",
                )  # fmt: skip
                assert not found[len(expected) :].any()
    return trace
