"""Tokenizers from GGUF give the ids and the text of those of Hugging Face that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.gguf_files import vocabulary
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tightfit import zoo
from tightfit.checkpoints.gguf.tokenizer import CONTROL, NORMAL, USER_DEFINED, token_ids, tokenizer_files
from tightfit.checkpoints.tokenizer import Tokenizer
from tightfit.errors import CheckpointError

TEXTS = (
    "",
    " ",
    "   ",
    "Once upon a time, there's a 12345-year-old   dragon.\n\n\tIt said: \"Don't!\"  \n",
    "naïve café — Größe ∑ λόγος 你好 世界 🙂🏽 e\u0301\u0301",
    "a\r\n\r\nb  c\u00a0d\u2581e  1.5e-3 3,000 0x1F x+=1; y<=>z^^~|",
    "<|bos|>x<|end|> y <|end|><|user|>Hi",
    "I'LL we'Ve IT'S CamelCase HTTPServer ÀÉÎ",
)
SPLIT = {"behavior": "isolated", "invert": False}


def nano() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((zoo.path("nano") / "tokenizer.json").read_text())
    return made


def byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


# The splits of the originals, as transformers has them.
ORIGINALS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(TikTokenConverter("").pattern), **SPLIT), byte_level()]
    ),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), **SPLIT), byte_level()]),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def original(pre: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(nano() | {"post_processor": None}))
    tokenizer.pre_tokenizer = ORIGINALS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        made = json.loads(tokenizer.to_str())
        made["model"]["ignore_merges"] = True
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(made))
    return tokenizer


def opened(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    for name, text in tokenizer_files(metadata.get, "model.gguf").items():
        (folder / name).write_text(text)
    return Tokenizer(folder, "model.gguf")


def assert_same(mine: Tokenizer, theirs: tokenizers.Tokenizer, text: str) -> None:
    ids = mine.encode(text)
    assert ids == theirs.encode(text).ids, text
    assert mine.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
    assert mine.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    mine, theirs = opened(tmp_path, vocabulary(pre)), original(pre)
    for text in TEXTS:
        assert_same(mine, theirs, text)

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def any_text(text: str) -> None:
        assert_same(mine, theirs, text)

    any_text()


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["Hi", "!!", " don", "'", "t", " ", "123", "45", "$$", " x"]),
        ("gpt-4o", ["Hi", "!!", " don't", " ", "123", "45", "$$", " x"]),
        ("tekken", ["Hi", "!!", " don", "'t", " ", "1", "2", "3", "4", "5", "$$", " x"]),
    ],
)
def test_other_splits(pre: str, pieces: list[str]) -> None:
    made = tokenizer_files(vocabulary(pre).get, "model.gguf")["tokenizer.json"]
    split = tokenizers.Tokenizer.from_str(made).pre_tokenizer.pre_tokenize_str("Hi!! don't 12345$$ x")
    assert [piece.replace("Ġ", " ") for piece, _ in split] == pieces


def sentence_piece(prefix: bool) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """A vocabulary of SentencePiece as GGUF has it, and transformers' tokenizer for it."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    text = [text for text in TEXTS if "<|" not in text] * 3 + ["the theme of the thesis is there"] * 5
    learner.train_from_iterator(text, tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learnt = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    first = ["<unk>", "<s>", "</s>", "<start>", "▁▁▁" if prefix else "▁▁"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learnt = [token for token in learnt if token not in first]
    tokens = [*first, *bytes_, *learnt]
    kinds = [2, CONTROL, CONTROL, CONTROL, USER_DEFINED if not prefix else NORMAL, *[6] * 256, *[NORMAL] * len(learnt)]
    # As SentencePiece does: what was learnt first has the highest score, single characters the lowest ones.
    order = sorted(range(261, len(tokens)), key=lambda index: (len(tokens[index]) == 1, index))
    scores = [0.0] * 261 + [0.0] * len(learnt)
    for place, index in enumerate(order):
        scores[index] = -float(place)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    vocab = {token: index for index, token in enumerate(tokens)}
    normal = {token: scores[vocab[token]] for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges = generate_merges({token: vocab[token] for token in normal}, list(normal.items()))
    theirs = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    theirs.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    theirs.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in first[:4]])
    if not prefix:
        theirs.add_tokens([tokenizers.AddedToken("▁▁", normalized=True)])
    return metadata, theirs


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece(prefix: bool, tmp_path: Path) -> None:
    metadata, theirs = sentence_piece(prefix)
    mine = opened(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": False})
    for text in (*TEXTS, "<start>the theme </s>   of<s>"):
        assert_same(mine, theirs, text)

    @given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("the ms▁"))
    def any_text(text: str) -> None:
        assert_same(mine, theirs, text)

    any_text()
    with_first = opened(tmp_path, metadata)  # what the kind implies
    assert with_first.encode("the") == [1, *mine.encode("the")]
    assert with_first.encode("the", add_special_tokens=False) == mine.encode("the")


def test_special_tokens_and_templates(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ bos_token }}{{ message.content }}{% endfor %}"
    metadata = vocabulary("llama-bpe") | {
        "tokenizer.chat_template": template,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools" + template,
        "tokenizer.ggml.add_bos_token": None,
    }
    mine = opened(tmp_path, metadata)
    assert (mine.bos_token_id, mine.eos_token_id, mine.pad_token_id) == (0, 1, 2)
    assert mine.special_token_ids == frozenset(range(6))
    assert mine.encode("a")[0] == 0  # llama 3 begins with it unless it says otherwise
    assert mine.render_chat([{"role": "user", "content": "Hi"}]) == "<|bos|>Hi"
    assert mine.render_chat([{"role": "user", "content": "Hi"}], tools=[{}]) == "tools<|bos|>Hi"


def test_all_ends_of_a_text_are_known() -> None:
    metadata = vocabulary() | {"tokenizer.ggml.eot_token_id": 3}
    # <|end|> is a control token that ends what a model says, whatever the file calls it
    assert token_ids(metadata.get) == {"eos_token_id": [1, 3, 5], "bos_token_id": 0, "pad_token_id": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "splits text as 'klingon' does"),
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'"),
        ({"tokenizer.ggml.tokens": None}, "kind 'gpt2'"),
        ({"tokenizer.ggml.merges": None}, "no 'tokenizer.ggml.merges'"),
        ({"tokenizer.ggml.token_type": [1]}, "types of 1"),
        ({"tokenizer.ggml.model": "llama"}, "no 'tokenizer.ggml.scores'"),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_files((vocabulary("gpt-2") | changes).get, "model.gguf")
