"""What a composition of methods means, written for reading: each head's tokens are a list, and methods are applied to
it one after the other. Nothing is shared with :mod:`tightfit.kv` but the settings.

A chunk of the prompt sees what was kept and itself. Then, and after every 32 tokens that are generated, each layer and
head first lets go of tokens, and then stores whole pages of 32 in fewer channels and bits. What is in another tier is
the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tests.kv.driver import Tiny

from tightfit.kv.compose import compose
from tightfit.kv.method import Method

PAGE = 32
# What evictors judge by: how many last queries (0: all), and what becomes of what these give to a token.
JUDGES = {
    "window": (0, "sum"),
    "h2o": (0, "sum"),
    "d2o": (0, "sum"),
    "snapkv": (None, "sum"),  # a setting
    "tova": (1, "sum"),
    "scissorhands": (None, "votes"),
    "corm": (None, "votes"),
    "morphkv": (None, None),
    "scope": (32, "sum"),
}
KNOWN = {*JUDGES, "int8", "int4", "int2", "think", "quest", "recycled", "host", "kvsharer"}


@dataclass
class Token:
    """Of one key-value head."""

    position: int
    key: torch.Tensor  # (dim,), turned; what reading it back gives
    value: torch.Tensor
    # Of queries that are observed their positions (n,), and what the heads of its group gave (n, groups).
    given: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


@dataclass
class Head:
    tokens: list[Token] = field(default_factory=list)
    coded: int = 0  # pages
    bounds: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # lowest and highest keys of pages
    channels: list[int] | None = None
    threshold: float | None = None  # of similarity, from which on d2o merges
    certain: int = 0  # tokens when they were last settled
    recycled: list[Token] | None = None  # what the last full step gave most to, of those before `since`
    since: int = 0
    steps: int = 0  # since then


class Slow:
    """One sequence of a model with rotary embeddings in a cache of the composition ``kv``."""

    def __init__(self, tiny: Tiny, kv: str, chunk: int, context: int, rounding: float = 0.0) -> None:
        self.model, config = tiny.theirs, tiny.theirs.config
        self.chunk, self.context, self.count, self.prompt = chunk, context, 0, 0
        self.rounding, self.close = rounding, False  # whether a vote was as close as this share of what it needs
        self.dim = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // self.kv_heads
        self.theta = config.rope_parameters["rope_theta"]
        self.windows = [attention.window for attention in (layer.attention for layer in tiny.spec.layers)]
        self.owners = owners(kv, len(self.windows))
        self.own = sorted(set(self.owners))
        of_owners = {layer: [Head() for _ in range(self.kv_heads)] for layer in self.own}
        self.layers = [of_owners[owner] for owner in self.owners]
        methods: dict[str, Method] = {method.name: method for method in compose(kv).methods}
        unknown = set(methods) - KNOWN
        if unknown:
            raise NotImplementedError(f"write down here what {', '.join(unknown)} means")
        self.window, self.h2o, self.snapkv, self.d2o = (methods.get(n) for n in ("window", "h2o", "snapkv", "d2o"))
        self.evictor = next((methods[name] for name in JUDGES if name in methods), None)
        self.last, self.fold = (0, "sum") if self.evictor is None else JUDGES[self.evictor.name]
        self.last = self.evictor.window if self.last is None else self.last
        self.fold = self.evictor.fusion if self.fold is None else self.fold
        self.starts = [0]  # positions at which blocks of queries begin that are still remembered, the last ones first
        self.think, self.quest, self.recycled = (methods.get(name) for name in ("think", "quest", "recycled"))
        self.selector = self.quest or self.recycled
        quantizers = [methods[name] for name in ("int8", "int4", "int2") if name in methods]
        self.key_bits = next((q.bits for q in quantizers if q.of != "values"), None)
        self.value_bits = next((q.bits for q in quantizers if q.of != "keys"), None)
        self.recent = max((method.recent for method in (*quantizers, self.think) if method), default=None)

    def kept(self) -> list[list[list[int]]]:
        """The positions that each head of each layer keeps."""
        return [[[token.position for token in head.tokens] for head in heads] for heads in self.layers]

    # ---- the model ----

    def prefill(self, tokens: Sequence[int], layered: bool = False) -> torch.Tensor:
        at_once = len(tokens) if layered else self.chunk
        for a in range(0, len(tokens), at_once):
            logits = self.forward(tokens[a : a + at_once], decode=False)
        return logits

    @torch.no_grad()
    def forward(self, tokens: Sequence[int], decode: bool) -> torch.Tensor:
        """Logits (vocab,) after the last of ``tokens``."""
        model, n = self.model.model, len(tokens)
        if not decode:
            self.prompt = self.count + n
            self.remember([self.count + n - i for i in range(PAGE, min(n, self.last) + PAGE, PAGE)], n)
        x = model.embed_tokens(torch.tensor(tokens))
        for index, layer in enumerate(model.layers):
            normed, attention = layer.input_layernorm(x), layer.self_attn
            q = attention.q_proj(normed).view(n, -1, self.dim)
            k = attention.k_proj(normed).view(n, -1, self.dim)
            v = attention.v_proj(normed).view(n, -1, self.dim)
            x = x + attention.o_proj(self.attend(index, q, k, v, decode).flatten(1))
            if not decode:
                owner = self.owners[index]
                if index == max(layer for layer, of in enumerate(self.owners) if of == owner):  # all have read it
                    self.settle(owner, self.count + n)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.count += n
        if decode and self.count % PAGE == 0:
            for index in self.own:
                self.settle(index, self.count)
        if not decode or self.count % PAGE == 0:
            self.remember([self.count])
        return self.model.lm_head(model.norm(x[-1]))

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.dim // 2
        angles = positions.view(-1, 1, 1) * self.theta ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decode: bool) -> torch.Tensor:
        """Attention (n, heads, dim) of new tokens, which are in their heads' lists afterwards: a layer that reads what
        another keeps adds nothing of its own."""
        n, window, out = len(q), self.windows[layer], torch.empty_like(q)
        own = torch.arange(self.count, self.count + n)
        sinks, reach, standing = 0, window, own
        if self.window is not None:
            keep = int(self.window.keep)
            sinks = self.window.sinks if window is None else 0  # a model with windows never sees its first tokens
            reach = min(keep - sinks, window or keep)
            if self.window.positions == "cache":
                standing = own.clamp(max=keep - 1)
        q, turned_for_sinks = self.turn(q, own), self.turn(q, standing)
        k = self.turn(k, own)
        for number, head in enumerate(self.layers[layer]):
            group = slice(number * self.groups, (number + 1) * self.groups)
            if self.owners[layer] == layer:
                head.tokens += [Token(int(own[i]), k[i, number], v[i, number]) for i in range(n)]
            seen = head.tokens
            if decode and self.selector and self.owners[layer] >= self.selector.full and window is None:
                seen = self.select(head, q[0, group]) if self.quest else self.recycle(head, q[0, group])
            positions = torch.tensor([token.position for token in seen])
            keys, values = (torch.stack([getattr(token, name) for token in seen]) for name in ("key", "value"))
            is_sink = torch.arange(len(seen)) < sinks
            scores = torch.where(is_sink, turned_for_sinks[:, group] @ keys.T, q[:, group] @ keys.T) / self.dim**0.5
            hidden = positions > own.view(-1, 1)
            if reach is not None:
                hidden |= (positions <= own.view(-1, 1) - reach) & ~is_sink
            weights = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1)  # (n, groups, tokens)
            out[:, group] = weights @ values
            self.observe(seen, own, weights, decode)
        if not decode and self.think and self.layers[layer][0].channels is None:
            self.prune(layer, q, k)
        return out

    def select(self, head: Head, q: torch.Tensor) -> list[Token]:
        """The pages whose keys may score highest with any of ``q`` (groups, dim), and what has no bounds yet."""
        scores = [float(torch.maximum(q * low, q * high).sum(-1).max()) for low, high in head.bounds]
        best = sorted(range(len(scores)), key=lambda page: -scores[page])[: self.quest.tokens // PAGE]
        tokens = [token for page in sorted(best) for token in head.tokens[page * PAGE : (page + 1) * PAGE]]
        return tokens + head.tokens[len(head.bounds) * PAGE :]

    def recycle(self, head: Head, q: torch.Tensor) -> list[Token]:
        """Everything at every so manyth step, else what ``q`` (groups, dim) of that step gave most to."""
        head.steps += 1
        if head.recycled is not None and head.steps < self.recycled.stride:
            return head.recycled + head.tokens[head.since :]
        keys = torch.stack([token.key for token in head.tokens[: head.certain]])
        shares = (q @ keys.T / self.dim**0.5).softmax(-1).sum(0)
        best = shares.argsort(descending=True)[: self.recycled.tokens].sort().values
        head.recycled, head.since, head.steps = [head.tokens[place] for place in best], head.certain, 0
        return head.tokens

    # ---- methods ----

    def remember(self, starts: list[int], chunk: int = 0) -> None:
        """Blocks of queries begin at ``starts``, if they are those of a chunk, its last ones; older ones than are ever
        needed are forgotten."""
        starts = [max(start, self.count + chunk - self.last, self.count) for start in starts] if chunk else starts
        older = [] if chunk >= self.last else [start for start in self.starts if not chunk or start < self.count]
        self.starts = [*starts, *older][: 1 if self.last == 1 else math.ceil(self.last / PAGE) + 1]

    def observe(self, seen: list[Token], own: torch.Tensor, weights: torch.Tensor, decode: bool) -> None:
        """Notes what tokens receive of queries at ``own`` (n,)."""
        if self.last:
            # Of a block of 32 tokens that are generated its last queries count.
            own = own[own % PAGE + self.last >= PAGE] if decode else own[-self.last :]
            weights = weights[len(weights) - len(own) :]
        for token, given in zip(seen, weights.unbind(-1), strict=True):
            token.given.append((own, given))

    def mass(self, token: Token, count: int, window: int | None) -> float:
        """What a token received from the queries by which it is judged, when ``count`` tokens came."""
        positions, given = (torch.cat(parts) for parts in zip(*token.given, strict=True))
        given = given[positions >= self.since(count)]
        positions = positions[positions >= self.since(count)]
        if self.fold == "votes":
            seen = (positions + 1).clamp(max=window or self.context).view(-1, 1)
            self.close |= bool(((given * seen - 1).abs() < self.rounding).any())
            return float((given * seen >= 1).sum())
        return float(given.amax()) if self.fold == "max" and len(given) else float(given.sum())

    def since(self, count: int) -> int:
        """The position of the first query by which tokens are judged: of as few blocks as have so many."""
        if not self.last:
            return 0
        return max((start for start in self.starts if count - start >= self.last), default=min(self.starts))

    def prune(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """ThinK: channels by the norms of the last queries and of the keys."""
        for number, head in enumerate(self.layers[layer]):
            queries = q[-self.think.window :, number * self.groups : (number + 1) * self.groups]
            worth = (queries**2).mean((0, 1)) * (k[:, number] ** 2).mean(0)
            count = self.dim - int(self.dim * self.think.prune)
            head.channels = sorted(worth.topk(count).indices.tolist())

    def settle(self, layer: int, count: int) -> None:
        """All of a layer's tokens are certain, of which ``count`` came so far."""
        staying = self.evict(layer, count)
        others = count > self.count or list(map(len, staying)) != [len(head.tokens) for head in self.layers[layer]]
        for head, places in zip(self.layers[layer], staying, strict=True):
            if others:
                head.recycled = None
            changed = {i for i, place in enumerate(places) if i != place}
            if self.d2o and len(places) < len(head.tokens):
                changed |= self.merge(head, places, count, self.windows[layer])
            head.tokens = [head.tokens[place] for place in places]
            head.certain = len(places)
            self.store(head, min(changed, default=len(places)) // PAGE)
            if self.quest:
                pages = [head.tokens[a : a + PAGE] for a in range(0, len(head.tokens) // PAGE * PAGE, PAGE)]
                keys = [torch.stack([token.key for token in page]) for page in pages]
                head.bounds = [(page.amin(0), page.amax(0)) for page in keys]

    def evict(self, layer: int, count: int) -> list[list[int]]:
        """Of each head the places of the tokens that stay."""
        heads, window = [head.tokens for head in self.layers[layer]], self.windows[layer]
        # What a layer keeps of a whole context is all that it has room for.
        limit = None if self.evictor is None else min(self.limit(layer, n) for n in (count, self.context))
        if limit is None and window is None:
            return [list(range(len(tokens))) for tokens in heads]
        limit = min(limit or self.context, window or self.context)
        total, adaptive = sum(map(len, heads)), self.evictor is not None and self.evictor.budget == "adakv"
        too_many = total > limit * len(heads) if adaptive else max(map(len, heads)) > limit
        too_old = window is not None and heads[0][0].position <= count - window
        selective = self.evictor is not None and self.evictor.name in ("corm", "scope")
        if not too_many and not too_old and not selective:
            return [list(range(len(tokens))) for tokens in heads]
        ranked = []  # (score, place) of each head, best first
        for head in range(len(heads)):
            scores = self.scores(layer, head, count, limit)
            ranked.append(sorted(((-score, place) for place, score in enumerate(scores) if score > -math.inf)))
        if not adaptive:
            return [sorted(place for _, place in rank[:limit]) for rank in ranked]
        least = max(int(limit * 0.2), 1)
        best = [
            (-math.inf if i < least else score, head, place)
            for head, rank in enumerate(ranked)
            for i, (score, place) in enumerate(rank)
        ]
        chosen = sorted(best)[: limit * len(heads)]
        return [sorted(place for _, h, place in chosen if h == head) for head in range(len(heads))]

    def merge(self, head: Head, places: list[int], count: int, window: int | None) -> set[int]:
        """D2O: tokens that go are merged into the most similar one that stays, if they are similar enough; gives the
        places among those that stay of the tokens that took some up."""
        gone = [token for place, token in enumerate(head.tokens) if place not in set(places)]
        gone = [token for token in gone if window is None or token.position > count - window]
        if not gone:
            return set()
        staying = [head.tokens[place] for place in places]
        similar = torch.nn.functional.cosine_similarity(
            torch.stack([token.key for token in gone])[:, None], torch.stack([token.key for token in staying]), dim=-1
        )
        best, closest = similar.max(1)
        mean, ema = float(best.mean()), self.d2o.ema
        head.threshold = mean if head.threshold is None else ema * mean + (1 - ema) * head.threshold
        into: dict[int, list[tuple[float, Token]]] = {}
        for token, similarity, place in zip(gone, best.tolist(), closest.tolist(), strict=True):
            if similarity >= head.threshold:
                into.setdefault(place, []).append((math.exp(similarity), token))
        for place, taken in into.items():
            token = staying[place]
            parts = [(math.e, token), *taken]
            total = sum(weight for weight, _ in parts)
            keys = sum(weight / total * part.key for weight, part in parts)
            values = sum(weight / total * part.value for weight, part in parts)
            token.key, token.value = keys, values
        return set(into)

    def limit(self, layer: int, count: int) -> int:
        """How many tokens each head of a layer keeps on average of ``count``."""
        evictor, last = self.evictor, len(self.own) - 1
        keep = (
            int(evictor.keep) if evictor.keep >= 1 else max(math.ceil(evictor.keep * count), sum(self.protected(1)), 2)
        )
        keep = min(keep, count)
        if evictor.budget == "pyramid":
            # What is not protected falls in equal steps from twice the average to a twentieth of it.
            safe = sum(self.protected(keep))
            low = (keep - safe) / 20
            high = 2 * (keep - safe) - low
            if high > count - safe:
                high = count - safe
                low = 2 * (keep - safe) - high
            if 0 <= low <= high:
                keep = safe + round(high - (high - low) / last * self.own.index(layer))
        return max(keep, 1)

    def protected(self, keep: int) -> tuple[int, int]:
        """How many of the first and the last of ``keep`` tokens stay in any case."""
        name, settings = self.evictor.name, self.evictor
        if name == "window":
            return settings.sinks, max(keep - settings.sinks, 1)
        if name in ("h2o", "d2o"):
            return 0, int(keep * settings.recent)
        if name == "tova":
            return 0, 0
        last = settings.recent if name in ("scissorhands", "scope") else settings.window
        if name == "scope":
            return 0, min(last, keep)
        return 0, last if keep == 1 and name == "snapkv" else min(last, max(keep - 1, 1))

    def scores(self, layer: int, head: int, count: int, limit: int) -> list[float]:
        heads, window = [head.tokens for head in self.layers[layer]], self.windows[layer]
        name, tokens = None if self.evictor is None else self.evictor.name, heads[head]
        masses = [0.0] * len(tokens) if name in (None, "window") else [self.mass(t, count, window) for t in tokens]
        scores = masses
        if name in (None, "window"):
            scores = [float(token.position) for token in tokens]
        elif name == "h2o" and self.h2o.normalize:
            scores = [mass / (count - token.position) for mass, token in zip(masses, tokens, strict=True)]
        elif name == "snapkv":
            judged = max(len(tokens) - self.snapkv.window, 0)
            masses = [mass if place < judged else 0.0 for place, mass in enumerate(masses)]
            half = self.snapkv.kernel // 2
            scores = [sum(masses[max(i - half, 0) : i + half + 1]) / self.snapkv.kernel for i in range(len(masses))]
        elif name == "tova":
            scores = [sum(self.mass(tokens[i], count, window) for tokens in heads) for i in range(len(tokens))]
        elif name == "scissorhands":  # minus how often it was not important
            readers = self.groups * self.owners.count(layer)
            queries = [count - max(token.position, self.since(count)) for token in tokens]
            scores = [mass - readers * n for mass, n in zip(masses, queries, strict=True)]
        elif name == "corm":
            scores = [mass or -math.inf for mass in masses]
        elif name == "scope":
            oldest = 0 if window is None else count - window + 1  # that the next query sees
            scores = self.scope([token.position for token in tokens], masses, count, oldest)
        first, last = (0, 0) if self.evictor is None else self.protected(limit)
        if window is not None:
            first, last = 0, first + last
        for place, token in enumerate(tokens):
            if place < first or place >= len(tokens) - last:
                scores[place] = math.inf
            if window is not None and token.position <= count - window:
                scores[place] = -math.inf
        return scores

    def scope(self, positions: list[int], masses: list[float], count: int, oldest: int) -> list[float]:
        """Scores that are minus infinity beyond the budgets of the prompt and of what is generated; tokens before the
        ``oldest`` do not count."""
        hidden = sum(position < oldest for position in positions)
        positions, masses = positions[hidden:], masses[hidden:]
        settings, prompt = self.evictor, sum(position < self.prompt for position in positions)
        if count == self.prompt:
            judged, half, most = prompt - settings.recent, settings.kernel // 2, settings.keep - settings.output
            masses = [mass if place < judged else 0.0 for place, mass in enumerate(masses)]
            masses = [sum(masses[max(i - half, 0) : i + half + 1]) / settings.kernel for i in range(len(masses))]
            prompt = 0
        elif settings.update == "slide" or (settings.update == "discontinuous" and count % settings.every):
            most = settings.output
        else:
            spare = settings.every - PAGE if settings.update == "discontinuous" else 0
            most = min(settings.recent + (count - self.prompt) // settings.step, settings.output - spare)
        rest = range(prompt, len(masses))
        order = sorted(rest, key=lambda place: -masses[place] if place < len(masses) - settings.recent else -math.inf)
        stay = {*range(prompt), *order[: int(most)]}
        scores = [math.inf] * prompt + masses[prompt:]
        return [-math.inf] * hidden + [score if at in stay else -math.inf for at, score in enumerate(scores)]

    def store(self, head: Head, same: int) -> None:
        """Writes whole pages in fewer channels and bits, all but those of the last tokens; the first ``same`` pages are
        those that were there."""
        if self.recent is None:
            return
        written = min(head.coded, same)
        head.coded = max((len(head.tokens) - self.recent) // PAGE, written)
        for page in range(written, head.coded):
            tokens = head.tokens[page * PAGE : (page + 1) * PAGE]
            keys, values = (torch.stack([getattr(token, name) for token in tokens]) for name in ("key", "value"))
            if self.think:
                pruned = torch.ones(self.dim, dtype=torch.bool)
                pruned[head.channels] = False
                keys[:, pruned] = 0.0
            if self.key_bits:
                keys = rounded(keys, self.key_bits, 0)
            if self.value_bits:
                values = torch.cat([rounded(part, self.value_bits, 1) for part in values.split(32, 1)], 1)
            for token, key, value in zip(tokens, keys, values, strict=True):
                token.key, token.value = key, value


def owners(kv: str, layers: int) -> list[int]:
    """Of each layer the one whose keys and values it reads: where layers share, the last one reads the first one's."""
    return [*range(layers - 1), 0 if "kvsharer" in kv else layers - 1]


def rounded(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """``x`` in 2**bits levels between its lowest and its highest number along ``dim``; scale and minimum in float16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, minimum = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((x - minimum) / scale.clamp(min=1e-30)).round().clamp(0, 2**bits - 1)
    return torch.where(scale > 0, codes, 0.0) * scale + minimum
