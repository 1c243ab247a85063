"""What the prompt cache finds goes on with the bits of computing it again, in every kind of cache, from memory and from
files; it keeps its limits, lets go of what was used longest ago, and believes no file that is not what it should be."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.driver import Run, Tiny

from tightfit.budget import mounts
from tightfit.budget.ledger import Arena
from tightfit.errors import UsageError
from tightfit.kv.make import entry_nbytes
from tightfit.kv.reuse import disk as disk_module
from tightfit.kv.reuse.disk import LOCK, OVERHEAD, PART, Disk
from tightfit.kv.reuse.memory import OBJECTS, UNIT, Memory, smallest_memory, unit_of
from tightfit.kv.reuse.prompts import PromptCache
from tightfit.model.batch import Segment
from tightfit.model.decoder import cache_layouts

CHUNK, CONTEXT = 64, 512
MIB = 1 << 20
ROOT = bytes(32)
METHODS = [
    "none",
    "window(keep=96)",
    "window(keep=96,positions=original)",
    "h2o(keep=96)",
    "snapkv(keep=96,window=16,budget=adakv)",
    "snapkv(keep=96,window=16,budget=dynamickv)",
    "d2o(keep=96)",
    "corm(keep=96,window=40)",
    "scope(keep=96,output=40,recent=16)",
    "int8(recent=0)",
    "int4(recent=40)",
    "int2(recent=32,of=keys)",
    "think",
    "quest(tokens=64,full=1)",
    "recycled(tokens=64,full=1,stride=7)",
    "host(resident=64)",
    "int4(recent=32)+host(resident=32)",
    "snapkv(keep=160,window=16)+int4(recent=32)+think+host(resident=32)",
    "h2o(keep=128,budget=adakv)+int8(recent=32)+quest(tokens=64)",
]


def prompt_cache(
    run: Run, memory: int | None = 8 * MIB, folder: Path | None = None, limit: int = 64 * MIB
) -> PromptCache:
    """A prompt cache of ``run``'s cache, in ``memory`` bytes and in files."""
    largest = run.cache.largest_entry(run.chunk)
    kept = None if memory is None else Memory(Arena(memory), memory, unit_of(largest, run.cache.whole_entries))
    return PromptCache(run.cache, run.chunk, ROOT, kept, None if folder is None else Disk(folder, limit, ROOT))


def prefill(run: Run, prompts: PromptCache, tokens: list[int], slot: int = 0) -> tuple[int, torch.Tensor]:
    """How many tokens were found, and the logits after the last, as the engine computes a prompt."""
    prefix = prompts.prefix(tokens)
    found = prompts.restore(slot, prefix)
    for start in range(found, len(tokens), run.chunk):
        part = Segment(slot, start, tokens[start : start + run.chunk], length=len(tokens))
        run.cache.begin(slot, start)
        logits = run.step(part)[-1]
        run.cache.prefilled(slot, start, part.stop)
        prompts.computed(slot, prefix, start, part.stop)
    run.lengths[slot] = len(tokens)
    return found, logits


def check_the_same(run: Run, logits: torch.Tensor, slot: int, fresh: Run, tokens: list[int], count: int = 40) -> None:
    """A sequence goes on as if all of it had just been computed, over a moment at which tokens are let go of."""
    expected = fresh.prefill(tokens)
    assert torch.equal(logits, expected)
    (new, after), (expected_new, expected_after) = run.generate(logits, count, slot), fresh.generate(expected, count)
    assert new == expected_new
    assert all(torch.equal(a, b) for a, b in zip(after, expected_after, strict=True))


@pytest.mark.parametrize("kv", METHODS)
@pytest.mark.parametrize("name", ["llama", "sliding", "latent"])
def test_what_is_found_goes_on_with_the_same_bits(
    tiny: Callable[..., Tiny], name: str, kv: str, tmp_path: Path
) -> None:
    model = tiny(name, torch.bfloat16)
    try:
        run = model.run(kv, context=CONTEXT, sequences=2, chunk=CHUNK)
    except UsageError as error:
        pytest.skip(error.message)
    tokens = model.tokens(300)
    other = tokens[:260] + model.tokens(70, seed=2)
    prompts = prompt_cache(run, folder=tmp_path)
    assert prefill(run, prompts, tokens)[0] == 0
    # In the place of another sequence, which went on to decode.
    run.generate(run.prefill(model.tokens(200, seed=3), slot=1), 5, slot=1)
    found, logits = prefill(run, prompts, other, slot=1)
    assert found == 4 * CHUNK
    check_the_same(run, logits, 1, model.run(kv, context=CONTEXT, chunk=CHUNK), other)
    # After a restart, from files alone, and from memory what came from files.
    again = model.run(kv, context=CONTEXT, sequences=2, chunk=CHUNK)
    prompts = prompt_cache(again, folder=tmp_path)
    for slot in (0, 1):
        found, logits = prefill(again, prompts, tokens, slot)
        assert found == 4 * CHUNK
        check_the_same(again, logits, slot, model.run(kv, context=CONTEXT, chunk=CHUNK), tokens)
    assert (prompts.disk_hits, prompts.memory_hits) == ((4, 4) if kv == "none" else (1, 1))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=6), min_size=2, max_size=8), st.integers(2, 12))
