"""`edgekv chat` as a user runs it: one-shot in a subprocess, the conversation in a pseudo-terminal."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pexpect
import psutil
import pytest

EDGEKV = str(Path(sys.executable).parent / "edgekv")
QUICK = ["-t", "1", "-c", "512", "--temp", "0"]


def run(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EDGEKV, "chat", *args], input=stdin, stdin=None if stdin else subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


class TestOneShot:
    def test_prompt_file_and_pipe_ask_the_same(self, smollm2: Path, tmp_path: Path) -> None:
        question = tmp_path / "question.txt"
        question.write_text("Name a colour.\n")
        asked = run(str(smollm2), *QUICK, "-n", "12", "-p", "Name a colour.")
        assert (asked.returncode, asked.stderr) == (0, "")
        assert len(asked.stdout.split()) > 2
        assert run(str(smollm2), *QUICK, "-n", "12", "-f", str(question)).stdout == asked.stdout
        assert run(str(smollm2), *QUICK, "-n", "12", stdin="Name a colour.\n").stdout == asked.stdout

    def test_json_has_the_text_and_figures(self, smollm2: Path) -> None:
        result = run(str(smollm2), *QUICK, "-n", "8", "-p", "Name a colour.", "--json", "--stats")
        report = json.loads(result.stdout)
        assert report["finish"] == "length"
        assert report["n_generated"] == 8
        assert report["n_prefilled"] > 10
        assert min(report["ttft_s"], report["prefill_tps"], report["decode_tps"]) > 0
        assert report["n_ctx"] == 512
        assert report["cache_nbytes"] == 512 * 30 * 2 * 3 * 64 * 2
        assert report["engine_peak_rss_nbytes"] > 100e6
        assert "cache 11.8 MB for 512 tokens" in result.stderr
        assert "\x1b" not in result.stderr

    def test_options_reach_the_engine_and_the_sampler(self, smollm2: Path) -> None:
        base = [str(smollm2), "-t", "1", "-n", "10", "-p", "My favourite", "--no-template", "--json"]
        wild = ["--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0"]
        first, same, other = (
            json.loads(run(*base, *wild, "--seed", seed, "-c", "300", "--cache-type", kind).stdout)
            for seed, kind in (("1", "q8_0"), ("1", "q8_0/q8_0"), ("2", "q8_0/q4_0"))
        )
        assert first["text"] == same["text"] != other["text"]
        assert first["cache_nbytes"] == same["cache_nbytes"] == 512 * 30 * 2 * 3 * 68
        assert other["cache_nbytes"] == 512 * 30 * 3 * (68 + 36)

    def test_the_reference_backend_answers_too(self, smollm2: Path) -> None:
        result = run(
            *[str(smollm2), "--backend", "reference", "-c", "64", "--temp", "0", "-n", "3", "--no-template"],
            *["-p", "The capital of France is", "--json"],
        )
        report = json.loads(result.stdout)
        assert report["backend"] == "reference"
        assert report["text"].startswith(" Paris")

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["none.gguf", "-p", "x"], "none.gguf"),
            (["MODEL", "-p", "x", "--top-p", "3"], "top_p is 3.0"),
            (["MODEL", "-p", "x", "--cache-type", "q3"], "q3"),
            (["MODEL", "-f", "none.txt"], "cannot read none.txt"),
            (["MODEL", "-p", " "], "the question is empty"),
            (["MODEL", "-c", "256", "-p", "word " * 400], "takes 4.. tokens and the context holds 256"),
            (["MODEL", "-p", "x", "--backend", "reference", "--cache-type", "q8_0"], "caches in f32"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, smollm2: Path, args: list[str], words: str) -> None:
        result = run(*[str(smollm2) if arg == "MODEL" else arg for arg in args])
        assert (result.returncode, result.stdout.strip()) == (2, "")
        assert "Traceback" not in result.stderr
        assert re.search(words, result.stderr), result.stderr

    @pytest.mark.parametrize("backend", ["llama.cpp", "reference"])
    def test_more_context_than_trained_for(self, tiny_llama: Path, backend: str, tmp_path: Path) -> None:
        """The model was trained for 512 tokens: no larger context is advised, and one that is asked for is noted."""
        model = [str(tiny_llama), "--backend", backend, "--temp", "0", "-n", "2", "--no-template"]
        for size, note in (([], False), (["-c", "512"], False), (["-c", "600"], True)):
            result = run(*model, *size, "-p", "hello")
            assert result.returncode == 0
            assert ("a context of 600 tokens, trained for 512" in result.stderr) == note
        long = "word " * 200
        assert "with a larger --ctx-size" in run(*model, "-c", "256", "-p", long).stderr
        for size in ([], ["-c", "600"]):
            refused = run(*model, *size, "-p", long)
            assert refused.returncode == 2
            assert "--ctx-size" not in refused.stderr
            assert "trained for more than 512 tokens" in refused.stderr

    def test_an_engine_that_refuses_is_exit_code_3(self, smollm2: Path, tmp_path: Path) -> None:
        model = altered(smollm2, tmp_path / "empty.gguf", None, tensors=False)
        result = run(str(model), "-p", "x")
        assert result.returncode == 3
        assert result.stderr.splitlines()[-1].startswith("edgekv: error: llama.cpp could not load")

    @pytest.mark.parametrize(
        "source", ["{{ ''.__class__.__mro__ }}{% for %}", "{{ messages[0].content | xmlattr }}"]
    )
    def test_a_broken_template_is_refused_and_can_be_passed_by(
        self, smollm2: Path, tmp_path: Path, source: str
    ) -> None:
        model = altered(smollm2, tmp_path / "evil.gguf", source)
        result = run(str(model), "-p", "x")
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert "evil.gguf: the chat template" in line
        assert "--no-template" in line
        assert run(str(model), *QUICK, "-n", "2", "-p", "x", "--no-template").returncode == 0

    def test_a_model_without_a_template_says_so(self, smollm2: Path, tmp_path: Path) -> None:
        model = altered(smollm2, tmp_path / "base.gguf", None)
        result = run(str(model), *QUICK, "-n", "4", "-p", "The capital of France is")
        assert "no chat template" in result.stderr
        assert "Paris" in result.stdout

    def test_ctrl_c_keeps_what_was_said_and_leaves_with_130(self, smollm2: Path) -> None:
        process = subprocess.Popen(
            [EDGEKV, "chat", str(smollm2), "-t", "1", "--temp", "0", "--no-template", "-p", "Once upon a time"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert len((first + rest).decode()) > 10
        assert b"Traceback" not in errors


def altered(source: Path, target: Path, template: str | None, tensors: bool = True) -> Path:
    """A copy of a model with another chat template, and perhaps no tensors, written by gguf-py."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "tokenizer.chat_template"):
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], element)
    if template is not None:
        writer.add_chat_template(template)
    for tensor in reader.tensors if tensors else ():
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


