"""Beginning with the weights of a trained model: what is taken, what is new, and what is said of it."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import caption_models, training_models
from support.photographs import photographs_in, run
from support.training_models import same_bits

import clipmapper
from clipmapper import cli
from clipmapper.commands import train as command
from clipmapper.commands.compose import train_settings
from clipmapper.data.readers.manifest import manifest_data
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.models.exported import (
    CARD,
    CONFIG,
    WEIGHTS,
    model_path,
    read_model,
    shipped_models,
    write_model,
)
from clipmapper.models.tokens import tokenize
from clipmapper.models.weight_files import Unreadable
from clipmapper.shipped import shipped_root
from clipmapper.tasks.captioning.head import take_words
from clipmapper.tasks.vqa.model import build_clipmapper, take_answers
from clipmapper.tasks.vqa.training import answer_loss
from clipmapper.training.initial import Taken, take_encoder, take_mapper
from clipmapper.training.run_folder import BEST, CHECKPOINT, RESULTS

COLOURS = ("red", "green", "blue", "a ring", "yellow")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


def answering(architecture, answers, seed, **mapper):
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True}
    torch.manual_seed(seed)
    model = build_clipmapper(encoder, training_models.TINY_MAPPER | mapper, answers)
    training_models.spread_out(model, seed)
    return model.eval()


def logits(model):
    images = torch.stack([torch.from_numpy(training_models.picture(n)) for n in range(3)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model(images, model.tokenize(["what colour is the ring?", "is there one?", "how many?"]))


def taken_over(model, other) -> Taken:
    taken = Taken("other")
    take_encoder(model, other, taken)
    take_mapper(model, other, taken)
    take_answers(model, other, taken)
    return taken


@pytest.mark.parametrize(
    ("answers", "known"),
    [
        (COLOURS, 5),
        (COLOURS[::-1], 5),
        (("purple", "Blue.", "teal", "ring", "red"), 3),  # as the official scorer compares them
        (("blue",), 1),
        (("teal", "mauve"), 0),
        ((*COLOURS, "teal", "mauve", "ochre"), 5),
    ],
    ids=["same", "permuted", "overlapping", "smaller", "disjoint", "larger"],
)
def test_answers_keep_their_rows_by_name(architecture, answers, known):
    other, model = answering(architecture, COLOURS, 1), answering(architecture, answers, 2)
    before = model.head.layers[-1].weight.detach().clone()
    taken = taken_over(model, other)
    assert taken.facts["answers"] == {"known": known, "new": len(answers) - known}
    names = {"Blue.": "blue", "ring": "a ring"}
    found, expected = logits(model), logits(other)
    for column, answer in enumerate(answers):
        name = names.get(answer, answer)
        if name in COLOURS:
            row = COLOURS.index(name)
            assert torch.equal(model.head.layers[-1].weight[column], other.head.layers[-1].weight[row])
            # (A matrix product's last bits may depend on how many columns it has.)
            torch.testing.assert_close(found[:, column], expected[:, row], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(model.head.layers[-1].weight[column], before[column])


def test_more_and_fewer_blocks(architecture):
    other = answering(architecture, COLOURS, 1, depth=2)
    for depth in (1, 3):
        model = answering(architecture, COLOURS, 2, depth=depth)
        old = model.mapper.blocks[-1].image_self.query.weight.detach().clone()
        taken = taken_over(model, other)
        first = [one.mapper.blocks[0].image_self.query.weight for one in (model, other)]
        assert torch.equal(*first)
        if depth == 3:
            assert torch.equal(model.mapper.blocks[-1].image_self.query.weight, old)
        assert taken.notes["mapper"] == [f"{min(depth, 2)} of its 2 blocks are the first of these {depth}"]


def test_another_encoder_leaves_blocks_alone(architecture, tmp_path):
    config = json.loads((tmp_path / "..").joinpath(architecture).read_text())
    config["vision_cfg"]["layers"] = 2
    other_file = tmp_path / "another-clip-for-tests.json"
    other_file.write_text(json.dumps(config))
    other, model = answering(architecture, COLOURS, 1), answering(str(other_file), COLOURS, 2)
    projection = model.mapper.project_image.weight.detach().clone()
    taken = taken_over(model, other)
    assert taken.weights["encoder"][0] == 0 and taken.notes["encoder"] == ["another architecture"]
    assert torch.equal(model.mapper.project_image.weight, projection)
    assert torch.equal(
        model.mapper.blocks[0].image_cross.output.weight, other.mapper.blocks[0].image_cross.output.weight
    )
    assert "new, for another encoder" in taken.notes["mapper"][0]


def test_places_of_another_grid_are_interpolated(architecture):
    encoder = {"architecture": architecture, "pretrained": None, "frozen": True, "image_size": 96}
    torch.manual_seed(2)
    model = build_clipmapper(encoder, training_models.TINY_MAPPER, COLOURS)
    other = answering(architecture, COLOURS, 1)
    with torch.no_grad():  # a slope over the rows
        other.mapper.positions[1:] = torch.arange(3.0).repeat_interleave(3)[:, None]
    taken = taken_over(model, other)
    assert taken.weights["mapper"][0] == taken.weights["mapper"][1]
    assert torch.equal(model.mapper.positions[0], other.mapper.positions[0])
    rows = model.mapper.positions[1:].detach().view(4, 4, -1).mean(dim=(1, 2))
    assert (rows.diff() > 0).all() and rows.mean() == pytest.approx(1, abs=1e-5)


def test_words_that_both_can_say_keep_their_rows(architecture):
    one = caption_models.captioner(architecture, vocabulary="data", said=["a red ring above a blue cross"])
    two = caption_models.captioner(architecture, vocabulary="data", said=["a green ring above a red one"])
    mine, its = (model.head.tokens.tolist() for model in (two, one))
    before = two.head.layer.weight.detach().clone()
    taken = Taken("one")
    take_words(two.head, one.head, taken)
    for row, token in enumerate(mine):
        expected = one.head.layer.weight[its.index(token)] if token in its else before[row]
        assert torch.equal(two.head.layer.weight[row], expected)
    assert taken.notes["head"] == [f"{len({*mine} & {*its})} of {len(mine)} tokens known"]


# Runs


QUICK = ("callbacks=none", "training.blind_steps=0", "trainer.val_check_interval=1", "data.workers=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def first(place):
    return run(place, "data=manifest", f"data.path={place / 'questions.jsonl'}", *QUICK, "name=first")


@pytest.fixture(scope="module")
def other_encoder(place):
    given = ("data=manifest", f"data.path={place / 'questions.jsonl'}", "name=other", "seed=7")
    return run(place, *given, *QUICK)


@pytest.mark.parametrize("exported", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_on_its_own_data_begins_where_it_ended(place, first, exported):
    """To the digit, as a checkpoint and as a folder; what was taken is in the results."""
    source = first / BEST
    if exported:
        source = place / "exported"
        write_model(clipmapper.load(first / BEST), source, "card")
    before = json.loads((first / RESULTS).read_text())
    done = run(place, "data=manifest", f"data.path={place / 'questions.jsonl'}", f"init={source}", *QUICK)
    results = json.loads((done / RESULTS).read_text())
    step, score = results["best"]["validations"][0]
    assert (step, score) == (0, before["objective"]["value"])
    assert results["init"]["answers"] == {"known": 2, "new": 0}
    assert results["init"]["questions_known"] == 1 and results["init"]["from"] == str(source)
    for part in ("encoder", "mapper", "head"):
        assert results["init"][part]["taken"] == results["init"][part]["of"] > 0


@pytest.mark.slow
def test_from_answers_to_captions_and_back(place, first, capsys):
    captions = ("experiment=caption_manifest", f"data.path={place / 'captions.jsonl'}")
    writer = run(place, *captions, f"init={first / CHECKPOINT}", "callbacks=none")
    assert "head new; that model is for vqa" in capsys.readouterr().out
    results = json.loads((writer / RESULTS).read_text())
    assert results["init"]["mapper"]["taken"] == results["init"]["mapper"]["of"]
    again = ("data=manifest", f"data.path={place / 'questions.jsonl'}", f"init={writer / CHECKPOINT}")
    answers = json.loads((run(place, *again, *QUICK) / RESULTS).read_text())
    assert 0 < answers["init"]["mapper"]["taken"] < answers["init"]["mapper"]["of"]
    assert answers["init"]["mapper"]["notes"] == ["new in its blocks: image_cross"]
    assert answers["init"]["head"]["taken"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_that_is_resumed_has_the_encoder_that_it_began_with(place, other_encoder, monkeypatch, steps):
    """Whose tokens are kept before the first step; no other file has its weights."""
    given = (
        "data=manifest", f"data.path={place / 'questions.jsonl'}", *QUICK, f"init={other_encoder / BEST}",
        f"training.max_steps={steps}", "trainer.val_check_interval=2", "trainer.monitor=validation/loss",
    )  # fmt: skip
    whole = run(place, *given, "name=whole")
    with monkeypatch.context() as patched:
        patched.setattr(command, "results_of", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(RunInterrupted):
            run(place, *given, "name=stopped")
    again = run(place, *given, "name=stopped", "resume=true")
    one, other = (json.loads((folder / RESULTS).read_text()) for folder in (whole, again))
    assert one["best"] == other["best"] and len(one["best"]["validations"]) == 1 + steps // 2
    assert one["objective"] == other["objective"] and one["accuracy"] == other["accuracy"]
    files = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (whole, again)]
    assert same_bits(files[0]["state_dict"], files[1]["state_dict"])
    assert other["best"]["value"] == loss_again(again)


def loss_again(folder) -> float:
    """The loss of validation of the kept weights, by hand."""
    model = clipmapper.load(folder / BEST)
    data = manifest_data(str(folder.parents[2] / "questions.jsonl"))
    losses = []
    for record in data.validation:
        text = tokenize(model.encoder.tokenizer, [record.question])
        with torch.no_grad():
            image = model.encoder.image_tokens(data.reader(model.encoder)(record)[None]).half().float()
            words = model.encoder.text_tokens(text.ids, text.valid).half().float()
            found = model.answer_logits(image, words, text.valid)
        losses.append(float(answer_loss(found, data.vocabulary.targets(record.answers)[None])))
    return pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.slow
def test_resuming_wins(place, first, capsys):
    given = ("data=manifest", f"data.path={place / 'questions.jsonl'}", "name=resumed", *QUICK)
    done = run(place, *given, f"init={first / CHECKPOINT}")
    (done / RESULTS).unlink()
    capsys.readouterr()
    assert run(place, *given, f"init={first / CHECKPOINT}", "resume=true") == done
    assert "is not read again: the run goes on with its own weights" in capsys.readouterr().out
    cli.export([f"checkpoint={done / BEST}", f"folder={place / 'given'}"])
    assert f"| began with | {CHECKPOINT.name} |" in (place / "given" / CARD).read_text()
    assert json.loads((done / RESULTS).read_text())["init"]["answers"] == {"known": 2, "new": 0}


# Settings


def sizes(first, *more):
    return train_settings("data=manifest", "data.path=x.jsonl", f"init={first / CHECKPOINT}", *more)


def test_sizes_come_from_the_model_unless_given(first, architecture):
    config = sizes(first, f"encoder.architecture={first.parents[2] / 'tiny-scenes-clip-for-tests.json'}")
    assert (config.model.width, config.model.depth, config.encoder.pretrained) == (128, 2, None)
    assert sizes(first, "encoder=vit_b_32", "model.depth=5").model.depth == 5
    assert sizes(first, "encoder=vit_b_32").encoder.pretrained == "openai"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["model.width=64", "encoder=vit_b_32"], "model.width=64: the mapper of init="),
        (["model.mapper=single_flow", "encoder=vit_b_32"], "model.mapper=single_flow: the mapper of init="),
        (["model.heads=4", "encoder=vit_b_32"], "model.heads=4: the mapper of init="),
        (["model=paper_dual_flow", "encoder=vit_b_32"], "model.width=512: the mapper of init="),
        ([], "give the file as encoder.architecture=FILE.json"),
        (["init=nowhere.ckpt"], "init=nowhere.ckpt: no such file, and not a model that is shipped"),
    ],
)
def test_what_contradicts_is_one_line(first, given, says):
    with pytest.raises(UserError, match=r"\A.*\Z") as stopped:
        sizes(first, *given)
    assert says in str(stopped.value)


# Folders


@pytest.fixture
def exported(architecture, tmp_path):
    model = answering(architecture, COLOURS, 3)
    with torch.no_grad():  # as the shipped encoder: tokens that training never saw embed as zero
        model.encoder.clip.token_embedding.weight[300:49400] = 0
    write_model(model, tmp_path / "model", "a card", precision=torch.float16)
    return model, tmp_path / "model"


def test_a_folder_holds_the_model_in_half_precision(exported):
    model, folder = exported
    found = clipmapper.load(folder)
    assert found.answers == COLOURS and found.description == model.description
    for name, weight in model.state_dict().items():
        assert torch.equal(
            found.state_dict()[name], weight.half().float() if weight.is_floating_point() else weight
        )
    assert (folder / WEIGHTS).stat().st_size < 110_000  # of 600,000 numbers of the embedding few are there
    assert (folder / CARD).read_text() == "a card"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "a folder without config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json is no JSON"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "config.json is no JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10]), "cut short"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x80\x02}q\x00."), "of another program"),
        (lambda folder: changed(folder, lambda c: c["model"].update(width=10**9)), "is not"),
        (
            lambda folder: changed(
                folder, lambda c: c["encoder"]["config"]["text_cfg"].update(vocab_size=9_999_999)
            ),
            "do not fit",
        ),
        (lambda folder: changed(folder, lambda c: c.update(_target_="os.system")), "is not one of the keys"),
    ],
)
def test_a_folder_that_is_none(exported, spoil, says):
    _, folder = exported
    spoil(folder)
    with pytest.raises(UserError, match=r"\A.*\Z") as stopped:
        clipmapper.load(folder)
    assert says in str(stopped.value) and str(stopped.value).startswith(f"checkpoint={folder}: ")


def vocabulary(config, count: int) -> None:
    config["encoder"]["config"]["text_cfg"]["vocab_size"] = count


def changed(folder, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_whole_numbers_are_no_weights(exported):
    _, folder = exported
    state = load_file(folder / WEIGHTS)
    name = "mapper.positions"
    save_file(state | {name: state[name].int()}, folder / WEIGHTS)
    with pytest.raises(UserError, match=rf"the weights {name} are of torch.int32, .* asks for torch.float32"):
        clipmapper.load(folder)


def test_numbers_of_a_folder_are_finite(exported, tmp_path):
    model, folder = exported
    with torch.no_grad():
        model.mapper.positions[0, 0] = float("nan")
    shutil.rmtree(folder)
    write_model(model, folder, "")
    with pytest.raises(Unreadable, match=r"mapper\.positions hold numbers that are not finite"):
        read_model(folder)


def test_the_command_writes_a_folder_with_its_card(first, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.export([f"checkpoint={first / BEST}", "folder=my|model", "precision=float16"])
    card = (tmp_path / "my|model" / CARD).read_text()
    results = json.loads((first / RESULTS).read_text())
    assert "| seed | 0 |" in card and "| trained on | data=manifest |" in card
    assert f"| objective value | {round(results['objective']['value'], 4)} |" in card
    assert "| accuracy overall validation |" in card and 'clipmapper.load("my|model")' in card
    answered = [clipmapper.load(path).answers for path in (first / BEST, "my|model")]
    assert answered[0] == answered[1]
    assert f"| step | {results['best']['step']}, the best validation by validation/accuracy/overall |" in card
    assert "| interval validation overall accuracy low |" in card
    given_away = (tmp_path / "my|model" / CONFIG).read_text()
    assert str(first.parents[2]) not in given_away + card and "tiny-scenes-clip-for-tests.json" in given_away
    (tmp_path / "my|model" / "notes.txt").touch()
    with pytest.raises(SystemExit):
        cli.export([f"checkpoint={first / BEST}", "folder=my|model"])
    assert "notes.txt in it already; give a folder of its own" in capsys.readouterr().err
    shutil.copy(first / BEST, tmp_path / "alone.ckpt")
    cli.export(["checkpoint=alone.ckpt", "folder=alone"])
    assert "No scores are known" in (tmp_path / "alone" / CARD).read_text()


@pytest.mark.parametrize("name", ["scenes-vqa", "scenes-captioner"])
def test_shipped_models(name):
    """Loaded by name; of at most 4 MB, with a card that says how they were made."""
    folder = shipped_root() / "checkpoints" / name
    assert name in shipped_models() and model_path(name) == folder
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    card = (folder / CARD).read_text()
    assert "| seed | 0 |" in card and "| exported | 20" in card and "| objective value | " in card
    model = clipmapper.load(name)
    image = training_models.picture(0)
    if name == "scenes-vqa":
        assert model.answer(image, "is there a red ring?") in ("yes", "no")
    else:
        assert len(model.caption(image).split()) > 3


def test_a_path_of_the_same_name_goes_before_a_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes-vqa").mkdir()
    with pytest.raises(UserError, match=r"a folder without config\.json"):
        clipmapper.load("scenes-vqa")
