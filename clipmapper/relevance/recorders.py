"""From a forward pass of a model that is neither modified nor copied to an :class:`AttentionTrace`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from clipmapper.models.attention import AttentionSublayer
from clipmapper.models.captioner import Captioner
from clipmapper.models.clipmapper import CLIPmapper
from clipmapper.models.mapper import DualFlowMapper
from clipmapper.relevance.backward_rules import backward_rules
from clipmapper.relevance.projections import output_weight
from clipmapper.relevance.trace import Attention, AttentionTrace, Join, Node

# Where an attention sub-layer of a known kind of module is found: its first argument is the residual
# stream before the sub-layer, and the output of the named submodule ("" = of the module itself) is what
# the sub-layer adds to it.
CONTRIBUTION = {
    ResidualAttentionBlock: "ls_1",
    TimmBlock: "drop_path1",
    EvaBlock: "drop_path1",
    EvaBlockPostNorm: "drop_path1",
    AttentionSublayer: "",
}


@dataclass
class _Sublayer:
    """An attention sub-layer that is to be recorded, and what has been seen of it in the current call."""

    name: str
    module: nn.Module
    query_stream: str
    key_stream: str
    before: Tensor | None = None
    call: dict = field(default_factory=dict)


class _Recorder:
    """Hooks that fill a trace. Keys are read by version: cross-attention may read an earlier state."""

    def __init__(self) -> None:
        self.trace = AttentionTrace()
        self.version: dict[str, int] = {}
        self.read_version: dict[str, int] = {}  # of keys of other streams: as they entered the block
        self.current: list[_Sublayer] = []

    def node(self, stream: str) -> Node:
        return Node(stream, self.version.setdefault(stream, 0))

    def watch(self, stack: ExitStack, sublayer: _Sublayer) -> None:
        kind = next((k for k in CONTRIBUTION if isinstance(sublayer.module, k)), None)
        if kind is None:
            raise ValueError(
                f"{sublayer.name}: the recorder does not know {type(sublayer.module).__name__}; add it to "
                "clipmapper.relevance.recorders.CONTRIBUTION with the submodule whose output is added"
            )
        place = CONTRIBUTION[kind]
        contribution = sublayer.module.get_submodule(place) if place else sublayer.module
        begin = sublayer.module.register_forward_pre_hook(
            lambda module, args, kwargs: self._begin(sublayer, args, kwargs), with_kwargs=True, prepend=True
        )
        end = contribution.register_forward_hook(lambda module, args, output: self._end(sublayer, output))
        stack.callback(begin.remove)
        stack.callback(end.remove)
        if place:  # a whole block, whose output is the residual stream after its MLP
            after = sublayer.module.register_forward_hook(
                lambda module, args, output: self.after_mlp(sublayer.query_stream, output)
            )
            stack.callback(after.remove)

    def after_mlp(self, stream: str, tokens: Tensor) -> None:
        """Note the residual stream after a block's MLP, at the stream's last sub-layer."""
        last = next(s for s in reversed(self.trace.attention) if s.query_node.stream == stream)
        last.after = tokens

    def _begin(self, sublayer: _Sublayer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        before = args[0]
        if not before.requires_grad:
            # The graph starts here: what is before the first sub-layer (embeddings) needs no backward.
            before = before.detach().requires_grad_()
            args = (before, *args[1:])
        sublayer.before, sublayer.call = before, {}
        self.current.append(sublayer)
        return args, kwargs

    def _end(self, sublayer: _Sublayer, added: Tensor) -> None:
        self.current.remove(sublayer)
        if not sublayer.call:
            raise RuntimeError(
                f"{sublayer.name}: no call of torch.nn.functional.scaled_dot_product_attention was seen; "
                "a trace needs attention that runs through it (in timm: set TIMM_FUSED_ATTN=1)"
            )
        stream, source = sublayer.query_stream, sublayer.key_stream
        before = self.node(stream)
        key = before if stream == source else Node(source, self.read_version[source])
        after = Node(stream, before.version + 1)
        self.version[stream] = after.version
        self.trace.lengths.setdefault(stream, sublayer.before.shape[1])
        step = Attention(
            name=sublayer.name,
            query_node=before,
            key_node=key,
            output_node=after,
            before=sublayer.before,
            added=added,
            output_weight=output_weight(sublayer.module, sublayer.call["query"].shape[1]),
            **sublayer.call,
        )
        if before.version == 0:
            self.trace.entries.setdefault(stream, sublayer.module)
        self.trace.steps.append(step)
        sublayer.before, sublayer.call = None, {}

    def attention(self, original):
        """``scaled_dot_product_attention``, remembering its inputs and output for the current sub-layer."""

        def recorded(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
            mixed = original(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                **more,
            )
            if self.current and not self.current[-1].call:
                self.current[-1].call = {
                    "query": query,
                    "key": key,
                    "value": value,
                    "mixed": mixed,
                    "mask": attn_mask,
                    "scale": scale,
                    "causal": is_causal,
                }
            return mixed

        return recorded


@contextmanager
def record(
    model: CLIPmapper | Captioner, samples: Sequence[int] | None = None, rules: str = "plain"
) -> Iterator[AttentionTrace]:
    """Record one forward of ``model`` (both towers and the mapper) made inside the ``with`` block.

    Fused attention stays on, gradients are on inside, the model's parameters take none. The forward must
    compute every token of the last block: ``model(images, text, only_class_token=False)``, or
    ``only_text=False`` where the model writes captions. On leaving, no hook, patch or changed flag stays
    behind, also after an exception. ``rules``: of the backward pass, one of ``backward_rules.RULES``; the
    forward's values are the same by all of them.

    The row that is read: of an answer, the mapper's image class token; of captions, the text position that
    predicts the word, which to begin with is the last of each text. For another word
    ``trace.read_token("text", position)``, then ``trace.backward(y, keep_graph=True)``.

    Raises ``RuntimeError`` when the number of sub-layers seen is not the number that the model has.
    """
    recorder = _Recorder()
    sublayers = [*_tower_sublayers(model), *_mapper_sublayers(model)]
    with ExitStack() as stack:
        for sublayer in sublayers:
            recorder.watch(stack, sublayer)
        _watch_mapper(stack, recorder, model)
        _parameters_without_gradient(stack, model)
        stack.enter_context(torch.inference_mode(False))  # in it no graph can be recorded
        stack.enter_context(torch.enable_grad())
        original = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = recorder.attention(original)
        stack.callback(setattr, F, "scaled_dot_product_attention", original)
        stack.enter_context(backward_rules(rules))
        recorder.trace.rules = rules
        yield recorder.trace
    trace = recorder.trace
    whole = all(s.before.shape[1] == trace.lengths[s.query_node.stream] for s in trace.attention)
    if len(trace.attention) != len(sublayers) or not whole:
        option = "only_text" if isinstance(model, Captioner) else "only_class_token"
        raise RuntimeError(
            f"recorded {len(trace.attention)} attention sub-layers of {len(sublayers)}: make exactly one "
            f"whole forward, model(images, text, {option}=False), inside `with record(model)`"
        )
    trace.grid, trace.samples = model.encoder.grid, samples
    trace.image_stream, trace.text_stream = "image", "text"


def _tower_sublayers(model: CLIPmapper | Captioner) -> Iterator[_Sublayer]:
    for number, block in enumerate(model.encoder.image_tower.attention_blocks()):
        yield _Sublayer(f"image tower, block {number}", block, "image", "image")
    if isinstance(model, Captioner) and model.text_embedding_only:
        return
    for number, block in enumerate(model.encoder.text_tower.attention_blocks()):
        yield _Sublayer(f"text tower, block {number}", block, "text", "text")


def _mapper_streams(model: CLIPmapper | Captioner) -> tuple[str, str]:
    """Names of the image and text streams inside the mapper."""
    if not isinstance(model.mapper, DualFlowMapper):
        return "joint", "joint"
    image = "image" if model.mapper.class_token is None else "mapper_image"
    return image, "mapper_text" if _leaves_words_behind(model) else "text"


def _leaves_words_behind(model: CLIPmapper | Captioner) -> bool:
    """The text tower runs on more tokens than the mapper is given: on padding and CoCa's class token."""
    if not isinstance(model, Captioner) or model.text_embedding_only:
        return False
    return model.encoder.text_tower.padding_matters


