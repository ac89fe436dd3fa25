"""Object-oriented world models on the Object Library: does alignment carry over to unseen scenes?

python scripts/world_model_experiment.py [symbolic] [pixels] [--seeds 0 1 2] [--config configs/world_model.yaml]

Every seed draws scenes to train on and unseen ones, and trains the model with the aligned loss, with a loss that compares slots
one by one, and with a transition that is not equivariant. A finished run is written at once: a second start goes on after it,
and an interrupted run resumes from its last checkpoint in --runs.
"""

import argparse
import csv
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from tqdm import tqdm

from hf_attn import SlotAttentionModel, WorldModel, WorldModelConfig
from hf_attn.recipes.object_library import KINDS, ObjectLibrary, collect, split_scenes
from hf_attn.recipes.safe_trainer import SafeTrainer
from hf_attn.recipes.world_model import (
    Observations,
    Transitions,
    binding_accuracy,
    model_equivariance,
    optimizer_of,
    pictures_of,
    rollout_metrics,
    seen_observations,
    separated,
    symbolic_observations,
)
from hf_attn.recipes.world_model_pictures import draw_rollout

VARIANTS = {"aligned": {}, "not aligned": {"aligned": False}, "aligned, MLP transition": {"transition": "mlp"}}
SPLITS = ("train", "seen", "unseen")
NAME = "world_model"