Talk = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def talk(smollm2: Path, tmp_path: Path) -> Iterator[Talk]:
    """Starts conversations in a pseudo-terminal."""
    started: list[pexpect.spawn[str]] = []

    def start(*args: str) -> "pexpect.spawn[str]":
        env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
        child = pexpect.spawn(
            EDGEKV, ["chat", str(smollm2), *args], env=env, encoding="utf-8", timeout=60, dimensions=(50, 250)
        )
        started.append(child)
        child.expect("Ctrl-D leaves")
        child.expect("\r\n.*> ")
        return child

    yield start
    for child in started:
        child.close(force=True)


def answer(child: "pexpect.spawn[str]", message: str) -> str:
    """Send a message; its answer, up to the next prompt."""
    child.sendline(message)
    child.expect("\r\n")
    child.expect("\r\n(\x1b\\[\\?2004h)?> ")
    assert isinstance(child.before, str)
    return child.before


def press_ctrl_c(child: "pexpect.spawn[str]", expected: str) -> None:
    """Ctrl-C at the prompt, until it is answered: CPython's readline misses one that comes between two waits."""
    for _ in range(5):
        child.sendintr()
        if child.expect([expected, pexpect.TIMEOUT], timeout=5) == 0:
            return
    pytest.fail(f"{expected!r} did not come")


