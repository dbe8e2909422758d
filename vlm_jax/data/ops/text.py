"""Text ops: choose a caption, fill a template, make tokens, hide spans."""

import contextlib
import functools
import string
from typing import Annotated, Any, Literal

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data import class_lists, spans
from vlm_jax.data.ops.pipeline import Pipeline
from vlm_jax.data.ops.registry import Length, Number, op
from vlm_jax.data.source import BadExample, field
from vlm_jax.data.tokenizers import clip
from vlm_jax.errors import UserError


def _text(value: str, path: str) -> str:
    text = value.strip()
    if not text:
        raise BadExample(f"caption `{path}` is empty", "text")
    return text


def texts_of(value: Any, path: str) -> list[str]:
    """The non-empty texts of a field: a text or a list of texts."""
    if not isinstance(value, str | bytes | list | tuple):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise BadExample(f"caption `{path}` is {what}; expected a text or a list of texts", "text")
    values = [value] if isinstance(value, str | bytes) else value
    texts = [v.strip() for v in values if isinstance(v, str) and v.strip()]
    if not texts:
        raise BadExample(f"caption `{path}` is empty", "text")
    return texts


@op
def caption(example: dict, path: str, join: str | None = None, max_texts: int | None = None) -> dict:
    """Sets `text` to the field at `path` ("title", "name/en").

    Args:
      example: holds the field: a text, or a list of texts.
      path: path of the field.
      join: separator that joins the texts of a list; None takes the first text.
      max_texts: joins at most this many of the first texts.
    """
    texts = texts_of(field(example, path), path)
    example["text"] = texts[0] if join is None else join.join(texts[:max_texts])
    return example


@op
def random_caption(
    example: dict,
    rng: np.random.Generator,
    path: str,
    *paths: str,
    weights: tuple[float, ...] | None = None,
    join: str | None = None,
) -> dict:
    """Sets `text` to one of several fields, drawn anew every time.

    Args:
      example: holds the fields: texts, or lists of texts.
      rng: the example's generator.
      path, *paths: the fields to draw from; if the drawn field is absent or empty, the first other field with a text
        counts.
      weights: probability of each field, up to a factor; equal by default.
      join: separator that joins the texts of a list in random order; None draws one text.
    """
    paths = (path, *paths)
    if weights is not None and len(weights) != len(paths):
        raise UserError(f"op `random_caption` has {len(paths)} fields and {len(weights)} weights; expected as many")
    u, order = rng.random(), range(len(paths))
    if weights is None:
        first = int(u * len(paths))
    else:
        first = min(int(np.searchsorted(np.cumsum(weights), u * sum(weights), side="right")), len(paths) - 1)
    for i in (first, *(i for i in order if i != first)):
        try:
            texts = texts_of(field(example, paths[i]), paths[i])
        except BadExample as error:
            reason = error
            continue
        if join is None:
            example["text"] = texts[int(rng.random() * len(texts))]
        else:
            example["text"] = join.join(texts[j] for j in rng.permutation(len(texts)))
        return example
    raise reason


@op
def captions(
    example: dict,
    rng: np.random.Generator,
    n: Number,
    path: str,
    *paths: str,
    ops: Pipeline | None = None,
    to: str = "texts",
    least: Annotated[int, range(1025)] = 1,
) -> dict:
    """Sets `texts` to n texts of the fields at the paths, and `texts_mask` to bool [n]: False where a text is lacking.

    `captions(4, "name/en", "keywords/en") | tokenize(16, key="texts", to="texts")` sets `texts` to int32 [4, 16]; a
    lacking text is empty, all padding.

    Args:
      example: holds the fields: texts, or lists of texts.
      rng: the example's generator.
      n: the number of texts. Of more texts, n different ones are drawn anew every time, in the order of the fields.
      path, *paths: the fields; fields that are absent or empty are passed over, unless all are.
      ops: ops on each text: `ops=lower | template("a photo of a {}.")`.
      to: name of the field that is set, and of its mask with `_mask`.
      least: fewer texts make a bad example; 0 for texts that not every example has, such as hard negatives.
    """
    texts = []
    for place in (path, *paths):
        with contextlib.suppress(BadExample):
            texts += texts_of(field(example, place), place)
    if ops:
        texts = [text for text in (ops({"text": text}, rng)["text"] for text in texts) if text]
    if len(texts) < least:
        count = f"hold {len(texts)} of {least} texts" if texts else "are empty"
        raise BadExample(f"captions {', '.join((path, *paths))} {count}", "text")
    if len(texts) > n:
        texts = [texts[i] for i in sorted(rng.permutation(len(texts))[:n])]
    example[to] = texts + [""] * (n - len(texts))
    example[f"{to}_mask"] = np.arange(n) < len(texts)
    return example


