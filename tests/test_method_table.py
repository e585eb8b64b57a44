"""docs/methods.md: every method on every kind of attention, each cell of the table.

Columns are tiny models of other people with random weights in float64. A cell that says yes equals naive code
(full matrices, autograd, one sample at a time; other backward rules by .detach()), captum, or what is said
beside it; a cell with a letter is an error that says what the letter says.
"""

import functools
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import families, naive_any, naive_parts, naive_relevance, naive_rules
from support import naive_methods as more
from support.naive_flow import by_networkx
from support.slow import once_each

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, record
from clipmapper.relevance.methods.effective import effective_matrix, efficient_matrix

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
COLUMNS = {
    "self": "hf_vit", "cross": "hf_blip", "bi-modal": "hf_lxmert", "encoder–decoder": "hf_t5",
    "decoder-only": "hf_gpt2",
}  # fmt: skip
# Where the tokens of each input stream come in.
ENTRIES = {
    "hf_vit": {"image": "vit.layers.0"},
    "hf_blip": {"image": "vision_model.encoder.layers.0", "text": "text_encoder.encoder.layer.0.attention"},
    "hf_lxmert": {
        "text": "lxmert.encoder.layer.0.attention", "image": "lxmert.encoder.r_layers.0.attention"
    },
    "hf_t5": {"encoder": "encoder.block.0.layer.0", "decoder": "decoder.block.0.layer.0"},
    "hf_gpt2": {"text": "transformer.h.0"},
}  # fmt: skip
# What hands an encoder's last state over to who reads it.
GIVEN = {
    "hf_blip": ("image", "vision_model.post_layernorm"),
    "hf_t5": ("encoder", "encoder.final_layer_norm"),
}
BLOCKS = {"hf_vit": "vit.layers", "hf_gpt2": "transformer.h"}
HEADS = {
    "hf_vit": lambda model, t: model.classifier(model.vit.layernorm(t))[:, 2],
    "hf_gpt2": lambda model, t: model.lm_head(model.transformer.ln_f(t))[:, 9],
}
SIGNED = more.SIGNED


def table():
    """{(method, column): text of the cell}, and what the letters mean."""
    text = DOCS.read_text()
    part = text.split("## Methods × attention")[1]
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in part.splitlines() if "|" in line
    ]
    header, cells = rows[0][1:], {}
    for row in rows[2:]:
        for method in re.findall(r"`(\w+)`", row[0]):
            cells |= {(method, column): cell for column, cell in zip(header, row[1:], strict=True)}
    return cells, dict(re.findall(r"^- ([a-z]): `(.+)`", part, flags=re.MULTILINE))


CELLS, LETTERS = table()
PAIRS = [(method, kind) for method in METHODS for kind in COLUMNS]


