"""Recording CLIPmapper and the captioner: their streams have names, and are known before the forward.

(:mod:`clipmapper.relevance.recording.streams` would find the same graph in any model.)
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.mapper import DualFlowMapper, Mapper
from clipmapper.relevance.modes import evaluating
from clipmapper.relevance.recording.capture import Call, Capture, Watched
from clipmapper.relevance.recording.families import sublayers_of
from clipmapper.relevance.trace import AttentionTrace, Join, Node


@dataclass(eq=False)
class _Streamed(Watched):
    """A sub-layer whose streams are known."""

    query_stream: str = ""
    key_stream: str = ""


class _Recorder:
    """Fills a trace. Keys are read by version: cross-attention may read an earlier state."""

    def __init__(self, trace: AttentionTrace) -> None:
        self.trace = trace
        self.version: dict[str, int] = {}
        self.read_version: dict[str, int] = {}  # of keys of other streams: as they entered the block

    def node(self, stream: str) -> Node:
        return Node(stream, self.version.setdefault(stream, 0))

    def add(self, call: Call) -> None:
        stream, source = call.watched.query_stream, call.watched.key_stream
        before = self.node(stream)
        key = before if stream == source else Node(source, self.read_version[source])
        after = Node(stream, before.version + 1)
        self.version[stream] = after.version
        self.trace.lengths.setdefault(stream, call.before.shape[1])
        step = call.as_attention(before, key, after)
        if before.version == 0 and not call.watched.kind.adds_outside:
            self.trace.entries.setdefault(stream, call.entry(before))
        self.trace.steps.append(step)

    def join(self, stream: str, parts: Sequence[str], index: Tensor | None = None) -> None:
        """``stream`` begins as the tokens of other streams, or as those of them that ``index`` names."""
        step = Join(self.node(stream), tuple(self.node(part) for part in parts), index)
        self.trace.steps.append(step)
        self.trace.valid[stream] = step.gather([self.trace.padding_free(part) for part in parts])
        self.trace.lengths[stream] = self.trace.valid[stream].shape[1]

    def after_mlp(self, stream: str, tokens: Tensor) -> None:
        """Note the residual stream after a block's MLP, at the stream's last sub-layer."""
        last = next(s for s in reversed(self.trace.attention) if s.query_node.stream == stream)
        last.after = tokens


class TwoStage(nn.Module):
    """A model of two stages: an encoder, a mapper over its tokens, and a head that reads these."""

    task: str  # its name
    # Whether the mapper is given words that have not passed the text tower.
    text_embedding_only = False
    # The argument of ``forward`` that leaves tokens out of the last block.
    only: str

    def __init__(self, encoder: ClipEncoder, mapper: Mapper, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.mapper = mapper
        self.head = head

    @property
    def device(self) -> torch.device:
        return next(self.mapper.parameters()).device

    def load_image(self, image) -> Float[Tensor, "1 3 height width"]:
        """A path, PIL image, uint8 array [height, width, 3] or preprocessed tensor, for the encoder."""
        return self.encoder.load_image(image).to(self.device)

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, dropout is off; behind it the model is as it was."""
        return evaluating(self)

    def recorded(self, samples: Sequence[int] | None, rules: str) -> AbstractContextManager[AttentionTrace]:
        """:func:`record_clipmapper` of this model."""
        return record_clipmapper(self, samples, rules)


@runtime_checkable
class SecondDecoder(Protocol):
    """A language model behind the mapper, under ``decoder`` of a model that has one."""

    gpt2: nn.Module
    cross: bool


@contextmanager
def record_clipmapper(model: TwoStage, samples: Sequence[int] | None, rules: str) -> Iterator[AttentionTrace]:
    """Record a forward in which every token of the last block is computed: ``model(images, text,
    only_class_token=False)``, or ``only_text=False`` where the model writes captions.

    The row that is read: of an answer, the mapper's image class token; of captions, the text position that
    predicts the word, which to begin with is the last of each text. For another word
    ``trace.read_token("text", position)``, then ``trace.backward(y, keep_graph=True)``. Otherwise as
    :func:`clipmapper.relevance.recording.record.record`, which calls it.
    """
    trace = AttentionTrace(rules=rules)
    recorder = _Recorder(trace)
    # All known: a captioner may write its caption with the hooks out of the way, then be recorded reading it.
    sublayers = [*_tower_sublayers(model), *_mapper_sublayers(model), *_decoder_sublayers(model)]
    capture = Capture(model, sublayers, recorder.add, all_known=True)
    with ExitStack() as stack:
        _watch_mapper(stack, recorder, model)
        if (decoder := getattr(model, "decoder", None)) is not None:
            _watch_decoder(stack, recorder, model, decoder)
        for watched in capture.watched:
            _watch_end(stack, recorder, watched)
        stack.enter_context(capture(rules))
        yield trace
    trace.cut = capture.cuts.first
    whole = all(s.before.shape[1] == trace.lengths[s.query_node.stream] for s in trace.attention)
    if len(trace.attention) != len(capture.watched) or not whole:
        raise RuntimeError(
            f"recorded {len(trace.attention)} attention sub-layers of {len(capture.watched)}: make exactly "
            f"one whole forward, model(images, text, {model.only}=False), inside `with record(model)`"
        )
    trace.grid, trace.samples = model.encoder.grid, samples
    trace.image_stream, trace.text_stream = "image", "text"


