"""The language model: words and sub-words, predictions, states, salience, fine-tuning. All with the real MiniLM."""

import copy
import json
import sys
from pathlib import Path

import captum.attr
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import torch.nn.functional as F

import clvq_core as clvq

DROPPED = "\u200b"  # a zero-width space is a word to the splitter and nothing to BERT's tokenizer
HARD = [
    "It's a so-so film -- isn't it?!",
    "“Don’t” say: naïve café, Žižek; 映画 … фильм",
    "A 🙂👍 unbelievably/untranslatable antidisestablishmentarianism (1999), $10.50!",
    f"before {DROPPED} after",
    DROPPED,
    "ok",
    "good " * 50 + "the end",
]
"""Sentences with what makes alignment hard; the last is longer than the 40 sub-words that `setup` allows."""
PLAIN = ["a gripping , moving film .", "dull", "it's neither funny nor unbelievably clever , just long and rather untidy ."]


def setup(**settings) -> clvq.Config:
    return clvq.configure("smoke", max_tokens=40, **settings)


def inputs(lm: clvq.LanguageModel, text: str) -> dict[str, torch.Tensor]:
    """One sentence as the tokenizer itself gives it."""
    return dict(lm.tokenizer([clvq.split_words(text)], is_split_into_words=True, truncation=True, max_length=40, return_tensors="pt"))


def spans(lm: clvq.LanguageModel, text: str) -> dict[int, list[int]]:
    """Word to its sub-words' positions in the sentence, read off the tokenizer one by one."""
    found: dict[int, list[int]] = {}
    words = clvq.split_words(text)
    encoding = lm.tokenizer(words, is_split_into_words=True, truncation=True, max_length=40)
    for position, word in enumerate(encoding.word_ids()):
        if word is not None:
            found.setdefault(word, []).append(position)
    return found


def plain_states(lm: clvq.LanguageModel, text: str) -> tuple[torch.Tensor, ...]:
    """States of every layer for one sentence, (T, D) each."""
    with torch.no_grad():
        out = lm.model(**inputs(lm, text), output_hidden_states=True)
    return tuple(state[0] for state in out.hidden_states)


# --- loading ------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_exist_is_refused(refused):
    with refused("unknown model 'no-such-model'", "minilm"):
        clvq.load_language_model("no-such-model", ["a", "b"])


def test_a_folder_without_configuration_is_refused(refused, tmp_path):
    with refused(str(tmp_path), "config.json"):
        clvq.load_language_model(str(tmp_path), ["a", "b"])


def test_a_model_without_a_head_is_refused_unless_it_gets_one(refused):
    with refused("'minilm'", "finetune"):
        clvq.load_language_model("minilm")


def test_a_local_folder_is_the_model_that_was_saved_there_with_its_own_head(minilm, tmp_path):
    minilm.model.save_pretrained(tmp_path)
    minilm.tokenizer.save_pretrained(tmp_path)
    for labels in (None, ["negative", "positive"]):
        lm = clvq.load_language_model(str(tmp_path), labels, seed=9)
        assert lm.model.config.id2label == {0: "negative", 1: "positive"}
        found, own = (clvq.predict(each, clvq.encode(each, PLAIN, setup()), setup()) for each in (lm, minilm))
        assert torch.equal(found, own)


