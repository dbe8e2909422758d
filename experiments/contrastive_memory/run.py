"""Memory and time of a contrastive loss and its gradients, against the batch.

    python experiments/contrastive_memory/measure.py

See README.md here.
"""

import argparse
import functools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("naive softmax", "blockwise softmax", "naive sigmoid", "blockwise sigmoid")
ON_POD = ("naive softmax", "gathered softmax", "ring softmax", "naive sigmoid", "rotated sigmoid", "ring sigmoid")
CHIPS, POD_WIDTH = 256, 1152
POD = dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)


def losses():
    """Name -> loss(x, y, scale, bias), with mesh= for several devices.

    naive: the papers' pseudo-code. gathered: open_clip's `ClipLoss(local_loss=True, gather_with_grad=True)`, logits
    [B / n, B] on each of n devices, twice. rotated: open_clip's `SigLipLoss`, texts passed on, a block [B / n, B / n]
    at a time, differentiated by the framework. blockwise and ring: this project's.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from vlm_jax.kernels import contrastive

    def naive_softmax(x, y, scale, bias):
        logits = scale * jnp.matmul(x, y.T, precision="highest")
        both = jax.nn.logsumexp(logits, 1).mean() + jax.nn.logsumexp(logits, 0).mean()
        return both / 2 - jnp.diagonal(logits).mean()

    def naive_sigmoid(x, y, scale, bias):
        logits = scale * jnp.matmul(x, y.T, precision="highest") + bias
        return -jax.nn.log_sigmoid((2 * jnp.eye(len(x)) - 1) * logits).sum() / len(x)

    def on_devices(loss):
        """The mean of `loss` of each device's share."""

        def mean(x, y, scale, bias, mesh):
            share = lambda *arrays: jax.lax.pmean(loss(*arrays), "data")
            specs = (PartitionSpec("data"),) * 2 + (PartitionSpec(),) * 2
            run = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
            return run(x, y, scale, bias)

        return mean

    def gathered_softmax(x, y, scale, bias):
        own = jax.lax.axis_index("data") * len(x) + jnp.arange(len(x))

        def cross_entropy(x, y):
            logits = scale * jnp.matmul(x, jax.lax.all_gather(y, "data", tiled=True).T, precision="highest")
            return (jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, own[:, None], 1)[:, 0]).mean()

        return (cross_entropy(x, y) + cross_entropy(y, x)) / 2

    def rotated_sigmoid(x, y, scale, bias):
        devices = jax.lax.axis_size("data")

        def step(y, first):
            logits = scale * jnp.matmul(x, y.T, precision="highest") + bias
            z = jnp.where(first, 2 * jnp.eye(len(x)) - 1, -1)
            value = -jax.nn.log_sigmoid(z * logits).sum() / len(x)
            return jax.lax.ppermute(y, "data", [(i, (i + 1) % devices) for i in range(devices)]), value

        return jax.lax.scan(step, y, jnp.arange(devices) == 0)[1].sum()

    def softmax(x, y, scale, bias, **options):
        row, column = contrastive.pairwise_logsumexp(x, y, scale, **options)
        return (row.mean() + column.mean()) / 2 - scale * jnp.sum(x.astype(jnp.float32) * y, 1).mean()

    def sigmoid(x, y, scale, bias, **options):
        return contrastive.pairwise_sigmoid_loss(x, y, scale, bias, **options)

    return {
        "naive softmax": naive_softmax,
        "naive sigmoid": naive_sigmoid,
        "gathered softmax": on_devices(gathered_softmax),
        "rotated sigmoid": on_devices(rotated_sigmoid),
        "blockwise softmax": lambda *a: softmax(*a, implementation="blockwise"),
        "blockwise sigmoid": lambda *a: sigmoid(*a, implementation="blockwise"),
        "ring softmax": softmax,
        "ring sigmoid": sigmoid,
    }


