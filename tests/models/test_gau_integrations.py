"""The gau family inside the ecosystem: PEFT, Trainer, pipelines, device maps."""

import copy

import numpy as np
import pytest
import torch
from test_gau_models import HEADS, KINDS, inputs_of, model_of
from transformers import AutoImageProcessor, Trainer, TrainingArguments, ViTImageProcessorPil, pipeline

import hf_attn
from hf_attn import Unsupported

kinds = pytest.mark.parametrize("kind", KINDS)
LAYERS = {"gau": ["in_proj", "out_proj"], "transformer": ["query_key_value", "gate_up"]}


@kinds
def test_lora_on_the_projections(kind, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = model_of("GauForMaskedLM", kind, torch.float32, n_ref=4, rel_pos_bias="none")
    base = copy.deepcopy(model)
    targets = LAYERS[model.config.block]
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * len(targets) and all("lora" in n for n in trainable)
    # so many tokens that the faster product would be taken, were there no adapter
    ids = torch.randint(0, 90, (1, 512))
    peft_model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in peft_model.named_parameters() if n in trainable)
    peft_model.eval()
    with torch.no_grad():
        adapted, plain = peft_model(ids).logits, base(ids).logits
        assert (adapted - plain).abs().max() > 1e-3
        peft_model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, adapted)


@kinds
@pytest.mark.parametrize("head", HEADS.values())
def test_trainer_trains_evaluates_and_resumes(kind, head, tmp_path):
    def data():
        batch = inputs_of(model_of(head, kind, torch.float32), labels=True)
        return [{k: v[i % 2] for k, v in batch.items()} for i in range(8)]

    def trainer():
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to="none",
            disable_tqdm=True, use_cpu=True, seed=3, logging_steps=1,
        )  # fmt: skip
        return Trainer(
            model=model_of(head, kind, torch.float32), args=arguments, train_dataset=data(), eval_dataset=data()
        )

    straight = trainer()
    straight.train()
    assert all(np.isfinite(entry["loss"]) for entry in straight.state.log_history if "loss" in entry)
    assert np.isfinite(straight.evaluate()["eval_loss"])
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(straight.model.state_dict().items(), resumed.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


@kinds
@pytest.mark.parametrize(
    "arguments", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}], ids=str
)
def test_ways_of_loading(kind, arguments, tmp_path):
    model = model_of("GauForMaskedLM", kind, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = type(model).from_pretrained(tmp_path, **arguments).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs_of(model)).logits, model(**inputs_of(model)).logits)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *"abcdefghij"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", mask_token="[MASK]"
    )


@pytest.mark.parametrize(
    "task, head, text",
    [
        ("fill-mask", "GauForMaskedLM", "a b [MASK] d"),
        ("text-generation", "GauForCausalLM", "a b c"),
        ("text-classification", "GauForSequenceClassification", "a b c"),
        ("token-classification", "GauForTokenClassification", "a b c"),
    ],
)
def test_pipelines_find_the_family_and_its_tokenizer(task, head, text, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model_of(head, vocab_size=14, eos_token_id=0, pad_token_id=0, bos_token_id=2).save_pretrained(tmp_path)
    arguments = {"max_new_tokens": 4} if task == "text-generation" else {}
    found = pipeline(task, model=str(tmp_path))(text, **arguments)
    assert len(found) == {"fill-mask": 5, "token-classification": 3}.get(task, 1)


def test_the_image_pipeline_finds_the_processor(tmp_path):
    from PIL import Image

    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(tmp_path)
    model_of("GauForImageClassification", dtype=torch.float32).save_pretrained(tmp_path)
    image = Image.fromarray(np.arange(300, dtype="uint8").reshape(10, 10, 3))
    assert len(pipeline("image-classification", model=str(tmp_path))(image)) == 3
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__.startswith("ViTImageProcessor")


@pytest.mark.parametrize("kind", ["quadratic", "mixed chunk"])
def test_units_take_no_other_mechanism(kind):
    with pytest.raises((Unsupported, hf_attn.InvalidOption)):
        hf_attn.convert(model_of("GauForMaskedLM", kind), "rfa")
