"""What decides the answers to questions, for planted maps."""

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores.planted import Deciding, patch_shares
from clipmapper.models.tokens import word_positions
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.tasks.vqa.samples import QuestionSamples


def require_truth(samples: QuestionSamples) -> None:
    """Raise ``UserError`` where it is not known of every question which pixels and words decide it."""
    if unknown := samples.undecided():
        raise UserError(
            f"planted: of {unknown} of {len(samples)} questions it is not known what decides the "
            "answer (pixels and words); the built-in world knows it"
        )


def deciding_of(model: CLIPmapper, samples: QuestionSamples) -> Deciding:
    """The deciding patches and words of every sample; errors as of :func:`require_truth`."""
    require_truth(samples)
    text, tokenizer = samples.text, model.encoder.tokenizer
    words = []
    for row, deciding in enumerate(samples.deciding):
        spelled = word_positions(tokenizer, text.ids[row], text.removable[row])
        words.append(
            [(decides, positions) for decides, (_, positions) in zip(deciding, spelled, strict=True)]
        )
    return Deciding(patch_shares(samples.masks, model.encoder.grid), words)
