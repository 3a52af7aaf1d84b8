"""What learned routers cost: a SMEAR layer, whole models, training steps, and X-LoRA against one LoRA.

    python benchmarks/learned.py     # writes benchmarks/results/learned.json; routers_page.py renders docs/smear.md

One thread, in processor time of its own; variants alternate in one process, and a ratio is the median over rounds.
Memory is the peak of anonymous memory, each training step in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import thread_time
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import coterie
from coterie.building.memory import PeakMemory, anonymous_bytes
from timing import Variant, machine, side_by_side, versions

RESULT = Path(__file__).parent / "results" / "learned.json"
RANK, BATCH, TOKENS = 16, 8, 128
EXPERTS = (4, 8, 32)
# What a training step of each is measured with; tag, hash and poly are told the task.
METHODS = (
    "single", "smear", "ensemble", "switch", "st_gumbel", "reinforce", "dselect_k", "soft_moe", "adamix", "poly",
    "mhr", "tag", "hash", "xlora",
)  # fmt: skip


def bert() -> PreTrainedModel:
    """The shape of MiniLM: 6 layers, width 384."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=1000
    )
    return BertForSequenceClassification(config).eval()


def llama() -> PreTrainedModel:
    """The shape of the research notes' measurement of PEFT: 4 layers, width 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=688, vocab_size=1000,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def filled(model: Any, names: tuple[str, ...] = ("bank", "router", "lora_")) -> Any:
    """Experts and routers that do something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def mixture(model: Any, method: str, experts: int, **parameters: Any) -> Any:
    config = coterie.MixtureConfig(method=method, experts=experts, parameters={"rank": RANK, **parameters})
    made = filled(coterie.wrap(model, config))
    if method == "single":
        made.coterie.use_path("grouped")  # not merged: what an expert costs is asked
    return made


def batch(rows: int = BATCH, tokens: int = TOKENS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compared(variants: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """name -> ms, ratio to the first, and the ratio's quartiles."""
    listed = [Variant(name, call, partial(torch.inference_mode)) for name, call in variants.items()]
    found, rounds = side_by_side(listed, 1, clock=thread_time)
    return {"rounds": rounds, "variants": found}


class Site(nn.Module):
    """One layer behind an embedding, so that a call has the shape of a model's."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return self.linear(inputs_embeds)


def products(width: int, experts: int, x: Tensor) -> float:
    """SMEAR's torch calls alone (mean, merge, two products; no router, no layer), over a single expert's."""
    down, up = torch.randn(2, experts, RANK * width)
    one, other = down[0].view(RANK, width), up[0].view(RANK, width)
    gates, y, flat = torch.rand(BATCH, experts), torch.zeros_like(x), x.flatten(0, 1)

    def smear() -> None:
        x.sum(1)
        merged, back = (gates @ down).view(-1, RANK, width), (gates @ up).view(-1, RANK, width)
        y.baddbmm_(torch.bmm(x, merged.transpose(1, 2)), back)

    def single() -> None:
        y.flatten(0, 1).addmm_(flat @ one.T, other)

    return float(compared({"single": single, "smear": smear})["variants"]["smear"]["ratio"])


def site(width: int, experts: int, tokens: int) -> dict[str, Any]:
    """What the experts of one layer cost, in units of a single expert's cost."""
    torch.manual_seed(0)
    dense = Site(width).eval()
    x = torch.randn(BATCH, tokens, width)
    models = {"dense": dense, "single": mixture(dense, "single", 1).eval()}
    models["smear"] = mixture(dense, "smear", experts).eval()
    models["ensemble"] = mixture(dense, "ensemble", experts).eval()
    found = compared({name: partial(model, inputs_embeds=x) for name, model in models.items()})
    ratios = {name: figures["ratio"] for name, figures in found["variants"].items()}
    one = ratios["single"] - 1
    floor = 1 + experts / tokens
    found |= {
        "width": width,
        "experts": experts,
        "tokens": tokens,
        "least, in experts": floor,
        "products, in experts": products(width, experts, x),
        "smear, in experts": (ratios["smear"] - 1) / one,
        "ensemble, in experts": (ratios["ensemble"] - 1) / one,
        "site over dense and least": ratios["smear"] / (1 + floor * one),
    }
    return found


def whole() -> list[dict[str, Any]]:
    """Whole models: SMEAR and the dense ensemble against one expert."""
    base, given, accounts = bert(), batch(), []
    for expert in ("lora", "bottleneck"):
        single = mixture(base, "single", 1, expert=expert).eval()
        for experts in EXPERTS:
            models = {"single": single, "base": base}
            for method in ("smear", "ensemble"):
                models[method] = mixture(base, method, experts, expert=expert).eval()
            found = compared({name: partial(model, **given) for name, model in models.items()})
            accounts.append({"experts": experts, "expert": expert, **found})
    return accounts


def step(method: str, experts: int) -> dict[str, float]:
    """One training step: median milliseconds of this thread, and the peak of anonymous memory above the model's."""
    torch.set_num_threads(1)
    base = bert()
    known: dict[str, Any] = {"tasks": experts} if method in ("poly", "mhr") else {}
    model = mixture(base, method, 1 if method == "single" else experts, **known)
    given = batch() | {"labels": torch.zeros(BATCH, dtype=torch.long), "task_ids": torch.arange(BATCH) % experts}
    if method == "single":
        del given["task_ids"]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times = []
    before = anonymous_bytes()
    with PeakMemory() as memory:
        for _ in range(7):
            start = thread_time()
            model(**given).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            times.append(1e3 * (thread_time() - start))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"ms": sorted(times[1:])[3], "peak_mib": (memory.bytes - before) / 2**20, "trainable": trainable}


def steps(experts: int = 8) -> dict[str, Any]:
    """Every method's step, in processes of their own, and how it compares with one expert's."""
    found = {}
    for method in METHODS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[method] = pool.submit(step, method, experts).result()
        print(method, found[method], flush=True)
    one = found["single"]
    return {
        name: {**each, "ratio": each["ms"] / one["ms"], "memory_ratio": each["peak_mib"] / one["peak_mib"]}
        for name, each in found.items()
    }


def xlora(experts: int = 8, rank: int = 8, new_tokens: int = 16) -> dict[str, Any]:
    """X-LoRA against one LoRA, ours and PEFT's: a forward over 128 tokens, and cached generation."""
    base, given = llama(), batch(1)
    wide = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = {"include": [f"*.{name}" for name in wide]}
    adapter = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=wide)
    models: dict[str, Any] = {"LoRA (PEFT)": filled(peft.get_peft_model(copy.deepcopy(base), adapter)).eval()}
    for method in ("single", "xlora", "xlora_frozen"):
        config = coterie.MixtureConfig(
            method=method, experts=1 if method == "single" else experts, parameters={"rank": rank}, modules=targets
        )
        models[method] = filled(coterie.wrap(base, config)).eval()
    models["single"].coterie.use_path("grouped")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(experts):
            peft.get_peft_model(copy.deepcopy(base), adapter).save_pretrained(f"{folder}/{i}")
        plain = copy.deepcopy(base)
        plain.config.use_cache = False  # as PEFT asks
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=256, xlora_depth=1, layerwise_scalings=True,
            adapters={str(i): f"{folder}/{i}" for i in range(experts)},
        )  # fmt: skip
        models["X-LoRA (PEFT)"] = filled(peft.get_peft_model(plain, config)).eval()
        forward, generate = {}, {}
        for name, model in models.items():
            extra = {"prompt_lengths": torch.tensor([TOKENS])} if name == "xlora_frozen" else {}
            cache = {} if "X-LoRA" in name else {"use_cache": False}
            forward[name] = partial(model, **given, **extra, **cache)
            few = {key: value[:, :32] for key, value in given.items()}
            generate[name] = partial(model.generate, **few, max_new_tokens=new_tokens, do_sample=False)
        return {"forward of 128 tokens": compared(forward), f"generation of {new_tokens} tokens": compared(generate)}


