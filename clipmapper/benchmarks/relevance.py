"""Measure the time and memory of every explanation method against one forward and backward to the image."""

import multiprocessing
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from clipmapper.benchmarks import compared, naive
from clipmapper.benchmarks.other_libraries import LIBRARIES
from clipmapper.benchmarks.subjects import SUBJECTS, Subject
from clipmapper.benchmarks.timing import (
    available_bytes,
    earlier_rows,
    measured,
    peak_bytes,
    peak_resident_bytes,
    ratio_chart,
    resident_bytes,
    write_results,
)
from clipmapper.commands.explain import chosen_device
from clipmapper.commands.mistakes import seconds, whole
from clipmapper.errors import UserError
from clipmapper.host.machine import machine
from clipmapper.relevance import METHODS, Relevance, method_named, needs_of
from clipmapper.relevance.methods.effective import SOLVED
from clipmapper.training.shown import console

FLOOR = "floor"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAIVE = {
    "one_backward_per_layer": naive.one_backward_per_layer,
    "three_gradients_per_layer": naive.three_gradients_per_layer,
}
# Which of ours does the same.
_SAME_AS = {"one_backward_per_layer": "gae", "three_gradients_per_layer": "weighted"}
# Times of runs that differ in one of these are not set side by side.
_MUST_AGREE = {
    "settings": ("repeats", "patience", "resident", "precision"),
    "machine": ("device", "name", "cores", "threads", "torch"),
}
_MODELS = ["vit_b_32", "vit_b_16", "vit_l_14_336", "clip_b_32", "dual_flow_b_32", "single_flow_b_32"]
_METHODS = ["weighted", "gae", "weighted_token", "rollout", "raw_attention", "grad_cam"]


def relevance_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=[*SUBJECTS], default=_MODELS, metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=whole(), default=[1])
    parser.add_argument("--methods", nargs="+", default=_METHODS, help="names, or: all")
    parser.add_argument(
        "--naive", action=BooleanOptionalAction, default=True,
        help="as released implementations do it: the time, at the smallest batch",
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs="+", choices=[*LIBRARIES], default=[], metavar="LIBRARY",
        help="captum, lxt: instead, their own programs against the methods here that give the same, of "
        f"{', '.join(compared.SUBJECTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--resident", action=BooleanOptionalAction, default=False,
        help="also the resident memory of a process that explains once, above the loaded model's",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=seconds, default=60.0, help="seconds after which a way is repeated no more"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision", choices=[*PRECISIONS], default="float32",
        help="other than float32: the model under autocast, and how far relevance then is from float32's",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="keep what the file has of an earlier run; a model and batch of which a way is missing is "
        "measured anew",
    )  # fmt: skip


def relevance(options: Namespace) -> dict:
    """Time and peak memory of methods, divided by those of one forward and backward to the input image.

    ``--compare``: of other libraries as well, on models of its own and against a backward to the tokens.
    What is measured of a model and batch is written at once. Raises ``UserError`` where ``--resume`` finds an
    earlier run of other settings or of another machine.
    """
    # (leave_one_out costs the forwards that it makes; how tokens are removed, only tasks' models say.)
    every = [name for name in METHODS if name != "leave_one_out"]
    methods = every if options.methods == ["all"] else options.methods
    for name in methods:
        method_named(name)
    device = chosen_device(options.device)
    results = {"machine": machine(device), "settings": vars(options), "rows": []}
    output = Path(options.output)
    if options.compare:
        return _compared(results, device, options, output)
    if options.resume:
        results["rows"] = earlier_rows(output / f"{options.name}.json", results, _MUST_AGREE)
    with tqdm(total=len(options.models) * len(options.batches), desc="relevance") as bar:
        for name in options.models:
            for batch in sorted(options.batches):
                ways = [FLOOR, *methods]
                # Their cost grows with the batch as ours does; it is large enough once.
                if options.naive and batch == min(options.batches):
                    ways += NAIVE
                before = [row for row in results["rows"] if (row["model"], row["batch"]) == (name, batch)]
                if not {*ways} <= {row["way"] for row in before}:
                    others = [row for row in results["rows"] if row not in before]
                    rows = _measure(name, batch, device, ways, options, bar, others)
                    results["rows"] = others + rows
                    results["machine"]["load_at_the_end"] = machine(device)["load"]
                    write_results(options.name, results, output)
                bar.update()
    return results


