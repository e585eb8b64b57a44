"""The models whose explanation is measured: random weights, which do not change the time."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor, nn

from clipmapper.data.images import input_size
from clipmapper.models.clip_weights import open_clip_log, registered_name
from clipmapper.models.tokens import TokenizedText
from clipmapper.relevance import Again, AttentionTrace, Node, record
from clipmapper.tasks.vqa.model import CLIPmapper, build_clipmapper

_WORDS = 14  # tokens of a question, start and end included
_ANSWERS = 3129  # of VQA v2


@dataclass(frozen=True)
class Subject:
    """A model, a batch for it, and the scalar that is explained.

    Attributes
    ----------
    module : what is recorded.
    forward : y [batch] as a user computes it, of these images; the floor is this and its backward.
    traced : the same inside the recorder, for some rows of the batch.
    reads : the states and tokens that y reads, which released programs are told by hand.
    embeddings : where the text enters, if it does: the floor goes back to there as well.
    """

    name: str
    module: nn.Module
    images: Tensor
    forward: Callable[[Tensor], Tensor]
    traced: Callable[[Tensor], Tensor]
    reads: Callable[[AttentionTrace], list[tuple[Node, Tensor]]]
    embeddings: nn.Module | None = None
    readout: Callable | None = None

    @property
    def all_rows(self) -> Tensor:
        return torch.arange(len(self.images), device=self.images.device)

    def floor(self) -> list[Tensor]:
        """One forward and one backward to the input image (and to the words' embeddings)."""
        leaves = [self.images.clone().requires_grad_()]

        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            leaves.append(output.requires_grad_())

        with ExitStack() as stack:
            if self.embeddings is not None:
                stack.callback(self.embeddings.register_forward_hook(note).remove)
            y = self.forward(leaves[0])
        return list(torch.autograd.grad(y.sum(), leaves))

    def again(self) -> Again:
        return Again(self.module, self.traced, self.readout)

    def trace(self, rules: str = "plain") -> tuple[AttentionTrace, Tensor]:
        with record(self.module, rules=rules) as trace:
            y = self.traced(self.all_rows)
        return trace, y


class _Readout:
    """Reads out every layer of an image tower, for the methods that need that."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self.read = read

    def applies(self, step: object) -> bool:
        return True

    def __call__(self, pooled: Tensor) -> Tensor:
        return self.read(pooled)


def image_tower(name: str, architecture: str, batch: int, device: torch.device, **more) -> Subject:
    """An image tower of open_clip; y is its feature along a random direction."""
    clip = _clip(architecture, device, **more)
    visual, images = clip.visual, _images(clip.visual, batch, device)
    direction = torch.randn(visual.output_dim, device=device)

    def forward(pixels: Tensor) -> Tensor:
        return visual(pixels) @ direction

    return Subject(
        name,
        visual,
        images,
        forward,
        lambda rows: forward(images[rows]),
        lambda trace: [_read(trace, "image", 0)],
        readout=_Readout(lambda pooled: visual.ln_post(pooled) @ visual.proj @ direction),
    )


def both_towers(name: str, architecture: str, batch: int, device: torch.device) -> Subject:
    """A CLIP of open_clip; y is the similarity of image and text."""
    clip = _clip(architecture, device)
    images = _images(clip.visual, batch, device)
    ids = _ids(clip, batch, clip.context_length, device)

    def similarity(pixels: Tensor, words: Tensor) -> Tensor:
        features = clip.encode_image(pixels, normalize=True), clip.encode_text(words, normalize=True)
        return clip.logit_scale.exp() * (features[0] * features[1]).sum(dim=-1)

    return Subject(
        name,
        clip,
        images,
        lambda pixels: similarity(pixels, ids),
        lambda rows: similarity(images[rows], ids[rows]),
        lambda trace: [_read(trace, "image", 0), _read(trace, "text", ids.shape[1] - 1)],
        embeddings=clip.token_embedding,
    )


def mapper(name: str, model: CLIPmapper, batch: int, device: torch.device) -> Subject:
    """A CLIPmapper; y is the logit of an answer."""
    model = model.to(device)
    images = _images(model.encoder.clip.visual, batch, device)
    text = tokens_of_texts(model, batch, shortest=_WORDS)

    def traced(rows: Tensor) -> Tensor:
        return model(images[rows], text[rows], only_class_token=False)[:, 0]

    class Head:
        def applies(self, step) -> bool:
            return step.name.startswith("mapper")

        def __call__(self, pooled: Tensor) -> Tensor:
            return model.head(pooled)[:, 0]

    return Subject(
        name,
        model,
        images,
        lambda pixels: model(pixels, text)[:, 0],
        traced,
        lambda trace: [trace.read],
        embeddings=model.encoder.text_tower.owner.token_embedding,
        readout=Head(),
    )


def tokens_of_texts(model: CLIPmapper, batch: int, shortest: int = 8) -> TokenizedText:
    """Random questions of ``shortest`` to 14 tokens, or of fewer where the model's context is shorter."""
    longest = min(_WORDS, model.encoder.context_length)
    shortest = min(shortest, longest)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (batch, 1), generator=generator)
    lengths[0] = longest
    ids = _ids(model.encoder.clip, batch, longest, torch.device("cpu"))
    place = torch.arange(longest)
    removable = (place > 0) & (place < lengths - 1)
    return TokenizedText(ids, place < lengths, removable).to(model.device)