def test_prompts_in_any_order_and_any_room_give_the_same_bits(
    tiny: Callable[..., Tiny], shapes: list[list[int]], room: int
) -> None:
    """Prompts are made of blocks of two kinds: many share beginnings, and few entries have room."""
    model = tiny("sliding")
    blocks = [model.tokens(16, seed=seed) for seed in (5, 6)]
    run = model.run("none", context=128, chunk=16)
    largest = run.cache.largest_entry(16)
    prompts = prompt_cache(run, room * (largest + OBJECTS))
    for shape in shapes:
        tokens = [token for kind in shape for token in blocks[kind]] + [3]
        found, logits = prefill(run, prompts, tokens)
        assert found <= 16 * len(shape)
        assert torch.equal(logits, model.run("none", context=128, chunk=16).prefill(tokens))
        memory = prompts.memory
        assert memory is not None
        assert len(memory.entries) <= room
        # No entry without those before it, as far as they are of this prompt.
        held = [name in memory.entries for name in prompts.prefix(tokens).names]
        assert held == sorted(held, reverse=True)
        assert held[0]


def test_a_prompt_that_was_found_whole_still_computes_a_token(tiny: Callable[..., Tiny]) -> None:
    model = tiny()
    run = model.run("none", context=CONTEXT, chunk=CHUNK)
    prompts, tokens = prompt_cache(run), model.tokens(2 * CHUNK)
    first = prefill(run, prompts, tokens)[1]
    found, second = prefill(run, prompts, tokens)
    assert found == CHUNK
    assert torch.equal(first, second)
    # And its last block is there for a prompt that goes on.
    assert prefill(run, prompts, [*tokens, 1])[0] == 2 * CHUNK


def test_what_goes_on_from_another_place_is_not_kept(tiny: Callable[..., Tiny]) -> None:
    """A block of which decoding computed a part has other bits than a prompt's."""
    model = tiny()
    run = model.run("none", context=CONTEXT, chunk=CHUNK)
    prompts, tokens = prompt_cache(run), model.tokens(CHUNK + 10)
    prompts.computed(0, prompts.prefix(tokens), 3, CHUNK)
    assert prompts.memory is not None
    assert not prompts.memory.entries


def test_a_ring_that_was_written_over_is_not_saved(tiny: Callable[..., Tiny]) -> None:
    """Where a whole prompt goes through a layer at once, windows have moved on when it is done."""
    model = tiny("sliding")
    run = model.run("none", context=CONTEXT, chunk=CHUNK)
    tokens = model.tokens(200)
    run.prefill(tokens, layered=True)
    assert run.cache.entry_nbytes(0, 0, CHUNK) == 0  # of 200 tokens a ring has the last 40 - 1 + 64
    assert run.cache.entry_nbytes(0, 128, 192) == run.cache.largest_entry(CHUNK)
    prompts = prompt_cache(run)
    prompts.computed(0, prompts.prefix(tokens), 0, len(tokens))
    assert prefill(run, prompts, tokens)[0] == 0


