"""A loopback Hub for this process, and small checkpoints to publish."""

import time
import types

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from server import TOKEN, Hub
from small import BERT

import hf_attn
from hf_attn.hub import talk


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client talks to, with a token that may write, without Xet and without waiting."""
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http, "time", types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
        monkeypatch.setattr(talk, "pause", lambda _: None)
        yield hub


@pytest.fixture
def model():
    config = hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa", attention_options={"num_features": 8})
    return hf_attn.AttnBertForMaskedLM(config).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
