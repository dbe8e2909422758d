"""Every kind of input, damaged: it is used, or refused by a UserError. `make fuzz` runs 5,000 mutations of each."""

import pytest

from tests.support.fuzz import fuzz
from tests.support.fuzz_checkpoints import SEEDS
from tests.support.fuzz_kinds import KINDS

MUTATIONS = 200
SLOW = {"curves": 4, "checkpoint": 30, "workdir_config": 60, "tfds_info": 60, "tfds_features": 60, "tfds_shard": 40}
ELSEWHERE = SEEDS  # 200 of each in tests/zoo/readers/test_fuzz_files.py
AWAITED = {
    "jsonl", "csv", "tar", "precomputed_index", "precomputed_shard", "tfds_info", "tfds_features", "tfds_shard", "uri",
    "classes_txt", "classes_json", "templates",
}  # fmt: skip


def marked(kind):
    mark = pytest.mark.xfail(reason="the source raises errors of its own", run=False)
    return pytest.param(kind, marks=mark if kind in AWAITED else ())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [marked(kind) for kind in KINDS if kind not in ELSEWHERE])
def test_a_damaged_input_is_used_or_refused(kind, tmp_path):
    faults = fuzz(kind, tmp_path, SLOW.get(kind, MUTATIONS))
    assert not faults, "\n".join(faults[:10])
