"""How the numbers of pages of keys and values are stored. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 32  # tokens
CODE_GROUP = 32  # channels of a value that share a scale


@dataclass(frozen=True)
class Codec:
    """How numbers of coded pages are stored: ``bits`` each, 16 and more being the cache's own type, in rows of ``dim``;
    ``per_channel`` says which of them share a scale and a minimum."""

    bits: int
    dim: int
    per_channel: bool

    @property
    def dense(self) -> bool:
        return self.bits >= 16

    @property
    def row_bytes(self) -> int:
        return -(-self.dim * self.bits // 8)

    @property
    def groups(self) -> int:
        return -(-self.dim // CODE_GROUP)

    @property
    def scales(self) -> int:
        """How many numbers of a page have a scale of their own."""
        if self.dense:
            return 0
        return self.dim if self.per_channel else PAGE * self.groups

    @property
    def page_bytes(self) -> int:
        """32 rows of codes, the first in the lowest bits; then scales, then minima in float16."""
        return -(-(PAGE * self.row_bytes + 4 * self.scales) // 64) * 64
