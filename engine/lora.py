"""Low-rank adapters: train two thin matrices beside each frozen projection instead of a copy of it.

    y = W x + b + (alpha / r) B A dropout(x)          A [r, in], B [out, r], B = 0 at the start

A and B are float32 and the only tensors that learn; W stays the teacher's. `merge` folds them into
plain weights for the export, and `write_adapter` writes them as PEFT does (adapter_config.json,
adapter_model.safetensors), so that PEFT can put them on the original model. PEFT restores weights
only: whoever does that must also set the RoPE scaling in the base model's config.json; the README
beside the adapter says to what.

Source.  LoRA, arXiv 2106.09685; PEFT's file format.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hub import download, rope_json
from hub.card import adapter_card
from hub.checkpoint import set_parameter
from model import Llama


class LoraLinear(nn.Module):
    """A frozen Linear, borrowed as it is, plus the trainable product B A."""

    def __init__(
        self,
        frozen: nn.Module,
        rank: int,
        alpha: float,
        dropout: float,
        device: torch.device,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.frozen = frozen  # model.Linear, or engine/quant.py's Packed
        self.lora_A = nn.Parameter(torch.empty(rank, frozen.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs] in x's dtype; in training the adapter reads x with
        dropout.
        """
        training = torch.is_grad_enabled()  # scoring runs without
        inner = F.dropout(x, self.dropout, training=training)
        added = F.linear(F.linear(inner, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.frozen(x) + added * self.scale

    def product(self) -> Tensor:
        """What the adapter adds to the weight, [outputs, inputs] float32."""
        return self.scale * (self.lora_B @ self.lora_A).detach()


def adapt(
    student: Llama,
    trained: tuple[str, ...],
    rank: int,
    alpha: float,
    dropout: float,
    generator: torch.Generator | None = None,
) -> Llama:
    """Puts adapters on every projection of `student` whose name is in `trained`, in place.

    generator: of their first numbers, on the student's device (None: torch's own).

    Raises ValueError for a rank outside 1 .. the model's width.
    """
    smallest = min(student.config.width, student.config.n_kv_head * student.config.head_dim)
    if not 0 < rank <= student.config.width:
        raise ValueError(
            f"--lora-rank is {rank}; it must be from 1 to the model's width, {student.config.width}"
        )
    if rank > smallest:
        print(
            f"--lora-rank {rank} is above {smallest}, the smaller side of k_proj: more numbers "
            "than full training has"
        )
    for layer in student.model.layers:
        for name in trained:
            frozen = getattr(layer.self_attn, name)
            adapter = LoraLinear(frozen, rank, alpha, dropout, student.device, generator)
            setattr(layer.self_attn, name, adapter)
    return student


def merge(student: Llama, original: Llama | None = None) -> Llama:
    """A plain Llama with W + (alpha / r) B A in float32; everything else is shared.

    original: whose W and other tensors are taken, where the student's are packed in 4 bits. Without
    adapters: `student`.
    """
    if not any(isinstance(m, LoraLinear) for m in student.modules()):
        return student
    with torch.device("meta"):
        plain = Llama(student.config)
    for name in [n for n, _ in plain.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        adapted = student.get_submodule(owner)
        held = original.get_submodule(owner) if original else getattr(adapted, "frozen", adapted)
        value = getattr(held, leaf).detach()
        if leaf == "weight" and isinstance(adapted, LoraLinear):
            value = value.float() + adapted.product().to(value.device)
        set_parameter(plain, name, value)
    return plain.eval()


def write_adapter(student: Llama, work: Path, base: str, trained: tuple[str, ...]) -> None:
    """adapter_config.json and adapter_model.safetensors in PEFT's names, into the folder `work`."""
    tensors, last = {}, None
    for name, m in student.named_modules():
        if isinstance(m, LoraLinear):
            last = m
            tensors[f"base_model.model.{name}.lora_A.weight"] = m.lora_A.detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = m.lora_B.detach().cpu().contiguous()
    assert last is not None, "write_adapter needs a student with adapters"
    rank = last.lora_A.shape[0]
    repository = download.repository_of(Path(base))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": repository or base,  # PEFT fetches by the Hub's name
        "r": rank,
        "lora_alpha": last.scale * rank,
        "lora_dropout": last.dropout,
        "target_modules": list(trained),
        "bias": "none",
        "inference_mode": True,
    }
    name = download.model_name(Path(base))
    readme = adapter_card(name, rope_json.write(student.config.rope), repository)
    save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
    (work / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (work / "README.md").write_text(readme, encoding="utf-8")
