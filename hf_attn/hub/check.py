"""Every rule that a folder must pass before it is copied or uploaded. Nothing here unpickles, and nothing loads weights."""

from __future__ import annotations

import fnmatch
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import HfAttnError, InvalidInput, Unsupported
from hf_attn.hub.card_check import check_eval_results
from hf_attn.hub.families import DESCRIBED
from hf_attn.hub.secrets import refuse_secrets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROBE = "hf_attn_probe.safetensors"
INDEX = "model.safetensors.index.json"
ALLOWED = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", INDEX, PROBE,
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "README.md", "LICENSE", "*.png", "fidelity.json", "linearize.json", ".eval_results/*.yaml",
    # what sentence-transformers reads
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "?_*/config.json",
)  # fmt: skip
"""Paths of files that are uploaded; everything else stays. A `*` does not reach into folders."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz")


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of the files that may be uploaded, and of everything else at the top of `folder`."""
    top = sorted(folder.iterdir())
    nested = [file for entry in top if entry.is_dir() and not entry.is_symlink() for file in sorted(entry.iterdir())]
    names = [path.relative_to(folder).as_posix() for path in (*top, *nested) if path.is_file()]
    chosen = [name for name in names if matches(name, ALLOWED)]
    taken = {name.partition("/")[0] for name in chosen}
    rest = [path.name + "/" * path.is_dir() for path in top if path.name not in taken and path.name != "manifest.json"]
    return sorted(chosen), rest


def check_folder(folder: Path, chosen: list[str], card: bool = True) -> PreTrainedConfig:
    """Raise for the first broken rule; the loaded config otherwise.

    Args:
        folder: the folder.
        chosen: paths of the files that would be uploaded.
        card: README.md must be there.
    """
    refuse_secrets(folder, [path.relative_to(folder).as_posix() for path in _everything(folder)])
    pickles = [path.name for path in sorted(folder.iterdir()) if matches(path.name, PICKLES)]
    if pickles:
        raise Unsupported(
            f"pack {folder}",
            f"it holds pickles ({', '.join(pickles)}), which run code when they are loaded and can carry secrets",
            "Save the model with save_pretrained into an empty folder, and pack that",
        )
    for needed in ("config.json", *(["README.md"] if card else [])):
        if needed not in chosen:
            raise InvalidInput(f"{str(folder)!r} has no {needed}. Save the model and its card there first.")
    if links := [name for name in chosen if (folder / name).is_symlink()]:
        raise InvalidInput(f"{links[0]} in {str(folder)!r} is a link. Put the file itself there.")
    for name in chosen:
        if matches(name, (".eval_results/*.yaml",)):
            check_eval_results(name, (folder / name).read_bytes().decode("utf-8", "replace"))
    held = check_weights(folder, chosen)
    config = check_config(folder)
    check_size(folder, config, sorted(set(held.values())))
    return config


def _everything(folder: Path) -> list[Path]:
    """The files whose bytes are searched: also those that stay behind, one folder deep; a pipe or a device is no file."""
    top = sorted(folder.iterdir())
    inner = [file for entry in top if entry.is_dir() and not entry.is_symlink() for file in sorted(entry.iterdir())]
    return [path for path in (*top, *inner) if path.is_file() and not path.is_symlink()]


def check_weights(folder: Path, names: list[str]) -> dict[str, str]:
    """Open the header of every weight file; an index and its shards must name each other. Tensor -> file."""
    from safetensors import SafetensorError, safe_open

    held: dict[str, str] = {}
    for name in names:
        if name.endswith(".safetensors") and name != PROBE:
            try:
                with safe_open(folder / name, framework="pt") as weights:
                    found = list(weights.keys())
            except (SafetensorError, OSError, ValueError, OverflowError) as error:
                raise InvalidInput(f"{name} in {str(folder)!r} is damaged ({error}). Save the model again.") from error
            if twice := held.keys() & set(found):
                raise InvalidInput(f"{sorted(twice)[0]!r} is in {name} and in another weight file of {str(folder)!r}.")
            held.update(dict.fromkeys(found, name))
    if not held:
        raise InvalidInput(f"{str(folder)!r} holds no *.safetensors with weights. Save the model there first.")
    if INDEX in names:
        if read_json(folder / INDEX).get("weight_map") != held:
            raise InvalidInput(
                f"{INDEX} in {str(folder)!r} does not match the weight files beside it. "
                "Save the model again into an empty folder."
            )
    elif set(held.values()) != {"model.safetensors"}:
        raise InvalidInput(f"{str(folder)!r} holds shards without {INDEX}. Save the model again.")
    return held


