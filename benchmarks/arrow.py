"""Arrow against PEFT's: what routing over 8, 32 and 128 adapters costs, and how far fifteen power iterations come.

    python benchmarks/arrow.py     # writes benchmarks/results/arrow.json

The adapters have spectra that fall fast, so that PEFT's iterations converge and both give the same outputs, which is
asserted. One thread, in processor time of its own; variants alternate in one process, and a ratio is the median over
rounds. Directions: `|cos|` between PEFT's prototype and the exact top right singular vector, over random deltas whose
singular values fall by a factor each; and between the product's and a float64 SVD's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from time import thread_time
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import coterie
from coterie.experts.factorise import factorise
from coterie.sources.delta import LowRank
from timing import Variant, machine, side_by_side, versions

RESULT = Path(__file__).parent / "results" / "arrow.json"
EXPERTS, TOKENS, RANK, TOP_K = (8, 32, 128), 512, 16, 3
WIDTH = 768  # of the layer
TARGETS = ("q_proj", "v_proj", "down_proj")
DECAYS, DRAWS = (0.5, 0.7, 0.9, 0.95, 0.99), 20


def small() -> PreTrainedModel:
    """4 layers of width 256."""
    return llama(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=688)


def llama(**sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, bos_token_id=1, eos_token_id=None, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


def factors(d_in: int, d_out: int, decay: float, generator: torch.Generator, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of a random delta whose singular values are `decay ** j`."""
    s = decay ** torch.arange(rank, dtype=torch.float64)
    v, u, mix = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
        for size in (d_in, d_out, rank)
    )
    return (mix @ (s.sqrt()[:, None] * v.T)).float(), (u * s.sqrt() @ mix.T).float()


def adapters(base: Any, folder: Path, count: int, targets: tuple[str, ...]) -> list[str]:
    """PEFT adapters of a base."""
    found = []
    for i in range(count):
        path, generator = folder / f"adapter {i}", torch.Generator().manual_seed(i)
        tensors = {}
        for name, module in base.named_modules():
            if name.endswith(targets):
                a, b = factors(module.in_features, module.out_features, 0.5, generator)
                tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
                tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets), task_type="CAUSAL_LM")
        config.base_model_name_or_path = str(folder / "base")
        path.mkdir()
        config.save_pretrained(path)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        found.append(str(path))
    return found


def both(base: Any, experts: int, targets: tuple[str, ...], run: Any) -> dict[str, Any]:
    """Base, ours and PEFT's side by side; `run(model, path prefix)` gives the call that is timed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder / "base")
        sources = adapters(base, folder, experts, targets)
        coterie.build(
            method="arrow", base=str(folder / "base"), experts={str(i): each for i, each in enumerate(sources)},
            parameters={"top_k": TOP_K}, out=folder / "mixture",
        )  # fmt: skip
        ours = coterie.load(str(folder / "mixture"))
        theirs = peft.create_arrow_model(
            base_model=LlamaForCausalLM.from_pretrained(folder / "base"),
            task_specific_adapter_paths=sources,
            arrow_config=peft.ArrowConfig(top_k=TOP_K, router_temperature=1.0, rng_seed=0),
        ).eval()
    calls = {"base": run(base, ""), "coterie": run(ours, ""), "PEFT": run(theirs, "base_model.model.")}
    with torch.inference_mode():
        a, b, plain = calls["coterie"](), calls["PEFT"](), calls["base"]()
        # A token whose scores tie to rounding may go either way: the median token tells whether the two agree.
        apart = float(((a - b).norm(dim=-1) / (b - plain).norm(dim=-1)).median())
    assert apart < 1e-4, apart
    listed = [Variant(name, call, partial(torch.inference_mode)) for name, call in calls.items()]
    found, rounds = side_by_side(listed, 1, clock=thread_time)
    times = {name: figures["ms"] for name, figures in found.items()}
    return {
        "experts": experts,
        "rounds": rounds,
        "variants": found,
        "PEFT over coterie": times["PEFT"] / times["coterie"],
        "beyond the base, PEFT over coterie": (times["PEFT"] - times["base"]) / (times["coterie"] - times["base"]),
        "median relative difference of outputs": apart,
    }


def layer(experts: int) -> dict[str, Any]:
    """One layer of width 768."""
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    base = llama(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=12, intermediate_size=16)
    return both(
        base, experts, ("q_proj",), lambda model, prefix: partial(
            model.get_submodule(f"{prefix}model.layers.0.self_attn.q_proj"), x
        )
    )  # fmt: skip


def model(experts: int) -> dict[str, Any]:
    """A small Llama, experts on three of its seven kinds of layers."""
    ids = torch.randint(2, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return both(small(), experts, TARGETS, lambda made, _: lambda: made(input_ids=ids).logits)


def directions() -> list[dict[str, Any]]:
    """How near prototypes come to the exact direction, by the factor by which singular values fall."""
    router = ArrowLoraLinearLayer(
        WIDTH, SimpleNamespace(top_k=1, router_temperature=1.0, rng_seed=None, task_adapter_names=[],
                               gks_adapter_names=[], use_gks=False),
    )  # fmt: skip
    torch.manual_seed(0)
    rows = []
    for decay in DECAYS:
        generator, theirs, ours = torch.Generator().manual_seed(7), [], []
        for _ in range(DRAWS):
            a, b = factors(WIDTH, WIDTH, decay, generator)
            exact = torch.linalg.svd(b.double() @ a.double())[2][0]
            theirs.append(float((router.top_right_singular_vec_from_BA(a, b).double() @ exact).abs()))
            ours.append(float((factorise(LowRank(b, a)).vt[0] @ exact).abs()))
        rows.append(
            {
                "decay": decay,
                "PEFT, mean |cos|": sum(theirs) / DRAWS,
                "PEFT, least |cos|": min(theirs),
                "coterie, least |cos|": min(ours),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one of layer, model, directions: the rest is kept as it is")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Any] = {
        "layer": lambda: [layer(experts) for experts in EXPERTS],
        "model": lambda: [model(experts) for experts in EXPERTS],
        "directions": directions,
    }
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name, run in parts.items():
        if chosen.only in (None, name):
            result[name] = run()
            print(name, json.dumps(result[name], indent=1), flush=True)
    settings = {"tokens": TOKENS, "rank": RANK, "top_k": TOP_K, "layer": WIDTH, "model": "Llama, 4 layers of 256"}
    result |= {"settings": settings, "machine": machine(), "versions": versions("torch", "transformers", "peft")}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
