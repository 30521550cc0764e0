"""OpenAI's folders: read bit for bit as TensorFlow wrote them, and refused when damaged."""

import json
import re
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from conftest import random_ids
from fixtures.make_openai_folders import FOLDERS, shapes, values
from torch.testing import assert_close

from gpt2mini import GPT2
from gpt2mini.checkpoints import CheckpointError
from gpt2mini.checkpoints.tensorflow import masked_crc32c, read_bundle, read_table

FIXTURES = Path(__file__).parent / "fixtures"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(FIXTURES / "openai-tiny", tmp_path / "openai-tiny")


def variable(folder: str, name: str) -> torch.Tensor:
    """What TensorFlow was given, without the leading axis of 1."""
    shape = shapes(FOLDERS[folder])[name]
    array = torch.from_numpy(values(name, shape))
    return array[0] if array.ndim == 3 else array


# ---- whole files


@pytest.mark.parametrize("name", FOLDERS)
def test_every_variable_is_read_bit_for_bit(name: str) -> None:
    tensors = read_bundle(FIXTURES / name / INDEX)
    for variable_name, shape in shapes(FOLDERS[name]).items():
        found = tensors[variable_name]
        assert found.shape == shape
        assert np.array_equal(found.read().numpy(), values(variable_name, shape)), variable_name


@pytest.mark.parametrize("name", FOLDERS)
def test_the_model_has_the_numbers_of_the_variables(name: str) -> None:
    model = GPT2.from_pretrained(FIXTURES / name)
    state = model.state_dict()
    hparams = FOLDERS[name]
    emb, last = hparams["n_embd"], hparams["n_layer"] - 1
    assert torch.equal(state["tok_emb.weight"], variable(name, "model/wte"))
    assert torch.equal(state["pos_emb.weight"], variable(name, "model/wpe"))
    assert torch.equal(state["final_norm.bias"], variable(name, "model/ln_f/b"))
    ours, theirs = f"trf_blocks.{last}.", f"model/h{last}/"
    assert torch.equal(state[ours + "norm1.weight"], variable(name, theirs + "ln_1/g"))
    together = variable(name, theirs + "attn/c_attn/w")
    for i, part in enumerate(("query", "key", "value")):
        found = state[f"{ours}attn.{part}.weight"]
        assert torch.equal(found, together[:, i * emb : (i + 1) * emb].T)
    assert torch.equal(
        state[ours + "mlp.mlp_out.weight"], variable(name, theirs + "mlp/c_proj/w").T
    )


def test_converted_to_a_hugging_face_folder_it_is_the_same_model(tmp_path: Path) -> None:
    model = GPT2.from_pretrained(FIXTURES / "openai-tiny")
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 7) % 23
    assert_close(GPT2.from_pretrained(tmp_path)(ids), model(ids), atol=0, rtol=0)


def test_the_numbers_are_cast_on_the_way(folder: Path) -> None:
    model = GPT2.from_pretrained(folder, dtype=torch.bfloat16)
    expected = variable("openai-tiny", "model/wte").bfloat16()
    assert torch.equal(model.tok_emb.weight, expected)


def test_a_folder_with_one_bundle_needs_no_file_that_names_it(folder: Path) -> None:
    (folder / "checkpoint").unlink()
    assert GPT2.from_pretrained(folder).config.n_layers == 2


def test_the_checksum_is_the_one_of_leveldb() -> None:
    """The published check value of CRC-32C, and leveldb's mask of it."""
    crc = google_crc32c.value(b"123456789")
    assert crc == 0xE3069283
    assert (
        masked_crc32c(b"123456789") == ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32
    )


# ---- damaged ones


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_one_wrong_bit_among_the_numbers_is_an_error_that_names_the_tensor(folder: Path) -> None:
    sizes = {name: np.prod(shape) * 4 for name, shape in shapes(FOLDERS["openai-tiny"]).items()}
    at = 0
    for name in sorted(sizes):  # the order of the bundle
        change_byte(folder / DATA, at)
        with pytest.raises(CheckpointError, match=rf"{DATA}: {name} is damaged, its checksum"):
            GPT2.from_pretrained(folder)
        change_byte(folder / DATA, at)
        at += int(sizes[name])


