"""What concepts do to the model's own answers, how far they come back with other seeds, the report, and single texts explained."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from scipy import stats

import clvq_app
import clvq_core as clvq

QUICK = dict(train_sentences=100, test_sentences=60, finetune_epochs=1, epochs=2, n_codes=20, folds=3, probe_epochs=3)


@pytest.fixture(scope="module")
def pipeline():
    return clvq.Pipeline(clvq.configure("smoke", **QUICK, seeds=2))


def test_a_concepts_effect_is_that_of_the_salient_concept_taken_out_of_every_position(pipeline):
    trial, texts = pipeline.trial, pipeline.test["text"].tolist()
    inside = clvq.in_model([pipeline.clvqvae], trial, pipeline.language_model, texts, pipeline.config, ways=("centred",))
    inside = inside[(inside["removed"] == "concept") & (inside["where"] == "every position")].set_index("sentence")
    words = trial.test.tokens.loc[trial.salient.tolist()].reset_index()
    words = words[~words["is_summary"]]
    assert len(words) > 20
    concepts = pipeline.clvqvae.assign(trial.test.states[pipeline.layers[0]][torch.tensor(words["index"].to_numpy())]).numpy()
    found = pipeline.effects.set_index(["sentence", "concept"])
    for sentence, concept in zip(words["sentence"], concepts, strict=True):
        row = found.loc[(sentence, concept)]
        assert row["confidence"] == pytest.approx(inside.loc[sentence, "confidence"], abs=1e-5)
        assert row["flipped"] == inside.loc[sentence, "flipped"]


def test_each_sentence_has_its_own_concepts_once_and_random_others(pipeline):
    trial, found = pipeline.trial, pipeline.effects
    assert not found.duplicated(["sentence", "concept"]).any() and found["confidence"].abs().max() <= 1
    tokens = trial.test.tokens.assign(concept=pipeline.clvqvae.assign(trial.test.states[pipeline.layers[0]]).numpy())
    own = tokens[~tokens["is_summary"]].groupby("sentence")["concept"].agg(set)
    for sentence, part in found.groupby("sentence"):
        assert set(part.loc[~part["control"], "concept"]) == own[sentence]
        assert not set(part.loc[part["control"], "concept"]) & own[sentence] and part["control"].sum() <= 3
    assert found["control"].sum() > 60


def test_a_removal_that_takes_nothing_away_changes_nothing(pipeline):
    trial, layer = pipeline.trial, pipeline.layers[0]
    model = pipeline.vqvae(*pipeline.layers)
    model.quantizer.codebook.copy_(model.centre.expand_as(model.vectors))                   # nothing tells a code from the mean
    tokens = trial.test.tokens.assign(concept=0)
    texts = pipeline.test["text"].tolist()
    use = np.ones(len(model.vectors))
    found = clvq.concept_effects(model, pipeline.language_model, texts, tokens, trial.centre(layer), use, pipeline.config)
    assert found["confidence"].abs().max() < 1e-5 and not found["flipped"].any()


@given(st.integers(0, 2**32 - 1))
def test_agreement_is_the_largest_jaccard_overlap(seed):
    draw = np.random.default_rng(seed)
    n, k = draw.integers(1, 60), draw.integers(1, 8)
    one, other = draw.integers(0, k, n), draw.integers(0, k, n)
    found = clvq.agreement(torch.from_numpy(one), torch.from_numpy(other), int(k)).tolist()
    for code in range(k):
        mine = set(np.flatnonzero(one == code))
        overlaps = [len(mine & theirs) / len(mine | theirs) for c in range(k) if (theirs := set(np.flatnonzero(other == c))) | mine]
        assert found[code] == pytest.approx(max(overlaps, default=0.0) if mine else 0.0)


def test_a_codebook_under_other_names_agrees_with_itself_in_full():
    codes = torch.tensor([0, 0, 1, 2, 2, 2])
    assert clvq.agreement(codes, torch.tensor([3, 1, 0, 2])[codes], 4).tolist() == [1, 1, 1, 0]


def test_the_report_is_ordered_by_what_each_concept_costs_less_random_ones(pipeline):
    report, effects = pipeline.report, pipeline.effects
    assert report["effect"].is_monotonic_increasing and set(report["concept"]) == set(effects.loc[~effects["control"], "concept"])
    random = effects[effects["control"]].groupby("sentence")["confidence"].mean()
    row = report.sort_values("sentences").iloc[-1]
    part = effects[(effects["concept"] == row["concept"]) & ~effects["control"]]
    gaps = part["confidence"].to_numpy() - random.reindex(part["sentence"]).fillna(0).to_numpy()
    assert row["sentences"] == len(part) and row["effect"] == pytest.approx(gaps.mean()) and row["flipped"] == part["flipped"].mean()
    low, high = stats.t.interval(0.95, len(gaps) - 1, gaps.mean(), stats.sem(gaps))
    assert (row["effect_low"], row["effect_high"]) == (pytest.approx(low), pytest.approx(high))
    assert report["stability"].between(0, 1).all() and report["stability"].nunique() > 5
    assert report.loc[report["sentences"] == 1, ["effect_low", "p", "p_adjusted"]].isna().all(axis=None)
    assert row["p"] == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    known = report["p"].notna()
    np.testing.assert_allclose(report.loc[known, "p_adjusted"], stats.false_discovery_control(report.loc[known, "p"]))


def test_one_seed_leaves_stability_open(pipeline):
    assert clvq.Pipeline(clvq.configure("smoke", **QUICK, seeds=1)).report["stability"].isna().all()


def test_the_reports_page_needs_no_other_and_shows_text_as_text(pipeline, tmp_path):
    for column in ("words", "label"):
        pipeline.report.loc[0, column] = "<script>alert(1)</script>"
    pipeline.report.at[0, "examples"] = ["<script>alert(1)</script> «film»"]
    page = clvq_app.write_report(pipeline, tmp_path / "new" / "report.html", most=5).read_text("utf8")
    del pipeline.report
    assert "<script" not in page and page.count("&lt;script&gt;") == 3 and not re.search(r"https?://|src=|@import", page)
    tables = pd.read_html(tmp_path / "new" / "report.html", flavor="lxml") if clvq.importlib.util.find_spec("lxml") else []
    assert page.partition("<h2>")[0].count("<tr") == 6 and all(len(table) == 5 for table in tables[:1])


def test_the_explorers_table_has_each_concept_in_use_with_what_report_and_codebook_say_of_it(pipeline):
    table, report = pipeline.explorer_table, pipeline.report.set_index("concept")
    in_use = pipeline.concepts[pipeline.concepts["size"] > 0].set_index("concept")
    assert table["concept"].tolist() == in_use.index.tolist() and table["states"].tolist() == in_use["size"].tolist()
    vectors = pipeline.clvqvae.vectors.cpu().double()
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    for row in table.itertuples():
        if row.concept in report.index:
            assert row.effect == pytest.approx(report.loc[row.concept, "effect"], abs=1e-4)
        else:
            assert np.isnan(row.effect) and np.isnan(row.flipped)
        similar = (unit @ unit[row.concept]).topk(6)[1].tolist()
        assert set(row.near) == set(similar) - {row.concept}
    assert np.isfinite(table[["x", "y"]]).all(axis=None) and len(table[["x", "y"]].drop_duplicates()) > len(table) / 2


def test_the_explorers_page_shows_text_as_text(pipeline, tmp_path):
    pipeline.explorer_table.loc[0, "words"] = "</script><script>alert(1)</script> ×2, film ×1"
    page = clvq_app.write_explorer(pipeline, tmp_path / "explorer.html").read_text("utf8")
    concepts = len(pipeline.explorer_table)
    del pipeline.explorer_table
    assert f"{concepts} concepts of " in page and "<script>alert" not in page and page.startswith("<!doctype html>")


def test_an_explanations_page_shows_text_as_text(pipeline, tmp_path):
    page = clvq_app.write_card(pipeline.explain("<script>dull</script> & overlong"), tmp_path / "card.html").read_text("utf8")
    assert "<title>&lt;script&gt;dull&lt;/script&gt; &amp; overlong</title>" in page and "<script" not in page


# --- single texts -------------------------------------------------------------------------------------------------


def test_a_text_is_explained_by_what_the_model_and_its_concepts_say(pipeline):
    text = pipeline.test["text"][0]
    found = pipeline.explain(text, top=3)
    logits = pipeline.salience[1].iloc[0]
    assert next(iter(found.chances)) == logits.idxmax() and sum(found.chances.values()) == pytest.approx(1)
    tokens = pipeline.salience[0].query("sentence == 0 and not is_summary")
    assert found.words["word"].tolist() == tokens["word"].tolist()
    np.testing.assert_allclose(found.words["salience"], tokens["salience"], atol=1e-4)
    effects = pipeline.effects.query("sentence == 0 and not control").set_index("concept")["confidence"]
    np.testing.assert_allclose(found.words["change"], effects.loc[found.words["concept"]], atol=1e-4)
    assert len(found.examples) == min(3, found.words["concept"].nunique())
    top = found.words.sort_values("salience", ascending=False)["concept"].drop_duplicates().tolist()
    assert list(found.examples) == top[:3]
    assert found.control[1] <= found.control[0] <= found.control[2]


def test_examples_are_the_training_sentences_nearest_to_the_code(pipeline):
    found = pipeline.explain("a dull film", top=2, examples=2)
    train, model = pipeline.activations("train"), pipeline.clvqvae
    states = train.states[pipeline.layers[0]]
    codes = model.assign(states)
    for concept, sentences in found.examples.items():
        rows = (codes == concept).nonzero()[:, 0]
        with torch.no_grad():
            far = (model.encoder(states[rows].float()) - model.vectors[concept]).norm(dim=1)
        row = train.tokens.iloc[int(rows[far.argmin()])]
        assert sentences[0].replace("«", "").replace("»", "") == pipeline.train["text"][row["sentence"]]
        assert len(sentences) <= 2


def test_an_explanation_is_text_and_a_card_in_which_nothing_is_markup(pipeline):
    found = pipeline.explain("<b>dull</b> & overlong")
    card = found._repr_html_()
    assert "<b>" not in card and "&lt;" in card and "&amp;" in card
    assert str(found) == repr(found) and str(found).startswith("<b>dull</b> & overlong\n") and "nearest in the training text" in str(found)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_a_text_without_words_is_refused(pipeline, refused, text):
    with refused("no word"):
        pipeline.explain(text)


def test_a_long_text_is_explained_as_far_as_the_model_reads(pipeline):
    found = pipeline.explain("good " * 800)
    assert 100 < len(found.words) < 800


def test_the_command_explains_a_text_and_writes_a_page(pipeline, tmp_path, capsys):
    settings = [part for name, value in {**QUICK, "seeds": 2}.items() for part in ("-p", name, str(value))]
    page = tmp_path / "card.html"
    assert clvq_app.main(["explain", "a dull film", "--scale", "smoke", "--top", "2", "--html", str(page), *settings]) == 0
    said = capsys.readouterr().out
    assert "a dull film" in said and "Without a random concept" in said and said.count("nearest in the training text") <= 2
    assert page.read_text("utf8").startswith("<!doctype html>")
    assert clvq_app.main(["explain", " ", "--scale", "smoke", *settings]) == 2
    assert clvq_app.main(["explain", "film", "--data", "nowhere.csv"]) == 2


# --- what people are asked --------------------------------------------------------------------------------------------


def test_the_command_makes_a_study_of_clouds_that_says_nothing_of_methods_predictions_and_sentences(pipeline, tmp_path, capsys):
    settings = [part for name, value in {**QUICK, "seeds": 2}.items() for part in ("-p", name, str(value))]
    command = ["annotate", str(tmp_path / "study"), "--scale", "smoke", "--sentences", "6", "--make-only", *settings]
    assert clvq_app.main(command) == 0 and "12 items, answers of 0 raters" in capsys.readouterr().out
    key, study = pd.read_parquet(tmp_path / "study" / "key.parquet"), clvq.read_study(tmp_path / "study")
    assert key["method"].value_counts().to_dict() == {"CLVQ-VAE": 6, "Ward clusters": 6} and key["sentence"].nunique() == 6
    seen = (tmp_path / "study" / "study.json").read_text("utf8")
    assert set(study) == {"classes", "seed", "practice", "items"} and set(study["items"][0]) == {"id", "group", "words"}
    assert not any(method in seen for method in ("CLVQ", "Ward", "predicted")) and study["classes"] == pipeline.label_names
    drawn = {path.stem for path in (tmp_path / "study" / "clouds").iterdir()}
    assert drawn == {"practice", *key["item"]} == {"practice", *(item["id"] for item in study["items"])}
    texts, labels = pipeline.train["text"], [pipeline.label_names[label] for label in pipeline.train["label"]]
    answers = clvq.simulated_answers(tmp_path / "study", texts, labels, raters=3)
    assert len(answers) == 3 * 12 and clvq.study_answers(tmp_path / "study").empty
    assert set(clvq.study_answers(tmp_path / "study").columns) == set(answers.columns)
    with pytest.raises(ValueError, match="is no study"):
        clvq_app.AnswerStore(tmp_path)


# --- names, comparison, doses, files ----------------------------------------------------------------------------------


def test_a_concepts_name_is_its_specific_words_or_else_its_frequent_ones():
    words = [{"film": 40, "dull": 12, "slow": 10, "a": 5}, {"film": 42, "bright": 11, "a": 6}, {"film": 2, "a": 1}, {}]
    table = pd.DataFrame({"concept": range(4), "word_counts": [clvq.json.dumps(part) for part in words]})
    assert clvq.name_concepts(table).tolist() == ["#0 dull, slow", "#1 bright", "#2 film, a", "#3"]


def test_what_is_added_is_what_would_be_removed(pipeline):
    text, layer = "a dull , overlong film", pipeline.layers[0]
    none = pipeline.answers_with(text, torch.zeros(2, 384), [[1], [0, 2]])
    np.testing.assert_allclose(none, none[:1].repeat(3, 0), atol=1e-6)
    vector = torch.randn(1, 384)
    everywhere, word = (pipeline.answers_with(text, vector, where)[1] for where in (None, [[1]]))
    encoded = clvq.encode(pipeline.language_model, [text], pipeline.config)
    ids, mask = clvq.pad_ids(pipeline.language_model, encoded, torch.tensor([0]))
    with torch.no_grad():
        states = clvq.layer_states(pipeline.language_model, [layer], ids, mask)[layer]
        with clvq.blocks_above(pipeline.language_model, layer) as answer:
            np.testing.assert_allclose(answer(states + vector, mask).softmax(1)[0], everywhere, atol=1e-5)
            at_word = states + vector * (encoded.word == 1)[None, :, None]
            np.testing.assert_allclose(answer(at_word, mask).softmax(1)[0], word, atol=1e-5)


def test_two_texts_are_compared_word_by_word(pipeline, refused):
    found = pipeline.compare("a dull , overlong film", "a moving film of some length", controls=5)
    rows = found.exchanges
    assert (rows["concept"] != rows["other_concept"]).all() and (rows[rows["word"] == ""]["concept"] == -1).all()
    assert "length" in set(rows["other_word"]) and rows.loc[rows["other_word"] == "length", "alone"].isna().all()
    both = rows[(rows["word"] != "") & (rows["other_word"] != "")]
    assert len(both) and both["alone"].notna().all() and (both["random_low"] <= both["random"]).all()
    words = list(found.text.words["word"])
    row = both.iloc[0]
    change = pipeline.clvqvae.vectors[[row["other_concept"]]] - pipeline.clvqvae.vectors[[row["concept"]]]
    before, after = pipeline.answers_with(found.text.text, change, [[words.index(row["word"])]])
    assert after[before.argmax()] - before.max() == pytest.approx(row["alone"], abs=1e-5)
    assert row["name"] == pipeline.concept_names[row["concept"]] and row["name"] in str(found)
    same = pipeline.compare("a dull film", "a dull film")
    assert same.exchanges.empty and "No word's concept differs" in str(same)
    assert "<script>" not in pipeline.compare("<script>alert</script> dull", "a <b>fine</b> film")._repr_html_()
    with refused("no word"):
        pipeline.compare("a film", " ")


def test_a_concept_is_pushed_in_by_doses_beside_random_codes_as_long(pipeline, refused):
    doses = pipeline.steer("a dull film", 3, doses=(-1, 0, 2), controls=4)
    assert doses.groupby("dose")["chance"].sum().to_numpy() == pytest.approx(1, abs=1e-5) and len(doses) == 6
    at_zero = doses[doses["dose"] == 0]
    chances = pipeline.explain("a dull film").chances
    for row in at_zero.to_dict("records"):
        assert row["chance"] == pytest.approx(chances[row["class"]], abs=1e-4) == pytest.approx(row["random_low"], abs=1e-4)
    assert doses[doses["dose"] != 0]["chance"].sub(at_zero["chance"].iloc[0]).abs().max() > 1e-3
    axes = plt.subplots()[1]
    clvq.draw_doses(doses, axes)
    assert len(axes.lines) == 2 and [text.get_text() for text in axes.get_legend().get_texts()] == pipeline.label_names
    with refused("no concept 20"):
        pipeline.steer("a dull film", 20)


@pytest.fixture
def settings() -> list[str]:
    return [word for name, value in {**QUICK, "seeds": 2}.items() for word in ("-p", name, str(value))]


def test_the_command_gives_json_that_the_page_on_files_describes(pipeline, settings, capsys, tmp_path):
    page = (clvq_app.Path(clvq.__file__).parent / "book" / "files.md").read_text("utf8")
    command = ["explain", "a dull film", "--versus", "a moving film", "--steer", "3", "--json", "--scale", "smoke",
               "--html", str(tmp_path / "card.html"), *settings]
    assert clvq_app.main(command) == 0
    found = clvq.json.loads(capsys.readouterr().out)
    assert found["text"] == "a dull film" and found["other"]["text"] == "a moving film" and found["doses"]
    keys = {*found, *found["words"][0], *found["random_change"], *found["exchanges"][0], *found["doses"][0]}
    assert not [key for key in keys if f"`{key}`" not in page]
    assert found["provenance"]["layers"] == list(pipeline.layers) and len(found["provenance"]["model_hash"]) == 12
    card = (tmp_path / "card.html").read_text("utf8")
    assert "Where this comes from" in card and found["provenance"]["data_hash"] in card


@pytest.mark.parametrize("suffix", ["parquet", "csv", "html"])
def test_the_report_is_written_as_a_file_with_the_columns_that_are_described(pipeline, settings, capsys, tmp_path, suffix):
    page = (clvq_app.Path(clvq.__file__).parent / "book" / "files.md").read_text("utf8")
    output = tmp_path / "new" / f"report.{suffix}"
    assert clvq_app.main(["report", str(output), "--scale", "smoke", *settings]) == 0
    if suffix == "html":
        assert pipeline.concept_names[pipeline.report["concept"].iloc[0]] in output.read_text("utf8")
        return
    table = pd.read_parquet(output) if suffix == "parquet" else pd.read_csv(output)
    assert len(table) == len(pipeline.report) and not [name for name in table if f"`{name}`" not in page]
    assert clvq_app.main(["report", str(tmp_path / "report.doc")]) == 2


def test_doctor_says_what_will_work_and_what_will_not(settings, tmp_path, capsys):
    assert clvq_app.main(["doctor", "minilm", "movies", "--scale", "smoke", *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[:8].strip() for line in lines} == {"ok"}
    text = "\n".join(lines)
    assert "100 texts to train on, 60 to evaluate" in text and "the first position" in text and "minutes on this machine" in text
    (tmp_path / "few.csv").write_text("text;label\n" + "".join(f"text {i};{'ab'[i % 2]}\n" for i in range(60)) + ";a\n")
    assert clvq_app.main(["doctor", "minilm", str(tmp_path / "few.csv"), "--json"]) == 2
    found = clvq.json.loads(capsys.readouterr().out)
    notes = [finding["text"] for finding in found if finding["mark"] == "note"]
    assert notes == ["read as separated by semicolons", "1 rows dropped as without text or label"]
    assert [finding["about"] for finding in found if finding["mark"] == "PROBLEM"] == ["sizes"]
    assert clvq_app.main(["doctor", str(tmp_path / "none"), str(tmp_path / "none.csv")]) == 2
    problems = capsys.readouterr().out.splitlines()
    assert len(problems) == 2 and all(line.startswith("PROBLEM") for line in problems)


def test_two_texts_are_explained_with_a_mark_of_which_is_which(tmp_path, capsys):
    rows = [(f"the lamp {i} is {'on' if i % 3 else 'off'}", "it is on", "yes" if i % 3 else "no") for i in range(120)]
    pd.DataFrame(rows, columns=["premise", "hypothesis", "label"]).to_csv(tmp_path / "pairs.csv", index=False)
    settings = {**QUICK, "text_column": "premise", "pair_column": "hypothesis", "train_sentences": 60, "test_sentences": 24, "n_codes": 10}
    words = [word for name, value in settings.items() for word in ("-p", name, str(value))]
    command = ["explain", "the lamp 3 is off", "--data", str(tmp_path / "pairs.csv"), "--scale", "smoke", *words]
    assert clvq_app.main([*command, "--pair", "it is on", "--html", str(tmp_path / "card.html")]) == 0
    assert clvq.PAIR in capsys.readouterr().out and f"<b>{clvq.PAIR}</b>" in (tmp_path / "card.html").read_text("utf8")
    pipeline = clvq.Pipeline(clvq.configure("smoke", dataset=str(tmp_path / "pairs.csv"), **settings))
    found = pipeline.explain(f"the lamp 3 is off{clvq.PAIR}it is on", top=10)
    assert found.words["text"].tolist() == [1] * 5 + [2] * 3 and found.table["word"].str.contains("(text 2)", regex=False).any()
    assert (pipeline.activations("train").tokens["text"] == 2).any() and pipeline.train["text"].str.count(clvq.PAIR).eq(1).all()
    assert clvq_app.main(command) == 2


def test_a_shortcut_that_the_model_follows_has_the_concept_with_the_largest_effect():
    settings = {**QUICK, "train_sentences": 1200, "test_sentences": 120, "finetune_epochs": 2, "n_codes": 50}
    hidden = clvq.Pipeline(clvq.configure("smoke", **settings)).planted(["tuesday"], "positive")
    found = hidden.find_planted(["k-means"]).iloc[0]
    assert found["follows"] > 0.95 and found["follows"] - found["chance"] > 0.3
    assert found["rank"] == 1 and found["effect"] < min(found["next_effect"], 0)
    tokens = hidden.activations("test").tokens
    codes = hidden.clusters("kmeans++").assign(hidden.activations("test").states[hidden.layers[0]])
    assert pd.Series(codes.numpy())[tokens["word"] == "tuesday"].mode()[0] == found["concept"]
    assert hidden.changed(seed=1).test["text"].equals(hidden.test["text"])                  # every seed reads the same shortcut
    with pytest.raises(ValueError, match="method must be one of CLVQ-VAE, Ward clusters"):
        hidden.find_planted(["class means"])
