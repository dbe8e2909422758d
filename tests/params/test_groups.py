"""Rates by layer, parts of parameters, transforms of groups, terms that are off: against AdamW in numpy, fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.errors import UserError
from vlm_jax.params import masks, optim
from vlm_jax.params.table import format_table, named_leaves

STEPS, LR, WD, D = 5, 0.1, 0.2, 0.75
SCHEDULE = dict(name="linear", end=0.2)
CURVE = [1 - 0.8 * step / STEPS for step in range(STEPS)]
SHAPES = {
    "image": {"patch_embed": {"kernel": (4, 3)}, "blocks": {"fc": {"kernel": (3, 4, 6)}}, "norm": {"scale": (4,)}},
    "text": {"token_embed": {"embedding": (5, 4)}, "head": {"kernel": (4, 2)}}
    | {f"blocks_{i}": {"fc": {"kernel": (4, 6)}} for i in range(2)},
    "logit_scale": (),
}
STACK, EMBEDDING = "image/blocks/fc/kernel", "text/token_embed/embedding"


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def draw(seed):
    rng = np.random.default_rng(seed)
    normal = lambda shape: jnp.asarray(rng.standard_normal(shape))
    return jax.tree.map(normal, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))


START, GRADIENTS = draw(0), [draw(step) for step in range(1, STEPS + 1)]


def build(*rules, reach=None, **section):
    section = dict(name="adamw", lr=LR, weight_decay=WD, schedule=SCHEDULE) | section
    with jax.enable_x64(True):
        return optim.build({**section, "params": (*rules, (".*", {}))}, START, STEPS, reach=reach)


def train(tx, active=lambda step: {}):
    """Returns parameters and optimizer state after each step."""
    update = jax.jit(lambda g, state, p, on: tx.update(g, state, p, active=on))
    p, state, seen = START, tx.init(START), []
    for step, g in enumerate(GRADIENTS):
        updates, state = update(g, state, p, active(step))
        p = optax.apply_updates(p, updates)
        seen.append((p, state))
    return seen


def adamw(name, rate=1.0, mask=True, active=lambda step: True, change=lambda g: g, decay="lr"):
    """Returns the parameter after each step: Loshchilov & Hutter 2019, algorithm 2; with `decay="lr"` as in torch."""
    p = np.asarray(named_leaves(START)[name])
    wd = WD if name.endswith("kernel") else 0.0
    mu, nu, count, seen = np.zeros_like(p), np.zeros_like(p), 0, []
    for step, gradients in enumerate(GRADIENTS):
        if active(step):
            g = np.where(mask, change(np.where(mask, named_leaves(gradients)[name], 0)), 0)
            count += 1
            mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
            move = LR * rate * mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.999**count)) + 1e-8)
            move += wd * p * (LR * rate if decay == "lr" else 1.0)
            p = np.where(mask, p - CURVE[step] * move, p)
        seen.append(p)
    return seen


def assert_follows(seen, name, **options):
    for (p, _), want in zip(seen, adamw(name, **options), strict=True):
        np.testing.assert_allclose(named_leaves(p)[name], want, rtol=1e-6, atol=1e-7)  # schedules are fp32


def assert_same_bits(got, want):
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def moments(state, name):
    """The arrays of the state that belong to a parameter."""
    return [x for path, x in named_leaves(state).items() if path.endswith(name) and x.ndim]


STACKED = np.array([D**3, D**2, D]).reshape(3, 1, 1)
DECAYED = {
    "image/patch_embed/kernel": D**4, STACK: STACKED, "image/norm/scale": 1.0,
    EMBEDDING: D**3, "text/blocks_0/fc/kernel": D**2, "text/blocks_1/fc/kernel": D, "text/head/kernel": 1.0,
    "logit_scale": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("decay", ["lr", "schedule"])
def test_layer_decay_counts_as_beit_and_mae(decay):
    tx, table, _ = build((".*", dict(layer_decay=D)), decay=decay)
    seen = train(tx)
    for name, rate in DECAYED.items():
        assert_follows(seen, name, rate=rate, decay=decay)
    assert table[STACK] == "lr x0.4219 to x0.75 by layer, wd x1"
    assert table["text/blocks_0/fc/kernel"] == "lr x0.5625, wd x1" and table["logit_scale"] == "lr x1, wd x0"


def test_one_rate_for_each_block():
    image = (r"image/blocks.*", dict(lr=[0.5, 2.0, 1.0], layer_decay=D))
    tx, table, _ = build(image, (r"text/blocks.*", dict(lr=(0.1, 3.0))), (r"image/.*", dict(lr=0.5, layer_decay=D)))
    seen = train(tx)
    assert_follows(seen, STACK, rate=STACKED * np.array([0.5, 2.0, 1.0]).reshape(3, 1, 1))
    assert_follows(seen, "text/blocks_0/fc/kernel", rate=0.1)
    assert_follows(seen, "text/blocks_1/fc/kernel", rate=3.0)
    assert_follows(seen, "image/patch_embed/kernel", rate=0.5 * D**4)
    assert_follows(seen, "text/head/kernel")
    assert table[STACK] == "lr x0.2109 to x0.75 by layer, wd x1"


ROWS = np.array([True, False, False, True, False])[:, None]
SCALARS = np.random.default_rng(9).random((4, 2)) < 0.5


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "mask.npz", **{"text/head/kernel": SCALARS})
    return str(tmp_path / "mask.npz")


def test_only_a_part_trains(file):
    tx, table, _ = build(
        (r"image/.*", dict(only="last_1", layer_decay=D)),
        (r"text/token_embed/.*", dict(only=ROWS.tolist())),
        (r"text/head/.*", dict(only=file, transform=dict(name="add_noise", eta=0.0, gamma=0.5, key=0))),
        (r"text/blocks_1/.*", dict(only=((r".*_1/.*", np.arange(6) < 2), (".*", False)))),
    )
    seen = train(tx)
    last = np.array([False, False, True]).reshape(3, 1, 1)
    for name, mask, rate in (
        (STACK, last, D),
        (EMBEDDING, ROWS, 1.0),
        ("text/head/kernel", SCALARS, 1.0),
        ("text/blocks_1/fc/kernel", np.arange(6) < 2, 1.0),
    ):
        assert_follows(seen, name, mask=mask, rate=rate)
        p, state = seen[-1]
        rest = ~np.broadcast_to(mask, named_leaves(START)[name].shape)
        assert_same_bits(named_leaves(p)[name][rest], named_leaves(START)[name][rest])
        assert [np.any(m[rest]) for m in moments(state, name)] == [False, False]
    assert table["image/patch_embed/kernel"] == "frozen" and table[EMBEDDING] == "lr x1, wd x0, 12 frozen"
    totals = format_table(START, table).splitlines()[-1]
    frozen = 12 + 48 + 12 + 16 + int(np.sum(~SCALARS))
    assert f"{165 - frozen} trained, {frozen} frozen" in totals


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon", "sgd"])
def test_what_is_masked_keeps_its_bits(name):
    """Under any optimizer, with decay, noise and clipping; -0.0 stays -0.0, and NaN does not matter there."""
    noise = dict(name="add_noise", eta=1.0, gamma=0.5, key=0)
    options = dict(momentum=0.9) if name == "sgd" else {}
    tx, _, _ = build((r"image/blocks/.*", dict(only="last_1", transform=noise)), name=name, clip_norm=1.0, **options)
    start = jax.tree.map(lambda x: x, START)
    start["image"]["blocks"]["fc"]["kernel"] = START["image"]["blocks"]["fc"]["kernel"].at[0, 0].set(-0.0)
    huge = jax.tree.map(lambda g: g, GRADIENTS[0])
    huge["image"]["blocks"]["fc"]["kernel"] = huge["image"]["blocks"]["fc"]["kernel"].at[:2].set(np.nan)
    updates, state = jax.jit(tx.update)(huge, tx.init(start), start)
    p = optax.apply_updates(start, updates)
    old, new = (named_leaves(tree)[STACK] for tree in (start, p))
    assert_same_bits(new[:2], old[:2])
    assert np.all(np.isfinite(new)) and np.all(new[2] != old[2])
    kept = [m[:2] for m in moments(state, STACK) if m.shape == old.shape]
    assert kept and all(np.all(np.abs(m) <= 1e-30) for m in kept)  # Adafactor adds 1e-30 to squared gradients


def test_transforms_of_a_group_come_before_the_optimizer():
    steps = ["centralize", dict(name="clip", max_delta=0.3), dict(name="scale", step_size=2.0)]
    tx, table, _ = build((r"text/.*", dict(transform=steps)), (r"image/norm/.*", dict(transform="scale_by_sign")))
    change = lambda g: 2 * np.clip(g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True), -0.3, 0.3)
    seen = train(tx)
    assert_follows(seen, EMBEDDING, change=change)
    assert_follows(seen, "text/blocks_1/fc/kernel", change=change)
    assert_follows(seen, "image/norm/scale", change=np.sign)
    assert_follows(seen, STACK)
    assert table[EMBEDDING] == "lr x1, wd x0, centralize, clip max_delta=0.3, scale step_size=2.0"


def test_shrink_is_the_proximal_step_of_an_l1_penalty():
    """sign(x) max(|x| - t, 0) of the parameter after SGD; a threshold that rises late, and a number."""
    rise = dict(name="constant", value=0.2, begin=2, warmup=2)
    tx, table, _ = build((EMBEDDING, dict(shrink=rise)), (STACK, dict(shrink=0.3)), name="sgd", weight_decay=0)
    assert table[EMBEDDING].endswith(", shrink name=constant value=0.2 begin=2 warmup=2")
    assert table[STACK].endswith(", shrink value=0.3")
    thresholds = {EMBEDDING: [0, 0, 0, 0.1, 0.2], STACK: [0.3] * STEPS, "logit_scale": [0] * STEPS}
    wanted = {name: named_leaves(START)[name] for name in thresholds}
    for step, (p, _) in enumerate(train(tx)):
        for name, x in wanted.items():
            x = x - LR * CURVE[step] * named_leaves(GRADIENTS[step])[name]
            wanted[name] = np.sign(x) * np.maximum(np.abs(x) - thresholds[name][step], 0)
            np.testing.assert_allclose(named_leaves(p)[name], wanted[name], rtol=1e-6, atol=1e-6)
    assert [np.any(named_leaves(p)[name] == 0) for name in thresholds] == [True, True, False]


def test_random_keys_of_the_state_are_numbers():
    """Noise differs from step to step; checkpoints cannot hold typed keys."""
    tx, _, _ = build((EMBEDDING, dict(transform=dict(name="add_noise", eta=1.0, gamma=0.0, key=3))), name="sgd")
    states = [tx.init(START)]
    moves = []
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, START), states[-1], START)
        states.append(state)
        moves.append(named_leaves(updates)[EMBEDDING])
    assert np.all(moves[0] != moves[1])
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(states))


ALWAYS = dict.fromkeys(named_leaves(START))


def test_parameters_that_no_term_reaches_stay():
    reach = {name: key for name, key in ALWAYS.items() if not name.startswith("image")}
    tx, table, _ = build((r"image/norm/.*", dict(freeze=True)), reach=reach)
    seen = train(tx)
    for name, leaf in named_leaves(START).items():
        if name in reach:
            assert_follows(seen, name)
            continue
        assert_same_bits(named_leaves(seen[-1][0])[name], leaf)
        assert not moments(seen[-1][1], name)
        assert table[name] == ("frozen" if "norm" in name else "frozen: no term reaches it")


@pytest.mark.parametrize("options", [{}, dict(layer_decay=D, only="last_1", transform="centralize")])
def test_a_term_that_is_off_holds_parameters_and_moments(options):
    """Moments and bias correction start with the term, and pause with it; the schedule is that of the run."""
    on = lambda step: step in (2, 4)
    reach = ALWAYS | {STACK: "later", EMBEDDING: "later"}
    tx, _, _ = build((STACK, options), reach=reach)
    seen = train(tx, lambda step: {"later": jnp.asarray(on(step))})
    expected = {}
    if options:
        centralize = lambda g: g - g.mean(axis=(1, 2), keepdims=True)
        expected = dict(rate=D, mask=np.array([False, False, True]).reshape(3, 1, 1), change=centralize)
    assert_follows(seen, STACK, active=on, **expected)
    assert_follows(seen, EMBEDDING, active=on)
    assert_follows(seen, "text/head/kernel")
    for name in (STACK, EMBEDDING):
        assert_same_bits(named_leaves(seen[1][0])[name], named_leaves(START)[name])
        assert_same_bits(named_leaves(seen[3][0])[name], named_leaves(seen[2][0])[name])
        assert not any(np.any(m) for m in moments(seen[1][1], name))
        for held, before in zip(moments(seen[3][1], name), moments(seen[2][1], name), strict=True):
            assert_same_bits(held, before)


@pytest.mark.parametrize(
    "rule, message",
    [
        ((STACK, dict(transform="centralise")), r"\.transform is `centralise`, .* did you mean `centralize`"),
        ((STACK, dict(transform="adamw")), "which is no gradient transformation of optax"),
        ((STACK, dict(transform=[dict(nam="clip")])), "which is no gradient transformation of optax"),
        ((STACK, dict(transform="clip")), r"\.transform \(clip\) lacks the key `max_delta`"),
        ((STACK, dict(transform=dict(name="clip", max_delt=1.0))), r"no key `max_delt`; did you mean `max_delta`"),
        ((STACK, dict(layer_decay=-1)), "layer_decay is -1; expected a number above 0"),
        (("logit_scale", dict(layer_decay=D)), "no parameter of the rule is in a tower with `blocks`"),
        (
            (STACK, dict(lr=[0.1, 0.2])),
            f"lr has 2 multipliers, one for each block; `{STACK}` is in a stack of 3 blocks",
        ),
        (("image/norm/.*", dict(lr=[1, 1, 1])), "`image/norm/scale` is outside a stack of 3 blocks"),
        ((STACK, dict(lr=[0.1, 0.0, 1.0])), "expected a multiplier above 0"),
        ((STACK, dict(only="last_9")), r"\.only is `last_9`, but `image/blocks` has 3 blocks|`text/blocks` has 2"),
        ((STACK, dict(only="biases")), r"\.only is `biases`; expected a table or one of"),
        ((STACK, dict(sparse=1.0)), r"\.sparse is 1.0; expected the share of zeros, 0 to below 1"),
        ((STACK, dict(sparse=0.5, freeze=True)), "has sparse=0.5 beside freeze or only"),
        (("logit_scale", dict(only="head")), "only trains no parameter of the rule; use freeze=True"),
        ((EMBEDDING, dict(only=[True, False])), r"the mask of `text/token_embed/embedding` is \[2\]; expected to"),
        ((EMBEDDING, dict(only=[0, 3])), "is int64; expected bools"),
        ((EMBEDDING, dict(only="no.npz")), "no.npz`, which cannot be read; expected an .npz file of bools by name"),
    ],
)
def test_mistakes_are_named(rule, message):
    with pytest.raises(UserError, match=message) as error:
        build(rule)
    assert "\n" not in str(error.value) and str(error.value).startswith("config.optimizer.params")


def test_masks_become_files_and_indices(tmp_path):
    """A mask of single scalars, as `largest_moves` computes it, is read back as it was written."""
    mask = masks.random_mask(jax.random.key(0), START, 40)
    np.savez(tmp_path / "mask.npz", **named_leaves(mask))
    read = masks.trainable(START, str(tmp_path / "mask.npz"))
    jax.tree.map(np.testing.assert_array_equal, read, mask)
    assert masks.count(read, START) == 40
    x = np.arange(24).reshape(2, 3, 4)
    for some in (x % 5 == 0, np.array([[[True]], [[False]]]), np.array([[True], [False], [True]]), np.arange(4) < 2):
        np.testing.assert_array_equal(x[masks.chosen(some, x.shape)].ravel(), x[np.broadcast_to(some, x.shape)])
    assert masks.chosen(True, x.shape) is ...


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_zeros_stay_zeros(name):
    """100 steps: zeros, their moments and all other scalars as under a mask; the state has the shapes of dense runs."""
    rule = (STACK, dict(sparse=0.5))
    section = dict(name=name, lr=LR, weight_decay=WD, clip_norm=1.0)
    tx, table, _ = optim.build(section | {"params": (rule, (".*", {}))}, START, 100)
    dense = optim.build(section, START, 100)[0]
    assert table[STACK].endswith(", 50 % zeros")
    begun = optim.zeroed({"params": (rule, (".*", {}))}, START)
    mask = np.asarray(masks.drawn(STACK, named_leaves(START)[STACK].shape, 0.5))
    assert 0.3 < mask.mean() < 0.7
    np.testing.assert_array_equal(named_leaves(begun)[STACK], np.where(mask, named_leaves(START)[STACK], 0))
    assert named_leaves(begun)[EMBEDDING] is named_leaves(START)[EMBEDDING]
    shapes = lambda tx: jax.tree.map(jnp.shape, tx.init(begun))
    assert shapes(tx) == shapes(dense)
    update = jax.jit(lambda g, state, p: tx.update(g, state, p))
    p, state = begun, tx.init(begun)
    for step in range(100):
        moves, state = update(GRADIENTS[step % STEPS], state, p)
        p = optax.apply_updates(p, moves)
    assert not np.any(np.asarray(named_leaves(p)[STACK])[~mask]) and np.all(np.asarray(named_leaves(p)[STACK])[mask])
    for path, leaf in named_leaves(state).items():
        if path.endswith(STACK) and leaf.shape == mask.shape and ("/mu/" in path or "/nu/" in path):
            assert not np.any(np.asarray(leaf)[~mask]) and np.any(np.asarray(leaf))
    moves, _ = update(GRADIENTS[0], tx.init(START), START)  # of a run that was dense: zeros after one step
    assert not np.any(np.asarray(named_leaves(optax.apply_updates(START, moves))[STACK])[~mask])


def test_zeros_are_a_mask_exactly():
    """What trains moves as under `only` with the same mask; no zeros is the dense run, bit for bit."""
    mask = np.asarray(masks.drawn(STACK, named_leaves(START)[STACK].shape, 0.5))
    begun = optim.zeroed({"params": ((STACK, dict(sparse=0.5)), (".*", {}))}, START)
    moves = []
    for options in (dict(sparse=0.5), dict(only=mask), dict(sparse=0.0), {}):
        tx = build((STACK, options))[0]
        moves.append(jax.jit(tx.update)(GRADIENTS[0], tx.init(begun), begun)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moves[0], moves[1])
    jax.tree.map(np.testing.assert_array_equal, moves[2], moves[3])
