"""Find which tokens an attention sub-layer reads and changes, in the autograd graph of the forward.

Between two attention sub-layers a token goes its own way (norms, MLPs): walking back from a sub-layer's
input, the first recorded tensors met say in which state of which stream it is. Where streams are joined, or
tokens selected, a few backward passes through just that piece of the graph measure which token went where.
"""

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipmapper.errors import UserError
from clipmapper.relevance.backward.rule import kind_of
from clipmapper.relevance.recording.capture import Call, Watched
from clipmapper.relevance.recording.tokenwise import leaves_tokens
from clipmapper.relevance.trace import Attention, AttentionTrace, Edge, Join, Node

_WORDS = (("image", r"vision|visual|image|vit|dino"), ("text", r"text|language|gpt|bert|llama"))

# Towers of transformers, recorded alone. (Speech2Text is none.)
_TOWERS = (
    ("image", r"Vision(Model|Transformer|Tower)"),
    ("text", r"(?<!2)Text(Model|Transformer)"),
)


def stream_name(watched: Watched, root: nn.Module) -> str:
    """image, text, encoder, decoder ...: of the family's line, or from the names on the module's path."""
    path = watched.name.split(",")[0]
    for part, name in watched.kind.streams.items():
        if part in path:
            return name
    named = _by_path(path)
    if named is not None:
        return named
    kinds = [type(root).__name__]
    for end in range(1, len(path.split("."))):
        kinds.append(type(root.get_submodule(".".join(path.split(".")[:end]))).__name__)
    for kind in reversed(kinds):
        for name, words in _TOWERS:
            if re.search(words, kind):
                return name
    for name in ("decoder", "encoder"):
        if name in path:
            return name
    # A text transformer unpacked into CLIP itself, or one tower recorded alone.
    for kind in reversed(kinds):
        for name, words in (*_WORDS, ("text", r"CLIP|CoCa")):
            if re.search(words, kind, re.IGNORECASE if words != r"CLIP|CoCa" else 0):
                return name
    return "tokens"


@functools.cache
def _by_path(path: str) -> str | None:
    for name, words in _WORDS:
        if re.search(words, path, re.IGNORECASE):
            return name
    return None


_BLOCK = re.compile(r"(.*?)\b(\d+)\b(?!.*\b\d+\b)")


def _list_of(name: str) -> tuple[str, int] | None:
    """Split a block's name into what is before its last number, and that number."""
    found = _BLOCK.match(name)
    return None if found is None else (found[1], int(found[2]))


Place = tuple[object, int]  # a node of the autograd graph and which of its outputs


def _place(edge: Edge) -> Place | None:
    return None if edge.edge is None else (edge.edge.node, edge.edge.output_nr)


