"""Rules on what a model may do: weights made of weights, probabilities that are touched, chance."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from clipmapper.errors import UserError
from clipmapper.relevance import backward_rules

RULES = ("libra", "attn_lrp", "lrp")


def tensor(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = tensor(2, 5, 8)


def relevance(network, rules, x=X):
    """Input × gradient of y, a mixture of what comes out, and y."""
    given = x.clone().requires_grad_()
    with backward_rules(rules):
        out = network(given)
    y = (out * tensor(*out.shape, seed=7)).sum()
    (gradient,) = torch.autograd.grad(y, given)
    return (x * gradient).detach(), float(y.detach())


# --- Weights that are computed from weights ----------------------------------------------------------------
class Weighted(nn.Module):
    """x plus x times weights that its subclass computes, and a gate that is all weights."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(tensor(8, 8, seed=1))
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.register_buffer("mask", (tensor(8, 8, seed=2) > 0).double())

    def forward(self, x):
        return x + (x @ self.weight().T).relu()


class Normalised(Weighted):
    def weight(self):
        return F.normalize(self.W, dim=1)


class Scaled(Weighted):
    def weight(self):
        return self.scale.exp() * self.W


class Pruned(Weighted):
    def weight(self):
        return self.W * self.mask


class LowRank(Weighted):
    def weight(self):
        return self.W + self.W[:, :2] @ self.W[:2] / 8


class Rounded(Weighted):
    """Trained as if it were quantised."""

    def weight(self):
        return self.W + ((self.W * 4).round() / 4 - self.W).detach()


class Masked(Weighted):
    def weight(self):
        return torch.where(self.mask > 0, self.W, 0.0).masked_fill(self.mask == 0, 0.5)


class Joined(Weighted):
    def weight(self):
        padded = torch.zeros(8, 8, dtype=torch.float64)
        padded[:4] = self.W[:4]
        return torch.cat([padded[:4], torch.ones(4, 8, dtype=torch.float64)]) - torch.eye(8).double()


class Multiplied(torch.autograd.Function):
    """(PEFT's LoHa makes its weights so.)"""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        return gradient * b, gradient * a


class Own(Weighted):
    def weight(self):
        return Multiplied.apply(self.W, self.scale.expand(8, 8))


class Cached(Weighted):
    """Made before the block."""

    def __init__(self):
        super().__init__()
        self.made = F.normalize(self.W, dim=1) * self.scale.exp()

    def weight(self):
        return self.made if self.W.requires_grad else self.made.detach()


class Written(Weighted):
    """Into what was made of weights, activations are written: it is of weights no more."""

    def weight(self):
        return self.W

    def forward(self, x):
        rows = self.W[None, :5].expand(len(x), 5, 8).clone()
        rows[:, 1:4] = x[:, 1:4]
        return rows * torch.sigmoid(x @ self.W)


class Similarity(Weighted):
    """A CLIP's: logits to prompts that are weights."""

    def forward(self, x):
        return self.scale.exp() * F.normalize(x, dim=-1) @ F.normalize(self.W, dim=-1).T


