"""Methods that weigh the attention of one sub-layer by its gradient."""

from jaxtyping import Float
from torch import Tensor

from clipmapper.relevance.attention_only import last_attention
from clipmapper.relevance.result import Relevance
from clipmapper.relevance.trace import Attention, AttentionTrace


def grad_cam(trace: AttentionTrace) -> Relevance:
    """Grad-CAM (Selvaraju et al. 2017) on attention, as Chefer et al. 2021 use it as a baseline.

    ``relu(E_h[(mean_ij ∇A) · A])`` of the last sub-layer in which the read token reads each modality, on
    the read row. The mean leaves padding out: a sample's map does not depend on what it is batched with.
    Needs ``trace.backward(y)``.
    """

    def matrix(step: Attention, queries: slice) -> Float[Tensor, "batch queries keys"]:
        rows = trace.padding_free(step.query_node.stream)[:, None, :, None]
        columns = trace.padding_free(step.key_node.stream)[:, None, None, :]
        inside = (rows & columns).to(trace.dtype)
        weight = (step.probability_gradient() * inside).sum(dim=(2, 3), keepdim=True)
        weight = weight / inside.sum(dim=(2, 3), keepdim=True)
        return (weight * step.probabilities()).mean(dim=1).clamp(min=0)[:, queries]

    return last_attention(trace, matrix)