def test_all_files_that_can_change_a_models_results_are_listed_and_no_others(minilm, tmp_path):
    minilm.model.save_pretrained(tmp_path)
    minilm.tokenizer.save_pretrained(tmp_path)
    own = sorted(path.name for path in tmp_path.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(own)
    for other in ("README.md", "history.parquet", "environment.json", "pytorch_model.bin", "modeling_own.py"):
        (tmp_path / other).write_text("{}")
    (tmp_path / "1_Pooling").mkdir()
    assert [path.name for path in clvq.model_files(tmp_path)] == own


def test_layers_that_do_not_exist_or_run_downwards_are_refused(refused):
    with refused("source_layer 9", "'minilm'", "0 to 6"):
        clvq.resolve_layers(setup(source_layer=9), 6, "minilm")
    with refused("target_layer 9", "'minilm'", "0 to 6"):
        clvq.resolve_layers(setup(target_layer=9), 6, "minilm")
    with refused("target_layer 2", "source_layer 4"):
        clvq.resolve_layers(setup(source_layer=4, target_layer=2), 6, "minilm")


def test_layers_are_two_thirds_and_all_of_the_depth_unless_chosen():
    assert clvq.resolve_layers(setup(), 12, "roberta") == (8, 12)
    assert clvq.resolve_layers(setup(), 6, "minilm") == (4, 6)
    assert clvq.resolve_layers(setup(source_layer=0, target_layer=0), 6, "minilm") == (0, 0)


def test_a_new_head_depends_on_the_seed_alone_and_the_global_state_stays(minilm):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = clvq.load_language_model("minilm", ["negative", "positive"], seed=0)
    other = clvq.load_language_model("minilm", ["negative", "positive"], seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [lm.model.classifier.weight for lm in (minilm, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not again.model.training and again.model.config.id2label == {0: "negative", 1: "positive"}


# --- words and sub-words ------------------------------------------------------------------------------------------


def test_words_are_aligned_as_the_tokenizer_says_on_hard_text(minilm):
    encoded = clvq.encode(minilm, HARD, setup())
    tokens = clvq.align_words(minilm, encoded)
    assert tokens.columns.tolist() == ["sentence", "position", "word", "is_summary", "first", "last"]
    expected = []
    for sentence, text in enumerate(HARD):
        begin, words = int(encoded.offsets[sentence]), clvq.split_words(text)
        expected.append((sentence, 0, "[CLS]", True, begin, begin))
        expected += [
            (sentence, word + 1, words[word], False, begin + where[0], begin + where[-1]) for word, where in spans(minilm, text).items()
        ]
    assert list(tokens.itertuples(index=False, name=None)) == expected


def test_words_that_truncation_or_the_tokenizer_takes_are_counted(minilm):
    def lost(text):
        return clvq.align_words(minilm, clvq.encode(minilm, [text], setup())).attrs["lost"]

    assert [lost(text) for text in HARD] == [0, 0, 0, 1, 1, 0, 14]  # 38 of 52 words fit
    assert clvq.align_words(minilm, clvq.encode(minilm, HARD, setup())).attrs["lost"] == 16


def test_a_word_after_one_that_was_dropped_keeps_its_name_and_place(minilm):
    tokens = clvq.align_words(minilm, clvq.encode(minilm, [f"before {DROPPED} after"], setup()))
    assert tokens["word"].tolist() == ["[CLS]", "before", "after"] and tokens["position"].tolist() == [0, 1, 3]


def test_sub_words_are_those_of_the_tokenizer_with_its_special_ones(minilm):
    encoded = clvq.encode(minilm, HARD, setup())
    for sentence, text in enumerate(HARD):
        part = encoded.ids[encoded.offsets[sentence] : encoded.offsets[sentence + 1]]
        assert torch.equal(part, inputs(minilm, text)["input_ids"][0])


@pytest.mark.parametrize("limit", [4, 3, 2])
def test_no_text_has_more_sub_words_than_are_allowed_however_few(minilm, limit):
    encoded = clvq.encode(minilm, ["a film"], clvq.configure("smoke", max_tokens=limit))
    assert len(encoded.ids) <= limit


# --- running ------------------------------------------------------------------------------------------------------


def test_predictions_of_a_batch_are_those_of_its_sentences_one_by_one(minilm):
    together = clvq.predict(minilm, clvq.encode(minilm, HARD, setup()), setup())
    small = clvq.predict(minilm, clvq.encode(minilm, HARD, setup()), setup(batch_tokens=60))
    with torch.no_grad():
        alone = torch.cat([minilm.model(**inputs(minilm, text)).logits for text in HARD])
    assert together.shape == (len(HARD), 2)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(small, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", range(7))
def test_states_put_in_at_their_layer_give_the_models_own_logits(minilm, layer):
    encoded = clvq.encode(minilm, HARD, setup())
    ids, mask = clvq.pad_ids(minilm, encoded, torch.arange(len(HARD)))
    with torch.no_grad():
        whole = minilm.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        with clvq.blocks_above(minilm, layer) as answer:
            upper = answer(whole.hidden_states[layer], mask)
    torch.testing.assert_close(upper, whole.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part, where", [(clvq.limit_blocks, (2, 4)), (clvq.blocks_above, (4,)), (clvq.blocks_above, (6,))])
def test_the_model_is_whole_again_after_an_error_inside(minilm, part, where):
    encoded = clvq.encode(minilm, PLAIN, setup())
    before, modules = clvq.predict(minilm, encoded, setup()), dict(minilm.model.named_modules())
    with pytest.raises(ZeroDivisionError), part(minilm, *where):
        assert minilm.n_layers < 3
        raise ZeroDivisionError
    assert minilm.n_layers == 6 and dict(minilm.model.named_modules()) == modules
    assert torch.equal(clvq.predict(minilm, encoded, setup()), before)


# --- states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["last", "first", "mean"])
def test_states_are_those_of_a_plain_forward_of_each_sentence(minilm, tmp_path, aggregation):
    acts = clvq.extract(minilm, HARD, [3, 0, 6], setup(aggregation=aggregation), tmp_path, filtered=False)
    take = {"last": lambda x: x[-1], "first": lambda x: x[0], "mean": lambda x: x.mean(0)}[aggregation]
    assert sorted(acts.states) == [0, 3, 6] and len(acts.lengths) == len(HARD)
    for sentence, text in enumerate(HARD):
        hidden, words = plain_states(minilm, text), spans(minilm, text)
        rows = slice(int(acts.offsets[sentence]), int(acts.offsets[sentence + 1]))
        assert (acts.tokens["sentence"][rows] == sentence).all() and acts.lengths[sentence] == 1 + len(words)
        for layer, states in acts.states.items():
            expected = torch.stack([hidden[layer][0], *(take(hidden[layer][where]) for where in words.values())])
            torch.testing.assert_close(states[rows].float(), expected, rtol=2e-3, atol=2e-3)


def test_states_do_not_depend_on_the_batches(minilm, tmp_path):
    found = []
    for budget in (60, 8192):
        (folder := tmp_path / str(budget)).mkdir()
        found.append(clvq.extract(minilm, HARD, [4], setup(batch_tokens=budget), folder, filtered=False))
    torch.testing.assert_close(found[0].states[4], found[1].states[4], rtol=2e-3, atol=2e-3)
    pd.testing.assert_frame_equal(found[0].tokens, found[1].tokens)


def test_only_rows_that_pass_the_filter_are_kept_and_every_summary_is(minilm, tmp_path):
    texts = ["the film", "a film", "the the end", "rare"] * 2
    config = setup(frequency_filter="first", min_count=3, max_count=4)
    (tmp_path / "all").mkdir()
    everything = clvq.extract(minilm, texts, [2], config, tmp_path / "all", filtered=False)
    acts = clvq.extract(minilm, texts, [2], config, tmp_path, filtered=True)
    assert acts.tokens["word"].tolist() == [
        "[CLS]", "the", "film", "[CLS]", "film", "[CLS]", "the", "the", "[CLS]",
        "[CLS]", "the", "film", "[CLS]", "film", "[CLS]", "[CLS]",
    ]  # fmt: skip
    assert acts.tokens["position"].tolist() == [0, 1, 2, 0, 2, 0, 1, 2, 0, 0, 1, 2, 0, 2, 0, 0]
    assert acts.offsets.tolist() == [0, 3, 5, 8, 9, 12, 14, 15, 16]
    assert torch.equal(acts.summary_rows, acts.offsets[:-1])
    both = everything.tokens.reset_index().merge(acts.tokens, on=["sentence", "position"])["index"]
    torch.testing.assert_close(acts.states[2], everything.states[2][torch.tensor(both.to_numpy())])
    assert (acts.source["words_seen"], acts.source["words_lost"], acts.source["words_kept"]) == (16, 0, 8)


def test_states_lie_on_disk_in_half_precision_and_are_not_read_before_they_are_asked_for(minilm, tmp_path):
    acts = clvq.extract(minilm, PLAIN, [0, 6], setup(), tmp_path, filtered=False)
    for layer in (0, 6):
        on_disk = np.load(tmp_path / f"layer_{layer}.npy", mmap_mode="r")
        assert on_disk.dtype == np.float16 and on_disk.shape == (len(acts.tokens), 384)
        assert acts.states[layer].dtype == torch.float16
        np.testing.assert_array_equal(on_disk, acts.states[layer].numpy())
    if sys.platform == "linux":
        assert str(tmp_path / "layer_6.npy") in Path("/proc/self/maps").read_text()


def test_states_say_what_they_are_states_of(minilm, tmp_path):
    config = setup(aggregation="mean", frequency_filter="uniform", min_count=1, max_count=1)
    acts = clvq.extract(minilm, [*HARD, "rare"], [2, 0], config, tmp_path)
    source = acts.source
    assert source == json.loads((tmp_path / "source.json").read_text("utf8"))
    assert (source["model"], source["n_layers"], source["layers"], source["width"]) == ("minilm", 6, [0, 2], 384)
    assert (source["sentences"], source["filtered"], source["words_lost"]) == (8, True, 16)
    assert source["text"] == clvq.hash_text([*HARD, "rare"])
    assert source["settings"]["aggregation"] == "mean" and source["settings"]["frequency_filter"] == "uniform"
    assert source["words_seen"] == sum(len(clvq.split_words(text)) for text in [*HARD, "rare"])
    assert source["words_kept"] == len(acts.tokens) - 8 == acts.tokens.query("not is_summary")["word"].nunique()


def test_loaded_states_are_those_that_were_extracted(minilm, tmp_path):
    acts = clvq.extract(minilm, HARD, [1, 5], setup(), tmp_path, filtered=False)
    again = clvq.Activations.load(tmp_path)
    assert again.source == acts.source and torch.equal(again.offsets, acts.offsets)
    pd.testing.assert_frame_equal(again.tokens, acts.tokens)
    assert all(torch.equal(again.states[layer], acts.states[layer]) for layer in (1, 5))


def test_a_batch_of_states_has_each_sentences_rows_one_after_the_other(tiny_acts):
    sentences = torch.tensor([7, 2, 30])
    states, lengths = next(tiny_acts.stream([sentences], [0, 1], torch.device("cpu")))
    assert torch.equal(lengths, tiny_acts.lengths[sentences]) and len(lengths.unique()) > 1
    for layer, rows in zip((0, 1), states, strict=True):
        assert rows.dtype == torch.float32
        for part, sentence in zip(rows.split(lengths.tolist()), sentences, strict=True):
            own = slice(int(tiny_acts.offsets[sentence]), int(tiny_acts.offsets[sentence + 1]))
            assert torch.equal(part, tiny_acts.states[layer][own].float())


# --- salience -----------------------------------------------------------------------------------------------------


def captums(lm: clvq.LanguageModel, text: str, layer: int, steps: int) -> list[float]:
    """Salience of the summary and of each word, by captum's LayerIntegratedGradients."""
    encoder = lm.model.base_model.encoder.layer
    below = encoder[layer - 1] if layer else lm.model.base_model.embeddings
    one = inputs(lm, text)
    target = lm.model(**one).logits.argmax().item()
    method = captum.attr.LayerIntegratedGradients(lambda ids, mask: lm.model(input_ids=ids, attention_mask=mask).logits, below)
    parts = method.attribute(one["input_ids"], baselines=torch.zeros_like(one["input_ids"]), target=target, n_steps=steps,
                             additional_forward_args=(one["attention_mask"],), method="gausslegendre")  # fmt: skip
    share = F.normalize(parts.sum(-1)[0], dim=0)
    return [share[0].item(), *(share[where].max().item() for where in spans(lm, text).values())]


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_salience_equals_captums_layer_integrated_gradients(minilm, layer):
    tokens, logits = clvq.attribute(minilm, PLAIN, layer, setup(salience_steps=8))
    with torch.no_grad():
        own = torch.cat([minilm.model(**inputs(minilm, text)).logits for text in PLAIN])
    torch.testing.assert_close(logits, own, rtol=0, atol=1e-5)
    for sentence, text in enumerate(PLAIN):
        found = tokens.loc[tokens["sentence"] == sentence, "salience"].to_numpy()
        np.testing.assert_allclose(found, captums(minilm, text, layer, 8), rtol=0, atol=1e-4)


def test_salience_has_a_row_for_the_summary_and_each_word_and_none_for_the_separator(minilm):
    tokens, _ = clvq.attribute(minilm, HARD, 4, setup(salience_steps=2))
    aligned = clvq.align_words(minilm, clvq.encode(minilm, HARD, setup()))
    pd.testing.assert_frame_equal(tokens.drop(columns="salience"), aligned)
    assert tokens["salience"].between(-1, 1).all() and not tokens["word"].eq("[SEP]").any()


def test_salience_does_not_depend_on_the_batches(minilm):
    each = [clvq.attribute(minilm, PLAIN, 4, setup(salience_steps=3, batch_tokens=n))[0] for n in (8, 150, 8192)]
    for other in each[1:]:
        np.testing.assert_allclose(other["salience"], each[0]["salience"], rtol=0, atol=1e-5)


def test_sixteen_points_are_enough_for_the_integral(minilm):
    few, many = (clvq.attribute(minilm, PLAIN, 4, setup(salience_steps=n))[0] for n in (16, 64))
    np.testing.assert_allclose(few["salience"], many["salience"], rtol=0, atol=1e-3)


def test_zero_and_padding_are_one_baseline_for_minilm_and_the_mean_state_another(minilm):
    zero, pad, mean = (
        clvq.attribute(minilm, PLAIN, 4, setup(salience_steps=2, salience_baseline=kind))[0]["salience"].to_numpy()
        for kind in ("zero", "pad", "mean")
    )
    assert minilm.tokenizer.pad_token_id == 0
    np.testing.assert_array_equal(zero, pad)
    assert np.abs(zero - mean).max() > 0.05


def test_the_padding_baseline_is_made_of_the_tokenizers_own_padding(minilm):
    other = clvq.LanguageModel(minilm.model, copy.deepcopy(minilm.tokenizer), "minilm")
    other.tokenizer.pad_token = "film"
    zero, pad = (
        clvq.attribute(other, PLAIN, 4, setup(salience_steps=2, salience_baseline=kind))[0]["salience"].to_numpy()
        for kind in ("zero", "pad")
    )
    own = clvq.attribute(minilm, PLAIN, 4, setup(salience_steps=2))[0]["salience"]
    np.testing.assert_allclose(zero, own, rtol=0, atol=1e-5)
    assert np.abs(zero - pad).max() > 0.05


def test_the_mean_baseline_is_the_mean_over_all_sub_words_of_the_corpus(minilm):
    mean = torch.cat([plain_states(minilm, text)[4] for text in PLAIN]).mean(0)
    points, weights = np.polynomial.legendre.leggauss(3)
    tokens, _ = clvq.attribute(minilm, PLAIN, 4, setup(salience_steps=3, salience_baseline="mean"))
    for sentence, text in enumerate(PLAIN):
        state = plain_states(minilm, text)[4][None]
        total = torch.zeros_like(state)
        with clvq.blocks_above(minilm, 4) as answer:
            real = torch.ones(state.shape[:2], dtype=torch.bool)
            target = answer(state, real).argmax()
            for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
                path = (mean + float(point) * (state - mean)).requires_grad_()
                total += weight * torch.autograd.grad(answer(path, real)[0, target], path)[0]
        share = F.normalize(((state - mean) * total).sum(-1)[0], dim=0)
        expected = [share[0].item(), *(share[where].max().item() for where in spans(minilm, text).values())]
        found = tokens.loc[tokens["sentence"] == sentence, "salience"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# --- fine-tuning --------------------------------------------------------------------------------------------------


def test_fine_tuning_depends_on_the_data_seed_alone_and_the_global_state_stays():
    texts = ["good film", "bad film", "a great story", "an awful story", "fine", "dull", "loved it", "hated it"]
    labels = torch.tensor([1, 0] * 4)

    def tuned(data_seed, seed):
        lm = clvq.load_language_model("minilm", ["negative", "positive"])
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        config = setup(finetune_epochs=1, finetune_batch=4, data_seed=data_seed, seed=seed, precision="float32")
        history = clvq.finetune(lm, texts, labels, config)
        assert torch.equal(torch.random.get_rng_state(), before) and not lm.model.training
        return history, lm.model.state_dict()

    (history, weights), (again, same), (_, other) = tuned(1, 1), tuned(1, 2), tuned(2, 1)
    assert len(history) == 2
    pd.testing.assert_frame_equal(history, again)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.parametrize("n", [1, 5, 40_000])
def test_moments_are_those_of_all_rows_whatever_the_blocks_and_do_not_cancel(n):
    x = (300 + torch.randn(n, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 9.0])).half()
    exact = x.double()
    for rows in (None, torch.arange(0, n, 2)):
        own = exact if rows is None else exact[rows]
        mean, variance = clvq.moments(x, rows)
        torch.testing.assert_close(mean, own.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(variance, own.var(0, unbiased=False), rtol=1e-9, atol=1e-12)
        whole = clvq.moments(x, rows, covariance=True)[1]
        torch.testing.assert_close(whole, torch.einsum("nd,ne->de", own - own.mean(0), own - own.mean(0)) / len(own), rtol=1e-9, atol=1e-9)


def test_a_stream_of_batches_gives_each_its_own_rows_over_many_pools(tiny_acts):
    draw = torch.Generator().manual_seed(0)
    batches = list(torch.randperm(len(tiny_acts.lengths), generator=draw).split(1))
    assert len(batches) > 2 * clvq.BATCHES_PER_READ
    streamed = tiny_acts.stream(batches, [1, 0], torch.device("cpu"))
    for batch, (states, lengths) in zip(batches, streamed, strict=True):
        assert torch.equal(lengths, tiny_acts.lengths[batch])
        rows = torch.cat([torch.arange(tiny_acts.offsets[s], tiny_acts.offsets[s + 1]) for s in batch])
        for layer, part in zip((1, 0), states, strict=True):
            assert torch.equal(part, tiny_acts.states[layer][rows].float())
    assert list(tiny_acts.stream([], [0], torch.device("cpu"))) == []


def test_reading_starts_one_thread_and_none_of_openmp(synthetic):
    """OpenMP lets no thread wait awake once there are more than cores, and then every operation of a training step takes longer."""
    acts, before = synthetic(sentences=20_000), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.ones(2**22).mul(2)  # the threads of this thread
        known = psutil.Process().num_threads()
        seen = [psutil.Process().num_threads() for _ in acts.stream(torch.arange(20_000).split(1000), (0, 1), torch.device("cpu"))]
    finally:
        torch.set_num_threads(before)
    assert max(seen) <= known + 1


@pytest.mark.parametrize("together", [1, 8, 1000])
def test_batches_have_every_sentence_once_and_neighbours_are_read_together(together):
    first, other = (clvq.shuffled_batches(1000, 4, torch.Generator().manual_seed(seed), together) for seed in (0, 1))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(1000)) and all(len(batch) == 4 for batch in first)
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    size = 4 * clvq.BATCHES_PER_READ
    pool = torch.cat(first)[:size]
    assert (pool.diff() < 0).sum() > size // 4  # shuffled within, whatever lies together
    stretches = 1 + int((pool.sort().values.diff() > 1).sum())  # as the pool is read
    assert stretches <= size // together + 1 if together > 1 else stretches > size // 2


def test_bucketed_batches_have_every_sentence_once_and_little_padding():
    lengths = torch.randint(1, 60, (1000,), generator=torch.Generator().manual_seed(0))
    batches = clvq.bucketed_batches(lengths, 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(1000)) and all(len(batch) <= 4 for batch in batches)
    assert sum(int(lengths[batch].max()) * len(batch) for batch in batches) < 1.15 * int(lengths.sum())
