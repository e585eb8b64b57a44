"""Record the attention sub-layers of a forward from outside: no model is modified or copied.

A hook where a sub-layer's input is, a hook where what it adds is, and ``scaled_dot_product_attention``
replaced for a while by itself with a memory. Every call of a sub-layer is recorded by itself, so that
weights that are used twice in a forward give two records.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.relevance.backward.rules import backward_rules
from clipmapper.relevance.modes import without_parameter_gradients
from clipmapper.relevance.recording.sample_axis import note_sample_axis
from clipmapper.relevance.recording.step_by_step import (
    GradientCuts,
    softmax_noticed,
    without_checkpointing,
    without_weights,
)
from clipmapper.relevance.sublayer import Sublayer
from clipmapper.relevance.trace import Attention, Edge, Entry, Node


@dataclass(eq=False)
class Watched:
    """A sub-layer of the model at hand, and how it is called in messages."""

    name: str
    module: nn.Module
    kind: Sublayer

    @property
    def tokens_first(self) -> bool:
        return self.kind.tokens_first(self.module)


@dataclass(eq=False)
class Call:
    """One run of a watched sub-layer; tensors as in :class:`clipmapper.relevance.trace.Attention`."""

    watched: Watched
    given: tuple[Tensor, ...] = ()  # the tokens before the sub-layer as they came, and as they went on
    before: Tensor | None = None  # None: nothing is added to it (attention that pools)
    before_edge: Edge | None = None
    context: Tensor | None = None  # the tokens that are read; None: its own
    context_edge: Edge | None = None
    read_as: Tensor | None = None  # the same as it came
    added: Tensor | None = None  # None again when `total` takes its place
    total: Tensor | None = None
    shape: torch.Size | None = None  # of added
    added_edge: Edge | None = None
    mixed_edge: Edge | None = None
    attention: dict = field(default_factory=dict)
    after: Tensor | None = None  # the stream after the block, where the module is one
    fresh: bool = False  # its tokens came without a graph, which starts here
    begun_at: nn.Module | None = None  # the module that got the tokens before the sub-layer ...
    number: int = 0  # ... in its call of this number
    record: Attention | None = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list)  # how often each was changed in place

    def keep_unchanged(self, tensor: Tensor) -> None:
        """The tensor is read when the forward is over."""
        if not tensor.is_inference():
            self.versions.append((tensor, tensor._version))

    def check_unchanged(self) -> None:
        """Raises ``UserError`` where the model has changed in place what the trace is to hold as it was."""
        if any(tensor._version != version for tensor, version in self.versions):
            raise UserError(
                f"{self.watched.name or 'the model'}: the tokens that it reads are changed in place "
                "afterwards (x += ...), and a trace needs them as they were; write x = x + ..."
            )

    def entry(self, node: Node, places: Tensor | None = None) -> Entry:
        """Where these tokens come in."""
        return Entry(self.begun_at, self.number, self.watched.tokens_first, node, places)

    def as_attention(self, query_node: Node, key_node: Node, output_node: Node) -> Attention:
        """The record of this call, in its place in the graph of streams."""
        # With nothing before it, a sub-layer weighs only what it adds: α = 0.
        before = torch.zeros_like(self.added).detach() if self.before is None else self.before
        self.record = Attention(
            name=self.watched.name,
            query_node=query_node,
            key_node=key_node,
            output_node=output_node,
            before=before,
            added=self.added,
            total=self.total,
            pools=self.before is None,
            context=self.context,
            after=self.after,
            projection=self.watched.kind.projected(self.watched.module),
            edges=(self.mixed_edge, self.before_edge or Edge(), self.added_edge),
            **self.attention,
        )
        return self.record

    def keep_total(self, total: Tensor) -> None:
        """Keep x + a in place of a."""
        total = self.before_edge.turned(total)
        self.added, self.total = None, total
        if self.record is not None:
            self.record.added, self.record.total = None, total


class Capture:
    """Records calls in the order in which they end, and gives each to ``on_call``."""

    def __init__(
        self,
        model: nn.Module,
        watched: Iterable[Watched],
        on_call: Callable[[Call], None],
        *,
        all_known: bool = False,
    ) -> None:
        """``all_known``: attention that is not watched is no mistake."""
        self.model = model
        self.modules = list(model.modules())  # once: to walk through a model takes its time
        self.watched = list(watched)
        self.called: set[int] = set()
        self.cuts = GradientCuts(model)
        self._on_call, self._all_known = on_call, all_known
        self._running: list[Call] = []
        self._begun: Counter[int] = Counter()
        self._borrowed: list[Tensor] = []
        self._last: Call | None = None  # the last one that has ended
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}
        self._places: list[tuple[Edge, bool]] = []

    @property
    def not_called(self) -> list[str]:
        return [watched.name for watched in self.watched if id(watched) not in self.called]

    @contextmanager
    def __call__(self, rules: str) -> Iterator[None]:
        """Within: hooks in place, gradients on, by these backward rules, parameters without, fused attention
        remembered."""
        with ExitStack() as stack:
            stack.callback(self._give_back)
            for watched in self.watched:
                self._watch(stack, watched)
            self.cuts.watch(stack, self.modules)
            stack.enter_context(without_checkpointing())
            for module in self.modules:
                if "norm" in type(module).__name__.lower():
                    stack.callback(module.register_forward_pre_hook(self._normed).remove)
            stack.enter_context(without_parameter_gradients(self.modules))
            stack.enter_context(torch.inference_mode(False))  # in it no graph can be recorded
            stack.enter_context(torch.enable_grad())
            stack.enter_context(without_weights(self.modules))
            if not self._all_known:
                stack.enter_context(softmax_noticed(self._refuse_softmax))
            original = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = self._remembering(original)
            stack.callback(setattr, F, "scaled_dot_product_attention", original)
            mode = stack.enter_context(backward_rules(rules))
            yield
            if mode is not None:
                note_sample_axis(mode.additions, self._places)

    def _watch(self, stack: ExitStack, watched: Watched) -> None:
        kind = watched.kind

        def at(path: str) -> nn.Module:
            return watched.module.get_submodule(path) if path else watched.module

        begin = at(kind.before or "")
        handles = [
            begin.register_forward_pre_hook(
                lambda module, args, kwargs: self._begin(watched, module, args, kwargs),
                with_kwargs=True,
                prepend=True,
            )
        ]
        if kind.context is not None:
            handles.append(
                at(kind.context_at).register_forward_pre_hook(
                    lambda module, args, kwargs: self._context(watched, module, args, kwargs),
                    with_kwargs=True,
                )
            )
        handles.append(
            at(kind.added).register_forward_hook(lambda module, args, output: self._end(watched, output))
        )
        for handle in handles:
            stack.callback(handle.remove)

    def _begin(self, watched: Watched, module: nn.Module, args: tuple, kwargs: dict):
        call = Call(watched, begun_at=module, number=self._begun[id(watched)])
        self._begun[id(watched)] += 1
        self._running.append(call)
        if watched.kind.before is None:
            return None
        before = given = argument(module, args, kwargs, None)
        if not before.requires_grad:
            # The graph starts here: what is before the first sub-layer (embeddings) needs no backward.
            call.fresh = True
            if before.is_inference():
                self.cuts.note(watched.name, type(watched.module).__name__)
            elif watched.kind.adds_outside:
                before.requires_grad_()
                self._borrowed.append(before)
            else:
                before = before.detach().requires_grad_()
        call.given = (given, before)
        call.before_edge = Edge.of(before, watched.tokens_first)
        call.before = call.before_edge.turned(before)
        call.keep_unchanged(before)
        return None if before is given else replaced(module, args, kwargs, before)

    def _context(self, watched: Watched, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._running and self._running[-1].watched is watched:
            call = self._running[-1]
            context = argument(module, args, kwargs, watched.kind.context)
            if context is None or any(context is own for own in call.given):
                return
            call.context_edge = Edge.of(context, watched.tokens_first)
            call.context, call.read_as = call.context_edge.turned(context), context
            call.keep_unchanged(context)

    def _end(self, watched: Watched, output: Tensor | tuple) -> Tensor | tuple | None:
        if watched.kind.again and not (self._running and self._running[-1].watched is watched):
            return None
        call = self._running.pop()
        if call.watched is not watched:
            raise RuntimeError(f"{call.watched.name}: has not ended when {watched.name} does")
        if not call.attention:
            raise RuntimeError(
                f"{watched.name}: no call of torch.nn.functional.scaled_dot_product_attention was seen; "
                "a trace needs attention that runs through it (in timm: set TIMM_FUSED_ATTN=1; in "
                'transformers: attn_implementation="sdpa"; see docs/recorder.md for attention of your own)'
            )
        added = output[0] if isinstance(output, tuple) else output
        # The model gets a copy: to a view of what another operator has made (every linear layer's output is
        # one) it could not add in place without this place in the graph being lost.
        given = added.clone() if added.requires_grad and type(output) in (Tensor, tuple) else added
        call.added_edge = Edge.of(given, watched.tokens_first)
        call.added = call.added_edge.turned(added)
        call.shape = call.added.shape
        mixed = call.attention["mixed"]
        call.mixed_edge = Edge.of(mixed)
        if call.added_edge.edge is None or call.mixed_edge.edge is None:
            self.cuts.note(watched.name, type(watched.module).__name__)
        self.called.add(id(watched))
        edges = (call.before_edge, call.added_edge)
        self._places += [(edge, watched.tokens_first) for edge in edges if edge is not None]
        self._on_call(call)
        self._last = call
        if given is added:
            return None
        return (given, *output[1:]) if isinstance(output, tuple) else given

    def _normed(self, module: nn.Module, args: tuple) -> None:
        """A norm keeps what it is given for its backward: if that is x + a, a need not be kept as well.

        (A twelfth of all that is kept, in a block of a ViT.) Not in half precision, in which the difference
        of x + a and x is not a.
        """
        call, self._last = self._last, None
        if call is None or call.before_edge is None or not args or not isinstance(args[0], Tensor):
            return
        total, before, added = args[0], call.before_edge.edge, call.added_edge.edge
        function = total.grad_fn
        if function is None or before is None or added is None or function.name() != "AddBackward0":
            return
        summands = {(before.node, before.output_nr), (added.node, added.output_nr)}
        plain = set(function.next_functions) == summands and function._saved_alpha == 1
        exact = total.dtype in (torch.float32, torch.float64) and call.added.dtype == total.dtype
        if plain and exact and call.before.dtype == total.dtype and not _same_memory(total, call.before):
            call.keep_total(total)

    def _remembering(self, original: Callable) -> Callable:
        """``scaled_dot_product_attention``, remembering its inputs and output for the running sub-layer."""

        def recorded(
            query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
        ):
            mixed = original(
                query,
                key,
                value,
                attn_mask=self._added_to_scores(attn_mask, query),
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                **({"enable_gqa": True} if enable_gqa else {}),
            )
            call = self._running[-1] if self._running else None
            if call is None:
                if not self._all_known:
                    self._refuse_unknown()
                return mixed
            if call.attention:
                raise RuntimeError(f"{call.watched.name}: attends twice; a sub-layer is one attention")
            if dropout_p:
                raise RuntimeError(
                    f"{call.watched.name}: drops out attention, which cannot be rebuilt; call model.eval()"
                )
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = (t.repeat_interleave(groups, dim=1) for t in (key.detach(), value.detach()))
            call.attention.update(
                query=query,
                key=key,
                value=value,
                mixed=mixed,
                mask=attn_mask,
                scale=scale,
                causal=is_causal,
            )
            return mixed

        return recorded

    def _refuse_softmax(self) -> None:
        if not self._running:
            self._refuse_unknown()

    def _added_to_scores(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """A boolean mask of queries × keys as numbers, made once for all layers that are given it.

        Torch would make them in each layer, and keep each for the backward: N × N numbers a layer.
        """
        if mask is None or mask.dtype != torch.bool or mask.ndim < 2 or mask.shape[-2] == 1:
            return mask
        if id(mask) not in self._masks:
            numbers = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
            self._masks[id(mask)] = (mask, numbers.masked_fill_(~mask, float("-inf")))
        return self._masks[id(mask)][1].to(query.dtype)

    def _refuse_unknown(self) -> None:
        """Attention outside every watched sub-layer: an error if it is the model's."""
        names = {id(module): name for name, module in self.model.named_modules()}
        frame = inspect.currentframe()
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in names:
                raise RuntimeError(
                    f"{names[id(module)] or 'the model'}: {type(module).__name__} attends in no sub-layer "
                    "that the recorder knows; say where its input and its contribution are, "
                    "as docs/recorder.md shows"
                )
            frame = frame.f_back

    def _give_back(self) -> None:
        self._masks.clear()
        self._places.clear()
        for tensor in self._borrowed:
            tensor.requires_grad_(False)


def _same_memory(first: Tensor, second: Tensor) -> bool:
    """Was the one made from the other in place?"""
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def argument(module: nn.Module, args: tuple, kwargs: dict, name: str | None) -> Tensor | None:
    """The argument of that name of a call of the module (None: the first one)."""
    names = _arguments(type(module))
    place = 0 if name is None else names.index(name)
    return args[place] if place < len(args) else kwargs.get(names[place])


def replaced(module: nn.Module, args: tuple, kwargs: dict, first: Tensor) -> tuple[tuple, dict]:
    """The arguments of a call with another first one."""
    if args:
        return (first, *args[1:]), kwargs
    return args, {**kwargs, _arguments(type(module))[0]: first}


@functools.cache
def _arguments(kind: type[nn.Module]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]
