"""Fine-tuning the encoder: trained blocks and their learning rates, adapters, and other image sizes."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import tiny_models, training_models

import clipmapper
from clipmapper.commands.train import train
from clipmapper.errors import UserError
from clipmapper.models.checkpoint import build_encoder
from clipmapper.models.clip_weights import build_clip, save_clip_weights
from clipmapper.models.encoder import learning_rate_scales, merge_adapters, without_adapters
from clipmapper.training.module import adamw
from clipmapper.training.run_folder import CHECKPOINT

PICTURE = Image.new("RGB", (60, 40))


def timm_clip(folder: Path) -> str:
    """A CLIP whose image tower is timm's, with 4 patches of 16 pixels."""
    vision = {"timm_model_name": "test_vit2", "image_size": 32, "timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": 12, "vocab_size": 40, "width": 12, "heads": 3, "layers": 2}
    path = folder / "tiny-timm-clip-for-tests.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def encoder(folder, **settings):
    torch.manual_seed(0)
    architecture = settings.pop("architecture", None) or tiny_models.clip_config(folder)
    return build_encoder({"architecture": architecture, "pretrained": None, "frozen": False} | settings)


def trained(built) -> set[str]:
    return {name for name, weight in built.clip.named_parameters() if weight.requires_grad}


def test_last_blocks(tmp_path):
    everything = trained(encoder(tmp_path))
    last = ("visual.transformer.resblocks.1.", "visual.ln_post.", "transformer.resblocks.1.", "ln_final.")
    assert trained(encoder(tmp_path, trained_blocks=1)) == {n for n in everything if n.startswith(last)}
    both = {name for name in everything if "resblocks" in name or "ln_post" in name or "ln_final" in name}
    assert trained(encoder(tmp_path, trained_blocks=2)) == both < everything
    assert trained(encoder(tmp_path, frozen=True)) == set()
    with pytest.raises(UserError, match="trained_blocks=3: the image tower has 2 blocks, the text tower 2"):
        encoder(tmp_path, trained_blocks=3)


def test_layer_wise_decay(tmp_path):
    built = encoder(tmp_path)
    mapper = torch.nn.Linear(2, 2)
    module = torch.nn.ModuleList([built, mapper])
    groups = adamw(module, 0.1, 0.3, scales=learning_rate_scales(built, 0.5)).param_groups
    rate = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    expected = {
        "visual.conv1.weight": 0.1 / 8,
        "visual.class_embedding": 0.1 / 8,
        "token_embedding.weight": 0.1 / 8,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 0.1 / 4,
        "visual.transformer.resblocks.1.mlp.c_fc.bias": 0.1 / 2,
        "transformer.resblocks.0.ln_1.weight": 0.1 / 4,
        "visual.ln_post.weight": 0.1,
        "ln_final.bias": 0.1,
    }
    for name, value in expected.items():
        assert rate[id(built.clip.get_parameter(name))] == pytest.approx(value), name
    assert rate[id(mapper.weight)] == 0.1 and set(rate.values()) == {0.1, 0.05, 0.025, 0.0125}
    assert decay[id(mapper.weight)] == 0.3 and decay[id(mapper.bias)] == 0.0
    plain = adamw(module, 0.1, 0.3, scales=learning_rate_scales(built, 1.0)).param_groups
    assert [group["lr"] for group in plain] == [0.1, 0.1]


# Adapters


@pytest.fixture(params=["open_clip", "timm"])
def adapted(request, tmp_path):
    pytest.importorskip("peft")
    if request.param == "timm":
        config = timm_clip(tmp_path)
        return encoder(tmp_path, architecture=config, lora_rank=2, trained_blocks=1)
    return encoder(tmp_path, lora_rank=2, trained_blocks=1)


def tokens(built) -> torch.Tensor:
    side = built.clip.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    text = built.text_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    return torch.cat([built.image_tokens(images).flatten(), text.flatten()])


def randomise_adapters(built) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in built.clip.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def test_adapters_begin_as_nothing_and_only_they_are_trained(adapted, tmp_path):
    names = trained(adapted)
    assert names and all("lora_" in name and "blocks.0." not in name for name in names)
    assert {"visual" in name for name in names} == {True, False}  # both towers
    before = tokens(adapted).detach()
    tokens(adapted).square().sum().backward()
    with_gradient = {name for name, weight in adapted.clip.named_parameters() if weight.grad is not None}
    assert with_gradient == names
    randomise_adapters(adapted)
    assert not torch.allclose(tokens(adapted), before, atol=1e-3)


