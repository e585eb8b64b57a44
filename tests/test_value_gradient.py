"""Value × gradient: worked by hand, on many families by every rule, in blocks; where it is not defined."""

import pytest
import torch
from support import families
from support.made_traces import sublayer, tensor
from support.more_families import CASES as MORE
from support.naive_methods import value_gradient_plain
from support.signed_maps import (
    check,
    equals_naive,
    image_and_text,
    rebuilds_attention_in_blocks,
    signed,
    traced,
)
from support.slow import mostly_slow

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, AttentionTrace, Join, Node
from clipmapper.relevance import method_named as named
from clipmapper.relevance.method import Needs

CASES = {**families.CASES, **MORE}
BY_RULES = {"plain": "value_gradient_plain", "libra": "value_gradient_libra", "attn_lrp": "value_gradient"}


def made(nodes, evidence):
    """A sub-layer with this A ⊙ ∂y/∂A, whatever A is."""
    query, key = nodes
    A = torch.full_like(tensor(evidence), 1 / len(evidence[0][0])).tolist()
    nothing = [[0.0] * 2] * len(evidence[0])
    return sublayer(query, key, A, evidence, before=nothing, added=nothing)


def two_streams():
    """The image by itself (two heads), the text by what that gave, and the image by the text as it was."""
    i0, i1, t0 = Node("image", 0), Node("image", 1), Node("text", 0)
    steps = [
        made((i0, i0), [[[1.0, 2], [2, 0]], [[-3, 0], [0, 1]]]),
        made((t0, i1), [[[1.0, -1], [1, 0], [0, 0]]]),
        made((i1, t0), [[[1.0, 2, -1], [0, 0, 0]]]),
    ]
    return image_and_text(steps)


def test_by_hand():
    # The image by itself: 1 + 2 − 3, 2 + 1; by the text: 1 + 1, −1. The text by the image: its one row.
    check(signed("value_gradient_plain", two_streams()), image=[0 + 2, 3 - 1], text=[1, 2, -1])
    check(METHODS["value_gradient_plain"](two_streams(), sign="negative").streams, text=[0, 0, 1])
    check(METHODS["value_gradient_plain"](two_streams()).streams, text=[1, 2, 0])
    later = signed("value_gradient_plain", two_streams(), start_layer={"image": 1})
    check(later, image=[2, -1], text=[1, 2, -1])


def test_padding_is_0():
    trace = two_streams()
    trace.valid = {"text": torch.tensor([[True, True, False]])}
    check(signed("value_gradient_plain", trace), text=[1, 2, 0])


def test_joined_streams_go_back_to_their_places():
    words, patches, joined = Node("text", 0), Node("image", 0), Node("joined", 0)
    own = made((joined, joined), [[[1.0, 1, -1]] * 3])
    trace = AttentionTrace(
        [Join(joined, (patches, words), torch.tensor([[3, 0, 1]])), own],
        {"image": 2, "text": 2, "joined": 3}, {}, ("image", "text"), (Node("joined", 1), torch.tensor([0])),
    )  # fmt: skip
    # Word 1, then both patches; word 0 was left out.
    check(signed("value_gradient_plain", trace), image=[3, -3], text=[0, 3])


FAMILIES = [
    "hf_bert", "hf_vilt", "hf_siglip", "open_clip_coca", "hf_clip", "hf_dinov2", "hf_mt5", "hf_qwen3",
    "hf_gptj", "hf_visual_bert", "shared_block", "timm_eva_post_norm", "hf_blip2", "hf_bart", "hf_paligemma",
    "hf_albert", "torch_transformer, batch_first=False, norm_first=False",
    "torch_multihead, batch_first=True",
]  # fmt: skip
QUICK = ("hf_bert", "open_clip_coca", "hf_qwen3", "torch_transformer, batch_first=False, norm_first=False")
BY_LIBRA = ("hf_bert", "hf_vilt")


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, QUICK))
def test_equals_the_naive_implementation(family):
    for rules in ("plain", "libra") if family in BY_LIBRA else ("plain",):
        # (Learned queries that pool are no input.)
        equals_naive(CASES[family](), rules, {BY_RULES[rules]: value_gradient_plain}, nothing=["pool"])


def test_each_form_is_recorded_by_its_rules():
    for rules, name in BY_RULES.items():
        assert METHODS[name].needs == Needs(rules=rules)
    assert named("value_gradient_attn_lrp") is METHODS["value_gradient"]
    with pytest.raises(UserError, match="value_gradient_libra runs the model more than once"):
        METHODS["value_gradient_libra"](traced(families.hf_bert())[0])


def test_attention_is_rebuilt_in_blocks(monkeypatch):
    rebuilds_attention_in_blocks("value_gradient_plain", monkeypatch)


def test_a_stream_that_is_only_read_counts_where_it_is_read():
    trace, _ = traced(families.hf_gpt2_reading())
    expected = sum(
        (step.probabilities() * step.probability_gradient()).sum(dim=(1, 2))
        for step in trace.attention
        if step.key_node.stream == "context"
    )
    torch.testing.assert_close(signed("value_gradient_plain", trace)["context"], expected)


def test_a_stream_that_nothing_reads_is_refused():
    trace = two_streams()
    trace.steps = [step for step in trace.attention if step.key_node.stream == "image"]
    with pytest.raises(
        UserError, match="value_gradient_plain: stream 'text' is read by no attention"
    ) as error:
        METHODS["value_gradient_plain"](trace)
    assert "\n" not in str(error.value)


def test_hidden_state_by_gradient_is_what_is_read_and_what_passes_by():
    """By LibraGrad's rules and without biases this is the part of AttCAT's factor that goes by attention."""
    case = families.hf_vit()
    with torch.no_grad():
        for name, weight in case.model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
    trace, _ = traced(case, "libra")
    read = 0
    for step in trace.attention:
        before, behind = (torch.linalg.vecdot(step.before, gradient) for gradient in step.gradients())
        read = read + before - behind
    torch.testing.assert_close(signed("value_gradient_libra", trace)["image"], read, rtol=0, atol=1e-10)
    assert (read.abs() > 1e-3 * read.abs().max()).sum() >= 3
