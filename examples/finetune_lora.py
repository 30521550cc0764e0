"""LoRA: teach GPT-2 a way of answering with a few parameters beside the frozen rest.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": each chosen linear layer gets
a second path of small rank, h = W x + (alpha / rank) B A x (equation 3). B begins at zero, so at
first nothing has changed; only A and B learn.

    python examples/finetune_lora.py
    python examples/finetune_lora.py --model gpt2 --data dialogues.jsonl --rank 16

The data are JSONL with prompt and completion; bundled are answers of a lighthouse keeper. Prints
answers and held-out loss without the adapter and with it (4.43 and 3.06 nats per token), and writes
it to runs/finetune_lora/best.
"""

import argparse
import random
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gpt2mini import GPT2, Tokenizer, complete
from gpt2mini.data.instructions import ExchangeBatches, encode_exchanges, read_exchanges
from gpt2mini.data.samples import sample
from gpt2mini.data.text import Batch
from gpt2mini.device import pick_device
from gpt2mini.lora import TARGETS, add_lora, lora_disabled, merge_lora, save_adapter
from gpt2mini.losses import next_token_loss

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--data", default=sample("keeper.jsonl"), help="JSONL: prompt, completion")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
random.seed(args.seed)
device = pick_device()
out = Path("runs/finetune_lora/best")
tokenizer = Tokenizer.from_pretrained(args.model)
model = GPT2.from_pretrained(args.model, device=device)
exchanges = read_exchanges(args.data)
random.shuffle(exchanges)
encoded = encode_exchanges(exchanges, tokenizer, longest=model.config.context_length)
batches = ExchangeBatches(encoded[20:], batch_size=8, seed=args.seed)
held_out = ExchangeBatches(encoded[:20], batch_size=20, seed=args.seed).batch(range(20)).to(device)

# ---- the adapters; everything else is frozen
add_lora(model, rank=args.rank, alpha=2 * args.rank, targets=list(TARGETS))
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
n_trainable, total = (sum(p.numel() for p in ps) for ps in (trainable, model.parameters()))
print(f"{n_trainable:,} of {total:,} parameters learn: {n_trainable / total:.1%}")


def answer_loss(batch: Batch) -> Tensor:
    """Nats per token of the answers; the labels of the questions are ignored."""
    logits = model(batch.token_ids, batch.attention_mask)  # (batch, tokens, vocab)
    loss_sum, count = next_token_loss(logits, batch.labels)
    return loss_sum / count


# ---- the loop
optimizer = torch.optim.AdamW(trainable, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
for step, batch in enumerate(islice(batches.part(), args.steps)):  # epoch after epoch
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / args.steps)
    optimizer.zero_grad()
    loss = answer_loss(batch.to(device))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, max_norm=1.0)
    optimizer.step()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step:4}   loss {loss.item():.3f}")

# ---- the base is still there: lora_disabled gives it back exactly
torch.set_grad_enabled(False)
for one in exchanges[:3]:
    with lora_disabled(model):
        before = complete(model, tokenizer, one.prompt, 50, temperature=0.7)
    after = complete(model, tokenizer, one.prompt, 50, temperature=0.7)
    print(f"\n--- without the adapter\n{before}\n--- with it\n{after}")
with lora_disabled(model):
    loss_without = answer_loss(held_out)
print(f"\nheld-out loss {loss_without:.3f} -> {answer_loss(held_out):.3f} nats per token")
save_adapter(model, out, replace=True)
size = sum(file.stat().st_size for file in out.iterdir())
print(f"adapter: {out}, {size / 1e6:.2f} MB, in PEFT's format")
merge_lora(model)  # W + (alpha / rank) B A: a plain GPT-2 again, at no extra cost
print(f"merged: held-out loss {answer_loss(held_out):.3f}")
