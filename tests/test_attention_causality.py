"""Replacing attention: what keeps its effect changes nothing, what does not changes predictions."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from support import tiny_models
from support.made_traces import MASKS, attention

from clipmapper.errors import UserError
from clipmapper.evaluation.attention_causality import attention_causality
from clipmapper.relevance.substitution import (
    jensen_shannon,
    names_of_calls,
    random_matrix,
    substituted_attention,
    total_variation,
    uniform_matrix,
)


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[1] / "scripts" / "attention_causality.py"
    spec = importlib.util.spec_from_file_location("attention_causality_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_distances_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert total_variation(a, b).tolist() == [1.0, 0.0]
    torch.testing.assert_close(jensen_shannon(a, b), torch.tensor([1.0, 0.0]))
    from scipy.spatial.distance import jensenshannon

    p, q = torch.rand(2, 7, dtype=torch.float64)
    p, q = p / p.sum(), q / q.sum()
    assert float(jensen_shannon(p, q)) == pytest.approx(jensenshannon(p.numpy(), q.numpy(), base=2))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("matrix", [uniform_matrix, random_matrix(3)], ids=["uniform", "random"])
def test_substitutes_are_distributions_over_what_may_be_read(mask, matrix):
    step, A, _ = attention(mask)
    rows = matrix(step)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    assert ((rows > 0) == (A > 0)).all()


def test_only_the_chosen_calls_are_changed_and_all_is_restored():
    step, A, _ = attention("none")
    original = F.scaled_dot_product_attention

    def run():
        return [F.scaled_dot_product_attention(step.query, step.key, step.value) for _ in range(3)]

    with substituted_attention(uniform_matrix, layers=[1]) as seen:
        first, second, third = run()
    torch.testing.assert_close(first, A @ step.value)
    torch.testing.assert_close(third, first)
    torch.testing.assert_close(second, step.value.mean(2, keepdim=True).expand(second.shape))
    assert len(seen) == 1 and F.scaled_dot_product_attention is original
    with pytest.raises(KeyError), substituted_attention(uniform_matrix):
        raise KeyError
    assert F.scaled_dot_product_attention is original


def test_the_script_on_a_text_classifier(script, tmp_path, capsys):
    output = tmp_path / "new" / "causality.json"
    script.main(["--samples", "16", "--output", str(output), "--seed", "1"])
    results = json.loads(output.read_text())
    assert results["samples"] == 16 and results["layers"] == [0, 1, 2] and results["sublayers"] == 3
    found = results["substitutes"]
    for name in ("effective", "efficient"):
        assert found[name]["predictions_changed"]["mean"] == 0
        assert found[name]["largest_logit_change"] < 1e-3
        assert found[name]["total_variation"] > 0.01
    assert found["effective"]["jensen_shannon"] is None
    assert 0 < found["efficient"]["jensen_shannon"] < 1
    assert found["uniform"]["predictions_changed"]["mean"] > 0
    assert found["random"]["largest_logit_change"] > 1e-2
    assert str(output) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        script.main(["--samples", "16", "--layers", "7", "--output", str(output)])
    assert "layers=[7]: the model has attention sub-layers 0 to 2" in capsys.readouterr().err


def test_a_model_without_fused_attention_is_refused():
    with pytest.raises(UserError, match="no attention was seen"):
        attention_causality([lambda: torch.zeros(2, 3)], None, 0)


def test_on_clipmapper(tmp_path):
    """Every sub-layer of towers and mapper, in float64; then only those of the mapper."""
    model = tiny_models.clipmapper(tmp_path, "single_flow")
    images, text = tiny_models.images(3), tiny_models.texts((7, 4, 9))
    predict = [lambda: model(images, text, only_class_token=False)]
    whole = attention_causality(predict, None, 0)
    assert whole["sublayers"] == 2 + 2 + 2 and whole["samples"] == 3
    mapper = attention_causality(predict, [4, 5], 0)
    assert mapper["layers"] == [4, 5]
    for results in (whole, mapper):
        for name in ("effective", "efficient"):
            assert results["substitutes"][name]["largest_logit_change"] < 1e-6
        assert results["substitutes"]["uniform"]["largest_logit_change"] > 1e-2


def test_calls_are_named_by_the_module_that_makes_them(tmp_path):
    model = tiny_models.clipmapper(tmp_path, "single_flow")
    images, text = tiny_models.images(1), tiny_models.texts((7,))
    names = names_of_calls(model, lambda: model(images, text, only_class_token=False))
    assert len(names) == 6 and len(set(names)) == 6
    modules = dict(model.named_modules())
    assert all(name in modules for name in names)
    assert [name.startswith("mapper") for name in names] == [False] * 4 + [True] * 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--samples", "0"], "--samples: '0' is not a whole number of at least 1"),
        (["--checkpoint", "a", "--classifier", "b"], "give one of them"),
        (["--classifier", "{tmp}"], "--classifier and --texts"),
        (["--texts", "{tmp}/lines.txt"], "--classifier and --texts"),
        (["--classifier", "{tmp}/no", "--texts", "{tmp}/lines.txt"], "no: no such folder"),
        (["--classifier", "{tmp}", "--texts", "{tmp}/lines.txt"], "no tokenizer in it"),
        (["--classifier", "{tmp}", "--texts", "{tmp}/empty.txt"], "holds no text"),
        (["--classifier", "{tmp}", "--texts", "{tmp}"], "a folder, not a file"),
        (["--checkpoint", "{tmp}/no.ckpt"], "no such file"),
        (["--output", "{tmp}"], "can't be written"),
        (["--output", "{tmp}/lines.txt/out.json"], "can't be written"),
    ],
)
def test_what_can_t_be_is_refused_in_one_line(script, tmp_path, capsys, arguments, line):
    (tmp_path / "lines.txt").write_text("a red disc\n")
    (tmp_path / "empty.txt").write_text("\n")
    output = ["--output", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit, match="2"):
        script.main(output + [a.format(tmp=tmp_path) for a in arguments])
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_classifier_in_a_folder(script, tmp_path, capsys):
    """Texts of different lengths: padding is never read, whatever takes attention's place."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "disc", "left", "of"]
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16,
        max_position_embeddings=16, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "classifier"
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "lines.txt").write_text("a red disc\n\na disc left of a red disc\nred\n")
    given = ["--classifier", str(folder), "--texts", str(tmp_path / "lines.txt")]
    capsys.readouterr()
    script.main([*given, "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["0", "1"]
    assert all(".attention" in line for line in listed)
    output = tmp_path / "out.json"
    script.main([*given, "--layers", "1", "--output", str(output)])
    results = json.loads(output.read_text())
    assert results["samples"] == 3 and results["layers"] == [1] and len(results["names"]) == 2
    assert results["substitutes"]["efficient"]["largest_logit_change"] < 1e-4
    assert results["substitutes"]["uniform"]["largest_logit_change"] > 1e-3


def test_a_model_that_writes_captions_is_refused(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "clipmapper.commands.attention_causality.load", lambda path, **_: tiny_models.captioner(tmp_path)
    )
    with pytest.raises(SystemExit, match="2"):
        script.main(["--checkpoint", "captions.ckpt", "--output", str(tmp_path / "out.json")])
    assert "writes captions" in capsys.readouterr().err


def test_no_layers_and_no_samples_are_refused():
    with pytest.raises(UserError, match="no layers"):
        attention_causality([lambda: torch.zeros(2, 3)], [], 0)
    with pytest.raises(UserError, match="no samples"):
        attention_causality([], None, 0)
