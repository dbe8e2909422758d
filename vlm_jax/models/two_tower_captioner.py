"""Two towers that also write: a decoder attends to the image tower's tokens (SigLIP 2: Tschannen et al. 2025)."""

from typing import ClassVar

import flax.linen as nn

from vlm_jax.models.decoder import WRITING, Conditional, shift_right
from vlm_jax.models.two_tower import EMBEDDINGS, TwoTower


class TwoTowerCaptioner(TwoTower, Conditional, kw_only=True):
    """A `TwoTower` and a `Captioner` with one image tower.

    "SigLIP 2" (arXiv:2502.14786), section 2.2: the decoder reads the tower's tokens before the pool.

    Attributes:
      decoder: `Decoder`.
      Others: see `TwoTower`.
    """

    can: ClassVar = frozenset({"embed", "describe"})

    outputs: ClassVar = (
        EMBEDDINGS | WRITING | {"context": lambda o: (o["of_image"].image_tokens, o["of_image"].image_mask)}
    )

    @nn.compact
    def __call__(self, images, token_ids, *, hidden=None, kept=None, train=False):
        """Returns `Embeddings`; see `TwoTower`."""
        found = super().__call__(images, token_ids, hidden=hidden, kept=kept, train=train)
        if self.is_initializing():
            self.logits(self.decode(shift_right(token_ids, self.decoder.start_id), found.image_tokens).hidden)
        return found

    def encode(self, images, *, train=False):
        """Images -> (context [B, N, D], its mask bool [B, N] or None)."""
        encoded = self.image(images, train=train)
        return encoded.tokens, encoded.mask
