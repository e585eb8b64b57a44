"""CLIPmapper for visual question answering: encoder, mapper and head in one module."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from clipmapper.data.answers import normalised
from clipmapper.errors import UserError
from clipmapper.models.checkpoint import build_encoder, build_mapper, describe
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.mapper import Mapper
from clipmapper.models.tokens import TokenizedText, padding_id, tokenize
from clipmapper.tasks.recording import TwoStage
from clipmapper.training.initial import Taken, take_alike


class VQAHead(nn.Module):
    """Linear → LayerNorm → GELU → Linear on the mapper's image class token (512 → 1024 → 3129: WRA)."""

    def __init__(self, width: int, hidden: int, answers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, answers)
        )
        # One answer of all is right: binary cross-entropy need not spend its first steps on finding that out
        # (Lin et al. 2017, "Focal loss", §3.3).
        nn.init.constant_(self.layers[-1].bias, -math.log(max(answers - 1, 1)))

    def forward(self, class_token: Float[Tensor, "batch width"]) -> Float[Tensor, "batch answers"]:
        return self.layers(class_token)


class CLIPmapper(TwoStage):
    """Huang et al. 2023 (arXiv 2308.10240): a CLIP, an attention mapper over its tokens, and a VQA head.

    ``answers``: the answer vocabulary, in the order of the logits.
    """

    task = "vqa"
    only = "only_class_token"

    def __init__(self, encoder: ClipEncoder, mapper: Mapper, head: VQAHead, answers: Sequence[str]) -> None:
        super().__init__(encoder, mapper, head)
        self.answers = tuple(answers)
        self._index = {answer: i for i, answer in enumerate(self.answers)}

    def forward(
        self,
        images: Num[Tensor, "batch 3 height width"],
        text: TokenizedText,
        *,
        image_ignore: Bool[Tensor, "batch patches"] | None = None,
        text_ignore: Bool[Tensor, "batch tokens"] | None = None,
        image_keep: Int[Tensor, "batch kept"] | None = None,
        text_keep: Int[Tensor, "batch kept_text"] | None = None,
        only_class_token: bool = True,
    ) -> Float[Tensor, "batch answers"]:
        """Answer logits.

        ``image_ignore`` and ``text_ignore``: True for patches and tokens that no attention of either stage
        reads. ``image_keep`` and ``text_keep``: the same by physical removal, indices of what stays
        (``text_keep`` padded behind with -1). ``only_class_token=False`` computes the last block for every
        token, as tracing needs; the logits are the same.
        """
        if self.encoder.text_tower.padding_matters and text.ids.shape[1] < self.encoder.context_length:
            # Words read the padding there, so it is part of the text stream from end to end.
            text = text.padded(self.encoder.context_length, padding_id(self.encoder.tokenizer))
            if text_ignore is not None:
                extra = text.ids.shape[1] - text_ignore.shape[1]
                text_ignore = nn.functional.pad(text_ignore, (0, extra), value=False)
        image_tokens = self.encoder.image_tokens(images, keep=image_keep, ignore=image_ignore)
        text_tokens = self.encoder.text_tokens(text.ids, text.valid, keep=text_keep, ignore=text_ignore)
        valid = text.valid if text_keep is None else text_keep >= 0
        if text_ignore is not None:
            valid = valid & ~text_ignore
        return self.answer_logits(
            image_tokens,
            text_tokens,
            valid,
            keep=image_keep,
            image_ignore=image_ignore,
            only_class_token=only_class_token,
        )

    def answer_logits(
        self,
        image_tokens: Float[Tensor, "batch image image_width"],
        text_tokens: Float[Tensor, "batch text text_width"],
        text_valid: Bool[Tensor, "batch tokens"],
        *,
        keep: Int[Tensor, "batch kept"] | None = None,
        image_ignore: Bool[Tensor, "batch patches"] | None = None,
        only_class_token: bool = True,
    ) -> Float[Tensor, "batch answers"]:
        """Stage 2 alone, from the encoder's tokens (cached, or shared by many perturbations)."""
        appended = text_tokens.shape[1] - text_valid.shape[1]
        if appended:  # CoCa's class token comes behind the words and is always there
            text_valid = nn.functional.pad(text_valid, (0, appended), value=True)
        image, _ = self.mapper(
            image_tokens,
            text_tokens,
            keep=keep,
            image_ignore=image_ignore,
            text_valid=text_valid,
            only_class_token=only_class_token,
        )
        return self.head(image[:, 0])

    @torch.no_grad()
    def kept_scorer(self, images: Num[Tensor, "samples 3 height width"], text: TokenizedText):
        """A function that answers these samples with some of their tokens removed.

        ``scorer(sample, image_keep, text_keep)`` → logits [variants, answers], where ``sample`` are positions
        in this batch and the other two list what is kept, as in :meth:`forward` (None: everything). What a
        variant leaves whole is encoded once and shared: the text tower is not run again when only the
        image changes, nor the image tower when only the text does. Patches are embedded once as well.
        """
        images, text = images.to(self.device), text.to(self.device)
        tower = self.encoder.image_tower
        embedded, rotary = tower.embed(images)
        image_tokens = tower.behind(embedded, rotary)
        text_tokens = self.encoder.text_tokens(text.ids, text.valid)

        @torch.no_grad()
        def scorer(
            sample: Int[Tensor, "variants"],
            image_keep: Int[Tensor, "variants kept"] | None,
            text_keep: Int[Tensor, "variants kept_text"] | None,
        ) -> Float[Tensor, "variants answers"]:
            sample = sample.to(self.device)
            if image_keep is None:
                image = image_tokens[sample]
            else:
                image_keep = image_keep.to(self.device)
                image = tower.behind(embedded[sample], rotary, keep=image_keep)
            if text_keep is None:
                valid = text.valid[sample]
                length = int(valid.sum(dim=1).max())
                if text_tokens.shape[1] == text.valid.shape[1]:
                    valid, words = valid[:, :length], text_tokens[sample, :length]
                else:
                    words = text_tokens[sample]
            else:
                text_keep = text_keep.to(self.device)
                valid = text_keep >= 0
                words = self.encoder.text_tokens(text.ids[sample], text.valid[sample], keep=text_keep)
            return self.answer_logits(image, words, valid, keep=image_keep)

        return scorer

    def answer_index(self, answer: str) -> int:
        """The position of an answer in the vocabulary. Raises ``UserError`` when it is not there."""
        if answer not in self._index:
            from difflib import get_close_matches

            near = get_close_matches(answer, self.answers, 3, cutoff=0.5)
            hint = (
                f"did you mean {', '.join(near)}?" if near else f"for example {', '.join(self.answers[:5])}"
            )
            raise UserError(
                f"answer {answer!r} is not one of the model's {len(self.answers)} answers; {hint}"
            )
        return self._index[answer]

    def tokenize(self, questions: str | Sequence[str]) -> TokenizedText:
        """Token ids of one or more questions. Raises ``UserError`` for an empty question."""
        texts = [questions] if isinstance(questions, str) else list(questions)
        if not texts or any(not text.strip() for text in texts):
            raise UserError("the question is empty; ask for example 'what colour is the ring?'")
        return tokenize(self.encoder.tokenizer, texts).to(self.device)

    @torch.no_grad()
    def answer(self, image, question: str) -> str:
        """The most probable answer to a question about an image (a path, a PIL image, an array)."""
        with self.evaluating():
            logits = self(self.load_image(image), self.tokenize(question))
        return self.answers[int(logits.argmax())]


