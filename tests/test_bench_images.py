"""Benchmarks of image models: AA-ResNets against the ResNet they share their weights with."""

import io

import pytest
import torch
from rich.console import Console

from hf_attn import bench
from hf_attn.bench.gate import Limits, measure
from hf_attn.bench.images import definition
from hf_attn.bench.workload import Case
from hf_attn.errors import InvalidOption, UnknownMechanism
from hf_attn.models.augmented_conv import AugmentedConv2d

CASE = Case(32, heads=2, head_dim=4, causal=None)
QUICK = Limits(repeats=1, min_seconds=0, memory=False)
SMALL = {"heads": 2, "head_dim": 4, "repeats": 1, "min_seconds": 0.0, "memory": False}


def test_an_aa_resnet_is_verified_and_timed_against_the_resnet(tmp_path):
    console = Console(file=io.StringIO(), width=140)
    names = ["aa_resnet:depth=34,attention_stages=[4],pooled_stages=[]"]
    report = bench.run(names, [32], model="resnet", batch=2, output=tmp_path, console=console, **SMALL)
    assert [(row.label, row.baseline, row.case.work) for row in report.rows] == [
        (names[0], "stock ResNet-34", "forward"),
        (names[0], "stock ResNet-34", "forward+backward"),
    ]
    for row in report.rows:
        assert row.status == "measured", row.note
        assert row.note == "model finite; 2 shapes of AugmentedConv2d equal their definition in float64 and float32"
        assert row.options == "depth=34,kappa=0.25,upsilon=0.25"
    assert {path.name for path in tmp_path.iterdir()} == {f"bench_images.{kind}" for kind in ("csv", "md", "png")}
    markdown = (tmp_path / "bench_images.md").read_text()
    assert "# images, N = side in pixels: resnet" in markdown and "AugmentedConv2d equal their definition" in markdown
    assert "aa_resnet:depth=34" in report.environment.command and "--model resnet" in report.environment.command


def test_both_see_the_same_images_and_share_their_weights():
    workload = bench.ResNetWorkload({"depth": 34, "upsilon": 0})
    contest = workload.setup(CASE)
    torch.testing.assert_close(contest.baseline(), contest.candidate())
    stock, ours = bench.ResNetWorkload({"depth": 34}).pair(CASE)
    weights = stock.state_dict()
    shared = [name for name, tensor in ours.state_dict().items() if name in weights and tensor.dim() == 4]
    assert shared and all(torch.equal(weights[name], ours.state_dict()[name]) for name in shared)


@pytest.mark.parametrize("broken", ["scaled", "detached"])
def test_an_augmented_convolution_that_is_wrong_gets_no_time(broken, monkeypatch):
    forward = AugmentedConv2d.forward

    def wrong(self, x):
        out = forward(self, x)
        return out * 1.001 if broken == "scaled" else 0.5 * (out + out.detach())

    monkeypatch.setattr(AugmentedConv2d, "forward", wrong)
    row = measure(bench.ResNetWorkload({"depth": 34}), CASE, QUICK)
    what = "output" if broken == "scaled" else "gradient of x"
    assert row.status == "refused" and row.time is None and f"{what} in float64 for" in row.note


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"pool": 2}, {"relative": False}, {"value_dim": 10}], ids=str)
def test_the_definition_of_an_augmented_convolution(options):
    given = {"key_dim": 8, "value_dim": 4, "num_heads": 2, "feature_size": (4, 6), **options}
    layer, x = AugmentedConv2d(6, 10, **given).double(), torch.randn(2, 6, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(definition(layer, x), layer(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["rfa"], UnknownMechanism, "aa_resnet"),
        (["aa_resnet:dept=34"], InvalidOption, "did you mean 'depth'"),
        (["aa_resnet:depth=33"], InvalidOption, "depth=33"),
        (["aa_resnet:upsilon=2"], InvalidOption, "upsilon=2"),
    ],
    ids=str,
)
def test_wrong_names_are_refused_before_anything_runs(names, error, message, monkeypatch):
    monkeypatch.setattr("hf_attn.bench.gate.measure", lambda *_: pytest.fail("something ran"))
    with pytest.raises(error, match=message):
        bench.run(names, model="resnet")
