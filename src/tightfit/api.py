"""The Python interface: ``tightfit.load(model, memory=...)`` gives a :class:`Model` that generates inside the
budget."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, overload

from tightfit.errors import UsageError

if TYPE_CHECKING:
    from tightfit.budget.ledger import Ledger
    from tightfit.checkpoints.checkpoint import Checkpoint
    from tightfit.engine.generate import Completion, Generator, Request
    from tightfit.plan.schema import Plan

DEFAULT_NEW_TOKENS = 256
Message = Mapping[str, str]


class Model:
    """A model that is loaded and stays inside its budget. Made by :func:`load`.

    Sampling settings (``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``) that are not given come
    from the model's generation_config.json; ``temperature=0`` is greedy. ``seed`` makes a text repeatable.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, generator: Generator, ledger: Ledger) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = generator.tokenizer
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
        for _ in self._generator.run([self._request(text, options) for text in prompts], completions):
            pass
        return completions[0] if isinstance(prompt, str) else completions

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
        return self._generator.run([self._request(text, options) for text in prompts], completions)

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
        request = self._request(text, options, add_special_tokens=False)
        for _, piece in self._generator.run([request], [completion], conversation=True):
            yield piece

    def score(self, tokens: list[int]) -> list[float]:
        """Natural log-probability of every token but the first, given those before it. At most one context long."""
        self._check_length(len(tokens) - 1)
        return self._generator.score(tokens)

    def receipt(self) -> dict[str, Any]:
        """What was promised, what the operating system saw, and how fast it was. Sizes in bytes, times in seconds."""
        from tightfit.engine.receipt import receipt

        return receipt(self.plan, self._ledger, self._generator.timing)

    def close(self) -> None:
        """Closes the checkpoint's files. The memory goes with the object."""
        self.checkpoint.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def new_completion() -> Completion:
        """An empty completion, for the streaming methods to fill."""
        from tightfit.engine.generate import Completion

        return Completion()

    def _request(self, text: str, options: Mapping[str, Any], add_special_tokens: bool = True) -> Request:
        from tightfit.engine.generate import Request

        options = dict(options)
        if not text:
            raise UsageError("the prompt is empty", "Give some text to continue.")
        if self.tokenizer.surely_exceeds(text, self.plan.context):  # encoding takes memory in proportion to the text
            raise UsageError(
                f"the prompt of {len(text):,} characters cannot fit into a context of {self.plan.context} tokens",
                "Shorten it, or ask for a longer context.",
            )
        tokens = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        self._check_length(len(tokens))
        defaults = self.checkpoint.generation
        stop = options.pop("stop", ())
        ignore_eos = options.pop("ignore_eos", False)
        max_new_tokens = options.pop("max_new_tokens", DEFAULT_NEW_TOKENS)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}", "Ask for at least one token.")
        return Request(
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            sampling=self._sampling(options),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_tokens=frozenset() if ignore_eos else frozenset(defaults.eos_token_ids),
        )

    def _sampling(self, options: dict[str, Any]) -> Any:
        from tightfit.decode.sample import SamplingParams

        defaults = self.checkpoint.generation
        settings = {
            "temperature": defaults.temperature if defaults.do_sample else 0.0,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
            "seed": None,
        }
        unknown = set(options) - set(settings)
        if unknown:
            raise UsageError(
                f"unknown option '{sorted(unknown)[0]}'",
                f"Known: max_new_tokens, stop, ignore_eos, {', '.join(settings)}.",
            )
        return SamplingParams(**settings | {name: value for name, value in options.items() if value is not None})

    def _check_length(self, tokens: int) -> None:
        if tokens >= self.plan.context:
            raise UsageError(
                f"the prompt has {tokens} tokens, the context holds {self.plan.context} and needs room for an answer",
                f"Shorten the prompt, or ask for a longer context (context={tokens + DEFAULT_NEW_TOKENS}).",
            )

    def _fit(self, messages: Many[Message], options: Mapping[str, Any]) -> tuple[list[Message], int]:
        """The messages that fit beside an answer, and how many of the oldest were left out."""
        kept = list(messages)
        if not kept:
            raise UsageError("the conversation is empty", "Give at least one message.")
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
    batch: int = 1,
    weights: str | None = None,
    chunk: int | None = None,
    threads: int | None = None,
    plan: Plan | None = None,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Opens a model and loads it inside ``memory``.

    ``model`` is a folder, a hub name, or an embedded model; ``memory`` bounds the peak resident set of the whole
    process (``"600MiB"``, ``"4GB"``, ``"50%"``, bytes; default: what is available less a margin). ``context`` tokens
    are reserved for each of ``batch`` sequences at once. ``weights`` is a format (``"int4"``; default: the most precise
    that fits), ``chunk`` how many prompt tokens are computed at once, ``threads`` how many cores are used. A
    ``plan`` made before is followed to the letter. ``progress(done, total)`` is called with bytes while weights are
    loaded.

    Raises BudgetError if it does not fit (``smallest_bytes`` says what would), CheckpointError for a model that cannot
    be opened, UsageError for arguments that make no sense.
    """
    from tightfit.engine.opening import Wish, open_model, plan_for

    wish = Wish(model, memory, context, batch, weights, chunk, threads)
    opened = open_model(wish)
    if chat and not opened.checkpoint.tokenizer().has_chat_template:
        raise UsageError(
            f"{opened.checkpoint.name} has no chat template: it was not trained for conversations",
            "Use `tightfit run MODEL -p TEXT` to continue a text.",
        )
    if plan is not None and plan.model.fingerprint != opened.checkpoint.fingerprint:
        raise UsageError(
            f"the plan is for {plan.model.name}, whose files differ from those of {opened.checkpoint.name}",
            "Make a new one with `tightfit plan --out`.",
        )
    chosen = plan or plan_for(wish, opened)

    from tightfit.engine.generate import Generator
    from tightfit.engine.start import start

    total, done = chosen.accounts["weights"], 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    tokenizer = opened.checkpoint.tokenizer()
    engine, ledger = start(opened.checkpoint, opened.spec, chosen, count)
    return Model(opened.checkpoint, chosen, Generator(engine, tokenizer), ledger)