def prompt(experts: int = 8, rank: int = 8) -> dict[str, Any]:
    """Generation for one prompt, which decides once: SMEAR by its low-rank pair, and merged into the weights."""
    base, given = llama(), {key: value[:, :32] for key, value in batch(1).items()}
    config = coterie.MixtureConfig(method="smear", experts=experts, parameters={"rank": rank, "pool": "prompt"})
    model = filled(coterie.wrap(base, config)).eval()
    found = {}
    for tokens in (4, 16, 64):
        settings = {**given, "max_new_tokens": tokens, "do_sample": False}
        run = partial(model.generate, **settings)
        listed = [
            Variant("base", partial(base.generate, **settings), torch.inference_mode),
            Variant("pair", run, torch.inference_mode),
            Variant("merged", run, partial(model.coterie.use_path, "merged")),
        ]
        with torch.inference_mode():
            figures, rounds = side_by_side(listed, 1, clock=thread_time)
        found[f"generation of {tokens} tokens"] = {"rounds": rounds, "variants": figures}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        choices=["site", "whole", "steps", "xlora", "prompt"],
        help="measure this part; the rest is kept as it is",
    )
    parser.add_argument("-o", "--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Any]] = {
        "site": lambda: [site(width, experts, TOKENS) for width in (384, 768) for experts in EXPERTS],
        "whole": whole,
        "steps": steps,
        "xlora": xlora,
        "prompt": prompt,
    }
    result = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    for name, run in parts.items():
        if chosen.only in (None, name):
            result[name] = run()
            print(name, json.dumps(result[name], indent=1)[:4000], flush=True)
    result |= {"machine": machine(), "versions": versions("coterie", "torch", "transformers", "peft"), "threads": 1}
    result |= {"shapes": {"batch": BATCH, "tokens": TOKENS, "rank": RANK}}
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
