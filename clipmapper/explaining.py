"""``clipmapper.explain``: one image, one question (or caption), one picture of why."""

import inspect

from torch import nn

from clipmapper.errors import UserError
from clipmapper.tasks.registry import task_of
from clipmapper.training.explained import Explanation


def explain(model: nn.Module, image, *asked, method: str | None = None, **settings) -> Explanation:
    """Explain what a model says about an image: one answer, or every word of a caption.

    ``image``: a path, PIL image or uint8 array [height, width, 3]. ``method``: a name in
    ``clipmapper.relevance.METHODS`` (default: "weighted"). Everything else is the task's:

    ``explain(model, image, question, method, answer, explained)`` of a model that answers questions: see
    :func:`clipmapper.tasks.vqa.explain.explain_answers`. ``explain(model, image, caption, method, word=...,
    word_weights=..., word_maps=..., explained=..., decoding=..., references=..., frequencies=...)`` of one
    that writes captions, all of them optional: see
    :func:`clipmapper.tasks.captioning.explain.explain_captions`.

    ``explained`` is, of the answer or of each word, its "logit" (the default), "probability" or
    "log_probability".

    Raises ``UserError`` for an unknown method, an unreadable image, and what belongs to another task.
    """
    task = task_of(model)
    names = [name for name in inspect.signature(task.explain).parameters if name not in ("model", "image")]
    names[names.index("methods")] = "method"
    given = dict(zip(names, asked, strict=False)) | settings
    if method is not None:
        given["method"] = method
    unknown = [name for name in given if name not in names]
    if unknown or len(asked) > len(names):
        others = [f"{name}=..." for name in names if name != "method"]
        what = f"no {unknown[0]}" if unknown else "nothing else"
        raise UserError(f"this model {task.does}: it takes {', '.join(others)}, {what}")
    methods = [given.pop("method", "weighted")]
    return task.explain(model, image, methods=methods, **given)[0]
