"""Boxes as text: four whole numbers, for models that write boxes, such as LocCa (Wan et al. 2024, arXiv:2403.19596).

The order of the numbers and their range are this project's.

box_text((0.0, 0.25, 0.5, 1.0))      "0 125 250 499"
box_of_text("a fox: 0 125 250 499")  (0.0, 0.2505, 0.501, 1.0)
"""

import re
from collections.abc import Sequence

BINS = 500


def box_text(box: Sequence[float], bins: int = BINS) -> str:
    """Returns a box (x0, y0, x1, y1), shares of the picture's width and height, as whole numbers from 0 to bins - 1."""
    return " ".join(str(min(max(round(side * (bins - 1)), 0), bins - 1)) for side in box)


def box_of_text(text: str, bins: int = BINS) -> tuple[float, float, float, float] | None:
    """Returns the box of the first four numbers of a text; None if there are fewer, or they enclose nothing."""
    numbers = [int(n) for n in re.findall(r"\d+", text)[:4]]
    if len(numbers) < 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3] or max(numbers) >= bins:
        return None
    x0, y0, x1, y1 = (n / (bins - 1) for n in numbers)
    return x0, y0, x1, y1
