"""Settings: what is accepted, what is refused and how, and that they survive JSON."""

import math
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import clvq_core as clvq

HINTS = {name: hint for name, hint in get_type_hints(clvq.Config, include_extras=True).items() if name in clvq.Config.model_fields}


def plain(hint):
    """A hint without None."""
    return next(kind for kind in get_args(hint) if kind is not type(None)) if get_origin(hint) in (Union, UnionType) else hint


def values(hint) -> st.SearchStrategy:
    """Values that a field's type hint allows."""
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(*(values(kind) for kind in get_args(hint) if kind is not type(None)))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    kind, bounds = hint, {}
    if get_origin(hint) is Annotated:
        kind, bounds = get_args(hint)[0], {type(part).__name__: part for part in get_args(hint)[1].metadata}
    low, high = bounds["Ge"].ge if bounds else -1e6, bounds["Le"].le if "Le" in bounds else math.inf
    if kind is int:
        return st.integers(int(low), 10**6 if high == math.inf else int(high))
    if kind is float:
        return st.floats(low, 1e6 if high == math.inf else high)
    return {bool: st.booleans(), str: st.text()}[kind]


def overrides() -> st.SearchStrategy:
    """Some settings with values they allow."""

    def possible(chosen):
        codes = chosen.get("n_codes", 50)
        return {**chosen, "top_k": min(chosen.get("top_k", 1), codes), "temperature": chosen.get("temperature") or 1.0}

    return st.fixed_dictionaries({}, optional={name: values(hint) for name, hint in HINTS.items()}).map(possible)


@pytest.mark.parametrize("scale", clvq.PRESETS)
def test_every_scale_gives_valid_settings(scale):
    config = clvq.configure(scale)
    for name, value in clvq.PRESETS[scale].items():
        assert getattr(config, name) == value


def test_an_unknown_scale_is_refused_with_the_known_ones(refused):
    with refused("scale", "'huge'", *clvq.PRESETS):
        clvq.configure("huge")


def test_the_paper_scale_has_the_settings_of_table_6_to_the_letter():
    config = clvq.configure("paper")
    table_6 = dict(n_codes=400, learning_rate=5e-3, clip_norm=0.0, norm_first=False, standardize_targets=False, commitment=0.1,
                   decoder_layers=6, decoder_heads=8, feedforward=2048, dropout=0.1, top_k=5,
                   temperature=1.0, alpha="adaptive", alpha_ceiling=0.5, weight_decay=1e-4, lr_factor=0.5, lr_patience=5,
                   batch_sentences=128, epochs=50, stop_patience=15, validation_share=0.1, seed=42, ema_decay=0.99,
                   ema_epsilon=1e-5, memory="encoder", mask="causal", start="spherical", folds=20)  # fmt: skip
    assert {name: getattr(config, name) for name in table_6} == table_6


def test_the_authors_scale_has_the_choices_of_their_code():
    config = clvq.configure("authors")
    assert (config.frequency_filter, config.min_count, config.max_count) == ("first", 5, 20)
    assert (config.mask, config.norm_first, config.learning_rate, config.clip_norm) == ("anticausal", False, 5e-3, 0)
    assert (config.salience_steps, config.probe_stopping, config.words) == (500, "test", "whitespace")
    assert (config.sae_rows, config.words_from, config.start_in, config.standardize_targets) == ("source", "samples", "averages", False)


