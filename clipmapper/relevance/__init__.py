"""Explanations of attention models: a trace in, relevance per input token out."""

from clipmapper.errors import UserError
from clipmapper.relevance.attention_only import raw_attention, rollout
from clipmapper.relevance.control import random
from clipmapper.relevance.effective import (
    effective_attention,
    effective_rollout,
    effective_weighted,
    efficient_attention,
    efficient_rollout,
    efficient_weighted,
)
from clipmapper.relevance.gae import gae
from clipmapper.relevance.gradients import grad_cam
from clipmapper.relevance.recorders import record
from clipmapper.relevance.result import Relevance
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node
from clipmapper.relevance.weighted import weighted, weighted_half, weighted_token

METHODS = {
    method.__name__: method
    for method in (
        weighted,
        weighted_token,
        weighted_half,
        gae,
        rollout,
        raw_attention,
        grad_cam,
        random,
        effective_attention,
        effective_rollout,
        effective_weighted,
        efficient_attention,
        efficient_rollout,
        efficient_weighted,
    )
}


def method_named(name: str):
    """The method of that name. Raises ``UserError`` naming those that there are."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "Attention",
    "AttentionTrace",
    "Join",
    "Node",
    "Relevance",
    "effective_attention",
    "effective_rollout",
    "effective_weighted",
    "efficient_attention",
    "efficient_rollout",
    "efficient_weighted",
    "gae",
    "grad_cam",
    "method_named",
    "random",
    "raw_attention",
    "record",
    "rollout",
    "weighted",
    "weighted_half",
    "weighted_token",
]
