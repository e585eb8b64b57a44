"""The methods that are not compared by default, against naive float64 code on whole models."""

import pytest
import torch
from support import naive_relevance
from support.explained_models import MODELS, Case, assert_same, expected_streams
from support.naive_methods import NAIVE, SIGNED, input_x_gradient, tokens_in_state
from support.naive_relevance import Run
from support.slow import mostly_slow

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, record

CHOSEN = [MODELS[0], MODELS[2], MODELS[3]]  # dual flow without and with a class token, single flow


class Explained(Case):
    """With ``trace.again``, as clipmapper.explain gives it."""

    def __init__(self, folder, *model):
        super().__init__(folder, *model)
        model = self.model

        class Head:
            def applies(self, step):
                return step.name.startswith("mapper")

            def __call__(self, pooled, answers=self.answers):
                return model.head(pooled).gather(1, answers[:, None])[:, 0]

        self.head = Head()
        self.trace.again = Again(model, self.forward, self.head)

    def forward(self, rows):
        logits = self.model(self.images[rows], self.text[rows], only_class_token=False)
        return logits.gather(1, self.answers[rows][:, None])[:, 0]

    def run(self, row, rules="plain", scale=1.0):
        ids = self.text.ids[row, : self.lengths[row]]
        run = Run(self.model, self.images[row], ids, rules=rules, scale=scale)
        return run.differentiate(int(self.answers[row]))


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    made = {}

    def case(model):
        if model not in made:
            made[model] = Explained(tmp_path_factory.mktemp("clip"), *model)
        return made[model]

    return case


@pytest.fixture(params=CHOSEN, ids=lambda m: f"{m[0]}{'-class_token' if m[1] else ''}")
def case(request, explained):
    return explained(request.param)


def assert_equal_to_naive(case, name, naive, **options):
    relevance, spread = METHODS[name](case.trace, **options), 0
    for row in range(len(case.lengths)):
        run, values = naive(case, row)
        expected = expected_streams(run, values, case.trace.lengths)
        spread = max(spread, int((values.abs() > 1e-3 * values.abs().max()).sum()))
        assert_same(relevance, expected, row, f"{name}, sample {row}")
    assert spread >= 5, "an example in which next to nothing is relevant proves nothing"


# The naive methods. Rows over all tokens, numbered through; "inputs" are the tokens that enter the towers.


def beyond_intuition(case, row):
    run = case.run(row)
    states = [torch.eye(run.size, dtype=run.logits.dtype)]
    for s in run.sublayers:
        new = states[-1].clone()
        keys = tokens_in_state(run, s.keys, s.keys_state)
        ratio = sum(s.v[h] @ s.W[h] for h in range(len(s.v))).norm(dim=1) / keys.norm(dim=1)
        new[s.queries] += s.A.mean(0) @ torch.diag(ratio) @ states[s.keys_state][s.keys]
        states.append(new)
    runs = [case.run(row, scale=k / 19) for k in range(20)]
    for number, s in enumerate(run.sublayers):
        s.dA = sum(other.sublayers[number].dA for other in runs) / 20
    weight = naive_relevance._last_reading(run, lambda s: torch.relu(s.dA).mean(0))
    return run, states[-1][run.read] * weight


LIBRA = {
    **{n: naive_relevance.METHODS[n] for n in ("weighted", "weighted_token", "gae", "grad_cam")},
    **NAIVE,
}
del LIBRA["alti"]


@pytest.mark.parametrize("name", NAIVE)
def test_method_equals_the_naive_implementation(case, name):
    options = {"sign": "both"} if name in SIGNED else {}

    def naive(case, row):
        if name == "weighted_evidence":  # whose plain name is of AttnLRP's rules
            run = case.run(row, rules="attn_lrp")
            return run, NAIVE[name](run, halved=True)
        run = case.run(row)
        return run, NAIVE[name](run)

    if name == "token_tm" and len(case.trace.inputs) == 3:
        pytest.skip("the class token's own state is not followed by the naive code")
    assert_equal_to_naive(case, name, naive, **options)