class Column:
    """A model, its trace, and its naive runs."""

    def __init__(self, name):
        self.name = name
        self.case = case = replace(families.CASES[name](), attentions=None)
        with record(case.model) as self.trace:
            y = case.y(case.run(case.model, case.inputs))
        self.trace.backward(y)
        head = HEADS.get(name, lambda model, tokens: tokens[:, 0])

        class Readout:
            def applies(self, step):
                return True

            def __call__(self, tokens):
                return head(case.model, tokens)

        def forward(rows):
            return case.y(case.run(case.model, {k: v[rows] for k, v in case.inputs.items()}))

        self.trace.again = Again(case.model, forward, Readout())
        self.run = functools.cache(self.run)

    def run(self, row, rules="plain", scale=1.0):
        """With everything the naive methods ask for."""
        case, given, ends, held = self.case, [], [], []

        @contextmanager
        def around(model):
            with ExitStack() as stack:
                if rules != "plain":
                    stack.enter_context(naive_rules.detached(model))
                for path in ENTRIES[self.name].values():
                    # Scaled on its way in, before the naive code notes it.
                    module = model.get_submodule(path)
                    stack.callback(module.register_forward_pre_hook(scaled, with_kwargs=True).remove)
                if self.name in GIVEN:
                    module = model.get_submodule(GIVEN[self.name][1])
                    stack.callback(module.register_forward_hook(lambda m, a, out: given.append(out)).remove)
                for block in model.get_submodule(BLOCKS[self.name]) if self.name in BLOCKS else ():
                    stack.callback(
                        block.register_forward_hook(
                            lambda m, a, out: ends.append(out[0] if isinstance(out, tuple) else out)
                        ).remove
                    )
                held.append(stack.enter_context(naive_parts.parts(model, case.specs, families.HEADS)))
                yield

        def scaled(module, args, kwargs):
            if not args:
                return args, {**kwargs, "hidden_states": scale * kwargs["hidden_states"]}
            return (scale * args[0], *args[1:]), kwargs

        runs, places = families.naive_runs(case, row, rules, around)
        (run,) = runs
        run.image, run.text = None, None
        for s, (q, k, v, W, norm) in zip(run.sublayers, held[0], strict=True):
            s.q, s.k, s.v, s.W, s.norm = q, k, v, W, norm
            if s.cross and self.name in GIVEN:
                s.given = given[0][0].detach()
        if ends:
            for s, end in zip(run.sublayers, ends, strict=True):
                s.after = end[0].detach()
        elif self.name == "hf_t5":
            for n, s in enumerate(run.sublayers):
                later = [t.x for t in run.sublayers[n + 1 :] if t.queries == s.queries]
                s.after = later[0] if later else None
        return run, places


@functools.cache
def column(name):
    return Column(name)


def token_tm(run):
    """As in ``test_more_methods``, with keys as they are handed over."""
    start = {}
    for s in run.sublayers:
        for i, place in enumerate(s.queries):
            start.setdefault(place, s.x[i].norm())
    states = [torch.diag(torch.stack([start[i] for i in range(run.size)]))]
    for s in run.sublayers:
        C, read, new = states[-1], states[s.keys_state], states[-1].clone()
        values = sum(s.v[h] @ s.W[h] for h in range(len(s.v)))
        W = torch.diag(more.transformation(keys_of(run, s), values))
        rows = C[s.queries] + ((s.A.mean(0) @ W) * torch.relu(s.dA).mean(0)) @ read[s.keys]
        if s.after is not None:
            e = s.x + s.a
            made = s.after - e
            if made.any():
                rows = rows + torch.diag(more.transformation(e, made)) @ rows
        new[s.queries] = rows
        states.append(new)
    return states[-1][run.read]


def keys_of(run, s):
    return more.tokens_in_state(run, s.keys, s.keys_state) if s.given is None else s.given


def beyond_intuition(col, row, rules="plain"):
    run, _ = col.run(row, rules)
    states = [torch.eye(run.size, dtype=run.logits.dtype)]
    for s in run.sublayers:
        new = states[-1].clone()
        ratio = sum(s.v[h] @ s.W[h] for h in range(len(s.v))).norm(dim=1) / keys_of(run, s).norm(dim=1)
        new[s.queries] += s.A.mean(0) @ torch.diag(ratio) @ states[s.keys_state][s.keys]
        states.append(new)
    runs = [col.run(row, rules, k / 19)[0] for k in range(20)]
    mean = [replace(s, dA=sum(r.sublayers[n].dA for r in runs) / 20) for n, s in enumerate(run.sublayers)]
    points = naive_any.Run(mean, run.size, run.read, run.logits)
    weight = naive_relevance._last_reading(points, lambda s: torch.relu(s.dA).mean(0))
    return states[-1][run.read] * weight


def with_matrices(run, steps, row, matrix):
    """The run with other matrices for A; ``matrix`` is tested in test_effective_attention.py."""
    replaced = []
    for s, step in zip(run.sublayers, steps, strict=True):
        A = matrix(step)[row][:, : len(s.queries), : len(s.keys)]
        replaced.append(replace(s, A=A))
    return naive_any.Run(replaced, run.size, run.read, run.logits)


