"""What is asked of the engine: a prompt as tokens, and how to continue it.

Nothing here imports torch: requests are made, and what cannot work is refused, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.decode.params import SamplingParams
from tightfit.errors import CheckpointError, UsageError
from tightfit.model.spec import ModelSpec

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Request:
    """One prompt as tokens, and how to continue it.

    ``stop`` strings end the text and are not part of it; ``stop_tokens`` likewise.
    """

    tokens: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()


class Requests:
    """Makes requests to one model with room for ``context`` tokens.

    Options are those of :meth:`tightfit.api.Model.stream`; what is not given, or None, comes from the checkpoint's
    generation_config.json.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, context: int) -> None:
        self.tokenizer = checkpoint.tokenizer()
        self.context = context
        self._name = checkpoint.name
        self._defaults = checkpoint.generation
        self._vocab_size = spec.vocab_size
        self._longest = spec.context

    def make(self, prompts: Sequence[str], options: Mapping[str, Any]) -> list[Request]:
        """A request for each prompt. Raises UsageError for one that is empty or leaves no room in the context, and for
        options that are unknown or out of range; CheckpointError where the model lacks a token of the tokenizer."""
        if len(prompts) == 1:
            return [self.make_one(prompts[0], options)]
        return [
            self.make_one(prompt, options, f"prompt {number} of {len(prompts)}")
            for number, prompt in enumerate(prompts, start=1)
        ]

    def make_one(
        self, prompt: str, options: Mapping[str, Any], what: str = "the prompt", add_special_tokens: bool = True
    ) -> Request:
        """As :meth:`make`; ``what`` names the prompt in messages."""
        return self._request(self._encode(prompt, what, add_special_tokens), options)

    def of_tokens(self, tokens: Sequence[int], options: Mapping[str, Any], what: str = "the prompt") -> Request:
        """As :meth:`make`, for a prompt that is token ids already."""
        if not tokens:
            raise UsageError(f"{what} is empty", "Give some tokens to continue.")
        self._check(tokens, what)
        return self._request(list(tokens), options)

    def _request(self, tokens: list[int], options: Mapping[str, Any]) -> Request:
        given = {name: value for name, value in options.items() if value is not None}
        stop = given.pop("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UsageError("an empty stop string would stop before anything is written", "Leave it out.")
        ignore_eos = given.pop("ignore_eos", False)
        max_new_tokens = given.pop("max_new_tokens", DEFAULT_NEW_TOKENS)
        if max_new_tokens < 1:
            raise UsageError(f"{max_new_tokens} new tokens were asked for", "Ask for at least one (max_new_tokens).")
        return Request(
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            sampling=self._sampling(given),
            stop=stop,
            stop_tokens=frozenset() if ignore_eos else frozenset(self._defaults.eos_token_ids),
        )

    def check(self, tokens: Sequence[int], what: str) -> None:
        """Raises CheckpointError for tokens that the model has no embedding of: reading it would go out of bounds."""
        outside = [token for token in tokens if not 0 <= token < self._vocab_size]
        if outside:
            raise CheckpointError(
                f"{what} has the token {outside[0]}, and the vocabulary of {self._name} ends at {self._vocab_size - 1}",
                "The tokenizer belongs to another model: compare tokenizer.json with 'vocab_size' in config.json.",
            )

    def check_length(self, tokens: int, what: str) -> None:
        """Raises UsageError unless a prompt of so many tokens leaves room for an answer."""
        if tokens >= self.context:
            raise UsageError(
                f"{what} has {tokens} tokens, and the context of {self.context} must hold an answer too",
                self._advice(tokens + DEFAULT_NEW_TOKENS),
            )

    def _encode(self, prompt: str, what: str, add_special_tokens: bool) -> list[int]:
        if not prompt:
            raise UsageError(f"{what} is empty", "Give some text to continue.")
        if self.tokenizer.surely_exceeds(prompt, self.context):  # encoding takes memory in proportion to the text
            raise UsageError(
                f"{what} of {len(prompt):,} characters has more tokens than the context of {self.context} holds",
                self._advice(None),
            )
        tokens = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if not tokens:
            raise UsageError(f"the tokenizer of {self._name} makes no token of {what}", "Give some text to continue.")
        self._check(tokens, what)
        return tokens

    def _check(self, tokens: Sequence[int], what: str) -> None:
        self.check_length(len(tokens), what)
        self.check(tokens, what)

    def _advice(self, wanted: int | None) -> str:
        """What to do about a prompt that is too long; a context of ``wanted`` tokens would do."""
        if self.context == self._longest:
            return f"Shorten it: {self._name} was trained for no more than {self._longest} tokens."
        enough = "N" if wanted is None else min(wanted, self._longest)
        return f"Shorten it, or ask for a longer context, up to {self._longest}: --context {enough} (context={enough})."

    def _sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        defaults = self._defaults
        settings: dict[str, Any] = {
            "temperature": defaults.temperature if defaults.do_sample else 0.0,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
            "seed": None,
        }
        unknown = sorted(set(given) - set(settings))
        if unknown:
            raise UsageError(
                f"unknown option '{unknown[0]}'", f"Known: max_new_tokens, stop, ignore_eos, {', '.join(settings)}."
            )
        params = SamplingParams(**settings | dict(given))
        without_effect = {"top_k", "top_p", "min_p"} & set(given)
        if params.temperature == 0 and "temperature" not in given and without_effect:
            raise UsageError(
                f"{min(without_effect)} has no effect: {self._name} decodes greedily unless it is told otherwise",
                "Add a temperature: --temperature 0.8 (temperature=0.8).",
            )
        return params
