"""Recording keeps nothing that grows with the square of the number of tokens, and ``a`` only once."""

import pytest
import torch
from support import tiny_models
from torch.autograd.graph import saved_tensors_hooks

from clipmapper.benchmarks import subjects
from clipmapper.benchmarks.timing import peak_bytes
from clipmapper.relevance import gae, propagation, record, weighted
from clipmapper.relevance.many_scalars import attention_for_several, each_scalar

CPU = torch.device("cpu")


class Saved:
    """Tensors that the graph keeps which have a query axis and a key axis, by their memory."""

    def __init__(self, lengths):
        self.lengths, self.kept = lengths, {}

    def __enter__(self):
        self.hooks = saved_tensors_hooks(self.note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def note(self, tensor):
        if tensor.ndim >= 2 and tensor.shape[-1] in self.lengths and tensor.shape[-2] in self.lengths:
            self.kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.mark.parametrize("kind", ["dual_flow", "single_flow"])
def test_no_matrix_of_tokens_is_kept_of_clipmapper(folder, kind):
    model = tiny_models.clipmapper(folder, kind)
    text = tiny_models.texts((7, 11, 9), 0)  # padded: there are masks
    with record(model) as trace, Saved({10, 11, 21}) as saved:
        y = model(tiny_models.images(3, 0), text, only_class_token=False)[:, 0]
    trace.backward(y)
    assert len(weighted(trace).streams) == len(gae(trace).streams) == 2
    # The causal mask of the text tower, one for all of its layers.
    assert [tuple(t.shape[-2:]) for t in saved.kept.values()] in ([], [(11, 11)])


def test_the_check_sees_matrices_where_they_are_kept(folder):
    model = tiny_models.clipmapper(folder, "dual_flow")
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        record(model),
        Saved({10, 11}) as saved,
    ):
        model(tiny_models.images(3, 0), tiny_models.texts((7, 11, 9), 0), only_class_token=False)
    assert len(saved.kept) > 8


def test_no_matrix_of_tokens_is_kept_of_captions(folder):
    model, text = tiny_models.captioner(folder), tiny_models.texts((11,), 0)
    with attention_for_several(), record(model) as trace, Saved({10, 11}) as saved:
        image_tokens = model.encoder.image_tokens(tiny_models.images(1, 0))
        text_tokens = model.text_tokens(text.ids, text.valid)
        scores = model.caption_logits(image_tokens, text_tokens, text.valid, only_text=False)[0]
    rows = next(each_scalar(trace, scores[[3, 5], 1], torch.tensor([3, 5]), [0, 1]))
    assert weighted(rows).text.shape == (2, 11)
    shapes = [tuple(t.shape[-2:]) for t in saved.kept.values()]
    assert len(shapes) <= 2, shapes  # causal masks: of the text tower, and of the mapper


def test_a_boolean_mask_is_made_numbers_once():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
    blocked = torch.ones(11, 11, dtype=torch.bool).triu(1)
    tokens = torch.randn(2, 11, 8, dtype=torch.float64)
    with record(model) as trace, Saved({11}) as saved:
        y = model(tokens, mask=blocked)[:, -1, 0]
    trace.backward(y)
    assert len(saved.kept) <= 1


@pytest.mark.slow
def test_memory_grows_with_the_number_of_tokens(folder):
    """From 10 × 10 to 20 × 20 patches, four times the tokens, four times the memory (not sixteen)."""
    peaks = {}
    for size in (160, 320):
        subject = subjects.image_tower("vit", tiny_models.clip_config(folder), 1, CPU, force_image_size=size)
        for method in (weighted, gae):

            def explain(subject=subject, method=method):
                trace, y = subject.trace()
                trace.backward(y)
                method(trace)

            peaks[method.__name__, size] = peak_bytes(explain, CPU)
    for method in ("weighted", "gae"):
        assert peaks[method, 320] < 5 * peaks[method, 160]


def test_recording_keeps_no_more_than_saliency(folder, monkeypatch):
    # In so small a model the few megabytes of one block of attention would be all that is seen.
    monkeypatch.setattr(propagation, "_BLOCK", 2**14)
    subject = subjects.image_tower("vit", tiny_models.clip_config(folder), 1, CPU, force_image_size=160)

    def explain():
        trace, y = subject.trace()
        trace.backward(y)
        weighted(trace)

    assert peak_bytes(explain, CPU) <= 1.02 * peak_bytes(subject.floor, CPU)
