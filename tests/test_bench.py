"""Benchmarks: what must not get a time, how pairs are taken, what the files say. No test asserts a time."""

import csv
import importlib.util
import io
import itertools
import os
import platform
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import BERT
from rich.console import Console

import hf_attn
from hf_attn import bench
from hf_attn.bench import memory, peers, timing
from hf_attn.bench.checks import Mismatch
from hf_attn.bench.gate import Limits, Row, cells, measure, sweep
from hf_attn.bench.models import STORED, checkpoint
from hf_attn.bench.report import COLUMNS, Environment, Report
from hf_attn.bench.timing import Comparison, Spread, TooSlow, compare
from hf_attn.bench.workload import Case, Contest, MechanismWorkload, Workload
from hf_attn.errors import InvalidInput, InvalidOption, UnknownMechanism, Unsupported
from hf_attn.mechanisms.rfa import RandomFeatureAttention
from hf_attn.mechanisms.softmax import SoftmaxAttention

CASE = Case(64, heads=2, head_dim=8)
QUICK = Limits(repeats=1, min_seconds=0, memory=False)
SMALL = {"heads": 2, "head_dim": 8, "repeats": 1, "min_seconds": 0.0, "memory": False}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=140)


# the gate


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", hf_attn.list_mechanisms())
def test_every_mechanism_is_verified_or_says_why_it_is_not_defined(name, backward):
    workload = MechanismWorkload(name)
    for mode in workload.modes(None, CASE):
        row = measure(workload, replace(CASE, causal=mode, backward=backward), QUICK)
        assert row.status in ("measured", "skipped"), row.note
        if name in ("softmax", "rfa", "ripple"):
            assert row.status == "measured", row.note
            assert "float64 at 64, float32 at 64" in row.note


def scaled(attend, call):
    return attend(call) * 1.001


def detached(attend, call):
    return attend(call) + 0 * call.value - (0.5 * call.value - 0.5 * call.value.detach())


def wrong_when_long(attend, call):
    return attend(call) * (1.0 if call.keys < 256 else 1.001)


def wrong_in_float32(attend, call):
    return attend(call) * (1.001 if call.query.dtype == torch.float32 else 1.0)


def not_finite_when_batched(attend, call):
    return attend(call) / (0.0 if call.batch == 3 else 1.0)


def raises(attend, call):
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("broken", "case", "why"),
    [
        (scaled, CASE, "output in float64 at length 64: off by"),
        (detached, CASE, "gradient of value in float64"),
        (wrong_when_long, replace(CASE, length=256), "output in float32 at length 256"),
        (wrong_in_float32, CASE, "output in float32 at length 64"),
        (not_finite_when_batched, replace(CASE, batch=3), "not finite"),
        (raises, CASE, "RuntimeError: no kernel image"),
    ],
)
def test_a_broken_kernel_gets_no_time(broken, case, why, backward, monkeypatch):
    attend = RandomFeatureAttention.attend
    monkeypatch.setattr(RandomFeatureAttention, "attend", lambda self, call: broken(lambda c: attend(self, c), call))
    row = measure(MechanismWorkload("rfa"), replace(case, backward=backward), QUICK)
    assert row.status == "refused" and why in row.note
    assert row.time is None and row.memory is None
    assert measure(MechanismWorkload("softmax"), case, QUICK).status == "measured"


def test_a_kernel_that_draws_otherwise_in_training_gets_no_time(monkeypatch):
    attend = RandomFeatureAttention.attend

    def fixed(self, call):
        training, self.training = self.training, False
        try:
            return attend(self, call)
        finally:
            self.training = training

    monkeypatch.setattr(RandomFeatureAttention, "attend", fixed)
    row = measure(MechanismWorkload("rfa"), CASE, QUICK)
    assert row.status == "refused" and "output in float64" in row.note


def test_run_prints_refused_and_why_instead_of_a_time(monkeypatch, tmp_path):
    attend = RandomFeatureAttention.attend
    monkeypatch.setattr(RandomFeatureAttention, "attend", lambda self, call: attend(self, call) * 1.001)
    console = quiet()
    report = bench.run(["rfa", "softmax"], [64], causal=False, output=tmp_path, console=console, **SMALL)
    assert [row.status for row in report.rows] == ["refused", "refused", "measured", "measured"]
    printed = console.file.getvalue()
    assert len(re.findall(r"^ +rfa 64: refused: output in float64 at length 64: off by", printed, re.MULTILINE)) == 2
    assert "rfa" not in "".join(report.findings())
    refused = [line for line in csv_rows(tmp_path / "bench_attention.csv") if line["attention"] == "rfa"]
    assert len(refused) == 2
    for line in refused:
        assert line["status"] == "refused" and "off by" in line["note"]
        assert not any(line[name] for name in line if name.endswith(("_ms", "_q1", "_q3", "_mib")) or name == "ratio")


