"""What reads the mapper's tokens."""

from jaxtyping import Float
from torch import Tensor, nn


class VQAHead(nn.Module):
    """Linear → LayerNorm → GELU → Linear on the mapper's image class token (512 → 1024 → 3129: WRA)."""

    def __init__(self, width: int, hidden: int, answers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, answers)
        )

    def forward(self, class_token: Float[Tensor, "batch width"]) -> Float[Tensor, "batch answers"]:
        return self.layers(class_token)
