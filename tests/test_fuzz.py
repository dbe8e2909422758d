"""Every kind of input, damaged: it is used, or refused by a UserError. `make fuzz` runs 5,000 mutations of each."""

import pytest

from tests.support import fuzz_families
from tests.support.fuzz import fuzz
from tests.support.fuzz_checkpoints import SEEDS
from tests.support.fuzz_kinds import KINDS

MUTATIONS = 200
SLOW = {"curves": 4, "checkpoint": 30, "workdir_config": 60, "tfds_info": 60, "tfds_features": 60, "tfds_shard": 40}
SLOW |= dict.fromkeys(("shards_index.json", "shards_shards", "shards_bounds", "shards_members", "array_record"), 25)
SLOW |= dict.fromkeys(fuzz_families.KINDS, 4)  # of 36 kinds
ELSEWHERE = SEEDS  # 200 of each in tests/zoo/readers/test_fuzz_files.py


@pytest.mark.parametrize("name", fuzz_families.FAMILIES)
def test_undamaged_families_are_read(name, tmp_path):
    """What the originals save: each tensor has its place."""
    fuzz_families.write(name, tmp_path)
    fuzz_families.use(name, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ELSEWHERE])
def test_a_damaged_input_is_used_or_refused(kind, tmp_path):
    faults = fuzz(kind, tmp_path, SLOW.get(kind, MUTATIONS))
    assert not faults, "\n".join(faults[:10])
