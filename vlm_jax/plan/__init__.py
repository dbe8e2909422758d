"""Plans a run before a slice is booked: does it fit, how fast can it be, what do the chips say to each other.

    python -m vlm_jax.plan --config=configs/ul2.py:20b --topology=v5p:4x8x8 --config.mesh.fsdp=64 --config.mesh.tensor=4
    python -m vlm_jax.plan --config=configs/clip.py:L/14 --topology=v5e:16x16 --search

Compiles the train step that `vlm_jax.train` would run, for chips that are not there (needs `pip install 'vlm_jax[tpu]'`
and no TPU; for --topology=h100:1x1x8 'vlm_jax[cuda]' and no GPU), and prints what it takes of a chip's memory, its
FLOPs, its collectives, and lower bounds on its time.
`--search` tries meshes, remat and accumulation for the fastest that fits.
"""
