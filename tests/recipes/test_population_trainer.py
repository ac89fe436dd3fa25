"""Populations of Hugging Face models: equal to separate runs, saved as ordinary checkpoints, honest refusals."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.recipes.population_arguments import PopulationArguments, epoch_order
from hf_attn.recipes.population_trainer import PopulationTrainer

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
NOT_VECTORISED = {"context_pool", "ripple"}
"""Mechanisms that look into their tensors, or ask for their memory format."""
RATES = {"learning_rate": [1e-3, 1e-2, 3e-3], "weight_decay": [0.0, 0.1, 0.5]}


def images(count=20):
    random = np.random.default_rng(0)
    return [
        {"pixel_values": random.normal(size=(1, 8, 8)), "labels": int(random.integers(10))} for _ in range(count)
    ]  # fmt: skip


def texts(count=20, padding=True):
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        ids = random.integers(1, 30, 6).tolist()
        mask = [1] * 6 if not padding or i % 2 else [1] * 4 + [0] * 2
        rows.append({"input_ids": ids, "attention_mask": mask})
    return rows


def vit():
    return ViTForImageClassification(ViTConfig(**SMALL, **DROP, **IMAGE)).double()


def attn_vit(name="softmax"):
    config = hf_attn.AttnViTConfig(**SMALL, **DROP, **IMAGE, attn_implementation=name)
    return lambda: hf_attn.AttnViTForImageClassification(config).double()


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=30, **SMALL, **DROP)).double()


def gpt2():
    config = GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).double()


CASES = {
    "ViT": (vit, images()),
    "AttnViT softmax": (attn_vit(), images()),
    "AttnViT rfa": (attn_vit({"name": "rfa", "redraw": "fixed"}), images()),
    "BERT with padding": (bert, [{**row, "labels": i % 2} for i, row in enumerate(texts())]),
    "GPT-2 with padding": (gpt2, [{**row, "labels": row["input_ids"]} for row in texts()]),
    "GPT-2, tied weights": (gpt2, [{**row, "labels": row["input_ids"]} for row in texts(padding=False)]),
}


def double(rows):
    batch = default_data_collator(rows)
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


def make(model_init, data, folder="unused", hyperparameters=RATES, **options):
    options = {"population_size": 3, "per_device_train_batch_size": 8, "disable_tqdm": True, "max_steps": 5} | options
    return PopulationTrainer(
        model_init, PopulationArguments(str(folder), **options), data, data, double, accuracy, hyperparameters
    )


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def alone(model_init, data, member, steps=5, size=8):
    """The run of one member in transformers' way: one model, torch's AdamW, no weight decay of biases and norms."""
    set_seed(member)
    model = model_init().train()
    decayed = Trainer.get_decay_parameter_names(None, model)
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if n in decayed],
            "weight_decay": RATES["weight_decay"][member],
        },
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATES["learning_rate"][member])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)
    per_epoch = -(-len(data) // size)
    for step in range(steps):
        rows = epoch_order(member, step // per_epoch, len(data))[step % per_epoch * size :][:size]
        model(**double([data[i] for i in rows])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_01_a_population_equals_separate_runs(case):
    model_init, data = CASES[case]
    trainer = make(model_init, data)
    if "GPT-2" in case:
        trainer.compute_metrics = None
    trainer.train()
    for i in range(3):
        expected, got = alone(model_init, data, i).state_dict(), trainer.members.model(i).state_dict()
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", hf_attn.list_mechanisms())
def test_a_mechanism_is_vectorised_or_refused(name):
    try:
        trainer = make(attn_vit(name), images(), max_steps=1, hyperparameters=None)
    except Unsupported:
        pytest.skip(f"{name} is not defined for this model")
    if name in NOT_VECTORISED:
        with pytest.raises(Unsupported, match="cannot be vectorised"):
            trainer.train()
        return
    before = trainer.members.model(1)
    losses = trainer.evaluate()
    with torch.no_grad():
        expected = before(**double(images())).loss.item()
    # drawn anew in each training forward is not drawn in evaluation
    assert losses[1]["eval_loss"] == pytest.approx(expected, abs=1e-10)
    trainer.train()
    assert np.isfinite([row["eval_loss"] for row in trainer.history]).all()


def test_02_permuting_members_permutes_results():
    models = [vit() for _ in range(3)]
    order = [2, 0, 1]
    results = []
    for who in ([0, 1, 2], order):
        rates = {name: [values[i] for i in who] for name, values in RATES.items()}
        trainer = make([models[i] for i in who], images(), hyperparameters=rates, same_batch=True)
        results.append([row["eval_loss"] for row in trainer.train()])
    assert results[1] == pytest.approx([results[0][i] for i in order], abs=1e-12)


def test_08_saved_and_reloaded_makes_the_same_next_steps(tmp_path):
    options = {
        "space": {"learning_rate": ("loguniform", 1e-4, 1e-2)}, "exploit_every": 2, "hyperparameters": None, "max_steps": 6,
    }  # fmt: skip
    whole = make(vit, images(), **options)
    whole.train()
    half = make(vit, images(), **options)
    half.train(steps=3)
    half.save_state(tmp_path)
    resumed = make(vit, images(), **options)
    resumed.load_state(tmp_path)
    assert resumed.step_number == 3
    assert resumed.train() == whole.history
    for group, weights in whole.members.weights.items():
        assert torch.equal(resumed.members.weights[group], weights)


@pytest.mark.parametrize("model_init", [vit, attn_vit()], ids=["ViT", "AttnViT"])
def test_members_are_ordinary_checkpoints(tmp_path, model_init):
    data = images()
    trainer = make(model_init, data, tmp_path)
    trainer.train()
    folders = trainer.save_model("all")
    assert [folder.name for folder in folders] == ["member_0", "member_1", "member_2"]
    expected = [row["eval_loss"] for row in trainer.evaluate()]
    for folder, loss in zip(folders, expected):
        model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64)
        assert type(model) is type(model_init())
        with torch.no_grad():
            assert model(**double(data)).loss.item() == pytest.approx(loss, abs=1e-12)
    (best,) = trainer.save_model()
    assert best.name == "best" and trainer.best_member() == int(np.argmin(expected))
    assert model.config._attn_implementation == model_init().config._attn_implementation


def test_weak_members_become_copies_with_new_hyperparameters(tmp_path):
    space = {"learning_rate": ("loguniform", 1e-4, 1e-2)}
    trainer = make(vit, images(), population_size=5, space=space, exploit_every=3, hyperparameters=None, max_steps=4)
    before = trainer.hyperparameters["learning_rate"].clone()
    trainer.train(steps=3)
    losses = torch.tensor([row["eval_loss"] for row in trainer.history])
    lost = -losses < (-losses).sort().values[2]
    source = trainer.source
    assert lost.sum() == 2 and torch.equal(source != torch.arange(5), lost)
    rates = trainer.hyperparameters["learning_rate"]
    assert torch.equal(rates[~lost], before[~lost]) and (rates[lost] != before[lost]).all()
    for weights in trainer.members.weights.values():
        assert torch.equal(weights, weights[source])
    assert torch.equal(trainer.members.state["t"], torch.where(lost, 0.0, 3.0).double())
    assert not trainer.members.state["m"]["decayed"][lost].any() and trainer.members.state["m"]["decayed"][~lost].any()


def test_frozen_weights_are_kept_once():
    torch.manual_seed(0)
    start = vit()
    start.vit.requires_grad_(False)
    models = [vit() for _ in range(3)]
    for model in models:
        model.load_state_dict(start.state_dict())
        model.vit.requires_grad_(False)
    trainer = make(models, images())
    assert not trainer.members.own and all(n.startswith("vit.") for n in trainer.members.shared)
    trainer.train()
    now = trainer.members.model(1).state_dict()
    for name, tensor in start.state_dict().items():
        assert torch.equal(now[name], tensor) == name.startswith("vit.")


def test_dropout_differs_between_members():
    config = ViTConfig(**SMALL, **IMAGE, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    model = ViTForImageClassification(config).double()
    trainer = make([model] * 3, images(), same_batch=True, hyperparameters=None)
    trainer.train(steps=2)
    weights = trainer.members.weights["decayed"]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_member_that_diverges_does_not_touch_the_others_and_ranks_last():
    rates = {"learning_rate": [1e-3, 1e300, 1e-3], "weight_decay": [0.0] * 3}
    trainer = make(vit, images(), hyperparameters=rates)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.evaluate()]
    assert np.isnan(losses[1]) and np.isfinite([losses[0], losses[2]]).all()
    assert trainer.best_member() != 1


def checkpointed():
    model = vit()
    model.gradient_checkpointing_enable()
    return model


def other_sizes():
    small = ViTForImageClassification(ViTConfig(**{**SMALL, "hidden_size": 8}, **IMAGE)).double()
    return [vit(), vit(), small]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda: ResNetForImageClassification(ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4)), "batch norm"),
        (lambda: vit().to(torch.bfloat16), "bfloat16"),
        (checkpointed, "gradient_checkpointing_disable"),
        (other_sizes(), "member 2"),
        ([vit()], "1 models were given"),
        (lambda: vit().requires_grad_(False), "nothing to train"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_a_population_are_refused(models, message):
    with pytest.raises((InvalidInput, Unsupported), match=message):
        make(models, images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population_size": 0}, "population_size=0"),
        ({"space": {"learning_rates": ("uniform", 0, 1)}}, "did you mean 'learning_rate'"),
        ({"explore": "mutate"}, "explore='mutate'"),
        ({"bottom_frac": 1.0}, "bottom_frac=1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"exploit_every": 2}, "a space to draw from"),
        ({"hyperparameters": {"learning_rate": [1.0]}}, "must be 3 values"),
    ],
)  # fmt: skip
def test_arguments_are_checked_before_training(options, message):
    with pytest.raises((InvalidInput, InvalidOption), match=message):
        make(vit, images(), **options)


def test_unknown_metrics_and_members_are_refused(tmp_path):
    trainer = make(vit, images(), tmp_path, metric_for_best_model="f1")
    with pytest.raises(InvalidOption, match="eval_f1"):
        trainer.best_member()
    with pytest.raises(InvalidOption, match="member=7"):
        trainer.save_model(7)
    with pytest.raises(InvalidInput, match="labels"):
        make(vit, [{"pixel_values": row["pixel_values"]} for row in images()])
