"""Templates: the text around a prompt, and where the completion begins.

What is learned is the filled template and the completion after it, each exactly as it stands. A
space between them is there only if the template ends in one, as PLAIN does.
"""

import re

PLAIN = "Question: {prompt}\nAnswer: "
ALPACA = (  # Taori et al. 2023; the part in brackets is left out where a record has no input
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n[### Input:\n{input}\n\n]### Response:\n"
)
TEMPLATES = {"plain": PLAIN, "alpaca": ALPACA}

FIELDS = {"prompt", "instruction", "input", "system"}


def check_template(template: str) -> None:
    """Raise ValueError for a template without the prompt or its input, or with an unknown field."""
    fields = set(re.findall(r"\{(\w*)\}", template))
    holds_all = "prompt" in fields or fields >= {"instruction", "input"}
    if not holds_all or not fields <= FIELDS:
        raise ValueError(
            f"the template {template!r} must hold {{prompt}}, or {{instruction}} and {{input}}; "
            "it may hold {system}, and no other field"
        )


def fill(template: str, prompt: str, context: str = "", system: str = "") -> str:
    """Fill in the template. {prompt} is the instruction and, on the next line, the input; the
    system prompt precedes it all, unless {system} says where it belongs. A part in square brackets
    around {input} or {system} is left out where a record has none."""
    for name, value in (("input", context), ("system", system)):
        optional = rf"\[([^\[\]]*\{{{name}\}}[^\[\]]*)\]"
        template = re.sub(optional, r"\1" if value else "", template)
    if system and "{system}" not in template:
        template = "{system}\n\n" + template
    fields = {
        "instruction": prompt,
        "input": context,
        "system": system,
        "prompt": f"{prompt}\n{context}" if context and "{input}" not in template else prompt,
    }
    return re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], template)


def divide(template: str, filled: str, completion: str) -> tuple[str, str]:
    """(prompt, completion), which one after the other are the text to learn.

    Spaces at the end of the filled template begin the completion: GPT-2's tokens of words begin
    with their space, and "Answer: " followed by "yes" would be tokens that it has hardly ever seen.
    The template's own space is left out where the completion begins with white space.
    """
    prompt = filled.rstrip(" ")
    spaces = filled[len(prompt) :]
    if completion[:1].isspace():
        spaces = spaces.removesuffix(template[len(template.rstrip(" ")) :])
    return prompt, spaces + completion
