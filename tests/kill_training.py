"""Kill a training run at random instants, let it go on each time, and compare what it ends with.

    python tests/kill_training.py --kills 50

The run has dropout, accumulation, AdamW and LoRA, and saves at every second step. It is killed with
SIGKILL, which no program can prepare for, at an instant drawn anew each time: while loading, in a
step, while saving. As often as it was killed it is started again with resume; when it comes to its
end, its weights must be those of a run that was left alone, bit for bit. Then the next run begins.
Linux and macOS only: processes are forked, so that none has to import torch again.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

# by the first run's saves, else; but it should not count as a run's time
import torch.distributed.checkpoint

from gpt2mini import GPT2, GPT2Config
from gpt2mini.data.text import TokenBatches
from gpt2mini.lora import add_lora, save_adapter
from gpt2mini.training import Settings, adamw, cosine, train

STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None, help="of the instants (default: new)")
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    instants = random.Random(seed)
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = args.folder or Path(tempfile.mkdtemp())

    began = time.perf_counter()
    wait(start(folder / "alone"))
    seconds = time.perf_counter() - began
    expected = torch.load(folder / "alone" / "weights.pt", weights_only=True)
    kills, runs = 0, 0
    while kills < args.kills:
        out = folder / f"run-{runs}"
        kills += finish(out, instants, seconds, args.kills - kills)
        found = torch.load(out / "weights.pt", weights_only=True)
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        if differing:
            sys.exit(f"run {runs} (seed {seed}) ended with other weights: {differing}")
        runs += 1
    print(f"{kills} kills in {runs} runs (seed {seed}): each ended with the same weights")


def finish(out: Path, instants: random.Random, seconds: float, most: int) -> int:
    """Start and kill a run until it gets to its end; how often it was killed."""
    kills = 0
    while True:
        child = start(out)
        if kills < most:
            time.sleep(instants.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        status = wait(child)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the run failed; see above"
            return kills
        kills += 1


def start(out: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(out)
            code = 0
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def run(out: Path) -> None:
    """What a user's script does, with --resume always given."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=211, context_length=32, emb_dim=48, n_heads=4, n_layers=2, drop_rate=0.1
    )
    model = GPT2(config)
    add_lora(model, rank=2, alpha=4, dropout=0.1, targets=("query", "value", "mlp_in"))
    tokens = torch.randint(211, (2000,), generator=torch.Generator().manual_seed(0)).numpy()
    losses = iter(range(1000, 0, -1))
    settings = Settings(
        steps=STEPS,
        schedule=partial(cosine, steps=STEPS, warmup_steps=2),
        accumulate=2,
        evaluate_every=6,
        save_every=2,
        progress=False,
    )
    train(
        model,
        TokenBatches(tokens, [range(2000)], 4, 32, seed=0),
        [adamw(model, lr=0.01)],
        settings,
        evaluate=lambda: float(next(losses)),
        out=out,
        resume=True,
        save=save_adapter,
    )
    aside = out / "weights.partial"
    torch.save(model.state_dict(), aside)
    aside.replace(out / "weights.pt")


if __name__ == "__main__":
    main()
