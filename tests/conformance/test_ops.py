"""What every declared op has to do: it enters by being declared, with the ops of an example in `needs`."""

import pickle

import numpy as np
import pytest

from vlm_jax import catalogue
from vlm_jax.data import ops, rows
from vlm_jax.data.sources import open_source
from vlm_jax.data.tokenizers import build

RECORDS = 12
TOKENIZER = build("emoji")


@pytest.fixture(scope="module")
def source():
    return open_source("scenes:?size=32&objects=1-3", "train")


@pytest.fixture(scope="module")
def records(source):
    return [source[i] for i in range(RECORDS)]


def plain(example):
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in example.items()}


@pytest.mark.parametrize("declaration", catalogue.of("ops").values(), ids=lambda d: d.name)
def test_op(declaration, source, records):
    """A pure function of record and generator, of what its strings name; examples of one shape; picklable."""
    string = declaration.needs["data.ops"]
    assert declaration.name in string
    pipeline = ops.parse(string, TOKENIZER)
    again = pickle.loads(pickle.dumps(ops.parse(f"{string} | keep('text')", TOKENIZER)))
    narrow = source.narrow(again.paths)
    made = []
    for i, record in enumerate(records):
        before = pickle.dumps(record)
        one, same = (plain(pipeline(record, np.random.default_rng(i))) for _ in range(2))
        assert one == same and pickle.dumps(record) == before
        assert one["text"] == again(narrow[i], np.random.default_rng(i))["text"]
        made.append(pipeline(record, np.random.default_rng(i)))
    own = [{key: value for key, value in one.items() if key not in records[0]} for one in made]
    fields = rows.fields_of(own, texts=True)
    for one in own:
        rows.check(one, fields)
    random = [step.random for step in (*pipeline.before, *pipeline.after)]
    if any(random):
        assert any(
            plain(pipeline(record, np.random.default_rng(1))) != plain(pipeline(record, np.random.default_rng(2)))
            for record in records
        )