def rolled_effective(run):
    def distribution(A):
        mean = A.mean(0).clamp(min=0)
        return (mean / mean.sum(-1, keepdim=True))[None]

    steps = [replace(s, A=distribution(s.A)) for s in run.sublayers]
    return naive_any.rollout(naive_any.Run(steps, run.size, run.read, run.logits))


def of_matrices(col, row, method, rules="plain"):
    run, _ = col.run(row, rules)
    kind, name = method.split("_")[:2]
    other = with_matrices(
        run, col.trace.attention, row, {"effective": effective_matrix, "efficient": efficient_matrix}[kind]
    )
    if name == "attention":
        return naive_relevance.raw_attention(other).clamp(min=0)
    if name == "rollout":
        return (rolled_effective if kind == "effective" else naive_any.rollout)(other)
    return naive_relevance.weighted(other)


def legrad(col, row, rules="plain"):
    """∂s_l/∂A_l by autograd through each block, run by itself on what came into it."""
    run, _ = col.run(row, rules)
    model, total = col.case.model, torch.zeros(run.size, dtype=torch.float64)
    blocks = model.get_submodule(BLOCKS[col.name])
    for s, block in zip(run.sublayers, blocks, strict=True):
        with ExitStack() as stack, torch.enable_grad():
            if rules != "plain":
                stack.enter_context(naive_rules.detached(model))
            seen = stack.enter_context(naive_any.slow_attention(rules))
            tokens = s.x[None].clone().requires_grad_()
            out = block(tokens)
            out = out[0] if isinstance(out, tuple) else out
            score = HEADS[col.name](model, out.mean(1)).sum()
            total += torch.relu(torch.autograd.grad(score, seen[0])[0][0]).mean((0, 1))
    return (total - total.min()) / (total.max() - total.min())


