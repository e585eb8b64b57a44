"""More families of transformers, by the same comparison with a naive float64 implementation."""

from collections import defaultdict

import pytest
import torch
from support import families as base
from support.families import IMAGE, LAYERS, SMALL, WORDS, Case, D, check, ids, pixels
from support.more_families import CASES, TEXT, made
from support.naive_any import number, selfs
from support.recordings import unmarked

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, record
from clipmapper.relevance.recording.families import TRANSFORMERS

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_naive_implementation(name):
    case = CASES[name]()
    trace = check(case)
    check_projections(case, trace, name)
    if trace.image_stream is not None and name != "hf_siglip2":  # whose patches come as such
        assert trace.grid == (3, 3) and METHODS["rollout"](trace).image.shape == (2, 3, 3)
    assert (trace.image_stream is None) == ("pixel_values" not in case.inputs or name == "hf_vit_mae")


NORM_BEHIND = ("hf_gemma2", "hf_gemma3", "hf_olmo2", "hf_olmo3", "hf_exaone4")  # RMSNorm: no projection
POST_NORM = {  # streams whose norms come after the additions
    **{f"hf_{kind}": ("text",) for kind in TEXT},
    **dict.fromkeys(
        ("hf_mpnet", "hf_albert", "hf_altclip", "hf_chinese_clip", "hf_opt, norm behind"), ("text",)
    ),
    **dict.fromkeys(("hf_bart", "hf_marian", "hf_blenderbot-small"), ("encoder", "decoder")),
    "hf_git": ("joint",),
    "hf_blip2": ("queries",),
}


def check_projections(case, trace, name):
    """Check that the projection of what was mixed is what is added, and that a norm behind is given x + a."""
    given, handles = defaultdict(list), []
    for norm in {s.projection.norm for s in trace.attention if s.projection and s.projection.norm}:
        keep = lambda module, args: given[module].append(args[0])  # noqa: E731
        handles.append(norm.register_forward_pre_hook(keep))
    with torch.no_grad():
        case.run(case.model, case.inputs)
    for handle in handles:
        handle.remove()
    for step in trace.attention:
        if name in NORM_BEHIND:
            assert step.projection is None
            continue
        assert (step.projection.norm is not None) == (step.query_node.stream in POST_NORM.get(name, ()))
        weight = step.projection.weight(step.mixed.shape[1])
        by_head = torch.einsum("bhnd,hdc->bnc", step.mixed.detach(), weight)
        constant = step.added.detach() - by_head  # the bias
        torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant), rtol=0, atol=1e-9)
        assert by_head.std() > 1e-3
        if step.projection.norm is not None:
            total = given[step.projection.norm].pop(0)
            torch.testing.assert_close(total, (step.before + step.added).detach(), rtol=0, atol=1e-9)


def test_every_family_has_a_case():
    models = [make().model for make in [*base.CASES.values(), *CASES.values(), base.hf_llava]]
    models += [language_part(name)[0] for name in LANGUAGE_PARTS] + [shuffling(name) for name in SHUFFLING]
    seen = {f"{type(m).__module__}.{type(m).__qualname__}" for model in models for m in model.modules()}
    assert not set(TRANSFORMERS) - seen


MULTIMODAL_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
QWEN = {
    "depth": 1,
    "hidden_size": D,
    "num_heads": 4,
    "out_hidden_size": D,
    "patch_size": 4,
    "intermediate_size": 16,
}
LANGUAGE_PARTS = {
    "hf_qwen2_vl": (
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"depth": 1, "embed_dim": 16, "num_heads": 4, "hidden_size": D, "patch_size": 4, "mlp_ratio": 2},
    ),
    "hf_qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", QWEN),
    "hf_qwen3_vl": (
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {**QWEN, "deepstack_visual_indexes": [0]}
    ),
}  # fmt: skip


def language_part(name):
    """A model whose image tower can't be recorded, and its language model."""
    kind, config, more = LANGUAGE_PARTS[name]
    words = {**WORDS, "num_key_value_heads": 2, "rope_parameters": MULTIMODAL_ROPE}
    model = made(kind, config, text_config=words, vision_config=more)
    return model, model.model.language_model


