"""Bad input to a merge beyond `tests/test_cli_errors.py`: exit code 2, one sentence, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import coterie
from coterie.cli import main
from coterie.errors import CoterieError
from zoo import base_model, fine_tune, make_adapter, save

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes and an adapter; a model of another kind; never modified."""
    root = tmp_path_factory.mktemp("sound")
    base = base_model("llama")
    save(base, root / "base")
    for seed, name in enumerate(("a", "b")):
        save(fine_tune(base, seed), root / name)
    make_adapter(root / "base", root / "adapter", 1, arch="llama")
    save(base_model("mistral"), root / "mistral")
    return root


@dataclass
class Place:
    """A copy of the sound sources to damage, and the command line to run on them."""

    root: Path
    capture: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def recipe(self, **changes: Any) -> dict[str, Any]:
        experts = {"a": str(self.root / "a"), "b": str(self.root / "b")}
        plain = {"method": "task_arithmetic", "base": str(self.root / "base"), "experts": experts}
        return {key: value for key, value in {**plain, **changes}.items() if value is not None}

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

    def refuses(self, recipe: dict[str, Any] | list[str], *said: str) -> None:
        arguments = recipe if isinstance(recipe, list) else [str(self.root / "recipe.yaml")]
        if isinstance(recipe, dict):
            (self.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        before = self.listing()
        code, out, err = self.run("merge", *arguments, "-o", str(self.root / "out"))
        assert code == 2, (code, out, err)
        assert self.listing() == before
        assert "Traceback" not in out + err
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        for word in said:
            assert word in err, f"{word!r} is not in {err!r}"

    def change(self, name: str, tensor: str, by: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Rewrite a tensor of a source; or take it out."""
        file = self.root / name / "model.safetensors"
        held = load_file(file)
        new = by(held.pop(tensor))
        save_file(held | ({} if new is None else {tensor: new.contiguous()}), file, {"format": "pt"})

    def configure(self, name: str, **keys: Any) -> None:
        file = self.root / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture
def place(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    root = tmp_path / "place"
    shutil.copytree(sound, root)
    yield Place(root, capsys, monkeypatch)


def test_the_sound_sources_merge(place: Place):
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe()))
    code, out, err = place.run("merge", str(place.root / "recipe.yaml"), "-o", str(place.root / "out"), "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == "task_arithmetic"
    assert (place.root / "out" / "config.json").exists() and not list(place.root.glob(".*"))
    code, out, err = place.run("merge", str(place.root / "recipe.yaml"), "-o", str(place.root / "out"), "--force")
    assert code == 0, err


# --- recipes ------------------------------------------------------------------------------------------------------


def test_options_stand_alone(place: Place):
    experts = ["--expert", f"a={place.root / 'a'}", "--expert", f"b={place.root / 'b'}"]
    arguments = ["--method", "average", *experts, "-o", str(place.root / "out")]
    code, _, err = place.run("merge", *arguments)
    assert code == 0, err
    place.refuses(["--method", "average"], "--expert is missing")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "tys"}, ("unknown method 'tys'", "did you mean 'ties'")),
        ({"method": "smile"}, ("makes a mixture", "coterie build")),
        ({"parameters": {"skale": 0.3}}, ("unknown parameter 'skale'", "did you mean 'scale'")),
        ({"parameters": {"scale": "much"}}, ("scale is 'much'", "number")),
        ({"method": "ties", "parameters": {"density": 2.0}}, ("density is 2.0", "<= 1")),
        ({"method": "ties", "parameters": {"density": [{"filter": "*", "value": 0}]}}, ("density is 0",)),
        ({"parameters": {"scale": [{"glob": "*", "value": 0.3}]}}, ("write {filter: GLOB, value: VALUE}",)),
        ({"others": "smooth"}, ("others: unknown method 'smooth'",)),
        ({"others": "ties"}, ("'ties' cannot be what other tensors follow",)),
        ({"head": "c"}, (".yaml: head is 'c'", "no expert")),
        ({"norm_budget": 0.0}, ("norm_budget",)),
        ({"seed": -1}, ("seed",)),
        ({"vocabulary": "both"}, ("vocabulary",)),
        ({"base": None}, ("needs a base", "add `base")),
        ({"vocab": "base"}, ("unknown key 'vocab'", "did you mean 'vocabulary'")),
        ({"experts": {}}, ("the list of experts is empty",)),
        ({"method": "fisher"}, ("needs statistics", "coterie statistics")),
        ({"dtype": "int8"}, ("dtype is 'int8'", "float16")),
        ({"dtype": "bf16"}, ("dtype is 'bf16'", "did you mean 'bfloat16'?")),
        ({"experts": None}, (": experts is missing",)),
        (
            {"experts": {"a": {"source": "x", "weight": "much"}}},
            ("experts.a.weight is 'much'; it must be a valid num",),
        ),
        ({"method": "slerp", "experts": {"a": "a"}}, ("no such directory",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_recipes(place: Place, changes: dict[str, Any], said: tuple[str, ...]):
    place.refuses(place.recipe(**changes), *said)


def test_another_source_keeps_what_the_recipe_says_of_an_expert(place: Place):
    """`--expert a=OTHER` over a recipe: its weight stays, and so do the other experts."""
    experts = {"a": {"source": str(place.root / "nowhere"), "weight": 0.5}, "b": str(place.root / "b")}
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe(experts=experts)))
    options = ["--expert", f"a={place.root / 'a'}", "--expert", f"c={place.root / 'b'}"]
    code, _, err = place.run("merge", str(place.root / "recipe.yaml"), *options, "-o", str(place.root / "out"))
    assert code == 0, err
    written = json.loads((place.root / "out" / "merge.json").read_text())["recipe"]["experts"]
    assert {name: (Path(e["source"]).name, e["weight"]) for name, e in written.items()} == {
        "a": ("a", 0.5), "b": ("b", 1.0), "c": ("b", 1.0),
    }  # fmt: skip


def test_what_was_given_instead_of_a_recipe(place: Place):
    place.refuses([str(place.root)], "is a directory; give a recipe")
    place.refuses([str(place.root / "recpie.yaml")], "no such file")
    (place.root / "recipe.yaml").write_text("")
    place.refuses([str(place.root / "recpie.yaml")], "no such file", f"did you mean '{place.root / 'recipe.yaml'}'?")
    place.refuses({"merge_method": "linear", "models": []}, "is a configuration of mergekit's", "--mergekit FILE")


def test_what_a_dry_run_says(place: Place):
    """It needs no free output; what it says of bytes is what happens, in however many passes."""
    (place.root / "out").mkdir()
    make_adapter(place.root / "base", place.root / "other", 2, rank=2, arch="llama")
    adapters = {"x": str(place.root / "adapter"), "y": str(place.root / "other")}
    cases: list[dict[str, Any]] = [
        {"method": "ties"},
        {"method": "ties", "dtype": "bfloat16"},
        {"method": "average", "experts": {"a": str(place.root / "a"), "x": str(place.root / "adapter")}},
        {"method": "squeeze", "experts": adapters, "parameters": {"rank": 3}},
        {"method": "squeeze", "experts": adapters},
        {"method": "concatenate", "experts": adapters},
    ]
    for index, changes in enumerate(cases):
        (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe(**changes)))
        given = [str(place.root / "recipe.yaml"), "--json", "-o"]
        code, out, err = place.run("merge", *given, str(place.root / "out"), "--dry-run")
        assert code == 0, err
        planned = json.loads(out)
        done = json.loads(place.run("merge", *given, str(place.root / f"out{index}"))[1])
        assert (planned["bytes_read"], planned["bytes_written"]) == (done["bytes_read"], done["bytes_written"]), changes
        assert planned["passes"] == (3 if changes["method"] == "ties" else 1)
    card = (place.root / "out5" / "README.md").read_text()
    assert "library_name: peft" in card and "A LoRA adapter for `LlamaForCausalLM`, of" in card
    assert "library_name: transformers" in (place.root / "out0" / "README.md").read_text()


def test_resuming_what_is_finished(place: Place):
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe()))
    given = [str(place.root / "recipe.yaml"), "-o", str(place.root / "out")]
    assert place.run("merge", *given)[0] == 0
    place.refuses([given[0], "--resume"], "is finished", "--force")
    place.refuses(given[:1], "exists already")
    with pytest.raises(CoterieError, match="is finished"):
        coterie.merge(place.recipe(), out=place.root / "out", resume=True)


def test_keys_that_would_say_nothing(place: Place):
    place.refuses(place.recipe(method="average", base=None, norm_budget=0.5), "norm_budget", "add `base`")
    for method in ("ties", "concatenate"):
        recipe = place.recipe(method=method, experts={"x": str(place.root / "adapter")}, modules={"exclude": ["*mlp*"]})
        place.refuses(recipe, "modules", method)


def test_statistics(place: Place):
    a, b = str(place.root / "a"), str(place.root / "b")
    experts: dict[str, Any] = {"a": {"source": a, "statistics": "nowhere"}, "b": {"source": b, "statistics": "nowhere"}}
    place.refuses(place.recipe(method="fisher", experts=experts), "no such file", "statistics of expert 'a'")
    place.refuses(place.recipe(experts=experts), "takes no statistics", "expert 'a'")
    file = place.root / "few.safetensors"
    save_file({"model.norm.weight": torch.ones(32)}, file)
    experts = {name: {"source": str(place.root / name), "statistics": str(file)} for name in ("a", "b")}
    place.refuses(place.recipe(method="fisher", experts=experts), "coterie statistics")


def test_other_options(place: Place):
    given = [str(place.root / "recipe.yaml")]
    (place.root / "recipe.yaml").write_text(yaml.safe_dump(place.recipe()))
    place.refuses([*given, "--jobs", "0"], "jobs is 0")
    place.refuses([*given, "--report", "long"], "report is 'long'")
    place.refuses([*given, "--device", "warp"], "device 'warp'")
    place.refuses([*given, "--set", "scale"], "has no '='")
    (place.root / "out").mkdir()
    (place.root / "out" / "mine.txt").write_text("")
    place.refuses(given, "exists already")
    place.refuses([*given, "--force"], "was not written by coterie")


# --- sources ------------------------------------------------------------------------------------------------------


def test_another_architecture(place: Place):
    experts = {"a": str(place.root / "a"), "m": str(place.root / "mistral")}
    place.refuses(place.recipe(experts=experts), "'mistral' model", "'llama' model", "one architecture")


def test_quantised_inputs(place: Place):
    place.configure("b", quantization_config={"quant_method": "bitsandbytes"})
    place.refuses(place.recipe(), "is quantised (bitsandbytes)", "dequantize()")


def test_a_quantised_dtype(place: Place):
    place.change("b", Q, lambda t: t.to(torch.float8_e4m3fn))
    place.refuses(place.recipe(), "F8_E4M3", "unquantised")


@pytest.mark.parametrize("through_skeleton", [False, True])
@pytest.mark.parametrize("source", ["base", "b"])
def test_not_a_number(place: Place, source: str, through_skeleton: bool):
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = float("nan")
        return tensor

    place.change(source, Q, spoil)
    experts = {"b": str(place.root / "b")} | ({"x": str(place.root / "adapter")} if through_skeleton else {})
    place.refuses(place.recipe(experts=experts), "1 NaN or infinite", Q, str(place.root / source))


def test_weights_too_large(place: Place):
    experts = {
        "a": {"source": str(place.root / "a"), "weight": 1e38},
        "b": {"source": str(place.root / "b"), "weight": 1e38},
    }
    place.refuses(place.recipe(experts=experts, parameters={"scale": 1e6}), "overflows or is not a number")


def test_float16_overflows(place: Place):
    given = place.recipe(parameters={"scale": 1e7}, dtype="float16")
    place.refuses(given, "overflows float16", "bfloat16")


def test_a_tensor_that_has_no_place(place: Place):
    file = place.root / "b" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.k_norm.weight": torch.ones(8)}, file, {"format": "pt"})
    place.refuses(place.recipe(), "k_norm", "has no place")


def test_more_rows_than_the_base(place: Place):
    place.change("b", "lm_head.weight", lambda t: torch.cat([t, t[:2]]))
    place.refuses(place.recipe(), "lm_head.weight", "vocabulary: base")


def test_another_vocabulary_without_base_or_tokenizer(place: Place):
    place.change("b", "lm_head.weight", lambda t: torch.cat([t, t[:2]]))
    given = place.recipe(method="average", base=None, vocabulary="base")
    place.refuses(given, "lm_head.weight", "another vocabulary's rows", "tokenizer.json, or a base")


def test_without_a_base_all_must_hold_all(place: Place):
    place.change("b", Q, lambda t: None)
    place.refuses(place.recipe(method="average", base=None), "lacks tensor", Q, "expert 'b'")


def test_an_adapter_needs_its_base(place: Place):
    experts = {"x": str(place.root / "adapter"), "a": str(place.root / "a")}
    place.refuses(place.recipe(method="average", base=None, experts=experts), "is an adapter", "add `base`")
    place.refuses(place.recipe(base=str(place.root / "adapter")), "is an adapter", "give the model")


def test_factors_are_of_adapters(place: Place):
    experts = {"x": str(place.root / "adapter"), "a": str(place.root / "a")}
    place.refuses(place.recipe(method="concatenate", experts=experts), "expert 'a'", "coterie extract")


def test_factors_of_dora(place: Place):
    make_adapter(place.root / "base", place.root / "dora", 1, arch="llama", use_dora=True)
    experts = {"x": str(place.root / "adapter"), "d": str(place.root / "dora")}
    place.refuses(place.recipe(method="concatenate", experts=experts), "adapter 'd'", "magnitude", "dense deltas")


def test_factors_that_overflow_or_vanish(place: Place):
    file = place.root / "adapter" / "adapter_model.safetensors"
    own, experts = load_file(file), {"x": str(place.root / "adapter")}
    save_file({name: tensor.half() for name, tensor in own.items()}, file)
    huge = place.recipe(method="concatenate", experts=experts, parameters={"scale": 1e6})
    place.refuses(huge, "overflows", "down_proj")
    save_file({name: tensor * (0 if "lora_B" in name else 1) for name, tensor in own.items()}, file)
    place.refuses(place.recipe(method="squeeze", experts=experts), "no adapter changes any layer")


def test_what_a_result_needs_is_not_replaced_by_it(place: Place):
    base = place.root / "merged"
    assert (
        place.run("merge", "--base", str(place.root / "base"), "--expert", f"a={place.root / 'a'}", "-o", str(base))[0]
        == 0
    )
    options = ["--method", "concatenate", "--base", str(base), "--expert", f"x={place.root / 'adapter'}"]
    code, _, err = place.run("merge", *options, "-o", str(base), "--force")
    assert code == 2 and "holds a source" in err
    assert (base / "model.safetensors").is_file()


def test_a_mixture(place: Place):
    place.configure("b", quantization_config={"quant_method": "coterie"})
    place.refuses(place.recipe(), "is a mixture", "the experts that it was built from")


def test_a_buffer_that_differs(tmp_path: Path, capsys: Any, monkeypatch: Any):
    place = Place(tmp_path, capsys, monkeypatch)
    for name, value in (("base", 0), ("a", 0), ("b", 1)):
        save(base_model("bert"), tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        position_ids = torch.arange(64)[None] + value
        save_file(load_file(file) | {"bert.embeddings.position_ids": position_ids}, file, {"format": "pt"})
    place.refuses(place.recipe(), "position_ids", "differs", 'others: {"bert.embeddings.position_ids": base}')
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(place.recipe(others={"bert.embeddings.position_ids": "base"})))
    code, _, err = place.run("merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert code == 0, err
    held = load_file(tmp_path / "out" / "model.safetensors")["bert.embeddings.position_ids"]
    assert held.equal(torch.arange(64)[None])


def test_a_tokenizer_that_cannot_be_read(place: Place):
    (place.root / "base" / "tokenizer.model").write_bytes(b"\x00")
    (place.root / "b" / "tokenizer.json").write_text(json.dumps({"model": 3}))
    place.refuses(place.recipe(vocabulary="union"), "cannot be read")


def test_a_method_that_breaks_down_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch):
    from coterie.merging import registry

    monkeypatch.setattr(registry, "_MERGES", dict(registry._MERGES))

    @registry.merge_method("broken", cite="-", acts_on="elements")
    def broken(deltas: torch.Tensor) -> torch.Tensor:
        """Nothing but not-a-numbers."""
        return deltas[0] * float("nan")

    place.refuses(place.recipe(method="broken"), "is not a number", "method broken")


@pytest.mark.parametrize("name", ["base", "b"])
@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "svc", "subspace_boosting", "knots"])
def test_not_a_number_where_matrices_are_factorised(place: Place, method: str, name: str):
    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = float("nan")
        return tensor

    place.change(name, Q, spoilt)
    place.refuses(place.recipe(method=method), f"{Q!r} holds 1 NaN", str(place.root / name))
