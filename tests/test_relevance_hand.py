"""Every method on sub-layers of two or three tokens, worked by hand."""

import math

import pytest
import torch
from support.compared_methods import METHODS
from support.made_traces import sublayer, tensor

from clipmapper.relevance import (
    AttentionTrace,
    Join,
    Node,
    gae,
    grad_cam,
    raw_attention,
    rollout,
    weighted,
    weighted_half,
    weighted_token,
)


def check(relevance, **streams):
    assert set(relevance.streams) == set(streams)
    for stream, expected in streams.items():
        torch.testing.assert_close(relevance.streams[stream], tensor([expected]), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------
# One stream, three tokens, two self-attention sub-layers of two heads each, row 0 read.
#
# First sub-layer. ∇A ⊙ A:
#   head 1: [[ 2, -1,  2], [ 0,  1,  1], [-1, -1, -1]]   head 2: [[2, 2, 0], [2, -1, 2], [-1, -2, -1]]
#   Ā = mean of the positive parts = [[2, 1, 1], [1, 1/2, 3/2], [0, 0, 0]]
#   Â = [[1/2, 1/4, 1/4], [1/3, 1/6, 1/2], identity row]
# E_h A = [[3/8, 3/8, 1/4], [3/8, 3/8, 1/4], [3/8, 1/4, 3/8]]
# Second sub-layer, row 0: Ā = mean([2, 4, 0], [0, 0, 0]) = [1, 2, 0], Â = [1/3, 2/3, 0];
#   E_h A = [3/8, 1/4, 3/8].
FIRST_A = [
    [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4]],
    [[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2]],
]
FIRST_EVIDENCE = [[[2, -1, 2], [0, 1, 1], [-1, -1, -1]], [[2, 2, 0], [2, -1, 2], [-1, -2, -1]]]
SECOND_A = [
    [[1 / 4, 1 / 4, 1 / 2], [1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4]],
    [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 4, 1 / 2, 1 / 4]],
]
# ∇A of head 1: [[8, 16, -4], [1, -8, 0], [-4, 0, 0]], sum 9, mean 1;
# of head 2: [[-2, 0, -4], [-3/4, 0, 0], [0, 0, 0]], sum -27/4, mean -3/4.
SECOND_EVIDENCE = [
    [[2, 4, -2], [1 / 4, -4, 0], [-2, 0, 0]],
    [[-1, 0, -1], [-3 / 16, 0, 0], [0, 0, 0]],
]


def one_stream():
    """x ⊙ ∇x and a ⊙ ∇a, positive parts summed per token:

    first sub-layer: x: 3, 1, 2 (sum 6), a: 1, 0, 1 (sum 2): α = 6/8 = 3/4; per token 3/4, 1, 2/3.
    second sub-layer: x: 1, 0, 0 (sum 1), a: 1, 2, 0 (sum 3): α = 1/4; per token 1/2, 0, 1 (nothing there).
    """
    first = sublayer(
        Node("tokens", 0), Node("tokens", 0), FIRST_A, FIRST_EVIDENCE,
        before=[[3, -1], [1, 0], [-5, 2]], added=[[1, 0], [0, -7], [0, 1]],
    )  # fmt: skip
    second = sublayer(
        Node("tokens", 1), Node("tokens", 1), SECOND_A, SECOND_EVIDENCE,
        before=[[1, -2], [0, -1], [-1, -1]], added=[[0, 1], [1, 1], [-3, -3]],
    )  # fmt: skip
    return AttentionTrace(
        steps=[first, second],
        lengths={"tokens": 3},
        inputs=("tokens",),
        read=(Node("tokens", 2), torch.tensor([0])),
    )


def test_the_helper_builds_the_sub_layers_that_it_says():
    first = one_stream().attention[0]
    torch.testing.assert_close(first.probabilities()[0], tensor(FIRST_A))
    torch.testing.assert_close(
        (first.probability_gradient() * first.probabilities())[0], tensor(FIRST_EVIDENCE)
    )


def test_weighted():
    # After the first sub-layer, α = 3/4: C0 = 3/4 e0 + 1/4 [1/2, 1/4, 1/4] = [7/8, 1/16, 1/16]
    #                                     C1 = 3/4 e1 + 1/4 [1/3, 1/6, 1/2] = [2, 19, 3]/24
    # After the second, α = 1/4: 1/4 C0 + 3/4 (1/3 C0 + 2/3 C1) = (C0 + C1)/2
    #   = [7/16 + 1/24, 1/32 + 19/48, 1/32 + 3/48] = [46, 41, 9]/96
    check(weighted(one_stream()), tokens=[46 / 96, 41 / 96, 9 / 96])


