"""First-match tables over parameter names: `(regex, option)` pairs, used for optimizer groups and for sharding.

A name is the '/'-joined path of a leaf, e.g. `image/blocks_0/attn/query/kernel`. A regex must match the whole name.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns `{name: leaf}` in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def map_with_name(fn: Callable, tree: Any, *rest: Any) -> Any:
    """Like `jax.tree.map`, calling `fn(name, leaf, *rest)`."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(name(path), *leaves), tree, *rest)


def match_rules(
    rules: Sequence[tuple[str, Any]], names: Iterable[str], *, where: str = "params", every_rule_used: bool = True
) -> dict[str, Any]:
    """Returns `{name: option}`; the option is from the first rule that matches the whole name.

    Args:
      rules: `(regex, option)` pairs, most specific first.
      names: '/'-joined parameter names, see `named_leaves`.
      where: name of the table in messages, e.g. "config.optimizer.params".
      every_rule_used: whether an unused rule raises. A last rule `.*` may always be unused.

    Raises:
      UserError: no rule matches a name; a rule matches no name, or earlier rules match all its names; a regex does not
        compile.
    """
    names = list(names)
    patterns = [_compile(regex, where) for regex, _ in rules]
    matched: dict[str, Any] = {}
    used = set()
    for name in names:
        index = next((i for i, pattern in enumerate(patterns) if pattern.fullmatch(name)), None)
        if index is None:
            raise UserError(f"{where}: no rule matches `{name}`; add one or end with `('.*', ...)`")
        matched[name] = rules[index][1]
        used.add(index)
    for i, pattern in enumerate(patterns):
        catch_all = i == len(patterns) - 1 and pattern.pattern == ".*"
        if i in used or catch_all or not every_rule_used:
            continue
        hidden = next((name for name in names if pattern.fullmatch(name)), None)
        if hidden is not None:
            winner = next(p.pattern for p in patterns if p.fullmatch(hidden))
            raise UserError(
                f"{where}: the rule `{pattern.pattern}` has no effect, `{winner}` above matches `{hidden}`; "
                f"move `{pattern.pattern}` up or remove it"
            )
        close = difflib.get_close_matches(pattern.pattern, names, n=1, cutoff=0.0)
        nearest = f"; the nearest name is `{close[0]}`" if close else ""
        raise UserError(
            f"{where}: the rule `{pattern.pattern}` matches no parameter (it must match the whole name){nearest}"
        )
    return matched


def _compile(regex: str, where: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise UserError(f"{where}: `{regex}` is not a regular expression: {error}") from None


def format_table(params: Any, groups: Mapping[str, str], shardings: Any = None) -> str:
    """Returns a table of the parameters as text: name, shape, group, sharding, count, and totals.

    Args:
      params: parameter tree, arrays or shapes.
      groups: `{name: group}` as returned by `optim.build`; "frozen..." and "..., <count> frozen" enter the totals.
      shardings: tree like `params`, of NamedShardings.
    """
    leaves = named_leaves(params)
    specs = {name: str(tuple(s.spec)) for name, s in named_leaves(shardings).items()} if shardings is not None else {}
    counts = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
    cells = [("name", "shape", "group", "sharding", "count")]
    for name, leaf in leaves.items():
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        cells.append((name, shape, groups[name], specs.get(name, ""), f"{counts[name]:,}"))
    total = sum(counts.values())
    part = {name: re.search(r", ([\d,]+) frozen$", groups[name]) for name in counts}
    frozen = sum(count for name, count in counts.items() if groups[name].startswith("frozen"))
    frozen += sum(int(match[1].replace(",", "")) for match in part.values() if match)
    cells.append((f"{len(leaves)} arrays", "", f"{total - frozen:,} trained, {frozen:,} frozen", "", f"{total:,}"))
    *left, right = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = lambda line: [*(cell.ljust(width) for cell, width in zip(line, left, strict=False)), line[-1].rjust(right)]
    lines = ["  ".join(pad(line)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def check_alike(first: Any, *others: Any) -> None:
    """Raises a UserError if trees differ in a name, shape or dtype; the error names the first parameter."""
    for other in others:
        check_names(first, other)
        leaves = named_leaves(other)
        for name, leaf in named_leaves(first).items():
            if kind(leaf) != kind(leaves[name]):
                raise UserError(
                    f"the trees differ: `{name}` is {kind(leaf)} in one and {kind(leaves[name])} in another; "
                    "expected parameters of one model"
                )


def check_names(first: Any, other: Any) -> None:
    """Raises a UserError if only one of two trees has a parameter; the error names the first."""
    one, two = named_leaves(first), named_leaves(other)
    for name in (*one, *two):
        if name not in one or name not in two:
            raise UserError(
                f"the trees differ: `{name}` is in one and not in another; expected parameters of one model"
            )


def kind(leaf: Any) -> str:
    """Returns dtype and shape of an array, `float32[3, 4]`."""
    return f"{jnp.dtype(leaf.dtype)}{list(leaf.shape)}"
