"""python -m gpt2mini JOB: the command, for those who have no `gpt2mini` on their path."""

from gpt2mini.cli import main

if __name__ == "__main__":
    main()
