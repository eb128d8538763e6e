"""The relation loss in transformers' Trainer: one file to copy, beside `relation_kl`.

    teacher = AutoModelForCausalLM.from_pretrained(DIR)
    config = AutoConfig.from_pretrained(DIR)       # stretched: `rope_parameters`, in version 4
    student = AutoModelForCausalLM.from_pretrained(DIR, config=config)  # `rope_scaling`
    train_projections(student)                     # or an adapter of PEFT on q, k and v
    RelationTrainer(model=student, teacher=teacher, args=..., train_dataset=...).train()

What.  Both models read the same tokens, the teacher without gradients. Their attention is an
implementation of ours that keeps q, k (after RoPE) and v of each layer where the loss finds them.
The loss is the mean over layers of the KL of Q/Q, K/K and V/V, each a mean over heads and rows of
text, plus `next_token` times the model's own loss where labels are given.

Right, each against one plain batch in tests/test_own_trainer.py: gradient accumulation (a mean of
the pieces' means: pieces of equal length), bf16 (the teacher stays in its dtype and is cast at the
loss), gradient checkpointing with `use_reentrant` False, PEFT students, several processes.

Refused.  Reentrant checkpointing, which computes q, k and v without gradients; padding on the left.

Limits.  Models of transformers that use its AttentionInterface and hold their layers as LLaMA does.
"""

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from relation_kl import relation_kl

NAME = "keep_qkv"


def keep_qkv(attention, q, k, v, mask, **options):
    """Attention as ever; q [B, H, T, D], k and v [B, Hkv, T, D] stay with the module."""
    attention.qkv = q, k, v
    return sdpa_attention_forward(attention, q, k, v, mask, **options)


AttentionInterface.register(NAME, keep_qkv)
AttentionMaskInterface.register(NAME, sdpa_mask)  # padding and windows stay as they are


def train_projections(model: nn.Module) -> None:
    """Freezes all but the q, k and v projections, as LinearARD trains."""
    for name, p in model.named_parameters():
        p.requires_grad = any(f"{r}_proj" in name for r in "qkv")


def decoder(model: nn.Module) -> nn.Module:
    """What holds the layers, inside an adapter or not."""
    return (model.get_base_model() if hasattr(model, "peft_config") else model).model


def relation_loss(teacher: nn.Module, student: nn.Module, lengths: Tensor | None = None) -> Tensor:
    """Mean KL of the relations in the text that both models read last, in nats.

    lengths [B]: of texts that are padded on the right. Raises ValueError where the student's q, k
    and v have no gradient although it is asked for.
    """
    pair = [decoder(m) for m in (student, teacher)]
    tau = [m.rotary_emb.attention_scaling for m in pair]  # YaRN's, which stands in q and k
    layers = [[layer.self_attn.__dict__.pop("qkv") for layer in m.layers] for m in pair]
    if torch.is_grad_enabled() and not any(x.requires_grad for qkv in layers[0] for x in qkv):
        raise ValueError(
            "the student's q, k and v have no gradient: give gradient_checkpointing_kwargs="
            '{"use_reentrant": False}, and train at least one of the projections'
        )
    total = 0.0
    for ours, theirs in zip(*layers, strict=True):
        for name, x, y in zip("qkv", ours, theirs, strict=True):
            a, b = [x.shape[-1] ** -0.5 / (1 if name == "v" else t * t) for t in tau]
            kl = relation_kl(x, y, scale=a, teacher_scale=b, lengths=lengths)  # [B, heads, T]
            rows = kl.shape[0] * kl.shape[2] if lengths is None else lengths.sum()
            total = total + kl.sum() / (kl.shape[1] * rows)
    return total / len(layers[0])


class RelationTrainer(transformers.Trainer):
    """Trainer(model=student, teacher=teacher, next_token=0.0, ...)."""

    def __init__(self, *args, teacher: nn.Module, next_token: float = 0.0, **more):
        super().__init__(*args, **more)
        # Ours is a mean: Trainer divides it by the pieces of a step instead of counting tokens
        self.model_accepts_loss_kwargs = False
        self.next_token = next_token
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        for model in (self.model, teacher):
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            base.set_attn_implementation(NAME)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one piece of a step; inputs: input_ids [B, T], and what the model takes."""
        mask, lengths = inputs.get("attention_mask"), None
        if mask is not None and not mask.all():
            if not mask[:, 0].all():
                raise ValueError('texts are padded on the left; set padding_side = "right"')
            lengths = mask.sum(1)
        with torch.no_grad():
            self.teacher(inputs["input_ids"], attention_mask=mask, use_cache=False)
        outputs = model(**inputs, use_cache=False)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        loss = relation_loss(self.teacher, student, lengths)
        if self.next_token:
            loss = loss + self.next_token * outputs.loss
        elif self.args.world_size > 1:  # DDP waits for a gradient of every weight, if of zeros
            loss = loss + 0.0 * outputs.logits.float().mean()
        return (loss, outputs) if return_outputs else loss
