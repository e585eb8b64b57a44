"""``scripts/benchmark.py``: one sub-command a benchmark, the results as JSON."""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from clipmapper.benchmarks import captions, fine_tuning, loading, perturbation, relevance
from clipmapper.benchmarks.timing import write_results
from clipmapper.commands.mistakes import Arguments, mistakes_end_it, some_path, whole
from clipmapper.host.outputs import check_file, file_name_problem
from clipmapper.host.stopping import a_command


class Benchmark(NamedTuple):
    """``run`` takes the options that ``arguments`` adds, and gives what is written; its docstring is the
    help.

    What is printed is ``line``, the result in one line, or what ``show`` prints. ``plot`` writes a picture.
    One that has an option ``resume`` writes what it has measured as it goes.
    """

    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], dict]
    line: str = ""
    show: Callable[[dict], None] | None = None
    plot: Callable[[dict, Path], Path] | None = None


# Another benchmark is another line here.
BENCHMARKS = {
    "decoding": Benchmark(
        captions.decoding_arguments,
        captions.decoding,
        "{tokens_per_s[cached]:.0f} tokens/s with the cache, {tokens_per_s[uncached]:.0f} without: "
        "{speed_up:.2f} times",
    ),
    "explanation": Benchmark(
        captions.explanation_arguments,
        captions.explanation,
        "{words} words: {times[together][median_s]:.3f} s together, {times[separately][median_s]:.3f} s one "
        "by one: ratio {ratio:.3f} ({ratio_to_plain:.3f} to a plain forward and backward a token)",
    ),
    "relevance": Benchmark(
        relevance.relevance_arguments, relevance.relevance, show=relevance.show, plot=relevance.plot
    ),
    "perturbation": Benchmark(
        perturbation.perturbation_arguments,
        perturbation.perturbation,
        show=perturbation.show,
        plot=perturbation.plot,
    ),
    "fine_tuning": Benchmark(
        fine_tuning.fine_tuning_arguments, fine_tuning.fine_tuning, show=fine_tuning.show
    ),
    "cache": Benchmark(
        loading.caching_arguments,
        loading.caching,
        "{steps_per_s[pixels]:.2f} steps/s from pixels, {steps_per_s[memory]:.2f} from tokens in memory, "
        "{steps_per_s[files]:.2f} in files: {speed_up:.1f} times; half precision: "
        "{half_precision[same_answer]:.2%} of answers the same",
    ),
    "data": Benchmark(
        loading.loading_arguments,
        loading.loading,
        "{images_per_s_and_core[fast]:.0f} images/s and core as the loaders do it (data.decoding=fast), "
        "{images_per_s_and_core[exact]:.0f} with exact, {images_per_s_and_core[open_clip]:.0f} by "
        "open_clip's transform: {speed_up:.2f} times; {bytes[fast]} of {bytes[open_clip]} bytes an image to "
        "the device; "
        "off by {deviation[fast][mean]} levels of 255 in the mean, {deviation[fast][max]} at most",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with exit status 2 and one line on stderr for a mistake of the user's, with 130 after Ctrl-C."""
    parser = Arguments(description="Measure speed.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=(benchmark.run.__doc__ or "").split(".")[0])
        command.add_argument("--repeats", type=whole(), default=7, help="the median of so many is reported")
        command.add_argument("--output", type=some_path, default=Path("outputs/benchmark"))
        command.add_argument("--name", default=name, help="of the file, without .json")
        benchmark.arguments(command)
    options = parser.parse_args(arguments)
    if problem := file_name_problem(options.name):
        parser.error(f"--name: {problem}")
    with a_command(), mistakes_end_it():
        _run(BENCHMARKS[options.benchmark], options)


def _run(benchmark: Benchmark, options: Namespace) -> None:
    output, began = options.output, time.time()
    options.output = str(output)
    try:
        check_file(output / f"{options.name}.json", f"--output {output}")
        results = benchmark.run(options)
    except KeyboardInterrupt:
        file = output / f"{options.name}.json"
        written = "resume" in options and file.exists() and (options.resume or file.stat().st_mtime >= began)
        goes_on = "the same command with --resume goes on" if written else "nothing was written"
        print(f"interrupted; {goes_on}", file=sys.stderr)
        sys.exit(130)
    path = write_results(options.name, results, output)
    if benchmark.show is None:
        print(benchmark.line.format(**results))
    else:
        benchmark.show(results)
    print(path)
    if benchmark.plot is not None:
        print(benchmark.plot(results, path.with_suffix(".png")))
