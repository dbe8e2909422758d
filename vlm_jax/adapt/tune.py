"""Few-shot tuning: trains a recipe's parameters on labelled pictures, by cross-entropy over class names.

    clip = vlm_jax.load("runs/clip")
    adapted = tune(clip, Inserted(LowRank(rank=4)), images, labels, names, learning_rate=1e-3)
    adapted.classify(pictures)

A recipe states the parameters that train, their effect on the model and further losses, see `vlm_jax.adapt.recipe`. The
step is that of `vlm_jax.train`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from vlm_jax import objectives
from vlm_jax.adapt import tables
from vlm_jax.adapt.heads.checks import check_labels
from vlm_jax.adapt.heads.training import shuffled
from vlm_jax.adapt.recipe import Adapted, Recipe, sees_pool, tree
from vlm_jax.adapt.task import changes_embeddings, changes_tower
from vlm_jax.data import ops
from vlm_jax.errors import DivergedError, UserError
from vlm_jax.models import insertion
from vlm_jax.models.generate import log_likelihoods
from vlm_jax.models.insertions import after_towers
from vlm_jax.models.insertions.prompts import Context
from vlm_jax.objectives import Objective, Teacher, Term
from vlm_jax.params import averages, optim
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained, class_embeddings, inputs
from vlm_jax.pretrained.linear import Linear
from vlm_jax.run.program import TrainState, train_step


def tune(
    pretrained: Pretrained,
    recipe: Recipe,
    images: Any,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    augment: str | None = None,
    pool: Any = None,
    beside: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    show: bool = False,
    begin: Mapping[str, jax.Array] | None = None,
    after: Callable[[dict[str, jax.Array]], None] | None = None,
) -> Pretrained:
    """Trains a recipe's parameters and returns the adapted model, which names pictures by `names`.

    AdamW under a cosine schedule to 0 unless the recipe says otherwise, on the mean cross-entropy of softmax(logits)
    over all names (CoOp, arXiv:2109.01134, equation 3), whatever loss the model was trained with. Logits are those of
    `Pretrained.class_logits`: scale * cosine, and of a captioner the log-likelihood of the name. An unchanged tower
    embeds its inputs once.

    Args:
      pretrained: a two-tower model or a captioner.
      recipe: see `Recipe` and `Extended`.
      images: preprocessed, [N, H, W, 3], or a list as for `Pretrained.embed_images`.
      labels: int [N], in range(len(names)).
      names: of the classes.
      templates: prompts; exactly one if the recipe changes the text tower, and for a captioner.
      steps, batch_size, learning_rate, weight_decay: of the optimizer.
      augment: op string in the place of the model's preprocessing, drawn anew at each step, such as "decode |
        random_resized_crop(32) | normalize"; `images` are then a list.
      pool: pictures without labels, as `images`, for recipes whose terms use them; a batch has `batch_size` of them.
      beside: further entries of the rows of "pool", one for each picture, such as pseudo-labels.
      seed: of the initial parameters, of the order of examples and of all draws.
      show: shows a progress bar.
      begin: the recipe's own parameters, to go on with; defaults to new ones.
      after: is called with the recipe's own parameters after each step.

    Raises:
      UserError: the recipe and the model do not fit, or the loss is not finite.
    """
    if steps < 1:
        raise UserError(f"steps of tuning is {steps}; expected 1 or more")
    task = dict(images=images, labels=labels, names=names)
    task |= dict(templates=templates, steps=steps, batch_size=batch_size, augment=augment, pool=pool, seed=seed)
    task |= dict(beside=beside)
    if first := getattr(recipe, "first", None):
        rates = dict(learning_rate=learning_rate, weight_decay=weight_decay)
        recipe = first(
            recipe, Look(pretrained, partial(tune, pretrained, **task, **rates), partial(gradients, pretrained, **task))
        )
    ready = _ready(pretrained, recipe, **task, weight_decay=weight_decay, begin=begin)
    return _train(ready, pretrained, names, templates, steps, learning_rate, seed, show, after)


class Look(NamedTuple):
    """What a recipe sees of a task before it trains, see `Extended.first`.

    Attributes:
      base: the model.
      tune: `tune(recipe, **changes) -> Pretrained`, on the task's pictures with the options of this tuning.
      gradients: `gradients(recipe, **changes)`, likewise.
    """

    base: Pretrained
    tune: Callable[..., Pretrained]
    gradients: Callable[..., Iterator[dict[str, jax.Array]]]


def gradients(
    pretrained: Pretrained,
    recipe: Recipe,
    images: Any,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    steps: int = 8,
    batch_size: int = 32,
    augment: str | None = None,
    pool: Any = None,
    beside: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Iterator[dict[str, jax.Array]]:
    """Yields the gradients of the loss by the recipe's own parameters, as they begin, of `steps` batches of tuning.

    Arguments as for `tune`.
    """
    task = dict(templates=templates, steps=steps, batch_size=batch_size, augment=augment, pool=pool, seed=seed)
    task |= dict(beside=beside)
    ready = _ready(pretrained, recipe, images, labels, names, **task, weight_decay=0.0, begin=None)
    for number, rows in enumerate(ready.order[:steps]):
        yield _gradients(ready.tuning, ready.state, ready.leaves, ready.frozen, ready.batch_of(number, rows), seed)


class _Ready(NamedTuple):
    """What the steps of tuning need."""

    tuning: "_Tuning"
    state: TrainState
    leaves: dict[str, jax.Array]
    frozen: dict[str, Any]
    batch_of: Callable[[int, np.ndarray], dict[str, Any]]
    order: np.ndarray
    adapted: Pretrained
    epoch: int


def _ready(
    pretrained, recipe, images, labels, names, *, templates, steps, batch_size, augment, pool, beside, seed,
    weight_decay, begin,
) -> _Ready:  # fmt: skip
    for name, given in (("images", images), ("pool", pool)):
        if augment is not None and given is not None and not isinstance(given, list):
            raise UserError(f"augment reads pictures before preprocessing; give `{name}` as a list of pictures")
    labels, beside = check_labels(labels, len(images), len(names)), beside or {}
    for name, values in beside.items():
        if len(values) != (0 if pool is None else len(pool)):
            raise UserError(f"`{name}` beside the pool has {len(values)} rows; expected one for each of its pictures")
    if of_task := getattr(recipe, "of_task", None):
        recipe = of_task(pretrained, images, labels, names)
    place = _context_place(pretrained)
    modules = recipe.insertions(pretrained.model, place)
    adapted = with_room(pretrained, modules)
    prompts = [template.replace("{}", name) for template in templates[:1] for name in names]
    tokenized = lambda model: (model._target_ids if model.is_captioner else model._token_ids)(prompts)
    token_ids = tokenized(adapted)
    if len(np.unique(token_ids, axis=0)) < len(np.unique(tokenized(pretrained), axis=0)):
        raise UserError("with the context, some names are cut to the same tokens; a shorter context, or longer texts?")
    pictures = _Pictures(pretrained, images, augment, seed)
    rng, order = jax.random.key(seed), shuffled(len(labels), batch_size, -(-steps * batch_size // len(labels)), seed)
    params = pretrained.params
    if modules:
        params = insertion.begin(rng, adapted.model, params, jnp.asarray(pictures.first), jnp.asarray(token_ids[:1]))
    leaves = named_leaves(params)
    own = recipe.begin(jax.random.fold_in(rng, 1), adapted.model, leaves)
    if begin is not None:
        shapes = lambda tree: {name: jnp.shape(leaf) for name, leaf in tree.items()}
        if shapes(begin) != shapes(own):
            raise UserError("`begin` has not the names and shapes of the recipe's own parameters")
        own = dict(begin)
    changed = recipe.combine(own, leaves).keys()
    if adapted.compares_pairs and getattr(recipe, "noise", None):
        raise UserError("the recipe's noise needs embeddings of pictures and names; this model compares pair by pair")
    if not changed:
        raise UserError(f"{recipe} trains nothing of this model; compare the recipe with the model's parameter names")
    changes = lambda tower: changes_tower(changed, tower)
    classes = {"token_ids": jnp.asarray(token_ids)}
    if len(templates) != 1 and (pretrained.is_captioner or changes("text")):
        raise UserError(f"{len(templates)} templates, but the recipe changes the text tower; give one")
    if not pretrained.is_captioner:
        zero_shot = jnp.asarray(class_embeddings(pretrained.embed_texts, names, templates))
        if not changes("text"):  # what changes embeddings after the towers reads them as the text's input
            classes = {"token_ids" if changes_embeddings(changed) else "text_embedding": zero_shot}
        classes |= {"zero_shot": zero_shot}
    known = tables.Known(pretrained, images, labels, names, classes)
    if callable(getattr(recipe, "terms", None)):
        recipe = dataclasses.replace(recipe, terms=recipe.terms(known))
    if sees_pool(recipe) and pool is None:
        raise UserError("the recipe has a term on pictures without labels; give `pool` (few_shot: pool=64)")
    classes |= {name: jnp.asarray(make(known)) for name, make in getattr(recipe, "tables", {}).items()}
    others = None if pool is None else _Pictures(pretrained, pool, augment, seed + 1)
    if augment is None and not changes("image") and not pretrained.is_captioner:
        pictures.embed()
        if others:
            others.embed()

    def batch_of(step, rows):
        batch = {"image": pictures.of(step, rows), "label": np.where(rows < 0, -1, labels[rows])}
        if others is None:
            return {"batch": batch, "classes": classes}
        drawn = np.random.default_rng((seed, step)).choice(others.size, batch_size, replace=others.size < batch_size)
        more = {name: values[drawn] for name, values in beside.items()}
        return {"batch": batch, "classes": classes, "pool": {"image": others.of(step, drawn), **more}}

    ids, pairwise = pretrained.tokenizer, adapted.compares_pairs
    tuning = _Tuning(adapted.model, pretrained.model, recipe, steps, weight_decay, ids.pad_id, pairwise, ids.eos_id)
    frozen = {"base": pretrained.params}
    state = _begin(tuning, own, leaves, frozen, batch_of(0, order[0]))
    return _Ready(tuning, state, leaves, frozen, batch_of, order, adapted, -(-len(labels) // order.shape[1]))


def _train(ready, pretrained, names, templates, steps, learning_rate, seed, show, after) -> Pretrained:
    tuning, state, leaves, frozen, batch_of, order, adapted, epoch = ready
    recipe, loss = tuning.recipe, 0.0
    head = getattr(recipe, "head", None)
    if head and "head" not in state.params.get(objectives.OWN, {}).get(head, {}):
        raise UserError(f"the recipe's head is `{head}`; no term of that name has a part `head`, see `classified`")
    trained = averages.Running(getattr(recipe, "average", None))
    for number, rows in enumerate(tqdm(order[:steps], desc="tune", unit="step", disable=not show)):
        state, loss = _step(tuning, state, leaves, frozen, batch_of(number, rows), learning_rate, seed)
        if after is not None:
            after(objectives.of_model(state.params))
        if (number + 1) % epoch == 0 or number + 1 == steps:
            trained.add(state.params, (number + 1) / steps)
    if not np.isfinite(loss):
        raise DivergedError(
            f"{type(recipe).__name__}: the loss is {loss} after {steps} steps; a smaller learning_rate?"
        )
    params = tree(leaves | recipe.combine(objectives.of_model(trained.params), leaves))
    if head:
        dense = trained.params[objectives.OWN][head]["head"]
        head = Linear(*(np.asarray(dense[name], np.float64) for name in ("kernel", "bias")))
    tuned = dataclasses.replace(adapted, params=params, classes=tuple(names), templates=tuple(templates), head=head)
    finish = getattr(recipe, "finish", None)
    return finish(pretrained, tuned) if finish else tuned


class _Pictures:
    """Pictures of a batch: preprocessed once, embedded once, or augmented at each step."""

    def __init__(self, pretrained: Pretrained, images: Any, augment: str | None, seed: int):
        self._pretrained, self._seed = pretrained, seed
        self._ops = None if augment is None else ops.parse(f"{augment} | keep('image')", pretrained.tokenizer)
        if augment:
            images = inputs.pictures(images)
        self._images = pretrained._pictures(images) if isinstance(images, list) and not augment else images
        self.size = len(images)

    @property
    def first(self) -> np.ndarray:
        """The first picture, [1, H, W, 3]."""
        return self.of(0, np.zeros(1, int))

    def embed(self) -> None:
        """Embeds all pictures; batches then have embeddings."""
        self._images = self._pretrained.embed_image_batch(self._images)

    def of(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Returns the pictures of some rows at a step."""
        if self._ops is None:
            return self._images[rows]
        draw = lambda row: self._ops(
            {"image": self._images[row]}, np.random.default_rng((self._seed, step, int(row) % self.size))
        )
        return np.stack([draw(row)["image"] for row in rows])


