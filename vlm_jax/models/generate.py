"""Decoding with caches, in one jitted loop: greedy, sampling, beam search, and the likelihood of given texts.

A model has `encode(inputs) -> (context, mask)`, `new_caches`, `decode(token_ids, context, ...) -> Decoded` and
`logits(hidden)`, like `Captioner`. Keys and values of the context are computed once; each step computes those of one
token.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models.block import Cache
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.logit_rules import (
    HIDDEN,
    LENGTH_FORMS,
    SAMPLING,
    Rules,
    check,
    check_beams,
    controlled,
    read_texts,
    truncated,
)
from vlm_jax.models.token_loss import token_loss
from vlm_jax.models.vocabulary import is_text


class Special(NamedTuple):
    """Ids of special tokens.

    Attributes:
      start: the decoder's input before the first token.
      end: ends a text.
      pad: follows the end; in a prefix: this position is not forced.
    """

    start: int = 0
    end: int = 1
    pad: int = 0


SPECIAL, RULES = Special(), Rules()
BEAM_OPTIONS = ("length_penalty", "length_form", "early_stopping")


class Generated(NamedTuple):
    """Generated texts.

    Attributes:
      token_ids: int32 [B, L], padding after the end; for a beam search [B, beams, L], best first.
      log_likelihood: fp32 [B] or [B, beams], the sum of log p over a text's tokens, end included. p is the model's
        probability after repetition control; in a beam search, repetition control changes log p itself, without
        normalising again (as in Transformers).
    """

    token_ids: jax.Array
    log_likelihood: jax.Array


@partial(jax.jit, static_argnames=("model", "length", "greedy", "special", "rules"))
def sample(
    model: nn.Module,
    params: Any,
    inputs: Any,
    rng: Any = None,
    prefix: jax.Array | None = None,
    *,
    length: int,
    greedy: bool = False,
    special: Special = SPECIAL,
    rules: Rules = RULES,
) -> Generated:
    """Samples a text for each input; `greedy` takes the most likely token each time.

    The loop ends when all texts have ended.

    Args:
      model: see the module's docstring.
      params: the model's parameters.
      inputs: a batch of B inputs for `model.encode`.
      rng: a `jax.random.key`, or a key for each text, [B]; None for greedy.
      prefix: integers [B, P], first tokens of the texts, or None; prefixes may have different lengths, padded with
        `special.pad`.
      length: L, the maximum length, end included.
      special: `Special`.
      rules: `Rules`.

    Returns:
      `Generated`.
    """
    check(rules, () if greedy else SAMPLING, length=length)
    read = read_texts(inputs, rules)
    decoding = _Decoding(model, params, inputs, length, special)
    batch = decoding.size
    forced = _forced(prefix, batch, length, special)

    def step(state):
        t, logits, caches, token_ids, done, total = state
        log_p = jax.nn.log_softmax(controlled(logits, token_ids, t, rules, special.start, read))
        chosen = jnp.argmax(log_p, axis=-1) if greedy else _draw(rng, t, truncated(log_p, rules))
        chosen = jnp.where(forced[:, t] == special.pad, chosen, forced[:, t])
        total += jnp.where(done, 0.0, jnp.take_along_axis(log_p, chosen[:, None], axis=1)[:, 0])
        chosen = jnp.where(done, special.pad, chosen).astype(jnp.int32)
        done = done | (chosen == special.end)
        logits, caches = decoding.step(chosen, t + 1, caches)
        return t + 1, logits, caches, token_ids.at[:, t].set(chosen), done, total

    token_ids = jnp.full((batch, length), special.pad, jnp.int32)
    state = (0, *decoding.first(), token_ids, jnp.zeros(batch, bool), jnp.zeros(batch))
    _, _, _, token_ids, _, total = jax.lax.while_loop(lambda s: (s[0] < length) & ~jnp.all(s[4]), step, state)
    return Generated(token_ids, total)


@partial(jax.jit, static_argnames=("model", "length", "beams", *BEAM_OPTIONS, "special", "rules"))
def beam_search(
    model: nn.Module,
    params: Any,
    inputs: Any,
    prefix: jax.Array | None = None,
    *,
    length: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    length_form: str = "gnmt",
    early_stopping: bool | str = "never",
    special: Special = SPECIAL,
    rules: Rules = RULES,
) -> Generated:
    """Beam search for the texts with the largest log p / norm(tokens).

    norm is ((5 + tokens) / 6)^a (GNMT, arXiv:1609.08144, section 7), or tokens^a (Transformers).

    A beam keeps `beams` unfinished and `beams` finished texts. A text ends only if the text is among the best `beams`
    candidates of its step (as in fairseq and Transformers). Unfinished texts of L tokens count as finished.

    Args:
      beams: number of texts to keep.
      length_penalty: a; a larger value favours longer texts; 0 compares log-likelihoods. At least 0 for "gnmt".
      length_form: "gnmt" counts all tokens and their log p, "power" those that no prefix forces.
      early_stopping: when the search of an input ends, in Transformers' words. "never": when no unfinished text can
        overtake the finished ones. False (the default there): when the best unfinished text, at its present length, is
        behind the finished ones. True: as False, and as soon as there are `beams` finished texts.
      others: as for `sample`; temperature, top_k and top_p have no effect.
    """
    check(rules, length=length, beams=beams)
    check_beams(length_penalty, length_form, early_stopping)
    read = read_texts(inputs, rules, beams)
    decoding = _Decoding(model, params, inputs, length, special, beams)
    batch = decoding.size
    forced = _forced(prefix, batch, length, special)
    every = length_form == "gnmt"  # whether tokens of the prefix count
    free = jnp.cumsum((forced == special.pad) | every, axis=1)
    count = lambda t: jnp.take(free, jnp.array([t - 1]), axis=1)
    norm = lambda t: LENGTH_FORMS[length_form][0](count(t), length_penalty)  # of the first t tokens, [B, 1]
    fold = lambda x: x.reshape(batch * beams, *x.shape[2:])
    unfold = lambda x: x.reshape(batch, beams, *x.shape[1:])
    pick = lambda x, index: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
    rows = jnp.arange(batch)[:, None] * beams

    def best(count, scores, *others):
        scores, index = jax.lax.top_k(scores, count)
        return scores, *(pick(x, index) for x in others)

    def step(state):
        t, logits, caches, live, live_ids, ended, ended_ids, ended_total, goes_on, given = state
        vocab = logits.shape[-1]
        log_p = controlled(jax.nn.log_softmax(logits), fold(live_ids), t, rules, special.start, read)
        wanted = forced[:, t][:, None, None]
        allowed = (wanted == special.pad) | (wanted == jnp.arange(vocab))
        totals = jnp.where(allowed, live[..., None] + unfold(log_p), HIDDEN)
        totals, index = jax.lax.top_k(totals.reshape(batch, -1), min(2 * beams, beams * vocab))
        beam, token = index // vocab, index % vocab
        ids = pick(live_ids, beam).at[:, :, t].set(token)
        ends = (token == special.end) | (t + 1 == length)
        among_best = jnp.arange(totals.shape[1]) < beams
        counts = ends & among_best & (totals > HIDDEN / 2) & goes_on[:, None]
        scores = jnp.where(counts, (totals - given) / norm(t + 1), HIDDEN)
        ended, ended_ids, ended_total = best(
            beams,
            jnp.concatenate([ended, scores], axis=1),
            jnp.concatenate([ended_ids, ids], axis=1),
            jnp.concatenate([ended_total, totals], axis=1),
        )
        live, live_ids, token, beam = best(beams, jnp.where(ends, HIDDEN, totals), ids, token, beam)
        given = given if every else jnp.where(wanted[..., 0] == special.pad, given, live[:, :1])
        best_norm = norm(t + 1)
        if early_stopping == "never":
            best_norm = jnp.maximum(best_norm, norm(length))
        goes_on &= (live[:, 0] > HIDDEN / 2) & ((live[:, :1] - given) / best_norm > ended[:, -1:])[:, 0]
        if early_stopping is True:
            goes_on &= ended[:, -1] <= HIDDEN / 2
        caches = decoding.reorder(caches, (rows + beam).reshape(-1))
        logits, caches = decoding.step(fold(token), t + 1, caches)
        return t + 1, logits, caches, live, live_ids, ended, ended_ids, ended_total, goes_on, given

    nothing = jnp.full((batch, beams), HIDDEN)
    ids = jnp.full((batch, beams, length), special.pad, jnp.int32)
    begun = nothing.at[:, 0].set(0.0), ids, nothing, ids, nothing, jnp.ones(batch, bool), jnp.zeros((batch, 1))
    state = jax.lax.while_loop(lambda s: (s[0] < length) & jnp.any(s[-2]), step, (0, *decoding.first(), *begun))
    *_, ended_ids, ended_total, _, _ = state
    return Generated(ended_ids, ended_total)


@partial(jax.jit, static_argnames=("model", "pad_id", "eos_id"))
def log_likelihood(
    model: nn.Module, params: Any, inputs: Any, target_ids: jax.Array, *, pad_id: int = 0, eos_id: int | None = None
) -> jax.Array:
    """Returns log p(text i | input i), fp32 [B], of target_ids [B, L]; padding does not count, see `is_text`."""
    hidden = model.apply({"params": params}, inputs, shift_right(target_ids, model.decoder.start_id), method="hidden")
    return _total(model, params, hidden, target_ids, pad_id, eos_id)


@partial(jax.jit, static_argnames=("model", "pad_id", "eos_id", "at_a_time"))
def log_likelihoods(
    model: nn.Module,
    params: Any,
    inputs: Any,
    target_ids: jax.Array,
    *,
    pad_id: int = 0,
    eos_id: int | None = None,
    at_a_time: int = 4,
) -> jax.Array:
    """Returns log p(text j | input i), fp32 [B, M], of target_ids [M, L]; encodes the inputs once.

    Scores `at_a_time` texts together.
    """
    decoding = _Decoding(model, params, inputs, target_ids.shape[1], Special(start=model.decoder.start_id))
    _, caches = decoding.first()

    def of_text(ids):
        targets = jnp.broadcast_to(ids, (decoding.size, len(ids)))
        hidden = decoding.decode(shift_right(targets, model.decoder.start_id), 0, caches).hidden
        return _total(model, params, hidden, targets, pad_id, eos_id)

    return jax.lax.map(of_text, target_ids, batch_size=at_a_time).T


def _draw(rng, t, log_p):
    """Draws a token of each row, by one key or by a key for each row."""
    one = lambda rng, log_p: jax.random.categorical(jax.random.fold_in(rng, t), log_p)
    return jax.vmap(one)(rng, log_p) if jnp.ndim(rng) else one(rng, log_p)


def _total(model, params, hidden, targets, pad_id, eos_id):
    logits = lambda hidden: model.apply({"params": params}, hidden, method="logits")
    log_p = token_loss(logits, hidden, targets).log_likelihood
    return jnp.sum(log_p, axis=1, where=is_text(targets, pad_id, eos_id))


class _Decoding:
    """Decoding steps of a model on a batch of inputs, with `beams` texts for each input."""

    def __init__(self, model, params, inputs, length, special, beams=1):
        self.model, self.length, self.special, self.beams = model, length, special, beams
        self.apply = partial(model.apply, {"params": params})
        self.context, self.context_mask = self.apply(inputs, method="encode")
        self.size = len(self.context)

    def first(self):
        """Returns logits [B * beams, V] of the first token, and the caches."""
        start = jnp.full((self.size,), self.special.start, jnp.int32)
        caches = self.model.new_caches(self.size, self.length)
        self.batch_axis = 0 if isinstance(caches, list) else 1
        hidden, caches, _ = self.decode(start[:, None], 0, caches, self.context)
        logits = self.apply(hidden, method="logits")[:, 0]
        again = lambda axis: lambda x: jnp.repeat(x, self.beams, axis=axis)
        if self.context_mask is not None:
            self.context_mask = again(0)(self.context_mask)
        return again(0)(logits), jax.tree.map(again(self.batch_axis), caches)

    def step(self, token_ids, position, caches):
        """Returns logits [B * beams, V] of the token after token_ids [B * beams], and the caches."""
        hidden, caches, _ = self.decode(token_ids[:, None], position, caches)
        return self.apply(hidden, method="logits")[:, 0], caches

    def decode(self, token_ids, position, caches, context=None):
        """Returns `Decoded` of token_ids [B * beams, l]."""
        return self.apply(
            token_ids, context, context_mask=self.context_mask, caches=caches, position=position, method="decode"
        )

    def reorder(self, caches, rows):
        """Returns the caches with their texts reordered by `rows`; contexts stay, because the inputs are the same."""
        take = partial(jnp.take, indices=rows, axis=self.batch_axis)
        of_block = lambda cache: cache._replace(attn=jax.tree.map(take, cache.attn))
        return jax.tree.map(of_block, caches, is_leaf=lambda x: isinstance(x, Cache))


def _forced(prefix, batch, length, special):
    """Returns the forced tokens [B, L]; `special.pad` where the model chooses."""
    forced = jnp.full((batch, length), special.pad, jnp.int32)
    return forced if prefix is None else forced.at[:, : prefix.shape[1]].set(prefix[:, :length])
