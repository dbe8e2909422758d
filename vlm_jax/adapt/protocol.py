"""The few-shot protocol: methods adapt a two-tower model to some pictures of each class, over several draws.

Tests: other pictures of the same classes (CoOp), of new classes (base to new: CoCoOp), of other data sets (cross data
set) and of other styles (domain generalisation).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax import catalogue, config
from vlm_jax.adapt import active
from vlm_jax.adapt.methods import fit, is_head, options_of
from vlm_jax.adapt.task import Shots, Task, named_right, right
from vlm_jax.data.sources import open_source, select, train_split_of
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes, Look, fewer, indices, plain, some
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import read_fields
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.sampling import few_shots
from vlm_jax.pretrained import Pretrained, class_embeddings

VALIDATION = 4  # pictures of each class to choose hyper-parameters on; at most as many as shots


class Test(NamedTuple):
    """Pictures to name, and the names to choose among.

    Attributes:
      uri, split, where: the data set.
      label: the field with the label.
      named: label -> name, see `labels.Classes`.
    """

    uri: str
    split: str | None
    where: Mapping[str, Sequence] | None
    label: str
    named: Mapping[int | str, str]

    @property
    def classes(self) -> Classes:
        return Classes(self.named)

    @property
    def names(self) -> list[str]:
        return self.classes.names


@catalogue.method(
    family="evaluators",
    system="FewShot-Survey",
    paper="arXiv:2109.01134",
    where="section 4.1",
    differs="any method of adaptation, trained on a few pictures of each class, over draws, tests and new classes",
)
def few_shot(
    *,
    uri: str,
    split: str | None = None,
    train_uri: str | None = None,
    train_split: str | None = "train",
    label: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    templates: str | Sequence[str] = "{}",
    methods: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    shots: int = 16,
    pool: int = 0,
    seen: float = 1.0,
    budget: int = 0,
    rounds: int | None = None,
    acquisition: str | Mapping[str, Any] | None = None,
    seeds: int = 3,
    where: Mapping[str, Sequence] | None = None,
    train_where: Mapping[str, Sequence] | None = None,
    tests: Mapping[str, Mapping[str, Any]] | None = None,
    base_to_new: bool = False,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
    keep: Callable[[str, int, Pretrained], None] | None = None,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Each draw takes `shots` training pictures of each class, and up to min(4, shots) other pictures to choose
    hyper-parameters on (the protocol of CoOp, arXiv:2109.01134, section 4.1, and of Tip-Adapter's successors); nothing
    is chosen on `split`. Metrics: `METHOD/top1`, the mean over seeds, and, of two seeds or more, `METHOD/spread`, the
    standard deviation over seeds; `METHOD/TEST/top1` and `METHOD/TEST/spread` of further tests; with `base_to_new`,
    `METHOD/new/...` and `METHOD/harmonic_mean`; with a `budget`, `METHOD/N_labels/top1` after each round but the last
    and `METHOD/imbalance` of the labels, see `active.imbalance`; `examples`, `left_out` (pictures of another label, or
    unreadable). The intervals are of the pictures to name, not of the draws. Notes: classes with fewer pictures than
    `shots`, or none.

    Args:
      uri, split, train_uri, train_split, label, where, train_where, ops, batch_size, memory_share: as for `probe`.
      classes: the labels that count, with their names, see `classes.read`; defaults to the data set's own names that
        have training pictures. Labels of all data sets are found by name, see `labels.Classes`.
      templates: prompts, see `classes.read_templates`.
      methods: names, see `vlm-jax methods`; defaults to all heads.
      options: options that every one of the methods has: steps, learning_rate, rank, ...; `lora.steps` is lora's alone.
      shots: training pictures of each class; a smaller class gives all its pictures but one to choose on.
      pool: training pictures without labels, for methods that use such pictures: of the classes, drawn anew by each
        seed, none among the pictures of any draw.
      seen: share of the classes, the first ones, that have labelled pictures; below 1 the pool is of the other classes
        alone (transductive zero-shot learning). All classes are told apart in any case.
      budget: labels of the pool's pictures that a strategy asks for, in place of the `shots`; those are the number of
        pictures to choose on, alone. See `active.plan`, also for `rounds` and `acquisition`.
      seeds: number of draws: 0, 1, ...
      tests: name -> changes of `uri`, `split`, `where`, `label` and `classes` in a further test. Heads are tested only
        on classes that they were trained on, in any order.
      base_to_new: trains on the first half of the classes, and tests the other half, too, as `new` (arXiv:2203.05557,
        section 4.1); each half is named among its own names.
      keep: is called with method, seed and adapted model.
    """
    fits = {method: fit(method) for method in (catalogue.of("heads") if methods is None else methods)}
    options = options_of(fits, options or {})
    if shots < 1 or seeds < 1:
        raise UserError(f"few_shot wants shots and seeds of 1 or more; got {shots} and {seeds}")
    if pool < 0:
        raise UserError(f"few_shot wants a pool of 0 pictures or more; got {pool}")
    if not 0 < seen <= 1 or (seen < 1 and budget):
        raise UserError(f"few_shot: seen is {seen}; expected above 0, to 1, and 1 with a budget")
    plan = active.plan(budget=budget, rounds=rounds, acquisition=acquisition, pool=pool)
    train_uri = train_uri or uri
    train_split = train_split_of(train_uri, train_split)
    if label is None:
        label = class_names.find_label(open_source(train_uri, train_split), f"data set `{train_uri}`")
    prompts = class_names.read_templates(templates)
    named = _trained_names(train_uri, train_split, label, train_where) if classes is None else class_names.read(classes)
    main = Test(uri, split, where, label, named)
    tests = _tests(main, tests or {}, base_to_new, given=classes is not None)
    training = Test(train_uri, train_split, train_where, label, tests[""].named)
    _check_apart(training, tests)
    pictures = not all(is_head(method) for method in fits)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Pretrained, progress: Progress | None = None) -> Result:
        _check_model(pretrained, pictures)
        progress = progress or Progress()
        asked = {"train": training} | {f"test_{name}": test for name, test in tests.items()}
        passes = {
            name: Pass(
                pretrained, progress, uri=test.uri, split=test.split, where=test.where, batch_size=batch_size,
                ops=picture_ops(ops or pretrained.preprocess, test.label), memory=limit / len(asked), name=f"{name}_",
            )
            for name, test in asked.items()
        }  # fmt: skip
        looks = {name: data.look(asked[name].classes, asked[name].label) for name, data in passes.items()}
        labels = indices(passes["train"].fields(label), looks["train"])
        if not (labels >= 0).any():
            raise UserError(f"few_shot: no training picture's `{label}` is among the classes {some(training.names)}")
        labelled = labels < math.ceil(seen * len(training.names))
        kept_labels = np.where(labelled, labels, -1)
        draws = [few_shots(kept_labels, shots + min(shots, VALIDATION), seed) for seed in range(seeds)]
        others = labels if seen == 1 else np.where(labelled, -1, labels)
        pools = [_pool(others, draws, pool, seed) for seed in range(seeds)]
        drawn = np.unique(np.concatenate(draws + pools))
        passes["train"].only(drawn)
        for name, data in passes.items():
            data.begin(name)
        for name, data in passes.items():
            kept = _embed(data, name, looks[name], pictures)
            data.check_any(kept, asked[name].label, asked[name].classes, looks[name])
        texts = {name: class_embeddings(pretrained.embed_texts, test.names, prompts) for name, test in tests.items()}

        def finish(_: Any) -> Result:
            known = _shots(passes["train"].tables["train"], pictures)
            place = drawn[passes["train"].tables["train"].read("position")]  # of the readable pictures
            queries = {name: _shots(passes[f"test_{name}"].tables[f"test_{name}"], pictures) for name in tests}
            scale, shares, row = math.exp(float(pretrained.params["logit_scale"])), {}, -1
            columns = {name: _columns(test.names, training.names) for name, test in tests.items()}
            uneven: dict[str, list[float]] = {}

            def tested(method, adapted, name):
                if method == "zero_shot":  # all hosts have embedded the texts, above
                    return right(queries[name].features @ texts[name].T, queries[name])
                if adapted.head is None or columns[name] is not None:
                    return named_right(pretrained, adapted, queries[name], tests[name].names, columns[name])
                return np.full(len(queries[name].labels), np.nan)  # a head knows only the classes it was trained on

            fitted = progress.table("fits", limit)  # a row for each seed and method: which pictures are named right
            for seed, draw in enumerate(draws):
                few, validation = _parts(known, np.flatnonzero(np.isin(place, draw)), shots, seed)
                hidden = _part(known, np.isin(place, pools[seed]))
                others = hidden._replace(labels=np.full_like(hidden.labels, -1)) if pool else None
                task = Task(training.names, prompts, texts[""], scale, seed, others)
                for method, adapt in fits.items():
                    row += 1
                    if row >= len(fitted):  # else it ended before an interruption
                        adapt, found = partial(adapt, **options[method]), {}
                        if plan is None:
                            adapted = adapt(pretrained, few, validation, task)
                        else:
                            ask = lambda rows, labels=hidden.labels: labels[rows]
                            for i, learned in enumerate(plan.learn(adapt, pretrained, others, ask, validation, task)):
                                adapted, asked = learned.adapted, learned.labels
                                found[f"round_{i}"] = tested(method, adapted, "")[None]
                            found["asked"] = asked[None]
                        if keep is not None:
                            keep(method, seed, adapted)
                        found |= {f"test_{i}": tested(method, adapted, name)[None] for i, name in enumerate(tests)}
                        fitted.append(**found)
                        progress.save(now=True)
                    read = lambda column, row=row: fitted.read(column, slice(row, row + 1))[0]
                    for i, name in enumerate(tests):
                        if not np.isnan(share := read(f"test_{i}")).any():
                            shares.setdefault((method, name), []).append(share)
                    for i, count in enumerate(np.cumsum(plan.sizes)[:-1] if plan else ()):
                        shares.setdefault((method, f"{count}_labels"), []).append(read(f"round_{i}"))
                    if plan:
                        uneven.setdefault(method, []).append(active.imbalance(read("asked"), len(training.names)))
            examples = len(queries[""].labels)
            numbers = {"examples": float(examples), "left_out": float(passes["test_"].num_examples - examples)}
            numbers |= {f"{method}/imbalance": float(np.mean(values)) for method, values in uneven.items()}
            notes = fewer(training.names, labels, shots, kept=1)
            for name, test in tests.items():
                left_out = lambda name=name, test=test: passes[f"test_{name}"].left_out(
                    test.label, looks[f"test_{name}"]
                )
                about = test.classes.notes(queries[name].labels, left_out)
                notes += [f"test `{name}`: {note}" if name else note for note in about]
            return Result(numbers | _summary(shares), {}, _intervals(shares), notes)

        return passes["train"].result(finish)

    return evaluate


