"""METEOR and SPICE, which exist as Java programs only.

Both programs come with the extra `java-scores` (the package `pycocoevalcap`), which brings METEOR complete
and SPICE without the language models it needs.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from clipmapper.errors import UserError
from clipmapper.evaluation.captions.ngram_scores import Words, check_samples

# What METEOR reads as the border between captions.
_BORDER = "|||"


def missing_for(score: str) -> str | None:
    """Say in one line what "meteor" or "spice" lacks on this machine; None where it can be computed.

    Raises ValueError for another score.
    """
    if score not in ("meteor", "spice"):
        raise ValueError(f"{score!r} is neither 'meteor' nor 'spice'")
    missing = []
    if shutil.which("java") is None:
        missing.append("Java (there is no program `java` on the PATH)")
    if _package_folder() is None:
        missing.append("the package pycocoevalcap (pip install 'clipmapper[java-scores]')")
    elif score == "spice" and not _spice_models().exists():
        missing.append(
            "Stanford CoreNLP 3.6.0 (several hundred MB; fetch it with `python -c 'from pycocoevalcap.spice."
            "get_stanford_models import get_stanford_models as get; get()'`)"
        )
    return f"{score.upper()} needs " + " and ".join(missing) if missing else None


def meteor(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, Float64[np.ndarray, "samples"]]:
    """METEOR 1.5 (Denkowski & Lavie 2014) of the corpus and of each sample, as coco-caption runs it.

    The corpus's score is not the mean of the samples'. Raises UserError where Java or the package is missing,
    ValueError as :func:`clipmapper.evaluation.captions.ngram_scores.bleu_counts`.
    """
    folder = _required("meteor") / "meteor"
    check_samples(predictions, references)
    if not predictions:
        return float("nan"), np.zeros(0)
    command = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as program:

        def ask(*fields: str) -> str:
            # One question, one answer: neither pipe can then fill up.
            program.stdin.write(f" {_BORDER} ".join(fields) + "\n")
            program.stdin.flush()
            return read()

        def read() -> str:
            answer = program.stdout.readline().strip()
            if not answer:
                raise UserError("METEOR's Java program stopped without an answer (it needs 2 GB of memory)")
            return answer

        statistics = [
            ask("SCORE", *map(_line, sample_references), _line(prediction))
            for prediction, sample_references in zip(predictions, references, strict=True)
        ]
        first = ask("EVAL", *statistics)
        scores = [float(answer) for answer in (first, *(read() for _ in predictions[1:]))]
        return float(read()), np.array(scores)


def spice(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, Float64[np.ndarray, "samples"]]:
    """SPICE 1.0 (Anderson et al. 2016, arXiv 1607.08822): mean and F-score of each sample.

    A sample whose references hold no statement has no score (NaN); the mean is then NaN too, as in
    coco-caption. Raises UserError where Java, the package or its models are missing and where the program
    fails (it was written for Java 8 and needs 8 GB of memory), ValueError as :func:`meteor`.
    """
    _required("spice")
    check_samples(predictions, references)
    if not predictions:
        return float("nan"), np.zeros(0)
    from pycocoevalcap.spice.spice import Spice

    numbered = list(enumerate(zip(predictions, references, strict=True)))
    try:
        mean, scores = Spice().compute_score(
            {index: [" ".join(reference) for reference in pair[1]] for index, pair in numbered},
            {index: [" ".join(pair[0])] for index, pair in numbered},
        )
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"SPICE's Java program failed with status {error.returncode} (it needs Java 8 and 8 GB of memory)"
        ) from error
    return float(mean), np.array([score["All"]["f"] for score in scores])


def _line(words: Words) -> str:
    return " ".join(words).replace(_BORDER, "")


def _required(score: str) -> Path:
    if missing := missing_for(score):
        raise UserError(missing)
    return _package_folder()


def _package_folder() -> Path | None:
    # The package has no __init__.py, so its spec has no file.
    spec = importlib.util.find_spec("pycocoevalcap")
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


def _spice_models() -> Path:
    return _package_folder() / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar"
