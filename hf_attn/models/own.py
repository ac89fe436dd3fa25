"""The families of this package that stand in for no family of transformers.

Apart from `hf_attn.models.configuration`, so that the code in a checkpoint of another family does without them.
"""

from __future__ import annotations

import importlib

from transformers.configuration_utils import PreTrainedConfig

from hf_attn.models.configuration import announce

OWN = {
    "gau": ("hf_attn.models.gau_config", "GauConfig"),
    "aa_resnet": ("hf_attn.models.aa_resnet_config", "AAResNetConfig"),
    "howm": ("hf_attn.models.world_model_config", "WorldModelConfig"),
    "dual_encoder": ("hf_attn.models.dual_encoder_config", "DualEncoderConfig"),
}
"""Model types with a config class of their own, and where it lives."""


def announce_own() -> None:
    """Let AutoConfig know them, put off until a checkpoint of theirs is loaded."""
    for model_type, (home, name) in OWN.items():

        def load(home: str = home, name: str = name) -> type[PreTrainedConfig]:
            from transformers.models.auto.configuration_auto import AutoConfig

            # not where the class is made: several checkpoints may each bring their own copy of it
            found = getattr(importlib.import_module(home), name)
            AutoConfig.register(found.model_type, found, exist_ok=True)
            return found

        announce(model_type, load)
