"""Quantiser forward and moving averages beside vector-quantize-pytorch."""

import pytest
import torch
from conftest import DEVICES, WHERE, timed
from vector_quantize_pytorch import VectorQuantize

import clvq_core as clvq


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [400, 4096])
@pytest.mark.parametrize("n", [1000, 4000, 32000])
def test_quantiser(beside, n, k, device):
    config = clvq.configure("paper", n_codes=k, top_k=1)
    q = clvq.Quantizer(768, config.subset(clvq.ModelSettings)).train()
    q.start(torch.randn(k, 768), torch.full((k,), 100.0))
    other = VectorQuantize(dim=768, codebook_size=k, decay=config.ema_decay, eps=config.ema_epsilon, commitment_weight=config.commitment).train()
    other._codebook.embed.copy_(q.codebook[None])
    other._codebook.embed_avg.copy_(q.sums[None])
    other._codebook.cluster_size.copy_(q.counts[None])
    other._codebook.initted.fill_(True)
    q, other, z = q.to(device), other.to(device), torch.randn(n, 768, device=device)

    @torch.no_grad()
    def ours():
        out = q(z)
        q.update(z, out.codes)
        return out.codes

    @torch.no_grad()
    def theirs():
        return other(z[None])[1][0]

    def same(mine, others):
        share = (mine == others).float().mean().item()
        assert share > 0.99
        return f"{share:.2%} of codes the same"

    beside(f"quantiser, N {n:,}, K {k:,}{WHERE[device]}", "vector-quantize-pytorch", ours, theirs, 1, same, rounds=7 if n * k < 1e8 else 3)


@pytest.mark.parametrize(("n", "k", "width"), [(4096, 16384, 4096)])
def test_many_codes(note, n, k, width):
    config = clvq.configure("paper", n_codes=k)
    q = clvq.Quantizer(width, config.subset(clvq.ModelSettings)).train()
    q.start(torch.randn(k, width), torch.full((k,), 100.0))
    z = torch.randn(n, width)

    @torch.no_grad()
    def step():
        out = q(z)
        q.update(z, out.codes)

    found = timed(step, 3, 1)
    note("Many codes", **{"states": f"{n:,}", "codes": f"{k:,}", "width": f"{width:,}", "seconds": f"{found.seconds:.2f}",
         "memory, MiB": f"{found.mib:,.0f}", "of which distances": f"{n * k * 4 / 2**20:,.0f}", "codebook and averages, MiB": f"{2 * k * width * 4 / 2**20:,.0f}"})
