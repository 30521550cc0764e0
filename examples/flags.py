"""What all examples share: one vocabulary of flags, and errors without a traceback."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLE_TEXT = Path(__file__).parent / "data" / "sample.txt"


def common_flags(description: str | None, out: str | None = None) -> argparse.ArgumentParser:
    """A parser with the flags of every example; scripts that write pass a default for --out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    if out is not None:
        parser.add_argument("--out", default=out, help=f"folder for results (default {out})")
        parser.add_argument(
            "--dtype",
            default="auto",
            choices=["auto", "fp32", "bf16"],
            help="of matrix products; auto: bf16 where the device gains from it (default auto)",
        )
    return parser


def run(main: Callable[[], None]) -> None:
    """Run a script's main; what the user can mend is said in one line."""
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def draw_losses(out: Path, title: str, unit: str = "nats per token") -> None:
    """Draw `out`/loss.png if matplotlib is installed; otherwise say how to get it."""
    from gpt2mini.inspection import plot_losses

    try:
        plot_losses(out / "metrics.jsonl", out / "loss.png", title, unit)
    except ImportError as error:
        print(f"(no loss curve: {error})")
    else:
        print(f"loss curve: {out / 'loss.png'}")


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
