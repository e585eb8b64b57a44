"""On a GPU: the same numbers as on a CPU, half precision, compiled models, and whole runs. Skips without."""

import copy
import json

import numpy as np
import pytest
import torch
from support import row_kernel_cases, tiny_models, training_models

import clipmapper
from clipmapper.benchmarks import relevance as benchmark
from clipmapper.benchmarks import subjects
from clipmapper.errors import UserError
from clipmapper.evaluation.perturbation import ModalityRelevance, perturb
from clipmapper.relevance import METHODS, propagation, record
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.registry import load
from clipmapper.tasks.vqa.explain import trace_answers
from clipmapper.tasks.vqa.perturbation import AnswerScorer

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
KINDS = ("dual_flow", "single_flow")
WITHOUT_CALLBACK = (
    *(setting for setting in training_models.SMALL_RUN if not setting.startswith("callbacks.")),
    "callbacks=none",
)


@pytest.fixture(scope="module", params=KINDS)
def on_both(request, tmp_path_factory):
    """Device → a float64 CLIPmapper with a trace of the same batch."""
    model = tiny_models.clipmapper(tmp_path_factory.mktemp("clip"), request.param).requires_grad_(False)
    found = {}
    for device in ("cpu", "cuda"):
        its = copy.deepcopy(model).to(device)
        images, text = tiny_models.images(3).to(device), tiny_models.texts([8, 6, 7]).to(device)
        found[device] = trace_answers(its, images, text, answers=[1, 0, 2], samples=range(3)).trace
    return found


@pytest.mark.parametrize("method", METHODS)
def test_relevance_is_that_of_a_cpu(on_both, method):
    try:
        expected = METHODS[method](on_both["cpu"])
    except UserError:
        with pytest.raises(UserError):
            METHODS[method](on_both["cuda"])
        return
    found = METHODS[method](on_both["cuda"])
    for stream, its in expected.streams.items():
        assert found.streams[stream].device.type == "cuda"
        # (captum's occlusion gives float32, whatever it is given.)
        exact = {"rtol": 1e-4, "atol": 1e-6} if method == "occlusion" else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(found.streams[stream].cpu(), its, **exact)


