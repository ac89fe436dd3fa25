"""From a pretrained checkpoint to a folder with other attention that is ready to publish.

    converted = convert_checkpoint("google-bert/bert-base-uncased", {"default": "softmax", "2-9": "rfa"}, "runs/bert-rfa")

The source is read as a stranger's: safetensors only, no code of its own, sizes checked against its weight files. The result
holds weights, config, tokenizer or image processor, what sentence-transformers reads, a probe and a card; it appears whole or
not at all, and it was loaded again and gave the same numbers, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import HfAttnError, InvalidInput, PublishFailed, Unsupported
from hf_attn.hub.check import PROBE, check_size, check_weights, listing, matches, model_class_of, read_json
from hf_attn.hub.pack import working_place
from hf_attn.hub.probe import check_probe, write_probe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_attn.hub.card import Fidelity
    from hf_attn.recipes.linearize_run import LinearizePlan

MADE_ANEW = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", PROBE, "README.md", "*.png",
    "fidelity.json", "linearize.json", ".eval_results/*.yaml",
)  # fmt: skip
"""What the conversion writes, or what would no longer be true of the converted model."""


@dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        folder: the saved model.
        source: the id or folder it came from.
        revision: the commit of the source; None for a folder.
        layers: mechanism of every layer.
        parameters: number of parameters.
        copied: files taken over unchanged.
    """

    folder: Path
    source: str
    revision: str | None
    layers: tuple[str, ...]
    parameters: int
    copied: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        numbered = [f"{number}: {name}" for number, name in enumerate(self.layers)]
        pinned = f" at {self.revision}" if self.revision else ""
        return (
            f"converted {self.source}{pinned}\nlayers       {', '.join(numbered)}\nparameters   {self.parameters:,}\n"
            f"taken over   {', '.join(self.copied) or 'nothing'}\nsaved in     {self.folder}\n"
            "Loaded again, it answers its probe with the same numbers, bit for bit."
        )