def captum(col, row, method, rules="plain"):
    """Captum itself, on the modules that the tokens enter."""
    from captum import attr

    case, paths = col.case, ENTRIES[col.name]
    inputs = {k: v[row : row + 1] for k, v in case.inputs.items()}
    entered = {}

    def forward(*tokens):
        with ExitStack() as stack:
            for path, values in zip(paths.values(), tokens, strict=True):

                def put(module, args, kwargs, values=values):
                    return (
                        ((values, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": values})
                    )

                module = case.model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(put, with_kwargs=True).remove)
            if rules != "plain":
                stack.enter_context(naive_rules.detached(case.model))
                stack.enter_context(naive_any.slow_attention(rules))
            repeated = {k: v.expand(len(tokens[0]), *v.shape[1:]) for k, v in inputs.items()}
            return case.y(case.run(case.model, repeated))

    with ExitStack() as stack, torch.no_grad():
        for stream, path in paths.items():

            def take(module, args, kwargs, stream=stream):
                entered[stream] = args[0] if args else kwargs["hidden_states"]

            stack.callback(
                case.model.get_submodule(path).register_forward_pre_hook(take, with_kwargs=True).remove
            )
        case.run(case.model, inputs)
    tokens = tuple(entered.values())
    if method == "occlusion":
        windows = tuple((1, t.shape[-1]) for t in tokens)
        found = [v[..., 0].double() for v in attr.Occlusion(forward).attribute(tokens, windows)]
    else:
        found = [v.sum(-1) for v in attr.IntegratedGradients(forward).attribute(tokens, n_steps=8)]
    return {stream: values[0].detach() for stream, values in zip(entered, found, strict=True)}


NAIVE = {
    **naive_relevance.METHODS,
    **naive_any.METHODS,
    **more.NAIVE,
    "alti": naive_parts.alti,
    "token_tm": token_tm,
}
RELATIVE = ("token_tm", "token_tm_libra")  # an MLP behind the last attention only scales its result


# Compared with naive code where their rules are tested (test_lrp_rules.py, test_published_rules.py).
ELSEWHERE = ("random", "leave_one_out", "transformer_attribution", "partial_lrp")


def expected(col, row, method):
    """Compute a sample's relevance by naive code: per stream, or all tokens in one; None: no reference."""
    rules = "libra" if method.endswith("_libra") else "plain"
    base = method.removesuffix("_libra")
    if base.startswith("value_gradient"):
        if method == "value_gradient":  # (twice: naively, halves meet in A v as well)
            return 2 * more.value_gradient_plain(col.run(row, "attn_lrp")[0])
        return more.value_gradient_plain(col.run(row, rules)[0])
    if method == "weighted_evidence":
        return more.weighted_evidence(col.run(row, "attn_lrp")[0], halved=True)
    if base in NAIVE:
        return NAIVE[base](col.run(row, rules)[0])
    if base.startswith(("effective", "efficient")):
        return of_matrices(col, row, base, rules)
    if base == "attn_lrp":
        return more.input_x_gradient(col.run(row, "attn_lrp")[0])
    if base == "attention_flow":
        run = col.run(row)[0]
        return torch.from_numpy(by_networkx(run, None))
    if base == "beyond_intuition":
        # 20 runs: with both kinds of attention, and once by the other rules.
        seldom = (col.name, rules) in {("hf_vit", "libra"), ("hf_vit", "plain"), ("hf_lxmert", "plain")}
        return beyond_intuition(col, row, rules) if row == 0 and seldom else None
    if base in ("integrated_gradients", "occlusion"):
        return captum(col, row, base, rules) if row == 0 else None
    if base == "legrad":
        return legrad(col, row, rules)
    assert base in ELSEWHERE, f"{base}: no naive code to compare it with; write it, in NAIVE"
    return None


def test_the_table_names_every_method_and_every_column():
    assert {method for method, _ in CELLS} == set(METHODS)
    assert {c for _, c in CELLS} == set(COLUMNS)
    assert set(CELLS.values()) - {"yes"} <= set(LETTERS)


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if CELLS[pair] != "yes"])
def test_cell_of_what_is_not_defined(method, kind):
    with pytest.raises(UserError, match=re.escape(LETTERS[CELLS[method, kind]])):
        METHODS[method](column(COLUMNS[kind]).trace)


@pytest.mark.parametrize(("method", "kind"), once_each(pair for pair in PAIRS if CELLS[pair] == "yes"))
def test_cell(method, kind):
    col = column(COLUMNS[kind])
    options = {"sign": "both"} if method.removesuffix("_libra") in SIGNED else {}
    if method.startswith("integrated"):
        options["steps"] = 8
    relevance = METHODS[method](col.trace, **options)
    assert list(relevance.streams) == list(col.trace.inputs)
    assert any(values.any() for values in relevance.streams.values())
    for row in range(2):
        wanted = expected(col, row, method)
        if wanted is None:
            for stream, values in relevance.streams.items():
                assert values.isfinite().all()
                assert options or (values >= 0).all()
                assert not values[~col.trace.padding_free(stream)].any()
            continue
        places = col.run(row)[1]
        compare(relevance, wanted, row, places, method)


def compare(relevance, wanted, row, places, method):
    found = {s: v[row].clone() for s, v in relevance.streams.items()}
    if not isinstance(wanted, dict):
        wanted = {stream: wanted[places[stream]] for stream in found}
    if method in RELATIVE:
        for streams in (found, wanted):
            total = sum(float(v.sum()) for v in streams.values())
            for stream in streams:
                streams[stream] = streams[stream] / total
    loose = method == "attention_flow" or method.startswith("occlusion")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if loose else {"rtol": 1e-7, "atol": 1e-11}
    for stream, values in wanted.items():
        torch.testing.assert_close(
            found[stream][: len(values)], values.to(found[stream].dtype), **tolerance,
            msg=lambda m, s=stream: f"{method}, sample {row}, {s}: {m}",
        )  # fmt: skip
        assert not found[stream][len(values) :].any()
