"""Every family of models that transformers knows, made tiny with random weights: what the door says of each.

`make compat` runs it (minutes), `make test` does not. A full run writes book/families.inc, a part of the page "Models and data".
"""

import contextlib
import re
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from test_families import ANSWERS, trained_tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

import clvq_core as clvq

PAGE = Path(__file__).parents[1] / "book" / "families.inc"
FAMILIES = [(kind, family, classes if isinstance(classes, str) else classes[0])
            for kind, mapping in (("classifier", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
                                  ("continues text", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
            for family, classes in mapping.items()]
SIZES = {
    32: "hidden_size d_model n_embd dim model_dim embedding_dim embedding_size emb_dim word_embed_proj_dim",
    3: "num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers num_decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads rotary_dim num_experts "
       "num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads n_head_kv num_experts_per_tok",
    48: "intermediate_size ffn_dim d_ff n_inner d_inner encoder_ffn_dim decoder_ffn_dim hidden_dim ffn_hidden_size",
    80: "max_position_embeddings n_positions n_ctx max_seq_len",
    8: "head_dim d_kv d_head",
    16: "moe_intermediate_size shared_expert_intermediate_size",
}
TOKENS = dict(pad_token_id=1, bos_token_id=2, cls_token_id=2, decoder_start_token_id=2, eos_token_id=3, sep_token_id=3)
RESULTS: dict[tuple[str, str], str] = {}


def make_small(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The family's own default configuration, and those inside it, with small sizes wherever it names one."""
    sizes = {name: size for size, names in SIZES.items() for name in names.split()} | {"vocab_size": 512}
    for name, value in sizes.items():
        with contextlib.suppress(Exception):
            if isinstance(getattr(config, name, None), int) or name == "n_inner":
                setattr(config, name, value)
    for name, value in TOKENS.items():
        with contextlib.suppress(Exception):
            setattr(config, name, value)
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            make_small(value)
        elif name in ("layer_types", "attention_layers", "mlp_layer_types", "no_rope_layers") and isinstance(value, list):
            setattr(config, name, value[:3])
    return config


@pytest.fixture(scope="module", autouse=True)
def page():
    """After a full run, the page: what came out, and of which families, the most frequent first."""
    yield
    if len(RESULTS) == len(FAMILIES):
        lines = []
        for kind in ("classifier", "continues text"):
            results = pd.Series({family: result for (one, family), result in RESULTS.items() if one == kind})
            lines += ["", "**As classifiers**" if kind == "classifier" else "**As models that continue text**", ""]
            for result, number in results.value_counts().items():
                families = ", ".join(results.index[results == result])
                lines.append(f"- *{result.replace('`', '').replace('*', '')}* ({number}): {families}")
        PAGE.write_text("\n".join(lines).strip() + "\n", "utf8")


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: trained_tokenizer("byte-level", kind == "continues text") for kind in ("classifier", "continues text")}


@pytest.mark.parametrize(("kind", "family", "name"), FAMILIES, ids=[f"{kind}-{family}" for kind, family, _ in FAMILIES])
def test_a_family_works_or_is_refused_in_one_sentence(kind, family, name, tokenizers, tmp_path):
    RESULTS[kind, family] = "cannot be made tiny here"
    try:
        config = make_small(getattr(transformers, CONFIG_MAPPING_NAMES[family])())
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(transformers, name)(config)
            assert sum(parameter.numel() for parameter in model.parameters()) < 2e7
            ids = torch.tensor([[2, *range(20, 30), 3]])
            with torch.no_grad():  # some do not run with these sizes, whoever asks them
                model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
            model.save_pretrained(tmp_path)
    except Exception as error:
        pytest.skip(f"{family} cannot be made tiny: {type(error).__name__}")
    tokenizers[kind].save_pretrained(tmp_path)
    try:
        asked = ("Review: {text}\nAnswer:", ANSWERS) if kind == "continues text" else None
        lm = clvq.load_language_model(str(tmp_path), asked=asked)
        assert kind == "continues text" or lm.summary in ("first", "last", "mean")
        clvq.check_model(lm, (1, lm.n_layers))
        RESULTS[kind, family] = "works"
    except ValueError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 400
        RESULTS[kind, family] = re.sub(rf"model '{re.escape(str(tmp_path))}' (\([\w-]+\) )?", "", sentence)
