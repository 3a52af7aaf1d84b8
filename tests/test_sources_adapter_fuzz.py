"""Random and mutated recipes, adapter configurations and safetensors files: only ever a `CoterieError`."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import coterie

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_subnormal=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)
ROOT = Path()  # set by the fixture below: the sound sources


def _llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=16, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", autouse=True)
def _sources(tmp_path_factory: pytest.TempPathFactory) -> None:
    global ROOT
    ROOT = tmp_path_factory.mktemp("sound")
    for seed, name in enumerate(("base", "full")):
        _llama(seed).save_pretrained(ROOT / name)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 8},
        task_type="CAUSAL_LM",
    )  # fmt: skip
    get_peft_model(_llama(0), config).save_pretrained(ROOT / "adapter")


@contextmanager
def _copy() -> Iterator[Path]:
    """A fresh copy of the sound sources."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "sources"
        shutil.copytree(ROOT, root)
        yield root


def _recipe(root: Path) -> dict[str, Any]:
    return {
        "method": "smile",
        "base": str(root / "base"),
        "experts": {"a": str(root / "full"), "b": {"source": str(root / "adapter"), "weight": 1.0}},
        "parameters": {"rank": 4, "gate_rank": 2, "top_k": 1},
        "modules": {"include": ["*"], "exclude": ["*o_proj"]},
        "others": "base",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "vocabulary": "error",
    }


def _attempt(recipe: Any, root: Path) -> str | None:
    """Build; what was said if it was refused. Whatever else is raised fails the test."""
    out = root / "out"
    try:
        coterie.build(recipe, out=out)
    except coterie.CoterieError as error:
        said = str(error)
        assert said.strip()
        assert not out.exists()
        assert not list(root.glob(".*"))
        return said
    assert (out / "mixture.json").exists()
    return None


@st.composite
def _mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with some of its parts replaced, removed, renamed or added to."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, changed = draw(st.sampled_from(keys)), copy.deepcopy(value)
        action = draw(st.sampled_from(["inside", "remove", "rename", "add"]))
        if action == "inside":
            changed[key] = draw(_mutated(value[key]))
        elif action == "remove":
            del changed[key]
        elif isinstance(changed, dict):
            name = draw(st.text(max_size=8) | st.sampled_from(keys))
            changed[name] = changed.pop(key) if action == "rename" else draw(JSON)
        return changed
    if isinstance(value, str) and draw(st.booleans()):
        cut = draw(st.integers(0, len(value)))
        return value[:cut] + draw(st.text(max_size=4)) + value[cut + draw(st.integers(0, 2)) :]
    return draw(JSON)


def test_the_sound_sources_build():
    with _copy() as root:
        assert _attempt(_recipe(root), root) is None


@settings(max_examples=80)
@given(st.data())
def test_mutated_recipes(data: st.DataObject):
    with _copy() as root:
        recipe = _recipe(root)
        for _ in range(data.draw(st.integers(1, 2))):
            recipe = data.draw(_mutated(recipe))
        _attempt(recipe, root)


@settings(max_examples=60)
@given(JSON)
def test_random_recipes(recipe: Any):
    with _copy() as root:
        assert _attempt(recipe, root) is not None


@settings(max_examples=100)
@given(st.data())
def test_mutated_recipe_files(data: st.DataObject):
    with _copy() as root:
        raw = bytearray(yaml.safe_dump(_recipe(root)).encode())
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(raw)))
            raw[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        (root / "recipe.yaml").write_bytes(raw)
        _attempt(root / "recipe.yaml", root)


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"a: &a [*a, *a]")
@example(b"!!python/object/apply:os.system [x]")
@example(b"? [1]\n: 2")
@example(b"<<: 3")
def test_random_recipe_files(raw: bytes):
    with _copy() as root:
        (root / "recipe.yaml").write_bytes(raw)
        assert _attempt(root / "recipe.yaml", root) is not None


@settings(max_examples=100)
@given(st.data())
def test_mutated_adapter_configurations(data: st.DataObject):
    with _copy() as root:
        path = root / "adapter" / "adapter_config.json"
        config = json.loads(path.read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            config = data.draw(_mutated(config))
        path.write_text(json.dumps(config))
        _attempt(_recipe(root), root)


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("source", ["base", "full"])
def test_mutated_model_configurations(source: str, data: st.DataObject):
    with _copy() as root:
        path = root / source / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(data.draw(_mutated(config))))
        _attempt(_recipe(root), root)


def _split(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


FILES = ["base/model.safetensors", "full/model.safetensors", "adapter/adapter_model.safetensors"]


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", FILES)
def test_mutated_safetensors_headers(name: str, data: st.DataObject):
    with _copy() as root:
        header, rest = _split(root / name)
        for _ in range(data.draw(st.integers(1, 2))):
            header = data.draw(_mutated(header))
        text = json.dumps(header).encode()
        (root / name).write_bytes(struct.pack("<Q", len(text)) + text + rest)
        _attempt(_recipe(root), root)


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", FILES)
def test_mutated_safetensors_bytes(name: str, data: st.DataObject):
    with _copy() as root:
        raw = bytearray((root / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, 12) | st.integers(0, len(raw) - 1))
            raw[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        (root / name).write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
        _attempt(_recipe(root), root)
