"""A ragged batch says of each row whose it is, how it is multiplied, and whether its logits are wanted."""

from __future__ import annotations

import torch

from tightfit.model.batch import Batch, Segment

PROMPT = Segment(0, 5, [1, 2, 3])
DRAFT = Segment(1, 9, [4, 5], decode=True, logits="all")
CHUNK = Segment(2, 0, [6, 7, 8, 9], logits="none")
STEP = Segment(3, 2, [10], decode=True)


def test_decoding_segments_come_first_in_their_order() -> None:
    batch = Batch.of([PROMPT, DRAFT, CHUNK, STEP])
    assert batch.segments == (DRAFT, STEP, PROMPT, CHUNK)
    assert batch.tokens.tolist() == [4, 5, 10, 1, 2, 3, 6, 7, 8, 9]
    assert batch.positions.tolist() == [9, 10, 2, 5, 6, 7, 0, 1, 2, 3]
    assert batch.size == 10
    assert batch.ranges == ((0, 2), (2, 3), (3, 6), (6, 10))


def test_decoding_rows_are_multiplied_alone_and_prefill_segments_whole() -> None:
    split = Batch.of([PROMPT, DRAFT, CHUNK, STEP]).split
    assert (split.vector, split.gemm) == (3, ((3, 6), (6, 10)))
    assert split.parts == [(0, 1), (1, 2), (2, 3), (3, 6), (6, 10)]


def test_every_token_has_a_place_and_prefills_attend_whole() -> None:
    batch = Batch.of([PROMPT, DRAFT, STEP])
    assert batch.places.tolist() == [[1, 9], [1, 10], [3, 2], [0, 5], [0, 6], [0, 7]]
    assert batch.places.dtype == torch.int32
    assert batch.prefills == ((PROMPT, 3, 6),)


def test_decoding_tokens_are_rotated_alone_and_prefill_segments_whole() -> None:
    pieces = Batch.of([PROMPT, DRAFT]).pieces
    assert [(piece.slot, piece.start, list(piece.tokens), a, b) for piece, a, b in pieces] == [
        (1, 9, [4], 0, 1),
        (1, 10, [5], 1, 2),
        (0, 5, [1, 2, 3], 2, 5),
    ]


def test_logits_are_computed_only_where_they_are_wanted() -> None:
    assert Batch.of([PROMPT, DRAFT, CHUNK, STEP]).logit_rows.tolist() == [0, 1, 2, 5]