def take_answers(model: CLIPmapper, other: CLIPmapper, taken: Taken) -> None:
    """Give the head the hidden layer of another, and of its last layer the rows of answers that it knows.

    Answers are the same by name, as VQA's official scorer compares them: order and number do not matter.
    """
    names = {normalised(answer): row for row, answer in reversed(list(enumerate(other.answers)))}
    known = [row for row, answer in enumerate(model.answers) if normalised(answer) in names]
    new = [answer for answer in model.answers if normalised(answer) not in names]
    taken.facts["answers"] = {"known": len(known), "new": len(new)}
    mine, its = model.head.layers, other.head.layers
    if mine[0].weight.shape != its[0].weight.shape:
        taken.nothing("head", model.head, "another width of its hidden layer (model.head_width)")
        return
    for layer in (0, 1):
        take_alike(mine[layer], its[layer], "head", taken)
    rows = [names[normalised(model.answers[row])] for row in known]
    with torch.no_grad():
        mine[-1].weight[known], mine[-1].bias[known] = its[-1].weight[rows], its[-1].bias[rows]
    size = 1 + mine[-1].weight.shape[1]
    some = f"; new: {', '.join(new[:5])}{', …' * (len(new) > 5)}" if new else ""
    note = f"{len(known)} of {len(model.answers)} answers known{some}"
    taken.add("head", size * len(known), size * len(model.answers), note)


def build_clipmapper(encoder: Mapping, model: Mapping, answers: Sequence[str]) -> CLIPmapper:
    """A CLIPmapper with a pretrained encoder and a new mapper and head.

    ``encoder``: as for :func:`build_encoder`. ``model``: mapper ("dual_flow" or "single_flow"), width,
    depth, heads, mlp_ratio, image_position_embedding, head_width.
    """
    stage_1 = build_encoder(encoder)
    mapper, head = build_mapper_and_head(stage_1, model, len(answers))
    built = CLIPmapper(stage_1, mapper, head, answers)
    built.description = describe("vqa", stage_1, encoder, model, answers=list(answers))
    return built


def build_mapper_and_head(encoder: ClipEncoder, model: Mapping, answers: int) -> tuple[Mapper, VQAHead]:
    """Stage 2 with new weights, for the settings of :func:`build_clipmapper`."""
    return build_mapper(encoder, model), VQAHead(model["width"], model["head_width"], answers)
