"""key_redundancy of one compression of R-KV, against PyTorch on the whole matrix of cosines, keys gathered already."""

import pytest
import shapes
import torch

import lil_ops

BUFFER = 128


@pytest.mark.parametrize("budget", [1024, 2048])
@pytest.mark.parametrize("variant", ["lil", "matrix"])
def test_key_redundancy(measure, budget, variant):
    torch.manual_seed(0)
    size, heads, n = shapes.PAGE_SIZE, shapes.KV_HEADS, budget + BUFFER
    # Around a common centre, as the keys of a model are: cosines on either side of the threshold.
    k = (torch.randn(n // size, heads, size, shapes.HEAD_DIM) + torch.randn(heads, 1, shapes.HEAD_DIM)).bfloat16()
    page_table = torch.randperm(n // size).int()[None]
    seq_lens = torch.tensor([n], dtype=torch.int32)
    keys = k[page_table[0].long()].transpose(0, 1).flatten(1, 2)

    def lil():
        return lil_ops.key_redundancy(k, page_table, seq_lens)

    def peer():
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        cosine = unit @ unit.mT
        cosine.diagonal(dim1=1, dim2=2).zero_()
        latest = torch.where(cosine > 0.5, torch.arange(n, dtype=torch.int32), 0).amax(-1, keepdim=True)
        return cosine.scatter_(-1, latest.long(), 0).mean(1)[None]

    torch.testing.assert_close(lil(), peer(), rtol=0, atol=2e-3)  # few cosines are at the threshold
    measure(f"key_redundancy, {n} tokens", variant, lil if variant == "lil" else peer, rounds=20)
