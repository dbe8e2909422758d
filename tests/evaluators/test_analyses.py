"""Analyses of models: calibration, pictures of no class, embeddings as sets, blind pairs, two-alternative choices."""

import numpy as np
import pytest
from scipy.special import softmax

import vlm_jax
from configs import openvision2
from tests.support.models import untrained
from vlm_jax import evaluators
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.tasks.blind_pairs import mined, neighbours_right
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.vocabulary import is_text

NAMES = {0: "grinning face", 570: "monkey", 571: "gorilla", 575: "dog"}
EMOJI = dict(uri="tfds:emoji", split="unseen_style[:600]", where={"concept": list(NAMES)})
SCENES = dict(uri="scenes:?examples=12&size=64", split="train")


def records(uri, split):
    source = open_source(uri, split)
    return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def clip():
    return vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny")


@pytest.fixture(scope="module")
def openvision():
    return untrained(openvision2.get_config("smoke"), opinionated=True)


@pytest.fixture(scope="module")
def named(clip):
    """Pictures of the four classes: their places among them, and their logits."""
    source = [record for record in records("tfds:emoji", "unseen_style[:600]") if record["concept"] in NAMES]
    logits = clip.logits([record["image"] for record in source], list(NAMES.values()))
    return np.array([list(NAMES).index(record["concept"]) for record in source]), logits.astype(np.float64)


def test_calibration_by_hand(clip, named):
    labels, logits = named
    found = evaluators.build(dict(EMOJI, type="calibration", classes=NAMES, label="concept", bins=3))(clip).metrics
    sure, right = softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == labels
    edges = [(sure > low / 3) & (sure <= (low + 1) / 3) for low in range(3)]
    error = sum(own.mean() * abs(right[own].mean() - sure[own].mean()) for own in edges if own.any())
    assert found["error"] == pytest.approx(error, abs=1e-5)
    assert found["top1"] == right.mean() and found["confidence"] == pytest.approx(sure.mean(), abs=1e-5)
    assert found["nll"] == pytest.approx(
        -np.log(softmax(logits, axis=1)[np.arange(len(labels)), labels]).mean(), abs=1e-5
    )
    folds = np.arange(len(labels)) % 2
    scaled = np.concatenate([
        softmax(logits[folds == i] / metrics.temperature(logits[folds != i], labels[folds != i]), axis=1)[
            np.arange((folds == i).sum()), labels[folds == i]
        ]
        for i in (0, 1)
    ])  # fmt: skip
    assert found["scaled/nll"] == pytest.approx(-np.log(scaled).mean(), rel=1e-3)


def test_pictures_of_no_class_by_hand(clip, named):
    others = {"concept": [600, 601, 602]}
    section = dict(EMOJI, type="out_of_distribution", classes=NAMES, other_where=others)
    found = evaluators.build(section)(clip).metrics
    source = records("tfds:emoji", "unseen_style[:600]")
    pictures = [record["image"] for record in source if record["concept"] in others["concept"]]
    best = (
        softmax(named[1], axis=1).max(axis=1),
        softmax(clip.logits(pictures, list(NAMES.values())), axis=1).max(axis=1),
    )
    assert found["examples"] == len(named[0]) and found["other_examples"] == len(pictures)
    assert found["msp/auroc"] == pytest.approx(np.mean(best[0][:, None] > best[1]), abs=1e-4)
    with pytest.raises(UserError, match="the same pictures"):
        evaluators.build(dict(EMOJI, type="out_of_distribution", classes=NAMES, other_where=EMOJI["where"]))


def test_embeddings_as_sets(clip):
    found = evaluators.build(dict(SCENES, type="representation", neighbours=3))(clip).metrics
    scenes = records(SCENES["uri"], "train")
    image = clip.embed_images([record["image"] for record in scenes]).astype(np.float64)
    text = clip.embed_texts([record["caption"] for record in scenes]).astype(np.float64)
    others = [image[i] @ text[j] for i in range(12) for j in range(12) if i != j]
    assert found["similarity/others"] == pytest.approx(np.mean(others), abs=1e-5)
    assert found["similarity/image"] == pytest.approx(
        np.mean([image[i] @ image[j] for i in range(12) for j in range(12) if i != j]), abs=1e-5
    )
    assert found["alignment"] == pytest.approx(2 - 2 * found["similarity/pairs"], abs=1e-5)
    assert found["gap"] == pytest.approx(metrics.modality_gap(image, text), abs=1e-5)


