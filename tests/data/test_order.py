"""Orders of an epoch: permutations, by blocks and windows, the same on any number of hosts and workers."""

import contextlib
import json
import random

import numpy as np
import pytest

from vlm_jax.data import loader, order
from vlm_jax.data.order import Windowed, Windows
from vlm_jax.errors import UserError


@pytest.mark.parametrize("seed", range(8))
def test_any_sizes_give_a_permutation_that_blocks_and_windows_make_up(seed):
    rng = random.Random(seed)
    for _ in range(60):
        n, rows = rng.choice([0, 1, 2, 7, rng.randrange(300)]), rng.randrange(1, 40)
        windows = Windows(rng.randrange(1, 50), rng.randrange(1, 9), rng.randrange(1, 20))
        epoch = Windowed(seed, 3, n, rows, windows)
        assert sorted(epoch[at] for at in range(n)) == list(range(n))
        by_window = {}
        for at in range(n):
            lane, window, _ = epoch.place(at)
            by_window.setdefault((lane, window), []).append(epoch[at])
        for lane in range(epoch.lanes):
            for window in range(n):
                blocks = [epoch.block_of(lane, window, number) for number in range(windows.window)]
                if blocks[0] is None:
                    break
                found = sorted(i for block in blocks for numbers in block for i in numbers)
                assert found == sorted(by_window.pop((lane, window)))
        assert not by_window


def test_epochs_seeds_and_neighbours():
    windows = Windows(block=10, window=4, lanes=2)
    epochs = [[*Windowed(seed, epoch, 1000, 8, windows)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert epochs[0] == [*Windowed(0, 0, 1000, 8, windows)] and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for epoch in epochs:
        lanes = np.array(epoch).reshape(-1, 2, 4).transpose(1, 0, 2).reshape(2, -1)
        assert (np.diff(lanes[0]) == 1).mean() < 0.05  # mixed
        blocks = lanes[0, :40]
        assert len({(i - blocks.min()) // 1000 for i in blocks}) == 1
        near = (np.abs(np.sort(blocks)[1:] - np.sort(blocks)[:-1]) == 1).mean()
        assert near > 0.85  # blocks of consecutive examples
    together = [{i // 10 for i in epoch[:40]} for epoch in epochs]
    assert together[0] != together[1]


def test_a_lookup_needs_a_window_and_no_more():
    epoch = Windowed(5, 2, 4 * 10**8, 4096, Windows())
    taken = [epoch[at] for at in range(0, 4 * 10**8, 7_777_777)]
    assert len({*taken}) == len(taken) and max(taken) < 4 * 10**8
    assert epoch.mixed.cache_info().currsize <= 2 * 16 + 2


def write(folder, count):
    path = folder / "table.jsonl"
    path.write_text("\n".join(json.dumps({"n": n}) for n in range(count)))
    return f"jsonl:{path}"


ORDER = dict(name="windowed", block=5, window=3, lanes=4)


def take(count, state=None, **options):
    with contextlib.closing(loader.train_loader(batch_size=8, seed=2, **options)) as batches:
        if state:
            batches.set_state(state)
        taken = [next(batches)["n"].tolist() for _ in range(count)]
        return taken, batches.get_state()


@pytest.mark.parametrize("mixed", [False, True], ids=["one source", "a mixture"])
def test_hosts_threads_and_resumed_runs_take_the_same_batches(tmp_path, mixed):
    one = dict(uri=write(tmp_path, 83), ops="keep('n')", order=ORDER)
    options = dict(sources={"a": one | {"weight": 3.0}, "b": one | {"order": "full"}}) if mixed else one
    expected, _ = take(25, **options)
    if not mixed:
        for first in (0, 10):
            epoch = sum(expected[first : first + 10], [])  # noqa: RUF017
            assert len({*epoch}) == 80
    shares = [take(25, rows=range(start, start + 4), **options)[0] for start in (0, 4)]
    assert [a + b for a, b in zip(*shares, strict=True)] == expected
    assert take(25, threads=3, **options)[0] == expected
    begun, state = take(7, **options)
    assert begun + take(18, state=json.loads(json.dumps(state)), **options)[0] == expected


def test_a_host_reads_the_blocks_of_its_lanes_alone():
    n, rows, windows = 4000, 16, Windows(block=20, window=2, lanes=4)
    epoch = Windowed(0, 0, n, rows, windows)
    for host in range(4):
        own = [epoch[k * rows + row] for k in range(n // rows) for row in range(host * 4, host * 4 + 4)]
        assert len({(i - epoch.shift) % n // 20 for i in own}) <= n // 20 // 4 + 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("shuffled", "config.data.order is 'shuffled'; expected 'full', 'windowed', or"),
        (5, "config.data.order is 5; expected"),
        ({"name": "full", "block": 3}, "config.data.order is {.*; expected"),
        ({"name": "windowed", "size": 3}, "config.data.order has no key `size`"),
        ({"name": "windowed", "block": 0}, "config.data.order.block is 0; expected 1 or more"),
        ({"name": "windowed", "block": "x"}, "block='x' should be a whole number"),
        ({"name": "windowed", "block": 2**20}, "at most 1,048,576"),
    ],
)
def test_a_wrong_order_is_one_line(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        take(1, uri=write(tmp_path, 9), ops="keep('n')", order=given)


def test_the_default_is_full_on_disk_and_windowed_in_a_store():
    assert order.windows_of(None, False, "config.data") is None
    assert (
        order.windows_of(None, True, "config.data") == Windows() == order.windows_of("windowed", False, "config.data")
    )
    assert order.windows_of("full", True, "config.data") is None
