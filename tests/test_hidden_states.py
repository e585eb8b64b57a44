"""full_grad, att_cat and x_grad_cam: worked by hand, on many families, and what must hold of them.

On CLIPmapper they are compared in test_more_methods.py, on five models of other people, by LibraGrad's rules
too, in test_method_table.py.
"""

from dataclasses import replace

import pytest
import torch
from support import families
from support.made_traces import sublayer, tensor
from support.more_families import CASES as MORE
from support.naive_methods import NAIVE
from support.signed_maps import (
    check,
    equals_naive,
    image_and_text,
    rebuilds_attention_in_blocks,
    signed,
    traced,
)
from support.slow import mostly_slow
from torch import nn

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, AttentionTrace, Join, Node, record
from clipmapper.relevance.many_scalars import each_scalar

NAMES = ("full_grad", "att_cat", "x_grad_cam")
CASES = {**families.CASES, **MORE}


# ---------------------------------------------------------------------------------------------------------
# By hand. An image of two tokens with one self-attention sub-layer; then a text of three tokens reads the
# image, and itself; the image goes on to read the text as it was at first.


def made(nodes, A, before, gradient):
    zero = [[[0.0] * len(A[0][0])] * len(A[0])] * len(A)
    step = sublayer(*nodes, A, zero, before=[[0.0] * 2] * len(A[0]), added=[[1.0] * 2] * len(A[0]))
    return replace(
        step, before=tensor([before]), before_gradient=tensor([gradient]),
        query=step.query.clamp(min=-1e3),  # log 0, which times a 0 of the keys would be no number
        mixed_gradient=torch.zeros_like(step.mixed),
    )  # fmt: skip


def two_streams():
    """x ⊙ ∇x, summed: image 0: 3, -2; text 0: 1, 4, 0; text 1: 2, 0, 5; image 1: -1, 0."""
    i0, i1, t0, t1 = Node("image", 0), Node("image", 1), Node("text", 0), Node("text", 1)
    steps = [
        made((i0, i0), [[[1 / 2, 1 / 2], [1 / 4, 3 / 4]], [[1, 0], [1 / 4, 3 / 4]]],
             [[1, 2], [-1, 1]], [[1, 1], [1, -1]]),
        # The text's last token reaches y nowhere: its row of attention counts for nothing.
        made((t0, i1), [[[1 / 2, 1 / 2], [1, 0], [0, 1]]], [[1, 1], [2, 0], [3, 3]],
             [[1, 0], [2, 7], [0, 0]]),
        made((t1, t1), [[[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1, 0, 0]]],
             [[1, 1], [0, 0], [5, 0]], [[1, 1], [1, 1], [1, 0]]),
        made((i1, t0), [[[1 / 3, 1 / 3, 1 / 3], [1, 0, 0]]], [[1, 0], [4, 4]], [[-1, 3], [0, 0]]),
    ]  # fmt: skip
    return image_and_text(steps)


def test_full_grad_by_hand():
    check(signed("full_grad", two_streams()), image=[3 - 1, -2], text=[1 + 2, 4, 0 + 5])
    check(signed("full_grad", two_streams(), start_layer={"text": 1}), image=[2, -2], text=[2, 0, 5])
    check(METHODS["full_grad"](two_streams(), sign="negative").streams, image=[0, 2], text=[0, 0, 0])
    check(METHODS["full_grad"](two_streams()).streams, image=[2, 0], text=[3, 4, 5])


def test_att_cat_by_hand():
    # The image by itself: received ½ (½ (½ + ¼) + ½ (1 + ¼)) = ½, and so ½.
    # By the text, as the image was before it read (-1, 0), by two queries: (½ + 1) / 2, ½ / 2.
    # The text by itself, three queries: (½ + ¼ + 1, ¼ + ½, ¼ + ¼) / 3 = 7/12, 1/4, 1/6.
    # By the image, as it was at first (1, 4, 0), by the first query alone: 1/3 each.
    check(
        signed("att_cat", two_streams()),
        image=[3 / 2 - 3 / 4, -1],
        text=[2 * 7 / 12 + 1 / 3, 4 / 3, 5 / 6],
    )
    # From there on the text is read by itself alone.
    check(signed("att_cat", two_streams(), start_layer={"text": 1}), text=[7 / 6, 0, 5 / 6])


