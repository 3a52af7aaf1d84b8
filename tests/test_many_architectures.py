"""Any architecture, without a line of modeling code: one expert at full rank, everything else averaged, is the expert.

The models are tiny and random. Every parameter of the expert differs from the base's, so that a parameter that was
dropped, misnamed or transposed shows in the outputs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

from coterie.errors import CoterieError
from matching import assert_matches, build, relative_error
from reference import from_model
from zoo import VOCAB

H = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(H, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
LLAMA = dict(TEXT, num_key_value_heads=2, tie_word_embeddings=False)
SEQ2SEQ = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
IMAGE = dict(H, image_size=16, patch_size=8)

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", dict(TEXT, embedding_size=16)),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", dict(TEXT, embedding_size=16)),
    "deberta": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        dict(TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm"),
    ),
    "mpnet": ("MPNetConfig", "MPNetModel", TEXT),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaForTokenClassification", TEXT),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        dict(TEXT, cls_token_id=1, sep_token_id=2, attn_implementation="eager"),
    ),
    "bert_tokens": ("BertConfig", "BertForTokenClassification", TEXT),
    "bert_questions": ("BertConfig", "BertForQuestionAnswering", TEXT),
    "bert_masked": ("BertConfig", "BertForMaskedLM", TEXT),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(LLAMA, head_dim=8)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(LLAMA, head_dim=8)),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", LLAMA),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", LLAMA),
    "granite": ("GraniteConfig", "GraniteForCausalLM", LLAMA),
    "cohere": ("CohereConfig", "CohereForCausalLM", LLAMA),
    "phi": ("PhiConfig", "PhiForCausalLM", LLAMA),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        dict(TEXT, ffn_dim=64, word_embed_proj_dim=16),
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    ),
    "gpt_classifier": (
        "GPT2Config",
        "GPT2ForSequenceClassification",
        dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
    ),
    "llama_classifier": ("LlamaConfig", "LlamaForSequenceClassification", LLAMA),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        dict(LLAMA, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, moe_layers=[1]),
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", dict(LLAMA, num_experts=4, num_experts_per_tok=2)),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            n_groups=2,
            chunk_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "falcon_mamba": (
        "FalconMambaConfig",
        "FalconMambaForCausalLM",
        dict(vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4, pad_token_id=0),
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQ2SEQ),
    "bart_classifier": ("BartConfig", "BartForSequenceClassification", SEQ2SEQ),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", SEQ2SEQ),
    "marian": ("MarianConfig", "MarianMTModel", SEQ2SEQ),
    "mt5": (
        "MT5Config",
        "MT5ForConditionalGeneration",
        dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, tie_word_embeddings=False),
    ),
    "t5_encoder": (
        "T5Config",
        "T5EncoderModel",
        dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        dict(SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=32, suppress_tokens=None),
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        dict(
            H,
            vocab_size=VOCAB,
            conv_dim=[16, 16],
            conv_kernel=[4, 4],
            conv_stride=[4, 4],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            pad_token_id=0,
        ),
    ),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", IMAGE),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModel", IMAGE),
    "clip_projection": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", dict(IMAGE, projection_dim=16)),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", IMAGE),
    "deit": ("DeiTConfig", "DeiTForImageClassification", IMAGE),
    "beit": ("BeitConfig", "BeitForImageClassification", dict(IMAGE, use_relative_position_bias=True)),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        dict(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    ),
}

FAST = ["deberta", "bart", "whisper", "siglip", "opt", "llama_classifier", "mamba2"]


def dense_model(name: str) -> nn.Module:
    """A tiny random model with weights of realistic scale and no dropout."""
    config_class, model_class, options = MODELS[name]
    config = getattr(tf, config_class)(**options)
    for key in list(config.to_dict()):
        if "drop" in key and isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = getattr(tf, model_class)(config).eval()
    perturb(model, 0, first=True)
    return model


def perturb(model: nn.Module, seed: int, first: bool = False) -> None:
    """Add to every parameter a random delta of a fifth of what is usual for its shape (all of it the first time).

    Parameters that transformers computes and never saves (sinusoidal positions) stay as they are.
    """
    gen = torch.Generator().manual_seed(seed)
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("A_log", "dt_bias", "logit_scale")) or ".dt_proj." in name or name in unsaved:
                continue
            noise = torch.randn(p.shape, generator=gen)
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.add_((1.0 if first and p.ndim > 1 else 0.2) * scale * noise)


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs that the model takes, by the name of its main input."""
    gen = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=gen)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 256, generator=gen)}
    ids = torch.randint(3, VOCAB, (2, 7), generator=gen)
    if model.main_input_name == "input_features":
        features = torch.randn(2, model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=gen)
        return {"input_features": features, "decoder_input_ids": ids}
    if "Classification" in type(model).__name__ and model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = (
        {"decoder_input_ids": ids[:, :5]}
        if model.config.is_encoder_decoder and "Encoder" not in type(model).__name__
        else {}
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def answer(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output of a model, (batch, features)."""
    with torch.no_grad():
        out = model(**batch)
    first = out.start_logits if hasattr(out, "start_logits") else out[0]
    return first.reshape(len(first), -1)


def pair(name: str, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """Base and expert, in memory and on disk."""
    base = dense_model(name)
    expert = copy.deepcopy(base)
    perturb(expert, 1)
    expert.tie_weights()
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    return base, expert


EVERY = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize("name", EVERY)
def test_the_average_of_one_is_the_expert(name, tmp_path):
    base, expert = pair(name, tmp_path)
    batch = batch_of(base)
    recipe = dict(parameters={"rank": "full"}, others="average")
    mixture = build(tmp_path / "out", tmp_path / "base", {"only": tmp_path / "expert"}, **recipe)
    wanted = answer(expert, batch)
    assert relative_error(answer(base, batch), wanted) > 1e-3
    assert relative_error(answer(mixture, batch), wanted) <= 2e-5
    assert len(mixture.coterie.layers) >= 2
    mixture.save_pretrained(tmp_path / "again")
    again = type(mixture).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(answer(again, batch), answer(mixture, batch))


@pytest.mark.parametrize("name", EVERY)
def test_two_experts_are_the_formula(name, tmp_path):
    if name == "albert":
        pytest.skip("its one layer runs twice, and the trace holds the last call")
    base, expert = pair(name, tmp_path)
    other = copy.deepcopy(base)
    perturb(other, 2)
    other.tie_weights()
    other.save_pretrained(tmp_path / "other")
    sources = {"a": tmp_path / "expert", "b": tmp_path / "other"}
    mixture = build(tmp_path / "out", tmp_path / "base", sources, parameters={"rank": 6, "gate_rank": 4})
    linears = {n for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    layers = set(mixture.coterie.layers)
    assert layers <= linears
    prefix = base.base_model_prefix
    inside = getattr(base, prefix, None) if prefix else None
    heads = [] if inside is None else [n for n, _ in base.named_children() if n != prefix]
    output = {n for n, m in base.named_modules() if m is base.get_output_embeddings()}
    heads = [h for h in heads if not any(o == h or o.startswith(f"{h}.") for o in output)]
    experts = [from_model(base, e, heads) for e in (expert, other)]
    options = dict(rank=6, gate_rank=4, tolerance=2e-5, run=answer)
    assert_matches(mixture, base, experts, sorted(layers), batch_of(base), **options)


def test_a_model_whose_linears_are_its_own_is_refused_clearly(tmp_path):
    """Falcon's linears are a subclass of nn.Linear: a mixture or a refusal, never a base model without experts."""
    options = dict(TEXT, num_kv_heads=2, new_decoder_architecture=True)
    torch.manual_seed(0)
    base = tf.FalconForCausalLM(tf.FalconConfig(**options)).eval()
    expert = copy.deepcopy(base)
    perturb(expert, 1)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    try:
        mixture = build(tmp_path / "out", tmp_path / "base", {"only": tmp_path / "expert"}, parameters={"rank": "full"})
    except CoterieError as error:
        assert "mixture layer" in str(error)
        assert not (tmp_path / "out").exists()
        return
    assert relative_error(answer(mixture, batch_of(base)), answer(base, batch_of(base))) > 1e-3
