"""The families inside the ecosystem: PEFT, pipelines, Trainer, Auto classes, device maps, embeddings, attention maps."""

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers import BERT, GPT2, VIT, families_of, inputs_of
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

import hf_attn
from hf_attn import Unsupported
from hf_attn.models.wrapping import attention_modules

MAIN = {"bert": "AttnBertForMaskedLM", "vit": "AttnViTForImageClassification", "gpt2": "AttnGPT2LMHeadModel"}
SIZES = {"bert": BERT, "vit": VIT, "gpt2": GPT2}
CASES = [(f, n) for n in hf_attn.list_mechanisms() for f in families_of(n)]
cases = pytest.mark.parametrize("family, mechanism", CASES)
QUERY_AND_VALUE = {"bert": ["query", "value"], "vit": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def model_of(family: str, mechanism: str, **fields):
    cls = getattr(hf_attn, MAIN[family])
    if mechanism == "relu2":
        # over the default length, the squares of a new model's small scores vanish
        fields = {"attention_options": {"n_ref": 8}, **fields}
    return cls(cls.config_class(**SIZES[family], attn_implementation=mechanism, **fields))


@cases
def test_lora_on_query_and_value(family, mechanism, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = model_of(family, mechanism).eval()
    for module in attention_modules(model).values():
        for parameter in module.mechanism.parameters():
            if not parameter.any():  # parts that start at zero pass no gradient to the query yet
                torch.nn.init.normal_(parameter, std=0.1)
    base = copy.deepcopy(model)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=QUERY_AND_VALUE[family], init_lora_weights=False))
    trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * len(QUERY_AND_VALUE[family]) and all("lora" in n for n in trainable)
    peft_model.train()(**inputs_of(model, labels=True)).loss.backward()
    if mechanism == "deformable":  # CLS pools by the keys alone, and the class is read from it
        trainable = [n for n in trainable if ".1." not in n or "q_proj" not in n]
    assert all(p.grad is not None and p.grad.any() for n, p in peft_model.named_parameters() if n in trainable)
    peft_model.eval()
    with torch.no_grad():
        adapted, plain = (m(**inputs_of(model)).logits for m in (peft_model, base))
        assert (adapted - plain).abs().max() > 1e-6
        peft_model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(again(**inputs_of(model)).logits, adapted)


@cases
def test_trainer_trains_evaluates_and_resumes(family, mechanism, tmp_path):
    def data():
        batch = inputs_of(model_of(family, mechanism), labels=True)
        return [{k: v[i % 2] for k, v in batch.items()} for i in range(8)]

    def trainer(**changes):
        torch.manual_seed(0)
        arguments = {"output_dir": str(tmp_path), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4,
                     "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3, "logging_steps": 1}  # fmt: skip
        arguments = TrainingArguments(**{**arguments, **changes})
        return Trainer(model=model_of(family, mechanism), args=arguments, train_dataset=data(), eval_dataset=data())

    straight = trainer()
    straight.train()
    assert all(np.isfinite(entry["loss"]) for entry in straight.state.log_history if "loss" in entry)
    assert np.isfinite(straight.evaluate()["eval_loss"])
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(straight.model.state_dict().items(), resumed.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_pipelines_find_the_family_and_its_processors(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    model_of("bert", "rfa").save_pretrained(tmp_path / "bert")
    found = pipeline("fill-mask", model=str(tmp_path / "bert"))("a b [MASK] d")
    assert len(found) == 5 and type(AutoTokenizer.from_pretrained(tmp_path / "bert")).__name__.startswith("Bert")

    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(tmp_path / "vit")
    model_of("vit", "ripple").save_pretrained(tmp_path / "vit")
    from PIL import Image

    image = Image.fromarray(np.arange(300, dtype="uint8").reshape(10, 10, 3))
    assert len(pipeline("image-classification", model=str(tmp_path / "vit"))(image)) == 2


@cases
@pytest.mark.parametrize(
    "arguments", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}], ids=str
)
def test_ways_of_loading(family, mechanism, arguments, tmp_path):
    model = model_of(family, mechanism).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = type(model).from_pretrained(tmp_path, **arguments).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs_of(model)).logits, model(**inputs_of(model)).logits)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_embeddings_are_tied_and_resize(family, tmp_path):
    model = model_of(family, "rfa")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120 and model(**inputs_of(model)).logits.shape[-1] == 120
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert loaded.get_input_embeddings().weight.shape[0] == 120


