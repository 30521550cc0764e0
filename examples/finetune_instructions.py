"""Supervised fine-tuning on instructions: learn the answers, not the questions.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", figure 2,
step 1. Question and answer are one text, but only the answer's tokens count in the loss: the labels
of the question are IGNORED. <|endoftext|> belongs to the answer: so the model learns to stop.

    python examples/finetune_instructions.py
    python examples/finetune_instructions.py --model gpt2 --data answers.jsonl --lr 5e-5

The data are JSONL with prompt and completion; the bundled ones are answers of a lighthouse keeper.
Prints held-out loss and answers before and after, and what the model has forgotten. Writes the
tuned model to runs/finetune_instructions.
"""

import argparse
import json
import random
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from gpt2mini import GPT2, Tokenizer, complete
from gpt2mini.data.samples import sample
from gpt2mini.data.text import Batch
from gpt2mini.device import pick_device
from gpt2mini.evaluation import forgetting
from gpt2mini.losses import IGNORED, next_token_loss
from gpt2mini.masking import pad_right

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--data", default=sample("keeper.jsonl"), help="JSONL: prompt, completion")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--lr", type=float, default=5e-4, help="learning rate; 5e-5 for gpt2")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
random.seed(args.seed)
device = pick_device()
tokenizer = Tokenizer.from_pretrained(args.model)
model = GPT2.from_pretrained(args.model, device=device)
base = deepcopy(model)

# ---- records -> token ids and labels
records = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
random.shuffle(records)
examples: list[tuple[Tensor, Tensor]] = []
for record in records:
    prompt_ids = tokenizer.encode(f"Question: {record['prompt']}\nAnswer:")
    answer_ids = [*tokenizer.encode(" " + record["completion"]), tokenizer.eos_id]
    labels = torch.tensor([IGNORED] * len(prompt_ids) + answer_ids)
    examples.append((torch.tensor(prompt_ids + answer_ids), labels))
held_out, training = examples[:20], examples[20:]


def answer_loss(examples: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Nats per token of the answers."""
    token_ids, is_real = pad_right([ids for ids, _ in examples])  # (batch, tokens), both
    labels = pad_right([labels for _, labels in examples])[0].masked_fill(~is_real, IGNORED)
    logits = model(token_ids.to(device), is_real.to(device))  # (batch, tokens, vocab)
    loss_sum, count = next_token_loss(logits, labels.to(device))
    return loss_sum / count


with torch.no_grad():
    print(f"before    held-out loss {answer_loss(held_out):.3f} nats per token")
# ---- the loop
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
for step in range(args.steps):
    optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
    optimizer.zero_grad()
    loss = answer_loss(random.sample(training, k=8))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step:4}   loss {loss.item():.3f}")

with torch.no_grad():
    print(f"after     held-out loss {answer_loss(held_out):.3f} nats per token")
for question in (f"Question: {record['prompt']}\nAnswer:" for record in records[:3]):
    for name, which in (("before", base), ("after", model)):
        print(f"\n--- {name}\n{complete(which, tokenizer, question, 60, temperature=0.7)}")
general = sample("general.txt").read_text(encoding="utf-8")
answers = [Batch(ids[None], labels[None]) for ids, labels in held_out]  # whose labels count
print(forgetting(base, model, tokenizer, general, answers))
model.save_pretrained("runs/finetune_instructions")
tokenizer.save_pretrained("runs/finetune_instructions")
