"""Local checkpoints, and one clear line for everything that is wrong with one or with an architecture."""

import json
import logging
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import training_models

from clipmapper.errors import UserError
from clipmapper.models.clip_weights import (
    EMBEDDING_IDS,
    build_clip,
    build_tokenizer,
    open_clip_log,
    save_clip_weights,
)
from clipmapper.models.exported import DESCRIPTION
from clipmapper.tasks.registry import load
from clipmapper.tasks.vqa.model import build_clipmapper

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 24, "patch_size": 12, "layers": 1, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 30, "width": 12, "heads": 2, "layers": 1},
}
IDS = torch.tensor([[28, 3, 5, 29, 0, 0], [28, 7, 29, 0, 0, 0]])


def write_config(path: Path, **changes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(CONFIG | changes))
    return str(path)


@pytest.fixture
def architecture(tmp_path) -> str:
    return write_config(tmp_path / "weights-test.json")


@pytest.fixture
def clip(architecture):
    torch.manual_seed(0)
    return build_clip(architecture, None)


@torch.no_grad()
def features(clip) -> torch.Tensor:
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return torch.cat([clip.encode_image(images), clip.encode_text(IDS)])


def one_line(architecture: str, pretrained: str | None) -> str:
    with pytest.raises(UserError) as error:
        build_clip(architecture, pretrained)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_local_checkpoints_of_every_format_give_the_same_features(tmp_path, architecture, clip):
    state = clip.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    training = {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(training, tmp_path / "epoch_3.pt")
    torch.manual_seed(99)
    assert not torch.equal(features(build_clip(architecture, None)), features(clip))
    for name in ("weights.safetensors", "weights.pt", "epoch_3.pt"):
        loaded = build_clip(architecture, str(tmp_path / name))
        assert not loaded.training and next(loaded.parameters()).dtype == torch.float32
        assert torch.equal(features(loaded), features(clip)), name


def test_images_are_prepared_as_the_weights_want_it(tmp_path, architecture, clip, monkeypatch):
    """Those of local files and of reloaded models too: SigLIP's are not CLIP's."""
    clip_like = {"mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3), "resize_mode": "shortest"}
    siglip = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    assert siglip["resize_mode"] == "squash" and siglip["mean"] == (0.5, 0.5, 0.5)
    known = {"one": siglip}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(known))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: known[tag])
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    local = build_clip(architecture, str(tmp_path / "clip.pt")).visual
    assert local.preprocess_cfg == clip.visual.preprocess_cfg | {k: siglip[k] for k in clip_like}
    assert local.image_mean == (0.5, 0.5, 0.5) and local.preprocess_cfg["size"] == (24, 24)
    known["two"] = clip_like  # where tags disagree, open_clip's default
    local = build_clip(architecture, str(tmp_path / "clip.pt")).visual
    assert local.preprocess_cfg == clip.visual.preprocess_cfg
    del known["two"]
    encoder = {"architecture": architecture, "pretrained": str(tmp_path / "clip.pt"), "frozen": True}
    model = build_clipmapper(encoder, training_models.TINY_MAPPER, ["yes", "no"])
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    torch.save({DESCRIPTION: model.description, "state_dict": state}, tmp_path / "model.ckpt")
    known.clear()  # a checkpoint says it by itself
    again = load(tmp_path / "model.ckpt").encoder.clip.visual
    assert again.preprocess_cfg["resize_mode"] == "squash" and tuple(again.image_mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("custom_text", [False, True])
def test_sparse_checkpoint_comes_back_in_half_precision(tmp_path, custom_text):
    architecture = write_config(tmp_path / "sparse-test.json", custom_text=custom_text)
    clip = build_clip(architecture, None)
    used = [29, 0, 3, 5, 7, 28, 3]
    path = tmp_path / "new" / "sparse.safetensors"
    save_clip_weights(clip, path, used, {"card": "trained on scenes"})
    assert [p.name for p in path.parent.iterdir()] == ["sparse.safetensors"]
    with safe_open(path, "pt") as stored:
        assert stored.metadata() == {"card": "trained on scenes"}
        name = next(key for key in stored.keys() if key.endswith("token_embedding.weight"))  # noqa: SIM118
        assert stored.get_tensor(EMBEDDING_IDS).tolist() == [0, 3, 5, 7, 28, 29]
        assert stored.get_tensor(name).shape == (6, 12) and stored.get_tensor(name).dtype == torch.half
    loaded = build_clip(architecture, str(path))
    torch.testing.assert_close(features(loaded), features(clip), atol=5e-3, rtol=5e-3)
    for (key, weight), original in zip(loaded.named_parameters(), clip.parameters(), strict=True):
        expected = original.half().float()
        if key == name:
            expected = expected * torch.isin(torch.arange(30), torch.tensor(used))[:, None]
        assert torch.equal(weight, expected), key


def test_shipped_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build_clip("checkpoints/scenes-clip.json", None).visual.grid_size == (6, 6)


def test_missing_checkpoint(tmp_path, architecture, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("built it before looking"))
    message = one_line(architecture, str(tmp_path / "absent.pt"))
    assert "absent.pt: no such file" in message and "no tag is known" in message
    message = one_line("ViT-B-32", "open-ai")
    assert "no such file" in message and "openai" in message and "laion2b_s34b_b79k" in message
    assert "no such file" in one_line(architecture, str(tmp_path))


def test_weights_of_a_tag_that_cannot_be_fetched(monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Failed to download weights for tag 'openai'\nand more lines")

    monkeypatch.setattr(open_clip, "create_model", offline)
    message = one_line("ViT-B-32", "openai")
    assert "could not fetch" in message and "Failed to download" in message and "local checkpoint" in message


def damaged(kind: str, folder: Path, clip) -> Path:
    whole_safetensors, whole_torch = folder / "whole.safetensors", folder / "whole.pt"
    save_file(clip.state_dict(), whole_safetensors)
    torch.save(clip.state_dict(), whole_torch)
    noise = bytes(torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(3)).tolist())
    contents = {
        "noise.safetensors": noise,
        "noise.pt": noise,
        "empty.safetensors": b"",
        "empty.pt": b"",
        "cut.safetensors": whole_safetensors.read_bytes()[:-1000],
        "cut.pt": whole_torch.read_bytes()[:-1000],
        "noise.npz": noise,
    }
    path = folder / kind
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "tensor.pt":
        torch.save(torch.ones(3), path)
    elif kind == "nothing.pt":
        torch.save({}, path)
    return path


DAMAGED = (
    "noise.safetensors", "noise.pt", "noise.npz", "empty.safetensors", "empty.pt",
    "cut.safetensors", "cut.pt", "tensor.pt", "nothing.pt",
)  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_checkpoint(tmp_path, architecture, clip, kind):
    message = one_line(architecture, str(damaged(kind, tmp_path, clip)))
    assert message.startswith("encoder.pretrained=") and f"{kind}: " in message and "damaged" in message


def test_checkpoint_of_another_architecture(tmp_path, architecture, clip):
    wider = write_config(tmp_path / "wider-test.json", vision_cfg=CONFIG["vision_cfg"] | {"width": 24})
    deeper = write_config(tmp_path / "deeper-test.json", text_cfg=CONFIG["text_cfg"] | {"layers": 2})
    other_words = write_config(tmp_path / "words-test.json", text_cfg=CONFIG["text_cfg"] | {"vocab_size": 20})
    whole, sparse = tmp_path / "whole.pt", tmp_path / "sparse.safetensors"
    torch.save(clip.state_dict(), whole)
    save_clip_weights(clip, sparse, [1, 2, 29], {})
    for path in (whole, sparse):
        assert "visual." in one_line(wider, str(path))
        assert "transformer.resblocks.1" in one_line(deeper, str(path))
        one_line(other_words, str(path))
    biased = build_clip(write_config(tmp_path / "biased-test.json", init_logit_bias=-10), None)
    torch.save(biased.state_dict(), tmp_path / "biased.pt")
    one_line(architecture, str(tmp_path / "biased.pt"))


class Harmful:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickled_code_is_not_run(tmp_path, architecture, clip):
    marker = tmp_path / "was run"
    torch.save({"state_dict": clip.state_dict(), "extra": Harmful(marker)}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"state_dict": Harmful(marker)}))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(Harmful(marker)))
    for name in ("torch.pt", "plain.pt", "named.safetensors"):
        message = one_line(architecture, str(tmp_path / name))
        assert name in message and not marker.exists()
        assert name == "named.safetensors" or "pickled objects" in message
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert marker.exists(), "the file is harmless, so the test shows nothing"