def _sublayer(name: str, module: nn.Module, query_stream: str, key_stream: str) -> _Streamed:
    kinds = sublayers_of(module)
    if len(kinds) != 1:
        raise ValueError(
            f"{name}: the recorder does not know {type(module).__name__}; add it to "
            "clipmapper.relevance.recording.families.SUBLAYERS with the submodule whose output is added"
        )
    return _Streamed(name, module, kinds[0], query_stream, key_stream)


def _tower_sublayers(model: TwoStage) -> Iterator[Watched]:
    for number, block in enumerate(model.encoder.image_tower.attention_blocks()):
        yield _sublayer(f"image tower, block {number}", block, "image", "image")
    if model.text_embedding_only:
        return
    for number, block in enumerate(model.encoder.text_tower.attention_blocks()):
        yield _sublayer(f"text tower, block {number}", block, "text", "text")


def _mapper_streams(model: TwoStage) -> tuple[str, str]:
    """Names of the image and text streams inside the mapper."""
    if not isinstance(model.mapper, DualFlowMapper):
        return "joint", "joint"
    image = "image" if model.mapper.class_token is None else "mapper_image"
    return image, "mapper_text" if _leaves_words_behind(model) else "text"


def _leaves_words_behind(model: TwoStage) -> bool:
    """The text tower runs on more tokens than the mapper is given: on padding and CoCa's class token."""
    if not model.mapper.captioning or model.text_embedding_only:
        return False
    return model.encoder.text_tower.padding_matters


def _mapper_sublayers(model: TwoStage) -> Iterator[Watched]:
    image, text = _mapper_streams(model)
    for number, block in enumerate(model.mapper.blocks):
        name = f"mapper, block {number}"
        if isinstance(model.mapper, DualFlowMapper):
            yield _sublayer(f"{name}, image self-attention", block.image_self, image, image)
            if block.image_cross is not None:
                yield _sublayer(f"{name}, image cross-attention", block.image_cross, image, text)
            yield _sublayer(f"{name}, text self-attention", block.text_self, text, text)
            yield _sublayer(f"{name}, text cross-attention", block.text_cross, text, image)
        else:
            yield _sublayer(f"{name}, self-attention", block.attention, image, image)


def _decoder_streams(model: TwoStage, decoder: SecondDecoder) -> tuple[str, str]:
    """Names of the streams that GPT-2 reads as its own tokens, and through cross-attention."""
    image, text = _mapper_streams(model)
    if not decoder.cross:
        # One stream of image and text is what GPT-2 reads already.
        return (image, image) if image == text else ("decoder", "decoder")
    return ("decoder_text", "decoder_image") if image == text else (text, image)


def _decoder_sublayers(model: TwoStage) -> Iterator[Watched]:
    if (decoder := getattr(model, "decoder", None)) is None:
        return
    words, read = _decoder_streams(model, decoder)
    for number, block in enumerate(decoder.gpt2.h):
        own, *cross = sublayers_of(block)
        yield _Streamed(f"GPT-2, block {number}, self-attention", block, own, words, words)
        for kind in cross:
            yield _Streamed(f"GPT-2, block {number}, cross-attention", block, kind, words, read)


def _watch_end(stack: ExitStack, recorder: _Recorder, watched: _Streamed) -> None:
    """Note a sub-layer's end: in a tower it is a whole block, whose output is the stream after its MLP."""
    if watched.kind.added:
        handle = watched.module.register_forward_hook(
            lambda module, args, output: recorder.after_mlp(
                watched.query_stream, output[0] if isinstance(output, tuple) else output
            )
        )
        stack.callback(handle.remove)


def _watch_mapper(stack: ExitStack, recorder: _Recorder, model: TwoStage) -> None:
    """Join the towers' streams where the mapper begins, and note which row its head reads."""
    trace = recorder.trace
    image, text = _mapper_streams(model)
    class_token = model.mapper.class_token is not None
    captioning = model.mapper.captioning
    last_words: list[Tensor] = []

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
            recorder.join(text_part, ["text"], torch.arange(words, device=text_tokens.device)[None])
        parts = ["class_token", "image"] if class_token else ["image"]
        if image == "joint":
            parts.append(text_part)
        if len(parts) > 1:
            recorder.join(image, parts)
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


def _watch_decoder(stack: ExitStack, recorder: _Recorder, model: TwoStage, decoder: SecondDecoder) -> None:
    """GPT-2 goes on with the mapper's streams: joined, or taken apart, and its words are what is read."""
    trace = recorder.trace
    image, text = _mapper_streams(model)
    words, read = _decoder_streams(model, decoder)

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if words == read != image:
            recorder.join(words, [image, text])
        elif words != text:
            length, count = trace.lengths[image], kwargs["inputs_embeds"].shape[1]
            places = torch.arange(length, device=trace.device)[None]
            recorder.join(read, [image], places[:, : length - count])
            recorder.join(words, [image], places[:, length - count :])
        recorder.read_version = {read: recorder.node(read).version}

    def end(module: nn.Module, args: tuple, output) -> None:
        # The same word as behind the mapper, in its last state.
        node, position = trace.read
        numbered = trace.places("text", node.stream)
        last = (numbered == position[:, None]).int().argmax(dim=1)
        trace.read = (recorder.node(words), last)
        trace.read_token("text", last)

    handles = [
        decoder.gpt2.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.gpt2.register_forward_hook(end),
    ]
    for handle in handles:
        stack.callback(handle.remove)
