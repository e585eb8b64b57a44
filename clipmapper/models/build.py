"""Building a CLIPmapper from plain settings, and writing those settings into its checkpoints."""

import json
import pickle
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clipmapper.errors import UserError
from clipmapper.models.clipmapper import CLIPmapper
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.heads import VQAHead
from clipmapper.models.mapper import MAPPERS, Mapper
from clipmapper.shipped import shipped_path

# Under this key a checkpoint holds what it takes to rebuild the model.
DESCRIPTION = "clipmapper"


def build_clipmapper(encoder: Mapping, model: Mapping, answers: Sequence[str]) -> CLIPmapper:
    """A CLIPmapper with a pretrained encoder and a new mapper and head.

    ``encoder``: architecture, pretrained, frozen. ``model``: mapper ("dual_flow" or "single_flow"), width,
    depth, heads, mlp_ratio, head_width, image_position_embedding.
    """
    stage_1 = ClipEncoder(encoder["architecture"], encoder["pretrained"], encoder["frozen"])
    mapper, head = build_mapper_and_head(stage_1, model, len(answers))
    built = CLIPmapper(stage_1, mapper, head, answers)
    built.description = describe(encoder, model, answers)
    return built


def build_mapper_and_head(encoder: ClipEncoder, model: Mapping, answers: int) -> tuple[Mapper, VQAHead]:
    """Stage 2 with new weights, for the settings of :func:`build_clipmapper`."""
    mapper = MAPPERS[model["mapper"]](
        encoder.image_width,
        encoder.text_width,
        encoder.grid,
        width=model["width"],
        depth=model["depth"],
        heads=model["heads"],
        mlp_ratio=model["mlp_ratio"],
        class_token=encoder.prefix_tokens == 0,
        image_position_embedding=model["image_position_embedding"],
    )
    return mapper, VQAHead(model["width"], model["head_width"], answers)


def describe(encoder: Mapping, model: Mapping, answers: Sequence[str]) -> dict:
    """Everything but the weights, in plain types; an architecture of one's own goes in whole."""
    architecture = encoder["architecture"]
    config = None
    if architecture.endswith(".json"):
        config = json.loads(shipped_path(architecture).read_text())
    return {
        "task": "vqa",
        "encoder": {"architecture": architecture, "frozen": encoder["frozen"], "config": config},
        "tokenizer": Path(architecture).stem if config else architecture,
        "model": dict(model),
        "answers": list(answers),
    }


def load(path: str | Path, device: str | torch.device = "cpu") -> CLIPmapper:
    """A trained CLIPmapper from a checkpoint, ready to ``.answer(image, question)``.

    No pickled code is executed and nothing but the file is needed. Raises ``UserError`` when the file is
    missing, damaged, or not a checkpoint of a CLIPmapper.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint={path}: no such file")
    try:
        with warnings.catch_warnings():
            # What torch says about pickles of other programs helps nobody: the line below says enough.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        description = checkpoint[DESCRIPTION]
        state = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        model = _empty(description)
        model.load_state_dict(state)
    except pickle.UnpicklingError as error:
        # torch's own text advises to execute what is in the file.
        what = "it is damaged, or holds more than weights"
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({what})") from error
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError, OSError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({line})") from error
    return model.to(device).eval()


def _empty(description: Mapping) -> CLIPmapper:
    encoder = dict(description["encoder"])
    config = encoder.pop("config")
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            # open_clip takes a configuration of one's own only from a file, and names it after the file.
            file = Path(folder) / Path(encoder["architecture"]).name
            file.write_text(json.dumps(config))
            encoder["architecture"] = str(file)
        model = build_clipmapper(encoder | {"pretrained": None}, description["model"], description["answers"])
        if config is not None:
            _ = model.encoder.tokenizer  # which is read by the file, while it is there
    model.encoder.architecture = description["encoder"]["architecture"]
    model.description = dict(description)
    return model
