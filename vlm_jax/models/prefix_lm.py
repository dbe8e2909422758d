"""One sequence of input and text: the base of such models, and a prefix language model (Raffel et al. 2020; UL2)."""

from typing import ClassVar

import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.block import room
from vlm_jax.models.decoder import WRITING, Conditional


class Prefixed(Conditional, kw_only=True):
    """A `Conditional` that reads the context and then the text as one sequence, without cross-attention.

    Subclasses define `encode`, whose mask is never None, and `sequence`.

    Attributes:
      two_way: whether tokens of the context see each other both ways; else each sees those before.
    """

    two_way: bool = True

    def decode(
        self,
        token_ids,
        context=None,
        *,
        context_mask=None,
        bidirectional=None,
        caches=None,
        position=None,
        whole=False,
        train=False,
        **options,
    ):
        """Returns `Decoded` of token ids [B, L] that follow a context.

        Args:
          token_ids: start token and targets, or a part of both.
          context, context_mask: results of `encode`; context is None after the first step with caches. Without caches
            the mask may be None: no padding.
          bidirectional: bool [B, L], only without caches: the token_ids that all positions see.
          caches: in the first step from `new_caches`; the returned caches also have room for the context.
          position: index of token_ids among the targets; 0 in the first step.
          whole: whether the hidden states of the context come first.
          train: whether dropout is active.
          options: others of the subclass's `sequence`.
        """
        given, place = (context_mask if context is None else context).shape[1], position
        if context is None:
            position = given + position
        elif caches is not None:
            caches = self.new_caches(len(token_ids), given + room(caches))
        later = token_ids.shape[1] if caches is None else room(caches) - given
        mask, two_way = context_mask, None
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, later)), constant_values=True)
        if self.two_way or bidirectional is not None:
            shown = jnp.zeros((len(token_ids), later), bool) if bidirectional is None else bidirectional
            two_way = jnp.pad(shown, ((0, 0), (given, 0)), constant_values=self.two_way)
        options |= dict(mask=mask, bidirectional=two_way, caches=caches, position=position, place=place, train=train)
        decoded = self.sequence(token_ids, context, **options)
        return decoded if context is None or whole else decoded._replace(hidden=decoded.hidden[:, given:])


class PrefixLM(Prefixed, kw_only=True):
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

    def sequence(self, token_ids, context, *, place, **options):
        """Returns `Decoded` of the context's token ids, if any, and of token_ids [B, L]; options of `Decoder`."""
        token_ids = token_ids if context is None else jnp.concatenate([context, token_ids], axis=1)
        return self.decoder(token_ids, **options)
