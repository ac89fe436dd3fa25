"""Products with a banded matrix equal those with the whole matrix, for every cut into bands."""

import pytest
import torch

from hf_attn.kernels import bands
from hf_attn.kernels.bands import Bands

CUTS = [  # targets, earlier, width, reach, causal
    (50, 0, 1, 3, False),
    (50, 0, 1, 3, True),
    (51, 0, 1, 0, False),
    (50, 0, 1, 20, True),
    (50, 0, 1, None, False),
    (9, 0, 1, 3, False),
    (30, 7, 1, 4, True),
    (30, 2, 1, 9, True),
    (1, 40, 1, 5, True),
    (1, 40, 1, None, True),
    (48, 0, 6, 1, False),
    (51, 0, 17, 1, False),
]


@pytest.fixture(autouse=True)
def short_bands(monkeypatch):
    monkeypatch.setattr(bands, "BAND", 8)


def case(targets, earlier, width, reach, causal, groups=3):
    """The bands, a matrix (G,m,n) that is zero outside of them, its (G,T,c,s) form, and x (G,n,F)."""
    cut = Bands.of(targets, earlier, width, reach, causal)
    tokens = earlier + targets
    source, inside = cut.sources(torch.device("cpu"))
    matrix = torch.randn(groups, targets, tokens, dtype=torch.float64)
    line = torch.arange(tokens) // width
    distance = line[earlier:, None] - line
    hidden = (torch.arange(tokens) > torch.arange(earlier, tokens)[:, None]) if causal else distance.abs() < 0
    if reach is not None:
        hidden = hidden | (distance.abs() > reach)
    matrix = matrix.masked_fill(hidden, 0)
    target = cut.split(torch.arange(targets))
    weight = matrix[:, target[:, :, None], source[:, None]] * inside[:, None]
    return cut, matrix, weight, torch.randn(groups, tokens, 5, dtype=torch.float64)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_product_is_that_of_the_whole_matrix(cut):
    found, matrix, weight, x = case(*cut)
    torch.testing.assert_close(found.product(weight, x), matrix @ x)
    assert (found.number > 1) == (weight.numel() < matrix.numel()), "only the windows are held"
    assert found.number > 1 or cut[0] < 30 or cut[3] is None or cut[2] * cut[3] > 16


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_gradients(cut, groups):
    found, _, weight, x = case(*cut, groups=groups)
    x = x[..., :2].clone().requires_grad_()
    weight = weight.requires_grad_()
    assert torch.autograd.gradcheck(found.product, (weight, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(found.product, (weight, x), fast_mode=True)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_places_in_a_window_are_those_of_the_tokens(cut):
    found, _, _, _ = case(*cut)
    source, inside = found.sources(torch.device("cpu"))
    target = found.split(torch.arange(cut[0])) + cut[1]
    line, place = found.offsets(torch.device("cpu"))
    width = cut[2]
    real = inside[:, None] & (torch.arange(found.number * found.size) < cut[0]).view(found.number, -1, 1)
    lines = target[:, :, None] // width - source[:, None] // width
    places = target[:, :, None] % width - source[:, None] % width
    # lines are counted from the first target, which starts one
    if cut[1] % width == 0:
        assert torch.equal(lines[real], line.expand_as(lines)[real])
        assert torch.equal(places[real], place.expand_as(places)[real])


def test_a_sample_with_infinities_stays_alone():
    found, matrix, weight, x = case(50, 0, 1, 3, False)
    x[1] = float("inf")
    out = found.product(weight, x)
    torch.testing.assert_close(out[::2], (matrix @ x)[::2])
