"""The command line: what goes to stdout, one line for each mistake, exit statuses. In this process where it can."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ringlm
from ringlm.cluster.launch import LaunchOptions
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import PeerLostError
from ringlm.frontend import console
from ringlm.frontend.cli import main
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine, install

ROOT = Path(__file__).parents[2]
ANSWER = "Paris, naïve 😀."


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(lambda _: [*tokenizer.encode(ANSWER), EOS])


@pytest.fixture(autouse=True)
def specs(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[EngineSpec]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return install(monkeypatch.setattr, engine)


def ringlm_process(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT / "src"), **environment}
    command = [sys.executable, "-m", "tests.frontend.fake_cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_one_answer(engine: FakeEngine, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", "demo", "--prompt", "Where?", "--seed", "5", "--top-k", "3"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (ANSWER + "\n", "")
    prompt, params = engine.submitted[1]
    assert prompt == tokenizer.chat([{"role": "user", "content": "Where?"}])
    assert (params.seed, params.top_k, params.temperature, params.max_tokens) == (5, 3, 0.7, 1024)
    assert engine.closed


def test_how_to_choose_and_when_to_stop(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    penalties = "--typical-p 0.9 --repetition-penalty 1.1 --presence-penalty 0.5 --frequency-penalty -0.5"
    stops = "--min-tokens 2 --stop na\u00efve --stop END"
    assert main(["run", "-m", "demo", "--prompt", "Where?", *penalties.split(), *stops.split()]) == 0
    assert capsys.readouterr().out == "Paris, \n"
    params = engine.submitted[1][1]
    assert (params.typical_p, params.repetition_penalty) == (0.9, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.min_tokens) == (0.5, -0.5, 2)


def test_json_is_one_object_and_nothing_else(
    engine: FakeEngine, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--json", "--throughput", "-m", "demo", "gguf", "--prompt", "Where?"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    said = json.loads(captured.out)
    assert set(said) >= {"text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert set(said) >= {"prompt_tokens_per_s", "tokens_per_s", "world_size"}
    assert (said["text"], said["finish_reason"], said["world_size"]) == (ANSWER, "stop", 2)
    assert said["token_ids"] == [*tokenizer.encode(ANSWER), EOS]
    assert said["completion_tokens"] == len(said["token_ids"])
    assert "tok/s" in captured.err


def test_the_prompt_on_stdin(
    engine: FakeEngine, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is it?\n"))
    assert main(["run", "-m", "demo", "--throughput"]) == 0
    answer, figures = capsys.readouterr().out.splitlines()
    assert answer == ANSWER
    assert "ring 10% of the time, world size 2" in figures
    assert "Where is it?" in tokenizer.decode(engine.submitted[1][0])


def test_without_a_template_the_text_is_continued(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "has_chat_template", False)
    assert main(["run", "-m", "demo", "--prompt", "Once upon"]) == 0
    assert engine.submitted[1][0] == tokenizer.encode("Once upon")
    assert main(["run", "-m", "demo", "-i"]) == 2


MISTAKES = [
    ("run", "ConfigError: no model; give one with -m"),
    ("run demo", "'demo' is neither plain nor gguf; a model is given with -m"),
    ("run -m demo", "RequestError: the prompt is empty"),
    ("run -m demo --json", "the prompt is empty"),
    ("run -m demo -i --json", "-i holds a conversation; leave --json out"),
    ("run -m no/such/model/here", "ModelError: no/such/model/here: no such file or folder"),
    ("run plain -m demo", "say 'gguf' or leave it out"),
    ("run -m demo --prompt x --temperature -1", "temperature is -1.0; it must be between 0 and 100"),
    ("run -m demo --prompt x --temperature hot", "'--temperature'"),
    ("run -m demo --prompt x --max-tokens 0", "max_tokens is 0"),
    ("run -m demo --prompt x --backend mpi", "choose ring, gloo, nccl"),
    ("run -m demo --prompt x --quant int5", "choose none, int8 or int4"),
    ("run -m demo --prompt x --device tpu", "choose auto, cpu, cuda or mps"),
    ("run -m demo --prompt x --dtype int3", "choose auto, float32"),
    ("run -m demo --prompt x --split 1,2", "2 weights for world size 1"),
    ("run -m demo --prompt x --split a,b", "not a list of numbers"),
    ("run -m demo --prompt x --threads 0", "1 or more"),
    ("run -m demo --prompt x --node-rank 1", "--node-rank needs --nodes or --config"),
    ("run -m demo --prompt x --nodes 127.0.0.1:1,127.0.0.1:2", "Give --node-rank 0 to 1"),
    ("run -m demo --prompt x --nodes 127.0.0.1:1 --config x.toml", "give one of them"),
    ("run -m demo --prompt x --config /no/such.toml", "cannot be read"),
    ("run --nonsense", "No such option: --nonsense"),
    ("nonsense", "No such command 'nonsense'. Try 'ringlm --help'"),
    ("serve -m demo --port 0 --tool-format yaml", "--tool-format yaml: there is no such format"),
    ("launch -n 2", "Try 'ringlm launch --help'"),
    ("launch -- run", "Give -n or --hosts. Try 'ringlm launch --help'"),
    ("launch -n 0 -- run", "-n is 0; a ring has 1 rank or more"),
    ("launch -n 2 --restarts -1 -- run", "--restarts is -1; it must be 0 or more"),
    ("launch -n 2 --hosts a,b,c -- run", "-n is 2, but --hosts names 3; leave -n out"),
    ("launch --hosts a,-oProxyCommand=x -- run", "--hosts holds '-oProxyCommand=x'; write HOST or USER@HOST"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_a_mistake_is_one_line(
    line: str, words: str, specs: list[EngineSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ringlm: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert specs == []


def test_failures_of_the_system(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine._fail_after, engine._failure = 1, PeerLostError("rank 1 (127.0.0.1:1501)\nclosed its link.", 1)
    assert main(["run", "-m", "demo", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == "ringlm: PeerLostError: rank 1 (127.0.0.1:1501) closed its link.\n"
    assert engine.closed
    engine._fail_after, engine._answer = None, lambda _: int("oops")
    assert main(["run", "-m", "demo", "--prompt", "x"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ringlm: ValueError: invalid literal")
    assert captured.err.endswith("(RINGLM_DEBUG=1 shows where)\n")
    monkeypatch.setenv("RINGLM_DEBUG", "1")
    assert main(["run", "-m", "demo", "--prompt", "x"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_rings(specs: list[EngineSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[EngineSpec] = []

    def serve(spec: EngineSpec) -> None:
        served.append(spec)
        raise SystemExit(0)

    monkeypatch.setattr("ringlm.cluster.client.serve_rank", serve)
    nodes = ["run", "-m", "demo", "--prompt", "x", "--nodes", "127.0.0.1:1500,127.0.0.1:1501,localhost:1502"]
    assert main([*nodes, "--node-rank", "0", "--split", "2,1,1"]) == 0
    assert (specs[-1].world_size, specs[-1].settings.split) == (3, (2, 1, 1))
    # A daemon heeds no prompt and no mistake in it.
    for rank in ("1", "2"):
        with pytest.raises(SystemExit):
            main(["run", "-m", "demo", "-i", "--json", "--nodes", nodes[-1], "--node-rank", rank])
    assert [spec.ring.rank for spec in served if spec.ring] == [1, 2]
    file = tmp_path / "ring.toml"
    file.write_text(
        '[[node]]\nhost = "127.0.0.1"\nport = 1500\nmodel = "demo"\ndevice = "cpu"\nweight = 2\n'
        '[[node]]\nhost = "127.0.0.1"\nport = 1501\n'
    )
    assert main(["run", "--prompt", "x", "--config", str(file), "--node-rank", "0"]) == 0
    assert (specs[-1].device, specs[-1].settings.split) == ("cpu", (2.0, 1.0))
    # The environment beats the file; a flag beats both.
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "RING_PORT": "1700", "RING_RIGHT": "1701"}.items():
        monkeypatch.setenv(name, value)
    for arguments, port in ((["--config", str(file)], 1700), (["--nodes", nodes[-1], "--node-rank", "0"], 1500)):
        assert main(["run", "-m", "demo", "--prompt", "x", *arguments]) == 0
        assert specs[-1].ring is not None
        assert specs[-1].ring.port == port
    assert main(["run", "-m", "demo", "--prompt", "x", "--node-rank", "1"]) == 2


@pytest.mark.parametrize(
    "line",
    ["launch -n 2 -- run -m demo -i", "launch --world-size 2 -- run -m demo -i", "launch -n 2 run -m demo -i"],
)
def test_launch_hands_on_its_arguments(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[list[str], LaunchOptions]] = []
    monkeypatch.setattr("ringlm.cluster.launch.launch", lambda *arguments: called.append(arguments) or 7)
    assert main(line.split()) == 7
    assert called == [(["run", "-m", "demo", "-i"], LaunchOptions(2))]


@pytest.mark.parametrize("arguments", [[], ["run"], ["launch"], ["join"], ["status"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--help"]) == 0
    assert "Example: ringlm" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ringlm {ringlm.__version__}\n"


def test_terminals_are_protected() -> None:
    assert console.escape("a\tb\nc") == "a\tb\nc"
    assert console.escape("\x1b[2J\x07\x00\x7f\x9b31m\r\n") == "␛[2J␇␀␡\ufffd31m\n"


def test_it_starts_fast_and_free_of_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import ringlm; first = time.perf_counter() - start\n"
        "from ringlm.frontend.cli import main; import ringlm.frontend.api; main(['--help'])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(first, time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, whole = map(float, done.stdout.splitlines()[-1].split())
    assert first < 0.3
    assert whole < 3  # 0.4 on an idle machine


@pytest.mark.usefixtures("tokenizer")
def test_ctrl_c_ends_with_130() -> None:
    process = ringlm_process("run", "-m", "demo", "--prompt", "word " * 30, FAKE_DELAY_S="0.1")
    assert process.stdout is not None
    assert process.stdout.read(3) == "You"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.usefixtures("tokenizer")
def test_nobody_reads_any_more() -> None:
    process = ringlm_process("run", "-m", "demo", "--prompt", "word " * 30, FAKE_DELAY_S="0.02")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(3) == "You"
    process.stdout.close()
    start = time.monotonic()
    assert process.wait(90) == 1
    assert time.monotonic() - start < 10
    assert process.stderr.read() == ""


@pytest.mark.usefixtures("tokenizer")
def test_stdin_that_is_not_text() -> None:
    process = ringlm_process("run", "-m", "demo")
    assert process.stdin is not None
    process.stdin.buffer.write(b"caf\xe9\n")
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (0, "You said: caf\ufffd\n")
    assert err == ""
