"""The benchmark that runs other libraries' programs beside the methods here."""

import json

import pytest
import torch
import transformers
from torch import nn

from clipmapper.benchmarks import command, compared, other_libraries
from clipmapper.benchmarks.compared import Compared
from clipmapper.benchmarks.other_libraries import Program


def small_bert(batch, device):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    model = transformers.BertForSequenceClassification(config).double().eval().requires_grad_(False)
    ids = torch.randint(1, 40, (batch, 6))

    def end(tokens):
        return model.classifier(model.bert.pooler(model.bert.encoder(tokens).last_hidden_state))[:, 0]

    return Compared("small_bert", model, ids, model.bert.embeddings, end)


@pytest.fixture
def compare(monkeypatch, tmp_path):
    monkeypatch.setattr(compared, "SUBJECTS", {"small_bert": small_bert})

    def run(*libraries):
        arguments = ["relevance", "--compare", *libraries, "--repeats", "1", "--device", "cpu"]
        command.main([*arguments, "--output", str(tmp_path)])
        rows = json.loads((tmp_path / "relevance.json").read_text())["rows"]
        return {row["way"]: row for row in rows}

    return run


@pytest.mark.slow
def test_captum_gives_what_the_methods_here_give(compare, capsys):
    pytest.importorskip("captum")
    rows = compare("captum")
    assert rows.keys() == {
        "floor", "input_x_gradient", "captum InputXGradient", "integrated_gradients",
        "captum IntegratedGradients",
    }  # fmt: skip
    for way in ("captum InputXGradient", "captum IntegratedGradients"):
        assert rows[way]["deviation"] < 1e-9 and rows[way]["times_slower_than_ours"] > 0
    assert "captum InputXGradient: the method here is off by" in capsys.readouterr().out


def test_a_library_that_is_not_there_is_one_line(compare, monkeypatch, capsys):
    monkeypatch.setattr(other_libraries.importlib.util, "find_spec", lambda name: None)
    rows = compare("lxt")
    assert rows["lxt AttnLRP"]["left_out"] == "lxt is not installed: pip install 'clipmapper[compare]'"
    assert "time_ratio" in rows["attn_lrp"]
    assert "small_bert, batch 1, lxt AttnLRP: lxt is not installed" in capsys.readouterr().out


def test_a_deviation_is_seen(compare, monkeypatch):
    def wrong(subject):
        return lambda: 2 * subject.explained("input_x_gradient")

    program = Program("twice", lambda subject: "input_x_gradient", wrong)
    monkeypatch.setitem(other_libraries.LIBRARIES, "lxt", (program,))
    assert compare("lxt")["lxt twice"]["deviation"] == pytest.approx(0.5)


def test_patched_classes_are_put_back():
    forward, kept = nn.GELU.forward, dict(vars(nn.GELU))

    def patch(target):
        target.original_forward, target.forward = target.forward, lambda self, x: x
        return True

    with pytest.raises(ZeroDivisionError), other_libraries._patched({nn.GELU: patch}):
        assert nn.GELU.forward is not forward
        raise ZeroDivisionError
    assert dict(vars(nn.GELU)) == kept


def test_what_is_left_out_is_refused_with_what_it_does_not_do(compare, capsys):
    for option in (["--precision", "bfloat16"], ["--resume"]):
        with pytest.raises(SystemExit):
            compare("lxt", *option)
        assert "--compare is made in float32" in capsys.readouterr().err
