"""The kinds of released families for `fuzz_kinds`: small configs and headers of weights, as the originals save them."""

import json
import math

from tests.support.paths import GOLDEN
from vlm_jax.zoo import recognize

FAMILIES = json.loads((GOLDEN / "families.json").read_text())
HEADER = "header.json"


def write(name, folder, damage=HEADER):
    """Writes a family's folder, with the header of its weights apart; returns the name of the file to damage."""
    config_name, config, _, shapes = FAMILIES[name]
    (folder / config_name).write_text(json.dumps(config))
    header, end = {}, 0
    for tensor, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[tensor] = dict(dtype="F16", shape=shape, data_offsets=[begin, end])
    (folder / HEADER).write_text(json.dumps(header))
    return damage


def use(name, folder):
    """Writes the weights, zeros below the header, recognises the folder, and finds a place for each tensor."""
    *_, weights, shapes = FAMILIES[name]
    header = (folder / HEADER).read_bytes()
    with open(folder / weights, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * sum(map(math.prod, shapes.values())))
    recognize.understand(folder).match()


KINDS = {
    f"{name}_{part}": (
        lambda folder, name=name, damage=damage: write(name, folder, damage),
        lambda folder, name=name: use(name, folder),
    )
    for name, (config, *_) in FAMILIES.items()
    for part, damage in (("config", config), ("weights", HEADER))
}
