import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.errors import UserError
from vlm_jax.params.table import format_table, map_with_name, match_rules, named_leaves

PARAMS = {
    "image": {"head": {"kernel": jax.ShapeDtypeStruct((32, 16), jnp.float32)}},
    "txt": {"head": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32), "bias": jnp.zeros(16)}},
    "logit_scale": jnp.zeros(()),
}
NAMES = ["image/head/kernel", "logit_scale", "txt/head/bias", "txt/head/kernel"]


def test_names():
    assert list(named_leaves(PARAMS)) == NAMES
    assert map_with_name(lambda name, _: name, PARAMS)["txt"]["head"]["bias"] == "txt/head/bias"


def test_the_first_match_of_the_whole_name_wins():
    rules = [("image/.*", 1), (".*/kernel", 2), ("logit_scale|.*/bias", 3)]
    assert match_rules(rules, NAMES) == dict(zip(NAMES, (1, 3, 3, 2), strict=True))
    assert match_rules([*rules, (".*", 4)], NAMES) == match_rules(rules, NAMES)  # a catch-all may be left over


@pytest.mark.parametrize(
    "rules, message",
    [
        ([(".*/kernel", 0), ("logit_scale", 0)], r"matches `txt/head/bias`; add one or end with `\('\.\*', \.\.\.\)`"),
        ([("text/.*", 0), (".*", 0)], r"the rule `text/\.\*` matches no parameter"),
        ([("head/kernel", 0), (".*", 0)], r"must match the whole name\); the nearest name is `txt/head/kernel`"),
        ([("txt/.*", 0), ("txt/head/bias", 1), (".*", 2)], r"`txt/head/bias` has no effect, `txt/\.\*` above"),
        ([("image/(", 0), (".*", 0)], r"config.sharding: `image/\(` is not a regular expression"),
    ],
)  # fmt: skip
def test_mistakes_are_named(rules, message):
    with pytest.raises(UserError, match=message) as error:
        match_rules(rules, NAMES, where="config.sharding")
    assert "\n" not in str(error.value)


def test_a_general_table_may_have_unused_rules():
    assert match_rules([("text/.*", 0), (".*", 1)], NAMES, every_rule_used=False) == dict.fromkeys(NAMES, 1)


def test_table():
    groups = dict(zip(NAMES, ("frozen", "lr x1, wd x0", "lr x1, wd x0", "lr x1, wd x1"), strict=True))
    mesh = jax.make_mesh((8,), ("fsdp",))
    shardings = map_with_name(
        lambda name, x: NamedSharding(mesh, PartitionSpec(*("fsdp",) * ("kernel" in name))), PARAMS
    )
    lines = format_table(PARAMS, groups, shardings).splitlines()
    assert lines[2].split() == ["image/head/kernel", "32x16", "frozen", "('fsdp',)", "512"]
    assert lines[3].split() == ["logit_scale", "scalar", "lr", "x1,", "wd", "x0", "()", "1"]
    assert lines[-1].split() == ["4", "arrays", "145", "trained,", "512", "frozen", "657"]
    assert len({len(line) for line in lines}) == 1
    assert "('fsdp',)" not in format_table(PARAMS, groups)
