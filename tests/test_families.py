"""Language models of other families: tiny ones with random weights, saved to a folder with a tokenizer trained here, and taken from it
as a user's own would be."""

import copy
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import clvq_core as clvq

DROPPED = "\u200b"  # a zero-width space is a word to the splitter and nothing to BERT's tokenizer
CASES = {
    "punctuation": "fine , really : yes ... no !? “so”",
    "contractions": "It's dull -- isn't it ?!",
    "hyphens": "a so-so film , state-of-the-art",
    "emoji": "good 🙂 👍🏽 👩‍👩‍👧 bad",
    "accents": "naïve café Žižek cafe\u0301",
    "CJK": "映画 は 面白い 电影 很好",
    "dropped": f"before {DROPPED} after",
    "empty": "",
    "nothing but a dropped word": DROPPED,
    "spaces around": "  \t two   words \n",
    "right to left": "שלום עולם good مرحبا",
    "digits": "( 1999 ) $10.50 1,000",
    "one long word": "antidisestablishmentarianism" * 3,
    "longer than the model": "good " * 90 + "end",
    "marks that touch": "The kettle works well,again... “(really)”?! 10,000£",
    "lines": "one line\n\nand another\tone",
    "a special token": "good </s> [SEP] bad",
}
"""What makes alignment hard. The tiny models take 80 sub-words, and `setup` allows 60."""
TEXTS = ["a gripping , moving film .", CASES["contractions"], CASES["emoji"], "the end of a long , long story ( 1999 )", CASES["CJK"]]
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=80)
ENCODERS = {
    "Bert": ("wordpiece", SMALL),
    "Roberta": ("byte-level", {**SMALL, "max_position_embeddings": 84}),
    "XLMRoberta": ("unigram", {**SMALL, "max_position_embeddings": 84}),
    "MPNet": ("wordpiece", {**SMALL, "max_position_embeddings": 84}),
    "DistilBert": ("wordpiece", {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 80}),
    "DebertaV2": ("metaspace", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}),
    "ModernBert": ("byte-level", {**SMALL, "global_attn_every_n_layers": 2, "local_attention": 8}),
    "Electra": ("wordpiece", {**SMALL, "embedding_size": 16}),
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
DECODERS = {
    "Llama": ("sentencepiece", GROUPED),
    "Qwen2": ("byte-level", {**GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "Mistral": ("sentencepiece", {**GROUPED, "sliding_window": 6}),
    "Gemma2": ("byte-level", {**GROUPED, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0}),
    "GPT2": ("byte-level", dict(n_embd=32, n_layer=3, n_head=4, n_positions=80)),
    "GPTNeoX": ("byte-level", SMALL),
    "Qwen3": ("split", {**GROUPED, "head_dim": 8}),
}

ANSWERS = ["negative", "positive"]


def trained_tokenizer(kind: str, decoder: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of a few hundred sub-words, with the special tokens of an encoder or of a model that continues text."""
    special = ["<unk>", "<pad>", "<s>", "</s>"] if decoder else ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*CASES.values(), *TEXTS, "Review : Answer : positive negative polite toxic fine dull"] * 3
    options = dict(vocab_size=500, special_tokens=special, show_progress=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: trainers.Trainer
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=special[0]))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder, trainer = decoders.WordPiece(cleanup=False), trainers.WordPieceTrainer(**options)
    elif kind in ("unigram", "metaspace"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace() if kind == "unigram" else None  # nothing says how ids become text
        trainer = trainers.UnigramTrainer(unk_token=special[0], **options)
    elif kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token=special[0], fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no sub-word is learnt across blanks
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        options["special_tokens"] = special + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(limit_alphabet=60, **options)
    else:  # nothing puts a blank before words that come one by one
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "byte-level")
        if kind == "split":  # a word takes the mark before it along, as in Llama 3 and Qwen
            pieces = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
            split = pre_tokenizers.Split(pieces, "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(words, trainer)
    named = dict(unk_token=special[0], model_max_length=80, tokenizer_object=tokenizer)
    if decoder:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
        return transformers.PreTrainedTokenizerFast(bos_token="<s>", eos_token="</s>", padding_side="left", **named)
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", **named)


@pytest.fixture(scope="module", params=[*ENCODERS, *DECODERS])
def family(request, tmp_path_factory) -> tuple[str, Path]:
    """A family's name, and the folder of a tiny model of it with random weights."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    decoder = name in DECODERS
    kind, sizes = (DECODERS if decoder else ENCODERS)[name]
    tokenizer = trained_tokenizer(kind, decoder)
    special = dict(bos_token_id=2, eos_token_id=3, pad_token_id=None) if decoder else dict(pad_token_id=1, num_labels=2)
    config = getattr(transformers, f"{name}Config")(**sizes, vocab_size=len(tokenizer) + 8, **special)
    torch.manual_seed(0)
    suffix = ("LMHeadModel" if name == "GPT2" else "ForCausalLM") if decoder else "ForSequenceClassification"
    model = getattr(transformers, name + suffix)(config)
    for parameter in model.parameters():  # so that states and answers differ
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return name, folder


@pytest.fixture(scope="module")
def lm(family) -> clvq.LanguageModel:
    return clvq.load_language_model(str(family[1]), asked=None if family[0] in ENCODERS else ("Review: {text}\nAnswer:", ANSWERS))


def setup(**settings) -> clvq.Config:
    return clvq.configure("smoke", max_tokens=60, salience_steps=3, **settings)


def read_and_written(lm: clvq.LanguageModel, ids: torch.Tensor, text: str) -> tuple[str, str]:
    """What the ids decode to, and what the tokenizer makes of the text in its prompt before it splits it; blanks alike."""
    normalizer = lm.tokenizer.backend_tokenizer.normalizer
    written = lm.prompt.replace("{text}", text.strip()) if lm.prompt else text
    written = normalizer.normalize_str(written).replace("▁", " ") if normalizer else written
    read = lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for special in ("[CLS]", "[SEP]", "<s>"):  # and not all that are called special: there are bytes among them
        read = read.replace(special, "")
    return tuple(("" if not lm.sees_blanks else " ").join(each.split()) for each in (read, written))


@pytest.mark.parametrize("case", [case for case in CASES if case != "a special token"])
def test_the_ids_of_any_text_decode_to_that_text(lm, case):
    if lm.tokenizer.backend_tokenizer.decoder is None:
        pytest.skip("the tokenizer says not how ids become text")
    encoded = clvq.encode(lm, [CASES[case]], setup())
    read, written = read_and_written(lm, encoded.ids, CASES[case])
    if case == "longer than the model":
        head, _, tail = written.rpartition("good end" if lm.sees_blanks else "goodend")
        assert len(encoded.ids) == 60 and written.startswith(read.removesuffix(tail)) and read.endswith(tail) and head
    elif lm.tokenizer.unk_token_id not in encoded.ids:
        assert read == written
    else:
        assert lm.tokenizer.unk_token_id not in clvq.encode(lm, ["a good film"], setup()).ids


@pytest.mark.parametrize("case", CASES)
def test_every_sub_word_of_a_text_has_its_word_and_the_summary_is_what_the_head_reads(family, lm, case):
    text, decoder = CASES[case], family[0] in DECODERS
    encoded = clvq.encode(lm, [text], setup())
    tokens, ids = clvq.align_words(lm, encoded), encoded.ids.tolist()
    words, (summary, rows) = encoded.words[0], (tokens[tokens["is_summary"]], tokens[~tokens["is_summary"]])
    place = len(ids) - 1 if decoder else 0
    assert summary[["first", "last", "position"]].values.tolist() == [[place, place, 0]]
    assert rows["word"].tolist() == [words[i] for i in rows["position"] - 1] and rows["position"].is_monotonic_increasing
    assert tokens.attrs["lost"] == len(words) - len(rows) and len(ids) <= 60
    inside = (encoded.word >= 0).nonzero()[:, 0].tolist()
    assert inside == [i for row in rows.itertuples() for i in range(row.first, row.last + 1)]  # each belongs to one word
    assert not inside or inside == list(range(inside[0], inside[-1] + 1))  # nothing in between belongs to none


@pytest.mark.parametrize("text", ["The kettle works well , again", "It's a so-so film : dull", CASES["spaces around"]])
def test_words_that_stand_apart_have_the_sub_words_that_decode_to_them(lm, text):
    encoded = clvq.encode(lm, [text], setup())
    tokens = clvq.align_words(lm, encoded)
    assert tokens.attrs["lost"] == 0 and tokens.loc[~tokens["is_summary"], "word"].tolist() == clvq.split_words(text)
    if lm.tokenizer.backend_tokenizer.decoder is None or lm.tokenizer.unk_token_id in encoded.ids:
        return  # nothing says how ids become text, or some of it is unknown
    for row in tokens[~tokens["is_summary"]].itertuples():
        part = lm.tokenizer.decode(encoded.ids[row.first : row.last + 1], clean_up_tokenization_spaces=False)
        assert "".join(part.split()) == (row.word if lm.sees_blanks else row.word.lower())


def test_special_tokens_that_are_written_in_a_text_are_read_as_text(lm):
    special = set(lm.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "<s>", "</s>"])) - {lm.tokenizer.unk_token_id}
    plain, spoilt = (clvq.encode(lm, [text], setup()).ids.tolist() for text in ("good bad", CASES["a special token"]))
    assert len(spoilt) > len(plain)
    assert [token for token in spoilt if token in special] == [token for token in plain if token in special]


def test_a_batchs_answers_are_those_of_its_texts_one_by_one(lm):
    together = clvq.predict(lm, clvq.encode(lm, TEXTS, setup()), setup())
    alone = torch.cat([clvq.predict(lm, clvq.encode(lm, [text], setup()), setup()) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert together.shape == (len(TEXTS), 2) and together.std() > 0


def test_answers_are_those_of_the_model_itself(family, lm):
    name, folder = family
    kind = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    for text in TEXTS[:2]:
        with torch.no_grad():
            if name in DECODERS:
                prompt = f"Review: {text}\nAnswer:"
                ids = lm.tokenizer(prompt).input_ids
                assert ids[0] == 2 and ids.count(2) == 1
                answers = [lm.tokenizer(f"{prompt} {answer}").input_ids for answer in ANSWERS]
                assert all(answer[: len(ids)] == ids for answer in answers)
                expected = model(torch.tensor([ids])).logits[0, -1][[answer[len(ids)] for answer in answers]]
            else:
                expected = model(**lm.tokenizer([text], return_tensors="pt")).logits[0]
        torch.testing.assert_close(clvq.predict(lm, clvq.encode(lm, [text], setup()), setup())[0], expected, atol=1e-4, rtol=1e-4)


def test_a_model_passes_its_trial_and_is_whole_after_it(lm):
    encoded = clvq.encode(lm, TEXTS, setup())
    ids, mask = clvq.pad_ids(lm, encoded, torch.arange(len(TEXTS)))
    with torch.no_grad():
        expected = lm.logits(ids, mask)
        clvq.check_model(lm, range(4))
        for layer in range(4):
            state = clvq.layer_states(lm, [layer], ids, mask)[layer]
            with clvq.blocks_above(lm, layer) as logits_of:
                torch.testing.assert_close(logits_of(state, mask), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lm.logits(ids, mask), expected)


def test_the_last_block_feeds_the_summary_alone_forward_where_the_head_reads_no_more(family, lm):
    encoded = clvq.encode(lm, TEXTS, setup())
    ids, mask = clvq.pad_ids(lm, encoded, torch.arange(len(TEXTS)))
    found = []
    with torch.no_grad():
        state = clvq.layer_states(lm, [1], ids, mask)[1]
        with clvq.blocks_above(lm, 1) as answer:
            last = getattr(*lm.block_list())[-1]
            hook = last.register_forward_hook(lambda _, __, out: found.append(out if isinstance(out, torch.Tensor) else out[0]))
            answer(state, mask)
            hook.remove()
    before_attention = {"ModernBert", *DECODERS}  # the norms of these
    assert [out.shape[1] for out in found] == [ids.shape[1] if family[0] in before_attention else 1]


def test_states_are_those_the_model_reports(family, lm, tmp_path):
    acts = clvq.extract(lm, TEXTS, [0, 1, 2, 3], setup(), tmp_path, filtered=False)
    encoded = clvq.encode(lm, TEXTS, setup())
    tokens = clvq.align_words(lm, encoded)
    model = lm.model.base_model
    for sentence in range(len(TEXTS)):
        begin, end = encoded.offsets[sentence : sentence + 2].tolist()
        with torch.no_grad():
            hidden = model(
                input_ids=encoded.ids[None, begin:end], attention_mask=torch.ones(1, end - begin), output_hidden_states=True
            ).hidden_states
        rows = tokens["sentence"] == sentence
        for layer in range(4):
            own = hidden[layer][0, tokens.loc[rows, "last"].to_numpy() - begin]
            torch.testing.assert_close(acts.states[layer][np.flatnonzero(rows)].float(), own, atol=2e-2, rtol=2e-3)


def test_every_word_has_salience_and_the_summary_too_unless_it_belongs_to_a_prompt(lm):
    tokens, logits = clvq.attribute(lm, TEXTS, 1, setup())
    assert (tokens["salience"].isna() == (tokens["is_summary"] & bool(lm.prompt))).all()
    assert np.isfinite(tokens.loc[~tokens["is_summary"], "salience"]).all() and tokens["salience"].abs().max() > 0
    torch.testing.assert_close(logits, clvq.predict(lm, clvq.encode(lm, TEXTS, setup()), setup()), atol=1e-4, rtol=1e-4)


def test_integrated_gradients_add_up_to_what_the_model_gains_over_the_baseline(lm):
    ids, mask = clvq.pad_ids(lm, clvq.encode(lm, TEXTS, setup()), torch.arange(len(TEXTS)))
    with torch.no_grad():
        state = clvq.layer_states(lm, [2], ids, mask)[2]
    baseline = state + 0.05 * torch.randn_like(state) * mask[..., None]
    with clvq.blocks_above(lm, 2) as logits_of:
        moved, logits = clvq.integrated_gradients(logits_of, state, baseline, mask, clvq.configure("smoke", salience_steps=24))
        with torch.no_grad():
            gain = logits - logits_of(baseline, mask)
    target = logits.argmax(-1, keepdim=True)
    torch.testing.assert_close(moved.sum(1), gain.gather(1, target)[:, 0], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("family", ["Bert", "Llama", "GPT2"], indirect=True)
def test_a_whole_run_from_a_folder_to_the_models_own_answers(family, tmp_path, monkeypatch):
    monkeypatch.setenv("CLVQ_CACHE", str(tmp_path))
    name, folder = family
    config = clvq.configure(
        "smoke",
        model=str(folder),
        finetune=name not in DECODERS,
        train_sentences=80,
        test_sentences=40,
        finetune_epochs=1,
        epochs=1,
        n_codes=10,
        folds=3,
        probe_epochs=2,
        max_tokens=60,
        salience_steps=2,
        decoder_heads=4,
        seeds=1,
        source_layer=1,
        target_layer=3,
    )
    pipeline = clvq.Pipeline(config, tmp_path).check()
    assert name not in DECODERS or not pipeline.salient["is_summary"].any()
    assert len(pipeline.clvq_faithfulness) > 0 and len(pipeline.in_model(["CLVQ-VAE"])) == 40 * 4 and len(pipeline.report)
    assert pipeline.explain("a dull film").words["word"].tolist() == ["a", "dull", "film"]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Llama", "GPT2"], indirect=True)
def test_a_gpu_gives_what_the_cpu_gives_and_hands_it_over_on_the_cpu(family, lm, tmp_path):
    assert lm.device.type == "cuda"
    cpu, found = dataclasses.replace(lm, model=copy.deepcopy(lm.model).cpu()), []
    for each in (lm, cpu):
        clvq.check_model(each, (1, 3))
        results = [clvq.predict(each, clvq.encode(each, TEXTS, setup(precision="float32")), setup(precision="float32"))]
        for baseline in ("zero", "pad", "mean"):
            tokens, logits = clvq.attribute(each, TEXTS, 1, setup(salience_baseline=baseline, precision="float32"))
            results += [logits, torch.from_numpy(tokens["salience"].fillna(0).to_numpy())]
        for aggregation in ("last", "mean"):
            (folder := tmp_path / f"{each.device.type}-{aggregation}").mkdir()
            config = setup(aggregation=aggregation, precision="float32")
            results.append(clvq.extract(each, TEXTS, [0, 3], config, folder, filtered=False).states[3].float())
        assert all(result.device.type == "cpu" for result in results)
        found.append(results)
    for on_gpu, on_cpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=2e-2, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fine_tuning_on_a_gpu_lowers_the_loss(tmp_path):
    lm = clvq.load_language_model(save_encoder(tmp_path, "Bert", "wordpiece"), ["bad", "good"])
    texts, labels = ["good film", "bad film", "fine , really", "dull"] * 10, torch.tensor([1, 0, 1, 0] * 10)
    history = clvq.finetune(lm, texts, labels, setup(finetune_epochs=8, finetune_batch=8, finetune_learning_rate=1e-3))
    assert lm.device.type == "cuda" and history["loss"].iloc[-5:].mean() < history["loss"].iloc[:5].mean()


# --- models that do not pass ------------------------------------------------------------------------------------------


def save_encoder(folder: Path, family: str, tokenizer: str, **sizes: object) -> str:
    """A tiny classifier with random weights in a folder; the folder's name."""
    trained = trained_tokenizer(tokenizer)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **sizes}, vocab_size=len(trained) + 8, pad_token_id=1)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    trained.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_model_whose_blocks_are_no_plain_chain_is_refused(refused, tmp_path, layer):
    convolution = dict(conv_kernel_size=3, conv_act="gelu", relative_attention=True, pos_att_type=["p2c", "c2p"])
    lm = clvq.load_language_model(save_encoder(tmp_path, "DebertaV2", "unigram", position_biased_input=False, **convolution))
    with refused(str(tmp_path), f"layer {layer}"):
        clvq.check_model(lm, [layer])


def test_a_model_whose_texts_change_each_other_is_refused(refused, tmp_path):
    lm = clvq.load_language_model(save_encoder(tmp_path, "FNet", "unigram"))
    with refused("(fnet)", "beside a text"):
        clvq.check_model(lm, [1])


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_that_are_used_several_times_run_one_by_one(tmp_path, groups):
    lm = clvq.load_language_model(save_encoder(tmp_path, "Albert", "unigram", num_hidden_groups=groups, num_hidden_layers=4))
    clvq.check_model(lm, range(5))
    encoded = clvq.encode(lm, TEXTS, setup())
    ids, mask = clvq.pad_ids(lm, encoded, torch.arange(len(TEXTS)))
    with torch.no_grad():
        expected = lm.model.base_model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        for layer, states in clvq.layer_states(lm, range(5), ids, mask).items():
            torch.testing.assert_close(states[mask], expected[layer][mask], rtol=0, atol=1e-5)
    assert len(getattr(*lm.block_list())) == groups


def test_a_model_that_fails_when_it_runs_is_refused_with_its_name(refused, tmp_path, monkeypatch):
    lm = clvq.load_language_model(save_encoder(tmp_path, "Bert", "wordpiece"))
    for error in (ValueError("You must\nspecify. More"), IndexError("out of range")):
        monkeypatch.setattr(lm.model, "forward", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with refused(str(tmp_path), str(error).partition("\n")[0].rstrip(".")):
            clvq.check_model(lm, [1])


def test_a_model_without_finite_logits_is_refused(refused, tmp_path):
    lm = clvq.load_language_model(save_encoder(tmp_path, "Bert", "wordpiece"))
    lm.model.classifier.bias.data[0] = torch.inf
    with refused("not finite"):
        clvq.check_model(lm, [1])


def test_a_tokenizer_that_glues_words_is_refused(refused, tmp_path):
    lm = clvq.load_language_model(save_encoder(tmp_path, "Roberta", "byte-level", max_position_embeddings=84))
    clvq.check_model(lm, [1])
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    with refused("its tokenizer reads"):
        clvq.check_model(lm, [1])


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_models_folder_never_runs_even_if_yes_stands_on_standard_input(refused, monkeypatch, tmp_path, file, known):
    folder, trace = save_encoder(tmp_path / "model", "Bert", "wordpiece"), tmp_path / "ran"
    settings = json.loads(Path(folder, file).read_text())
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": [None, "own.OwnTokenizer"],
                            "AutoModelForSequenceClassification": "own.OwnBert"}  # fmt: skip
    if not known:
        settings |= {"model_type": "own_bert", "architectures": ["OwnBert"], "tokenizer_class": "OwnTokenizer"}
    Path(folder, file).write_text(json.dumps(settings))
    Path(folder, "own.py").write_text(f"open({str(trace)!r}, 'w').close()")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with refused("auto_map", folder):
        clvq.load_language_model(folder)
    assert not trace.exists()


# --- what the head reads ------------------------------------------------------------------------------------------


def save_classifier(folder: Path, family: str, tokenizer: str, decoder: bool = False, **sizes: object) -> str:
    """A tiny classifier of any family; the folder's name."""
    trained = trained_tokenizer(tokenizer, decoder)
    config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=len(trained) + 8, bos_token_id=2, eos_token_id=3)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    trained.save_pretrained(folder)
    return str(folder)


HEADS = {
    "Bert": ("wordpiece", False, dict(**SMALL, pad_token_id=1), "first"),
    "ModernBert": ("byte-level", False, dict(ENCODERS["ModernBert"][1], classifier_pooling="mean", pad_token_id=1), "mean"),
    "GPT2": ("byte-level", True, dict(DECODERS["GPT2"][1], pad_token_id=1), "last"),
    "Llama": ("sentencepiece", True, dict(GROUPED, pad_token_id=None), "last"),
    "Qwen3": ("split", True, dict(DECODERS["Qwen3"][1], pad_token_id=3), "last"),
    "Gemma": ("byte-level", True, dict(GROUPED, head_dim=8, pad_token_id=0), "last"),
}


@pytest.fixture(scope="module", params=[*HEADS])
def head(request, tmp_path_factory) -> tuple[clvq.LanguageModel, str]:
    kind, decoder, sizes, summary = HEADS[request.param]
    return clvq.load_language_model(save_classifier(tmp_path_factory.mktemp("head"), request.param, kind, decoder, **sizes)), summary


def test_the_summary_is_what_the_head_reads(head, tmp_path):
    lm, summary = head
    assert lm.summary == summary
    clvq.check_model(lm, range(4))
    acts = clvq.extract(lm, TEXTS, [3], setup(), tmp_path, filtered=False)
    encoded = clvq.encode(lm, TEXTS, setup())
    own = clvq.predict(lm, encoded, setup())
    with clvq.blocks_above(lm, 3) as logits_of, torch.no_grad():  # one position, the summary, is all that the head needs
        alone = logits_of(acts.states[3][acts.summary_rows].float()[:, None], torch.ones(len(TEXTS), 1, dtype=torch.bool))
    torch.testing.assert_close(alone, own, rtol=0, atol=0.05)  # states are kept in half precision
    assert (acts.tokens.groupby("sentence")["is_summary"].sum() == 1).all()
    tokens = clvq.align_words(lm, encoded)
    assert tokens.groupby("sentence")["first"].is_monotonic_increasing.all()
    ends = encoded.offsets[1:].numpy() - 1
    summaries = tokens[tokens["is_summary"]]
    np.testing.assert_array_equal(summaries["last"], encoded.offsets[:-1] if summary == "first" else ends)


def test_salience_and_edits_follow_what_the_head_reads(head):
    lm, summary = head
    tokens, logits = clvq.attribute(lm, TEXTS, 1, setup())
    assert (tokens["salience"].isna() == (tokens["is_summary"] & (summary != "first"))).all()
    torch.testing.assert_close(logits, clvq.predict(lm, clvq.encode(lm, TEXTS, setup()), setup()), rtol=0, atol=1e-4)
    centres = clvq.Centres(*torch.randn(3, 32))
    everywhere = {}

    def edit(states, centre, pairs):
        everywhere["centre"] = centre
        return [(("gone",), torch.zeros_like(states))]

    sentences = torch.arange(len(TEXTS))
    own, edited = clvq.answer_edited(lm, TEXTS, 3, centres, sentences, edit, setup())
    torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)
    # above the last layer nothing but the summary is read, so that changing it alone is changing all
    torch.testing.assert_close(edited["gone", "summary"], edited["gone", "every position"], rtol=0, atol=1e-5)
    at_summary = (everywhere["centre"][0] == centres.summary).all(1).sum()
    assert at_summary == (summary != "mean")


