"""GPT-2 from ``transformers`` as a decoder of captions, new or from a local folder, and its tokenizer."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from clipmapper.data.text_files import parsed_json
from clipmapper.errors import UserError
from clipmapper.models.weight_files import check_finite, read_torch_file
from clipmapper.settings.plain_values import absent_or, flag, number, one_of, section, text, whole

# New beside a pretrained GPT-2, which reads no images.
CROSS_ATTENTION = ("crossattention", "ln_cross_attn")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token")


@dataclass
class OwnTokenizer:
    """GPT-2's tokenizer, with what :mod:`clipmapper.models.tokens` asks of one of open_clip's."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    strip_sep_token: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token is None:
            # GPT-2 has no padding token. Any id will do: padding is known by its position.
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @staticmethod
    def clean_fn(text: str) -> str:
        return " ".join(text.split())

    def description(self) -> dict:
        """All that it takes to build it again, in plain types."""
        special = {name: getattr(self.tokenizer, name) for name in _SPECIAL_TOKENS}
        return {"json": self.tokenizer.backend_tokenizer.to_str(), "special": special}

    @classmethod
    def described(cls, description: Mapping, context_length: int) -> "OwnTokenizer":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_text(description["json"], encoding="utf-8")
            special = {name: token for name, token in description["special"].items() if token is not None}
            return cls(
                transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **special), context_length
            )


def new_gpt2(
    *, layers: int, width: int, heads: int, vocabulary: int, positions: int, cross: bool
) -> GPT2LMHeadModel:
    """A GPT-2 with random weights and without dropout (which the mapper has none of either)."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        add_cross_attention=cross,
    )
    return gpt2_of(config)


def gpt2_of(config: GPT2Config | Mapping) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, of this configuration (or of what :func:`plain_config` made of one)."""
    if not isinstance(config, GPT2Config):
        config = GPT2Config(**{key: config[key] for key in GPT2_KEYS if key in config})
    config.use_cache = False
    # Attention that a recorder sees: see clipmapper.relevance.recording.capture.
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def plain_config(model: GPT2LMHeadModel) -> dict:
    """The configuration in plain types, for a checkpoint."""
    config = json.loads(model.config.to_json_string())
    return {key: config[key] for key in GPT2_KEYS if key in config}


def local_gpt2(path: str, cross: bool) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """A pretrained model of the GPT-2 family and its tokenizer, from a folder in ``transformers``' format.

    Nothing is downloaded, and no code of the folder is run. With ``cross`` it gets cross-attention
    sub-layers, whose weights are random unless the folder has some. Raises ``UserError`` when the folder
    lacks weights, configuration or tokenizer, when they are damaged, or belong to another kind of model.
    """
    folder, what = Path(path), f"model.gpt2.path={path}"
    if not folder.is_dir():
        raise UserError(f"{what}: no such folder; it holds config.json, weights and tokenizer of a GPT-2")
    try:
        kind = parsed_json((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{what}: there is no readable config.json of a transformers model in it") from error
    if kind != "gpt2":
        raise UserError(f"{what}: a model of the kind {kind!r}, not of the GPT-2 family (model_type gpt2)")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{what}: there are no tokenizer files in it (tokenizer.json, or vocab.json with merges.txt); "
            "save them beside the weights with tokenizer.save_pretrained, or leave model.gpt2.path out for a "
            "new GPT-2 on CLIP's tokens"
        )
    try:
        for file in sorted(folder.glob("pytorch_model*.bin")):
            read_torch_file(file, mmap=True)
        with _quiet():
            model, info = GPT2LMHeadModel.from_pretrained(
                folder,
                local_files_only=True,
                add_cross_attention=cross,
                attn_implementation="sdpa",
                output_loading_info=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_finite(model.state_dict())
    except Exception as error:  # a damaged file fails where its reader happens to stumble over it
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{what}: not a readable GPT-2 ({line})") from error
    missing = [
        name for name in info["missing_keys"] if not any(f".{part}." in name for part in CROSS_ATTENTION)
    ]
    if missing:
        raise UserError(f"{what}: its weights lack {len(missing)} of a GPT-2's, {sorted(missing)[0]} for one")
    if tokenizer.eos_token is None:
        raise UserError(f"{what}: its tokenizer has no end token, so captions would never end")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{what}: its tokenizer has {len(tokenizer)} tokens, its weights are for "
            f"{model.config.vocab_size}"
        )
    model.config.use_cache = False
    return model.float().eval(), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports on standard output: what is wrong is said in one line."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


_ID = absent_or(whole(-1, 10_000_000))
_DROPOUT = number(0, 1)
# Of GPT-2's configuration what its numbers depend on.
GPT2_KEYS = {
    "vocab_size": whole(1, 10_000_000),
    "n_positions": whole(1, 1_048_576),
    "n_embd": whole(1, 65_536),
    "n_layer": whole(1, 512),
    "n_head": whole(1, 1024),
    "n_inner": absent_or(whole(1, 1_048_576)),
    "activation_function": one_of(
        "gelu", "gelu_new", "gelu_fast", "gelu_10", "gelu_accurate", "gelu_python", "gelu_pytorch_tanh",
        "quick_gelu", "relu", "silu", "swish", "tanh",
    ),
    "resid_pdrop": _DROPOUT,
    "embd_pdrop": _DROPOUT,
    "attn_pdrop": _DROPOUT,
    "layer_norm_epsilon": number(0, 1),
    "initializer_range": number(0, 1e3),
    "scale_attn_weights": flag,
    "scale_attn_by_inverse_layer_idx": flag,
    "reorder_and_upcast_attn": flag,
    "add_cross_attention": flag,
    "tie_word_embeddings": flag,
    "bos_token_id": _ID,
    "eos_token_id": _ID,
    "pad_token_id": _ID,
}  # fmt: skip
# What transformers writes besides, which changes nothing here: older checkpoints have it. It is not read.
GPT2_UNREAD = frozenset(
    (
        "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "gradient_checkpointing",
        "id2label", "is_encoder_decoder", "label2id", "model_type", "n_ctx", "output_attentions",
        "output_hidden_states", "output_past", "problem_type", "return_dict", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    )
)  # fmt: skip
_TOKENIZER_KEYS = frozenset(
    ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
     "decoder", "model")
)  # fmt: skip


def _anything(value: object, where: str) -> None:
    """Let a value pass that is not read."""


def _tokenizer(value: object, where: str) -> None:
    """The content of a ``tokenizer.json``: tables and rules of the ``tokenizers`` library, no code."""
    text(500_000_000)(value, where)
    try:
        content = parsed_json(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{where}: not a tokenizer.json")
    for key in content:
        if key not in _TOKENIZER_KEYS:
            raise ValueError(f"{where}: {key!r} is not one of the keys of a tokenizer.json")


_special = absent_or(text(200))
GPT2_SECTION = section(
    {
        "config": section(
            {key: GPT2_KEYS[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")},
            GPT2_KEYS | dict.fromkeys(GPT2_UNREAD, _anything),
        ),
        "tokenizer": absent_or(
            section(
                {
                    "json": _tokenizer,
                    "special": section({}, dict.fromkeys(("bos_token", "eos_token", "unk_token"), _special)),
                }
            )
        ),
    }
)
