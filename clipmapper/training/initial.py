"""A new model that begins with the weights of a trained one (``init=``), as far as they fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from open_clip.model import resize_pos_embed, set_model_preprocess_cfg
from torch import Tensor, nn

from clipmapper.models.description import PREPROCESS
from clipmapper.models.encoder import ClipEncoder


@dataclass
class Taken:
    """What a new model has of a trained one, which messages call ``source``.

    ``weights``: part → (how many were taken, how many it has). ``notes``: what is to be said of a part
    besides. ``facts``: more for ``results.json``.
    """

    source: str
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, taken: int, of: int, *notes: str) -> None:
        """Add to what is known of a part."""
        before = self.weights.get(part, (0, 0))
        self.weights[part] = before[0] + taken, before[1] + of
        self.notes.setdefault(part, []).extend(notes)

    def nothing(self, part: str, module: nn.Module, why: str) -> None:
        """Say that a part is new, and why."""
        self.add(part, 0, _count(module), why)

    def lines(self) -> list[str]:
        """Say it, a line a part."""
        lines = []
        for part, (taken, of) in self.weights.items():
            share = "new" if not taken else f"taken, {taken:,} of {of:,} weights"
            lines.append(f"init={self.source}: {'; '.join([f'{part} {share}', *self.notes[part]])}")
        return lines

    def results(self) -> dict:
        """The same for ``results.json``."""
        parts = {
            part: {"taken": taken, "of": of, "notes": self.notes[part]}
            for part, (taken, of) in self.weights.items()
        }
        return {"from": self.source, **parts, **self.facts}


def take_encoder(model: nn.Module, other: nn.Module, taken: Taken) -> None:
    """The weights of stage 1, where both have the same architecture.

    Images may be of another size: position embeddings are interpolated then, as open_clip does. Images are
    normalised and resized as the weights want it.
    """
    new, old = model.encoder, other.encoder
    if not same_encoder(new, old):
        taken.nothing("encoder", new.clip, "another architecture")
        return
    state = dict(old.clip.state_dict())
    resize_pos_embed(state, new.clip)
    with torch.no_grad():
        for name, weight in new.clip.state_dict().items():
            if ".lora_" not in name:  # adapters are beside the weights, and begin by changing nothing
                weight.copy_(state[name.replace(".base_layer.", ".")])
    wanted = {key: old.clip.visual.preprocess_cfg[key] for key in PREPROCESS}
    set_model_preprocess_cfg(new.clip, new.clip.visual.preprocess_cfg | wanted)
    preprocess = {key: list(value) if isinstance(value, tuple) else value for key, value in wanted.items()}
    model.description["encoder"]["preprocess"] = preprocess
    taken.add("encoder", _count(old.clip), _count(old.clip))


def same_encoder(one: ClipEncoder, other: ClipEncoder) -> bool:
    """Whether weights of one mean the same in the other: the architectures are, the size of images aside."""

    def apart(config: Mapping) -> dict:
        vision = {key: value for key, value in config["vision_cfg"].items() if key != "image_size"}
        return {**config, "vision_cfg": vision}

    return apart(one.config) == apart(other.config)


def take_mapper(model: nn.Module, other: nn.Module, taken: Taken) -> None:
    """The weights of stage 2: blocks from the first on; projections and places where encoders are alike."""
    alike = same_encoder(model.encoder, other.encoder)
    same_words = _reader_of_words(model) == _reader_of_words(other)
    old, new = dict(other.mapper.named_parameters()), dict(model.mapper.named_parameters())
    strange = set() if alike else {"project_image.weight", "project_text.weight", "positions", "class_token"}
    strange |= set() if same_words else {"project_text.weight"}
    count, missing = 0, set()
    with torch.no_grad():
        for name, weight in new.items():
            value = None if name in strange else old.get(name)
            if name == "positions" and value is not None and value.shape != weight.shape:
                value = _placed(value, other.encoder.grid, model.encoder.grid)
            if value is not None and value.shape == weight.shape:
                weight.copy_(value)
                count += weight.numel()
            elif name.startswith("blocks.") and int(name.split(".")[1]) < len(other.mapper.blocks):
                missing.add(name.split(".")[2])
    # Of a captioner, whose image reads no words, to one that answers.
    notes = [f"new in its blocks: {', '.join(sorted(missing))}"] if missing else []
    blocks, there = len(model.mapper.blocks), len(other.mapper.blocks)
    if blocks != there:
        notes.append(f"{min(blocks, there)} of its {there} blocks are the first of these {blocks}")
    if not alike:
        notes.append("its projections are new, for another encoder")
    elif not same_words:
        notes.append("its projection of words is new, for another reader of words")
    if model.mapper.positions is not None and other.mapper.positions is None:
        notes.append("its places are new")
    taken.add("mapper", count, _count(model.mapper), *notes)


def take_alike(new: nn.Module, old: nn.Module, part: str, taken: Taken) -> None:
    """The weights that have the same name and size in both."""
    there, count = dict(old.named_parameters()), 0
    with torch.no_grad():
        for name, weight in new.named_parameters():
            if name in there and there[name].shape == weight.shape:
                weight.copy_(there[name])
                count += weight.numel()
    taken.add(part, count, _count(new))


def _reader_of_words(model: nn.Module) -> tuple[bool, bool]:
    """Whether the mapper is given words that have not passed the text tower, and another tokenizer's."""
    own = getattr(model, "tokenizer", None)
    return model.text_embedding_only, own is not None and own is not model.encoder.tokenizer


def _placed(positions: Tensor, before: tuple[int, int], now: tuple[int, int]) -> Tensor:
    """Embeddings of places in another grid, interpolated as a CLIP's are; that of the class token stays."""
    first, places = positions[:1], positions[1:]
    grid = places.T.reshape(1, -1, *before)
    grid = nn.functional.interpolate(grid, now, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, grid.flatten(2)[0].T])


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