@pytest.mark.parametrize("name", LIBRA)
def test_libra_equals_the_naive_gradient_with_detach(explained, name):
    case = explained(MODELS[0])
    options = {"sign": "both"} if name in SIGNED else {}

    def naive(case, row):
        run = case.run(row, rules="libra")
        return run, LIBRA[name](run)

    assert_equal_to_naive(case, f"{name.removesuffix('_plain')}_libra", naive, **options)


def test_grad_cam_of_the_read_row_equals_the_naive_implementation(case):
    """As in Chefer et al.'s code for ViT: ∇A of the class token's row, without its own column."""

    def naive(case, row):
        run = case.run(row)

        def matrix(s):
            others = [place for place, key in enumerate(s.keys) if key != run.read]
            weight = s.dA[:, s.queries.index(run.read), others].mean(dim=1)
            return torch.relu((weight[:, None, None] * s.A).mean(dim=0))

        return run, naive_relevance._last_reading(run, matrix)

    assert_equal_to_naive(case, "grad_cam", naive, rows="read")
    whole, read = (METHODS["grad_cam"](case.trace, rows=rows).image for rows in ("all", "read"))
    assert torch.equal(whole, METHODS["grad_cam"](case.trace).image) and not torch.allclose(whole, read)
    with pytest.raises(UserError, match="rows='class': must be one of all, read"):
        METHODS["grad_cam"](case.trace, rows="class")


def test_attn_lrp_equals_the_naive_gradient_with_halves(case):
    def naive(case, row):
        run = case.run(row, rules="attn_lrp")
        return run, input_x_gradient(run)

    assert_equal_to_naive(case, "attn_lrp", naive, sign="both")


def test_beyond_intuition_equals_the_naive_implementation(explained):
    assert_equal_to_naive(explained(MODELS[0]), "beyond_intuition", beyond_intuition)


@pytest.mark.parametrize("rules", ["libra", "attn_lrp", "lrp"])
def test_the_values_of_the_forward_are_unchanged(case, rules):
    with record(case.model, rules=rules) as trace:
        logits = case.model(case.images, case.text, only_class_token=False)
    torch.testing.assert_close(logits.detach(), case.logits, rtol=0, atol=1e-12)
    for step, plain in zip(trace.attention, case.trace.attention, strict=True):
        torch.testing.assert_close(step.before.detach(), plain.before, rtol=0, atol=1e-12)


def test_occlusion_and_integrated_gradients_of_sets_of_tokens(explained):
    """Occlusion by running the model with a token at 0; integrated gradients sum up to y − y(0)."""
    case = explained(MODELS[3])
    trace, again = case.trace, case.trace.again
    rows = torch.arange(trace.batch)
    from clipmapper.relevance.rerun import input_tokens

    tokens = input_tokens(trace, "occlusion")
    y = case.logits.gather(1, case.answers[:, None])[:, 0]
    with torch.no_grad():
        torch.testing.assert_close(again.score(trace, rows, tokens), y)
        found = METHODS["occlusion"](trace, sign="both")
        for stream, place in (("image", 3), ("image", 0), ("text", 2)):
            changed = {s: v.clone() for s, v in tokens.items()}
            changed[stream][:, place] = 0
            torch.testing.assert_close(
                found.streams[stream][:, place], y - again.score(trace, rows, changed), rtol=0, atol=1e-5
            )
        nothing = again.score(trace, rows, {s: torch.zeros_like(v) for s, v in tokens.items()})
    found = METHODS["integrated_gradients"](trace, steps=400, sign="both")
    total = sum(values.sum(1) for values in found.streams.values())
    torch.testing.assert_close(total, y - nothing, rtol=0, atol=2e-2)


def test_input_x_gradient_equals_captum(explained):
    from captum.attr import InputXGradient

    from clipmapper.relevance.rerun import input_tokens

    case = explained(MODELS[0])
    tokens = input_tokens(case.trace, "input_x_gradient")

    def forward(image, text):
        return case.trace.again.score(
            case.trace, torch.arange(case.trace.batch), {"image": image, "text": text}
        )

    inputs = tuple(v.clone().requires_grad_() for v in tokens.values())
    expected = InputXGradient(forward).attribute(inputs)
    found = METHODS["input_x_gradient"](case.trace, sign="both")
    for stream, values in zip(tokens, expected, strict=True):
        inside = case.trace.padding_free(stream)
        torch.testing.assert_close(found.streams[stream], values.detach().sum(-1) * inside)


