"""Does a student that imitates one head of a teacher and one of a self-supervised assistant learn more from few labels?

python scripts/ssta_experiment.py [--seeds 0 1 2] [--output docs/benchmarks/ssta]

scikit-learn's digits, 17 tokens. For every seed: a teacher (ViT, 48 channels, 3 layers, 4 heads) learns all 1257 training
images with their labels, an assistant of that size learns to fill in hidden patches of them without, and students (24
channels, 3 layers, 2 heads) learn 150 of them with labels, 750 steps each: from labels alone, with the teacher's logits
(KD), with one head more of the teacher, of the assistant, of both (SSTA). Test: 540 other images.
"""

import argparse
import csv
import datetime
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from digits_experiments import tensors
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling

import hf_attn
from hf_attn.recipes.ssta_trainer import HeadDistillationTrainer, SSTAConfig

LABELLED, STUDENT_STEPS, STEPS, BATCH = 150, 750, 800, 50
STUDENTS = {
    "labels only": {"alpha": 0.0, "lambda_teacher": 0.0, "lambda_assistant": 0.0},
    "KD": {"lambda_teacher": 0.0, "lambda_assistant": 0.0},
    "KD, teacher's head": {"lambda_assistant": 0.0},
    "KD, assistant's head": {"lambda_teacher": 0.0},
    "SSTA": {},
}
"""Row -> weights of the losses (0.5, 1 and 1 where left out)."""


def config(width: int, heads: int) -> ViTConfig:
    return ViTConfig(
        image_size=8, patch_size=2, encoder_stride=2, num_channels=1, hidden_size=width, num_hidden_layers=3,
        num_attention_heads=heads, intermediate_size=2 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=10,
    )  # fmt: skip


def learn(model: torch.nn.Module, loss_of: object, images: Tensor, seed: int) -> None:
    """AdamW with one cycle up to 2e-3 on batches of `images`' numbers."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(torch.randint(len(images), (64,), generator=generator), generator).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def teacher_of(seed: int, images: Tensor, labels: Tensor) -> ViTForImageClassification:
    torch.manual_seed(seed)
    model = ViTForImageClassification(config(48, 4))
    learn(model, lambda rows, _: functional.cross_entropy(model(images[rows]).logits, labels[rows]), images, seed)
    return model


def assistant_of(seed: int, images: Tensor) -> torch.nn.Module:
    """A ViT that fills in 10 of 16 hidden patches; labels play no part."""
    torch.manual_seed(seed + 100)
    model = ViTForMaskedImageModeling(config(48, 4))

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        hidden = torch.rand(len(rows), 16, generator=generator).argsort(dim=1) < 10
        return model(images[rows], bool_masked_pos=hidden).loss

    learn(model, loss, images, seed)
    return model


def accuracy(model: torch.nn.Module, test: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return (model.eval()(test[0]).logits.argmax(-1) == test[1]).double().mean().item()


def student_of(seed: int, weights: dict, teacher: object, assistant: object, rows: list) -> tuple[object, dict]:
    """The trained student, and the mean of its loss terms over the last 50 steps."""
    torch.manual_seed(seed + 200)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STUDENT_STEPS, per_device_train_batch_size=BATCH, learning_rate=2e-3, weight_decay=0.05,
            lr_scheduler_type="cosine", warmup_steps=50, logging_steps=50, save_strategy="no", report_to=[], seed=seed,
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="steps",
        )  # fmt: skip
        ssta = SSTAConfig(teacher, assistant, **weights)
        trainer = HeadDistillationTrainer(
            ViTForImageClassification(config(24, 2)), ssta, args=arguments, train_dataset=rows
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss_teacher_head" in entry]
    return trainer.model, log[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/ssta"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    (images, labels), test = tensors()
    found: list[dict] = []
    with Progress() as progress:
        task = progress.add_task("models", total=len(arguments.seeds) * (2 + len(STUDENTS)))
        for seed in arguments.seeds:
            teacher, assistant = teacher_of(seed, images, labels), assistant_of(seed, images)
            progress.advance(task, 2)
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:LABELLED]
            rows = [{"pixel_values": images[i], "labels": labels[i]} for i in chosen]
            found.append({"seed": seed, "model": "teacher", "accuracy": accuracy(teacher, test)})
            for name, weights in STUDENTS.items():
                student, log = student_of(seed, weights, teacher, assistant, rows)
                record = {"accuracy": accuracy(student, test), "KL teacher": log["loss_teacher_head"]}
                found.append({"seed": seed, "model": name, **record, "KL assistant": log["loss_assistant_head"]})
                progress.advance(task)
                progress.print(str(found[-1]))
    write(arguments.output, arguments.seeds, found)
    return 0


def write(path: Path, seeds: list[int], found: list[dict]) -> None:
    """CSV and Markdown."""
    columns = ["seed", "model", "accuracy", "KL teacher", "KL assistant"]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in found)
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, hf_attn {hf_attn.__version__}"
    lines = [
        "# SSTA on digits", "", *__doc__.strip().splitlines()[4:], "",
        f"Command: `python scripts/ssta_experiment.py --seeds {' '.join(map(str, seeds))}` ({versions}, one CPU thread, "
        f"{datetime.date.today()}).", "",
        "KL: of the student's head to the teacher's, and to the assistant's, on the last batches of training.", "",
        f"| model | {' | '.join(f'seed {seed}' for seed in seeds)} | mean accuracy | KL to the teacher's head | to the assistant's |",
        "|---" * (4 + len(seeds)) + "|",
    ]  # fmt: skip
    for name in ("teacher", *STUDENTS):
        rows = [row for row in found if row["model"] == name]
        cells = [
            name,
            *(f"{row['accuracy']:.3f}" for row in rows),
            f"{statistics.mean(r['accuracy'] for r in rows):.3f}",
        ]
        for column in ("KL teacher", "KL assistant"):
            cells.append(f"{statistics.mean(r[column] for r in rows):.2f}" if column in rows[0] else "")
        lines.append("| " + " | ".join(cells) + " |")
    path.with_suffix(".md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