@pytest.mark.parametrize(
    ("name", "near"), [("ViT-B-23", "ViT-B-32"), ("vit-b-32", "ViT-B-32"), ("ViT-B/32", "ViT-B-32")]
)
def test_unknown_architecture_suggests_the_nearest(name, near):
    message = one_line(name, None)
    assert name in message and "did you mean" in message and near in message


def test_unknown_architecture_that_is_near_to_none():
    assert "open_clip.list_models()" in one_line("qqqqqqqq", None)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not readable JSON"),
        ("\xff", "not readable JSON"),
        ("[1, 2]", "vision_cfg"),
        ("3", "vision_cfg"),
        ('{"embed_dim": 8}', "vision_cfg"),
        (json.dumps(CONFIG | {"vision_cfg": 4}), "vision_cfg"),
        (json.dumps(CONFIG | {"vision_cfg": {"widht": 16}}), "widht"),
        (json.dumps(CONFIG | {"embed_dims": 16}), "embed_dims"),
        (json.dumps(CONFIG | {"vision_cfg": {"timm_model_name": "no_such_model"}}), "no_such_model"),
    ],
)
def test_malformed_configuration(tmp_path, text, what):
    path = tmp_path / "malformed-test.json"
    path.write_text(text, encoding="latin-1")
    message = one_line(str(path), None)
    assert "malformed-test.json" in message and what in message