class _Tuning(NamedTuple):
    """What a compiled step depends on, besides arrays."""

    model: nn.Module
    base: nn.Module
    recipe: Recipe
    steps: int
    weight_decay: float
    pad_id: int
    pairwise: bool
    eos_id: int | None = None

    def objective(self, classes: Mapping[str, Any]) -> Objective:
        """Returns the loss of the classes and the recipe's own terms."""
        names = (self._classes(classes),) if getattr(self.recipe, "names_classes", True) else ()
        teachers = {"base": Teacher(spec="the base model", model=self.base), **getattr(self.recipe, "teachers", {})}
        terms = (*names, *getattr(self.recipe, "terms", ()))
        return Objective(terms, teachers=teachers, combine=getattr(self.recipe, "gradients", None))

    def optimizer(self, params: Any, learning_rate: Any) -> tuple[Any, Any]:
        """Returns (transform, schedule); the learning rate may be traced."""
        section = {"name": "adamw", "schedule": {"name": "cosine"}, "weight_decay": self.weight_decay}
        section |= {"params": ((".*", {"wd": 1.0}),), **getattr(self.recipe, "optimizer", {}), "lr": learning_rate}
        tx, _, schedule = optim.build(section, params, total_steps=self.steps)
        return tx, schedule

    def _classes(self, classes: Mapping[str, Any]) -> Term:
        """Returns the cross-entropy of the labels over the classes."""

        def cross_entropy(logits, labels):
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses, where=labels >= 0), {}

        def of_embeddings(outputs, features, rows, ctx):
            cosines = jnp.matmul(features["batch"], features["classes"].T, precision="highest")
            return cross_entropy(outputs["scale"] * cosines, rows["batch"]["label"])

        def pair_by_pair(outputs, ctx):
            params, given = outputs.model.effective(outputs.params), (outputs["image"], classes["token_ids"])
            if "embed" in self.model.can:
                return after_towers.class_logits(self.model, params, *given)
            return log_likelihoods(self.model, params, *given, pad_id=self.pad_id, eos_id=self.eos_id)

        if self.pairwise:
            return Term("classes", pair_by_pair, lambda o, features, rows, ctx: cross_entropy(features, rows["label"]))
        embeddings = {"batch": "image_embedding", "classes": "text_embedding"}
        features = {name: lambda outputs, ctx, key=key: outputs[key] for name, key in embeddings.items()}
        return Term("classes", features, of_embeddings)


