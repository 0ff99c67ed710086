"""Hub ids: which files are fetched, what the cache spares, and one line for each thing that goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringlm.errors import ModelError
from ringlm.frontend.hub import HubId, _gguf
from ringlm.weights.files import model_name
from tests.frontend.fake_hub import COMMIT, FakeHub, fake_hub

SIZE = 12_000_000  # the client keeps blocks of 10 MB
INDEX = json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}})
BESIDE = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"x",
    "generation_config.json": b"{  }",
}
NEEDLESS = dict.fromkeys(
    ("README.md", "pytorch_model.bin", "consolidated.safetensors", "original/params.json", "onnx/model.onnx"), b"no"
)
WEIGHTS = {f"model-0000{part}-of-00002.safetensors": bytes([part]) * SIZE for part in (1, 2)}
FILES = {
    "owner/sharded": BESIDE | NEEDLESS | WEIGHTS | {"model.safetensors.index.json": INDEX.encode()},
    "owner/single": BESIDE | NEEDLESS | {"model.safetensors": b"weights", "model.fp16.safetensors": b"no"},
    "owner/one-GGUF": {"README.md": b"no", "one-Q8_0.gguf": b"GGUF1", "mmproj-one.gguf": b"GGUF"},
    "owner/many-GGUF": {
        "config.json": b"{}",
        "many-Q4_K_M.gguf": b"GGUF4",
        "many-Q4_K_S.gguf": b"GGUF5",
        "BF16/many-BF16-00001-of-00002.gguf": b"GGUF6",
        "BF16/many-BF16-00002-of-00002.gguf": b"GGUF7",
    },
    "owner/pickles": {"config.json": b"{}", "pytorch_model.bin": b"no"},
}


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub(FILES) as running:
        yield running


class Runner:
    """`resolve` in processes of their own, whose cache is empty at first."""

    def __init__(self, server: FakeHub, folder: Path) -> None:
        self.server = server
        self.environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}

    def start(self, model: str, **variables: str) -> subprocess.Popen[str]:
        code = (
            "import sys; from ringlm.frontend import cli, model\n"
            "cli.app = lambda **_: print(model.resolve(sys.argv[1]).path, end='')\n"
            "sys.exit(cli.main())"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, model],
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def path(self, model: str, **variables: str) -> Path:
        process = self.start(model, **variables)
        out, err = process.communicate(timeout=90)
        assert (process.returncode, err) == (0, "")
        return Path(out)

    def refusal(self, model: str, **variables: str) -> str:
        process = self.start(model, **variables)
        out, err = process.communicate(timeout=90)
        assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
        return err


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Runner:
    return Runner(server, tmp_path / "cache")


def test_only_what_is_needed_is_fetched_and_only_once(hub: Runner) -> None:
    folder = hub.path("owner/sharded")
    wanted = {*BESIDE, *WEIGHTS, "model.safetensors.index.json"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert sorted(hub.server.fetched) == sorted(wanted)
    assert model_name(folder) == "owner/sharded"
    hub.server.fetched.clear()
    assert hub.path("owner/sharded") == folder
    assert hub.path("owner/sharded", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9") == folder
    assert hub.server.fetched == []
    hub.path("owner/single@v2")
    assert set(hub.server.fetched) == {*BESIDE, "model.safetensors"}


def test_gguf_files_by_quantization_and_by_name(hub: Runner) -> None:
    assert hub.path("owner/one-GGUF").read_bytes() == b"GGUF1"
    assert hub.path("owner/many-GGUF:q4_k_m").read_bytes() == b"GGUF4"
    assert hub.path("owner/many-GGUF:many-Q4_K_S.gguf").read_bytes() == b"GGUF5"
    first = hub.path("owner/many-GGUF:BF16")
    assert first.read_bytes() == b"GGUF6"
    assert first.with_name("many-BF16-00002-of-00002.gguf").read_bytes() == b"GGUF7"
    assert len(hub.server.fetched) == 5
    assert hub.path("owner/many-GGUF:BF16", HF_HUB_OFFLINE="1") == first
    first.with_name("many-BF16-00002-of-00002.gguf").unlink()
    assert "HF_HUB_OFFLINE forbids" in hub.refusal("owner/many-GGUF:BF16", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("owner/missing", "no such public model on the Hugging Face hub; check the name"),
        ("owner/gated", "want their terms accepted first, on https://huggingface.co/owner/gated"),
        ("owner/single@v3", "no revision 'v3'"),
        ("owner/pickles", "neither model.safetensors of it nor a GGUF file"),
        (
            "owner/many-GGUF",
            "3 of its GGUF files could be meant; say which: owner/many-GGUF:BF16/many-BF",
        ),
        ("owner/many-GGUF:Q2_K", "no GGUF file 'Q2_K'"),
        ("owner/many-GGUF:Q4_K", "no GGUF file 'Q4_K'"),
    ],
)
def test_what_the_hub_does_not_have(hub: Runner, model: str, words: str) -> None:
    assert f"ModelError: {model.partition('@')[0].partition(':')[0]}: " in (said := hub.refusal(model))
    assert words in said


def test_no_network(hub: Runner) -> None:
    assert "did not give it (" in hub.refusal("owner/single", HF_ENDPOINT="http://127.0.0.1:9")
    assert "HF_HUB_OFFLINE forbids" in hub.refusal("owner/single", HF_HUB_OFFLINE="1")


def test_a_download_that_breaks_goes_on(hub: Runner) -> None:
    hub.server.cut = 11_000_000
    folder = hub.path("owner/sharded")
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == b"\1" * SIZE
    assert len(hub.server.ranges) == 1  # not from its beginning


def test_a_server_that_falls_silent_is_left(hub: Runner) -> None:
    hub.server.pause_s = 20
    start = time.monotonic()
    assert "did not give it (" in hub.refusal("owner/single", HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    assert time.monotonic() - start < 40


def test_ctrl_c_ends_a_download_at_once(hub: Runner) -> None:
    hub.server.pause_s = 0.3
    process = hub.start("owner/sharded")
    deadline = time.monotonic() + 90
    while not any("safetensors" in name and "index" not in name for name in hub.server.fetched):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert time.monotonic() - start < 3
    assert (process.returncode, err) == (130, "")
    hub.server.pause_s = 0
    assert (hub.path("owner/sharded") / "model-00001-of-00002.safetensors").stat().st_size == SIZE


def test_ids() -> None:
    assert HubId.parse("a/b") == HubId("a/b", None, None)
    assert HubId.parse("a/b@v1.0:Q4_0") == HubId("a/b", "v1.0", "Q4_0")
    assert HubId.parse("a/b:x/y-00001-of-00002.gguf") == HubId("a/b", None, "x/y-00001-of-00002.gguf")
    assert [HubId.parse(text) for text in ("a", "a/b/c", "./a", "/a/b", "a/b@", "a/b:", "C:\\a")] == [None] * 7
    assert COMMIT not in str(HubId.parse("a/b"))


def test_a_quantization_is_a_whole_word() -> None:
    files = ["m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m.IQ4_XS.gguf", "m.i1-Q4_0.gguf"]
    for choice, file in (("Q4_K_XL", 1), ("iq4_xs", 2), ("Q4_0", 3), ("UD-Q4_K_XL", 1)):
        assert _gguf(HubId("a/b", None, choice), files) == [files[file]]
    for choice in ("Q4", "K_M", "Q4_K", "XS"):
        with pytest.raises(ModelError):
            _gguf(HubId("a/b", None, choice), files)
