"""Bad input to builds and merges through the real command line: exit code 2, one sentence, no traceback, no output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from coterie.cli import main

Q = "model.layers.1.self_attn.q_proj.weight"
METHODS: dict[str, dict[str, Any]] = {
    "build": {"method": "smile", "parameters": {"rank": 4}},
    "merge": {"method": "ties", "parameters": {"density": 0.5}},
}
both = pytest.mark.parametrize("place", METHODS, indirect=True)


def _llama(seed: int, hidden: int = 16, vocabulary: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _adapter(folder: Path, model: LlamaForCausalLM) -> None:
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapter.save_pretrained(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two full fine-tunes in several shards, and an adapter; never modified."""
    root = tmp_path_factory.mktemp("sound")
    for seed, name in enumerate(("base", "a", "b")):
        _llama(seed).save_pretrained(root / name, max_shard_size="10KB")
        assert len(list((root / name).glob("model-*.safetensors"))) > 2
    _adapter(root / "adapter", _llama(0))
    return root


@dataclass
class Place:
    """A copy of the sound sources to damage, and the command to run on them: `build`, or `merge` in tests of both."""

    root: Path
    capture: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    command: str

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe that the command would run, with `changes` to its keys."""
        experts = {"a": str(self.root / "a"), "b": str(self.root / "b")}
        return {**METHODS[self.command], "base": str(self.root / "base"), "experts": experts, **changes}

    def options(self, *experts: str) -> list[str]:
        """The same with these `--expert`s, as arguments."""
        given = [argument for expert in experts for argument in ("--expert", expert)]
        return ["--method", METHODS[self.command]["method"], "--base", str(self.root / "base"), *given]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of `coterie ARGUMENTS`."""
        self.capture.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["coterie", *arguments])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        out, err = self.capture.readouterr()
        return int(code or 0), out, err

    def listing(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*"))

    def refuses(self, recipe: dict[str, Any] | str | list[str], *said: str, out: str = "out") -> str:
        """Give the command a recipe (or its text, or bare arguments) and see it refused in one sentence."""
        if isinstance(recipe, list):
            arguments = recipe
        else:
            text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, allow_unicode=True)
            (self.root / "recipe.yaml").write_text(text)
            arguments = [str(self.root / "recipe.yaml")]
        before = self.listing()
        code, printed, err = self.run(self.command, *arguments, "-o", str(self.root / out))
        assert code == 2, (code, printed, err)
        assert self.listing() == before
        assert "Traceback" not in printed + err
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        for word in said:
            assert word in err, f"{word!r} is not in {err!r}"
        return err


@pytest.fixture
def place(
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Place]:
    root = tmp_path / "place"
    shutil.copytree(sound, root)
    yield Place(root, capsys, monkeypatch, getattr(request, "param", "build"))


def _shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def _rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shard = _shard_with(folder, name)
    tensors = load_file(shard)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, shard, {"format": "pt"})
    return shard


@both
def test_the_sound_sources_build_and_merge(place: Place):
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe()))
    code, _, err = place.run(place.command, str(place.root / "recipe.yaml"), "-o", str(place.root / "out"))
    assert code == 0, err
    assert (place.root / "out" / "config.json").exists()
    assert not list(place.root.glob(".*"))


# --- damaged files ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("source", ["base", "b"])
def test_missing_shard(place: Place, source: str):
    shard = _shard_with(place.root / source, Q)
    shard.unlink()
    place.refuses(place.recipe(), shard.name, "missing")


@both
@pytest.mark.parametrize("source", ["base", "b"])
def test_truncated_shard(place: Place, source: str):
    shard = _shard_with(place.root / source, Q)
    os.truncate(shard, shard.stat().st_size // 2)
    place.refuses(place.recipe(), str(shard))


@both
@pytest.mark.parametrize("start", [0, 8, 12], ids=["length", "brace", "json"])
def test_corrupted_header(place: Place, start: int):
    shard = _shard_with(place.root / "a", Q)
    content = bytearray(shard.read_bytes())
    content[start : start + 6] = b"\xff" * 6
    shard.write_bytes(content)
    place.refuses(place.recipe(), str(shard))


@both
def test_empty_weight_file(place: Place):
    shard = _shard_with(place.root / "a", Q)
    shard.write_bytes(b"")
    place.refuses(place.recipe(), str(shard))


@both
def test_index_that_names_a_missing_tensor(place: Place):
    path = place.root / "a" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.1.self_attn.ghost.weight"] = _shard_with(place.root / "a", Q).name
    path.write_text(json.dumps(index))
    place.refuses(place.recipe(), "model.layers.1.self_attn.ghost.weight")


@both
def test_index_that_leads_out_of_the_directory(place: Place):
    path = place.root / "a" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q] = "../b/" + index["weight_map"][Q]
    path.write_text(json.dumps(index))
    place.refuses(place.recipe(), str(place.root / "a"))