def _begin(tuning, own, leaves, frozen, batch):
    params, memory = own, None
    if getattr(tuning.recipe, "terms", ()):
        params, memory = _make(tuning, own, leaves, frozen, batch)
    return TrainState(jnp.zeros((), jnp.int32), params, tuning.optimizer(params, 1.0)[0].init(params), None, memory)


@partial(jax.jit, static_argnums=0)
def _make(tuning, own, leaves, frozen, batch):
    view = Adapted(tuning.model, tuning.recipe, leaves)
    return objectives.make(tuning.objective(batch["classes"]), view, own, batch, jax.random.key(0), frozen)


@partial(jax.jit, static_argnums=0)
def _step(tuning, state, leaves, frozen, batch, learning_rate, seed):
    view = Adapted(tuning.model, tuning.recipe, leaves)
    tx, schedule = tuning.optimizer(state.params, learning_rate)
    state, metrics, _ = train_step(
        state, batch, frozen, objective=tuning.objective(batch["classes"]), model=view, tx=tx, schedule=schedule,
        reach=dict.fromkeys(named_leaves(state.params)), trainable=None, accumulate=1, ema=None, seed=seed,
    )  # fmt: skip
    return state, metrics["loss"]


@partial(jax.jit, static_argnums=0)
def _gradients(tuning, state, leaves, frozen, batch, seed):
    view = Adapted(tuning.model, tuning.recipe, leaves)
    return objectives.value_and_grad(
        tuning.objective(batch["classes"]), view, state.params, batch, jax.random.key(seed), frozen=frozen,
        state=state.objective_state,
    )[2]  # fmt: skip


def with_room(pretrained: Pretrained, insertions: tuple) -> Pretrained:
    """The model with insertions and with room for contexts in its texts; the parameters have no insertions yet."""
    if not insertions:
        return pretrained
    room = "".join(f" | room({m.length}, {m.at})" for m in insertions if isinstance(m, Context))
    model = insertion.inserted(pretrained.model, *insertions)
    return dataclasses.replace(pretrained, model=model, tokenize=pretrained.tokenize + room)


def _context_place(pretrained: Pretrained) -> int:
    """1 if texts begin with a start token, else 0."""
    first = pretrained._token_ids(["a", "the"])[:, 0]
    return int(first[0] == first[1])