def test_an_entry_takes_the_bytes_that_are_promised(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    for name, kv in (("llama", "none"), ("latent", "none"), ("llama", "int4(recent=32)"), ("llama", "host")):
        model = tiny(name)
        run = model.run(kv, context=CONTEXT, chunk=CHUNK)
        folder = tmp_path / f"{name}-{kv}"
        prompts = prompt_cache(run, None, folder)
        prefill(run, prompts, model.tokens(CONTEXT - 8))
        promised = entry_nbytes(kv, cache_layouts(model.spec, CONTEXT, CHUNK), CONTEXT, "float32", CHUNK)
        sizes = [path.stat().st_size - OVERHEAD for path in folder.glob("*.prefix")]
        if kv == "none":
            assert sizes == [promised] * 7
        else:
            assert len(sizes) == 1
            assert 0.25 * promised < sizes[0] <= promised  # room for tokens to come is most of a small cache


def names_of(prompts: PromptCache, tokens: list[int]) -> list[bytes]:
    return prompts.prefix(tokens).names


def test_names_stand_for_all_that_came_before(tiny: Callable[..., Tiny]) -> None:
    run = tiny().run("none", context=CONTEXT, chunk=CHUNK)
    prompts, tokens = prompt_cache(run), list(range(4 * CHUNK))
    names = names_of(prompts, tokens)
    assert len(set(names)) == len(names) == 4
    assert names_of(prompts, tokens + [7] * (CHUNK - 1)) == names
    changed = names_of(prompts, [*tokens[:CHUNK], 9, *tokens[CHUNK + 1 :]])
    assert changed[0] == names[0]
    assert not set(changed[1:]) & set(names)
    other = PromptCache(run.cache, CHUNK, b"\1" * 32, None, None)
    assert not set(names_of(other, tokens)) & set(names)
    assert not set(prompts.prefix(tokens, b"longer").names) & set(names)


def small_memory(entries: int, unit: int = 100) -> Memory:
    limit = entries * (unit + OBJECTS)
    return Memory(Arena(limit), limit, unit)


def fill(value: int, nbytes: int) -> Callable[[Callable[[torch.Tensor], None]], None]:
    def save(put: Callable[[torch.Tensor], None]) -> None:
        for start in range(0, nbytes, 7):
            put(torch.full((min(7, nbytes - start),), value, dtype=torch.uint8))

    return save


def read(memory: Memory, name: bytes, nbytes: int) -> list[int]:
    reader, out = memory.reader(name), torch.zeros(nbytes, dtype=torch.uint8)
    assert reader is not None
    reader(out[:1])
    reader(out[1:])
    return out.tolist()


def test_what_was_used_longest_ago_goes_first() -> None:
    memory = small_memory(3)
    for age, name in enumerate((b"a", b"b", b"c")):
        assert memory.put(name, 100, age, fill(age, 100))
    memory.touch(b"a", 10)
    assert memory.put(b"d", 100, 11, fill(3, 100))
    assert set(memory.entries) == {b"a", b"c", b"d"}
    assert read(memory, b"a", 100) == [0] * 100
    assert not memory.put(b"e", 100, 1, fill(4, 100))  # all others are younger
    assert set(memory.entries) == {b"a", b"c", b"d"}


def test_entries_of_several_units_fit_wherever_there_is_room() -> None:
    memory = small_memory(5)
    for age, (name, nbytes) in enumerate(((b"a", 100), (b"b", 250), (b"c", 30))):
        assert memory.put(name, nbytes, age, fill(age + 1, nbytes))
    memory.touch(b"b", 5)
    assert memory.nbytes == 500
    assert memory.put(b"d", 101, 6, fill(4, 101))  # in the places of a and c
    assert set(memory.entries) == {b"b", b"d"}
    assert read(memory, b"b", 250) == [2] * 250
    assert read(memory, b"d", 101) == [4] * 101
    assert not memory.put(b"e", 501, 9, fill(5, 501))
    assert set(memory.entries) == {b"b", b"d"}


def test_what_is_interrupted_leaves_no_entry_and_its_room() -> None:
    memory = small_memory(2)

    def interrupted(put: Callable[[torch.Tensor], None]) -> None:
        put(torch.zeros(10, dtype=torch.uint8))
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            memory.put(b"a", 200, 1, interrupted)
    assert not memory.entries
    assert memory.put(b"b", 200, 1, fill(1, 200))


def test_the_stated_smallest_limit_holds_the_largest_entry() -> None:
    for largest, whole in ((1000, False), (UNIT + 1, True), (3 * UNIT, True)):
        limit = smallest_memory(largest, whole)
        for room, fits in ((limit, True), (limit - 1, False)):
            memory = Memory(Arena(room), room, unit_of(largest, whole))
            assert memory.put(b"a", largest, 1, fill(1, largest)) is fits


NBYTES = 1000
NAMES = [bytes([number]) * 32 for number in range(200)]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK}


def file_of(name: bytes) -> str:
    return f"{name.hex()}.prefix"


