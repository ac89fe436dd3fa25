"""AA-ResNets: the published table, counts, the library's ways of loading and running, and what they share with ResNets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, ResNetConfig

from hf_attn import (
    AAResNetBackbone,
    AAResNetConfig,
    AAResNetForImageClassification,
    AAResNetModel,
    AugmentedConv2d,
    aa_resnet_from_resnet,
    aa_resnet_stats,
)
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.aa_resnet import attention_maps, config_stats

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "aa_resnet_stats.json").read_text())["rows"]
TINY = {"embedding_size": 8, "hidden_sizes": (16, 32), "depths": (1, 2), "attention_stages": (2,), "pooled_stages": (2,), "num_attention_heads": 2, "min_head_key_dim": 2, "image_size": 32}  # fmt: skip
KINDS = ("bottleneck", "basic", "wide")
kinds = pytest.mark.parametrize("kind", KINDS)


def config(kind="bottleneck", **fields):
    return AAResNetConfig(**{**TINY, "layer_type": kind, **fields})


def built(kind="bottleneck", cls=AAResNetForImageClassification, seed=0, **fields):
    torch.manual_seed(seed)
    return cls(config(kind, **fields)).eval()


def pixels(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['depth']}, {r['upsilon']}")
def test_table_6_of_the_paper(row):
    """Parameters and the paper's convention to the digit printed; the count of all products beside it."""
    stats = aa_resnet_stats(row["depth"], row["kappa"], row["upsilon"], row["image_size"], row["num_labels"])
    assert round(stats["num_parameters"] / 1e6, 1) == row["published_params_millions"]
    assert round(stats["gflops_paper"], 1) == row["published_gflops"]
    assert stats["num_parameters"] == row["num_parameters"]
    for name in ("gflops_paper", "gflops_all_products"):
        assert stats[name] == pytest.approx(row[name], rel=1e-9)


def test_table_6_has_the_six_rows():
    assert [r["published_params_millions"] for r in ROWS] == [21.8, 25.6, 24.3, 22.3, 20.7, 19.4]
    assert [r["published_gflops"] for r in ROWS] == [7.4, 8.2, 7.9, 7.3, 6.8, 6.3]


@pytest.mark.parametrize(
    "depth, kappa, upsilon, parameters, gflops, all_products",
    [
        (34, 0.25, 0.25, 20.749, 7.106, 7.236),
        (50, 0.2, 0.1, 25.809, 8.332, 8.431),
        (101, 0.2, 0.1, 45.387, 16.092, 16.375),
        (152, 0.2, 0.1, 61.614, 23.810, 24.271),
        (101, 0.0, 0.0, 44.549, 15.614, None),
        (152, 0.0, 0.0, 60.193, 23.042, None),
    ],
)
def test_09_the_other_rows_of_the_specification(depth, kappa, upsilon, parameters, gflops, all_products):
    stats = aa_resnet_stats(depth, kappa, upsilon)
    assert round(stats["num_parameters"] / 1e6, 3) == parameters
    assert stats["gflops_paper"] == pytest.approx(gflops, abs=1.1e-3)
    assert all_products is None or stats["gflops_all_products"] == pytest.approx(all_products, abs=1.1e-3)


def test_the_wide_row_as_counted_which_is_not_the_published_one():
    """The paper prints 36.2 M and 10.9 GFLOPs for the augmented one; the count gives 36.1 and 11.2."""
    plain, augmented = (config_stats(AAResNetConfig.wide(upsilon=u, num_labels=100)) for u in (0.0, 0.1))
    assert round(plain["num_parameters"] / 1e6, 3) == 36.278 and round(plain["gflops_paper"], 2) == 10.43
    assert round(augmented["num_parameters"] / 1e6, 3) == 36.054 and round(augmented["gflops_paper"], 2) == 11.16


@pytest.mark.parametrize(
    "made",
    [
        *(AAResNetConfig.of_depth(d, u, u) for d in (34, 50) for u in (0.0, 0.25, 1.0)),
        AAResNetConfig.of_depth(50, relative=False),
        AAResNetConfig.wide(num_labels=100),
        *(config(kind, image_size=45) for kind in KINDS),
    ],
    ids=lambda c: f"{c.layer_type} {c.depths} {c.upsilon} {c.relative}",
)
def test_09_the_model_has_the_counted_parameters(made):
    with torch.device("meta"):
        model = AAResNetForImageClassification(made)
    assert sum(p.numel() for p in model.parameters()) == config_stats(made)["num_parameters"]


@kinds
def test_which_convolutions_are_augmented(kind):
    names = [n for n, m in built(kind).named_modules() if isinstance(m, AugmentedConv2d)]
    assert len(names) == 2 and all("stages.1" in n for n in names)
    assert not [m for m in built(kind, upsilon=0.0).modules() if isinstance(m, AugmentedConv2d)]


@kinds
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageClassification, AutoBackbone])
def test_auto_classes_save_and_load(kind, auto, tmp_path):
    model = auto.from_config(config(kind)).eval()
    model.save_pretrained(tmp_path)
    # AutoBackbone takes names on the Hub only
    loader = type(model) if auto is AutoBackbone else auto
    again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    first, second = (m.eval()(pixels(), return_dict=False) for m in (model, again))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), AAResNetConfig)


