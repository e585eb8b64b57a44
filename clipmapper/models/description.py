"""Checks of what a checkpoint says about its model: a closed list of keys, types and ranges.

A checkpoint may come from anybody. Nothing that it says is imported, downloaded or opened: names of
architectures are those that open_clip or timm bring along, and a configuration of one's own may name no
tokenizer and no weights of a hub or of a folder, unless the user names the same file.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import timm

from clipmapper.models.mapper import MAPPERS
from clipmapper.settings.plain_values import (
    Rule,
    absent_or,
    either,
    flag,
    list_of,
    number,
    one_of,
    section,
    shown,
    text,
    whole,
)

LAYERS, WIDTH, HEADS = whole(1, 512), whole(1, 65_536), whole(1, 1024)
_LENGTH, _VOCABULARY = whole(1, 1_048_576), whole(1, 10_000_000)
_SIDE = either(whole(1, 16_384), list_of(whole(1, 16_384), 2, 2))  # pixels
_RATIO, _DROPOUT, ID = number(0.001, 64), number(0, 1), whole(-1, 10_000_000)
# As installed: whatever else open_clip is told of while the program runs comes from files.
_BROUGHT_ALONG = frozenset(
    file.stem for file in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")
)
# Names are part of file names, and open_clip takes what stands before a colon for the place to load from.
_NAME = re.compile(r"[\w.+ -]{1,200}")


def _timm_name(value: object, where: str) -> None:
    """Check the name of a model that timm brings along; a dot and a tag would stand for weights: refused."""
    text(200)(value, where)
    if value not in timm.list_models():
        raise ValueError(f"{where}: {shown(value)} is no model of timm's own")


# What loads from a hub or a folder: the user alone may name it.
_NAMES = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")

_BLOCKS = {  # of either tower of open_clip
    "width": WIDTH,
    "layers": LAYERS,
    "mlp_ratio": _RATIO,
    "ls_init_value": absent_or(number(-1e3, 1e3)),
    "act_kwargs": absent_or(section({}, {"approximate": one_of("none", "tanh")})),
    "norm_kwargs": absent_or(section({}, {"eps": number(0, 1)})),
    "block_type": one_of(None, "default", "custom"),
    "final_ln_after_pool": flag,
    "output_tokens": flag,
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), flag
    ),
}
_VISION = section(
    {},
    _BLOCKS
    | {
        "head_width": WIDTH,
        "patch_size": absent_or(_SIDE),
        "image_size": _SIDE,
        "patch_dropout": _DROPOUT,
        "attentional_pool": one_of(True, False, "parallel", "cascade"),
        "attn_pooler_queries": whole(1, 65_536),
        "attn_pooler_heads": HEADS,
        "no_ln_pre": flag,
        "pos_embed_type": one_of("learnable"),
        "pool_type": one_of("tok", "avg", "none"),
        "timm_model_name": _timm_name,
        "timm_model_pretrained": one_of(False),
        "timm_pool": one_of("", "avg", "avgmax", "max", "token", "map", "abs_attn", "rot_attn"),
        "timm_proj": one_of(None, "", "linear", "mlp", "none"),
        "timm_proj_bias": flag,
        "timm_drop": _DROPOUT,
        "timm_drop_path": absent_or(_DROPOUT),
    },
)
_TEXT_KEYS = _BLOCKS | {
    "heads": HEADS,
    "context_length": _LENGTH,
    "vocab_size": _VOCABULARY,
    "embed_cls": flag,
    "pad_id": ID,
    "eos_id": ID,
    "no_causal_mask": flag,
    "pool_type": one_of("argmax", "eos", "first", "last", "none"),
    "proj_type": one_of("linear", "none"),
    "proj_bias": flag,
}
_TEXT = section({}, _TEXT_KEYS)
_ARCHITECTURE = {
    "embed_dim": WIDTH,
    "vision_cfg": _VISION,
    "text_cfg": _TEXT,
}
_OF_ARCHITECTURE = {
    "quick_gelu": flag,
    "custom_text": flag,
    "init_logit_scale": number(-1e3, 1e3),
    "init_logit_bias": absent_or(number(-1e3, 1e3)),
    "nonscalar_logit_scale": flag,
    "multimodal_cfg": section(
        {},
        _TEXT_KEYS | {"dim_head": WIDTH, "n_queries": whole(1, 65_536), "attn_pooler_heads": HEADS},
    ),
}
_NAMED = {  # where the user names the same file
    "hf_tokenizer_name": absent_or(text(1000)),
    "tokenizer_kwargs": absent_or(
        section(
            {},
            {
                "clean": one_of("canonicalize", "lower", "whitespace"),
                "strip_sep_token": flag,
            },
        )
    ),
    "tokenizer_mode": one_of(None, "clips"),
}
_PREPROCESS = section(
    {
        "mean": list_of(number(-10, 10), 3, 3),
        "std": list_of(number(1e-6, 10), 3, 3),
        "interpolation": one_of("bicubic", "bilinear", "random"),
        "resize_mode": one_of("shortest", "longest", "squash"),
    }
)
# Of the settings that describe how images are prepared, what the architecture does not say.
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")

MAPPER = {
    "mapper": one_of(*MAPPERS),
    "width": WIDTH,
    "depth": LAYERS,
    "heads": HEADS,
    "mlp_ratio": _RATIO,
    "image_position_embedding": flag,
}
_CHOICES = {
    "image_size": absent_or(whole(1, 16_384)),
    "trained_blocks": absent_or(LAYERS),
    "lora_rank": absent_or(whole(1, 4096)),
    "preprocess": _PREPROCESS,
}


@dataclass(frozen=True)
class ModelRules:
    """Rules of what a checkpoint of a task may say.

    ``model``: of the section on its model. ``needed``, ``optional``: of other keys.
    ``check``: whether they go together; raises ``ValueError`` with one line. ``layers``: that stand in them
    and not in the model's ``depth``.
    """

    model: Rule
    needed: Mapping[str, Rule] = field(default_factory=dict)
    optional: Mapping[str, Rule] = field(default_factory=dict)
    check: Callable[[Mapping], None] = lambda description: None
    layers: Callable[[Mapping], int] = lambda description: 0


def check_task(description: object, names: Sequence[str] | None) -> None:
    """Raise ``ValueError`` with one line where a description does not say which of these tasks it is of
    (None: of which at all)."""
    section({"task": text(100) if names is None else one_of(*names)}, _anything_of(description))(
        description, "its description"
    )


def check_description(description: Mapping, rules: ModelRules, tensors: int, named: bool = False) -> None:
    """Raise ``ValueError`` with one line for a description that is not one of :func:`build.describe`.

    ``rules``: of its task. ``tensors``: how many the checkpoint has; there is no layer without one.
    ``named``: the user has given the same architecture, so that it may name a tokenizer.
    """
    needed = {"task": text(1000), "encoder": _encoder(named), "model": rules.model, **rules.needed}
    optional = {"tokenizer": text(10_000), "data": _unread, **rules.optional}
    section(needed, optional)(description, "its description")
    rules.check(description)
    layers = sum(_layers(description)) + rules.layers(description)
    if layers > tensors:
        raise ValueError(f"its description: has {layers} layers, but the file has {tensors} tensors")


def _encoder(named: bool) -> Rule:
    of_text = section({}, _TEXT_KEYS | _NAMED) if named else _TEXT
    config = section(_ARCHITECTURE | {"text_cfg": of_text}, _OF_ARCHITECTURE)

    def architecture(value: object, where: str) -> None:
        section({"architecture": text(10_000), "frozen": flag, "config": _unread}, _CHOICES)(value, where)
        name, own = value["architecture"], value["config"]
        if own is None:
            if name not in _BROUGHT_ALONG:
                raise ValueError(f"{where}.architecture: {shown(name)} is no architecture of open_clip's own")
            return
        stem = Path(name).name
        if not _NAME.fullmatch(stem) or not stem.endswith(".json"):
            raise ValueError(f"{where}.architecture: {shown(name)} is no name of a .json file")
        _no_names(own, f"{where}.config", named)
        config(own, f"{where}.config")

    return architecture


def _no_names(config: object, where: str, named: bool) -> None:
    """Refuse names that would be loaded from elsewhere, with a line of their own."""
    of_text = config.get("text_cfg") if isinstance(config, Mapping) else None
    for key in _NAMES if isinstance(of_text, Mapping) and not named else ():
        if of_text.get(key) is not None:
            raise ValueError(
                f"{where}.text_cfg.{key}: {shown(of_text[key])} would be loaded from a hub or a folder, "
                "which only you may name; if the architecture is yours, give its file: architecture=FILE.json"
            )


def _layers(description: Mapping) -> Iterator[int]:
    config = description["encoder"]["config"] or {}
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        yield config.get(part, {}).get("layers", 0)
    yield description["model"]["depth"]


def _anything_of(description: object) -> dict:
    return dict.fromkeys(description, _unread) if isinstance(description, Mapping) else {}


def _unread(value: object, where: str) -> None:
    """Accept any value: it is checked elsewhere."""