def test_a_row_cannot_hold_a_time_that_was_not_verified():
    spread = Spread(1, 1, 1)
    time = Comparison(spread, spread, spread, 1)
    for status in ("refused", "skipped"):
        with pytest.raises(InvalidInput, match="do not go together"):
            Row("x", "SDPA", CASE, status, "", time=time)
    with pytest.raises(InvalidInput, match="do not go together"):
        Row("x", "SDPA", CASE, "measured", "")


def test_lower_precision_is_held_to_the_definition_in_that_precision():
    for dtype in ("bfloat16", "float64"):
        row = measure(MechanismWorkload("rfa"), replace(CASE, dtype=dtype, backward=True), QUICK)
        assert row.status == "measured" and f"{dtype} at 64" in row.note


def test_the_check_goes_up_to_the_timed_length_while_the_definition_is_cheap(monkeypatch):
    workload = MechanismWorkload("softmax")
    assert workload.ladder(1024) == [256, 512, 1024] and workload.ladder(300) == [150, 300]
    assert MechanismWorkload("ripple").ladder(4096) == [256, 1024, 4096]
    assert workload.verify(replace(CASE, length=512)) == "float64 at 64, float32 at 512"
    monkeypatch.setattr("hf_attn.bench.workload.NAIVE_SECONDS", 0)
    assert MechanismWorkload("softmax").verify(replace(CASE, length=512)) == "float64 at 64, float32 at 256"


