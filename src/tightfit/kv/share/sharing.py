"""Which layers share keys and values: found once with a text, kept as JSON in the user's cache folder under the model's
fingerprint and the settings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tightfit.budget.machine import cache_folder, remember
from tightfit.catalog import spec_string
from tightfit.errors import CheckpointError, UsageError
from tightfit.kv.compose import compose
from tightfit.kv.share.kvsharer import KVSharer


@dataclass(frozen=True)
class Sharing:
    """``owners`` of the layers: of each the one whose keys and values it reads. With ``tokens`` tokens of a text, final
    hidden states then had the cosine ``similarity`` with those of the model as it is."""

    model: str
    tokens: int
    owners: list[int]
    similarity: float


def sharing_file(fingerprint: str, method: KVSharer) -> Path:
    return cache_folder() / f"layers-{fingerprint[:32]}-{method.share:g}-{method.threshold:g}.json"


def read_sharing(name: str, fingerprint: str, method: KVSharer, layers: int) -> Sharing:
    """What was found for the model ``name``. Raises CheckpointError if that is nothing, or not of its layers."""
    path = sharing_file(fingerprint, method)
    find = f"Find them with `tightfit fit MODEL --kv '{spec_string(method)}' --text FILE`."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sharing = Sharing(values["model"], values["tokens"], values["owners"], values["similarity"])
        owners = sharing.owners
        fits = len(owners) == layers and all(isinstance(owner, int) for owner in owners)
        fits = fits and all(0 <= owner <= layer and owners[owner] == owner for layer, owner in enumerate(owners))
        fits = fits and sum(owner != layer for layer, owner in enumerate(owners)) == method.wanted(layers)
    except FileNotFoundError:
        raise CheckpointError(f"layers of {name} that can share keys and values were never looked for", find) from None
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path} does not say which layers of {name} share", find)
    return sharing


def write_sharing(fingerprint: str, method: KVSharer, sharing: Sharing) -> Path:
    """Keeps what was found, whole or not at all; gives the file. Raises FileError."""
    return remember(sharing_file(fingerprint, method), json.dumps(asdict(sharing)))


def owners_for(kv: str, name: str, fingerprint: str, trained: list[int]) -> list[int] | None:
    """The owners of the layers of a model in a cache of the methods ``kv``, where it was ``trained`` with some; None
    where each has its own. Raises CheckpointError as :func:`read_sharing` does, UsageError for a method beside owners
    that it was trained with."""
    sharer = compose(kv).sharer
    if trained != list(range(len(trained))):
        if sharer is not None:
            raise UsageError(f"layers of {name} were trained to share keys and values", "Leave kvsharer out.")
        return trained
    return None if sharer is None else read_sharing(name, fingerprint, sharer, len(trained)).owners