def test_configuration_that_is_not_there_or_takes_a_known_name(tmp_path):
    assert "no such file" in one_line(str(tmp_path / "absent.json"), None)
    assert "another name" in one_line(write_config(tmp_path / "ViT-B-32.json"), None)
    assert build_tokenizer("ViT-B-32", 77).context_length == 77
    assert open_clip.get_model_config("ViT-B-32")["embed_dim"] == 512


def test_configurations_of_the_same_name_in_two_folders(tmp_path):
    first = write_config(tmp_path / "a" / "same-test.json")
    second = write_config(tmp_path / "b" / "same-test.json", embed_dim=4)
    dims = [build_clip(path, None).visual.output_dim for path in (first, second, first)]
    assert dims == [8, 4, 8]


def test_tokenizer_of_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(UserError, match=r"timm/ViT-B-16-SigLIP.*couldn't connect") as error:
        build_tokenizer("ViT-B-16-SigLIP", 64)
    assert "\n" not in str(error.value)


def test_random_weights_asked_for_are_no_reason_to_warn(architecture, clip, tmp_path, monkeypatch, capsys):
    save_file(clip.state_dict(), tmp_path / "weights.safetensors")
    root = logging.getLogger()
    for handlers in ([], [logging.StreamHandler()]):
        monkeypatch.setattr(root, "handlers", list(handlers))
        monkeypatch.setattr(root, "level", logging.INFO)
        build_clip(architecture, None)
        build_clip(architecture, str(tmp_path / "weights.safetensors"))
        build_tokenizer(architecture, 6)
        assert capsys.readouterr() == ("", "")
        assert root.handlers == handlers and root.filters == [], "the program's logging was changed"
        with open_clip_log():
            logging.warning("something is wrong")
        assert "something is wrong" in capsys.readouterr().err
