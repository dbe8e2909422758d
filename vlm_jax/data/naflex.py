"""NaFlex: each batch holds packed pictures of one length, drawn from several lengths (SigLIP 2, arXiv:2502.14786).

    data=dict(uri=..., ops="... | resize_to_patches(16) | normalize | pack_patches(16) | ...",
              naflex=dict(lengths=(128, 256, 576, 784, 1024), budget=2**23, multiple=256))

Section 2.4.2 of the paper. A batch of length N has budget / N pictures of up to N patches each, proportions kept.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import config
from vlm_jax.errors import UserError

WHERE = "config.data.naflex"
LONGEST = 2**20  # patches, as `registry.Length`
DRAW = 4  # use of a seed's randomness, apart from those of `order`


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The lengths of batches.

    In each round of as many batches as there are lengths, every length comes once, in an order drawn anew. So every
    length is equally probable, all rounds have the same number of examples, and batch k is known without those before.

    Attributes:
      lengths: patches of a picture, padding included; in ascending order.
      budget: patches of a batch, at most.
      multiple: the rows of a batch are rounded down to a multiple, of devices and micro-batches.
    """

    lengths: Sequence[int]
    budget: int
    multiple: int = 1

    def __post_init__(self):
        lengths = self.lengths if isinstance(self.lengths, Sequence) and not isinstance(self.lengths, str) else ()
        sound = all(type(length) is int and 1 <= length <= LONGEST for length in lengths)
        if not lengths or not sound or len(set(lengths)) < len(lengths):
            raise UserError(f"{WHERE}.lengths is {self.lengths!r:.80}; expected different numbers, such as (128, 256)")
        object.__setattr__(self, "lengths", tuple(sorted(lengths)))
        config.check_least(1, WHERE, budget=self.budget, multiple=self.multiple)
        for length, size in self.sizes.items():
            if not size:
                least = length * self.multiple
                raise UserError(
                    f"{WHERE}.budget is {self.budget}, too small for a batch of length {length}; expected {least} or "
                    "more, or a shorter length"
                )

    @property
    def sizes(self) -> dict[int, int]:
        """Length -> rows of a batch."""
        rows = lambda length: self.budget // (length * self.multiple) * self.multiple
        return {length: rows(length) for length in self.lengths}

    @property
    def round(self) -> int:
        """The number of examples of a round."""
        return sum(self.sizes.values())

    @property
    def mean(self) -> int:
        """The mean number of rows of a batch, rounded down."""
        return self.round // len(self.lengths)

    def check(self, shards: int, accumulate: int) -> None:
        """Raises a UserError if a batch cannot be split over devices and cut into micro-batches."""
        for length, size in self.sizes.items():
            if accumulate > 0 and (size % shards or size % accumulate):
                raise UserError(
                    f"{WHERE}: a batch of length {length} has {size} rows, which {shards} devices (mesh data x fsdp) "
                    f"with accumulate={accumulate} cannot share; set multiple={shards * accumulate}"
                )

    def length(self, seed: int, k: int) -> int:
        """Returns the length of batch k."""
        number, at = divmod(k, len(self.lengths))
        return self._drawn(seed, number)[at]

    def before(self, seed: int, k: int) -> int:
        """Returns the number of examples of the first k batches."""
        number, at = divmod(k, len(self.lengths))
        return number * self.round + sum(self.sizes[length] for length in self._drawn(seed, number)[:at])

    def _drawn(self, seed: int, number: int) -> list[int]:
        return [self.lengths[i] for i in _order(seed, number, len(self.lengths))]


def read(section: Mapping[str, Any] | None) -> Buckets | None:
    """Returns the buckets of a config's `data.naflex`, None without one."""
    return config.call(Buckets, section, WHERE) if section else None


def check_example(length: int, example: Mapping[str, Any]) -> None:
    """Raises a UserError if a batch of a length does not hold packed pictures of this length."""
    found = {
        fields["patches"].shape[1] for fields in example.values() if isinstance(fields, dict) and "patches" in fields
    }
    if found != {length}:
        raise UserError(
            f"{WHERE}: the ops make pictures of {' and '.join(map(str, sorted(found))) or 'no'} patches for the length "
            f"{length}; write `resize_to_patches(16) | normalize | pack_patches(16)`, without a number of patches"
        )


@functools.lru_cache(maxsize=64)
def _order(seed: int, number: int, count: int) -> list[int]:
    return np.random.default_rng((seed, number, DRAW)).permutation(count).tolist()
