"""A model with everything it needs to be used: parameters, tokenizer, preprocessing."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax.data import class_lists, ops
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError
from vlm_jax.models.generate import log_likelihood, log_likelihoods
from vlm_jax.models.insertions import after_towers
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.vocabulary import is_text
from vlm_jax.params import sharding
from vlm_jax.pretrained import inputs, writing
from vlm_jax.pretrained.embedding import class_embeddings, embed, features, features_of_layers, pair_logits, prompts_of
from vlm_jax.pretrained.similarity import similarity


@inputs.checked
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A model ready for use: two towers or one, a captioner, a CoCa, or a text-to-text model.

    Attributes:
      model: a `vlm_jax.models.TwoTower`, `Captioner`, `CoCa`, `EncoderDecoder` or `PrefixLM`.
      params: its parameters.
      tokenizer: text <-> ids, see `vlm_jax.data.tokenizers`; None without texts.
      preprocess: op string from a record with "image" to the model's input, e.g. "decode | resize(32) | normalize";
        None without an image tower.
      tokenize: op string from a record with "text" to "token_ids", e.g. "lower | tokenize(16)"; None without texts.
      config: "model", "preprocess", "tokenizer" and "tokenize"; for a training run, the whole config.
      mesh: the devices to run on; None is one device.
      batch_size: number of examples embedded at a time.
      classes: the class names of an adapted model.
      templates: the prompts that names are put into.
      head: image embeddings [B, D] -> logits [B, classes] of an adapted model; None uses the names' embeddings.
      lacks: what the files do not tell: `preprocess`, `tokenizer` or `tokenize` is None, and pictures or texts raise;
        preprocessed arrays (`embed_image_batch`) and token ids (`embed_text_batch`) do not.
    """

    model: nn.Module
    params: Any
    tokenizer: Any
    preprocess: str | None
    tokenize: str | None
    config: dict = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    batch_size: int = 256
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    head: Callable[[np.ndarray], np.ndarray] | None = None
    lacks: inputs.Lacks = dataclasses.field(default_factory=inputs.Lacks)

    def __repr__(self) -> str:
        """Three lines: the family and its size, the inputs, what the model can do."""
        leaves = jax.tree.leaves(self.params)
        place = "one device" if self.mesh is None else f"{self.mesh.size} devices"
        size = f"{sum(math.prod(leaf.shape) for leaf in leaves):,} parameters on {place}"
        read = {"pictures": self.preprocess, "texts": self.tokenize}
        reads = "; ".join(f"{what}: {ops}" for what, ops in read.items() if ops)
        adapted = f"; adapted to {len(self.classes)} classes: {', '.join(self.classes):.60}" if self.classes else ""
        reads = "; ".join(filter(None, (reads, *(f"pass {name}= to `load`" for name in self.lacks.why))))
        return f"Pretrained {type(self.model).__name__}, {size}\n  reads {reads}\n  can {', '.join(self.can)}{adapted}"

    @property
    def can(self) -> tuple[str, ...]:
        """The methods that this model has the towers for."""
        has = lambda side: getattr(self.model, side, None) is not None
        embeds = () if self.is_captioner else ("embed_images",) * has("image") + ("embed_texts",) * has("text")
        named = ("logits", "classify") if has("image") and (has("text") or has("decoder")) else ()
        writes = () if not has("decoder") else ("generate", "score") if self.reads_texts else ("caption", "score")
        return (*embeds, *named, *writes)

    @property
    def is_captioner(self) -> bool:
        """Whether texts are scored by likelihood, because the model has no text embedding."""
        return "embed" not in self.model.can

    @property
    def compares_pairs(self) -> bool:
        """Whether logits are computed pair by pair: captioners, and prompts that depend on the picture."""
        return self.is_captioner or after_towers.by_pairs(self.model) is not None

    @property
    def reads_texts(self) -> bool:
        """Whether the model writes texts from texts."""
        return "write" in self.model.can

    def embed_images(self, images: Any) -> np.ndarray:
        """Pictures (PIL images, paths, bytes, arrays: see `inputs.pictures`) -> unit-norm float32 [n, D].

        A tower with pool "all" returns [n, N, D], a vector for every token.
        """
        return self.embed_image_batch(self._pictures(images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit-norm float32 [n, D], or with pool "all" [n, L, D], zeros for padding."""
        return self._embed_ids(self._texts(texts))

    def embed_image_batch(self, images: Any) -> np.ndarray:
        """Preprocessed images, float [B, H, W, 3] (or packed patches, see `models.ViT`) -> unit-norm float32 [B, D]."""
        self._need("image")
        if self.is_captioner:
            raise UserError("a captioner embeds no pictures; its image tower's output is `image_features`")
        return self._run(lambda model, params, images: embed(model, params, images, None), images)

    def embed_text_batch(self, token_ids: Any) -> np.ndarray:
        """Token ids, int [B, L], as the op string `tokenize` makes them -> unit-norm float32 [B, D]."""
        self._need_texts()
        token_ids = np.asarray(token_ids)
        if token_ids.ndim != 2 or token_ids.dtype.kind not in "iu":
            seen = f"{token_ids.dtype} {list(token_ids.shape)}"
            raise UserError(f"`embed_text_batch` takes token ids, int [B, L]; got {seen}")
        return self._embed_ids(self._checked(token_ids))

    def _embed_ids(self, token_ids: np.ndarray) -> np.ndarray:
        return self._run(lambda model, params, token_ids: embed(model, params, None, token_ids), token_ids)

    def features(
        self, images: Any = None, *, texts: Sequence[str] | None = None, layers: Sequence[int] = (-1,)
    ) -> list[np.ndarray]:
        """Returns the tokens of chosen layers, one array for each layer, float32 [n, L, D].

        The tokens are the outputs of a tower's blocks, before the final norm, the pool and the head. A cls token comes
        first, then registers, then patches; in a CoCa's text tower it comes last. Tokens of padding are not left out.

        Args:
          images: pictures as for `embed_images`; or
          texts: n texts.
          layers: numbers of blocks, from 0; negative ones count from the end. A stack with `scan` holds the outputs of
            all blocks while it runs; `batch_size` limits the memory.
        """
        if (images is None) == (texts is None):
            raise UserError("features takes pictures or texts: features(images, ...) or features(texts=texts, ...)")
        side = "image" if texts is None else "text"
        if np.ndim(layers) != 1 or not len(layers) or np.asarray(layers).dtype.kind not in "iu":
            raise UserError(f"layers should be numbers of blocks, such as [3, -1]; got {layers}")
        rows = self._pictures(images) if texts is None else self._texts(texts)
        if not isinstance(tower := getattr(self.model, side), Encoder):
            raise UserError(f"the {side} tower, a {type(tower).__name__}, has no blocks of a transformer")
        run = lambda *args: features_of_layers(*args, side=side, layers=tuple(layers))
        return list(self._run(run, rows))

    def image_features(self, images: Any) -> np.ndarray:
        """Pictures -> the mean of the image tower's tokens, before any head, float32 [n, D]: for probes."""
        return self.image_feature_batch(self._pictures(images))

    def image_feature_batch(self, images: Any, layer: int | None = None) -> np.ndarray:
        """Preprocessed images [B, H, W, 3] -> `image_features`, or the mean of a block's tokens, float32 [B, D]."""
        self._need("image")
        return self._run(lambda *args: features(*args, layer=layer), images)

    def logits(self, images: Any, texts: Sequence[str]) -> np.ndarray:
        """Returns logits of every picture with every text, float32 [n, m].

        scale * cosine + bias, as in training; for a captioner, log-likelihoods.
        """
        if self.is_captioner:
            return self.caption_logits(self._pictures(images), texts)
        bias = float(self.params.get("logit_bias", 0.0))
        image, text = self.embed_images(images), self.embed_texts(texts)
        return math.exp(float(self.params["logit_scale"])) * similarity(image, text) + bias

    def caption_logits(self, images: Any, texts: Sequence[str]) -> np.ndarray:
        """Returns log p(text | picture) of all preprocessed images [B, H, W, 3] and texts, float32 [B, m]."""
        self._need("decoder")
        token_ids = self._target_ids(texts)
        lengths = token_ids.shape[1] - np.argmax(self._is_text(token_ids)[:, ::-1], axis=1)
        room = np.minimum(2 ** np.ceil(np.log2(np.maximum(lengths, 2))).astype(int), token_ids.shape[1])
        few = dataclasses.replace(self, batch_size=min(self.batch_size, 64))  # memory holds the logits of several texts
        logits = np.empty((len(jax.tree.leaves(images)[0]), len(texts)), np.float32)
        for length in np.unique(room):  # short texts together: padding costs as much as tokens
            some = token_ids[room == length][:, :length]
            logits[:, room == length] = few._run(
                lambda *args, ids=some: log_likelihoods(*args, ids, **self._ends), images
            )
        return logits

    def class_logits(
        self, images: Any, labels: str | Sequence[str] | None = None, templates: str | Sequence[str] | None = None
    ) -> np.ndarray:
        """Returns logits of preprocessed images [B, H, W, 3] for every label, float32 [B, labels].

        scale * cosine with the label's embedding, the mean over prompts (CLIP, section 3.1.2). If the model compares
        pair by pair: the mean of the prompts' logits (for a captioner, log-likelihoods). A head gives its own logits.

        Args:
          images: [B, H, W, 3].
          labels: class names, or a list of names such as "cifar10"; defaults to the classes that the model was adapted
            to. A head knows only these.
          templates: a prompt with a `{}` for the name, several, or a list of prompts such as "imagenet80"; defaults to
            the model's own (`{}` without adaptation).
        """
        labels = self.classes if labels is None else inputs.labels(labels)
        if not labels:
            raise UserError("classify needs labels: this model was not adapted to any")
        if self.head is not None:
            return self._head_logits(images, labels, templates)
        templates = self.templates if templates is None else class_lists.read_templates(templates)
        if not self.compares_pairs:
            self._need("text")
            with ThreadPoolExecutor(1) as pool:  # compiles two programs at the same time
                text = pool.submit(class_embeddings, self.embed_texts, labels, templates)
                image, text = self.embed_image_batch(images), text.result()
            return math.exp(float(self.params["logit_scale"])) * similarity(image, text)
        if self.is_captioner:
            logits = self.caption_logits(images, prompts_of(labels, templates))
            return logits.reshape(len(logits), len(labels), len(templates)).mean(2)
        run = lambda token_ids: self._run(lambda *args: pair_logits(*args, token_ids), images)
        return np.mean([run(self._token_ids(prompts_of(labels, [template]))) for template in templates], axis=0)

    def _head_logits(self, images: Any, labels: Sequence[str], templates: Sequence[str] | None) -> np.ndarray:
        unknown = [label for label in labels if label not in self.classes]
        if unknown or templates is not None:
            what = f"the label `{unknown[0]}`" if unknown else "templates"
            raise UserError(f"a head has only the {len(self.classes)} classes of its training; leave out {what}")
        logits = np.asarray(self.head(self.embed_image_batch(images)))
        same = tuple(labels) == self.classes
        return logits if same else logits[:, [self.classes.index(label) for label in labels]]

    def classify(
        self, images: Any, labels: str | Sequence[str] | None = None, templates: str | Sequence[str] | None = None
    ) -> np.ndarray:
        """Returns probabilities float32 [n, labels]: the softmax over labels of `class_logits`.

        The softmax assumes that one of the labels fits, also for models trained with the sigmoid loss. Use the sigmoid
        of their `logits` for whether a text fits at all.

        Args:
          images: as for `embed_images`.
          labels, templates: as for `class_logits`.
        """
        logits = self.class_logits(self._pictures(images), labels, templates)
        logits = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(logits / logits.sum(-1, keepdims=True), np.float32)

    def caption(self, images: Any, method: str = "greedy", **options) -> list[str]:
        """Describes pictures (as for `embed_images`); `method` ("greedy", "sample", "beam") and options: see
        `writing.write`."""
        return self.caption_batch(self._pictures(images), method, **options)

    def generate(
        self, texts: Sequence[str], method: str = "greedy", *, max_length: int | None = None, **options
    ) -> list[str]:
        """Answers texts, as T5 does; `see `writing.write`.

        Args:
          texts: n input texts.
          method: "greedy", "sample" or "beam".
          max_length: largest number of tokens of an answer; defaults to the decoder's length.
          **options: prefix, beams, length_penalty, seed, and fields of `logit_rules.Rules`.
        """
        if not self.reads_texts:
            raise UserError("this model writes no texts about texts; an EncoderDecoder or a PrefixLM does")
        return self.caption_batch(self._inputs(texts), method, length=max_length, **options)

    def caption_batch(self, images: Any, method: str = "greedy", **options) -> list[str]:
        """Describes preprocessed images [B, H, W, 3], or answers texts, token ids [B, L]; options: `writing.write`."""
        self._need("decoder")
        return writing.write(self, self._checked(images) if self.reads_texts else images, method, **options)

    def score(self, inputs: Sequence, texts: Sequence[str]) -> np.ndarray:
        """Returns log p(text i | input i), summed over tokens, float32 [n]; inputs are pictures or texts."""
        self._need("decoder")
        return self.score_batch(self._inputs(inputs), texts)[0]

    def score_batch(self, images: Any, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns `score` of preprocessed images [B, H, W, 3] (or token ids [B, L]), and the number of scored tokens.

        Both are [B], float32 and int; the number includes the end token."""
        self._need("decoder")
        token_ids, count = self._target_ids(captions), len(jax.tree.leaves(images)[0])
        if count != len(token_ids):
            what = ("text", "target") if self.reads_texts else ("picture", "caption")
            seen = f"{count} {what[0]}s, {len(token_ids)} {what[1]}s"
            raise UserError(f"score takes a {what[1]} for each {what[0]}; got {seen}")
        return self.target_log_likelihood(images, token_ids), np.sum(self._is_text(token_ids), axis=1)

    def target_log_likelihood(self, inputs: Any, target_ids: np.ndarray) -> np.ndarray:
        """Returns log p(target i | input i) of target ids int [B, L] and the model's inputs, float32 [B]."""
        pairs = (self._checked(inputs) if self.reads_texts else inputs), self._checked(target_ids)
        run = lambda model, params, pairs: log_likelihood(model, params, *pairs, **self._ends)
        return self._run(run, pairs)

    def _inputs(self, values: Sequence) -> Any:
        """The input of the decoder's context: preprocessed pictures, or texts, int32 [n, L]."""
        if not self.reads_texts:
            return self._pictures(values)
        return inputs.cut(token_ids := self._token_ids(values), self._is_text(token_ids))

    def _pictures(self, images: Any) -> Any:
        """Preprocessed, a tree of arrays [n, ...]."""
        self._need("image")
        self.lacks.check("preprocess")
        records = [{"image": image} for image in inputs.pictures(images)]
        return self._prepare("image", self.preprocess, records, "image")

    def _texts(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [n, L], the text tower's input."""
        self._need_texts()
        return self._token_ids(texts)

    def _need_texts(self) -> None:
        self._need("text")
        if after_towers.by_pairs(self.model):
            raise UserError("texts of this model depend on the picture; use classify or class_logits")

    def _token_ids(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [n, L]."""
        self.lacks.check("tokenizer", "tokenize")
        records = [{"text": text} for text in inputs.texts(texts)]
        return self._checked(self._prepare("text", self.tokenize, records, "token_ids"))

    @property
    def _ends(self) -> dict[str, int | None]:
        """The ids that end a text, for `generate.log_likelihood`."""
        self.lacks.check("tokenizer")
        return {"pad_id": self.tokenizer.pad_id, "eos_id": self.tokenizer.eos_id}

    def _is_text(self, token_ids: np.ndarray) -> np.ndarray:
        """bool [n, L], see `vocabulary.is_text`."""
        return is_text(token_ids, **self._ends)

    def _checked(self, token_ids: np.ndarray) -> np.ndarray:
        return inputs.known_ids(self.model, self.tokenizer, token_ids)

    def _target_ids(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [n, L], the decoder's targets: without the start token."""
        token_ids = self._token_ids(texts)
        if self.reads_texts:
            return inputs.cut(token_ids, self._is_text(token_ids))
        return token_ids[:, 1:] if (token_ids[:, 0] == self.model.decoder.start_id).all() else token_ids

    def _prepare(self, modality: str, string: str, records: list[dict], field: str) -> Any:
        if not records:
            raise UserError(f"no {modality} is given: the list is empty")
        pipeline = ops.parse(string, self.tokenizer)
        rows = []
        for i, record in enumerate(records):
            try:
                rows.append(pipeline(record, np.random.default_rng(0))[field])
            except Exception as error:  # also Pillow's and numpy's, of ops that do not fit a picture
                reason = error if isinstance(error, BadExample | UserError) else f"{type(error).__name__}: {error}"
                raise UserError(f"{modality} {i} of {len(records)} cannot be used: {reason}") from None
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def _need(self, modality: str) -> None:
        if getattr(self.model, modality, None) is None:
            raise UserError(f"this model has no {modality}{'' if modality == 'decoder' else ' tower'}")

    def _run(self, fn: Callable, rows: Any) -> Any:
        """fn(model, params, batch) -> tree of [b, ...] over a tree of [n, ...], some rows at a time -> [n, ...]."""
        count = len(jax.tree.leaves(rows)[0])
        size = min(self.batch_size, 1 << (count - 1).bit_length())  # few shapes, so few programs to compile
        if self.mesh is not None:
            shards = math.prod(self.mesh.shape[axis] for axis in sharding.BATCH_AXES)
            size = -(-size // shards) * shards
        results = []
        pad = lambda chunk: np.concatenate([chunk, np.repeat(chunk[:1], size - len(chunk), axis=0)])
        for start in range(0, count, size):
            padded = jax.tree.map(lambda array, start=start: pad(array[start : start + size]), rows)
            batch = jax.tree.map(jnp.asarray if self.mesh is None else self._spread, padded)
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):  # for the kernels
                result = fn(self.model, self.params, batch)
            results.append(jax.tree.map(lambda rows: np.asarray(self._gather(rows)), result))
        return jax.tree.map(lambda *chunks: np.concatenate(chunks)[:count], *results)

    def _spread(self, batch: np.ndarray) -> jax.Array:
        place = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(batch.shape, place, lambda index: batch[index])

    def _gather(self, embeddings: jax.Array) -> jax.Array:
        if embeddings.is_fully_addressable:
            return embeddings
        return jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))(embeddings)
