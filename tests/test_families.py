"""Language models of other families: tiny ones with random weights, saved to a folder with a tokenizer trained here, and taken from it
as a user's own would be."""

from pathlib import Path

import httpx2
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
    "DebertaV2": ("unigram", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}),
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
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=special[0], **options)
    elif kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token=special[0], fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        options["special_tokens"] = special + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(limit_alphabet=60, **options)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
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


@pytest.mark.parametrize("case", CASES)
def test_a_word_has_the_sub_words_that_it_has_alone_and_the_summary_is_what_the_head_reads(family, lm, case):
    words, encoded = clvq.split_words(CASES[case]), clvq.encode(lm, [CASES[case]], setup())
    tokens, ids = clvq.align_words(lm, encoded), encoded.ids.tolist()
    decoder = family[0] in DECODERS
    summary, rows = tokens[tokens["is_summary"]], tokens[~tokens["is_summary"]]
    assert summary[["first", "last", "position"]].values.tolist() == [[len(ids) - 1, len(ids) - 1, 0] if decoder else [0, 0, 0]]
    alone = [lm.tokenizer([word], is_split_into_words=True, add_special_tokens=False).input_ids for word in words]
    room = 60 - (len(lm.prompt.before) + len(lm.prompt.after) if lm.prompt else 2)
    fits = [i for i, end in enumerate(np.cumsum([len(sub) for sub in alone])) if alone[i] and end - len(alone[i]) < room]
    assert rows["word"].tolist() == [words[i] for i in fits] and (rows["position"] - 1).tolist() == fits
    found = [ids[row.first : row.last + 1] for row in rows.itertuples()]
    assert found[:-1] == [alone[i] for i in fits[:-1]]
    assert not fits or found[-1] == alone[fits[-1]][: len(found[-1])]  # the last may be cut
    assert sum(map(len, found)) == min(room, sum(map(len, alone)))
    assert tokens.attrs["lost"] == len(words) - len(fits) and len(ids) <= 60
    if decoder:
        before, after = lm.prompt[:2]
        assert ids[: len(before)] == before and ids[len(ids) - len(after) :] == after


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
        words = clvq.split_words(text)
        with torch.no_grad():
            if name in DECODERS:
                ids = [*lm.prompt[0], *lm.tokenizer(words, is_split_into_words=True, add_special_tokens=False).input_ids, *lm.prompt[1]]
                assert ids[0] == 2 and ids.count(2) == 1
                scores = model(torch.tensor([ids])).logits[0, -1]
                expected = scores[[lm.tokenizer([a], is_split_into_words=True, add_special_tokens=False).input_ids[0] for a in ANSWERS]]
            else:
                expected = model(**lm.tokenizer([words], is_split_into_words=True, return_tensors="pt")).logits[0]
        torch.testing.assert_close(clvq.predict(lm, clvq.encode(lm, [text], setup()), setup())[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", range(4))
def test_states_put_in_at_their_layer_give_the_models_own_answers(lm, layer):
    encoded = clvq.encode(lm, TEXTS, setup())
    ids, mask = clvq.pad_ids(lm, encoded, torch.arange(len(TEXTS)))
    with torch.no_grad():
        expected = lm.model(input_ids=ids, attention_mask=mask.long()).logits
        state = clvq.layer_states(lm, [layer], ids, mask)[layer]
        with clvq.blocks_above(lm, layer) as answer:
            found = answer(state, mask)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lm.model(input_ids=ids, attention_mask=mask.long()).logits, expected)


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
    assert (tokens["salience"].isna() == (tokens["is_summary"] & (lm.prompt is not None))).all()
    assert np.isfinite(tokens.loc[~tokens["is_summary"], "salience"]).all() and tokens["salience"].abs().max() > 0
    torch.testing.assert_close(logits, clvq.predict(lm, clvq.encode(lm, TEXTS, setup()), setup()), atol=1e-4, rtol=1e-4)


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
    assert len(pipeline.alone) > 0 and len(pipeline.in_model(["CLVQ-VAE"])) == 40 * 4 and len(pipeline.report)
    assert pipeline.explain("a dull film").words["word"].tolist() == ["a", "dull", "film"]


# --- what a prompt can have wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
@pytest.mark.parametrize(
    "asked, part",
    [
        (("Review: {text} Answer:", ["positive", "positive thing"]), "same token"),
        (("Review: Answer:", ["dull", "fine"]), "{text}"),
        (None, "continues text"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(family, refused, asked, part):
    with refused(part):
        clvq.load_language_model(str(family[1]), asked=asked)


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
def test_a_model_that_continues_text_is_not_fine_tuned(family, refused):
    with refused("finetune"):
        clvq.load_language_model(str(family[1]), ["a", "b"])


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
        (dict(finetune=True), "finetune"),
        (dict(finetune=False, answers="bad"), "1 answers for 2 classes"),
        (dict(finetune=False, answers="dull, dull film"), "same token"),
        (dict(finetune=False, prompt="Is it good?"), "{text}"),
        (dict(finetune=False, source_layer=4), "source_layer 4"),
    ],
)
def test_what_cannot_be_asked_is_found_before_anything_runs(family, refused, tmp_path, settings, part):
    with refused(part):
        clvq.Pipeline(clvq.configure("smoke", model=str(family[1]), decoder_heads=4, **settings), tmp_path).check()


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
        whole = smollm2.model.causal(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        own = whole.logits[torch.arange(len(ids)), mask.sum(1) - 1][:, smollm2.prompt.answers]
        torch.testing.assert_close(clvq.predict(smollm2, encoded, setup()), own, atol=1e-3, rtol=1e-3)
        for layer in (0, 20, 30):
            states = clvq.layer_states(smollm2, [layer], ids, mask)[layer]
            torch.testing.assert_close(states[mask], whole.hidden_states[layer][mask], atol=1e-3, rtol=1e-3)
            with clvq.blocks_above(smollm2, layer) as answer:
                torch.testing.assert_close(answer(states, mask), own, atol=1e-3, rtol=1e-3)
