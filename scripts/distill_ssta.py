"""Train a student by SSTA: from labels, a supervised teacher and a self-supervised teaching assistant.

python scripts/distill_ssta.py CONFIG --teacher FOLDER --assistant FOLDER [--KEY=VALUE ...]

CONFIG is a recipe of the student as for scripts/train.py, with one key more: `ssta`, the fields of
`hf_attn.recipes.ssta_trainer.SSTAConfig`. Teacher and assistant are folders or Hub names: an image classifier with the
student's classes, and any vision transformer. Offline, both are made by

    hf-attn train configs/vit_ripple_digits.yaml --attn_implementation=softmax --output_dir=runs/teacher
    hf-attn train configs/vit_softmax_mim.yaml --output_dir=runs/assistant
"""

import argparse
import sys
from pathlib import Path

import yaml
from transformers import AutoModel, AutoModelForImageClassification

import hf_attn
from hf_attn.errors import HfAttnError, InvalidOption, near
from hf_attn.recipes.arguments import parse_overrides, read
from hf_attn.recipes.ssta_trainer import HeadDistillationTrainer, SSTAConfig
from hf_attn.recipes.train import measure, prepare

FIELDS = [field for field in SSTAConfig.__dataclass_fields__ if field not in ("teacher", "assistant")]


def distill(config: Path, teacher: str, assistant: str, overrides: dict) -> dict[str, float]:
    """Train, save in `output_dir`/model, and return the metrics of the validation and test splits."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    options = values.pop("ssta", {})
    if unknown := [name for name in options if name not in FIELDS]:
        raise InvalidOption(f"{config}: ssta has no field {unknown[0]!r}{near(unknown[0], FIELDS)}.")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    ssta = SSTAConfig(
        AutoModelForImageClassification.from_pretrained(teacher), AutoModel.from_pretrained(assistant), **options
    )
    recipe = read(values, overrides)
    prepared = prepare(recipe)
    trainer = HeadDistillationTrainer(
        model=prepared.model, ssta=ssta, args=recipe.training, train_dataset=prepared.data["train"],
        eval_dataset=prepared.data["validation"], compute_metrics=prepared.task.objective.metrics,
        preprocess_logits_for_metrics=prepared.task.objective.sums,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(recipe.output / "model")
    prepared.setting.processor.save_pretrained(recipe.output / "model")
    return measure(trainer, prepared)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--teacher", required=True, metavar="FOLDER")
    parser.add_argument("--assistant", required=True, metavar="FOLDER")
    arguments, rest = parser.parse_known_args()
    hf_attn.register_all()
    try:
        metrics = distill(arguments.config, arguments.teacher, arguments.assistant, parse_overrides(rest))
    except HfAttnError as error:
        parser.error(str(error))
    for name, value in metrics.items():
        print(f"{name.replace('_', ' '):<24}{value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