def convert_checkpoint(
    source: str | os.PathLike[str],
    attention: str | dict[str, Any],
    output: str | os.PathLike[str],
    *,
    revision: str | None = None,
    seed: int = 0,
    held_out: Callable[[PreTrainedModel, str], Sequence[Any]] | None = None,
    linearize: LinearizePlan | None = None,
    **options: Any,
) -> Converted:
    """Give a checkpoint other attention, and save it with everything it needs.

    Args:
        source: a folder, or a model on the Hub (downloaded at one commit).
        attention: a mechanism, or a choice by layer, as `hf_attn.convert` takes it.
        output: the folder to make. An earlier conversion there is replaced; any other content is refused.
        revision: branch, tag or commit of the source on the Hub.
        seed: of the mechanisms' parameters and draws.
        held_out: makes batches to measure the fidelity on, of the original model and the folder of its tokenizer or image
            processor. The card gets the numbers, and `fidelity.json` and `fidelity.png` lie beside it.
        linearize: also train the result to compute what the original computed; see `hf_attn.recipes.linearize`.
        options: options of the default mechanism.

    Raises:
        InvalidInput: the source is damaged, hostile or no model.
        Unsupported: a mechanism is not defined in this model, or the source has no safetensors.
        PublishFailed: the source could not be downloaded.
    """
    import torch

    from hf_attn.models.family import convert
    from hf_attn.models.spec import canonical
    from hf_attn.models.wrapping import layer_names

    output = Path(output)
    if output.exists() and not (output / PROBE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidInput(f"{str(output)!r} holds files that no conversion made. Give another folder, or empty it.")
    # a wrong name is refused before anything is downloaded
    spec = canonical(attention, options)
    folder, commit = fetch(source, revision)
    config = source_config(folder)
    model_class = model_class_of(folder, config)
    try:
        model = model_class.from_pretrained(folder, config=config, use_safetensors=True, local_files_only=True)
    except HfAttnError:
        raise
    except Exception as error:  # a stranger's weights can fail anywhere in a stock model
        raise InvalidInput(f"the model in {str(folder)!r} does not load: {error}") from error
    report = None
    if linearize is not None:
        report = linearize(model.eval(), spec, str(folder))
        model = report.model
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convert(model, spec)
    model.eval()

    named = str(source) if commit else folder.name
    partial = working_place(output)
    try:
        model.save_pretrained(partial)
        copied = take_over(folder, partial)
        write_probe(model, partial)
        check_probe(partial, model.config, exact=True)
        known: dict[str, Any] = {"base_model": str(source) if commit else None}
        if report is not None and linearize is not None:
            report.save(partial)
            known["linearized"] = linearize.arguments()
        if held_out is not None:
            original = model_class.from_pretrained(folder, config=config, use_safetensors=True, local_files_only=True)
            known["fidelity"] = _measure(original.eval(), model, held_out(original, str(folder)), partial, named)
        _write_card(partial, folder, model.config, output.name, known)
        if output.exists():
            shutil.rmtree(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(output, named, commit, tuple(layer_names(model)), model.num_parameters(), tuple(copied))


def fetch(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, str | None]:
    """The folder of a source, and the commit where it is on the Hub."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise InvalidInput(f"revision={revision!r} belongs to a model on the Hub, and {str(source)!r} is a folder.")
        return folder, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError

    from hf_attn.hub.check import ALLOWED

    # the rest of a repository, pickles and code above all, is not even downloaded
    wanted = [pattern for pattern in ALLOWED if not matches(pattern, ("*.png",))]
    try:
        path = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise InvalidInput(f"{str(source)!r} is neither a folder nor the name of a model on the Hub.") from error
    except Exception as error:
        raise PublishFailed(
            f"downloading {source}",
            f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}",
            "Nothing was written",
            "Check the name and the connection; a private model needs `hf auth login` or HF_TOKEN",
        ) from error
    return path, path.name


def source_config(folder: Path) -> PreTrainedConfig:
    """The config of a source, checked together with its weight files."""
    from transformers import AutoConfig

    from hf_attn.models.limits import check_stored

    names = listing(folder)[0]
    if "config.json" not in names:
        raise InvalidInput(f"{str(folder)!r} has no config.json, so it is no model of transformers.")
    if not any(matches(name, ("model*.safetensors",)) for name in names):
        raise Unsupported(
            f"convert {folder}",
            "it has no *.safetensors weights, and pickled weights run code when they are read",
            "Ask its author for safetensors, or save it again yourself if you trust it",
        )
    check_stored(read_json(folder / "config.json"))
    held = check_weights(folder, names)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except HfAttnError:
        raise
    except Exception as error:  # a stranger's config can go wrong in any place of the stock class
        raise InvalidInput(f"config.json in {str(folder)!r} does not load: {error}") from error
    check_size(folder, config, sorted(set(held.values())))
    return config


def take_over(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, processor, license and the files of sentence-transformers; links on local machines are refused."""
    copied = []
    inside = source.resolve()
    for name in listing(source)[0]:
        if matches(name, MADE_ANEW):
            continue
        path = (source / name).resolve()
        # the Hub's cache links into its own folder of blobs, beside the snapshots
        if not path.is_relative_to(inside) and not path.is_relative_to(inside.parents[1] / "blobs"):
            raise InvalidInput(
                f"{name} in {str(source)!r} is a link that leaves the folder. Put the file itself there."
            )
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
        copied.append(name)
    return copied


def _measure(original: Any, model: Any, batches: Sequence[Any], folder: Path, teacher: str) -> Fidelity:
    """Write the fidelity report into `folder`; what the card says of it."""
    from hf_attn.analysis.fidelity import fidelity
    from hf_attn.hub.card import Fidelity

    report = fidelity(original, model, batches)
    (folder / "fidelity.json").write_text(json.dumps(report.facts(), indent=1) + "\n", encoding="utf-8")
    report.draw(folder / "fidelity.png")
    rows = [(f"embedding cosine, {entry.length} tokens", f"{entry.embedding_cosine:.4f}") for entry in report.lengths]
    rows += [(f"relative error of the attention outputs, {entry.length} tokens", f"{entry.error:.4f}") for entry in report.lengths]  # fmt: skip
    examples = sum(entry.examples for entry in report.lengths)
    return Fidelity(f"`{teacher}` in float64", f"{examples} held-out examples", tuple(rows), "fidelity.png")


def _write_card(folder: Path, source: Path, config: PreTrainedConfig, name: str, known: dict[str, Any]) -> None:
    """The card; the license comes from the source."""
    from hf_attn.hub.card import checkpoint_card
    from hf_attn.hub.card_check import check_card

    known = dict(known)
    card = source / "README.md"
    if card.is_file():
        try:
            known["license"] = check_card(card.read_text(encoding="utf-8")).get("license")
        except (InvalidInput, UnicodeDecodeError):
            known["license"] = None  # a card that breaks the rules states no license that could be relied on
    if not isinstance(known.get("license"), str) or known["license"] == "other":
        known["license"] = None
    text = str(checkpoint_card(folder, config, f"ORG/{name}", **known))
    (folder / "README.md").write_text(text, encoding="utf-8")