def child(program, batch, width, repeats):
    """One program in a fresh process; prints a row."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = []
    for _ in "xy":
        z = rng.standard_normal((batch, width), np.float32)
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        arrays.append(jax.device_put(z))
    arrays += [np.float32(20), np.float32(-10)]
    step = jax.jit(jax.value_and_grad(losses()[program], (0, 1, 2, 3))).lower(*arrays).compile()
    del z
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    value, _ = jax.block_until_ready(step(*arrays))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arrays))
        seconds.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    row = dict(
        program=program, batch=batch, width=width, loss=float(value), seconds=min(seconds), peak_bytes=peak(),
        step_bytes=peak() - before, temp_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes,
    )  # fmt: skip
    print("ROW " + json.dumps(row))


def pod(program, batch, width, dtype):
    """One program compiled ahead of time for 256 chips; prints a row. What does not fit says how much it needs."""
    os.environ.update(POD)
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from vlm_jax.kernels import contrastive

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16")
    mesh = topologies.make_mesh(topology, (CHIPS,), ("data",))
    struct = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )
    loss = losses()[program]
    if not program.startswith("naive"):
        loss = functools.partial(loss, mesh=mesh)
    arrays = [struct((batch, width), dtype, "data")] * 2 + [struct((), "float32")] * 2
    row = dict(program=program, batch=batch, width=width, dtype=dtype, chips=CHIPS)
    if program.startswith("ring"):
        row["implementation"] = contrastive.explain(*arrays[:2], mesh=mesh).implementation
    try:
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*arrays).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds", str(error))
        if not needed:
            raise
        row |= dict(temp_bytes=float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])), fits=False)
    else:
        text = compiled.as_text()
        row |= dict(
            temp_bytes=compiled.memory_analysis().temp_size_in_bytes, fits=True,
            asynchronous=len(re.findall(r" collective-permute-start\(", text)),
            waiting=len(re.findall(r" collective-permute\(", text)),
        )  # fmt: skip
    print("ROW " + json.dumps(row))


def run(kind, program, batch, width, python=sys.executable, **options):
    """The row of a child process; None where it failed."""
    options = [f"--{name}={value}" for name, value in options.items()]
    command = [python, __file__, f"--{kind}={program}", f"--width={width}", f"--batches={batch}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        print(kind, program, batch, "failed:", done.stderr.strip().splitlines()[-1][:300], flush=True)
        return None
    return json.loads(rows[-1][4:])


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colours = {"softmax": "tab:blue", "sigmoid": "tab:orange"}
    panels = (
        ("program_bytes", 2**20, "arguments + results + temporaries, MB", "one CPU device"),
        ("seconds", 1, "seconds, forward + backward", "2-core CPU"),
        ("temp_bytes", 2**20, "temporaries per chip, MB", "v5e:16x16, D = 1152 (x: does not fit)"),
    )
    styles = dict(naive="--", gathered="-.", rotated="-.", blockwise="-", ring="-")
    for i, (axis, (key, unit, label, title)) in enumerate(zip(axes, panels, strict=True)):
        here = [row for row in rows if ("chips" in row) == (i == 2) and row.get("dtype") != "bfloat16"]
        for program in dict.fromkeys(row["program"] for row in here):
            form, penalty = program.split()
            points = sorted((r["batch"], r[key] / unit, r.get("fits", True)) for r in here if r["program"] == program)
            batch, value, fits = zip(*points, strict=True)
            axis.plot(batch, value, styles[form], color=colours[penalty], label=program)
            for marker, shown in ((".", True), ("x", False)):
                at = [j for j, fit in enumerate(fits) if fit == shown]
                axis.plot([batch[j] for j in at], [value[j] for j in at], marker, color=colours[penalty])
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel=label, title=title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child")
    parser.add_argument("--pod")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batches", default="1024,2048,4096,8192,16384")
    parser.add_argument("--pod-batches", default="32768,262144,1048576")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each program at the largest batch")
    parser.add_argument("--pod-python", help="a Python with jax and libtpu: adds the pod's rows")
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",") if batch]
    if options.child:
        return child(options.child, batches[0], options.width, options.repeats)
    if options.pod:
        return pod(options.pod, batches[0], options.width, options.dtype)
    results = HERE / "results.json"
    of = lambda row: (row["program"], row["batch"], row.get("dtype"))  # only the pod's rows have a dtype
    rows = {of(row): row for row in json.loads(results.read_text())} if results.exists() else {}
    for batch in batches:
        turns = {program: [] for program in PROGRAMS}
        for _ in range(options.rounds if batch == batches[-1] else 1):
            for program in PROGRAMS:
                turns[program].append(run("child", program, batch, options.width, repeats=options.repeats))
        for found in turns.values():
            row = found[0] | {"seconds": statistics.median(row["seconds"] for row in found)}
            rows[of(row)] = row
            print(json.dumps(row), flush=True)
    if options.pod_python:
        for batch in map(int, options.pod_batches.split(",")):
            for program in ON_POD:
                for dtype in ("float32", "bfloat16") if program.startswith("ring") else ("float32",):
                    row = run("pod", program, batch, POD_WIDTH, options.pod_python, dtype=dtype)
                    if row:
                        rows[of(row)] = row
                        print(json.dumps(row), flush=True)
    rows = list(rows.values())
    results.write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, HERE / "contrastive_memory.png")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    main()
