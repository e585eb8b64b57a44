"""What reads the mapper's tokens."""

import math

from jaxtyping import Float
from torch import Tensor, nn


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
