"""Tokenizers: the same ids and texts as transformers, and clear words where files are missing or damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tightfit.checkpoints.tokenizer import Tokenizer
from tightfit.errors import CheckpointError, UsageError

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": {"__type": "AddedToken", "content": "<unk>"}}
CORPUS = ["def f(x):\n    return x + 1\n", "The quick brown fox jumps over the lazy dog.", "naïve café 東京 🙂"] * 20
TEXTS = [
    "",
    " ",
    "The quick brown fox",
    "  two  spaces \n\n\ttab ",
    "naïve 東京 🙂👩‍👩‍👧 \u0000 \u200b",
    "<s>written out</s><|im_end|> <|im_start|>",
    "can't don't 12345 f(x)==1",
]


def byte_level() -> tokenizers.Tokenizer:
    """Like llama 3 and qwen: bytes as characters; begins with <s>."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Like llama 2 and gemma: spaces as ▁, unknown characters as bytes; adds no special tokens."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece_like}


def write(folder: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **config})
    )
    return folder


def both(folder: Path) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    return Tokenizer(folder, "org/model"), AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    mine, theirs = both(write(tmp_path, KINDS[kind]()))
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert mine.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert mine.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert mine.vocab_size == len(theirs)
    assert mine.special_tokens == theirs.special_tokens_map
    assert (mine.bos_token_id, mine.eos_token_id, mine.pad_token_id) == (1, 2, 0)
    assert mine.token_to_id("<|im_end|>") == 4
    assert mine.token_to_id("no such token") is None


def test_the_first_token_is_added_where_only_the_config_asks_for_it(tmp_path: Path) -> None:
    tokenizer = byte_level()
    bos = tokenizer.token_to_id("<s>")
    mine, theirs = both(write(tmp_path, tokenizer, add_bos_token=True))
    assert mine.encode("fox") == theirs.encode("fox")  # the file brings it: not twice
    assert mine.encode("fox").count(bos) == 1
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # as in the files of deepseek_v3
    mine = Tokenizer(write(tmp_path, tokenizer, add_bos_token=True), "org/model")
    assert mine.encode("fox") == [bos, *mine.encode("fox", add_special_tokens=False)]
    for config in ({"add_bos_token": False}, {}, {"add_bos_token": True, "bos_token": None}):
        mine = Tokenizer(write(tmp_path, tokenizer, **config), "org/model")
        assert mine.encode("fox") == mine.encode("fox", add_special_tokens=False)


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    mine, theirs = both(write(tmp_path, tokenizer))
    assert mine.encode("fox") == theirs.encode("fox")
    assert mine.encode("fox " * 50) == theirs.encode("fox " * 50)
    assert len(mine.encode("fox " * 50)) > 50


