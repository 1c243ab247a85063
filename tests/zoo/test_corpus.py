from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tightfit.errors import UsageError
from tightfit.zoo import corpus
from tightfit.zoo.presets import BOS, EOS


def source(name: str) -> str:
    """Code of more than the 400 characters that a document needs; another name gives another text."""
    return "".join(f"def {name}_{letter}(value):\n    return value + 2024\n\n\n" for letter in "abcdefghijkl")


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def names(folder: Path) -> set[str]:
    return {document.name for document in corpus.collect([folder])}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", source("text")),
        ("short.py", "import os\n"),
        ("table.py", "DATA = [\n" + "    1234567890,\n" * 100 + "]\n"),
        ("minified.py", source("wide") + "x = '" + "a" * 400 + "'\n"),
        ("pip/_vendor/copied.py", source("vendored")),
        ("encodings/cp1252.py", source("code_page")),
        ("lib/site-packages/found_under_its_own_root.py", source("package")),
    ],
)
def test_what_does_not_read_like_code_is_dropped(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path, {"module.py": source("module"), "docs/guide.rst": source("guide"), name: text})
    assert names(tmp_path) == {"module.py", "docs/guide.rst"}


def test_a_file_that_is_not_utf8_is_dropped(tmp_path: Path) -> None:
    put(tmp_path, {"module.py": source("module")})
    (tmp_path / "latin.py").write_bytes(source("latin").encode() + b"# caf\xe9\n")
    assert names(tmp_path) == {"module.py"}


def test_each_text_is_kept_once_whatever_its_licence_header(tmp_path: Path) -> None:
    header = "# Copyright\n# All rights\n# reserved\n# by someone\n"
    put(tmp_path, {"a.py": source("same"), "b/copy.py": source("same"), "c.py": header + source("same")})
    (document,) = corpus.collect([tmp_path])
    assert document.text == source("same")


def test_the_split_depends_on_the_texts_alone(tmp_path: Path) -> None:
    texts = [source(f"module_{letter}") for letter in "abcdefgh"]
    one = put(tmp_path / "one", {f"{i}.py": text for i, text in enumerate(texts)})
    other = put(tmp_path / "other", {f"package/{9 - i}.py": text for i, text in enumerate(texts)})
    train, held_out = corpus.split(corpus.collect([one]), 3)
    train_again, held_out_again = corpus.split(corpus.collect([other]), 3)
    assert [d.text for d in held_out] == [d.text for d in held_out_again]
    assert [d.text for d in train] == [d.text for d in train_again]
    assert len(held_out) == 3
    assert not {d.text for d in train} & {d.text for d in held_out}


def test_holding_everything_out_is_refused() -> None:
    documents = [corpus.Document("a.py", "text")] * 3
    with pytest.raises(UsageError, match="3 documents are too few to hold 3 out"):
        corpus.split(documents, 3)


def test_every_digit_is_a_token_of_its_own_however_often_a_number_occurs() -> None:
    tokenizer = corpus.train_tokenizer([source("year") * 20], vocab_size=400)
    assert tokenizer.encode("value = 2024", add_special_tokens=False).tokens[-4:] == ["2", "0", "2", "4"]
    # Nothing but byte 32 + digit may have a digit in it: 2024 occurs 240 times, and would be merged if it could be.
    assert [token for token in tokenizer.get_vocab() if any(c in "0123456789" for c in token) and len(token) > 1] == []


def test_a_tokenizer_gives_any_text_back_and_begins_it_as_in_training() -> None:
    tokenizer = corpus.train_tokenizer([source("any")], vocab_size=300)
    text = "naïve\t= '🙂'\r\n\n  # 12.5 µs"
    ids = tokenizer.encode(text).ids
    assert ids[0] == BOS
    assert tokenizer.decode(ids) == text


def test_token_files_hold_each_document_between_a_begin_and_an_end(tmp_path: Path) -> None:
    documents = [corpus.Document(f"{name}.py", source(name)) for name in ("first", "second", "third")]
    tokenizer = corpus.train_tokenizer([d.text for d in documents], vocab_size=300)
    counts = corpus.write(tmp_path, documents, tokenizer, held_out=1)
    read = corpus.read(tmp_path)
    assert read.counts == counts
    assert (counts.documents, counts.held_out, counts.val_bytes) == (3, 1, len(source("first")))
    assert (counts.train_tokens, counts.val_tokens) == (len(read.train), len(read.val))
    train = read.train.tolist()
    assert train.count(BOS) == train.count(EOS) == 2
    assert (train[0], train[-1]) == (BOS, EOS)
    assert read.tokenizer.decode(train) == source("second") + source("third")
    assert read.tokenizer.decode(read.val.tolist()) == source("first")
    assert json.loads((tmp_path / "heldout.json").read_text()) == ["first.py"]


def test_a_corpus_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(UsageError, match=r"python -m tightfit\.zoo\.corpus"):
        corpus.read(tmp_path)


def test_a_vocabulary_that_16_bits_cannot_name_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(corpus.train_tokenizer([source("any")], vocab_size=300).to_str())
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    with pytest.raises(UsageError, match="16-bit"):
        corpus.write(tmp_path, [corpus.Document("a.py", "text")], tokenizer, held_out=0)


def test_the_command_makes_a_corpus_of_the_folders_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = put(tmp_path / "src", {f"{letter}.py": source(f"module_{letter}") for letter in "abcdef"})
    out = tmp_path / "out"
    assert corpus.main([str(out), str(folder), "--vocab-size", "300", "--held-out", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 6
    assert corpus.read(out).tokenizer.get_vocab_size() == 300


def test_the_command_says_what_is_wrong_with_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus.main([str(tmp_path / "out"), str(tmp_path / "missing")]) == UsageError.exit_status
    captured = capsys.readouterr()
    assert "missing is not a folder" in captured.err
    assert captured.out == ""
