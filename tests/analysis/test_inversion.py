"""Plug-In Inversion: the invariants of its page, and pictures that a classifier takes for their class."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

import hf_attn
from hf_attn.analysis import inversion
from hf_attn.analysis.inversion import PlugInInversionConfig, PlugInInverter
from hf_attn.cli import app
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported

FAST = {"steps": 3, "num_copies": 2, "learning_rate": 0.1}


def classifier(size=16, **fields):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=size, patch_size=4,
        num_labels=4, **fields,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    # an untrained model that tells pictures apart
    with torch.no_grad():
        model.classifier.weight.mul_(50)
        model.vit.embeddings.patch_embeddings.projection.weight.mul_(20)
    return model


def picture(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def test_01_jitter_by_nothing_is_the_identity_and_moves_pixels_only():
    images = picture(2, 3, 6, 7)
    assert torch.equal(inversion.jitter(images, torch.tensor([0, 0])), images)
    moved = inversion.jitter(images, torch.tensor([2, -3]))
    assert not torch.equal(moved, images)
    assert torch.equal(moved.flatten().sort().values, images.flatten().sort().values)


def test_02_color_shift_by_nothing_is_the_identity_and_can_be_undone():
    images, zero = picture(3, 3, 4, 4), torch.zeros(3, 3, 1, 1, dtype=torch.float64)
    assert torch.equal(inversion.color_shift(images, zero, zero), images)
    mean, log_std = (torch.randn(3, 3, 1, 1, dtype=torch.float64) for _ in range(2))
    shifted = inversion.color_shift(images, mean, log_std)
    assert torch.allclose((shifted - mean) / log_std.exp(), images, atol=1e-12)


def test_03_stage_sizes():
    assert inversion.stage_sizes(224).tolist() == [56, 84, 112, 140, 168, 196, 224]


def test_04_growing_without_padding_is_resizing_and_around_the_old_picture_keeps_it():
    image, canvas = picture(1, 3, 8, 8), picture(1, 3, 12, 12)
    before = canvas.clone()
    assert torch.equal(inversion.grow(image, 0, canvas), inversion.resize(image, 12))
    grown = inversion.grow(image, 4, canvas)
    assert torch.allclose(inversion.center_crop(grown, 8), image, atol=1e-12)
    assert torch.equal(grown[..., :2, :], canvas[..., :2, :]) and torch.equal(canvas, before)


def test_05_equal_copies_have_the_gradient_of_one():
    image = picture(1, 3, 16, 16).requires_grad_()
    model = classifier().double()
    gradients = []
    for copies in (1, 5):
        zero = torch.zeros(copies, 3, 1, 1, dtype=torch.float64)
        seen = inversion.augment(image, torch.tensor([1, 2]), zero, zero, 16, 16)
        loss = inversion.inversion_loss(model(pixel_values=seen).logits, 2)
        gradients.append(torch.autograd.grad(loss, image)[0])
    assert torch.allclose(*gradients, atol=1e-12)


def test_06_pixels_stay_between_0_and_1_at_every_stage():
    seen = []
    inverter = PlugInInverter(classifier(), config=PlugInInversionConfig(**FAST))
    inverter.invert(
        [0], lambda stage, images: seen.append((images.shape[-1], images.min().item(), images.max().item())), False
    )
    assert [size for size, _, _ in seen] == inversion.stage_sizes(16).tolist()
    assert all(low >= 0 and high <= 1 for _, low, high in seen)


def test_07_a_seed_gives_the_same_picture_and_another_one_does_not():
    model = classifier()

    def images(seed):
        return PlugInInverter(model, config=PlugInInversionConfig(**FAST, seed=seed)).invert([1], progress=False).images

    assert torch.equal(images(3), images(3)) and not torch.equal(images(3), images(4))


def test_08_a_side_that_eight_does_not_divide_gets_a_last_stage_of_its_own():
    assert inversion.stage_sizes(20).tolist() == [4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert inversion.stage_sizes(30).tolist()[-2:] == [27, 30]


@pytest.mark.parametrize("way", [*inversion.WAYS, None])
def test_a_picture_is_more_of_its_class_than_that_of_another(way):
    shift = 0.2 if way else 0.0
    config = PlugInInversionConfig(
        steps=30 if way else 210, num_copies=2, learning_rate=0.1, jitter=None if way else 0, color_shift_mean=shift,
        color_shift_std=shift, way=way,
    )  # fmt: skip
    model = hf_attn.convert(classifier(), "ripple")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = PlugInInverter(model, config=config).invert([3, 0], progress=False)
    probability = found.logits.softmax(dim=-1)[:, [3, 0]]
    assert (probability.diag() > probability.flip(0).diag()).all()
    # the model is as it was
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_classes_do_not_disturb_each_other():
    """The loss is summed over classes: with plain optimisation from one start, each picture is the one made alone."""
    config = PlugInInversionConfig(steps=4, num_copies=1, jitter=0, color_shift_mean=0, color_shift_std=0, way=None)
    model = classifier()
    together = PlugInInverter(model, config=config).invert([2, 1], progress=False)
    alone = PlugInInverter(model, config=config).invert([2], progress=False)
    assert torch.allclose(together.images[:1], alone.images, atol=1e-5)


def test_total_variation():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    assert inversion.total_variation(ramp).item() == 1
    assert inversion.total_variation(torch.ones(1, 3, 4, 4)).item() == 0


def test_total_variation_weight_smooths():
    model = classifier()

    def variation(weight):
        config = PlugInInversionConfig(steps=20, learning_rate=0.1, way=None, num_copies=1, tv_weight=weight)
        return inversion.total_variation(PlugInInverter(model, config=config).invert([0], progress=False).images)

    assert variation(10.0) < 0.9 * variation(0.0)


def test_refusals():
    text = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    )
    with pytest.raises(Unsupported, match="inputs are discrete"):
        PlugInInverter(text)
    with pytest.raises(InvalidInput, match="target 7 must be a class of the model, 0 to 3"):
        PlugInInverter(classifier()).invert([7])
    with pytest.raises(InvalidInput, match="side of square pictures"):
        PlugInInverter(classifier(size=(16, 12)))
    for field, value in {"steps": 0, "way": "sideways", "jitter": -1, "learning_rate": -1.0}.items():
        with pytest.raises(InvalidOption, match=field):
            PlugInInversionConfig(**{field: value})


def test_the_command_draws_and_reports(tmp_path):
    from transformers import ViTImageProcessorPil

    folder, drawn = tmp_path / "model", tmp_path / "classes.png"
    classifier().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    command = [
        "invert",
        str(folder),
        "--classes",
        "0,2",
        "--steps",
        "2",
        "--copies",
        "1",
        "--output",
        str(drawn),
        "--json",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert drawn.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(done.stdout)
    assert [row["class"] for row in rows] == [0, 2] and all(0 <= row["probability"] <= 1 for row in rows)
    assert CliRunner().invoke(app, ["invert", str(folder), "--classes", "a"]).exit_code == 2
