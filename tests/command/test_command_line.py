"""The command line: help without jax, examples that the flags allow, one JSON object, errors in one line."""

import json
import re
import shlex
import subprocess
import sys
import time

import jax
import pytest
from absl import flags

from tests.support.paths import ROOT
from vlm_jax import catalogue, command
from vlm_jax.command import commands, configs, help_page
from vlm_jax.command.commands import COMMANDS, LOADING
from vlm_jax.command.values import data_uri, given
from vlm_jax.errors import UserError
from vlm_jax.run import processes

CLIP = "pkg:vlm_jax/zoo/clip_tiny"


def vlm_jax_command(*argv, program="from vlm_jax.__main__ import main; main()"):
    """(exit status, stdout, stderr) of `vlm-jax ARGV`, with a last line of stderr if it has imported jax."""
    look = "import atexit, os, sys; look = lambda: 'jax' in sys.modules and print('JAX', file=sys.stderr, flush=True); "
    look += "leave = os._exit; os._exit = lambda status: (look(), leave(status)); atexit.register(look); "
    given = [sys.executable, "-c", f"{look}sys.argv[0] = 'vlm-jax'; {program}", *map(str, argv)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.subprocess
def test_alone_it_says_what_one_can_do():
    code, output, errors = vlm_jax_command()
    assert (code, errors) == (0, "") and output == help_page.overview() + "\n"
    assert [re.search(rf"^  {re.escape(name)}  +[A-Z].*\.$", output, re.MULTILINE)[0] for name in COMMANDS]
    assert help_page.examples("train")[0] in output
    assert vlm_jax_command("--help") == (0, output, "")
    assert sorted(name for names in help_page.GROUPS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.subprocess
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_imports_no_jax(name):
    code, output, errors = vlm_jax_command(name, "--help")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    own = lines[: lines.index("methods")] if "methods" in lines else lines  # the catalogue's names may take more
    assert len(own) < 60 and max(map(len, lines)) <= 120
    assert lines[2].startswith(f"usage: vlm-jax {name} ") and f"  vlm-jax {name} " in f"{lines[5]} "
    values = flags.FlagValues()
    commands.define(name, values)
    said = re.findall(r"^  --(\w+)  +\S", output, re.MULTILINE)
    assert sorted(said) == sorted(values)  # all of its own flags, and nothing of absl's


@pytest.mark.subprocess
def test_flags_mistaken_are_told_before_jax_is_imported(tmp_path):
    assert vlm_jax_command("evalute") == (
        2, "", "error: vlm-jax has no command `evalute`; did you mean `evaluate`?\n",
    )  # fmt: skip
    code, output, errors = vlm_jax_command("x")
    assert (code, output) == (2, "") and errors.startswith("error: vlm-jax has no command `x`; expected one of: train,")
    missing = f"--config={tmp_path}/no.py: there is no such file"
    (tmp_path / "wrong.py").write_text("def get_config():\n    raise TypeError('a\\nb')\n")
    for argv, message in {
        ("evaluate",): "evaluate needs --model, --task, --data, --out; vlm-jax evaluate --help has an example",
        ("evaluate", "--modle=a"): "evaluate has no flag --modle; did you mean --model?",
        ("evaluate", "--rank=4"): "evaluate has no flag --rank; --option=rank=... sets any other argument; "
            "see vlm-jax evaluate --help",
        ("evaluate", "--model=", "--task=a", "--data=a", "--out=b"):
            "evaluate needs --model; vlm-jax evaluate --help has an example",
        ("evaluate", "--batch_size=a"): "--batch_size=a should be a whole number",
        ("plan", "--config=configs/clip.py:smoke", "--topology=v5e:2x2", "true"):
            "plan takes flags, --name=value, and not `true`; see vlm-jax plan --help",
        ("train", "--config=configs/clip.py:smoke", "--config.optimizer.lrr=1", "--workdir=a"):
            "the config has no key `optimizer.lrr`; did you mean `optimizer.lr`?",
        ("train", "--config=configs/clip.py:big", "--workdir=a"):
            "--config=configs/clip.py:big: there is no variant `big` of this config; on the embedded data: tiny, "
            "select, smoke, base, base_multilingual, base_select",
        ("train", f"--config={tmp_path}/no.py", "--workdir=a"): missing,
        ("train", f"--config={tmp_path}/clip.py:tiny", "--workdir=a"): f"--config={tmp_path}/clip.py: there is no such "
            "file; the config that comes with the package is --config=clip",
        ("train", f"--config={tmp_path}/no.py", "--workdir=a", "--config.batch_size=3"): missing,
        ("train", f"--config={tmp_path}/wrong.py", "--workdir=a"): f"--config={tmp_path}/wrong.py: TypeError: a b",
    }.items():  # fmt: skip
        code, output, errors = vlm_jax_command(*argv)
        assert (code, output, errors.count("\n")) == (2, "", 1), errors
        assert errors.startswith("error: ") and errors.endswith(f"{message}\n"), errors
        assert not message.startswith("--config") or errors == f"error: {message}\n"
    code, _, errors = vlm_jax_command("train", f"--config={tmp_path}/no.py", "--workdir=a", "--debug")
    assert code == 2 and "Traceback" in errors and errors.endswith(f"error: {missing}\n")


def command_lines(text):
    """The commands that a text tells to run, as lists of words."""
    found = re.findall(r"^ *(?:vlm-jax|python -m vlm_jax\.)(?: ?)((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", ""), comments=True) for line in found]


