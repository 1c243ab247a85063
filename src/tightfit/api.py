"""The Python interface: ``tightfit.load(model, memory=...)`` gives a :class:`Model` that generates inside the
budget."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, overload

from tightfit.engine.request import DEFAULT_NEW_TOKENS
from tightfit.errors import UsageError

if TYPE_CHECKING:
    from tightfit.budget.ledger import Ledger
    from tightfit.checkpoints.checkpoint import Checkpoint
    from tightfit.engine.engine import Engine
    from tightfit.engine.generate import Completion, Generator
    from tightfit.engine.opening import Opened, Wish
    from tightfit.engine.request import Requests
    from tightfit.plan.schema import Plan

Message = Mapping[str, str]


class Model:
    """A model that is loaded and stays inside its budget. Made by :func:`load`.

    Sampling settings (``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``) that are not given come
    from the model's generation_config.json; ``temperature=0`` is greedy. ``seed`` makes a text repeatable.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, requests: Requests, generator: Generator, ledger: Ledger
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = generator.tokenizer
        self._requests = requests
        self._generator = generator
        self._ledger = ledger

    @overload
    def generate(self, prompt: str, **options: Any) -> Completion: ...
    @overload
    def generate(self, prompt: Many[str], **options: Any) -> list[Completion]: ...
    def generate(self, prompt: str | Many[str], **options: Any) -> Completion | list[Completion]:
        """Continues one prompt, or several at once; see :meth:`stream` for ``options``."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        completions = [self.new_completion() for _ in prompts]
        for _ in self.stream_many(prompts, completions, **options):
            pass
        return completions[0] if isinstance(prompt, str) else completions

    def generate_tokens(self, prompts: Many[Many[int]], **options: Any) -> list[Completion]:
        """As :meth:`generate`, for prompts that are token ids already, those that begin a sequence included."""
        completions = [self.new_completion() for _ in prompts]
        requests = [self._requests.of_tokens(prompt, options) for prompt in prompts]
        for _ in self._generator.run(requests, completions):
            pass
        return completions

    def stream(self, prompt: str, **options: Any) -> abc.Generator[str, None, None]:
        """Continues a prompt, piece by piece; no piece ends inside a character.

        Options: ``max_new_tokens`` (256), ``stop`` (a string or several, which end the text and are not part of it),
        ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``seed``, ``ignore_eos``.
        Raises UsageError for an empty prompt or one that leaves no room in the context.
        """
        for _, text in self.stream_many([prompt], [self.new_completion()], **options):
            yield text

    def stream_many(
        self, prompts: Many[str], completions: list[Completion], **options: Any
    ) -> abc.Generator[tuple[int, str], None, None]:
        """Continues several prompts at once: (index of the prompt, piece). Fills ``completions``."""
        return self._generator.run(self._requests.make(prompts, options), completions)

    def chat(self, messages: Many[Message], **options: Any) -> Completion:
        """The assistant's next message. Only what is new since the last turn is computed."""
        completions = [self.new_completion()]
        for _ in self.chat_stream(messages, completions[0], **options):
            pass
        return completions[0]

    def chat_stream(
        self, messages: Many[Message], completion: Completion | None = None, **options: Any
    ) -> abc.Generator[str, None, None]:
        """As :meth:`chat`, piece by piece.

        When the conversation no longer fits into the context beside the answer, its oldest messages after the system
        message are left out, and ``completion.dropped_messages`` says how many.
        """
        completion = completion or self.new_completion()
        kept, dropped = self._fit(messages, options)
        completion.dropped_messages = dropped
        text = self.tokenizer.render_chat(kept)
        request = self._requests.make_one(text, options, "the conversation", add_special_tokens=False)
        for _, piece in self._generator.run([request], [completion], conversation=True):
            yield piece

    def score(self, tokens: list[int]) -> list[float]:
        """Natural log-probability of every token but the first, given those before it. At most one context long."""
        self._requests.check(tokens, "the text")
        self._requests.check_length(len(tokens) - 1, "the text")
        return self._generator.score(tokens)

    def census(self, text: str, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
        """Counts which experts ``text`` activates, and keeps that for ``experts="static"``: ``tokens``, ``file``, and
        ``most_used_half``, for each mixture the share of its experts on which half of all choices fall.
        ``progress(done, total)`` is called with tokens."""
        from tightfit.engine.census import take_census
        from tightfit.experts.census import write_census

        if not text:
            raise UsageError("the text is empty", "Give one that is like what the model will be used for.")
        tokens = self.tokenizer.encode(text)
        census = take_census(self._generator, self.checkpoint.name, tokens, progress)
        file = write_census(self.checkpoint.fingerprint, census)
        return {"tokens": census.tokens, "file": str(file), "most_used_half": census.most_used_half()}

    def fit(
        self, kv: str, text: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Any]:
        """Finds with ``text`` what the method of ``kv`` must know of the model, and keeps that for its settings:
        ``kv``, ``file``, ``lines`` that say what was found, and the same as the method's own keys (of kvsharer
        ``tokens``, ``owners``, of each layer the one whose keys and values it reads, and ``similarity`` of the final
        hidden states to those of the model as it is)."""
        from tightfit.catalog import spec_string
        from tightfit.engine.fit import Observing
        from tightfit.kv.compose import fitted
        from tightfit.kv.fitted import write_findings

        method = fitted(kv)
        tokens = self.tokenizer.encode(text)

        def encode(more: str) -> list[int]:
            return self.tokenizer.encode(more, add_special_tokens=False)

        observed = Observing(self.borrow_engine(), self.checkpoint.name, tokens, encode, self.plan.budget)
        found = method.fit(observed, progress)
        file = write_findings(self.checkpoint.fingerprint, method, found)
        return {"kv": spec_string(method), "file": str(file), "lines": found.lines, **found.report}

    def borrow_engine(self) -> Engine:
        """What computes, for measurements that fill its cache by hand while nothing is generated. A conversation that
        was kept is forgotten."""
        return self._generator.borrow()

    def receipt(self) -> dict[str, Any]:
        """What was promised, what the operating system saw, and how fast it was. Sizes in bytes, times in seconds."""
        from tightfit.engine.opening import cost_of
        from tightfit.engine.receipt import receipt

        generator = self._generator
        cost = cost_of(self.checkpoint, generator.engine.decoder.spec, self.plan)
        return receipt(self.plan, self._ledger, generator.timing, generator.engine.prompts, cost)

    def close(self) -> None:
        """Closes the checkpoint's files and gives the memory back: nothing can be generated any more."""
        self._generator.close()
        self._generator.engine.decoder.weights.close()
        self._generator.engine.cache.close()
        self.checkpoint.close()
        self._ledger.release()  # a process that ends reads code again that was dropped

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def new_completion() -> Completion:
        """An empty completion, for the streaming methods to fill."""
        from tightfit.engine.generate import Completion

        return Completion()

    def _fit(self, messages: Many[Message], options: Mapping[str, Any]) -> tuple[list[Message], int]:
        """The messages that fit beside an answer, and how many of the oldest were left out."""
        kept = list(messages)
        if not kept or not all(isinstance(message, Mapping) for message in kept):
            raise UsageError("a conversation is a list of messages", 'Give [{"role": "user", "content": "Hello"}].')
        room = min(options.get("max_new_tokens") or DEFAULT_NEW_TOKENS, self.plan.context // 4)
        first = 1 if kept[0].get("role") == "system" else 0
        dropped = 0
        while len(kept) > first + 1:
            tokens = self.tokenizer.encode(self.tokenizer.render_chat(kept), add_special_tokens=False)
            if len(tokens) + room <= self.plan.context:
                break
            pair = 2 if len(kept) > first + 2 else 1
            del kept[first : first + pair]
            dropped += pair
        return kept, dropped


def load(
    model: str = "nano",
    memory: str | int | None = None,
    *,
    context: int | None = None,
    batch: int | None = None,
    weights: str | None = None,
    chunk: int | None = None,
    activations: str | None = None,
    experts: str | None = None,
    kv: str | None = None,
    prefill: str | None = None,
    prompt_cache: str | int | None = None,
    prompt_cache_disk: str | int | None = None,
    prompt_cache_dir: str | None = None,
    threads: int | None = None,
    prefer: str | None = None,
    plan: Plan | None = None,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Opens a model and loads it inside ``memory``.

    ``model`` is a folder, a hub name, or an embedded model; ``memory`` bounds the peak resident set of the whole
    process (``"600MiB"``, ``"4GB"``, ``"50%"``, bytes; default: what is available less a margin). ``context`` tokens
    are reserved for each of ``batch`` sequences at once (one). ``weights`` is a format (``"int4"``; default: the most
    precise that fits), ``chunk`` how many prompt tokens are computed at once, ``activations`` whether decoding rounds
    what low-bit weights are multiplied with (``"int8"``, the default) or not (``"float32"``), ``experts`` which of a
    mixture stay in memory where not all fit (``"score+gate"``), ``kv`` how keys and values are kept
    (``"snapkv(keep=512)+int4"``, or bytes, ``"64MiB"``; default: all as they are), ``prefill`` whether prompts are
    computed in chunks (``"chunked"``) or layer by layer (``"layered"``), ``threads`` how many cores are used.
    ``prompt_cache`` bytes of memory (``"64MiB"``), and ``prompt_cache_disk`` bytes of files in ``prompt_cache_dir`` (a
    folder; default: in the user's cache folder), keep beginnings of prompts for prompts that begin alike. A
    ``plan`` made before is followed to the letter, and fixes all of these but the model. With ``chat``, a model without
    a chat template is refused at once. ``progress(done, total)`` is called with bytes while weights are loaded.

    Raises BudgetError if it does not fit (``smallest_bytes`` says what would), CheckpointError for a model that cannot
    be opened, UsageError for arguments that make no sense.
    """
    from tightfit.engine.following import planned
    from tightfit.engine.opening import Wish, open_model

    wish = Wish(
        model,
        memory,
        context,
        batch,
        weights,
        chunk,
        threads,
        activations,
        experts,
        kv,
        prefill,
        prompt_cache,
        prompt_cache_disk,
        prompt_cache_dir,
        prefer,
    )
    if plan is not None:
        wish = planned(wish, plan)
    opened = open_model(wish)
    try:
        if chat:
            opened.check_chat()
        return load_opened(wish, opened, plan, progress)
    except BaseException:
        opened.checkpoint.close()
        raise


def load_opened(
    wish: Wish, opened: Opened, plan: Plan | None = None, progress: Callable[[int, int], None] | None = None
) -> Model:
    """As :func:`load`, from a checkpoint that was opened before, so that requests could be checked."""
    from tightfit.engine.following import follow
    from tightfit.engine.opening import plan_for

    chosen = plan_for(wish, opened) if plan is None else follow(plan, opened)
    requests = opened.requests(chosen.context)

    from tightfit.engine.generate import Generator
    from tightfit.engine.start import start

    total, done = chosen.weights_bytes, 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    engine, ledger = start(opened.checkpoint, opened.spec, chosen, count)
    return Model(opened.checkpoint, chosen, requests, Generator(engine, requests.tokenizer), ledger)
