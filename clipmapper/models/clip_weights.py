"""Building a CLIP of ``open_clip`` and filling it with weights, from a tag or a local file."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.shipped import shipped_path

# A checkpoint may hold only the token embeddings that its training ever used: these ids, in this order.
EMBEDDING_IDS = "token_embedding.ids"
EMBEDDING = "token_embedding.weight"


def build_clip(architecture: str, pretrained: str | None) -> nn.Module:
    """A CLIP in float32 and evaluation mode.

    ``architecture``: a name that open_clip knows, or the path of a model configuration in open_clip's own
    JSON format. ``pretrained``: an open_clip tag ("openai", "laion2b_s34b_b79k", ...), the path of a local
    checkpoint (safetensors or torch format), or None for random weights. Local files are loaded without
    executing pickled code. Raises ``UserError`` for anything that is not there or does not fit.
    """
    name = _registered_name(architecture)
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = pretrained if pretrained in tags else None
    try:
        # pretrained_text would fetch a text tower's own weights from a hub before ours replace them.
        clip = open_clip.create_model(name, pretrained=tag, pretrained_text=False, weights_only=True)
    except Exception as error:
        if tag is not None:
            raise UserError(
                f"encoder.pretrained={pretrained}: open_clip could not fetch the weights of {name} "
                f"({_first_line(error)}); give the path of a local checkpoint instead"
            ) from error
        raise UserError(f"encoder.architecture={architecture}: {_first_line(error)}") from error
    if pretrained is not None and tag is None:
        path = shipped_path(pretrained)
        if not path.is_file():
            known = f"one of {', '.join(tags)}" if tags else "no tag is known for this architecture"
            raise UserError(
                f"encoder.pretrained={pretrained}: no such file, and not an open_clip tag of {name} ({known})"
            )
        load_clip_weights(clip, path)
    return clip.eval()


def load_clip_weights(clip: nn.Module, path: Path) -> None:
    """Fill ``clip`` from a local checkpoint. Raises ``UserError`` when it is damaged or does not fit."""
    try:
        if path.suffix == ".safetensors" and EMBEDDING_IDS in (state := load_file(path)):
            clip.load_state_dict(_spread_embedding(state, clip))
        else:
            open_clip.load_checkpoint(clip, str(path), weights_only=True)
    except (RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError, EOFError, StopIteration) as error:
        raise UserError(
            f"encoder.pretrained={path}: not a readable checkpoint of this architecture ({_first_line(error)})"
        ) from error


def save_clip_weights(clip: nn.Module, path: Path, token_ids: Sequence[int], card: dict[str, str]) -> None:
    """Write weights in half precision with only the embeddings of ``token_ids``, and ``card`` as metadata."""
    ids = torch.tensor(sorted(set(token_ids)))
    state = {name: value.detach().half().contiguous() for name, value in clip.state_dict().items()}
    state[EMBEDDING] = state[EMBEDDING][ids].contiguous()
    state[EMBEDDING_IDS] = ids
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, metadata=card)
    temporary.replace(path)


def trained_token_ids(path: Path) -> Int[Tensor, "rows"] | None:
    """The token ids that a checkpoint holds embeddings for, None when it holds all of them."""
    if path.suffix != ".safetensors":
        return None
    return load_file(path).get(EMBEDDING_IDS)


def _spread_embedding(state: dict[str, Tensor], clip: nn.Module) -> dict[str, Tensor]:
    """Token embeddings at their places; a token that training never used embeds as zero."""
    ids = state.pop(EMBEDDING_IDS)
    rows = state[EMBEDDING].float()
    full = rows.new_zeros(clip.vocab_size, rows.shape[1])
    full[ids] = rows
    return {**{name: value.float() for name, value in state.items()}, EMBEDDING: full}


def _registered_name(architecture: str) -> str:
    if not architecture.endswith(".json"):
        if architecture not in open_clip.list_models():
            from difflib import get_close_matches

            near = get_close_matches(architecture, open_clip.list_models(), 3)
            raise UserError(
                f"encoder.architecture={architecture}: open_clip knows no such architecture"
                + (f"; did you mean {' or '.join(near)}?" if near else "; see open_clip.list_models()")
            )
        return architecture
    path = shipped_path(architecture)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"encoder.architecture={architecture}: {_first_line(error)}") from error
    if not all(key in config for key in ("embed_dim", "vision_cfg", "text_cfg")):
        raise UserError(f"encoder.architecture={architecture}: needs embed_dim, vision_cfg and text_cfg")
    open_clip.add_model_config(path)
    return path.stem


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
