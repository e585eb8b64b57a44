"""Methods of the captum library, on the tokens that enter the first sub-layers."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.relevance.method import Relevance, as_relevance, explanation, with_sign
from clipmapper.relevance.rerun import again, input_tokens
from clipmapper.relevance.trace import AttentionTrace

_VARIANTS = 64  # at least so many in one forward, and one of each sample


@explanation()
def integrated_gradients(trace: AttentionTrace, steps: int = 50, sign: str = "positive") -> Relevance:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from captum, summed over channels.

    The line runs from tokens of 0 (captum's default) to those that enter the first sub-layers, position
    embeddings included. ``sign`` as in :func:`~clipmapper.relevance.methods.gradients.input_x_gradient`;
    "both" sums up to the change of y along the line. What is part of the model (learned queries, a class
    token that the mapper adds) stays as it is. Defined for every trace with ``trace.again``. Raises
    ``UserError`` where captum is not installed.
    """
    attribution, tokens, options = _captum(trace, "IntegratedGradients", "integrated_gradients")
    batch = max(trace.batch, _VARIANTS)
    found = attribution.attribute(tuple(tokens.values()), n_steps=steps, internal_batch_size=batch, **options)
    return _relevance(trace, tokens, found, lambda values: values.sum(dim=-1), sign)


@explanation()
def occlusion(trace: AttentionTrace, sign: str = "positive") -> Relevance:
    """Occlusion (Zeiler & Fergus 2014) from captum: by how much y falls when one token is set to 0.

    Tokens, ``sign`` and requirements as in :func:`integrated_gradients`. (Removing a token from the sequence
    is another question; that is what the perturbation test asks.)
    """
    attribution, tokens, options = _captum(trace, "Occlusion", "occlusion")
    windows = tuple((1, values.shape[-1]) for values in tokens.values())
    at_once = max(1, _VARIANTS // trace.batch)
    with trace.device:  # captum (0.9) makes some of its masks on the default device
        found = attribution.attribute(
            tuple(tokens.values()), windows, perturbations_per_eval=at_once, **options
        )
    # Every channel of a token holds what the whole token changes.
    return _relevance(trace, tokens, found, lambda values: values[..., 0], sign)


def _captum(trace: AttentionTrace, kind: str, method: str):
    """The captum object, its inputs, and what it is to hand on to the forward."""
    running = again(trace, method)
    if kind == "IntegratedGradients":
        trace.require_no_cut()
    try:
        from captum import attr
    except ImportError as missing:
        raise UserError(f"{method} needs captum: pip install 'clipmapper[captum]'") from missing
    tokens, usual = input_tokens(trace, method), torch.get_default_device()

    def forward(*arguments: Tensor) -> Tensor:
        *values, rows = arguments
        with usual:  # the model's own default, whatever is set for captum
            return running.score(trace, rows, dict(zip(tokens, values, strict=True)))

    rows = torch.arange(trace.batch, device=trace.device)
    return getattr(attr, kind)(forward), tokens, {"additional_forward_args": (rows,)}


def _relevance(
    trace: AttentionTrace,
    tokens: Iterable[str],
    found: tuple[Tensor, ...],
    per_token: Callable[[Tensor], Tensor],
    sign: str,
) -> Relevance:
    # captum's occlusion gives float32, whatever it is given.
    values = (per_token(v.detach()).to(trace.dtype) for v in found)
    streams = dict(zip(tokens, values, strict=True))
    return with_sign(as_relevance(trace, streams), sign)
