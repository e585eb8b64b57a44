"""Pretraining the small CLIP of the built-in scenes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from PIL import Image
from safetensors import safe_open

from clipmapper.commands import pretrain_clip
from clipmapper.commands.pretrain_clip import run_pretraining, used_token_ids
from clipmapper.data.images import clip_input
from clipmapper.data.world.scenes import draw_scene, render
from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder
from clipmapper.settings.commands import PretrainConfig
from clipmapper.training.contrastive import ContrastiveModule, ContrastiveScenes


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A tiny CLIP whose images have another size than the rendered ones."""
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("clip") / "tiny-clip-to-pretrain.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def encoder(architecture):
    torch.manual_seed(0)
    return ClipEncoder(architecture, frozen=False)


@pytest.fixture(scope="module", autouse=True)
def token_ids(architecture):
    """Thousands of scenes are drawn for the words: once for all of these tests."""
    found = used_token_ids(ClipEncoder(architecture))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrain_clip, "used_token_ids", lambda encoder: found)
        yield found


def module(encoder, token_ids, caption_weight=1.0):
    torch.manual_seed(0)
    made = ContrastiveModule(encoder, token_ids, caption_weight, 1e-3, 0.1, 2, 10)
    made.log_dict = lambda *args, **kwargs: None  # no trainer here
    return made


def settings(architecture, output, **changes):
    given = {
        "architecture": architecture, "pretrained": None, "output": str(output), "seed": 3, "max_steps": 4,
        "batch_size": 8, "variants": 4, "caption_weight": 1.0, "precision": "32-true", "learning_rate": 1e-3,
        "weight_decay": 0.1, "warmup_steps": 1, "workers": 0, "checkpoint_every": 2, "resume": False,
    }  # fmt: skip
    return PretrainConfig(**(given | changes))


@pytest.mark.slow
def test_rendered_images_are_resized_as_the_transform_does(encoder):
    images = render([draw_scene(0, "resize", i) for i in range(4)]).images
    transform = encoder.preprocess()
    slow = torch.stack([transform(Image.fromarray(image)) for image in images])
    fast = clip_input(images, encoder.clip.visual)
    std = torch.tensor(encoder.clip.visual.image_std)[:, None, None]
    assert fast.shape == (4, 3, 24, 24)
    assert ((fast - slow) * std * 255).abs().max() <= 2  # levels of 255
    same_size = np.ascontiguousarray(images[:, :24, :24])
    exact = torch.stack([transform(Image.fromarray(image)) for image in same_size])
    torch.testing.assert_close(clip_input(same_size, encoder.clip.visual), exact)


def test_the_contrastive_part_is_clips_own_loss(encoder, token_ids):
    batch = ContrastiveScenes(encoder, 8, 4, 0, 100).batch(90)
    loss = module(encoder, token_ids, caption_weight=0.0).training_step(batch, 0)
    image, text = encoder.embeddings(*batch)
    expected = ClipLoss()(image, text, encoder.clip.logit_scale.exp())
    torch.testing.assert_close(loss, expected)


def test_the_captioner_reads_no_later_word_and_pays_for_no_padding(encoder, token_ids):
    images, ids = ContrastiveScenes(encoder, 8, 4, 0, 100).batch(90)
    made = module(encoder, token_ids)
    captioner = made.captioner
    labels = captioner.labels(ids)
    assert (captioner.token_ids[labels] == ids).all()  # every word of a caption can be said
    assert ((labels == 0) == (ids == 0)).all() and (ids == 0).any()  # and CoCaLoss leaves padding, 0, out
    image_tokens = encoder.image_tokens(images)

    def said(of):
        tokens = encoder.text_tokens(of, torch.ones_like(of, dtype=torch.bool))
        return captioner(tokens, image_tokens)

    changed = ids.clone()
    changed[:, 5] = changed[:, 3]
    before, after = said(ids), said(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    other_images = captioner(encoder.text_tokens(ids, ids >= 0), image_tokens.flip(0))
    assert not torch.allclose(other_images, before)


def test_patch_tokens_take_a_gradient_from_captions_only(encoder, token_ids):
    """Why there is a captioner: the last block's patches get none from the class token's loss."""
    batch = ContrastiveScenes(encoder, 8, 4, 0, 100).batch(90)
    for caption_weight in (0.0, 1.0):
        made = module(encoder, token_ids, caption_weight)
        kept = []

        def keep(module, arguments, output, kept=kept):
            output.retain_grad()
            kept.append(output)

        hook = encoder.image_tower.register_forward_hook(keep)
        made.training_step(batch, 0).backward()
        hook.remove()
        of_patches = kept[0].grad[:, encoder.prefix_tokens :].abs().max()
        assert (of_patches > 0) == (caption_weight > 0)


@pytest.mark.slow
def test_interrupted_pretraining_goes_on_to_the_same_weights(architecture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = run_pretraining(settings(architecture, tmp_path / "whole.safetensors"))
    (tmp_path / "outputs/pretrain_clip/last.ckpt").unlink()
    with monkeypatch.context() as half:

        def stop(self, *args, after=ContrastiveModule.on_train_batch_end):
            after(self, *args)
            if self.trainer.global_step == 2:
                raise RuntimeError("pulled the plug")

        half.setattr(ContrastiveModule, "on_train_batch_end", stop)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run_pretraining(settings(architecture, tmp_path / "resumed.safetensors", checkpoint_every=1))
    saved = torch.load("outputs/pretrain_clip/last.ckpt", weights_only=True)
    assert saved["global_step"] in (1, 2)
    resumed = run_pretraining(
        settings(architecture, tmp_path / "resumed.safetensors", checkpoint_every=1, resume=True)
    )
    assert resumed == whole and 0 < whole["image_to_text_top5"] <= 1
    one, two = (
        ClipEncoder(architecture, str(tmp_path / f"{name}.safetensors")) for name in ("whole", "resumed")
    )
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.slow
def test_the_card_is_in_the_file(architecture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = run_pretraining(settings(architecture, "clip.safetensors", max_steps=1, precision="bf16-mixed"))
    with safe_open("clip.safetensors", "pt") as file:
        card = json.loads(file.metadata()["card"])
    assert card["retrieval"] == scores and card["config"]["seed"] == 3 and card["minutes"] >= 0
    assert "output" not in card["config"]  # says nothing about the machine


def test_resuming_without_a_checkpoint_is_a_mistake(architecture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"resume=true: there is no outputs/pretrain_clip/last\.ckpt"):
        run_pretraining(settings(architecture, "clip.safetensors", resume=True))


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(flush=True)
    input()
"""


def test_two_at_once_are_a_mistake(architecture, tmp_path, monkeypatch):
    """They would write one checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/pretrain_clip").mkdir(parents=True)
    lock = "outputs/pretrain_clip/running"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match=r"outputs/pretrain_clip: a run is running there already"):
        run_pretraining(settings(architecture, "clip.safetensors", max_steps=1))
    holder.communicate("\n")