def test_weighted_token():
    # First, α = 3/4, 1, 2/3: C0 = [7/8, 1/16, 1/16], C1 = e1.
    # Second, α0 = 1/2: 1/2 C0 + 1/2 (1/3 C0 + 2/3 C1) = 2/3 C0 + 1/3 C1
    #   = [7/12, 1/24 + 1/3, 1/24] = [14, 9, 1]/24
    check(weighted_token(one_stream()), tokens=[14 / 24, 9 / 24, 1 / 24])


# First: C = (I + E_h A)/2 = [[11, 3, 2], [3, 11, 2], [3, 2, 11]]/16.
# Second, row 0: 1/2 C0 + 1/2 (3/8 C0 + 1/4 C1 + 3/8 C2) = (11 C0 + 2 C1 + 3 C2)/16
#   = [121 + 6 + 9, 33 + 22 + 6, 22 + 4 + 33]/256 = [136, 61, 59]/256
HALF = [136 / 256, 61 / 256, 59 / 256]


def test_weighted_half():
    check(weighted_half(one_stream()), tokens=HALF)


def test_rollout_of_one_stream_is_the_ablation_with_equal_weights():
    # rownorm(A + I) = (A + I)/2
    check(rollout(one_stream()), tokens=HALF)


def test_gae_self_rule():
    # First: R = I + Ā = [[3, 1, 1], [1, 3/2, 3/2], [0, 0, 1]].
    # Second, row 0: R0 + 1 R0 + 2 R1 = [3+3+2, 1+1+3, 1+1+3] = [8, 5, 5]
    check(gae(one_stream()), tokens=[8, 5, 5])


def test_raw_attention_is_the_read_row_of_the_last_sub_layer():
    check(raw_attention(one_stream()), tokens=[3 / 8, 1 / 4, 3 / 8])


def test_grad_cam():
    # mean ∇A: 1 and -3/4. Row 0: ½ (1 [1/4, 1/4, 1/2] - 3/4 [1/2, 1/4, 1/4]) = ½ [-1/8, 1/16, 5/16]
    check(grad_cam(one_stream()), tokens=[0, 1 / 32, 5 / 32])


def test_grad_cam_of_the_read_row():
    # Row 0 of ∇A without its column 0: [16, -4], mean 6; [0, -4], mean -2.
    # ½ (6 [1/4, 1/4, 1/2] - 2 [1/2, 1/4, 1/4]) = ½ [1/2, 1, 5/2]
    check(grad_cam(one_stream(), rows="read"), tokens=[1 / 4, 1 / 2, 5 / 4])


def test_grad_cam_of_several_rows_that_are_read():
    trace = one_stream()
    trace.read = (Node("tokens", 2), tensor([[3 / 4, 1 / 4, 0]]))
    # Row 1 without its column 1: [1, 0], [-3/4, 0]. Weighed 3/4 and 1/4, the mean is
    # (3/4 · 12 + 1/4 · 1) / 2 = 37/8 and (3/4 · -4 - 1/4 · 3/4) / 2 = -51/32.
    # Row 0: ½ (37/8 [1/4, 1/4, 1/2] - 51/32 [1/2, 1/4, 1/4]);
    # row 1: ½ (37/8 [1/4, 1/2, 1/4] - 51/32 [1/4, 1/4, 1/2]).
    first = [37 / 64 - 51 / 128, 37 / 64 - 51 / 256, 37 / 32 - 51 / 256]
    second = [37 / 64 - 51 / 256, 37 / 32 - 51 / 256, 37 / 64 - 51 / 128]
    expected = [3 / 4 * a + 1 / 4 * b for a, b in zip(first, second, strict=True)]
    check(grad_cam(trace, rows="read"), tokens=expected)


def test_another_read_row():
    trace = one_stream()
    trace.read = (Node("tokens", 2), torch.tensor([2]))
    # Second sub-layer, row 2: no positive evidence, so C2 stays; first, row 2: the same.
    check(weighted(trace), tokens=[0, 0, 1])
    check(gae(trace), tokens=[0, 0, 1])
    check(raw_attention(trace), tokens=[3 / 8, 3 / 8, 1 / 4])