class StreamGraph:
    """Puts recorded calls, one after the other, into a trace."""

    def __init__(self, trace: AttentionTrace, root: torch.nn.Module) -> None:
        self.trace = trace
        self._root = root
        self._known: dict[Place, Node] = {}  # where in the graph a state of a stream is, in part or whole
        self._source: dict[Node, Edge] = {}  # a place that a state's gradient passes
        self._resolved: dict[Place, Node] = {}
        self._without_graph: dict[int, tuple[Tensor, Node]] = {}
        self._made: dict[Node, Attention] = {}
        self._batch: int | None = None
        # By what is before the number in a block's name: its last block, the state it made and their shape.
        self._left: set[Node] = set()
        self._last_in_list: dict[tuple[str, int] | None, tuple[str, Node, torch.Size]] = {}

    def add(self, call: Call) -> None:
        """Raises ``UserError`` for tokens of which it can't be said which earlier ones they are."""
        name, trace = call.watched.name, self.trace
        own_name = stream_name(call.watched, self._root)
        if call.before is None:
            query = self._new_stream(own_name, call.added)
        else:
            query = self._continued(call) or self._resolve(
                call.before, call.before_edge, call.before, name, own_name
            )
        if call.context is None:
            key = query
        else:
            key = self._resolve(call.context, call.context_edge, call.read_as, name, "context")
        output = Node(query.stream, query.version + 1)
        if output in self._source:
            raise UserError(
                f"{name}: a second attention sub-layer that changes the same state of its tokens "
                f"({query.stream}, {query.version}); sub-layers side by side can't be recorded"
            )
        self._check(call, query, key)
        if call.before is not None:
            self._known.setdefault(_place(call.before_edge), query)
            self._source.setdefault(query, call.before_edge)
        self._known[_place(call.added_edge)] = output
        self._source[output] = call.added_edge
        step = call.as_attention(query, key, output)
        if query in self._made and call.before is not None:
            self._made[query].after = call.before  # what is between two sub-layers of a stream is the MLP
        self._made[output] = step
        self._last_in_list[_list_of(name)] = (name, output, call.shape)
        trace.steps.append(step)
        self._enter(step, call)
        if step.is_self:
            self._note_padding(step)

    def _continued(self, call: Call) -> Node | None:
        """The state that a block goes on with though its tokens came without a graph; None for an input.

        A stream that begins in the middle of a row of blocks is the one that left the block before: the
        model has cut its gradient there (as by ``detach()``). Methods without a gradient need not care.
        """
        found = _list_of(call.watched.name)
        if not call.fresh or found is None or found[1] == 0:
            return None
        before = self._last_in_list.get((found[0], found[1] - 1))
        if before is None or before[2] != call.before.shape or before[1] in self._left:
            return None
        name, node, _ = before
        self._left.add(node)
        if self.trace.cut is None:
            self.trace.cut = f"the gradient stops between {name} and {call.watched.name}"
        return node

    def _enter(self, step: Attention, call: Call) -> None:
        """Note which input streams come in here."""
        if step.pools or step.query_node.version or call.watched.kind.adds_outside:
            return  # an addition outside would still see the tokens that were there
        trace, node = self.trace, step.query_node
        if node.stream in trace.inputs:
            trace.entries.setdefault(node.stream, call.entry(node))
        for join in (s for s in trace.steps if isinstance(s, Join) and s.output == node):
            for part in join.parts:
                if part.version == 0 and part.stream in trace.inputs:
                    places = trace.places(part.stream, node.stream)
                    trace.entries.setdefault(part.stream, call.entry(node, places))

    def _check(self, call: Call, query: Node, key: Node) -> None:
        seen = tuple(call.attention[part].shape[2] for part in ("query", "key"))
        expected = (self.trace.lengths[query.stream], self.trace.lengths[key.stream])
        if seen != expected or call.shape[:2] != call.attention["query"].shape[::2][:2]:
            raise UserError(
                f"{call.watched.name}: {seen[0]} queries read {seen[1]} keys, but its tokens are "
                f"{expected[0]} and {expected[1]}; windows, merged tokens, keys remembered from an earlier "
                "forward (use_cache) and learned extra keys can't be recorded"
            )

    def _new_stream(self, name: str, tokens: Tensor, is_input: bool = True) -> Node:
        batch, length = tokens.shape[:2]
        if self._batch is None:
            self._batch = batch
        if batch != self._batch:
            raise UserError(
                f"stream {name!r} has {batch} samples, another one {self._batch}: give as many images as "
                "texts (repeat them), so that each sample has its own"
            )
        number, unique = 2, name
        while unique in self.trace.lengths:
            unique, number = f"{name} {number}", number + 1
        self.trace.lengths[unique] = length
        if is_input:
            self.trace.inputs = (*self.trace.inputs, unique)
        return Node(unique, 0)

    def _resolve(self, tokens: Tensor, edge: Edge, given: Tensor, name: str, stream: str) -> Node:
        """The state in which ``tokens`` [batch, tokens, width] are; ``given``: as the module got them."""
        if tokens.ndim != 3:
            shape = tuple(tokens.shape)
            raise UserError(f"{name}: its tokens have shape {shape}, not [batch, tokens, width]")
        place = _place(edge)
        if place is None:
            if id(given) not in self._without_graph:
                self._without_graph[id(given)] = (given, self._new_stream(stream, tokens))
            return self._without_graph[id(given)][1]
        if place not in self._resolved:
            self._resolved[place] = self._find(tokens, place, name, stream)
        return self._resolved[place]

    def _find(self, tokens: Tensor, place: Place, name: str, stream: str) -> Node:
        nodes, moved = self._walk(place)
        if not nodes:
            return self._new_stream(stream, tokens)
        same_length = tokens.shape[1] == self.trace.lengths[nodes[0].stream]
        if len(nodes) == 1 and same_length and not moved:
            return nodes[0]
        return self._joined(tokens, nodes, moved, name, stream)

    def _walk(self, place: Place) -> tuple[list[Node], set[str]]:
        """The states met first on the way back, the latest of each stream, and what may have moved tokens."""
        latest: dict[str, Node] = {}
        moved: set[str] = set()
        seen, waiting = {place}, [place]
        while waiting:
            at = waiting.pop()
            node = self._known.get(at)
            if node is not None:
                if node.version >= latest.get(node.stream, node).version:
                    latest[node.stream] = node
                continue
            function = at[0]
            if not leaves_tokens(function):
                moved.add(kind_of(function))
            for further in function.next_functions:
                if further[0] is not None and further not in seen:
                    seen.add(further)
                    waiting.append(further)
        return list(latest.values()), moved

    def _joined(self, tokens: Tensor, nodes: Sequence[Node], moved: set[str], name: str, stream: str) -> Node:
        """A new stream, whose tokens are tokens of earlier ones, and its own where they are not."""
        places = _where_tokens_come_from(
            tokens, [self._source[node] for node in nodes], [self.trace.lengths[n.stream] for n in nodes]
        )
        if places is None:
            raise UserError(
                f"{name}: its tokens are no selection of the tokens of {', '.join(n.stream for n in nodes)}: "
                f"something between the attention sub-layers mixes tokens ({', '.join(sorted(moved))}); "
                "hierarchical models (windows, merged patches) can't be recorded"
            )
        if bool((places < 0).all()):
            # They hang together in the graph, and no gradient arrives: a function with a backward that gives
            # none. Where the tokens are as many, they are taken for the same.
            self.trace.cut = self.trace.cut or f"the gradient stops before {name}"
            if len(nodes) == 1 and self.trace.lengths[nodes[0].stream] == tokens.shape[1]:
                return nodes[0]
        count = tokens.shape[1]
        identity = torch.arange(count, device=tokens.device)
        whole = sum(self.trace.lengths[node.stream] for node in nodes) == count
        if len(nodes) == 1 and whole and bool((places == identity).all()):
            return nodes[0]
        parts = list(nodes)
        if bool((places < 0).any()):
            behind = sum(self.trace.lengths[node.stream] for node in nodes)
            parts.append(self._new_stream(stream, tokens))
            places = torch.where(places < 0, behind + identity, places)
        if bool((places == places[:1]).all()):
            places = places[:1]
        total = sum(self.trace.lengths[part.stream] for part in parts)
        plain = places.shape[0] == 1 and total == count and bool((places[0] == identity).all())
        joint = "joint" if len(parts) > 1 else f"selected {parts[0].stream}"
        output = self._new_stream(joint, tokens, is_input=False)
        self.trace.steps.append(Join(output, tuple(parts), None if plain else places))
        return output

    def _note_padding(self, step) -> None:
        """Keys that no query may read are padding."""
        stream = step.key_node.stream
        if step.mask is None or stream in self.trace.valid:
            return
        allowed = step.allowed()
        while allowed.ndim < 4:
            allowed = allowed[None]
        read = allowed.expand(*allowed.shape[:3], step.key.shape[2]).any(dim=2).any(dim=1)
        if not bool(read.all()):
            self.trace.valid[stream] = read.expand(step.key.shape[0], -1)


