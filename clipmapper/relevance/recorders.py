"""From a forward pass of a model that is neither modified nor copied to an :class:`AttentionTrace`."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from clipmapper.relevance.record_any import record_any
from clipmapper.relevance.trace import AttentionTrace


def record(
    model: nn.Module, samples: Sequence[int] | None = None, rules: str = "plain"
) -> AbstractContextManager[AttentionTrace]:
    """Record the forward of ``model`` that is made inside the ``with`` block.

    ``with record(model) as trace: y = model(**inputs).logits[:, 3]``, then ``trace.backward(y)``, then
    ``weighted(trace)`` or another method. Fused attention stays on, gradients are on inside (whatever the
    caller has set), parameters take none, compiled models run as they were written. On leaving, no hook,
    patch or changed flag stays behind, also after an exception. ``samples``: identity of every sample of
    the batch, which seeds what is random. ``rules``: of the backward pass, one of ``backward_rules.RULES``;
    the forward's values are the same by all of them.

    *CLIPmapper and captioner.* The forward must compute every token of the last block:
    ``model(images, text, only_class_token=False)``, or ``only_text=False`` where the model writes captions.
    The row that is read: of an answer, the mapper's image class token; of captions, the text position that
    predicts the word, which to begin with is the last of each text. For another word
    ``trace.read_token("text", position)``, then ``trace.backward(y, keep_graph=True)``.

    *Any other model* of which :mod:`clipmapper.relevance.families` knows the attention sub-layers (see
    ``docs/recorder.md``): streams, and who reads whom, are found in the autograd graph. The row that is
    read is that of the final tokens that y's gradient reaches, unless ``trace.read_token`` says otherwise.
    To explain one part of a model, record that part: ``record(clip.visual)``.

    Raises ``RuntimeError`` when not every attention sub-layer that the model has was seen, and
    ``UserError`` for a model that cannot be followed; both name the module.
    """
    if _is_clipmapper(model):
        from clipmapper.relevance.record_clipmapper import record_clipmapper

        return record_clipmapper(model, samples, rules)
    return record_any(model, samples, rules)


def _is_clipmapper(model: nn.Module) -> bool:
    # Without importing them: who explains a model of their own need not load CLIP.
    classes = (
        ("clipmapper.models.clipmapper", "CLIPmapper"),
        ("clipmapper.models.captioner", "Captioner"),
    )
    return any(
        name in sys.modules and isinstance(model, getattr(sys.modules[name], kind)) for name, kind in classes
    )
