"""The paper's recipes, on tiny random models with the file layout of the published checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import coterie

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "paper").glob("*.yaml"))
SHARD = "16KB"  # small enough that every full checkpoint has several shards


def _tune(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """A full fine-tune: every parameter moved by noise of `scale` times its own spread."""
    tuned, noise = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += scale * (parameter.std(correction=0) + 0.01) * torch.randn(parameter.shape, generator=noise)
    return tuned


def _save(model: tf.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=SHARD)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def _add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors that older versions of transformers stored into the last shard of a checkpoint."""
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    save_file(load_file(shard) | tensors, shard, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _clip(base: Path, experts: list[Path]) -> None:
    """The base holds both towers and the position ids of its day; the experts are vision towers."""
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = tf.CLIPConfig(
        vision_config=dict(tower, image_size=8, patch_size=4),
        text_config=dict(tower, vocab_size=64, max_position_embeddings=16),
        projection_dim=8,
    )
    _save(tf.CLIPModel(config), base)
    positions = {"text_model.embeddings.position_ids": 16, "vision_model.embeddings.position_ids": 5}
    _add_tensors(base, {name: torch.arange(size)[None] for name, size in positions.items()})
    (base / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    vision = tf.CLIPVisionModel.from_pretrained(base)
    for seed, folder in enumerate(experts):
        _save(_tune(vision, seed), folder)


def _t5() -> tf.T5ForConditionalGeneration:
    """Flan-T5: gated feed-forward, and an output head that is not the embedding, whatever transformers' config says."""
    config = tf.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64, tie_word_embeddings=False,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = tf.T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.randn(64, 16) / 4)
    return model


def _save_t5(model: tf.T5ForConditionalGeneration, folder: Path) -> None:
    """With the configuration of the published checkpoints, which says that head and embedding are two."""
    _save(model, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {"shared.weight", "lm_head.weight"} <= set(index["weight_map"])
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(config))


def _flan_t5(base: Path, experts: list[Path]) -> None:
    model = _t5()
    _save_t5(model, base)
    for seed, folder in enumerate(experts):
        _save_t5(_tune(model, seed), folder)


def _flan_t5_lora(base: Path, experts: list[Path]) -> None:
    model = _t5()
    _save_t5(model, base)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    for seed, folder in enumerate(experts):
        torch.manual_seed(seed)
        adapter = get_peft_model(copy.deepcopy(model), lora)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        adapter.save_pretrained(folder)


def _mistral(base: Path, experts: list[Path]) -> None:
    """A base in bfloat16; experts in float16, two of them with tokens of their own, one with stored rotary buffers."""
    config = tf.MistralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=64, sliding_window=32,
    )  # fmt: skip
    model = tf.MistralForCausalLM(config)
    _save(copy.deepcopy(model).to(torch.bfloat16), base)
    for seed, (folder, added) in enumerate(zip(experts, (1, 2, 0), strict=True)):
        tuned = _tune(model, seed)
        if added:
            tuned.resize_token_embeddings(320 + added, mean_resizing=False)
        _save(tuned.to(torch.float16), folder)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    _add_tensors(experts[2], frequencies)


STAND_INS: dict[str, Callable[[Path, list[Path]], None]] = {
    "clip-vit-base-patch32": _clip,
    "clip-vit-large-patch14": _clip,
    "flan-t5-base-glue": _flan_t5,
    "flan-t5-base-glue-lora": _flan_t5_lora,
    "mistral-7b": _mistral,
}
LAYERS = {  # one mixture layer of each
    "clip-vit-base-patch32": "encoder.layers.1.self_attn.q_proj",
    "clip-vit-large-patch14": "encoder.layers.1.mlp.fc1",
    "flan-t5-base-glue": "lm_head",
    "flan-t5-base-glue-lora": "decoder.block.1.layer.1.EncDecAttention.v",
    "mistral-7b": "model.layers.1.mlp.down_proj",
}


def _source(expert: str | dict[str, Any]) -> str:
    return expert if isinstance(expert, str) else expert["source"]


