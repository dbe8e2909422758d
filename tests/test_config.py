from collections.abc import Sequence

import numpy as np
import pytest

from vlm_jax import config
from vlm_jax.errors import UserError


def build(width, *, depth=2):
    return width, depth


def test_a_section_is_the_keyword_arguments():
    assert config.call(build, {"width": 3}, "config.model") == (3, 2)
    assert config.call(build, {"depth": 4}, "config.model", width=1) == (1, 4)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"width": 1, "dept": 3}, r"^config.model has no key `dept`; did you mean `depth`\?$"),
        ({"width": 1, "zzz": 3}, r"^config.model has no key `zzz`; known keys: width, depth$"),
        ({}, r"^config.model lacks the key `width`, which has no default$"),
    ],
)
def test_wrong_keys_are_named(section, message):
    with pytest.raises(UserError, match=message):
        config.call(build, section, "config.model")


def test_a_public_function_names_its_arguments():
    wide = config.checked(build)
    assert wide(1, depth=3) == (1, 3)
    for mistake, message in (
        (lambda: wide(1, dept=3), r"^`build`: .* unexpected keyword argument `dept`; did you mean `depth`\?$"),
        (lambda: wide(1, zzz=3), r"^`build`: .* `zzz`; its arguments: width, depth$"),
        (lambda: wide(), r"^`build`: missing a required argument: `width`"),
        (lambda: wide(1, 2), r"^`build`: too many positional arguments"),
    ):
        with pytest.raises(UserError, match=message):
            mistake()


def test_a_number_is_no_text():
    def sized(width: int, rate: float | None = None, sides: Sequence[int] = (), name: int | str = 1):
        return width

    for section in ({"width": 3.0, "rate": 1}, {"width": np.int64(3), "rate": None, "sides": [3], "name": "a"}):
        assert config.call(sized, section, "config.model") == 3
    for section, message in (({"width": "a"}, "width='a' should be a whole"), ({"width": 1, "rate": [2]}, "a number")):
        with pytest.raises(UserError, match=message):
            config.call(sized, section, "config.model")


def test_the_least_number_is_told():
    config.check_least(1, "config", depth=1, width=None, mlp="moe")
    for value in (0, -1.5, float("nan")):
        with pytest.raises(UserError, match=rf"^config\.depth is {value!r}; expected 1 or more$"):
            config.check_least(1, "config", width=1, depth=value)


def test_a_fixed_argument_is_not_the_configs():
    with pytest.raises(UserError, match="no key `width`"):
        config.call(build, {"width": 1}, "config.model", width=2)


def test_flatten_and_plain():
    assert config.flatten({"a": {"b": 1}, "c": [2]}) == {"a.b": 1, "c": [2]}
    assert config.plain({"a": (1, 2)}) == {"a": [1, 2]}
