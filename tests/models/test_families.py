"""Every head of every family, with every mechanism the family can use: loading, initialisation, saving, reloading."""

import pickle

import pytest
import torch
import transformers
from helpers import BERT, GPT2, VIT, families_of, inputs_of
from transformers import AutoConfig

import hf_attn
from hf_attn.models.wrapping import attention_modules

SIZES = {"bert": BERT, "vit": VIT, "gpt2": GPT2}
PREFIX = {"bert": "AttnBert", "vit": "AttnViT", "gpt2": "AttnGPT2"}
HEADS = [
    (family, name)
    for family, prefix in PREFIX.items()
    for name in dir(hf_attn)
    if name.startswith(prefix) and not name.endswith("Config")
]
CASES = [(f, n) for n in hf_attn.list_mechanisms() for f in families_of(n)]
MAIN = {"bert": "AttnBertForMaskedLM", "vit": "AttnViTForImageClassification", "gpt2": "AttnGPT2LMHeadModel"}

heads = pytest.mark.parametrize("family, head", HEADS)
cases = pytest.mark.parametrize("family, mechanism", CASES)


def stock_model(head: str, family: str):
    cls = getattr(transformers, head.removeprefix("Attn"))
    torch.manual_seed(1)
    return cls(cls.config_class(**SIZES[family])).eval()


def config_of(family: str, mechanism: str = "softmax", **fields):
    cls = getattr(hf_attn, f"{PREFIX[family]}Config")
    return cls(**SIZES[family], attn_implementation=mechanism, **fields)


def test_every_head_of_transformers_is_there():
    for family, stock in (("bert", "Bert"), ("vit", "ViT"), ("gpt2", "GPT2")):
        module = getattr(transformers.models, family)
        known = {
            n
            for n in getattr(module, f"modeling_{family}").__all__
            if not n.endswith("PreTrainedModel") and n != "BertLayer"
        }
        ours = {head.removeprefix("Attn") for f, head in HEADS if f == family}
        assert known == ours, f"{stock}: {known ^ ours}"


@heads
def test_a_class_is_documented_named_and_pickles(family, head):
    cls = getattr(hf_attn, head)
    assert cls.__name__ == cls.__qualname__ == head
    assert cls.__module__ == f"hf_attn.models.{family}"
    assert head.removeprefix("Attn") in cls.__doc__ and "Args:" in cls.__doc__
    assert pickle.loads(pickle.dumps(cls)) is cls
    model = cls(config_of(family)).eval()
    copy = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for a, b in zip(model(**inputs_of(model)).values(), copy(**inputs_of(model)).values()):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)


@heads
def test_softmax_gives_the_stock_outputs(family, head, tmp_path):
    stock = stock_model(head, family)
    stock.save_pretrained(tmp_path)
    model = getattr(hf_attn, head).from_pretrained(tmp_path, attn_implementation="softmax").eval()
    assert set(model.state_dict()) == set(stock.state_dict())
    with torch.no_grad():
        ours, theirs = model(**inputs_of(model)), stock(**inputs_of(stock))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)


@heads
def test_saved_equals_reloaded_by_its_own_class_and_the_auto_class(family, head, tmp_path):
    mechanism = "ripple" if family == "vit" else "rfa"
    model = getattr(hf_attn, head)(config_of(family, mechanism)).eval()
    model.save_pretrained(tmp_path)
    own = getattr(hf_attn, head).from_pretrained(tmp_path).eval()
    assert type(own) is type(model)
    autos = [
        auto
        for name, auto in vars(transformers.models.auto.modeling_auto).items()
        if name.startswith("AutoModel") and type(model) in _registered(auto, type(model.config))
    ]
    assert autos or head == "AttnBertLMHeadModel" or _registered_nowhere(head), f"no Auto class knows {head}"
    for loaded in [own, *(auto.from_pretrained(tmp_path).eval() for auto in autos[:1])]:
        assert hf_attn.layer_names(loaded) == [mechanism] * 2
        with torch.no_grad():
            for a, b in zip(model(**inputs_of(model)).values(), loaded(**inputs_of(model)).values()):
                if isinstance(a, torch.Tensor):
                    assert torch.equal(a, b)


def _registered(auto, config_class):
    mapping = getattr(auto, "_model_mapping", None)
    found = mapping[config_class] if mapping is not None and config_class in mapping else ()
    return found if isinstance(found, (tuple, list)) else (found,)


