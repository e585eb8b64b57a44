"""Small CLIPmapper models with random weights, in float64, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.mapper import MAPPERS
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.captioning.gpt2 import new_gpt2
from clipmapper.tasks.captioning.gpt2_decoder import GPT2Captioner, GPT2Decoder
from clipmapper.tasks.captioning.head import CaptionEnds, CaptionHead, GPT2Head, TiedCaptionHead
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.vqa.model import CLIPmapper, VQAHead

ANSWERS = ("yes", "no", "red", "blue", "two")
IMAGE_SIZE, PATCH_SIZE = 12, 4
GRID = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
PATCHES = GRID[0] * GRID[1]
CONTEXT_LENGTH, VOCABULARY = 12, 40


# As in OpenAI's CLIP; as in SigLIP, whose words read the padding; as in CoCa, with a class token behind it.
TEXT_TOWERS = {"causal": {}, "unmasked": {"no_causal_mask": True}, "class_token": {"embed_cls": True}}


def clip_config(folder: Path, text_tower: str = "causal", vocabulary: int = VOCABULARY) -> str:
    """The path of a tiny CLIP's configuration: 2 + 2 layers, 9 patches, towers of different widths.

    The image tower scales what its attention adds (LayerScale), so that the contribution to the residual
    stream is not the output of the attention module.
    """
    path = Path(folder) / f"tiny-clip-for-tests-{text_tower}-{vocabulary}.json"
    vision = {
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "layers": 2, "width": 16, "head_width": 8,
        "ls_init_value": 0.5,
    }  # fmt: skip
    text = {
        "context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 12, "heads": 3, "layers": 2,
        **TEXT_TOWERS[text_tower],
    }  # fmt: skip
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text, "custom_text": text_tower != "causal"}
    path.write_text(json.dumps(config))
    return str(path)


def clipmapper(
    folder: Path,
    kind: str = "dual_flow",
    class_token: bool = False,
    depth: int = 2,
    seed: int = 0,
    frozen: bool = True,
    image_position_embedding: bool = False,
    text_tower: str = "causal",
) -> CLIPmapper:
    """A float64 CLIPmapper in evaluation mode; every weight, bias and norm is random and matters."""
    encoder = ClipEncoder(clip_config(folder, text_tower), frozen=frozen)
    mapper = MAPPERS[kind](
        encoder.image_width,
        encoder.text_width,
        encoder.grid,
        width=16,
        depth=depth,
        heads=4,
        mlp_ratio=2.0,
        class_token=class_token,
        image_position_embedding=image_position_embedding,
    )
    model = CLIPmapper(encoder, mapper, VQAHead(16, 10, len(ANSWERS)), ANSWERS).double().eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Random weights that give attention with contrast: what is uniform everywhere would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        is_scale = weight.ndim == 1 and (name.endswith("weight") or name.endswith("gamma"))
        if is_scale:
            weight.copy_(1 + 0.2 * noise)
        elif weight.ndim == 1:
            weight.copy_(0.2 * noise)
        elif weight.ndim > 1:  # CLIP's logit scale has no dimension and no part in this
            weight.copy_(1.6 * noise * weight[0].numel() ** -0.5)


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64)


def texts(lengths: Sequence[int], seed: int = 0) -> TokenizedText:
    """Texts of these lengths (start and end included), padded with id 0 to the longest."""
    generator = torch.Generator().manual_seed(2000 + seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    place, length = torch.arange(max(lengths)), torch.tensor(list(lengths))[:, None]
    valid = place < length
    return TokenizedText(ids * valid, valid, valid & (place > 0) & (place < length - 1))


def captioner(
    folder: Path,
    kind: str = "dual_flow",
    *,
    class_token: bool = False,
    depth: int = 2,
    seed: int = 0,
    frozen: bool = True,
    text_tower: str = "causal",
    text_embedding_only: bool = False,
    tied: bool = False,
    width: int = 16,
    vocabulary: int = VOCABULARY,
    decoder: str | None = None,
) -> Captioner:
    """A float64 captioner in evaluation mode. The last two ids of the vocabulary are start and end.

    ``decoder``: "gpt2_prefix" or "gpt2_cross", a GPT-2 of two blocks, wider than the mapper.
    """
    encoder = ClipEncoder(clip_config(folder, text_tower, vocabulary), frozen=frozen)
    mapper = MAPPERS[kind](
        encoder.image_width,
        encoder.text_width,
        encoder.grid,
        width=width,
        depth=depth,
        heads=4,
        mlp_ratio=2.0,
        class_token=class_token,
        image_position_embedding=not class_token,  # both would be one place too few
        captioning=True,
    )
    ends = CaptionEnds(start=vocabulary - 2, end=vocabulary - 1)
    if decoder is not None:
        cross, length = decoder == "gpt2_cross", 1 + PATCHES
        gpt2 = new_gpt2(
            layers=2, width=20, heads=2, vocabulary=vocabulary, cross=cross,
            positions=CONTEXT_LENGTH + (0 if cross else length),
        )  # fmt: skip
        reader = GPT2Decoder(gpt2, width, length, cross=cross, frozen=False)
        model = GPT2Captioner(
            encoder, mapper, reader, GPT2Head(gpt2), ends=ends, text_embedding_only=text_embedding_only
        )
        randomise(model.double().eval(), seed)
        return model
    embedding = encoder.text_tower.owner.token_embedding
    head = TiedCaptionHead(width, embedding) if tied else CaptionHead(width, vocabulary)
    model = Captioner(encoder, mapper, head, ends=ends, text_embedding_only=text_embedding_only)
    model = model.double().eval()
    randomise(model, seed)
    return model