def test_x_grad_cam_by_hand():
    # Image 0: |x| = [1, 1], [2, 1]: w = (1 + 1)/2, (2 - 1)/3: [1 + 2/3, -1 + 1/3].
    # Image 1: the first token alone; |x| = 1, 0: w = -1, 0: [-1, 0].
    # Text 0: two tokens; |x| = [1, 2], [1, 0]: w = (1 + 4)/3, 0: [5/3, 10/3, 0].
    # Text 1: |x| = [1, 0, 5], [1, 0, 0]: w = (1 + 5)/6, 1: [2, 0, 5].
    check(
        signed("x_grad_cam", two_streams()),
        image=[5 / 3 - 1, -2 / 3],
        text=[5 / 3 + 2, 10 / 3, 5],
    )
    check(signed("x_grad_cam", two_streams(), start_layer={"text": 1}), text=[2, 0, 5])


def test_padding_is_no_part_of_what_is_averaged():
    trace = two_streams()
    trace.valid = {"text": torch.tensor([[True, False, True]])}
    check(signed("full_grad", trace), text=[3, 0, 5])
    # One query of the text asks the image: [½, ½]; two ask the text: (3/2, _, 1/4) / 2.
    check(signed("att_cat", trace), image=[3 / 2 - 1 / 2, -1], text=[2 * 3 / 4 + 1 / 3, 0, 5 / 8])
    # Text 0: w = 1, 0 of the first token alone.
    check(signed("x_grad_cam", trace), text=[1 + 2, 0, 5])


def test_a_channel_of_zeros_has_no_weight():
    trace = two_streams()
    for step in trace.attention:
        step.before = torch.zeros_like(step.before)
    for name in NAMES:
        check(signed(name, trace), image=[0, 0], text=[0, 0, 0])


def test_joined_streams_go_back_to_their_places_and_pools_to_what_they_read():
    """Two pooled tokens behind two words, of which one is left out, in one sequence that asks itself."""
    image, words = Node("image", 0), Node("text", 0)
    pool = Node("pool", 0), Node("pool", 1)
    A = [[[1 / 4, 3 / 4], [1, 0]]]
    # (Whatever a recorder may keep as the tokens before attention that pools, they are none.)
    pooling = made((pool[0], image), A, [[1, 1], [1, 1]], [[1, 1], [0, 0]])
    pooling = replace(pooling, pools=True, output_node=pool[1])
    joined = Node("joined", 0)
    own = made((joined, joined), [[[1, 0, 0]] * 3], [[1, 1], [2, 0], [0, 3]], [[1, 1], [2, 0], [0, 1]])
    before = made((image, image), A, [[1, 0], [0, 1]], [[5, 0], [0, 7]])
    pooling = replace(pooling, key_node=Node("image", 1))
    trace = AttentionTrace(
        [before, pooling, Join(joined, (words, pool[1]), torch.tensor([[1, 2, 3]])), own],
        {"image": 2, "pool": 2, "text": 2, "joined": 3}, {}, ("image", "pool", "text"),
        (Node("joined", 1), torch.tensor([0])),
    )  # fmt: skip
    # x ⊙ ∇x of the joined tokens: 2 of the word that is there, 4 and 3 of the pooled ones.
    expected = [5 + 4 / 4 + 3, 7 + 4 * 3 / 4]
    check(signed("full_grad", trace), text=[0, 2], image=expected, pool=[0, 0])
    # All attention of the joined tokens is on the word. The state that is pooled has no gradient.
    check(signed("att_cat", trace), text=[0, 2], image=[5 * 5 / 8, 7 * 3 / 8], pool=[0, 0])
    # But it counts where it was recorded, for all queries whose output reaches y.
    later = made((Node("image", 1), Node("image", 1)), [[[1, 0], [1, 0]]], [[1, 0], [0, 1]], [[8, 0], [0, 8]])
    trace.steps.append(later)
    image = [5 * 5 / 8 + 8 + 8 * 5 / 8, 7 * 3 / 8 + 8 * 3 / 8]
    check(signed("att_cat", trace), text=[0, 2], image=image)


