"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on models inside a budget.

``python -m tightfit.lab.lm_eval run --model tightfit --model_args pretrained=nano,memory=1GiB,kv=int4 --tasks ...`` is
lm-eval's own command with one model class more; in Python, importing this module registers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import tightfit
from tightfit.errors import UsageError
from tightfit.lab.reader import Reader
from tightfit.lab.rows import log_probability

Request = tuple[Any, list[int], list[int]]  # what it is known by, context, continuation


@register_model("tightfit")
class TightfitLM(TemplateLM):  # type: ignore[misc]
    """``pretrained`` is a model as ``tightfit run`` takes it, ``memory`` bounds the whole process, lm-eval included;
    ``options`` are those of :func:`tightfit.load`: ``weights``, ``kv``, ``context`` and so on. ``batch_size`` prompts
    are generated at once.

    What is scored is decoded token by token, so that it goes through the compressed cache; a context that is too long
    loses its first tokens.
    """

    def __init__(
        self,
        pretrained: str = "nano",
        memory: str | int | None = None,
        *,
        batch_size: str | int = 1,
        max_batch_size: int | None = None,  # lm-eval passes these two to every class; neither means anything here
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit():
            raise UsageError(f"the batch size cannot be {batch_size!r}", "Give a number: --batch_size 4.")
        self.model = tightfit.load(pretrained, memory, batch=int(batch_size), **options)
        self.reader = Reader(self.model)

    @property
    def max_length(self) -> int:
        """Tokens that can be given to predict one more from."""
        return self.model.plan.context - 1

    @property
    def eot_token_id(self) -> int:
        token = self.model.tokenizer.eos_token_id
        if token is None:
            raise UsageError(f"{self.tokenizer_name} has no end token", "Take a model whose tokenizer has one.")
        return token

    @property
    def prefix_token_id(self) -> int:
        token = self.model.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        return self.model.checkpoint.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.model.tokenizer.render_chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.tokenizer.chat_templates.get("default") if chat_template else None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        if add_special_tokens is None:  # a rendered chat begins as the model wants it
            begin = tokenizer.special_tokens.get("bos_token")
            add_special_tokens = begin is None or not string.startswith(begin)
        return tokenizer.encode(string, add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval does, but for a continuation that becomes part of the last token before it, of which nothing would
        be left: that one is encoded alone."""
        before, behind = super()._encode_pair(context, continuation)
        return before, behind or self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for key, context, continuation in tqdm(requests, desc="log-likelihoods", disable=disable_tqdm):
            room = self.max_length + 1 - len(continuation)
            if not continuation or room < 1:
                raise UsageError(
                    f"{len(continuation)} tokens can't be scored in a context of {self.max_length + 1}: {key}",
                    "There must be one at least behind the context, and room for one before it.",
                )
            total, greedy = 0.0, True
            for row, token in zip(self.reader.follow(context[-room:], continuation), continuation, strict=True):
                total += log_probability(row, token)
                greedy = greedy and int(row.argmax()) == token
            found.append((total, greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each token of the text once, the first one after the token that begins a sequence. It departs from lm-eval's
        class for transformers in that such a token is not predicted itself."""
        found = []
        for (text,) in tqdm([request.args for request in requests], desc="texts", disable=disable_tqdm):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = []
        progress = tqdm(total=len(requests), desc="texts", disable=disable_tqdm)
        for wanted, group in groupby((request.args for request in requests), lambda args: args[1]):
            options = dict(normalize_gen_kwargs(wanted))
            options.setdefault("temperature", 1.0 if options["do_sample"] else 0.0)
            del options["do_sample"]
            new = options["max_new_tokens"] = options.pop("max_gen_toks")
            options["stop"] = [text for text in options.pop("until") if text]
            room = self.model.plan.context - new
            if room < 1:
                raise UsageError(f"no room for {new} new tokens", f"Give a longer context than {new}.")
            contexts = [context for context, _ in group]
            for start in range(0, len(contexts), self.model.plan.sequences):
                part = contexts[start : start + self.model.plan.sequences]
                prompts = [self.tok_encode(context)[-room:] for context in part]
                for context, completion in zip(part, self.model.generate_tokens(prompts, **options), strict=True):
                    found.append(completion.text)
                    self.cache_hook.add_partial("generate_until", (context, wanted), completion.text)
                progress.update(len(part))
        progress.close()
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
