"""Writing captions: greedy, beam and nucleus decoding by ``transformers``' generation loop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from clipmapper.errors import UserError
from clipmapper.models.tokens import TokenizedText, padding_id
from clipmapper.tasks.captioning.head import spell, with_ends

# What only one way of decoding reads, and its value when it is not given.
METHODS: Mapping[str, Mapping[str, float]] = {
    "greedy": {},
    "beam": {"beams": 5, "length_penalty": 1.0},
    "nucleus": {"top_p": 0.9, "temperature": 1.0, "seed": 0},
}


@dataclass(frozen=True)
class Decoding:
    """How captions are written. Raises ``UserError`` for values that are not allowed or have no effect.

    Parameters
    ----------
    method : "greedy", "beam" or "nucleus".
    captions : how many for every image. Beam: the best ones, all different; nucleus: so many draws;
        greedy: 1.
    min_length, max_length : tokens of a caption; the end token counts in ``max_length`` only. A caption that
        has not ended by then is cut.
    repetition_penalty : over 1 makes tokens that the caption has already less likely (1: no effect).
    no_repeat_ngram : no sequence of so many tokens comes twice (0: no such limit).
    beams, length_penalty (beam) : captions are compared by log-probability / length ** length_penalty.
    top_p, temperature, seed (nucleus) : a word is drawn from the smallest set that has probability top_p.
    """

    method: str = "beam"
    captions: int = 1
    min_length: int = 1
    max_length: int = 30
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    beams: int | None = None
    length_penalty: float | None = None
    top_p: float | None = None
    temperature: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"decoding.method={self.method}: must be one of {', '.join(METHODS)}")
        for method, options in METHODS.items():
            for name, default in options.items():
                given = getattr(self, name)
                if method != self.method and given is not None:
                    raise UserError(
                        f"decoding.{name}={given}: only decoding.method={method} has it, not {self.method}"
                    )
                if method == self.method and given is None:
                    object.__setattr__(self, name, default)
        limits = {
            "captions": (self.captions >= 1, "at least 1"),
            "min_length": (0 <= self.min_length < self.max_length, "from 0 to less than max_length"),
            "max_length": (self.max_length >= 1, "at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "over 0 (1: no effect)"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "0 (no limit) or more"),
            "beams": (self.beams is None or self.beams >= 2, "at least 2 (1 is decoding.method=greedy)"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "over 0, at most 1"),
            "temperature": (self.temperature is None or self.temperature > 0, "over 0"),
        }
        for name, (fine, allowed) in limits.items():
            if not fine:
                raise UserError(f"decoding.{name}={getattr(self, name)}: must be {allowed}")
        most = {"greedy": 1, "beam": self.beams}.get(self.method, self.captions)
        if self.captions > most:
            raise UserError(
                f"decoding.captions={self.captions}: decoding.method={self.method} gives at most {most} "
                "(nucleus gives as many as you like, beam as many as it has beams)"
            )

    def generation_config(self, room: int, start: int, end: int, use_cache: bool) -> GenerationConfig:
        """The same in the words of ``transformers``. ``room``: for tokens behind the start token."""
        if self.max_length > room:
            raise UserError(
                f"decoding.max_length={self.max_length}: the model has room for {room} tokens "
                "behind the start token"
            )
        own = {
            "greedy": {},
            # "never": stop when no running caption can get better than the finished ones. The default stops
            # earlier by a guess, and then misses longer captions that would win.
            "beam": {
                "num_beams": self.beams,
                "length_penalty": self.length_penalty,
                "early_stopping": "never",
            },
            # top_k is 50 unless told otherwise.
            "nucleus": {"do_sample": True, "top_p": self.top_p, "temperature": self.temperature, "top_k": 0},
        }[self.method]
        return GenerationConfig(
            eos_token_id=end,
            # Ended captions are filled up with the end token: any other id may be a word.
            pad_token_id=end,
            suppress_tokens=[start] if start != end else None,
            min_new_tokens=self.min_length,
            max_new_tokens=self.max_length,
            num_return_sequences=self.captions,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram,
            use_cache=use_cache,
            **own,
        )


@dataclass(frozen=True)
class WrittenCaptions:
    """``texts``: for every image its captions, the best first (beam) or as drawn (nucleus).

    ``tokens``: the same as a captioner's ``forward`` reads them, the captions of an image in succession. One
    that was cut has no end token.
    """

    tokens: TokenizedText
    texts: tuple[tuple[str, ...], ...]


@torch.no_grad()
def write_captions(
    captioner: nn.Module,
    image_tokens: Float[Tensor, "images image image_width"],
    decoding: Decoding,
    *,
    keep: Int[Tensor, "images kept"] | None = None,
    use_cache: bool = True,
) -> WrittenCaptions:
    """Write captions of images given by the encoder's ``image_tokens`` (``keep``: which patches these hold).

    ``captioner``: a :class:`~clipmapper.tasks.captioning.model.Captioner`.
    ``use_cache``: remember keys and values of the text tower, of the mapper's text and of the image; without
    it every word computes the mapper and the whole caption so far anew. The captions are the same.
    """
    device = image_tokens.device
    with captioner.evaluating():
        decoder = _Decoder(captioner, image_tokens, keep, decoding, use_cache)
        start = torch.full((len(image_tokens), 1), decoder.start, device=device)
        # transformers draws from torch's global generator: it is seeded here, and left as it was found.
        with torch.random.fork_rng(
            [device] if device.type == "cuda" else [], enabled=decoding.seed is not None
        ):
            if decoding.seed is not None:
                torch.manual_seed(decoding.seed)
            ids = decoder.generate(start, attention_mask=torch.ones_like(start))
    return _read(captioner, decoder.token_ids(ids[:, 1:]).tolist(), decoding.captions)


def _read(captioner: nn.Module, rows: Sequence[Sequence[int]], captions: int) -> WrittenCaptions:
    end, tokenizer = captioner.ends.end, captioner.tokenizer
    ended = [end in row for row in rows]
    words = [list(row[: row.index(end)]) if end in row else list(row) for row in rows]
    tokens = with_ends(words, captioner.ends, padding_id(tokenizer), ended).to(captioner.device)
    texts = [spell(tokenizer, row) for row in words]
    return WrittenCaptions(
        tokens, tuple(tuple(texts[i : i + captions]) for i in range(0, len(texts), captions))
    )


class _Decoder(PreTrainedModel, GenerationMixin):
    """A captioner with its images, as the language model that ``transformers`` generates with.

    It has no weights of its own: the captioner stays out of the module tree. Where the head knows only some
    tokens, generation runs over these and, behind them, the start token (which is never said): to sort and to
    copy the scores of a whole vocabulary would take most of the time.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        captioner: nn.Module,
        image_tokens: Float[Tensor, "images image image_width"],
        keep: Int[Tensor, "images kept"] | None,
        decoding: Decoding,
        use_cache: bool,
    ) -> None:
        known = captioner.head.tokens
        scored = captioner.head.vocabulary if known is None else len(known) + 1
        # Beams need the vocabulary's size from here, to transformers before 5.24.
        super().__init__(PreTrainedConfig(num_hidden_layers=captioner.caches, vocab_size=scored))
        self._captioner = (captioner,)
        self.image_tokens, self.keep = image_tokens, keep
        self.memory = captioner.image_memory(image_tokens, keep) if use_cache else []
        self.start, end = captioner.ends.start, captioner.ends.end
        self._tokens = captioner.head.tokens
        if self._tokens is not None:
            self._tokens = torch.cat([self._tokens, self._tokens.new_tensor([self.start])])
            self.start = len(self._tokens) - 1
            end = int(captioner.head.places(self._tokens.new_tensor([end])))
        self.generation_config = decoding.generation_config(captioner.longest, self.start, end, use_cache)

    def token_ids(self, places: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
        """The tokenizer's ids of what generation runs over."""
        return places if self._tokens is None else self._tokens[places]

    @property
    def device(self) -> torch.device:
        return self.image_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.image_tokens.dtype

    def forward(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Int[Tensor, "rows all_tokens"] | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token; rows are the captions being written, those of an image in succession.

        ``generate`` always gives the last three; nothing here depends on them. (No token is masked: captions
        that have ended are only filled up until the others have, too.) What is remembered is ``cache`` to
        transformers since 5.24, ``past_key_values`` before; it is changed in place, so that the output need
        not name it.
        """
        cache = past_key_values if cache is None else cache
        (captioner,) = self._captioner
        ids = self.token_ids(input_ids)
        if cache is None:
            logits = self._from_the_start(captioner, ids)
        else:
            remember = [partial(cache.update, layer_idx=i) for i in range(captioner.caches)]
            past = cache.get_seq_length()
            logits = captioner.step_logits(ids, self.memory, past, remember, known_only=True)
        if self._tokens is not None:
            logits = torch.nn.functional.pad(logits, (0, 1), value=-math.inf)
        return CausalLMOutputWithPast(logits=logits[:, None])

    def _from_the_start(
        self, captioner: nn.Module, ids: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows scored"]:
        each = len(ids) // len(self.image_tokens)
        keep = None if self.keep is None else self.keep.repeat_interleave(each, 0)
        valid = torch.ones_like(ids, dtype=torch.bool)
        return captioner.caption_logits(
            self.image_tokens.repeat_interleave(each, 0),
            captioner.text_tokens(ids, valid),
            valid,
            keep=keep,
            known_only=True,
        )[:, -1]
