"""A training step at the paper's shape beside the naive one: sentences padded to 61, a Python loop for sampling, one-hot averages."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import DEVICES, RATES, WHERE, timed, to_the_end

import clvq_core as clvq

WIDTH, LONGEST, SENTENCES = 768, 61, 128


def lengths(n: int, seed: int = 0) -> torch.Tensor:
    """Ragged like the paper's ERASER sentences after its filter: mean 5.9, at most 61."""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(np.clip(np.round(draw.lognormal(1.55, 0.66, n)), 1, LONGEST).astype(int))


class Naive(nn.Module):
    """What the equations say, written down without a thought for speed."""

    def __init__(self, model: clvq.CLVQVAE) -> None:
        super().__init__()
        s = self.s = model.settings
        self.encoder = model.encoder
        layer = nn.TransformerDecoderLayer(WIDTH, s.decoder_heads, s.feedforward, s.dropout, batch_first=True, norm_first=s.norm_first)
        self.decoder = nn.TransformerDecoder(layer, s.decoder_layers, model.decoder.norm if s.norm_first else None)
        for mine, other in zip(self.decoder.layers, model.decoder.layers, strict=True):
            mine.load_state_dict(other.state_dict())
        self.out = model.decoder.out
        self.codebook, self.counts, self.sums = (b.clone() for b in (model.quantizer.codebook, model.quantizer.counts, model.quantizer.sums))

    def forward(self, x, mask):
        z = self.encoder(x)
        codes = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)
        for b, t in mask.nonzero().tolist():
            distances = ((z[b, t] - self.codebook) ** 2).sum(1)
            near, which = distances.topk(self.s.top_k, largest=False)
            codes[b, t] = which[torch.multinomial(torch.softmax(-near / self.s.temperature, 0), 1)]
        chosen = self.codebook[codes]
        commitment = (z - chosen.detach()).square()[mask].mean()
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        out = self.out(self.decoder(z + (chosen - z).detach(), z, tgt_mask=hidden, memory_key_padding_mask=~mask))
        return out, z, codes, commitment

    def update(self, z, codes):
        one_hot = F.one_hot(codes, len(self.codebook)).float()
        decay = self.s.ema_decay
        self.counts = decay * self.counts + (1 - decay) * one_hot.sum(0)
        self.sums = decay * self.sums + (1 - decay) * one_hot.T @ z
        total = self.counts.sum()
        smooth = (self.counts + self.s.ema_epsilon) / (total + len(self.counts) * self.s.ema_epsilon) * total
        self.codebook = self.sums / smooth[:, None]


def paper_model(device: str, **changed) -> tuple[clvq.CLVQVAE, clvq.Config]:
    config = clvq.configure("paper", **changed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clvq.CLVQVAE(WIDTH, WIDTH, 8, 12, "random", config.subset(clvq.ModelSettings))
        model.quantizer.start(torch.randn(config.n_codes, WIDTH), torch.full((config.n_codes,), 200.0))
    return model.to(device), config


def product_rate(states: int, device: str) -> float:
    """FLOP/s of products of bfloat16 matrices of the decoder's own shapes: what the machine can do at best."""
    inputs = [(torch.randn(states, rows, device=device).bfloat16(), torch.randn(rows, columns, device=device).bfloat16())
              for rows, columns in ((WIDTH, 2048), (2048, WIDTH))]
    products, best = to_the_end(lambda: [x @ w for x, w in inputs]), math.inf
    for _ in range(20):
        began = time.perf_counter()
        products()
        best = min(best, time.perf_counter() - began)
    return sum(2 * x.shape[0] * x.shape[1] * w.shape[1] for x, w in inputs) / best


@pytest.mark.parametrize("device", DEVICES)
def test_training_step(beside, note, device):
    model, config = paper_model(device, dropout=0.0, top_k=1)  # nothing drawn, so that losses can be compared; what is computed is the same
    sizes = lengths(SENTENCES)
    n = int(sizes.sum())
    x, y = torch.randn(2, n, WIDTH, device=device)
    mask = (torch.arange(LONGEST) < sizes[:, None]).to(device)
    wide_x, wide_y = (torch.zeros(SENTENCES, LONGEST, WIDTH, device=device).masked_scatter(mask[..., None], part) for part in (x, y))
    naive, losses = Naive(model).to(device), {"here": [], "there": []}
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.0, fused=True), torch.optim.Adam(naive.parameters(), lr=0.0)]

    def ours():
        with clvq.autocast(x.device, config.precision):
            out = model(x, sizes)
        loss, _ = model.loss(out, y)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        model.quantizer.update(out.encoded.detach(), out.quantized.codes)
        losses["here"].append(loss.item())

    def theirs():
        out, z, codes, commitment = naive(wide_x, mask)
        loss = F.mse_loss(out[mask], wide_y[mask]) + config.commitment * commitment
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        naive.update(z[mask].detach(), codes[mask])
        losses["there"].append(loss.item())

    def same(*_):
        mine, other = losses["here"][0], losses["there"][0]  # codes move with every step: compared are the first ones
        assert abs(mine - other) < 0.02 * other, (mine, other)
        return f"loss {mine:.4f} in bfloat16, {other:.4f} in float32"

    mine = beside(f"training step, 128 sentences{WHERE[device]}", "the equations as they stand: padded to 61, codes drawn one by one", ours, theirs,
                  25 if device == "cpu" else None, same, rounds=10, warm_up=3, peer_rounds=2, peer_warm_up=0)
    model, config = paper_model(device)  # with dropout, and codes drawn, as it is trained
    optimizers[0] = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    seconds = timed(ours, 10, 3).seconds
    rate, limit = 6 * sum(p.numel() for p in model.parameters()) * n / seconds, product_rate(n, device)
    RATES.update(training=rate, share=rate / limit)
    note("A training step", on={"cpu": "CPU", "cuda": "GPU"}[device], states=f"{n:,}", **{"states a second": f"{n / seconds:,.0f}",
         "GFLOP a second": f"{rate / 1e9:,.0f}", "limit, GFLOP a second": f"{limit / 1e9:,.0f}", "of the limit": f"{rate / limit:.0%}", "goal": "60%",
         "an epoch of 81,456 states, s": f"{81456 / n * seconds:,.0f}", "without dropout, s": f"{81456 / n * mine.seconds:,.0f}"})