def whole(disk: Disk, name: bytes) -> bool:
    """Whether an entry is there and holds what was written."""
    with disk.reader(name) as reader:
        if reader is None:
            return False
        out = torch.zeros(NBYTES, dtype=torch.uint8)
        reader(out[:300])
        reader(out[300:])
        return out.tolist() == [name[0]] * NBYTES


def put(disk: Disk, name: bytes, age: int) -> None:
    disk.put(name, NBYTES, age, fill(name[0], NBYTES))


def test_files_keep_their_limit_and_those_used_longest_ago_go_first(tmp_path: Path) -> None:
    each = OVERHEAD + NBYTES
    disk = Disk(tmp_path, 3 * each + 1, ROOT)
    (tmp_path / "notes.txt").write_text("of somebody else")
    for age, name in enumerate(NAMES[:3], start=1):
        put(disk, name, 1000 * age)
    disk.touch(NAMES[0], 9000)
    put(disk, NAMES[3], 10000)
    assert files(tmp_path) == {"notes.txt", *map(file_of, (NAMES[0], NAMES[2], NAMES[3]))}
    assert all(whole(disk, name) for name in (NAMES[0], NAMES[2], NAMES[3]))
    put(disk, NAMES[4], 500)  # older than all others: the end of a prompt, of which they are the beginning
    assert file_of(NAMES[4]) not in files(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.prefix")) <= disk.limit
    lower = Disk(tmp_path, each, ROOT)  # another limit the next time
    put(lower, NAMES[5], 20000)
    assert files(tmp_path) == {"notes.txt", file_of(NAMES[5])}
    disk.put(NAMES[6], 4 * each, 30000, fill(6, 4 * each))  # larger than all of it: nothing goes for that
    assert files(tmp_path) == {"notes.txt", file_of(NAMES[5])}


def test_more_files_than_are_looked_at_at_once_keep_the_limit(tmp_path: Path) -> None:
    count = 2 * disk_module.AT_ONCE + 10
    many = Disk(tmp_path, MIB, ROOT)
    for age, name in enumerate(NAMES[:count], start=1):
        put(many, name, 1000 * age)
    assert len(files(tmp_path)) == count
    put(Disk(tmp_path, 2 * (OVERHEAD + NBYTES), ROOT), NAMES[count], 10**9)
    assert files(tmp_path) == {file_of(NAMES[count - 1]), file_of(NAMES[count])}


def test_damaged_truncated_and_foreign_files_are_deleted_and_counted(tmp_path: Path) -> None:
    disk = Disk(tmp_path, MIB, ROOT)
    path = tmp_path / file_of(NAMES[0])
    put(disk, NAMES[0], 1)
    sound = path.read_bytes()
    put(disk, NAMES[1], 1)
    other = (tmp_path / file_of(NAMES[1])).read_bytes()
    elsewhere = Disk(tmp_path / "elsewhere", MIB, b"\1" * 32)
    put(elsewhere, NAMES[0], 1)
    foreign = (tmp_path / "elsewhere" / path.name).read_bytes()
    wrong = [sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :] for at in range(0, len(sound), 13)]
    wrong += [sound[:-1], sound[: OVERHEAD - 1], b"", sound + b"\0", other, foreign, os.urandom(len(sound))]
    for content in wrong:
        before = disk.damaged
        path.write_bytes(content)
        assert not whole(disk, NAMES[0])
        assert not path.exists()
        assert disk.damaged == before + 1
    path.write_bytes(sound)
    assert whole(disk, NAMES[0])
    path.unlink()
    path.symlink_to(tmp_path / file_of(NAMES[1]))
    assert not whole(disk, NAMES[0])


@pytest.mark.parametrize("damage", ["flip", "truncate"])
@pytest.mark.parametrize("kv", ["none", "snapkv(keep=96,window=16)+int4(recent=32)"])
def test_a_prompt_is_computed_where_its_file_is_damaged(
    tiny: Callable[..., Tiny], kv: str, damage: str, tmp_path: Path
) -> None:
    model = tiny()
    tokens = model.tokens(300)
    run = model.run(kv, context=CONTEXT, chunk=CHUNK)
    prompts = prompt_cache(run, None, tmp_path)
    expected = prefill(run, prompts, tokens)[1]
    name = names_of(prompts, tokens)[2 if kv == "none" else 3]
    path = tmp_path / file_of(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content if damage == "flip" else content[:-5])
    again = model.run(kv, context=CONTEXT, chunk=CHUNK)
    prompts = prompt_cache(again, None, tmp_path)
    found, logits = prefill(again, prompts, tokens)
    assert found == (2 * CHUNK if kv == "none" else 0)
    assert torch.equal(logits, expected)
    assert prompts.receipt()["damaged"] == 1
    # It is written anew, and found the next time.
    found, logits = prefill(again, prompts, tokens)
    assert found == 4 * CHUNK
    assert torch.equal(logits, expected)