def build_mapper(encoder: dict, settings: dict, answers: int = _ANSWERS) -> CLIPmapper:
    torch.manual_seed(0)
    return build_clipmapper(encoder, settings, [str(i) for i in range(answers)]).eval().requires_grad_(False)


_PAPER = {
    "width": 512, "heads": 8, "mlp_ratio": 4.0, "image_position_embedding": False, "head_width": 1024
}  # fmt: skip
_B_32 = {"architecture": "ViT-B-32-quickgelu", "pretrained": None, "frozen": True}
_SHIPPED = {
    "architecture": "checkpoints/scenes-clip.json",
    "pretrained": "checkpoints/scenes-clip.safetensors",
    "frozen": True,
}


def vit_b_32_mapper(kind: str = "dual_flow") -> CLIPmapper:
    """Build a mapper of the paper's size."""
    return build_mapper(_B_32, _PAPER | {"mapper": kind, "depth": {"dual_flow": 3, "single_flow": 8}[kind]})


def scenes_mapper() -> CLIPmapper:
    """Build a mapper of the built-in experiment's size, on the shipped CLIP."""
    settings = {"mapper": "dual_flow", "width": 128, "depth": 2, "heads": 8, "head_width": 256}
    return build_mapper(_SHIPPED, _PAPER | settings | {"image_position_embedding": True}, answers=40)


# (batch, device) → a subject; those of the paper's sizes.
SUBJECTS: dict[str, Callable[[int, torch.device], Subject]] = {
    "vit_b_32": lambda b, d: image_tower("vit_b_32", "ViT-B-32", b, d),
    "vit_b_16": lambda b, d: image_tower("vit_b_16", "ViT-B-16", b, d),
    "vit_l_14_336": lambda b, d: image_tower("vit_l_14_336", "ViT-L-14-336", b, d),
    "clip_b_32": lambda b, d: both_towers("clip_b_32", "ViT-B-32", b, d),
    "clip_b_16": lambda b, d: both_towers("clip_b_16", "ViT-B-16", b, d),
    "dual_flow_b_32": lambda b, d: mapper("dual_flow_b_32", vit_b_32_mapper(), b, d),
    "single_flow_b_32": lambda b, d: mapper("single_flow_b_32", vit_b_32_mapper("single_flow"), b, d),
    # 4097 tokens
    "vit_b_16_1024px": lambda b, d: image_tower("vit_b_16_1024px", "ViT-B-16", b, d, force_image_size=1024),
}


def _read(trace: AttentionTrace, stream: str, position: int) -> tuple[Node, Tensor]:
    last = [step.output_node for step in trace.attention if step.query_node.stream == stream][-1]
    return last, torch.full((trace.batch,), position, device=trace.device)


def _clip(architecture: str, device: torch.device, **more) -> nn.Module:
    torch.manual_seed(0)
    with open_clip_log():
        clip = open_clip.create_model(registered_name(architecture), **more)
    return clip.to(device).eval().requires_grad_(False)


def _images(visual: nn.Module, batch: int, device: torch.device) -> Tensor:
    return torch.randn(batch, 3, *input_size(visual), device=device)


def _ids(clip: nn.Module, batch: int, length: int, device: torch.device) -> Tensor:
    """Random words; the last token has the largest number, which says to CLIP that it is the end."""
    words = clip.vocab_size if hasattr(clip, "vocab_size") else clip.token_embedding.num_embeddings
    ids = torch.randint(1, words - 1, (batch, length))
    ids[:, -1] = words - 1
    return ids.to(device)
