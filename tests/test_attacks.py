"""Files that somebody sends, made to run code, to open or to remove what they name: each ends in one line.

A canary lies beside them; whatever an attack runs would remove it, or leave a mark.
"""

import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from copy import deepcopy
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from support import training_models
from support.slow import mostly_slow

import clipmapper
from clipmapper import cli
from clipmapper.commands.compose import data_settings
from clipmapper.data.records import Record
from clipmapper.errors import UserError, visible
from clipmapper.evaluation.perturbation import run_in_chunks
from clipmapper.evaluation.perturbation_scores import PerturbationScores
from clipmapper.host.outputs import file_name_problem
from clipmapper.models.clip_weights import build_clip, build_tokenizer
from clipmapper.models.exported import DESCRIPTION
from clipmapper.settings import compose
from clipmapper.settings.checks import built
from clipmapper.settings.compose import config_groups
from clipmapper.settings.data import ScenesVQAConfig
from clipmapper.settings.plain_values import section_of_numbers
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.checkpoint import check_same_model, restore_checkpoint
from clipmapper.training.interruption import SaveSteps
from clipmapper.training.run_folder import CHECKPOINT, folder_to_resume
from clipmapper.training.shown import console

WORLD = {
    "train_scenes": 4, "simple_scenes": 4, "validation_scenes": 6, "held_out_scenes": 4, "train_questions": 1,
    "seed": 0,
}  # fmt: skip
TINY_GPT2 = {"vocab_size": 49408, "n_positions": 60, "n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict:
    """A whole checkpoint, as ``torch.save`` is given it."""
    model = training_models.tiny_model(training_models.tiny_clip(tmp_path_factory.mktemp("clip")))
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    return {
        DESCRIPTION: model.description | {"data": {"name": "scenes", "settings": WORLD}},
        "state_dict": state,
    }


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The folder with the canary in it, which is the working directory; looked for when the test is over."""
    folder = tmp_path / "canary"
    folder.mkdir()
    (folder / "alive").write_text("alive")
    monkeypatch.chdir(folder)
    yield folder
    assert [path.name for path in folder.iterdir()] == ["alive"] and (folder / "alive").read_text() == "alive"


@pytest.fixture
def one_line(canary, capfd, monkeypatch):
    """``one_line(command, *arguments)``: the line that a command ends with."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(command: str, *arguments: str) -> str:
        with pytest.raises(SystemExit) as leaving:
            getattr(cli, command)(list(arguments))
        printed = capfd.readouterr()
        assert leaving.value.code == 2, printed
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert "Traceback" not in printed.err and "\x1b" not in printed.err + printed.out
        return printed.err.removeprefix("error: ").rstrip("\n")

    return run


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def refused(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        clipmapper.load(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class Runs:
    """A pickle that calls something when it is read."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def harmful(canary: Path) -> dict[str, object]:
    import shutil
    import subprocess

    return {
        "system": Runs(os.system, f"rm {canary}/alive"),
        "exec": Runs(exec, f"open({str(canary / 'ran')!r}, 'w').close()"),
        "remove": Runs(shutil.rmtree, str(canary)),
        "run": Runs(subprocess.getoutput, f"touch {canary}/ran"),
        "nested": {"a": [Runs(eval, f"__import__('os').remove({str(canary / 'alive')!r})")]},
    }


# Pickles


@pytest.mark.parametrize("kind", mostly_slow(["system", "exec", "remove", "run", "nested"], 5))
def test_pickles_do_not_run(canary, tmp_path, content, kind):
    what = harmful(canary)[kind]
    torn = content | {DESCRIPTION: content[DESCRIPTION] | {"data": what}}
    paths = [
        saved(tmp_path / "description.ckpt", torn),
        saved(tmp_path / "weights.ckpt", content | {"state_dict": content["state_dict"] | {"model.x": what}}),
        saved(tmp_path / "beside.ckpt", content | {"extra": what}),
        saved(tmp_path / "legacy.ckpt", torn, _use_new_zipfile_serialization=False),
    ]
    for protocol in (0, 2, 4):
        path = tmp_path / f"pickle{protocol}.ckpt"
        path.write_bytes(pickle.dumps(what, protocol=protocol))
        paths.append(path)
    tar = tmp_path / "tar.ckpt"
    with tarfile.open(tar, "w") as archive:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            member = tarfile.TarInfo(name)
            member.size = len(pickle.dumps(what))
            archive.addfile(member, io.BytesIO(pickle.dumps(what)))
    numpy_file = tmp_path / "weights.npy"
    np.save(numpy_file, np.array([what], dtype=object), allow_pickle=True)
    architecture = training_models.tiny_clip(tmp_path)
    for path in [*paths, tar, numpy_file]:
        assert "not a readable checkpoint" in refused(path)
        with pytest.raises(UserError, match=r"encoder\.pretrained="):
            build_clip(architecture, str(path))
        with pytest.raises(UserError, match="resume=true"):
            restore_checkpoint(path)


def test_a_torchscript_archive_is_not_run(canary, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have it replaced; files of it will be about for long
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    assert "not a readable checkpoint" in refused(tmp_path / "script.pt")
    with pytest.raises(UserError, match=r"encoder\.pretrained="):
        build_clip(training_models.tiny_clip(tmp_path), str(tmp_path / "script.pt"))


# What a checkpoint says about data


def targets(canary: Path) -> list[dict]:
    return [
        {"_target_": "os.system", "command": f"touch {canary}/ran"},
        {"_target_": "shutil.rmtree", "path": str(canary)},
        {"_target_": "pathlib.Path.unlink", "self": str(canary / "alive")},
        {"_target_": "torch.load", "f": str(canary / "alive"), "weights_only": False},
        {
            "_target_": "clipmapper.data.shards.data.ShardData",
            "path": f"pipe:touch {canary}/ran #",
            "buffer": 1,
        },
        {"_target_": "clipmapper.data.readers.manifest.manifest_data", "path": str(canary / "alive")},
        {"_target_": "clipmapper.data.world.data.ScenesVQA", **WORLD, "seed": {"_target_": "os.getpid"}},
        {"_target_": "clipmapper.data.world.data.ScenesVQA", **WORLD, "validation_scenes": 10**12},
        {"_target_": "clipmapper.data.world.data.ScenesVQA", **WORLD, "validation_scenes": True},
        {"_target_": "clipmapper.data.world.data.ScenesVQA", **WORLD, "_recursive_": True},
        {"name": "scenes", "settings": WORLD | {"_target_": "os.getpid"}},
        {"name": "scenes", "settings": WORLD | {"seed": "${oc.env:HOME}"}},
        {"name": "scenes", "settings": {"seed": 0}},
        {"name": "shards", "settings": {"path": f"pipe:touch {canary}/ran"}},
        {"name": "os.system", "settings": {"command": f"touch {canary}/ran"}},
        {"name": ["scenes"], "settings": WORLD},
        {"name": "manifest", "settings": {"path": "\x1b]0;title\x07\u202etxt.lnosj"}},
        {},
    ]


@pytest.mark.parametrize("number", mostly_slow(range(len(targets(Path("canary")))), 6))
def test_data_of_a_checkpoint_are_never_opened(one_line, canary, tmp_path, content, number):
    data = targets(canary)[number]
    torn = content | {DESCRIPTION: content[DESCRIPTION] | {"data": data}}
    path = saved(tmp_path / "torn.ckpt", torn)
    assert isinstance(clipmapper.load(path), clipmapper.CLIPmapper)  # the model itself is whole
    line = one_line("perturb", f"checkpoint={path}", "samples=1", f"output={tmp_path / 'out'}")
    assert line.startswith(f"checkpoint={path}: ")
    if "scenes" not in str(data):
        assert "data=" in line


def test_the_world_is_rebuilt_from_numbers(tmp_path, content):
    from clipmapper.tasks.registry import task_of
    from clipmapper.training.checkpoint_data import data_description, data_for

    model = clipmapper.load(saved(tmp_path / "whole.ckpt", content))
    data = data_for(task_of(model), model, None, "whole.ckpt")
    assert data.sizes["validation"] == 6
    model.description["data"] = {"_target_": "clipmapper.data.scenes_vqa.ScenesVQA", **WORLD}
    again = data_for(task_of(model), model, None, "whole.ckpt")
    for one, other in zip(again.validation, data.validation, strict=True):
        assert (one.id, one.question, one.answers) == (other.id, other.question, other.answers)
        assert np.array_equal(one.image.pixels, other.image.pixels)
    assert (
        data_description(ScenesVQAConfig(_target_="clipmapper.data.world.data.ScenesVQA", **WORLD))
        == content[DESCRIPTION]["data"]
    )
    own = data_description(ScenesVQAConfig(_target_="my.Scenes", **WORLD))
    assert own == {"name": "my.Scenes", "settings": WORLD}  # no world of ours


@pytest.mark.parametrize("name", config_groups()["data"])
def test_a_checkpoint_tells_the_name_of_its_data(name):
    from clipmapper.training.checkpoint_data import data_description

    schema = compose.SCHEMAS[f"{name}_schema"]
    described = data_description(schema(_target_=compose.data_targets()[name]))
    assert described["name"] == name and "_target_" not in described["settings"]


def test_numbers_without_a_limit_are_no_closed_list():
    with pytest.raises(TypeError, match="TrainConfig"):
        section_of_numbers(TrainConfig)


def manifest(folder: Path, answers: str = "red") -> Path:
    Image.fromarray(np.full((80, 80, 3), 90, np.uint8)).save(folder / "a.png")
    Image.fromarray(np.full((80, 80, 3), 10, np.uint8)).save(folder / "b.png")
    rows = [
        {"image": name, "question": question, "answers": [answer], "split": split}
        for split, name in (("train", "a.png"), ("validation", "b.png"))
        for question, answer in (("what colour is it?", answers), ("${oc.env:HOME}", "unheard of"))
    ]
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_perturbation_of_data_that_the_user_names(canary, tmp_path, content, capfd, monkeypatch):
    """The model's own answers count, in whatever order the data have theirs."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("clipmapper.commands.perturb._PICTURES", 1)
    path, out = saved(tmp_path / "whole.ckpt", content), tmp_path / "out"
    given = ["perturb", f"checkpoint={path}", "methods=[random]", "samples=2", f"output={out}"]
    data = ["data=manifest", f"data.path={manifest(tmp_path)}", "data.workers=0"]
    cli.perturb([*given[1:], *data])
    assert "1 of 2 questions have no answer that the model can give" in capfd.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["data"]["path"] == str(tmp_path / "my.jsonl")
    first = (out / "chunks" / "removal" / "chunk_00000.npz").read_bytes()
    # Other data of the same name are other data.
    manifest(tmp_path, "green")
    cli.perturb([*given[1:], *data])
    assert (out / "chunks" / "removal" / "chunk_00000.npz").read_bytes() != first


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (["data.path=x"], "data.path=x: of which data set?"),
        pytest.param(["data=manifets"], "did you mean manifest?", marks=pytest.mark.slow),
        pytest.param(["data=manifest"], "data.path: no value", marks=pytest.mark.slow),
        (["data=scenes_captions"], "it answers questions, but these data have captions"),
        (["data=manifest", "data.path=${oc.env:HOME}"], "${oc.env:HOME}: no such file"),
        (["data=scenes", "data._target_=os.system"], "_target_=os.system: "),
        pytest.param(
            ["data=scenes", "data._target_=no.such.Data"], "_target_=no.such.Data: ", marks=pytest.mark.slow
        ),
        pytest.param(["data=shards", "data.path=nowhere"], "data.path=nowhere: ", marks=pytest.mark.slow),
    ],
)
def test_mistakes_in_the_data_of_perturb(one_line, tmp_path, content, data, says):
    path = saved(tmp_path / "whole.ckpt", content)
    assert says in one_line("perturb", f"checkpoint={path}", *data)


# What a checkpoint says about its model


def remote_tokenizer(folder: Path, canary: Path) -> Path:
    """A tokenizer's folder with code of its own."""
    folder.mkdir()
    code = f"open({str(canary / 'ran')!r}, 'w').close()\nclass T:\n    pass\n"
    (folder / "evil.py").write_text(code)
    auto = {"AutoTokenizer": ["evil.T", "evil.T"], "AutoConfig": "evil.T"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "T"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    return folder


def changed(content: dict, *keys: str, value: object) -> dict:
    content = {**content, DESCRIPTION: deepcopy(content[DESCRIPTION])}
    place = content[DESCRIPTION]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return content


CONFIG = ("encoder", "config")
TEXT, VISION = (*CONFIG, "text_cfg"), (*CONFIG, "vision_cfg")
LIES = [
    ((*TEXT, "hf_tokenizer_name"), "{evil}", "which only you may name"),
    ((*TEXT, "hf_model_name"), "{evil}", "which only you may name"),
    ((*TEXT, "tokenizer_kwargs"), {"trust_remote_code": True}, "which only you may name"),
    ((*TEXT, "tokenizer_mode"), "clips", "which only you may name"),
    ((*TEXT, "trust_remote_code"), True, "'trust_remote_code' is not one of the keys"),
    ((*TEXT, "layers"), 10**12, "is not a whole number from 1 to 512"),
    ((*TEXT, "layers"), 500, "has 502 layers, but the file has"),
    ((*TEXT, "layers"), True, "is not a whole number"),
    ((*TEXT, "layers"), "1", "is not a whole number"),
    ((*TEXT, "width"), 60_000, "its description asks for"),
    ((*TEXT, "context_length"), 1_000_000, "its description asks for"),
    ((*TEXT, "vocab_size"), 9_000_000, "its description asks for"),
    ((*TEXT, "heads"), 7, ""),
    ((*TEXT, "mlp_ratio"), float("nan"), "is not a number"),
    ((*TEXT, "act_kwargs"), {"inplace": True}, "is not one of the keys"),
    ((*VISION, "layers"), [1, 1, 1, 1], "is not a whole number"),
    ((*VISION, "patch_size"), 0, "is not a whole number"),
    ((*VISION, "image_size"), 16_000, "its description asks for"),
    ((*VISION, "timm_model_name"), "hf-hub:evil/model", "is no model of timm's own"),
    ((*VISION, "timm_model_name"), "local-dir:{evil}", "is no model of timm's own"),
    ((*VISION, "timm_model_name"), "vit_giant_patch14_224", ""),
    ((*VISION, "timm_model_pretrained"), True, "is not one of"),
    ((*CONFIG, "cast_dtype"), "x", "is not one of the keys"),
    ((*CONFIG, "custom_text"), "yes", "is not one of"),
    (CONFIG, None, "no architecture of open_clip's own"),
    (CONFIG, [], "is not a section"),
    (("encoder", "architecture"), "local-dir:{evil}", "is no name of a .json file"),
    (("encoder", "architecture"), "hf-hub:evil.json", "is no name of a .json file"),
    (("encoder", "architecture"), "../../{evil}/x\x1b[31m.json", "is no name of a .json file"),
    (("encoder",), {"architecture": "hf-hub:evil/model", "frozen": True, "config": None}, "no architecture"),
    (("encoder",), {"architecture": "ViT-bigG-14", "frozen": True, "config": None}, ""),
    (("encoder", "pretrained"), "{evil}", "is not one of the keys"),
    (("encoder", "lora_rank"), 10**9, "is not a whole number"),
    (("encoder", "frozen"), 1, "is not one of"),
    (("model", "depth"), 10**12, "is not a whole number"),
    (("model", "depth"), 2, "that its description asks for"),
    (("model", "width"), 65_536, "its description asks for"),
    (("model", "heads"), 3, ""),
    (("model", "mapper"), "os.system", "is not one of dual_flow, single_flow"),
    (("model", "_target_"), "os.system", "is not one of the keys"),
    (("answers",), ["red"], "its description asks for"),
    (("answers",), "red", "is not a list"),
    (("answers",), [1, 2], "is not a text"),
    (("answers",), [], "is not a list"),
    (("task",), "captioning", "is not one of the keys"),
    (("task",), "os.system", "is not one of vqa, captioning"),
    (("extra",), {"_target_": "os.system"}, "is not one of the keys"),
]


@pytest.mark.parametrize(("keys", "value", "says"), mostly_slow(LIES, 5))
def test_lies_about_the_model(canary, tmp_path, content, keys, value, says):
    evil = remote_tokenizer(tmp_path / "evil", canary)
    value = value.replace("{evil}", str(evil)) if isinstance(value, str) else value
    path = saved(tmp_path / "lies.ckpt", changed(content, *keys, value=value))
    line = refused(path)
    assert line.startswith(f"checkpoint={path}: ") and says in line and "\x1b" not in line


CAPTIONER = {
    "mapper": "dual_flow", "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0,
    "image_position_embedding": True, "tied_head": False, "text_embedding_only": True,
    "vocabulary": "tokenizer", "decoder": "gpt2_prefix",
    "gpt2": {"path": None, "layers": 1, "width": 8, "heads": 2, "frozen": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("gpt2", "says"),
    [
        (None, "has no gpt2"),  # the folder in model.gpt2.path would be opened
        ({"config": TINY_GPT2 | {"n_layer": 10**9}, "tokenizer": None}, "n_layer: "),
        (
            {"config": TINY_GPT2 | {"auto_map": {"AutoModel": "evil.T"}}, "tokenizer": None},
            "'auto_map' is not",
        ),
        ({"config": TINY_GPT2 | {"attn_implementation": "evil/kernel"}, "tokenizer": None}, "is not one of"),
        ({"config": TINY_GPT2 | {"quantization_config": {}}, "tokenizer": None}, "is not one of the keys"),
        ({"config": TINY_GPT2 | {"activation_function": "os.system"}, "tokenizer": None}, "is not one of"),
        ({"config": TINY_GPT2, "tokenizer": "{evil}"}, "is not a section"),
        ({"config": TINY_GPT2, "tokenizer": {"json": "[" * 100_000, "special": {}}}, "not readable JSON"),
        (
            {"config": TINY_GPT2, "tokenizer": {"json": '{"model": {}, "x": 1}', "special": {}}},
            "tokenizer.json",
        ),
        (
            {"config": TINY_GPT2, "tokenizer": {"json": '{"model": {}}', "special": {"x": "y"}}},
            "is not one of",
        ),
        ({"config": TINY_GPT2, "tokenizer": {"json": '{"model": {}}', "special": {}}}, ""),
    ],
)
def test_lies_about_a_gpt2(canary, tmp_path, content, gpt2, says):
    evil = remote_tokenizer(tmp_path / "evil", canary)
    model = deepcopy(CAPTIONER)
    model["gpt2"]["path"] = str(evil)
    described = {
        "task": "captioning",
        "encoder": content[DESCRIPTION]["encoder"],
        "model": model,
        "tokens": None,
    }
    described |= {} if gpt2 is None else {"gpt2": gpt2}
    line = refused(saved(tmp_path / "lies.ckpt", content | {DESCRIPTION: described}))
    assert says in line


def test_a_tokenizer_is_loaded_where_the_user_names_it_and_runs_no_code(canary, tmp_path, content):
    evil = remote_tokenizer(tmp_path / "evil", canary)
    own = tmp_path / "own-for-attacks.json"
    config = deepcopy(content[DESCRIPTION]["encoder"]["config"])
    config["text_cfg"]["hf_tokenizer_name"] = str(evil)
    own.write_text(json.dumps(config))
    path = saved(tmp_path / "own.ckpt", changed(content, *TEXT, "hf_tokenizer_name", value=str(evil)))
    assert "architecture=FILE.json" in refused(path)
    assert "its tokenizer" in refused(path, architecture=str(own))  # looked at now, and without its code
    config["text_cfg"]["hf_tokenizer_name"] = "another"
    own.write_text(json.dumps(config))
    assert "not the one that the model was trained with" in refused(path, architecture=str(own))
    config["text_cfg"] |= {"hf_tokenizer_name": str(evil), "tokenizer_kwargs": {"trust_remote_code": True}}
    own.write_text(json.dumps(config))
    for refuses in (build_clip, build_tokenizer):
        with pytest.raises(UserError, match="trust_remote_code is never given"):
            refuses(str(own), None if refuses is build_clip else 48)


# Weights


def one_bit_off(path: Path, which: int) -> str:
    """Change a bit of one of the file's tensors; says which part of the file it is in."""
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = [info for info in archive.infolist() if "/data/" in info.filename][which]
        with archive.open(info) as stored:
            whole[whole.index(stored.read(64), info.header_offset) + 2] ^= 1
    path.write_bytes(whole)
    return info.filename


@pytest.mark.parametrize("which", [0, 7, -1])
def test_every_byte_of_the_weights_counts(tmp_path, content, which):
    """On loading a model, on resuming a run, and of an encoder's weights in a file of one's own."""
    path = saved(tmp_path / "whole.ckpt", content | {"global_step": 3})
    assert restore_checkpoint(path) is None
    changed_part = one_bit_off(path, which)
    assert f"damaged ({changed_part} is not what was written)" in refused(path)
    with pytest.raises(UserError, match="damaged"):
        restore_checkpoint(path)
    architecture = training_models.tiny_clip(tmp_path)
    weights = saved(tmp_path / "clip.pt", build_clip(architecture, None).state_dict())
    build_clip(architecture, str(weights))
    one_bit_off(weights, which)
    with pytest.raises(UserError, match=r"encoder\.pretrained=.*damaged"):
        build_clip(architecture, str(weights))


def test_a_resumed_checkpoint_is_of_the_same_model(tmp_path, content):
    path = saved(tmp_path / "last.ckpt", content | {"global_step": 3})
    model = torch.nn.Module()
    model.model = clipmapper.load(path)
    check_same_model(path, model)
    model.model.head = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"resume=true: .*lacks the weights model.head"):
        check_same_model(path, model)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, content, number):
    name = "model.mapper.image_in.weight"
    name = name if name in content["state_dict"] else next(n for n in content["state_dict"] if "mapper" in n)
    weight = content["state_dict"][name].clone()
    weight.view(-1)[3] = number
    torn = content | {"state_dict": content["state_dict"] | {name: weight}}
    line = refused(saved(tmp_path / "nan.ckpt", torn))
    assert f"the weights {name.removeprefix('model.')} hold numbers that are not finite" in line


def test_a_few_bytes_do_not_stand_for_a_large_tensor(tmp_path, content):
    name = next(iter(content["state_dict"]))
    endless = torch.zeros(1).expand(10**6, 10**6)
    torn = content | {"state_dict": content["state_dict"] | {name: endless}}
    assert "is not a plain one" in refused(saved(tmp_path / "endless.ckpt", torn))
    index = torch.tensor([[0], [0]])
    sparse = torch.sparse_coo_tensor(index, torch.ones(1), (10**6, 10**6), check_invariants=True)
    torn = content | {"state_dict": content["state_dict"] | {name: sparse}}
    refused(saved(tmp_path / "sparse.ckpt", torn))
    torn = content | {"state_dict": content["state_dict"] | {name: torch.empty(3, device="meta")}}
    refused(saved(tmp_path / "meta.ckpt", torn))


@pytest.mark.slow
def test_checkpoints_from_before_names_still_load(tmp_path):
    """As 77b9875 wrote their descriptions and named their weights (the weights themselves are drawn)."""
    old = json.loads((Path(__file__).parent / "checkpoints" / "before_names.json").read_text())
    generator = torch.Generator().manual_seed(0)
    for kind, made in old.items():
        state = {n: torch.randn(shape, generator=generator) / 10 for n, shape in made["state"].items()}
        for name in [
            n for n in state if "language_model" in n and n.endswith(("wte.weight", "lm_head.weight"))
        ]:
            state[name] = torch.zeros(made["state"][name])  # one weight under two names
        path = saved(tmp_path / f"{kind}.ckpt", {DESCRIPTION: made["description"], "state_dict": state})
        model = clipmapper.load(path)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, state[f"model.{name}"]), name
        path.unlink()


