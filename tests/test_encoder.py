"""The encoder's token sequences against open_clip itself, and masking of tokens against their removal."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.slow import mostly_slow

from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder

CONTEXT_LENGTH, END = 12, 59
VISION = {"image_size": [48, 36], "patch_size": 12, "layers": 2, "width": 32, "head_width": 16}
TEXT = {"context_length": CONTEXT_LENGTH, "vocab_size": END + 1, "width": 24, "heads": 3, "layers": 2}
BIDIRECTIONAL = {"no_causal_mask": True, "pool_type": "last"}
ATTENTION_POOL = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}


def timm_tower(name: str, size: int, pool: str, proj: str | None) -> dict:
    return {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": proj}


def own(vision: dict | None = None, text: dict | None = None, **more) -> dict:
    """A small model configuration in open_clip's format."""
    timm = vision is not None and "timm_model_name" in vision
    whole = vision if timm else VISION | (vision or {})
    return {"embed_dim": 16, "vision_cfg": whole, "text_cfg": TEXT | (text or {})} | more


SMALL = {
    "plain": own(),
    "layer-scale-quick-gelu": own({"ls_init_value": 0.5}, {"ls_init_value": 0.5}, quick_gelu=True),
    "average-pool-eos": own({"pool_type": "avg"}, {"pool_type": "eos", "eos_id": END, "proj_bias": True}),
    "like-clipa": own({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, BIDIRECTIONAL),
    "attention-pool-first": own(ATTENTION_POOL, {"pool_type": "first"}, custom_text=True),
    "class-token-behind-text": own(text={"embed_cls": True}, custom_text=True),
    "bidirectional-class-token": own(text={"embed_cls": True, "no_causal_mask": True}, custom_text=True),
    "like-coca": own(
        ATTENTION_POOL | {"output_tokens": True},
        {"embed_cls": True, "output_tokens": True},
        multimodal_cfg={"context_length": CONTEXT_LENGTH, "vocab_size": END + 1, "width": 24, "layers": 1},
        custom_text=True,
    ),
    "timm-registers-bidirectional": own(
        timm_tower("test_vit3", 160, "map", "none"), BIDIRECTIONAL, custom_text=True, embed_dim=96
    ),
    "timm-average-pool": own(timm_tower("test_vit2", 160, "avg", "linear")),
    "timm-rotary-eva": own(timm_tower("eva02_tiny_patch14_224", 224, "token", None), custom_text=True),
    "timm-rotary-pe": own(timm_tower("vit_pe_core_tiny_patch16_384", 384, "map", None), custom_text=True),
}
REAL = ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP")


def build(name: str, folder, **options) -> ClipEncoder:
    torch.manual_seed(0)
    if name in REAL:
        return ClipEncoder(name, **options)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(SMALL[name]))
    encoder = ClipEncoder(str(path), **options)
    roughen(encoder)
    return encoder


@torch.no_grad()
def roughen(encoder: ClipEncoder) -> None:
    """Weights that give attention with contrast: where it is near uniform, mistakes would hardly show."""
    for name, weight in encoder.named_parameters():
        noise = torch.randn(weight.shape)
        if weight.ndim > 1:
            weight.copy_(1.4 * noise / weight[0].numel() ** 0.5)
        elif "bias" in name or "cls_emb" in name or "class_embedding" in name:
            weight.copy_(0.2 * noise)
        else:  # norms and layer scales, which timm starts at 1e-5
            weight.copy_(1 + 0.2 * noise)


@pytest.fixture(scope="module", params=mostly_slow([*SMALL, *REAL], [*SMALL, "ViT-B-32-quickgelu"]))
def encoder(request, tmp_path_factory) -> ClipEncoder:
    return build(request.param, tmp_path_factory.mktemp("configs"))


@pytest.fixture
def small(tmp_path):
    return lambda name, **options: build(name, tmp_path, **options)


def images_for(encoder: ClipEncoder) -> torch.Tensor:
    size = encoder.clip.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