# ---------------------------------------------------------------------------------------------------------
# Two streams, image of two tokens and text of three, as in a dual-flow mapper of two blocks: both
# cross-attentions of the first block (S2, S4) read the other stream as it entered (version 0), the second
# block's (S5) reads the text after both of its sub-layers (version 2). Row 0 of the image is read.
#
#   S1 image 0 → 1, self            Ā1 = [[1, 1], [0, 2]]                   α = 1/2
#   S2 image 1 → 2, reads text 0    Ā2 = [[1, 0, 1], [0, 2, 0]]             α = 1/2
#   S3 text 0 → 1, self             Ā3 = [[1, 0, 1], [0, 0, 0], [0, 2, 0]]  α = 2/3
#   S4 text 1 → 2, reads image 0    Ā4 = [[1, 1], [2, 0], [0, 2]]           α = 1/2
#   S5 image 2 → 3, reads text 2    Ā5 = [[0, 1, 1], [1, 0, 0]]             α = 1/4
def two_streams(order=(0, 1, 2, 3, 4)):
    def node(stream, version):
        return Node(stream, version)

    steps = [
        sublayer(
            node("image", 0), node("image", 0),
            [[[3 / 4, 1 / 4], [1 / 2, 1 / 2]]], [[[1, 1], [-1, 2]]],
            before=[[1, 0], [0, 1]], added=[[2, -1], [0, -1]],
        ),
        sublayer(
            node("image", 1), node("text", 0),
            [[[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4]]], [[[1, -1, 1], [-2, 2, 0]]],
            before=[[1, 1], [1, -2]], added=[[3, 0], [0, -1]],
        ),
        sublayer(
            node("text", 0), node("text", 0),
            [[[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 4, 1 / 2, 1 / 4]]],
            [[[1, -1, 1], [-1, 0, -1], [0, 2, -3]]],
            before=[[1, 0], [1, -1], [0, 2]], added=[[0, 1], [0, -5], [1, -5]],
        ),
        sublayer(
            node("text", 1), node("image", 0),
            [[[1 / 2, 1 / 2], [1 / 4, 3 / 4], [3 / 4, 1 / 4]]], [[[1, 1], [2, -1], [-1, 2]]],
            before=[[1, 0], [0, -1], [0, 0]], added=[[0, 0], [1, -1], [0, 0]],
        ),
        sublayer(
            node("image", 2), node("text", 2),
            [[[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4]]], [[[-1, 1, 1], [1, 0, -1]]],
            before=[[1, -1], [0, 0]], added=[[1, 0], [2, -1]],
        ),
    ]  # fmt: skip
    return AttentionTrace(
        steps=[steps[i] for i in order],
        lengths={"image": 2, "text": 3},
        inputs=("image", "text"),
        read=(Node("image", 3), torch.tensor([0])),
        image_stream="image",
        text_stream="text",
        grid=(1, 1),
    )


# Also with the text's half of the first block run before the image's, and interleaved: nothing changes.
ORDERS = [(0, 1, 2, 3, 4), (2, 3, 0, 1, 4), (0, 2, 3, 1, 4)]


@pytest.mark.parametrize("order", ORDERS)
def test_weighted_over_two_streams(order):
    # The read row taken backwards, [image | text]:
    # S5, α = 1/4, Â row 0 = [0, 1/2, 1/2]:  image 2: [1/4, 0], text 2: [0, 3/8, 3/8]
    # S4, α = 1/2, Â = [[1/2, 1/2], [1, 0], [0, 1]]:  text 1: [0, 3/16, 3/16], image 0: [3/16, 3/16]
    # S3, α = 2/3, Â = [[1/2, 0, 1/2], stays, [0, 1, 0]], β × row = [0, 1/16, 1/16]:
    #     text 0: [0, 2/16 + 1/16 + 1/16, 2/16] = [0, 4, 2]/16
    # S2, α = 1/2, Â row 0 = [1/2, 0, 1/2]:  image 1: [1/8, 0], text 0 gains [1/16, 0, 1/16]: [1, 4, 3]/16
    # S1, α = 1/2, Â row 0 = [1/2, 1/2]:  image 0 gains [1/16 + 1/32, 1/32]: [6 + 3, 6 + 1]/32
    relevance = weighted(two_streams(order))
    check(relevance, image=[9 / 32, 7 / 32], text=[2 / 32, 8 / 32, 6 / 32])
    torch.testing.assert_close(relevance.image, tensor([[[7 / 32]]]))
    torch.testing.assert_close(relevance.text, tensor([[2 / 32, 8 / 32, 6 / 32]]))


