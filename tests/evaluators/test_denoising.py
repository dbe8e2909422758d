"""Perplexity of what denoisers hide: against the plain sums, and the same for every batch size."""

import json

import jax
import numpy as np
import pytest

from configs import ul2
from tests.support.models import run, untrained
from vlm_jax import evaluators
from vlm_jax.data import loader
from vlm_jax.errors import UserError


@pytest.fixture(scope="module")
def texts_to_texts():
    return untrained(ul2.get_config("smoke"), opinionated=True)


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """23 texts; the fifth is empty and does not count."""
    lines = [f"a cat, {'a dog, ' * (i % 5)}and number {i}" for i in range(23)]
    lines[4] = ""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    ops = "caption('text') | lower | denoise(48, 48, 3088) | keep('input_ids', 'token_ids', 'denoiser')"
    return dict(type="denoising", uri=f"jsonl:{path}", ops=ops, denoisers=ul2.DENOISERS)


def test_sums(texts_to_texts, section):
    metrics = evaluators.build(section | dict(batch_size=8))(texts_to_texts).metrics
    of = dict(uri=section["uri"], ops=section["ops"], batch_size=23, tokenizer=texts_to_texts.tokenizer)
    batch = next(iter(loader.eval_batches(max_bad_fraction=0.1, **of)))
    logits = run(texts_to_texts.model, texts_to_texts.params, batch["input_ids"], batch["token_ids"])
    log_p = np.take_along_axis(jax.nn.log_softmax(logits), batch["token_ids"][..., None], axis=2)[..., 0]
    counts = (batch["token_ids"] != 0) & batch["mask"][:, None]
    perplexity = lambda counts: np.exp(-(log_p * counts).sum() / counts.sum())
    assert metrics.pop("examples") == 22 == batch["mask"].sum()
    assert metrics.pop("perplexity") == pytest.approx(perplexity(counts), rel=1e-5)
    kinds = sorted(set(batch["denoiser"][batch["mask"]].tolist()))
    of_kind = {f"{ul2.DENOISERS[k]}/perplexity": perplexity(counts & (batch["denoiser"] == k)[:, None]) for k in kinds}
    assert metrics.pop("bad_examples") == 1
    assert metrics == pytest.approx(of_kind, rel=1e-5)


def test_batch_size_changes_nothing(texts_to_texts, section):
    one, other = (evaluators.build(section | dict(batch_size=size))(texts_to_texts).metrics for size in (5, 23))
    assert one == pytest.approx(other, rel=1e-6)


def test_captioners_read_no_texts(captioner, section):
    with pytest.raises(UserError, match="reads no texts"):
        evaluators.build(section)(captioner)
