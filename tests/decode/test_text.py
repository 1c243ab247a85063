"""The text that is shown piece by piece is the text of all tokens, whatever the tokenizer and the tokens are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tightfit.decode.text import BROKEN, TextStream
from tightfit.errors import UsageError

END = "<end>"
WORDS = ["hello", " ", "world", "ab", "é", "你", "好", "\u0301", BROKEN]


def byte_level() -> Tokenizer:
    """GPT-2's kind: every token is a run of bytes; some tokens end or begin inside a character."""
    letters = dict(zip(_bytes_in_gpt2_order(), _gpt2_letters(), strict=True))
    runs = [bytes([byte]) for byte in range(256)]
    runs += [
        b" hello",
        " 你".encode()[:3],
        "你".encode()[1:] + b" ",
        "😀".encode()[:2],
        "😀".encode()[2:],
        b"\n\n",
    ]
    vocabulary = {"".join(letters[byte] for byte in run): index for index, run in enumerate(runs)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def _bytes_in_gpt2_order() -> list[int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _gpt2_letters() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def byte_fallback(decoder: str) -> Tokenizer:
    """SentencePiece's kind: words with a mark for the space before them, and a token for each byte."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [word.replace(" ", "▁") for word in WORDS] + ["▁hello", "▁▁", "▁你", "!"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = {
        "llama": decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
        "gemma": decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()]),
    }[decoder]
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(),
    "llama": byte_fallback("llama"),
    "metaspace": byte_fallback("metaspace"),
    "gemma": byte_fallback("gemma"),
}
TEXTS = st.text(alphabet=st.sampled_from("aé\n 你好😀👨\u200d👩🏽\u0301ﬁ\U0001f1e9\U0001f1ea")) | st.text()


def byte_ids(name: str, data: bytes) -> list[int]:
    return list(data) if name == "byte-level" else [1 + byte for byte in data]  # 0 is <unk>


@st.composite
def token_lists(draw: st.DrawFn, name: str) -> list[int]:
    """Any tokens, mixed with the bytes of real text and with bytes that are no text."""
    tokens = st.integers(0, TOKENIZERS[name].get_vocab_size() - 1).map(lambda token: [token])
    long_tokens = st.integers(256, TOKENIZERS[name].get_vocab_size() - 1).map(lambda token: [token])
    encoded = TEXTS.map(lambda text: byte_ids(name, text.encode(errors="replace")))
    raw = st.binary(max_size=30).map(lambda data: byte_ids(name, data))
    return [token for part in draw(st.lists(tokens | long_tokens | encoded | raw, max_size=20)) for token in part]


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: characters come one by one, and the first stop string to be complete ends the text."""
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            stop = max(ends, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_together_are_the_text_of_all_tokens(name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=200, deadline=None)
    @given(token_lists(name))
    def check(ids: list[int]) -> None:
        pieces = pieces_of(TextStream(tokenizer, skip_special_tokens=skip), ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_ends_before_the_first_complete_stop_string(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    alphabet = st.text(alphabet="ab 你\n😀", min_size=1, max_size=4)

    @settings(max_examples=200, deadline=None)
    @given(st.text(alphabet="ab 你\n😀", max_size=30), st.lists(alphabet, max_size=4))
    def check(text: str, stops: list[str]) -> None:
        ids = byte_ids(name, text.encode())
        stream = TextStream(tokenizer, stops)
        shown = ""
        expected, stopped = cut(tokenizer.decode(ids), stops)
        for piece in pieces_of(stream, ids):
            shown += piece
            assert expected.startswith(shown)  # at no time more is shown than in the end
        assert (shown, stream.stopped) == (expected, stopped)

    check()


def test_an_emoji_in_four_tokens_is_shown_whole() -> None:
    ids = byte_ids("byte-level", "a😀b".encode())
    assert pieces_of(TextStream(TOKENIZERS["byte-level"]), ids) == ["a", "", "", "", "😀", "b", ""]


def test_text_before_an_unfinished_character_is_shown_at_once() -> None:
    stream = TextStream(TOKENIZERS["byte-level"])
    start = byte_level().token_to_id("Ġä½")  # a space and two of the three bytes of 你
    assert stream.push(start) == " "
    assert stream.push("你".encode()[2]) == "你"


def test_only_the_first_word_loses_its_space() -> None:
    tokenizer = TOKENIZERS["llama"]
    hello, end = tokenizer.token_to_id("▁hello"), tokenizer.token_to_id(END)
    assert pieces_of(TextStream(tokenizer), [end, hello, end, hello, end]) == ["", "hello", "", " hello", "", ""]


def test_a_run_of_bytes_is_read_by_its_end() -> None:
    tokenizer = TOKENIZERS["llama"]
    run = byte_ids("llama", "你".encode() + b"\xff")
    # The whole run is invalid, so each byte of the character that could have been shown is, too.
    assert "".join(pieces_of(TextStream(tokenizer), run)) == BROKEN * 4


def test_a_part_of_a_stop_string_waits_until_it_is_none() -> None:
    stream = TextStream(TOKENIZERS["byte-level"], ["\n\nUser:"])
    assert [stream.push(byte) for byte in b"Hi\n\nUs"] == ["H", "i", "", "", "", ""]
    assert stream.push(ord("e")) == ""
    assert stream.push(ord("d")) == "\n\nUsed"
    assert stream.stopped is None


def test_nothing_is_shown_after_a_stop_string() -> None:
    stream = TextStream(TOKENIZERS["byte-level"], ["stop"])
    assert "".join(pieces_of(stream, list(b"a stop sign"))) == "a "
    assert stream.stopped == "stop"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        TextStream(TOKENIZERS["llama"], [""])


class Counting:
    """A tokenizer that counts how many tokens it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.decoded = tokenizer, 0
        self.token_to_id = tokenizer.token_to_id

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("byte-level", list(b"word ")),
        ("byte-level", [0xFF]),  # never a character
        ("byte-level", list("😀".encode())),
        ("llama", [1 + 0xFF]),  # a run that never ends
        ("llama", [TOKENIZERS["llama"].token_to_id("▁")]),
        ("llama", [TOKENIZERS["llama"].token_to_id(BROKEN)]),  # a real token that looks unfinished
        ("metaspace", [TOKENIZERS["metaspace"].token_to_id("▁▁")]),
        ("llama", [TOKENIZERS["llama"].token_to_id(END)]),
    ],
)
def test_the_work_is_linear_in_the_tokens(name: str, ids: list[int]) -> None:
    tokenizer = Counting(TOKENIZERS[name])
    length = 3000
    many = (ids * length)[:length]
    assert "".join(pieces_of(TextStream(tokenizer), many)) == tokenizer.tokenizer.decode(many)
    # The worst of these decodes a window of 20 tokens a few times for each; decoding everything anew would be 1500.
    assert tokenizer.decoded < 150 * length
