"""SSTA on small models: importance, selection of heads, and training that leaves teacher and assistant alone."""

import pytest
import torch
from transformers import BertConfig, BertModel, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.recording import exact_copy
from hf_attn.recipes.ssta import head_importance
from hf_attn.recipes.ssta_trainer import (
    HeadDistillationTrainer,
    SSTAConfig,
    attention_map,
    classification_loss,
    last_attention,
    measure_heads,
)
from tests.helpers import BERT, VIT, agree


def vit(cls=ViTForImageClassification, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {**VIT, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "num_labels": 3, **changes}
    model = cls(ViTConfig(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "classifier.weight")):
                parameter.mul_(20)
    return model


def batch(size=4):
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(size, 3, 12, 12, generator=generator), "labels": torch.arange(size) % 3}


def trainer_of(folder, student=None, ssta=None, **arguments):
    rows = batch(12)
    data = [{name: value[i] for name, value in rows.items()} for i in range(12)]
    ssta = ssta or SSTAConfig(vit(seed=1), vit(ViTModel, seed=2, patch_size=4), calibration_size=8)
    fields = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, **arguments}
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, save_strategy="no", **fields)
    return HeadDistillationTrainer(student or vit(), ssta, args=args, train_dataset=data, eval_dataset=data)


def test_02_importance_of_a_model_is_that_of_its_maps():
    model, given = vit().double(), batch()
    given["pixel_values"] = given["pixel_values"].double()
    # not the stock model: its eager form computes the softmax in float32, whatever the model's dtype
    output = exact_copy(model)(pixel_values=given["pixel_values"], output_attentions=True)
    loss = torch.nn.functional.cross_entropy(output.logits, given["labels"], reduction="sum")
    heads = output.attentions[-1]
    gradient = torch.autograd.grad(loss, heads)[0]
    agree(measure_heads(model, [given], classification_loss), head_importance(heads.detach(), gradient))


@pytest.mark.parametrize("method", ["taylor", "ablation"])
def test_03_a_head_without_values_has_no_importance(method):
    model = vit().double()
    value = last_attention(model, "teacher").v_proj
    with torch.no_grad():
        value.weight[8:16], value.bias[8:16] = 0, 0
    given = {**batch(), "pixel_values": batch()["pixel_values"].double()}
    importance = measure_heads(model, [given], classification_loss, method)
    assert importance[1] == 0 and (importance[[0, 2, 3]] != 0).all()


def test_07_teacher_and_assistant_stay_as_they_are(tmp_path):
    teacher, assistant = vit(seed=1), vit(ViTModel, seed=2)
    trainer = trainer_of(tmp_path, ssta=SSTAConfig(teacher, assistant, calibration_size=8))
    copies = trainer.teacher, trainer.assistant
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (*copies, teacher, assistant)]
    student = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    trainer.train()
    for model, state in zip((*copies, teacher, assistant), before):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters()) and not model.training
    assert not all(torch.equal(t, student[n]) for n, t in trainer.model.state_dict().items())
    assert set(trainer.model.state_dict()) == set(student)


@pytest.mark.parametrize("head, weights", [(0, {"lambda_assistant": 0.0}), (1, {"lambda_teacher": 0.0})])
def test_08_a_student_head_learns_from_its_own_map_only(tmp_path, head, weights):
    config = SSTAConfig(vit(seed=1), vit(ViTModel, seed=2), teacher_head=0, assistant_head=1, alpha=1.0, **weights)
    trainer = trainer_of(tmp_path, ssta=config)
    student = trainer.model.train()
    # no task: the first token of the last layer reaches the logits through this weight only
    with torch.no_grad():
        student.classifier.weight.zero_()
    trainer.compute_loss(student, batch()).backward()
    gradient = last_attention(student, "student").q_proj.weight.grad.unflatten(0, (4, 8)).abs().sum((1, 2))
    assert gradient[head] > 0 and gradient.sum() == gradient[head]


@pytest.mark.parametrize("attention", [None, "ripple", "relative_2d"])
def test_training_selects_heads_logs_the_terms_and_evaluates_by_cross_entropy(tmp_path, attention):
    student = vit() if attention is None else hf_attn.convert(vit(), attention)
    trainer = trainer_of(tmp_path, student)
    trainer.train()
    found = trainer.select_heads()
    assert trainer.ssta.teacher_head == found["teacher"].argmax() and trainer.ssta.assistant_head is not None
    terms = {"loss_ce", "loss_kd", "loss_teacher_head", "loss_assistant_head"}
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2 and all(terms <= set(row) for row in logged)
    for row in logged:
        expected = 0.5 * (row["loss_ce"] + row["loss_kd"]) + row["loss_teacher_head"] + row["loss_assistant_head"]
        assert row["loss"] == pytest.approx(expected, rel=1e-3)
    cross_entropy = classification_loss(trainer.model.eval(), batch(12)).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(cross_entropy, rel=1e-4)


def test_the_students_module_is_as_it_was_after_its_map_is_taken():
    model = vit()
    module = last_attention(model, "student")
    with attention_map(module) as maps:
        model(pixel_values=batch()["pixel_values"])
    assert maps[0].shape == (4, 4, 37, 37) and maps[0].requires_grad
    assert module.config is model.config and not module._forward_hooks


def test_what_does_not_fit_is_refused(tmp_path):
    teacher, assistant = vit(seed=1), vit(ViTModel, seed=2)
    good = SSTAConfig(teacher, assistant)
    with pytest.raises(Unsupported, match="lara.*another draw"):
        trainer_of(tmp_path, hf_attn.convert(vit(), "lara"), good)
    with pytest.raises(Unsupported, match="no N x N weights"):
        trainer_of(tmp_path, hf_attn.convert(vit(), "vars"), good)
    with pytest.raises(Unsupported, match="dropout"):
        trainer_of(tmp_path, vit(attention_probs_dropout_prob=0.1), good)
    with pytest.raises(Unsupported, match="pixel_values"):
        trainer_of(tmp_path, None, SSTAConfig(teacher, BertModel(BertConfig(**BERT))))
    with pytest.raises(InvalidInput, match="classes"):
        trainer_of(tmp_path, vit(num_labels=4), good)
    with pytest.raises(InvalidInput, match="head 4 of the student"):
        trainer_of(tmp_path, None, SSTAConfig(teacher, assistant, student_heads=(0, 4)))
    with pytest.raises(InvalidInput, match="pictures"):
        trainer_of(tmp_path, None, SSTAConfig(teacher, vit(ViTModel, image_size=16)))
    with pytest.raises(InvalidOption, match="importance"):
        SSTAConfig(teacher, assistant, importance="guess")
    with pytest.raises(InvalidOption, match="select_heads"):
        trainer_of(tmp_path, None, good).compute_loss(vit().train(), batch())
