"""Block sizes of the TPU kernels: data, and the rule for what the data does not cover.

Cycles of candidates: `python -m experiments.kernel_schedules.tune` (needs the [tpu] extra, no TPU): the compiler's
static schedule for v5e, batch 8, bf16, at lengths that towers have (77, 197, 257, 729). The rows were chosen from a
part of its grid, some forty candidates; other chips use them too.
"""

TABLE = {
    # (pass, longest of Lq and Lk up to, head_dim up to): fields of `tpu_short.Spec`
    ("forward", 128, 64): dict(groups=4, ahead=4),
    ("forward", 200, 64): dict(groups=3, ahead=4, chunk=128),
    ("forward", 320, 64): dict(groups=2, ahead=4, chunk=128),
    ("forward", 1024, 256): dict(groups=1, ahead=2, tile=256, chunk=256),
    ("backward", 128, 64): dict(groups=4, ahead=4),
    ("backward", 320, 64): dict(groups=2, ahead=1),
    ("backward", 1024, 256): dict(groups=1, ahead=0, chunk=128),
}


def sizes(direction, lq, lk, head_dim):
    """The first row that covers these shapes."""
    for (name, length, dim), fields in TABLE.items():
        if name == direction and max(lq, lk) <= length and head_dim <= dim:
            return fields
    raise KeyError((direction, lq, lk, head_dim))