def _where_tokens_come_from(tokens: Tensor, sources: Sequence[Edge], lengths: Sequence[int]) -> Tensor | None:
    """Find which of the sources' tokens, counted through, every token [batch, tokens] is; -1 for none.

    None when a token is more than one of them, or one of them becomes several, or another sample's.

    Every token has a number. For each binary digit of it, the gradient of the tokens where it is 1, and of
    those where it is 0, arrives at just those tokens of the sources that became them: so their gradients
    spell the number. (Two passes a digit, and not one a token.)
    """
    batch, count = tokens.shape[:2]
    numbers = torch.arange(batch * count, device=tokens.device).view(batch, count)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tokens.shape, generator=generator).to(tokens)
    digits = max(1, (batch * count - 1).bit_length())
    arrived: list[list[Tensor]] = [[] for _ in sources]
    for digit in range(digits):
        for value in (0, 1):
            chosen = ((numbers >> digit) & 1) == value
            gradients = torch.autograd.grad(
                tokens,
                [source.edge for source in sources],
                noise * chosen[..., None],
                retain_graph=True,
                allow_unused=True,
            )
            for found, source, gradient, length in zip(arrived, sources, gradients, lengths, strict=True):
                if gradient is None:
                    found.append(torch.zeros(batch, length, dtype=torch.bool, device=tokens.device))
                else:
                    found.append((source.turned(gradient) != 0).any(dim=-1))
    places = torch.full((batch, count), -1, device=tokens.device)
    offset = 0
    for found, length in zip(arrived, lengths, strict=True):
        zero, one = torch.stack(found[0::2]), torch.stack(found[1::2])
        if bool((zero & one).any()):
            return None
        number = (one * 2 ** torch.arange(digits, device=tokens.device)[:, None, None]).sum(dim=0)
        sample, token = (zero[0] | one[0]).nonzero(as_tuple=True)
        reached = number[sample, token]
        target = reached % count
        if bool((reached // count != sample).any()) or bool((places[sample, target] >= 0).any()):
            return None
        if torch.unique(reached).numel() != reached.numel():
            return None
        places[sample, target] = token + offset
        offset += length
    return places