def texts_for(encoder: ClipEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of two texts of different lengths in the whole context, end token and padding included; valid."""
    highest = encoder.text_tower.owner.token_embedding.num_embeddings - 1
    context = encoder.context_length
    ids = torch.randint(1, highest, (2, context), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([[context - 2], [context // 2]])
    place = torch.arange(context)
    ids[place == lengths - 1] = highest
    return ids * (place < lengths), place < lengths


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Tokens that a tower normalises only after pooling may be large.
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, atol=1e-5 * max(1.0, largest), rtol=0)


@torch.no_grad()
def test_pooled_tokens_equal_open_clip(encoder):
    images, (ids, valid) = images_for(encoder), texts_for(encoder)
    image_tokens, text_tokens = encoder.image_tokens(images), encoder.text_tokens(ids, valid)
    rows, columns = encoder.grid
    assert image_tokens.shape == (2, encoder.prefix_tokens + rows * columns, encoder.image_width)
    appended = int(encoder.text_tower.appended_class_token)
    assert text_tokens.shape == (2, encoder.context_length + appended, encoder.text_width)
    image = encoder.clip.encode_image(images, normalize=False)
    text = encoder.clip.encode_text(ids, normalize=False)
    assert_close(encoder.pool_image(image_tokens), image)
    assert_close(encoder.pool_text(text_tokens, ids), text)
    # Features that hardly depend on the input would be equal whatever was computed.
    assert (image[0] - image[1]).abs().max() > 1e-2
    assert (text[0] - text[1]).abs().max() > 1e-2
    normalised = encoder.embeddings(images, ids)
    assert_close(normalised[0], torch.nn.functional.normalize(image, dim=-1))
    assert_close(normalised[1], torch.nn.functional.normalize(text, dim=-1))


@torch.no_grad()
def test_masked_patches_are_as_good_as_removed(encoder):
    images, prefix = images_for(encoder), encoder.prefix_tokens
    patches = encoder.grid[0] * encoder.grid[1]
    order = torch.rand(2, patches, generator=torch.Generator().manual_seed(4)).argsort(1)
    keep = order[:, : patches // 3].sort(1).values
    ignore = torch.ones(2, patches, dtype=torch.bool).scatter(1, keep, False)

    def at_kept(tokens):
        rows = (keep + prefix)[..., None].expand(-1, -1, tokens.shape[-1])
        return torch.cat([tokens[:, :prefix], tokens.gather(1, rows)], dim=1)

    removed = encoder.image_tokens(images, keep=keep)
    assert_close(at_kept(encoder.image_tokens(images, ignore=ignore)), removed)
    assert (at_kept(encoder.image_tokens(images)) - removed).abs().max() > 1e-2
    # Places stay with their patches: in another order the same patches give the same tokens.
    backwards = encoder.image_tokens(images, keep=keep.flip(1))
    assert_close(backwards[:, prefix:].flip(1), removed[:, prefix:])
    half = ignore.clone()
    half.scatter_(1, keep[:, ::2], True)
    both = encoder.image_tokens(images, keep=keep, ignore=half)
    assert_close(both[:, prefix + 1 :: 2], encoder.image_tokens(images, keep=keep[:, 1::2])[:, prefix:])


@torch.no_grad()
def test_with_no_patch_left_the_class_token_is_the_same_either_way(encoder):
    if encoder.prefix_tokens == 0:
        pytest.skip("no class token")
    images, patches = images_for(encoder), encoder.grid[0] * encoder.grid[1]
    removed = encoder.image_tokens(images, keep=torch.zeros(2, 0, dtype=torch.long))
    masked = encoder.image_tokens(images, ignore=torch.ones(2, patches, dtype=torch.bool))
    assert removed.shape[1] == encoder.prefix_tokens
    assert_close(masked[:, : encoder.prefix_tokens], removed)


def without_tokens(encoder: ClipEncoder, ids: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Final tokens of one text [context] after taking rows out of the sequence, [remaining, width]."""
    tower, owner = encoder.text_tower, encoder.text_tower.owner
    embedded, mask = tower.embed(ids[None])
    stays = (~torch.nn.functional.pad(gone, (0, embedded.shape[1] - len(gone)))).nonzero().flatten()
    if mask is not None:
        mask = mask[..., stays, :][..., stays]
    return owner.ln_final(owner.transformer(embedded[:, stays], attn_mask=mask))[0]


@torch.no_grad()
def test_masked_words_are_as_good_as_removed(encoder):
    ids, valid = texts_for(encoder)
    gone = valid & (torch.arange(ids.shape[1]) % torch.tensor([[3], [2]]) == 1)
    kept = valid & ~gone
    assert kept[0].sum() != kept[1].sum()
    keep = torch.full((2, int(kept.sum(1).max())), -1)
    for row in range(2):
        keep[row, : kept[row].sum()] = kept[row].nonzero().flatten()
    masked = encoder.text_tokens(ids, valid, ignore=gone)
    removed = encoder.text_tokens(ids, valid, keep=keep)
    whole = encoder.text_tokens(ids, valid)
    appended = encoder.text_tower.appended_class_token
    for row in range(2):
        expected = without_tokens(encoder, ids[row], gone[row])
        count = int(kept[row].sum())
        assert_close(masked[row, : len(ids[row])][kept[row]], expected[:count])
        assert_close(removed[row, :count], expected[:count])
        assert (whole[row, : len(ids[row])][kept[row]] - expected[:count]).abs().max() > 1e-2
        if appended:
            assert_close(masked[row, -1], expected[-1])
            assert_close(removed[row, -1], expected[-1])


@pytest.mark.parametrize("name", ["plain", "like-clipa", "like-coca", "bidirectional-class-token"])
@torch.no_grad()
def test_cutting_the_padding_off_changes_nothing(small, name):
    encoder = small(name)
    # A padding id that is not 0, as SigLIP's tokenizer has it.
    encoder._tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=1))
    ids, valid = texts_for(encoder)
    ids[~valid] = 1
    length = int(valid.sum(1).max())
    assert length < encoder.context_length
    whole, cut = encoder.text_tokens(ids, valid), encoder.text_tokens(ids[:, :length], valid[:, :length])
    appended = int(encoder.text_tower.appended_class_token)
    assert cut.shape[1] == length + appended
    assert_close(cut[:, :length], whole[:, :length])
    ignore = valid.clone()
    ignore[:, 0] = False
    whole = encoder.text_tokens(ids, valid, ignore=ignore)
    cut = encoder.text_tokens(ids[:, :length], valid[:, :length], ignore=ignore[:, :length])
    assert_close(cut[:, 0], whole[:, 0])
    if appended:
        assert_close(cut[:, -1], whole[:, -1])
    images = images_for(encoder)
    assert_close(encoder.embeddings(images, ids[:, :length])[1], encoder.embeddings(images, ids)[1])