def _own_names(uri: str, split: str | None, label: str) -> dict[int | str, str]:
    return class_names.of_source(open_source(uri, split), label, f"data set `{uri}`")


def _trained_names(uri: str, split: str | None, label: str, where: Mapping | None) -> dict[int | str, str]:
    """The data set's own label -> name, of the classes that have training pictures."""
    source, named = open_source(uri, split), _own_names(uri, split, label)
    classes = Classes(named)
    look = classes.look(source.label_names(label), f"data set `{uri}`")
    has = set(indices(read_fields(source, select(source, where) if where else None, [label]), look).tolist())
    return {label: name for label, name in named.items() if classes.of_label[label] in has}


def _tests(main: Test, further: Mapping[str, Mapping[str, Any]], base_to_new: bool, given: bool) -> dict[str, Test]:
    """Name -> test, "" for the main test; `given`: see `_further`."""
    tests = {"": main} | {name: _further(main, changes, name, given) for name, changes in further.items()}
    if base_to_new:
        if "new" in tests:
            raise UserError("few_shot: base_to_new has a test `new` of its own; give yours another name")
        base, new = _halves(main.named)
        tests |= {"": main._replace(named=base), "new": main._replace(named=new)}
    return tests


def _further(main: Test, changes: Mapping[str, Any], name: str, given: bool) -> Test:
    """A further test. If `given`, the main test's classes apply; else another data set or label has its own classes."""
    changes = dict(changes)
    classes = changes.pop("classes", None)
    test = config.call(Test, main._asdict() | changes, f"the test `{name}` of few_shot")
    if classes is not None:
        return test._replace(named=class_names.read(classes))
    if not given and {"uri", "label"} & changes.keys():
        return test._replace(named=_own_names(test.uri, test.split, test.label))
    return test