@both
@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{", ""])
def test_index_that_is_none(place: Place, content: str):
    (place.root / "a" / "model.safetensors.index.json").write_text(content)
    place.refuses(place.recipe(), "model.safetensors.index.json")


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("source", ["base", "b"])
@pytest.mark.parametrize("name", [Q, "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(place: Place, source: str, name: str, value: float):
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    shard = _rewrite(place.root / source, name, poison)
    place.refuses(place.recipe(), name, str(shard))


@both
def test_adapter_that_is_not_finite_is_named(place: Place):
    file = place.root / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    place.refuses(place.recipe(experts={"x": str(place.root / "adapter")}), name, str(file))


# --- files that are never read ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("source", ["base", "a"])
def test_pickled_weights_are_refused_and_the_way_out_is_named(place: Place, source: str):
    folder = place.root / source
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(_llama(5).state_dict(), folder / "pytorch_model.bin")
    place.refuses(place.recipe(), "pytorch_model.bin", "coterie convert")


@both
def test_pickled_adapter_is_refused(place: Place):
    (place.root / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({}, place.root / "adapter" / "adapter_model.bin")
    place.refuses(place.recipe(experts={"x": str(place.root / "adapter")}), "adapter_model.bin", "coterie convert")


@both
@pytest.mark.parametrize("source", ["base", "a"])
def test_quantised_source(place: Place, source: str):
    path = place.root / source / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))
    place.refuses(place.recipe(), "gptq", str(place.root / source))


# --- sources that do not match ------------------------------------------------------------------------------------


@both
def test_shape_mismatch_names_tensor_and_both_shapes(place: Place):
    _rewrite(place.root / "b", Q, lambda weight: weight[:12])
    place.refuses(place.recipe(), Q, "[12, 16]", "[16, 16]", "'b'")


@both
def test_vocabulary_mismatch_names_the_option(place: Place):
    shutil.rmtree(place.root / "b")
    _llama(2, vocabulary=35).save_pretrained(place.root / "b")
    err = place.refuses(place.recipe(), "[35, 16]", "[32, 16]", "vocabulary: base")
    assert "embed_tokens" in err or "lm_head" in err
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe(vocabulary="base")))
    assert place.run(place.command, str(place.root / "recipe.yaml"), "-o", str(place.root / "out"))[0] == 0


@both
def test_expert_of_another_size(place: Place):
    shutil.rmtree(place.root / "b")
    _llama(2, hidden=24).save_pretrained(place.root / "b")
    place.refuses(place.recipe(), "'b'", "24", "16")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["coterie", "demo", "-o", "nowhere", "--device", "cpu"])
    monkeypatch.setattr("coterie.evaluation.commands.check_device", stop)
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "coterie: stopped\n"


