"""The code blocks of the two seed texts run as written.

`000_*.txt` and `003_*.txt` are the texts as they came. 003 has lost the line breaks in its code;
`003_restored.txt` is the same text with these put back, and fences around the code. Only placeholders are
filled before a block runs: `${...}`, addresses, keys and the model's path.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import deepseek_api_compat
from deepseek_api_compat.models.prepared import default_model
from fakes.files import Files
from fakes.pictures import drawn
from fakes.service import BIN, Service

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SEED_000 = (HERE / "000_46ed1c4597cbb6f3.txt").read_text(encoding="utf-8")
SEED_003 = (HERE / "003_3a934d98219c79b4.txt").read_text(encoding="utf-8")
RESTORED_003 = (HERE / "003_restored.txt").read_text(encoding="utf-8")

FENCED = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^(\d(?:\.\d)+) ", re.MULTILINE)
MODEL = "smollm2-135m-instruct"

# Blocks that don't run, or not all of them, and why.
NOT_RUN = (
    ("003 2.1", "the two conda lines: conda is not needed here; the pip line runs"),
    ("003 5.1", "the image is not built here; its command runs"),
    ("003 6.2", "needs LoRATrainer"),
)


def blocks() -> dict[str, str]:
    """Code by name: `000 bash`, or `003 3.2` after its section."""
    found = [(f"000 {language}", code) for language, code in FENCED.findall(SEED_000)]
    for block in FENCED.finditer(RESTORED_003):
        section = SECTION.findall(RESTORED_003, 0, block.start())[-1]
        found.append((f"003 {section}", block[2]))
    assert len(found) == len(dict(found)), "two blocks have one name"
    return dict(found)


BLOCKS = blocks()
RUN: set[str] = set()


def runs(*names: str) -> pytest.MarkDecorator:
    """For a test that runs these blocks, one after the other: its argument `code`."""
    RUN.update(names)
    code = "".join(BLOCKS[name] for name in names)
    return pytest.mark.parametrize("code", [pytest.param(code, id=" + ".join(names))])


def fill(code: str, placeholders: dict[str, str]) -> str:
    for placeholder, value in placeholders.items():
        assert placeholder in code
        code = code.replace(placeholder, value)
    return code


def run(*argv: str | Path, **environ: str) -> str:
    """The standard output of a command that succeeds. Nothing of it goes through a proxy."""
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [str(word) for word in argv],
        env=env | environ,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def openai_028() -> Path:
    """A Python that has installed what seed 003 says in 2.1: this package with openai==0.28.1.

    It is kept in the checkout, and made again when pyproject.toml or the seed's line changes.
    """
    (line,) = re.findall(r"^pip install .*$", BLOCKS["003 2.1"], re.MULTILINE)
    pip_install = shlex.split(line.replace("deepseek-api-compat", shlex.quote(str(ROOT))), comments=True)
    recipe = json.dumps([*pip_install, (ROOT / "pyproject.toml").read_text(encoding="utf-8")])
    home = ROOT / f".venv-openai028-{sys.version_info.major}.{sys.version_info.minor}"
    stamp = home / "recipe.json"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != recipe:
        # Made beside its place and moved there when complete, as several test runs may want it.
        with tempfile.TemporaryDirectory(prefix=".venv-openai028-", dir=ROOT) as temporary:
            fresh = Path(temporary) / "venv"
            for argv in ([sys.executable, "-m", "venv", fresh], [fresh / "bin/python", "-m", *pip_install]):
                done = subprocess.run(argv, capture_output=True, text=True)
                if done.returncode:
                    pytest.fail(
                        f"No environment for openai==0.28.1 (is the package index reachable?): {argv}\n"
                        f"{done.stdout}{done.stderr}",
                        pytrace=False,
                    )
            (fresh / stamp.name).write_text(recipe, encoding="utf-8")
            shutil.rmtree(home, ignore_errors=True)
            fresh.rename(home)
    return home / "bin/python"


def test_restored_text_is_the_seed_but_for_white_space() -> None:
    unfenced = re.sub(r"^```\w*$", "", RESTORED_003, flags=re.MULTILINE)
    assert "".join(unfenced.split()) == "".join(SEED_003.split())


def test_no_code_is_left_outside_the_blocks() -> None:
    """Every block of 003 has a double quote or an equals sign; its prose has neither."""
    assert all(re.search('["=]', code) for name, code in BLOCKS.items() if name.startswith("003"))
    assert not re.search('["=]', FENCED.sub("", RESTORED_003))
    assert "```" not in FENCED.sub("", SEED_000)


def test_every_block_runs_or_is_listed() -> None:
    assert RUN | {name for name, _ in NOT_RUN} == BLOCKS.keys()
    assert RUN & {name for name, _ in NOT_RUN} == {"003 2.1", "003 5.1"}  # run in part


def test_restored_python_parses() -> None:
    for name, code in BLOCKS.items():
        if name not in ("000 bash", "003 2.1", "003 5.1"):
            ast.parse(code, name)


@pytest.mark.parametrize("block", ["003 6.2"])
def test_what_is_listed_for_want_of_a_name_still_lacks_it(block: str) -> None:
    """Fails when the name arrives: then the block can run."""
    (name,) = re.findall(r"from deepseek_api_compat import (\w+)", BLOCKS[block])
    assert not hasattr(deepseek_api_compat, name)


@runs("000 bash")
def test_curl(code: str, service: Service, tmp_path: Path) -> None:
    # The seed's port is 8000; curl's own configuration leads it to the port that is free here.
    curlrc = f'connect-to = "127.0.0.1:8000:127.0.0.1:{service.port}"\nsilent\nshow-error\nfail-with-body\n'
    (tmp_path / ".curlrc").write_text(curlrc, encoding="utf-8")
    assert "-X Post" in code
    placeholders = {"${ServerIP}": "127.0.0.1", "${ApiKey}": service.key or "", "${ModelName}": "deepseek-v3"}
    answer = json.loads(run("bash", "-c", fill(code, placeholders), CURL_HOME=str(tmp_path)))
    (choice,) = answer["choices"]
    assert choice["message"]["content"].strip()
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["model"] == MODEL
    assert answer["usage"]["total_tokens"] <= 256


@pytest.mark.parametrize("stream", [True, False])
@runs("000 python")
def test_python_program(code: str, stream: bool, service: Service, tmp_path: Path) -> None:
    placeholders = {"${ApiKey}": service.key or "", "${ServerUrl}": f"{service.url}/v1"}
    if not stream:
        placeholders["stream = True"] = "stream = False"
    program = tmp_path / "program.py"
    program.write_text(fill(code, placeholders), encoding="utf-8")
    model, _, answer = run(sys.executable, program).partition("\n")
    assert model == MODEL
    assert answer.strip().removesuffix("None")


@runs("003 3.1", "003 3.2")
def test_compatible_endpoint(code: str, service: Service, tmp_path: Path) -> None:
    placeholders = {
        "https://api.deepseek.com/v1/compat": f"{service.url}/v1/compat",
        "YOUR_DEEPSEEK_API_KEY": service.key or "",
    }
    program = tmp_path / "program.py"
    program.write_text(fill(code, placeholders), encoding="utf-8")
    assert run(sys.executable, program).strip()


# The seed's client is the openai package's; streams that it reads as dictionaries, and plugins, need ours.
CLIENT = """
import sys
from deepseek_api_compat import OpenAI
client = OpenAI(api_key=sys.argv[1], base_url=sys.argv[2])
"""


@runs("003 2.2")
def test_temporary_token(code: str, service: Service) -> None:
    made = json.loads(service.command("keys", "create", "seed", "--json"))
    filled = fill(code, {"DSK-XXXXXX": made["api_key"], "YOUR_SECRET_KEY": made["secret_key"]})
    token = run(sys.executable, "-c", f"{filled}\nprint(token)").strip()
    with service.client(token) as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == MODEL


@runs("003 3.3.1")
def test_stream_handler(code: str, service: Service) -> None:
    messages = '[{"role": "user", "content": "Where is Paris?"}]'
    program = CLIENT + fill(code, {"[...]": messages, "stream=True": "stream=True, max_tokens=12"})
    answer = run(sys.executable, "-c", program, service.key or "", f"{service.url}/v1/compat")
    assert answer.strip()
    assert "None" not in answer


@runs("003 3.3.2")
def test_picture(code: str, service: Service) -> None:
    """The seed's picture is one of ours; what stands in it is part of the prompt."""
    files = Files(drawn("Torque 45 Nm", format_="JPEG"))
    try:
        url = {"https://example.com/image.jpg": f"{files.url}/image.jpg"}
        asked = "\nprint(response.usage.prompt_tokens, response.choices[0].message.content)"
        out = run(
            sys.executable, "-c", CLIENT + fill(code, url) + asked, service.key or "", f"{service.url}/v1"
        )
    finally:
        files.close()
    assert files.paths == ["/image.jpg"]
    tokens, _, answer = out.partition(" ")
    with service.client() as http:
        question = [{"role": "user", "content": "描述这张图片中的技术细节"}]
        alone = http.post("/tokenize", json={"messages": question}).json()["count"]
    assert int(tokens) > alone + 20
    assert answer.strip()


