"""Recording a captioner: every word's explanation equals the naive one, from a single forward."""

import pytest
import torch
from support import naive_relevance, tiny_models
from support.compared_methods import METHODS
from support.naive_captioning import CaptionRun
from support.slow import mostly_slow

from clipmapper.models.tokens import TokenizedText
from clipmapper.relevance import Node, record
from clipmapper.tasks.captioning.gpt2_decoder import GPT2Captioner

LENGTHS = (7, 4, 9)
CASES = {
    "dual_flow": {"kind": "dual_flow"},
    "dual_flow, class token": {"kind": "dual_flow", "class_token": True, "depth": 3, "seed": 1},
    "dual_flow, text embedding": {"kind": "dual_flow", "text_embedding_only": True, "seed": 2},
    "dual_flow, CoCa": {"kind": "dual_flow", "text_tower": "class_token", "seed": 3},
    "single_flow": {"kind": "single_flow", "seed": 4},
    "single_flow, class token": {"kind": "single_flow", "class_token": True, "depth": 3, "seed": 5},
    "single_flow, text embedding": {"kind": "single_flow", "text_embedding_only": True, "seed": 6},
    "single_flow, CoCa": {"kind": "single_flow", "text_tower": "class_token", "seed": 7},
    "dual_flow, GPT-2 prefix": {"kind": "dual_flow", "decoder": "gpt2_prefix", "seed": 8},
    "dual_flow, GPT-2 cross": {"kind": "dual_flow", "decoder": "gpt2_cross", "class_token": True, "seed": 9},
    "single_flow, GPT-2 prefix": {"kind": "single_flow", "decoder": "gpt2_prefix", "seed": 10},
    "single_flow, GPT-2 cross": {"kind": "single_flow", "decoder": "gpt2_cross", "seed": 11},
    "dual_flow, GPT-2 cross, text embedding": {
        "kind": "dual_flow",
        "decoder": "gpt2_cross",
        "text_embedding_only": True,
        "seed": 12,
    },
    "dual_flow, CoCa, GPT-2 prefix": {
        "kind": "dual_flow",
        "text_tower": "class_token",
        "decoder": "gpt2_prefix",
        "seed": 13,
    },
    "dual_flow, SigLIP": {"kind": "dual_flow", "text_tower": "unmasked", "text_embedding_only": True},
}
IMAGES, TEXT = tiny_models.images(len(LENGTHS)), tiny_models.texts(LENGTHS)


QUICK = (
    "dual_flow", "single_flow, class token", "dual_flow, text embedding", "dual_flow, CoCa",
    "single_flow, GPT-2 prefix", "dual_flow, GPT-2 cross", "dual_flow, SigLIP",
)  # fmt: skip


@pytest.fixture(params=mostly_slow(CASES, QUICK), scope="module")
def model(request, tmp_path_factory):
    return tiny_models.captioner(tmp_path_factory.mktemp("clip"), **CASES[request.param])


def across_then_self(trace) -> bool:
    """The mapper has two flows and GPT-2 joins them: it attends itself behind their cross-attention."""
    across = [number for number, step in enumerate(trace.attention) if not step.is_self]
    return bool(across) and "decoder" in trace.lengths


def recorded(model, images=IMAGES, text=TEXT):
    with record(model) as trace:
        logits = model(images, text, only_text=False)
    return trace, logits