def test_an_unknown_name_is_refused_and_the_nearest_one_offered(refused):
    with refused("'n_code'", "did you mean n_codes"):
        clvq.configure("smoke", n_code=10)
    with refused("'qqqq'"):
        clvq.configure("smoke", qqqq=1)
    with refused("'qqqq'"):
        clvq.Config.from_json('{"qqqq": 1}')


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("n_codes", "400", "a whole number"),
        ("n_codes", 400.0, "a whole number"),
        ("n_codes", True, "a whole number"),
        ("learning_rate", "1e-3", "a number"),
        ("learning_rate", True, "a number"),
        ("finetune", "true", "true or false"),
        ("finetune", 1, "true or false"),
        ("dataset", 7, "a text"),
        ("dataset", ["movies"], "a text"),
        ("source_layer", "4", "a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_even_as_papermills_text(refused, name, value, kind):
    with refused(name, kind, repr(value)):
        clvq.configure("smoke", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("n_codes", 0, "at least 1"),
        ("epochs", -1, "at least 1"),
        ("source_layer", -1, "at least 0"),
        ("clip_norm", -0.5, "at least 0"),
        ("dropout", 1.5, "between 0 and 0.9"),
        ("ema_decay", -0.1, "between 0 and 1"),
        ("commitment", math.nan, "at least 0"),
        ("validation_share", math.nan, "between 0.001 and 0.9"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(refused, name, value, allowed):
    with refused(name, allowed, repr(value)):
        clvq.configure("smoke", **{name: value})


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if get_origin(hint) is Literal])
def test_a_choice_that_does_not_exist_is_refused_with_the_choices(refused, name):
    with refused(name, "'nonsense'", *get_args(HINTS[name])):
        clvq.configure("smoke", **{name: "nonsense"})


def test_more_nearest_codes_than_codes_are_refused(refused):
    assert clvq.configure("smoke", top_k=8, n_codes=8).top_k == 8
    with refused("top_k", "n_codes=8", "9"):
        clvq.configure("smoke", top_k=9, n_codes=8)


def test_a_temperature_of_zero_is_refused_with_what_to_do_instead(refused):
    with refused("temperature", "top_k=1"):
        clvq.configure("smoke", temperature=0.0)


def test_a_whole_number_will_do_for_a_number_and_becomes_one():
    assert type(clvq.configure("smoke", temperature=2).temperature) is float


def test_none_leaves_the_scales_own_value():
    assert clvq.configure("smoke", n_codes=None, source_layer=None) == clvq.configure("smoke")


def test_settings_cannot_be_changed():
    config = clvq.configure("smoke")
    with pytest.raises(ValidationError):
        config.n_codes = 3  # type: ignore[misc]


@given(chosen=overrides())
def test_settings_survive_json_whatever_they_are(chosen):
    config = clvq.configure("smoke", **chosen)
    assert clvq.Config.from_json(config.to_json()) == config
    assert all(getattr(config, name) == value for name, value in chosen.items())


@given(chosen=overrides())
def test_a_part_of_the_settings_has_the_same_values(chosen):
    config = clvq.configure("smoke", **chosen)
    for kind in (clvq.CorpusSettings, clvq.ModelSettings, clvq.TrainSettings, clvq.ProbeSettings):
        assert config.subset(kind).model_dump().items() <= config.model_dump().items()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("n_codes", "12", 12), ("learning_rate", "1e-3", 1e-3), ("learning_rate", "1", 1.0), ("finetune", "false", False),
     ("source_layer", "none", None),
     ("dataset", "movies", "movies"), ("dataset", "2012", "2012"), ("prompt", "true", "true"), ("n_codes", "many", "many"),
     ("raters", "12", 12), ("difference", "0.5", 0.5), ("difference", "-2", -2), ("rationales", "none", None),
     ("rationales", "True", True), ("report", "yes", "yes")],
)  # fmt: skip
def test_a_value_of_the_command_line_is_read_in_the_type_of_its_setting_and_otherwise_as_it_looks(name, text, value):
    parsed = clvq.parse_value(name, text)
    assert parsed == value and type(parsed) is type(value)


def test_settings_are_documented_for_who_asks_for_their_schema():
    assert all(field.description for field in clvq.Config.model_fields.values())
    assert "table 2" in clvq.Config.model_fields["top_k"].description


def test_a_changed_setting_is_checked_again(refused):
    config = clvq.configure("smoke", n_codes=8)
    assert config.replace(top_k=8).top_k == 8 and config.top_k == 5
    with refused("top_k", "n_codes=8", "9"):
        config.replace(top_k=9)
    with refused("'n_code'", "did you mean n_codes"):
        config.replace(n_code=3)
