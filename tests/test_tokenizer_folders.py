"""Tokenizer folders of every form: the ids of `AutoTokenizer`, before and after our save, or a
refusal that names the field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from gpt2mini import Tokenizer
from gpt2mini.tokenizer import END_OF_TEXT

NANO = Path(__file__).parents[1] / "weights" / "gpt2-nano"
SIZE, LAST = 8192, 8191  # of its vocabulary; <|endoftext|> is the last

TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello world ",
    "  two  spaces\n\nand lines\t\ttabs \r\n",
    "<|user|> Hello<|assistant|>  Hi there <|endoftext|>",
    "<|user|><|user|><|endoftext|><|endoftext|>",
    "a<|user|>b <|user|> c\t<|user|>\nd\u00a0<|user|>\u2003e\x1c<|user|>\x1ff",
    "<|user|<|user|>|><|user",
    "<|USER|> <|user |>",
    "lighthouse-keeper lighthouse-keepers xlighthouse-keeper the lighthouse-keeper.",
    "lighthouse-keeper\u0301 _lighthouse-keeper lighthouse-keeper1 lighthouse-keeper½ ⒶＡ",
    "½lighthouse-keeper² lighthouse-keeper\u200d Ⓐlighthouse-keeperⒶ é lighthouse-keeper_",
    "light lighthouse lighthouse- lighthouse-keeperlighthouse-keeper",
    "[PAD][PAD] [PAD]x [pad] [MASK] [MASK]. the [MASK]  was",
    "ab abc abcd abcde bcd abab cabcd",
    "the old man's the  the\tthe",
    "Hello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n",
    "naïve café 中文 👨\u200d👩 العربية <é> é",
    "<s>a</s> <unk>",
    "　<|user|>　全角　",
    " <|user|>",
    "<|user|> ",
    "\n<|user|>\n\n x",
    "don't they'll we've 'tis I'd",
    "x" * 50 + "<|user|>" + " " * 50,
]


def write(folder: Path, name: str, contents: Any) -> None:
    text = contents if isinstance(contents, str) else json.dumps(contents, ensure_ascii=False)
    (folder / name).write_text(text, encoding="utf-8")


def change(folder: Path, name: str, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path = folder / name
    write(folder, name, json.loads(path.read_text("utf-8")) | fields)


def slow(folder: Path, **config: Any) -> Path:
    """vocab.json and merges.txt, as transformers 4 wrote them for a slow tokenizer."""
    for name in ("vocab.json", "merges.txt", "config.json"):
        write(folder, name, (NANO / name).read_text("utf-8"))
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **config})
    return folder


def fast(folder: Path, kind: type = GPT2Tokenizer, **options: Any) -> Any:
    """A tokenizer of `transformers` that is to be saved into the folder."""
    write(folder, "config.json", (NANO / "config.json").read_text("utf-8"))
    if kind is GPT2Tokenizer:
        return GPT2Tokenizer.from_pretrained(NANO, **options)
    inner = GPT2Tokenizer.from_pretrained(NANO).backend_tokenizer
    names = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    return kind(tokenizer_object=inner, **(names | options))


def token(content: str, **flags: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, **flags}
    special = flags.get("special", True)
    return {"content": content, "normalized": not special, "special": special, **flags}


# ---- folders that are obeyed


def published(folder: Path) -> None:
    slow(folder)


def no_config(folder: Path) -> None:
    slow(folder)
    (folder / "tokenizer_config.json").unlink()


def chat_tokens(folder: Path) -> None:
    theirs = fast(folder)
    special = {"additional_special_tokens": ["<|user|>", "<|assistant|>"], "pad_token": "[PAD]"}
    theirs.add_special_tokens(special)
    theirs.save_pretrained(folder)


def chat_and_ordinary_tokens(folder: Path) -> None:
    theirs = fast(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"], "pad_token": "[PAD]"})
    theirs.add_tokens(["lighthouse-keeper", "ab", "abcd", "bcd", "<é>", "é", "the"])
    theirs.save_pretrained(folder)


def chatml(folder: Path) -> None:
    theirs = fast(folder)
    theirs.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    )
    theirs.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% endfor %}"
    theirs.save_pretrained(folder)


def template_in_config(folder: Path) -> None:
    slow(folder, chat_template="{{ messages }}")


def several_templates(folder: Path) -> None:
    theirs = fast(folder)
    theirs.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    theirs.save_pretrained(folder)


def flags(**given: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        theirs = fast(folder)
        contents = ["<|user|>", "[MASK]", "lighthouse-keeper", "the", "ab"]
        theirs.add_tokens([AddedToken(content, **given) for content in contents])
        theirs.save_pretrained(folder)

    return make


def mixed_flags(folder: Path) -> None:
    theirs = fast(folder)
    theirs.add_tokens(
        [
            AddedToken("<|user|>", special=True, rstrip=True, normalized=False),
            AddedToken("[MASK]", special=True, lstrip=True, normalized=True),
            AddedToken("lighthouse-keeper", single_word=True),
            AddedToken("lighthouse-", normalized=False),
            AddedToken("ab", normalized=True),
            AddedToken("abcd", normalized=False, special=True),
            AddedToken(" c", normalized=True),
        ]
    )
    theirs.save_pretrained(folder)


def prefix_space(folder: Path) -> None:
    theirs = fast(folder, add_prefix_space=True)
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    theirs.save_pretrained(folder)


def slow_prefix_space(folder: Path) -> None:
    slow(folder, add_prefix_space=True)


def general_class(folder: Path) -> None:
    theirs = fast(folder, PreTrainedTokenizerFast, pad_token="[PAD]")
    theirs.add_tokens(["lighthouse-keeper"])
    theirs.save_pretrained(folder)


def general_class_with_prefix_space(folder: Path) -> None:
    theirs = fast(folder, PreTrainedTokenizerFast)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    theirs.backend_tokenizer.pre_tokenizer = byte_level
    theirs.save_pretrained(folder)


def truncation_and_padding(folder: Path) -> None:
    theirs = fast(folder)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.backend_tokenizer.enable_truncation(3)
    theirs.backend_tokenizer.enable_padding(length=10, pad_token="[PAD]", pad_id=SIZE)
    theirs.save_pretrained(folder)


def byte_level_post_processor(folder: Path) -> None:
    fast(folder).save_pretrained(folder)
    processor = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    change(folder, "tokenizer.json", post_processor=processor)


def no_post_processor(folder: Path) -> None:
    fast(folder).save_pretrained(folder)
    change(folder, "tokenizer.json", post_processor=None, decoder=None)


def added_tokens_file(folder: Path) -> None:
    slow(folder, pad_token="[PAD]")
    write(folder, "added_tokens.json", {"[PAD]": SIZE, "lighthouse-keeper": SIZE + 1})


def special_tokens_map_file(folder: Path) -> None:
    slow(folder)
    write(folder, "added_tokens.json", {"[PAD]": SIZE, "<|user|>": SIZE + 1})
    write(
        folder,
        "special_tokens_map.json",
        {
            "mask_token": "<|user|>",
            "eos_token": {
                "content": END_OF_TEXT,
                "lstrip": False,
                "normalized": True,
                "rstrip": False,
                "single_word": False,
            },
            "pad_token": "[PAD]",
        },
    )


def added_tokens_decoder(folder: Path) -> None:
    slow(
        folder,
        added_tokens_decoder={
            str(LAST): token(END_OF_TEXT, normalized=True),
            str(SIZE): token("[PAD]"),
            str(SIZE + 1): token("<|user|>", rstrip=True),
            str(SIZE + 2): token("lighthouse-keeper", special=False, single_word=True),
        },
        additional_special_tokens=["<|user|>"],
        pad_token="[PAD]",
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=True,
        errors="replace",
        model_max_length=1024,
        add_bos_token=False,
    )
    names = {"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]}
    write(folder, "special_tokens_map.json", names)
    write(
        folder,
        "added_tokens.json",
        {"[PAD]": SIZE, "<|user|>": SIZE + 1, "lighthouse-keeper": SIZE + 2},
    )


def all_forms(folder: Path) -> None:
    """As transformers 4 saved a fast tokenizer: every file, saying the same."""
    chat_and_ordinary_tokens(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    decoder = {str(one["id"]): {**one} for one in added}
    for one in decoder.values():
        del one["id"]
    slow(folder, **config, added_tokens_decoder=decoder)
    names = {key: value for key, value in config.items() if key.endswith("_token")}
    write(folder, "special_tokens_map.json", names | {"additional_special_tokens": ["<|user|>"]})
    new = {one["content"]: one["id"] for one in added if one["id"] >= SIZE}
    write(folder, "added_tokens.json", new)


def names_without_ids(folder: Path) -> None:
    slow(folder, additional_special_tokens=["<|user|>", "the"], pad_token="[PAD]", sep_token="ab")


def names_of_other_kinds(folder: Path) -> None:
    slow(
        folder,
        cls_token={"__type": "AddedToken", **token("[MASK]", lstrip=True)},
        image_token="<|assistant|>",
        extra_special_tokens={"user_token": "<|user|>"},
        bos_token=None,
    )


def gap_in_the_vocabulary(folder: Path) -> None:
    slow(folder)
    vocab = json.loads((NANO / "vocab.json").read_text("utf-8"))
    write(folder, "vocab.json", {**vocab, END_OF_TEXT: LAST + 5})


def unused_word_in_the_vocabulary(folder: Path) -> None:
    slow(folder)
    vocab = json.loads((NANO / "vocab.json").read_text("utf-8"))
    write(folder, "vocab.json", {**vocab, "<|user|>": SIZE})


OBEYED = [
    published,
    no_config,
    chat_tokens,
    chat_and_ordinary_tokens,
    chatml,
    template_in_config,
    several_templates,
    mixed_flags,
    prefix_space,
    slow_prefix_space,
    general_class,
    general_class_with_prefix_space,
    truncation_and_padding,
    byte_level_post_processor,
    no_post_processor,
    added_tokens_file,
    special_tokens_map_file,
    added_tokens_decoder,
    all_forms,
    names_without_ids,
    names_of_other_kinds,
    gap_in_the_vocabulary,
    unused_word_in_the_vocabulary,
    *[
        pytest.param(flags(**{name: True}, special=special), id=f"{name}-special-{special}")
        for name in ("lstrip", "rstrip", "single_word", "normalized")
        for special in (True, False)
    ],
]


def their_ids(theirs: Any, text: str, allow_special: bool) -> list[int]:
    split = not allow_special
    return theirs(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]


def facts(theirs: Any) -> dict[str, Any]:
    """What must be the same after our save."""
    return {
        "class": type(theirs).__name__,
        "map": theirs.special_tokens_map,
        "further": theirs.extra_special_tokens,
        "pad": theirs.pad_token_id,
        "added": {i: repr(added) for i, added in theirs.added_tokens_decoder.items()},
        "template": theirs.chat_template,
        "ids": [theirs(text)["input_ids"] for text in TEXTS],
        "longest": theirs.model_max_length,
    }


@pytest.mark.parametrize("make", OBEYED)
def test_ids_and_save_are_those_of_transformers(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder, saved = tmp_path / "given", tmp_path / "saved"
    folder.mkdir()
    make(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    for text in TEXTS:
        for allow_special in (True, False):
            expected = their_ids(theirs, text, allow_special)
            assert ours.encode(text, allow_special) == expected, (text, allow_special)
            assert ours.encode_to_numpy(text, allow_special).tolist() == expected
    assert (ours.pad_id, ours.bos_id) == (theirs.pad_token_id, theirs.bos_token_id)
    assert ours.eos_id == theirs.eos_token_id
    for added_id, added in theirs.added_tokens_decoder.items():
        assert ours.vocab[added.content] == added_id
        # The vocabulary has an "é" of its own, which stands for a byte and not for this letter.
        assert added.content == "é" or ours.decode([added_id]) == added.content
    ours.save_pretrained(saved)
    write(saved, "config.json", (NANO / "config.json").read_text("utf-8"))
    assert facts(AutoTokenizer.from_pretrained(saved)) == facts(theirs)
    again = Tokenizer.from_pretrained(saved)
    assert [again.encode(t, True) for t in TEXTS] == [ours.encode(t, True) for t in TEXTS]


def test_a_special_token_that_only_the_map_lists_is_special(tmp_path: Path) -> None:
    """As for transformers 4; transformers 5 finds it in any text."""
    slow(tmp_path)
    write(tmp_path, "added_tokens.json", {"<|user|>": SIZE})
    write(tmp_path, "special_tokens_map.json", {"additional_special_tokens": ["<|user|>"]})
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == their_ids(theirs, text, True)
        assert SIZE not in ours.encode(text)


# ---- folders that are refused


def with_json(**fields: Any) -> Callable[[Path], None]:
    """A folder of tokenizer.json and its config, with other fields in tokenizer.json."""

    def make(folder: Path) -> None:
        fast(folder).save_pretrained(folder)
        change(folder, "tokenizer.json", **fields)

    return make


def with_model(**fields: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        fast(folder).save_pretrained(folder)
        model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
        change(folder, "tokenizer.json", model=model | fields)

    return make


def with_config(**fields: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        slow(folder, **fields)

    return make


def with_files(**files: Any) -> Callable[[Path], None]:
    """All forms, saying the same, but for some whole files."""

    def make(folder: Path) -> None:
        all_forms(folder)
        for stem, contents in files.items():
            write(folder, f"{stem}.json", contents)

    return make


def bos_template(folder: Path) -> None:
    theirs = fast(folder)
    theirs.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, LAST)]
    )
    theirs.save_pretrained(folder)


def other_vocabulary(folder: Path) -> None:
    fast(folder).save_pretrained(folder)
    config = (folder / "tokenizer_config.json").read_text("utf-8")
    slow(folder)
    write(folder, "tokenizer_config.json", config)
    vocab = json.loads((NANO / "vocab.json").read_text("utf-8"))
    write(folder, "vocab.json", {**vocab, "a": vocab["b"], "b": vocab["a"]})


def prefix_space_contradicted(folder: Path) -> None:
    prefix_space(folder)
    change(folder, "tokenizer_config.json", add_prefix_space=False)


def prefix_space_of_the_json_alone(folder: Path) -> None:
    prefix_space(folder)
    (folder / "tokenizer_config.json").unlink()


def decoder_without_the_map(folder: Path) -> None:
    added_tokens_decoder(folder)
    write(folder, "special_tokens_map.json", {"mask_token": "[PAD]"})


def flags_contradicted(folder: Path) -> None:
    all_forms(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config[DECODER][str(SIZE)]["lstrip"] = True
    write(folder, "tokenizer_config.json", config)


def another_id(folder: Path) -> None:
    slow(folder)
    write(folder, "added_tokens.json", {"[PAD]": SIZE + 7})


def named_but_not_special(folder: Path) -> None:
    slow(folder, pad_token="[PAD]", added_tokens_decoder={str(SIZE): token("[PAD]", special=False)})


DECODER = "added_tokens_decoder"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
REFUSED = [
    (with_json(normalizer={"type": "NFC"}), "tokenizer.json: normalizer"),
    (with_json(normalizer={"type": "Lowercase"}), "tokenizer.json: normalizer.*normalize the"),
    (with_json(pre_tokenizer=None), "tokenizer.json: pre_tokenizer"),
    (with_json(pre_tokenizer={"type": "Whitespace"}), "tokenizer.json: pre_tokenizer"),
    (with_json(pre_tokenizer={**BYTE_LEVEL, "use_regex": False}), "tokenizer.json: pre_tokenizer"),
    (with_json(pre_tokenizer="ByteLevel"), "tokenizer.json: pre_tokenizer"),
    (bos_template, "tokenizer.json: post_processor.*allow_special=True"),
    (
        with_json(post_processor={"type": "RobertaProcessing", "sep": ["x", 1], "cls": ["y", 2]}),
        "tokenizer.json: post_processor",
    ),
    (with_json(decoder={"type": "WordPiece"}), "tokenizer.json: decoder"),
    (with_json(surprise={"ids": "other"}), "tokenizer.json: surprise"),
    (with_model(dropout=0.1), "tokenizer.json: dropout"),
    (with_model(ignore_merges=True), "tokenizer.json: ignore_merges"),
    (with_model(byte_fallback=True), "tokenizer.json: byte_fallback"),
    (with_model(end_of_word_suffix="</w>"), "tokenizer.json: end_of_word_suffix"),
    (with_model(type="WordPiece"), 'tokenizer.json: type is "WordPiece"'),
    (with_model(type="Unigram"), 'tokenizer.json: type is "Unigram"'),
    (with_config(add_bos_token=True), "tokenizer_config.json: add_bos_token.*set it to false"),
    (with_config(add_eos_token=True), "tokenizer_config.json: add_eos_token"),
    (with_config(split_special_tokens=True), "tokenizer_config.json: split_special_tokens"),
    (with_config(tokenizer_class="LlamaTokenizer"), 'tokenizer_class is "LlamaTokenizer"'),
    (with_config(tokenizer_class="BertTokenizerFast"), 'tokenizer_class is "BertTokenizerFast"'),
    (with_config(do_lower_case=True), "tokenizer_config.json: do_lower_case"),
    (with_config(auto_map={"AutoTokenizer": ["x.Y", None]}), "tokenizer_config.json: auto_map"),
    (with_files(special_tokens_map={"eos_token": "[PAD]"}), "contradict each other.*eos_token"),
    (with_files(special_tokens_map={"surprise": 1}), "special_tokens_map.json: surprise"),
    (with_files(added_tokens={"[PAD]": SIZE + 1}), r"contradict each other about '\[PAD\]'"),
    (with_files(added_tokens={"<new>": SIZE + 9}), "contradict each other about '<new>'"),
    (with_files(tokenizer_config=[]), "tokenizer_config.json is damaged"),
    (with_files(added_tokens={"[PAD]": "7"}), "contradict each other"),
    (with_config(added_tokens_decoder={"x": token("[PAD]")}), "invalid literal|no list of tokens"),
    (with_config(added_tokens_decoder=["[PAD]"]), "tokenizer_config.json: added_tokens_decoder"),
    (with_config(additional_special_tokens=[7]), "no list of tokens: 7"),
    (with_json(added_tokens={"[PAD]": SIZE}), "tokenizer.json: added_tokens"),
    (with_json(added_tokens=["[PAD]"]), "tokenizer.json: added_tokens"),
    (with_model(merges=None), "tokenizer.json: merges"),
    (with_model(merges=["a"]), "tokenizer.json is damaged: expected two pieces"),
    (with_config(added_tokens_decoder={"9": {"text": "[PAD]"}}), "no list of tokens"),
    (other_vocabulary, "another vocabulary than tokenizer.json"),
    (prefix_space_contradicted, "add_prefix_space is False"),
    (prefix_space_of_the_json_alone, "add_prefix_space is False"),
    (decoder_without_the_map, "contradict each other about 'mask_token'"),
    (flags_contradicted, "contradict each other about"),
    (another_id, r"'\[PAD\]' has the id 8199, but transformers gives it 8192"),
    (named_but_not_special, r"'\[PAD\]' is named as a special token"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_obeyed_is_refused_by_name(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_of_another_kind_of_tokenizer_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is of another kind"):
        Tokenizer.from_pretrained(tmp_path)


# ---- files as they come


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all_forms")
    all_forms(folder)
    return folder


JSON_FILES = ["vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"]


@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.json"])
def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(
    name: str, every_form: Path, tmp_path: Path
) -> None:
    shutil.copytree(every_form, tmp_path, dirs_exist_ok=True)
    before = Tokenizer.from_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    after = Tokenizer.from_pretrained(tmp_path)
    assert (after.vocab, after.merges) == (before.vocab, before.merges)
    after.save_pretrained(tmp_path)  # without the mark, which transformers does not take
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[5])["input_ids"] == before.encode(TEXTS[5], allow_special=True)


@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.json"])
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><head>", "is a web page"),
        (b"\n  <html lang='en'>", "is a web page"),
    ],
    ids=["LFS", "HTML", "html"],
)
def test_what_stands_in_the_place_of_a_file_is_named(
    name: str, contents: bytes, message: str, every_form: Path, tmp_path: Path
) -> None:
    shutil.copytree(every_form, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        Tokenizer.from_pretrained(tmp_path)


def test_saving_removes_the_files_of_another_tokenizer(tmp_path: Path) -> None:
    several_templates(tmp_path)
    Tokenizer.from_pretrained(NANO).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"vocab.json", "merges.txt", "tokenizer_config.json", "config.json"}
