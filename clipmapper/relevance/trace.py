"""The one data structure of the relevance library: what happened at every attention sub-layer.

A trace is a small directed graph. Its nodes are *(stream, version)*: the tokens of a stream, in the state
in which they are after so many attention sub-layers. Its edges are attention sub-layers (:class:`Attention`)
and concatenations of streams (:class:`Join`). Every explanation method is a pure function of a trace.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from clipmapper.errors import UserError
from clipmapper.relevance.float16_gradients import Rescued, scaled_gradients
from clipmapper.relevance.modes import in_place_changes_named
from clipmapper.relevance.sublayer import Projection

_NO_GRADIENT = (
    "so gradient methods can't explain this model; those without a gradient (rollout, raw_attention, "
    "attention_flow, ...) can"
)
# "Not at all" is -inf, the most negative number or, in older code, -10000.
_FORBIDDEN = -9999


class Node(NamedTuple):
    """A stream's tokens after ``version`` attention sub-layers of that stream (0: as they entered)."""

    stream: str
    version: int


@dataclass(frozen=True)
class Edge:
    """A place in the autograd graph, where a recorded tensor was.

    It stays that place when the tensor is later changed in place. ``transposed``: the model counts tokens
    on the first axis there and samples on the second.
    """

    edge: GradientEdge | None = None  # None: the tensor has no graph
    transposed: bool = False

    @classmethod
    def of(cls, tensor: Tensor, transposed: bool = False) -> "Edge":
        return cls(get_gradient_edge(tensor) if tensor.requires_grad else None, transposed)

    def turned(self, tensor: Tensor) -> Tensor:
        """[batch, tokens, width], of the tensor that is there, or of its gradient."""
        return tensor.transpose(0, 1) if self.transposed else tensor


@dataclass(frozen=True)
class Entry:
    """Where the tokens of an input stream come in: the first argument of one call of a module.

    ``call`` counts the calls of this module in a forward. ``node``: what the first sub-layer there reads.
    ``places``: where the stream's tokens stand in it (-1: nowhere); None: it is nothing but them.
    """

    module: nn.Module
    call: int
    transposed: bool
    node: Node
    places: Int[Tensor, "batch _tokens"] | None = None


