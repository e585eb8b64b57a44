"""The official files of data sets that people fine-tune on: CLEVR (with CLEVR-XAI's masks), SNLI-VE, VQA-RAD,
SLAKE, PathVQA."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipmapper.data.images import as_pil
from clipmapper.data.readers.fields import KEY, NUMBER, TEXT, Entries, Field, shown
from clipmapper.data.readers.manifest import leads_out
from clipmapper.data.readers.manifest_files import manifest_rows
from clipmapper.data.readers.source import Row, Source
from clipmapper.data.record import OTHER, Problem, resized
from clipmapper.data.text_files import check_file, other_kind
from clipmapper.errors import UserError
from clipmapper.host.progress import counted


def _clevr_answer(value: Any) -> tuple[str, bool]:
    # CLEVR-XAI's are what the generator computed: true for "yes", 3 for "3".
    return (("no", "yes")[value], True) if isinstance(value, bool) else TEXT.read(value)


_CLEVR = {
    "question_index": NUMBER,
    "image_filename": TEXT,
    "question": TEXT,
    "answer": Field(_clevr_answer, TEXT.allowed, default=None),  # the split test has none
    "program": Field(lambda value: (value, False), "a list of functions", default=None),
}
_FUNCTION = {"function": TEXT.or_else(None), "type": TEXT.or_else(None)}  # CLEVR's name, CLEVR-XAI's name
_OF_NUMBERS = ("equal_integer", "less_than", "greater_than")


def clevr(source: Source) -> Iterator[Row]:
    """CLEVR (Johnson et al. 2017, arXiv 1612.06890), and CLEVR-XAI (Arras, Osman and Samek 2022, arXiv
    2003.07258), whose questions are such files too. Families are the five that CLEVR's scores are told by."""
    reading, masks = source.reading, source.masks
    if masks is not None:
        _check_masks(masks, source.images)
    size_of = lru_cache(maxsize=1 << 10)(lambda image: as_pil(image).size[::-1])
    count = 0
    entries = reading.of_file(source.questions, "questions", "CLEVR's questions", _CLEVR)
    for entry in counted(entries, f"reading {source.questions}"):
        count += 1
        family = _clevr_family(entry, reading)
        if family is None:
            continue
        image = source.images / entry["image_filename"]
        wanted = masks is not None and not leads_out(entry["image_filename"])
        yield {
            "source": entry["source"],
            "id": entry["question_index"],
            "image": image,
            "question": entry["question"],
            "family": family,
            "answers": None if entry["answer"] is None else [entry["answer"]],
            "mask": _mask(source, entry, image, size_of) if wanted else None,
        }
    if masks is not None and source.told[_NO_MASK] == count and not reading.problems:
        raise UserError(f"--masks {masks}: no mask of any question is in it; 0.npy is that of question 0")


def _clevr_family(entry: Mapping, reading: Entries) -> str | None:
    """What the last function of a question's program asks for; None where the program is wrong."""
    where, program = entry["source"], entry["program"]
    if program is None:
        return OTHER
    if not isinstance(program, list):
        reading.wrong(where, "'program' is not a list of functions", shown(program))
        return None
    last = reading.entry(f"{where}, end of 'program'", program[-1], _FUNCTION)
    if last is None:
        return None
    name = last["function"] or last["type"]
    if name is None:
        reading.wrong(last["source"], "no 'function'")
    elif name in _OF_NUMBERS:
        return "compare_number"
    elif name.startswith("equal_"):
        return "compare_attribute"
    elif name.startswith("query_"):
        return "query_attribute"
    return name


_NO_MASK = "questions without a mask"
# Rows and columns: the whole image, squashed to the square that the authors' network reads.
_RELEASED = (128, 128)


def _check_masks(masks: Path, images: Path) -> None:
    if masks.is_file():
        what = "a file, not a folder of arrays (0.npy); all masks in one file are a pickle, which is not read"
        raise UserError(f"--masks {masks}: {what}")
    if not masks.is_dir():
        raise UserError(f"--masks {masks}: no such folder")
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder; masks are made as large as their images")