def _mapper_sublayers(model: CLIPmapper | Captioner) -> Iterator[_Sublayer]:
    image, text = _mapper_streams(model)
    for number, block in enumerate(model.mapper.blocks):
        name = f"mapper, block {number}"
        if isinstance(model.mapper, DualFlowMapper):
            yield _Sublayer(f"{name}, image self-attention", block.image_self, image, image)
            if block.image_cross is not None:
                yield _Sublayer(f"{name}, image cross-attention", block.image_cross, image, text)
            yield _Sublayer(f"{name}, text self-attention", block.text_self, text, text)
            yield _Sublayer(f"{name}, text cross-attention", block.text_cross, text, image)
        else:
            yield _Sublayer(f"{name}, self-attention", block.attention, image, image)


def _watch_mapper(stack: ExitStack, recorder: _Recorder, model: CLIPmapper | Captioner) -> None:
    """Join the towers' streams where the mapper begins, and note which row its head reads."""
    trace = recorder.trace
    image, text = _mapper_streams(model)
    class_token = model.mapper.class_token is not None
    captioning = isinstance(model, Captioner)
    last_words: list[Tensor] = []

    def join(stream: str, parts: list[str], index: Tensor | None = None) -> None:
        step = Join(recorder.node(stream), tuple(recorder.node(part) for part in parts), index)
        trace.steps.append(step)
        trace.valid[stream] = step.gather([trace.padding_free(part) for part in parts])
        trace.lengths[stream] = trace.valid[stream].shape[1]

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        image_tokens, text_tokens = args[0], args[1]
        if (
            not text_tokens.requires_grad
        ):  # embeddings that have passed no text tower: their graph starts here
            text_tokens = text_tokens.detach().requires_grad_()
        trace.inputs = ("class_token", "image", "text") if class_token else ("image", "text")
        words, behind = text_tokens.shape[1], trace.lengths.get("text", 0)
        lengths = {"class_token": 1, "image": image_tokens.shape[1], "text": max(words, behind)}
        trace.lengths.update({stream: lengths[stream] for stream in trace.inputs})
        valid = kwargs.get("text_valid")
        if valid is not None:
            place = torch.arange(words, device=valid.device)
            last_words.append(torch.where(valid, place, 0).amax(dim=1))
            trace.valid["text"] = F.pad(valid, (0, lengths["text"] - words), value=False)
        if kwargs.get("image_ignore") is not None:
            ignored = kwargs["image_ignore"]
            prefix = ignored.new_ones(len(ignored), image_tokens.shape[1] - ignored.shape[1])
            trace.valid["image"] = torch.cat([prefix, ~ignored], dim=1)
        text_part = "text"
        if _leaves_words_behind(model):
            text_part = "mapper_text"
            join(text_part, ["text"], torch.arange(words, device=text_tokens.device)[None])
        parts = ["class_token", "image"] if class_token else ["image"]
        if image == "joint":
            parts.append(text_part)
        if len(parts) > 1:
            join(image, parts)
        return (image_tokens, text_tokens, *args[2:]), kwargs

    def enter_block(module: nn.Module, args: tuple) -> None:
        recorder.read_version = {stream: recorder.node(stream).version for stream in (image, text)}

    def end(module: nn.Module, args: tuple, output: tuple) -> None:
        batch = output[0].shape[0]
        first = torch.zeros(batch, dtype=torch.long, device=output[0].device)
        trace.read = (recorder.node(text if captioning else image), first)
        if captioning:
            last = last_words[-1] if last_words else first + output[1].shape[1] - 1
            trace.read_token("text", last)

    def leave_block(module: nn.Module, args: tuple, output: tuple | Tensor) -> None:
        outputs = {image: output} if image == text else {image: output[0], text: output[1]}
        for stream, tokens in outputs.items():
            recorder.after_mlp(stream, tokens)

    handles = [
        model.mapper.register_forward_pre_hook(begin, with_kwargs=True),
        model.mapper.register_forward_hook(end),
        *(block.register_forward_pre_hook(enter_block) for block in model.mapper.blocks),
        *(block.register_forward_hook(leave_block) for block in model.mapper.blocks),
    ]
    for handle in handles:
        stack.callback(handle.remove)


def _parameters_without_gradient(stack: ExitStack, model: nn.Module) -> None:
    """Weights need no gradient while explaining: what only their gradients need is not kept."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
