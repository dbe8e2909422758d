"""Tuning of chosen scalars: what is chosen and what stays, by hand; and what is full tuning or LoRA exactly."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.support.compare import bits
from tests.support.few_shot import GIVEN, NAMES, tuned
from vlm_jax.adapt.modules.lora import lora
from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.tune import Look, gradients, with_room
from vlm_jax.adapt.tuning import sparse
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.params import importance, layers, masks
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo.adapters import composed, merged, save_adapter


@pytest.fixture(scope="module")
def whole(base, pictures) -> Pretrained:
    """The model after full tuning."""
    return tuned(base, full(base.model), pictures)


@pytest.fixture(scope="module")
def ticket(base, whole):
    """LT-SFT after its look."""
    recipe = sparse.lt_sft(base.model, share=0.02)
    return recipe.first(recipe, Look(base, lambda recipe: whole, None))


@pytest.fixture(scope="module")
def tickets(base, ticket, pictures) -> Pretrained:
    return tuned(base, ticket, pictures)


def flat(params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def test_lt_sft_trains_the_largest_moves_alone(base, whole, ticket, tickets):
    """From the base model again; all other scalars keep their bits."""
    start, end, moved = flat(base.params), flat(tickets.params), flat(whole.params)
    k = round(0.02 * start.size)
    far = np.argsort(-np.abs(moved - start), kind="stable")[:k]
    own = ticket.begin(None, None, named_leaves(base.params))
    np.testing.assert_array_equal(flat(own), start[np.sort(far)])
    changed = np.flatnonzero(start.view(np.uint32) != end.view(np.uint32))
    assert set(changed) <= set(far) and len(changed) > 0.9 * k


def test_limits_are_full_tuning(base, whole):
    """All scalars, or a budget of all of them, train as they are; all of a tuned model is that model, bit for bit."""
    leaves, ends = named_leaves(base.params), named_leaves(whole.params)
    assert sparse.lt_sft(base.model, share=1.0).first is None
    assert sparse.lt_sft(base.model, share=1.0).recipe == full(base.model)
    every = sparse.spt(base.model, budget=1.0, rank=1000, where=".*", passes=1)
    one = lambda recipe, steps: [recipe.begin(None, None, leaves)] * steps
    recipe = every.first(every, Look(base, None, one))
    own = recipe.begin(jax.random.key(0), base.model, leaves)
    assert own.keys() == leaves.keys() and all(own[name] is leaves[name] for name in own)
    assert recipe.insertions(base.model, 0) == () and recipe.combine(ends, leaves) == ends
    graft = sparse.Graft(ends, {name: np.ones(leaf.shape, bool) for name, leaf in leaves.items()}, 10.0)
    assert bits(untrained(base, graft, ends).params) == bits(whole.params)


def untrained(base, graft, ends):
    """The graft of the mask at the beginning."""
    leaves = named_leaves(base.params)
    mixed = sparse.tree(graft.combine(graft.begin(None, None, leaves), leaves))
    return sparse.grafted(base, dataclasses.replace(base, params=mixed), ends)


def test_adapters_are_small_and_add_up(base, pictures, tickets, tmp_path):
    """Places and values of the trained scalars alone; base + (one - base) + (two - base) in float64."""
    rng = np.random.default_rng(0)
    move = lambda x: jnp.where(rng.random(x.shape) < 0.01, x + 0.1, x)
    other = dataclasses.replace(tickets, params=jax.tree.map(move, base.params))
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, model in zip(files, (tickets, other), strict=True):
        save_adapter(path, base, model)
    k = round(0.02 * flat(base.params).size)
    header = int.from_bytes(files[0].read_bytes()[:8], "little")
    assert files[0].stat().st_size - header <= 8 * k + 64
    start, one, two = (np.float64(flat(model.params)) for model in (base, tickets, other))
    found = composed(base, files)
    np.testing.assert_allclose(flat(found.params), one + two - start, rtol=0, atol=1e-6)
    np.testing.assert_allclose(flat(composed(base, files, [1, -2]).params), one - 2 * (two - start), rtol=0, atol=1e-6)
    assert found.classes == NAMES
    again = vlm_jax.load_adapter(files, base)
    assert bits(again.params) == bits(found.params)
    low_rank = with_room(base, (LowRank(),))
    params = insertion.begin(jax.random.key(0), low_rank.model, base.params, *GIVEN)
    save_adapter(tmp_path / "lora.safetensors", base, dataclasses.replace(low_rank, params=params))
    with pytest.raises(UserError, match=r"lora.safetensors has inserted modules or a head"):
        composed(base, [files[0], tmp_path / "lora.safetensors"])
    with pytest.raises(UserError, match="no adapters to add"):
        composed(base, [])


def test_fisher_scores_picture_by_picture(base, pictures):
    """Gradients of each picture's cross-entropy, squared in float64, block by block; the best blocks alone train."""
    images, labels = pictures
    ids = jnp.asarray(base._token_ids(list(NAMES)))

    @jax.jit
    def gradient(params, image, label):
        def loss(params):
            found = base.model.apply({"params": params}, image[None], ids)
            logits = jnp.exp(params["logit_scale"]) * found.text @ found.image[0]
            return jax.nn.logsumexp(logits) - logits[label]

        return jax.grad(loss)(params)

    squares = [
        jax.tree.map(lambda g: np.float64(g) ** 2, gradient(base.params, *one)) for one in zip(*pictures, strict=True)
    ]
    want = layers.block_totals(jax.tree.map(lambda *parts: sum(parts) / len(labels), *squares))
    found = gradients(base, full(base.model), images, labels, NAMES, steps=len(labels), batch_size=1)
    got = layers.block_totals(sparse.tree(importance.scores("fisher", found)))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
    look = Look(base, None, lambda recipe, **changes: gradients(base, recipe, images, labels, NAMES, **changes))
    recipe = sparse.fim_surgical(base.model, blocks=2, passes=len(labels))
    mask = masks.of_blocks(base.params, sorted(want, key=want.get)[-2:])
    chosen = masks.trainable(base.params, recipe.first(recipe, look).recipe.trainable)
    jax.tree.map(np.testing.assert_array_equal, chosen, mask)
    every = sparse.fim_surgical(base.model, blocks=6, passes=len(labels))
    blocks = masks.trainable(base.params, ((".*/blocks/.*", True), (".*", False)))
    chosen = masks.trainable(base.params, every.first(every, look).recipe.trainable)
    jax.tree.map(np.testing.assert_array_equal, chosen, blocks)
    more = sparse.fim_surgical(base.model, blocks=7, passes=len(labels))
    with pytest.raises(UserError, match="blocks of fim_surgical is 7; `the model` has 6 blocks"):
        more.first(more, look)


