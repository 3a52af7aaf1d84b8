"""Tiny random models of many architectures, their fine-tunes and their LoRA adapters.

Every model is built from a configuration and filled with weights of realistic scale (fan-in scaled linears, norms
near one, small biases), so that outputs are of order one and every layer matters to them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCAB = 100
PAD = 0


@dataclass(frozen=True)
class Arch:
    """How to make one architecture, and what the tests need to know of it."""

    name: str
    config: Callable[[], Any]
    model: str
    auto: str
    kind: str  # classify | encode | vision | clip | seq2seq | causal
    targets: tuple[str, ...] = ()  # PEFT target modules; empty where adapters are not tested
    heads: tuple[str, ...] = ()  # modules outside the base model, which are task heads
    skipped: tuple[str, ...] = ()  # linears that cannot be mixture layers (suffixes)
    options: dict[str, Any] = field(default_factory=dict)


def _text(cls: type, **more: Any) -> Callable[[], Any]:
    common = dict(vocab_size=VOCAB, pad_token_id=PAD)
    return lambda: cls(**{**common, **more})


def _encoder(cls: type, **more: Any) -> Callable[[], Any]:
    return _text(
        cls,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )


def _decoder(cls: type, **more: Any) -> Callable[[], Any]:
    base = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return _text(cls, **{**base, **more})


def _vision(cls: type, **more: Any) -> Callable[[], Any]:
    base = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_channels=3,
    )
    return lambda: cls(**{**base, **more})


def _clip() -> Any:
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = dict(tower, vocab_size=VOCAB, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    vision = dict(tower, image_size=16, patch_size=8)
    return tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


_QV = ("query", "value")
_LLAMA = ("q_proj", "v_proj", "up_proj", "down_proj")

ARCHS: dict[str, Arch] = {
    a.name: a
    for a in [
        Arch(
            "bert",
            _encoder(tf.BertConfig, num_labels=3),
            "BertForSequenceClassification",
            "AutoModelForSequenceClassification",
            "classify",
            _QV,
            ("classifier",),
        ),
        Arch("bert_encoder", _encoder(tf.BertConfig), "BertModel", "AutoModel", "encode", _QV),
        Arch(
            "roberta",
            _encoder(tf.RobertaConfig, num_labels=3, type_vocab_size=1),
            "RobertaForSequenceClassification",
            "AutoModelForSequenceClassification",
            "classify",
            _QV,
            ("classifier",),
        ),
        Arch(
            "distilbert",
            lambda: tf.DistilBertConfig(
                vocab_size=VOCAB,
                dim=32,
                n_layers=2,
                n_heads=4,
                hidden_dim=64,
                max_position_embeddings=64,
                dropout=0.0,
                attention_dropout=0.0,
                seq_classif_dropout=0.0,
                num_labels=3,
                pad_token_id=PAD,
            ),
            "DistilBertForSequenceClassification",
            "AutoModelForSequenceClassification",
            "classify",
            ("q_lin", "v_lin", "lin1"),
            ("pre_classifier", "classifier"),
        ),
        Arch(
            "vit",
            _vision(tf.ViTConfig, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            "ViTForImageClassification",
            "AutoModelForImageClassification",
            "vision",
            ("q_proj", "v_proj", "fc1"),
            ("classifier",),
        ),
        Arch("clip", _clip, "CLIPModel", "AutoModel", "clip", ("q_proj", "v_proj", "fc1")),
        Arch(
            "t5",
            lambda: tf.T5Config(
                vocab_size=VOCAB,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
                pad_token_id=PAD,
                eos_token_id=2,
            ),
            "T5ForConditionalGeneration",
            "AutoModelForSeq2SeqLM",
            "seq2seq",
            ("q", "v", "wo"),
            skipped=("lm_head",),
        ),
        Arch(
            "gpt2",
            lambda: tf.GPT2Config(
                vocab_size=VOCAB,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=PAD,
            ),
            "GPT2LMHeadModel",
            "AutoModelForCausalLM",
            "causal",
            ("c_attn", "c_fc"),
            skipped=("lm_head",),
            options={"fan_in_fan_out": True},
        ),
        Arch(
            "llama",
            _decoder(tf.LlamaConfig),
            "LlamaForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            _LLAMA,
            skipped=("lm_head",),
        ),
        Arch(
            "mistral",
            _decoder(tf.MistralConfig, sliding_window=16, head_dim=8),
            "MistralForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            _LLAMA,
            skipped=("lm_head",),
        ),
        Arch(
            "qwen2",
            _decoder(tf.Qwen2Config, tie_word_embeddings=True),
            "Qwen2ForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            _LLAMA,
            skipped=("lm_head",),
        ),
        Arch(
            "gemma2",
            _decoder(tf.Gemma2Config, head_dim=8, tie_word_embeddings=True, sliding_window=16),
            "Gemma2ForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            _LLAMA,
            skipped=("lm_head",),
        ),
        Arch(
            "phi3",
            _decoder(tf.Phi3Config, original_max_position_embeddings=128, resid_pdrop=0.0, embd_pdrop=0.0),
            "Phi3ForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            ("qkv_proj", "gate_up_proj"),
            skipped=("lm_head",),
        ),
        Arch(
            "mamba",
            lambda: tf.MambaConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                state_size=8,
                num_hidden_layers=2,
                expand=2,
                time_step_rank=4,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=PAD,
            ),
            "MambaForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            ("in_proj", "x_proj"),
            skipped=("lm_head", "dt_proj"),
        ),
        Arch(
            "mixtral",
            _decoder(tf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
            "MixtralForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            ("q_proj", "v_proj"),
            skipped=("lm_head",),
        ),
        Arch(
            "qwen3_moe",
            _decoder(
                tf.Qwen3MoeConfig,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                mlp_only_layers=[1],
            ),
            "Qwen3MoeForCausalLM",
            "AutoModelForCausalLM",
            "causal",
            ("q_proj", "v_proj"),
            skipped=("lm_head",),
        ),
    ]
}

CAUSAL = [a.name for a in ARCHS.values() if a.kind == "causal"]
ALL = list(ARCHS)
WITH_ADAPTERS = [a.name for a in ARCHS.values() if a.targets]


def _fill(model: nn.Module, seed: int) -> None:
    """Weights of realistic scale, drawn from ``seed``; structured parameters (Mamba's A_log) keep their own start."""
    gen = torch.Generator().manual_seed(seed)

    def randn(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=gen)

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    conv1d = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("A_log", "D", "logit_scale") or "dt_proj" in name:
                continue
            if id(p) in embeddings:
                p.copy_(0.3 * randn(p))
            elif p.ndim >= 2:
                fan_in = p.shape[0] if id(p) in conv1d else p[0].numel() if p.ndim != 3 else p.shape[-1]
                p.copy_(randn(p) * fan_in**-0.5)
            elif leaf == "weight":  # a norm: Gemma's is an offset from one
                p.copy_((0.0 if "gemma" in type(model).__name__.lower() else 1.0) + 0.1 * randn(p))
            else:
                p.copy_(0.1 * randn(p))


def base_model(arch: str, seed: int = 0, **config: Any) -> nn.Module:
    """A random model of ``arch`` in eval mode, float32. ``config`` overrides attributes of its configuration."""
    spec = ARCHS[arch]
    cfg = spec.config()
    for key, value in config.items():
        setattr(cfg, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(tf, spec.model)(cfg)
    _fill(model, seed)
    model.tie_weights()
    return model.eval()


def linear_names(model: nn.Module) -> list[str]:
    """Paths of every nn.Linear and Conv1D (exact classes and subclasses)."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]


def head_names(arch: str, model: nn.Module) -> list[str]:
    """Paths of the linears that lie in the task head."""
    heads = ARCHS[arch].heads
    return [n for n in linear_names(model) if n.split(".")[0] in heads]


def body_linears(arch: str, model: nn.Module) -> list[str]:
    """Paths of the linears that may become mixture layers."""
    heads, skipped = head_names(arch, model), ARCHS[arch].skipped
    return [n for n in linear_names(model) if n not in heads and not n.endswith(skipped or ("\0",))]


def _decaying(shape: torch.Size, gen: torch.Generator, rank: int | None, scale: float) -> Tensor:
    """A random matrix whose singular values decay as 1/sqrt(i): clear gaps, as the deltas of fine-tuning have."""
    a = torch.randn(shape, generator=gen, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    k = len(s) if rank is None else min(rank, len(s))
    values = torch.arange(1, k + 1, dtype=torch.float64) ** -0.5
    return (scale * (u[:, :k] * values) @ vh[:k]).float()


def fine_tune(
    model: nn.Module,
    seed: int,
    scale: float = 0.5,
    modules: Iterable[str] | None = None,
    heads: bool = True,
    *,
    rank: int | None = None,
    biases: bool = True,
    norms: bool = False,
    everything: bool = False,
) -> nn.Module:
    """A perturbed copy of ``model``.

    Args:
        model: a model of this zoo.
        seed: of the perturbation.
        scale: spectral norm of a linear's delta.
        modules: path suffixes of the linears to change; by default every linear of the body.
        heads: also change the linears of the task head, and its biases.
        rank: rank of each delta; by default full.
        biases: also change the biases of the linears that are changed.
        norms: also change the normalisation layers.
        everything: also change every other parameter (embeddings, convolutions, fused experts, output embeddings).
    """
    arch = arch_of(model)
    tuned = copy.deepcopy(model)
    gen = torch.Generator().manual_seed(1000 + seed)
    body = body_linears(arch, tuned)
    wanted = body if modules is None else [n for n in body if n.endswith(tuple(modules))]
    wanted = [*wanted, *(head_names(arch, tuned) if heads else [])]
    done = set()
    with torch.no_grad():
        for name in wanted:
            layer = tuned.get_submodule(name)
            layer.weight.add_(_decaying(layer.weight.shape, gen, rank, scale))
            done.add(id(layer.weight))
            if biases and layer.bias is not None:
                layer.bias.add_(0.1 * torch.randn(layer.bias.shape, generator=gen))
                done.add(id(layer.bias))
        linears = {id(p) for n in linear_names(tuned) for p in tuned.get_submodule(n).parameters()}
        for p in tuned.parameters():
            if id(p) in done:
                continue
            if (norms and p.ndim == 1 and id(p) not in linears) or (everything and id(p) not in linears):
                p.add_(0.05 * torch.randn(p.shape, generator=gen))
                done.add(id(p))
    return tuned


def arch_of(model: nn.Module) -> str:
    """The zoo's name of a model."""
    return next(a.name for a in ARCHS.values() if a.model == type(model).__name__)


def save(model: nn.Module, path: Path, max_shard_size: str | int = "5GB") -> Path:
    """Write a model as a Hugging Face directory of safetensors; returns ``path``."""
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def load_dense(path: Path, arch: str) -> nn.Module:
    """The plain transformers model in ``path``, float32, eval mode."""
    return getattr(tf, ARCHS[arch].model).from_pretrained(path, dtype=torch.float32).eval()


def make_adapter(
    base_dir: Path,
    out: Path,
    seed: int,
    rank: int = 4,
    targets: Iterable[str] | str | None = None,
    *,
    arch: str,
    scale: float = 0.5,
    **options: Any,
) -> Path:
    """A LoRA adapter made by PEFT itself, with every adapter tensor random and non-zero; returns ``out``.

    ``options`` go to ``peft.LoraConfig``. The base is read from ``base_dir`` by its own class, so that the names in
    the adapter are those that PEFT writes for it.
    """
    import peft

    spec = ARCHS[arch]
    model = load_dense(base_dir, arch)
    config = peft.LoraConfig(
        r=rank,
        target_modules=targets if isinstance(targets, str) else sorted(targets or spec.targets),
        **{"lora_alpha": 2 * rank, **spec.options, **options},
    )
    adapted = peft.get_peft_model(model, config)
    gen = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=gen) * p[0].numel() ** -0.5)
            elif "lora_B" in name and p.ndim >= 2:
                p.copy_(scale * torch.randn(p.shape, generator=gen) * p.shape[0] ** -0.5)
            elif p.requires_grad:  # modules_to_save, trained biases, lora_bias
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
    adapted.save_pretrained(out)
    file = out / "adapter_config.json"
    written = json.loads(file.read_text())
    written["base_model_name_or_path"] = str(base_dir)
    file.write_text(json.dumps(written, indent=2))
    return out