def test_a_merged_adapter_is_w_and_b_a_unscaled(tmp_path):
    pytest.importorskip("peft")
    built = encoder(tmp_path, lora_rank=2, trained_blocks=1)
    randomise_adapters(built)
    name = "visual.transformer.resblocks.1.mlp.c_fc"
    layer = built.clip.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.get_base_layer().weight + b @ a).detach()
    merge_adapters(built)
    torch.testing.assert_close(built.clip.get_submodule(name).weight, expected)


def test_merged_adapters_compute_the_same(adapted):
    randomise_adapters(adapted)
    adapted.eval()
    expected = tokens(adapted).detach()
    names = set(adapted.clip.state_dict())
    with without_adapters(adapted):
        assert not any("lora" in name for name in adapted.clip.state_dict())
        torch.testing.assert_close(tokens(adapted), expected, atol=1e-5, rtol=1e-4)
    assert set(adapted.clip.state_dict()) == names
    torch.testing.assert_close(tokens(adapted), expected)
    merge_adapters(adapted)
    torch.testing.assert_close(tokens(adapted), expected, atol=1e-5, rtol=1e-4)
    assert not any("peft" in type(module).__module__ for module in adapted.modules())


@pytest.mark.slow
def test_run_with_adapters_loads_and_answers(tmp_path):
    """Validated, explained, saved, and loaded as a plain model."""
    pytest.importorskip("peft")
    architecture = training_models.tiny_clip(tmp_path)
    run = (
        *training_models.SMALL_RUN,
        *("data.train_scenes=24", "data.simple_scenes=16", "training.blind_steps=1", "logger=csv"),
        *("model.width=16", "model.depth=1", "model.heads=2", "callbacks.methods=[weighted]"),
        *("encoder.frozen=false", "encoder.lora_rank=2", "training.layer_decay=0.9"),
        *(f"encoder.architecture={architecture}", f"output={tmp_path}", "callbacks.samples=3"),
    )
    folder = train(training_models.train_settings(*run))
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    adapters = {n: w for n, w in state["state_dict"].items() if "lora_B" in n}
    assert adapters and all(weight.any() for weight in adapters.values())  # they were 0 at first
    assert {entry["lr"] for entry in state["optimizer_states"][0]["param_groups"]} != {0.0}
    model = clipmapper.load(folder / CHECKPOINT)
    assert not any("lora" in name for name in model.state_dict())
    image = training_models.picture(0)
    assert model.answer(image, "is there a red ring?") in model.answers
    assert clipmapper.explain(model, image, "is there a red ring?").patches.shape == (3, 3)


# Other image sizes


@pytest.mark.parametrize("form", ["weights.safetensors", "weights.pt", "sparse.safetensors"])
def test_position_embeddings_are_resized_as_open_clip_does(tmp_path, form):
    architecture = tiny_models.clip_config(tmp_path)
    torch.manual_seed(1)
    clip = build_clip(architecture, None)
    path = tmp_path / form
    if form == "sparse.safetensors":
        save_clip_weights(clip, path, range(tiny_models.VOCABULARY), {})
    elif path.suffix == ".pt":
        torch.save(clip.state_dict(), path)
    else:
        save_file(clip.state_dict(), path)
    built = encoder(tmp_path, pretrained=str(path), image_size=20)
    assert built.grid == (5, 5) and built.preprocess()(PICTURE).shape[1:] == (20, 20)
    whole = tmp_path / "whole.pt"
    torch.save(clip.state_dict(), whole)
    reference = open_clip.create_model(
        "tiny-clip-for-tests-causal-40", pretrained=str(whole), force_image_size=20
    )
    ours, theirs = built.clip.visual.positional_embedding, reference.visual.positional_embedding
    assert ours.shape == theirs.shape == (26, 16)
    torch.testing.assert_close(ours, theirs, atol=2e-3 if "sparse" in form else 0.0, rtol=0)


def test_size_that_patches_do_not_fill(tmp_path):
    with pytest.raises(UserError, match="image_size=22: no multiple of the 4 pixels of a patch; nearest: 24"):
        encoder(tmp_path, image_size=22)


def test_timm_tower_of_another_size(tmp_path):
    architecture = timm_clip(tmp_path)
    clip = build_clip(architecture, None)
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    built = encoder(
        tmp_path, architecture=architecture, pretrained=str(tmp_path / "weights.pt"), image_size=48
    )
    assert built.grid == (3, 3) and tokens(built).isfinite().all()
    assert built.preprocess()(PICTURE).shape[1:] == (48, 48)