def test_pooling_the_last_token_of_a_cut_context_is_refused(small):
    encoder = small("like-clipa")
    ids, valid = texts_for(encoder)
    tokens = encoder.text_tokens(ids[:, :6], valid[:, :6])
    with pytest.raises(ValueError, match="whole_context=True"):
        encoder.pool_text(tokens, ids[:, :6])


@torch.no_grad()
def test_text_tower_that_masks_its_own_padding(small):
    encoder = small("attention-pool-first")
    # No JSON option of open_clip switches this on, but its text tower has it.
    owner = encoder.clip.text
    owner.attn_mask, owner.use_pad_mask = None, True
    tower = encoder._towers[1]
    tower.causal, tower.padding_matters = False, True
    ids, valid = texts_for(encoder)
    assert_close(encoder.pool_text(encoder.text_tokens(ids, valid), ids), encoder.clip.encode_text(ids))
    ids[:, 3] = 7
    gone = torch.zeros_like(valid)
    gone[:, 3] = True
    expected = without_tokens(encoder, ids[1], gone[1])
    assert_close(encoder.text_tokens(ids, valid, ignore=gone)[1, :3], expected[:3])


def test_frozen_encoder_takes_no_gradient_and_stays_in_evaluation_mode(small):
    encoder = small("plain")
    assert not encoder.train().training
    assert not any(weight.requires_grad for weight in encoder.parameters())
    trained = small("plain", frozen=False)
    assert trained.train().training
    assert all(weight.requires_grad for weight in trained.parameters())
    assert len(list(trained.parameters())) == len(list(trained.clip.parameters()))


def test_patch_dropout_of_the_configuration_takes_no_token_away(small, monkeypatch):
    monkeypatch.setitem(SMALL, "dropout", own({"patch_dropout": 0.5}))
    encoder = small("dropout", frozen=False).train()
    assert encoder.image_tokens(images_for(encoder)).shape[1] == 1 + encoder.grid[0] * encoder.grid[1]


def test_preprocess_fits_the_tower(small):
    from PIL import Image

    encoder = small("plain")
    assert encoder.preprocess()(Image.new("RGB", (90, 50))).shape == (3, 48, 36)


CUSTOM = {"qk_norm": True}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (own({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}), "ModifiedResNet"),
        (own(timm_tower("test_convnext", 160, "avg", "linear")), "ConvNeXt"),
        (own(timm_tower("test_vit_relpos", 160, "avg", "linear")), "VisionTransformerRelPos"),
        (own(CUSTOM), "custom attention blocks in its image tower"),
        (own(text=CUSTOM), "custom attention blocks in its text tower"),
    ],
)
def test_towers_without_a_usable_token_sequence(tmp_path, config, what):
    path = tmp_path / "unusable.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=what) as error:
        ClipEncoder(str(path))
    assert "ViT-B-32" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "what"), [("RN50", "ModifiedResNet"), ("roberta-ViT-B-32", "Hugging Face")])
def test_architectures_without_a_usable_token_sequence(name, what):
    with pytest.raises(UserError, match=what) as error:
        ClipEncoder(name)
    assert "ViT-B-32" in str(error.value) and "\n" not in str(error.value)
