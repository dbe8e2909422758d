"""Prints the cycles of candidate block sizes per shape and pass: the source of `kernels/attention/tuning.py`.

    python -m experiments.kernel_schedules.tune [--chip v5e]

Needs the [tpu] extra (libtpu), no TPU; about an hour on two cores.
"""

import argparse

import jax
import jax.numpy as jnp

from experiments.kernel_schedules import tpu_cycles
from vlm_jax.kernels.attention import tpu_short
from vlm_jax.kernels.attention.tpu_heads import Spec, fits_groups

BATCH = 8
SHAPES = {
    "77": (77, 8, 64, True),
    "197": (197, 12, 64, False),
    "257": (257, 16, 64, False),
    "729": (729, 16, 72, False),
}
CANDIDATES = {
    "forward": [
        dict(groups=groups, ahead=ahead, tile=tile, chunk=chunk)
        for groups in (1, 2, 3, 4)
        for ahead in (1, 2, 4)
        for tile in (256, 384, 1024)
        for chunk in (128, 256, 1024)
    ],
    "backward": [
        dict(groups=groups, ahead=ahead, chunk=chunk)
        for groups in (1, 2, 4)
        for ahead in (0, 1, 2, 4)
        for chunk in (128, 256, 1024)
    ],
}


def candidates():
    """Returns {case: (fn, args)} for `tpu_cycles.py`; candidates of equal kernels appear once."""
    cases = {}
    for name, (length, heads, dim, causal) in SHAPES.items():
        packed = jax.ShapeDtypeStruct((BATCH, length, heads * dim), jnp.bfloat16)
        lse = jax.ShapeDtypeStruct((BATCH, heads, length), jnp.float32)
        for direction, fields in ((d, f) for d, every in CANDIDATES.items() for f in every):
            if min(fields["chunk"], length) == length < fields["chunk"] != 1024 or fields.get("tile", 0) - 256 > length:
                continue
            spec = fits_groups(Spec(heads, dim, causal, dim**-0.5, **fields))
            if spec.groups != fields["groups"]:
                continue
            case = f"{name} {direction} {' '.join(f'{k}={v}' for k, v in fields.items())}"
            cases[case] = (forward(spec), (packed,) * 3) if direction == "forward" else (
                backward(spec), (packed,) * 4 + (lse,),
            )  # fmt: skip
    return cases


def forward(spec):
    return lambda q, k, v: tpu_short.forward(q, k, v, None, None, None, spec=spec, lse=True)


def backward(spec):
    return lambda q, k, v, dout, lse: tpu_short.backward(q, k, v, None, None, None, dout, lse, spec=spec)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--only", help="regular expression: cases to measure, such as `729 forward`")
    options = parser.parse_args()
    found = tpu_cycles.measure("experiments.kernel_schedules.tune:candidates", options.chip, options.only)
    for name, row in sorted(found.items(), key=lambda item: (item[0].split()[:2], item[1].get("cycles", 1e18))):
        print(f"{name:60s} {row.get('cycles', row.get('error'))}")


if __name__ == "__main__":
    main()