def test_tables_missing_from_a_checkpoint_start_as_documented(tmp_path):
    model = built()
    state = {n: t for n, t in model.state_dict().items() if "rel_" not in n}
    again = AAResNetForImageClassification.from_pretrained(None, config=model.config, state_dict=state)
    tables = torch.cat([t.flatten() for n, t in again.state_dict().items() if "rel_" in n])
    assert torch.isfinite(tables).all() and 0.3 < tables.std() * 2**0.5 < 2


@kinds
def test_outputs(kind):
    model = built(kind)
    out = model(pixels(), labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert out.logits.shape == (2, 2) and out.loss.dim() == 0
    stem = 32 if kind == "wide" else 8
    assert [tuple(h.shape[1:]) for h in out.hidden_states] == [
        (8, stem, stem),
        (16, stem, stem),
        (32, stem // 2, stem // 2),
    ]
    assert len(model(pixels(), return_dict=False)) == 1


@kinds
def test_backbone_gives_the_chosen_maps(kind):
    model = built(kind, AAResNetBackbone, out_features=["stage1", "stage2"])
    maps = model(pixels()).feature_maps
    assert [m.shape[1] for m in maps] == model.channels == [16, 32]
    whole = AAResNetModel(model.config).eval()
    whole.load_state_dict(model.state_dict(), strict=False)
    states = whole(pixels(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(maps, states[1:])


@kinds
def test_gradient_checkpointing_changes_nothing(kind):
    runs = []
    for on in (False, True):
        model = built(kind).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(pixels(), labels=torch.tensor([0, 1])).loss.backward()
        runs.append((dict(model.state_dict()), {n: p.grad for n, p in model.named_parameters()}))
    assert model.resnet.encoder.gradient_checkpointing
    for name, tensor in runs[0][0].items():
        assert torch.equal(tensor, runs[1][0][name]), f"{name}: running statistics are updated once"
    for name, grad in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], grad, rtol=1e-5, atol=1e-7)


@kinds
def test_compiles_in_one_piece_and_takes_channels_last(kind):
    model, x = built(kind), pixels()
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x).logits, expected)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            model(x.to(memory_format=torch.channels_last)).logits, expected, rtol=1e-4, atol=1e-4
        )


def stock(kind="bottleneck", cls=transformers.ResNetForImageClassification):
    torch.manual_seed(3)
    made = cls(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type=kind, num_labels=2))
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean)
    return made.eval()


FIELDS = {n: v for n, v in TINY.items() if n not in ("embedding_size", "hidden_sizes", "depths")}


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("head", ["ResNetModel", "ResNetForImageClassification", "ResNetBackbone"])
def test_a_converted_resnet_without_attention_is_the_resnet(kind, head):
    theirs = stock(kind, getattr(transformers, head))
    ours, new = aa_resnet_from_resnet(theirs, **{**FIELDS, "upsilon": 0.0, "attention_stages": (), "pooled_stages": ()})
    assert new == [] and set(ours.state_dict()) == set(theirs.state_dict())
    with torch.no_grad():
        a, b = ours(pixels(), return_dict=False), theirs(pixels(), return_dict=False)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_a_converted_resnet_shares_its_convolutions(kind):
    theirs = stock(kind)
    ours, new = aa_resnet_from_resnet(theirs, **FIELDS)
    given = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if name not in new:
            source = given.get(name)
            source = given[name.replace(".convolution.conv.", ".convolution.")] if source is None else source
            assert torch.equal(tensor, source[: len(tensor)] if tensor.dim() else source), name
    assert new and all(any(part in name for part in ("qkv", "out_proj", "rel_", "normalization")) for name in new), new
    norm = next(name for name in new if name.endswith("normalization.weight"))
    kept = ours.get_submodule(norm.replace(".normalization.weight", ".convolution")).conv.out_channels
    assert torch.equal(ours.state_dict()[norm][:kept], given[norm][:kept])
    assert (ours.state_dict()[norm][kept:] == 1).all()


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(Unsupported, match="ViTModel"):
        aa_resnet_from_resnet(
            transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, hidden_size=12, intermediate_size=4))
        )
    odd = transformers.ResNetModel(
        ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=4, downsample_in_first_stage=True)
    )
    with pytest.raises(Unsupported, match="downsample_in_first_stage"):
        aa_resnet_from_resnet(odd)


def test_attention_maps_are_those_of_the_layers():
    maps = attention_maps(built(), pixels())
    assert [tuple(m.shape) for m in maps.values()] == [(2, 2, 4, 4)] * 2
    with pytest.raises(Unsupported, match="without augmented"):
        attention_maps(built(upsilon=0.0), pixels())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_type": "narrow"}, "layer_type"),
        ({"upsilon": 1.5}, "upsilon"),
        ({"kappa": -1.0}, "kappa"),
        ({"attention_stages": (3,)}, "names stage 3"),
        ({"pooled_stages": (1,)}, "Leave it out"),
        ({"depths": (1,)}, "as many stages"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises((InvalidOption, ValueError), match=message):
        config(**fields)


def test_wrong_images_and_depths_are_refused():
    with pytest.raises(InvalidInput, match="Resize the images"):
        built()(pixels(size=48))
    with pytest.raises(InvalidOption, match="depth=18"):
        aa_resnet_stats(18)
    with pytest.raises(InvalidOption, match="6 n"):
        AAResNetConfig.wide(depth=20)
