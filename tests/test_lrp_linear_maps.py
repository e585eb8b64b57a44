"""z⁺ of linear maps product by product, and which of its two ways of computing is taken."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from clipmapper.errors import UserError
from clipmapper.relevance import backward_rules
from clipmapper.relevance.backward import z_plus


def tensor(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# (Mostly positive, that no sum of positive products is small.)
X, W, BIAS = 0.7 + tensor(2, 5, 8, seed=0), 0.7 + tensor(8, 6, seed=1), tensor(6, seed=2)
X[0, 1, 3] = X[1, 4, 0] = 0  # as behind a ReLU


def naive(x, weight, relevance):
    """R_in / x of x [..., in], weight [in, out]: a table of all products, of which those > 0 share R."""
    products = x[..., None] * weight
    positive, negative = products.clamp(min=0), products.clamp(max=0)
    total = positive.sum(-2, keepdim=True)
    shares = torch.where(total > 0, positive / total, negative / negative.sum(-2, keepdim=True))
    return torch.where(x == 0, 0, (shares * relevance[..., None, :]).sum(-1) / x)


def found(function, x, toward):
    """The gradient of (output · toward), and the relevance of the output."""
    x = x.clone().requires_grad_()
    with backward_rules("lrp"):
        out = function(x)
    (gradient,) = torch.autograd.grad((out * toward).sum(), x)
    return gradient, (out * toward).detach()


def each(function):
    """The function of one token, for all."""
    return lambda x: torch.stack([torch.stack([function(token) for token in row]) for row in x])


# How x W is written, with what is added to it.
WRITTEN = {
    "linear": lambda x, W, b: F.linear(x, W.T),
    "linear with a bias": lambda x, W, b: F.linear(x, W.T, b),
    "a bias by name": lambda x, W, b: F.linear(x, weight=W.T, bias=b),
    "matmul": lambda x, W, b: x @ W,
    "addmm": lambda x, W, b: torch.addmm(b, x.flatten(0, 1), W).view(2, 5, 6),
    "addmm with factors": lambda x, W, b: torch.addmm(
        b, x.flatten(0, 1), W / 4, beta=-0.5, alpha=4
    ).view(2, 5, 6),
    "one token": lambda x, W, b: each(lambda token: F.linear(token, W.T, b))(x),
    "einsum": lambda x, W, b: torch.einsum("bnd,df->bnf", x, W),
    "convolution": lambda x, W, b: F.conv1d(x.mT, W.T[..., None], b).mT,
    "baddbmm": lambda x, W, b: torch.baddbmm(b, x, (W / 4).expand(2, 8, 6), beta=-0.5, alpha=4),
}  # fmt: skip
BY_FOUR_PRODUCTS = ("einsum", "convolution", "baddbmm")
# The tokens that relevance reaches: one of sample 0 and two of 1, of which one has little; or all.
FEW = torch.zeros(2, 5, 1, dtype=torch.float64)
FEW[0, 3], FEW[1, 0], FEW[1, 2] = 1, 1, 1e-9
REACHED = {"all": torch.ones(2, 5, 1, dtype=torch.float64), "few": FEW, "none": 0 * FEW}


@pytest.mark.parametrize("reached", REACHED)
@pytest.mark.parametrize("name", WRITTEN)
def test_z_plus_product_by_product(name, reached):
    toward = tensor(2, 5, 6, seed=3) * REACHED[reached]
    with mock.patch.object(z_plus, "_passed", wraps=z_plus._passed) as four:
        gradient, relevance = found(lambda x: WRITTEN[name](x, W, BIAS), X, toward)
    assert four.called == (name in BY_FOUR_PRODUCTS)
    torch.testing.assert_close(gradient, naive(X, W, relevance), rtol=1e-11, atol=1e-22)
    assert gradient.any() == (reached != "none")


@pytest.mark.parametrize("name", ["linear", "einsum"])
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        # Of the three columns' sums one is a difference of nearly equal numbers, one of ordinary ones.
        ((1.0, 1.0, -1.0), ((-1.0, 1.0, 0.5), (1e-14, 2.0, 0.25), (0.5, 0.5, 1.0))),
        ((1.0, 1.0), ((-1.0, 1.0), (1e-200, 2.0))),  # tiny, and above 0
        ((1.0, -1.0), ((-3.0, 2.0), (1.0, 1.0))),  # column 0 has negative products alone
        ((1e-12, -2e-12), ((1.0, -1.0), (0.5, -2.0))),  # all small
    ],
)
def test_z_plus_of_sums_that_cancel(name, x, weight):
    x, W = torch.tensor([[x]], dtype=torch.float64), torch.tensor(weight, dtype=torch.float64)
    gradient, relevance = found(lambda x: WRITTEN[name](x, W, None), x, 1.0)
    torch.testing.assert_close(gradient, naive(x, W, relevance), rtol=1e-11, atol=1e-30)


def test_z_plus_beside_a_large_bias():
    """x W + b has lost digits of x W where b is much larger."""
    gradient, relevance = found(lambda x: F.linear(x, W.T, 1e10 * BIAS), X, tensor(2, 5, 6, seed=3))
    torch.testing.assert_close(gradient, naive(X, W, relevance), rtol=1e-11, atol=0)


def test_z_plus_that_no_number_can_be_divided_by():
    """R / 1e-320 is infinite: the negative product takes R."""
    weight = torch.tensor([[1e-320], [-1.0]], dtype=torch.float64)
    gradient, relevance = found(lambda x: x @ weight, torch.ones(1, 1, 2, dtype=torch.float64), 1.0)
    assert gradient.tolist() == [[[0, float(relevance)]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    weight = torch.tensor([[-1.0], [0.03]], dtype=dtype)
    with pytest.raises(UserError, match="not defined in half precision"):
        found(lambda x: x @ weight, torch.ones(1, 1, 2, dtype=dtype), 1.0)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e30])
def test_relevance_of_odd_numbers_is_finite(size):
    x, weight = torch.randn(2, 5, 4) * size, torch.randn(4, 3) * 1e-6
    for bias in (torch.zeros(3), torch.full((3,), 1e4)):
        gradient, _ = found(lambda x, bias=bias: F.linear(x, weight.T, bias), x, 1.0)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reached", ["all", "few"])
def test_ordinary_sums_take_three_products_of_the_tokens_reached(dtype, reached):
    x, weight, bias = X.to(dtype), W.to(dtype), BIAS.to(dtype)
    toward = (tensor(2, 5, 6, seed=3) * REACHED[reached]).to(dtype)
    rows = []

    def noted(x, *others):
        rows.append(x.numel() // 8)
        return original(x, *others)

    original = z_plus._by_three_products
    four = mock.patch.object(z_plus, "_passed", side_effect=AssertionError("four products"))
    with mock.patch.object(z_plus, "_by_three_products", noted), four:
        found(lambda x: F.linear(x, weight.T, bias), x, toward)
    assert rows == [{"all": 10, "few": 3}[reached]]
