"""Pretrain a GPT-2 from nothing but text: learn a vocabulary, then the weights.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2: byte-pair
encoding (Sennrich et al. 2016) on bytes, random weights, next-token prediction. The bundled text
has 46 KB, the model 1 million parameters: enough for words and the look of the text. gpt2-nano was
made from far more (see weights/gpt2-nano/README.md).

    python examples/pretrain.py
    python examples/pretrain.py --data books.txt --steps 5000 --layers 12

Prints samples on the way, the loss, which begins at ln(vocabulary), 6.9, and bits per byte of the
text held out, 1.72, which can be compared across vocabularies. Writes the model to runs/pretrain.
"""

import argparse
import math
from pathlib import Path

import torch

from gpt2mini import GPT2, GPT2Config, Tokenizer, complete
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.evaluation import perplexity
from gpt2mini.losses import next_token_loss
from gpt2mini.tokenizer import train_tokenizer

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--data", default=sample("sample.txt"), help="a text file")
parser.add_argument("--vocab-size", type=int, default=1024)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
device = pick_device()
out = Path("runs/pretrain")

# ---- the vocabulary: 256 bytes, then the most frequent pairs merged, then <|endoftext|>
text = Path(args.data).read_text(encoding="utf-8")
cut = text.rfind(" ", 0, int(0.9 * len(text)))
tokenizer: Tokenizer = train_tokenizer([text[:cut]], args.vocab_size)
tokens = torch.tensor(tokenizer.encode(text[:cut]), device=device)  # (training tokens)
print(f"{cut:,} characters are {len(tokens):,} tokens")

# ---- the model: GPT-2's shape, a hundredth of its size
shape = {"context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": args.layers}
config = GPT2Config(tokenizer.vocab_size, **shape)
model = GPT2(config).to(device)  # Normal(0, 0.02), residual projections / sqrt(2 * layers)
n_parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"{n_parameters:,} parameters; the loss of chance is {math.log(config.vocab_size):.2f} nats")

# ---- the optimizer: weight decay on matrices only (Brown et al. 2020, appendix B)
matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
peak_lr, warmup_steps = 2e-3, 20
optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95))

# ---- the loop
batch_size, window = 8, min(config.context_length, len(tokens))
for step in range(args.steps):
    # linear warm-up, then a cosine down to a tenth (Brown et al. 2020, appendix B)
    lr = peak_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / warmup_steps)
    starts = torch.randint(len(tokens) - window + 1, (batch_size,)).tolist()
    token_ids = torch.stack([tokens[start : start + window] for start in starts])  # (batch, tokens)

    optimizer.zero_grad()
    loss_sum, count = next_token_loss(model(token_ids), labels=token_ids)
    loss = loss_sum / count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()

    if step % 40 == 0 or step == args.steps - 1:
        written = complete(model, tokenizer, "The", 24, temperature=0.8)
        print(f"step {step:4}   loss {loss.item():.3f}   {written!r}")

found = perplexity(model, tokenizer, text[cut:])
print(f"\nheld out: perplexity {found.per_token:.1f}, {found.bits_per_byte:.3f} bits per byte\n")
print(complete(model, tokenizer, "Log of the", 80, temperature=0.8, top_k=50))
model.save_pretrained(out)
tokenizer.save_pretrained(out)
print(f"\nmodel: {out}   (python examples/generate.py --model {out})")
