"""Texts to texts: relative positions, caches, scans, packed texts, and the objective that captioners have.

Values are compared with Transformers' in `tests/zoo/formats/test_references.py`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import close
from tests.support.models import T5_SIZES, VOCAB, run, section, tiny
from vlm_jax import models, objectives
from vlm_jax.data import packing
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.generate import log_likelihood
from vlm_jax.models.layers import Attention
from vlm_jax.models.positions import relative_bucket
from vlm_jax.params.table import named_leaves

INPUTS = jnp.array([[3, 4, 5, 6, 7, 8, 9, 1], [10, 11, 1, 0, 0, 0, 0, 0]])
TARGETS = jnp.array([[5, 6, 7, 8, 9, 1], [4, 12, 1, 0, 0, 0]])


def build(scan=False, **decoder):
    fields = section("encoder_decoder", scan)
    return models.build(fields | dict(decoder=fields["decoder"] | decoder))


@pytest.fixture(scope="module")
def t5():
    return tiny("encoder_decoder")


@pytest.fixture(scope="module")
def logits(t5):
    return t5.apply(INPUTS, TARGETS)


def published_bucket(ahead, buckets, distance, two_way):
    """Mesh TensorFlow's `_relative_position_bucket`, a number at a time."""
    first = 0
    if two_way:
        buckets //= 2
        first, ahead = buckets * (ahead > 0), -abs(ahead)
    away = max(-ahead, 0)
    exact = buckets // 2
    if away < exact:
        return first + away
    far = exact + int(math.log(away / exact) / math.log(distance / exact) * (buckets - exact) + 1e-9)
    return first + min(far, buckets - 1)


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (64, 256)])
def test_relative_buckets(buckets, distance, two_way):
    ahead = np.arange(-300, 301)
    want = [published_bucket(i, buckets, distance, two_way) for i in ahead.tolist()]
    np.testing.assert_array_equal(relative_bucket(jnp.asarray(ahead), buckets, distance, two_way), want)


def test_queries_begin_smaller_where_attention_does_not_scale():
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    run = lambda scale: jax.jit(Attention(4, scale=scale).init_with_output)(jax.random.key(1), x)
    (scaled, _), params = run(None)
    (plain, _), smaller = run(1.0)
    close(plain, scaled)
    close(smaller["params"]["query"]["kernel"], params["params"]["query"]["kernel"] * 8**-0.5)


def test_parameters(t5):
    """No bias anywhere, one table of tokens, one of positions in each stack."""
    names = named_leaves(t5.params)
    assert not any("bias" in name for name in names)
    tables = {name for name in names if "blocks" not in name and "norm" not in name}
    wanted = {"decoder/token_embed/embedding", "decoder/relative/table", "encoder/relative/table", "head/kernel"}
    assert tables == wanted


@pytest.mark.parametrize(
    ("variant", "count"),
    [("small", 76_961_152), ("base", 247_577_856), ("xxl", 11_135_332_352), ("20b", 19_591_209_984)],
)
def test_released_sizes(variant, count):
    sizes = dict(variant=variant, scan=True)
    decoder = dict(sizes, vocab_size=32_128, length=512)
    model = models.build(dict(name="encoder_decoder", encoder=sizes, decoder=decoder))
    shapes = jax.eval_shape(model.init, jax.random.key(0), INPUTS, TARGETS)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_a_scan_is_the_loop(t5, logits):
    params = t5.params
    stack = lambda part: (
        {name: value for name, value in part.items() if "blocks" not in name}
        | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[f"blocks_{i}"] for i in range(2)))}
    )
    stacked = params | {side: stack(params[side]) for side in ("encoder", "decoder")}
    scanned = build(scan=True, remat="full")
    close(run(scanned, stacked, INPUTS, TARGETS), logits)


def test_cached_steps_are_the_whole(t5, logits):
    model, params, _ = t5
    apply = lambda *args, **options: model.apply({"params": params}, *args, **options)
    context, mask = jax.jit(partial(apply, method="encode"))(INPUTS)
    shown, caches = shift_right(TARGETS), model.new_caches(2, 8)

    @jax.jit
    def decode(ids, context, caches, position):
        decoded = apply(ids, context, context_mask=mask, caches=caches, position=position, method="decode")
        return apply(decoded.hidden, method="logits"), decoded.caches

    for first, last in ((0, 4), (4, 6)):
        got, caches = decode(shown[:, first:last], context, caches, first)
        context = None
        close(got, logits[:, first:last])


def test_padding_of_inputs_changes_nothing(t5, logits):
    close(t5.apply(INPUTS[1:, :3], TARGETS[1:]), logits[1:])


def test_packed_texts_do_not_see_each_other(t5, logits):
    """Both examples in one row."""
    packed = packing.pack(np.asarray(INPUTS), np.asarray(TARGETS), eos_id=1, inputs_length=14, targets_length=12)
    segments = packed.input_segments, packed.target_segments
    got = t5.apply(packed.inputs, packed.targets, segments=segments)
    assert len(got) == 1
    close(got[0, :6], logits[0])
    close(got[0, 6:9], logits[1, :3])


def test_tied_logits():
    """They are the products with the token table, of hidden states times the factor, without the mask token."""
    tied = build(tied_scale=0.25, mask_token=True)
    assert "head" not in jax.eval_shape(tied.init, jax.random.key(0), INPUTS, TARGETS)["params"]
    table = jax.random.normal(jax.random.key(0), (VOCAB + 1, 32))
    hidden = jax.random.normal(jax.random.key(1), (2, 6, 32))
    params = dict(decoder=dict(token_embed=dict(embedding=table)))
    close(tied.apply({"params": params}, hidden, method="logits"), 0.25 * hidden @ table[:VOCAB].T)


def test_likelihoods_and_the_denoising_objective(t5, logits):
    """The same functions as for pictures; the input text stands for the picture."""
    model, params, _ = t5
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], axis=2)[..., 0]
    want = jnp.sum(jnp.where(TARGETS != 0, own, 0), axis=1)
    close(log_likelihood(model, params, INPUTS, TARGETS), want)
    objective = objectives.build(dict(name="denoising", mean="token"), model)
    batch = {"input_ids": INPUTS, "token_ids": TARGETS}
    got, _ = jax.jit(partial(objectives.value, objective, model))(params, batch, None)
    close(got, -jnp.sum(want) / jnp.sum(TARGETS != 0))


def test_errors(t5):
    model, params, _ = t5
    with pytest.raises(UserError, match="share the token table; their widths are 32 and 64"):
        models.build(
            dict(name="encoder_decoder", encoder=T5_SIZES, decoder=dict(T5_SIZES, width=64, vocab_size=24, length=8))
        )
    with pytest.raises(UserError, match=r"token_ids should be integers \[B, L\]"):
        model.apply({"params": params}, jnp.ones((2, 3)), TARGETS)
    with pytest.raises(UserError, match="variant is `B`; expected one of: small, base"):
        models.build(dict(name="encoder_decoder", encoder=dict(variant="B"), decoder={}))
