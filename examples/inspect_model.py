"""Look inside GPT-2: the residual stream, the logit lens, attention heads, and an ablation.

A block adds to the residual stream what its attention and its MLP have found (Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits"). The logit lens reads the stream after every
block as if it were the last (nostalgebraist 2020). Induction heads continue a pattern that was seen
once (Olsson et al. 2022, "In-context Learning and Induction Heads").

    python examples/inspect_model.py
    python examples/inspect_model.py --model gpt2 --text "The capital of France is"

Prints what each block adds and what the model would say after it; the strongest previous-token and
induction heads; and how the prediction of a repeated text suffers without the strongest of them.
"""

import argparse

import torch

from gpt2mini import GPT2, Tokenizer
from gpt2mini.device import pick_device
from gpt2mini.inspection import head_scores, logit_lens, patched, trace
from gpt2mini.losses import next_token_loss

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--text", default="The old keeper lit the lamp. Then the old", help="to read")
parser.add_argument("--heads", type=int, default=4, help="heads to show, and to ablate")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
device = pick_device()
tokenizer = Tokenizer.from_pretrained(args.model)
model = GPT2.from_pretrained(args.model, device=device).eval()
token_ids = torch.tensor([tokenizer.encode(args.text)], device=device)  # (1, tokens)

# ---- the residual stream, and the logit lens on it: what would be said after each block?
activations = trace(model, token_ids)
missing = tokenizer.missing_ids(model.config.vocab_size)  # of a padded vocabulary
lens = logit_lens(model, token_ids, k=3, forbidden_ids=missing)
print(f"{args.text!r}, the last token: what each block adds, and the likeliest next tokens\n")
print("            attention   MLP   stream")
for layer, (ids, shares) in enumerate(zip(lens.token_ids, lens.probabilities, strict=True)):
    guesses = zip(ids[0, -1].tolist(), shares[0, -1].tolist(), strict=True)
    said = "  ".join(f"{tokenizer.decode([i])!r} {share:.0%}" for i, share in guesses)
    if layer == 0:  # layer 0 of the lens is the embedding
        print(f"embedding   {activations['embedding'][0, -1].norm():22.1f}   {said}")
        continue
    parts = [f"blocks.{layer - 1}.{part}" for part in ("attn_out", "mlp_out", "stream")]
    added, mlp, stream = (float(activations[part][0, -1].norm()) for part in parts)
    print(f"block {layer - 1:2}    {added:9.1f} {mlp:5.1f} {stream:6.1f}   {said}")

# ---- attention: each row is a distribution over the tokens so far
middle = model.config.n_layers // 2
attention = activations[f"blocks.{middle}.attention"]  # (1, heads, tokens, tokens)
print(f"\nwhere the last token looks in block {middle}")
for head, shares in enumerate(attention[0, :, -1]):
    best = shares.topk(min(3, len(shares)))
    looks = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    pieces = [f"{tokenizer.decode([int(token_ids[0, i])])!r} {share:.0%}" for i, share in looks]
    print(f"  head {head}   {'  '.join(pieces)}")

# ---- heads with a known job: scores on random tokens that are repeated
scores = head_scores(model, seed=args.seed)
print("\nthe share of its attention that goes where its kind looks (head 8.2: block 8, head 2)")
for kind in ("previous_token", "induction"):
    strongest = scores.strongest(kind, args.heads)
    shown = "  ".join(f"head {i}.{head}: {score:.2f}" for i, head, score in strongest)
    print(f"  {kind:15}", shown)

# ---- ablation: does the model need them to continue a repeated text?
once = torch.randint(model.config.vocab_size, (4, 32))
repeated = once.repeat(1, 2).to(device)  # (4, 64): the second half can be known from the first


@torch.no_grad()
def losses_of_halves() -> str:
    halves = zip(model(repeated).chunk(2, dim=1), repeated.chunk(2, dim=1), strict=True)
    (first, n), (second, _) = (next_token_loss(logits, token_ids) for logits, token_ids in halves)
    return f"{first / n:.2f} nats the first time, {second / n:.2f} the second"


print(f"\nloss on random tokens that are repeated: {losses_of_halves()}")
for kind in ("induction", "previous_token"):
    without = {f"blocks.{i}.head.{head}": 0.0 for i, head, _ in scores.strongest(kind, args.heads)}
    with patched(model, without):  # these heads add nothing
        print(f"  without the {len(without)} strongest {kind} heads: {losses_of_halves()}")
