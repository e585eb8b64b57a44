"""Operators that do something else while a model is trained: by chance, or with the batch's other samples."""

from collections.abc import Callable

from torch import Tensor

from clipmapper.errors import UserError

DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
BY_CHANCE = "{} is on, and an explanation would be of chance; call model.eval()"


def dropout(func: Callable, x: Tensor, p: float = 0.5, train: bool = True, *args, **kwargs) -> Tensor:
    """Dropout that is off changes nothing; raises ``UserError`` where it is on."""
    if train and p > 0:
        raise UserError(BY_CHANCE.format(func.__name__))
    return func(x, p, train, *args, **kwargs)


def attention(rule: Callable) -> Callable:
    """The rule of attention, which may drop some of its probabilities."""

    def checked(func: Callable, query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        if dropout_p > 0:
            raise UserError(BY_CHANCE.format("dropout_p of scaled_dot_product_attention"))
        return rule(func, query, key, value, attn_mask, dropout_p, *args, **kwargs)

    return checked


def rrelu(rule: Callable) -> Callable:
    """The rule of rrelu, whose slope is one by chance in training."""

    def checked(func: Callable, x: Tensor, lower=1 / 8, upper=1 / 3, training=False, *args, **kwargs):
        if training and lower != upper:
            raise UserError(BY_CHANCE.format("rrelu in training"))
        return rule(func, x, lower, upper, training, *args, **kwargs)

    return checked


def batch_norm(func: Callable, x, weight, bias, mean, variance, training, *args, **kwargs) -> Tensor:
    """By fixed statistics; raises ``UserError`` for those of the batch."""
    if training:
        raise UserError(
            "batch_norm takes the statistics of the batch, so that samples mix; call model.eval()"
        )
    return func(x, weight, bias, mean, variance, training, *args, **kwargs)
