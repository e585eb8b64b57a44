"""Every method on a gradient, with LibraGrad's gradient in its place.

Not ``attn_lrp`` and ``partial_lrp``: they *are* rules for the backward pass. Of ``transformer_attribution``
∇A is LibraGrad's, R^A is LRP's as before.
"""

import inspect
from collections.abc import Callable

from clipmapper.relevance.method import differentiated
from clipmapper.relevance.methods.effective import effective_weighted, efficient_weighted
from clipmapper.relevance.methods.gae import gae
from clipmapper.relevance.methods.gradients import grad_cam, grad_eclip, input_x_gradient
from clipmapper.relevance.methods.legrad import legrad
from clipmapper.relevance.methods.lrp import transformer_attribution
from clipmapper.relevance.methods.norms import beyond_intuition, token_tm
from clipmapper.relevance.methods.on_captum import integrated_gradients
from clipmapper.relevance.methods.weighted import weighted, weighted_norm, weighted_token, weighted_token_norm
from clipmapper.relevance.rerun import with_rules
from clipmapper.relevance.result import Relevance
from clipmapper.relevance.trace import AttentionTrace

GRADIENT_METHODS = (
    weighted,
    weighted_token,
    weighted_norm,
    weighted_token_norm,
    effective_weighted,
    efficient_weighted,
    gae,
    grad_cam,
    grad_eclip,
    input_x_gradient,
    token_tm,
    beyond_intuition,
    legrad,
    transformer_attribution,
    integrated_gradients,
)


def with_libra(method: Callable[..., Relevance]) -> Callable[..., Relevance]:
    """The method by the gradients of ``backward_rules("libra")`` (LibraGrad, CVPR 2025).

    Takes a trace that was recorded so, or any with ``trace.again``. Options are those of the method.
    """

    def balanced(trace: AttentionTrace, y: object = None, **options) -> Relevance:
        trace = differentiated(trace, y, gradient=True)
        return method(with_rules(trace, "libra", balanced.__name__), **options)

    balanced.__name__ = balanced.__qualname__ = f"{method.__name__}_libra"
    balanced.__doc__ = f"{method.__name__} with LibraGrad's gradient in place of the plain one."
    balanced.__signature__ = inspect.signature(method)
    return balanced
