"""Reports with several scores of explanations on tiny models: resumed, put together, printed, refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import caption_models, tiny_models, training_models

from clipmapper.errors import UserError
from clipmapper.evaluation.explanation_scores import chosen
from clipmapper.evaluation.explanation_scores.chosen import check_scores, points
from clipmapper.evaluation.explanation_scores.subject import Subject
from clipmapper.evaluation.perturbation_scores import MODALITIES
from clipmapper.settings.keys import EXPLANATION_SCORES
from clipmapper.tasks.captioning import report as of_captions
from clipmapper.tasks.captioning.decoding import Decoding
from clipmapper.tasks.captioning.report import caption_report
from clipmapper.tasks.captioning.samples import caption_samples
from clipmapper.tasks.captioning.subject import CaptionSubject, Said
from clipmapper.tasks.captioning.trace import trace_caption
from clipmapper.tasks.layers import parameter_groups
from clipmapper.tasks.registry import task_named
from clipmapper.tasks.vqa import report as of_answers
from clipmapper.tasks.vqa.report import AnswerReport, answer_report
from clipmapper.tasks.vqa.samples import question_samples
from clipmapper.tasks.vqa.subject import AnswerSubject
from clipmapper.training.callback import RelevanceCallback
from clipmapper.training.processes import Share
from clipmapper.training.shown import console, score_tables

METHODS = ("weighted", "random")
OF_IMAGES = tuple(score for score in EXPLANATION_SCORES if score != "f_syn")
OF_CAPTIONS = ("removal", "replace_mean", "replace_blur", "oracle", "adcc", "infidelity", "sanity")  # fast
GREEDY = Decoding("greedy", max_length=6)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def answering(architecture):
    model = training_models.tiny_model(architecture).eval()
    return model, question_samples(model, training_models.small_scenes(), "validation", 4, seed=0)


@pytest.fixture(scope="module")
def captioning(architecture):
    data = caption_models.scenes(3)
    said = [caption for captions in data.validation.captions() for caption in captions]
    model = caption_models.captioner(architecture, said=said, vocabulary="data").float()
    return model, caption_samples(model, data, "validation", 2, seed=1)


def of_questions(asked, scores, samples=None, **options):
    model, every = asked
    return answer_report(
        model, samples or every, METHODS, chunk=2, batch_size=64, seed=2, scores=scores, **options
    )


def of_images(told, scores, samples=None, **options):
    model, every = told
    return caption_report(
        model, samples or every, METHODS, chunk=1, batch_size=64, seed=2, scores=scores,
        caption_scores=["log_probability"], decoding=GREEDY, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in ("answers", "captions")}


@pytest.fixture(scope="module")
def answers(answering, folders):
    """All scores; and how far its progress came."""
    told = []
    report = of_questions(
        answering, EXPLANATION_SCORES, folder=folders["answers"], key="a", progress=told.append
    )
    assert sum(told) == answering[1].points(len(METHODS), EXPLANATION_SCORES)
    return report


@pytest.fixture(scope="module")
def captions(captioning, folders):
    told = []
    report = of_images(captioning, OF_CAPTIONS, folder=folders["captions"], key="a", progress=told.append)
    assert sum(told) == captioning[1].points(len(METHODS), OF_CAPTIONS)
    return report


# Which there are


def test_the_settings_name_what_can_be_computed():
    assert (chosen.REMOVAL, *chosen._REPLACING, *chosen._OTHERS) == EXPLANATION_SCORES
    assert set(chosen._OF_CAPTUM) < set(EXPLANATION_SCORES)


@pytest.mark.parametrize(
    ("scores", "modalities", "said"),
    [
        (["removal", "beauty"], MODALITIES, r"^scores: there is no 'beauty'; one of removal, .*, sanity$"),
        (
            ["f_syn"],
            ("image",),
            r"^scores: f_syn removes patches and words together, .* others are removal, ",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line(scores, modalities, said):
    with pytest.raises(UserError, match=said) as error:
        check_scores(scores, modalities)
    assert "\n" not in str(error.value)
    check_scores(EXPLANATION_SCORES, MODALITIES)


def test_tasks_and_the_callback_refuse_what_they_have_not(captioning, tmp_path):
    task_named("vqa").check_explanation_scores(EXPLANATION_SCORES)
    task_named("captioning").check_explanation_scores(OF_IMAGES)
    numbers = {"every_n_validations": 1, "samples": 1, "pictures": 0, "batch_size": 1, "seed": 0}
    callback = RelevanceCallback(["gae"], **numbers, confidence=0.9, scores=["removal", "f_syn"])
    with pytest.raises(UserError, match="scores: f_syn"):
        callback.prepare(task_named("captioning"), captioning[1], tmp_path)


def test_what_the_data_do_not_have_is_one_line(answering, captioning):
    for run, asked in ((of_questions, answering), (of_images, captioning)):
        samples = asked[1]
        elsewhere = replace(samples, known=[None] * len(samples))
        with pytest.raises(UserError, match=r"^scores: replace_background needs"):
            run(asked, ["replace_background"], elsewhere)
        if run is of_images:  # the same code, and slow
            continue
        alone = replace(samples, others=[-1] * len(samples))
        with pytest.raises(UserError, match=r"^scores: replace_other takes"):
            run(asked, ["replace_other"], alone)


# Progress, and what is taken up again


def test_points_of_scores():
    """3 samples, 2 methods, 2 directions, 9 fractions; words are removed and replaced by some alone."""
    assert points("removal", 3, 2, MODALITIES) == points("replace_mean", 3, 2, MODALITIES) == 216
    assert points("replace_blur", 3, 2, MODALITIES) == points("sanity", 3, 2, MODALITIES) == 108
    assert points("removal", 3, 2, ("image",)) == 108


@pytest.mark.parametrize("task", ["answers", "captions"])
def test_no_score_is_computed_again(task, request, folders, monkeypatch):
    first = request.getfixturevalue(task)
    run, asked, module = {
        "answers": (of_questions, "answering", of_answers),
        "captions": (of_images, "captioning", of_captions),
    }[task]
    asked, scores = request.getfixturevalue(asked), tuple(first.scored)
    tests = ("",) if task == "answers" else ("caption", "word")
    stored = {path.relative_to(folders[task]) for path in folders[task].rglob("*.npz")}
    assert {str(path.parent) for path in stored} == {
        "/".join(filter(None, (score, test))) for score in scores for test in tests
    }
    assert len(stored) == 2 * len(scores) * len(tests)

    def never(*args, **options):
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr(module, "score_samples", never)
        again = run(asked, scores, folder=folders[task], key="a")
        if task == "answers":
            with pytest.raises(AssertionError):
                run(asked, scores, folder=folders[task], key="b")
    assert again.numbers(0.9, 0) == first.numbers(0.9, 0)


def test_a_score_asked_for_later_finds_the_chunks_of_others(answering, answers, tmp_path):
    told = []
    options = {"folder": tmp_path, "key": "a", "progress": told.append}
    of_questions(answering, ["removal"], **options)
    told.clear()
    both = of_questions(answering, ["f_syn", "removal"], **options)
    assert sum(told) == points("f_syn", 4, len(METHODS), MODALITIES)
    assert np.array_equal(both.perturbation.values, answers.perturbation.values)
    told.clear()
    of_questions(answering, ["f_syn"], **(options | {"key": "b"}))
    assert sum(told) == points("f_syn", 4, len(METHODS), MODALITIES)


def test_whoever_wants_to_stop_can(answering):
    """Every score tells its progress before the end."""
    for score in ("removal", "replace_grey", *chosen._OTHERS):
        told = []

        def stop(number, told=told):
            told.append(number)
            if len(told) == 4:  # two are of the maps
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            of_questions(answering, [score], progress=stop)


def test_parts_of_two_processes_are_the_whole(answering, answers):
    samples, scores = answering[1], ("removal", "replace_other", "oracle", "adcc", "sensitivity", "sanity")
    parts = [of_questions(answering, scores, samples.part(Share(k, 2))) for k in range(2)]
    joined = AnswerReport.together(samples, parts)
    assert tuple(joined.scored) == scores
    for score, its in joined.scored.items():
        found = answers.scored[score]
        assert its.values.quantities == found.values.quantities
        np.testing.assert_allclose(its.values.values, found.values.values, rtol=1e-4, atol=1e-5)
        assert (its.values.sample_ids == samples.ids).all()
        assert (its.curves is None) == (found.curves is None)
        if found.curves is not None:
            assert its.curves.values.shape == found.curves.values.shape
    assert joined.numbers(0.9, 0)["unchanged"] == answers.numbers(0.9, 0)["unchanged"]


@pytest.mark.slow
def test_every_score_of_captions_in_two_parts(captioning, captions):
    samples = captioning[1]
    parts = [of_images(captioning, OF_IMAGES, samples.part(Share(k, 2))) for k in range(2)]
    joined = type(captions).together(samples, parts)
    assert tuple(joined.scored) == OF_IMAGES
    json.dumps(joined.numbers(0.9, 0), allow_nan=False)
    for score, by_test in captions.tested.items():
        for test, found in by_test.items():
            its = joined.tested[score][test]
            np.testing.assert_allclose(its.values.values, found.values.values, rtol=1e-4, atol=1e-5)
            assert (its.curves is None) == (found.curves is None)


# Numbers, tables, loggers, pictures


@pytest.mark.parametrize("task", ["answers", "captions"])
def test_where_the_numbers_land(task, request):
    report = request.getfixturevalue(task)
    numbers = report.numbers(0.9, seed=0)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert list(numbers["scores"]) == [score for score in report.scored if score != "removal"]
    first = {"answers": "f_syn", "captions": "caption/adcc"}[task]
    of_score = {"answers": "f_syn", "captions": "adcc"}[task]
    its = numbers["scores"][of_score][first]
    assert (its["better"], set(its["methods"])) == ("high", set(METHODS))
    assert set(its["methods"]["random"]) == {"value", "difference_to_weighted"}
    assert set(its["methods"]["random"]["value"]) == {"mean", "low", "high"}
    quantity = next(q for q in report.scored[of_score].values.quantities if q.name == first)
    mean = report.scored[of_score].values.mean(quantity)[1]
    assert its["methods"]["random"]["value"]["mean"] == pytest.approx(mean)
    assert report.scalars()[f"scores/{of_score}/{first}/random"] == pytest.approx(mean)
    assert not any(name.startswith("scores/removal") for name in report.scalars())
    assert numbers["unchanged"] == ["random"]  # which reads no weight
    ends = [name for name in numbers["scores"]["sanity"] if name.endswith("/all")]
    assert len(ends) == 2
    for name in ends:
        assert numbers["scores"]["sanity"][name]["methods"]["random"]["value"]["mean"] == pytest.approx(1)
    # What replaces is named as the areas of removal are; words are in their place in what has them.
    blur, mean = (set(numbers["scores"][f"replace_{kind}"]) for kind in ("blur", "mean"))
    if task == "answers":
        assert "image/gap/accuracy" in blur and not any(name.startswith("text") for name in blur)
        assert {"text/gap/probability", "gap/probability"} <= mean - blur
    else:
        assert "caption/image/gap/log_probability" in blur == mean
        assert "word/image/positive/word_probability" in mean


@pytest.mark.parametrize("task", ["answers", "captions"])
def test_tables_are_printed(task, request):
    numbers = request.getfixturevalue(task).numbers(0.9, seed=0)
    out = console()
    with out.capture() as printed:
        for table in score_tables(numbers):
            out.print(table)
    told = printed.get()
    for expected in ("random †", "† : hardly changes", "90 % interval", "↑", "↓", "oracle", "share (%) ↑"):
        assert expected in told
    assert "possible" not in told and "1 head" not in told and "…" not in told
    assert all(len(table.columns) <= 5 for table in score_tables(numbers))
    lines = told.splitlines()
    titles = ("replace_mean, area under", "adcc, 90", "infidelity, 90", "sanity, 90")
    for title in titles:
        assert any(line.startswith(title) for line in lines), title


def test_the_best_is_bold_and_what_is_level_is_marked():
    """Low is better of the error and high of the gain; the interval of b's difference holds 0, that of c's
    does not."""

    def one(better, means, differences, factor=1):
        methods = {
            name: {"value": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
            for name, mean in zip(("weighted", "b", "c"), means, strict=True)
        }
        for name, (low, high) in zip(("b", "c"), differences, strict=True):
            methods[name]["difference_to_weighted"] = {"mean": 0.0, "low": low, "high": high}
        return {"better": better, "factor": factor, "methods": methods}

    numbers = {
        "confidence": 0.95,
        "scores": {
            "made": {
                "error": one("low", (0.5, 0.4, 0.9), ((-0.2, 0.0), (0.1, 0.6))),
                "gain": one("high", (0.5, 0.4, 0.9), ((-0.2, 0.0), (0.1, 0.6)), 100),
                "hidden": one("neither", (1, 1, 1), ((0, 0), (0, 0))),
            }
        },
    }
    (table,) = score_tables(numbers)
    assert [column.header for column in table.columns] == ["method", "error ↓", "gain (%) ↑"]
    (names, error, gain) = (list(column.cells) for column in table.columns)
    assert names == ["weighted", "b", "c"]
    assert [str(cell) for cell in error] == [
        "0.500 [0.400, 0.600]", "0.400 [0.300, 0.500] =", "0.900 [0.800, 1.000]",
    ]  # fmt: skip
    assert [str(cell) for cell in gain][2] == "90.0 [80.0, 100.0]"
    assert [cell.style for cell in error] == ["", "bold", ""]
    assert [cell.style for cell in gain] == ["", "", "bold"]


def test_a_report_without_removal(answering, answers, tmp_path):
    report = of_questions(answering, ["replace_grey"])
    numbers = report.numbers(0.9, seed=0)
    assert numbers["perturbation"] == {} and "unchanged" not in numbers
    expected = answers.scored["replace_grey"].values.values
    np.testing.assert_allclose(report.scored["replace_grey"].values.values, expected, rtol=1e-4, atol=1e-6)
    assert len(AnswerReport.tables(numbers)) == 3 and report.scalars()  # two of areas, one of localisation
    written = {path.name for path in report.write(tmp_path, count=1, confidence=0.9)}
    assert {f"perturbation_replace_grey_{one}.png" for one in ("accuracy", "probability")} <= written
    assert "curves" in report.media(tmp_path)["explanations"].columns
    without = of_questions(answering, ["f_syn"])
    assert without.tests == {} and without.write(tmp_path / "other", count=1, confidence=0.9)
    assert "curves" not in without.media(tmp_path / "other")["explanations"].columns


# What scores see of the models


def test_answers_as_scores_see_them(answering, answers):
    model, samples = answering
    with torch.no_grad():
        given = model(samples.images, samples.text).argmax(dim=1)
    subject = AnswerSubject(model, samples, range(1, 4), METHODS, answers=given[1:], seed=2)
    assert isinstance(subject, Subject)
    whole = subject.certain().unperturbed(2)[:, 0]
    np.testing.assert_allclose(whole, answers.probabilities[1:], rtol=1e-5)
    rows = np.array([2, 0])
    np.testing.assert_allclose(subject.certainty_of(rows, subject.images[[2, 0]]), whole[rows], rtol=1e-5)
    for method, its in subject.maps().items():
        expected = answers.relevance[method].patches[1:].reshape(3, 9)
        np.testing.assert_allclose(its.image, expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(its.text, answers.relevance[method].tokens[1:], rtol=1e-4, atol=1e-7)
    # At other images it is still these answers that are explained, and their certainty.
    others = samples.images[[0, 1, 2]] * -1.5
    with torch.no_grad():
        logits = model(others, samples.text[1:4])
    expected = logits.softmax(1).gather(1, given[1:, None])[:, 0]
    np.testing.assert_allclose(subject.certainty_of(np.arange(3), others), expected, rtol=1e-5)
    found, own = subject.maps(others), subject.maps()
    assert not torch.allclose(found["weighted"].image, own["weighted"].image, rtol=0.01)
    assert torch.equal(found["random"].image, own["random"].image)
    explained_alone(subject, others)


def explained_alone(subject, images):
    """A score that needs one method's maps gets those that it has among all."""
    every = subject.maps(images)
    for method in every:
        ((name, alone),) = subject.maps(images, [method]).items()
        assert name == method
        assert torch.equal(alone.image, every[method].image) and torch.equal(alone.text, every[method].text)