def test_the_seed_decides_and_the_callers_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    measure(MechanismWorkload("rfa"), replace(CASE, backward=True), QUICK)
    assert torch.equal(before, torch.get_rng_state())
    outputs = [MechanismWorkload("rfa").setup(replace(CASE, seed=seed)).candidate()[0] for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


# options, modes, cells that are not defined


def test_options_come_from_the_user_then_the_host_then_the_defaults():
    options = MechanismWorkload("ripple").resolve(replace(CASE, length=256))
    assert options[0].r_cap == 15 and options[1] == (16, 16)
    given = MechanismWorkload("ripple", {"r_cap": 4})
    assert given.resolve(CASE)[0].r_cap == 4 and given.label == "ripple:r_cap=4"
    assert MechanismWorkload("rfa").setup(CASE).options == "", "its own defaults"
    flat = MechanismWorkload("ripple", {"allow_1d": True, "r_cap": 4})
    assert flat.resolve(replace(CASE, length=50))[1] is None
    assert list(flat.modes(None, CASE)) == [False, True]


def test_cells_that_are_not_defined_say_why():
    row = measure(MechanismWorkload("ripple"), replace(CASE, length=50), QUICK)
    assert row.status == "skipped" and "length 50 is no square grid" in row.note
    row = measure(MechanismWorkload("ripple"), replace(CASE, causal=True), QUICK)
    assert row.status == "skipped" and "is_causal=True" in row.note
    assert list(MechanismWorkload("ripple").modes(None, CASE)) == [False]
    assert list(MechanismWorkload("rfa").modes(None, CASE)) == [False, True]
    assert list(MechanismWorkload("rfa").modes(True, CASE)) == [True]


def test_causal_attention_is_compared_with_causal_attention():
    case = replace(CASE, causal=True)
    workload = MechanismWorkload("softmax")
    assert workload.baseline(case) == "causal SDPA" and workload.baseline(CASE) == "SDPA"
    for seen in (case, CASE, replace(case, backward=True)):
        contest = workload.setup(seen)
        for a, b in zip(contest.baseline(), contest.candidate(), strict=True):
            torch.testing.assert_close(a, b)


def test_forward_runs_without_gradients_and_the_backward_pass_in_training_mode():
    workload = MechanismWorkload("rfa")
    forward = workload.setup(CASE).candidate()
    assert len(forward) == 1 and not forward[0].requires_grad
    contest = workload.setup(replace(CASE, backward=True))
    first, second = contest.candidate(), contest.candidate()
    assert len(first) == 4 and not torch.equal(first[0], second[0]), "new features in each training step"


# pairs and their statistics


class FakeMachine:
    """Steps that only advance a clock."""

    def __init__(self, baseline, candidate):
        self.log, self.now = [], 0.0
        self.times = {"baseline": itertools.chain(baseline), "candidate": itertools.chain(candidate)}

    def step(self, name):
        def run():
            self.log.append(name)
            self.now += next(self.times[name])

        return run

    def clock(self, step):
        start = self.now
        step()
        return self.now - start

    def compare(self, **limits):
        limits = {"repeats": 3, "min_seconds": 0, "budget": 1e9, **limits}
        return compare(self.step("baseline"), self.step("candidate"), self.clock, **limits)


def test_baseline_and_candidate_take_turns_in_a_swapping_order():
    machine = FakeMachine(itertools.repeat(1.0), itertools.repeat(2.0))
    result = machine.compare(repeats=4)
    b, c = "baseline", "candidate"
    assert machine.log == [b, c, b, c, c, b, b, c, c, b], "a warm-up of both, then pairs"
    assert result.pairs == 4 and result.ratio.median == 2


def test_the_ratio_is_the_median_over_pairs_and_the_warm_up_does_not_count():
    machine = FakeMachine([100, 1, 10, 4], [100, 2, 10, 12])
    result = machine.compare()
    assert (result.baseline.median, result.candidate.median) == (4, 10)
    assert result.ratio == Spread(1.5, 2, 2.5), "of 2, 1 and 3"


def test_quartiles():
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(2, 3, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)


def test_it_goes_on_until_both_limits_are_met_and_stops_somewhere(monkeypatch):
    assert FakeMachine(itertools.repeat(1.0), itertools.repeat(1.0)).compare(min_seconds=11).pairs == 6
    monkeypatch.setattr(timing, "MAX_PAIRS", 5)
    assert FakeMachine(itertools.repeat(1e-9), itertools.repeat(1e-9)).compare(min_seconds=1).pairs == 5


def test_what_does_not_fit_the_budget_is_not_timed():
    machine = FakeMachine(itertools.repeat(1.0), itertools.repeat(9.0))
    with pytest.raises(TooSlow, match=r"about 30.0 s, and the budget of a cell is 29 s"):
        machine.compare(budget=29)
    assert len(machine.log) == 4, "a second try, since the first call may build what later ones reuse"
    assert FakeMachine(itertools.chain([100], itertools.repeat(1)), itertools.repeat(9)).compare(budget=31).pairs == 3


class FakeWorkload(Workload):
    """Takes what it is told and logs what is called."""

    label = "fake"

    def __init__(self, seconds=lambda length: 1.0, absent=None):
        self.seconds, self.reason, self.log = seconds, absent, []

    def absent(self):
        return self.reason

    def modes(self, causal, case):
        return (False,)

    def baseline(self, case):
        return "SDPA"

    def setup(self, case):
        self.log.append(("setup", case.length))
        return Contest(lambda: [torch.zeros(1)], lambda: [torch.zeros(1)], "")

    def verify(self, case):
        self.log.append(("verify", case.length))
        return "all of it"


def test_nothing_is_timed_before_it_is_verified():
    workload = FakeWorkload()

    def clock(step):
        workload.log.append(("time", 64))
        return 1.0

    assert measure(workload, CASE, QUICK, clock).note == "all of it"
    assert [event for event, _ in workload.log] == ["setup", "verify", "time", "time", "time", "time"]

    def refuse(case):
        raise Mismatch("off by 3")

    workload.log, workload.verify = [], refuse
    assert measure(workload, CASE, QUICK, clock).note == "off by 3"
    assert [event for event, _ in workload.log] == ["setup"]


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (MemoryError("a lot"), "skipped", "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "skipped", "out of memory"),
        (NotImplementedError("no backward on CPU"), "skipped", "no backward on CPU"),
        (Unsupported("x", "no", "Use y"), "skipped", "x: no. Use y"),
        (ZeroDivisionError("division by zero"), "refused", "ZeroDivisionError: division by zero"),
    ],
)
def test_errors_of_a_cell_become_its_note(error, status, note):
    workload = FakeWorkload()

    def fail(case):
        raise error

    workload.verify = fail
    row = measure(workload, CASE, QUICK)
    assert row.status == status and row.note.startswith(note)