def documented():
    """Those of the commands' docstrings, the configs' and the README's."""
    for name in COMMANDS:
        yield from command_lines("\n".join(help_page.examples(name)))
    for path in [ROOT / "README.md", *sorted(ROOT.glob("configs/*.py"))]:
        blocks = re.findall(r"```\n(.*?)```", path.read_text(), re.DOTALL) if path.suffix == ".md" else [
            path.read_text().split('"""')[1].replace("\\\\\n", "\\\n")
        ]  # fmt: skip
        yield from (line for block in blocks for line in command_lines(block))


def test_documented_commands_have_the_flags_they_are_given(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for name, *argv in documented():
        values = flags.FlagValues()
        commands.define(name, values)
        left = configs.parse(values, [name, *argv])
        own = COMMANDS[name]
        assert all(values[flag.name].value is not None for flag in own.all() if flag.needed), argv
        assert own.arguments or not left[1:], argv
        assert left[1:] or not own.arguments or own.arguments[0] == "[", argv
        seen.add(name)
    assert seen == COMMANDS.keys()


def test_help_names_what_there_is():
    from vlm_jax.zoo.load import load
    from vlm_jax.zoo.save import FORMATS

    about = {flag.name: flag.help for own in COMMANDS.values() for flag in own.all()}
    for name in ("evaluate", "adapt"):
        shown = help_page.help_of(name)
        assert all(re.search(rf"\b{one}\b", shown) for one in catalogue.of(*COMMANDS[name].families))
    assert set(about["format"].split(": ")[1].split(", ")) == set(FORMATS)
    assert {flag.name for flag in LOADING} == load.__annotations__.keys() - {"spec", "mesh", "partition", "return"}


@pytest.mark.subprocess
def test_json_is_all_of_stdout(tmp_path):
    code, output, errors = vlm_jax_command("convert", CLIP, tmp_path / "clip", "--json")
    assert code == 0 and json.loads(output) == {"wrote": str(tmp_path / "clip"), "format": "native"}
    assert errors.endswith("JAX\n")
    about = convert("--inspect", tmp_path / "clip").results
    assert about["format"] == "vlm_jax" and about["problem"] is None
    assert about["tensors"][0] == {
        "name": "image/blocks_0/attn/key/bias", "shape": [128], "dtype": "float32",
        "parameters": ["image/blocks_0/attn/key/bias"], "ignored": False,
    }  # fmt: skip
    with pytest.raises(UserError, match="clip exists; remove it or write elsewhere"):
        convert(CLIP, tmp_path / "clip")


def convert(*argv):
    """The answer of `vlm-jax convert ARGV`, in this process."""
    from vlm_jax.convert import main

    values = flags.FlagValues()
    commands.define("convert", values)
    return main(values(["convert", *map(str, argv)]), values)


FAILING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background ignores it
from vlm_jax import catalogue, command
def main(argv, values):
    print("on the way")
    {does}
command.run("convert", main)
"""


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("does", "code", "line"),
    [
        ("raise KeyError('a\\nb')", 1, r"error: KeyError: 'a\nb' (a bug? --debug shows the traceback)"),
        ("raise ValueError('x' * 999)", 1, f"error: ValueError: {'x' * 288} ... (a bug? --debug shows the traceback)"),
        ("raise command.UserError('two\\n  lines')", 2, "error: two lines"),
        ("open('/proc/nothing', 'x')", 1, "error: FileNotFoundError: [Errno 2] No such file or directory: "
         "'/proc/nothing' (a bug? --debug shows the traceback)"),
        ("raise PermissionError(13, 'Permission denied', 'a')", 2, "error: Permission denied (a)"),
        ("raise KeyboardInterrupt", 130, "error: interrupted"),
        ("import os; os.kill(os.getpid(), 2); command.time.sleep(9)", 130, "error: interrupted"),
        ("try: command.os.kill(command.os.getpid(), 2)\n    except BaseException: raise ValueError('a library')",
         130, "error: interrupted"),
        ("import weakref as w; ref = w.ref(x := set(), lambda _: command.os.kill(command.os.getpid(), 2)); del x; "
         "command.time.sleep(9)", 130, "error: interrupted"),
        ("command.tqdm(total=9, desc='x'); raise UnicodeError('y')", 1,
         "error: UnicodeError: y (a bug? --debug shows the traceback)"),
        ("sys.exit('stopped: saved')", 1, "stopped: saved"),
        ("return command.Answer({'a': 1}, 'text', 3)", 3, None),
    ],
)  # fmt: skip
def test_errors_are_one_line(does, code, line):
    status, output, errors = vlm_jax_command("a", "b", program=FAILING.format(does=does))
    assert (status, output) == (code, "on the way\n" + ("" if line else "text\n"))
    assert errors.splitlines()[-1:] == ([line] if line else []) and "Traceback" not in errors
    status, output, errors = vlm_jax_command("a", "b", "--debug", "--json", program=FAILING.format(does=does))
    assert (status, output) == (code, "" if line else '{"a": 1}\n') and "on the way\n" in errors
    assert errors.splitlines()[-1] == (line or "on the way")
    assert ("Traceback" in errors) == (line is not None and "stopped" not in line)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--tokenizer=clip", "--inspect only says what SRC is, and takes no --tokenizer"),
        ("--format=native", "--inspect only says what SRC is, and takes no --format"),
        ("--image_size=64", r"has 16 positions; image_size \(64, 64\) gives 64"),
    ],
)
def test_inspect_ignores_no_flag(flag, message):
    with pytest.raises(UserError, match=message):
        convert("--inspect", CLIP, flag)


@pytest.mark.subprocess
def test_json_has_no_nan_and_threads_are_not_waited_for():
    waits = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()"
    answer = "command.Answer({'a': [float('nan'), 1.5], 'b': {'c': -float('inf')}}, 'text', 3, at_once=True)"
    program = FAILING.format(does=f"{waits}; return {answer}")
    status, output, _ = vlm_jax_command("a", "b", "--json", program=program)
    assert (status, output) == (3, '{"a": [null, 1.5], "b": {"c": null}}\n')


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyError("a"), 1, "KeyError: 'a' (a bug? --debug shows the traceback)"),
        (UserError("a"), 2, "a"),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: b\nc"), 1, "a process of the run is lost (UNAVAILABLE: b). Start "
         "all of them again: they go on from the last checkpoint"),
    ],
)  # fmt: skip
def test_an_error_of_one_of_several_processes_is_one_line(error, code, line, capsys, monkeypatch):
    exits = []
    monkeypatch.setattr(processes.os, "_exit", exits.append)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for argv, before in ([], ""), (["--debug"], "Traceback"):
        monkeypatch.setattr(sys, "argv", ["train", *argv])
        with processes.joined(None):
            raise error
        errors = capsys.readouterr().err
        assert errors.startswith(before) and errors.endswith(f"error: process 0 of 1: {line}\n")
        assert argv or errors.count("\n") == 1
    assert exits == [code] * 2


@pytest.mark.parametrize(("argument", "uri"), [((), "jsonl:a"), (("--allow-outside",), "jsonl:a?allow_outside")])
def test_pictures_outside_are_allowed_by_a_flag(argument, uri):
    values = flags.FlagValues()
    commands.define("evaluate", values)
    given = ("--model=m", "--task=zeroshot", "--data=jsonl:a", "--out=o", *argument)
    command.parse("evaluate", ["evaluate", *given], values)
    assert data_uri(values) == uri


def test_image_size_is_one_side_or_two():
    values = flags.FlagValues()
    commands.define("convert", values)
    for text, sides in {"384": [384, 384], "384,288": [384, 288]}.items():
        values(["convert", f"--image_size={text}"])
        assert given(values, ["image_size"]) == {"image_size": sides}
    values(["convert", "--image_size=384,288,9"])
    with pytest.raises(UserError, match="--image_size=384,288,9 cannot be read; expected pixels, 384 or height,width"):
        given(values, ["image_size"])


def test_functions_raise_what_they_raise():
    """The one line is the command's; who calls the functions sees exceptions."""
    from vlm_jax.convert import convert
    from vlm_jax.train import train

    with pytest.raises(UserError, match="has no key `nothing`"):
        train({"nothing": 1}, "/tmp")
    with pytest.raises(UserError):
        convert("/nowhere", "/nowhere/else")


@pytest.mark.subprocess
def test_who_reads_may_leave():
    inspect = f"{sys.executable} -m vlm_jax convert --inspect {CLIP} | (read line; echo $line; exec <&-)"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", inspect], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("file ")
    assert "error" not in done.stderr.lower() and "Traceback" not in done.stderr


def test_what_goes_on_is_said_once_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr(command, "LONG", 0)
    with command.doing("compiling"):
        wait_for(lambda: capsys.readouterr().err == "compiling ...\n")
    with command.doing("compiling", seen=False):
        pass
    monkeypatch.setattr(command, "LONG", 60)
    with command.doing("a moment"):
        pass
    assert capsys.readouterr().err == ""


def test_what_goes_on_counts_seconds_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    heard = []

    def hear():
        heard.append(capsys.readouterr().err)
        return "".join(heard).count("compiling: ") >= 2

    with command.doing("compiling"):
        wait_for(hear)
    heard.append(capsys.readouterr().err)
    text = "".join(heard)
    assert re.fullmatch(r"(\r\x1b\[Kcompiling: \d+ s\r)+\r\x1b\[K", text), text
    with command.doing("compiling"), command.bar(total=3, desc="steps"):  # a bar that stands still
        heard.clear()
        wait_for(lambda: heard.append(capsys.readouterr().err) or "steps: " in "".join(heard))
    assert "compiling" not in "".join(heard)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_table():
    assert command.table([["a", "1.0"], ["long", "22.5 %"]]) == "a        1.0\nlong  22.5 %"
    assert command.table([["a", "b"], ["ccc", ""]], left=2) == "a    b\nccc"
