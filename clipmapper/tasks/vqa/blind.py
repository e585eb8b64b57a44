"""The question-only baseline, and whether a model answers better than it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from clipmapper.tasks.vqa.batches import QuestionBatches, StreamedQuestions
from clipmapper.tasks.vqa.model import CLIPmapper, build_mapper_and_head
from clipmapper.tasks.vqa.training import answer_loss
from clipmapper.training.measures import OVERALL, Measures, differences
from clipmapper.training.module import adamw, warmup_cosine

_CONFIDENCE = 0.95
_FEW = 100  # questions: of fewer a model that sees would often not be told apart


def blind_answers(
    model: CLIPmapper,
    settings: Mapping,
    train: QuestionBatches | StreamedQuestions,
    validation: QuestionBatches,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> list[int]:
    """Answers to the validation questions, in their order and as rows of ``model.answers``, of the same
    mapper trained on questions without images.

    The image is one constant token; everything else, from the text tower to the loss, is as in training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper, head = build_mapper_and_head(model.encoder, settings, len(model.answers))
    blind = CLIPmapper(model.encoder, mapper, head, model.answers).to(model.device)
    optimiser = adamw(torch.nn.ModuleList([mapper, head]), learning_rate, weight_decay)
    schedule = warmup_cosine(optimiser, steps // 10, steps)
    generator = torch.Generator().manual_seed(seed)

    def logits(batch: Mapping) -> Tensor:
        if "text_tokens" in batch:
            tokens, valid = batch["text_tokens"].to(model.device), batch["text_valid"].to(model.device)
        else:
            text = batch["text"].to(model.device)
            with torch.no_grad():
                tokens, valid = model.encoder.text_tokens(text.ids, text.valid), text.valid
        prefix = model.encoder.prefix_tokens
        nothing = tokens.new_zeros(len(tokens), prefix, model.encoder.image_width)
        keep = torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)
        return blind.answer_logits(nothing, tokens, valid, keep=keep)

    for _ in range(steps):
        numbers = torch.randint(len(train.records), (batch_size,), generator=generator)
        batch = train.questions_only(numbers)
        optimiser.zero_grad()
        answer_loss(logits(batch), batch["targets"].to(model.device)).backward()
        optimiser.step()
        schedule.step()
    found: list[int] = []
    with torch.no_grad():
        for start in range(0, len(validation.records), batch_size):
            numbers = torch.arange(start, min(start + batch_size, len(validation.records)))
            found += logits(validation.questions_only(numbers)).argmax(dim=1).tolist()
    return found


def blind_accuracies(blind: Measures) -> dict[str, float]:
    """Accuracy of the baseline in each group."""
    right = {group: of_group["accuracy"].columns[:, 0].tolist() for group, of_group in blind.items()}
    return {group: sum(scores) / len(scores) for group, scores in right.items()}


def beyond_blind(measures: Measures, blind: Measures, seed: int) -> dict:
    """For ``results.json``: group → the interval of the accuracy less the baseline's (paired)."""
    found = differences(measures, blind, _CONFIDENCE, seed)
    return {group: of_group["accuracy"] for group, of_group in found.items()}


def unseeing_lines(measures: Measures, blind: Measures, beyond: Mapping) -> list[str]:
    """A warning for all questions, and for each family that has enough of them or is worse, where accuracy
    is not above the baseline's by more than chance: the interval of the difference holds 0, or ends below."""
    lines = []
    for group in (OVERALL, *(name for name in measures if name != OVERALL)):
        of_group = measures[group]["accuracy"]
        few = len(of_group.columns) < _FEW and beyond[group]["high"] >= 0
        if beyond[group]["low"] > 0 or (group != OVERALL and few):
            continue
        about = "" if group == OVERALL else f" {group.replace('_', ' ')} questions:"
        mean, low, high = (f"{100 * beyond[group][key]:+.1f}" for key in ("mean", "low", "high"))
        lines.append(
            f"warning:{about} the model answers as if it did not see the image: {100 * of_group.value:.1f} % "
            f"are right, of the question-only baseline {100 * blind[group]['accuracy'].value:.1f} % "
            f"(difference {mean} [{low}, {high}]{', of few questions' * few})"
        )
    return lines
