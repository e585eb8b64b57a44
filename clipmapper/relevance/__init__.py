"""Explanations of attention models: a trace in, relevance per input token out."""

from clipmapper.errors import UserError
from clipmapper.relevance.backward.rules import backward_rules
from clipmapper.relevance.call_forms import Attribution, quantus_explainer
from clipmapper.relevance.method import Needs, Relevance, needs_of
from clipmapper.relevance.methods.attention_only import attention_flow, random, raw_attention, rollout
from clipmapper.relevance.methods.effective import (
    effective_attention,
    effective_rollout,
    effective_weighted,
    efficient_attention,
    efficient_rollout,
    efficient_weighted,
)
from clipmapper.relevance.methods.gae import gae
from clipmapper.relevance.methods.gradients import (
    attn_lrp,
    grad_cam,
    grad_eclip,
    input_x_gradient,
    integrated_gradients,
    legrad,
    occlusion,
)
from clipmapper.relevance.methods.hidden_states import (
    att_cat,
    full_grad,
    value_gradient,
    value_gradient_libra,
    value_gradient_plain,
    x_grad_cam,
)
from clipmapper.relevance.methods.lrp import (
    GRADIENT_METHODS,
    partial_lrp,
    transformer_attribution,
    weighted_evidence,
    weighted_evidence_libra,
    with_libra,
)
from clipmapper.relevance.methods.norms import alti, beyond_intuition, token_tm
from clipmapper.relevance.methods.removal import leave_one_out
from clipmapper.relevance.methods.weighted import (
    weighted,
    weighted_half,
    weighted_norm,
    weighted_token,
    weighted_token_norm,
)
from clipmapper.relevance.recording.record import record
from clipmapper.relevance.rerun import Again
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node

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
        weighted_norm,
        weighted_token_norm,
        attention_flow,
        effective_attention,
        effective_rollout,
        effective_weighted,
        efficient_attention,
        efficient_rollout,
        efficient_weighted,
        grad_eclip,
        legrad,
        beyond_intuition,
        token_tm,
        alti,
        transformer_attribution,
        partial_lrp,
        attn_lrp,
        integrated_gradients,
        occlusion,
        leave_one_out,
        input_x_gradient,
        full_grad,
        att_cat,
        x_grad_cam,
        value_gradient,
        value_gradient_libra,
        value_gradient_plain,
        weighted_evidence,
        weighted_evidence_libra,
        *map(with_libra, GRADIENT_METHODS),
    )
}


# What is compared unless told otherwise, as in conf/callbacks/relevance.yaml.
COMPARED = (
    "weighted",
    "weighted_token",
    "weighted_half",
    "gae",
    "rollout",
    "raw_attention",
    "grad_cam",
    "random",
)


# Names by which a method is looked for as well: it has forms by several rules, and this one is the default.
ALSO_CALLED = {
    "value_gradient_attn_lrp": "value_gradient",
    "weighted_evidence_attn_lrp": "weighted_evidence",
}


def method_named(name: str):
    """The method of that name. Raises ``UserError`` naming those that there are."""
    name = ALSO_CALLED.get(name, name)
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "COMPARED",
    "METHODS",
    "Again",
    "Attention",
    "AttentionTrace",
    "Attribution",
    "Join",
    "Needs",
    "Node",
    "Relevance",
    "alti",
    "att_cat",
    "attention_flow",
    "attn_lrp",
    "backward_rules",
    "beyond_intuition",
    "effective_attention",
    "effective_rollout",
    "effective_weighted",
    "efficient_attention",
    "efficient_rollout",
    "efficient_weighted",
    "full_grad",
    "gae",
    "grad_cam",
    "grad_eclip",
    "input_x_gradient",
    "integrated_gradients",
    "leave_one_out",
    "legrad",
    "method_named",
    "needs_of",
    "occlusion",
    "partial_lrp",
    "quantus_explainer",
    "random",
    "raw_attention",
    "record",
    "rollout",
    "token_tm",
    "transformer_attribution",
    "value_gradient",
    "value_gradient_libra",
    "value_gradient_plain",
    "weighted",
    "weighted_evidence",
    "weighted_evidence_libra",
    "weighted_half",
    "weighted_norm",
    "weighted_token",
    "weighted_token_norm",
    "with_libra",
    "x_grad_cam",
]
