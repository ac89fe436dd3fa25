"""Attention maps: the weights are the mechanism's, pictures are the same every time and touch no global state."""

import dataclasses
import struct
import subprocess
import sys

import pytest
import torch

import hf_attn
from hf_attn.analysis import attention_maps as maps
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported

NAMES = [n for n in hf_attn.list_mechanisms() if hf_attn.get_mechanism(n).capabilities.attention_weights]


@pytest.mark.parametrize("name", NAMES)
def test_patterns_are_what_the_record_defines(name):
    capabilities = hf_attn.get_mechanism(name).capabilities
    shown = maps.patterns(name)
    wanted = [causal for causal, is_defined in ((False, capabilities.bidirectional), (True, capabilities.causal)) if is_defined]  # fmt: skip
    assert [entry.is_causal for entry in shown] == wanted
    for entry, again in zip(shown, maps.patterns(name)):
        length = entry.weights.shape[0]
        assert entry.weights.shape == (length, length) and torch.isfinite(entry.weights).all()
        assert torch.equal(entry.weights, again.weights)
        assert entry.weights.any()
        if entry.is_causal:
            assert not entry.weights.triu(1).any()
        if entry.grid is not None:
            assert entry.grid[0] * entry.grid[1] == length
    if capabilities.grid == "used" and capabilities.bidirectional:
        assert shown[0].grid is not None


def test_drawing_random_numbers_leaves_no_trace():
    before = torch.random.get_rng_state()
    first = maps.pattern("rfa")
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first.weights, maps.pattern("rfa", seed=1).weights)


def test_softmax_weights_are_those_of_alike_tokens():
    weights = maps.pattern("softmax").weights
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(64, dtype=torch.float64))
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    assert weights[distance <= 1].mean() > 10 * weights[distance > 8].mean()


def test_one_query_on_the_grid():
    entry = maps.pattern("ripple")
    assert entry.grid == (8, 8) and entry.query == 36
    on_grid = entry.on_grid()
    for row, column in ((0, 0), (4, 4), (7, 2)):
        assert on_grid[row, column] == entry.weights[36, 8 * row + column]
    assert on_grid.argmax() == 36, "the nearest ring weighs most"
    with pytest.raises(InvalidInput, match="softmax: its tokens are on no grid"):
        maps.pattern("softmax").on_grid()


def test_options_change_the_pattern():
    assert maps.pattern("ripple").options == {"r_cap": 3}
    entry = maps.pattern("ripple", options={"ripple_weights": "truncated", "r_cap": 2})
    assert entry.options == {"ripple_weights": "truncated", "r_cap": 2}
    assert (entry.on_grid() > 0).sum() == 9
    assert [(p.is_causal, p.grid) for p in maps.patterns("ripple", {"allow_1d": True})] == [(False, (8, 8)), (True, None)]  # fmt: skip


def test_refusals(monkeypatch):
    with pytest.raises(Unsupported, match="ripple.*is_causal"):
        maps.pattern("ripple", is_causal=True)
    with pytest.raises(InvalidOption, match="r_cup"):
        maps.patterns("ripple", {"r_cup": 1})
    module_class = hf_attn.get_mechanism("softmax").module_class
    without = dataclasses.replace(hf_attn.get_mechanism("softmax").capabilities, attention_weights=False)
    monkeypatch.setattr(module_class, "describe", classmethod(lambda cls, options: without))
    with pytest.raises(Unsupported, match="softmax: it has no N x M attention weights to draw"):
        maps.patterns("softmax")


def size(path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize("name", NAMES)
def test_equal_patterns_draw_equal_files(name, tmp_path):
    shown = maps.patterns(name)
    for file in ("a.png", "b.png"):
        maps.draw(shown, tmp_path / file)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and b"Software" not in data
    panels = len(shown) + sum(entry.grid is not None for entry in shown)
    assert size(tmp_path / "a.png") == (552 * panels, 540)


def test_negative_weights_have_colours_of_their_own(tmp_path):
    from PIL import Image

    pattern = maps.pattern("softmax")
    weights = torch.zeros(64, 64, dtype=torch.float64)
    weights[:, :32], weights[:, 32:] = 0.5, -0.5
    maps.draw([dataclasses.replace(pattern, weights=weights)], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = image.convert("RGB")
        width, height = pixels.size
        positive, negative = pixels.getpixel((width // 4, height // 2)), pixels.getpixel((6 * width // 10, height // 2))
    assert positive[0] > positive[2] and negative[2] > negative[0]


def test_weights_that_are_all_alike_can_be_drawn(tmp_path):
    for value in (0.0, 1 / 64):
        entry = dataclasses.replace(maps.pattern("softmax"), weights=torch.full((64, 64), value, dtype=torch.float64))
        maps.draw([entry], tmp_path / "a.png")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be written to .*nowhere.*No such file"):
        maps.draw(maps.patterns("softmax"), tmp_path / "nowhere" / "a.png")


def test_pyplot_stays_out(tmp_path):
    code = (
        "import sys\nfrom hf_attn.analysis.attention_maps import draw, patterns\n"
        "draw(patterns('softmax'), sys.argv[1])\nprint('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "False"