@dataclass
class Attention:
    """One attention sub-layer: the query stream reads the key stream and goes to its next version.

    Shapes: B samples, H heads, N query tokens, M key tokens, D head width, C model width.
    The gradients are those of the explained scalar and are there after :meth:`AttentionTrace.backward`;
    a tensor that does not reach the scalar has a zero gradient.
    """

    name: str
    query_node: Node
    key_node: Node
    output_node: Node
    query: Float[Tensor, "batch heads queries channels"]
    key: Float[Tensor, "batch heads keys channels"]
    value: Float[Tensor, "batch heads keys channels"]
    mixed: Float[Tensor, "batch heads queries channels"]  # o = A v, per head
    mask: Tensor | None  # added to the scores, or boolean with True where a query may read a key
    scale: float | None  # of the scores; None: 1 / √D
    causal: bool
    before: Float[Tensor, "batch queries width"]  # x: the query stream's tokens before the sub-layer
    added: Float[Tensor, "batch queries width"] | None  # a: what the sub-layer adds to them
    mixed_gradient: Tensor | None = None
    before_gradient: Tensor | None = None
    added_gradient: Tensor | None = None
    replaced: Tensor | None = None  # [batch, heads, queries, keys]: a matrix that stands in for A
    context: Tensor | None = None  # [batch, keys, width]: the tokens that are read, as given; None: `before`
    projection: Projection | None = None  # what is behind attention, where the recorder knows it
    after: Tensor | None = None  # [batch, queries, width]: the stream after the MLP that follows; None: none
    pools: bool = False  # nothing is before it: its queries are learned, and its output is `added` alone
    rounded: bool = False  # some of these were computed with less than float32
    # x + a, where the graph holds that and not a: then `added` is their difference, when first asked for.
    total: Float[Tensor, "batch queries width"] | None = None
    # Where mixed, before and added are in the graph; () when it is gone.
    edges: tuple[Edge, ...] = field(default=(), repr=False)
    # [batch]: what the gradients as stored were multiplied by, so that half precision holds them. None: 1.
    gradient_scale: Tensor | None = None

    @property
    def is_self(self) -> bool:
        return self.query_node == self.key_node

    def probabilities(self) -> Float[Tensor, "batch heads queries keys"]:
        """A, rebuilt from query, key and mask without autograd, or what stands in for it."""
        if self.replaced is not None:
            return self.replaced
        return attention_probabilities(self.query, self.key, self.mask, self.causal, self.scale)

    def allowed(self) -> Bool[Tensor, "..."]:
        """True where the mask lets a query read a key; broadcasts to the shape of A."""
        allowed = torch.ones(
            self.query.shape[2], self.key.shape[2], dtype=torch.bool, device=self.query.device
        )
        if self.causal:
            allowed = allowed.tril()
        if self.mask is not None:
            allowed = allowed & (self.mask if self.mask.dtype == torch.bool else self.mask > _FORBIDDEN)
        return allowed

    def probability_gradient(self) -> Float[Tensor, "batch heads queries keys"]:
        """∂y/∂A = ∂y/∂o · vᵀ: exact, since o = A v, and the same for any way of computing attention."""
        with torch.no_grad():
            product = exact(self._required("mixed_gradient")) @ exact(self.value.detach()).transpose(-2, -1)
        return product if self.gradient_scale is None else product / by_sample(self.gradient_scale, product)

    def _required(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{self.name}: no gradient yet; call trace.backward(y) before a gradient method")
        return value

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(∂y/∂x, ∂y/∂a), each [batch, queries, width]."""
        found = self._required("before_gradient"), self._required("added_gradient")
        if self.gradient_scale is None:
            return found
        before, added = (exact(g) / by_sample(self.gradient_scale, g) for g in found)
        return before, added


def _added(step: Attention) -> Tensor:
    if step._added is None:
        with torch.no_grad():
            step._added = step.total - step.before
        step.total = None
    return step._added


def _keep_added(step: Attention, added: Tensor | None) -> None:
    step._added = added


Attention.added = property(_added, _keep_added)


@torch.no_grad()
def attention_probabilities(
    query: Float[Tensor, "batch heads queries channels"],
    key: Float[Tensor, "batch heads keys channels"],
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Compute the A by which ``scaled_dot_product_attention`` mixes values, given the same arguments.

    A query that may read no key (padding on the left of a causal model) gets a row of zeros, as there.
    """
    query, key = exact(query.detach()), exact(key.detach())
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores.masked_fill_(~allowed, float("-inf"))
    if mask is not None:
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, float("-inf"))
        else:
            scores += mask
    torch.softmax(scores, dim=-1, out=scores)
    blind = blind_queries(mask)
    return scores if blind is None else scores.masked_fill_(blind, 0)


def blind_queries(mask: Tensor | None) -> Bool[Tensor, "*queries 1"] | None:
    """True for queries whose mask lets them read no key at all; None where there is none.

    Broadcasts to the shape of A. Only what is −inf counts: by the most negative number that is finite, which
    some models forbid keys with, a softmax over nothing else is uniform, and so is what the model computed.
    """
    if mask is None:
        return None
    reads = mask if mask.dtype == torch.bool else mask > float("-inf")
    blind = ~reads.any(dim=-1, keepdim=True)
    return blind if bool(blind.any()) else None


