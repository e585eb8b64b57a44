"""The generic recorder around the forward: nothing left behind, errors that name the module, odd callers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from support import families, more_families
from support.own_layers import TOKENS, Doing, Mixed
from support.recordings import HOOKS, maps, unmarked
from support.slow import mostly_slow
from torch import nn

from clipmapper.errors import UserError
from clipmapper.relevance import METHODS, Join, Node, record
from clipmapper.relevance.modes import evaluating

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = (
    "hf_bert",
    "hf_lxmert",
    "hf_t5",
    "timm_pooled_by_attention",
    "torch_encoder, batch_first=False, norm_first=True",
)


def traced(case, model=None):
    with record(case.model if model is None else model) as trace:
        y = case.y(case.run(case.model if model is None else model, case.inputs))
    trace.backward(y)
    return trace


@pytest.mark.parametrize("name", FAMILIES)
def test_two_recordings_in_a_row_leave_no_mark_and_are_the_same(name):
    case = families.CASES[name]()
    case.model.train(False)
    config = getattr(case.model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    fast = torch.backends.mha.get_fastpath_enabled()
    seed = torch.random.get_rng_state()
    with unmarked(case.model):
        first = maps(traced(case))
        with torch.no_grad():
            second = maps(traced(case))
        with torch.inference_mode():
            third = maps(traced(case))
    for key, values in first.items():
        assert torch.equal(second[key], values) and torch.equal(third[key], values)
    assert getattr(config, "_attn_implementation", None) == chosen
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert not any(v.requires_grad for v in case.inputs.values() if v.is_floating_point())


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_behind_by_an_error(name):
    case = families.CASES[name]()
    last = [m for m in case.model.modules() if isinstance(m, nn.Linear)][-1]
    with unmarked(case.model), pytest.raises(KeyError), record(case.model):
        raise KeyError

    def broken(module, args):
        raise ZeroDivisionError

    handle = last.register_forward_pre_hook(broken)
    try:
        with pytest.raises(ZeroDivisionError), record(case.model):
            case.run(case.model, case.inputs)
    finally:
        handle.remove()
    with unmarked(case.model):
        pass


@pytest.mark.parametrize("name", ["hf_vit", "hf_bert", "hf_t5"])
def test_a_model_loaded_with_eager_attention(name):
    case = families.CASES[name]()
    expected = maps(traced(case))
    case.model.set_attn_implementation("eager")
    with unmarked(case.model):
        found = maps(traced(case))
    assert case.model.config._attn_implementation == "eager"
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", mostly_slow(["hf_bert", "timm_class_token"], 2))
def test_a_compiled_model(name):
    case = families.CASES[name]()
    expected = maps(traced(case))
    compiled = torch.compile(case.model, backend="eager")
    with torch.no_grad():
        case.run(compiled, case.inputs)
    found = maps(traced(case, compiled))
    for key, values in expected.items():
        assert torch.equal(found[key], values)


def test_an_image_among_words():
    """LLaVA-like: the tokens of the image stand at their places; the class token is left behind."""
    case = families.hf_llava()
    trace = traced(case)
    join = next(step for step in trace.steps if isinstance(step, Join))
    # The projector reads the state before the vision tower's last layer.
    assert join.parts == (Node("image", 2), Node("text", 0))
    text = 10 + torch.arange(14)
    text[2:11] = torch.arange(1, 10)
    assert join.index.tolist() == [text.tolist()]
    families.check_joined(case, trace)


@pytest.mark.parametrize("size", [(12, 12), (20, 28), (8, 12)])
def test_the_grid_is_that_of_the_images_that_came(size):
    """Not the one the model was made for: transformers and timm interpolate position embeddings."""
    import timm

    hf = families.hf_vit().model
    other = timm.models.vision_transformer.VisionTransformer(
        12, 4, embed_dim=16, depth=1, num_heads=4, num_classes=5, dynamic_img_size=True
    )
    dinov2 = families.hf_dinov2().model
    forwards = (
        (hf, lambda x: hf(pixel_values=x, interpolate_pos_encoding=True).logits),
        (other.double().eval(), other),
        (dinov2, lambda x: dinov2(pixel_values=x).pooler_output),
    )
    rows, columns = size[0] // 4, size[1] // 4
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for model, forward in forwards:
        with unmarked(model), record(model) as trace:
            y = forward(images)[:, 1]
        trace.backward(y)
        found = METHODS["gae"](trace)
        assert found.image.shape == (2, rows, columns)
        assert torch.equal(found.image.flatten(1), found.streams["image"][:, 1:])


def test_a_tower_recorded_by_itself_and_a_tower_that_does_not_run(tmp_path):
    model = families.open_clip_model(tmp_path, "causal")
    with record(model.visual) as trace:
        y = model.encode_image(families.pixels(2))[:, 1]
    trace.backward(y)
    assert trace.inputs == ("image",) and METHODS["weighted"](trace).image.shape == (2, 3, 3)
    with (
        pytest.raises(RuntimeError, match=r"2 of 4 attention sub-layers were not seen \(transformer.resb"),
        record(model),
    ):
        model.encode_image(families.pixels(2))


def test_both_towers_read_a_token_each(tmp_path):
    case = families.open_clip_similarity(tmp_path, "causal")
    trace = traced(case)
    assert [(node, at.tolist()) for node, at in trace.reads] == [
        (Node("image", 2), [0, 0]),
        (Node("text", 2), [6, 6]),
    ]
    assert (trace.image_stream, trace.text_stream, trace.grid) == ("image", "text", (3, 3))


def test_several_words_of_one_forward():
    case = families.hf_gpt2()
    with record(case.model) as trace:
        logits = case.model(**case.inputs).logits
    for position in (2, 5, 6):
        trace.backward(logits[:, position, 4], keep_graph=position != 6)
        assert trace.read[1].tolist() == [position] * 2
        text = METHODS["weighted"](trace).text
        assert text[:, : position + 1].all() and not text[:, position + 1 :].any()


def test_a_model_that_averages_its_tokens():
    model = families.timm_vit(class_token=False, global_pool="avg")
    with record(model) as trace:
        y = model(families.pixels(2))[:, 1]
    trace.backward(y)
    assert torch.equal(trace.read[1], torch.full((2, 9), 1 / 9, dtype=torch.float64))
    whole = METHODS["weighted"](trace).image
    parts = torch.zeros_like(whole)
    for position in range(9):
        trace.read_token("image", torch.tensor([position] * 2))
        parts += METHODS["weighted"](trace).image / 9
    torch.testing.assert_close(whole, parts)


def test_methods_without_a_backward_ask_for_the_row():
    case = families.hf_vit()
    with record(case.model) as trace:
        case.run(case.model, case.inputs)
    with pytest.raises(ValueError, match=r"set trace\.read, by trace\.read_token\(stream, position\)"):
        METHODS["rollout"](trace)
    trace.read_token("image", torch.tensor([0, 0]))
    assert METHODS["rollout"](trace).image.shape == (2, 3, 3)
    with pytest.raises(ValueError, match="no stream 'text'; those that are inputs: image"):
        trace.read_token("text", torch.tensor([0, 0]))


class Own(nn.Module):
    """A block whose attention is of no known class."""

    def __init__(self, fused=True, named=False):
        super().__init__()
        self.inner = (MyAttention if named else Mixing)(fused)

    def forward(self, x):
        return x + self.inner(x)


class Mixing(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, x):
        if self.fused:
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


class MyAttention(Mixing):
    pass


def refused(model, error, message):
    model = model.eval()
    with unmarked(model), pytest.raises(error, match=message), record(model):
        model(TOKENS)


def test_attention_that_is_not_known_is_named():
    refused(Own(named=True), UserError, "inner: the recorder does not know MyAttention; say where its input")
    refused(
        Mixed(Own(named=True)),
        UserError,
        r"between.inner: the recorder does not know MyAttention.*recorder\.md",
    )
    refused(Mixed(Own()), RuntimeError, r"between.inner: Mixing attends in no sub-layer.*docs/recorder\.md")
    refused(Own(fused=False), UserError, "Own has no attention that the recorder knows")


@pytest.mark.parametrize("place", ["first", "between", "last"])
def test_attention_that_is_neither_known_nor_fused_is_named_wherever_it_is(place):
    """Its softmax gives it away; before the first layer and behind the last nothing else would."""
    model = Mixed(Own(fused=False) if place == "between" else nn.Identity())
    if place != "between":
        whole = [model, Own(fused=False)] if place == "last" else [Own(fused=False), model]
        model = nn.Sequential(*whole)
    refused(model, RuntimeError, r"inner: Mixing attends in no sub-layer that the recorder knows")


def test_probabilities_of_classes_are_no_attention():
    head = nn.Sequential(nn.Linear(8, 4), nn.Softmax(dim=-1))
    model = nn.Sequential(Mixed(nn.Identity()), head).eval()
    softmax = (torch.softmax, F.softmax, torch.Tensor.softmax)
    with record(model) as trace:
        y = torch.softmax(model(TOKENS), dim=-1)[:, 1, 3].log()
    trace.backward(y)
    assert trace.read[1].tolist() == [1, 1]
    assert (torch.softmax, F.softmax, torch.Tensor.softmax) == softmax
    assert "softmax" not in vars(torch.Tensor)


def test_known_attention_that_is_not_fused_is_named():
    model = Mixed(nn.Identity())
    model.second.self_attn = MyAttention(False)
    model.second.self_attn.batch_first = True
    model.second.self_attn.forward = lambda x, *more, **others: (x, None)
    model.eval()
    with (
        pytest.raises(RuntimeError, match=r"second: no call of .*scaled_dot_product_attention was seen"),
        record(model),
    ):
        model(TOKENS)


def test_tokens_that_are_mixed_or_cut_into_windows_are_refused():
    merge = Doing(lambda x: x.unflatten(1, (3, 2)).mean(2))
    refused(Mixed(merge), UserError, "second: its tokens are no selection of the tokens of tokens.*Mean")
    windows = Doing(lambda x: x.unflatten(1, (2, 3)).flatten(0, 1))
    refused(Mixed(windows), UserError, "4 samples|another sample|no selection")
    blur = Doing(lambda x: F.conv1d(x.transpose(1, 2), torch.ones(8, 8, 3), padding=1).transpose(1, 2))
    refused(Mixed(blur), UserError, "mixes tokens.*Convolution")


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [0, 2, 4], [1, 3]])
def test_tokens_that_are_rearranged_or_left_out_are_followed(order):
    model = Mixed(Doing(lambda x: x[:, order])).eval()
    with record(model) as trace:
        y = model(TOKENS)[:, 1, 3]
    trace.backward(y)
    join = next(step for step in trace.steps if isinstance(step, Join))
    assert join.index.tolist() == [order]
    assert trace.read[0].stream == "selected tokens" and trace.read[1].tolist() == [1, 1]
    relevance = METHODS["weighted"](trace).streams["tokens"]
    torch.testing.assert_close(relevance.sum(1), torch.ones(2))


def test_attention_dropout_is_refused():
    model = Mixed(nn.Identity()).train()
    with (
        unmarked(model),
        pytest.raises(RuntimeError, match=r"first: drops out attention.*model\.eval\(\)"),
        record(model),
    ):
        model(TOKENS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"drop_path_rate": 0.2}, r"drop_path1: DropPath is on"),
        ({"patch_drop_rate": 0.25}, r"patch_drop: PatchDropout is on"),
        ({"pos_drop_rate": 0.1}, r"pos_drop: Dropout is on"),
        ({}, None),
    ],
)
def test_a_forward_of_chance_is_refused(settings, named):
    """(Of a model in training; one that drops nothing may be in training.)"""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=2, num_classes=3, **settings
    )
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if named is not None:
        with pytest.raises(UserError, match=rf"{named}.*model\.eval\(\)"), record(model.train()):
            model(images)
    for training in (False, True) if named is None else (False,):
        with record(model.train(training)) as trace:
            y = model(images)[:, 1]
        trace.backward(y)


def test_a_tower_called_twice_gives_two_streams():
    model = Mixed(nn.Identity()).eval()
    with record(model) as trace:
        y = (model(TOKENS)[:, 0] * model(TOKENS.flip(0))[:, 2]).sum(-1)
    trace.backward(y)
    assert trace.inputs == ("tokens", "tokens 2")
    assert [(node, at.tolist()) for node, at in trace.reads] == [
        (Node("tokens", 2), [0, 0]),
        (Node("tokens 2", 2), [2, 2]),
    ]


def test_more_images_than_texts_are_refused(tmp_path):
    case = families.open_clip_similarity(tmp_path, "causal")
    with pytest.raises(UserError, match=r"repeat them.*so that each sample has its own"), record(case.model):
        case.model(families.pixels(1), case.inputs["text"])


def test_swin_is_refused_by_name():
    import timm

    model = timm.models.swin_transformer.SwinTransformer(
        16, 2, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=2, num_classes=3
    )
    with (
        pytest.raises(
            UserError, match=r"layers\.0\.blocks\.0\.attn: WindowAttention attends within windows; .*\(Swin\)"
        ),
        record(model),
    ):
        pass
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    with (
        pytest.raises(UserError, match=r"attention: Swin\w+ attends within windows; .*\(Swin\)"),
        record(SwinForImageClassification(config)),
    ):
        pass


def test_parameters_take_no_gradient_and_no_matrix_of_tokens_is_in_the_graph():
    case = families.hf_lxmert()
    with record(case.model) as trace:
        y = case.y(case.run(case.model, case.inputs))
    lengths = {7, 6}
    seen, waiting, square = set(), [y.grad_fn], []
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        assert not function.name().startswith(("Softmax", "Bmm")), function.name()
        if hasattr(function, "variable"):
            square.append(function.variable.shape)
        waiting += [further for further, _ in function.next_functions]
    assert len(square) == 2  # the two streams' first states, and no parameter
    assert all(shape[1] in lengths for shape in square)
    trace.backward(y)
    assert all(p.grad is None for p in case.model.parameters())


def test_no_library_is_imported_that_is_not_in_use():
    code = (
        "import sys, clipmapper.relevance; "
        "print(sorted({'transformers', 'open_clip', 'timm'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_hooks_that_are_looked_for_exist():
    assert all(hasattr(nn.Linear(1, 1), kind) for kind in HOOKS)


def test_the_table_of_models_names_tests_and_every_model_that_is_tested():
    text = (ROOT / "docs" / "recorder.md").read_text().split("## Models × recorder")[1]
    cells = [line.split("|")[-2] for line in text.splitlines() if line.startswith("| ")]
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)", cell)}
    tests = (ROOT / "tests" / "test_record_any.py").read_text() + Path(__file__).read_text()
    here = set(re.findall(r"^def (test_\w+)", tests, flags=re.MULTILINE))
    made = {name.split(",")[0] for name in families.CASES | more_families.CASES}
    assert made <= named
    for name in named - made - here - {"weighted", "rollout"}:
        assert (ROOT / "tests" / f"{name}.py").exists(), name


def test_parts_of_a_model_keep_their_own_modes():
    """Such as norms that are to keep their statistics while the rest is trained."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[2].eval()
    with pytest.raises(RuntimeError, match="within"), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise RuntimeError("within")
    assert [part.training for part in model.modules()] == [True, True, True, False]
