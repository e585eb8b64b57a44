"""Small models of known layers with something of one's own among them."""

import torch
from torch import nn

TOKENS = torch.randn(2, 6, 8)


class Mixed(nn.Module):
    """Known layers with something of one's own between them."""

    def __init__(self, between):
        super().__init__()
        layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # noqa: E731
        self.first, self.between, self.second = layer(), between, layer()

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Doing(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