@op
def template(text: str, template: str, *templates: str) -> str:
    """Replaces `{}` of the (first) template by the text: `template("a photo of a {}.")`."""
    return template.replace("{}", text)


@method(
    family="ops",
    system="PAFT",
    paper="arXiv:2502.12859",
    differs="a prompt's template is drawn anew for each example and step, so that no wording is learned",
    needs={"data.ops": "caption('caption') | random_template('imagenet80')"},
)
@op
def random_template(text: str, rng: np.random.Generator, template: str, *templates: str) -> str:
    """Replaces `{}` of a template, drawn at random, by the text.

    `random_template('imagenet80')` draws from packaged templates, see `vlm_jax.data.class_lists.read_templates`.
    """
    templates = prompts_named(template, *templates)
    return templates[int(rng.random() * len(templates))].replace("{}", text)


@op
def random_templates(
    example: dict,
    rng: np.random.Generator,
    n: Number,
    template: str,
    *templates: str,
    key: str = "text",
    to: str = "texts",
) -> dict:
    """Sets `texts` to n prompts of the text at `key`, in different templates drawn at random: a prompt ensemble.

    `texts_mask`, bool [n], is False where there are fewer templates. Templates as of `random_template`.
    """
    text, known = field(example, key), prompts_named(template, *templates)
    drawn = [known[i].replace("{}", _text(text, key)) for i in rng.permutation(len(known))[:n]]
    example[to] = drawn + [""] * (n - len(drawn))
    example[f"{to}_mask"] = np.arange(n) < len(drawn)
    return example


@functools.lru_cache(64)
def prompts_named(*templates: str) -> tuple[str, ...]:
    """Returns the templates, or those of the packaged set or file that a single one names."""
    if len(templates) == 1 and "{}" not in templates[0]:
        return tuple(class_lists.read_templates(templates[0]))
    return templates


@op
def lower(text: str) -> str:
    """Lower-cases the text."""
    return text.lower()


@op
def clean(text: str) -> str:
    """Unescapes HTML, makes quotes and ligatures plain and spaces single, as open_clip does before every tokenizer.

    Mis-decoded text ("CafÃ©") is not repaired.
    """
    return clip.repaired(text)


_PUNCTUATION = str.maketrans("", "", string.punctuation)


@op
def canonicalize(text: str, lower: bool = True, underscore: Literal["space", "drop"] = "space") -> str:
    """Lower-cases, drops ASCII punctuation, makes spaces single: SigLIP's treatment of zero-shot prompts.

    An underscore becomes a space, as in big_vision's `canonicalize_text`: `fire_truck` is two words. With
    `underscore="drop"` it is dropped with the other punctuation, as in Transformers' `SiglipTokenizer`.
    """
    text = text.replace("_", " ") if underscore == "space" else text
    text = (text.lower() if lower else text).translate(_PUNCTUATION)
    return " ".join(text.split())


