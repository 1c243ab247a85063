"""How the numbers of pages of keys and values are stored. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 32  # tokens
CODE_GROUP = 32  # channels of a value that share a scale


@dataclass(frozen=True)
class Codec:
    """How numbers of coded pages are stored: ``bits`` each, 16 and more being the cache's own type, in rows of ``dim``;
    ``per_channel`` says which of them share a scale and a minimum: a channel of a page, or ``group`` channels of a
    token.

    ``affine``: of each channel an offset is taken off, and the rest divided by a factor, before that. ``coupled``: so
    many neighbours share one code, that of the nearest of 2**bits centroids; there are no scales. ``rank``: of what
    codes miss, each token keeps its part along so many directions, in float16. ``outliers``: the numbers of a page that
    lie furthest from the median of their channel or token are kept apart as they are, in ``wide`` bytes.

    Offsets and factors, centroids and directions lie in a table beside the pages, of ``side`` numbers.
    """

    bits: int
    dim: int
    per_channel: bool
    group: int = CODE_GROUP
    affine: bool = False
    coupled: int = 0
    rank: int = 0
    outliers: int = 0
    wide: int = 2

    @property
    def dense(self) -> bool:
        return self.bits >= 16

    @property
    def codes(self) -> int:
        """How many codes a token has."""
        return self.dim // self.coupled if self.coupled else self.dim

    @property
    def row_bytes(self) -> int:
        return -(-self.codes * self.bits // 8)

    @property
    def groups(self) -> int:
        return -(-self.dim // self.group)

    @property
    def scales(self) -> int:
        """How many numbers of a page have a scale of their own."""
        if self.dense or self.coupled:
            return 0
        return self.dim if self.per_channel else PAGE * self.groups

    @property
    def side(self) -> int:
        """How many numbers the table of a head has: offsets and factors of channels, then directions (rank, dim); or
        centroids (dim / coupled, 2**bits, coupled)."""
        return (self.dim << self.bits) if self.coupled else (2 * self.affine + self.rank) * self.dim

    @property
    def page_bytes(self) -> int:
        """32 rows of codes, the first in the lowest bits; then scales, then minima in float16; then for each token its
        parts along the directions; then places and numbers of outliers."""
        more = 2 * PAGE * self.rank + (2 + self.wide) * self.outliers
        return -(-(PAGE * self.row_bytes + 4 * self.scales + more) // 64) * 64

    def arguments(self) -> tuple[int, ...]:
        """What the compiled kernels take."""
        kinds = self.bits, self.dim, int(self.per_channel), self.group, int(self.affine)
        return *kinds, self.coupled, self.rank, self.outliers, self.wide
