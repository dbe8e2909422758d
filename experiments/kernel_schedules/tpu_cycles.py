"""Cycles of a TPU kernel, from the compiler's static schedule; needs jax and libtpu, no TPU.

    python -m experiments.kernel_schedules.tpu_cycles MODULE:FUNCTION [--chip v5e] [--only REGEX]

FUNCTION() returns {name: (fn, args)}: `args` are jax.ShapeDtypeStruct (or arrays, whose shape and dtype count). Each
`fn` is compiled ahead of time for one chip. The cycles of a custom call are the sum of the VLIW bundles of its final
schedule, each times the trip counts of the loops around the bundle, without DMA waits; branches (`pl.when`) count as
taken. All kernels are measured alike, so ratios are fair. The temp bytes of the whole program are printed, too.
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ENV = dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)
CHIPS = dict(v4="v4:2x2x1", v5e="v5e:2x2", v5p="v5p:2x2x1", v6e="v6e:2x2", v7="tpu7x:2x2x1")
NOT_KERNELS = r"<|TLP|copy|fusion|bitcast|convert|broadcast|reduce|transpose|pad|slice|param"


def compile_one(target, name, chip):
    """In a child process: compiles case `name` and prints memory as JSON; LIBTPU_INIT_ARGS names the dump's folder."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    fn, args = cases(target)[name]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS.get(chip, chip))
    one = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for a in args]
    compiled = jax.jit(fn).lower(*args).compile()
    print("RESULT " + json.dumps(dict(temp_bytes=compiled.memory_analysis().temp_size_in_bytes)))


def cases(target):
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)()


def cycles(text):
    """Cycles of one final_bundles dump: bundles, weighted by their loops' trip counts."""
    body = text.split("= control target key end", 1)[1]
    bundles, current = [], None  # (depth, opens a loop, text); a bundle may span lines
    for line in body.splitlines():
        match = re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:\s*(>*)\s*\{", line)
        if match:
            current = [len(match.group(3)), match.group(2) == "LB", line]
            bundles.append(current)
        elif current:
            current[2] += " " + line
    around, owner = [], []  # loop = [depth, trips]
    for depth, opens, bundle in bundles:
        if not depth and re.search(r"\{\s*\}", bundle):
            depth = around[-1][0] if around else 0  # empty delay bundles carry no marker
        while around and (around[-1][0] > depth or (opens and around[-1][0] >= depth)):
            around.pop()
        if opens:
            around.append([depth, None])
        for match in re.finditer(r"scmp\.ge\.s32\.totalorder[^,]*, (\d+) /\* loop exit test", bundle):
            unknown = [loop for loop in around if loop[1] is None]
            if unknown:
                unknown[-1][1] = int(match.group(1))
        owner.append(list(around))
    total = 0
    for loops in owner:
        weight = 1
        for _, trips in loops:
            weight *= trips or 1
        total += weight
    return total


def measure(target, chip, only=None):
    """Returns {case: dict(cycles, kernels, temp_bytes) or dict(error)}."""
    os.environ.update(ENV)
    out = {}
    for name in cases(target):
        if only and not re.search(only, name):
            continue
        with tempfile.TemporaryDirectory() as dump:
            flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
            command = [sys.executable, __file__, target, "--case", name, "--chip", chip]
            for _ in range(1000):  # libtpu lets one process in at a time: wait for our turn
                run = subprocess.run(
                    command, env=os.environ | dict(LIBTPU_INIT_ARGS=flags), capture_output=True, text=True
                )
                if "lockfile" not in run.stderr:
                    break
                time.sleep(1)
            found = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                lines = [x for x in run.stderr.splitlines() if "Error" in x] or run.stderr.splitlines() or ["no output"]
                out[name] = dict(error=lines[-1][:300])
                continue
            kernels = {}
            for path in sorted(pathlib.Path(dump).glob("*final_bundles.txt")):
                kernel = re.sub(r"^\d+-|-\d+-.*$", "", path.name)
                if "schedule-analysis" not in path.name and not re.match(NOT_KERNELS, kernel):
                    kernels[kernel] = cycles(path.read_text(errors="replace"))
            out[name] = dict(cycles=sum(kernels.values()), kernels=kernels, **json.loads(found[-1][7:]))
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="regular expression: cases to measure")
    options = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    if options.case:
        os.environ.update(ENV)
        compile_one(options.target, options.case, options.chip)
        sys.exit()
    for name, row in measure(options.target, options.chip, options.only).items():
        shown = row.get("error") or f"cycles {row['cycles']:>12,}  temp {row['temp_bytes']:>12,}  {row['kernels']}"
        print(f"{name:40s} {shown}")