def test_a_head_that_reads_something_else_is_refused(refused, tmp_path):
    with refused("(bart)", "encoder"):
        clvq.load_language_model(save_classifier(
            tmp_path / "bart", "Bart", "byte-level", d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=80, pad_token_id=1))  # fmt: skip
    lm = clvq.load_language_model(save_encoder(tmp_path / "bert", "Bert", "wordpiece"))
    pool = lm.model.bert.pooler.forward
    lm.model.bert.pooler.forward = lambda states: pool(states) + states[:, 2]
    with refused("position 0, 2 of"):
        clvq.find_summary(lm)


def test_heads_without_one_answer_are_refused_and_one_label_of_several_is_explained(refused, tmp_path):
    with refused("one number"):
        clvq.load_language_model(save_encoder(tmp_path / "one", "Bert", "wordpiece", num_labels=1))
    folder = save_encoder(tmp_path / "several", "Bert", "wordpiece", problem_type="multi_label_classification",
                          id2label={0: "sport", 1: "money", 2: "art"})  # fmt: skip
    with refused("set label", "sport or money or art"):
        clvq.load_language_model(folder)
    with refused("not 'music'"):
        clvq.load_language_model(folder, label="music")
    lm = clvq.load_language_model(folder, label="money")
    encoded = clvq.encode(lm, TEXTS, setup())
    with torch.no_grad():
        chance = lm.model(*clvq.pad_ids(lm, encoded, torch.arange(len(TEXTS)))).logits[:, 1].sigmoid()
    torch.testing.assert_close(clvq.predict(lm, encoded, setup()).softmax(1)[:, 1], chance, rtol=0, atol=1e-5)
    clvq.check_model(lm, [1, 3])
    new = clvq.load_language_model(folder, ["a", "b"])  # which fine-tuning gives a head of its own
    assert new.n_classes == 2 and new.model.config.problem_type == "single_label_classification"