def test_one_wrong_bit_anywhere_in_the_index_is_an_error_that_names_the_file(folder: Path) -> None:
    """Except in the padding of the footer, which says nothing."""
    size = (folder / INDEX).stat().st_size
    for at in [*range(0, size - 48, 7), size - 48, *range(size - 8, size)]:
        change_byte(folder / INDEX, at)
        with pytest.raises(CheckpointError, match=re.escape(INDEX)):
            GPT2.from_pretrained(folder)
        change_byte(folder / INDEX, at)


@pytest.mark.parametrize("name", [INDEX, DATA])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_an_error(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=name.split("-")[0]):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (INDEX, r"checkpoint refers to model.ckpt.index, which is missing"),
        (DATA, rf"{INDEX} refers to {DATA}, which is missing"),
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("changes", [{"n_embd": 9}, {"n_layer": 1}, {"n_vocab": 50257}])
def test_hparams_that_do_not_fit_the_numbers_are_refused(
    folder: Path, changes: dict[str, int]
) -> None:
    hparams = json.loads((folder / "hparams.json").read_text(encoding="utf-8"))
    (folder / "hparams.json").write_text(json.dumps(hparams | changes), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the config asks for|unknown"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("contents", ["[]", '{"n_vocab": 23}', "{", '{"n_layer": 1e999}'])
def test_hparams_of_another_form_are_refused_by_name(folder: Path, contents: str) -> None:
    (folder / "hparams.json").write_text(contents, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"hparams.json"):
        GPT2.from_pretrained(folder)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("number", [10**12, -1, 0, "6", None, 1.5])
def test_absurd_hparams_are_refused_before_anything_is_allocated(
    folder: Path, number: object
) -> None:
    for key in FOLDERS["openai-tiny"]:
        hparams = FOLDERS["openai-tiny"] | {key: number}
        (folder / "hparams.json").write_text(json.dumps(hparams), encoding="utf-8")
        with pytest.raises(CheckpointError):
            GPT2.from_pretrained(folder)


def test_a_checkpoint_file_that_leads_elsewhere_is_refused(folder: Path) -> None:
    (folder / "checkpoint").write_text('model_checkpoint_path: ".."\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"refers to '?\.\.\.index"):
        GPT2.from_pretrained(folder)


# ---- tables whose checksums are right and whose contents are not


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def block(entries: bytes) -> bytes:
    contents = entries + (0).to_bytes(4, "little") + b"\0"
    return contents + masked_crc32c(contents).to_bytes(4, "little")


def entry(shared: int, rest: bytes, value: bytes) -> bytes:
    return varint(shared) + varint(len(rest)) + varint(len(value)) + rest + value


def handle(offset: int, contents: bytes) -> bytes:
    return varint(offset) + varint(len(contents) - 5)


def table(data: bytes, index: bytes) -> bytes:
    extras = block(b"")
    footer = handle(len(data), extras) + handle(len(data + extras), index)
    magic = (0xDB4775248B80FB57).to_bytes(8, "little")
    return data + extras + index + footer.ljust(40, b"\0") + magic


def test_a_table_is_read_over_several_blocks() -> None:
    first = block(entry(0, b"ab", b"1") + entry(1, b"c", b"2"))
    second = block(entry(0, b"x", b"3"))
    index = block(entry(0, b"b", handle(0, first)) + entry(0, b"y", handle(len(first), second)))
    whole = table(first + second, index)
    assert read_table(whole) == {b"ab": b"1", b"ac": b"2", b"x": b"3"}


def test_a_block_that_is_listed_twice_is_refused() -> None:
    """A megabyte of such entries would list a block of a megabyte a hundred thousand times."""
    data = block(entry(0, b"ab", b"1"))
    index = block(entry(0, b"a", handle(0, data)) + entry(0, b"b", handle(0, data)))
    with pytest.raises(ValueError, match="blocks overlap"):
        read_table(table(data, index))


def test_a_name_without_end_is_refused() -> None:
    data = block(entry(0, b"a" * 900, b"") + entry(900, b"a" * 900, b""))
    with pytest.raises(ValueError, match="a name has more than a thousand bytes"):
        read_table(table(data, block(entry(0, b"b", handle(0, data)))))