def test_weighted_token_over_two_streams():
    # α per token: S5 row 0: 1/(1+1) = 1/2; S4: 1, 0, 1 (nothing); S3: 1/2, 1 (only x), 2/3;
    # S2 row 0: 2/5; S1 row 0: 1/3.
    # S5: image 2: [1/2, 0], text 2: [0, 1/4, 1/4]
    # S4: text 1: [0, 0, 1/4], image 0: 1/4 [1, 0]
    # S3: text 0: [0, 1/12, 2/12]  (1/3 of 1/4 goes to token 1)
    # S2: image 1: [1/5, 0], text 0 gains 3/10 [1/2, 0, 1/2]: [9, 5, 19]/60
    # S1: image 0 gains [1/15, 0] + 2/15 [1/2, 1/2] = [2/15, 1/15]: [23, 4]/60
    check(weighted_token(two_streams()), image=[23 / 60, 4 / 60], text=[9 / 60, 5 / 60, 19 / 60])


@pytest.mark.parametrize("order", ORDERS)
def test_weighted_half_over_two_streams(order):
    # S5: image 2: [1/2, 0], text 2: [1/8, 1/4, 1/8]
    # S4: text 1: [1/16, 1/8, 1/16]; image 0: [1/16, 1/8, 1/16] A4 = [2 + 2 + 3, 2 + 6 + 1]/64 = [7, 9]/64
    # S3: text 1 × A3 = [5/4, 5/4, 3/2]/16; text 0: ([1, 2, 1] + [5/4, 5/4, 3/2])/32 = [9, 13, 10]/128
    # S2: image 1: [1/4, 0]; text 0 gains 1/4 [1/2, 1/4, 1/4] = [16, 8, 8]/128: [25, 21, 18]/128
    # S1: image 0 gains [1/8 + 3/32, 1/32]: [7 + 14, 9 + 2]/64
    check(weighted_half(two_streams(order)), image=[21 / 64, 11 / 64], text=[25 / 128, 21 / 128, 18 / 128])


@pytest.mark.parametrize("order", ORDERS)
def test_gae_bi_modal_rule(order):
    # S1: R_ii = I + Ā1 = [[2, 1], [0, 3]];  R_ii - I = [[1, 1], [0, 2]], N(R_ii) = [[3/2, 1/2], [0, 2]]
    # S2: R_it = N(R_ii)ᵀ Ā2 N(I) = [[3/2, 0], [1/2, 2]] Ā2 = [[3/2, 0, 3/2], [1/2, 4, 1/2]]
    #     R_ii stays, since R_ti of text 0 is 0.  (N(I) = I: a zero row is not divided.)
    # S3: R_tt = I + Ā3, whose row 1 is 0: N(R_tt) = [[3/2, 0, 1/2], [0, 1, 0], [0, 1, 1]]
    # S4: R_ti = N(R_tt)ᵀ Ā4 N(I) = [[3/2, 0, 0], [0, 1, 1], [1/2, 0, 1]] [[1, 1], [2, 0], [0, 2]]
    #          = [[3/2, 3/2], [2, 2], [1/2, 5/2]];  R_tt stays, since R_it of image 0 is 0.
    # S5, row 0: N(R_ii)ᵀ row 0 = [3/2, 0];  [3/2, 0] Ā5 = [0, 3/2, 3/2];
    #     × N(R_tt) = 3/2 ([0, 1, 0] + [0, 1, 1]) = [0, 3, 3/2];  R_it row 0 = [3/2, 3, 3]
    #     R_ii row 0 = [2, 1] + [0, 1, 1] R_ti = [2 + 2 + 1/2, 1 + 2 + 5/2] = [9/2, 11/2]
    check(gae(two_streams(order)), image=[9 / 2, 11 / 2], text=[3 / 2, 3, 3])


def test_rollout_chains_the_last_cross_attention():
    # Image: S1 alone, (e0 + [3/4, 1/4])/2 = [7/8, 1/8]. Text: A5 row 0 = [1/4, 1/2, 1/4] × (I + A3)/2
    #   = ([1, 2, 1] + [5/4, 5/4, 3/2])/8 = [9, 13, 10]/32. S2 and S4 play no part.
    check(rollout(two_streams()), image=[7 / 8, 1 / 8], text=[9 / 32, 13 / 32, 10 / 32])


