"""Kill a training run at random moments, resume it, and compare its weights bit for bit with those of an unbroken run.

    python scripts/kill_resume.py
    python scripts/kill_resume.py --processes 2 --points 8

The model is a small GPT-2 with `rfa`, which draws its random features anew in every step, with dropout; the data are shuffled.
Two processes (gloo) hold a copy of the model each. One of them, drawn at random, is killed first, the other up to half a
second later: what the survivor does meanwhile must not harm either.
"""

import argparse
import csv
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import platform
import random
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PrinterCallback, TrainingArguments

import hf_attn
from hf_attn.recipes.checkpoints import PARTIAL, checkpoints
from hf_attn.recipes.safe_trainer import SafeTrainer

ROOT = Path(__file__).parents[1]
SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "attn_pdrop": 0.0}  # fmt: skip
EXAMPLES, BATCH, SAVE_STEPS = 52, 8, 3
SURVIVES = 0.5
"""Most seconds between the kills of two processes."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One killed and resumed run.

    Attributes:
        seconds: from the start of the run to the kill.
        checkpoint: the last checkpoint at that moment; empty for none.
        saving: a checkpoint was being written or deleted.
        different: tensors of the final model that are not those of the unbroken run.
    """

    seconds: float
    checkpoint: str
    saving: bool
    different: int


def data(seed: int) -> Dataset:
    tokens = torch.randint(2, 64, (EXAMPLES, 24), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


@dataclasses.dataclass(frozen=True)
class Work:
    """What every run trains."""

    epochs: int
    seed: int
    processes: int = 1

    @property
    def steps(self) -> int:
        return self.epochs * -(-EXAMPLES // (BATCH * self.processes))


def train(run: Path, work: Work, rank: int = 0, port: int = 0, doomed: bool = False) -> None:
    """One process of the run, from its newest checkpoint on; the final weights go to `run/final`."""
    if doomed and work.processes > 1:
        # what the survivor says about the end of the other one
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    seed = work.seed
    if work.processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    transformers.set_seed(seed)
    options = {"num_features": 16, "redraw": "fresh"}
    model = hf_attn.AttnGPT2LMHeadModel(
        hf_attn.AttnGPT2Config(**SIZES, attn_implementation="rfa", attention_options=options)
    )
    arguments = TrainingArguments(
        output_dir=str(run), num_train_epochs=work.epochs, per_device_train_batch_size=BATCH, learning_rate=1e-3, seed=seed,
        save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=2, eval_strategy="epoch", logging_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = SafeTrainer(model, arguments, train_dataset=data(seed), eval_dataset=data(seed + 1))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_world_process_zero():
        model.save_pretrained(run / "final")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def start(run: Path, work: Work, doomed: bool = False) -> list[Any]:
    """`train` in processes of its own; forks, so that a moment of the run is not one of its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(run, work, rank, port, doomed)) for rank in range(work.processes)]
    for process in processes:
        process.start()
    return processes


def finish(run: Path, work: Work) -> float:
    """Train to the end. Returns the seconds it took."""
    started = time.perf_counter()
    processes = start(run, work)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"the run in {run} ended with status {[process.exitcode for process in processes]}")
    return time.perf_counter() - started


def kill(
    run: Path, work: Work, seconds: float, expected: dict[str, torch.Tensor], moments: random.Random
) -> Point | None:
    """Kill a run after `seconds`, resume it, and compare. None where it ended before."""
    processes = start(run, work, doomed=True)
    multiprocessing.connection.wait([process.sentinel for process in processes], seconds)
    if not all(process.is_alive() for process in processes):
        for process in processes:
            process.join()
        return None
    moments.shuffle(processes)
    for number, process in enumerate(processes):
        time.sleep(moments.uniform(0, SURVIVES) if number else 0)
        # the other one may have died of the first one's end
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    if processes[0].exitcode != -signal.SIGKILL:
        return None
    there, saving = checkpoints(run), any((run / PARTIAL).glob("*"))
    finish(run, work)
    found = load_file(run / "final" / "model.safetensors")
    different = sum(not torch.equal(value, found[name]) for name, value in expected.items())
    return Point(seconds, there[-1].name if there else "", saving, different)


def markdown(points: list[Point], arguments: argparse.Namespace, length: float, tensors: int) -> str:
    whole = sum(point.different == 0 for point in points)
    work = Work(arguments.epochs, arguments.seed, arguments.processes)
    several = f" --processes {work.processes}" if work.processes > 1 else ""
    where = f"{work.processes} CPU processes (gloo), one thread each" if several else "one CPU thread"
    killed = f" (one of its processes then, the other up to {SURVIVES:g} s later)" if several else ""
    lines = [
        "# Killed and resumed runs",
        "",
        f"Made with `python scripts/kill_resume.py --points {arguments.points} --epochs {arguments.epochs} --seed {arguments.seed}{several}`, "
        f"hf_attn {hf_attn.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {where}, {time.strftime('%Y-%m-%d')}.",
        "",
        f'A small GPT-2 with `rfa` (`redraw="fresh"`) and dropout trains for {work.steps} steps on shuffled data, saves every '
        f"{SAVE_STEPS} steps and evaluates after each epoch. The unbroken run took {length:.1f} s. Each row is a run that got "
        f"SIGKILL after that time{killed} and was started again by the same command. **Equal**: all "
        f"{tensors} tensors of its final weights are those of the unbroken run, bit for bit.",
        "",
        f"**{whole} of {len(points)} runs are equal.** {sum(p.saving for p in points)} were killed while a checkpoint was written or "
        "deleted.",
        "",
        "| | killed after (s) | last checkpoint | while saving | equal |",
        "|---|---|---|:-:|:-:|",
    ]
    for number, point in enumerate(points, 1):
        equal = "yes" if point.different == 0 else f"NO: {point.different} tensors differ"
        lines.append(
            f"| {number} | {point.seconds:.3f} | {point.checkpoint or 'none'} | {'yes' if point.saving else ''} | {equal} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the moments")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    moments, points = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=arguments.points, desc="kills") as bar:
        work = Work(arguments.epochs, arguments.seed, arguments.processes)
        length = finish(Path(folder, "unbroken"), work)
        expected = load_file(Path(folder, "unbroken", "final", "model.safetensors"))
        while len(points) < arguments.points:
            run = Path(folder, f"{bar.n}-{moments.random()}")
            point = kill(run, work, moments.uniform(0, length), expected, moments)
            if point:
                points.append(point)
                bar.update()
    name = "kill_resume" if arguments.processes == 1 else "kill_resume_two"
    (arguments.output / f"{name}.md").write_text(markdown(points, arguments, length, len(expected)), encoding="utf-8")
    with (arguments.output / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, points))
    equal = sum(point.different == 0 for point in points)
    print(f"{equal} of {len(points)} runs are equal")
    raise SystemExit(equal < len(points))


if __name__ == "__main__":
    main()