def test_spt_keeps_its_budget(base, pictures):
    """Sensitive matrices have low-rank updates, other scalars are single; no more than the budget moves."""
    recipe = sparse.spt(base.model, budget=0.03, rank=1, passes=2)
    after = tuned(base, recipe, pictures)
    before, leaves = named_leaves(base.params), named_leaves(after.params)
    single = sum(int(np.sum(leaves[name] != leaf)) for name, leaf in before.items())
    low_rank = {name: leaf for name, leaf in leaves.items() if name not in before}
    trained = sum(int(np.sum(leaf != 0)) for leaf in low_rank.values())
    assert single and trained and single + trained <= 0.03 * flat(base.params).size
    for name, leaf in low_rank.items():
        if name.endswith("inserted_a"):  # the layers of a stack without an update have none
            on = np.any(leaf, axis=(1, 2))
            np.testing.assert_array_equal(on, np.any(low_rank[name[:-1] + "b"], axis=(1, 2)))
            kernel = name.replace("inserted_a", "kernel")
            assert not np.any((leaves[kernel] != before[kernel])[on])
    folded = merged(after)
    given = np.random.default_rng(1).integers(0, 255, (4, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(folded.classify(given), after.classify(given), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"budget of spt is 0.0; expected a share above 0, up to 1"):
        sparse.spt(base.model, budget=0.0)


def test_a_graft_by_hand(base, pictures, whole):
    """m = b + (1 - 2 b) sigmoid(S - bias) in float64; without moves of S, the graft of the largest moves, exactly."""
    rng, start = np.random.default_rng(0), {"w": np.float64([[1, 2, 3], [4, 5, 6]])}
    end, begun = {"w": start["w"] + rng.normal(size=(2, 3))}, {"w": rng.random((2, 3)) < 0.5}
    own = {"w": 3 * rng.normal(size=(2, 3))}
    with jax.enable_x64():
        found = sparse.Graft(end, begun, 2.0).combine(own, start)["w"]
    s, b = 1 / (1 + np.exp(2.0 - own["w"])), begun["w"].astype(float)
    m = b + (1 - 2 * b) * s
    np.testing.assert_allclose(found, start["w"] + m * (end["w"] - start["w"]), rtol=1e-12)
    look = Look(base, lambda recipe: whole, None)
    recipe = sparse.skill_graft(base.model, share=0.01, penalty=3.0, bias=1.0)
    recipe = recipe.first(recipe, look)
    chosen = named_leaves(masks.largest_moves(base.params, whole.params, round(0.01 * flat(base.params).size)))
    before, ends = named_leaves(base.params), named_leaves(whole.params)
    for name, leaf in named_leaves(untrained(base, recipe.recipe, ends).params).items():
        np.testing.assert_array_equal(leaf, np.where(chosen[name], ends[name], before[name]))
    size = sum(int(mask.sum()) for mask in chosen.values())
    own = recipe.recipe.begin(None, None, before)
    outputs = SimpleNamespace(params=own)
    value = recipe.terms[0].loss(outputs, {}, {}, None)[0]
    soft, every = 1 / (1 + np.exp(1.0)), sum(leaf.size for leaf in own.values())
    np.testing.assert_allclose(value, ((1 - soft) * size + soft * (every - size)) / size, rtol=1e-5)
    after = named_leaves(tuned(base, recipe, pictures).params)
    grafted = {name: leaf != before[name] for name, leaf in after.items()}
    assert all(np.array_equal(leaf[grafted[name]], ends[name][grafted[name]]) for name, leaf in after.items())
    assert 0 < sum(int(m.sum()) for m in grafted.values()) != size


def test_the_sparse_part_of_a_sum():
    """Of low rank + few large scalars, these; of a stack, layer by layer."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 24))
    places = rng.permutation(kernel.size)[:5]
    kernel.ravel()[places] += 8 * rng.choice([-1, 1], 5)
    found = sparse.sparse_part(kernel, 2, 5)
    assert set(np.flatnonzero(found)) == set(places)
    stack = sparse.sparse_part(np.stack([-kernel[::-1], kernel]), 2, 5)
    np.testing.assert_array_equal(stack, [found[::-1], found])
    with pytest.raises(UserError, match="dsee takes 721 scalars of a matrix of 720"):
        sparse.sparse_part(kernel, 1, 721)


def test_dsee(base, pictures):
    """Zeros are the smallest |W + a b| of all kernels, exactly, after 100 steps; s keeps to its places; both fold."""
    first = []
    tune = lambda recipe: first.append(tuned(base, recipe, pictures, steps=20)) or first[-1]
    recipe = sparse.dsee(base.model, rank=2, scalars=7, pruned=0.5)
    after = tuned(base, recipe.first(recipe, Look(base, tune, None)), pictures, steps=100)
    leaves, before = named_leaves(after.params), named_leaves(base.params)
    update = named_leaves(first[0].params)
    sizes, zeros = [], []
    for name, kernel in before.items():
        if re.fullmatch(r".*blocks.*/kernel", name):
            place, whole = name.removesuffix("kernel"), np.float64(kernel)
            if f"{place}inserted_a" in update:
                whole = whole + np.float64(update[f"{place}inserted_a"]) @ np.float64(update[f"{place}inserted_b"])
            sizes.append(np.abs(whole).ravel())
            zeros.append(np.ravel(leaves[name] == 0))
            kept = np.asarray(leaves[name] != 0)
            np.testing.assert_array_equal(leaves[name][kept], kernel[kept])
        elif "inserted" not in name:
            np.testing.assert_array_equal(leaves[name], kernel)
    sizes, zeros = np.concatenate(sizes), np.concatenate(zeros)
    assert zeros.sum() == sizes.size - round(0.5 * sizes.size)
    np.testing.assert_array_equal(zeros, np.argsort(np.argsort(sizes, kind="stable")) < zeros.sum())
    for name, leaf in leaves.items():
        if name.endswith("inserted_s"):
            support = sparse.sparse_part(np.asarray(before[name.replace("inserted_s", "kernel")]), 2, 7)
            assert np.any(leaf) and not np.any(np.asarray(leaf)[~support])
    given = np.random.default_rng(1).integers(0, 255, (4, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(merged(after).classify(given), after.classify(given), rtol=0, atol=1e-6)


def test_dsee_without_scalars_and_zeros_is_lora(base, pictures):
    found = tuned(base, sparse.dsee(base.model, rank=3, scalars=0, pruned=0.0), pictures)
    assert bits(found.params) == bits(tuned(base, lora(base.model, rank=3), pictures).params)
    with pytest.raises(UserError, match=r"dsee has pruned 1.0 and scalars 64"):
        sparse.dsee(base.model, pruned=1.0)
    with pytest.raises(UserError, match="which matches no parameter"):
        tuned(base, sparse.dsee(base.model, pruned_where="none"), pictures, steps=1)
