"""Recording a forward: what it gives, and that it leaves no mark on the model."""

import pytest
import torch
from support import tiny_models
from support.compared_methods import METHODS
from support.recordings import unmarked
from torch import nn

from clipmapper.models.tokens import TokenizedText
from clipmapper.relevance import Join, Node, record

KINDS = [("dual_flow", False), ("dual_flow", True), ("single_flow", False), ("single_flow", True)]
LENGTHS = (7, 4, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(params=KINDS, ids=lambda k: f"{k[0]}{'-class_token' if k[1] else ''}")
def model(request, folder):
    return tiny_models.clipmapper(folder, *request.param)


@pytest.fixture
def dual(folder):
    return tiny_models.clipmapper(folder, "dual_flow")


IMAGES, TEXT = tiny_models.images(len(LENGTHS)), tiny_models.texts(LENGTHS)


def recorded(model, samples=None):
    with record(model, samples) as trace:
        logits = model(IMAGES, TEXT, only_class_token=False)
    return trace, logits


def test_logits_inside_are_the_plain_logits(model):
    with torch.no_grad():
        plain = model(IMAGES, TEXT)
        everything = model(IMAGES, TEXT, only_class_token=False)
    torch.testing.assert_close(everything, plain, rtol=0, atol=1e-10)
    with unmarked(model):
        _, logits = recorded(model)
    torch.testing.assert_close(logits.detach(), plain, rtol=0, atol=1e-10)
    assert plain.std(0).min() > 1e-2, "samples differ, or a mix-up could not be seen"


def test_recording_inside_inference_mode(dual):
    _, expected = recorded(dual)
    with torch.inference_mode(), unmarked(dual):
        trace, logits = recorded(dual)
        assert torch.is_inference_mode_enabled()  # again, after the recording
    trace.backward(logits[:, 0])
    relevance = METHODS["weighted"](trace)
    torch.testing.assert_close(logits, expected)
    assert relevance.image.std() > 0


def test_the_graph_of_the_dual_flow_mapper(dual):
    """Both directions of a block read the other stream as it entered the block."""
    trace, _ = recorded(dual)
    i, t = ("image", "text")
    # Two layers in each tower: the mapper begins at version 2, and a block adds two versions to each stream.
    expected = [(Node(s, v), Node(s, v), Node(s, v + 1)) for s in (i, t) for v in (0, 1)]
    for entered in (2, 4):
        for stream, other in ((i, t), (t, i)):
            own, after = Node(stream, entered), Node(stream, entered + 1)
            expected += [(own, own, after), (after, Node(other, entered), Node(stream, entered + 2))]
    assert [(s.query_node, s.key_node, s.output_node) for s in trace.attention] == expected
    assert trace.steps == trace.attention
    assert trace.lengths == {"image": 1 + tiny_models.PATCHES, "text": max(LENGTHS)}
    assert trace.inputs == ("image", "text")
    assert trace.read[0] == Node("image", 6) and trace.read[1].tolist() == [0, 0, 0]
    assert torch.equal(trace.valid["text"], TEXT.valid)
    assert [s.is_self for s in trace.attention].count(False) == 4


def test_the_graph_of_the_single_flow_mapper_with_a_class_token(folder):
    trace, _ = recorded(tiny_models.clipmapper(folder, "single_flow", class_token=True))
    towers = [(Node(s, v), Node(s, v), Node(s, v + 1)) for s in ("image", "text") for v in (0, 1)]
    joint = [(Node("joint", v), Node("joint", v), Node("joint", v + 1)) for v in (0, 1)]
    assert [(s.query_node, s.key_node, s.output_node) for s in trace.attention] == towers + joint
    parts = (Node("class_token", 0), Node("image", 2), Node("text", 2))
    assert trace.steps[4] == Join(Node("joint", 0), parts)
    assert trace.inputs == ("class_token", "image", "text")
    assert trace.lengths["joint"] == 1 + 1 + tiny_models.PATCHES + max(LENGTHS)
    assert trace.valid["joint"].sum(1).tolist() == [2 + tiny_models.PATCHES + n for n in LENGTHS]
    assert trace.read[0] == Node("joint", 2)


def test_the_class_token_of_a_dual_flow_mapper_is_a_stream_of_its_own(folder):
    trace, _ = recorded(tiny_models.clipmapper(folder, "dual_flow", class_token=True))
    assert trace.inputs == ("class_token", "image", "text")
    join = next(s for s in trace.steps if isinstance(s, Join))
    assert join == Join(Node("mapper_image", 0), (Node("class_token", 0), Node("image", 2)))
    assert trace.read[0] == Node("mapper_image", 4)
    text_cross = [s for s in trace.attention if s.name.endswith("text cross-attention")]
    assert [s.key_node for s in text_cross] == [Node("mapper_image", 0), Node("mapper_image", 2)]


def test_what_is_recorded_adds_up(model):
    """x of a sub-layer plus what it adds, through the MLP where there is one, is what comes after it."""
    trace, _ = recorded(model)
    for tower in ("image tower", "text tower"):
        first, second = (s for s in trace.attention if s.name.startswith(tower))
        clip = model.encoder.clip
        block = (clip.visual if tower == "image tower" else clip).transformer.resblocks[0]
        after = first.before + first.added
        after = after + block.ls_2(block.mlp(block.ln_2(after)))
        torch.testing.assert_close(second.before, after)
    for step in trace.attention:
        torch.testing.assert_close(step.mixed, step.probabilities() @ step.value)
        assert step.before.shape == step.added.shape
        assert step.before.shape[1] == trace.lengths[step.query_node.stream] == step.query.shape[2]
        assert step.key.shape[2] == trace.lengths[step.key_node.stream]


def test_gradients_are_those_of_plain_autograd(dual):
    """∇x and ∇a at the last image sub-layers, from a head applied to x + a by hand."""
    trace, logits = recorded(dual)
    cross = next(s for s in trace.attention if s.name == "mapper, block 1, image cross-attention")
    with torch.no_grad():
        x, a = cross.before.detach().clone(), cross.added.detach().clone()
    with torch.enable_grad():
        a.requires_grad_()
        after = x + a
        out = after + dual.mapper.blocks[1].image_mlp(after)
        y = dual.head(out[:, 0])[:, 2]
        torch.testing.assert_close(y, logits[:, 2])
        expected = torch.autograd.grad(y.sum(), a)[0]
    trace.backward(logits[:, 2])
    torch.testing.assert_close(cross.added_gradient, expected)
    assert expected[:, 0].abs().max() > 1e-3
    assert not expected[:, 1:].any()


def test_the_backward_lets_go_of_the_graph_and_touches_no_weight(model):
    with unmarked(model):
        trace, logits = recorded(model)
        trace.backward(logits[:, 0])
    for step in trace.attention:
        for name in ("query", "key", "value", "mixed", "before", "added"):
            assert not getattr(step, name).requires_grad
        assert step.mixed_gradient is not None and not step.mixed_gradient.requires_grad


def test_a_scalar_from_elsewhere_is_refused(dual):
    trace, _ = recorded(dual)
    with torch.no_grad():
        plain = dual(IMAGES, TEXT)
    with pytest.raises(ValueError, match="run the model inside the recorder"):
        trace.backward(plain[:, 0])


@pytest.mark.parametrize("frozen", [True, False])
def test_flags_hooks_and_the_patched_function_are_restored(folder, frozen):
    model = tiny_models.clipmapper(folder, frozen=frozen)
    assert model.encoder.clip.visual.conv1.weight.requires_grad is not frozen
    model.head.layers[0].bias.requires_grad_(False)
    with unmarked(model):
        with record(model) as trace:
            assert not any(weight.requires_grad for weight in model.parameters())
            assert torch.is_grad_enabled()
            logits = model(IMAGES, TEXT, only_class_token=False)
        trace.backward(logits[:, 1])
    assert not model.head.layers[0].bias.requires_grad


def test_nothing_is_left_behind_by_an_error_in_the_block(dual):
    with unmarked(dual), pytest.raises(KeyError, match="mine"), record(dual):
        dual(IMAGES, TEXT, only_class_token=False)
        raise KeyError("mine")
    with unmarked(dual), pytest.raises(KeyError, match="mine"), record(dual):
        raise KeyError("mine")


def test_nothing_is_left_behind_by_an_error_in_the_middle_of_a_forward(dual):
    class Broken(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("in the MLP of the first block")

    expected = METHODS["weighted"](explained(dual)).image
    whole, dual.mapper.blocks[0].image_mlp = dual.mapper.blocks[0].image_mlp, Broken()
    with unmarked(dual), pytest.raises(ZeroDivisionError), record(dual):
        dual(IMAGES, TEXT, only_class_token=False)
    dual.mapper.blocks[0].image_mlp = whole
    assert torch.equal(METHODS["weighted"](explained(dual)).image, expected)


def explained(model, images=IMAGES, text=TEXT):
    with record(model) as trace:
        y = model(images, text, only_class_token=False)[:, 0]
    trace.backward(y)
    return trace


def test_under_no_grad_and_in_training_mode(model):
    expected = METHODS["weighted"](explained(model))
    with torch.no_grad(), unmarked(model):
        under_no_grad = explained(model)
    model.train()
    assert not model.encoder.training
    with unmarked(model):
        in_training = explained(model)
    for trace in (under_no_grad, in_training):
        for stream, values in METHODS["weighted"](trace).streams.items():
            torch.testing.assert_close(values, expected.streams[stream], rtol=0, atol=1e-12)


def test_two_recordings_in_a_row_are_the_same(model):
    first, second = explained(model), explained(model)
    for name, method in METHODS.items():
        for stream, values in method(first).streams.items():
            assert torch.equal(method(second).streams[stream], values), name


def test_an_unfrozen_encoder_gives_the_same_explanation(folder):
    frozen, free = (tiny_models.clipmapper(folder, frozen=f) for f in (True, False))
    a, b = METHODS["weighted"](explained(frozen)), METHODS["weighted"](explained(free))
    for stream, values in a.streams.items():
        torch.testing.assert_close(b.streams[stream], values, rtol=0, atol=1e-12)


def test_plain_forwards_before_and_after_are_not_recorded(dual):
    dual(IMAGES, TEXT, only_class_token=False)
    trace, _ = recorded(dual)
    count = len(trace.steps)
    dual(IMAGES, TEXT, only_class_token=False)
    assert len(trace.steps) == count == 12


WRONG = r"make exactly one whole forward, model\(images, text, only_class_token=False\)"


def test_a_forward_of_only_the_class_token_is_refused(model):
    with unmarked(model), pytest.raises(RuntimeError, match=WRONG), record(model):
        model(IMAGES, TEXT, only_class_token=True)


def test_no_forward_and_two_forwards_are_refused(model):
    with unmarked(model), pytest.raises(RuntimeError, match=f"recorded 0 attention.*{WRONG}"), record(model):
        pass
    with unmarked(model), pytest.raises(RuntimeError, match=WRONG), record(model):
        model(IMAGES, TEXT, only_class_token=False)
        model(IMAGES, TEXT, only_class_token=False)


def test_a_forward_of_the_mapper_alone_is_refused(dual):
    image, text = dual.encoder.image_tokens(IMAGES), dual.encoder.text_tokens(TEXT.ids, TEXT.valid)
    with unmarked(dual), pytest.raises(RuntimeError, match=WRONG), record(dual):
        dual.answer_logits(image, text, TEXT.valid, only_class_token=False)


def test_attention_that_is_not_seen_is_named(dual):
    """A sub-layer that makes its attention without scaled_dot_product_attention."""

    class Own(nn.Module):
        def forward(self, x, *more, **others):
            return x * 0.1, None

    attention = dual.encoder.clip.visual.transformer.resblocks[1].attn
    dual.encoder.clip.visual.transformer.resblocks[1].attn = Own()
    with (
        unmarked(dual),
        pytest.raises(
            RuntimeError, match=r"image tower, block 1: no call of .*scaled_dot_product_attention was seen"
        ),
        record(dual),
    ):
        dual(IMAGES, TEXT, only_class_token=False)
    dual.encoder.clip.visual.transformer.resblocks[1].attn = attention


def test_an_unknown_kind_of_block_is_named(dual):
    dual.mapper.blocks[0].text_self = nn.Linear(16, 16)
    with (
        unmarked(dual),
        pytest.raises(ValueError, match="block 0, text self-attention: the recorder does not know Linear"),
        record(dual),
    ):
        pass


def test_what_the_trace_says_about_the_samples(model):
    trace, _ = recorded(model, samples=[5, 3, 8])
    assert trace.samples == [5, 3, 8]
    assert trace.grid == tiny_models.GRID
    assert (trace.image_stream, trace.text_stream, trace.batch) == ("image", "text", 3)


def test_ignored_patches_are_not_valid(dual):
    ignored = torch.zeros(len(LENGTHS), tiny_models.PATCHES, dtype=torch.bool)
    ignored[0, 4] = ignored[2, 8] = True
    with record(dual) as trace:
        dual(IMAGES, TEXT, image_ignore=ignored, only_class_token=False)
    expected = torch.cat([torch.ones(3, 1, dtype=torch.bool), ~ignored], dim=1)
    assert torch.equal(trace.padding_free("image"), expected)


@pytest.mark.parametrize("text_tower", ["unmasked", "class_token"])
@pytest.mark.parametrize("kind", ["dual_flow", "single_flow"])
def test_text_towers_that_are_given_their_padding_back(folder, kind, text_tower):
    """SigLIP's and CoCa's text towers run on the whole context; the mapper gets what was given."""
    model = tiny_models.clipmapper(folder, kind, text_tower=text_tower)
    trace = explained(model)
    alone = TokenizedText(*(t[1:2, : LENGTHS[1]] for t in (TEXT.ids, TEXT.valid, TEXT.removable)))
    trace_alone = explained(model, IMAGES[1:2], alone)
    for name, method in METHODS.items():
        together, by_itself = method(trace), method(trace_alone)
        assert together.text.isfinite().all()
        assert not together.text[:, : max(LENGTHS)][~TEXT.valid].any()
        if name != "random":  # seeded by the place in the batch where no samples are named
            torch.testing.assert_close(together.image[1:2], by_itself.image, rtol=0, atol=1e-10)
            first = slice(LENGTHS[1])
            torch.testing.assert_close(
                together.text[1:2, first], by_itself.text[:, first], rtol=0, atol=1e-10
            )