def test_sigterm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    cleaned = []

    def stop(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(True)

    monkeypatch.setattr("sys.argv", ["coterie", "demo", "-o", str(tmp_path / "out"), "--device", "cpu"])
    monkeypatch.setattr("coterie.evaluation.commands.check_device", stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        main()
    assert cleaned and capsys.readouterr().err == "coterie: stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


@both
def test_expert_of_another_architecture(place: Place):
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    BertForSequenceClassification(config).save_pretrained(place.root / "bert")
    (place.root / "unknown").mkdir()
    (place.root / "unknown" / "config.json").write_text('{"model_type": "foo"}')
    for base, expert, kinds in (
        ("base", "bert", ("bert", "llama")),
        ("bert", "a", ("llama", "bert")),
        ("base", "unknown", ("foo", "llama")),
    ):
        recipe = place.recipe(base=str(place.root / base), experts={"x": str(place.root / expert)})
        said = f"expert 'x' ({place.root / expert}): is a {kinds[0]!r} model, and the base"
        place.refuses(recipe, said, f"a {kinds[1]!r} model")


@both
def test_adapter_for_a_base_of_another_size(place: Place):
    _adapter(place.root / "other", _llama(3, hidden=24))
    place.refuses(place.recipe(experts={"x": str(place.root / "other")}), "'x'", "24", "16")


@both
def test_adapter_for_modules_that_the_base_lacks(place: Place):
    file = place.root / "adapter" / "adapter_model.safetensors"
    tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    place.refuses(place.recipe(experts={"x": str(place.root / "adapter")}), "layers.7", "'x'")


@both
def test_adapter_of_another_kind(place: Place):
    path = place.root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LOHA"}))
    place.refuses(place.recipe(experts={"x": str(place.root / "adapter")}), "LOHA", "'x'")


@both
def test_adapter_as_the_base(place: Place):
    place.refuses(place.recipe(base=str(place.root / "adapter")), "adapter", str(place.root / "adapter"))


@both
@pytest.mark.parametrize("content", ["{", "[]"])
def test_configuration_that_is_none(place: Place, content: str):
    (place.root / "base" / "config.json").write_text(content)
    place.refuses(place.recipe(), str(place.root / "base"))


@both
@pytest.mark.parametrize("content", ["{}", '{"model_type": "no-such-model"}'])
def test_configuration_of_no_known_model(place: Place, content: str):
    (place.root / "base" / "config.json").write_text(content)
    place.refuses(place.recipe(), str(place.root / "base"))


@both
def test_source_that_is_nowhere(place: Place):
    place.refuses(place.recipe(base=str(place.root / "nowhere")), str(place.root / "nowhere"))
    place.refuses(
        place.recipe(experts={"a": "no-such-organisation/no-such-model"}), "no-such-organisation/no-such-model"
    )
    place.refuses(place.recipe(experts={"a": str(place.root / "base" / "config.json")}), "config.json")


@both
def test_unknown_architecture(place: Place):
    place.refuses(place.recipe(architecture="LlamaForCausalML"), "LlamaForCausalML", "LlamaForCausalLM")


# --- recipes ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["", " ", "a\nb", "tab\tbed", "\x1b[31mred", "nul\0", "\x7f"])
def test_expert_names_that_are_empty_or_hold_control_characters(place: Place, name: str):
    place.refuses(place.recipe(experts={name: str(place.root / "a")}), "name")


@both
def test_duplicate_expert_names(place: Place):
    text = yaml.safe_dump(place.recipe()).replace("\n  b:", "\n  a:")
    place.refuses(text, "'a'", "twice")
    place.refuses(place.options(f"x={place.root / 'a'}", f"x={place.root / 'b'}"), "'x'", "twice")


@pytest.mark.parametrize(
    ("changes", "wrong", "near"),
    [
        ({"expert": {}}, "expert", "experts"),
        ({"modules": {"inclde": ["*"]}}, "inclde", "include"),
        ({"experts": {"a": {"source": "x", "wieght": 2.0}}}, "wieght", "weight"),
        ({"parameters": {"rnak": 4}}, "rnak", "rank"),
        ({"method": "simle"}, "simle", "smile"),
    ],
)
def test_unknown_words_name_the_nearest(place: Place, changes: dict[str, Any], wrong: str, near: str):
    place.refuses(place.recipe(**changes), repr(wrong), repr(near))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -4}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": "ful"}, "rank"),
        ({"rank": True}, "rank"),
        ({"gate_rank": 0}, "gate_rank"),
        ({"gate_rank": "full"}, "gate_rank"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 3}, "top_k"),
    ],
)
def test_parameters_out_of_range(place: Place, parameters: dict[str, Any], said: str):
    place.refuses(place.recipe(parameters=parameters), said, repr(parameters[said]).strip("'"))


def test_parameters_out_of_range_as_arguments(place: Place):
    common = place.options(f"x={place.root / 'a'}")
    place.refuses([*common, "--set", "rank=0"], "rank", "0")
    place.refuses([*common, "--set", "rnk=4"], "'rnk'", "'rank'")
    place.refuses([*common, "--set", "rank"], "rank", "=")