def _mask(source: Source, entry: Mapping, image: Path, size_of: Any) -> bytes | None:
    """The mask of a question as a PNG of the size of its image; None where it has none, or a wrong one."""
    path, where, reading = source.masks / f"{entry['question_index']}.npy", entry["source"], source.reading
    if not path.is_file():
        source.told[_NO_MASK] += 1
        return None
    try:
        # Mapped: a damaged header may claim any size.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        size = size_of(image)
    except UserError as error:
        reading.wrong(where, "no image for its mask", str(error))
        return None
    except Exception as error:  # whatever a damaged header makes NumPy raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reading.wrong(where, "not a readable mask", f"{path} ({reason})")
        return None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "bui":
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        what = f"{path}: {kind}, not true and false for each row and column"
        reading.wrong(where, "not a mask", what)
        return None
    if found.shape not in (size, _RELEASED):
        (rows, columns), (height, width) = found.shape, size
        what = f"{path} has {columns} x {rows}, its image {width} x {height}; CLEVR-XAI's own have 128 x 128"
        reading.wrong(where, "a mask of another size than its image", what)
        return None
    if found.shape != size:
        source.told["masks of 128 x 128, brought to the size of their images"] += 1
    file = BytesIO()
    Image.fromarray(resized(np.asarray(found) != 0, size)).save(file, "PNG")
    return file.getvalue()


_SNLI_VE = {
    "pairID": TEXT,
    "sentence2": TEXT,
    "gold_label": TEXT,
    "Flickr30K_ID": KEY.or_else(None),
    "Flikr30kID": KEY.or_else(None),  # as the first release has it, with .jpg or without
}
_LABELS = ("entailment", "neutral", "contradiction")


def snli_ve(source: Source) -> Iterator[Row]:
    """SNLI-VE (Xie et al. 2019, arXiv 1901.06706): the question is the sentence that the image may bear out,
    and each of the three answers is a family."""
    path, reading = source.questions, source.reading
    _check_kind(path, (".jsonl", ".json"), "SNLI-VE's files are lines of JSON, such as snli_ve_train.jsonl")
    for where, found in counted(manifest_rows(path), f"reading {path}"):
        if isinstance(found, Problem):
            reading.problems.append(found)
            continue
        entry = reading.entry(where, found, _SNLI_VE)
        if entry is None:
            continue
        label, image = entry["gold_label"], entry["Flickr30K_ID"] or entry["Flikr30kID"]
        if label == "-":  # the annotators did not agree
            source.told["pairs left out, without a gold label"] += 1
        elif label not in _LABELS:
            reading.wrong(where, f"'gold_label' is not one of {', '.join(_LABELS)}", shown(label))
        elif image is None:
            reading.wrong(where, "no 'Flickr30K_ID'")
        else:
            yield {
                "source": where,
                "id": entry["pairID"],
                "image": source.images / f"{str(image).removesuffix('.jpg')}.jpg",
                "question": entry["sentence2"],
                "family": label,
                "answers": [label],
            }


def _check_kind(path: Path, suffixes: tuple[str, ...], wanted: str) -> None:
    kind = other_kind(check_file(path))
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: {wanted}" + (f"; this is {kind}" if kind else ""))


_MEDICAL = {"qid": KEY, "question": TEXT, "answer": TEXT, "answer_type": TEXT.or_else(OTHER)}
_VQA_RAD = _MEDICAL | {"image_name": TEXT, "phrase_type": TEXT}
_SLAKE = _MEDICAL | {"img_name": TEXT, "q_lang": TEXT}
LANGUAGES = ("en", "zh")