def _registered_nowhere(head: str) -> bool:
    """The stock class is in no Auto mapping either, as the first choice of its config."""
    stock = getattr(transformers, head.removeprefix("Attn"))
    return not any(
        stock in _registered(auto, stock.config_class)[:1]
        for name, auto in vars(transformers.models.auto.modeling_auto).items()
        if name.startswith("AutoModel")
    )


@cases
def test_a_stock_checkpoint_loads_and_every_parameter_is_at_its_start(family, mechanism, tmp_path):
    stock = stock_model(MAIN[family], family)
    stock.save_pretrained(tmp_path)
    torch.manual_seed(5)
    model, info = getattr(hf_attn, MAIN[family]).from_pretrained(
        tmp_path, attn_implementation=mechanism, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert value.device.type == "cpu"
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    for path, module in attention_modules(model).items():
        assert module.mechanism.name == mechanism
        fresh = type(module.mechanism)(module.mechanism.num_heads, module.mechanism.head_dim, module.mechanism.options)
        fresh.reset_beside_pretrained()
        for name, value in fresh.state_dict().items():
            loaded = module.mechanism.state_dict()[name]
            if _is_random(fresh, name):
                assert 0.25 < loaded.std() / value.std() < 4, f"{path}.{name}: another scale than its start"
            else:
                torch.testing.assert_close(loaded, value, rtol=0, atol=0, msg=f"{path}.{name}")
    model.eval()
    with torch.no_grad():
        first, second = (model(**inputs_of(model)).logits for _ in range(2))
    assert torch.isfinite(first).all() and torch.equal(first, second)


def _is_random(module, name: str) -> bool:
    before = module.state_dict()[name].clone()
    module.reset_beside_pretrained()
    return not torch.equal(before, module.state_dict()[name])


@cases
def test_saved_equals_reloaded(family, mechanism, tmp_path):
    model = getattr(hf_attn, MAIN[family])(config_of(family, mechanism)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    loaded = getattr(hf_attn, MAIN[family]).from_pretrained(tmp_path).eval()
    assert loaded.config.attention == model.config.attention == AutoConfig.from_pretrained(tmp_path).attention
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(model)).logits, loaded(**inputs_of(model)).logits)


@cases
def test_it_trains_and_checkpointing_changes_no_gradient(family, mechanism):
    torch.manual_seed(0)
    model = getattr(hf_attn, MAIN[family])(config_of(family, mechanism)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs_of(model, labels=True)).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-7, msg=name)
    learned = [n for n, _ in model.named_parameters() if ".mechanism." in n]
    assert bool(learned) == any(m.mechanism.capabilities.learned for m in attention_modules(model).values())
    assert all(n in gradients[0] for n in learned), "every parameter of a mechanism takes part in training"


@cases
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loads_and_runs(family, mechanism, dtype, tmp_path):
    stock_model(MAIN[family], family).save_pretrained(tmp_path)
    low = getattr(torch, dtype)
    model = getattr(hf_attn, MAIN[family]).from_pretrained(tmp_path, attn_implementation=mechanism, dtype=low).eval()
    assert {p.dtype for p in model.parameters()} == {low}
    inputs = {k: v.to(low) if v.is_floating_point() else v for k, v in inputs_of(model).items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.dtype == low and torch.isfinite(logits).all()


@cases
def test_compiled_equals_eager(family, mechanism):
    model = getattr(hf_attn, MAIN[family])(config_of(family, mechanism)).eval()
    assert all(m.mechanism.capabilities.compile for m in attention_modules(model).values())
    inputs = {**inputs_of(model), **({"use_cache": False} if family == "gpt2" else {})}
    torch.compiler.reset()  # every mechanism shares one forward, and what is compiled of it is limited
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@cases
def test_padded_equals_alone(family, mechanism):
    if family == "vit":
        pytest.skip("an image has no padding")
    model = getattr(hf_attn, MAIN[family])(config_of(family, mechanism)).double().eval()
    ids = torch.randint(0, 99, (2, 14))
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.no_grad():
        both, alone = model(ids, attention_mask=mask).logits, model(ids[1:, :9]).logits
        torch.testing.assert_close(both[1:, :9], alone, rtol=1e-10, atol=1e-10)
        ids[1, 9:] = 7
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[1:, :9], alone, rtol=1e-10, atol=1e-10)
