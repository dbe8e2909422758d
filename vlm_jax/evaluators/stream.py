"""One pass over a data set for an evaluator, from any batch on, each host reading its share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import command
from vlm_jax.data import loader, ops
from vlm_jax.data.examples import Examples
from vlm_jax.evaluators.hosts import Hosts


class Batch(NamedTuple):
    """A batch of the whole data set's order.

    Attributes:
      done: how many batches there have been, this one included.
      position: int [B], the examples' places in the data set.
      mask: bool [B], which rows are examples.
      image: what the model takes, a tree of arrays [B, ...]; on several hosts only this one's rows are filled.
      columns: name -> list of B values.
    """

    done: int
    position: np.ndarray
    mask: np.ndarray
    image: Any
    columns: dict[str, list]


class _From(loader.EvalBatches):
    """The batches from number `start` on."""

    def __init__(self, batches: loader.EvalBatches, start: int):
        self.__dict__ |= batches.__dict__ | {"start": start}

    def __len__(self) -> int:
        return super().__len__() - self.start

    def __getitem__(self, k: int) -> Any:
        return super().__getitem__(self.start + k)


def stream(
    batches: loader.EvalBatches, hosts: Hosts, columns: Sequence[str], start: int = 0, show: bool = False
) -> Iterator[Batch]:
    """Yields the batches from number `start` on.

    Args:
      batches: this process's share, with `image` and the columns.
      hosts: the processes.
      columns: fields that every process gets of the whole batch; their values are JSON-able.
      start: how many batches are done already.
      show: whether a progress bar is shown.
    """
    if show and start:
        print(f"continuing after {start:,} of {len(batches):,} batches")
    bar = command.bar(
        _From(batches, start), initial=start, total=len(batches), desc="embed", unit="batch", disable=not show
    )
    for k, batch in enumerate(bar, start):
        rows = hosts.gather(list(zip(batch["mask"].tolist(), *(batch[name] for name in columns), strict=True)))
        mask, *values = zip(*rows, strict=True)
        position = k * hosts.batch_size + np.arange(len(rows))
        named = dict(zip(columns, map(list, values), strict=True))
        yield Batch(k + 1, position, np.array(mask, bool), hosts.whole(batch["image"]), named)


def open_pass(
    pretrained: Any, *, uri: str, split: str | None, where: Mapping[str, Sequence] | None, ops: str, batch_size: int
) -> tuple[Any, Hosts, loader.EvalBatches]:
    """What one pass needs: the model as it embeds such batches, the processes, and this one's share of the batches.

    Args:
      pretrained: the model; it knows where it runs.
      uri, split, where, ops, batch_size: as for `loader.eval_batches`.
    """
    hosts = Hosts(getattr(pretrained, "mesh", None), batch_size)
    batches = loader.eval_batches(
        uri=uri, split=split, where=where, ops=ops, tokenizer=pretrained.tokenizer,
        batch_size=hosts.batch_size, rows=hosts.rows,
    )  # fmt: skip
    return hosts.place(pretrained), hosts, batches


def look_up(batches: loader.EvalBatches, string: str, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Examples at some places of the data set, made by another op string, which may name the same fields."""
    pipeline = ops.parse(string)
    narrowed = batches.examples.source.narrow(pipeline.paths)
    examples = Examples(narrowed, pipeline, batches.examples.chosen, batches.examples.seed)
    return [examples.read(int(i), int(i)) for i in positions]