@both
def test_no_experts(place: Place):
    place.refuses(place.recipe(experts={}), "expert")
    place.refuses(place.options(), "expert")
    place.refuses({k: v for k, v in place.recipe().items() if k != "experts"}, "experts")


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"experts": ["a", "b"]},
        {"experts": {"a": 3}},
        {"experts": {"a": None}},
        {"experts": {"a": ""}},
        {"experts": {"a": {"weight": 1.0}}},
        {"experts": {"a": {"source": "x", "weight": float("nan")}}},
        {"base": ""},
        {"base": None},
        {"parameters": [1]},
        {"modules": {"include": "*"}},
        {"modules": {"include": []}},
        {"modules": {"include": ["no.such.module"]}},
        {"others": "mean"},
        {"others": {"*": "mean"}},
        {"dtype": "float8"},
        {"vocabulary": "mine"},
        {"architecture": 3},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_recipe_values_of_the_wrong_kind(place: Place, changes: dict[str, Any]):
    err = place.refuses(place.recipe(**changes))
    assert any(word in err for word in (*changes, "method 'mean'")), err


@both
@pytest.mark.parametrize(
    "text", ["", "3", "- a\n- b", "method: [", "\x00", "a: &a [*a]", "method: smile\nmethod: smile"]
)
def test_text_that_is_no_recipe(place: Place, text: str):
    place.refuses(text, str(place.root / "recipe.yaml"))


def test_a_merge_given_to_build(place: Place):
    place.refuses(place.recipe(method="ties"), "'ties' is a merge, not a mixture", "coterie merge")
    place.refuses(place.recipe(method="ties", head="a"), "'ties' is a merge", "coterie merge")
    place.refuses(place.recipe(head="a"), "unknown key 'head'", "only merges have it")
    place.refuses({"merge_method": "linear", "models": []}, "mergekit", "coterie merge --mergekit")


def test_the_options_sentences_name_the_recipe_once(place: Place):
    base, a = str(place.root / "base"), str(place.root / "a")
    err = place.refuses(["--base", base, "--expert", f" ={a}"], "expert name ' ' is empty")
    assert "recipe: recipe:" not in err
    place.refuses(["--base", base, "--expert", f"x={a}", "--dtype", "bf16"], "dtype is 'bf16'", "'bfloat16'")


@both
def test_a_path_that_is_nearly_right(place: Place):
    place.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place.refuses(place.recipe(base=str(place.root / "bas")), "no such directory", f"'{place.root / 'base'}'?")
    place.monkeypatch.chdir(place.root)
    place.refuses(place.recipe(base="bas"), "no such directory, and the Hub", "did you mean 'base'?")
    place.refuses(place.recipe(base="nothing/like/it"), "no such directory", "check the path")


def test_dry_runs_and_finished_builds(place: Place):
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe()))
    given = [str(place.root / "recipe.yaml"), "-o", str(place.root / "out")]
    assert place.run("build", *given)[0] == 0
    code, out, err = place.run("build", *given, "--dry-run")
    assert code == 0 and "plan" in out, err
    place.refuses([given[0], "--resume"], "is finished", "--force")


@both
def test_recipe_that_is_nowhere(place: Place):
    place.refuses([str(place.root / "none.yaml")], "none.yaml")


@both
def test_expert_argument_without_a_name(place: Place):
    a = str(place.root / "a")
    assert "=" in place.refuses(place.options(a), a)


# --- the output ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_output_that_exists(place: Place, kind: str):
    out = place.root / "out"
    if kind == "directory":
        out.mkdir()
        (out / "precious").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(place.root / "nowhere")
    place.refuses(place.recipe(), str(out), "exists", "--force")


@both
def test_output_below_a_file(place: Place):
    (place.root / "file").write_text("mine")
    place.refuses(place.recipe(), str(place.root / "file"), out="file/out")
    assert (place.root / "file").read_text() == "mine"


@both
def test_too_little_space_is_seen_before_anything_is_written(place: Place):
    place.monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=1000))
    place.refuses(place.recipe(), "no space left on the device")


@both
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_device_that_fills_up_meanwhile(place: Place, call: str):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "fsync":
        place.monkeypatch.setattr(os, "fsync", full)
    else:
        place.monkeypatch.setattr(Path, "rename", full)
    place.refuses(place.recipe(), "no space left on the device")