@cases
def test_attention_maps_are_exact_or_refused(family, mechanism):
    model = model_of(family, mechanism).double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(model).items()}
    weights_known = all(m.mechanism.capabilities.attention_weights for m in attention_modules(model).values())
    with torch.no_grad():
        if not weights_known:
            with pytest.raises(Unsupported, match="output_attentions"):
                model(**inputs, output_attentions=True)
            return
        out = model(**inputs, output_attentions=True)
    maps = out.attentions
    assert len(maps) == 2
    seen = torch.ones(maps[0].shape[0], maps[0].shape[2], dtype=torch.bool)
    if "attention_mask" in inputs:
        seen = inputs["attention_mask"].bool()
        hidden = ~seen[:, None, None].expand_as(maps[0])
        assert not maps[0][hidden].any()
    if family == "gpt2":
        assert not maps[0].triu(1).any()
    if not all(m.mechanism.capabilities.convex for m in attention_modules(model).values()):
        return
    rows = maps[0].sum(-1).transpose(1, 2)[seen]
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-9, atol=1e-9)


def test_the_stock_class_takes_mechanisms_without_parameters(tmp_path):
    transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="rfa").eval()
    assert type(stock).__name__ == "BertForMaskedLM"
    ours = hf_attn.convert(AutoModelForMaskedLM.from_pretrained(tmp_path), "rfa").eval()
    with torch.no_grad():
        first, second = (stock(**inputs_of(stock)).logits for _ in range(2))
        assert torch.equal(first, second), "features of a layer are drawn once"
        assert torch.isfinite(ours(**inputs_of(stock)).logits).all()
        softmax = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="softmax").eval()
        sdpa = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(
            softmax(**inputs_of(stock)).logits, sdpa(**inputs_of(stock)).logits, rtol=1e-5, atol=1e-6
        )


def test_the_stock_class_refuses_a_mechanism_with_parameters(tmp_path):
    transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).save_pretrained(tmp_path)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="ripple")
    with pytest.raises(Unsupported, match=r"ripple in ViTAttention.*configuration.*convert"):
        stock(torch.rand(1, 3, 12, 12))


@pytest.mark.parametrize("mechanism", [n for f, n in CASES if f == "bert"])
def test_packed_rows_equal_the_sequences_alone(mechanism):
    model = model_of("bert", mechanism).double().eval()
    first, second = torch.randint(1, 90, (1, 6)), torch.randint(1, 90, (1, 9))
    row = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(6), torch.arange(9)))[None]
    packable = all(m.mechanism.capabilities.packed for m in attention_modules(model).values())
    with torch.no_grad():
        if not packable:
            with pytest.raises(Unsupported, match=f"{mechanism}.*packed"):
                model(row, position_ids=positions)
            return
        out = model(row, position_ids=positions).logits
        alone = torch.cat([model(x).logits for x in (first, second)], dim=1)
    torch.testing.assert_close(out, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mechanism", [n for f, n in CASES if f == "gpt2"])
def test_packed_causal_rows_equal_the_sequences_alone(mechanism):
    model = model_of("gpt2", mechanism).double().eval()
    first, second = torch.randint(1, 90, (1, 6)), torch.randint(1, 90, (1, 9))
    positions = torch.cat((torch.arange(6), torch.arange(9)))[None]
    with torch.no_grad():
        out = model(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(x, use_cache=False).logits for x in (first, second)], dim=1)
    torch.testing.assert_close(out, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mechanism", [n for f, n in CASES if f == "bert"])
def test_masks_handed_in_by_the_user(mechanism):
    model = model_of("bert", mechanism).double().eval()
    ids = torch.randint(1, 90, (2, 8))
    padding = torch.ones(2, 8, dtype=torch.long)
    padding[1, 5:] = 0
    blocks = torch.rand(2, 1, 8, 8) > 0.4
    blocks |= torch.eye(8, dtype=torch.bool)
    dense = all(m.mechanism.capabilities.dense_mask for m in attention_modules(model).values())
    with torch.no_grad():
        by_padding = model(ids, attention_mask=padding).logits
        as_4d = padding[:, None, None].bool().expand(2, 1, 8, 8)
        torch.testing.assert_close(model(ids, attention_mask=as_4d).logits[0], by_padding[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            model(ids, attention_mask=as_4d).logits[1, :5], by_padding[1, :5], rtol=1e-9, atol=1e-9
        )
        if not dense:
            with pytest.raises(Unsupported, match=f"{mechanism}.*mask"):
                model(ids, attention_mask=blocks)
            return
        additive = torch.zeros(2, 1, 8, 8, dtype=torch.float64).masked_fill(~blocks, torch.finfo(torch.float64).min)
        expected = model(ids, attention_mask=additive).logits
        if mechanism == "softmax":
            stock = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).double().eval()
            stock.load_state_dict(model.state_dict())
            expected = stock(ids, attention_mask=additive).logits
        assert (expected - by_padding).abs().max() > 1e-9
        for mask in (blocks, additive):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-9, atol=1e-9)
