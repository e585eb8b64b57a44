"""README.md and docs/: their links and paths lead somewhere, and code blocks that can run here do run."""

import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
FILE = r"((?:[\w-]+/)*[\w-]+\.py)\b"


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """A path may begin in any folder: `weighted.py` is found, and so is `methods/weighted.py`."""
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"`([^`\n]+)`", text) + blocks(text, "", "bash", "python")
    named = {file for part in code for file in re.findall(FILE, part)}
    there = [f"/{path.relative_to(ROOT)}" for where in ("clipmapper", "scripts", "tests") for path in
             (ROOT / where).rglob("*.py")]  # fmt: skip
    assert [file for file in sorted(named) if not any(path.endswith(f"/{file}") for path in there)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_can_be_made(page):
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        for line in re.findall(r"^(?:from|import) clipmapper.*$", code, flags=re.MULTILINE):
            exec(line, {})


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 180


@pytest.fixture
def without_downloads(monkeypatch, tmp_path):
    """Random weights in place of those that the README's models are downloaded with."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save("cat.png")
    create = open_clip.create_model_and_transforms
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, pretrained: create(name))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=sizes, vision_config={**sizes, "patch_size": 32})
    monkeypatch.setattr(
        transformers.CLIPModel, "from_pretrained", lambda name: transformers.CLIPModel(config)
    )
    read = transformers.CLIPImageProcessor()

    def processor(text, images, return_tensors):
        ids = torch.tensor([[49406, 320, 2368, 49407]] * len(text))
        return {"input_ids": ids, **read(images, return_tensors=return_tensors)}

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: processor)


def test_a_model_that_one_already_has(without_downloads):
    of_open_clip, of_transformers = blocks(README, "python")[:2]
    names: dict = {}
    exec(of_open_clip, names)
    assert names["why"].image.shape == (1, 7, 7) and names["why"].text.shape == (1, 77)
    assert Path("why.png").stat().st_size > 0
    exec(of_transformers, names)
    assert names["why"].image.shape == (1, 7, 7) and names["why"].text.shape == (1, 4)
