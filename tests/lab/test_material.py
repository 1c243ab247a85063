from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from tightfit import zoo
from tightfit.checkpoints.tokenizer import Tokenizer
from tightfit.errors import UsageError
from tightfit.lab import material as materials
from tightfit.lab.material import Material, Source, text_bytes
from tightfit.lab.rows import divergence, log_probability
from tightfit.zoo import corpus


def test_given_files_are_read_whole_and_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    text = "".join(f"line {number} of a text\n" for number in range(9000))  # more than is encoded at once
    first.write_text(text)
    second.write_text("é, 日本語\n")
    found = Material.read(tokenizer, zoo.path(), [first, second])
    assert tokenizer.decode(found.ids.tolist()) == text + "é, 日本語\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert found.sources[0] == Source("a.txt", digest)
    assert text_bytes(tokenizer, [*found.begin, *found.ids.tolist()]) == len((text + "é, 日本語\n").encode())


def test_pieces_do_not_change_how_text_is_encoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def f(x):\n    return x\n" * 50
    whole = Material.of_texts(tokenizer, [("", text)])
    monkeypatch.setattr(materials, "PIECE", 40)
    assert Material.of_texts(tokenizer, [("", text)]).ids.tolist() == whole.ids.tolist()


def test_without_files_the_text_is_one_that_the_model_has_not_seen(tokenizer: Tokenizer) -> None:
    texts, names = corpus.held_out(zoo.path())
    found = list(texts)
    assert len(found) <= names
    standard = Material.read(tokenizer, None)
    assert len(standard.ids) > 100_000
    assert {source.name.split("/")[0] for source in standard.sources} == set(materials.PACKAGES)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b""])
def test_files_that_are_no_text_are_refused(content: bytes | None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        Material.read(tokenizer, zoo.path(), [file])
    assert "--text" in error.value.hint


def test_a_prompt_has_the_tokens_asked_for_with_those_that_begin_it(material: Material) -> None:
    for tokens in (1, 2, 50):
        prompt, following = material.continued(random.Random(0), tokens, 7)
        assert (len(prompt), len(following)) == (tokens, 7)
        assert prompt[:1] == material.begin


def test_bytes_of_sentencepiece_tokens_are_counted(tmp_path: Path) -> None:
    vocabulary = {"▁the": 0, "é": 1, "<0xE6>": 2, "<0x97>": 3, "<0xA5>": 4, "<s>": 5}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.decoder = decoders.ByteFallback()
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, "words")
    assert text_bytes(tokenizer, [5, 0, 1, 2, 3, 4]) == len(" theé日".encode())


def test_rows_say_what_torch_says() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    one, other = (8 * torch.randn(50_000, generator=generator) for _ in range(2))  # more than one block
    p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
    assert divergence(one, other) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-12)
    assert divergence(one, one) == 0
    assert log_probability(one, 33_333) == pytest.approx(float(p[33_333]), rel=1e-12)