@runs("003 6.1")
def test_plugin(code: str, service: Service) -> None:
    asked = """
call = dict(model="deepseek-v3", max_tokens=1)
for text in ("写一段文字", "写一段Python代码"):
    messages = [{"role": "user", "content": text}]
    print(client.chat.completions.create(messages=messages, **call).usage.prompt_tokens, len(messages))
"""
    out = run(sys.executable, "-c", CLIENT + code + asked, service.key or "", f"{service.url}/v1")
    plain, coding = [[int(word) for word in line.split()] for line in out.splitlines()]
    assert coding[0] > plain[0] + 10, "the plugin has added a message"
    assert coding[1] == 1, "to the request, not to the caller's list"


@runs("003 2.1")
def test_install_line(code: str, openai_028: Path) -> None:
    report = (
        "from importlib.metadata import version; print(version('deepseek-api-compat'), version('openai'))"
    )
    installed = run(openai_028, "-c", report).split()
    assert installed == [deepseek_api_compat.__version__, "0.28.1"]
    assert "openai==0.28.1" in code


OLD_STYLE = """
import sys, openai
openai.api_key, openai.api_base = sys.argv[1:]
"""


@runs("003 3.2")
def test_text_generation_with_openai_028(
    code: str, service: Service, openai_028: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    call = fill(code, {"client.chat.completions.create": "openai.ChatCompletion.create"})
    program.write_text(OLD_STYLE + call, encoding="utf-8")
    assert run(openai_028, program, service.key or "", f"{service.url}/v1/compat").strip()


OLD_STREAM = """
import json
call = dict(model="deepseek-v3", messages=[{"role": "user", "content": "Where is Paris?"}], temperature=0)
call |= dict(max_tokens=12)
whole = openai.ChatCompletion.create(**call)
parts, reasons = [], []
for chunk in openai.ChatCompletion.create(**call, stream=True):
    parts.append(chunk.choices[0].delta.get("content", ""))
    reasons.append(chunk.choices[0].finish_reason)
openai.api_key = "DSK-wrong"
try:
    openai.ChatCompletion.create(**call)
except openai.error.AuthenticationError as error:
    refused = error.http_status
print(json.dumps([whole.choices[0].message.content, parts, reasons, refused]))
"""


def test_stream_and_error_with_openai_028(service: Service, openai_028: Path) -> None:
    out = run(openai_028, "-c", OLD_STYLE + OLD_STREAM, service.key or "", f"{service.url}/v1/compat")
    whole, parts, reasons, refused = json.loads(out)
    assert "".join(parts) == whole
    assert len(parts) > 3
    assert [reason for reason in reasons if reason] == ["length"]
    assert refused == 401


@runs("003 5.1")
def test_container_command(code: str, tmp_path: Path) -> None:
    """The image's CMD starts the service: four workers, on every address."""
    words = json.loads(code.split("CMD", 1)[1].replace("\\\n", ""))
    assert words[0] == "/opt/deepseek/bin/start_server"
    assert (BIN / "start_server").is_file()
    models = tmp_path / "models" / "deepseek-v3"
    models.mkdir(parents=True)
    (models / default_model().name).symlink_to(default_model())
    filled = {"--model-path=/models": f"--model-path={models.parent}", "--port=8080": "--port=0"}
    arguments = [fill(word, {old: new for old, new in filled.items() if old in word}) for word in words[1:]]
    service = Service(tmp_path / "data", *arguments, command="start_server")
    try:
        assert len(service.workers()) == 4
        assert "not opened" not in service.output
        with service.client() as http:
            question = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "Hello"}]}
            answer = http.post("/v1/chat/completions", json=question | {"max_tokens": 4}).json()
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        exit_code = service.stop()
    assert exit_code == 0
