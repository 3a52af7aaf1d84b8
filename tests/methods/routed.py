"""Models with experts of unequal ranks that adapt different layers, and the same in naive float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import coterie
from coterie.errors import CoterieError
from zoo import base_model, make_adapter, save

NAMES = ["task", "general", "same"]
# Every layer has some of them, some layers one alone.
TARGETS = {
    "llama": [["q_proj", "v_proj", "down_proj"], ["q_proj", "v_proj", "up_proj"], ["q_proj", "down_proj"]],
    "bert": [["query", "output.dense"], ["query", "value"], ["query", "output.dense", "value"]],
}
TEXTS = {
    "task": ["the first words", "some more of them"],
    "general": ["whatever else", "there is to say", "and so on"],
    "same": ["a third thing"],
}


def fill(root: Path, arch: str, ranks: tuple[int, ...] = (4, 6, 3)) -> SimpleNamespace:
    """A base, and a library of three adapters of it."""
    model = base_model(arch)
    save(model, root / "base")
    library = coterie.library.create(root / "library", root / "base")
    for i, (name, targets, rank) in enumerate(zip(NAMES, TARGETS[arch], ranks, strict=True)):
        source = make_adapter(root / "base", root / name, i, rank, targets, arch=arch)
        library.add(name, source, examples=TEXTS[name], description=name)
    return SimpleNamespace(base=root / "base", model=model, library=library, arch=arch, root=root)


def build(
    made: SimpleNamespace, method: str, out: Path, weights: dict[str, float] | None = None, **parameters: Any
) -> Any:
    """A mixture of all experts of the library, built and loaded."""
    experts = {
        name: {"source": f"{made.library.path}#{name}", "weight": (weights or {}).get(name, 1.0)} for name in NAMES
    }
    coterie.build(method=method, base=str(made.base), experts=experts, parameters=parameters, out=out)
    return coterie.load(out)


def deltas(made: SimpleNamespace) -> dict[str, dict[int, Tensor]]:
    """Layer -> expert -> its delta (out, in), float64, straight from the adapters' files."""
    return {path: {i: b @ a for i, (b, a) in each.items()} for path, each in factors(made).items()}


def factors(made: SimpleNamespace) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    """Layer -> expert -> B times the scale, and A, float64."""
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for i, name in enumerate(NAMES):
        folder = made.root / name
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
                found.setdefault(path, {})[i] = config["lora_alpha"] / config["r"] * b, a
    return found


def naive(made: SimpleNamespace, add: Callable[[str, Tensor], Any]) -> nn.Module:
    """The base in float64, with what `add` makes of a layer's path and input (batch, tokens, in) beside each layer."""
    model = copy.deepcopy(made.model).double().eval()
    for path in deltas(made):
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda _, args, out, path=path: out + add(path, args[0]))
    return model


def batch(rows: int = 3, length: int = 7, side: str = "right") -> dict[str, Tensor]:
    """Ids of unlike length, padded on one side."""
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, slice(length - row, None) if side == "right" else slice(None, row)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def data(arch: str, rows: int = 4) -> list[dict[str, Tensor]]:
    """Two batches with labels."""
    found = []
    for seed in (1, 2):
        ids = torch.randint(3, 60, (rows, 6), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        labels = ids.masked_fill(mask == 0, -100) if arch == "llama" else torch.arange(rows) % 3
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def close_where_it_counts(ours: Tensor, theirs: Tensor, mask: Tensor, tolerance: float = 1e-5) -> None:
    """Logits (batch, tokens, classes), or (batch, classes), agree on what is no padding."""
    kept = mask.bool() if ours.ndim == 3 else slice(None)
    torch.testing.assert_close(ours[kept].double(), theirs[kept].double(), atol=tolerance, rtol=tolerance)


def alone(
    given: dict[str, Tensor], together: Tensor, lengths: Tensor | None
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Each row of a batch padded on the right as a call of its own, with its prompt's length where it has one; and what
    the batch gave for it."""
    for row in range(len(together)):
        length = int(given["attention_mask"][row].sum())
        one = {"input_ids": given["input_ids"][row : row + 1, :length]}
        more = {} if lengths is None else {"prompt_lengths": lengths[row : row + 1]}
        yield one | more, together[row, :length] if together.ndim == 3 else together[row]


def decides_by_the_prompt_alone(mixture: Any) -> None:
    """Of a causal model: what comes later changes nothing before, and cached steps are as the whole text at once."""
    ids = batch()["input_ids"][:1]
    changed = ids.clone()
    changed[0, 5] = 7
    prompt = {"prompt_lengths": torch.tensor([4])}
    a, b = mixture(input_ids=ids, **prompt).logits, mixture(input_ids=changed, **prompt).logits
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=1e-6, rtol=1e-6)
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-4

    given = batch(side="left")
    how = {"output_logits": True, "return_dict_in_generate": True}
    written = mixture.generate(**given, max_new_tokens=4, do_sample=False, **how)
    for row in range(3):
        own = given["input_ids"][row : row + 1, row:]
        for step in range(4):
            more = written.sequences[row, 7 : 7 + step][None]
            out = mixture(input_ids=torch.cat([own, more], 1), prompt_lengths=torch.tensor([own.shape[1]]))
            torch.testing.assert_close(out.logits[0, -1], written.logits[step][row], atol=1e-5, rtol=1e-5)
    assert mixture.generate(**given, max_new_tokens=3, num_beams=2, do_sample=False).shape == (3, 10)
    with pytest.raises(CoterieError, match="does not say where it ends"):
        mixture(**given)


def encoder(texts: Any) -> Tensor:
    """Letters of the texts, counted: (n, 8)."""
    rows = [[sum(ord(c) % 8 == k for c in text) + 0.25 * k for k in range(8)] for text in texts]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 8)


def equal_states(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