def test_rollout_of_the_own_stream_after_the_cross_attention():
    # Text: (e0 + [1/4, 3/4])/2 = [5/8, 3/8] times A = [[1/4, 1/2, 1/4], [1/2, 1/4, 1/4]]
    #   = [5 + 6, 10 + 3, 5 + 3]/32
    cross = sublayer(
        Node("image", 0), Node("text", 0),
        [[[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4]]], [[[1, 1, 1], [1, 1, 1]]],
        before=[[1], [1]], added=[[1], [1]],
    )  # fmt: skip
    own = sublayer(
        Node("image", 1), Node("image", 1), [[[1 / 4, 3 / 4], [1 / 2, 1 / 2]]], [[[1, 1], [1, 1]]],
        before=[[1], [1]], added=[[1], [1]],
    )  # fmt: skip
    trace = AttentionTrace(
        steps=[cross, own],
        lengths={"image": 2, "text": 3},
        inputs=("image", "text"),
        read=(Node("image", 2), torch.tensor([0])),
    )
    check(rollout(trace), image=[5 / 8, 3 / 8], text=[11 / 32, 13 / 32, 8 / 32])


def test_raw_attention_and_grad_cam_take_the_last_reading_of_each_modality():
    # Image: S1 row 0; text: S5 row 0.
    check(raw_attention(two_streams()), image=[3 / 4, 1 / 4], text=[1 / 4, 1 / 2, 1 / 4])
    # ∇A of S1 = [[4/3, 4], [-2, 4]], mean 11/6: 11/6 [3/4, 1/4] = [11/8, 11/24].
    # ∇A of S5 = [[-4, 2, 4], [2, 0, -4]], mean 0.
    check(grad_cam(two_streams()), image=[11 / 8, 11 / 24], text=[0, 0, 0])


# ---------------------------------------------------------------------------------------------------------
def test_joined_streams_are_taken_apart_again():
    """A learned class token and two patches are joined before the one sub-layer; row 0 is read.

    α = 3/4; Ā row 0 = [1, 2, 1], Â = [1/4, 1/2, 1/4]: C0 = [3/4 + 1/16, 1/8, 1/16].
    """
    step = sublayer(
        Node("joint", 0), Node("joint", 0),
        [[[1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4]]],
        [[[1, 2, 1], [1, 1, 1], [1, 1, 1]]],
        before=[[3], [0], [0]], added=[[1], [-1], [0]],
    )  # fmt: skip
    trace = AttentionTrace(
        steps=[Join(Node("joint", 0), (Node("class_token", 0), Node("image", 0))), step],
        lengths={"class_token": 1, "image": 2, "joint": 3},
        inputs=("class_token", "image"),
        read=(Node("joint", 1), torch.tensor([0])),
        image_stream="image",
        grid=(1, 2),
    )
    check(weighted(trace), class_token=[13 / 16], image=[2 / 16, 1 / 16])
    torch.testing.assert_close(weighted(trace).image, tensor([[[2 / 16, 1 / 16]]]))
    check(gae(trace), class_token=[2], image=[2, 1])
    check(raw_attention(trace), class_token=[1 / 4], image=[1 / 4, 1 / 2])
    check(rollout(trace), class_token=[5 / 8], image=[1 / 8, 1 / 4])


def test_padding_counts_in_no_mean_and_has_no_relevance():
    """Token 2 is padding with large values: counted in, α would be 10/110, 10/11 or 3/103 instead of 3/4.

    Ā row 0 = [1, 3, 0]: C0 = 3/4 e0 + 1/4 [1/4, 3/4, 0] = [13, 3, 0]/16.
    """
    step = sublayer(
        Node("tokens", 0), Node("tokens", 0),
        [[[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 2, 1 / 4]]],
        [[[1, 3, 0], [1, 1, 0], [1, 1, 0]]],
        before=[[2], [1], [7]], added=[[0], [1], [99]],
    )  # fmt: skip
    trace = AttentionTrace(
        steps=[step],
        lengths={"tokens": 3},
        valid={"tokens": torch.tensor([[True, True, False]])},
        inputs=("tokens",),
        read=(Node("tokens", 1), torch.tensor([0])),
    )
    check(weighted(trace), tokens=[13 / 16, 3 / 16, 0])
    check(raw_attention(trace), tokens=[1 / 4, 1 / 2, 0])