def by_sample(values: Float[Tensor, "batch"], like: Tensor) -> Tensor:
    """One number a sample, to be multiplied with ``like`` [batch, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


HALVES = (torch.float16, torch.bfloat16)


def exact(tensor: Tensor) -> Tensor:
    """Convert to float32 what is less: a softmax of bfloat16 scores would be off by parts in a hundred."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def gradients_of(
    y: Tensor, edges: Sequence[GradientEdge], trace: "AttentionTrace", keep_graph: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of ``y.sum()``, and per sample what they were multiplied by (None: nothing)."""
    halves = {tensor.dtype for step in trace.attention for tensor in (step.mixed, step.before)}
    half = torch.float16 in halves

    def run(scale: Tensor | None, largest_at_first: float = 1.0) -> tuple[list[Tensor | None], float]:
        with torch.inference_mode(False), torch.enable_grad():
            scaled = y
            if trace.rules == "lrp":
                # The relevance that is passed on is 1 (Chefer et al.'s one-hot vector), not y.
                scaled = y / y.detach()
            if scale is not None:
                scaled = scaled * scale.to(scaled.dtype).view_as(scaled)
            total = scaled.sum()
        recorded = {edge.node for edge in edges}
        # (Backward rules are code of ours that autocast would reach, where the caller is inside it.)
        with torch.autocast(trace.device.type, enabled=False), in_place_changes_named():
            if scale is None:
                found = torch.autograd.grad(total, edges, allow_unused=True, retain_graph=keep_graph)
                return list(found), 1.0
            with Rescued(y, recorded, largest_at_first) as rescued:
                found = torch.autograd.grad(total, edges, allow_unused=True, retain_graph=True)
            return list(found), rescued.factor

    if not half:
        return run(None)[0], None

    def largest(gradient: Tensor) -> Tensor | None:
        """For each sample; models that count tokens first have samples on their second axis."""
        if y.ndim == 0:
            return gradient.abs().amax()[None]
        axis = 0 if gradient.shape[0] == len(y) else 1
        return gradient.abs().transpose(0, axis).flatten(1).amax(dim=1)

    found, scale = scaled_gradients(run, y.numel(), trace.device, largest)
    return found, scale.expand(trace.batch)


def factors(
    times: Float[Tensor, "*batch"] | None, scale: Float[Tensor, "_"] | None, steps: Sequence[Attention]
) -> tuple[Float[Tensor, "*batch"] | None, Float[Tensor, "..."] | None]:
    """What gradients are multiplied by at once, and what they are too large by (``gradient_scale``).

    Half precision can't hold what ``times`` makes of them: there it is left to whoever reads them in float32.
    """
    if times is None or not any(t.dtype in HALVES for step in steps for t in (step.mixed, step.before)):
        return times, scale
    # (A factor of 0 leaves nothing; divided by, it would be infinite.)
    size = (1.0 if scale is None else scale) / times.clamp(min=torch.finfo(times.dtype).tiny)
    return None, size


def multiplied(gradient: Float[Tensor, "batch *rest"], times: Float[Tensor, "*batch"] | None) -> Tensor:
    """The gradient itself for None; otherwise each sample's multiplied by its factor."""
    return gradient if times is None else gradient * by_sample(times.to(gradient.dtype), gradient)


_NUMBERS = (
    "query", "key", "value", "mixed", "before", "added", "mixed_gradient", "before_gradient",
    "added_gradient", "context", "after", "replaced",
)  # fmt: skip


_GRADIENTS = {"mixed_gradient", "before_gradient", "added_gradient"}
_ATTENDING = ("query", "key", "value", "mixed_gradient", "replaced")


def exact_step(step: Attention, *, only_attention: bool = False) -> Attention:
    """The sub-layer with all its numbers as float32 where they are less; itself where none is.

    ``only_attention``: those alone that attention and its gradient are rebuilt from.

    A model in half precision, or under autocast (which mixes both), rounds what it computes; what is made of
    that here does not round again. For one sub-layer at a time: all of them would take twice the memory.
    """
    names = _ATTENDING if only_attention else _NUMBERS
    found = {name: value for name in names if (value := getattr(step, name)) is not None}
    if not any(value.dtype in HALVES for value in found.values()):
        return step
    scale = step.gradient_scale
    if scale is not None:  # of all three alike, whichever were asked for
        found |= {name: value for name in _GRADIENTS if (value := getattr(step, name)) is not None}
    with torch.no_grad():
        numbers = {name: exact(value) for name, value in found.items()}
        if scale is not None:
            for name in _GRADIENTS & numbers.keys():
                numbers[name] = numbers[name] / by_sample(scale, numbers[name])
        return replace(step, **numbers, rounded=True, gradient_scale=None)


