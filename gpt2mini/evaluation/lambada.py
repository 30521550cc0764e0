"""LAMBADA: predict the last word of a passage (Paperno et al. 2016).

The last word can be predicted from the whole passage, but not from its last sentence alone. There
are two versions of the 5,153 test passages: OpenAI's (JSONL, plain prose) and the original (one
passage a line, tokenized into words, lower case).
"""

from pathlib import Path

from gpt2mini.data.decoding import numbered_lines
from gpt2mini.data.records import Record
from gpt2mini.data.rows import is_file_of_records
from gpt2mini.evaluation.continuations import Continuation, score_continuations
from gpt2mini.evaluation.perplexity import exponential
from gpt2mini.evaluation.table import PAPER, Options, Row, percent
from gpt2mini.evaluation.task_files import read_examples
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer

# English stop words of the Snowball project (M. Porter, BSD license), also in NLTK.
SNOWBALL = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself
    she her hers herself it its itself they them their theirs themselves what which who whom this
    that these those am is are was were be been being have has had having do does did doing would
    should could ought a an the and but if or because as until while of at by for with about against
    between into through during before after above below to from up down in out on off over under
    again further then once here there when where why how all any both each few more most other some
    such no nor not only own same so than too very
"""
STOP_WORDS = frozenset(SNOWBALL.split())


def lambada(model: GPT2, tokenizer: Tokenizer, path: Path, options: Options) -> list[Row]:
    """Perplexity of the last word, and accuracy of greedy decoding.

    A word is correct if each of its tokens is the most likely one, given those before it. The
    stop-word filter ignores tokens that are a whole stop word (" the", " him") when it looks for
    the most likely first token. The paper (section 3.3) uses such a filter because the model often
    predicts words that cannot end a sentence; it publishes neither list nor rule. Its figures seem
    to be for the last token alone, which is easier for words of several tokens
    (github.com/EleutherAI/lm-evaluation-harness/issues/350).
    """
    passages = read_passages(path)[: options.limit]
    continuations = [Continuation.of(tokenizer, before, word) for before, word in passages]
    excluded = stop_word_ids(tokenizer)
    scores = score_continuations(
        model, continuations, excluded, options.precision, options.progress
    )
    word = -sum(score.logprob for score in scores) / len(scores)
    token = -sum(float(score.logprobs[-1]) for score in scores) / len(scores)
    hits = [all(score.is_likeliest) for score in scores]
    filtered = [
        score.first_is_likeliest_allowed and all(score.is_likeliest[1:]) for score in scores
    ]
    are_records = is_file_of_records(path)
    task = "LAMBADA" if are_records else "LAMBADA, original"
    form = "OpenAI's text" if are_records else "as in the file, tokenized into words"

    def row(metric: str, value: float, setting: str, paper: str) -> Row:
        setting = f"{setting}; {form}"
        return Row(task, metric, value, len(scores), "passages", setting, PAPER[paper])

    return [
        row("perplexity", exponential(word), "whole last word", "LAMBADA perplexity"),
        row("perplexity", exponential(token), "last token alone", "LAMBADA perplexity"),
        row("accuracy %", percent(hits), "whole word, no filter", "LAMBADA accuracy"),
        row("accuracy %", percent(filtered), "stop-word filter", "LAMBADA accuracy, filtered"),
    ]


def read_passages(path: Path) -> list[tuple[str, str]]:
    """(the text before the last word, a space and the last word) of each passage."""
    if is_file_of_records(path):
        return read_examples(path, read_passage)
    found = [divide(line, f"{path}, line {number}") for number, line in numbered_lines(path)]
    if not found:
        raise ValueError(f"{path} has no passage")
    return found


def read_passage(record: Record) -> tuple[str, str]:
    return divide(record.required_text("text"), record.place)


def divide(passage: str, place: str) -> tuple[str, str]:
    before, space, word = passage.rstrip().rpartition(" ")
    if not before.strip():
        raise ValueError(f"{place}: a passage needs a word before its last, not {passage!r}")
    return before, space + word


def stop_word_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of tokens that are a space and a whole stop word, in lower, title or upper case."""
    forms = (f" {form}" for word in STOP_WORDS for form in (word, word.capitalize(), word.upper()))
    encoded = (tokenizer.encode(form) for form in forms)
    return {ids[0] for ids in encoded if len(ids) == 1}