def test_short_lengths_come_first_and_hopeless_cells_are_not_tried():
    workload = FakeWorkload()
    planned = cells([workload], [400, 100, 200, 100], CASE, None, backward=False)
    assert [case.length for _, case in planned] == [100, 200, 400]
    limits = Limits(repeats=5, min_seconds=0, budget=25, memory=False)
    rows = list(sweep(planned, limits, clock=lambda step: 2.0))
    assert [row.status for row in rows] == ["measured", "skipped", "skipped"]
    assert "about 40.0 s" in rows[1].note and "about 80.0 s" in rows[2].note
    assert {length for _, length in workload.log} == {100}
    rows = list(sweep(planned, replace(limits, budget=15), clock=lambda step: 2.0))
    assert [row.status for row in rows] == ["skipped"] * 3 and workload.log[-1][1] == 100


def test_the_total_time_cuts_the_rest():
    planned = cells([FakeWorkload()], [100, 200, 400], CASE, None, backward=False)
    watch = itertools.count(0, 4).__next__
    rows = list(sweep(planned, replace(QUICK, total=6), clock=lambda step: 1e-3, watch=watch))
    assert [row.status for row in rows] == ["measured", "skipped", "skipped"]
    assert rows[1].note == "the 6 s of the sweep were over"


# memory


needs_record = pytest.mark.skipif(memory.resident("VmHWM") is None, reason="no VmHWM in /proc/self/status")


@needs_record
def test_a_known_allocation_is_measured():
    kept = []
    found = bench.peak_memory(lambda: kept.append(torch.ones(64 * 2**18)))
    assert found.mib == pytest.approx(64, abs=4)
    assert not kept, "it ran in a child"
    nothing = bench.peak_memory(lambda: None)
    assert 0 <= nothing.mib < 4


@needs_record
def test_what_is_freed_counts_at_its_peak_and_free_memory_of_the_parent_does_not_hide_it():
    blocks = [torch.ones(2**18) for _ in range(32)]
    del blocks

    def step():
        for _ in range(3):
            torch.ones(32 * 2**18).sum()

    assert bench.peak_memory(step).mib == pytest.approx(32, abs=4)


@needs_record
def test_a_step_after_parallel_work_of_the_parent_does_not_hang():
    torch.set_num_threads(2)
    try:
        x = torch.randn(256, 256, requires_grad=True)
        (x @ x).sum().backward()
        found = bench.peak_memory(lambda: torch.autograd.grad((x @ x).sum(), x), timeout=20)
    finally:
        torch.set_num_threads(1)
    assert found.mib is not None, found


@needs_record
def test_failures_of_the_child_are_reasons():
    def fail():
        raise ValueError("broken")

    assert str(bench.peak_memory(fail)) == "not measured: ValueError: broken"
    assert "exit code 3" in str(bench.peak_memory(lambda: os._exit(3)))
    assert "within 0.2 s" in str(bench.peak_memory(lambda: __import__("time").sleep(5), timeout=0.2))


def test_other_systems_say_that_memory_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    found = bench.peak_memory(lambda: None)
    assert found.mib is None and str(found).startswith("not measured: this system has no VmHWM")


@needs_record
def test_without_a_peak_that_can_be_reset_the_first_run_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none" / "clear_refs")
    # the code of the step, and what torch sets up on its first run, is read into memory, too
    assert 60 < bench.peak_memory(lambda: torch.ones(64 * 2**18)).mib < 2 * 64


# CUDA, without a device


class FakeCuda:
    """Records the order of calls; the second event ends 7 ms after the first."""

    def __init__(self, monkeypatch):
        self.log, self.peak = [], 0
        log = self.log

        class Event:
            def __init__(self, enable_timing):
                log.append("event")

            def record(self):
                log.append("record")

            def elapsed_time(self, other):
                return 7.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)

    def step(self):
        self.log.append("step")