def test_a_disk_that_fails_between_two_looks_is_a_miss(
    tiny: Callable[..., Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    tokens = model.tokens(300)
    for kv in ("none", "h2o(keep=96)"):
        run = model.run(kv, context=CONTEXT, chunk=CHUNK)
        prompts = prompt_cache(run, None, tmp_path / kv)
        expected = prefill(run, prompts, tokens)[1]

        def fail(reader: disk_module.Reader, part: torch.Tensor) -> None:
            part.fill_(255)
            raise OSError(errno.EIO, "broken")

        with monkeypatch.context() as patched:
            patched.setattr(disk_module.Reader, "__call__", fail)
            found, logits = prefill(run, prompts, tokens)
        assert found == 0
        assert torch.equal(logits, expected)
        assert prompts.receipt()["damaged"] > 0


def test_a_full_disk_and_an_interruption_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, MIB, ROOT)

    def interrupted(put: Callable[[torch.Tensor], None]) -> None:
        put(torch.zeros(10, dtype=torch.uint8))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.put(NAMES[0], NBYTES, 1, interrupted)
    assert files(tmp_path) == set()
    with monkeypatch.context() as patched:

        def full(file: int, view: memoryview) -> int:
            raise OSError(errno.ENOSPC, "full")

        patched.setattr(os, "write", full)
        put(disk, NAMES[0], 1)
    assert files(tmp_path) == set()
    assert disk.unwritten == 1
    put(disk, NAMES[0], 1)
    assert whole(disk, NAMES[0])


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 2 * (OVERHEAD + NBYTES), ROOT)
    (tmp_path / file_of(NAMES[0])).with_suffix(PART).write_bytes(bytes(5000))
    assert not whole(disk, NAMES[0])
    put(disk, NAMES[0], 1)
    assert files(tmp_path) == {file_of(NAMES[0])}
    assert whole(disk, NAMES[0])


def test_another_process_that_writes_is_not_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "PATIENCE", 0.05)
    disk = Disk(tmp_path, MIB, ROOT)
    put(disk, NAMES[0], 1)
    with open(tmp_path / LOCK, "r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        put(disk, NAMES[1], 2)
        assert disk.unwritten == 1
        assert whole(disk, NAMES[0])  # reading needs no lock
    put(disk, NAMES[1], 2)
    assert whole(disk, NAMES[1])


def test_several_that_write_and_read_at_once_keep_the_limit_and_damage_nothing(tmp_path: Path) -> None:
    """Threads with a :class:`Disk` each: locks are of open files, not of processes."""
    limit = 4 * (OVERHEAD + NBYTES)

    def work(seed: int) -> tuple[int, int]:
        disk, order, found = Disk(tmp_path, limit, ROOT), random.Random(seed), 0
        for _ in range(150):
            name = NAMES[order.randrange(12)]
            there = whole(disk, name)
            found += there
            if not there:
                put(disk, name, time.time_ns())
        return found, disk.damaged + disk.unwritten

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    assert all(found > 0 and trouble == 0 for found, trouble in results)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.prefix")) <= limit


def test_a_file_that_another_process_deletes_is_read_to_its_end(tmp_path: Path) -> None:
    disk = Disk(tmp_path, MIB, ROOT)
    put(disk, NAMES[1], 1)
    with disk.reader(NAMES[1]) as reader:
        (tmp_path / file_of(NAMES[1])).unlink()
        assert reader is not None
        out = torch.zeros(NBYTES, dtype=torch.uint8)
        reader(out)
        assert out.tolist() == [1] * NBYTES
    assert not whole(disk, NAMES[1])
    assert disk.damaged == 0


def test_folders_that_cannot_hold_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot hold prompts"):
        Disk(tmp_path / "file", MIB, ROOT)
    mount = mounts.Mount("tmpfs", (), Path("/"), tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(mounts, "mounts", lambda: [mount])
    with pytest.raises(UsageError, match="lies in memory"):
        Disk(tmp_path / "new", MIB, ROOT)