def check_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint of hf_attn, loaded from its file alone."""
    from transformers import AutoConfig

    from hf_attn.models.own import OWN

    # first as JSON: the loader's own message for a damaged file does not name it
    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (HfAttnError, ValueError, OSError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidInput(f"config.json in {str(folder)!r} does not load: {error}") from error
    if config.model_type in OWN and config.model_type not in DESCRIBED:
        raise Unsupported(
            f"pack {folder}",
            f"model_type={config.model_type!r} is a family whose card cannot be written yet",
            "Publish the models that it is made of, or upload the saved folder with `hf upload`",
        )
    if config.model_type not in OWN and not getattr(config, "attention", None):
        raise Unsupported(
            f"pack {folder}",
            f"its config (model_type={config.model_type!r}) has no `attention`, so it is not a model of hf_attn",
            "Convert the model with hf_attn.convert and save it again",
        )
    return config


def check_size(folder: Path, config: PreTrainedConfig, files: list[str]) -> None:
    """Raise where the config describes another model, or a far larger one, than the weight files hold.

    The model is built without memory: what it would take is known before any of it is taken.
    """
    import torch
    from safetensors import safe_open

    model_class = model_class_of(folder, config)
    try:
        with torch.device("meta"):
            wanted = sum(p.numel() for p in model_class(config).parameters())
    except HfAttnError:
        raise
    except Exception as error:  # sizes that contradict each other fail anywhere in a stock model
        raise InvalidInput(f"config.json in {str(folder)!r} describes no model that can be built: {error}") from error
    stored = 0
    for name in files:
        with safe_open(folder / name, framework="pt") as weights:
            stored += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    if wanted > 4 * stored + 10_000_000:
        raise InvalidInput(
            f"config.json in {str(folder)!r} describes {wanted:,} parameters, and its weight files hold {stored:,}. "
            "Check where the folder comes from."
        )


def model_class_of(folder: Path, config: PreTrainedConfig) -> Any:
    """The class of this package (for a stock config: of transformers) that a config names."""
    import transformers

    from hf_attn.models.configuration import AttnConfigMixin
    from hf_attn.models.family import attn_class
    from hf_attn.models.loading import model_classes
    from hf_attn.models.own import OWN

    named = next(iter(getattr(config, "architectures", None) or []), None)
    if config.model_type in OWN:
        known = {model.__name__: model for model in model_classes(config).values()}
        if named not in known:
            raise InvalidInput(
                f"config.json in {str(folder)!r} names the architecture {named!r}; model_type={config.model_type!r} has "
                f"{', '.join(known)}."
            )
        return known[named]
    ours = isinstance(config, AttnConfigMixin)
    stock: Any = getattr(transformers, str(named).removeprefix("Attn" if ours else ""), None)
    is_model = isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)
    if not is_model:
        raise InvalidInput(f"config.json in {str(folder)!r} names the architecture {named!r}, which is no model class.")
    wanted = getattr(config, "stock_class", type(config))
    if stock.config_class is not wanted:
        raise InvalidInput(
            f"config.json in {str(folder)!r} names the architecture {named!r}, which does not take a {type(config).__name__}."
        )
    return attn_class(stock) if ours else stock


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{str(path)!r} is not valid JSON ({error}). Save the model again.") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{str(path)!r} does not hold a JSON object. Save the model again.")
    return value


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits one of the patterns, part by part."""
    parts = name.split("/")
    return any(
        len(parts) == len(wanted := pattern.split("/")) and all(map(fnmatch.fnmatchcase, parts, wanted))
        for pattern in patterns
    )
