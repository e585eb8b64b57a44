"""From the mapper's text tokens to scores of the next word."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CaptionHead(nn.Module):
    """One linear map to the vocabulary on every text position (WRA: 512 → 49408)."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, vocabulary)

    def forward(self, text: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        return self.layer(text)


class TiedCaptionHead(nn.Module):
    """Scores by comparison with CLIP's own token embeddings (not in the paper).

    Between the mapper's width and another width of the embedding there is a linear map without bias. The
    embedding stays the encoder's: frozen with it, and listed among its weights only.
    """

    def __init__(self, width: int, embedding: nn.Embedding) -> None:
        super().__init__()
        vocabulary, embedded = embedding.weight.shape
        self.project = nn.Linear(width, embedded, bias=False) if width != embedded else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        # Kept out of the module tree so that no weight is listed twice.
        self._embedding = (embedding,)

    def forward(self, text: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        return F.linear(self.project(text), self._embedding[0].weight, self.bias)
