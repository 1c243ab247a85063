"""Texts that samples are made of, as token ids."""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from tightfit.checkpoints.tokenizer import Tokenizer
from tightfit.errors import UsageError
from tightfit.zoo import corpus, tasks

# Of the standard library, where a model has no held-out files and none are given: prose in docstrings, and code.
PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest", "xml")
PIECE = 1 << 16  # characters encoded at once: what the tokenizer takes for a moment stays under 10 MiB
BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Source:
    """A text by its name and the digest of what was read."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Material:
    """A tokenizer, and ``ids`` (n,) int32: all texts, one behind the other."""

    tokenizer: Tokenizer
    ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    sources: tuple[Source, ...]

    @classmethod
    def read(cls, tokenizer: Tokenizer, folder: Path | None, files: Sequence[Path] = ()) -> Material:
        """The texts of ``files``; without any the files that were held out when the model in ``folder`` was trained, as
        far as they are installed here; where none is known, packages of Python's standard library.

        Raises UsageError for a file that cannot be read as UTF-8 text.
        """
        return cls.of_texts(tokenizer, _given(files) or _held_out(folder) or _standard_library())

    @classmethod
    def of_texts(cls, tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> Material:
        """Of (name, text)."""
        sources, ids = [], []
        for name, text in texts:
            sources.append(Source(name, hashlib.sha256(text.encode()).hexdigest()))
            ids += [np.array(tokenizer.encode(piece, add_special_tokens=False), np.int32) for piece in _pieces(text)]
        if not ids:
            raise UsageError("the texts are empty", "Give --text a file that is not.")
        return cls(tokenizer, np.concatenate(ids), tuple(sources))

    @cached_property
    def begin(self) -> list[int]:
        """The tokens that begin a sequence of this model: mostly one, or none."""
        return self.tokenizer.encode("")

    @cached_property
    def examples(self) -> tasks.Material:
        """The same for texts with questions (:mod:`tightfit.zoo.tasks`)."""
        return tasks.Material(self.tokenizer.backend, self.ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` alone."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def window(self, rng: random.Random, tokens: int) -> list[int]:
        """``tokens`` token ids from a random place. Raises UsageError where there are not as many."""
        if tokens > len(self.ids):
            raise UsageError(
                f"the texts have {len(self.ids)} tokens and a sample takes {tokens}", "Give --text longer files."
            )
        start = rng.randint(0, len(self.ids) - tokens)
        window: list[int] = self.ids[start : start + tokens].tolist()
        return window

    def continued(self, rng: random.Random, tokens: int, following: int) -> tuple[list[int], list[int]]:
        """A prompt of ``tokens`` tokens, those that begin a sequence included, and what is ``following`` it."""
        beginning = self.begin[:tokens]
        text = self.window(rng, tokens - len(beginning) + following)
        ids = beginning + text
        return ids[:tokens], ids[tokens:]


def text_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> int:
    """UTF-8 bytes of the text that token ids stand for, exactly, wherever they were cut; special tokens stand for
    none."""
    backend = tokenizer.backend
    byte_level = all(backend.token_to_id(character) is not None for character in ByteLevel.alphabet())
    total = 0
    for index in ids:
        token = backend.id_to_token(index)
        if token is None or index in tokenizer.special_token_ids:
            continue
        if byte_level:  # each character stands for a byte
            total += len(token)
        else:  # as SentencePiece writes it: <0x0A> is a byte, and the mark for a space is longer than one
            total += 1 if BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
    return total


def _given(files: Sequence[Path]) -> list[tuple[str, str]]:
    found = []
    for file in files:
        try:
            found.append((file.name, file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read: {error}", "Give --text files of UTF-8 text.") from error
    return found


def _held_out(folder: Path | None) -> list[tuple[str, str]]:
    return list(corpus.held_out(folder)[0]) if folder is not None and (folder / "heldout.json").is_file() else []


def _standard_library() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        (f"{package}/{document.name}", document.text)
        for package in PACKAGES
        for document in corpus.collect([root / package])
    ]


def _pieces(text: str) -> Iterator[str]:
    """``text`` in parts that end with a line, each no longer than it must be."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end