def train(model, data, settings: dict, folder: Path, seed: int, warmup: float):
    """The trained model, saved in `folder`."""
    arguments = transformers.TrainingArguments(
        str(folder), seed=seed, report_to="none", save_strategy="epoch", save_total_limit=1, logging_strategy="epoch",
        remove_unused_columns=False, disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    steps = int(arguments.num_train_epochs) * -(-len(data) // arguments.per_device_train_batch_size)
    trainer = SafeTrainer(
        model, arguments, train_dataset=data,
        optimizers=optimizer_of(model, arguments.learning_rate, steps, warmup),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return model.eval()


def scenes(settings: dict, kind: str, seed: int):
    """The library, and episodes to train on, of the same scenes, and of unseen ones."""
    library = ObjectLibrary(kind, **settings["library"])
    known, unseen = split_scenes(library, settings["scenes"]["train"], settings["scenes"]["unseen"], seed)
    counts = settings["episodes"]
    episodes = [
        collect(library, chosen, counts[size], counts["steps"], seed=1000 * seed + i)
        for i, (chosen, size) in enumerate(((known, "train"), (known, "evaluation"), (unseen, "evaluation")))
    ]
    return library, dict(zip(SPLITS, episodes, strict=True))


def observe(settings: dict, slots: str, kind: str, seed: int, runs: Path):
    """Observations of the three splits, and the vision model that made them."""
    library, episodes = scenes(settings, kind, seed)
    if slots == "symbolic":
        size = settings["symbolic"]["appearance_size"]
        return {
            name: symbolic_observations(library, played, size, appearance_seed=seed, seed=1000 * seed + i)
            for i, (name, played) in enumerate(episodes.items())
        }, None
    part = settings["pixels"]
    torch.manual_seed(seed)
    vision = SlotAttentionModel(WorldModelConfig(**sizes(settings), **part["vision"])).train()
    pictures = [{"pixel_values": picture} for picture in pictures_of(library, episodes["train"])]
    vision = train(vision, pictures, part["vision_training"], runs / f"vision_{kind}_{seed}", seed, 0.1)
    torch.manual_seed(seed)
    return {name: seen_observations(vision, library, played) for name, played in episodes.items()}, vision


def sizes(settings: dict) -> dict[str, int]:
    library = settings["library"]
    return {
        "num_library_objects": library["num_objects"],
        "num_scene_objects": library["num_scene_objects"],
    }


def run(
    settings: dict, slots: str, kind: str, variant: str, seed: int, observed: dict[str, Observations], vision, runs
):
    """One model, and its row of the table."""
    started, part = time.perf_counter(), settings[slots]
    torch.manual_seed(seed)
    fields = {**part["model"], **VARIANTS[variant]}
    if vision is None:
        model = WorldModel(WorldModelConfig(**sizes(settings), **fields))
    else:
        model = WorldModel.from_representation(vision, **fields)
    data = Transitions(observed["train"])
    folder = runs / f"{slots}_{kind}_{variant.replace(', ', '_').replace(' ', '_')}_{seed}"
    model = train(model, data, part["training"], folder, seed, 0.05)
    metrics = {name: rollout_metrics(model, observed[name]) for name in ("seen", "unseen")}
    row = {"slots": slots, "kind": kind, "variant": variant, "seed": seed}
    for name, found in metrics.items():
        row |= {f"{name} mrr": found[1]["mrr"], f"{name} hits@1": found[1]["hits@1"]}
    row |= {f"unseen mrr {number}": metrics["unseen"][number]["mrr"] for number in (5, 10)}
    row |= {
        "binding": binding_accuracy(model, observed["unseen"]),
        "separated": separated(observed["unseen"]),
        "equivariance": model_equivariance(model, observed["unseen"]),
        "seconds": time.perf_counter() - started,
    }
    return model, row


def report(rows: list[dict], command: str, settings: dict, output: Path) -> str:
    """The tables, and in which runs the direction holds."""
    columns = [name for name in rows[0] if name not in ("slots", "kind", "variant", "seed")]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["slots"], row["kind"], row["variant"]), []).append(row)
    lines = [f"| slots | world | model | seeds | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 4)}"]
    for key, members in groups.items():
        means = [statistics.mean(float(row[name]) for row in members) for name in columns]
        lines.append(f"| {' | '.join(key)} | {len(members)} | {' | '.join(f'{mean:.3g}' for mean in means)} |")
    verdicts = []
    value = {(r["slots"], r["kind"], r["variant"], int(r["seed"])): r for r in rows}
    for (slots, kind, variant, seed), row in sorted(value.items()):
        other = value.get((slots, kind, "not aligned", seed))
        if variant != "aligned" or other is None:
            continue
        gain = float(row["unseen mrr"]) - float(other["unseen mrr"])
        gap, binding = float(row["seen mrr"]) - float(row["unseen mrr"]), float(row["binding"])
        holds = [gain > 0.3, gap < 0.1, binding > 0.6]
        failed = [name for name, held in zip(("gain", "gap", "binding"), holds, strict=True) if not held]
        verdict = f"no: {', '.join(failed)}" if failed else "yes"
        verdicts.append(f"| {slots} | {kind} | {seed} | {gain:.3f} | {gap:.3f} | {binding:.3f} | {verdict} |")
    counts, library = settings["episodes"], settings["library"]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    pictures = sorted(output.glob(f"{NAME}_*.png"))
    return "\n".join(
        [
            "# Object-oriented world models on the Object Library\n",
            f"- command: `{command}`; settings: `configs/world_model.yaml`; every run: [world_model.csv]({NAME}.csv)",
            f"- seeds: {', '.join(sorted({str(row['seed']) for row in rows}))}; {versions}; CPU; {datetime.date.today()}",
            f"- {library['num_objects']} objects, {library['num_scene_objects']} in a scene; {settings['scenes']['train']} scenes "
            f"to train on, {settings['scenes']['unseen']} unseen; {counts['train']} episodes of {counts['steps']} steps to train "
            f"on, ranks among {counts['evaluation']}\n",
            "MRR and Hits@1 of one step in new episodes of the scenes of training (`seen`) and in unseen ones, MRR after 5 and 10 "
            "steps, share of objects bound to their slot (`binding`), share of observations with every object in a slot of its own "
            "(`separated`), largest equivariance error of the transition, seconds. Means over the seeds.\n",
            *lines,
            "\nThe direction to show, in each run: on unseen scenes, an MRR more than 0.3 above that without alignment (`gain`); "
            "less than 0.1 lost from seen to unseen scenes (`gap`); binding above 0.6.\n",
            "| slots | world | seed | gain | gap | binding | holds |",
            "|---|---|---|---|---|---|---|",
            *verdicts,
            "\nSix steps in an unseen scene. A prediction is shown as the observation that comes nearest among those of all unseen "
            "episodes; green: it is what happened.\n",
            *(
                f"![Rollouts, {path.stem.removeprefix(NAME + '_').replace('_', ' ')}]({path.name})\n"
                for path in pictures
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slots", nargs="*", default=["symbolic"], help="symbolic, pixels, or both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--config", type=Path, default=Path("configs/world_model.yaml"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--runs", type=Path, default=Path("runs/world_model"), help="checkpoints and trained models")
    arguments = parser.parse_args()
    if wrong := [name for name in arguments.slots if name not in ("symbolic", "pixels")]:
        parser.error(f"slots {wrong[0]!r} must be symbolic or pixels")
    settings = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = arguments.output / f"{NAME}.csv"
    rows = list(csv.DictReader(table.open())) if table.is_file() else []
    done = {(row["slots"], row["kind"], row["variant"], int(row["seed"])) for row in rows}
    plan = [(slots, seed, kind) for slots in arguments.slots for seed in arguments.seeds for kind in arguments.worlds]
    for slots, seed, kind in tqdm(plan, desc="worlds"):
        if all((slots, kind, variant, seed) in done for variant in VARIANTS):
            continue
        observed, vision = observe(settings, slots, kind, seed, arguments.runs)
        models = {}
        for variant in VARIANTS:
            models[variant], row = run(settings, slots, kind, variant, seed, observed, vision, arguments.runs)
            if (slots, kind, variant, seed) not in done:
                rows.append({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
                with table.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)
                tqdm.write(json.dumps(rows[-1]))
        if seed == arguments.seeds[0]:
            picture = arguments.output / f"{NAME}_{slots}_{kind}.png"
            shown = {name: models[name] for name in ("aligned", "not aligned")}
            draw_rollout(shown, observed["unseen"], picture, episode=int(np.argmax(observed["unseen"].episodes.moved[:, :6].sum(1))))  # fmt: skip
    command = f"python {' '.join(sys.argv)}"
    text = report(rows, command, settings, arguments.output)
    (arguments.output / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
