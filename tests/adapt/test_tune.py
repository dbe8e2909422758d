"""Few-shot tuning: what trains and how much of it, small files that give the adapted model back, the command."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.support.few_shot import DEPTH, NAMES, D, clip_like, few_shot_task, moved
from vlm_jax import models
from vlm_jax.adapt.files import save_adapter
from vlm_jax.adapt.methods import METHODS
from vlm_jax.adapt.prompts.maple import Coupled
from vlm_jax.adapt.prompts.upt import Unified
from vlm_jax.adapt.recipe import Inserted, Masked
from vlm_jax.adapt.task import accuracy
from vlm_jax.adapt.tune import tune
from vlm_jax.data import ops, tokenizers
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.params.table import named_leaves

EVERYTHING = ((".*", True),)


def trained(pretrained, recipe, pictures, **changes):
    settings = dict(steps=3, batch_size=5, learning_rate=1e-2) | changes
    return tune(pretrained, recipe, *pictures, NAMES, **settings)


def count(recipe, base):
    modules = recipe.insertions(base.model, 0)
    model = insertion.inserted(base.model, *modules)
    given = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8), int)
    params = insertion.begin(jax.random.key(0), model, base.params, *given) if modules else base.params
    return sum(leaf.size for leaf in recipe.begin(jax.random.key(0), model, named_leaves(params)).values())


def test_counts(base):
    """The formulas of the papers."""
    of = lambda recipe: count(recipe, base)
    assert of(Coupled(length=2, depth=9)) == DEPTH * 2 * D + DEPTH * (D * D + D)
    assert of(Coupled(length=2, depth=2)) == 2 * 2 * D + 2 * (D * D + D)
    unify = 7 * D + 4 * (D * D + D) + 4 * D + 2 * D * 6 + 6 + D + D * D + D
    assert of(Unified(3, 4, hidden=6, heads=2)) == unify
    conditional = insertion.Context(length=3, image_width=D)
    assert of(Inserted((conditional,))) == 3 * D + D * 1 + 1 + 1 * D + D
    block = 4 * (D * D + D) + 2 * 2 * D + 2 * D * 24 + 24 + D
    after = 2 * (2 * D + D * D + D)  # the final norm and the head of both towers
    assert of(Masked("last_1")) == 2 * block + after + 1
    assert of(Masked(EVERYTHING)) == models.count(base.params)


RECIPES = {
    "lora": (Inserted((insertion.LowRank(rank=2),)), r"inserted_[ab]"),
    "maple": (Coupled(length=2, depth=2), "inserted_(context|prompt)"),
    "upt": (Unified(2, 2, heads=2), "inserted_(context|prompt)"),
    "last_1": (Masked("last_1"), "blocks|norm|head|scale"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_only_what_trains_moves_and_a_file_brings_it_back(base, pictures, name, tmp_path):
    recipe, pattern = RECIPES[name]
    adapted = trained(base, recipe, pictures)
    changed = moved(base, adapted)
    assert changed and all(re.search(pattern, leaf) for leaf in changed)
    save_adapter(tmp_path / "a.safetensors", base, adapted)
    again = vlm_jax.load_adapter(tmp_path / "a.safetensors", base)
    assert again.classes == NAMES and again.tokenize == adapted.tokenize
    for leaf, want in named_leaves(adapted.params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[leaf], want, err_msg=leaf)
    given = np.random.default_rng(1).integers(0, 255, (2, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(again.classify(given), adapted.classify(given, NAMES))
    small = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(base.params)) / 2
    assert (tmp_path / "a.safetensors").stat().st_size < small


def test_last_1_leaves_the_other_layers(base, pictures):
    adapted = trained(base, Masked("last_1"), pictures)
    for tower in ("image", "text"):
        old, new = (p.params[tower]["blocks"]["mlp"]["fc1"]["kernel"] for p in (base, adapted))
        assert np.array_equal(old[:-1], new[:-1]) and not np.array_equal(old[-1], new[-1])


@pytest.mark.parametrize("recipe", [Masked("head"), Inserted((insertion.Context(length=2),))], ids=["head", "coop"])
def test_it_learns(base, pictures, recipe):
    images, labels = pictures
    before = base.class_logits(images, NAMES).argmax(1)
    adapted = trained(base, recipe, pictures, steps=60, batch_size=12)
    assert np.mean(adapted.class_logits(images, NAMES).argmax(1) == labels) > max(np.mean(before == labels), 0.6)


@pytest.mark.parametrize("scan", [True, False])
def test_coupled_prompts_are_linear_in_the_texts(scan):
    """V_j = P_j K_j + b_j in the first J blocks, nothing in the others."""
    recipe = Coupled(length=2, depth=2)
    own = {"prompts": (2, 2, D), "kernel": (2, D, D), "bias": (2, D)}
    own = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(own.items())}
    base = clip_like(scan)
    model = insertion.inserted(base.model, *recipe.insertions(base.model, 0))
    given = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8), int)
    leaves = insertion.new_leaves(jax.eval_shape(model.init, jax.random.key(0), *given)["params"])
    placed = recipe.combine(own, {name: jnp.ones(leaf.shape) for name, leaf in leaves.items()})
    assert {name: leaf.shape for name, leaf in placed.items()} == {name: leaf.shape for name, leaf in leaves.items()}

    def row(tower, name, i):
        return placed[f"{tower}/blocks/{name}"][i] if scan else placed[f"{tower}/blocks_{i}/{name}"]

    for i in range(2):
        want = own["prompts"][i] @ own["kernel"][i] + own["bias"][i]
        np.testing.assert_allclose(row("image", "inserted_prompt", i), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(row("text", "inserted_context", 1), own["prompts"][1])
    np.testing.assert_array_equal(placed["text/token_embed/inserted_context"], own["prompts"][0])
    assert not np.any(row("image", "inserted_prompt", 2))


def test_prompts_of_the_first_blocks_go_on_through_the_others(base):
    """The rows of later blocks are of no account."""
    images, texts = jnp.ones((2, 8, 8, 3)), jnp.full((2, 8), 5)
    model = insertion.inserted(base.model, insertion.Prompt(length=2, depth=2))
    params = insertion.begin(jax.random.key(1), model, base.params, images, texts)
    run = jax.jit(lambda params: model.apply({"params": params}, images, None).image)
    before = run(params)
    rows = params["image"]["blocks"]["inserted_prompt"]
    change = lambda rows: (
        params | {"image": params["image"] | {"blocks": params["image"]["blocks"] | {"inserted_prompt": rows}}}
    )
    np.testing.assert_array_equal(run(change(rows.at[2].add(1))), before)
    assert not np.array_equal(run(change(rows.at[1].add(1))), before)


def test_a_meta_net_moves_the_context_by_the_picture(base, pictures):
    """Each picture's texts have contexts v + net(x), in numpy (arXiv:2203.05557, equation 3)."""
    images = pictures[0][:3]
    adapted = trained(base, Inserted((insertion.Context(length=2, image_width=D),)), pictures)
    assert adapted.compares_pairs and not base.compares_pairs
    x = adapted.embed_image_batch(images)
    own = adapted.params["text"]["token_embed"]
    hidden = np.maximum(x @ own["inserted_meta_down"] + own["inserted_meta_down_bias"], 0)
    moves = hidden @ own["inserted_meta_up"] + own["inserted_meta_up_bias"]
    want = []
    for i in range(3):
        params = jax.tree.map(lambda leaf: leaf, adapted.params)
        params["text"]["token_embed"]["inserted_context"] = own["inserted_context"] + moves[i]
        plain = insertion.inserted(base.model, insertion.Context(length=2, at=0))
        texts = dataclasses.replace(adapted, model=plain, params=params).embed_texts(NAMES)
        want.append(np.exp(float(params["logit_scale"])) * texts @ x[i])
    np.testing.assert_allclose(adapted.class_logits(images, NAMES), want, rtol=1e-4, atol=1e-4)
    assert np.abs(moves).max() > 1e-3
    with pytest.raises(UserError, match="texts of this model depend on the picture"):
        adapted.embed_texts(NAMES)


