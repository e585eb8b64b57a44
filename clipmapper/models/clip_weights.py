"""Building a CLIP of ``open_clip`` and filling it with weights, from a tag or a local file."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten

import open_clip
import torch
from open_clip.model import resize_pos_embed, set_model_preprocess_cfg
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from clipmapper.data.text_files import parsed_json
from clipmapper.errors import UserError
from clipmapper.host.outputs import write_whole
from clipmapper.models.weight_files import Unreadable, check_finite, check_tensors, read_torch_file
from clipmapper.shipped import shipped_path

# A checkpoint may hold only the token embeddings that its training ever used: these ids, in this order.
EMBEDDING_IDS = "token_embedding.ids"
EMBEDDING = "token_embedding.weight"


def build_clip(architecture: str, pretrained: str | None, image_size: int | None = None) -> nn.Module:
    """A CLIP in float32 and evaluation mode.

    ``architecture``: a name that open_clip knows, or the path of a model configuration in open_clip's own
    JSON format. ``pretrained``: an open_clip tag ("openai", "laion2b_s34b_b79k", ...), the path of a local
    checkpoint (safetensors or torch format), or None for random weights. Local files are loaded without
    executing pickled code. ``image_size``: side of an image in pixels, for another than the architecture's;
    position embeddings are interpolated as open_clip does. Raises ``UserError`` for anything that is not
    there or does not fit.
    """
    name = registered_name(architecture)
    if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]:
        raise UserError(
            f"encoder.architecture={architecture}: its text tower is a model of the Hugging Face hub; use an "
            "architecture whose text tower is open_clip's own text transformer (ViT-B-32, ...)"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = pretrained if pretrained in tags else None
    path = None if pretrained is None or tag is not None else shipped_path(pretrained)
    if path is not None and not path.is_file():
        known = f"one of {', '.join(tags)}" if tags else "no tag is known for this architecture"
        raise UserError(
            f"encoder.pretrained={pretrained}: no such file, and not an open_clip tag of {name} ({known})"
        )
    try:
        with open_clip_log():
            clip = open_clip.create_model(
                name,
                pretrained=tag,
                # This would fetch a text tower's own weights from a hub before ours replace them.
                pretrained_text=False,
                # In training mode patches at random would be missing from the token sequence.
                force_patch_dropout=0.0,
                # timm's towers are resized with their weights inside, below.
                force_image_size=None if _is_timm(name) else image_size,
                weights_only=True,
                # Where the sizes of a model are looked at, it is built without its numbers.
                device="meta" if torch.get_default_device().type == "meta" else "cpu",
            )
    except Exception as error:
        if tag is not None:
            raise UserError(
                f"encoder.pretrained={pretrained}: open_clip could not fetch the weights of {name} "
                f"({_one_line(error)}); give the path of a local checkpoint instead"
            ) from error
        raise UserError(f"encoder.architecture={architecture}: {_one_line(error)}") from error
    if path is not None:
        load_clip_weights(clip, path)
        prepare_images_as(clip, name, pretrained)
    if image_size is not None:
        _check_image_size(clip.visual, image_size)
        if _is_timm(name):
            clip.visual.set_input_size(image_size)
            clip.visual.preprocess_cfg["size"] = clip.visual.image_size
    return clip.eval()


def prepare_images_as(clip: nn.Module, architecture: str, pretrained: str) -> None:
    """Have images normalised and resized as the weights want it, which their file does not say.

    As open_clip's tag does that they are from; those of another origin as all tags of the architecture do
    (SigLIP: a mean of 0.5, squashed). Where they do not agree on something it stays open_clip's default, as
    open_clip has it for any local file.
    """
    name = registered_name(architecture)
    tags = open_clip.list_pretrained_tags_by_model(name)
    settings = [open_clip.get_pretrained_cfg(name, t) for t in ([pretrained] if pretrained in tags else tags)]
    wanted = dict(clip.visual.preprocess_cfg)
    for key in ("mean", "std", "interpolation", "resize_mode") if settings else ():
        first = settings[0].get(key)
        if first is not None and all(one.get(key) == first for one in settings):
            wanted[key] = first
    set_model_preprocess_cfg(clip, wanted)


def _is_timm(name: str) -> bool:
    return "timm_model_name" in open_clip.get_model_config(name)["vision_cfg"]


def _check_image_size(visual: nn.Module, image_size: int) -> None:
    patches = getattr(visual, "conv1", None) or visual.trunk.patch_embed.proj
    side = patches.kernel_size[0]
    if image_size % side:
        near = max(side, round(image_size / side) * side)
        raise UserError(
            f"encoder.image_size={image_size}: no multiple of the {side} pixels of a patch; nearest: {near}"
        )


def build_tokenizer(architecture: str, context_length: int):
    """The tokenizer that the architecture names, CLIP's byte-pair tokenizer unless it says otherwise.

    Raises ``UserError`` when it is one of a hub that cannot be read.
    """
    name = registered_name(architecture)
    of_text = open_clip.get_model_config(name)["text_cfg"]
    # Said, because transformers would ask a terminal whether it may run a repository's code.
    options = {"trust_remote_code": False} if of_text.get("hf_tokenizer_name") else {}
    try:
        with open_clip_log():
            return open_clip.get_tokenizer(name, context_length=context_length, **options)
    except (OSError, ValueError) as error:
        source = of_text.get("hf_tokenizer_name", "a hub's")
        raise UserError(
            f"encoder.architecture={architecture}: its tokenizer ({source}) could not be read "
            f"({_one_line(error)}); it is fetched once and needs a network then"
        ) from error


def load_clip_weights(clip: nn.Module, path: Path) -> None:
    """Fill ``clip`` from a local checkpoint, in open_clip's formats or that of :func:`save_clip_weights`.

    Position embeddings of another resolution or context length are interpolated, as open_clip does.
    Raises ``UserError`` when the file is damaged, does not fit, holds numbers that are not finite, or more
    than tensors. (The formats of safetensors and of numpy's ``.npy`` have no checksums to compare.)
    """
    try:
        if path.suffix == ".safetensors" and EMBEDDING_IDS in _tensor_names(path):
            state = _spread_embedding(load_file(path), clip)
            resize_pos_embed(state, clip)
            clip.load_state_dict(state)
        else:
            if path.suffix not in (".safetensors", ".npz", ".npy"):
                _check_torch_file(path)
            with open_clip_log():
                open_clip.load_checkpoint(clip, str(path), weights_only=True)
        check_finite(clip.state_dict())
    except Unreadable as error:
        raise UserError(f"encoder.pretrained={path}: {error}") from error
    # What a damaged or foreign file raises depends on where its reader happens to stumble over it.
    except Exception as error:
        kind = "" if isinstance(error, RuntimeError | SafetensorError) else f"{type(error).__name__}: "
        raise UserError(
            f"encoder.pretrained={path}: damaged, or not a checkpoint of this architecture "
            f"({kind}{_one_line(error)})"
        ) from error


def save_clip_weights(clip: nn.Module, path: Path, token_ids: Sequence[int], card: Mapping[str, str]) -> None:
    """Write weights in half precision with only the embeddings of ``token_ids``, and ``card`` as metadata."""
    ids = torch.tensor(sorted(set(token_ids)))
    state = {name: value.detach().half().contiguous() for name, value in clip.state_dict().items()}
    embedding = _embedding_name(state)
    state[embedding] = state[embedding][ids].contiguous()
    state[EMBEDDING_IDS] = ids
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not safetensors' own writing, whose errors do not tell a full disk from others.
    write_whole(path, save(state, metadata=dict(card)))


def registered_name(architecture: str) -> str:
    """The name by which open_clip knows an architecture, after telling it of a configuration file.

    Raises ``UserError`` for an unknown name (with the nearest ones) and for a file that is no configuration.
    """
    if not architecture.endswith(".json"):
        known = {name.lower(): name for name in open_clip.list_models()}
        if architecture in known.values():
            return architecture
        near = [known[name] for name in get_close_matches(architecture.lower(), known, 3)]
        raise UserError(
            f"encoder.architecture={architecture}: open_clip knows no such architecture"
            + (f"; did you mean {' or '.join(near)}?" if near else "; see open_clip.list_models()")
        )
    path = shipped_path(architecture)
    architecture_config(architecture)
    if not re.fullmatch(r"[\w.+ -]+", path.stem):  # open_clip loads "hf-hub:…" from a hub
        raise UserError(
            f"encoder.architecture={architecture}: its name may have letters, digits, spaces and .+-_ alone"
        )
    if (Path(open_clip.__file__).parent / "model_configs" / path.name).exists():
        raise UserError(
            f"encoder.architecture={architecture}: open_clip has an architecture named {path.stem}; "
            "give the file another name"
        )
    open_clip.add_model_config(path)
    return path.stem


def architecture_config(architecture: str) -> dict:
    """A configuration of the user's own, from its file, in open_clip's format.

    Raises ``UserError`` for a file that is none, and for one that would run code (``trust_remote_code``).
    """
    try:
        config = parsed_json(shipped_path(architecture).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"encoder.architecture={architecture}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = _one_line(error)
        raise UserError(f"encoder.architecture={architecture}: not readable JSON ({reason})") from error
    parts = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    found = config if isinstance(config, dict) else {}
    if not all(isinstance(found.get(part), kind) for part, kind in parts.items()):
        raise UserError(
            f"encoder.architecture={architecture}: needs the number embed_dim and the objects vision_cfg and "
            "text_cfg, as open_clip's own model configurations have them"
        )
    options = config["text_cfg"].get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or "trust_remote_code" in options:
        raise UserError(
            f"encoder.architecture={architecture}: text_cfg.tokenizer_kwargs: trust_remote_code is never "
            "given: it runs code that comes with a tokenizer"
        )
    return config


def names_tokenizer(architecture: str) -> bool:
    """Whether it is a file of the user's own that names a tokenizer of a hub or of a folder."""
    own = architecture_config(architecture) if architecture.endswith(".json") else None
    return own is not None and own["text_cfg"].get("hf_tokenizer_name") is not None


@contextmanager
def open_clip_log() -> Iterator[None]:
    """Keep from the user what open_clip logs, on the root logger, without there being anything to do.

    That is how far it has got, and that weights are random: they were asked for, or are loaded next.
    """

    def worth_reading(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and "No pretrained weights loaded" not in record.getMessage()

    root = logging.getLogger()
    # Without any handler, logging.info() would configure the program's logging for good.
    handler = None if root.handlers else logging.lastResort
    root.addFilter(worth_reading)
    if handler is not None:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.removeFilter(worth_reading)
        if handler is not None:
            root.removeHandler(handler)


def _check_torch_file(path: Path) -> None:
    """Raise ``Unreadable`` before open_clip, which compares no checksums, reads the file."""
    loaded = read_torch_file(path, mmap=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if isinstance(state, dict):
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        check_tensors(tensors, path.stat().st_size)


def _tensor_names(path: Path) -> set[str]:
    with safe_open(path, "pt") as tensors:
        return set(tensors.keys())


def _embedding_name(state: Mapping[str, Tensor]) -> str:
    """``token_embedding.weight``, or ``text.token_embedding.weight`` where the text tower is a module."""
    return next(name for name in state if name in (EMBEDDING, f"text.{EMBEDDING}"))


def _spread_embedding(state: dict[str, Tensor], clip: nn.Module) -> dict[str, Tensor]:
    """Token embeddings at their places; a token that training never used embeds as zero."""
    ids = state.pop(EMBEDDING_IDS)
    name = _embedding_name(state)
    rows = state[name].float()
    full = rows.new_zeros(len(clip.get_parameter(name)), rows.shape[1])
    full[ids] = rows
    return {**{name: value.float() for name, value in state.items()}, name: full}


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no more is known"]
    # torch says in the first line that something does not fit, and only then what.
    torch_mismatch = lines[0].startswith("Error(s) in loading state_dict") and len(lines) > 1
    return shorten(lines[1] if torch_mismatch else lines[0], 200, placeholder=" ...")
