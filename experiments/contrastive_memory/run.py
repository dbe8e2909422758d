"""Measures memory and time of contrastive losses and their gradients, against the batch. See README.md here."""

import argparse
import functools
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time

from experiments import study  # import nothing large here: a child's peak memory starts at its parent's

PROGRAMS = ("naive softmax", "blockwise softmax", "naive sigmoid", "blockwise sigmoid")
BATCHES, WIDTH = (1024, 2048, 4096, 8192, 16384), 512
ON_POD = (
    "naive softmax", "gathered softmax", "ring softmax", "looped softmax",
    "naive sigmoid", "rotated sigmoid", "ring sigmoid", "looped sigmoid",
)  # fmt: skip
CHIPS, POD_BATCHES, POD_WIDTH = 256, (32768, 262144, 1048576), 1152
KERNEL_BOUND = {"forward": 294_912, "forward + backward": 1_179_648}  # cycles of the matrix units: cases.py
POD = dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)


def losses():
    """Name -> loss(x, y, scale, bias), with mesh= for several devices.

    naive: the papers' pseudo-code. gathered: open_clip's `ClipLoss(local_loss=True, gather_with_grad=True)`, logits
    [B / n, B] on each of n devices, twice. rotated: open_clip's `SigLipLoss`, which passes texts on, a block
    [B / n, B / n] at a time, with the framework's gradient. This project's: blockwise, ring, looped (a ring without the
    TPU kernel).
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
        "looped softmax": functools.partial(softmax, implementation="blockwise"),
        "looped sigmoid": functools.partial(sigmoid, implementation="blockwise"),
    }


def child(program, batch, width, repeats):
    """Runs one program in this fresh process; prints a row."""
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
    """Compiles one program for 256 chips; prints a row, with the memory needed if the program does not fit."""
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


def run(kind, program, batch, width, **options):
    """Returns the row of a child process; None if the process failed."""
    options = [f"--{name}={value}" for name, value in options.items()]
    module = ["-m", "experiments.contrastive_memory.run"]
    command = [sys.executable, *module, f"--{kind}={program}", f"--width={width}", f"--batch={batch}", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    print(kind, program, batch, rows[-1] if rows else f"failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
    return json.loads(rows[-1][4:]) if rows else None


def on_cpu(rounds, repeats):
    """Rows of all programs; at each batch the programs take turns, `rounds` turns at the largest batch."""
    rows = []
    for batch in BATCHES:
        turns = {program: [] for program in PROGRAMS}
        for _ in range(rounds if batch == BATCHES[-1] else 1):
            for program in PROGRAMS:
                turns[program].append(run("child", program, batch, WIDTH, repeats=repeats))
        for found in turns.values():
            rows.append(found[0] | {"seconds": statistics.median(row["seconds"] for row in found)})
    return rows


def on_pod():
    rows = []
    for batch in POD_BATCHES:
        for program in ON_POD:
            if program.startswith("looped") and batch != POD_BATCHES[-1]:
                continue
            for dtype in ("float32", "bfloat16") if program.startswith(("ring", "looped")) else ("float32",):
                rows.append(run("pod", program, batch, POD_WIDTH, dtype=dtype))
    return [row for row in rows if row]


def step():
    """Returns memory and traffic of `vlm_jax.plan` for CLIP B/32 at a batch of 32,768 on v5e:8x8."""
    command = [sys.executable, "-m", "vlm_jax.plan", "--config=configs/clip.py:B/32", "--topology=v5e:8x8", "--json"]
    done = subprocess.run([*command, "--config.mesh.fsdp=8"], stdout=subprocess.PIPE, text=True, check=True)
    plan = json.loads(done.stdout)
    permutes = [one for one in plan["collectives"] if one["kind"] == "collective-permute"]
    sent = lambda beside: sum(one["bytes"] for one in permutes if one["asynchronous"] == beside)
    return dict(memory=plan["memory"], fits=plan["fits"], sent_beside_work=sent(True), sent_waited_for=sent(False))


def table(results):
    cpu = {(row["program"], row["batch"]): row for row in results["cpu"]}
    mb = lambda value, digits=0: f"{value / 2**20:,.{digits}f}"
    cell = lambda row: f"{mb(row['program_bytes'])} / {row['seconds']:.{2 if row['batch'] > 1024 else 3}f}"
    rows = [[f"{batch:,}", *(cell(cpu[program, batch]) for program in PROGRAMS)] for batch in BATCHES]
    blocks = [study.markdown(["MB / seconds at a batch of", *PROGRAMS], rows)]

    rows = []
    for penalty in ("softmax", "sigmoid"):
        naive, ours = (cpu[f"{form} {penalty}", BATCHES[-1]] for form in ("naive", "blockwise"))
        part = lambda key, naive=naive, ours=ours: f"1/{naive[key] / ours[key]:.1f}"
        grows = f"{mb(ours['step_bytes'])} and {mb(naive['step_bytes'])} MB"
        shares = part("program_bytes"), part("step_bytes"), grows, part("peak_bytes")
        rows.append([penalty, f"{ours['seconds'] / naive['seconds']:.2f}", *shares])
    head = "time", "program's memory", "growth of the process", "which is", "its peak, Python and JAX included"
    blocks.append(study.markdown([f"blockwise of naive, at {BATCHES[-1]:,}", *head], rows))

    pod, rows = {}, []
    for row in results["pod"]:
        pod.setdefault((row["program"], row["dtype"]), {})[row["batch"]] = row
    for (program, dtype), of in pod.items():
        ours = program.startswith(("ring", "looped"))
        digits = 1 if ours else 0
        fit = lambda row, digits=digits: mb(row["temp_bytes"], digits) + ("" if row["fits"] else ", does not fit")
        last = [row for row in of.values() if row["fits"]][-1]
        sends = f"{last['asynchronous']} / {last['waiting']}" if last["asynchronous"] or last["waiting"] else ""
        cells = [fit(of[batch]) if batch in of else "" for batch in POD_BATCHES]
        rows.append([f"{program}, {dtype}" if ours else program, *cells, sends])
    head = [f"{batch:,}" for batch in POD_BATCHES]
    blocks.append(study.markdown(["MB of temporaries", *head, "permutes: asynchronous / waiting"], rows))

    rows = []
    for penalty, of in results["kernel"].items():
        rows.append(
            [penalty, *(f"{of[p]['cycles']:,} ({of[p]['cycles'] / KERNEL_BOUND[p]:.2f}x)" for p in KERNEL_BOUND)]
        )
    rows.append(["bound", *(f"{bound:,}" for bound in KERNEL_BOUND.values())])
    blocks.append(study.markdown(["cycles of the TPU kernel", *KERNEL_BOUND], rows))

    of = results["step"]
    row = [*(mb(value) for value in of["memory"].values()), "yes" if of["fits"] else "no"]
    sends = f"{mb(of['sent_beside_work'], 1)} + {mb(of['sent_waited_for'], 1)}"
    head = "MB of a chip", *of["memory"], "fits", "the ring sends: beside work + waited for"
    blocks.append(study.markdown(head, [["CLIP B/32", *row, sends]]))
    return "\n\n".join(blocks)


def plot(results):
    figure, axes = study.subplots(1, 3, size=(13, 4))
    panels = (
        ("cpu", "program_bytes", 2**20, "arguments + results + temporaries, MB", "One CPU device"),
        ("cpu", "seconds", 1, "seconds, forward + backward", "Two CPU cores"),
        ("pod", "temp_bytes", 2**20, "temporaries of a chip, MB", "v5e:16x16, D = 1152, cross: does not fit"),
    )
    strokes = dict(naive="--", gathered=":", rotated=":", blockwise="-", ring="-")
    for axis, (where, key, unit, label, title) in zip(axes, panels, strict=True):
        lines = {}
        for row in results[where]:
            if row.get("dtype") != "bfloat16" and not row["program"].startswith("looped"):
                lines.setdefault(row["program"], []).append((row["batch"], row[key] / unit, row.get("fits", True)))
        for program, points in lines.items():
            form, penalty = program.split()
            softmax = penalty == "softmax"
            style = dict(color=study.INK, zorder=3) if softmax else dict(color=study.SHADES[1], linewidth=3)
            batch, value, fits = zip(*sorted(points), strict=True)
            axis.plot(batch, value, strokes[form], label=program, **style)
            for fit, marker in ((True, "o" if softmax else "s"), (False, "X")):
                at = [i for i, found in enumerate(fits) if found == fit]
                x, y = [batch[i] for i in at], [value[i] for i in at]
                axis.plot(x, y, marker, color=style["color"], markersize=(4 if softmax else 6) if fit else 9, zorder=3)
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel=label, title=title)
        axis.set_xscale("log", base=2)
        if where == "pod":
            axis.set_ylim(bottom=0.01)  # room for the legend
            axis.axhline(256, color=study.GREY, linewidth=1, label="wanted, at most")
        axis.legend(fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--child", "--pod", "--dtype"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--batch", "--width"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each program at the largest batch")
    parser.add_argument(
        "--parts", default="cpu,pod,kernel,step", help="what is measured again; all but cpu need libtpu"
    )
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.batch, options.width, options.repeats)
    if options.pod:
        return pod(options.pod, options.batch, options.width, options.dtype)
    parts, results = options.parts.split(","), study.read("contrastive_memory", {})
    if not importlib.util.find_spec("libtpu"):
        print("libtpu is not installed: the CPU alone (pip install 'vlm_jax[tpu]')")
        parts = ["cpu"]
    if "cpu" in parts:
        results["cpu"] = on_cpu(options.rounds, options.repeats)
    if "pod" in parts:
        results["pod"] = on_pod()
    if "step" in parts:
        results["step"] = step()
    if "kernel" in parts:
        from experiments.kernel_schedules import tpu_cycles

        target = "experiments.contrastive_memory.cases"
        results["kernel"] = {name: tpu_cycles.measure(f"{target}:{name}", "v5e") for name in ("softmax", "sigmoid")}
    study.save("contrastive_memory", results)
    study.publish("contrastive_memory", table, plot)


if __name__ == "__main__":
    main()
