"""Folders from strangers: weights, indices and configs that are damaged, hostile or do not belong together."""

import contextlib
import json
import pickle
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_attn.errors import HfAttnError, InvalidInput
from hf_attn.hub.check import check_folder, check_weights, listing, matches, read_json
from hf_attn.hub.upload import publish


def check(folder):
    return check_folder(folder, listing(folder)[0], card=False)


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_good_folder_passes(folder):
    assert check(folder).attention["default"]["name"] == "rfa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**12}, "does not load: config: hidden_size"),
        ({"vocab_size": 2**23}, "describes 142,.*parameters, and its weight files hold"),
        ({"num_attention_heads": 3}, "describes no model that can be built"),
        ({"hidden_size": 0}, "describes no model that can be built|holds?"),
        ({"architectures": ["os.system"]}, "which is no model class"),
        ({"architectures": ["AttnGPT2Model"]}, "does not take a AttnBertConfig"),
        ({"architectures": [["x"]]}, "architecture|does not load"),
        ({"architectures": []}, "names the architecture None"),
        ({"model_type": "../../attn_bert"}, "does not load"),
        ({"attention": {"default": {"name": "rfa", "num_features": 10**12}}}, "must be a number of at most"),
    ],
)
def test_hostile_configs(change, message, folder):
    rewrite(folder, **change)
    with pytest.raises(HfAttnError, match=message):
        check(folder)


@pytest.mark.parametrize("ref", ["../../evil.Model", "/tmp/evil.Model", "someone/evil--modeling.Model"])
def test_code_named_in_a_config_is_neither_run_nor_published(ref, folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    rewrite(folder, auto_map={"AutoConfig": ref, "AutoModel": ref})
    result = publish(folder, "someone/model", dry_run=True)
    assert not (tmp_path / "ran").exists() and "evil.py" in result.skipped
    assert "evil.py" not in {file["path"] for file in result.files}


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "/etc/passwd", "model-00001-of-00002.safetensors", 3, None, ["a"]]
)
def test_an_index_that_names_other_files_is_refused(shard, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InvalidInput, match="does not match the weight files"):
        check(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    (folder / "model-00001-of-00001.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InvalidInput, match="in another weight file"):
        check(folder)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BOOL", "X", "", 3, None]),
        "shape": st.one_of(st.lists(st.integers(-(2**65), 2**65), max_size=4), st.text(max_size=3)),
        "data_offsets": st.one_of(st.lists(st.integers(-(2**65), 2**65), max_size=3), st.none()),
    }
)
HEADER = st.one_of(
    st.binary(max_size=80),
    st.dictionaries(
        st.text(max_size=8), st.one_of(ENTRY, st.integers(), st.text(max_size=5), st.none()), max_size=4
    ).map(lambda header: json.dumps(header).encode()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.builds(with_header, HEADER, st.binary(max_size=64))))
def test_fuzzed_weights_give_names_or_a_typed_error(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        held = check_weights(tmp_path, ["model.safetensors"])
    except InvalidInput:
        return
    assert all(isinstance(name, str) for name in held)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{}",
        with_header(b"[" * 100_000),
        with_header(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()),
        with_header(json.dumps({"a": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}).encode()),
        pickle.dumps({"a": 1}),
    ],
)
def test_headers_that_lie_are_refused_without_reading_what_they_promise(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidInput, match="model.safetensors .* is damaged"):
        check_weights(tmp_path, ["model.safetensors"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=100), st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)).map(lambda v: json.dumps(v).encode()), st.just(b"[" * 200_000)))  # fmt: skip
def test_fuzzed_json_gives_an_object_or_a_typed_error(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with contextlib.suppress(InvalidInput):
        assert isinstance(read_json(tmp_path / "config.json"), dict)


def test_pickled_weights_are_never_read(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(HfAttnError, match="pickles"):
        check(folder)
    assert not (tmp_path / "ran").exists()


def test_patterns_do_not_reach_into_folders(folder):
    assert matches("a.png", ("*.png",)) and not matches("checkpoint-3/a.png", ("*.png",))
    (folder / "checkpoint-3").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "checkpoint-3" / "model.safetensors")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "a.yaml").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    chosen, rest = listing(folder)
    assert {".eval_results/a.yaml", "1_Pooling/config.json", "config.json"} <= set(chosen)
    assert rest == ["checkpoint-3/"]


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InvalidInput, match=r"tokenizer.json .* is a link"):
        check(folder)


@pytest.mark.parametrize("text", ["a: [", "- 3", "3", "- {dataset: {id: a/b}}", "- {dataset: {id: a/b, task_id: c}, value: .nan}"])  # fmt: skip
def test_results_that_the_hub_could_not_read_are_refused(folder, text):
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "a.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=r".eval_results/a.yaml"):
        check(folder)
