"""Models that add in place: the same relevance as of those that do not, or a line that says why not."""

import pytest
import torch
from torch import nn

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, record

WIDTH = 8


class Block(nn.Module):
    def __init__(self, add, batch_first=True, norm_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.add, self.batch_first, self.norm_first = add, batch_first, norm_first

    def forward(self, x):
        tokens = self.norm(x) if self.norm_first else x
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        x = self.add(x, mixed if self.batch_first else mixed.transpose(0, 1))
        x = x if self.norm_first else self.norm(x)
        return self.add(x, self.mlp(torch.tanh(x)))


class Model(nn.Module):
    def __init__(self, *settings):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(*settings), Block(*settings))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        return self.head(self.blocks(tokens * 1.5)[:, 0])[:, 1]


def plainly(x, added):
    return x + added


def into_what_was_added(x, added):
    added += x
    return added


def into_the_tokens(x, added):
    return x.add_(added)


TOKENS = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def relevance(method, rules, *settings):
    model = Model(*settings).double().eval()
    with record(model, rules=rules) as trace:
        y = model(TOKENS)
    trace.backward(y)
    trace.again = Again(model, lambda rows: model(TOKENS[rows]))
    return METHODS[method](trace).streams["tokens"]


@pytest.mark.parametrize("settings", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("method", "rules"),
    [
        ("weighted", "plain"),
        ("token_tm", "plain"),
        ("full_grad", "plain"),
        ("transformer_attribution", "plain"),
        ("transformer_attribution", "lrp"),
        ("input_x_gradient_libra", "libra"),
        ("attn_lrp", "attn_lrp"),
    ],
)
def test_added_to_what_attention_gives(method, rules, settings):
    """(The output of a linear layer is a view, and so is what is transposed.)"""
    expected = relevance(method, rules, plainly, *settings)
    found = relevance(method, rules, into_what_was_added, *settings)
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_output_that_is_kept_is_that_of_attention():
    """Without a norm behind it, the sum in place would stand where the output stood."""

    class Bare(Model):
        def forward(self, tokens):
            x = self.blocks[0].attention(tokens, tokens, tokens, need_weights=False)[0]
            x = into_what_was_added(tokens, x) if self.in_place else tokens + x
            return self.head(x[:, 0])[:, 1]

    found = []
    for in_place in (False, True):
        model = Bare(plainly).double().eval()
        model.in_place = in_place
        with record(model.blocks[0].attention) as trace:
            y = model(TOKENS)
        trace.backward(y)
        found.append(METHODS["weighted"](trace).streams)
    for stream, values in found[0].items():
        assert torch.equal(found[1][stream], values)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("rules", ["plain", "lrp", "libra"])
def test_added_to_what_attention_has_read(rules, norm_first):
    with pytest.raises(UserError, match=r"in place .*x \+= .*write x = x \+ ") as caught:
        relevance("weighted", rules, into_the_tokens, True, norm_first)
    assert "\n" not in str(caught.value)


def test_tokens_that_change_after_they_were_read():
    """Nothing needs them for its gradient but the trace itself."""

    class Frozen(Block):
        def forward(self, x):
            mixed = self.attention(x, x, x, need_weights=False)[0]
            return x.add_(mixed)

    model = Model(plainly).double().eval()
    model.blocks = nn.Sequential(Frozen(None), Frozen(None)).double()
    with pytest.raises(UserError, match="in place"), record(model) as trace:
        y = model(TOKENS.clone())
        trace.backward(y)


@pytest.mark.parametrize(("whole", "named"), [(True, "blocks.0.attention"), (False, "the model")])
def test_tokens_that_change_where_torch_does_not_mind(whole, named):
    class Bare(Model):
        def forward(self, tokens):
            x = tokens * 1.5
            mixed = self.blocks[0].attention(x, x, x, need_weights=False)[0]
            with torch.no_grad():
                x.add_(1)
            return self.head(mixed[:, 0])[:, 1]

    model = Bare(plainly).double().eval()
    model.blocks = model.blocks[:1]
    with (
        pytest.raises(UserError, match=f"^{named}: the tokens that it reads are changed in place afterwards"),
        record(model if whole else model.blocks[0].attention),
    ):
        model(TOKENS)


def test_other_errors_of_torch_stay_as_they_are():
    model = Model(plainly).double().eval()
    with pytest.raises(RuntimeError, match="normalized_shape"), record(model):
        model(TOKENS[..., :3])