def test_legrad_layer_by_layer(explained):
    """∂s/∂A by autograd through a layer of the single-flow mapper that is written out here."""
    case = explained(MODELS[3])
    mapper, relevance = case.model.mapper, METHODS["legrad"](case.trace)
    for row, length in enumerate(case.lengths):
        run = Run(case.model, case.images[row], case.text.ids[row, :length])
        total = torch.zeros(run.size, dtype=torch.float64)
        for s, block in zip(run.sublayers[-len(mapper.blocks) :], mapper.blocks, strict=True):
            A = s.A.detach().requires_grad_()
            a = block.attention.output((A @ s.v).transpose(0, 1).flatten(1))
            tokens = s.x.detach() + a
            tokens = tokens + block.mlp(tokens[None])[0]
            score = case.model.head(tokens.mean(0, keepdim=True))[0, case.answers[row]]
            total += torch.relu(torch.autograd.grad(score, A)[0]).mean((0, 1))
        for places in (run.image, run.text):
            part = total[places]
            total[places] = (part - part.min()) / (part.max() - part.min())
        expected = expected_streams(run, total, case.trace.lengths)
        assert_same(relevance, expected, row, f"legrad, sample {row}")


# leave_one_out needs to know how tokens are removed: test_leave_one_out.py.
OTHERS = ("random", "leave_one_out", *naive_relevance.METHODS)
MORE = [name for name in METHODS if name not in OTHERS]
SLOW = ("attention_flow", "beyond_intuition", "integrated_gradients")


# With LibraGrad the same functions run, on another recording.
@pytest.mark.parametrize(
    "name", mostly_slow(MORE, [n for n in MORE if not n.endswith("_libra") and n != "beyond_intuition"])
)
def test_what_holds_of_every_method(explained, name):
    """Shapes, no relevance on padding, none negative, and a batch gives what a sample gives alone."""
    case = explained(MODELS[0])
    found = METHODS[name](case.trace)
    for stream, values in found.streams.items():
        assert values.shape == (3, case.trace.lengths[stream]) and values.isfinite().all()
        assert (values >= 0).all() and not values[~case.trace.padding_free(stream)].any()
        assert not values.requires_grad
    assert found.image.std() > 0
    row = slice(1, 2)
    _, alone = case.traced(rows=row)
    longest = case.lengths[1]

    def forward(rows):
        text = case.text[row]
        text = type(text)(*(t[:, :longest] for t in vars(text).values()))
        chosen = torch.arange(1).expand(len(rows))
        logits = case.model(case.images[row][chosen], text[chosen], only_class_token=False)
        return logits[:, int(case.answers[1])]

    class Head:
        def applies(self, step):
            return step.name.startswith("mapper")

        def __call__(self, pooled):
            return case.model.head(pooled)[:, int(case.answers[1])]

    alone.again = Again(case.model, forward, Head())
    for stream, values in METHODS[name](alone).streams.items():
        together = found.streams[stream][1, : longest if stream == "text" else None]
        torch.testing.assert_close(
            together, values[0], rtol=0, atol=1e-8, msg=lambda m, s=stream: f"{s}: {m}"
        )


def test_a_method_that_needs_another_forward_says_so(explained):
    from dataclasses import replace

    trace = replace(explained(MODELS[0]).trace, again=None)
    for name in ("weighted_libra", "attn_lrp", "legrad", "beyond_intuition", "occlusion", "partial_lrp"):
        with pytest.raises(UserError, match=f"{name} runs the model more than once: set trace.again"):
            METHODS[name](trace)
    for step in trace.attention:
        step.projection, kept = None, step.projection
        for name in ("alti", "token_tm"):
            with pytest.raises(UserError, match=f"{name} needs the output projection"):
                METHODS[name](trace)
        step.projection = kept
        break
    with pytest.raises(UserError, match="sign='none': must be one of"):
        METHODS["input_x_gradient"](trace, sign="none")
