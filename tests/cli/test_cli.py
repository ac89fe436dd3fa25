"""The command line, used as a user does: what goes to stdout and stderr, exit codes, files, and no heavy imports."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import hf_attn
from hf_attn import console, tables
from hf_attn.cli import COMMANDS, app
from hf_attn.mechanisms.softmax import SoftmaxAttention

ROOT = Path(__file__).parents[2]
NAMES = hf_attn.list_mechanisms()


def process(*arguments, code: str | None = None, **environment):
    """`hf-attn` in a process of its own, in the current folder."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "hf_attn.cli"]), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`hf-attn` in this process, in an empty folder, with a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)], prog_name="hf-attn")


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)  # fmt: skip
def test_help_and_version_load_no_torch(arguments):
    code = (
        "import sys\nfrom hf_attn.cli import app\ntry:\n    app(sys.argv[1:])\nfinally:\n"
        "    print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = process(*arguments, code=code)
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stderr.strip() == "[]"


def test_version(run):
    assert run("version").stdout == f"hf_attn {hf_attn.__version__}\n"


def test_the_entry_point_is_the_app():
    assert 'hf-attn = "hf_attn.cli:app"' in (ROOT / "pyproject.toml").read_text()


def test_every_command_has_a_help_page_with_examples(run):
    page = run("--help").stdout
    for name in COMMANDS:
        assert f" {name} " in page
    for name in set(COMMANDS) - {"version"}:
        page = run(name, "--help").stdout
        assert "Examples" in page and f"hf-attn {name}" in page.partition("Examples")[2]
    assert run().exit_code == 2


def test_a_pipe_gets_one_line_a_mechanism():
    done = process("list")
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    for name, cells in tables.rows():
        assert [name, *" ".join({"yes": "✓", "no": "–"}.get(cell, cell) for cell in cells).split()] in lines


def printed(monkeypatch, encoding="utf-8", **settings) -> str:
    """What `hf-attn list` prints in a terminal of this kind."""
    raw = io.BytesIO()
    terminal = Console(file=io.TextIOWrapper(raw, encoding=encoding), color_system=None, highlight=False, **settings)
    monkeypatch.setattr(console, "make", lambda stderr=False: terminal)
    console.print_capabilities()
    terminal.file.flush()
    return raw.getvalue().decode(encoding)


def test_a_narrow_terminal_gets_two_parts_and_loses_nothing(monkeypatch):
    lines = printed(monkeypatch, force_terminal=True, width=80).splitlines()
    assert not [line for line in lines if "…" in line or len(line) > 80]
    for column in tables.COLUMNS:
        for part in column.title.split("/"):
            assert any(part in line for line in lines)
    for name in NAMES:
        assert sum(line.split()[:1] == [name] for line in lines) == 2
    wide = printed(monkeypatch, force_terminal=True, width=200).splitlines()
    assert all(sum(line.split()[:1] == [name] for line in wide) == 1 for name in NAMES)


def test_a_terminal_without_unicode_gets_words(monkeypatch):
    page = printed(monkeypatch, encoding="ascii", force_terminal=True, width=200)
    assert " yes " in page and " no " in page


def test_list_for_programs_and_for_the_readme(run):
    facts = json.loads(run("list", "--json").stdout)
    assert [entry["name"] for entry in facts] == NAMES
    for entry in facts:
        record = hf_attn.get_mechanism(entry["name"])
        assert entry["equation"] == record.equation and entry["paper"] == record.paper
        assert entry["capabilities"] == json.loads(json.dumps(dataclasses.asdict(record.capabilities)))
    assert run("list", "--markdown").stdout == tables.readme_table() + "\n"
    assert run("list", "--markdown", "--json").exit_code == 2


@pytest.mark.parametrize("name", NAMES)
def test_show_explains_a_mechanism_and_draws_it(name, run, tmp_path):
    done = run("show", name)
    assert done.exit_code == 0
    record, page = hf_attn.get_mechanism(name), words(done.stdout)
    assert page.startswith(f"{name}: {record.title} {record.summary}")
    assert record.paper in page and record.equation.partition(",  ")[0] in page
    for option in tables.option_rows(record.options_class):
        assert words(f"{option.name} {option.default} {option.meaning}") in page
    assert f"dtypes {', '.join(record.capabilities.dtypes)}" in page and record.capabilities.pays_from in page
    if record.capabilities.attention_weights:
        assert done.stderr == f"picture: {name}.png\n"
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert done.stderr.startswith(f"no picture: {name}: ")
        assert not list(tmp_path.iterdir())


def test_show_for_programs(run, tmp_path):
    facts = json.loads(run("show", "ripple", "--json", "--picture", "here.png").stdout)
    assert facts == {**json.loads(json.dumps(tables.facts("ripple"))), "picture": "here.png"}
    assert (tmp_path / "here.png").stat().st_size > 5000
    assert json.loads(run("show", "ripple", "--json", "--no-picture").stdout)["picture"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


def test_show_with_other_options(run):
    done = run("show", "ripple", "--no-picture", "-o", "allow_1d=true", "--option", "ripple_kernel=softmax")
    assert done.exit_code == 0 and done.stderr == ""
    page = words(done.stdout)
    assert "with r_cap=3, ripple_kernel=softmax, allow_1d=True" in page and "causal ✓" in page
    assert "causal –" in words(run("show", "ripple", "--no-picture").stdout)


def test_without_attention_weights_there_is_a_hint_and_no_picture(run, tmp_path, monkeypatch):
    capabilities = hf_attn.get_mechanism("softmax").capabilities
    without = dataclasses.replace(capabilities, attention_weights=False)
    monkeypatch.setattr(SoftmaxAttention, "describe", classmethod(lambda cls, options: without))
    done = run("show", "softmax", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["picture"] is None
    assert done.stderr.startswith("no picture: softmax: it has no N x M attention weights")
    assert not list(tmp_path.iterdir())


def test_train_hands_over_the_configuration_and_the_overrides(run, monkeypatch):
    given = []
    monkeypatch.setattr("hf_attn.recipes.train.train", lambda *arguments: given.append(arguments) or "the result")
    done = run("train", "some.yaml", "--learning-rate=2e-4", "--config.hidden_size=32", "--notes=a b")
    assert done.exit_code == 0 and done.stdout == "the result\n"
    assert given == [(Path("some.yaml"), {"learning_rate": "2e-4", "config.hidden_size": 32, "notes": "a b"})]


def test_train_as_a_user_does(tmp_path):
    sizes = {"image_size": 8, "patch_size": 2, "encoder_stride": 2, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}  # fmt: skip
    recipe = {"attn_implementation": "ripple", "config": sizes, "dataset": "digits", "max_examples": 20, "num_train_epochs": 2,
              "output_dir": str(tmp_path / "run"), "dataloader_pin_memory": False, "report_to": "none"}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = process("train", tmp_path / "recipe.yaml", "--num_train_epochs=1")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "--repo-id ORG/run" in done.stdout
    assert json.loads((tmp_path / "run" / "hub" / "config.json").read_text())["hidden_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "riple"], "no attention mechanism is called 'riple' (did you mean 'ripple'?)"),
        (["show", "ripple", "-o", "r_cup=3"], "ripple: unknown option 'r_cup' (did you mean 'r_cap'?)"),
        (["show", "ripple", "-o", "r_cap=-1"], "ripple: option r_cap=-1 must be an integer of at least 1"),
        (["show", "rfa", "--picture", "nowhere/rfa.png"], "the picture cannot be written to 'nowhere/rfa.png'"),
        (["train", "none.yaml"], "there is no configuration file 'none.yaml'"),
        (["doctor", "--device", "abacus"], "device='abacus' is not a device of this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments, message, run, tmp_path):
    done = run(*arguments)
    assert done.exit_code == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_process_of_its_own():
    done = process("list", HF_ATTN_KERNELS="wrong")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == "error: the environment variable HF_ATTN_KERNELS is 'wrong'; it must be 'auto', 'torch' or 'triton'.\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [["nose"], ["show"], ["show", "ripple", "--nose"], ["show", "ripple", "-o", "r_cap"], ["show", "ripple", "-o", "r_cap=["],
     ["show", "ripple", "--picture", "a.png", "--no-picture"], ["train"], ["train", "a.yaml", "--seed", "1"], ["doctor", "--device"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(arguments, run, tmp_path):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Error" in done.stderr or "Usage" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_nip_compares_a_pattern_with_the_known_ones(run, tmp_path):
    done = run("nip", "--pattern", "hypercube", "--length", "64", "--json")
    rows = json.loads(done.stdout)
    assert done.exit_code == 0 and rows[0]["pattern"] == "hypercube" and len(rows) == 6
    assert next(row for row in rows if row["pattern"] == "complete")["relative"] == pytest.approx(1)
    drawn = run(
        "nip", "--pattern", "bigbird", "--length", "32", "-o", "w=3", "-o", "g=1", "-o", "r=2", "--picture", "b.png"
    )
    assert drawn.exit_code == 0 and drawn.stdout.count("bigbird") == 2
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    wrong = run("nip", "--pattern", "hypercub")
    assert wrong.exit_code == 1 and "hypercube" in wrong.stderr


def test_bench_prints_a_ratio_and_refuses_wrong_arguments(run, tmp_path):
    done = run(
        "bench", "softmax", "--lengths", "32", "--bidirectional", "--no-backward", "--no-memory", "--output", "here"
    )
    assert done.exit_code == 0, done.stderr
    assert "softmax" in done.stdout and (tmp_path / "here" / "bench_attention.csv").is_file()
    assert run("bench", "softmax", "--lengths", "a,b").exit_code == 2
    wrong = run("bench", "sofmax")
    assert wrong.exit_code == 1 and "did you mean 'softmax'" in wrong.stderr
