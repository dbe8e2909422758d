"""SPDF: sparse pretraining, dense fine-tuning (Thangarasa et al. 2023, arXiv:2303.10464), of UL2's denoisers.

    vlm-jax train --config=spdf:75 --workdir=runs/spdf               # minutes on 2 CPU cores
    vlm-jax train --config=spdf:75-smoke --workdir=runs/spdf_smoke   # seconds: does it run?

The first four fifths of the steps see keywords in six languages, with so many percent of the blocks' kernels at 0,
drawn once; the last fifth sees German ones, and all scalars train. Variants: 0 (dense), 50, 75, or any percent below
100, each also with `-smoke`. `german` and `unseen_concepts` measure perplexity. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs import ul2
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

KERNELS = r".*blocks.*/kernel"


@method(
    family="recipes",
    system="SPDF",
    paper="arXiv:2303.10464",
    differs="a random share of the blocks' kernels is 0 in pretraining; in fine-tuning it trains",
)
def get_config(variant: str = "75") -> ConfigDict:
    percent, _, size = variant.partition("-")
    if not percent.isdigit() or int(percent) > 99 or size not in ("", "smoke"):
        raise UserError(f"there is no variant `{variant}` of this config; expected a percent, 0 to 99, or `75-smoke`")
    config = ul2.get_config(size or "tiny")
    every = ", ".join(f"'keywords/{language}'" for language in ul2.LANGUAGES)
    ops = config.data.ops.replace(every, "'keywords/de'")
    config.evals.german = dict(config.evals.unseen_concepts.to_dict(), ops=ops)
    zeros = ((KERNELS, dict(sparse=int(percent) / 100)), (".*", {}))
    config.stages = (
        dict(share="80%", optimizer=dict(config.optimizer.to_dict(), params=zeros)),
        dict(share="20%", data=dict(config.data.to_dict(), ops=ops)),
    )
    return config
