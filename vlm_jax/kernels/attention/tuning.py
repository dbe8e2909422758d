"""Block sizes of the TPU kernels: a table, and the rule that picks a row.

`python -m experiments.kernel_schedules.tune` counts the cycles of candidates (needs the [tpu] extra, no TPU): the
compiler's static schedule for v5e, batch 8, bf16, at the lengths of towers (77, 197, 257, 729). The rows were chosen
among some forty candidates of the grid; other chips use the same rows.
"""

TABLE = {
    # (pass, largest max(Lq, Lk), largest head_dim): fields of `tpu_short.Spec`
    ("forward", 128, 64): dict(groups=4, ahead=4),
    ("forward", 200, 64): dict(groups=3, ahead=4, chunk=128),
    ("forward", 320, 64): dict(groups=2, ahead=4, chunk=128),
    ("forward", 1024, 256): dict(groups=1, ahead=2, tile=256, chunk=256),
    ("backward", 128, 64): dict(groups=4, ahead=4),
    ("backward", 320, 64): dict(groups=2, ahead=1),
    ("backward", 1024, 256): dict(groups=1, ahead=0, chunk=128),
}


def sizes(direction, lq, lk, head_dim):
    """Returns the first row that covers these shapes."""
    for (name, length, dim), fields in TABLE.items():
        if name == direction and max(lq, lk) <= length and head_dim <= dim:
            return fields
    raise KeyError((direction, lq, lk, head_dim))
