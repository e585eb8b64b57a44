"""A padded sample has the map of the same sample without padding, and 0 at padding, on either side.

A query that may read no key (padding on the left of a causal model, or beyond a local window) gets a row of
zeros from ``scaled_dot_product_attention``, and so it does where attention is rebuilt.
"""

import inspect

import pytest
import torch
from support import families as base
from support import more_families as more

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Again, record
from clipmapper.relevance.trace import attention_probabilities, blind_queries

N, L = 9, 5  # tokens of the sample without padding, and of the one with
_ALL = {**base.CASES, **more.CASES}
# Models of words alone, whose padding a mask says.
FAMILIES = [
    name for name, make in _ALL.items()
    if name.startswith("hf_") and name not in (
        "hf_vit", "hf_dinov2", "hf_deit", "hf_vit_msn", "hf_ijepa", "hf_vit_mae", "hf_dinov2_with_registers",
        "hf_dinov3", "hf_beit", "hf_clip", "hf_siglip", "hf_altclip", "hf_chinese_clip", "hf_metaclip_2",
        "hf_owlvit", "hf_owlv2", "hf_siglip2", "hf_flava", "hf_git", "hf_paligemma", "hf_blip2", "hf_blip",
        "hf_visual_bert", "hf_vilt", "hf_whisper", "hf_speech_to_text",
    )
]  # fmt: skip
# Their tokens count positions from the left of the row, padding or not, and can't be told otherwise.
FROM_THE_LEFT = ("hf_m2m100", "hf_mpnet", "hf_distilbert", "hf_bart", "hf_marian", "hf_blenderbot-small",
                 "hf_mbart", "hf_pegasus", "hf_blenderbot", "hf_lxmert")  # fmt: skip
TRIED = (
    "weighted", "weighted_token", "gae", "rollout", "grad_cam", "input_x_gradient", "full_grad", "att_cat",
    "x_grad_cam",
)  # fmt: skip
QUICK = ("hf_llama", "hf_gemma3", "hf_gpt2_reading", "hf_t5", "hf_bert", "hf_falcon, alibi")


def padded(tokens, side, fill):
    padding = torch.full((1, N - L), fill)
    return torch.cat([padding, tokens] if side == "left" else [tokens, padding], dim=1)


def traced(case, side, alone):
    """The trace of a batch whose second sample is padded, or of it alone; and where its words are."""
    fill = getattr(case.model.config, "pad_token_id", None) or 0
    words = base.ids(1, L, seed=4)
    first = N - L if side == "left" else 0
    tokens = words if alone else torch.cat([base.ids(1, N, seed=3), padded(words, side, fill)])
    mask = torch.ones(1, L).long()
    mask = mask if alone else torch.cat([torch.ones(1, N).long(), padded(mask, side, 0)])
    rows = [1] if alone else [0, 1]
    inputs = {name: value[rows] for name, value in case.inputs.items()} | {"input_ids": tokens}
    inputs["attention_mask"] = mask
    if "position_ids" in inspect.signature(case.model.forward).parameters and case.text == "text":
        offset = fill + 1 if case.model.config.model_type in ("roberta", "xlm-roberta", "camembert",
                                                              "data2vec-text") else 0  # fmt: skip
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0) + offset
    start = torch.tensor([0] if alone else [0, first])

    def explained(rows):
        given = {name: value[rows] for name, value in inputs.items()}
        if case.text == "encoder":
            return case.y(case.run(case.model, given))
        outputs = case.run(case.model, {**given, "output_hidden_states": True})
        at = start[rows] + (L - 2 if case.reads == [5] else 0)
        states = getattr(outputs, "hidden_states", None) or outputs.language_hidden_states
        return states[-1][torch.arange(len(rows)), at, 3]

    with record(case.model, samples=rows) as trace:
        y = explained(torch.arange(len(rows)))
    trace.backward(y)
    trace.again = Again(case.model, explained)
    return trace, slice(0, L) if alone else slice(first, first + L)


def check(name, side, methods):
    case = _ALL[name]()
    (batch, where), (alone, _) = traced(case, side, False), traced(case, side, True)
    for method in methods:
        try:
            expected = METHODS[method](alone).streams
        except UserError as undefined:  # for this model, padded or not
            with pytest.raises(UserError, match=str(undefined)[:20]):
                METHODS[method](batch)
            continue
        found = METHODS[method](batch).streams
        assert found.keys() == expected.keys()
        for stream, values in expected.items():
            row = found[stream][1]
            if stream == case.text:
                outside = torch.ones(N, dtype=torch.bool)
                outside[where] = False
                assert not row[outside].any(), f"{method}: relevance at padding"
                row = row[where]
            scale = float(values.abs().max()) or 1.0
            torch.testing.assert_close(row / scale, values[0] / scale, rtol=0, atol=1e-7, msg=method)


def sides(name):
    return ("right",) if name in FROM_THE_LEFT else ("left", "right")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", QUICK)
def test_a_padded_sample_has_the_map_of_the_unpadded_one(name, side):
    check(name, side, TRIED)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    for side in sides(name):
        check(name, side, ("weighted", "gae", "rollout"))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2", "hf_t5", "hf_bert", "hf_modernbert"])
def test_every_method(name, side):
    """But the control, whose numbers are drawn for a row of so many tokens."""
    check(name, side, [method for method in METHODS if method != "random"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_longer_than_a_local_window(side):
    case = base.hf_mistral()
    case.model.config.sliding_window = 2
    case.model.config.layer_types = None
    windowed, _ = traced(case, side, False)
    assert blind_queries(windowed.attention[0].mask) is not None
    _ALL["windowed"] = lambda: case
    try:
        check("windowed", side, ("weighted", "gae", "rollout", "weighted_half"))
    finally:
        del _ALL["windowed"]


@pytest.mark.parametrize("additive", [False, True])
def test_a_query_that_may_read_nothing_gets_zeros_as_the_fused_function_gives(additive):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    mask[1, :, :2] = False
    given = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) if additive else mask
    A = attention_probabilities(query, key, given, False, None)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=given)
    torch.testing.assert_close(A @ value, fused)
    assert not A[1, :, :2].any() and blind_queries(given).sum() == 2
    assert blind_queries(mask[:1]) is None and blind_queries(None) is None