def test_cuda_steps_are_timed_between_events_on_an_idle_device(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    assert timing.clock_of("cuda")(cuda.step) == 0.007
    assert cuda.log == ["event", "event", "synchronize", "record", "step", "record", "synchronize"]


def test_cuda_memory_is_counted_by_torch(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    assert bench.peak_memory(cuda.step, "cuda:0").mib == 4
    assert cuda.log == ["step", "synchronize", "reset", "step", "synchronize"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_cuda_device():
    case = Case(256, heads=2, head_dim=32, dtype="float16", device="cuda", backward=True)
    for name in ("softmax", "rfa"):
        row = measure(MechanismWorkload(name), case, Limits(repeats=3, min_seconds=0))
        assert row.status == "measured", row.note
        assert row.memory[0].mib > 0 and row.memory[1].mib > 0


# reports


def csv_rows(path: Path) -> list[dict]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def row_of(label="rfa", length=512, ratio=(0.8, 0.9, 0.95), **case) -> Row:
    time = Comparison(Spread(0.009, 0.01, 0.011), Spread(0.008, 0.009, 0.01), Spread(*ratio), 7)
    seen = replace(CASE, length=length, **case)
    used = memory.Memory(10.0), memory.Memory(2.5)
    return Row(label, "SDPA", seen, "measured", "float64 at 64", "num_features=32", time, used)


def report_of(rows) -> Report:
    facts = Environment("python scripts/bench.py rfa", "torch 1", "a CPU, 2 cores", "2026-01-02", 3)
    return Report("attention", "bench_attention", rows, facts)


def test_all_three_files_say_how_they_were_made(tmp_path):
    report = bench.run(
        ["softmax", "rfa:num_features=8"], [64, 128], seed=3, causal=False, output=tmp_path / "new", console=quiet(),
        **{**SMALL, "memory": True},
    )  # fmt: skip
    texts = {path.suffix: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert set(texts) == {".csv", ".md", ".png"}
    assert texts[".png"].startswith(b"\x89PNG\r\n\x1a\n") and len(texts[".png"]) > 10000
    facts = report.environment
    assert facts.command == (
        "python scripts/bench.py softmax rfa:num_features=8 --lengths 64 128 --heads 2 --head-dim 8 --no-causal "
        "--repeats 1 --min-seconds 0.0 --seed 3"
    )
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", facts.date) and facts.seed == 3
    for name in ("hf_attn", "torch", "transformers", "python"):
        assert re.search(rf"\b{name} \d", facts.versions)
    assert re.search(r"\d+ cores, 1 thread", facts.machine)
    for text in texts.values():
        for fact in (facts.command, facts.versions, facts.machine, facts.date, facts.other_load):
            assert fact.encode() in text
        assert str(tmp_path).encode() not in text and os.getcwd().encode() not in text
    assert not re.search(rf"\b{re.escape(platform.node())}\b", " ".join(map(str, vars(facts).values())))

    rows = csv_rows(tmp_path / "new" / "bench_attention.csv")
    assert len(rows) == 2 * 2 * 2
    assert {(r["attention"], r["length"], r["pass"]) for r in rows} == {
        (a, n, p)
        for a in ("softmax", "rfa:num_features=8")
        for n in ("64", "128")
        for p in ("forward", "forward+backward")
    }
    for line in rows:
        assert float(line["ratio"]) > 0 and float(line["baseline_ms"]) > 0 and float(line["candidate_ms_q3"]) > 0
        assert line["mode"] == "bidirectional" and line["dtype"] == "float32" and line["status"] == "measured"
        if memory.resident("VmHWM") is not None:
            assert float(line["candidate_mib"]) >= 0
    markdown = texts[".md"].decode()
    assert markdown.count("| rfa (num_features=8) |") == 4 and "## bidirectional, forward+backward" in markdown
    assert "## From which length it pays" in markdown


def test_numbers_of_the_files_and_the_terminal(tmp_path):
    rows = [
        row_of(),
        Row("mra", "SDPA", CASE, "refused", "off by 3"),
        Row("p", "SDPA", replace(CASE, length=0), "skipped", "not installed"),
    ]
    report = report_of(rows)
    report.write(tmp_path)
    markdown = (tmp_path / "bench_attention.md").read_text()
    assert "| " + " | ".join(COLUMNS) + " |" in markdown
    assert (
        "| rfa (num_features=32) | 512 | SDPA | 10.0 [9.00-11.0] | 9.00 [8.00-10.0] | 0.900 [0.800-0.950] | 10.0 | 2.5 | float64 at 64 |"
        in markdown
    )
    assert "| mra | 64 | SDPA |  |  |  |  |  | refused: off by 3 |" in markdown
    assert "| p | all | SDPA |  |  |  |  |  | skipped: not installed |" in markdown
    first = csv_rows(tmp_path / "bench_attention.csv")[0]
    assert (first["candidate_ms"], first["candidate_ms_q1"], first["ratio_q3"], first["pairs"]) == (
        "9",
        "8",
        "0.95",
        "7",
    )
    console = quiet()
    report.print(console)
    text = console.file.getvalue()
    assert re.search(r"rfa +512 +10.0 +9.00 +0.900 \[0.800-0.950\] +10.0 +2.5 +float64 at 64", text)
    assert "  mra 64: refused: off by 3" in text and "  p all: skipped: not installed" in text


def test_the_crossover_is_where_it_is_faster_from_there_on():
    fast, slow, unsure = (0.8, 0.9, 0.95), (1.1, 1.2, 1.3), (0.8, 0.9, 1.01)
    for ratios, expected in (
        ([slow, fast, fast], 256),
        ([fast, slow, fast], 512),
        ([fast, fast, fast], 128),
        ([slow, fast, unsure], None),
        ([slow, slow, slow], None),
    ):
        rows = [row_of(length=n, ratio=r) for n, r in zip((128, 256, 512), ratios, strict=True)]
        section = report_of(rows).sections()[0]
        assert section.crossover("rfa") == expected
    rows = [row_of(length=n, ratio=r) for n, r in ((128, slow), (512, fast))] + [row_of(length=128, causal=True)]
    assert report_of(rows).findings() == [
        "rfa, bidirectional, forward: faster from 512 to 512",
        "rfa, causal, forward: faster from 128 (the shortest measured) to 128",
    ]


def test_a_report_without_times_can_be_written(tmp_path):
    report = report_of([Row("mra", "SDPA", CASE, "refused", "off by 3")])
    assert [path.suffix for path in report.write(tmp_path)] == [".csv", ".md", ".png"]
    assert not report.findings()


# arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"names": ["rfaa"]}, UnknownMechanism, "did you mean 'rfa'"),
        ({"names": ["performer"]}, UnknownMechanism, "did you mean 'performer-pytorch'"),
        ({"names": ["rfa:num_featurs=3"]}, InvalidOption, "did you mean 'num_features'"),
        ({"names": ["rfa:num_features=0"]}, InvalidOption, "num_features=0"),
        ({"names": ["rfa:num_features"]}, InvalidOption, "must look like name:key=value|key=value"),
        ({"names": ["performer-pytorch:a=1"]}, InvalidOption, "takes no options"),
        ({"names": "rfa"}, InvalidInput, "must be a list"),
        ({"names": []}, InvalidInput, "at least one name"),
        ({"lengths": []}, InvalidInput, "lengths is empty"),
        ({"lengths": [0]}, InvalidInput, "lengths=0"),
        ({"lengths": [True]}, InvalidInput, "lengths=True"),
        ({"batch": -1}, InvalidInput, "batch=-1"),
        ({"heads": 2.0}, InvalidInput, "heads=2.0"),
        ({"repeats": 0}, InvalidInput, "repeats=0"),
        ({"budget": -1}, InvalidInput, "budget=-1"),
        ({"total": float("nan")}, InvalidInput, "total=nan"),
        ({"dtype": "float23"}, InvalidOption, "did you mean 'float32'"),
        ({"device": "gpu0"}, InvalidOption, "device='gpu0'"),
        ({"device": "meta"}, Unsupported, "only CPU and CUDA"),
        ({"causal": "yes"}, InvalidOption, "causal='yes'"),
        ({"model": "bert", "causal": True}, InvalidOption, "the model decides"),
        ({"model": "bertt"}, InvalidInput, "did you mean 'bert'"),
        ({"model": "bert", "names": ["rfa:num_featurs=3"]}, InvalidOption, "did you mean 'num_features'"),
        ({"model": "bert", "names": [STORED]}, InvalidOption, "carries no mechanisms"),
        ({"model": "bert", "layers": 0}, InvalidInput, "layers=0"),
        ({"output": "/dev/null/x"}, InvalidInput, "cannot be made"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_runs(arguments, error, message, monkeypatch):
    monkeypatch.setattr("hf_attn.bench.gate.measure", lambda *_: pytest.fail("something ran"))
    with pytest.raises(error, match=message):
        bench.run(**arguments)


def test_without_a_cuda_device_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(bench, "missing_cuda", lambda: "there is no CUDA device")
    with pytest.raises(Unsupported, match="device='cuda:1'.*there is no CUDA device"):
        bench.run(["rfa"], [64], device="cuda:1")


def test_names_with_options():
    assert bench.parse_name("rfa") == ("rfa", {})
    assert bench.parse_name("rfa:num_features=8,orthogonal=false") == ("rfa", {"num_features": 8, "orthogonal": False})
    assert bench.parse_name("generalized:beta=0010") == ("generalized", {"beta": "0010"})
    assert bench.parse_name("x:grid_size=[3,5],tau=0.5,r_cap=null") == (
        "x",
        {"grid_size": [3, 5], "tau": 0.5, "r_cap": None},
    )


# whole models


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_a_model_with_softmax_equals_the_stock_model(model):
    report = bench.run(["softmax", "rfa", "ripple"], [16], model=model, layers=2, batch=2, console=quiet(), **SMALL)
    assert [row.status for row in report.rows] == ["measured"] * 4 + ["skipped"] * 2
    assert "equal to the stock model" in report.rows[0].note
    assert report.rows[2].note == "finite; its layers in float64 and float32"
    assert report.rows[2].baseline == "stock model, SDPA" and report.rows[2].options == "rfa"
    assert "ripple" in report.rows[4].note


def test_a_vision_model_with_its_grid():
    report = bench.run(["ripple"], [16, 20], model="vit", layers=1, batch=1, console=quiet(), **SMALL)
    assert [row.status for row in report.rows] == ["measured", "measured", "skipped", "skipped"]
    assert report.rows[0].options == "ripple(r_cap=3)" and "length 20" in report.rows[2].note


@pytest.mark.parametrize("broken", [1.5, float("nan")])
def test_a_model_that_differs_from_the_stock_model_gets_no_time(broken, monkeypatch):
    attend = SoftmaxAttention.attend
    monkeypatch.setattr(SoftmaxAttention, "attend", lambda self, call: attend(self, call) * broken)
    (row,) = bench.run(["softmax"], [16], model="bert", layers=1, backward=False, console=quiet(), **SMALL).rows
    assert row.status == "refused" and row.time is None
    assert ("differs from the stock model" if broken == 1.5 else "not finite") in row.note


def test_a_mechanism_that_is_wrong_gets_no_time_in_a_model(monkeypatch):
    attend = RandomFeatureAttention.attend
    monkeypatch.setattr(RandomFeatureAttention, "attend", lambda self, call: attend(self, call) * 1.001)
    (row,) = bench.run(["rfa"], [16], model="bert", layers=1, backward=False, console=quiet(), **SMALL).rows
    assert row.status == "refused" and "output in float64" in row.note


def test_checkpoints_stock_and_ours(tmp_path):
    from transformers import BertConfig, BertModel

    stock, ours = tmp_path / "stock-bert", tmp_path / "rfa-bert"
    BertModel(BertConfig(**BERT)).save_pretrained(stock)
    hf_attn.AttnBertModel(
        hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa", attention_options={"num_features": 8})
    ).save_pretrained(ours)
    report = bench.run(["softmax"], [16, 65], model=str(stock), backward=False, console=quiet(), **SMALL)
    assert [row.status for row in report.rows] == ["measured", "skipped"]
    assert "equal to the stock model" in report.rows[0].note and "over its 64 positions" in report.rows[1].note
    assert report.title == "whole model stock-bert" and str(tmp_path) not in report.environment.command
    report = bench.run([STORED, "softmax"], [16], model=str(ours), console=quiet(), **SMALL)
    assert [row.status for row in report.rows] == ["measured"] * 4
    assert report.rows[0].options == "rfa(num_features=8)"
    with pytest.raises(InvalidOption, match="carries no mechanisms"):
        bench.ModelWorkload(checkpoint(str(stock)), STORED)
    with pytest.raises(InvalidOption, match="takes no options"):
        bench.ModelWorkload(checkpoint(str(ours)), STORED, {"num_features": 3})


# other packages


class FakeLayer(torch.nn.Module):
    """Linear attention's shape: a mean over the tokens a token may see."""

    def __init__(self, dim, heads=1, causal=False, **others):
        super().__init__()
        self.out, self.causal = torch.nn.Linear(dim, dim), causal

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.out(x.cumsum(1) / count if self.causal else x.mean(1, keepdim=True).expand_as(x))


class LeakyLayer(FakeLayer):
    def forward(self, x):
        return self.out(x.mean(1, keepdim=True).expand_as(x))


class ZeroLayer(FakeLayer):
    def forward(self, x):
        return 0 * x


@pytest.fixture
def installed(monkeypatch):
    """Puts modules with the peers' names and classes in place."""

    def install(layer=FakeLayer):
        for peer in peers.PEERS.values():
            parts = peer.module.split(".")
            for depth in range(1, len(parts) + 1):
                module = types.ModuleType(".".join(parts[:depth]))
                module.SelfAttention = module.NystromAttention = module.FLASH = module.GAU = layer
                module.__path__ = []
                monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def test_peers_are_verified_and_timed_where_they_are_installed(installed):
    installed()
    report = bench.run(list(peers.PEERS), [32], console=quiet(), **SMALL)
    assert len(report.rows) == (4 * 2 + 1) * 2
    assert {row.status for row in report.rows} == {"measured"}
    baselines = {row.label: row.baseline for row in report.rows if not row.case.causal}
    assert baselines == {
        "performer-pytorch": "SDPA layer",
        "linear-attention-transformer": "SDPA layer",
        "nystrom-attention": "SDPA layer",
        "FLASH-pytorch": "SDPA block",
        "FLASH-pytorch-GAU": "SDPA block",
    }
    row = measure(bench.PeerWorkload(peers.PEERS["nystrom-attention"]), replace(CASE, causal=True), QUICK)
    assert row.status == "skipped" and "no causal form" in row.note


@pytest.mark.parametrize(
    ("layer", "why"), [(LeakyLayer, "not causal: later tokens change"), (ZeroLayer, "does not depend on its input")]
)
def test_a_peer_that_is_wrong_gets_no_time(layer, why, installed):
    installed(layer)
    row = measure(bench.PeerWorkload(peers.PEERS["performer-pytorch"]), replace(CASE, causal=True), QUICK)
    assert row.status == "refused" and why in row.note


def test_peers_that_are_not_there_have_one_row(monkeypatch):
    for name in ("flash_pytorch", "nystrom_attention"):
        monkeypatch.setitem(sys.modules, name, None)

    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr("hf_attn.bench.peers.importlib.import_module", broken)
    assert "undefined symbol" in bench.PeerWorkload(peers.PEERS["FLASH-pytorch"]).absent()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nystrom_attention", None)
    console = quiet()
    report = bench.run(["nystrom-attention", "softmax"], [16, 32], causal=False, console=console, **SMALL)
    (row,) = (row for row in report.rows if row.label == "nystrom-attention")
    assert row.status == "skipped" and row.note == "not installed"
    assert "nystrom-attention all: skipped: not installed" in console.file.getvalue()


def test_the_bench_extra_installs_every_peer():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in Python 3.11")
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["bench"]
    assert {re.split(r"[<>=]", requirement)[0] for requirement in extra} == {p.package for p in peers.PEERS.values()}


def test_a_baseline_layer_is_what_it_says():
    case = replace(CASE, causal=True)
    layer = peers.AttentionLayer(case)
    x = torch.randn(1, 64, 16)
    query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(layer(x), layer.out(out.transpose(1, 2).reshape(1, 64, 16)))
    assert peers.AttentionBlock(case)(x).shape == x.shape


# the script


def test_the_script_passes_its_arguments_on(monkeypatch, capsys):
    path = Path(__file__).parents[1] / "scripts" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = {}
    monkeypatch.setattr(bench, "run", lambda names, **values: asked.update(values, names=names))
    words = [
        "bench.py",
        "rfa",
        "--lengths",
        "64",
        "128",
        "--no-causal",
        "--head-dim",
        "8",
        "--total",
        "0",
        "--no-memory",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert script.main() == 0
    monkeypatch.undo()
    assert asked["names"] == ["rfa"] and asked["lengths"] == [64, 128] and asked["total"] is None
    assert asked["causal"] is False and asked["head_dim"] == 8 and asked["memory"] is False
    assert set(asked) == {*bench.run.__kwdefaults__, "names", "lengths"} - {"console"}
    unchanged = {n for n in asked if n not in ("names", "lengths", "causal", "head_dim", "total", "memory")}
    assert {n: asked[n] for n in unchanged} == {n: bench.run.__kwdefaults__[n] for n in unchanged}
    monkeypatch.setattr(sys, "argv", ["bench.py", "rfaa"])
    assert script.main() == 1
    assert "UnknownMechanism: no attention mechanism is called 'rfaa'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gau", "flash_gau:chunk_size=8"])
def test_two_units_are_verified_and_timed_against_a_block(name):
    report = bench.run([name], [40], console=quiet(), **SMALL)
    assert {(row.label, row.baseline) for row in report.rows} == {(name, "SDPA block"), (name, "causal SDPA block")}
    assert all(row.status == "measured" and row.note == "float64 and float32 at 40" for row in report.rows)
    assert "units=2" in report.rows[0].options


def test_units_that_compute_something_else_are_refused(monkeypatch):
    from hf_attn.models.gau import FlashGatedAttentionUnit

    attend = FlashGatedAttentionUnit.attend
    monkeypatch.setattr(FlashGatedAttentionUnit, "attend", lambda *a: (1.001 * attend(*a)[0], None))
    row = measure(bench.UnitWorkload("flash_gau"), replace(CASE, causal=True), QUICK)
    assert row.status == "refused" and "off by" in row.note and row.time is None
    with pytest.raises(InvalidOption, match="chunk"):
        bench.UnitWorkload("flash_gau", {"chunks": 3})
