"""Padding of words beside an image, of patches and of PyTorch's own layers: as ``test_padding.py`` has it."""

import pytest
import torch
from support import families as base
from support import more_families as more
from support.slow import mostly_slow

from clipmapper.relevance import METHODS, record

N, L = 7, 5  # words of the batch, and of the sample without padding
CASES = {**base.CASES, **more.CASES, "hf_llava": base.hf_llava}
QUICK = ("hf_vilt", "hf_paligemma")
METHODS_TRIED = (
    "weighted", "gae", "rollout", "input_x_gradient", "grad_cam", "full_grad", "att_cat", "x_grad_cam",
)  # fmt: skip


def padded(words, side, fill=0):
    padding = torch.full((len(words), N - L), fill, dtype=words.dtype)
    return torch.cat([padding, words] if side == "left" else [words, padding], dim=1)


def compare(trace, alone, places, methods=METHODS_TRIED):
    """``places``: stream → where the sample's tokens are in the padded row, of streams that have padding."""
    for method in methods:
        found, expected = METHODS[method](trace).streams, METHODS[method](alone).streams
        assert found.keys() == expected.keys()
        for stream, values in expected.items():
            row = found[stream][1]
            if stream in places:
                outside = torch.ones(len(row), dtype=torch.bool)
                outside[places[stream]] = False
                assert not row[outside].any(), f"{method}: relevance at padding of {stream}"
                row = row[places[stream]]
            scale = float(values.abs().max()) or 1.0
            torch.testing.assert_close(
                row / scale, values[0] / scale, rtol=0, atol=1e-7, msg=f"{method}: {stream}"
            )


def traced(model, run, inputs):
    with record(model) as trace:
        y = run(model, inputs)
    trace.backward(y)
    return trace, y.detach()


def check(model, run, batch, alone, places):
    (trace, y), (single, expected) = traced(model, run, batch), traced(model, run, alone)
    torch.testing.assert_close(y[1:], expected)  # the model itself is not changed by its padding
    compare(trace, single, places)


# A class token reads; padding behind the words.

