"""vlm-jax COMMAND ...: the same as python -m vlm_jax.COMMAND ..."""

import os
import runpy
import sys

COMMANDS = {
    "train": "train an experiment:  vlm-jax train --config=configs/clip.py:tiny --workdir=runs/tiny",
    "evaluate": "evaluate a model:     vlm-jax evaluate --model=runs/tiny --task=zeroshot --data=... --out=runs/eval",
    "adapt": "to a few pictures:    vlm-jax adapt --model=runs/tiny --method=lora --data=... --shots=16 --out=...",
    "plan": "does it fit a pod:    vlm-jax plan --config=configs/ul2.py:20b --topology=v6e:16x16",
    "precompute": "embed pictures once:  vlm-jax precompute --config=configs/lit.py:tiny --data=... --out=...",
    "convert": "between projects:     vlm-jax convert SRC DST --format=hf, or to look: vlm-jax convert --inspect SRC",
    "data.train_tokenizer": "learn a tokenizer:    vlm-jax data.train_tokenizer --uri=... --fields=... --out=...",
    "data.emoji.build": "remake the embedded data set",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: vlm-jax COMMAND ...\n\n" + "\n".join(f"  {name:22}{what}" for name, what in COMMANDS.items()))
        sys.exit(len(sys.argv) >= 2 and sys.argv[1] not in ("--help", "-h", "help") and 2)
    sys.path.insert(0, os.getcwd())  # as python -m does: a config file may import its neighbours
    command = sys.argv.pop(1)
    runpy.run_module(f"vlm_jax.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
