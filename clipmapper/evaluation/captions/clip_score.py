"""CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv 2104.08718), from embeddings of any CLIP.

Embeddings are the outputs of a CLIP's `encode_image` and `encode_text`, normalised or not. The paper puts
`PROMPT` before every caption, references too; so should the caller who wants its numbers, which are those of
ViT-B/32 with OpenAI's weights. Scores of different CLIPs cannot be compared.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric

PROMPT = "A photo depicts "
# The paper's w. It stretches the usual range of cosines (0 to 0.4) to 0 to 1 and changes no ranking.
WEIGHT = 2.5

# Sums are kept in whole units of 2^-40: they do not depend on how samples are spread over processes.
_UNIT = 2.0**-40


def clip_score(
    images: Float[Tensor, "samples width"], captions: Float[Tensor, "samples width"]
) -> Float[Tensor, "samples"]:
    """CLIP-S of each sample, `2.5 · max(cos(caption, image), 0)` (section 3), between 0 and 2.5."""
    return WEIGHT * _cosine(images, captions).clamp(min=0)


def ref_clip_score(
    images: Float[Tensor, "samples width"],
    captions: Float[Tensor, "samples width"],
    references: Sequence[Float[Tensor, "_ width"]],
) -> Float[Tensor, "samples"]:
    """RefCLIP-S of each sample: harmonic mean of CLIP-S and of `max(max_r cos(caption, r), 0)` (section 3).

    `references` has the embeddings of each sample's references, as many as it has. 0 where either part is 0.

    Raises ValueError for another number of samples and for a sample without references.
    """
    if len(references) != len(captions):
        raise ValueError(f"{len(captions)} captions, but references for {len(references)} samples")
    if not all(len(sample) for sample in references):
        raise ValueError("every sample needs at least one reference")
    image_part = clip_score(images, captions)
    if not references:
        return image_part
    text_part = torch.stack(
        [_cosine(caption, sample).max() for caption, sample in zip(captions, references, strict=True)]
    ).clamp(min=0)
    total = image_part + text_part
    return 2 * image_part * text_part / torch.where(total > 0, total, torch.ones_like(total))


class ClipScore(Metric):
    """Mean CLIP-S ("clip_score") over batches and processes, and mean RefCLIP-S ("ref_clip_score").

    The second is there if `references`, and needs the references' embeddings at every update.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    sums: Int64[Tensor, "scores"]
    samples: Int64[Tensor, ""]

    def __init__(self, references: bool = False) -> None:
        super().__init__()
        self._names = ("clip_score", "ref_clip_score") if references else ("clip_score",)
        self.add_state("sums", torch.zeros(len(self._names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        images: Float[Tensor, "samples width"],
        captions: Float[Tensor, "samples width"],
        references: Sequence[Float[Tensor, "_ width"]] | None = None,
    ) -> None:
        """Add samples. Raises ValueError, and adds nothing, if references are missing or not asked for, and
        where `ref_clip_score` does."""
        if (references is not None) != (len(self._names) == 2):
            raise ValueError("give references if, and only if, the metric was made with references=True")
        scores = [clip_score(images, captions)]
        if references is not None:
            scores.append(ref_clip_score(images, captions, references))
        # On the CPU, because not every device has float64.
        units = torch.stack(scores).detach().cpu().double().div(_UNIT).round().long().sum(dim=1)
        self.sums += units.to(self.sums.device)
        self.samples += len(captions)

    def compute(self) -> dict[str, Tensor]:
        """The means by name as scalar float32 tensors; NaN where no sample was seen."""
        count = self.samples.item()
        return {
            name: torch.tensor(
                total * _UNIT / count if count else math.nan, dtype=torch.float32, device=self.sums.device
            )
            for name, total in zip(self._names, self.sums.tolist(), strict=True)
        }


def _cosine(
    first: Float[Tensor, "*#rows width"], second: Float[Tensor, "*#rows width"]
) -> Float[Tensor, "*rows"]:
    # In float32 at least: half precision has three digits, and two captions often differ in the third.
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.cosine_similarity(first.to(dtype), second.to(dtype), dim=-1)
