"""The tokenizer of a GGUF file: the tokenizer.json that it carries, or one built of its vocabulary.

transformers builds it (vocabulary, merges, special tokens) and splits text for the vocabularies that it knows; `SPLITS`
adds those of other mixture-of-experts models. A vocabulary whose splitting is not known is refused: its tokens would be
others than those that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hybrimoe import compat
from hybrimoe.checkpoint.gguf.fields import ARCHITECTURE_KEY
from hybrimoe.checkpoint.gguf.file import open_gguf
from hybrimoe.errors import ModelError

TOKENS, MODEL, SPLIT_NAME = "tokenizer.ggml.tokens", "tokenizer.ggml.model", "tokenizer.ggml.pre"
WHOLE_JSON = "tokenizer.huggingface.json"
CHAT_TEMPLATE = "tokenizer.chat_template"
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
SPACE, SPACE_BEFORE = "▁", "tokenizer.ggml.add_space_prefix"
GEMMA4 = "gemma4"  # SentencePiece's spelling, merges of its own
READABLE = (BYTE_LEVEL, SENTENCEPIECE, GEMMA4)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _PUNCTUATED)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORTENED}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORTENED}?"
    r"|\p{N}{1,3}" + _REST
)
_DIGITS_THEN_GPT2 = (r"\p{N}", _GPT2)
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),  # llama.cpp's, where a file names none
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"), _DIGITS_THEN_GPT2),
    **dict.fromkeys(("glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("hunyuan", "stablelm2", "solar-open"), (_QWEN2,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "kimi-k2": (_KIMI,),
    "afmoe": (
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
        r"[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
        _PUNCTUATED,
    ),
    "exaone-moe": (
        _SHORTENED + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{_CASED}+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
"""Regular expressions by which text is split, one after the other, by the file's name for its vocabulary."""
STARTS_WITH_BOS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken"})
"""Byte-level vocabularies that begin with the BOS token where the file does not say; their tokens that are whole words
are taken before merges."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file. Raises ModelError where it has none, or one that is not read."""
    metadata = open_gguf(path).metadata
    try:
        tokenizer = _tokenizer(path, metadata)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions; all are about the file's vocabulary
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} has no usable tokenizer ({reason}); fetch the file again") from error
    if metadata.get(MODEL) == SENTENCEPIECE or metadata.get(SPLIT_NAME) in STARTS_WITH_BOS:
        tokenizer.add_bos_token = True
    if WHOLE_JSON not in metadata:
        for name in ("add_bos_token", "add_eos_token"):
            if isinstance(says := metadata.get(f"tokenizer.ggml.{name}"), bool):
                setattr(tokenizer, name, says)
    return tokenizer


def _tokenizer(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens or metadata.get(MODEL) not in READABLE:
        found = metadata.get(MODEL, "no tokenizer")
        raise ModelError(
            f"{path} has no tokenizer that is read: found {found!r}, readable are {', '.join(READABLE)} (byte-level"
            " BPE and SentencePiece BPE). hybrimoe.load gives the model all the same, for token ids of your own"
        )
    special = {name: _token(metadata, tokens, key) for name, key in SPECIAL_TOKENS.items()}
    template = metadata.get(CHAT_TEMPLATE)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=_backend(path, metadata),
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )
    return tokenizer


def _backend(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    if isinstance(text := metadata.get(WHOLE_JSON), str):
        whole: Tokenizer = Tokenizer.from_str(text)
        return whole
    backend: Tokenizer = compat.gguf_tokenizer(str(metadata[ARCHITECTURE_KEY]), metadata)
    name = metadata.get(SPLIT_NAME, "default")
    if metadata[MODEL] != BYTE_LEVEL:
        _set_sentencepieces_spaces(backend, metadata)
        if metadata[MODEL] == GEMMA4:
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated")
        return backend
    if name in STARTS_WITH_BOS:
        backend.model.ignore_merges = True
    if name in SPLITS:
        splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS[name]]
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    elif name not in compat.gguf_splits():
        known = ", ".join(sorted({*SPLITS, *compat.gguf_splits()}))
        raise ModelError(
            f"{path} splits text like {name!r} ({SPLIT_NAME}) before it makes tokens of it, which is not known here;"
            f" known are {known}. hybrimoe.load gives the model all the same, for a tokenizer of your own"
        )
    return backend


def _set_sentencepieces_spaces(backend: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Spaces as SentencePiece and llama.cpp have them: one more is put before a text, also before one that begins with
    spaces (which the library's own way leaves out), unless the file says that none is."""
    first = [] if metadata.get(SPACE_BEFORE, True) is False else [normalizers.Prepend(SPACE)]
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = None


def _token(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None