def _localise(recipe: dict[str, Any], root: Path) -> tuple[dict[str, Any], Path, list[Path]]:
    """The recipe with every Hub id replaced by a directory under `root`, the base's directory and the experts'."""
    here = {name: root / _source(source).replace("/", "--") for name, source in recipe["experts"].items()}
    base = root / recipe["base"].replace("/", "--")
    return recipe | {"base": str(base), "experts": {n: str(p) for n, p in here.items()}}, base, list(here.values())


def _inputs(model: tf.PreTrainedModel) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(7)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=noise, dtype=model.dtype)}
    ids = torch.randint(3, 64, (2, 9), generator=noise)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


def _output(model: tf.PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(**_inputs(model))[0].double()


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    bias = torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
    return layer.weight.detach().double(), bias.detach().double()


def _truncated(layer: nn.Module, base: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """An expert's layer with its delta cut to `rank` singular directions."""
    (weight, bias), (start, _) = _weights(layer), _weights(base)
    u, s, vh = torch.linalg.svd(weight - start, full_matrices=False)
    return start + (u[:, :rank] * s[:rank]) @ vh[:rank], bias


def test_every_recipe_has_a_stand_in():
    assert {path.stem for path in RECIPES} == set(STAND_INS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_a_mixture_whose_layers_are_one_truncated_expert_a_token(path: Path, tmp_path: Path):
    published = yaml.safe_load(path.read_text())
    recipe, base_dir, expert_dirs = _localise(published, tmp_path)
    STAND_INS[path.stem](base_dir, expert_dirs)
    coterie.build(recipe, out=tmp_path / "mixture")
    mixture = coterie.load(tmp_path / "mixture")

    assert list(mixture.coterie.expert_names) == list(published["experts"])
    assert type(mixture).__name__ == published["architecture"]
    architecture = getattr(tf, published["architecture"])
    base = architecture.from_pretrained(base_dir)
    assert mixture.dtype == base.dtype
    assert not torch.allclose(_output(mixture), _output(base), atol=1e-3)

    kept = {name.replace(".base_weight", ".weight"): tensor for name, tensor in mixture.state_dict().items()}
    for name, tensor in base.state_dict().items():  # `others: base`, and the base weight of every mixture layer
        assert torch.equal(kept[name], tensor), name

    experts = []
    for folder in expert_dirs:
        if (folder / "adapter_config.json").exists():
            model = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
        else:
            model = architecture.from_pretrained(folder, dtype=torch.float32)
        experts.append(model)
    layer, rank = mixture.get_submodule(LAYERS[path.stem]), published["parameters"]["rank"]
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, args, y: seen.append((args[0].double(), y.double())))
    _output(mixture)
    hook.remove()
    x, y = seen[0]
    before = base.get_submodule(LAYERS[path.stem])
    cut = [_truncated(expert.get_submodule(LAYERS[path.stem]), before, rank) for expert in experts]
    away = torch.stack([(x @ weight.T + bias - y).norm(dim=-1) for weight, bias in cut]) / y.norm(dim=-1)
    tolerance = 2e-2 if mixture.dtype == torch.bfloat16 else 1e-5
    assert away.min(dim=0).values.max() < tolerance


def test_mistral_keeps_the_base_vocabulary_and_says_so(tmp_path: Path):
    path = next(p for p in RECIPES if p.stem == "mistral-7b")
    recipe, base_dir, expert_dirs = _localise(yaml.safe_load(path.read_text()), tmp_path)
    _mistral(base_dir, expert_dirs)
    with pytest.raises(coterie.CoterieError, match=r"embed_tokens.*321.*320.*vocabulary: base"):
        coterie.build({k: v for k, v in recipe.items() if k != "vocabulary"}, out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

    coterie.build(recipe, out=tmp_path / "mixture")
    mixture, base = coterie.load(tmp_path / "mixture"), tf.MistralForCausalLM.from_pretrained(base_dir)
    assert mixture.config.vocab_size == 320
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(mixture.get_parameter(name), base.get_parameter(name))
    ids = torch.randint(3, 320, (1, 6), generator=torch.Generator().manual_seed(0))
    assert mixture.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= 10
    assert "vocab" in (tmp_path / "mixture" / "mixture.json").read_text()
