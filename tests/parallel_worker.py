"""What each of torchrun's processes does in `test_parallel`: train in several ways, leave files.

torchrun --standalone --nproc-per-node 2 tests/parallel_worker.py FOLDER
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parallel_rollouts import learn_from_rewards
from torch.optim import SGD, Optimizer

from gpt2mini import GPT2, GPT2Config
from gpt2mini.classification.frozen import (
    FrozenStream,
    LabeledBatches,
    evaluate_classes,
    last_token_step,
    texts_to_train_on,
)
from gpt2mini.data.instructions import EncodedExchange
from gpt2mini.data.text import TokenBatches
from gpt2mini.files import write_json
from gpt2mini.lora import add_lora
from gpt2mini.preferences.dpo import dpo_step, evaluate_dpo, with_reference
from gpt2mini.preferences.pairs import EncodedPreference, PreferenceBatches
from gpt2mini.preferences.reward_model import evaluate_rewards, give_reward_head, reward_step
from gpt2mini.training import Settings, adamw, cosine, evaluate_loss, train
from gpt2mini.training.distributed import (
    can_shard_on_cpu,
    get_rank,
    get_world_size,
    process_group,
    save_whole,
    shard,
)
from gpt2mini.training.optimizers import Muon

STEPS, STOP = 6, 3
TOKENS = torch.randint(211, (900,), generator=torch.Generator().manual_seed(1)).numpy()


def make_model(lora: bool = False, spread: bool = False) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=211, context_length=32, emb_dim=48, n_heads=4, n_layers=2))
    if lora:
        add_lora(model, rank=2, alpha=4, targets=("query", "mlp_in"))
    if spread:
        shard(model, "fp32")
    return model


def sgd(model: GPT2) -> Optimizer:
    return SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def run(
    model: GPT2,
    optimizer: Callable[[GPT2], Optimizer],
    batches_per_step: int,
    out: Path | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """The same training, whatever the number of processes: so many micro-batches a step in all."""
    arguments = {key: changes.pop(key) for key in ("resume", "save", "evaluate") if key in changes}
    settings = Settings(
        **{
            "steps": STEPS,
            "schedule": partial(cosine, steps=STEPS, warmup_steps=1),
            "accumulate": batches_per_step // get_world_size(),
            "precision": "fp32",
            "log_every": 1,
            "progress": False,
            **changes,
        }
    )
    batches = TokenBatches(TOKENS, [range(900)], 3, 32, seed=0)
    return train(model, batches, [optimizer(model)], settings, out=out, **arguments)


def validation_loss(model: GPT2) -> float:
    batches = TokenBatches(TOKENS, [range(300)], 2, 32, seed=1)
    return evaluate_loss(model, [next(iter(batches))], precision="fp32")


def main(folder: Path) -> None:
    for spread in (False, True) if can_shard_on_cpu() else (False,):
        classify(folder, spread)
        prefer("dpo", folder, spread)
        prefer("reward", folder, spread)
    for name, spread in (("ddp", False), ("fsdp", True)):
        if spread and not can_shard_on_cpu():
            continue
        learn_from_rewards(folder, name, spread)
        for lora in (False, True):
            model = make_model(lora, spread)
            once: dict[str, Any] = {"steps": 1, "max_grad_norm": 1e9, "schedule": lambda step: 1.0}
            run(model, sgd, 4, **once, activation_checkpointing=spread)
            save_whole(save_weights, model, folder / f"{name}{'-lora' * lora}.pt")

        model = make_model(spread=spread)
        run(model, muon, 4, steps=2)
        save_whole(save_weights, model, folder / f"{name}-muon.pt")

        model = make_model(spread=spread)
        arguments: dict[str, Any] = {
            "save_every": STOP,
            "evaluate": partial(validation_loss, model),
        }
        run(model, adam, 4, folder / name, steps=STOP, **arguments)

        model = make_model(spread=spread)
        arguments["evaluate"] = partial(validation_loss, model)
        run(model, adam, 4, folder / f"alone-then-{name}", resume=True, **arguments)
        save_whole(save_weights, model, folder / f"alone-then-{name}.pt")
        if spread:
            measure(model, folder)


def classify(folder: Path, spread: bool = False) -> None:
    """The last block and a head learn, the rest is computed once; not so in a model spread over the
    processes."""
    model = make_model().requires_grad_(False)
    model.trf_blocks[-1].requires_grad_(True)
    torch.manual_seed(0)
    model.out_head = torch.nn.Linear(48, 2)
    rows = [torch.from_numpy(TOKENS[i : i + 9 + i % 7]) for i in range(0, 160, 10)]
    if spread:
        shard(model, "fp32")
    data = texts_to_train_on(model, rows, [i % 2 for i in range(16)], "fp32")
    assert isinstance(data, FrozenStream) != spread
    file = folder / f"classifier-{get_world_size()}{'-spread' * spread}.pt"
    teach(model, LabeledBatches(data, 4, seed=0), last_token_step, file)
    write_figures(file, evaluate_classes(model, data, "fp32"))


def prefer(method: str, folder: Path, spread: bool = False) -> None:
    """DPO, or a reward model, on the same pairs."""
    rows = [torch.from_numpy(TOKENS[i : i + 9 + i % 7]) for i in range(0, 240, 10)]
    answers = [EncodedExchange(row, n_prompt=4) for row in rows]
    pairs = [EncodedPreference(*both) for both in zip(answers[::2], answers[1::2], strict=True)]
    model = make_model()
    step: Callable
    report: Callable
    if method == "reward":
        give_reward_head(model, torch.Generator().manual_seed(0))
        step, report = reward_step, evaluate_rewards
    else:
        pairs = with_reference(pairs, model, precision="fp32")
        step, report = dpo_step, partial(evaluate_dpo, precision="fp32")
    if spread:
        shard(model, "fp32")
    file = folder / f"{method}-{get_world_size()}{'-spread' * spread}.pt"
    teach(model, PreferenceBatches(pairs, 3, seed=0), step, file)
    write_figures(file, [report(model, pairs).loss])


def teach(model: GPT2, batches: Iterable[Any], step: Callable, file: Path) -> None:
    """Three steps of SGD, two micro-batches each; the weights go into the file."""
    settings = Settings(
        steps=3,
        schedule=lambda step: 1.0,
        accumulate=2 // get_world_size(),
        precision="fp32",
        progress=False,
    )
    learning = [p for p in model.parameters() if p.requires_grad]
    train(model, batches, [SGD(learning, lr=0.1)], settings, step)
    save_whole(save_weights, model, file)


def write_figures(file: Path, figures: Sequence[float]) -> None:
    if get_rank() == 0:
        write_json(file.with_name(f"{file.name}.json"), list(figures))


def adam(model: GPT2) -> Optimizer:
    return adamw(model, lr=0.01)


def muon(model: GPT2) -> Optimizer:
    """For the matrices of the blocks; nothing else learns."""
    return Muon(
        [p for p in model.trf_blocks.parameters() if p.ndim == 2], lr=0.02, precision="fp32"
    )


def save_weights(model: GPT2, path: Path) -> None:
    torch.save(dict(model.named_parameters()), path)


def measure(model: GPT2, folder: Path) -> None:
    """How many numbers of the model this process holds."""
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    (folder / f"held-{get_rank()}.txt").write_text(str(held), encoding="utf-8")


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]))
