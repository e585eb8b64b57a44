"""The question-only baseline: what the wording of a question alone gives away."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clipmapper.data.answer_rule import vqa_soft_accuracy
from clipmapper.tasks.vqa.batches import QuestionBatches, StreamedQuestions
from clipmapper.tasks.vqa.model import CLIPmapper, build_mapper_and_head
from clipmapper.tasks.vqa.training import answer_loss
from clipmapper.training.module import adamw, warmup_cosine


def blind_accuracy(
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
    score: Callable[[str, Sequence[str]], float] = vqa_soft_accuracy,
) -> dict[str, float]:
    """Accuracy per family (and "overall") of the same mapper trained on questions without images.

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
    right: dict[str, list[float]] = {"overall": []}
    with torch.no_grad():
        for start in range(0, len(validation.records), batch_size):
            numbers = torch.arange(start, min(start + batch_size, len(validation.records)))
            batch = validation.questions_only(numbers)
            found = logits(batch).argmax(dim=1).tolist()
            for family, people, answer in zip(batch["families"], batch["answers"], found, strict=True):
                hit = score(model.answers[answer], people)
                right.setdefault(family, []).append(hit)
                right["overall"].append(hit)
    return {family: sum(scores) / len(scores) for family, scores in right.items()}
