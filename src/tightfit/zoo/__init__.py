"""The models that ship inside the package, and the recipe that makes them.

``corpus`` gathers text and trains the tokenizer, ``tasks`` writes questions about what was read, ``presets`` and
``network`` say what is trained, ``train`` trains it, ``evaluate`` measures it. Importing this module costs nothing.
"""

from __future__ import annotations

from pathlib import Path

from tightfit.errors import UsageError

EMBEDDED: dict[str, Path] = {"nano": Path(__file__).parent / "nano"}
DEFAULT = "nano"


def path(name: str = DEFAULT) -> Path:
    """The Hugging Face folder of the embedded model ``name``. Raises UsageError for a name that does not ship."""
    if name not in EMBEDDED:
        raise UsageError(
            f"there is no embedded model named {name!r}",
            f"Embedded models: {', '.join(EMBEDDED)}. Any other model is opened by its folder or hub name.",
        )
    return EMBEDDED[name]
