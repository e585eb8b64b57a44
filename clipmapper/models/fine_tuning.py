"""Which weights of the encoder are trained, and how fast."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

from torch import nn

from clipmapper.errors import UserError
from clipmapper.models.encoder import ClipEncoder

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


def learning_rate_scales(encoder: ClipEncoder, decay: float) -> dict[nn.Parameter, float]:
    """Layer-wise learning-rate decay (BEiT, arXiv 2106.08254, appendix): the nearer to the input, the slower.

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
    return scales | dict.fromkeys(last, 1.0)


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
