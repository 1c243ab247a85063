"""The scheduler's promises: everybody decodes, chunks start at fixed places, nobody waits without need."""

from __future__ import annotations

from tightfit.decode.sample import Sampler, SamplingParams
from tightfit.engine.scheduler import Scheduler
from tightfit.engine.sequence import Sequence


def sequence(prompt: int, computed: int = 0, new: int = 0) -> Sequence:
    return Sequence(
        tokens=list(range(prompt + new)),
        prompt_length=prompt,
        max_new_tokens=10,
        stop_tokens=frozenset(),
        sampler=Sampler(SamplingParams()),
        computed=computed,
    )


def test_decoding_sequences_come_first_and_prefill_takes_one_chunk() -> None:
    scheduler = Scheduler(slots=3, chunk=16)
    scheduler.add(sequence(prompt=40))
    scheduler.add(sequence(prompt=5, computed=5, new=1))
    batch, order = scheduler.schedule()
    assert [(s.decode, s.start, len(s.tokens)) for s in batch.segments] == [(True, 5, 1), (False, 0, 16)]
    assert [s.prompt_length for s in order] == [5, 40]


def test_chunks_start_at_multiples_of_the_chunk_size_whatever_else_runs() -> None:
    scheduler = Scheduler(slots=4, chunk=8)
    long = sequence(prompt=30, computed=3)  # a conversation that goes on in the middle of a chunk
    scheduler.add(sequence(prompt=6))
    scheduler.add(long)
    starts = []
    while long.computed < 30:
        batch, order = scheduler.schedule()
        for segment, owner in zip(batch.segments, order, strict=True):
            owner.computed = segment.stop
            if owner is long:
                starts.append(segment.start)
            elif segment.logits == "last":
                scheduler.finish(owner)
    assert starts == [3, 8, 16, 24]


def test_only_the_last_chunk_of_a_prompt_asks_for_logits() -> None:
    scheduler = Scheduler(slots=1, chunk=8)
    scheduler.add(sequence(prompt=16))
    first, [owner] = scheduler.schedule()
    owner.computed = 8
    second, _ = scheduler.schedule()
    assert [first.segments[0].logits, second.segments[0].logits] == ["none", "last"]


def test_a_step_never_computes_more_prompt_rows_than_a_chunk_with_padding() -> None:
    scheduler = Scheduler(slots=4, chunk=64)
    for length in (17, 40, 20, 8):
        scheduler.add(sequence(prompt=length))
    batch, _ = scheduler.schedule()
    # 17 tokens are padded to 32; 40 to 64, which do not fit beside them; 20 to 32, which do; nothing is left for 8.
    assert [len(s.tokens) for s in batch.segments] == [17, 20]


def test_sequences_wait_for_a_slot_and_get_the_one_that_is_given_back() -> None:
    scheduler = Scheduler(slots=1, chunk=8)
    first, second = sequence(prompt=2), sequence(prompt=2)
    scheduler.add(first)
    scheduler.add(second)
    _, order = scheduler.schedule()
    assert order == [first]
    scheduler.finish(first)
    _, order = scheduler.schedule()
    assert order == [second]
    assert second.slot == first.slot == 0