def _columns(names: Sequence[str], trained: Sequence[str]) -> list[int] | None:
    """The places of the names among the names that a head was trained on; None if one is not there."""
    places = {plain(name): i for i, name in enumerate(trained)}
    found = [places.get(plain(name)) for name in names]
    return None if None in found else found


def _halves(named: Mapping) -> tuple[dict, dict]:
    """The first half of the classes (the larger one if the number is odd), and the second half, as in CoOp's code."""
    pairs = list(named.items())
    if len(pairs) < 2:
        raise UserError(f"base_to_new halves the classes and needs 2 or more; got {len(pairs)}")
    middle = -(-len(pairs) // 2)
    return dict(pairs[:middle]), dict(pairs[middle:])


def _check_model(pretrained: Pretrained, tunes: bool) -> None:
    if pretrained.is_captioner:
        raise UserError("few_shot compares embeddings, and a captioner has none; see `probe`")
    if getattr(getattr(pretrained.model, "image", None), "pool", None) == "all":
        raise UserError('few_shot needs one vector for each picture; this model has pool "all", one for each token')
    if tunes and jax.process_count() > 1:
        heads = ", ".join(catalogue.of("heads"))
        raise UserError(f"few_shot tunes on one host only; on several hosts choose among the heads: {heads}")


def _check_apart(training: Test, tests: Mapping[str, Test]) -> None:
    for name, test in tests.items():
        if (test.uri, test.split, test.where) == (training.uri, training.split, training.where):
            raise UserError(
                f"few_shot: test `{name or 'split'}` would name the pictures that are trained on; "
                "give another split, `train_uri` (--train_data), or where and train_where"
            )


def _embed(data: Pass, table: str, look: Look, pictures: bool) -> int:
    """Embeds the pictures of the classes and returns their number; with `pictures` the table also keeps pictures."""

    def rows(batch: Batch) -> Mapping[str, Columns]:
        own = {"image": np.asarray(batch.inputs)[batch.kept]} if pictures else {}
        feature = data.pretrained.embed_image_batch(batch.inputs)[batch.kept]
        return {table: {"feature": feature, "label": np.array(batch.about), "position": batch.position, **own}}

    return data.run(rows, about=lambda fields: look(fields[0]))


def _shots(table: Table, pictures: bool) -> Shots:
    return Shots(table.read("image") if pictures else None, table.read("feature"), table.read("label"))


def _parts(known: Shots, row: np.ndarray, shots: int, seed: int) -> tuple[Shots, Shots]:
    """The pictures to train on and to choose on, of a draw: `row` int [n], rows of `known`."""
    training = np.isin(np.arange(len(row)), _training_places(known.labels[row], shots, seed))
    if training.all() or not training.any():
        raise UserError("few_shot: too few pictures of a class to choose hyper-parameters on; fewer shots?")
    return _part(known, row[training]), _part(known, row[~training])


def _part(known: Shots, rows: np.ndarray) -> Shots:
    return Shots(*(None if values is None else values[rows] for values in known))


def _pool(labels: np.ndarray, draws: Sequence[np.ndarray], size: int, seed: int) -> np.ndarray:
    """Draws places of `size` pictures of the classes that are in no draw."""
    others = np.setdiff1d(np.flatnonzero(labels >= 0), np.concatenate(draws))
    if size > len(others):
        raise UserError(
            f"few_shot: the pool is {size} pictures, but {len(others)} training pictures are in no draw; "
            "a smaller pool, fewer shots or fewer seeds?"
        )
    return np.random.default_rng((seed, 0, 2)).permutation(others)[:size]


def _summary(shares: Mapping[tuple[str, str], Sequence[np.ndarray]]) -> dict[str, float]:
    """Means and, of several seeds, standard deviations over seeds; shares: for each seed, which pictures are right."""
    numbers = {}

    def add(mean: str, spread: str, values: Sequence[float]) -> None:
        numbers[mean] = float(np.mean(values))
        if len(values) > 1:
            numbers[spread] = float(np.std(values, ddof=1))

    of_seeds = {key: [float(np.mean(share)) for share in several] for key, several in shares.items()}
    for (method, test), values in of_seeds.items():
        where = f"{method}/{test}/" if test else f"{method}/"
        add(f"{where}top1", f"{where}spread", values)
        if test == "new":
            means = [_harmonic(b, n) for b, n in zip(of_seeds[method, ""], values, strict=True)]
            add(f"{method}/harmonic_mean", f"{method}/harmonic_spread", means)
    return numbers


def _intervals(shares: Mapping[tuple[str, str], Sequence[np.ndarray]]) -> dict[str, tuple[float, float]]:
    """The confidence intervals of `_summary`'s means: the pictures are drawn again, the seeds are not."""
    found, drawn = {}, {}
    for (method, test), several in shares.items():
        own = int(test == "new")  # other pictures than the base's, drawn independently
        drawn[method, test] = metrics.resampled(np.mean(several, axis=0), seed=own)
        found[f"{method}/{test}/top1" if test else f"{method}/top1"] = metrics.percentiles(drawn[method, test])
        if test == "new":
            means = np.vectorize(_harmonic)(drawn[method, ""], drawn[method, test])
            found[f"{method}/harmonic_mean"] = metrics.percentiles(means)
    return found


def _harmonic(base: float, new: float) -> float:
    return 2 * base * new / (base + new) if base + new else 0.0


def _training_places(labels, shots, seed):
    """Places of up to `shots` examples of each class; at least one example of a class is left out, if it has two."""
    chosen = []
    for c in np.unique(labels):
        own = np.flatnonzero(labels == c)
        count = max(min(shots, len(own) - 1), 1)
        chosen.append(np.random.default_rng((seed, int(c), 1)).permutation(own)[:count])
    return np.concatenate(chosen)
