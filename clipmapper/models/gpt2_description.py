"""What a checkpoint may say about a GPT-2 and its tokenizer."""

import json

from clipmapper.plain_values import absent_or, flag, number, one_of, section, text, whole

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
    """Of a value that is not read."""


def _tokenizer(value: object, where: str) -> None:
    """The content of a ``tokenizer.json``: tables and rules of the ``tokenizers`` library, no code."""
    text(500_000_000)(value, where)
    try:
        content = json.loads(value)
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