def with_norm(wrapper):
    linear = nn.Linear(8, 8, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(tensor(8, 8, seed=3))
    wrapped = wrapper(linear)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = wrapped

        def forward(self, x):
            return x + self.linear(x).tanh()

    return Wrapped().eval()


MODELS = {
    "normalised": Normalised,
    "scaled": Scaled,
    "pruned": Pruned,
    "low rank": LowRank,
    "similarity": Similarity,
    "written into": Written,
    "rounded": Rounded,
    "masked": Masked,
    "joined": Joined,
    "function of its own": Own,
    "made before": Cached,
    "orthogonal": lambda: with_norm(parametrizations.orthogonal),
    "weight_norm": lambda: with_norm(parametrizations.weight_norm),
    "spectral_norm": lambda: with_norm(parametrizations.spectral_norm),
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_may_be_trained_has_the_map_of_a_frozen_one(name, rules):
    model = MODELS[name]()
    trained, y = relevance(model, rules)
    frozen, _ = relevance(model.requires_grad_(False), rules)
    torch.testing.assert_close(trained, frozen, rtol=1e-9, atol=1e-12)
    if rules != "lrp" and name != "written into":
        assert float(trained.sum()) == pytest.approx(y)


@pytest.mark.parametrize("rules", RULES)
def test_computed_weights_give_the_map_of_the_weights_that_they_are(rules):
    model = Normalised()
    found, _ = relevance(model, rules)
    W = F.normalize(model.W.detach(), dim=1)
    expected, _ = relevance(lambda x: x + F.linear(x, W).relu(), rules)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", RULES)
def test_position_weights_are_no_residual_connection(rules):
    """(One sample and computed positions have the same shape.)"""
    x, positions = X[:1], nn.Parameter(tensor(1, 8, 5, seed=5))

    def network(x):
        return (x + F.interpolate(positions, scale_factor=1.0).mT).tanh()

    trained, _ = relevance(network, rules, x)
    positions.requires_grad_(False)
    frozen, _ = relevance(network, rules, x)
    torch.testing.assert_close(trained, frozen, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", RULES)
def test_what_is_looked_up_in_weights_is_an_activation(rules):
    """(Else nothing behind an embedding would have a rule.)"""
    embedding = nn.Embedding(9, 8).double()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        embedding.weight.copy_(tensor(9, 8, seed=6))
    W = tensor(8, 8, seed=1)

    def network(x):
        return x + (x @ W).tanh()

    with backward_rules(rules):
        hidden = embedding(ids)
        y = (network(hidden) * tensor(1, 4, 8, seed=7)).sum()
    (gradient,) = torch.autograd.grad(y, hidden)
    expected, _ = relevance(network, rules, hidden.detach())
    torch.testing.assert_close(hidden.detach() * gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2000])
def test_tokens_that_were_embedded_before_the_block_are_activations(layers):
    """(However long the graph behind them is.)"""
    embedding, W = nn.Embedding(9, 8).double(), tensor(8, 8, seed=1)
    hidden = embedding(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    for _ in range(layers):
        hidden = hidden + 1e-4 * hidden.sin()
    with backward_rules("libra"):
        y = (F.silu(hidden @ W) * (hidden @ W)).sum()
    (gradient,) = torch.autograd.grad(y, hidden)
    assert float((hidden * gradient).sum().detach()) == pytest.approx(float(y.detach()))


# --- Probabilities that something is done to ---------------------------------------------------------------
SCORES = X @ tensor(8, 8, seed=8) @ X.mT / 8
MIX = tensor(3, 3, seed=9).softmax(-1)


def heads(x):
    return (x.unsqueeze(1) * torch.tensor([1.0, 0.5, -0.7], dtype=torch.float64).view(3, 1, 1)) @ x.mT[
        :, None
    ]


TOUCHED = {
    "plus an epsilon": lambda s: s.softmax(-1) + 1e-6,
    "no nan": lambda s: s.softmax(-1).nan_to_num(),
    "clamped": lambda s: s.softmax(-1).clamp(min=0.01),
    "lower triangle": lambda s: s.softmax(-1).tril(),
    "padded": lambda s: F.pad(s[..., :-1].softmax(-1), (1, 0)),
    "differential": lambda s: s.softmax(-1) - 0.4 * (0.3 * s).softmax(-1),
    "renormalised": lambda s: (lambda a: a / a.sum(-1, keepdim=True))(s.softmax(-1).clamp(min=0.05)),
    "product of two": lambda s: s.softmax(-1) @ (-s).softmax(-1),
    "talking heads": lambda s: torch.einsum("gh,bhnm->bgnm", MIX, heads(s).softmax(-1)).mean(1),
    "dropped in eval": lambda s: F.dropout(s.softmax(-1), 0.5, False),
    "square": lambda s: s.softmax(-1) ** 2,
}


@pytest.mark.parametrize("name", TOUCHED)
def test_touched_probabilities_are_constants_to_libra(name):
    def network(x):
        return TOUCHED[name](x @ tensor(8, 8, seed=8) @ x.mT / 8) @ x

    found, y = relevance(network, "libra")
    constant = TOUCHED[name](SCORES)
    expected, _ = relevance(lambda x: constant @ x, "libra")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float(found.sum()) == pytest.approx(y)


def test_values_made_of_earlier_probabilities_are_no_constants():
    """A second layer's values come from the first's probabilities and weights alone where its values do."""
    memory = nn.Parameter(tensor(8, 6, seed=10))
    to_values = tensor(6, 8, seed=11)

    def network(x):
        hidden = (x @ memory).softmax(-1) @ to_values
        return (hidden @ hidden.mT).softmax(-1) @ hidden

    found, _ = relevance(network, "libra")
    with torch.no_grad():
        hidden = (X @ memory).softmax(-1) @ to_values
        attention = (hidden @ hidden.mT).softmax(-1)
    expected, _ = relevance(lambda x: attention @ ((x @ memory).softmax(-1) @ to_values), "libra")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_gate_of_an_activation_beside_probabilities_has_relevance():
    def network(x):
        return ((x @ x.mT).softmax(-1) * torch.sigmoid(x.sum(-1, keepdim=True))) @ x

    found, y = relevance(network, "libra")
    assert float(found.sum()) == pytest.approx(y)


def exponentials(s):
    return (s - s.amax(-1, keepdim=True).detach()).exp()


WRITTEN = {
    "times one over the sum": lambda s: exponentials(s) * (1 / exponentials(s).sum(-1, keepdim=True)),
    "reciprocal": lambda s: (lambda e: e * e.sum(-1, keepdim=True).reciprocal())(exponentials(s)),
    "power": lambda s: (lambda e: e * e.sum(-1, keepdim=True) ** -1)(exponentials(s)),
    "normalize": lambda s: F.normalize(exponentials(s), p=1, dim=-1),
    "masked": lambda s: (lambda e: e / e.sum(-1, keepdim=True))(
        exponentials(s) * torch.ones(5, 5).tril().double()
    ),
    "by ones": lambda s: (lambda e: e / (e @ torch.ones(5, 1).double()))(exponentials(s)),
    "mean": lambda s: (lambda e: e / e.mean(-1, keepdim=True) / 5)(exponentials(s)),
    "less its logarithm": lambda s: (s - exponentials(s).sum(-1, keepdim=True).log()).exp(),
    "end of a cumulated sum": lambda s: (lambda e: e / e.cumsum(-1)[..., -1:])(exponentials(s)),
    "with a sink": lambda s: (lambda e: e / (e.sum(-1, keepdim=True) + e[..., :1]))(exponentials(s)),
    "one by one": lambda s: (lambda e: e / sum(e[..., i : i + 1] for i in range(5)))(exponentials(s)),
    "of powers": lambda s: (2**s) / (2**s).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("rules", RULES)
def test_a_softmax_that_is_written_out_is_refused(name, rules):
    with pytest.raises(UserError, match="softmax written out"):
        relevance(lambda x: WRITTEN[name](x @ x.mT / 30) @ x, rules)


@pytest.mark.parametrize("rules", RULES)
def test_a_sum_of_exponentials_that_divides_the_output_is_refused(rules):
    def network(x):
        e = exponentials(x @ x.mT / 30)
        return (e @ x) / e.sum(-1, keepdim=True)

    with pytest.raises(UserError, match="softmax written out"):
        relevance(network, rules)


@pytest.mark.parametrize("rules", RULES)
def test_gates_that_are_written_out_are_none(rules):
    relevance(lambda x: x / (1 + (-x).exp()), rules)
    relevance(lambda x: x * (1 / (x.exp() + (-x).exp())), rules)


@pytest.mark.parametrize("rules", RULES)
def test_a_recurrent_softmax_is_refused(rules):
    """(RWKV's: numerator and denominator are added up token by token.)"""

    def network(x):
        above = below = torch.zeros(2, 8, dtype=torch.float64)
        for i in range(5):
            weight = (x[:, i] @ tensor(8, 8, seed=1) / 8).exp()
            above, below = above + weight * x[:, i], below + weight
        return above / below

    with pytest.raises(UserError, match="softmax written out"):
        relevance(network, rules)


# --- What does not vary ------------------------------------------------------------------------------------
QUERY = tensor(2, 1, 3, 8, seed=12)


def written_out(query, key, value):
    return (query @ key.mT * 8**-0.5).softmax(-1) @ value


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("which", ["learned query", "given memory", "given keys"])
def test_attention_that_reads_constants_gives_one_relevance_however_written(which, rules):
    """(As learned queries that pool tokens do, and a context that is given.)"""

    def network(attend):
        def run(x):
            x = x[:, None]
            return {
                "learned query": lambda: attend(QUERY, x, x),
                "given memory": lambda: attend(x, QUERY, QUERY),
                "given keys": lambda: attend(x, X[:, None], x),
            }[which]()

        return run

    if (which, rules) == ("given memory", "libra"):  # whose attention is a constant: nothing passes
        return
    found, _ = relevance(network(F.scaled_dot_product_attention), rules)
    expected, _ = relevance(network(written_out), rules)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_relevance_of_tokens_that_a_learned_query_pools_sums_to_what_enters():
    found, y = relevance(lambda x: F.scaled_dot_product_attention(QUERY, x[:, None], x[:, None]), "lrp")
    assert float(found.sum()) == pytest.approx(y)


# --- Chance, and what is done in place ---------------------------------------------------------------------
@pytest.mark.parametrize("rules", RULES)
def test_what_is_of_chance_is_refused(rules):
    attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True).double().train()
    for network in (
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
        lambda x: F.rrelu(x, training=True),
        lambda x: attention(x, x, x, need_weights=False)[0],
        lambda x: attention(x, x, x)[0],
    ):
        with pytest.raises(
            UserError, match=r"is on, and an explanation would be of chance; call model.eval\(\)"
        ):
            relevance(network, rules)
    attention.eval()
    for network in (lambda x: F.rrelu(x), lambda x: attention(x, x, x, need_weights=False)[0]):
        relevance(network, rules)


@pytest.mark.parametrize("rules", RULES)
def test_a_power_of_a_number(rules):
    found, y = relevance(lambda x: 2**x, rules)
    assert float(found.sum()) == pytest.approx(y)


@pytest.mark.parametrize("rules", ["libra", "attn_lrp"])
def test_what_is_changed_in_place_behind_a_rule_is_one_line(rules):
    def network(x):
        h = (x @ tensor(8, 8, seed=1)).tanh()
        h.add_(x)
        return h

    with pytest.raises(UserError, match=r"changes in place \(x \+= .*write x = x"):
        relevance(network, rules)


# --- What can't be seen, and other ways of writing ---------------------------------------------------------
def gated(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def by_jit(make, *args, **kwargs):
    """torch.jit is deprecated, and in many models."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        warnings.simplefilter("ignore", DeprecationWarning)
        return make(*args, **kwargs)


@pytest.mark.parametrize("rules", RULES)
def test_what_the_rules_cannot_see_is_refused(rules):
    traced = by_jit(torch.jit.trace, lambda x: (x * 2).tanh(), (X,), check_trace=False)
    W = tensor(8, 8, seed=1)
    for function in (by_jit(torch.jit.script, gated), traced, torch.vmap(F.silu)):
        with pytest.raises(UserError, match=r"of torch\.jit, torch\.vmap or the like: .* have no rule"):
            relevance(lambda x: function(x @ W) * 1.0, rules)  # noqa: B023


@pytest.mark.parametrize("rules", ["libra", "attn_lrp"])
def test_what_is_linear_may_go_unseen(rules):
    doubled = by_jit(torch.jit.trace, lambda x: (x * 2).transpose(1, 2), (X,), check_trace=False)
    found, y = relevance(lambda x: doubled(x.tanh()) * 1.0, rules)
    assert float(found.sum()) == pytest.approx(y)


@pytest.mark.parametrize("rules", RULES)
def test_a_gain_divided_by_a_length(rules):
    """(ScaleNorm as it was published; the other way round it is a division of what varies.)"""
    W, gain = tensor(8, 8, seed=1).abs(), nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def network(x):
        return (x @ W) * (gain / (x @ W).norm(dim=-1, keepdim=True))

    found, y = relevance(network, rules)
    expected, _ = relevance(lambda x: gain * (x @ W) / (x @ W).norm(dim=-1, keepdim=True), rules)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float(found.sum()) == pytest.approx(y)


@pytest.mark.parametrize("rules", RULES)
def test_a_bias_of_scores_that_is_made_of_activations(rules):
    def network(attend):
        def run(x):
            q, k, v = (x @ tensor(8, 8, seed=seed) for seed in (1, 2, 3))
            return attend(q[:, None], k[:, None], v[:, None], (x @ tensor(8, 5, seed=4))[:, None])

        return run

    def by_hand(q, k, v, bias):
        return (q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v

    found, y = relevance(network(F.scaled_dot_product_attention), rules)
    expected, _ = relevance(network(by_hand), rules)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if rules != "attn_lrp":
        assert float(found.sum()) == pytest.approx(y)


def test_attention_of_two_axes():
    found, _ = relevance(lambda x: F.scaled_dot_product_attention(x, x, x), "lrp", X[0])
    expected, _ = relevance(
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0], "lrp", X[0]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rules", RULES)
def test_dropout_in_place_that_is_off_changes_nothing(rules):
    dropout = nn.Dropout(0.1, inplace=True).eval()
    for network in (lambda d: lambda x: d((x @ x.mT).softmax(-1)) @ x, lambda d: lambda x: d(x.relu()) * 2):
        found, _ = relevance(network(dropout), rules)
        expected, _ = relevance(network(lambda x: x), rules)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_mean_however_written_is_a_norms():
    def network(mean):
        return lambda x: ((x - mean(x)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()).tanh()

    expected, _ = relevance(network(lambda x: x.mean(-1, keepdim=True)), "lrp")
    for mean in (lambda x: x.mean(-1)[..., None], lambda x: x.sum(-1, keepdim=True) / 8):
        found, _ = relevance(network(mean), "lrp")
        torch.testing.assert_close(found, expected)


def test_a_difference_however_written():
    W = tensor(8, 8, seed=1)
    expected, _ = relevance(lambda x: x - (x @ W), "lrp")
    found, _ = relevance(lambda x: torch.rsub(x @ W, x), "lrp")
    torch.testing.assert_close(found, expected)


def test_lrp_in_half_precision_is_refused_wherever_it_begins():
    def half(x):
        return F.scaled_dot_product_attention(x.bfloat16(), x.bfloat16(), x.bfloat16()).double()

    def auto(x):
        with torch.autocast("cpu", torch.bfloat16):
            return (x.float() @ x.float().mT).softmax(-1) @ x.float()

    for network in (half, auto):
        with pytest.raises(UserError, match="not defined in half precision"):
            relevance(network, "lrp")
