"""Every tensor of every source is used, reported or refused; nothing is dropped, doubled or replaced in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import coterie
from coterie.building.convert import convert

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def bert(cls: type = BertForSequenceClassification, seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return cls(BertConfig(**{**SMALL, **config})).eval()


def tuned(model: nn.Module, seed: int, only: str = "") -> nn.Module:
    import copy

    torch.manual_seed(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if only in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return twin


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    base = bert()
    base.save_pretrained(tmp_path / "base")
    tuned(base, 1).save_pretrained(tmp_path / "a")
    return tmp_path


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def build(folder: Path, out: str = "out", **keys: object) -> coterie.BuildReport:
    experts = keys.pop("experts", {"a": str(folder / "a")})
    return coterie.build(method="smile", base=str(folder / "base"), experts=experts, out=folder / out, **keys)


def test_nan_in_a_head_is_refused(sources):
    edit(sources / "a", lambda t: t["classifier.weight"].view(-1)[0].fill_(float("nan")))
    with pytest.raises(coterie.CoterieError, match=r"classifier\.weight.*NaN"):
        build(sources)


@pytest.mark.parametrize("what", ["the base itself", "its biases"])
def test_experts_that_change_no_layer_are_refused(sources, what):
    twins = {f"e{i}": tuned(bert(), i, only=".bias" if "biases" in what else "nothing") for i in range(2)}
    for name, twin in twins.items():
        twin.save_pretrained(sources / name)
    with pytest.raises(coterie.CoterieError, match="no expert changes"):
        build(sources, experts={name: str(sources / name) for name in twins})
    with pytest.raises(coterie.CoterieError, match="no expert changes"):
        coterie.smile(bert(), twins)


def test_an_expert_under_foreign_names_is_said(sources):
    edit(sources / "a", lambda t: [t.update({"student." + n: t.pop(n)}) for n in list(t) if ".query." in n])
    report = build(sources)
    assert any("student" in w and "left out" in w for w in report.warnings)
    assert any("lacks" in w and "query" in w for w in report.warnings)
    assert any(name.startswith("student.") for name in report.left_out["expert a"])


def test_two_names_of_one_tensor_must_agree(sources):
    name = "bert.encoder.layer.0.attention.self.query.weight"
    edit(sources / "a", lambda t: t.update({name.removeprefix("bert."): t[name].clone()}))
    report = build(sources)
    assert name.removeprefix("bert.") in report.left_out["expert a"] or name in report.left_out["expert a"]
    edit(sources / "a", lambda t: t[name].mul_(2))
    with pytest.raises(coterie.CoterieError, match="they differ"):
        build(sources, "again")


def test_what_the_base_has_beyond_the_architecture_is_listed(tmp_path):
    bert(BertForMaskedLM).save_pretrained(tmp_path / "base")
    bert(seed=3).save_pretrained(tmp_path / "a")
    report = build(tmp_path)
    assert any(name.startswith("cls.") for name in report.left_out["base"])


def test_an_adapter_of_a_head_that_nobody_has_whole_is_refused(tmp_path):
    bert(BertModel).save_pretrained(tmp_path / "base")
    bert(seed=3).save_pretrained(tmp_path / "full")
    config = LoraConfig(r=2, target_modules=["query", "classifier"])
    model = get_peft_model(bert(seed=4), config)
    model.save_pretrained(tmp_path / "adapter")
    experts = {"full": str(tmp_path / "full"), "adapter": str(tmp_path / "adapter")}
    with pytest.raises(coterie.CoterieError, match="classifier"):
        build(tmp_path, experts=experts, architecture="BertForSequenceClassification")


def adapter(model: nn.Module, folder: Path, **config: object) -> None:
    peft = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **config))
    peft.save_pretrained(folder)


def test_dora_off_a_linear_layer_is_refused(sources):
    adapter(bert(), sources / "d", target_modules=["query", "word_embeddings"], use_dora=True)
    with pytest.raises(coterie.CoterieError, match="DoRA"):
        build(sources, experts={"d": str(sources / "d")})


def test_an_adapter_on_one_side_of_a_tie_is_not_averaged(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "a", target_modules=["wte", "c_attn"], fan_in_fan_out=True)
    with pytest.raises(coterie.CoterieError, match="ties"):
        build(tmp_path, others="average")
    build(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"query": 0}},
        {"rank_pattern": {"query": -4}, "use_rslora": True},
        {"alpha_pattern": {"query": float("nan")}},
        {"lora_alpha": 10**400},
        {"rank_pattern": {"query": 10**400}},
        {"some_future_option": True},
    ],
)
def test_numbers_and_options_of_an_adapter_are_checked(sources, change):
    adapter(bert(), sources / "d", target_modules=["query"])
    file = sources / "d" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(coterie.CoterieError):
        build(sources, experts={"d": str(sources / "d")})


def test_an_expert_stored_in_half_precision_touches_only_what_it_changed(sources):
    tuned(bert(), 1, only="layer.0.output.dense").half().save_pretrained(sources / "half")
    report = build(sources, experts={"a": str(sources / "a"), "half": str(sources / "half")})
    touched = [layer.path for layer in report.layers if layer.ranks[1] is not None]
    assert touched == ["bert.encoder.layer.0.output.dense"]


def test_heads_beside_the_base_of_a_class_are_kept_per_expert():
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tiny, "image_size": 16, "patch_size": 8}
    model = CLIPForImageClassification(CLIPConfig(text_config={**tiny, "vocab_size": 50}, vision_config=vision))
    with pytest.warns(UserWarning, match="classifier"):
        mixture = coterie.smile(model, {"a": tuned(model, 1), "b": tuned(model, 2)})
    assert list(mixture.coterie.spec.heads) == ["classifier"]
    pixels = torch.randn(2, 3, 16, 16)
    first = mixture(pixel_values=pixels).logits
    with mixture.coterie.use_head("b"):
        assert not torch.equal(first, mixture(pixel_values=pixels).logits)


def test_a_trace_keeps_the_batches_of_two_towers_apart():
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tiny, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**tiny, "vocab_size": 50}, vision_config=vision, projection_dim=8))
    mixture = coterie.smile(model, {"a": tuned(model, 1), "b": tuned(model, 2)}, rank=4, gate_rank=4)
    ids, pixels = torch.randint(3, 50, (2, 6)), torch.randn(4, 3, 16, 16)
    with coterie.routing_trace(mixture) as trace:
        mixture(input_ids=ids, pixel_values=pixels)
    assert trace["vision_model.encoder.layers.0.mlp.fc1"].shape == (4, 5, 2)
    assert trace["text_model.encoder.layers.0.mlp.fc1"].shape == (2, 6, 2)


def test_another_configuration_is_said(tmp_path):
    torch.manual_seed(0)
    config = {**SMALL, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(tmp_path / "base")
    other = LlamaForCausalLM(LlamaConfig(**config, rms_norm_eps=1e-2))
    other.load_state_dict(tuned(model, 1).state_dict())
    other.save_pretrained(tmp_path / "a")
    assert any("rms_norm_eps" in w for w in build(tmp_path).warnings)


def test_globs_that_match_nothing_are_said(sources):
    report = build(sources, modules={"exclude": ["*atention*"]}, others={"*LayerNrm*": "average"})
    assert sum("no name matches" in w for w in report.warnings) == 2


def test_keys_beside_a_recipe_are_refused(sources):
    recipe = {"method": "smile", "base": str(sources / "base"), "experts": {"a": str(sources / "a")}}
    with pytest.raises(coterie.CoterieError, match="beside a recipe"):
        coterie.build(recipe, out=sources / "out", parameters={"rank": 2})


def test_force_replaces_only_what_coterie_wrote(sources):
    build(sources)
    build(sources, force=True)
    with pytest.raises(coterie.CoterieError, match="source of this very build"):
        build(sources, "a", force=True)
    (sources / "thesis").mkdir()
    (sources / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(coterie.CoterieError, match="not written by coterie"):
        build(sources, "thesis", force=True)
    assert (sources / "thesis" / "chapter.txt").exists()
    assert (sources / "a" / "model.safetensors").exists()


def test_a_result_that_was_moved_aside_comes_back(sources):
    build(sources)
    (sources / "out").rename(sources / ".out.previous")
    with pytest.raises(coterie.CoterieError):
        build(sources, experts={"a": str(sources / "nowhere")})
    with pytest.raises(coterie.CoterieError, match="exists already"):
        build(sources)
    coterie.load(sources / "out")


def test_convert_keeps_every_view(tmp_path):
    weight = torch.randn(4, 4)
    (tmp_path / "p").mkdir()
    torch.save({"a": weight, "b": weight.T, "c": weight.view(16)}, tmp_path / "p" / "pytorch_model.bin")
    assert convert(tmp_path / "p", tmp_path / "s") == 3
    assert torch.equal(load_file(tmp_path / "s" / "model.safetensors")["b"], weight.T)


@pytest.mark.parametrize(
    "arguments",
    [{"weights": {"typo": 2.0}}, {"weights": {"a": float("nan")}}, {"include": "*"}, {"others": None}, {"rank": 0}],
)
def test_arguments_of_smile_are_checked(arguments):
    with pytest.raises(coterie.CoterieError):
        coterie.smile(bert(), {"a": tuned(bert(), 1)}, **arguments)


def test_experts_of_smile_are_modules_with_names():
    for experts in ({"": bert()}, {}, [bert()], {"a": bert().state_dict()}):
        with pytest.raises(coterie.CoterieError):
            coterie.smile(bert(), experts)


def test_a_live_configuration_builds_no_dense_model():
    mixture = coterie.smile(bert(), {"a": tuned(bert(), 1)})
    with pytest.raises(ValueError, match="coterie mixture"):
        type(mixture)(mixture.config)
