"""Scores of examples and the rules that choose by them, against slow loops."""

import json

import numpy as np
import pytest

import vlm_jax
from tests.support.pictures import write_pictures
from vlm_jax import select
from vlm_jax.data import index
from vlm_jax.errors import UserError
from vlm_jax.evaluate import evaluate
from vlm_jax.evaluators.tasks.pair_scores import number_of


@pytest.fixture
def columns():
    """60 examples in no order: near copies by threes, five concepts."""
    rng = np.random.default_rng(0)
    embedding = np.repeat(rng.normal(size=(20, 8)), 3, axis=0) + 0.01 * rng.normal(size=(60, 8))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    order = rng.permutation(60)
    found = dict(
        record=np.arange(60), similarity=rng.random(60), concept=rng.integers(0, 5, 60).astype(float),
        embedding=embedding.astype(np.float16), language=np.array([number_of(x) for x in ["en", "de"] * 30]),
    )  # fmt: skip
    return {name: column[order] for name, column in found.items()}


def rows(columns, rules, seed=0):
    return select.select(columns, rules, seed)["record"].tolist()


def of(columns, name):
    return dict(zip(columns["record"].tolist(), columns[name].tolist(), strict=True))


def test_by_values(columns):
    similarity, language = of(columns, "similarity"), of(columns, "language")
    assert rows(columns, "least('similarity', 0.5)") == [i for i in range(60) if similarity[i] >= 0.5]
    assert rows(columns, "most('similarity', 0.5)") == [i for i in range(60) if similarity[i] <= 0.5]
    assert rows(columns, "among('language', 'de')") == [i for i in range(60) if language[i] == number_of("de")]
    assert rows(columns, "top('similarity', 0.3)") == sorted(sorted(range(60), key=lambda i: -similarity[i])[:18])
    both = "least('similarity', 0.2) | top('similarity', 0.5)"
    above = [i for i in range(60) if similarity[i] >= 0.2]
    assert rows(columns, both.replace("|", "| cache |")) == rows(columns, both)  # no rule is left out
    assert rows(columns, both) == sorted(sorted(above, key=lambda i: -similarity[i])[: round(len(above) / 2)])


def test_balanced(columns):
    concept = of(columns, "concept")
    chosen = rows(columns, "cap('concept', 3)")
    assert sorted(concept[i] for i in chosen) == sorted(c for c in set(concept.values()) for _ in range(3))
    assert chosen == rows(columns, "cap('concept', 3)") != rows(columns, "cap('concept', 3)", seed=1)
    assert rows(columns, "cap('concept', 100)") == list(range(60))


@pytest.mark.parametrize("block", [7, 4096])
def test_without_near_duplicates(columns, block, monkeypatch):
    monkeypatch.setattr(select, "BLOCK", block)
    similarity, embedding = of(columns, "similarity"), of(columns, "embedding")
    kept = []
    for i in sorted(range(60), key=lambda i: -similarity[i]):
        if all(np.dot(embedding[i], embedding[j]) <= 0.9 for j in kept):
            kept.append(i)
    assert rows(columns, "unlike(0.9)") == sorted(kept) and len(kept) == 20
    assert set(kept) <= set(rows(columns, "unlike(0.9, clusters=3)"))


def test_like_good_examples(columns, tmp_path):
    """A third of a cluster is known to be good: the rest of the cluster comes with it."""
    towards = np.float32(list(of(columns, "embedding").values())) @ np.eye(8)[0]
    good = columns["record"][towards > np.quantile(towards, 0.8)]
    np.savez(tmp_path / "good.npz", index=good[::2])
    chosen = rows(columns, f"like('{tmp_path}/good.npz', 0.2)")
    assert len(chosen) == 12 and len(set(chosen) & set(good.tolist())) >= 9


def test_weights_reach_the_loader(columns, tmp_path):
    chosen = select.select(columns, "top('similarity', 0.5) | weigh('similarity', 2)")
    select.write(chosen, tmp_path / "chosen.npz")
    records, weights = index.read(str(tmp_path / "chosen.npz"), 60, "data")
    similarity = of(columns, "similarity")
    squares = np.array([similarity[i] ** 2 for i in records.tolist()])
    np.testing.assert_allclose(weights, squares / squares.mean())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("top('likes', 0.3)", "no column `likes`.*score with --fields=likes"),
        ("top('similarity', 30)", "share is 30; expected a share above 0, at most 1"),
        ("least('similarity', 2.0)", "`least` leaves no example"),
        ("flip", "`flip` is no rule; expected one of among, cap"),
        ("topp('similarity', 0.3)", "no op `topp`; did you mean `top`"),
        ("like('nothing.npz', 0.3)", "`nothing.npz` does not exist"),
    ],
)
def test_mistakes(columns, rules, message):
    with pytest.raises(UserError, match=message) as error:
        select.select(columns, rules)
    assert "\n" not in str(error.value)


def test_scores_are_those_of_the_model(tmp_path):
    """Similarities, sizes and fields by hand; a broken picture and an empty text have no row."""
    write_pictures(tmp_path, 8, truncated=(2,), empty=(5,))
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    rows = [dict(line, language="de" if i % 2 else "en") for i, line in enumerate(lines)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, out = vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny"), tmp_path / "scores"
    section = dict(uri=f"jsonl:{tmp_path / 'data.jsonl'}", fields=["language"], embeddings=True, batch_size=4)
    results = evaluate(model, "pair_scores", out, **section)
    found, used = select.read(out), [0, 1, 3, 4, 6, 7]
    assert found["record"].tolist() == used and results["pair_scores/examples"] == 6
    pictures = model.embed_images([str(tmp_path / f"{i}.jpg") for i in used])
    texts = model.embed_texts([rows[i]["text"] for i in used])
    np.testing.assert_allclose(found["similarity"], np.sum(pictures * texts, axis=1), atol=1e-5)
    np.testing.assert_allclose(found["embedding"], pictures, atol=1e-3)
    assert found["characters"].tolist() == [len(rows[i]["text"]) for i in used]
    assert set(found["height"].tolist()) == set(found["width"].tolist()) == {32}
    assert found["language"].tolist() == [number_of(rows[i]["language"]) for i in used]
    with pytest.raises(UserError, match="holds no scores"):
        select.read(tmp_path)
