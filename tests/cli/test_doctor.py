"""The self-check: it passes where everything is right, and finds what is wrong."""

import dataclasses
import json
import re

import pytest
import torch
from typer.testing import CliRunner

import hf_attn
from hf_attn import doctor, kernels
from hf_attn.cli import app
from hf_attn.errors import InvalidInput
from hf_attn.mechanisms.softmax import SoftmaxAttention

CPU = torch.device("cpu")


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", hf_attn.list_mechanisms())
def test_every_mechanism_passes_on_the_cpu(name, precision):
    capabilities = hf_attn.get_mechanism(name).capabilities
    modes = doctor.modes(capabilities)
    assert ("causal" in modes) == capabilities.causal and ("cross" in modes) == capabilities.cross
    for mode in modes:
        check = doctor.check(name, CPU, precision, mode)
        assert check.passed, str(check)


def test_looking_changes_no_random_numbers():
    before = torch.random.get_rng_state()
    doctor.examine("cpu")
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_report_is_complete():
    seen = []
    report = doctor.examine(progress=seen.append)
    assert seen == hf_attn.list_mechanisms() == list(dict.fromkeys(check.mechanism for check in report.checks))
    assert "cpu" in report.devices and not report.failures
    found = {(check.precision, check.mode) for check in report.checks if check.mechanism == "softmax" and check.device == "cpu"}  # fmt: skip
    assert found == {(p, m) for p in ("float64", "float32") for m in ("bidirectional", "causal", "padding", "cross")}
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["passed"] is True


attend = SoftmaxAttention.attend


def off_by_little(self, call):
    return attend(self, call) * (1 + 1e-6)


def wrong_gradient(self, call):
    out = attend(self, call)
    return out + 0.01 * (out - out.detach())


def wrong_causal_order(self, call):
    call.is_causal = False
    return attend(self, call)


def ignores_padding(self, call):
    call.key_padding_mask = None
    return attend(self, call)


def not_a_number(self, call):
    return attend(self, call) * float("nan")


