"""From a GGUF file's vocabulary to the files of a Hugging Face tokenizer.

``gpt2`` is byte-level BPE with the merges in the file; how text is split before, a name stands for (the patterns are
those of the original tokenizers). ``llama`` is SentencePiece's BPE: its merges follow from the scores, as in
transformers' conversion.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tightfit.checkpoints.files import DOWNLOAD_AGAIN
from tightfit.errors import CheckpointError

Metadata = Callable[[str], Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of tokens
SPACE = "\u2581"  # SentencePiece's

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"
O200K = rf"{CASED % (f'{CONTRACTIONS}?', f'{CONTRACTIONS}?')}|\p{{N}}{{1,3}}|{PUNCTUATION}"
TEKKEN = rf"{CASED % ('', '')}|\p{{N}}|{PUNCTUATION}"
# Each pattern splits what those before it left, what it matches and what stands between.
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")
PATTERNS = {
    "default": DEFAULT,
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "smollm": (r"\p{N}", GPT2),
    "gpt-4o": (O200K,),
    "tekken": (TEKKEN,),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token is not built by merges
NORMALIZED = ("qwen2", "deepseek-r1-qwen")  # to NFC
BEGIN = ("llama-bpe", "llama3", "llama-v3", "tekken")  # files that do not say it begin with the token for that
# Ends of what a model says, in files that name only one of them.
ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<EOT>",
    "</s>",
)
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask", "sep": "seperator"}


def token_ids(metadata: Metadata) -> dict[str, Any]:
    """The ids that config.json has: ``bos_token_id``, ``pad_token_id`` and all that end a text as ``eos_token_id``."""
    tokens, types = metadata("tokenizer.ggml.tokens") or [], metadata("tokenizer.ggml.token_type") or []
    ends = [metadata(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    # Text that merely looks like an end is no control token.
    ends += [index for index, kind in enumerate(types) if kind == CONTROL and tokens[index] in ENDS]
    ids: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    for kind, key in (("bos", "bos"), ("pad", "padding")):
        if (index := metadata(f"tokenizer.ggml.{key}_token_id")) is not None:
            ids[f"{kind}_token_id"] = index
    return {key: value for key, value in ids.items() if value != []}


def tokenizer_files(metadata: Metadata, file: str) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of the model in ``file``. Raises CheckpointError for a kind of tokenizer
    that is not known."""
    tokens: list[str] | None = metadata("tokenizer.ggml.tokens")
    kind = metadata("tokenizer.ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file} has a tokenizer of the kind '{kind}', which is not supported",
            "Known are gpt2 (byte-level BPE) and llama (SentencePiece). Take the model's safetensors.",
        )
    types: list[int] = metadata("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{file} has {len(tokens)} tokens, but types of {len(types)}", DOWNLOAD_AGAIN)
    made = _byte_level(metadata, tokens, file) if kind == "gpt2" else _sentence_piece(metadata, tokens, types, file)
    # What SentencePiece's users defined is found in text whose spaces were replaced already.
    normalized = kind == "llama" and not _space_first(metadata)
    special = {"single_word": False, "lstrip": False, "rstrip": False}
    made["added_tokens"] = [
        {"id": index, "content": token, "special": kind != USER_DEFINED}
        | {"normalized": normalized and kind == USER_DEFINED}
        | special
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    settings: dict[str, Any] = {}
    for name, key in NAMED.items():
        index = metadata(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            settings[f"{name}_token"] = tokens[index]
    if _begins(metadata) and "bos_token" in settings:
        made["post_processor"] = _begin_with(settings["bos_token"], tokens.index(settings["bos_token"]))
    templates = {"default": metadata("tokenizer.chat_template")}
    templates |= {
        name: metadata(f"tokenizer.chat_template.{name}") for name in metadata("tokenizer.chat_templates") or ()
    }
    if any(templates.values()):
        settings["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items() if template
        ]
    return {"tokenizer.json": json.dumps(made), "tokenizer_config.json": json.dumps(settings)}


def _begins(metadata: Metadata) -> bool:
    """Whether a text begins with the token for that."""
    said = metadata("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    return metadata("tokenizer.ggml.model") == "llama" or metadata("tokenizer.ggml.pre") in BEGIN


def _space_first(metadata: Metadata) -> bool:
    return metadata("tokenizer.ggml.add_space_prefix") is not False


def _begin_with(token: str, index: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _byte_level(metadata: Metadata, tokens: list[str], file: str) -> dict[str, Any]:
    pre = metadata("tokenizer.ggml.pre") or "default"
    if pre not in PATTERNS:
        raise CheckpointError(
            f"{file} splits text as '{pre}' does, which is not known", f"Known are: {', '.join(PATTERNS)}."
        )
    merges = metadata("tokenizer.ggml.merges")
    if merges is None:
        raise CheckpointError(f"{file} has no 'tokenizer.ggml.merges'", DOWNLOAD_AGAIN)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[pre]
    ]
    return {
        "normalizer": {"type": "NFC"} if pre in NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": _bpe(tokens, merges, ignore_merges=pre in WHOLE_WORDS),
    }


def _sentence_piece(metadata: Metadata, tokens: list[str], types: list[int], file: str) -> dict[str, Any]:
    scores = metadata("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{file} has no 'tokenizer.ggml.scores' of all tokens", DOWNLOAD_AGAIN)
    first = _space_first(metadata)
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    prefix = [{"type": "Prepend", "prepend": SPACE}] if first else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    unknown = metadata("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, *spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, *strip]},
        "model": _bpe(
            tokens,
            _merges(tokens, types, scores),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        ),
    }


def _bpe(tokens: list[str], merges: list[str] | list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges],
    } | settings


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs of tokens that are tokens together, in the order of what they give: the highest score first, of one
    token those with the longest left part."""
    score_of = {token: scores[index] for index, token in enumerate(tokens) if types[index] == NORMAL}
    merges = []
    for token, score in score_of.items():
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in score_of and right in score_of:
                merges.append((left, right, score, cut))
    merges.sort(key=lambda merge: merge[2:], reverse=True)
    return [(left, right) for left, right, *_ in merges]
