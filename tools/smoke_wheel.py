"""Install the built wheel as people do, and use each part: client, gateway, embedded engine.

    python tools/smoke_wheel.py dist

Each extra gets a clean virtual environment. Exits with 1 and a sentence at the first thing that fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLIENT = """
import sys
from deepseek_api_compat import AsyncOpenAI, OpenAI
import openai
assert issubclass(OpenAI, openai.OpenAI) and issubclass(AsyncOpenAI, openai.AsyncOpenAI)
assert OpenAI(api_key="x").base_url.host == "127.0.0.1"
heavy = {"uvicorn", "msgspec", "torch", "sqlalchemy", "xllamacpp", "PIL", "rapidocr"} & set(sys.modules)
assert not heavy, heavy
"""

OLD = """
import openai
from deepseek_api_compat import AudioInput, AuthManager, ImageInput
assert openai.ChatCompletion and openai.VERSION == "0.28.1"
assert ImageInput(url="https://example.com/a.png")["type"] == "image_url"
assert AuthManager(api_key="DSK-abcdefghijkl-" + "x" * 43, secret_key="s").generate_token().startswith("eyJ")
try:
    from deepseek_api_compat import OpenAI
except ImportError as error:
    print(error)
"""

CALL = """
import sys
from deepseek_api_compat import OpenAI
client = OpenAI(api_key=sys.argv[1], base_url=sys.argv[2])
answer = client.chat.completions.create(
    model="deepseek-v3", max_tokens=16, messages=[{"role": "user", "content": "Where is Paris?"}]
)
assert answer.choices[0].message.content and answer.usage.completion_tokens, answer
print(answer.choices[0].message.content)
"""


def run(*argv: str | Path) -> str:
    done = subprocess.run([str(part) for part in argv], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"smoke_wheel: {' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def environment(folder: Path, requirement: str) -> Path:
    """A clean virtual environment with `requirement`; returns its bin folder."""
    run(sys.executable, "-m", "venv", folder)
    constraints = Path(__file__).parent.parent / "constraints.txt"
    run(folder / "bin/python", "-m", "pip", "install", "--quiet", "-c", constraints, requirement)
    return folder / "bin"


def first_line(process: subprocess.Popen[str], start: str, seconds: float) -> str:
    """The first line of output with `start` in it, without it."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    for line in process.stdout:
        if start in line:
            return line.split(start)[1].split()[0]
        if time.monotonic() > deadline:
            break
    sys.exit(f"smoke_wheel: the service never printed {start!r}")


def main() -> int:
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        client = environment(work / "client", str(wheel))
        run(client / "python", "-c", CLIENT)
        print("client: imported", run(client / "deepseek-api", "version").strip())

        # As documents of old say it: pip finds the package in a folder, beside a release without clients.
        run(sys.executable, "-m", "venv", work / "old")
        old = work / "old" / "bin"
        found = [old / "pip", "install", "--quiet", "--find-links", wheel.parent]
        run(*found, "deepseek-api-compat", "openai==0.28.1")
        said = run(old / "python", "-c", OLD)
        if "pip install -U openai" not in said or "openai.api_base" not in said:
            sys.exit(f"smoke_wheel: with openai 0.28.1 OpenAI says {said!r}")
        print("openai 0.28.1:", said.strip())

        server = environment(work / "server", f"{wheel}[server]")
        data = work / "data"
        key = run(server / "deepseek-api", "keys", "create", "smoke", "--quiet", "--data-dir", data).strip()
        run(server / "python", "-c", "import deepseek_api_compat.gateway.app")
        print("server: key made", key[:4] + "...")

        embedded = environment(work / "embedded", f"{wheel}[embedded]")
        serve = [embedded / "deepseek-api", "serve", "--port", "0", "--data-dir", data]
        process = subprocess.Popen(
            list(map(str, serve)), stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        try:
            url = first_line(process, "local     ", 300)
            print("embedded:", run(client / "python", "-c", CALL, key, url).strip())
        finally:
            process.send_signal(signal.SIGINT)
            if process.wait(60):
                sys.exit("smoke_wheel: the service did not end with 0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