def raises(self, call):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("form", "precision", "modes", "words"),
    [
        (off_by_little, "float64", {"bidirectional", "causal", "padding", "cross"}, r"error 1.0e-06 \(limit 1e-10\)"),
        (wrong_gradient, "float32", {"bidirectional", "causal", "padding", "cross"}, r"gradients 1.0e-02 \(limit 0.0001\)"),
        (wrong_causal_order, "float32", {"causal"}, "error"),
        (ignores_padding, "float32", {"padding"}, "error"),
        (not_a_number, "float64", {"bidirectional", "causal", "padding", "cross"}, "not finite"),
        (raises, "float64", {"bidirectional", "causal", "padding", "cross"}, "RuntimeError: no kernel image is available"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(form, precision, modes, words, monkeypatch):
    monkeypatch.setattr(SoftmaxAttention, "attend", form)
    checks = [check for check in doctor.checks("softmax", [CPU]) if check.precision == precision]
    failed = [check for check in checks if not check.passed]
    assert {check.mode for check in failed} == modes
    for check in failed:
        assert re.search(words, str(check)), str(check)
        assert str(check).startswith(f"softmax on cpu, {precision}, {check.mode}: ")


def test_exit_codes_and_outputs(monkeypatch):
    done = run("--device", "cpu")
    assert done.exit_code == 0 and not done.stderr
    number = len(doctor.examine("cpu").checks)
    assert f"{number} of {number} checks passed" in done.stdout and "FAILED" not in done.stdout
    assert run("--json").exit_code == 0
    monkeypatch.setattr(SoftmaxAttention, "attend", raises)
    done = run()
    assert done.exit_code == 1 and "FAILED" in done.stdout and "did not run" in done.stdout
    lines = done.stderr.splitlines()
    # context_pool attends by softmax
    assert all(re.match("failed: (softmax|context_pool) on cpu, float", line) for line in lines)
    assert sum("softmax" in line for line in lines) == 8
    done = run("--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 1 and report["passed"] is False and len(report["failures"]) == len(lines)
    assert {check["passed"] for check in report["checks"] if check["mechanism"] == "softmax"} == {False}


def test_numbers_that_are_not_finite_still_make_json(monkeypatch):
    monkeypatch.setattr(SoftmaxAttention, "attend", not_a_number)
    report = json.loads(run("--json").stdout)
    assert report["passed"] is False and "NaN" not in json.dumps(report)


def test_packages():
    found = {package.name: package for package in doctor.packages()}
    assert found["hf_attn"].version == hf_attn.__version__
    assert found["torch"].version.partition("+")[0] == torch.__version__.partition("+")[0]
    assert all(package.passed for package in found.values() if not package.optional)
    assert "pytest" not in found and found["flash-attn"].optional
    assert found["transformers"].needs == ">=5.17,<6"


@pytest.mark.parametrize(
    ("version", "needs", "optional", "passed"),
    [("5.23.0", ">=5.17,<6", False, True), ("6.0", ">=5.17,<6", False, False), ("6.0", ">=5.17,<6", True, False),
     ("2.13.0+cpu", ">=2.11", False, True), ("2.12.0a0+git", ">=2.11", False, True), (None, ">=3.4", True, True), (None, ">=3.4", False, False)],
)  # fmt: skip
def test_versions_are_compared(version, needs, optional, passed):
    assert doctor.Package("some", version, needs, optional).passed is passed


def test_a_package_outside_its_range_fails_the_check(monkeypatch):
    package = doctor.Package("transformers", "4.50.0", ">=5.17,<6", optional=False)
    monkeypatch.setattr(doctor, "packages", lambda: [package])
    done = run("--device=cpu")
    assert done.exit_code == 1
    assert done.stderr.strip() == "failed: transformers 4.50.0, needed: >=5.17,<6"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert doctor.devices() == doctor.devices("cpu") == [CPU]
    for wanted in ("cuda", "nose", "cpu:1", ""):
        with pytest.raises(InvalidInput, match="is not a device of this machine. It has: cpu"):
            doctor.devices(wanted)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert doctor.devices() == [CPU, torch.device("cuda:0")]
    assert doctor.devices("cuda") == [torch.device("cuda:0")]
    assert doctor.devices("cuda:1") == [torch.device("cuda:1")]
    with pytest.raises(InvalidInput, match="It has: cpu, cuda:0, cuda:1"):
        doctor.devices("cuda:2")


def test_kernels(monkeypatch):
    found = doctor.all_kernels()
    assert list(dict.fromkeys(kernel.operation for kernel in found)) == kernels.operations()
    attention = {kernel.backend: kernel for kernel in found if kernel.operation == "attention"}
    assert tuple(attention) == hf_attn.get_mechanism("softmax").capabilities.backends
    assert attention["math"].reason is None and attention["math"].automatic
    assert not attention["sdpa-flash"].automatic
    monkeypatch.setenv("HF_ATTN_KERNELS", "torch")
    limited = {kernel.backend: kernel for kernel in doctor.all_kernels() if kernel.operation == "attention"}
    assert not limited["flash-attn-2"].automatic and limited["math"].automatic
    assert limited["math"] == dataclasses.replace(attention["math"])


def test_triton_kernels_are_checked(monkeypatch):
    if doctor.missing_triton() is not None:
        pytest.skip(f"Triton kernels cannot run here: {doctor.missing_triton()}")
    found = list(doctor.kernel_checks(CPU))
    assert [check.mode.partition(" by ")[2] for check in found] == list(doctor.TRITON)
    assert all(check.passed for check in found), "\n".join(map(str, found))

    # a mechanism that does not take its kernel is found
    monkeypatch.setattr(kernels, "setting", lambda environment: "torch")
    found = list(doctor.kernel_checks(CPU))
    assert not any(check.passed for check in found)
    assert all("was not called" in str(check) for check in found)


def test_active_kernels_are_named(monkeypatch):
    found = {(kernel.operation, kernel.backend): kernel for kernel in doctor.all_kernels()}
    assert found["attention", "math"].active and not found["ring_sums", "triton"].active
    assert found["ring_sums", "tables"].active
    monkeypatch.setenv("HF_ATTN_KERNELS", "triton")
    found = {(kernel.operation, kernel.backend): kernel for kernel in doctor.all_kernels()}
    assert found["ring_sums", "triton"].active == (doctor.missing_triton() is None)


def test_why_a_kernel_cannot_run_is_printed():
    printed = " ".join(run("--device", "cpu").stdout.split())
    for kernel in doctor.all_kernels():
        assert kernel.backend in printed
    if not torch.backends.cuda.is_built():
        assert "sdpa-cudnn – this torch is built without CUDA" in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_accelerator_passes():
    report = doctor.examine()
    assert len(report.devices) == 2
    assert not report.failures, "\n".join(map(str, report.failures))
