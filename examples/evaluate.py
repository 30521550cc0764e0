"""Evaluate a language model: perplexity, which of two endings it finds likelier, how it writes.

Three ways to measure without any training, as in Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 3: the perplexity of a text that the model has not seen;
multiple choice by likelihood, as in Zellers et al. 2019, "HellaSwag"; and figures of its own
writing (distinct-n: Li et al. 2016; repetition: Welleck et al. 2020).

    python examples/evaluate.py
    python examples/evaluate.py --model runs/finetune_text/best --text novel.txt

Prints the perplexity by hand and from the library, 50.52 both; how much more context helps, 48.75
with half a window before each token; and how often it finds the kinder of two answers likelier.
"""

import argparse
import math
from pathlib import Path

import torch

from gpt2mini import GPT2, Tokenizer, generate
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.evaluation import generation_quality, perplexity
from gpt2mini.losses import next_token_loss, sequence_logprobs
from gpt2mini.preferences.pairs import encode_preferences, pad_pairs, read_preferences

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--text", default=sample("general.txt"), help="a text file")
parser.add_argument("--pairs", type=int, default=40, help="pairs of answers to choose from")
parser.add_argument("--samples", type=int, default=4, help="texts to write")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
device = pick_device()
tokenizer = Tokenizer.from_pretrained(args.model)
model = GPT2.from_pretrained(args.model, device=device).eval()
torch.set_grad_enabled(False)

# ---- perplexity: exp of the mean negative log-likelihood of a token
text = Path(args.text).read_text(encoding="utf-8")
window = min(256, model.config.context_length)
# GPT-2 saw <|endoftext|> before every document: the first token is predicted from it
token_ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text)], device=device)
nats, scored = 0.0, 0
for start in range(0, len(token_ids) - 1, window - 1):
    part = token_ids[None, start : start + window]  # (1, tokens); overlaps the next by one token
    loss_sum, count = next_token_loss(model(part), labels=part)
    nats, scored = nats + float(loss_sum), scored + int(count)
print(f"perplexity of {Path(args.text).name} ({scored:,} tokens), windows of {window} tokens")
print(f"  by hand                       {math.exp(nats / scored):.2f} per token")
# a window that moves on by fewer tokens than it holds gives each token more context
for stride in (window - 1, window // 2):
    found = perplexity(model, tokenizer, text, context_length=window, stride=stride)
    print(f"  library, stride {stride:3}           {found.per_token:.2f} per token, ", end="")
    print(f"{found.per_word:.1f} per word, {found.bits_per_byte:.3f} bits per byte")

# ---- multiple choice: which ending is likelier, given the same beginning?
pairs = read_preferences(sample("preferences.jsonl"))[: args.pairs]
batch = pad_pairs(encode_preferences(pairs, tokenizer, model.config.context_length)).to(device)
logprobs, lengths = sequence_logprobs(
    model, batch.token_ids, batch.attention_mask, batch.response_mask
)  # (2 * pairs) each: the chosen answers, then the rejected ones
for name, scores in (("sum", logprobs), ("mean per token", logprobs / lengths)):
    chosen, rejected = scores.chunk(2)
    share = (chosen > rejected).float().mean()
    print(f"finds the kinder of two answers likelier, {name}: {share:.0%} of {len(pairs)}")

# ---- its own writing
eos = torch.tensor([[tokenizer.eos_id]], device=device)
missing = tokenizer.missing_ids(model.config.vocab_size)  # of a padded vocabulary
out = generate(model, eos, 100, num_samples=args.samples, forbidden_ids=missing)
texts = [tokenizer.decode(row[1:].tolist()) for row in out.token_ids]
print(f"\nits own writing, temperature 1, begins: {texts[0][:120]!r}")
print(generation_quality(model, tokenizer, texts))
