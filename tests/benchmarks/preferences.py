"""Speed of DPO and of PPO's rollouts: gpt2mini beside trl on transformers, in one run.

    python tests/benchmarks/preferences.py                 # GPT-2 124M
    python tests/benchmarks/preferences.py --layers 1 --steps 1 --pairs 2 --new-tokens 4   # a try

Both give a GPT-2 of the same size, from random weights and without dropout, the same pairs (of
--data) and the same prompts, in float32, in a process of its own for each measurement.

DPO is a training step of fused AdamW on all weights. trl computes the reference again in every step
(its default) or once for the whole data set ("once"); gpt2mini always once. Where it is computed
once, the time for that is in the figure, shared out over three epochs. trl's step is its own
DPOTrainer's, from the beginning of a step to its end.

A rollout is sampling at temperature 1 and the log-probabilities of all sampled tokens under policy
and reference. trl 1.16 has no PPOTrainer any more, so the other side is spelled out: `generate`
of transformers, which also gives the policy's logits, a forward pass of the reference, and trl's
own `selective_log_softmax`. gpt2mini takes the policy's log-probabilities from generation too, as
it does in float32; "again" reads the responses a second time for them (RolloutSettings.read_again).
With --samples 8 eight responses to each prompt are sampled, as GRPO does; gpt2mini then reads each
prompt once, transformers eight times.

Needs transformers, trl and what trl needs (`datasets`, `accelerate`); says so where they are
missing.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measuring import transformers_model

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.data.samples import sample
from gpt2mini.preferences.pairs import Preference, encode_preferences, pad_pairs, read_preferences

SAMPLE = sample("preferences.jsonl")
EPOCHS = 3  # over which the time for a reference that is computed once is shared out
WORKERS = {
    "DPO, pairs/s": ("dpo-trl", "dpo-trl-once", "dpo-gpt2mini"),
    "rollouts, new tokens/s": ("rollouts-trl", "rollouts-gpt2mini-again", "rollouts-gpt2mini"),
}


def main() -> None:
    args = parse_arguments()
    if args.worker:
        work = {"dpo-gpt2mini": our_dpo, "rollouts-gpt2mini": our_rollouts}
        work["rollouts-gpt2mini-again"] = our_rollouts
        work |= {"dpo-trl": their_dpo, "dpo-trl-once": their_dpo, "rollouts-trl": their_rollouts}
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        print(json.dumps(work[args.worker](args)))
        return
    missing = [name for name in ("transformers", "trl", "datasets") if find_spec(name) is None]
    if missing:
        sys.exit(f"nothing to compare with: {', '.join(missing)} not installed (pip install trl)")
    print(
        f"{args.size}, {args.threads} threads; DPO: {args.pairs} pairs a step; rollouts: "
        f"{args.rows} responses of {args.new_tokens} tokens, {args.samples} to each prompt of "
        f"{args.prompt_tokens}"
    )
    for task, workers in WORKERS.items():
        speeds = {worker: measure_in_own_process(worker) for worker in workers}
        print(f"\n{task}")
        for worker, speed in speeds.items():
            ratio = speeds[workers[-1]] / speed
            print(f"{worker:24}{speed:10.2f}   gpt2mini / this: {ratio:.2f} x", flush=True)


def measure_in_own_process(worker: str) -> float:
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", worker]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return float(json.loads(done.stdout.splitlines()[-1]))


def config_of(args: argparse.Namespace) -> GPT2Config:
    config = GPT2Config.from_name(args.size)
    return dataclasses.replace(config, n_layers=args.layers or config.n_layers)


def their_model(args: argparse.Namespace) -> Any:
    return transformers_model(config_of(args), use_cache=True)  # which `generate` needs


def median_seconds(step: Callable[[int], object], steps: int) -> float:
    """Of some steps, after one to warm up."""
    seconds = []
    for i in range(steps + 1):
        began = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


# ---- DPO


def some_pairs(args: argparse.Namespace) -> list[Preference]:
    """As many pairs as all steps need, the data over and over if they are too few."""
    pairs = read_preferences(args.data)
    return (pairs * args.pairs * (args.steps + 1))[: args.pairs * (args.steps + 1)]


def our_dpo(args: argparse.Namespace) -> float:
    from gpt2mini.preferences.dpo import dpo_step, with_reference
    from gpt2mini.training import adamw, recompute_activations

    model = GPT2(config_of(args))
    pairs = encode_preferences(
        some_pairs(args), Tokenizer.from_pretrained("gpt2-nano"), args.longest
    )
    began = time.perf_counter()
    pairs = with_reference(pairs, model, precision="fp32")
    for_reference = (time.perf_counter() - began) / len(pairs) / EPOCHS  # seconds per pair
    optimizer = adamw(model, lr=1e-6)

    def step(i: int) -> None:
        with recompute_activations():
            loss_sum, count = dpo_step(model, pad_pairs(pairs[i * args.pairs :][: args.pairs]))
        (loss_sum / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return 1 / (median_seconds(step, args.steps) / args.pairs + for_reference)


def their_dpo(args: argparse.Namespace) -> float:
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    once = args.worker.endswith("once")
    rows = [json.dumps(dataclasses.asdict(pair)) for pair in some_pairs(args)]
    seconds: list[float] = []
    reference_seconds = [0.0]

    class Trainer(DPOTrainer):
        def _precompute_ref_logps(self, *arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments, **more)
            reference_seconds.append(time.perf_counter() - began)
            return found

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] = time.perf_counter() - seconds[-1]

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        data.write_text("\n".join(rows), encoding="utf-8")
        Tokenizer.from_pretrained("gpt2-nano").save_pretrained(folder)
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        settings = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.pairs,
            max_steps=args.steps + 1,
            max_length=args.longest,
            precompute_ref_log_probs=once,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=their_model(args),
            ref_model=None if once else their_model(args),
            args=settings,
            train_dataset=Dataset.from_json(str(data), cache_dir=folder),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    if once and len(reference_seconds) == 1:
        raise RuntimeError("this trl computes its reference elsewhere: the time was not seen")
    for_reference = sum(reference_seconds) / len(rows) / EPOCHS  # seconds per pair
    return 1 / (statistics.median(seconds[1:]) / args.pairs + for_reference)


# ---- rollouts


def our_rollouts(args: argparse.Namespace) -> float:
    from gpt2mini.preferences.rollouts import RolloutSettings, roll_out

    model = GPT2(config_of(args))
    reference = copy.deepcopy(model)
    prompts = list(torch.randint(8000, (args.rows // args.samples, args.prompt_tokens)))
    settings = RolloutSettings(
        rows=args.rows,
        num_samples=args.samples,
        minibatch_rows=args.rows,
        max_new_tokens=args.new_tokens,
        precision="fp32",
        read_again=args.worker.endswith("again"),
    )

    def step(i: int) -> None:
        end = model.config.vocab_size - 1  # never sampled: no token ends a response
        roll_out(model, prompts, end, settings, reference, forbidden_ids=[end])

    return args.rows * args.new_tokens / median_seconds(step, args.steps)


@torch.no_grad()
def their_rollouts(args: argparse.Namespace) -> float:
    model = their_model(args).eval()
    reference = copy.deepcopy(model)
    prompts = torch.randint(8000, (args.rows // args.samples, args.prompt_tokens))
    mask = torch.ones_like(prompts)

    def step(i: int) -> None:
        found = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            num_return_sequences=args.samples,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            pad_token_id=50256,
            return_dict_in_generate=True,
            output_logits=True,
        )
        responses = found.sequences[:, args.prompt_tokens :]  # (rows, new)
        log_probabilities(torch.stack(found.logits, dim=1), responses)
        whole = torch.ones_like(found.sequences)
        logits = reference(found.sequences, attention_mask=whole).logits
        log_probabilities(logits[:, args.prompt_tokens - 1 : -1], responses)

    return args.rows * args.new_tokens / median_seconds(step, args.steps)


def log_probabilities(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, token_ids)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--layers", type=int, help="blocks (default: those of the size)")
    parser.add_argument("--data", default=SAMPLE, help="pairs: .jsonl (default: the sample)")
    parser.add_argument("--pairs", type=int, default=8, help="per DPO step (default 8)")
    parser.add_argument("--longest", type=int, default=512, help="tokens of prompt and answer")
    parser.add_argument("--rows", type=int, default=16, help="responses of a rollout (default 16)")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt, as in GRPO")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