def test_room():
    """Where the context goes; padding falls off, then what is before the last token."""
    tokenizer = tokenizers.build("emoji")
    make = lambda n, at: ops.parse(f"room({n}, {at}) | keep('token_ids')", tokenizer)  # the tokenizer of now
    run = lambda ids, n, at: make(n, at)({"token_ids": np.array(ids, np.int32)}, None)["token_ids"].tolist()
    filler = run([0, 0], 1, 0)[0]
    assert filler not in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    assert run([7, 8, 9, 0, 0, 0], 2, 1) == [7, filler, filler, 8, 9, 0]
    assert run([7, 8, 9, 10, 11, 12], 2, 0) == [filler, filler, 7, 8, 9, 12]
    tokenizer = SimpleNamespace(pad_id=1, eos_id=1, bos_id=0)  # SigLIP's: the first padding ends the text
    assert run([7, 8, 9, 10, 1, 1], 2, 0) == [2, 2, 7, 8, 9, 1]
    assert run([7, 8, 9, 10, 11, 1], 2, 1) == [7, 2, 2, 8, 9, 1]


@pytest.mark.parametrize("method", ["zero_shot", "gda", "tip_adapter_f", "tip_x", "prolip"])
def test_heads_come_back_from_their_file(base, pictures, method, tmp_path):
    few, validation, task = few_shot_task(base, pictures)
    adapted = METHODS[method](base, few, validation, task)
    save_adapter(tmp_path / "a.safetensors", base, adapted)
    again = vlm_jax.load_adapter(tmp_path / "a.safetensors", base)
    given = np.random.default_rng(1).integers(0, 255, (4, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(again.classify(given), adapted.classify(given))
    assert (again.head is None) == (method in ("zero_shot", "prolip"))
    np.testing.assert_allclose(again.classify(given).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("method", ["bias", "adaptformer", "prefix", "coop", "cocoop", "vpt_deep"])
def test_methods_that_train(base, pictures, method, tmp_path):
    """Each trains, is saved, and is as accurate as its logits say, from embeddings or from pictures."""
    few, validation, task = few_shot_task(base, pictures)
    adapted = METHODS[method](base, few, validation, task, steps=2, batch_size=4, learning_rate=1e-2)
    assert moved(base, adapted)
    logits = adapted.class_logits(few.images, NAMES)
    assert accuracy(base, adapted, few, NAMES) == np.mean(logits.argmax(1) == few.labels)
    save_adapter(tmp_path / "a.safetensors", base, adapted)
    again = vlm_jax.load_adapter(tmp_path / "a.safetensors", base)
    np.testing.assert_array_equal(again.class_logits(few.images, NAMES), logits)


def test_unified_prompts_are_a_transformers():
    """U' = SA(U) + LN(U), then FFN(LN(U')) + LN(U'), in numpy."""
    recipe = Unified(2, 3, hidden=6, heads=2)
    own = jax.jit(lambda rng: recipe.begin(rng, clip_like(scan=True).model, {}))(jax.random.key(0))
    own = {name: leaf + 0.1 * jax.random.normal(jax.random.key(len(name)), leaf.shape) for name, leaf in own.items()}
    leaves = {"text/token_embed/inserted_context": jnp.zeros((2, D)), "image/inserted_prompt": jnp.zeros((3, D))}
    placed = recipe.combine(own, leaves)
    own = jax.tree.map(np.asarray, own)

    def norm(x, name):
        centred = x - x.mean(1, keepdims=True)
        return (
            centred / np.sqrt(np.mean(centred**2, 1, keepdims=True) + 1e-6) * own[f"{name}/scale"] + own[f"{name}/bias"]
        )

    x = own["prompts"]
    q, k, v = (
        np.einsum("nd,dhe->hne", x, own[f"attn/{n}/kernel"]) + own[f"attn/{n}/bias"][:, None]
        for n in ("query", "key", "value")
    )
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(D / 2))
    heads = weights / weights.sum(2, keepdims=True) @ v
    x = np.einsum("hne,hed->nd", heads, own["attn/out/kernel"]) + own["attn/out/bias"] + norm(x, "norm1")
    x = norm(x, "norm2")
    hidden = np.asarray(jax.nn.gelu(x @ own["fc1/kernel"] + own["fc1/bias"]))
    x = hidden @ own["fc2/kernel"] + own["fc2/bias"] + x
    np.testing.assert_allclose(placed["text/token_embed/inserted_context"], x[:2], rtol=1e-4, atol=1e-5)
    image = x[2:] @ own["image/kernel"] + own["image/bias"]
    np.testing.assert_allclose(placed["image/inserted_prompt"], image, rtol=1e-4, atol=1e-5)


def test_prolip_trains_the_projection_alone(base, pictures):
    adapted = METHODS["prolip"](base, *few_shot_task(base, pictures))
    assert moved(base, adapted) == {"image/head/kernel"}


def test_what_is_wrong_is_named(base, pictures, tmp_path):
    adapted = trained(base, Inserted((insertion.LowRank(rank=2),)), pictures)
    save_adapter(tmp_path / "a.safetensors", base, adapted)
    other = dataclasses.replace(base, params=jax.tree.map(lambda leaf: leaf + 1, base.params))
    with pytest.raises(UserError, match="is of another model: load the one that it was made from"):
        vlm_jax.load_adapter(tmp_path / "a.safetensors", other)
    from vlm_jax.zoo.readers.safetensors_files import write_safetensors

    write_safetensors(tmp_path / "b.safetensors", {"x": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="is no adapter"):
        vlm_jax.load_adapter(tmp_path / "b.safetensors", base)
    with pytest.raises(UserError, match="classify needs labels: this model was not adapted"):
        base.classify([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(UserError, match="2 templates, but what trains is in the text tower; give one"):
        trained(base, Inserted((insertion.Context(length=2),)), pictures, templates=("{}", "a {}"))
    with pytest.raises(UserError, match="an option of the method has no key `ranks`; did you mean `rank`"):
        METHODS["lora"](base, *few_shot_task(base, pictures), ranks=2)
    with pytest.raises(UserError, match=r"the loss is nan after 3 steps; a smaller learning_rate"):
        trained(base, Masked(EVERYTHING), pictures, learning_rate=1e30)
    conv = models.build(dict(image=dict(type="efficientnet", variant="lite0"), text=None))
    with pytest.raises(UserError, match="put prompts into two transformers; this model's text tower is none"):
        Coupled().insertions(conv, 0)