@dataclass(frozen=True)
class Join:
    """``output`` is the concatenation of ``parts`` along the token axis, in order.

    With ``index`` it is only so many tokens of that concatenation, in that order (the same for all samples
    in one row, or a row for each): what a model selects, inserts or leaves behind.
    """

    output: Node
    parts: tuple[Node, ...]
    index: Int[Tensor, "rows tokens"] | None = field(default=None, compare=False)

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Values of the output's tokens [batch, tokens, ...], from those of the parts' tokens."""
        joined = torch.cat(list(parts), dim=1)
        if self.index is None:
            return joined
        rows = max(joined.shape[0], self.index.shape[0])  # one row may stand for all samples
        joined, index = joined.expand(rows, *joined.shape[1:]), self.index.expand(rows, -1).to(joined.device)
        return joined[torch.arange(rows, device=joined.device)[:, None], index]

    def spread(
        self, row: Float[Tensor, "batch rows tokens"], lengths: Sequence[int]
    ) -> list[Float[Tensor, "batch rows _part"]]:
        """The other way: a row over the output's tokens as rows over the parts' (of these lengths)."""
        if self.index is not None:
            index = self.index.to(row.device)[:, None].expand(row.shape)
            row = row.new_zeros(*row.shape[:2], sum(lengths)).scatter_add(2, index, row)
        return list(row.split(list(lengths), dim=-1))


@dataclass
class AttentionTrace:
    """Everything an explanation method needs of one forward (and one backward) of a batch.

    Attributes
    ----------
    steps : sub-layers and joins in the order in which they ran.
    lengths : number of tokens of every stream.
    valid : per stream, False at padding; a stream without padding may be left out.
    inputs : the streams that are inputs (relevance is read at their version 0).
    read : the node whose row is read, and for every sample the position of that row (or Float[batch, tokens],
        weights of several rows, for what averages tokens). None: ``backward`` finds what y reads.
    also_read : more of the same, for a y that reads several streams (both towers of a CLIP).
    image_stream, text_stream : which inputs they are, where there are such.
    grid : (rows, columns) of image patches; the tokens before them are prefix tokens (the class token).
    samples : identity of every sample, which seeds what is random about it.
    rules : by which the backward was made (:mod:`clipmapper.relevance.backward.rules`).
    entries : where every input stream's tokens come in, as far as others can be put in their place.
    again : the same forward, for methods that run the model more than once.
    cut : which module passes no gradient, where the recorder has noticed one.
    """

    steps: list[Attention | Join] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)
    valid: dict[str, Bool[Tensor, "batch _tokens"]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    read: tuple[Node, Tensor] | None = None
    also_read: tuple[tuple[Node, Tensor], ...] = ()
    image_stream: str | None = None
    text_stream: str | None = None
    grid: tuple[int, int] | None = None
    samples: Sequence[int] | None = None
    rules: str = "plain"
    entries: dict[str, Entry] = field(default_factory=dict)
    again: Any = None  # clipmapper.relevance.rerun.Again, which needs this module
    cut: str | None = None
    _read_was_found: bool = False
    _explained: weakref.ref | None = None

    @property
    def explained(self) -> Tensor | None:
        """The y of the last backward, as long as the caller has it."""
        return None if self._explained is None else self._explained()

    @property
    def reads_what_y_reads(self) -> bool:
        """Nobody has said which row is read, so the backward finds it."""
        return self.read is None or self._read_was_found

    @property
    def attention(self) -> list[Attention]:
        return [step for step in self.steps if isinstance(step, Attention)]

    @property
    def batch(self) -> int:
        return self.attention[0].query.shape[0]

    @property
    def device(self) -> torch.device:
        return self.attention[0].query.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of relevance: the model's, but not less than float32."""
        return torch.promote_types(self.attention[0].before.dtype, torch.float32)

    def padding_free(self, stream: str) -> Bool[Tensor, "batch tokens"]:
        """True at the tokens of a stream that are not padding."""
        if stream in self.valid:
            return self.valid[stream]
        return torch.ones(self.batch, self.lengths[stream], dtype=torch.bool, device=self.device)

    def backward(
        self,
        y: Float[Tensor, "*batch"],
        keep_graph: bool = False,
        times: Float[Tensor, "*batch"] | None = None,
    ) -> None:
        """The one backward: gradients of ``y.sum()`` at every sub-layer (samples do not interact).

        ``keep_graph``: another scalar of the same forward (the next word of a caption) may follow; its
        gradients take the place of these. The last one goes without, and lets go of the graph. ``times``:
        what each sample's gradients are multiplied by behind the model
        (:mod:`clipmapper.relevance.explained_scalar`).

        In float16 it is made of y as often and as large as the gradients need (``Attention.gradient_scale``).

        Raises ``ValueError`` when ``y`` depends on nothing that was recorded, or is not one number a sample,
        and ``UserError`` where a part of the model passes no gradient, or y has none but 0.
        """
        if y.ndim > 1 or (y.ndim == 1 and len(y) != self.batch):
            shape = tuple(y.shape)
            raise ValueError(f"y has shape {shape}: one number a sample is explained, [{self.batch}]")
        self.require_gradient(y)
        edges = [edge for step in self.attention for edge in step.edges if edge.edge is not None]
        if not edges:
            raise RuntimeError("the graph is gone: backward(y, keep_graph=True) lets another one follow")
        explained = weakref.ref(y)
        found, scale = gradients_of(y, [edge.edge for edge in edges], self, keep_graph)
        times, scale = factors(times, scale, self.attention)
        gradients = {id(edge): gradient for edge, gradient in zip(edges, found, strict=True)}
        self._check_reached([gradients.get(id(edge)) for step in self.attention for edge in step.edges])
        for step in self.attention:
            recorded = (step.mixed, step.before, step.added)
            step.mixed_gradient, step.before_gradient, step.added_gradient = (
                torch.zeros_like(tensor)
                if gradients.get(id(edge)) is None
                else multiplied(edge.turned(gradients[id(edge)]), times)
                for tensor, edge in zip(recorded, step.edges, strict=True)
            )
            step.gradient_scale = None if scale is None else scale.expand(self.batch)
        self._explained = explained
        if self.reads_what_y_reads:
            self._find_read()
        if not keep_graph:
            self.release_graph()

    def require_gradient(self, y: Tensor) -> None:
        """Raises ``UserError`` that names the module where the model passes no gradient, and ``ValueError``
        where y has nothing to do with the recorded forward."""
        self.require_no_cut()
        if not y.requires_grad:
            raise ValueError("y does not depend on the recorded forward: run the model inside the recorder")

    def require_no_cut(self) -> None:
        """Raises ``UserError`` that names the module where the model passes no gradient."""
        if self.cut is not None:
            raise UserError(f"{self.cut}, {_NO_GRADIENT}")

    def _check_reached(self, gradients: Sequence[Tensor | None]) -> None:
        """Raises where no gradient arrives (None) at what others, at which it does, are made of."""
        if all(gradient is None for gradient in gradients):
            raise ValueError("y depends on nothing that was recorded: run the model inside the recorder")
        made: dict[Node, tuple[str, bool]] = {}
        for number, step in enumerate(self.attention):
            _, before, added = gradients[3 * number : 3 * number + 3]
            name, arrives = made.get(step.query_node, ("", True))
            if not arrives and before is not None and bool(before.any()):
                raise UserError(
                    f"the gradient stops between {name} and {step.name}: something there passes none (a "
                    f"detach, a function with a backward of its own), {_NO_GRADIENT}"
                )
            made[step.output_node] = (step.name, added is not None)

    def _find_read(self) -> None:
        """Find what y reads: the final tokens that its gradient reaches, all alike where they are several.

        Raises ``UserError`` where it reaches none.
        """
        # (All at once: each number that is asked of a GPU waits for everything before it.)
        flags = torch.stack([step.added_gradient.any().to(self.device) for step in self.attention])
        reaching = {
            step.output_node for step, reaches in zip(self.attention, flags.tolist(), strict=True) if reaches
        }
        if not reaching:
            raise UserError("y has a gradient of 0 at every token (is it constant, or a probability of 1?)")
        active = {node.stream for node in reaching}
        # A final state that another stream reads is not read by y itself, if that stream reaches y.
        consumed = set()
        for step in self.steps:
            if isinstance(step, Join):
                readers = {
                    s.query_node.stream for s in self.attention if s.key_node.stream == step.output.stream
                }
                if readers & active:
                    consumed.update(step.parts)
            elif not step.is_self and step.output_node in reaching:
                consumed.add(step.key_node)
        last = {step.output_node.stream: step for step in self.attention}
        found = []
        for step in last.values():
            if step.output_node in consumed or step.output_node not in reaching:
                continue
            reached = (step.added_gradient != 0).any(dim=-1)
            if bool((reached.sum(dim=1) == 1).all()):
                found.append((step.output_node, reached.int().argmax(dim=1)))
            else:
                share = reached.to(self.dtype)
                found.append((step.output_node, share / share.sum(dim=1, keepdim=True).clamp(min=1)))
        self.read, self._read_was_found = (found[0] if found else None), True
        self.also_read = tuple(found[1:])

    def release_graph(self) -> None:
        """Let go of the autograd graph; what was recorded stays as plain tensors."""
        for step in self.attention:
            step.edges = ()
            for name in ("query", "key", "value", "mixed", "before", "added"):
                setattr(step, name, getattr(step, name).detach())
            for name in ("after", "context"):
                value = getattr(step, name)
                setattr(step, name, None if value is None else value.detach())

    def read_token(self, stream: str, position: Int[Tensor, "batch"]) -> None:
        """Set ``read`` to the row of an input stream's token, in the node whose row was to be read.

        ``position`` counts in the input stream, whatever streams it has been joined with since. Raises
        ``ValueError`` when the node that is read holds no token of that stream, or not this one.
        """
        node = self._last_holding(stream) if self.reads_what_y_reads else self.read[0]
        places = self.places(stream, node.stream).to(position.device)
        found = places[torch.arange(len(position), device=position.device), position]
        if (found < 0).any():
            raise ValueError(f"stream {node.stream!r} does not hold all these tokens of {stream!r}")
        self.read, self.also_read, self._read_was_found = (node, found), (), False

    def _last_holding(self, stream: str) -> Node:
        """The last state of the last stream that holds tokens of ``stream``."""
        for step in reversed(self.attention):
            if bool((self.places(stream, step.output_node.stream) >= 0).any()):
                return step.output_node
        raise ValueError(f"no stream {stream!r}; those that are inputs: {', '.join(self.inputs)}")

    def places(self, stream: str, holder: str) -> Int[Tensor, "batch _tokens"]:
        """Where the tokens of ``stream`` stand in the stream ``holder``; -1 for those that do not."""
        if stream not in self.lengths:
            raise ValueError(f"no stream {stream!r}; those that are inputs: {', '.join(self.inputs)}")
        batch, length = self.batch, self.lengths[stream]
        if stream == holder:
            return torch.arange(length, device=self.device).expand(batch, -1)
        places = torch.full((batch, length), -1, device=self.device)
        for join in self.steps:
            # (Not where a stream only goes to its next version, as method.from_layer lets it.)
            if isinstance(join, Join) and join.output.stream == holder != join.parts[0].stream:
                inner = [self._numbered(stream, part.stream) for part in join.parts]
                tokens = join.gather(inner)
                row, place = (tokens >= 0).nonzero(as_tuple=True)
                places[row, tokens[row, place]] = place
        return places

    def _numbered(self, stream: str, holder: str) -> Int[Tensor, "batch _tokens"]:
        """For every token of ``holder``: which token of ``stream`` it is, -1 if none."""
        numbered = torch.full((self.batch, self.lengths[holder]), -1, device=self.device)
        places = self.places(stream, holder)
        row, number = (places >= 0).nonzero(as_tuple=True)
        numbered[row, places[row, number]] = number
        return numbered

    @property
    def reads(self) -> list[tuple[Node, Tensor]]:
        """``read`` and ``also_read``. Raises ``ValueError`` when nothing is read."""
        if self.read is None:
            raise ValueError(
                "the trace does not say which token's row is read: set trace.read, by "
                "trace.read_token(stream, position) or by trace.backward(y), which finds what y reads"
            )
        return [self.read, *self.also_read]

    def read_row(self) -> Mapping[Node, Float[Tensor, "batch 1 _tokens"]]:
        """Row at the read tokens, one-hot where it is one: where relevance starts on its way back."""
        rows = {}
        for node, position in self.reads:
            row = torch.zeros(self.batch, 1, self.lengths[node.stream], dtype=self.dtype, device=self.device)
            if position.is_floating_point():
                row[:, 0] = position
            else:
                row.scatter_(2, position.to(self.device)[:, None, None], 1.0)
            rows[node] = row
        return rows