def test_kernels():
    row_kernel_cases.check("cuda", 1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_kernels_are_exact_for_what_was_rounded(precision, monkeypatch):
    subject = subjects.mapper("b_32", subjects.vit_b_32_mapper(), 2, GPU)
    with torch.autocast("cuda", dtype=benchmark.PRECISIONS[precision]):
        trace, y = subject.trace()
        trace.backward(y)
    by_kernels = METHODS["weighted"](trace)
    monkeypatch.setattr(propagation, "_kernels", lambda: None)
    assert benchmark.deviation(by_kernels, METHODS["weighted"](trace))["deviation_of_largest"] < 1e-5


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near(precision):
    subject = subjects.mapper("b_32", subjects.vit_b_32_mapper(), 2, GPU)
    whole = benchmark._work(subject, "weighted", "float32")()
    half = benchmark._work(subject, "weighted", precision)()
    assert benchmark.deviation(half, whole)["deviation"] < 1e-3


@pytest.mark.filterwarnings("default::DeprecationWarning", "default:TensorFloat32")  # Inductor's own
def test_a_compiled_model_runs_as_written(tmp_path):
    tower = subjects.image_tower("vit", tiny_models.clip_config(tmp_path), 2, GPU)
    compiled = torch.compile(tower.module)
    compiled(tower.images)
    with record(compiled) as trace:
        y = compiled(tower.images)[:, 0]
    trace.backward(y)
    with record(tower.module) as plain:
        y = tower.module(tower.images)[:, 0]
    plain.backward(y)
    for stream, its in METHODS["weighted"](plain).streams.items():
        torch.testing.assert_close(METHODS["weighted"](trace).streams[stream], its)


@pytest.mark.parametrize("kind", KINDS)
def test_perturbation_is_that_of_a_cpu(tmp_path, kind):
    model = tiny_models.clipmapper(tmp_path, kind).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    image, text = torch.rand(3, 9, generator=generator), torch.rand(3, 8, generator=generator)
    relevance = {"a": ModalityRelevance(image, text)}
    targets = torch.rand(3, 5, generator=generator)
    scores = {}
    for device in ("cpu", "cuda"):
        its = copy.deepcopy(model).to(device)
        text = tiny_models.texts([8, 6, 7]).to(device)
        scorer = AnswerScorer(its.kept_scorer(tiny_models.images(3).to(device), text), targets)
        scores[device] = perturb(
            scorer, relevance, text.removable, text.valid, sample_ids=np.arange(3), batch_size=16
        )
    for score in ("accuracy", "probability"):
        np.testing.assert_allclose(scores["cuda"].score(score), scores["cpu"].score(score), rtol=1e-9)


@pytest.mark.parametrize("decoder", [None, "gpt2_prefix", "gpt2_cross"])
def test_captions_are_those_of_a_cpu(tmp_path, decoder):
    model = tiny_models.captioner(tmp_path, decoder=decoder)
    written = {}
    for device in ("cpu", "cuda"):
        its = copy.deepcopy(model).to(device)
        tokens = its.encoder.image_tokens(tiny_models.images(3).to(device))
        written[device] = [
            write_captions(its, tokens, Decoding(method, max_length=8)) for method in ("greedy", "beam")
        ]
    for found, expected in zip(written["cuda"], written["cpu"], strict=True):
        assert torch.equal(found.tokens.ids.cpu(), expected.tokens.ids)


# Whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    run = training_models.script("train", *training_models.SMALL_RUN, "trainer=gpu", folder=folder)
    assert run.status == 0, run.errors
    return run


def test_training_explaining_and_perturbing(trained, tmp_path):
    results = json.loads((trained.run_folder / "results.json").read_text())
    assert results["explanations"]["perturbation"]
    checkpoint = trained.run_folder / "checkpoints" / "last.ckpt"
    on_gpu, on_cpu = load(checkpoint, GPU), load(checkpoint)
    picture = training_models.picture(3)
    found, expected = (
        clipmapper.explain(model, picture, "is the red ring left of the cross?", answer="yes")
        for model in (on_gpu, on_cpu)
    )
    np.testing.assert_allclose(found.patches, expected.patches, atol=1e-3)
    perturbed = training_models.script(
        "perturb", f"checkpoint={checkpoint}", "device=cuda", "samples=8", folder=tmp_path
    )
    assert perturbed.status == 0, perturbed.errors


def test_a_compiled_run(tmp_path):
    run = training_models.script(
        "train", *WITHOUT_CALLBACK, "trainer=gpu", "trainer.compile=true",
        "training.token_cache=false", folder=tmp_path,
    )  # fmt: skip
    assert run.status == 0, run.errors


@pytest.mark.parametrize("experiment", ["caption_scenes", "caption_scenes_gpt2"])
def test_a_captioner(tmp_path, experiment):
    run = training_models.script(
        "train", f"experiment={experiment}", "encoder.pretrained=null", "data.train_scenes=20",
        "data.simple_scenes=9", "data.validation_scenes=8", "data.held_out_scenes=8", "training.max_steps=4",
        "training.batch_size=8", "callbacks=relevance", "callbacks.samples=4", "callbacks.pictures=1",
        "trainer=gpu", folder=tmp_path,
    )  # fmt: skip
    assert run.status == 0, run.errors
    assert json.loads((run.run_folder / "results.json").read_text())["explanations"]
    checkpoint = run.run_folder / "checkpoints" / "last.ckpt"
    picture = training_models.picture(3)
    found, expected = (
        clipmapper.explain(load(checkpoint, device), picture, caption="a red ring left of a cross")
        for device in (GPU, torch.device("cpu"))
    )
    np.testing.assert_allclose(found.patches, expected.patches, atol=1e-3)
    perturbed = training_models.script(
        "perturb", f"checkpoint={checkpoint}", "device=cuda", "samples=4", folder=tmp_path
    )
    assert perturbed.status == 0, perturbed.errors
