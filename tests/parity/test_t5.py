"""T5, T5 v1.1 and UL2 of Transformers at random init: the same states, logits, loss, gradients and generated texts."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from tests.support.torch_parity import close, same_gradients
from vlm_jax import models, save_pretrained
from vlm_jax.data import tokenizers
from vlm_jax.models.generate import Rules, Special, beam_search, sample
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo import recognize, tokenizer_files
from vlm_jax.zoo.load import read_params

SIZES = dict(vocab_size=64, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4)
SIZES |= dict(decoder_start_token_id=0, dropout_rate=0.0)
KINDS = {
    "t5": dict(feed_forward_proj="relu"),
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "ul2": dict(feed_forward_proj="gated-silu", tie_word_embeddings=False),
    "tied_gated": dict(feed_forward_proj="gated-gelu"),
    "few_buckets": dict(relative_attention_num_buckets=8, relative_attention_max_distance=12),
}


def of_transformers(kind):
    """The model there, randomised; what v1.1 has untied since Transformers 5 ties it at init."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **KINDS[kind])).eval()
    if not model.config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(64, 32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.5 if "relative" in name else 0.05
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def texts():
    """Inputs and targets of several lengths: the end is 1, padding 0; longer than the exact distances."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(3, 64, (4, 40)), rng.integers(3, 64, (4, 24))
    for ids, lengths in ((inputs, (40, 25, 3, 39)), (targets, (24, 2, 20, 23))):
        for row, length in zip(ids, lengths, strict=True):
            row[length - 1], row[length:] = 1, 0
    return inputs.astype(np.int32), targets.astype(np.int32)


def read_back(theirs, folder):
    """(what the folder is that Transformers writes, the parameters read from it)."""
    theirs.save_pretrained(folder)
    released = recognize.understand(folder)
    params = read_params(released.match(), released.shapes, released.tensors)
    return released, flax.traverse_util.unflatten_dict(params, sep="/")


@pytest.mark.parametrize("kind", KINDS)
def test_t5(kind, tmp_path):
    theirs = of_transformers(kind)
    released, params = read_back(theirs, tmp_path / "theirs")
    model = models.build(released.model)
    inputs, targets = texts()
    given = dict(input_ids=torch.tensor(inputs).long(), attention_mask=torch.tensor(inputs != 0).long())
    labels = torch.tensor(np.where(targets == 0, -100, targets)).long()
    shown = torch.tensor(np.pad(targets[:, :-1], ((0, 0), (1, 0)))).long()  # theirs would show -100 as padding, too
    out = theirs(**given, decoder_input_ids=shown, labels=labels)
    out.loss.backward()

    def loss_fn(params):
        logits = model.apply({"params": params}, inputs, targets)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(targets != 0, log_p, 0)) / jnp.sum(targets != 0), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    context, seen = model.apply({"params": params}, inputs, method="encode")
    seen = np.asarray(seen)[..., None]
    close(np.where(seen, context, 0), out.encoder_last_hidden_state.detach().numpy() * seen)
    close(logits, out.logits)
    close(loss, out.loss)
    options = dict(max_length=9, num_beams=1, do_sample=False, use_cache=False)
    want = theirs.generate(**given, **options)[:, 1:].numpy()
    got = sample(model, params, inputs, length=8, greedy=True, special=Special(start=0, end=1, pad=0)).token_ids
    np.testing.assert_array_equal(got, np.pad(want, ((0, 0), (0, 8 - want.shape[1]))))
    options |= dict(num_beams=4, num_return_sequences=4, length_penalty=0.0, max_length=13)
    end = -1
    for _ in range(2):  # without an end, then with one that is met often
        theirs.generation_config.eos_token_id = None if end < 0 else end
        want = theirs.generate(**given, **options)[:, 1:].numpy()
        want[np.cumsum(want == end, axis=1) - (want == end) > 0] = 0  # theirs fills up with the end
        special = Special(start=0, end=end, pad=0)
        got = beam_search(model, params, inputs, length=12, beams=4, length_penalty=0.0, special=special).token_ids
        np.testing.assert_array_equal(got.reshape(-1, 12), np.pad(want, ((0, 0), (0, 12 - want.shape[1]))))
        end = int(np.bincount(want[:, 2:8].ravel()).argmax())
    assert len(set(np.sum(want != 0, axis=1))) > 1  # texts of several lengths
    same_gradients(theirs, grads, released, tmp_path / "gradients")


RULES = {  # ours, theirs
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "encoder_no_repeat_ngram": "encoder_no_repeat_ngram_size",
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """(model there, with an end that is met often; model and parameters here; the end)."""
    theirs = of_transformers("t5")
    released, params = read_back(theirs, tmp_path_factory.mktemp("writer") / "t5")
    model = models.build(released.model)
    free = sample(model, params, texts()[0], length=12, greedy=True, special=Special(end=-1)).token_ids
    end = int(np.bincount(np.asarray(free)[:, 3:].ravel()).argmax())
    theirs.generation_config.eos_token_id = end
    return theirs, model, params, end


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "rules",
    [
        dict(repetition_penalty=1.7),
        dict(repetition_penalty=0.6),
        dict(no_repeat_ngram=1),
        dict(no_repeat_ngram=2),
        dict(no_repeat_ngram=3, repetition_penalty=1.2),
        dict(encoder_no_repeat_ngram=1),
        dict(encoder_no_repeat_ngram=2, no_repeat_ngram=2),
    ],
    ids=str,
)
def test_repetition(writer, rules, beams):
    agree(writer, rules, beams)


@pytest.mark.parametrize("prefix", [None, np.array([[5, 9]] * 4)], ids=["", "prefix"])
@pytest.mark.parametrize(
    ("penalty", "stop"), [(-1.0, "never"), (0.7, "never"), (2.0, "never"), (1.0, False), (2.0, False), (0.7, True)]
)
def test_lengths(writer, penalty, stop, prefix):
    agree(writer, dict(repetition_penalty=1.2), 3, prefix, length_penalty=penalty, early_stopping=stop)


def agree(writer, rules, beams, prefix=None, **lengths):
    """The same texts, and with beams the same scores; `lengths` as there."""
    theirs, model, params, end = writer
    inputs, special = texts()[0], Special(start=0, end=end, pad=0)
    given = dict(input_ids=torch.tensor(inputs).long(), attention_mask=torch.tensor(inputs != 0).long())
    if prefix is not None:
        given["decoder_input_ids"] = torch.tensor(np.pad(prefix, ((0, 0), (1, 0)))).long()
    options = dict(max_length=13, num_beams=beams, num_return_sequences=beams, do_sample=False, use_cache=False)
    options |= dict(output_scores=True, return_dict_in_generate=True) | {RULES[key]: rules[key] for key in rules}
    out = theirs.generate(**given, **options, **lengths)
    want = out.sequences[:, 1:].numpy().copy()
    want[np.cumsum(want == end, axis=1) - (want == end) > 0] = 0
    want = np.pad(want, ((0, 0), (0, 12 - want.shape[1])))
    if beams == 1:
        got = sample(model, params, inputs, length=12, greedy=True, special=special, rules=Rules(**rules)).token_ids
    else:
        lengths = dict(dict(length_penalty=1.0, early_stopping=False), **lengths)
        got, total = beam_search(
            model, params, inputs, prefix, length=12, beams=beams, length_form="power", special=special,
            rules=Rules(**rules), **lengths,
        )  # fmt: skip
        got = got.reshape(-1, 12)
        tokens = np.sum(np.cumsum(want == end, axis=1) - (want == end) == 0, axis=1)
        tokens -= 0 if prefix is None else prefix.shape[1]
        their_total = (out.sequences_scores.numpy() * tokens ** lengths["length_penalty"]).reshape(-1, beams)
        of_prefix = 0 if prefix is None else np.mean(total - their_total, axis=1, keepdims=True)  # which theirs lack
        close(total, their_total + of_prefix)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_here_is_read_there(kind, tmp_path):
    theirs = of_transformers(kind)
    released, params = read_back(theirs, tmp_path / "theirs")
    ours = Pretrained(models.build(released.model), params, None, None, None, dict(model=released.model))
    save_pretrained(ours, tmp_path / "ours", "hf")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    inputs, targets = texts()
    run = lambda model: model(input_ids=torch.tensor(inputs).long(), decoder_input_ids=torch.tensor(targets).long())
    torch.testing.assert_close(run(again).logits, run(theirs).logits, rtol=0, atol=0)


def test_sentinels(tmp_path):
    """The tokenizer written for Transformers has the ids of ours, extra ids included."""
    lines = iter(["a photo of a dog in the park", "two cats, and the dog they saw", "the end of it"] * 5)
    with open(tmp_path / "spiece.model", "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=writer, vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    spec, folder = f"sentencepiece:{tmp_path}/spiece.model?extra_ids=100", tmp_path / "hf"
    folder.mkdir()
    tokenizer_files.to_transformers(spec, "tokenize(24, bos=False)", folder)
    theirs, ours = transformers.T5Tokenizer.from_pretrained(folder), tokenizers.build(spec)
    assert len(theirs) == ours.vocab_size
    for text in ("a dog", "the <extra_id_0> in <extra_id_1> park <extra_id_99>", "<extra_id_2> cats"):
        assert ours([text], 24)[0].tolist() == theirs(text, padding="max_length", max_length=24).input_ids
