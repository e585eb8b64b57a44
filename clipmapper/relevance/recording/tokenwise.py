"""Operators that leave every token where it is."""

from typing import Any

from clipmapper.relevance.backward.rule import Rule, kind_of

# After any other, where the tokens went is measured. (An operator without a derivative, NotImplemented, as of
# a quantised layer, can not be measured.)
_TOKENWISE = {
    "Add", "Sub", "Mul", "Div", "Neg", "Pow", "Rsqrt", "Sqrt", "Addmm", "Mm", "T", "View", "UnsafeView",
    "ReshapeAlias", "Clone", "ToCopy", "Alias", "Gelu", "Silu", "Relu", "Sigmoid", "Tanh", "Erf", "Hardswish",
    "NativeLayerNorm", "FusedRmsNorm", "NativeDropout", "Linear", "Expand", "Clamp", "Where",
    "AccumulateGrad", "CopyBackwards", "NotImplemented", "WarnNotImplemented",
}  # fmt: skip
_LAST_AXIS = ((2**64 - 1,), 2**64 - 1, (-1,), -1)


def leaves_tokens(function: Any) -> bool:
    """Whether every token stays where it is."""
    rule = getattr(function, "_forward_cls", None)
    if rule is not None:
        return issubclass(rule, Rule) and rule.tokenwise
    kind = kind_of(function)
    if kind in ("Mean", "Sum"):
        return getattr(function, "_saved_dim", None) in _LAST_AXIS
    return kind in _TOKENWISE
