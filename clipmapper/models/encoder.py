"""Stage 1 of CLIPmapper: any CLIP of ``open_clip`` as two token sequences; which weights are trained."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from importlib.metadata import version

import open_clip
import torch
from jaxtyping import Bool, Float, Int, Num
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from clipmapper.data.images import as_pil, input_size
from clipmapper.data.pixels import normalised
from clipmapper.errors import UserError
from clipmapper.models.clip_weights import build_clip, build_tokenizer, registered_name
from clipmapper.models.image_towers import image_tower
from clipmapper.models.text_tower import TextTower
from clipmapper.models.tokens import padding_id


class ClipEncoder(nn.Module):
    """A CLIP whose towers give tokens: all visual tokens and all text tokens after the final LayerNorm.

    Parameters: ``architecture``, ``pretrained`` and ``image_size`` as in
    :func:`clipmapper.models.clip_weights.build_clip`. ``frozen``: its weights take no gradient and it stays
    in evaluation mode; :mod:`clipmapper.models.encoder` says which of one that is not frozen are trained.
    ``resting``: for now its tokens take no gradient back to its weights, which spares a step half its work.
    """

    resting = False

    def __init__(
        self,
        architecture: str,
        pretrained: str | None = None,
        frozen: bool = True,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.pretrained = pretrained
        self.frozen = frozen
        self.clip = build_clip(architecture, pretrained, image_size)
        # As plain values: what a name or a file stands for may change.
        self.config = open_clip.get_model_config(registered_name(architecture))
        # Views on the modules of `clip`: kept out of the module tree so that no weight is listed twice.
        self._towers = (image_tower(self.clip.visual, architecture), TextTower(self.clip, architecture))
        if frozen:
            self.clip.requires_grad_(False)

    @property
    def image_tower(self):
        return self._towers[0]

    @property
    def text_tower(self):
        return self._towers[1]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image patches."""
        return self.image_tower.grid

    @property
    def prefix_tokens(self) -> int:
        """How many image tokens come before the patches: 1 class token in CLIP, 0 in SigLIP."""
        return self.image_tower.prefix_tokens

    @property
    def image_width(self) -> int:
        return self.image_tower.width

    @property
    def text_width(self) -> int:
        return self.text_tower.width

    @property
    def context_length(self) -> int:
        return self.clip.context_length

    def train(self, mode: bool = True) -> "ClipEncoder":
        return super().train(mode and not self.frozen)

    def preprocess(self):
        """The image transform that belongs to the weights: PIL image → Float[3, height, width]."""
        return image_transform_v2(PreprocessCfg(**self.clip.visual.preprocess_cfg), is_train=False)

    def load_image(self, image) -> Float[Tensor, "batch 3 height width"]:
        """A path, PIL image or uint8 array [height, width, 3] as the towers read it; a tensor as it is.

        The exact way: one image is no matter of speed.
        """
        if isinstance(image, Tensor):
            return image if image.ndim == 4 else image[None]
        return self.preprocess()(as_pil(image))[None]

    def image_tokens(
        self,
        images: Num[Tensor, "batch 3 height width"],
        keep: Int[Tensor, "batch kept"] | None = None,
        ignore: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Prefix tokens, then patches row by row, after the tower's final LayerNorm.

        ``images``: as :meth:`preprocess` gives them, or uint8 as a
        :class:`~clipmapper.data.pixels.PixelReader` does, which are normalised here, on their device.
        ``keep``: patches that stay (the others are physically removed); ``ignore``: patches that no attention
        of the tower reads. See :meth:`clipmapper.models.image_towers.ImageTower.forward`.
        """
        if images.dtype == torch.uint8:
            images = normalised(images, self.clip.visual)
        with self._gradients():
            return self.image_tower(images, keep=keep, ignore=ignore)

    def text_tokens(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"],
        keep: Int[Tensor, "batch kept"] | None = None,
        ignore: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch out width"]:
        """All text tokens after the tower's final LayerNorm, with ``keep`` and ``ignore`` as for images.

        One for each id, and behind them the class token that CoCa appends (with ``keep`` as well).

        ``valid`` is False at padding. Padding behind the longest text of the batch may have been cut off
        (:func:`clipmapper.models.tokens.tokenize` does); a tower that reads its padding is given it back.
        """
        given = ids.shape[1]
        if self.text_tower.padding_matters and given < self.context_length:
            extra = self.context_length - given
            ids = nn.functional.pad(ids, (0, extra), value=padding_id(self.tokenizer))
            valid = nn.functional.pad(valid, (0, extra), value=False)
            ignore = None if ignore is None else nn.functional.pad(ignore, (0, extra), value=False)
        with self._gradients():
            tokens = self.text_tower(ids, keep=keep, ignore=ignore, valid=valid)
        if keep is not None or tokens.shape[1] == given:
            return tokens
        if self.text_tower.appended_class_token:
            return torch.cat([tokens[:, :given], tokens[:, -1:]], dim=1)
        return tokens[:, :given]

    def _gradients(self):
        return torch.no_grad() if self.resting else nullcontext()

    @property
    def tokenizer(self):
        """CLIP's byte-pair tokenizer, or the one that the architecture names (read when first asked for)."""
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = build_tokenizer(self.architecture, self.context_length)
        return self._tokenizer

    def pool_image(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch embedding"]:
        """open_clip's ``encode_image``, from the tokens."""
        return self.image_tower.pool(tokens)

    def pool_text(
        self, tokens: Float[Tensor, "batch out width"], ids: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch embedding"]:
        """open_clip's ``encode_text``, from the tokens."""
        return self.text_tower.pool(tokens, ids)

    @torch.no_grad()
    def embeddings(
        self, images: Num[Tensor, "batch 3 height width"], ids: Int[Tensor, "texts tokens"]
    ) -> tuple[Float[Tensor, "batch embedding"], Float[Tensor, "texts embedding"]]:
        """Normalised pooled features of both towers, for retrieval."""
        image = self.pool_image(self.image_tokens(images))
        extra = self.context_length - ids.shape[1]
        if extra and self.text_tower.padding_matters:  # SigLIP even pools a token of the padding
            ids = nn.functional.pad(ids, (0, extra), value=padding_id(self.tokenizer))
        text = self.pool_text(self.text_tokens(ids, torch.ones_like(ids, dtype=torch.bool)), ids)
        return nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)


# Raise it whenever the towers (image_towers.py, text_tower.py) or the images that they are given
# (clipmapper/data/images.py) come to give other tokens for the same weights and data.
TOKENS_VERSION = 1


def image_identity(encoder: ClipEncoder) -> dict:
    """Architecture, weights (by their content, wherever they came from) and preprocessing of the images."""
    visual = encoder.clip.visual
    return {
        **_common(encoder),
        "weights": weights_digest(visual.state_dict()),
        "preprocessing": {
            **visual.preprocess_cfg,
            "image_size": list(input_size(visual)),
            "image_mean": list(visual.image_mean),
            "image_std": list(visual.image_std),
        },
    }


def text_identity(encoder: ClipEncoder) -> dict:
    """Architecture and weights. The tokenizer's part is in the ids that it gives."""
    state = {k: v for k, v in encoder.clip.state_dict().items() if not k.startswith("visual.")}
    return {**_common(encoder), "weights": weights_digest(state), "context_length": encoder.context_length}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _common(encoder: ClipEncoder) -> dict:
    return {
        "tokens_version": TOKENS_VERSION,
        "open_clip": version("open_clip_torch"),
        "architecture": encoder.config,
    }


# The linear maps of a transformer block that get adapters, in the names of open_clip and of timm.
_ADAPTED = (nn.Linear, nn.MultiheadAttention)


def choose_trained(encoder: ClipEncoder, blocks: int | None, lora_rank: int | None) -> None:
    """Train the last ``blocks`` of each tower (None: everything) of an encoder that is not frozen.

    The norms behind the last block are trained with it. With ``lora_rank`` only low-rank adapters are (Hu et
    al. 2021, arXiv 2106.09685) in attention and MLP of these blocks, by ``peft``; W + BA with B = 0 at first.
    The scale α / r is 1 (α = r), so that the rank does not change the learning rate that is right.

    Raises ``UserError`` for more blocks than a tower has, and without ``peft``.
    """
    towers = (encoder.image_tower.attention_blocks(), encoder.text_tower.attention_blocks())
    if blocks is not None and blocks > min(map(len, towers)):
        raise UserError(
            f"encoder.trained_blocks={blocks}: the image tower has {len(towers[0])} blocks, the text tower "
            f"{len(towers[1])}; null trains all of both"
        )
    chosen = [block for tower in towers for block in tower[-blocks if blocks else 0 :]]
    if lora_rank is not None:
        _add_adapters(encoder.clip, chosen, lora_rank)
    elif blocks is not None:
        encoder.clip.requires_grad_(False)
        for module in (*chosen, *_last_norms(encoder)):
            module.requires_grad_(True)


def learning_rate_scales(encoder: ClipEncoder, decay: float, whole: float = 1.0) -> dict[nn.Parameter, float]:
    """Layer-wise learning-rate decay (BEiT, arXiv 2106.08254, appendix): the nearer to the input, the slower.

    ``whole``: of all of the encoder, by which the rest is multiplied.
    ``decay`` ** k, k = 0 for what comes behind a tower's blocks, 1 for its last block and so on; what comes
    before its D blocks has k = D + 1.
    """
    scales = {}
    image, text = encoder.image_tower.attention_blocks(), encoder.text_tower.attention_blocks()
    for name, weight in encoder.clip.named_parameters():
        scales[weight] = decay ** (len(image if name.startswith("visual.") else text) + 1)
    for tower in (image, text):
        for k, block in enumerate(reversed(tower), start=1):
            scales |= dict.fromkeys(block.parameters(), decay**k)
    last = [weight for module in _last_norms(encoder) for weight in module.parameters()]
    scales |= dict.fromkeys(last, 1.0)
    return {weight: whole * scale for weight, scale in scales.items()}


@contextmanager
def without_adapters(encoder: ClipEncoder) -> Iterator[None]:
    """Inside, the encoder is the plain one with its adapters merged: what reads it needs not know of them."""
    replaced = _merge(encoder.clip)
    try:
        yield
    finally:
        for parent, name, adapted in replaced:
            setattr(parent, name, adapted)


def merge_adapters(encoder: ClipEncoder) -> None:
    """Make the encoder a plain one with its adapters merged, for good."""
    _merge(encoder.clip)


def _last_norms(encoder: ClipEncoder) -> Sequence[nn.Module]:
    visual, text = encoder.clip.visual, encoder.text_tower.owner
    image_norm = visual.trunk.norm if hasattr(visual, "trunk") else visual.ln_post
    return (image_norm, text.ln_final)


def _add_adapters(clip: nn.Module, blocks: Sequence[nn.Module], rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("encoder.lora_rank: needs peft: pip install 'clipmapper[lora]'") from error
    names = {module: name for name, module in clip.named_modules()}
    inside = [module for block in blocks for module in block.modules() if isinstance(module, _ADAPTED)]
    of_attention = {id(module.out_proj) for module in inside if isinstance(module, nn.MultiheadAttention)}
    adapted = [names[module] for module in inside if id(module) not in of_attention]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted), clip)


def _merge(clip: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put plain modules in the place of adapted ones; says where, and what was there."""
    adapted = [
        (parent, name, child)
        for parent in clip.modules()
        for name, child in parent.named_children()
        if hasattr(child, "lora_A") and not hasattr(parent, "lora_A")
    ]
    for parent, name, child in adapted:
        merged = deepcopy(child)
        merged.merge()
        base = merged.get_base_layer()
        if isinstance(base, nn.MultiheadAttention):
            # peft leaves plain tensors where the parameters were, and the output's own adapter around it.
            output = base.out_proj.get_base_layer()
            output.weight = nn.Parameter(output.weight.detach(), requires_grad=False)
            base.in_proj_weight = nn.Parameter(base.in_proj_weight.detach(), requires_grad=False)
            base.out_proj = output
        setattr(parent, name, base.train(child.training))
    return adapted
