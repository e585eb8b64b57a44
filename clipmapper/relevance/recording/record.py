"""Record a forward pass of a model, neither modified nor copied, as an :class:`AttentionTrace`."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.relevance.modes import in_place_changes_named
from clipmapper.relevance.recording.capture import Call, Capture, Watched
from clipmapper.relevance.recording.chance import refuse_chance
from clipmapper.relevance.recording.families import refuse_capped_scores, sublayers_of, why_refused
from clipmapper.relevance.recording.step_by_step import fused_attention
from clipmapper.relevance.recording.streams import StreamGraph
from clipmapper.relevance.trace import AttentionTrace


def record(
    model: nn.Module, samples: Sequence[int] | None = None, rules: str = "plain"
) -> AbstractContextManager[AttentionTrace]:
    """Record the forward of ``model`` that is made inside the ``with`` block.

    ``with record(model) as trace: y = model(**inputs).logits[:, 3]``, then ``trace.backward(y)``, then
    ``weighted(trace)`` or another method. Fused attention stays on, gradients are on inside (whatever the
    caller has set), parameters take none, compiled models run as they were written. On leaving, no hook,
    patch or changed flag stays behind, also after an exception. ``samples``: identity of every sample of
    the batch, which seeds what is random. ``rules``: of the backward pass, one of ``backward_rules.RULES``;
    the forward's values are the same by all of them.

    *A model that knows its streams* has a method ``recorded(samples, rules)``, which takes the place of this
    function (CLIPmapper and the captioner do: :mod:`clipmapper.tasks.recording`).

    *Any other model* of which :mod:`clipmapper.relevance.recording.families` knows the attention sub-layers
    (see ``docs/recorder.md``): streams, and who reads whom, are found in the autograd graph. The row that is
    read is that of the final tokens that y's gradient reaches, unless ``trace.read_token`` says otherwise. To
    explain one part of a model, record that part: ``record(clip.visual)``.

    Raises ``RuntimeError`` when not every attention sub-layer that the model has was seen, and
    ``UserError`` for a model that cannot be followed; both name the module.
    """
    own = getattr(model, "recorded", None)
    return record_any(model, samples, rules) if own is None else own(samples, rules)


_HOW = "say where its input and its contribution are, as docs/recorder.md shows"


@contextmanager
def record_any(model: nn.Module, samples: Sequence[int] | None, rules: str) -> Iterator[AttentionTrace]:
    """See :func:`clipmapper.relevance.recording.record.record`."""
    root = getattr(model, "_orig_mod", model)  # of torch.compile
    trace, calls = AttentionTrace(rules=rules), []
    capture = Capture(root, sublayers_in(root), calls.append)
    with ExitStack() as stack:
        stack.enter_context(in_place_changes_named())
        stack.enter_context(fused_attention(capture.modules))
        grids = grids_seen(stack, capture.modules)
        stack.enter_context(capture(rules))
        _note_ends_of_blocks(stack, capture, calls)
        yield trace
        # While gradients are still on: finding the streams may take small backward passes.
        _complete(trace, capture, calls, root)
        trace.cut = trace.cut or capture.cuts.first
        trace.grid = grids[-1] if grids else patch_grid(root, capture.modules)
    trace.samples = samples


def _note_ends_of_blocks(stack: ExitStack, capture: Capture, calls: list[Call]) -> None:
    def end(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        last = next((call for call in reversed(calls) if call.watched.module is module), None)
        if last is not None:
            tokens = output[0] if isinstance(output, tuple) else output
            last.after = last.added_edge.turned(tokens)

    for module in {watched.module for watched in capture.watched if watched.kind.block}:
        stack.callback(module.register_forward_hook(end).remove)


def _complete(trace: AttentionTrace, capture: Capture, calls: list[Call], root: nn.Module) -> None:
    if capture.not_called:
        names = capture.not_called
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise RuntimeError(
            f"{len(names)} of {len(capture.watched)} attention sub-layers were not seen ({some}): make one "
            "whole forward inside `with record(model)`, or record just the part of the model that runs, "
            "e.g. record(model.visual)"
        )
    refuse_chance(root)
    graph = StreamGraph(trace, root)
    for call in calls:
        call.check_unchanged()
        graph.add(call)
    trace.image_stream = "image" if "image" in trace.inputs else None
    trace.text_stream = "text" if "text" in trace.inputs else None


def sublayers_in(root: nn.Module) -> list[Watched]:
    """All attention sub-layers of a model.

    Raises ``UserError`` when there is none, or one that can't be recorded, or one that seems to attend and
    is of no known family.
    """
    watched: list[Watched] = []
    covered = None  # the path that all of a known sub-layer's own modules begin with
    unknown: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        if covered is not None and name.startswith(covered):
            continue
        kinds = sublayers_of(module)
        for kind in kinds:
            cross = kind.before is not None and kind.context is not None and len(kinds) > 1
            watched.append(Watched(name + (", cross-attention" if cross else ""), module, kind))
        if kinds:
            covered = f"{name}." if name else ""  # (a module's are named right behind it)
            refuse_capped_scores(name, module)
        elif (why := why_refused(type(module))) is not None:
            raise UserError(f"{name or 'the model'}: {type(module).__name__} {why}")
        elif re.search(r"attention|attn", type(module).__name__, re.IGNORECASE):
            unknown[name] = module
    for name, module in unknown.items():
        if not any(w.name.startswith(f"{name}." if name else "") for w in watched):
            kind = type(module).__name__
            raise UserError(f"{name or 'the model'}: the recorder does not know {kind}; {_HOW}")
    if not watched:
        raise UserError(f"{type(root).__name__} has no attention that the recorder knows; {_HOW}")
    return watched


def grids_seen(stack: ExitStack, modules: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """Holds, after a forward, (rows, columns) of what each patch embedding gave, until ``stack`` is left.

    Images need not have the size that the model was made for (position embeddings can be interpolated).
    """
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append((output.shape[-2], output.shape[-1]))

    for module in modules:
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1):
            stack.callback(module.register_forward_hook(note).remove)
    return seen


def patch_grid(root: nn.Module, modules: Iterable[nn.Module]) -> tuple[int, int] | None:
    """(rows, columns) of the image patches of the size that the model was made for, where it says so."""
    for module in modules:
        size = vars(module).get("grid_size")
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    config = getattr(root, "config", None)
    config = getattr(config, "vision_config", config)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        return None
    rows, columns = ((n, n) if isinstance(n, int) else tuple(n) for n in (image, patch))
    return rows[0] // columns[0], rows[1] // columns[1]