def merged(base_dir: Path, adapter: Path, arch: str) -> nn.Module:
    """What PEFT itself makes of base and adapter: one dense model."""
    import peft

    return peft.PeftModel.from_pretrained(load_dense(base_dir, arch), str(adapter)).merge_and_unload().eval()


def inputs(arch: str, batch: int = 2, seed: int = 0, length: int = 7) -> dict[str, Tensor]:
    """A batch without padding for ``arch``: ids (batch, length) int64, pixels (batch, 3, 16, 16) float32."""
    gen = torch.Generator().manual_seed(3000 + seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=gen)
    mask = torch.ones_like(ids)
    kind = ARCHS[arch].kind
    if kind == "vision":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=gen)}
    if kind == "clip":
        ids[:, -1] = 2  # the text tower pools at the end token
        pixels = torch.randn(batch, 3, 16, 16, generator=gen)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if kind == "seq2seq":
        decoder = torch.randint(3, VOCAB, (batch, length - 2), generator=gen)
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's answer as one tensor (batch, features), whatever its kind."""
    with torch.no_grad():
        out = model(**batch)
    if getattr(out, "logits_per_image", None) is not None:
        parts = [out.image_embeds, out.text_embeds, out.vision_model_output.last_hidden_state.flatten(1)]
        parts.append(out.text_model_output.last_hidden_state.flatten(1))
    elif getattr(out, "logits", None) is not None:
        parts = [out.logits]
    else:
        parts = [out.last_hidden_state, out.pooler_output]
    return torch.cat([p.reshape(p.shape[0], -1) for p in parts], dim=1)
