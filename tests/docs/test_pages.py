"""What the pages say beside their commands: links lead somewhere, names are there, numbers are those of the results."""

import importlib
import json
import re
import statistics

import pytest

from tests.docs.sandbox import ROOT
from vlm_jax.run.chips import CHIPS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S) for page in PAGES}
of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    return [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)", page, re.M)]


@of_pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@of_pages
def test_names_are_there(page):
    makefile = (ROOT / "Makefile").read_text()
    for code in re.findall(r"`([^`\n]+)`", TEXTS[page]):
        if re.fullmatch(r"vlm_jax(\.\w+)+", code):
            value, *names = importlib.import_module("vlm_jax"), *code.split(".")[1:]
            for i, name in enumerate(names, 2):
                if not hasattr(value, name):
                    importlib.import_module(".".join(code.split(".")[:i]))
                value = getattr(value, name)
        if re.match(r"(configs|experiments|vlm_jax|docs|tests|colab)/[\w./-]+$", code) and "NAME" not in code:
            assert (ROOT / code).exists() or code in written(page), code
        if match := re.match(r"make (\w+)", code):
            assert re.search(rf"^{match[1]}:", makefile, re.M), code


def written(page):
    """The files that a page itself writes."""
    return re.findall(r"`([\w./]+)`:$", page.read_text(), re.M)


def rows(page, head):
    """Cells of the table whose first head cell is `head`."""
    table = re.search(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXTS[ROOT / page], re.M)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def results(study):
    return json.loads((ROOT / "experiments" / study / "results.json").read_text())


def test_variants_of_the_configs_are_there():
    for paths, variants, _ in rows("README.md", "config"):
        for path in re.findall(r"`configs/(\w+)\.py`", paths):
            config = importlib.import_module(f"configs.{path}")
            for variant in re.split(r"[;,] | to ", variants):
                if re.fullmatch(r"[\w./]+", variant):
                    config.get_config(variant)


def test_plans_are_those_of_the_study():
    made = {}
    for plan in results("pod_plans"):
        if not plan["flags"]:
            memory, chip = sum(plan["memory"].values()) / 2**30, CHIPS[plan["topology"].split(":")[0]]
            made[plan["config"], plan["topology"]] = [
                f"{plan['fsdp']} x {plan['tensor']}", f"{memory:.1f} of {chip.hbm / 2**30:.0f}", f"{plan['mfu']:.0%}",
                f"{plan['seconds']:.3f}",
            ]  # fmt: skip
    shown = rows("docs/pods.md", "config")
    assert len(shown) == 13
    for config, topology, *cells in shown:
        assert cells == made[config.strip("`"), topology], config


def test_few_shots_are_those_of_the_study():
    found, text = results("few_shot"), " ".join(TEXTS[ROOT / "docs" / "adapt.md"].split())
    names = {
        "linear probe": "linear_probe", "GDA": "gda", "Tip-Adapter-F": "tip_adapter_f", "the last block": "last_1",
        "adapters": "adapter", "LoRA": "lora", "CoOp": "coop",
    }  # fmt: skip
    for name, method in names.items():
        numbers = found[f"16 shots {method}"]
        assert re.search(rf"\b{name}\W+{100 * numbers['top1']:.1f} ± {100 * numbers['spread']:.1f}\b", text)
    assert re.search(rf"\bzero-shot\W+{100 * found['16 shots zero_shot']['top1']:.1f}\b", text)


def test_locked_images_are_those_of_the_study():
    found = results("locked_image_tuning")
    (paragraph,) = [part for part in TEXTS[ROOT / "docs" / "train.md"].split("\n\n") if "locked_image_tuning" in part]
    mean = sum(found[f"Lu, 224 px {seed}"]["unseen style"] for seed in range(3)) / 3
    said = [f"{share:.0%}".replace("%", " %") for share in (mean, found["ridge"]["unseen style"])]
    assert re.findall(r"\d+ %", paragraph) == said


def test_the_demo_names_as_many_as_in_the_study():
    runs = [results("captioning_vs_contrastive")[f"CLIP {seed}"] for seed in range(3)]
    shown = rows("README.md", "on pictures it has not seen")
    for cells, (split, metric) in zip(
        shown, (("unseen_style", "top1"), ("unseen_style", "top5"), ("unseen_concepts", "top1")), strict=True
    ):
        values = [100 * run[split][metric] for run in runs]
        assert cells[1] == ", ".join(f"{value:.1f}" for value in values) + " %"
        assert cells[2] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %"