# Names, texts and what is printed


NAMES_OF_RUNS = [
    "../../x", "/x", "a/b", "a\\b", "..", ".", ".hidden", "x.", " x", "a\nb", "a\x1b[2Jb", "\u202ex", "con",
    "NUL.txt", "a:b", "x" * 300, "a*", "", "  ",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES_OF_RUNS, "a\x00b"])
def test_names_stay_in_their_folder(name):
    assert file_name_problem(name) is not None


@pytest.mark.parametrize("name", mostly_slow(NAMES_OF_RUNS, 6))
def test_names_outside_of_their_folder_are_one_line(one_line, name):
    assert one_line("train", f"name={name}").startswith("name: ")


def test_usual_names_are_names():
    for name in ("vqa_scenes", "run 3", "été", "опыт-2", "a.b", "x=1,y=2", "${seed}"):
        assert file_name_problem(name) is None, name


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "$${oc.env:HOME}", "\\${oc.env:HOME}", "a ${x} b", "${"])
def test_free_text_is_literal(canary, text):
    settings = data_settings(["data=manifest", f"data.path={text}"])
    assert settings.path == text
    assert built(
        {"_target_": "clipmapper.data.records.Record", "id": 1, "image": b"", "image_id": text}
    ) == Record(1, b"", text)


HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202egnp.exe\r[bold]x[/bold] :smile: [/nope]"


def test_what_is_printed_obeys_no_text(capfd):
    from rich.table import Table
    from rich.text import Text

    table = Table("a", title=HOSTILE)
    table.add_row(HOSTILE)
    for what in (HOSTILE, Text(HOSTILE), table):
        console().print(what, soft_wrap=True)
    printed = capfd.readouterr().out
    assert not set("\x1b\x07\x9b\u202e\r") & set(printed)
    assert "\\x1b]0;owned\\x07" in printed and "[bold]x[/bold] :smile: [/nope]" in printed
    assert str(UserError(HOSTILE)) == visible(HOSTILE) and "\x1b" not in visible(HOSTILE)
    assert visible("été, опыт, 犬, \u200d, 🙂\n\t") == "été, опыт, 犬, \u200d, 🙂\n\t"
    assert visible("\ud800") == "\\ud800"


def test_answers_of_a_checkpoint_reach_no_terminal(canary, tmp_path, content, capfd, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    answers = [f"{HOSTILE} {n}" for n in range(len(content[DESCRIPTION]["answers"]))]
    path = saved(tmp_path / "hostile.ckpt", changed(content, "answers", value=answers))
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(tmp_path / "a.png")
    given = [f"checkpoint={path}", f"image={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of the picture
        cli.explain([*given, "question=is it ${oc.env:HOME}?"])
    printed = capfd.readouterr()
    assert not set("\x1b\x07\x9b\u202e\r") & set(printed.out + printed.err)
    assert "question: is it ${oc.env:HOME}?" in printed.out and "[bold]x[/bold]" in printed.out.replace(
        "\n", ""
    )


# Files that a run finds again


def run_folder(folder: Path, config: str) -> Path:
    run = folder / "x" / "2026-01-01_00-00-00"
    (run / CHECKPOINT.parent).mkdir(parents=True)
    (run / CHECKPOINT).write_bytes(b"")
    (run / "config.yaml").write_text(config)
    return run


@pytest.mark.parametrize(
    "config",
    [
        "!!python/object/apply:os.system ['rm alive']",
        "name: !!python/object/new:os.system ['rm alive']",
        "name: !!python/name:os.system",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "a: [",
        "just text",
        "",
        "[" * 100_000,
        "\x1b[31m: \x00",
    ],
)
def test_settings_of_a_resumed_folder(canary, tmp_path, config):
    run_folder(tmp_path, config)
    with pytest.raises(UserError, match="no settings of a run"):
        folder_to_resume(str(tmp_path), "x", {"name": "x"})


def test_a_resumed_checkpoint_names_no_files():
    """Lightning's ModelCheckpoint would remove what best_model_path says when it saves the next time."""
    assert not issubclass(SaveSteps, ModelCheckpoint)
    assert SaveSteps.load_state_dict is lightning.Callback.load_state_dict  # which does nothing


@pytest.mark.parametrize("kind", ["pickled", "array", "text", "empty"])
def test_chunks_with_pickled_arrays_are_computed_again(canary, tmp_path, kind):
    path = tmp_path / "chunk_00000.npz"
    what = np.array([harmful(canary)["system"]], dtype=object)
    if kind == "pickled":
        np.savez(path, key=np.array("k [0:1]"), scores=what, allow_pickle=True)
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, what, allow_pickle=True)
    else:
        path.write_bytes(b"" if kind == "empty" else b"text")

    class Computed(Exception):
        pass

    def compute(positions: range) -> PerturbationScores:
        raise Computed

    with pytest.raises(Computed):
        run_in_chunks(1, 1, compute, folder=tmp_path, key="k")


def test_token_files_with_pickled_arrays(canary, tmp_path):
    from clipmapper.data.token_file import KEY, TOKENS, TokenFile

    file = TokenFile(tmp_path, "images", {}, 2, (1, 1), torch.float32, 1)
    file.folder.mkdir()
    what = np.array([harmful(canary)["system"]], dtype=object)
    for key, content in ((json.dumps(file.key), what), ("[" * 100_000, np.zeros(1)), ("7", what)):
        (file.folder / KEY).write_text(key)
        np.save(file.folder / TOKENS, content, allow_pickle=True)
        with pytest.raises(UserError, match="delete"):
            file.open()


@pytest.mark.parametrize(
    "rows", ['{"rows": 7}', '{"rows": [7]}', "[]", "[" * 100_000, '{"rows": "x"}', "\x00"]
)
def test_results_of_a_benchmark(tmp_path, rows):
    from clipmapper.benchmarks.timing import earlier_rows

    (tmp_path / "r.json").write_text(rows)
    with pytest.raises(UserError, match="no result of this benchmark"):
        earlier_rows(tmp_path / "r.json", {}, {})
