"""A prefix language model: one stack for the input and the targets (Raffel et al. 2020, section 3.2.1; UL2)."""

from typing import ClassVar

import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.decoder import WRITING, Conditional
from vlm_jax.models.transformer import room


class PrefixLM(Conditional, kw_only=True):
    """A decoder that reads input, start token and targets as one sequence; attention within the input is bidirectional.

    The inputs are token ids, integers [B, P]. Padding of the inputs moves to the front and is masked. The targets thus
    follow the input's last token, with the same distances as without padding. Positions must be relative.

    Attributes:
      decoder: `Decoder` without cross-attention.
      pad_id: id of padding in inputs; no token attends to padding.
    """

    pad_id: int = 0
    can: ClassVar = frozenset({"write"})

    outputs: ClassVar = WRITING | {"context": lambda o: o.apply("encode", o["input_ids"])}

    def encode(self, input_ids, *, train=False):
        """Moves padding to the front: token ids [B, P] -> (token ids [B, P], bool [B, P], False for padding)."""
        if self.decoder.posemb != "none":
            raise UserError(f'a prefix LM has relative positions; set posemb="none", not "{self.decoder.posemb}"')
        length = input_ids.shape[1]
        real = input_ids != self.pad_id
        spare = jnp.argmax(real[:, ::-1], axis=1)[:, None]  # number of padding tokens at the end
        ids = jnp.take_along_axis(input_ids, (jnp.arange(length) - spare) % length, axis=1)
        return ids, ids != self.pad_id

    def decode(
        self,
        token_ids,
        context=None,
        *,
        context_mask,
        bidirectional=None,
        caches=None,
        position=None,
        train=False,
    ):
        """Returns `Decoded` of token ids [B, L] that follow an input.

        Args:
          token_ids: start token and targets, or a part of both.
          context, context_mask: results of `encode`; context is None after the first step with caches.
          bidirectional: bool [B, L], only without caches: the token_ids that all positions see.
          caches: in the first step from `new_caches`; the returned caches also have room for the input.
          position: index of token_ids among the targets; 0 in the first step.
          train: whether dropout is active.
        """
        given = context_mask.shape[1]
        if context is None:
            position = given + position
        else:
            token_ids = jnp.concatenate([context, token_ids], axis=1)
            caches = None if caches is None else self.new_caches(len(token_ids), given + room(caches))
        later = (len(token_ids), (token_ids.shape[1] if caches is None else room(caches)) - given)
        shown = jnp.zeros(later, bool) if bidirectional is None else bidirectional
        mask = jnp.concatenate([context_mask, jnp.ones(later, bool)], axis=1)
        two_way = jnp.concatenate([jnp.ones_like(context_mask), shown], axis=1)
        options = dict(mask=mask, bidirectional=two_way, caches=caches, position=position, train=train)
        decoded = self.decoder(token_ids, **options)
        return decoded if context is None else decoded._replace(hidden=decoded.hidden[:, given:])
