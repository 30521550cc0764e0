"""Generate text: the sampling loop, first by hand, then as the library does it.

A language model gives the probabilities of the next token. To write, draw one, append it, ask
again. The rules that make the draw less random: temperature, top-k (Fan et al. 2018, "Hierarchical
Neural Story Generation"), top-p (Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration").

    python examples/generate.py
    python examples/generate.py --prompt "It was a dark night" --temperature 0.7
    python examples/generate.py --model runs/finetune_text/best

Prints a continuation from the loop below; one from `generate`, the same loop with a cache of keys
and values, several times as fast; and two by top-p.
"""

import argparse
import time

import torch

from gpt2mini import GPT2, Tokenizer, generate
from gpt2mini.device import pick_device
from gpt2mini.generation import stream

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--prompt", default="The old man looked at", help="text to continue")
parser.add_argument("--tokens", type=int, default=60, help="tokens to generate")
parser.add_argument("--temperature", type=float, default=0.8, help="above 0; 1: as learned")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
device = pick_device()
tokenizer = Tokenizer.from_pretrained(args.model)
model = GPT2.from_pretrained(args.model, device=device).eval()
prompt_ids = torch.tensor([tokenizer.encode(args.prompt)], device=device)  # (1, tokens)
top_k = 50
missing = tokenizer.missing_ids(model.config.vocab_size)  # ids of a padded vocabulary: no tokens

# ---- by hand: the whole text goes through the model for every new token
torch.manual_seed(args.seed)
token_ids = prompt_ids
began = time.perf_counter()
with torch.no_grad():
    for _ in range(args.tokens):
        logits = model(token_ids)[:, -1] / args.temperature  # (1, vocab): below 1, bolder
        logits[:, missing] = float("-inf")
        kth_largest = logits.topk(top_k).values[:, -1:]  # (1, 1)
        logits = logits.masked_fill(logits < kth_largest, float("-inf"))
        next_id = torch.multinomial(logits.softmax(dim=1), num_samples=1)  # (1, 1)
        token_ids = torch.cat([token_ids, next_id], dim=1)  # (1, tokens + 1)
seconds = time.perf_counter() - began
print(f"--- the loop by hand: {args.tokens / seconds:.0f} tokens a second")
print(tokenizer.decode(token_ids[0].tolist()))

# ---- generate: keys and values of earlier tokens are kept, only the new one is computed
began = time.perf_counter()
sampling = {"temperature": args.temperature, "top_k": top_k, "forbidden_ids": missing}
out = generate(model, prompt_ids, args.tokens, **sampling)
seconds = time.perf_counter() - began
print(f"\n--- generate, with a key/value cache: {args.tokens / seconds:.0f} tokens a second")
print(tokenizer.decode(out.token_ids[0].tolist()))
perplexity = out.logprobs[out.response_mask].mean().neg().exp()
print(f"perplexity of its own text under the model: {perplexity:.1f}")

# ---- stream: text piece by piece, until <|endoftext|>
for number in range(2):
    print(f"\n--- sample {number + 1}, top-p 0.9")
    print(args.prompt, end="")
    for piece in stream(
        model, tokenizer, args.prompt, args.tokens, temperature=args.temperature, top_p=0.9
    ):
        print(piece, end="", flush=True)
    print()