def test_every_method_equals_the_naive_implementation_for_every_word(model):
    """One forward; for three words in turn a backward, and all samples at once."""
    trace, logits = recorded(model)
    offsets = (1, 2, 3)
    spread = 0
    for number, offset in enumerate(offsets):
        position = torch.tensor([length - offset - 1 for length in LENGTHS])
        word = TEXT.ids[torch.arange(3), position + 1]
        trace.read_token("text", position)
        y = logits[torch.arange(3), position, word]
        trace.backward(y, keep_graph=number + 1 < len(offsets))
        results = {name: METHODS[name](trace) for name in naive_relevance.METHODS}
        for row, length in enumerate(LENGTHS):
            run = CaptionRun(model, IMAGES[row], TEXT.ids[row, :length], int(position[row]))
            run.differentiate(int(word[row]))
            torch.testing.assert_close(run.logits[word[row]], y[row].detach(), rtol=0, atol=1e-10)
            for name, method in naive_relevance.METHODS.items():
                if name == "rollout" and across_then_self(trace):
                    continue  # the naive one knows no self-attention behind the last cross-attention
                values = method(run)
                if name == "weighted":
                    spread = max(spread, int((values > 0.01 * values.max()).sum()))
                streams = {"image": run.image, "text": run.text}
                if len(run.visual) > len(run.image):
                    streams["class_token"] = [0]
                assert set(results[name].streams) == set(streams)
                for stream, places in streams.items():
                    found = results[name].streams[stream][row]
                    torch.testing.assert_close(
                        found[: len(places)], values[places], rtol=1e-8, atol=1e-12,
                        msg=lambda m, n=name, s=stream, r=row: f"{n}, sample {r}, {s}: {m}",
                    )  # fmt: skip
                    assert not found[len(places) :].any()
    assert spread >= 5
    assert not trace.attention[0].query.requires_grad


def test_the_row_that_is_read_first_is_the_last_of_each_text(model):
    trace, _ = recorded(model)
    node, position = trace.read
    if node.stream in ("joint", "decoder"):
        position = position - (trace.lengths[node.stream] - TEXT.ids.shape[1])
    assert position.tolist() == [length - 1 for length in LENGTHS]


def test_later_words_have_no_relevance(model):
    trace, logits = recorded(model)
    position = torch.tensor([3, 2, 5])
    trace.read_token("text", position)
    trace.backward(logits[torch.arange(3), position, 1])
    for name, method in METHODS.items():
        if name == "random":
            continue
        text = method(trace).text
        later = torch.arange(text.shape[1]) > position[:, None]
        assert not text[later].any(), name


def test_the_graph_is_gone_after_a_backward_that_does_not_keep_it(model):
    trace, logits = recorded(model)
    trace.backward(logits[:, 1, 0], keep_graph=True)
    first = METHODS["gae"](trace)
    trace.backward(logits[:, 1, 0])
    assert torch.equal(METHODS["gae"](trace).image, first.image)
    with pytest.raises(RuntimeError):
        trace.backward(logits[:, 1, 0])


def test_a_token_that_the_read_stream_does_not_hold_is_refused(tmp_path):
    trace, _ = recorded(tiny_models.captioner(tmp_path))
    with pytest.raises(ValueError, match="'text' does not hold all these tokens of 'image'"):
        trace.read_token("image", torch.tensor([1, 1, 1]))


def test_a_forward_of_only_the_text_is_refused(model):
    if isinstance(model, GPT2Captioner):
        pytest.skip("GPT-2 reads the image's final tokens: there is no such forward")
    with pytest.raises(RuntimeError, match=r"model\(images, text, only_text=False\)"), record(model):
        model(IMAGES, TEXT)


def test_the_image_of_a_dual_flow_captioner_reads_no_text(tmp_path):
    trace, _ = recorded(tiny_models.captioner(tmp_path))
    across = [(s.query_node, s.key_node) for s in trace.attention if not s.is_self]
    assert across == [(Node("text", 3), Node("image", 2)), (Node("text", 5), Node("image", 3))]


def test_a_batch_gives_what_its_samples_give_alone(model):
    trace, logits = recorded(model)
    trace.backward(logits[torch.arange(3), torch.tensor(LENGTHS) - 1, 5])
    alone = TokenizedText(*(t[1:2, : LENGTHS[1]] for t in (TEXT.ids, TEXT.valid, TEXT.removable)))
    trace_alone, logits = recorded(model, IMAGES[1:2], alone)
    trace_alone.backward(logits[:, -1, 5])
    for name in ("weighted", "gae", "rollout"):
        together, by_itself = METHODS[name](trace), METHODS[name](trace_alone)
        torch.testing.assert_close(together.image[1:2], by_itself.image, rtol=0, atol=1e-10)
        first = slice(LENGTHS[1])
        torch.testing.assert_close(together.text[1:2, first], by_itself.text[:, first], rtol=0, atol=1e-10)