def vqa_rad(source: Source) -> Iterator[Row]:
    """VQA-RAD (Lau et al. 2018, doi 10.1038/sdata.2018.251): one file, in which ``phrase_type`` tells the
    questions for testing (``test_freeform``, ``test_para``) from the others."""
    for entry in source.listed(None, "VQA-RAD's questions", _VQA_RAD):
        for_test = entry["phrase_type"].strip().lower().startswith("test")
        split = "test" if for_test else "train"
        yield _medical(entry, source.images / entry["image_name"]) | {"split": split}


def slake(source: Source) -> Iterator[Row]:
    """SLAKE (Liu et al. 2021, arXiv 2102.09542): ``train.json``, ``validation.json``, ``test.json``."""
    if source.language is None:
        raise UserError(f"SLAKE has questions in two languages; give --language {' or '.join(LANGUAGES)}")
    for entry in source.listed(None, "SLAKE's questions", _SLAKE):
        if entry["q_lang"] not in LANGUAGES:
            reading, what = source.reading, f"'q_lang' is not {' or '.join(LANGUAGES)}"
            reading.wrong(entry["source"], what, shown(entry["q_lang"]))
        elif entry["q_lang"] != source.language:
            source.told["questions left out, in the other language"] += 1
        else:
            yield _medical(entry, source.images / entry["img_name"])


def _medical(entry: Mapping, image: Path) -> Row:
    return {
        "source": entry["source"],
        "id": entry["qid"],
        "image": image,
        "question": entry["question"],
        "family": entry["answer_type"].strip(),  # OPEN, CLOSED and "CLOSED "
        "answers": [entry["answer"]],
    }


_PATH_VQA = {"question": TEXT, "answer": TEXT}
_PART = re.compile(r"(train|validation|test)-\d+-of-(\d+).*", re.IGNORECASE)
_PICKLES = (".pkl", ".pickle")


def path_vqa(source: Source) -> Iterator[Row]:
    """PathVQA (He et al. 2020, arXiv 2003.10286) in Parquet, with the images in it. Its authors' own files
    are pickles, which are refused. Several files are parts of one split, or of several: their names say
    which."""
    files = (source.questions, *source.more)
    for path in files:
        _check_path_vqa(path)
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise UserError(f"{source.questions}: one of the {len(files)} files is given twice")
    named = [found for path in files if (found := _PART.fullmatch(path.name))]
    for (split, whole), given in Counter((part[1].lower(), int(part[2])) for part in named).items():
        if given < whole:
            source.told[f"of {whole} files of {split} were given"] = given
    for path in files:
        part = _PART.fullmatch(path.name)
        split = {} if part is None else {"split": part[1].lower()}
        for where, found in counted(manifest_rows(path), f"reading {path}"):
            row = _path_vqa_row(where, found, source.reading)
            if row is not None:
                yield row | split


def _check_path_vqa(path: Path) -> None:
    head = check_file(path)
    if path.suffix.lower() in _PICKLES or re.match(rb"\x80[\2-\5]", head):
        what = "a pickle, which can run any program when it is read"
        advice = "take PathVQA's Parquet files (flaviagiammarino/path-vqa on Hugging Face)"
        raise UserError(f"{path}: {what}; {advice}")
    _check_kind(path, (".parquet",), "PathVQA is read from its Parquet files, train-00000-of-00007 and so on")


def _path_vqa_row(where: str, found: Mapping, reading: Entries) -> Row | None:
    entry = reading.entry(where, found, _PATH_VQA)
    if entry is None:
        return None
    stored = found.get("image")
    content = stored.get("bytes") if isinstance(stored, Mapping) else stored
    if not isinstance(content, bytes) or not content:
        reading.wrong(where, "no bytes of an image in 'image'", shown(stored))
        return None
    answer = entry["answer"]
    return {  # without an id: it has none
        "source": where,
        "image": content,
        "question": entry["question"],
        "answers": [answer],
        "family": "yes/no" if answer.strip().lower() in ("yes", "no") else OTHER,
    }
