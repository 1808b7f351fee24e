"""Encoder, decoder and the whole CLVQ-VAE: equation 1, masks, what passes around the codes, saving and loading."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import clvq_core as clvq

WIDTH = 32


def model_settings(**chosen) -> clvq.ModelSettings:
    small = dict(n_codes=12, top_k=3, decoder_layers=2, decoder_heads=4, feedforward=64)
    return clvq.configure("smoke", **{**small, **chosen}).subset(clvq.ModelSettings)


def build(acts: clvq.Activations, **chosen) -> clvq.CLVQVAE:
    """A model in evaluation mode whose codes and target statistics come from the states."""
    settings = model_settings(**chosen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clvq.CLVQVAE(WIDTH, WIDTH, 0, 1, "synthetic", settings)
    model.quantizer.start(*clvq.start_codebook(acts.states[0], settings, torch.Generator().manual_seed(0)))
    model.target_mean.copy_(acts.states[1].float().mean(0))
    model.target_scale.copy_(acts.states[1].float().std(0))
    return model.eval()


@pytest.fixture(scope="module")
def batch(tiny_acts):
    """Source states of eight sentences of unlike length, one after the other, and the lengths."""
    (x,), lengths = next(tiny_acts.stream([torch.arange(8)], [0], torch.device("cpu")))
    assert len(lengths.unique()) > 2 and len(x) == lengths.sum()
    return x, lengths


# --- encoder ------------------------------------------------------------------------------------------------------


def test_the_encoder_is_equation_1():
    encoder = clvq.AdaptiveResidualEncoder(WIDTH, model_settings())
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
        linear, norm, a = encoder.linear, encoder.norm, 0.5 * torch.sigmoid(encoder.theta)
        y = x @ linear.weight.T + linear.bias
        normed = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(encoder(x), (1 - a) * x + a * (normed * norm.weight + norm.bias))


def test_the_encoder_starts_with_an_alpha_of_0275_and_the_layer_norm_of_its_input():
    encoder = clvq.AdaptiveResidualEncoder(WIDTH, model_settings())
    x = torch.randn(5, WIDTH)
    assert encoder.alpha.item() == pytest.approx(0.275, abs=5e-4)
    torch.testing.assert_close(encoder(x), (1 - encoder.alpha) * x + encoder.alpha * F.layer_norm(x, (WIDTH,)))


@pytest.mark.parametrize("chosen", [dict(alpha="adaptive", alpha_theta=-60.0), dict(alpha="complete", alpha_theta=-60.0),
                                    dict(alpha="fixed", fixed_alpha=0.0), dict(alpha_ceiling=0.0)])  # fmt: skip
def test_the_encoder_is_the_identity_where_alpha_is_zero(chosen):
    x = 50 * torch.randn(5, WIDTH)
    torch.testing.assert_close(clvq.AdaptiveResidualEncoder(WIDTH, model_settings(**chosen))(x), x, rtol=0, atol=1e-6)


@given(theta=st.floats(-1e3, 1e3), ceiling=st.floats(0, 1))
def test_adaptive_alpha_never_passes_its_ceiling_and_complete_alpha_has_none(theta, ceiling):
    adaptive, complete = (
        clvq.AdaptiveResidualEncoder(4, model_settings(alpha=kind, alpha_theta=theta, alpha_ceiling=ceiling)).alpha
        for kind in ("adaptive", "complete")
    )
    assert 0 <= adaptive <= torch.tensor(ceiling)
    torch.testing.assert_close(adaptive, ceiling * complete)
    torch.testing.assert_close(complete, torch.tensor(theta).sigmoid())


@pytest.mark.parametrize("a", [0.0, 0.1, 0.4, 0.75, 1.0])
def test_fixed_alpha_stays_where_it_is_put(a):
    encoder = clvq.AdaptiveResidualEncoder(WIDTH, model_settings(alpha="fixed", fixed_alpha=a))
    encoder(torch.randn(5, WIDTH)).square().sum().backward()
    assert encoder.alpha.item() == pytest.approx(a) and encoder.theta.grad is None


@pytest.mark.parametrize("kind", ["adaptive", "complete"])
def test_alpha_learns_unless_it_is_fixed(kind):
    encoder = clvq.AdaptiveResidualEncoder(WIDTH, model_settings(alpha=kind))
    encoder(torch.randn(5, WIDTH)).square().sum().backward()
    assert encoder.theta.grad.abs() > 0


# --- decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "forward", "backward"), [("causal", True, False), ("anticausal", False, True), ("none", True, True)])
def test_self_attention_sees_what_its_mask_lets_it_see(tiny_acts, mask, forward, backward):
    decoder = build(tiny_acts, mask=mask).decoder
    queries, memory, lengths = torch.randn(12, WIDTH), torch.randn(12, WIDTH), torch.tensor([7, 5])
    before = decoder(queries, memory, lengths)
    queries[[3, 7 + 3]] = torch.randn(2, WIDTH)
    moved = (decoder(queries, memory, lengths) - before).abs().amax(-1) > 1e-4  # which positions saw the change
    for sentence in moved.split(lengths.tolist()):
        assert sentence[3]
        assert sentence[4:].all() == forward and sentence[4:].any() == forward
        assert sentence[:3].all() == backward and sentence[:3].any() == backward


def test_a_position_sees_the_memory_of_all_positions(tiny_acts):
    decoder = build(tiny_acts).decoder
    queries, memory, lengths = torch.randn(9, WIDTH), torch.randn(9, WIDTH), torch.tensor([7, 2])
    before = decoder(queries, memory, lengths)
    memory[6] = torch.randn(WIDTH)
    assert torch.equal((decoder(queries, memory, lengths) - before).abs().amax(-1) > 1e-5, torch.arange(9) < 7)  # its own sentence


@pytest.mark.parametrize("mask", ["causal", "none", "anticausal"])
@pytest.mark.parametrize(("longest", "n"), [(61, 128), (8, 500), (32, 3), (1, 1)])
def test_sentences_share_lines_and_see_nothing_of_each_other(mask, longest, n):
    draw = torch.Generator().manual_seed(n)
    lengths = torch.randint(1, longest + 1, (n,), generator=draw)
    layout, total = clvq.Layout(lengths, mask, torch.device("cpu")), int(lengths.sum())
    assert math.prod(layout.shape) < 1.2 * total + 4 * 64  # little is empty
    assert len(layout.places.unique()) == total  # no two in one place
    line, place = layout.places // layout.shape[1], layout.places % layout.shape[1]
    sentence, position = torch.arange(n).repeat_interleave(lengths), torch.cat([torch.arange(size) for size in lengths])
    same = sentence[:, None] == sentence
    assert torch.equal(layout.same_sentence[line[:, None], 0, place[:, None], place] & (line[:, None] == line), same)
    order = {"causal": position[:, None] >= position, "none": True, "anticausal": position[:, None] <= position}[mask]
    assert torch.equal(layout.visible[line[:, None], 0, place[:, None], place] & (line[:, None] == line), same & order)
    assert layout.visible.any(-1).all()  # an empty place too sees something, so that no softmax is undefined


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", ["causal", "none", "anticausal"])
@pytest.mark.parametrize("lengths", [[5, 1, 7, 7], [3, 3], [1], [1, 1, 1], [40, 20, 9, 33, 16]])
def test_without_padding_the_decoder_gives_what_pytorchs_own_gives_with_padding(norm_first, mask, lengths):
    decoder = clvq.Decoder(WIDTH, 20, model_settings(decoder_layers=3, norm_first=norm_first, mask=mask, dropout=0.0))
    layer = torch.nn.TransformerDecoderLayer(WIDTH, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
    theirs = torch.nn.TransformerDecoder(layer, 3, decoder.norm if norm_first else None)
    for one, other in zip(theirs.layers, decoder.layers, strict=True):
        one.load_state_dict(other.state_dict())
    lengths = torch.tensor(lengths)
    wide = int(lengths.max())
    real = torch.arange(wide) < lengths[:, None]
    seen = torch.ones(wide, wide, dtype=torch.bool)
    seen = real[:, None] & {"causal": seen.tril(), "anticausal": seen.triu(), "none": seen}[mask] | torch.eye(wide, dtype=torch.bool)
    queries, memory = torch.randn(2, len(lengths), wide, WIDTH)
    queries.requires_grad_()
    expected = decoder.out(theirs(queries, memory, tgt_mask=~seen.repeat_interleave(4, 0), memory_key_padding_mask=~real))[real]
    found = decoder(queries[real], memory[real], lengths)
    torch.testing.assert_close(found, expected)
    for parameters in zip(theirs.layers.parameters(), decoder.layers.parameters(), strict=True):
        gradients = [torch.autograd.grad(out.square().sum(), [queries, parameter], retain_graph=True)
                     for out, parameter in zip((expected, found), parameters, strict=True)]  # fmt: skip
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_products_have_few_sizes_whatever_the_number_of_states(tiny_acts):
    model = clvq.CLVQVAE(WIDTH, WIDTH, 0, 1, "", model_settings())
    met = set()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(lambda _, args: met.add(len(args[0])))
    for n in range(1, 100):
        x = torch.randn(n, WIDTH)
        out = model(x, torch.tensor([n]))
        assert len(out.encoded) == len(out.reconstruction) == len(out.quantized.codes) == n
    assert met == {32, 64, 96, 128}  # each size that a CPU's products meet keeps memory


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_each_number_with_its_chance_alone_and_keeps_the_mean(p, dtype):
    x, dropout = torch.ones(301, 1001, dtype=dtype, requires_grad=True), clvq.Decoder(4, 4, model_settings(dropout=p)).dropout
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = dropout(x)
        torch.manual_seed(1)
        assert torch.equal(out, dropout(x))  # the seed decides
        assert not torch.equal(out, dropout(x))
    out.sum().backward()
    assert torch.equal(out, x.grad) and len(out.unique()) == 2
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=4e-3 if dtype == torch.bfloat16 else 1e-6)
    dropped = (out == 0).double().flatten()
    spread = (p * (1 - p)) ** 0.5
    for part in (dropped, *(dropped[i::4] for i in range(4))):  # of the four numbers drawn at once, too
        assert abs(part.mean() - p) < 4 * spread / len(part) ** 0.5
    for lag in (1, 2, 3, 4, 1001):
        pairs = (dropped[lag:] - p) * (dropped[:-lag] - p)
        assert abs(pairs.mean()) < 4 * spread**2 / len(pairs) ** 0.5


def test_what_is_dropped_differs_between_the_parts_of_a_layer_and_evaluation_drops_nothing(tiny_acts, batch):
    model, (x, lengths) = build(tiny_acts, dropout=0.5), batch
    assert torch.equal(model(x, lengths).reconstruction, model(x, lengths).reconstruction)
    queries = model.quantizer(x).vectors
    model.decoder.train()
    first, second = (model.decoder(queries, queries, lengths) for _ in range(2))
    assert (first - second).abs().mean() > 1e-2


def test_the_decoders_blocks_are_not_copies_of_each_other_at_the_start():
    blocks = clvq.Decoder(WIDTH, WIDTH, model_settings(decoder_layers=3)).layers
    for name, weight in blocks[0].named_parameters():
        if weight.dim() > 1:
            others = [dict(block.named_parameters())[name] for block in blocks[1:]]
            assert not any(torch.equal(weight, other) for other in others) and not torch.equal(*others), name


def test_heads_that_do_not_divide_the_width_are_refused(refused):
    with refused("decoder_heads", "30", "4"):
        clvq.CLVQVAE(30, 30, 0, 1, "synthetic", model_settings(decoder_heads=4))


def test_the_target_may_have_another_width(tiny_acts, batch):
    x, lengths = batch
    model = clvq.CLVQVAE(WIDTH, 20, 0, 1, "synthetic", model_settings()).eval()
    out = model(x, lengths)
    assert out.reconstruction.shape == (len(x), 20) and model.loss(out, torch.zeros(len(x), 20))[0].isfinite()


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["encoder", "quantized"])
@pytest.mark.parametrize("mask_kind", ["causal", "none", "anticausal"])
def test_a_sentence_is_the_same_whatever_stands_beside_it(tiny_acts, batch, memory, mask_kind):
    x, lengths = batch
    model = build(tiny_acts, memory=memory, mask=mask_kind)
    together = model(x, lengths)
    parts = zip(*(tensor.split(lengths.tolist()) for tensor in (x, together.reconstruction, together.quantized.codes)), strict=True)
    for states, reconstruction, codes in parts:
        alone = model(states, torch.tensor([len(states)]))
        beside = model(torch.cat([100 * torch.randn(50, WIDTH), states]), torch.tensor([50, len(states)]))
        for other in (alone.reconstruction, beside.reconstruction[50:]):
            torch.testing.assert_close(other, reconstruction, rtol=0, atol=1e-5)
        assert torch.equal(alone.quantized.codes, codes) and torch.equal(beside.quantized.codes[50:], codes)


def test_with_quantised_memory_nothing_passes_around_the_codes(tiny_acts, batch):
    x, lengths = batch
    nudged = x + 0.02 * torch.randn_like(x)

    def moved(memory: str) -> float:
        model = build(tiny_acts, memory=memory)
        before, after = model(x, lengths), model(nudged, lengths)
        assert torch.equal(before.quantized.codes, after.quantized.codes)  # too small a step to reach another code
        return (before.reconstruction - after.reconstruction).abs().max().item()

    assert moved("quantized") < 1e-5 < 1e-3 < moved("encoder")


def test_the_loss_is_the_error_in_standard_deviations_plus_beta_times_the_commitment(tiny_acts, batch):
    x, lengths = batch
    (y,), _ = next(tiny_acts.stream([torch.arange(8)], [1], torch.device("cpu")))
    model = build(tiny_acts, commitment=0.3)
    out = model(x, lengths)
    mean, scale = tiny_acts.states[1].float().mean(0), tiny_acts.states[1].float().std(0)
    error = (out.reconstruction - (y - mean) / scale).square().mean()
    commitment = (out.encoded - model.vectors[out.quantized.codes]).square().mean()
    torch.testing.assert_close(model.loss(out, y), (error + 0.3 * commitment, error))
    in_own_units = (model.reconstruct(out) - y).square().mean(0)
    torch.testing.assert_close((in_own_units / scale.square()).mean(), error)


def test_the_concept_of_a_state_is_the_code_it_gets_in_its_sentence(tiny_acts, batch):
    x, lengths = batch
    model = build(tiny_acts)
    for rows in (5, 16384):
        assert torch.equal(model.assign(tiny_acts.states[0][: len(x)], rows), model(x, lengths).quantized.codes)


# --- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{}, dict(alpha="fixed", fixed_alpha=0.75, norm_first=False, memory="quantized", mask="none")])
def test_a_model_that_was_saved_and_loaded_is_the_same(tiny_acts, batch, tmp_path, chosen):
    x, lengths = batch
    model = build(tiny_acts, **chosen)
    model.save_pretrained(tmp_path)
    again = clvq.CLVQVAE.from_pretrained(tmp_path).eval()
    assert again.settings == model.settings and type(again.settings) is clvq.ModelSettings
    assert (again.layer, again.target_layer, again.model) == (0, 1, "synthetic")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    before, after = model(x, lengths), again(x, lengths)
    assert torch.equal(before.reconstruction, after.reconstruction)
    assert torch.equal(before.quantized.codes, after.quantized.codes)


def test_a_saved_model_is_safetensors_and_json_and_no_pickle(tiny_acts, tmp_path):
    build(tiny_acts).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "config.json").exists() and (tmp_path / "model.safetensors").exists()
    assert not any(path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05") for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["quantizer.codebook", "encoder.theta", "encoding_mean", "decoder.layers.1.norm1.bias"])
def test_a_file_that_lacks_a_tensor_has_one_too_many_or_one_of_another_shape_is_refused(refused, tiny_acts, tmp_path, name):
    build(tiny_acts).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for fault, changed in {
        "lacks": {key: value for key, value in tensors.items() if key != name},
        "unexpected": {**tensors, f"{name}2": tensors[name].clone()},
        "wrong shape": {**tensors, name: torch.zeros(3, 5)},
    }.items():
        save_file(changed, path)
        with refused("model.safetensors", fault, name):
            clvq.CLVQVAE.from_pretrained(tmp_path)
        with refused("model.safetensors", fault, name):
            clvq.CLVQVAE.from_pretrained(tmp_path, strict=False)
    save_file(tensors, path)
    clvq.CLVQVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["settings", "width", "source_layer"])
def test_a_configuration_that_lacks_something_is_refused(refused, tiny_acts, tmp_path, name):
    build(tiny_acts).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    with refused("config.json", name):
        clvq.CLVQVAE.from_pretrained(tmp_path)


def test_a_pickle_is_never_read(refused, tiny_acts, tmp_path):
    model = build(tiny_acts)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with refused("pytorch_model.bin", "safetensors"):
        clvq.CLVQVAE._load_as_pickle(model, str(tmp_path / "pytorch_model.bin"), "cpu", True)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("memory", ["encoder", "quantized", "shuffled", "constant", "none"])
def test_a_model_on_a_gpu_gives_what_it_gives_on_the_cpu_and_hands_out_tensors_of_the_cpu(tiny_acts, batch, memory):
    x, lengths = batch
    model = build(tiny_acts, memory=memory)
    states, expected, codes = tiny_acts.states[0], model(x, lengths).reconstruction, model.assign(tiny_acts.states[0])
    model.cuda()
    torch.testing.assert_close(model(x.cuda(), lengths).reconstruction.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert (model.assign(states) == codes).float().mean() > 0.99
    drawn = [model.assign(states, generator=torch.Generator(device)) for device in ("cpu", "cuda")]
    assert {tensor.device.type for tensor in (model.vectors, model.centre, *drawn)} == {"cpu"}
    clvq.sampling(model, states)


def with_source(acts: clvq.Activations, layers: list[int], **changed) -> clvq.Activations:
    """The same states as if they were of other layers, or of another model."""
    source = {**acts.source, "layers": layers, **changed}
    return dataclasses.replace(acts, states={layer: acts.states[0] for layer in layers}, source=source)


def test_states_of_another_model_layer_or_width_are_refused(refused, tiny_acts):
    model = build(tiny_acts)
    model.check(tiny_acts)
    with refused("model", "synthetic", "roberta"):
        model.check(with_source(tiny_acts, [0, 1], model="roberta"))
    with refused("width", "32", "768"):
        model.check(with_source(tiny_acts, [0, 1], width=768))
    upper = clvq.CLVQVAE(WIDTH, WIDTH, 4, 6, "synthetic", model_settings())
    upper.check(with_source(tiny_acts, [4, 6]))
    with refused("layer", "4"):
        upper.check(tiny_acts)


def test_states_without_layer_0_are_refused_by_a_model_of_layer_0(refused, tiny_acts):
    with refused("layer", "0"):
        build(tiny_acts).check(with_source(tiny_acts, [2, 4]))
