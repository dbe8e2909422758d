"""The number of attention heads where a file has fused projections and no config."""

from vlm_jax.errors import UserError
from vlm_jax.models.variants import VARIANTS
from vlm_jax.zoo.released import Told

HEAD_WIDTH = 64  # of OpenAI's CLIPs, and of all towers since but the largest


def heads_of(width: int, depth: int, mlp_dim: int, told: Told, side: str = "image") -> int:
    """Returns the heads of a tower: those of the variant with these sizes, else width / 64 if no variant of this width
    has others.

    Raises:
      UserError: the sizes do not determine the number, and `told` does not have it.
    """
    known = {heads for *sizes, heads in VARIANTS.values() if tuple(sizes) == (width, depth, mlp_dim)}
    if len(known) == 1:
        return known.pop()
    given = told.of("heads", side)
    if given is not None:
        if type(given) is not int or given < 1 or width % given:
            raise UserError(f"heads={given!r:.40} of the {side} tower does not divide its width {width}")
        return given
    of_width = {heads for *sizes, heads in VARIANTS.values() if sizes[0] == width}
    if width % HEAD_WIDTH or of_width - {width // HEAD_WIDTH}:
        raise UserError(
            f"the files do not tell the heads of the {side} tower (width {width}, depth {depth}, MLP {mlp_dim}); "
            f"pass heads={min(of_width, default=max(width // HEAD_WIDTH, 1))} or what the model was trained with"
        )
    return width // HEAD_WIDTH