@op
def tokenize(
    example: dict,
    tokenizer: Any,
    length: Length,
    key: str = "text",
    bos: bool = True,
    eos: bool = True,
    to: str = "token_ids",
) -> dict:
    """Sets `token_ids` to int32 [length]: the text at `key`, padded or truncated (the end token is kept).

    The texts of `captions` become int32 [n, length]; a lacking text becomes padding. A model with another tokenizer,
    such as a teacher, reads a field of its own: `tokenize(77, to="teacher_ids", tokenizer="clip")`, see
    `vlm_jax.data.tokenizers` for specs.
    """
    text = field(example, key)
    if isinstance(text, list) and all(isinstance(one, str) for one in text) and f"{key}_mask" in example:
        token_ids = tokenizer(text, length, bos=bos, eos=eos)
        example[to] = np.where(example[f"{key}_mask"][:, None], token_ids, tokenizer.pad_id)
        return example
    if not isinstance(text, str):
        raise UserError(
            f"op `tokenize` was given `{key}` of type {type(text).__name__}; expected a text: use `caption` first"
        )
    _text(text, key)  # not empty; white space at its ends is the tokenizer's business
    example[to] = tokenizer([text], length, bos=bos, eos=eos)[0]
    return example


@op
def room(example: dict, tokenizer: Any, n: int, at: int, key: str = "token_ids") -> dict:
    """Makes room for n tokens of a learned context: moves the tokens from `at` on by n.

    The context (`insertions.prompts.Context`) overwrites the ids in the room, so any will do. Padding falls off the
    end; a text that is too long is cut, and its last token kept.
    """
    token_ids = field(example, key)
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    filler = min(set(range(len(special) + 1)) - special)
    end = np.max(np.nonzero(token_ids != tokenizer.pad_id)[0], initial=0) + 1
    words = token_ids[: end + (tokenizer.pad_id == tokenizer.eos_id)]  # the first padding is the end token then
    words = np.concatenate([words[:at], np.full(n, filler, words.dtype), words[at:]])
    room = np.full_like(token_ids, tokenizer.pad_id)
    room[: len(words)] = words[: len(room)]
    if len(words) > len(room):
        room[-1] = words[-1]
    example[key] = room
    return example


@op
def denoise(
    example: dict,
    rng: np.random.Generator,
    tokenizer: Any,
    inputs: Length,
    targets: Length,
    vocab_size: int,
    denoisers: str | tuple[tuple, ...] = "ul2",
    modes: Literal["ids", "text"] | None = "ids",
    sentinels: int = spans.SENTINELS,
    key: str = "text",
) -> dict:
    """Hides parts of the text: sets `input_ids` int32 [inputs], `token_ids` int32 [targets] and `denoiser`, an int.

    A text that is too long for the drawn denoiser is first cut to its first `spans.longest` tokens.

    Args:
      example: holds the text.
      rng: draws the denoiser, then the hidden tokens.
      tokenizer: with `encode`, `eos_id` and `vocab_size`.
      inputs: length of the inputs, which end with EOS and are padded with 0.
      targets: length of the targets, which end with EOS and are padded with 0.
      vocab_size: the model's. Its top ids are the sentinels; the three mode tokens are below (`spans.mode_ids`).
      denoisers: a mixture: "ul2", "t5", "prefix", "causal", or literals as `spans.mixture` reads them. `denoiser`
        becomes the index of the denoiser drawn.
      modes: tokens before the inputs: "ids", one mode token; "text", the mode's name as the tokenizer encodes it, as in
        the released UL2 checkpoints (with vocab_size=32100); None, nothing.
      sentinels: their number.
      key: the text's field.
    """
    plan = spans.plan(tokenizer, denoisers, inputs, targets, vocab_size, modes, sentinels)
    text = field(example, key)
    if not isinstance(text, str):
        raise UserError(
            f"op `denoise` was given `{key}` of type {type(text).__name__}; expected a text: use `caption` first"
        )
    token_ids = tokenizer.encode(_text(text, key))
    if not token_ids:
        raise BadExample(f"text `{key}` has no tokens", "text")
    if tokenizer.eos_id in token_ids:
        raise BadExample(f"text `{key}` holds the end token", "text")
    last = len(plan.denoisers) - 1
    i = min(int(np.searchsorted(plan.weights, rng.random() * plan.weights[-1], side="right")), last)
    example["input_ids"], example["token_ids"] = spans.corrupt(
        token_ids[: plan.longest[i]], plan.denoisers[i], rng, mode=plan.modes[i], vocab_size=vocab_size,
        eos_id=tokenizer.eos_id, inputs_length=inputs, targets_length=targets, sentinels=sentinels,
    )  # fmt: skip
    example["denoiser"] = i
    return example