def test_choices_by_hand(clip):
    pictures = dict(images=["image", "minimal_pair/image"], reference="caption", text=True)
    found = evaluators.build(dict(SCENES, type="two_alternatives", **pictures))(clip).metrics
    scenes = records(SCENES["uri"], "train")
    score = [
        clip.logits([record["image"], record["minimal_pair"]["image"]], [record["caption"]])[:, 0] for record in scenes
    ]
    assert found["accuracy"] == pytest.approx(np.mean([1.0 if a > b else 0.5 if a == b else 0 for a, b in score]))
    itself = dict(pictures, reference="image", text=False)
    assert evaluators.build(dict(SCENES, type="two_alternatives", **itself))(clip).metrics["accuracy"] == 1
    with pytest.raises(UserError, match="two fields"):
        evaluators.build(dict(SCENES, type="two_alternatives", reference="caption", images="image"))


def test_mined_pairs_by_a_loop(monkeypatch):
    monkeypatch.setattr("vlm_jax.evaluators.tasks.blind_pairs.ROWS", 7)
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    x, y, labels = unit(rng.normal(size=(40, 3))), unit(rng.normal(size=(40, 3))), rng.integers(0, 5, 40)
    every = [(y[i] @ y[j] - x[i] @ x[j], i, j) for i in range(40) for j in range(i + 1, 40)
             if labels[i] != labels[j] and x[i] @ x[j] > 0.8 and y[i] @ y[j] < 0.2]  # fmt: skip
    taken, slow = set(), []
    for _, i, j in sorted(every):
        if not taken & {i, j}:
            taken |= {i, j}
            slow.append([i, j])
    pairs = mined(x, y, labels, 0.8, 0.2)
    assert pairs.tolist() == slow and len(slow) > 3
    for right, (i, j) in zip(neighbours_right(x, labels, pairs), slow, strict=True):
        near = lambda k, i=i, j=j: max(
            (x[k] @ x[m], labels[m]) for m in range(40) if m != k and labels[m] in labels[[i, j]]
        )[1]
        assert right == (near(i) == labels[i] and near(j) == labels[j])


def test_a_model_has_no_blind_spot_beside_itself(clip):
    section = dict(EMOJI, type="blind_pairs", classes=NAMES, label="concept", other="pkg:vlm_jax/zoo/clip_tiny")
    with pytest.raises(UserError, match="far <= close"):
        evaluators.build(dict(section, close=0.1))
    result = evaluators.build(dict(section, close=0.9999))(clip)
    assert result.metrics["pairs"] == 0 and "no two pictures" in result.notes[0]


def test_the_integration_rate_reads_every_layer(openvision):
    found = evaluators.build(dict(SCENES, type="integration_rate", batch_size=5))(openvision).metrics
    depth = openvision.model.decoder.depth
    assert found["rate"] == pytest.approx(np.log10(sum(found[f"layer_{i}"] for i in range(depth))), abs=1e-9)
    pictures, said = zip(*((one["image"], one["caption"]) for one in records(SCENES["uri"], "train")), strict=True)
    ids, images = openvision._target_ids(said), openvision._pictures(pictures)

    def last(model):  # the final norm of the last block's output is what decoding returns
        context, mask = model.encode(images)
        decoded = model.decode(shift_right(ids), context, context_mask=mask, whole=True, layers=(-1,))
        return (decoded.hidden, decoded.aux["layers"][0], context.shape[1])

    hidden, block, n = openvision.model.apply({"params": openvision.params}, method=last)
    norm = openvision.params["decoder"]["norm"]
    centred = block - block.mean(-1, keepdims=True)
    by_hand = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm.get("bias", 0)
    np.testing.assert_allclose(hidden, by_hand, atol=1e-4)
    real = is_text(ids, openvision.tokenizer.pad_id, openvision.tokenizer.eos_id)
    own = metrics.frechet(*_unit(np.asarray(block)[:, :n].reshape(-1, block.shape[-1]), np.asarray(block)[:, n:][real]))
    assert found[f"layer_{depth - 1}"] == pytest.approx(own, rel=1e-3)


def _unit(pictures, said):
    unit = np.linalg.norm(said, axis=1).mean()
    found = []
    for tokens in (pictures / unit, said / unit):
        size = np.linalg.norm(tokens, axis=1)
        far = abs(size - np.median(size)) > 3 * size.std(ddof=1)
        found.append(np.where(far[:, None], np.median(tokens, axis=0), tokens))
    return found
