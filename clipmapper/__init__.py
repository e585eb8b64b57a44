"""Train CLIPmapper for vision and language, and explain it by weighted relevance accumulation.

``clipmapper.load(path)`` gives a trained model, ``clipmapper.explain(model, image, question)`` an explanation
of its answer, or, where it writes captions, ``clipmapper.explain(model, image)`` one of every word that it
writes; ``clipmapper.relevance`` holds the methods, for models of one's own too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipmapper import relevance
    from clipmapper.errors import UserError
    from clipmapper.explaining import explain
    from clipmapper.tasks.captioning.explain import CaptionExplanation
    from clipmapper.tasks.captioning.model import Captioner
    from clipmapper.tasks.registry import load
    from clipmapper.tasks.vqa.explain import Explanation
    from clipmapper.tasks.vqa.model import CLIPmapper

# Where each public name lives. They are imported when first asked for: `clipmapper --help` and a mistyped
# option need not wait for torch.
_HOMES = {
    "CLIPmapper": "clipmapper.tasks.vqa.model",
    "CaptionExplanation": "clipmapper.tasks.captioning.explain",
    "Captioner": "clipmapper.tasks.captioning.model",
    "Explanation": "clipmapper.tasks.vqa.explain",
    "UserError": "clipmapper.errors",
    "explain": "clipmapper.explaining",
    "load": "clipmapper.tasks.registry",
}
__version__ = "0.1.0"
__all__ = [
    "CLIPmapper",
    "CaptionExplanation",
    "Captioner",
    "Explanation",
    "UserError",
    "explain",
    "load",
    "relevance",
]


def __getattr__(name: str):
    if name == "relevance":
        return import_module("clipmapper.relevance")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'clipmapper' has no attribute {name!r}")
