"""Programs of other libraries that give relevance, called as they are meant to be.

captum: ``InputXGradient`` and ``IntegratedGradients`` with their defaults. lxt (its ``efficient`` half):
gradient × input after its patches of a model's classes, which are taken back behind every explanation.
"""

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn

_NOT_THERE = "{0} is not installed: pip install 'clipmapper[compare]'"


class Missing(Exception):
    """Says in one line why a program can't be run here."""


class Program(NamedTuple):
    """``ours``: the method here that gives the same for a subject. ``ready``: the program for a subject;
    raises ``Missing``."""

    name: str
    ours: Callable[[Any], str]
    ready: Callable[[Any], Callable[[], Tensor]]


def _captum(kind: str, subject) -> Callable[[], Tensor]:
    try:
        from captum import attr
    except ImportError as error:
        raise Missing(_NOT_THERE.format("captum")) from error

    def explain() -> Tensor:
        tokens = subject.tokens().requires_grad_()
        return getattr(attr, kind)(subject.end).attribute(tokens).detach().sum(dim=-1)

    return explain


def _lxt(subject) -> Callable[[], Tensor]:
    if importlib.util.find_spec("lxt") is None:
        raise Missing(_NOT_THERE.format("lxt"))
    table = _TABLES[subject.name]()

    def explain() -> Tensor:
        with _patched(table):
            tokens = subject.tokens().requires_grad_()
            (gradient,) = torch.autograd.grad(subject.end(tokens).sum(), tokens)
        return (gradient * tokens.detach()).sum(dim=-1)

    return explain


Patches = Mapping[Any, Callable[[Any], bool]]  # of classes and modules


@contextmanager
def _patched(table: Patches) -> Iterator[None]:
    """As ``lxt.efficient.monkey_patch``, which has no way back."""
    before = {target: dict(vars(target)) for target in table}
    try:
        for target, patch in table.items():
            patch(target)
        yield
    finally:
        for target, values in before.items():
            for name in vars(target).keys() - values.keys():
                delattr(target, name)
            for name, value in values.items():
                if vars(target)[name] is not value:
                    setattr(target, name, value)


def _vit() -> Patches:
    """lxt's table of torchvision's ViT (CP-LRP, without zennit's rules of linear layers), for the classes of
    open_clip's."""
    patches = _of_lxt("patches")
    return {
        open_clip.transformer.LayerNorm: partial(patches.patch_method, patches.layer_norm_forward),
        nn.GELU: partial(patches.patch_method, patches.non_linear_forward, keep_original=True),
        nn.MultiheadAttention: partial(
            patches.patch_method, patches.cp_multi_head_attention_forward, keep_original=True
        ),
    }


def _llama() -> Patches:
    """lxt's table, but for one thing: lxt 2.1 replaces the table of attention functions by a plain dict,
    which transformers 5 can't read; here what comes out of that table is wrapped, in lxt's own wrapper."""
    patches, llama = _of_lxt("patches"), _of_lxt("models.llama")

    class Wrapped:
        def __init__(self, functions) -> None:
            self.functions = functions

        def get_interface(self, *asked) -> Callable:
            return patches.wrap_attention_forward(self.functions.get_interface(*asked))

    def wrap_attention(module: types.ModuleType) -> bool:
        module.ALL_ATTENTION_FUNCTIONS = Wrapped(module.ALL_ATTENTION_FUNCTIONS)
        return True

    return {**llama.attnLRP, llama.modeling_llama: wrap_attention}


def _bert() -> Patches:
    """Raises ``Missing``: lxt 2.1 puts a copy of transformers 4's BERT in the place of the installed one."""
    try:
        _of_lxt("models.bert", whole=True)
    except ImportError as error:
        which = f"lxt {version('lxt')} with transformers {version('transformers')}"
        raise Missing(f"{which}: its copy of BERT does not load ({error})") from error
    raise Missing("lxt's copy of BERT takes the place of a whole module, which can't be taken back")


_TABLES: Mapping[str, Callable[[], Patches]] = {"vit_b_16": _vit, "bert_base": _bert, "small_llama": _llama}


def _of_lxt(part: str, *, whole: bool = False) -> types.ModuleType:
    """``lxt.efficient.<part>``. Unless ``whole``, without its copy of BERT, for want of which nothing of
    lxt.efficient would load."""
    bert, name = "lxt.efficient.models.bert", f"lxt.efficient.{part}"
    if not whole and bert not in sys.modules:
        empty = types.ModuleType(bert)
        empty.modeling_bert, empty.attnLRP = empty, {}
        sys.modules[bert] = empty
    elif whole:
        for loaded in [module for module in sys.modules if module.split(".")[0] == "lxt"]:
            del sys.modules[loaded]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that zennit is not there
        return importlib.import_module(name)


LIBRARIES: Mapping[str, tuple[Program, ...]] = {
    "captum": (
        Program("InputXGradient", lambda subject: "input_x_gradient", partial(_captum, "InputXGradient")),
        Program(
            "IntegratedGradients",
            lambda subject: "integrated_gradients",
            partial(_captum, "IntegratedGradients"),
        ),
    ),
    "lxt": (Program("AttnLRP", lambda subject: subject.ours, _lxt),),
}