class TestConversation:
    def test_commands(self, talk: Talk, tmp_path: Path) -> None:
        child = talk(*QUICK, "-n", "12")
        assert "/regen" in answer(child, "/help")
        assert "no answer yet" in answer(child, "/stats")
        assert "ask something first" in answer(child, "/regen")
        assert "there is no /nope" in answer(child, "/nope")
        first = answer(child, "Name a colour.")
        assert len(first.split()) > 2
        assert first.strip() in answer(child, "/regen")
        stats = answer(child, "/stats")
        assert "decode 12 tokens" in stats
        assert "peak RSS engine" in stats
        assert "system prompt: none of yours" in answer(child, "/system")
        assert "Speak like a pirate." in answer(child, "/system Speak like a pirate.")
        assert "forgotten" in answer(child, "/clear")
        assert answer(child, "Name a colour.") != first  # another system prompt
        child.sendline("/exit")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        history = tmp_path / "edgekv" / "chat_history"
        assert history.read_text().splitlines()[-2:] == ["Name a colour.", "/exit"]
        assert stat.S_IMODE(history.stat().st_mode) == 0o600

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, talk: Talk) -> None:
        child = talk("-t", "1", "--temp", "0", "--no-template")
        child.sendline("Once upon a time")
        child.expect("time\r\n.*[a-z]+ [a-z]+ ")
        child.sendintr()
        child.expect("stopped; /regen")
        child.expect("> ")
        press_ctrl_c(child, "Ctrl-D or /exit leaves")
        child.expect("> ")
        child.send("half a line")
        child.expect("half a line")
        press_ctrl_c(child, "leaves")
        assert "tokens/s" in answer(child, "/stats")
        child.sendeof()
        child.expect(pexpect.EOF)

    def test_ctrl_c_stops_a_long_prefill(self, talk: Talk) -> None:
        child = talk("-t", "1", "-c", "4096")
        (engine,) = psutil.Process(child.pid).children()
        before = sum(engine.cpu_times()[:2])
        child.send("\x1b[200~" + "word and line\n" * 700 + "\x1b[201~\r")
        while sum(engine.cpu_times()[:2]) < before + 0.2:
            time.sleep(0.01)
        child.sendintr()
        child.expect(r"\^C\s*(\x1b\[2m)?\[stopped; /regen")  # before the first token

    def test_a_pasted_text_is_one_message(self, talk: Talk) -> None:
        child = talk(*QUICK, "-n", "4", "--stats")
        child.send("\x1b[200~Line one.\nLine two.\nLine three.\x1b[201~")
        child.send("\r")
        child.expect(r"prefill (\d+) tokens")
        assert child.match is not None
        pasted = int(child.match.group(1))
        child.expect("> ")
        answer(child, "/clear")
        assert "first token" in answer(child, "Line one. \\\rLine two. \\\rLine three.")
        assert pasted > 35  # the template's default system prompt and all three lines
        child.sendline("/exit")
        child.expect(pexpect.EOF)

    def test_a_killed_engine_is_started_again_and_remembers(self, talk: Talk) -> None:
        child = talk("-t", "1", "--temp", "0", "--no-template")
        child.sendline("Once upon a time")
        child.expect("time\r\n.*[a-z]+ [a-z]+ ")
        (engine,) = psutil.Process(child.pid).children()
        engine.kill()
        child.expect("the engine's process died: killed by SIGKILL")
        child.expect("/regen asks again")
        child.expect("> ")
        child.sendline("/regen")
        child.expect("[a-z]+ [a-z]+ [a-z]+ ")
        (restarted,) = psutil.Process(child.pid).children()
        assert restarted.pid != engine.pid
        child.sendintr()
        child.expect("stopped")
        child.expect("> ")
        child.kill(signal.SIGKILL)  # and an orphaned engine leaves by itself
        restarted.wait(10)

    def test_a_full_context_forgets_and_says_so(self, talk: Talk) -> None:
        child = talk("-t", "1", "-c", "256", "-n", "60", "--temp", "0")
        said = [answer(child, f"Tell me something long about the number {i}.") for i in range(4)]
        assert any("the context is full: forgot the oldest" in text for text in said)
        assert "error" not in "".join(said)
        assert "takes" in answer(child, "word " * 280)  # alone too long: refused, and nothing is lost
        assert "tokens/s" in answer(child, "/stats")
