"""Models that are in training, whose forward is one of many by chance."""

import re

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from clipmapper.errors import UserError
from clipmapper.relevance.backward.in_training import BY_CHANCE

# Modules of timm, torchvision, open_clip and transformers that leave out whole residual branches or patches.
_LEAVES_OUT = re.compile(r"DropPath|StochasticDepth|PatchDropout|DropBlock")
_SHARES = ("p", "drop_prob", "prob", "drop_rate")


def refuse_chance(root: nn.Module) -> None:
    """Raise ``UserError`` where a module of the model drops something by chance, which it names."""
    for name, module in root.named_modules():
        kind = type(module).__name__
        if not module.training or not (isinstance(module, _DropoutNd) or _LEAVES_OUT.search(kind)):
            continue
        shares = (getattr(module, share, None) for share in _SHARES)
        if any(isinstance(share, int | float) and share > 0 for share in shares):
            raise UserError(f"{name or 'the model'}: {BY_CHANCE.format(kind)}")