# ---------------------------------------------------------------------------------------------------------
# Whole models.

LIBRA = ("hf_bert", "hf_vilt")
FAMILIES = [
    "hf_bert", "hf_siglip", "hf_vilt", "open_clip_coca", "hf_clip", "hf_distilbert", "hf_dinov2", "hf_mt5",
    "hf_visual_bert", "open_clip_custom_text", "shared_block", "timm_norm_behind", "timm_eva_post_norm",
    "timm_pooled_by_attention", "torch_encoder, batch_first=False, norm_first=True",
    "torch_transformer, batch_first=False, norm_first=False", "torch_multihead, batch_first=True",
    "hf_albert", "hf_git", "hf_flava", "hf_blip2", "hf_bart", "hf_paligemma", "hf_gptj", "hf_qwen3",
]  # fmt: skip
QUICK = ("hf_bert", "hf_vilt", "open_clip_coca", "torch_transformer, batch_first=False, norm_first=False")


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, QUICK))
def test_equals_the_naive_implementation(family):
    for rules in ("plain", "libra") if family in LIBRA else ("plain",):
        equals_naive(CASES[family](), rules, {name: NAIVE[name] for name in NAMES})


@pytest.mark.parametrize("name", NAMES)
def test_a_word_is_explained_by_the_text_up_to_it(name):
    """What a decoder is given behind the word is no part of the averages, whatever it is."""
    case = families.hf_gpt2()
    tokens = case.inputs["input_ids"][:1]
    at = torch.tensor([2, 4])

    def run(words):
        with record(case.model) as trace:
            logits = case.model(words).logits[0]
        return trace, logits[at[at < words.shape[1]], 9]

    trace, y = run(tokens)
    (rows,) = each_scalar(trace, y, at, [0, 1])
    found = signed(name, rows)["text"]
    for row, place in enumerate(at.tolist()):
        trace, y = run(tokens[:, : place + 1])
        trace.backward(y[-1:])
        expected = signed(name, trace)["text"][0]
        torch.testing.assert_close(found[row, : place + 1], expected, rtol=0, atol=1e-12)
        assert not found[row, place + 1 :].any() and expected.abs().min() > 0


def test_without_biases_every_layer_sums_to_y_under_libra():
    """LibraGrad's completeness: Σ x_l ⊙ ∂y/∂x_l = y in every layer, so full_grad sums to y times layers."""
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, activation="gelu", batch_first=True, norm_first=True, bias=False, dropout=0.0
    )
    model = families.ready(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    with record(model, rules="libra") as trace:
        y = model(torch.randn(2, 7, 16, dtype=torch.float64))[:, 3, 2]
    trace.backward(y)
    for options, layers in (({}, 3), ({"start_layer": -1}, 1)):
        (values,) = signed("full_grad_libra", trace, **options).values()
        torch.testing.assert_close(values.sum(dim=1), layers * y.detach())


def test_x_grad_cam_sums_to_gradient_times_token_where_tokens_are_positive():
    """Fu et al.'s axiom of conservation, for which they choose the weights."""
    trace, _ = traced(families.hf_vit())
    for step in trace.attention:
        step.before = step.before.detach().abs()
    for stream, values in signed("x_grad_cam", trace).items():
        expected = signed("full_grad", trace)[stream]
        torch.testing.assert_close(values.sum(dim=1), expected.sum(dim=1))
        assert not torch.allclose(values, expected, rtol=0.1)


def test_attention_is_rebuilt_in_blocks(monkeypatch):
    rebuilds_attention_in_blocks("att_cat", monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_is_only_read_is_refused(name):
    trace, _ = traced(families.hf_gpt2_reading())
    with pytest.raises(UserError, match=f"{name}: stream 'context' is only read, by cross-att") as error:
        METHODS[name](trace)
    assert "\n" not in str(error.value)