def test_captions_as_scores_see_them(captioning, captions):
    model, samples = captioning
    said = []
    for row, (chosen_word, its) in enumerate(
        zip(captions.chosen, captions.explanations["weighted"], strict=True)
    ):
        traced = trace_caption(model, samples.images[row : row + 1], decoding=GREEDY)
        tokens = [place - 1 for place in traced.words[chosen_word][1]]
        said.append(Said(traced.text.to("cpu"), its.weights, chosen_word, tokens))
    relevance = of_captions.partial(of_captions.word_relevance, methods=METHODS, explained="logit", seed=2)
    for test in ("caption", "word"):
        subject = CaptionSubject(
            model, samples, range(2), said, test, relevance=relevance, word_maps="scaled",
            caption_scores=["log_probability"], decoding=GREEDY,
        )  # fmt: skip
        assert isinstance(subject, Subject)
        whole = subject.certain().unperturbed(2)[:, 0]
        rows = np.array([1, 0])
        np.testing.assert_allclose(subject.certainty_of(rows, subject.images[[1, 0]]), whole[rows], rtol=1e-5)
        at_start = captions.tested["removal"][test].curves.values[0, 0, 0, 0, :, 0]
        if test == "word":
            np.testing.assert_allclose(whole, at_start, rtol=1e-5)
        else:
            many = subject.text_valid.sum(dim=1).numpy() - 1
            np.testing.assert_allclose(whole, np.exp(at_start / many), rtol=1e-5)
        for method, its in subject.maps().items():
            for row, explanation in enumerate(captions.explanations[method]):
                own = explanation.maps[said[row].word] if test == "word" else explanation.patches
                np.testing.assert_allclose(its.image[row], own.flatten(), rtol=1e-4, atol=1e-7)
        explained_alone(subject, samples.images[[1, 0]])