def _compared(results: dict, device: torch.device, options: Namespace, output: Path) -> dict:
    if options.precision != "float32" or options.resume or options.resident:
        raise UserError("--compare is made in float32, and without --resume and --resident")
    work = [(name, batch) for name in compared.SUBJECTS for batch in sorted(options.batches)]
    with tqdm(work, desc="relevance") as bar:
        for name, batch in bar:
            results["rows"] += compared.compare(name, batch, device, options, bar.set_postfix_str)
            write_results(options.name, results, output)
    return results


def _measure(
    name: str,
    batch: int,
    device: torch.device,
    names: list[str],
    options: Namespace,
    bar: tqdm,
    before: list[dict],
) -> list[dict]:
    subject = SUBJECTS[name](batch, device)
    ways = {way: _work(subject, way, options.precision) for way in names}
    its = machine(device)
    rows = {
        way: {"model": name, "batch": batch, "way": way, "when": its["when"], "load": its["load"]}
        for way in ways
    }
    for way, work in list(ways.items()):
        bar.set_postfix_str(f"{name}, batch {batch}, memory of {way}")
        if way in NAIVE:
            # Its peak is not measured: the profiler writes down every allocation of a backward per layer,
            # which takes longer and more memory than the work itself.
            needed = naive.probability_bytes(subject.trace()[0])
        else:
            needed = _expected_bytes(before, name, way, batch)
        if needed > 0.8 * available_bytes(device):
            rows[way]["left_out"] = f"would take about {needed / 2**30:.1f} GiB"
            del ways[way]
            continue
        if way in NAIVE:
            continue
        try:
            rows[way]["peak_bytes"] = peak_bytes(work, device)
        except UserError as error:  # a method that is not defined for this model
            rows[way]["left_out"] = str(error)
            del ways[way]
            continue
        if way in METHODS and options.precision != "float32":
            rows[way] |= deviation(work(), _work(subject, way, "float32")())
    if options.resident:
        for way in ways:
            rows[way]["resident_bytes"] = _resident_growth(name, batch, way, str(device), options.precision)
    times = measured(
        ways,
        options.repeats,
        patience_s=options.patience,
        progress=lambda way: bar.set_postfix_str(f"{name}, batch {batch}, {way}"),
        beside=FLOOR,
    )
    for way, its in times.items():
        rows[way] |= its | {"runs": len(its["all_s"])}
        if FLOOR in times and "peak_bytes" in rows[way]:
            rows[way]["memory_ratio"] = rows[way]["peak_bytes"] / rows[FLOOR]["peak_bytes"]
        ours = _SAME_AS.get(way)
        if ours in times:
            for key, clock in (("time", "median_s"), ("cpu_time", "cpu_median_s")):
                rows[way][f"{key}s_slower_than_ours"] = its[clock] / times[ours][clock]
    return list(rows.values())


def _work(subject: Subject, way: str, precision: str) -> Callable[[], object]:
    if way == FLOOR:
        work = subject.floor
    else:
        work = explaining_naively(subject, way) if way in NAIVE else explaining(subject, way)
    if precision == "float32":
        return work

    def under_autocast():
        with torch.autocast(subject.images.device.type, dtype=PRECISIONS[precision]):
            return work()

    return under_autocast


def deviation(found: Relevance, expected: Relevance) -> dict[str, float]:
    """The largest difference of the relevance of any token.

    ``deviation``: of relevance that sums to 1 in every sample (as of ``weighted``); ``deviation_of_largest``:
    divided by the sample's largest.
    """

    def shares(relevance: Relevance) -> Tensor:
        tokens = torch.cat([relevance.streams[stream] for stream in expected.streams], dim=1).double()
        return tokens / tokens.abs().sum(dim=1, keepdim=True)

    now, then = shares(found), shares(expected)
    difference = (now - then).abs().amax(dim=1)
    return {
        "deviation": float(difference.max()),
        "deviation_of_largest": float((difference / then.abs().amax(dim=1)).max()),
    }