def test_texts_are_cut_to_the_positions_that_the_model_has(tmp_path):
    folder = save_encoder(tmp_path, "Roberta", "byte-level", max_position_embeddings=50)
    trained = transformers.AutoTokenizer.from_pretrained(folder)
    trained.model_max_length = 10**30
    trained.save_pretrained(folder)
    lm = clvq.load_language_model(folder)
    assert lm.limit == 48  # positions begin after the row for padding
    clvq.check_model(lm, [1])
    assert max(clvq.encode(lm, [CASES["longer than the model"]], clvq.configure("smoke")).offsets.diff()) == 48


# --- two texts -------------------------------------------------------------------------------------------------------

PAIRS = [("the kettle works well .", "it's broken ?!"), ("dull", "a long , long story , and then some"), ("fine", "fine")]


@pytest.mark.parametrize("name", ["Bert", "Albert", "DebertaV2", "Roberta", "GPT2", "Llama"])
def test_two_texts_are_read_as_the_models_own_tokenizer_gives_them(name, tmp_path):
    if name in DECODERS:
        folder = save_classifier(tmp_path, name, "byte-level", True, **DECODERS[name][1], pad_token_id=1)
    else:
        kind, sizes = ENCODERS.get(name, ("unigram", {}))
        folder = save_encoder(tmp_path, name, kind, **sizes)
    if name != "GPT2":  # whose tokenizer here puts nothing between texts
        trained = transformers.AutoTokenizer.from_pretrained(folder)
        if name in ENCODERS or name == "Albert":
            trained.backend_tokenizer.post_processor = processors.TemplateProcessing(
                "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
            if name not in ("Roberta",):
                trained.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
            trained.save_pretrained(folder)
    lm = clvq.load_language_model(folder)
    clvq.check_model(lm, [1, 3])
    encoded = clvq.encode(lm, [clvq.PAIR.join(pair) for pair in PAIRS], setup())
    logits = clvq.predict(lm, encoded, setup())
    for i, pair in enumerate(PAIRS):
        if not lm.sees_blanks:
            pair = tuple(" ".join(clvq.split_words(part)) for part in pair)
        given = lm.tokenizer(*pair, return_tensors="pt")
        begin, end = encoded.offsets[i:i + 2]
        assert encoded.ids[begin:end].tolist() == given.input_ids[0].tolist()
        with torch.no_grad():
            torch.testing.assert_close(lm.model(**given).logits[0], logits[i], rtol=0, atol=1e-4)
    tokens = clvq.align_words(lm, encoded)
    words = tokens[~tokens["is_summary"]]
    for i, (one, two) in enumerate(PAIRS):
        mine = words[words["sentence"] == i]
        for number, text in ((1, one), (2, two)):
            assert set(mine.loc[mine["text"] == number, "word"]) <= set(clvq.split_words(text))
        assert len(mine) + (tokens.attrs["lost"] > 0) >= 2


def test_two_texts_that_are_too_long_are_cut_where_the_longer_one_ends(tmp_path, refused):
    lm = clvq.load_language_model(save_encoder(tmp_path, "Bert", "wordpiece"))
    encoded = clvq.encode(lm, [clvq.PAIR.join(["good " * 90, "bad " * 5]), clvq.PAIR.join(["good " * 90, "bad " * 90])], setup())
    tokens = clvq.align_words(lm, encoded)
    counts = tokens[~tokens["is_summary"]].groupby(["sentence", "text"]).size()
    assert counts.loc[0, 2] == 5 and counts.loc[0, 1] > 40 and abs(counts.loc[1, 1] - counts.loc[1, 2]) <= 1
    with refused("every row or none"):
        clvq.encode(lm, ["one", f"one{clvq.PAIR}two"], setup())


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
def test_a_prompt_may_hold_two_texts(family, refused):
    asked = ("Does {text}\nfollow from {pair}?\nAnswer:", ANSWERS)
    lm = clvq.load_language_model(str(family[1]), asked=asked)
    clvq.check_model(lm, [1, 3])
    text = clvq.PAIR.join(["it works well", "the kettle works"])
    encoded = clvq.encode(lm, [text], setup())
    read, _ = read_and_written(lm, encoded.ids, "")
    assert read == "Does it works well follow from the kettle works? Answer:"
    tokens = clvq.align_words(lm, encoded)
    assert tokens["word"].tolist() == [*clvq.split_words(text), "[END]"] and tokens["text"].tolist()[:6] == [1, 1, 1, 2, 2, 2]
    for row in tokens[~tokens["is_summary"]].itertuples():
        assert lm.tokenizer.decode(encoded.ids[row.first:row.last + 1]).strip() == row.word
    with refused("two texts"):
        clvq.encode(lm, ["one"], setup())
    with refused("after {text}"):
        clvq.load_language_model(str(family[1]), asked=("Does {text} follow from {pair}", ANSWERS))


# --- weights and tokenizers -----------------------------------------------------------------------------------------


def test_pickles_are_not_read_and_the_command_that_converts_them_works(refused, tmp_path):
    folder = save_encoder(tmp_path / "model", "Bert", "wordpiece")
    torch.save(clvq.load_file(Path(folder, "model.safetensors")), Path(folder, "pytorch_model.bin"))
    Path(folder, "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only as pickles") as caught:
        clvq.load_language_model(folder)
    command = str(caught.value).partition('python -c "')[2].rstrip('"')
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    clvq.check_model(clvq.load_language_model(f"{folder}-safe"), [1])


def test_folders_that_lack_something_say_what(refused, tmp_path):
    folder = Path(save_encoder(tmp_path / "model", "Bert", "wordpiece"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with refused("tokenizer"):
        clvq.load_language_model(str(folder))
    (folder / "model.safetensors").write_bytes(b"nothing")
    save_encoder(tmp_path / "other", "Bert", "wordpiece")
    shutil.copy(tmp_path / "other" / "tokenizer.json", folder)
    shutil.copy(tmp_path / "other" / "tokenizer_config.json", folder)
    with refused("no weights that can be loaded"):
        clvq.load_language_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with refused("no configuration that can be loaded"):
        clvq.load_language_model(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with refused("without adapter_model.safetensors"):
        clvq.load_language_model(str(folder))
    (folder / "adapter_model.safetensors").touch()
    with refused("some/base"):  # whether the package is there or not
        clvq.load_language_model(str(folder))


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_an_adapter_is_merged_into_its_model(tmp_path, decoder, with_config):
    peft = pytest.importorskip("peft")
    kind, sizes = ("Llama", dict(GROUPED, pad_token_id=None)) if decoder else ("Bert", dict(SMALL, pad_token_id=1))
    base = save_classifier(tmp_path / "base", kind, "sentencepiece" if decoder else "wordpiece", decoder, **sizes)
    labels = {"id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, ignore_mismatched_sizes=True, **labels)
    options = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"] if decoder else ["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, options)
    adapted.save_pretrained(tmp_path / "adapter")
    if with_config:
        model.config.save_pretrained(tmp_path / "adapter")
    lm = clvq.load_language_model(str(tmp_path / "adapter"))
    ids, mask = clvq.pad_ids(lm, encoded := clvq.encode(lm, TEXTS, setup()), torch.arange(len(TEXTS)))
    adapted.eval().base_model.model.config.pad_token_id = lm.tokenizer.pad_token_id
    with torch.no_grad():
        expected = adapted(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(clvq.predict(lm, encoded, setup()), expected, rtol=0, atol=1e-4)
    assert lm.n_classes == 3 and (lm.model.config.id2label[2] == "c") == with_config
    clvq.check_model(lm, [1, 3])


def test_a_tokenizer_of_another_model_is_refused(refused, tmp_path):
    folder = Path(save_encoder(tmp_path, "Bert", "wordpiece"))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 40}
    transformers.BertForSequenceClassification(transformers.BertConfig(**config)).save_pretrained(folder)
    with refused("it knows 40 tokens"):
        clvq.load_language_model(str(folder))


def test_states_beyond_half_precision_are_kept_in_single(tmp_path):
    lm = clvq.load_language_model(save_encoder(tmp_path / "model", "Bert", "wordpiece"))
    lm.model.bert.embeddings.LayerNorm.weight.data[3] = 1e6
    (tmp_path / "states").mkdir()
    acts = clvq.extract(lm, TEXTS, [0], setup(), tmp_path / "states", filtered=False)
    assert acts.states[0].dtype == torch.float32 and acts.states[0].abs().max() > 1e5
    lm.model.bert.embeddings.LayerNorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        clvq.extract(lm, TEXTS, [0], setup(), tmp_path / "states", filtered=False)


# --- what a prompt can have wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
@pytest.mark.parametrize(
    "asked, part",
    [
        (("Review: {text} Answer:", ["positive", "positive thing"]), "same token"),
        (("Review: Answer:", ["dull", "fine"]), "{text}"),
        (("Is it good? {text}", ["dull", "fine"]), "after {text}"),
        (("Is it good? {text} \n", ["dull", "fine"]), "after {text}"),
        (None, "no classification head"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(family, refused, asked, part):
    with refused(part):
        clvq.load_language_model(str(family[1]), asked=asked)


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
def test_a_model_that_continues_text_is_fine_tuned_by_its_last_position(family):
    lm = clvq.load_language_model(str(family[1]), ["a", "b"])
    assert lm.summary == "last" and not lm.prompt
    clvq.check_model(lm, [1, 3])
    losses = clvq.finetune(lm, TEXTS * 8, torch.arange(40) % 2, setup(finetune_batch=8, finetune_epochs=1))["loss"]
    assert losses.notna().all()


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
def test_what_is_kept_of_one_prompt_is_not_taken_for_another(family, tmp_path):
    base = dict(model=str(family[1]), finetune=False, decoder_heads=4, n_codes=10, train_sentences=40, test_sentences=20, max_tokens=60)
    found = []
    for asked in ({}, dict(prompt="{text}\nAnswer:"), dict(answers="dull, fine"), {}):
        pipeline = clvq.Pipeline(clvq.configure("smoke", salience_steps=2, **base, **asked), tmp_path)
        found.append((pipeline.salience[1].to_numpy(), pipeline.activations("test").states[1].float().numpy()))
    (logits, states), (others, elsewhere), (answers, same), (again, _) = found
    assert np.abs(others - logits).max() > 0.01 and not np.array_equal(elsewhere, states)  # by another prompt all is other
    assert np.abs(answers - logits).max() > 0.01 and np.array_equal(same, states) and np.array_equal(again, logits)


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
@pytest.mark.parametrize(
    "settings, part",
    [
        (dict(finetune=False, answers="bad"), "answers must be one for each of negative, positive"),
        (dict(finetune=False, answers="dull, dull film"), "same token"),
        (dict(finetune=False, prompt="Is it good?"), "{text}"),
        (dict(finetune=False, prompt="Is it good? {text}"), "after {text}"),
        (dict(finetune=False, source_layer=4), "source_layer 4"),
    ],
)
def test_what_cannot_be_asked_is_found_before_anything_runs(family, refused, tmp_path, settings, part):
    with refused(part):
        clvq.Pipeline(clvq.configure("smoke", model=str(family[1]), decoder_heads=4, **settings), tmp_path).check()


@pytest.mark.parametrize("name", [*DECODERS])
@pytest.mark.parametrize(
    "prompt, blank",
    [
        ("Review: {text}\nAnswer:", " "), ("{text} Answer: ", " "), ("Review : {text}\nAnswer:\n", ""), ("Review: “{text}” Answer: “", ""),
    ],
)  # fmt: skip
def test_a_prompts_joints_are_those_of_the_whole_text(name, prompt, blank):
    tokenizer = trained_tokenizer(DECODERS[name][0], decoder=True)
    template, answers = clvq.tokenize_prompt(tokenizer, prompt, ["fine", "dull"], name)
    lm = clvq.LanguageModel(transformers.BertModel(transformers.BertConfig(**SMALL)), tokenizer, name, template, answers)
    encoded = clvq.encode(lm, ["good 🙂 .", "isn't it ?!"], setup())
    for text, ids in zip(["good 🙂 .", "isn't it ?!"], encoded.ids.split(encoded.offsets.diff().tolist()), strict=True):
        assert ids.tolist() == tokenizer(prompt.rstrip(" ").replace("{text}", text)).input_ids
        read, written = read_and_written(lm, ids, text)
        assert read == written
        for answer, token in zip(["fine", "dull"], answers, strict=True):
            whole = tokenizer(prompt.rstrip(" ").replace("{text}", text) + blank + answer).input_ids
            assert whole[: len(ids)] == ids.tolist() and whole[len(ids)] == token


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
def test_a_prompt_that_leaves_no_room_for_text_is_refused(family, refused):
    asked = ("Review: {text}\n" + "a very long question " * 30 + "Answer:", ANSWERS)
    lm = clvq.load_language_model(str(family[1]), asked=asked)
    with refused("no room for text"):
        clvq.encode(lm, ["a dull film"], setup())


def test_a_gated_model_without_a_token_is_said_in_one_sentence(refused, monkeypatch):
    def gated(*_, **__):
        raise GatedRepoError("401", response=httpx2.Response(401, request=httpx2.Request("GET", "https://huggingface.co")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with refused("'meta-llama/Llama-2-7b-hf' is gated", "hf auth login"):
        clvq.load_language_model("meta-llama/Llama-2-7b-hf", asked=("{text}", ANSWERS))


def test_a_model_without_a_fast_tokenizer_is_refused(refused, monkeypatch, family):
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with refused("no fast tokenizer"):
        clvq.load_language_model(str(family[1]), ["a", "b"])


# --- the embedded one -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> clvq.LanguageModel:
    return clvq.load_language_model("smollm2", asked=(clvq.PROMPTS["movies"][0], ANSWERS))


def test_smollm2_prefers_positive_more_after_praise_than_after_blame(smollm2):
    praise = ["a moving , gripping masterpiece .", "i loved every minute of it ."]
    blame = ["a dull , lifeless mess .", "i hated every minute of it ."]
    scores = clvq.predict(smollm2, clvq.encode(smollm2, [*praise, *blame], setup()), setup())
    preference = scores[:, 1] - scores[:, 0]
    assert preference[:2].min() > preference[2:].max()


def test_smollm2_answers_as_its_weights_do_from_states_too(smollm2):
    encoded = clvq.encode(smollm2, TEXTS, setup())
    ids, mask = clvq.pad_ids(smollm2, encoded, torch.arange(len(TEXTS)))
    with torch.no_grad():
        whole = smollm2.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        own = whole.logits[torch.arange(len(ids)), mask.sum(1) - 1][:, smollm2.answers]
        torch.testing.assert_close(clvq.predict(smollm2, encoded, setup()), own, atol=1e-3, rtol=1e-3)
        for layer in (0, 20, 30):
            states = clvq.layer_states(smollm2, [layer], ids, mask)[layer]
            torch.testing.assert_close(states[mask], whole.hidden_states[layer][mask], atol=1e-3, rtol=1e-3)
            with clvq.blocks_above(smollm2, layer) as answer:
                torch.testing.assert_close(answer(states, mask), own, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("text", ["the kettle works well , again .", *CASES.values()])
def test_what_smollm2_reads_is_the_text_in_its_prompt(smollm2, text):
    encoded = clvq.encode(smollm2, [text], clvq.configure("smoke", max_tokens=500))
    if text != CASES["a special token"]:
        assert smollm2.tokenizer.decode(encoded.ids) == f"Review: {text.strip()}\nSentiment:"
    clvq.check_model(smollm2, (20, 30))
    assert [smollm2.tokenizer.decode([token]) for token in smollm2.answers] == [" negative", " positive"]
