"""Every golden case in tests/golden, run as its contract says, and every refused call.

Cases come from an independent float64 implementation. One file is one case; a new mechanism needs no new test here:
its cases run as soon as it is registered.
"""

import importlib
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import hf_attn

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*/*.safetensors"))
REFUSED = [case for path in sorted(GOLDEN.glob("refused_*.json")) for case in json.loads(path.read_text())]


@cache
def load(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        # clone: tensors in a file may be aligned to 8 bytes only
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def identify(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_there_are_cases_and_every_folder_is_known():
    folders = {path.parent.name for path in CASES}
    assert len(CASES) >= 130
    built = {path.parent.name for path in CASES if load(path)[0]["target"] == "build"}
    assert built <= set(hf_attn.list_mechanisms())
    assert {"softmax", "rfa", "ripple"} <= folders


def resolve(meta: dict[str, str], tensors: dict[str, torch.Tensor]):
    """The callable of a case with its parameters loaded (strictly), in float64."""
    parameters = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    options = json.loads(meta.get("options") or "{}")
    if meta["target"] == "build":
        heads = int(meta.get("num_heads") or tensors["query"].shape[1])
        dim = int(meta.get("head_dim") or tensors["query"].shape[3])
        module = hf_attn.build(meta["mechanism"], num_heads=heads, head_dim=dim, **options).double()
    else:
        home, _, attribute = meta["target"].rpartition(".")
        found = getattr(importlib.import_module(home), attribute)
        if not isinstance(found, type):
            return lambda **inputs: found(**inputs, **options)
        module = found(**options).double()
    module.load_state_dict(parameters, strict=True)
    return module.train(meta.get("training") == "true")


def nest(flat: dict[str, object]) -> dict[str, object]:
    """`params.w` and `logits.0` become entries of a dict or list argument, `state.m.w` of a dict in one."""
    out: dict[str, object] = {}
    for name, tensor in flat.items():
        head, _, rest = name.partition(".")
        if rest:
            out.setdefault(head, {})[rest] = tensor
        else:
            out[head] = tensor
    out = {k: nest(v) if isinstance(v, dict) else v for k, v in out.items()}
    return {
        k: [v[i] for i in sorted(v, key=int)] if isinstance(v, dict) and all(i.isdigit() for i in v) else v
        for k, v in out.items()
    }


def leaves(name: str | None, part: object) -> list[tuple[str | None, object]]:
    """The tensors of a result under their names: a list or dict has one more dot an entry."""
    if isinstance(part, (list, dict)):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        return [leaf for key, value in items for leaf in leaves(f"{name}.{key}", value)]
    return [(name, part)]


RESERVED = ("param.", "grad.", "output", "cotangent", "pooled_layer_input", "decode_output")


@pytest.mark.parametrize("form", ["forward", "naive"])
@pytest.mark.parametrize("path", CASES, ids=identify)
def test_golden(path: Path, form: str):
    meta, tensors = load(path)
    if form == "naive" and meta["target"] != "build":
        pytest.skip("a system has one form")
    target = resolve(meta, tensors)
    # a layer's state is what its decoding steps start from; a function's is an argument
    reserved = (*RESERVED, "state.") if isinstance(target, torch.nn.Module) else RESERVED
    inputs = {n: t.clone() for n, t in tensors.items() if not n.startswith(reserved)}
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and f"grad.{name}" in tensors:
            tensor.requires_grad_()
    call = json.loads(meta.get("call") or "{}")
    result = (target.naive if form == "naive" else target)(**nest(inputs), **call)

    names = json.loads(meta["outputs"]) if "outputs" in meta else [None]
    results = [result] if names == [None] else list(result)
    loss = 0.0
    flat = [leaf for name, part in zip(names, results, strict=True) for leaf in leaves(name, part)]
    for name, value in flat:
        key = "output" if name is None else f"output.{name}"
        value, expected = torch.as_tensor(value), tensors[key]
        assert torch.isfinite(value).all()
        valid = tensors.get("output_valid")
        shown, wanted = (value, expected) if valid is None else (select(value, valid), select(expected, valid))
        torch.testing.assert_close(shown, wanted, rtol=1e-9, atol=1e-9)
        cotangent = tensors.get("cotangent" if name is None else f"cotangent.{name}")
        if cotangent is not None:
            loss = loss + (value * cotangent).sum()
    if isinstance(loss, torch.Tensor):
        loss.backward()
        check_gradients(target, inputs, tensors)


def select(value: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The rows (B,N) to compare of a (B,H,N,D) or (B,N,...) result, or the pixels (B,h,w) of a (B,C,h,w) one."""
    if valid.dim() == 3:
        return value.movedim(1, -1)[valid]
    return value.transpose(1, 2)[valid] if value.dim() == 4 else value[valid]


def check_gradients(target, inputs, tensors):
    parameters = dict(target.named_parameters()) if isinstance(target, torch.nn.Module) else {}
    for name, expected in tensors.items():
        if name.startswith("grad."):
            key = name.removeprefix("grad.")
            source = parameters[key.removeprefix("param.")] if key.startswith("param.") else inputs[key]
            got = torch.zeros_like(expected) if source.grad is None else source.grad
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"grad.{key}: {m}")
    for name, parameter in parameters.items():
        if f"grad.param.{name}" not in tensors:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} takes no part and has a gradient"


@pytest.mark.parametrize("path", [p for p in CASES if load(p)[0]["target"] == "build"], ids=identify)
def test_golden_in_float32(path: Path):
    meta, tensors = load(path)
    target = resolve(meta, tensors).float()
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items() if not n.startswith(RESERVED)}
    value = target(**nest(inputs), **json.loads(meta.get("call") or "{}"))
    valid = tensors.get("output_valid", torch.ones(value.shape[0], value.shape[2], dtype=torch.bool))
    torch.testing.assert_close(select(value, valid), select(tensors["output"], valid).float(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "case", REFUSED, ids=lambda c: f"{c.get('mechanism') or c.get('target')}: {c['why']}".replace("/", " ")
)
def test_refused(case: dict):
    name = case.get("mechanism")
    if name not in hf_attn.list_mechanisms():
        pytest.skip(f"{name or case.get('target')} is not written yet")
    make = {"num_heads": case["H"], "head_dim": case["D"], **case["options"]}
    if case["at"] == "build":
        with pytest.raises((ValueError, TypeError), match=name):
            hf_attn.build(name, **make)
        return
    module = hf_attn.build(name, **make)
    shape = (case["B"], case["H"])
    query, key, value = (torch.randn(*shape, n, case["D"]) for n in (case["N"], case["M"], case["M"]))
    extra = {n: torch.randn(*s) for n, s in case["tensors"].items()}
    with pytest.raises(ValueError, match=name):
        module(query, key, value, **extra, **case["call"])