def _tmpfs(folder: Path, size: str) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


@both
def test_a_device_that_is_too_small(place: Place, tmp_path: Path):
    small = tmp_path / "small"
    if os.name == "nt" or os.geteuid() != 0 or not _tmpfs(small, "40k"):
        pytest.skip("mounting a small device needs root")
    try:
        place.refuses(place.recipe(), "no space left on the device", out=str(small / "out"))
        assert list(small.iterdir()) == []
        # Past the early check: as if the space had gone to someone else meanwhile.
        place.monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=0, free=10**9))
        place.refuses(place.recipe(), "no space left on the device", out=str(small / "out"))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


# --- the rest of the program --------------------------------------------------------------------------------------


def test_one_method(place: Place):
    code, out, _ = place.run("methods", "ties", "--json")
    assert code == 0 and [each["name"] for each in json.loads(out)] == ["ties"]
    code, out, _ = place.run("methods", "smile")
    assert code == 0 and "gate_rank" in out and "ties" not in out
    code, _, err = place.run("methods", "tees")
    assert code == 2 and "did you mean 'ties'?" in err


@pytest.mark.parametrize(
    "command", [("compare", "text8"), ("eval", "text8"), ("eval", "base", "--lm-eval", "t"), ("demo",)]
)
def test_a_device_that_cannot_be_used(place: Place, command: tuple[str, ...]):
    before, out = place.listing(), [] if command[0] == "eval" else ["-o", str(place.root / "out")]
    for device in ("foo", "cuda:99", "meta", "hpu"):
        code, _, err = place.run(*command, *out, "--cache", str(place.root / "cache"), "--device", device)
        assert code == 2 and f"device {device!r} cannot be used" in err and err.count("\n") == 1
    assert place.listing() == before


def test_texts_for_a_mixture_that_routes_nothing(place: Place):
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe(method="emr", parameters={})))
    code, _, err = place.run("build", str(place.root / "recipe.yaml"), "-o", str(place.root / "out"))
    assert code == 0, err
    page = place.root / "page.html"
    code, _, err = place.run("inspect", str(place.root / "out"), "--html", str(page), "--text", "some words")
    assert code == 2 and "routes nothing by itself" in err and "leave out --text" in err and not page.exists()


@pytest.mark.parametrize("what", ["nowhere", "base", "adapter", "base/config.json"])
def test_inspecting_what_is_no_mixture(place: Place, what: str):
    code, _, err = place.run("inspect", str(place.root / what))
    assert code == 2
    assert "Traceback" not in err
    assert str(place.root / what) in err


def test_as_a_process(place: Place):
    """The installed program and the module say the same on a real standard error."""
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe(parameters={"rank": 0})))
    arguments = ["build", str(place.root / "recipe.yaml"), "-o", str(place.root / "out")]
    program = Path(sys.executable).with_name("coterie")
    for command in ([sys.executable, "-m", "coterie"], [str(program)]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert "rank" in done.stderr
        assert done.stdout == ""
    assert not (place.root / "out").exists()


NAMES = [
    "../../escape",
    "a/b",
    "..",
    "C:\\x",
    "日本語 😀",
    "lora_A.weight",
    " padded ",
    "--help",
    "a=b",
    "null",
    "$(id)",
]


def test_any_other_text_is_a_fine_name(place: Place):
    """Names reach neither paths nor tensor keys."""
    experts = {name: str(place.root / "ab"[i % 2]) for i, name in enumerate(NAMES)}
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe(experts=experts), allow_unicode=True))
    before = place.listing()
    code, _, err = place.run("build", str(place.root / "recipe.yaml"), "-o", str(place.root / "out"))
    assert code == 0, err
    assert {path.split("/")[0] for path in place.listing()} == {path.split("/")[0] for path in before} | {"out"}
    files = (place.root / "out").glob("*.safetensors")
    keys = [key for file in files for key in load_file(file)]
    assert not any(name in key for key in keys for name in NAMES)
    code, out, _ = place.run("inspect", str(place.root / "out"), "--json")
    assert code == 0
    assert [
        name for name in NAMES if name not in json.dumps(json.loads(out), ensure_ascii=False).replace("\\\\", "\\")
    ] == []
