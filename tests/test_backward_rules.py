"""The rules of every operator: input × gradient keeps its sum, however a network is written."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipmapper.errors import UserError
from clipmapper.relevance import backward_rules
from clipmapper.relevance.backward.elementwise import ELEMENTWISE
from clipmapper.relevance.backward.products import MULTIPLICATIONS

RULES = ("libra", "attn_lrp", "lrp")
OF_GRADIENTS = RULES[:2]


def tensor(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, W, V, KERNEL = tensor(2, 5, 8), tensor(8, 6, seed=1), tensor(8, seed=2), tensor(6, 8, 3, seed=3)
TOWARD = tensor(2, 5, 6, seed=4)


def relevance(function, rules, *inputs):
    """Input × gradient of each, of y = the sum of what comes out in some mixture."""
    given = [x.clone().requires_grad_() for x in inputs]
    with backward_rules(rules):
        out = function(*given)
    plain = function(*inputs)
    assert torch.equal(out.detach(), plain), "the values of the forward are those of the model"
    toward = tensor(*out.shape, seed=7)
    found = torch.autograd.grad((out * toward).sum(), given)
    y = float((plain.detach() * toward).sum())
    return [(x * g).detach() for x, g in zip(inputs, found, strict=True)], y


# --- Sums ------------------------------------------------------------------------------------------------
OPTIONS = {
    **dict.fromkeys(("clamp", "clip"), (-0.5, 0.7)),
    **dict.fromkeys(("pow", "float_power"), (3,)),
    "clamp_max": (0.7,),
    "clamp_min": (-0.5,),
    "prelu": (torch.tensor(0.2, dtype=torch.float64),),
    "threshold": (0.1, 0.3),
}
POSITIVE = {"log", "log10", "log2", "sqrt", "logit", "acosh", "arccosh"}  # of numbers in their domain


@pytest.mark.parametrize("rules", RULES)
def test_a_function_of_one_number_passes_relevance_as_it_is(rules):
    for name in sorted(ELEMENTWISE):
        function = next(
            getattr(place, name)
            for place in (torch, F, torch._C._nn, torch._C._special)
            if hasattr(place, name)
        )
        x = (X / 4).clamp(-0.9, 0.9)
        if name in POSITIVE:
            x = x.abs() + (1.1 if name.endswith("cosh") else 0.01)
            x = x.clamp(max=0.9) if name == "logit" else x
        more = OPTIONS.get(name, ())
        (found,), _ = relevance(lambda t, f=function, more=more: f(t, *more), rules, x)
        expected = (function(x, *more) * tensor(*X.shape, seed=7)).detach()
        torch.testing.assert_close(
            found, expected, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_where_the_number_is_zero():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with backward_rules("libra"):
        y, gate, z = x.tanh(), x.square(), x.cos()
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == pytest.approx([1] * 3, rel=1e-9)
    assert torch.autograd.grad(gate.sum(), x)[0].tolist() == pytest.approx([0] * 3, abs=1e-6)
    assert torch.autograd.grad(z.sum(), x)[0].tolist() == [0] * 3  # 1 at 0: no gradient could say it


NORMED = {
    "layer_norm": lambda x: F.layer_norm(x, (8,), V),
    "rms_norm": lambda x: F.rms_norm(x, (8,), V),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 2, V).transpose(1, 2),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "a norm that is written out": lambda x: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
    ),
    "by rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "by a power": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5,
    "divided by its length": lambda x: x / x.norm(dim=-1, keepdim=True),
    "times 1 / its length": lambda x: x * (1 / torch.linalg.norm(x, dim=-1, keepdim=True)),
    "length": lambda x: x.norm(dim=-1),
    "instance_norm": lambda x: F.instance_norm(x),
    "variance": lambda x: x.var(dim=-1),
}
PRODUCTS = {
    "x · x": lambda x: x * x,
    "in place": lambda x: (x @ W).mul_(x @ W),
    "SwiGLU": lambda x: F.silu(x @ W) * (x @ W.flip(0)),
    "glu by sigmoid": lambda x: torch.sigmoid(x @ W) * (x @ W.flip(0)),
    "three factors": lambda x: torch.einsum("bnd,bnd,bnd->bn", x, x, x),
    "matmul": lambda x: x @ x.mT,
    "bmm": lambda x: torch.bmm(x, x.mT),
    "baddbmm": lambda x: torch.baddbmm(x.new_zeros(2, 5, 5), x, x.mT),
    "cosine": lambda x: F.cosine_similarity(x[:, :1], x, dim=-1),
    "squared relu": lambda x: F.relu(x @ W).square(),
    "max": lambda x: (x @ W).amax(dim=1),
    "glu": lambda x: F.glu(x @ W, -1),
    "an einsum of two vectors": lambda x: torch.einsum("bnd,bmd->bnm", x, x),
}
B = tensor(6, seed=5)
LINEAR = {
    "linear": lambda x: F.linear(x, W.T),
    "matmul": lambda x: torch.matmul(x, W),
    "@": lambda x: x @ W,
    "addmm": lambda x: torch.addmm(W.new_zeros(6), x.flatten(0, 1), W).view(2, 5, 6),
    "mm": lambda x: x.flatten(0, 1).mm(W).view(2, 5, 6),
    "bmm": lambda x: torch.bmm(x, W.expand(2, 8, 6)),
    "baddbmm": lambda x: torch.baddbmm(W.new_zeros(2, 5, 6), x, W.expand(2, 8, 6)),
    "einsum": lambda x: torch.einsum("bnd,df->bnf", x, W),
    "einsum, weights first": lambda x: torch.einsum("df,bnd->bnf", W, x),
    "tensordot": lambda x: torch.tensordot(x, W, 1),
    "weights first": lambda x: (W.T @ x.mT).mT,
    "convolution": lambda x: F.conv1d(x.mT, W.T[..., None]).mT,
    "mv": lambda x: torch.stack([torch.stack([torch.mv(W.T, token) for token in row]) for row in x]),
    "@=": lambda x: torch.Tensor.__matmul__(x, W),
}  # fmt: skip


@pytest.mark.parametrize("name", [*NORMED, *PRODUCTS, *LINEAR])
def test_the_sum_is_kept(name):
    for rules in RULES:
        (found,), y = relevance((NORMED | PRODUCTS | LINEAR)[name], rules, X)
        assert torch.isfinite(found).all()
        assert float(found.sum()) == pytest.approx(y, rel=1e-6), rules


@pytest.mark.parametrize("rules", RULES)
def test_the_sum_is_kept_by_convolutions(rules):
    for function in (
        lambda x: F.conv1d(x.mT, KERNEL, padding=1),
        lambda x: F.conv1d(x.mT, KERNEL[:, :1].repeat(8, 1, 1)[:8], groups=8),  # depth-wise
        lambda x: F.conv2d(x[:, None], KERNEL[:1, :1, None], stride=(1, 2)),
        lambda x: F.conv_transpose1d(x, tensor(5, 2, 3, seed=5)),
    ):
        (found,), y = relevance(function, rules, X)
        assert float(found.sum()) == pytest.approx(y, rel=1e-6)


# --- One network, written twice --------------------------------------------------------------------------
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_map_is_one_however_it_is_written(name):
    for rules in RULES:
        (expected,), _ = relevance(LINEAR["linear"], rules, X)
        (found,), _ = relevance(LINEAR[name], rules, X)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_z_plus_by_hand():
    """x = (1, −2), weights (3, 4): products 3 and −8, y = −5 = R; only the positive product shares R."""
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    with backward_rules("lrp"):
        y = F.linear(x, weight)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (x * gradient).tolist()[0] == pytest.approx([-5, 0])


@pytest.mark.parametrize("name", ["linear", "matmul", "einsum"])
def test_z_plus_where_every_product_is_negative(name):
    """Products −3 and −1, R = −4: they share it, where the released code loses it."""
    x = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[-3.0], [1.0]], dtype=torch.float64)
    written = {
        "linear": lambda: F.linear(x, weight.T),
        "matmul": lambda: x @ weight,
        "einsum": lambda: torch.einsum("bnd,df->bnf", x, weight),
    }
    with backward_rules("lrp"):
        y = written[name]()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (x * gradient).flatten().tolist() == pytest.approx([-3, -1])


def test_z_plus_of_an_einsum_with_two_weights_by_hand():
    """Products x_d a_dk b_k: −3 and −2 of the first number, 6 and −4 of the second, whose 6 gets R = −3."""
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([-3.0, 2.0], dtype=torch.float64)
    with backward_rules("lrp"):
        y = torch.einsum("nd,dk,k->n", x, a, b)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [-3] and (x * gradient).tolist()[0] == pytest.approx([0, -3])


PAIRS = {
    "norm": (NORMED["by rsqrt"], NORMED["by a power"]),
    "length": (NORMED["normalize"], NORMED["divided by its length"]),
    "inverse length": (NORMED["normalize"], NORMED["times 1 / its length"]),
    "rms": (lambda x: F.rms_norm(x, (8,), eps=1e-5), NORMED["by rsqrt"]),
    "layer norm": (
        lambda x: F.layer_norm(x, (8,)),
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    ),
    "instance norm": (
        lambda x: F.instance_norm(x, weight=V[:5]),
        lambda x: F.group_norm(x, 5, weight=V[:5]),
    ),
    "glu": (lambda x: F.glu(x, -1), lambda x: x[..., :4] * x[..., 4:].sigmoid()),
    "gelu, written out": (F.gelu, lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "gelu by tanh, written out": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    ),
    "hardswish, written out": (F.hardswish, lambda x: x * F.relu6(x + 3) / 6),
    "a residual connection with a factor": (
        lambda x: torch.add(x, torch.tanh(x @ W @ W.T), alpha=0.5),
        lambda x: x + 0.5 * torch.tanh(x @ W @ W.T),
    ),
    "less a factor": (
        lambda x: torch.sub(x, torch.tanh(x @ W @ W.T), alpha=0.5),
        lambda x: x - 0.5 * torch.tanh(x @ W @ W.T),
    ),
    "a residual connection in baddbmm": (
        lambda x: torch.baddbmm(x, torch.tanh(x), (W @ W.T).expand(2, 8, 8), alpha=-0.5),
        lambda x: x + torch.tanh(x) @ (-0.5 * W @ W.T),
    ),
    "a residual connection in addmm": (
        lambda x: torch.addmm(x.flatten(0, 1), x.flatten(0, 1).tanh(), W @ W.T),
        lambda x: x.flatten(0, 1) + x.flatten(0, 1).tanh() @ (W @ W.T),
    ),
    "a residual connection in addcmul": (
        lambda x: torch.addcmul(x, torch.tanh(x), V, value=0.5),
        lambda x: x + torch.tanh(x) * V * 0.5,
    ),
    "addbmm": (
        lambda x: torch.addbmm(tensor(5, 6), x, W.expand(2, 8, 6)),
        lambda x: (x @ W).sum(0) + tensor(5, 6),
    ),
    "addmm with names": (
        lambda x: F.linear(x[0], 3 * W.T, 2 * B),
        lambda x: torch.addmm(input=B, mat1=x[0], mat2=W, beta=2, alpha=3),
    ),
    "addmm with one name": (
        lambda x: F.linear(x[0], W.T, B),
        lambda x: torch.addmm(B, x[0], mat2=W),
    ),
    "addmm less a product": (
        lambda x: F.linear(x[0], -W.T, 1000 * B),
        lambda x: torch.addmm(1000 * B, x[0], W, alpha=-1),
    ),
    "a bias for each token": (
        lambda x: torch.baddbmm(tensor(1, 5, 6), x[:1], W[None])[0, 3:4],
        lambda x: torch.addmm(tensor(1, 5, 6)[0], x[0], W)[3:4],
    ),
    "addmv with names": (
        lambda x: F.linear(x[0, 0], W.T, B),
        lambda x: torch.addmv(B, mat=W.T, vec=x[0, 0]),
    ),
    "named batches": (
        lambda x: torch.baddbmm(B, x, W.expand(2, 8, 6)),
        lambda x: torch.baddbmm(B, batch1=x, batch2=W.expand(2, 8, 6)),
    ),
    "a named number": (lambda x: x + 1, lambda x: torch.add(x, other=1)),
    "einsum that exchanges axes": (lambda x: x.mT, lambda x: torch.einsum("bnd->bdn", x)),
    "einsum that sums": (lambda x: x.sum(1), lambda x: torch.einsum("bnd->bd", x)),
    "einsum with a scale": (lambda x: x @ (V[:, None] * W), lambda x: torch.einsum("bnd,d,df->bnf", x, V, W)),
    "linalg": (lambda x: x @ W, lambda x: torch.linalg.matmul(x, W)),
    "square": (lambda x: x.square(), lambda x: x * x),
    "power": (lambda x: x.square(), lambda x: x**2),
    "silu": (F.silu, lambda x: nn.SiLU()(x)),
    "relu": (F.relu, lambda x: x.clamp(min=0)),
    "subtraction": (lambda x: x @ W - x @ W.flip(0), lambda x: x @ W + -(x @ W.flip(0))),
    "in place": (lambda x: x @ W + x @ W.flip(0), lambda x: (x @ W).add_(x @ W.flip(0))),
    "+=": (lambda x: (x @ W) * F.relu(x @ W), lambda x: (x @ W).mul_(F.relu(x @ W))),
    "gelu": (F.gelu, lambda x: nn.GELU()(x)),
    "named input": (F.gelu, lambda x: F.gelu(input=x)),
    "named softmax": (lambda x: x.softmax(-1), lambda x: torch.softmax(input=x, dim=-1)),
    "named summands": (lambda x: x @ W + x @ W.flip(0), lambda x: torch.add(x @ W, other=x @ W.flip(0))),
    "named factors": (lambda x: x @ W, lambda x: torch.matmul(input=x, other=W)),
    "named weights": (lambda x: F.linear(x, W.T), lambda x: F.linear(input=x, weight=W.T)),
    "named divisor": (
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: torch.div(x, other=x.norm(dim=-1, keepdim=True)),
    ),
    "named size": (lambda x: F.layer_norm(x, (8,)), lambda x: F.layer_norm(input=x, normalized_shape=(8,))),
    "gated": (
        lambda x: F.silu(x @ W) * (x @ W),
        lambda x: torch.einsum("bnf,bnf->bnf", F.silu(x @ W), x @ W),
    ),
    "cosine": (
        lambda x: F.cosine_similarity(x[:, 0], x[:, 1], dim=-1),
        lambda x: (F.normalize(x[:, 0], dim=-1) * F.normalize(x[:, 1], dim=-1)).sum(-1),
    ),
    "patches": (
        lambda x: F.conv1d(x[:, None].flatten(2), tensor(6, 1, 4, seed=6), stride=4).mT,
        lambda x: x[:, None].flatten(1).unflatten(1, (-1, 4)) @ tensor(6, 1, 4, seed=6)[:, 0].T,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_one_network_written_twice(name):
    one, other = PAIRS[name]
    torch.testing.assert_close(one(X), other(X))
    for rules in RULES:
        (first,), _ = relevance(one, rules, X)
        (second,), _ = relevance(other, rules, X)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rules", RULES)
def test_attention_written_out(rules):
    """Softmax of a product, and a product with it, is the fused function."""

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def written(q, k, v):
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

    inputs = [tensor(2, 1, 5, 4, seed=seed) for seed in (1, 2, 3)]
    found = []
    for function in (fused, written):
        given_ = [x.clone().requires_grad_() for x in inputs]
        with backward_rules(rules):
            out = function(*given_)
        found.append(torch.autograd.grad((out * tensor(*out.shape, seed=8)).sum(), given_, allow_unused=True))
    for one, other in zip(*found, strict=True):
        one, other = (torch.zeros(1) if g is None or not g.any() else g for g in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    rules=st.sampled_from(RULES),
    names=st.lists(
        st.sampled_from([*NORMED, *LINEAR, "SwiGLU", "squared relu", "tanh", "residual"]), max_size=5
    ),
)
def test_sums_are_kept_by_any_network(rules, names):
    """Of operators that keep [2, 5, ·], one behind the other, with maps back to 8 numbers between them.

    (Numbers keep about their size: those of 1e-100, which lrp's divisions take for 0, lose their relevance.)
    """
    kept = [name for name in names if name not in ("length", "variance")]

    def network(x):
        for name in kept:
            if name == "residual":
                x = x + torch.tanh(x @ W @ W.T)
                continue
            x = torch.tanh(x) if name == "tanh" else (NORMED | PRODUCTS | LINEAR)[name](x)
            x = (x if x.shape[-1] == 8 else x @ W.T) / 4
        return x

    (found,), y = relevance(network, rules, X)
    assert float(found.sum()) == pytest.approx(y, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rules", RULES)
def test_a_residual_connection_into_a_view_behind_attention(rules):
    def attended(x):
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0].clone()

    def in_place(x):
        whole = attended(x)
        whole[:, :] += torch.tanh(x @ W @ W.T)
        return whole

    (first,), _ = relevance(lambda x: attended(x) + torch.tanh(x @ W @ W.T), rules, X)
    (second,), _ = relevance(in_place, rules, X)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


WRITTEN_SOFTMAXES = {
    "exp / sum": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "one exp": lambda s: (lambda e: e / e.sum(-1, keepdim=True))((s - s.max(-1, keepdim=True).values).exp()),
    "with an epsilon": lambda s: (lambda e: e / (e.sum(-1)[..., None] + 1e-9).clamp(min=1e-6))(s.exp()),
    "of its logarithm": lambda s: s.log_softmax(-1).exp(),
}


@pytest.mark.parametrize("name", WRITTEN_SOFTMAXES)
@pytest.mark.parametrize("rules", RULES)
def test_a_softmax_that_is_written_out_is_refused(name, rules):
    """(The gates of exp and the constant that it is divided by are no softmax's rule.)"""

    def network(x):
        return WRITTEN_SOFTMAXES[name](x @ x.mT / 30) @ x

    if (name, rules) == ("of its logarithm", "lrp"):  # where both pass relevance as it is
        (found,), _ = relevance(network, rules, X)
        (expected,), _ = relevance(lambda x: (x @ x.mT / 30).softmax(-1) @ x, rules, X)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
        return
    with pytest.raises(UserError, match="softmax written out"):
        relevance(network, rules, X)


def test_other_ratios_are_no_softmax():
    for function in (
        lambda x: x / x.sum(-1, keepdim=True),
        lambda x: x.exp() / x.abs().sum(-1, keepdim=True),
    ):
        for rules in RULES:
            relevance(function, rules, X)


def test_weights_among_several_activations_are_refused_under_lrp():
    with pytest.raises(UserError, match="einsum of several activations and weights"):
        relevance(lambda x: torch.einsum("bnd,de,bme->bnm", x, W @ W.T, x), "lrp", X)


# --- What has no rule ------------------------------------------------------------------------------------
class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


NO_RULE = {
    "cumprod": lambda x: x.cumprod(-1),
    "prod": lambda x: x.prod(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "atan2": lambda x: torch.atan2(x, x @ W @ W.T),
    "cdist": lambda x: torch.cdist(x, x.flip(1)),
    "Own": lambda x: Own.apply(x) + 1,
    "pow": lambda x: x.abs() ** x,
    "lerp": lambda x: torch.lerp(x, x.flip(1), x),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
}


@pytest.mark.parametrize("name", NO_RULE)
def test_an_operator_without_a_rule_is_named_where_relevance_arrives(name):
    for rules in RULES:
        x = X.clone().requires_grad_()
        with backward_rules(rules):
            y = NO_RULE[name](x)
            other = (x @ W).sum() + (y * 0).sum().detach()
        assert torch.equal(y, NO_RULE[name](X))
        torch.autograd.grad(other, x)  # computed, and not passed
        with pytest.raises(UserError, match=f"^{name}: the backward rules '{rules}' have no rule for it"):
            torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("rules", RULES)
def test_what_is_of_chance_or_of_the_batch_is_refused(rules):
    with backward_rules(rules):
        x = X.clone().requires_grad_()
        assert torch.equal(F.dropout(x, 0.5, training=False), X) and torch.equal(F.dropout(x, 0.0), X)
        with pytest.raises(UserError, match=r"dropout is on, .*; call model.eval\(\)"):
            F.dropout(x, 0.5)
        with pytest.raises(UserError, match=r"batch_norm takes the statistics of the batch.*model.eval\(\)"):
            nn.BatchNorm1d(5).double()(x)
        nn.BatchNorm1d(5).double().eval()(x)


def test_weights_that_are_trained_are_weights():
    """A model whose parameters want gradients has the rules of the same model without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    for rules in RULES:
        found = []
        for trained in (True, False):
            (one,), _ = relevance(model.requires_grad_(trained), rules, X)
            found.append(one)
        torch.testing.assert_close(*found)


def test_every_product_is_one_that_torch_has():
    assert all(hasattr(torch, name) or hasattr(F, name) for name in MULTIPLICATIONS)


def test_the_probability_that_a_softmax_of_answers_gives():
    """y may be made inside: a softmax that weighs nothing passes its plain gradient."""
    for rules in OF_GRADIENTS:
        x = X[:, 0].clone().requires_grad_()
        with backward_rules(rules):
            y = (x @ W).softmax(-1)[:, 1]
        plain = torch.autograd.grad((x @ W).softmax(-1)[:, 1].sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], plain)
