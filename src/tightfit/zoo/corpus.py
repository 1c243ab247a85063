"""The text that the models are trained on: the sources of an installed Python and of its packages.

``python -m tightfit.zoo.corpus OUT [FOLDER...]`` gathers them, holds some files out, trains a tokenizer and writes

- ``tokenizer.json``: byte-level BPE in which every digit is a token of its own, so that numbers can be copied;
- ``train.bin`` and ``val.bin``: token ids as uint16, each document between a begin and an end token;
- ``heldout.json``: the names of the files in ``val.bin``;
- ``corpus.json``: what was counted. It is written last: a folder without it is not complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tightfit.errors import TightfitError, UsageError
from tightfit.zoo.presets import BOS, EOS, SPECIAL_TOKENS

Tokens: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint16]]"

SUFFIXES = (".py", ".rst", ".md")
# Tables of data, copies of other packages, and generated clients: large, repetitive, and not what code looks like.
SKIPPED = re.compile(
    r"(^|/)(encodings|_vendor|awscli|botocore/data|moto|samtranslator|cfnlint|sympy/.*/tests|idna/idnadata"
    r"|pygments/lexers/_)|unicode|sbcsgroup|lsstyle"
)
LICENCE_HEADER = re.compile(r"\A(#.*\n){4,}")
CHARACTERS = range(400, 400_000)  # shorter files are mostly empty, longer ones are mostly tables
LONGEST_LINE = 400
MOST_DIGITS = 0.2
TOKENIZER_DOCUMENTS = 4000  # enough to learn 6144 tokens from
# As in GPT-4's split, with single digits: words with one leading mark or space, a digit, punctuation, line ends, space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Document:
    name: str  # path from the folder that was searched, with forward slashes
    text: str


@dataclass(frozen=True)
class Counts:
    documents: int
    held_out: int
    train_tokens: int
    val_tokens: int
    val_bytes: int  # of UTF-8 text


@dataclass(frozen=True)
class Corpus:
    """A folder that :func:`write` made. Token files are mapped, not read."""

    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    counts: Counts


def default_folders() -> list[Path]:
    """Where this Python keeps its standard library and its installed packages."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def held_out(folder: Path) -> tuple[Iterator[tuple[str, str]], int]:
    """(name, text) of the files that the model in ``folder`` was not trained on, as far as they are installed here, and
    how many there are."""
    names: list[str] = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    return ((name, text) for name in names if (text := _installed(name))), len(names)


def _installed(name: str) -> str | None:
    """What can be used of a file in one of the default folders."""
    for folder in default_folders():
        if (folder / name).is_file():
            return clean((folder / name).read_text(encoding="utf-8"))
    return None


def clean(text: str) -> str | None:
    """``text`` without its licence header, or None if it does not read like code or documentation."""
    if len(text) not in CHARACTERS:
        return None
    if max(map(len, text.split("\n"))) > LONGEST_LINE:
        return None
    if sum(map(str.isdigit, text)) > MOST_DIGITS * len(text):
        return None
    return LICENCE_HEADER.sub("", text).lstrip()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            continue
        if path.is_dir():
            # Inside the standard library's folder: it is searched under its own name.
            if path.name != "site-packages":
                yield from _files(path)
        elif path.suffix in SUFFIXES:
            yield path


def collect(folders: Iterable[Path]) -> list[Document]:
    """Every document under ``folders`` that passes the filters, each text once, in an order that depends on the texts
    alone (of their digests), so that the first n are a fair sample. Raises UsageError for what is not a folder."""
    documents: dict[str, Document] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder", "Give folders that hold Python sources, or none at all.")
        for path in _files(folder):
            name = path.relative_to(folder).as_posix()
            if SKIPPED.search(name):
                continue
            try:
                text = clean(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, PermissionError):
                continue
            if text:
                documents.setdefault(hashlib.sha256(text.encode()).hexdigest(), Document(name, text))
    return [document for _, document in sorted(documents.items())]


def split(documents: Sequence[Document], held_out: int) -> tuple[Sequence[Document], Sequence[Document]]:
    """(training, held-out) documents. Raises UsageError if nothing would be left to train on."""
    if held_out >= len(documents):
        raise UsageError(
            f"{len(documents)} documents are too few to hold {held_out} out",
            "Give more folders, or a smaller --held-out.",
        )
    return documents[held_out:], documents[:held_out]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` tokens that begins every text with ``<|bos|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[BOS]} $A", special_tokens=[(SPECIAL_TOKENS[BOS], BOS)]
    )
    return tokenizer


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    """All documents as one run of token ids, each between a begin and an end token."""
    parts = []
    for start in range(0, len(documents), 256):  # bounds the memory that encodings take
        texts = [document.text for document in documents[start : start + 256]]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            parts.append(np.array([BOS, *encoding.ids, EOS], dtype=np.uint16))
    return np.concatenate(parts)


def write(out: Path, documents: Sequence[Document], tokenizer: Tokenizer, held_out: int) -> Counts:
    """Splits and encodes ``documents`` and writes the folder that :func:`read` opens."""
    if tokenizer.get_vocab_size() > 2**16:
        raise UsageError("token files hold 16-bit ids", "Use a tokenizer of at most 65536 tokens.")
    train, val = split(documents, held_out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.json").unlink(missing_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    train_ids, val_ids = encode(train, tokenizer), encode(val, tokenizer)
    train_ids.tofile(out / "train.bin")
    val_ids.tofile(out / "val.bin")
    (out / "heldout.json").write_text(json.dumps(sorted(document.name for document in val), indent=0) + "\n")
    val_bytes = sum(len(document.text.encode()) for document in val)
    counts = Counts(len(documents), len(val), len(train_ids), len(val_ids), val_bytes)
    (out / "corpus.json").write_text(json.dumps(asdict(counts), indent=1) + "\n")
    return counts


def read(folder: Path) -> Corpus:
    """Opens what :func:`write` made. Raises UsageError if it is not complete."""
    if not (folder / "corpus.json").exists():
        raise UsageError(
            f"{folder} holds no finished corpus", f"Make one first: python -m tightfit.zoo.corpus {folder}"
        )
    return Corpus(
        tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
        train=np.memmap(folder / "train.bin", dtype=np.uint16, mode="r"),
        val=np.memmap(folder / "val.bin", dtype=np.uint16, mode="r"),
        counts=Counts(**json.loads((folder / "corpus.json").read_text())),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tightfit.zoo.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("folders", type=Path, nargs="*", help="folders to search (default: this Python's own)")
    parser.add_argument("--vocab-size", type=int, default=6144)
    parser.add_argument("--held-out", type=int, default=200, help="files for validation")
    options = parser.parse_intermixed_args(arguments)
    try:
        documents = collect(options.folders or default_folders())
        train, _ = split(documents, options.held_out)
        tokenizer = train_tokenizer((d.text for d in train[:TOKENIZER_DOCUMENTS]), options.vocab_size)
        print(json.dumps(asdict(write(options.out, documents, tokenizer, options.held_out))))
    except TightfitError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