BESIDE = {  # name → (the stream of the words, how many tokens it has before them and behind)
    "hf_vilt": ("joint", 0, 10), "hf_visual_bert": ("joint", 0, 5), "hf_blip": ("text", 0, 0),
    "hf_altclip": ("text", 0, 0), "hf_chinese_clip": ("text", 0, 0), "hf_lxmert": ("text", 0, 0),
    "hf_flava": ("text", 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(BESIDE, QUICK))
def test_words_beside_an_image(name):
    case = CASES[name]()
    stream, before, behind = BESIDE[name]
    tokens = base.ids(2, N, seed=5)
    fill = getattr(case.model.config, "pad_token_id", None) or 0
    words = tokens[1:, :L]
    batch = case.inputs | {"input_ids": torch.cat([tokens[:1], padded(words, "right", fill)])}
    batch["attention_mask"] = torch.cat([torch.ones(1, N), padded(torch.ones(1, L), "right")]).long()
    alone = {key: value[1:] for key, value in case.inputs.items()}
    alone |= {"input_ids": words, "attention_mask": torch.ones(1, L).long()}
    where = [*range(before + L), *range(before + N, before + N + behind)]
    places = {stream: where}
    if name == "hf_flava":  # a class token, the image's tokens and the words, once more
        places["multimodal"] = range(1 + 10 + L)
    check(case.model, lambda model, inputs: case.y(case.run(model, inputs)), batch, alone, places)


# Words behind an image, or around it, in a causal model; the token that is read is named.


def causal(name):
    """The case, and how its words' tokens are: of the batch, and of the sample alone."""
    case = CASES[name]()
    if name == "hf_git":
        tokens = base.ids(2, N, seed=5)
        return case, tokens, tokens[1:, :L], 10
    tokens = case.inputs["input_ids"]
    longer = torch.cat([tokens, base.ids(2, N - L, seed=6)], dim=1)
    return case, longer, tokens[1:], 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", mostly_slow(("hf_git", "hf_paligemma", "hf_llava", "hf_blip2"), QUICK))
def test_words_around_an_image(name, side):
    case, tokens, words, before = causal(name)
    if name == "hf_git" and side == "left":
        pytest.skip("its words count positions from the left of the row, whatever the mask says")
    length = words.shape[1]
    mask = torch.ones(1, length).long()
    batch = case.inputs | {
        "input_ids": torch.cat([tokens[:1], padded(words, side)]),
        "attention_mask": torch.cat([torch.ones(1, length + N - L).long(), padded(mask, side)]),
    }
    alone = {key: value[1:] for key, value in case.inputs.items()}
    alone |= {"input_ids": words, "attention_mask": mask}
    first = N - L if side == "left" else 0
    if name == "hf_paligemma":  # all of it is a prefix, within which it reads both ways
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        alone["token_type_ids"] = torch.zeros_like(words)
    if name in (
        "hf_llava",
        "hf_paligemma",
    ):  # rotary angles are float32: the same positions, not only the same distances
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        alone["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)

    def run(model, inputs):
        outputs = case.run(model, inputs)
        start = first if len(inputs["input_ids"]) > 1 else 0
        at = torch.tensor([length - 2, start + length - 2])[-len(inputs["input_ids"]) :] + before
        return outputs.logits[torch.arange(len(at)), at, 9]

    where = [*range(before), *range(before + first, before + first + length)]
    check(case.model, run, batch, alone, {"text": where})


def test_patches_that_come_as_such():
    """SigLIP 2: an image of 2 × 3 patches in a row of 9."""
    case = CASES["hf_siglip2"]()
    patches = case.inputs["pixel_values"]
    six = patches[1:, :6]
    mask = torch.ones(2, 9).long()
    mask[1, 6:] = 0
    shapes = torch.tensor([[3, 3], [2, 3]])
    batch = case.inputs | {
        "pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes,
    }  # fmt: skip
    alone = {
        "input_ids": case.inputs["input_ids"][1:], "pixel_values": six,
        "pixel_attention_mask": mask[1:, :6], "spatial_shapes": shapes[1:],
    }  # fmt: skip
    check(
        case.model,
        lambda model, inputs: case.y(case.run(model, inputs)),
        batch,
        alone,
        {"image": list(range(6))},
    )


# PyTorch's own layers, whose masks are True where nothing is read.


def hidden(side, of=2):
    """True at padding of the second sample."""
    mask = torch.zeros(of, N, dtype=torch.bool)
    mask[1, slice(0, N - L) if side == "left" else slice(L, N)] = True
    return mask


def place(side):
    return list(range(N - L, N) if side == "left" else range(L))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "multihead"])
def test_pytorchs_encoder_and_attention(kind, batch_first, side):
    case = base.torch_encoder(batch_first) if kind == "encoder" else base.torch_multihead(batch_first)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    name = "src" if kind == "encoder" else "tokens"
    tokens = turn(case.inputs[name])
    where = place(side)

    def run(model, inputs):
        tokens, mask = inputs
        at = torch.tensor([3] if mask is None else [3, where[3]])
        if kind == "encoder":
            return turn(model(turn(tokens), src_key_padding_mask=mask))[torch.arange(len(at)), at, 2]
        x = model.embed(turn(tokens))
        for layer in (model.one, model.two, model.two):
            x = model.norm(x + layer(x, x, x, key_padding_mask=mask)[0])
        return model.head(turn(x)[torch.arange(len(at)), at])[:, 1]

    batch, alone = (tokens, hidden(side)), (tokens[1:, where], None)
    check(case.model, run, batch, alone, {"tokens": where})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_pytorchs_encoder_and_decoder(norm_first, side):
    case = base.torch_transformer(norm_first=norm_first)
    source, target = case.inputs["src"], case.inputs["tgt"]
    where = place(side)

    def run(model, inputs):
        source, target, mask = inputs
        rows = torch.arange(len(source))
        more = {"src_key_padding_mask": mask, "memory_key_padding_mask": mask}
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        out = model(source, target, tgt_mask=causal, **({} if mask is None else more))
        return out[rows, 3, 2]

    batch, alone = (source, target, hidden(side)), (source[1:, where], target[1:], None)
    check(case.model, run, batch, alone, {"encoder": where})