@pytest.mark.parametrize("kind", ["answers", "captions", "tied", "gpt2_cross"])
def test_layers_from_the_output_to_the_input(architecture, answering, captioning, kind):
    gpt2 = {"path": None, "layers": 1, "width": 16, "heads": 2, "frozen": False}
    made = {
        "tied": {"tied_head": True},
        "gpt2_cross": {"mapper": "single_flow", "decoder": kind, "gpt2": gpt2},
    }
    if kind in made:
        model = caption_models.captioner(architecture, **made[kind])
    else:
        model = (answering if kind == "answers" else captioning)[0]
    groups = parameter_groups(model)
    every = [id(parameter) for _, group in groups for parameter in group]
    assert len(set(every)) == len(every) and set(every) == {id(p) for p in model.parameters()}
    assert [name for name, _ in groups] == [
        "head", "mapper block 1", "mapper projections", "encoder block 1", "encoder embeddings",
    ]  # fmt: skip
    by_name = dict(groups)
    towers = [next(iter(t.attention_blocks())) for t in (model.encoder.image_tower, model.encoder.text_tower)]
    in_blocks = {id(p) for tower in towers for p in tower.parameters()}
    assert {id(p) for p in by_name["encoder block 1"]} == in_blocks
    assert {id(p) for p in by_name["mapper block 1"]} == {id(p) for p in model.mapper.blocks.parameters()}


def test_blocks_are_counted_from_the_last(tmp_path):
    """The last blocks of both go together."""
    model = tiny_models.clipmapper(tmp_path, depth=2)
    groups = parameter_groups(model)
    assert [name for name, _ in groups] == [
        "head", "mapper block 2", "mapper block 1", "mapper projections", "encoder block 2",
        "encoder block 1", "encoder embeddings",
    ]  # fmt: skip
    image, text = (list(t.attention_blocks()) for t in (model.encoder.image_tower, model.encoder.text_tower))
    by_name = dict(groups)
    for number in (1, 2):
        expected = [*image[number - 1].parameters(), *text[number - 1].parameters()]
        assert [id(p) for p in by_name[f"encoder block {number}"]] == [id(p) for p in expected]
    for number in (1, 2):
        expected = model.mapper.blocks[number - 1].parameters()
        assert [id(p) for p in by_name[f"mapper block {number}"]] == [id(p) for p in expected]


def test_sanity_leaves_a_model_as_it_was(answering):
    model, samples = answering
    before = {name: value.clone() for name, value in model.state_dict().items()}
    of_questions(answering, ["sanity"], samples.part(Share(0, 2)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