@pytest.mark.parametrize("name", LANGUAGE_PARTS)
def test_the_language_part_of_a_model_whose_image_tower_is_refused(name):
    model, part = language_part(name)
    refused(model, r"visual\.blocks\.0: Qwen\w+Block has the patches of all images")
    x = torch.randn(2, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def forward(part, inputs):
        return part(inputs_embeds=inputs["x"], output_attentions="output_attentions" in inputs)

    case = Case(
        part, {"x": x}, lambda o: o.last_hidden_state[:, 5, 3],
        selfs("text", "layers", LAYERS, "", "self_attn"), number(text=7), [5], lambda o: o.attentions,
        forward=forward,
    )  # fmt: skip
    trace = check(case)
    check_projections(case, trace, name)


def refused(model, message, forward=None):
    with unmarked(model), pytest.raises(UserError, match=message) as caught, record(model):
        forward()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("ParallelScalingBlock", "adds attention and MLP as one"),
        ("ParallelThingsBlock", "has several attentions side by side"),
        ("DiffParallelScalingBlock", "adds the difference of two attentions"),
    ],
)
def test_parallel_blocks_of_timm_are_refused_with_the_reason(block, why):
    from timm.models import vision_transformer

    refused(base.timm_vit(block_fn=getattr(vision_transformer, block)), rf"blocks\.0: {block} {why}")


def test_other_attention_of_timm_is_refused_with_the_reason():
    import timm

    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3}
    refused(
        timm.models.cait.Cait(**small), r"blocks\.0\.attn: TalkingHeadAttn mixes the attention of its heads"
    )
    refused(timm.models.xcit.Xcit(**small), r"blocks\.0\.attn: XCA attends among channels, not among tokens")
    sam = timm.models.vision_transformer_sam.VisionTransformerSAM(
        **{**small, "img_size": 32}, neck_chans=8, window_size=2, use_rel_pos=False
    )
    refused(sam, r"blocks\.0: Block keeps its tokens as an image, .*windows")


GROUPED = {**WORDS, "num_key_value_heads": 2}
WIDE = {"hidden_size": 64}
REFUSED = {
    "Granite": ("ForCausalLM", GROUPED, r"layers\.0\.self_attn: GraniteAttention has its result mult"),
    "DebertaV2": ("Model", WORDS, r"encoder\.layer\.0\.attention: DebertaV2Attention .*disentangled"),
    "BridgeTower": (
        "Model",
        {**SMALL, **WIDE, "text_config": {**WORDS, **WIDE}, "vision_config": {**IMAGE, **WIDE}},
        r"BridgeTower\w+ is in towers whose states",
    ),
    "GptOss": (
        "ForCausalLM", {**GROUPED, "head_dim": 4, "num_local_experts": 2},
        "GptOssAttention has a learned sink",
    ),
    "Longformer": ("Model", {**WORDS, "attention_window": 2}, "LongformerAttention attends in blocks"),
    "Gemma2": ("ForCausalLM", {**GROUPED, "head_dim": 4}, r"layers\.0\.self_attn: caps its scores \(.*=50"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_attention_of_transformers_that_cannot_be_recorded_says_why(name):
    kind, config, message = REFUSED[name]
    refused(made(name + kind, f"{name}Config", **config), message)


SHUFFLING = ("SmolVLM", "Idefics3")


def shuffling(name):
    return made(
        f"{name}ForConditionalGeneration", f"{name}Config", vision_config={**IMAGE, "image_size": 16},
        text_config={**WORDS, "model_type": "llama"}, scale_factor=2, image_token_id=2,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHUFFLING)
def test_patches_that_are_merged_before_the_words_read_them_are_refused(name):
    """They shuffle 2 × 2 patches into one token; their parts can be recorded."""
    model = shuffling(name)
    tokens = ids(1, 8)
    tokens[:, 2:6] = 2
    inputs = {"input_ids": tokens, "pixel_values": pixels(1, 16)[:, None]}
    message = r"model\.text_model\.layers\.0: its tokens are no selection of the tokens of image"
    refused(model, message, lambda: model(**inputs))
    for part, stream in ((model.model.text_model, "text"), (model.model.vision_model, "image")):
        with record(part) as trace:
            y = model(**inputs).logits[:, -1, 3]
        trace.backward(y)
        assert trace.inputs == (stream,)
        relevance = METHODS["weighted"](trace)
        if stream == "text":
            assert relevance.text.shape == (1, 8)
        else:
            assert relevance.image.shape == (1, 4, 4)


@pytest.mark.parametrize("stream", ["image", "text"])
def test_a_tower_of_transformers_by_itself_has_its_name(stream):
    case = base.hf_clip()
    tower = {"image": case.model.vision_model, "text": case.model.text_model}[stream]
    with record(tower) as trace:
        case.run(case.model, case.inputs)
    assert trace.inputs == (stream,)