def test_tokens_that_only_the_config_declares_special_are_matched_whole(tmp_path: Path) -> None:
    content = json.loads(byte_level().to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert tokenizer.token_to_id("<|im_end|>") == 4
    assert len(tokenizer.encode("<|im_end|>").ids) > 2
    for config in ({"eos_token": "<|im_end|>"}, {"additional_special_tokens": ["<|im_end|>"]}):
        mine, theirs = both(write(tmp_path, tokenizer, **config))
        assert mine.encode("a<|im_end|>b") == theirs.encode("a<|im_end|>b")
        assert 4 in mine.encode("a<|im_end|>b")
        assert 4 in mine.special_token_ids
        assert mine.decode([4]) == ""
        assert mine.decode([4], skip_special_tokens=False) == "<|im_end|>"


def test_a_declared_token_without_an_id_is_left_alone(tmp_path: Path) -> None:
    tokenizer = byte_level()
    mine = Tokenizer(write(tmp_path, tokenizer, pad_token="[PAD]"), "org/model")
    assert mine.pad_token_id is None
    assert mine.vocab_size == tokenizer.get_vocab_size()


def test_special_tokens_map_counts_for_old_folders_only(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    mine, theirs = both(folder)
    assert mine.special_tokens == theirs.special_tokens_map
    assert mine.eos_token_id == 4
    write(tmp_path, byte_level(), added_tokens_decoder={"2": {"content": "</s>", "special": True}})
    mine, theirs = both(folder)
    assert mine.special_tokens == theirs.special_tokens_map
    assert mine.eos_token_id == 2


def test_without_tokenizer_config_the_file_alone_works(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    mine = Tokenizer(tmp_path, "org/model")
    assert mine.decode(mine.encode("The quick fox")) == "The quick fox"
    assert mine.special_tokens == {}
    assert mine.bos_token_id is None
    assert not mine.has_chat_template


def test_bytes_that_are_no_character_yet_decode_to_the_replacement(tmp_path: Path) -> None:
    mine = Tokenizer(write(tmp_path, byte_level()), "org/model")
    ids = mine.encode("💡", add_special_tokens=False)
    assert len(ids) > 1  # the training text has no such character
    assert mine.decode(ids) == "💡"
    assert mine.decode(ids[:-1]).endswith("\ufffd")


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    mine = Tokenizer(write(tmp_path, byte_level()), "org/model")
    with pytest.raises(UsageError, match="not valid Unicode"):
        mine.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))  # what sys.argv gives for latin-1 bytes


def test_a_prompt_that_is_far_too_long_is_known_without_encoding_it_whole(tmp_path: Path, monkeypatch) -> None:
    mine = Tokenizer(write(tmp_path, byte_level()), "org/model")
    text = "The quick brown fox jumps. " * 20_000  # half a million characters
    length = len(mine.encode(text))
    assert mine.surely_exceeds(text, length // 2)
    assert not mine.surely_exceeds(text, length)
    assert not mine.surely_exceeds("", 0)
    encoded = []
    whole = mine.encode
    monkeypatch.setattr(mine, "encode", lambda text, **options: encoded.append(len(text)) or whole(text, **options))
    assert mine.surely_exceeds(text, 100)
    assert encoded == [1 << 14]


@pytest.mark.parametrize("other", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_tokenizers_of_other_kinds_are_refused_by_name(tmp_path: Path, other: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing$|tokenizer.json is missing\n"):
        Tokenizer(tmp_path, "org/model")
    (tmp_path / other).write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match=f"tokenizer.json is missing: {other} alone is not supported") as caught:
        Tokenizer(tmp_path, "org/model")
    assert "save_pretrained" in caught.value.hint


def test_damaged_tokenizer_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    whole = (folder / "tokenizer.json").read_bytes()
    content = json.loads(whole)
    out_of_range = {**content, "model": {**content["model"], "merges": [["no", "such"]]}}
    unknown = {**content, "model": {"type": "BPE 2"}}
    for damaged in (b"", whole[: len(whole) // 2], b"[]", b"\xff" * 9, json.dumps(out_of_range), json.dumps(unknown)):
        (folder / "tokenizer.json").write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read by tokenizers") as caught:
            Tokenizer(folder, "org/model")
        assert "Download the file again" in caught.value.hint
    (folder / "tokenizer.json").write_bytes(whole)
    for damaged in (b"{", b"[]", b'{"bos_token": 5}', b'{"eos_token": {"content": []}}'):
        (folder / "tokenizer_config.json").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer_config.json"):
            Tokenizer(folder, "org/model")


def test_reading_a_large_vocabulary_leaves_little_behind(tmp_path: Path) -> None:
    # 60,000 tokens: reading takes about 50 MiB, of which about 22 MiB stay when what was freed is given back
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][:60_000]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    write(tmp_path, tokenizer)
    script = f"""
import sys
from pathlib import Path
import tokenizers
from tightfit.checkpoints.tokenizer import Tokenizer
def memory(key):
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith(key))
before = memory("VmRSS")
kept = Tokenizer(Path({str(tmp_path)!r}), "org/model")
print(memory("VmRSS") - before, memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    stays, peak = (int(value) for value in done.stdout.split())
    assert stays <= 30
    assert peak <= 80


CHAT = "{{ messages[0].content }}{{ bos_token }}"


@pytest.fixture
def rendered(tmp_path: Path) -> Callable[..., str]:
    def render(**config: Any) -> str:
        folder = write(tmp_path, byte_level(), **config)
        mine, theirs = both(folder)
        messages = [{"role": "user", "content": "hi"}]
        assert mine.has_chat_template
        text = mine.render_chat(messages)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    return render


def test_chat_templates_are_found_where_transformers_finds_them(rendered, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "default " + CHAT}, {"name": "tool_use", "template": "tools"}]
    assert rendered(chat_template=CHAT) == "hi<s>"
    assert rendered(chat_template=named) == "default hi<s>"
    (tmp_path / "chat_template.jinja").write_text("file " + CHAT)
    assert rendered(chat_template=CHAT) == "file hi<s>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    assert rendered(chat_template=CHAT) == "file hi<s>"
    mine = Tokenizer(tmp_path, "org/model")
    assert mine.render_chat([{"role": "user", "content": "hi"}], tools=[{"name": "f"}]) == "with tools"


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    mine = Tokenizer(write(tmp_path, byte_level()), "org/model")
    assert not mine.has_chat_template
    with pytest.raises(UsageError, match="org/model has no chat template") as caught:
        mine.render_chat([{"role": "user", "content": "hi"}])
    assert "plain prompt" in caught.value.hint


@pytest.mark.parametrize("value", [5, {"default": "x"}, [5], [{"name": "default"}], [{"name": "a", "template": 5}]])
def test_a_malformed_chat_template_is_refused(tmp_path: Path, value: object) -> None:
    mine = Tokenizer(write(tmp_path, byte_level(), chat_template=value), "org/model")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json of org/model has a 'chat_template'"):
        mine.render_chat([{"role": "user", "content": "hi"}])