def test_grad_cam_means_leave_padding_out():
    """Token 2 is padding. ∇A over the tokens that there are: head 1 [[1, 1], [1, 1]], mean 1; head 2 [[0, 0],
    [0, 2]], mean 1/2. Row 0: ½ (1 [1/2, 1/4] + 1/2 [1/4, 1/2]) = [5/16, 1/4]; whatever ∇A is at padding.
    """
    A = [[[1 / 2, 1 / 4, 1 / 4]] * 3, [[1 / 4, 1 / 2, 1 / 4]] * 3]
    gradient = [[[1, 1, 80], [1, 1, 8], [-8, 8, 8]], [[0, 0, -80], [0, 2, 8], [8, 8, 8]]]
    step = sublayer(
        Node("tokens", 0), Node("tokens", 0), A, (tensor(A) * tensor(gradient)).tolist(),
        before=[[1], [1], [1]], added=[[1], [1], [1]],
    )  # fmt: skip
    trace = AttentionTrace(
        steps=[step],
        lengths={"tokens": 3},
        valid={"tokens": torch.tensor([[True, True, False]])},
        inputs=("tokens",),
        read=(Node("tokens", 1), torch.tensor([0])),
    )
    check(grad_cam(trace), tokens=[5 / 16, 1 / 4, 0])


def test_a_sub_layer_that_does_not_reach_the_scalar_moves_nothing():
    """All gradients 0: α = 1, nothing is divided by 0."""
    nothing = [[[0, 0], [0, 0]]]
    step = sublayer(
        Node("tokens", 0), Node("tokens", 0), [[[1 / 4, 3 / 4], [1 / 2, 1 / 2]]], nothing,
        before=[[0], [0]], added=[[0], [0]],
    )  # fmt: skip
    trace = AttentionTrace(
        steps=[step],
        lengths={"tokens": 2},
        inputs=("tokens",),
        read=(Node("tokens", 1), torch.tensor([1])),
    )
    for method in (weighted, weighted_token, gae):
        check(method(trace), tokens=[0, 1])
    check(grad_cam(trace), tokens=[0, 0])


def test_what_attention_added_alone_matters():
    """x without positive evidence: α = 0, and all relevance goes by Â = [1/4, 3/4]."""
    step = sublayer(
        Node("tokens", 0), Node("tokens", 0), [[[1 / 2, 1 / 2], [1 / 2, 1 / 2]]], [[[1, 3], [1, 1]]],
        before=[[-1], [-1]], added=[[1], [0]],
    )  # fmt: skip
    trace = AttentionTrace(
        steps=[step],
        lengths={"tokens": 2},
        inputs=("tokens",),
        read=(Node("tokens", 1), torch.tensor([0])),
    )
    check(weighted(trace), tokens=[1 / 4, 3 / 4])
    check(weighted_token(trace), tokens=[1 / 4, 3 / 4])


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"random"}))
def test_samples_of_a_batch_do_not_mix(name):
    """The trace of one_stream() beside one with other evidence, in either order."""
    names = ("query", "key", "value", "mixed", "before", "added")
    gradients = ("mixed_gradient", "before_gradient", "added_gradient")

    def other():
        trace = one_stream()
        for step in trace.attention:
            step.query = step.query.flip(1, 2)
            step.mixed_gradient = step.mixed_gradient.flip(2) * 3 - 1
            step.before_gradient, step.added_gradient = -step.added_gradient, step.before_gradient
        return trace

    for parts in ((one_stream(), other()), (other(), one_stream())):
        both = one_stream()
        both.read = (Node("tokens", 2), torch.tensor([0, 1]))
        for step, *alone in zip(both.attention, *(p.attention for p in parts), strict=True):
            for field in (*names, *gradients):
                setattr(step, field, torch.cat([getattr(s, field) for s in alone]))
        expected = []
        for row, part in enumerate(parts):
            part.read = (Node("tokens", 2), torch.tensor([row]))
            expected.append(METHODS[name](part).streams["tokens"])
        together = METHODS[name](both).streams["tokens"]
        torch.testing.assert_close(together, torch.cat(expected), rtol=0, atol=1e-14)
        assert not math.isclose(float((expected[0] - expected[1]).abs().max()), 0, abs_tol=1e-3)