def explaining(subject: Subject, method: str) -> Callable[[], object]:
    """The whole of it: recorded forward, backward, method."""

    def explain():
        SOLVED.clear()  # of the same input, in the turn before
        needs = needs_of([METHODS[method]])
        trace, y = subject.trace(needs.rules)
        needs.differentiate(trace, y)
        trace.again = subject.again()
        return METHODS[method](trace)

    return explain


def explaining_naively(subject: Subject, way: str) -> Callable[[], object]:
    def explain():
        with naive.attention_written_out() as probabilities:
            trace, y = subject.trace()
            return NAIVE[way](trace, probabilities, y, subject.reads(trace))

    return explain


def show(results: dict) -> None:
    """The table of ratios."""
    table = Table(
        title="Divided by one forward and one backward to the input image (and to the words)",
        title_justify="left",
        caption="runs: of which the time is the median; × ours: against the method here that gives the same",
        caption_justify="left",
    )
    columns = ["model", "batch", "way", "time (s)", "time", "CPU time", "memory", "× ours", "runs"]
    rounded = any("deviation" in row for row in results["rows"]) and not results["settings"].get("compare")
    if rounded:
        columns.append("off float32")
        table.caption += "; off float32: largest difference of relevance that sums to 1"
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "way") else "right")
    previous = None
    for row in results["rows"]:
        if previous is not None and (row["model"], row["batch"]) != previous:
            table.add_section()
        previous = (row["model"], row["batch"])
        if "left_out" in row:
            table.add_row(row["model"], str(row["batch"]), row["way"], "left out", *[""] * (len(columns) - 4))
            continue
        slower, memory = row.get("times_slower_than_ours"), row.get("memory_ratio")
        table.add_row(
            row["model"], str(row["batch"]), row["way"], f"{row['median_s']:.3f}", f"{row['time_ratio']:.2f}",
            f"{row['cpu_time_ratio']:.2f}", "" if memory is None else f"{memory:.2f}",
            "" if slower is None else f"{slower:.1f}", str(row["runs"]),
            *([f"{row['deviation']:.1e}" if "deviation" in row else ""] if rounded else []),
        )  # fmt: skip
    out = console()
    out.print(table)
    for row in results["rows"]:
        if "left_out" in row:
            out.print(f"{row['model']}, batch {row['batch']}, {row['way']}: {row['left_out']}")
        if results["settings"].get("compare") and "deviation" in row:
            off = f"{row['deviation']:.1e} of the largest"
            out.print(f"{row['model']}, {row['way']}: the method here is off by {off}")
        if "resident_bytes" in row:
            grown = row["resident_bytes"] / 2**30
            out.print(f"{row['model']}, {row['way']}: {grown:.2f} GiB resident above the model")


def plot(results: dict, path: Path) -> Path:
    groups: dict[str, dict[str, tuple[float | None, ...]]] = {}
    for row in results["rows"]:
        if "time_ratio" in row and row["way"] != FLOOR:
            group = groups.setdefault(f"{row['model']}, batch {row['batch']}", {})
            group[row["way"].replace("_", " ")] = (row["time_ratio"], row.get("memory_ratio"))
    its = results["machine"]
    note = f"{its['name']}, {its['threads']} threads, {its['when'][:10]}, load {its['load']}"
    if results["settings"]["precision"] != "float32":
        note += f", {results['settings']['precision']}"
    headers = ("time ÷ one forward + backward", "peak memory ÷ the same")
    return ratio_chart(groups, headers, "What explanations cost", note, path)


def _expected_bytes(before: list[dict], model: str, way: str, batch: int) -> float:
    """Extrapolate the peak of memory from smaller batches of the same."""
    same = [r for r in before if r["model"] == model and r["way"] == way and "peak_bytes" in r]
    return same[-1]["peak_bytes"] * batch / same[-1]["batch"] if same else 0.0


def _resident_growth(name: str, batch: int, way: str, device: str, precision: str) -> int:
    """Measure the growth of memory in a process of its own: an earlier peak would hide this one."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_explain_once, (name, batch, way, device, precision, torch.get_num_threads()))


def _explain_once(name: str, batch: int, way: str, device: str, precision: str, threads: int) -> int:
    torch.set_num_threads(threads)
    subject = SUBJECTS[name](batch, torch.device(device))
    before = resident_bytes()
    _work(subject, way, precision)()
    return peak_resident_bytes() - before
